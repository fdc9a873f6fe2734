"""From arguments to a trained model with its table: `trl-score train`, and what the example scripts share."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .collection import with_first_attempts
from .evaluation import disconnect
from .metrics import label
from .score_config import SCoReConfig
from .score_trainer import SCoReTrainer
from .tasks import TASKS, Arithmetic, Task, get_task
from .tasks.arithmetic import BASE_MODEL_PATH
from .tasks.base import first


SHOWN = ("accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i")
LABELS = {name: label(name) for name in SHOWN} | {"changed_ratio": "changed"}


@dataclass
class TaskArguments:
    """
    Which problems, for a script that trains on a task of [`trl_score.tasks`].

    Args:
        task (`str`, *optional*):
            Name of the task to train on.
        eval_task (`str`, *optional*):
            Name of the task to evaluate on, if another.
        data_dir (`str`, *optional*):
            Folder with the rows as JSON lines (docs/tasks.md). By default, they come from the Hub.
        num_train_problems (`int`, *optional*):
            Take only the first problems of the training split.
        num_eval_problems (`int`, *optional*):
            Take only the first problems of the test split. 0: no evaluation.
    """

    task: str | None = field(default=None, metadata={"help": f"Task to train on: {', '.join(TASKS)}."})
    eval_task: str | None = field(default=None, metadata={"help": "Task to evaluate on, if another."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the rows as JSON lines. By default, they come from the Hub."}
    )
    num_train_problems: int | None = field(
        default=None, metadata={"help": "Take only the first problems of the training split."}
    )
    num_eval_problems: int | None = field(
        default=None, metadata={"help": "Take only the first problems of the test split. 0: no evaluation."}
    )


@dataclass
class TrainArguments(TaskArguments):
    """
    Which problems to train on by reinforcement.

    Args:
        first_attempts (`str`, *optional*):
            Folder of `trl-score collect` with first attempts at the problems to train on, for `offline_first_attempts`.
    """

    first_attempts: str | None = field(
        default=None,
        metadata={"help": "Folder of `trl-score collect` with first attempts, for `offline_first_attempts`."},
    )


def load_tasks(arguments: TaskArguments) -> tuple[Task, Task | None]:
    """
    The task to train on, and the one to evaluate on, if any.

    Raises:
        `SystemExit`: If they cannot be had, with one line that says why.
    """
    try:
        task = get_task(arguments.task, data_dir=arguments.data_dir)
        if arguments.num_eval_problems == 0:
            return task, None
        if arguments.eval_task in (None, arguments.task):
            return task, task
        other = {"sandbox": task.sandbox} if hasattr(task, "sandbox") else {}
        return task, get_task(arguments.eval_task, data_dir=arguments.data_dir, **other)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))


def load_task(arguments: TrainArguments) -> tuple[Task, Dataset, Dataset | None]:
    """
    The task, its problems to train on, and those to evaluate on, if any.

    Raises:
        `SystemExit`: If they cannot be had, with one line that says why.
    """
    task, eval_task = load_tasks(arguments)
    try:
        train_rows = first(task.load("train"), arguments.num_train_problems)
        if arguments.first_attempts is not None:
            train_rows = with_first_attempts(train_rows, arguments.first_attempts, task)
        eval_rows = None if eval_task is None else first(eval_task.load("test"), arguments.num_eval_problems)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))
    return task, train_rows, eval_rows


def init_kwargs(args, model_args: ModelConfig) -> dict:
    """What the model is loaded with: `model_init_kwargs`, and what `ModelConfig` says of it."""
    names = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}
    return {name: getattr(model_args, field) for name, field in names.items()} | (args.model_init_kwargs or {})


def percent(share: float | None) -> float:
    """In percent; not a number where no attempt could be graded."""
    return float("nan") if share is None else 100 * share


class Progress(ProgressCallback):
    """The progress bar, and one short line for each log; the trackers of `--report_to` get all of it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "stage" in logs:
            values = "  ".join(f"{label} {percent(logs[name]):5.1f}" for name, label in LABELS.items() if name in logs)
            self.training_bar.write(f"step {state.global_step:>5}  stage {logs['stage']:.0f}  {values}")


