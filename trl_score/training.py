"""From arguments to a trained model with its table: `trl-score train`, and what the example scripts share."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import is_async_callable

from .arguments import TrainArguments
from .callbacks import CollapseAlarm, trackers
from .collection import with_first_attempts
from .metrics import label
from .model_card import attempts_in, decoding_of, left_out, loaded_weights
from .parsing import Parser
from .records import check_folder, disconnect, write_json
from .resuming import check_no_model, checkpoints, is_whole
from .score_config import SCoReConfig, lacks_bfloat16
from .score_trainer import SCoReTrainer
from .tasks import Arithmetic, Task
from .tasks.arithmetic import BASE_MODEL_PATH
from .tasks.base import first, first_line, text_of
from .tasks.dataset import DatasetTask


EXAMPLES = ("i→c", "c→c", "i→i")  # first and last attempt, right (c) or wrong (i)
# The embedded task with its own model, on two CPU cores: `examples/configs/arithmetic.yaml`.
EMBEDDED = {
    "max_completion_length": 8,
    "num_generations": 8,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 1000,
    "max_steps": 80,
    "stage1_steps": 20,
    "learning_rate": 5e-4,
    "warmup_steps": 5,
    "lr_scheduler_type": "constant_with_warmup",
    "adam_beta2": 0.98,
    "max_grad_norm": 0.125,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class TrainConfig(SCoReConfig):
    """
    [`SCoReConfig`] for the command line: on a machine without bfloat16 it is valid, with `bf16=False`, and
    [`check_precision`] speaks of that after all other mistakes.
    """

    def __post_init__(self):
        self.asked_bf16 = self.bf16
        self.lacks_bf16 = lacks_bfloat16(self)
        if self.lacks_bf16:
            self.bf16 = False
        super().__post_init__()


def check_precision(args: SCoReConfig, model: str) -> None:
    """
    The embedded model trains in float32 where there is no bfloat16. For any other one somebody has to say so.

    Raises:
        `SystemExit`: If it was not said, with one sentence.
    """
    if getattr(args, "lacks_bf16", False) and (args.asked_bf16 or model != str(BASE_MODEL_PATH)):
        sys.exit(
            "Training is in bfloat16 by default, and this machine has no GPU with it. Add `--use_cpu` to train on the CPU in "
            "bfloat16, or `--bf16 false` to train in float32."
        )


@contextmanager
def in_one_line():
    """
    What the user can mend ends the process with one line that says so. With `TRL_SCORE_TRACEBACK=1` it is raised.

    Raises:
        `SystemExit`: In place of `OSError`, `ValueError`, `RuntimeError` and `ImportError`.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("TRL_SCORE_TRACEBACK"):
            raise
        sys.exit(" ".join(str(error).split()))


def load_task(
    arguments: TrainArguments, model_args: ModelConfig | None = None
) -> tuple[Task, Task | None, Dataset, Dataset | None]:
    """
    The task to train on and the one to evaluate on, if any, and the problems of each. With `model_args`, stored first attempts
    must be in the tokens of the model.

    Raises:
        `SystemExit`: If they cannot be loaded, with one line that says why.
    """
    with in_one_line():
        task, eval_task = arguments.open_tasks()
        train_rows = first(task.load("train"), arguments.num_train_problems)
        if arguments.first_attempts is not None:
            tokenizer = None
            if model_args is not None and model_args.model_name_or_path is not None:
                where = {"revision": model_args.model_revision}
                tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **where)
            train_rows = with_first_attempts(train_rows, arguments.first_attempts, task, tokenizer)
        eval_rows = None if eval_task is None else first(eval_task.load("test"), arguments.num_eval_problems)
    return task, eval_task, train_rows, eval_rows


def init_kwargs(args, model_args: ModelConfig) -> dict:
    """What the model is loaded with: `model_init_kwargs`, and what `ModelConfig` says of it."""
    names = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}
    return {name: getattr(model_args, field) for name, field in names.items()} | (args.model_init_kwargs or {})


