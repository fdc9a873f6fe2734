# /// script
# dependencies = ["trl-score"]
# ///
"""
Train a model to correct its own mathematics.

    accelerate launch examples/math.py

trains the tiny embedded model on the embedded arithmetic task: no network, no GPU, less than a minute on 2 CPU cores. Expect
Accuracy@t2 to rise from 68 % to above 95 % on held-out problems.

    accelerate launch examples/math.py --config examples/configs/math_1.5b_lora.yaml

trains Qwen2.5-1.5B-Instruct on MATH in the paper's split, on one GPU with 24 GB (estimated; docs/one_gpu.md has other models and
sizes). The problems come from the Hub or, with `--data_dir`, from a folder.

    accelerate launch examples/math.py --dataset_name trl-lib/DeepMath-103K --model_name_or_path ...

trains on any dataset (Hub id, folder, or a .json/.jsonl file) with a column `prompt` (chat messages or text; else
`problem` or `question`, as the user's message) and a column `solution` (or `answer`), which math-verify compares. Every
field of SCoReConfig and of TRL's ModelConfig is an argument; `--config FILE.yaml` reads them from a file.
"""

import sys


sys.path.pop(0)  # this folder: to Python its math.py would be the standard library's

import os
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.rewards import accuracy_reward

from trl_score import SCoReConfig
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.tasks.base import first
from trl_score.training import TrainArguments, load_task, train


EMBEDDED = ["--config", str(Path(__file__).parent / "configs" / "arithmetic.yaml")]


def load_rows(script_args: ScriptArguments) -> DatasetDict:
    name, split = script_args.dataset_name, script_args.dataset_train_split
    if name is None:
        sys.exit("Which problems? Give --task, or --dataset_name: a Hub id, a folder, a .json or .jsonl file.")
    try:
        if name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
            rows = load_dataset("json", data_files={split: name})
        else:
            rows = load_dataset(name, name=script_args.dataset_config)
    except Exception as error:  # of whatever kind: what failed is said in one line
        sys.exit(f"The dataset '{name}' cannot be loaded: {str(error).splitlines()[0]}")
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
    arguments, named = sys.argv[1:], {"--model_name_or_path", "--dataset_name", "--task", "--config"}
    if not {argument.split("=")[0] for argument in arguments} & named:
        arguments = EMBEDDED + arguments
        # `accelerate launch` leaves a process on a CPU one thread.
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("WORLD_SIZE", "1"))))
    parser = TrlParser((TrainArguments, ScriptArguments, SCoReConfig, ModelConfig))
    task_args, script_args, args, model_args = parser.parse_args_and_config(arguments)
    if task_args.task is not None:
        task, train_rows, eval_rows = load_task(task_args, model_args)
        if task_args.task == Arithmetic.name and model_args.model_name_or_path is None:
            model_args.model_name_or_path = str(BASE_MODEL_PATH)
        names = (task.name, task_args.eval_task)
        train(
            train_rows,
            eval_rows,
            task.reward,
            args,
            model_args,
            task.correction_instruction,
            *names,
            task_args.callbacks(),
        )
    else:
        rows = load_rows(script_args)
        eval_rows = rows.get(script_args.dataset_test_split)
        eval_rows = None if eval_rows is None else first(eval_rows, task_args.num_eval_problems)
        train_rows = first(rows[script_args.dataset_train_split], task_args.num_train_problems)
        train(train_rows, eval_rows, reward, args, model_args, callbacks=task_args.callbacks())


if __name__ == "__main__":
    main()