def train(
    train_rows: Dataset,
    eval_rows: Dataset | None,
    reward,
    args: SCoReConfig,
    model_args: ModelConfig,
    correction_instruction: str | None = None,
    task: str | None = None,
    eval_task: str | None = None,
) -> SCoReTrainer:
    """
    Train, evaluate before and after, save the model with its card, print the table.

    Args:
        train_rows, eval_rows (`~datasets.Dataset`):
            Problems, with the columns that the reward reads.
        reward (`Callable`):
            A TRL reward function.
        args (`SCoReConfig`):
            Settings.
        model_args (`~trl.ModelConfig`):
            The model, its quantization and its adapter.
        correction_instruction (`str`, *optional*):
            The instruction of the task, used if `args` has none.
        task, eval_task (`str`, *optional*):
            Names of the tasks that the problems are from, for the model card. The second defaults to the first.

    Raises:
        `SystemExit`: If the model cannot be had.
    """
    if model_args.model_name_or_path is None:
        sys.exit("Which model? Give --model_name_or_path: a Hub id or a folder.")
    if args.correction_instruction is None:
        args.correction_instruction = correction_instruction
    args.eval_on_start = eval_rows is not None
    args.model_init_kwargs = init_kwargs(args, model_args)
    try:
        trainer = SCoReTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=reward,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except OSError as error:
        sys.exit(f"The model '{model_args.model_name_or_path}' cannot be had: {str(error).splitlines()[0]}")
    trainer.task, trainer.eval_task = task, eval_task or task
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if eval_rows is not None:
        show(trainer)
    disconnect()
    return trainer


def show(trainer: SCoReTrainer) -> None:
    """Print base and trained side by side, three rollouts and where the time went; write the numbers."""
    problems = trainer.eval_dataset.select(range(min(3, len(trainer.eval_dataset))))
    rollouts = trainer.generate_attempts(problems["prompt"])
    if not trainer.is_world_process_zero():
        return
    evaluations = [log for log in trainer.state.log_history if "eval_stage" in log]
    table = {label: [percent(evaluations[i][f"eval_{name}"]) for i in (0, -1)] for name, label in LABELS.items()}
    table["unchanged attempts"] = [100 - changed for changed in table.pop("changed")]
    print(f"\n{len(trainer.eval_dataset)} held-out problems, greedy decoding, percent{'base':>10}{'SCoRe':>10}")
    for name, (base, score) in table.items():
        print(f"{name:<46}{base:>10.1f}{score:>10.1f}")
    for problem, attempts in zip(problems["prompt"], rollouts, strict=True):
        print(f"\nproblem    {problem if isinstance(problem, str) else problem[-1]['content']}")
        for k, attempt in enumerate(attempts, start=1):
            print(f"attempt {k}  {attempt}")

    total = next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log)
    print(f"\n{total:.0f} s of training{shares_of_time(trainer, total)}")
    numbers = {
        "table": table,
        "num_problems": len(trainer.eval_dataset),
        "seed": trainer.args.seed,
        "train_seconds": total,
    }
    Path(trainer.args.output_dir, "self_correction.json").write_text(json.dumps(numbers, indent=2))
    print(f"Model, metrics and model card: {Path(trainer.args.output_dir).resolve()}")


def shares_of_time(trainer: SCoReTrainer, total: float) -> str:
    """Where `total` seconds went; nothing where the run was shorter than `logging_steps`."""
    steps = [log for log in trainer.state.log_history if "step_time" in log]
    if not steps:
        return ""
    names = ("step_time", "time/batch", "time/rollout", "time/reference", "time/reward")
    mean = {name: sum(log[name] for log in steps) / len(steps) for name in names}
    seconds = {
        "rollouts": mean["time/rollout"],
        "reference": mean["time/reference"],
        "rewards": mean["time/reward"],
        "updates": mean["step_time"] - mean["time/batch"],
    }
    shares = [f"{name} {100 * value * trainer.state.max_steps / total:.0f} %" for name, value in seconds.items()]
    return f": {', '.join(shares)}, the rest evaluation, optimizer and bookkeeping"


def main() -> None:
    """A process of `trl-score train`."""
    task_args, args, model_args = TrlParser((TrainArguments, SCoReConfig, ModelConfig)).parse_args_and_config()
    if task_args.task is None:
        sys.exit(f"Which problems? Give --task: {', '.join(TASKS)}.")
    if task_args.task == Arithmetic.name and model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(BASE_MODEL_PATH)
    task, train_rows, eval_rows = load_task(task_args)
    names = (task.name, task_args.eval_task)
    train(train_rows, eval_rows, task.reward, args, model_args, task.correction_instruction, *names)


if __name__ == "__main__":
    main()