def percent(share: float | None) -> float:
    """In percent; not a number where no attempt could be graded."""
    return float("nan") if share is None else 100 * share


class Progress(ProgressCallback):
    """
    The progress bar, which counts from the step that a run resumes from, and one line for each log; the trackers of
    `--report_to` get all of it.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.reset(total=state.max_steps)  # forgets the time since it was made, too
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step
            self.training_bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "stage" in logs:
            self.training_bar.write(line_of(state.global_step, logs))


def labels_of(num_attempts: int) -> dict[str, str]:
    """The metrics that the console shows of so many attempts: their keys in the logs, and their labels."""
    names = [*(f"accuracy_t{k}" for k in range(1, num_attempts + 1)), f"delta_t1_t{num_attempts}"]
    return {name: label(name) for name in (*names, "delta_i_to_c", "delta_c_to_i")} | {"changed_ratio": "changed"}


def line_of(step: int, logs: dict) -> str:
    """A log in one line: shares in percent, KL in nats per token, tokens sampled so far, seconds per step."""
    parts = [f"step {step:>5}", f"stage {logs['stage']:.0f}"]
    labels = labels_of(attempts_in(logs))
    parts += [f"{name} {percent(logs[key]):5.1f}" for key, name in labels.items() if key in logs]
    if "kl" in logs:
        parts.append(f"KL {logs['kl']:.4f}")
    if "num_generated_tokens" in logs:
        parts.append(f"{logs['num_generated_tokens']:,.0f} tokens")
    if "step_time" in logs:
        parts.append(f"{logs['step_time']:.1f} s/step")
    return "  ".join(parts)


@contextmanager
def interruptible(say: Callable[[], str]):
    """
    Ctrl-C ends the process with one line, by the first process.

    Raises:
        `SystemExit`: With code 130, in place of `KeyboardInterrupt`.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nInterrupted. {say()}", file=sys.stderr)
        sys.exit(130)


def kept(trainer: SCoReTrainer) -> str:
    """What is left of a training that was interrupted, and how to continue it."""
    args, state = trainer.args, trainer.state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Progress) and callback.training_bar is not None:
            callback.on_train_end(args, state, trainer.control)  # closes the bar, so that the line is the last one
    done = f"{state.global_step} of {state.max_steps} steps were done"
    whole = next((path for path in checkpoints(Path(args.output_dir)) if is_whole(path)), None)
    if whole is not None:
        return f"{done}; '{whole}' is kept. The same command with `--resume_from_checkpoint true` continues from it."
    return f"{done}, and nothing is kept: no checkpoint was written yet (`--save_steps`, `--save_strategy`)."


def checkpoint_to_resume(args: SCoReConfig) -> str | None:
    """
    What `resume_from_checkpoint` says: a checkpoint's folder, or "true" for the last complete one in the output folder.

    Raises:
        `SystemExit`: If there is no such checkpoint, or if nothing is said and the output folder has some or a trained model,
            with one sentence.
    """
    asked, folder = args.resume_from_checkpoint, Path(args.output_dir)
    found = [path for path in checkpoints(folder) if is_whole(path)]
    if str(asked).lower() == "true":
        if not found:
            sys.exit(
                f"`--resume_from_checkpoint true` resumes from the last checkpoint in '{folder}', but there is none. Leave the "
                "option out to start a run, or give another `--output_dir`."
            )
        return str(found[0])
    if asked is None or str(asked).lower() == "false":
        if found:
            sys.exit(
                f"'{folder}' has checkpoints of an earlier run. Resume that run with `--resume_from_checkpoint true`, or "
                "start a new one with another `--output_dir`."
            )
        with in_one_line():
            check_no_model(folder)
        return None
    if not is_whole(asked):
        sys.exit(
            f"`--resume_from_checkpoint {asked}` is no checkpoint: it has no {TRAINER_STATE_NAME}. Give the folder of a "
            "checkpoint, or `true` for the last one in the output folder."
        )
    return str(asked)


