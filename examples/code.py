# /// script
# dependencies = ["trl-score"]
# ///
"""
Train a model to correct its own programs: on MBPP, evaluated on HumanEval, as in the paper.

    HF_ALLOW_CODE_EVAL=1 accelerate launch examples/code.py --config examples/configs/mbpp_1.5b_lora.yaml

trains Qwen2.5-Coder-1.5B-Instruct on one GPU with 24 GB (estimated; docs/one_gpu.md has other sizes).

Grading runs programs that the model wrote, on this machine, in a sandbox: docs/sandbox.md says what it covers and what it
does not. HF_ALLOW_CODE_EVAL=1 is your consent.

The problems come from the Hub or, with `--data_dir`, from a folder; `--eval_task mbpp` evaluates on MBPP's test split. Without
`--config` the coefficients are those of the paper's MBPP column (configs/mbpp.yaml), and the model is `--model_name_or_path`.
Every field of SCoReConfig and of TRL's ModelConfig is an argument; `--config FILE.yaml` reads them from another file.
"""

import sys


sys.path.pop(0)  # this folder: to Python its code.py would be the standard library's

from pathlib import Path

from trl_score import training


PAPER = ["--config", str(Path(__file__).parent / "configs" / "mbpp.yaml")]


def main():
    arguments = sys.argv[1:]
    if "--config" not in {argument.split("=")[0] for argument in arguments}:
        arguments = PAPER + arguments
    training.main(arguments)


if __name__ == "__main__":
    main()
