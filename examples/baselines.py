# /// script
# dependencies = ["trl-score"]
# ///
"""
The paper's baselines that fine-tune, STaR and Pair-SFT, on the problems that SCoRe trains on.

    accelerate launch examples/baselines.py

runs STaR (D) on the tiny embedded model and task. It needs no network and no GPU, and takes about two minutes on 2 CPU cores. Add
`--plus true` for D+.

    accelerate launch examples/baselines.py --method pair_sft --task math --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --use_peft --num_samples 64 --output_dir outputs/pair-sft

samples 64 attempts at each problem of MATH, pairs wrong and right attempts, fine-tunes an adapter on the pairs, and evaluates the
base model and the trained model. `--task gsm8k` and `--task mbpp` use other problems. Set `--num_samples` so that methods sample
equally many attempts: SCoRe samples steps x rollouts per step x attempts / problems. Every field of TRL's SFTConfig and ModelConfig is an argument; `--config FILE.yaml`
reads them from a file. An interrupted run resumes where it stopped. Self-Refine needs no training:
`trl-score evaluate --self_refine`.
"""

import sys


sys.path.pop(0)  # this folder: to Python its math.py would be the standard library's

from pathlib import Path

from trl_score.baselines import main


EMBEDDED = ["--config", str(Path(__file__).parent / "configs" / "arithmetic_baselines.yaml")]


if __name__ == "__main__":
    named = {argument.split("=")[0] for argument in sys.argv[1:]}
    if not named & {"--model_name_or_path", "--task", "--config"}:
        sys.argv[1:1] = EMBEDDED
    main()