def with_examples(reward, examples: dict[str, tuple], num_attempts: int):
    """
    The reward function, which now also keeps the first rollout of each kind that it grades, with its verdicts; of several, the
    first one does, which says whether an attempt is right. One that is no plain function is left as it is.

    Args:
        reward (`Callable` or `list[Callable]`):
            A TRL reward function, or several.
        examples (`dict[str, tuple]`):
            Where they are kept: by kind, the problem and a list of texts with verdicts.
        num_attempts (`int`):
            Attempts in a rollout.
    """
    if isinstance(reward, list):
        return [with_examples(reward[0], examples, num_attempts), *reward[1:]]
    if not inspect.isroutine(reward) or inspect.iscoroutinefunction(reward):
        return reward
    attempts = []  # of the batch: for each row, text and whether it is right

    @wraps(reward)
    def call(*, prompts, completions, attempt, **kwargs):
        rewards = reward(prompts=prompts, completions=completions, attempt=attempt, **kwargs)
        if not hasattr(rewards, "__len__") or len(rewards) != len(completions):
            return rewards  # which the trainer refuses
        if attempt == 1:
            attempts[:] = [[] for _ in completions]
        for row, completion, value in zip(attempts, completions, rewards, strict=True):
            row.append((text_of(completion), value))
        if attempt == num_attempts:
            for prompt, row in zip(prompts, attempts, strict=True):
                if all(value is not None and value == value for _, value in row):  # graded, and not NaN
                    kind = "→".join("c" if row[i][1] >= 1 else "i" for i in (0, -1))
                    examples.setdefault(kind, (text_of(prompt), [(text, value >= 1) for text, value in row]))
        return rewards

    return call


def by_mode(reward, eval_reward: Callable, is_training: Callable[[], bool]):
    """
    The reward function, or in evaluation that of another task; async if one of the two is. Of several, the others abstain in
    evaluation.

    Args:
        reward (`Callable` or `list[Callable]`):
            A TRL reward function, or several.
        eval_reward (`Callable`):
            The one of the evaluation.
        is_training (`Callable`):
            Whether the attempts are those of training.
    """
    if isinstance(reward, list):
        abstain = lambda completions, **kwargs: [None] * len(completions)  # noqa: E731
        others = [by_mode(each, abstain, is_training) for each in reward[1:]]
        return [by_mode(reward[0], eval_reward, is_training), *others]

    def call(**kwargs):
        return (reward if is_training() else eval_reward)(**kwargs)

    if not is_async_callable(reward) and not is_async_callable(eval_reward):
        return wraps(reward)(call)

    @wraps(reward)
    async def call_async(**kwargs):
        rewards = call(**kwargs)
        return await rewards if inspect.isawaitable(rewards) else rewards

    return call_async


