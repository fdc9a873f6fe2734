# /// script
# dependencies = ["trl-score"]
# ///
"""
Train a model to correct its own mathematics.

    accelerate launch examples/math.py

trains the tiny embedded model on the embedded arithmetic task: no network, no GPU, about a minute on 2 CPU cores. Expect
Accuracy@t2 to rise from 55 % to above 95 % on held-out problems.

    accelerate launch examples/math.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --use_peft --load_in_4bit --output_dir outputs/qwen

trains any causal language model on any dataset (Hub id, folder, or a .json/.jsonl file) with a column `prompt` (chat
messages or text; else `problem` or `question`, as the user's message) and a column `solution` (or `answer`), which
math-verify compares. Every field of SCoReConfig and of TRL's ModelConfig is an argument; `--config FILE.yaml` reads them from a file.
"""

import sys


sys.path.pop(0)  # this folder: to Python its math.py would be the standard library's

import json
from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers import ProgressCallback
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from trl_score import SCoReConfig, SCoReTrainer
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


EMBEDDED = ["--config", str(Path(__file__).parent / "configs" / "arithmetic.yaml")]
LABELS = {
    "accuracy_t1": "Accuracy@t1",
    "accuracy_t2": "Accuracy@t2",
    "delta_t1_t2": "Δ(t1,t2)",
    "delta_i_to_c": "Δ(i→c)",
    "delta_c_to_i": "Δ(c→i)",
    "changed_ratio": "changed",
}


def percent(share: float | None) -> float:
    """In percent; not a number where no attempt could be graded."""
    return float("nan") if share is None else 100 * share


class Progress(ProgressCallback):
    """The progress bar, and one short line for each log; the trackers of `--report_to` get all of it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "stage" in logs:
            values = "  ".join(f"{label} {percent(logs[name]):5.1f}" for name, label in LABELS.items())
            self.training_bar.write(f"step {state.global_step:>5}  stage {logs['stage']:.0f}  {values}")


def load_rows(script_args: ScriptArguments) -> DatasetDict:
    name, split = script_args.dataset_name, script_args.dataset_train_split
    if name is None:
        sys.exit("Which problems? Give --dataset_name: a Hub id, a folder, a .json or .jsonl file, or 'arithmetic'.")
    try:
        if name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
            rows = load_dataset("json", data_files={split: name})
        else:
            rows = load_dataset(name, name=script_args.dataset_config)
    except Exception as error:  # of whatever kind: what failed is said in one line
        sys.exit(f"The dataset '{name}' cannot be had: {str(error).splitlines()[0]}")
    if split not in rows:
        sys.exit(f"The dataset '{name}' has no split '{split}', only {sorted(rows)}. Set --dataset_train_split.")
    columns = rows[split].column_names
    problem = next((column for column in ("problem", "question") if column in columns), None)
    if "prompt" not in columns and problem is not None:
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row[problem]}]}, remove_columns=problem)
    if "solution" not in columns and "answer" in columns:
        rows = rows.rename_column("answer", "solution")
    return rows


def reward(completions, solution, **kwargs):
    """TRL's `accuracy_reward` (math-verify), also for plain text."""
    messages = [[{"content": text}] if isinstance(text, str) else text for text in completions]
    return accuracy_reward(messages, solution, **kwargs)


def main():
    arguments = sys.argv[1:]
    if not {argument.split("=")[0] for argument in arguments} & {"--model_name_or_path", "--dataset_name", "--config"}:
        arguments = EMBEDDED + arguments
    script_args, args, model_args = TrlParser((ScriptArguments, SCoReConfig, ModelConfig)).parse_args_and_config(
        arguments
    )

    if script_args.dataset_name == Arithmetic.name:
        task = Arithmetic()
        rows = DatasetDict({"train": task.load("train"), "test": task.load("test")})
        grade, args.correction_instruction = task.reward, task.correction_instruction
        model_args.model_name_or_path = model_args.model_name_or_path or str(BASE_MODEL_PATH)
    else:
        rows, grade = load_rows(script_args), reward
    if model_args.model_name_or_path is None:
        sys.exit("Which model? Give --model_name_or_path: a Hub id or a folder.")
    eval_rows = rows.get(script_args.dataset_test_split)
    args.eval_on_start = eval_rows is not None
    args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    try:
        trainer = SCoReTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=grade,
            args=args,
            train_dataset=rows[script_args.dataset_train_split],
            eval_dataset=eval_rows,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except OSError as error:
        sys.exit(f"The model '{model_args.model_name_or_path}' cannot be had: {str(error).splitlines()[0]}")
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if eval_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if eval_rows is not None:
        report(trainer)


def report(trainer: SCoReTrainer):
    """Print base and trained side by side, three rollouts and where the time went; write the numbers."""
    problems = trainer.eval_dataset.select(range(min(3, len(trainer.eval_dataset))))
    rollouts = trainer.generate_attempts(problems["prompt"])
    if not trainer.is_world_process_zero():
        return
    evaluations = [log for log in trainer.state.log_history if "eval_stage" in log]
    table = {label: [percent(evaluations[i][f"eval_{name}"]) for i in (0, -1)] for name, label in LABELS.items()}
    table["unchanged attempts"] = [100 - changed for changed in table.pop("changed")]
    print(f"\n{len(trainer.eval_dataset)} held-out problems, greedy decoding, percent{'base':>10}{'SCoRe':>10}")
    for label, (base, score) in table.items():
        print(f"{label:<46}{base:>10.1f}{score:>10.1f}")
    for problem, attempts in zip(problems["prompt"], rollouts, strict=True):
        print(f"\nproblem    {problem if isinstance(problem, str) else problem[-1]['content']}")
        for k, attempt in enumerate(attempts, start=1):
            print(f"attempt {k}  {attempt}")

    steps = [log for log in trainer.state.log_history if "step_time" in log]
    mean = {
        name: sum(log[name] for log in steps) / len(steps)
        for name in ("step_time", "time/batch", "time/rollout", "time/reference")
    }
    total = next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log)
    seconds = {
        "rollouts": mean["time/rollout"],
        "reference": mean["time/reference"],
        "updates": mean["step_time"] - mean["time/batch"],
    }
    shares = ", ".join(
        f"{name} {100 * value * trainer.state.max_steps / total:.0f} %" for name, value in seconds.items()
    )
    print(f"\n{total:.0f} s of training: {shares}, the rest evaluation, optimizer, rewards and bookkeeping")
    numbers = {
        "table": table,
        "num_problems": len(trainer.eval_dataset),
        "seed": trainer.args.seed,
        "train_seconds": total,
    }
    Path(trainer.args.output_dir, "self_correction.json").write_text(json.dumps(numbers, indent=2))
    print(f"Model, metrics and model card: {Path(trainer.args.output_dir).resolve()}")


if __name__ == "__main__":
    main()
