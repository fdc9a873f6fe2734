"""
What it saves to go on from the key-value cache of the attempt before, on this machine:

    python tests/benchmarks/rollout.py

Rollouts of two attempts by a random model, with and without reuse in turn within one run, all attempts of the
same length. Medians of the ratios of neighbouring rollouts, with the smallest and the largest. `--help` shows the sizes.
"""

import argparse
import time
from contextlib import nullcontext

import torch
from common import SIZES, columns, header, line, make_model, random_ids
from transformers import GenerationConfig, PreTrainedModel

from trl_score.cache import reused_cache
from trl_score.rollout import roll_out


def seconds(model: PreTrainedModel, prompts: list, bridges: list, length: int, reuse: bool) -> list[float]:
    """Of each attempt."""
    config = GenerationConfig(
        do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length, eos_token_id=0, pad_token_id=0
    )
    found = []

    def generate(contexts, attempt):
        longest = max(map(len, contexts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in contexts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in contexts], device=model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        found.append(time.perf_counter() - started)
        return output[:, longest:].tolist(), None

    with reused_cache(model) if reuse else nullcontext():
        roll_out(prompts, generate, lambda attempt, attempts: bridges)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Two attempts, with and without reuse of the cache.")
    parser.add_argument("--model", choices=SIZES, default="30m", help="Size, with random weights.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="Tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of the longest bridge.")
    parser.add_argument("--batch", type=int, default=8, help="Rollouts in a batch.")
    parser.add_argument("--repeats", type=int, default=7, help="Pairs of rollouts.")
    args = parser.parse_args()

    model = make_model(args.model).eval()
    header(
        model.num_parameters(),
        f"{args.batch} rollouts of 2 attempts, prompts of {args.prompt // 2} to {args.prompt} tokens, bridges of "
        f"{args.bridge // 2} to {args.bridge}",
    )
    columns("ratios")
    prompts, bridges = (random_ids(most, args.batch, model.config.vocab_size) for most in (args.prompt, args.bridge))
    for reuse in (True, False):
        seconds(model, prompts, bridges, 8, reuse)
    for length in args.lengths:
        pairs = []
        for repeat in range(args.repeats):
            order = (True, False) if repeat % 2 else (False, True)
            pairs.append({reuse: seconds(model, prompts, bridges, length, reuse) for reuse in order})
        what = f"{length:,} tokens: "
        line(f"{what}attempt 2, with reuse / without", [pair[True][1] / pair[False][1] for pair in pairs])
        line(f"{what}rollout, with reuse / without", [sum(pair[True]) / sum(pair[False]) for pair in pairs])
        line(f"{what}attempt 2 / attempt 1, with reuse", [pair[True][1] / pair[True][0] for pair in pairs])
        line(f"{what}attempt 2 / attempt 1, without", [pair[False][1] / pair[False][0] for pair in pairs])


if __name__ == "__main__":
    main()
