# /// script
# dependencies = ["trl-score"]
# ///
"""
Train a model to correct its own mathematics.

    accelerate launch examples/math.py

trains the tiny embedded model on the embedded arithmetic task. It needs no network and no GPU, and takes less than a minute on 2 CPU
cores. Expect Accuracy@t2 to rise from 68 % to above 95 % on held-out problems.

    accelerate launch examples/math.py --config examples/configs/math_1.5b_lora.yaml

trains Qwen2.5-1.5B-Instruct on MATH in the paper's split, on one GPU with 24 GB (estimated; docs/one_gpu.md has other models and
sizes). The problems come from the Hub or, with `--data_dir`, from a folder.

    accelerate launch examples/math.py --dataset_name trl-lib/DeepMath-103K --model_name_or_path ...

trains on any dataset (Hub id, folder, or a .json/.jsonl file). It has a column `prompt` (chat messages or text), or a column `problem`
or `question`, which becomes the user's message. math-verify compares answers with the column `solution` (or `answer`). Every field of SCoReConfig and of TRL's ModelConfig is an argument; `--config FILE.yaml` reads them from a file. `trl-score train`
takes the same arguments.
"""

import sys


sys.path.pop(0)  # this folder: to Python its math.py would be the standard library's

from pathlib import Path

from trl_score import training


EMBEDDED = ["--config", str(Path(__file__).parent / "configs" / "arithmetic.yaml")]


def main():
    arguments, named = sys.argv[1:], {"--model_name_or_path", "--dataset_name", "--task", "--config"}
    if not {argument.split("=")[0] for argument in arguments} & named:
        arguments = EMBEDDED + arguments
    training.main(arguments)


if __name__ == "__main__":
    main()