def train(
    train_rows: Dataset,
    eval_rows: Dataset | None,
    reward,
    args: SCoReConfig,
    model_args: ModelConfig,
    correction_instruction: str | None = None,
    task: str | None = None,
    eval_task: str | None = None,
    callbacks: list[TrainerCallback] | None = None,
    eval_reward: Callable | None = None,
) -> SCoReTrainer:
    """
    Train, save the model, evaluate before and after, write the card, print the table. What fails after the model is saved
    costs nothing else, and is told at the end.

    Args:
        train_rows, eval_rows (`~datasets.Dataset`):
            Problems, with the columns that the reward reads.
        reward (`Callable` or `list[Callable]`):
            A TRL reward function, or several, which are added; the first one says whether an attempt is right.
        args (`SCoReConfig`):
            Settings.
        model_args (`~trl.ModelConfig`):
            The model, its quantization and its adapter.
        correction_instruction (`str`, *optional*):
            The instruction of the task, used if `args` has none.
        task, eval_task (`str`, *optional*):
            Names of the tasks that the problems are from, for the model card. The second defaults to the first.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            What watches the run; by default, the collapse alarm.
        eval_reward (`Callable`, *optional*):
            What grades `eval_rows`; by default, `reward`.

    Raises:
        `SystemExit`: If the model cannot be loaded or trained as asked, if the checkpoint to resume is not found, or if
            something failed after the model was saved, with one sentence each.
    """
    if model_args.model_name_or_path is None:
        sys.exit("Which model? Give --model_name_or_path: a Hub id or a folder.")
    with in_one_line():
        check_folder(args.output_dir)
    resume = checkpoint_to_resume(args)
    check_precision(args, model_args.model_name_or_path)
    if args.correction_instruction is None:
        args.correction_instruction = correction_instruction
    args.eval_on_start = eval_rows is not None
    args.model_init_kwargs = init_kwargs(args, model_args)
    examples = {}
    if eval_reward is not None:
        reward = by_mode(reward, eval_reward, lambda: trainer.model.training)
    try:
        trainer = SCoReTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=with_examples(reward, examples, args.num_attempts_eval),
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            callbacks=[CollapseAlarm()] if callbacks is None else callbacks,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if os.environ.get("TRL_SCORE_TRACEBACK"):
            raise
        if "/api/repos/create" in str(error):
            sys.exit(
                f"The repository for `--push_to_hub` cannot be made: {first_line(error)} Is `hf auth login` done?"
            )
        if isinstance(error, OSError | SafetensorError):
            sys.exit(f"The model '{model_args.model_name_or_path}' cannot be loaded: {first_line(error)}")
        sys.exit(" ".join(str(error).split()))
    trainer.task, trainer.eval_task = task, eval_task or task
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)

    with interruptible(lambda: kept(trainer)):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(_internal_call=True)  # first, and the upload last, so that nothing costs the model
    with interruptible(lambda: f"The model is trained and saved in '{args.output_dir}'."):
        finish(trainer, examples, is_evaluated=eval_rows is not None)
    return trainer


def finish(trainer: SCoReTrainer, examples: dict[str, tuple], is_evaluated: bool) -> None:
    """What follows once the model is saved: the last evaluation, the card, the table, the upload."""
    failures = Failures(trainer)
    failures.collect("The training state", trainer.save_state)
    if is_evaluated:
        examples.clear()
        evaluated = failures.collect("The last evaluation", trainer.evaluate)
        failures.collect("The training state", trainer.save_state)
    failures.collect("The model card", trainer.create_model_card)
    if is_evaluated:
        if not evaluated:
            failures.exit()  # at once: other processes may wait for this one in vain
        failures.collect("The table", lambda: show(trainer, examples))
    if trainer.is_world_process_zero():
        print(f"Model, metrics and model card: {Path(trainer.args.output_dir).resolve()}")
    if trainer.args.push_to_hub:
        failures.collect("The upload", trainer.push_to_hub)
    disconnect()
    failures.exit()


class Failures:
    """What has failed after the model was saved. With `TRL_SCORE_TRACEBACK=1` the first failure is raised."""

    def __init__(self, trainer: SCoReTrainer):
        self.trainer, self.found = trainer, []

    def collect(self, name: str, action: Callable) -> bool:
        """Do it, and return whether it worked."""
        try:
            action()
        except Exception as error:
            if os.environ.get("TRL_SCORE_TRACEBACK"):
                raise
            self.add(name, error)
            return False
        return True

    def add(self, name: str, error: Exception) -> None:
        self.found.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())}")

    def exit(self) -> None:
        """Say in one line what has failed, trackers included, and end the process, if there is something."""
        for tracker in trackers(self.trainer.callback_handler.callbacks):
            if (error := getattr(tracker, "failure", None)) is not None:
                self.add(type(tracker).__name__, error)
        if self.found:
            folder = Path(self.trainer.args.output_dir).resolve()
            sys.exit(f"The model is trained and saved in {folder}, but: {'; '.join(self.found)}")


def show(trainer: SCoReTrainer, examples: dict[str, tuple]) -> None:
    """Print base and trained side by side, a rollout of each kind and where the time went; write the numbers."""
    found = gather_object([examples])  # each process has graded its own share
    if not trainer.is_world_process_zero():
        return
    num_attempts = trainer.args.num_attempts_eval
    evaluations = [log for log in trainer.state.log_history if attempts_in(log, "eval_") == num_attempts]
    shown = first, last = evaluations[0], evaluations[-1]
    labels = labels_of(num_attempts)
    table = {label: [percent(log[f"eval_{name}"]) for log in shown] for name, label in labels.items()}
    table["unchanged attempts"] = [100 - changed for changed in table.pop("changed")]
    start = "base" if first["step"] == 0 else f"step {first['step']}"
    print(f"\n{held_out(last)}, {decoding_of(trainer.args)}, percent{start:>10}{'SCoRe':>10}")
    for name, (before, after) in table.items():
        print(f"{name:<46}{before:>10.1f}{after:>10.1f}")
    if held_out(first) != held_out(last):
        print(f"{start}: {held_out(first)}")
    if (loaded := loaded_weights(trainer)) is not None:
        print(f"SCoRe: weights of {loaded}")
    for kind in EXAMPLES:
        for problem, attempts in [each[kind] for each in found if kind in each][:1]:
            print(f"\nproblem    {problem}")
            for k, (attempt, right) in enumerate(attempts, start=1):
                print(f"attempt {k}  {'right' if right else 'wrong'}  {attempt}")

    total = [log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log][-1]
    print(f"\n{total:.0f} s of training{shares_of_time(trainer, total)}")
    numbers = {
        "table": table,
        "steps": [log.get("eval_loaded_step", log["step"]) for log in shown],
        "num_problems": last["eval_num_problems"],
        "seed": trainer.args.seed,
        "train_seconds": total,
    }
    write_json(Path(trainer.args.output_dir, "self_correction.json"), numbers)


def held_out(log: dict) -> str:
    """What an evaluation was measured on. One from before it was logged does not say of how many problems."""
    return f"{log.get('eval_num_problems', 'an unknown number of')} held-out problems{left_out(log, 'eval')}"


def shares_of_time(trainer: SCoReTrainer, total: float) -> str:
    """Where `total` seconds went; nothing where the run was shorter than `logging_steps`."""
    steps = [log for log in trainer.state.log_history if "step_time" in log and log["step"] > trainer._first_step]
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
    done = trainer.state.max_steps - trainer._first_step
    shares = [f"{name} {100 * value * done / total:.0f} %" for name, value in seconds.items()]
    return f": {', '.join(shares)}, the rest evaluation, optimizer and bookkeeping"


def train_parser(arguments: list[str], **kwargs) -> Parser:
    """
    The parser of `trl-score train`. For the embedded task with its own model and without a configuration file, the defaults
    are `EMBEDDED`.
    """
    parser = Parser((TrainArguments, TrainConfig, ModelConfig), "train", launched=True, **kwargs)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--model_name_or_path", "--config"):
        peek.add_argument(name)
    given, _ = peek.parse_known_args(arguments)
    if given.task == Arithmetic.name and given.model_name_or_path is None and given.config is None:
        parser.set_defaults(**EMBEDDED)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """A process of `trl-score train`, and of the example scripts."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with interruptible(lambda: "The training has not begun, and nothing is kept."):
        with in_one_line():
            task_args, args, model_args = train_parser(arguments).parse_args_and_config(arguments)
            check_folder(args.output_dir)
        if task_args.task == Arithmetic.name and model_args.model_name_or_path is None:
            model_args.model_name_or_path = str(BASE_MODEL_PATH)
            # `accelerate launch` leaves a process on a CPU one thread.
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        task, eval_task, train_rows, eval_rows = load_task(task_args, model_args)
        is_dataset = isinstance(task, DatasetTask)
        reward = task.reward_funcs if is_dataset else task.reward
        names = (None, None) if is_dataset else (task.name, None if eval_task is None else eval_task.name)
        eval_reward = None if eval_task in (None, task) else eval_task.reward
        instruction, callbacks = task.correction_instruction, task_args.callbacks()
        train(train_rows, eval_rows, reward, args, model_args, instruction, *names, callbacks, eval_reward)


if __name__ == "__main__":
    main()
