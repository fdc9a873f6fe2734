"""
What it saves to generate all attempts in one call, on this machine:

    OMP_NUM_THREADS=1 python tests/benchmarks/rollout.py

Rollouts of two attempts by a random model: in one `generate`, and in a `generate` for each attempt that reads its whole context, in
turn within one run. The lengths of attempts are log-normal (mean as given, at most five times as long; the attempts of a problem
resemble one another), and the same for both. CPU seconds of this process, or seconds on a GPU. Medians of the ratios of neighbouring
rollouts, with the smallest and the largest. `--help` shows the sizes.
"""

import argparse

import torch
from common import DEVICE, SIZES, columns, cpu_seconds, header, line, make_model, ragged_lengths, random_ids
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from trl_score.generation import AllAttempts
from trl_score.rollout import roll_out


class Lengths(LogitsProcessor):
    """Ends an attempt at its length and not before. `left()` gives the tokens that each row of the batch has to go."""

    def __init__(self, left, end: int):
        self.left, self.end = left, end

    def __call__(self, input_ids, scores):
        last = torch.tensor([left == 1 for left in self.left(input_ids)], device=scores.device)
        scores[:, self.end] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.end] = 0.0
        return scores


class Sampling:
    """Both ways to sample rollouts, of the same lengths."""

    def __init__(self, model: PreTrainedModel, prompts: list, bridges: list, lengths: list[list[int]]):
        self.model, self.prompts, self.bridges, self.lengths = model, prompts, bridges, lengths
        self.end = model.config.vocab_size - 1
        self.config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max(map(max, lengths)), eos_token_id=self.end, pad_token_id=0
        )

    def _generate(self, contexts: list, left, **kwargs) -> torch.Tensor:
        longest = max(map(len, contexts))
        with torch.inference_mode():
            return self.model.generate(
                input_ids=torch.tensor([[0] * (longest - len(ids)) + ids for ids in contexts], device=DEVICE),
                attention_mask=torch.tensor(
                    [[0] * (longest - len(ids)) + [1] * len(ids) for ids in contexts], device=DEVICE
                ),
                generation_config=self.config,
                logits_processor=LogitsProcessorList([Lengths(left, self.end)]),
                **kwargs,
            )

    def together(self) -> list:
        loop = AllAttempts(self.prompts, lambda attempt, row, ids: self.bridges[row], [self.end])

        def left(input_ids):
            return [self.lengths[row.index][len(row.attempts) - 1] - len(row.attempts[-1]) for row in loop.rows]

        self._generate(loop.contexts, left, custom_generate=loop)
        return loop.rollouts.attempts

    def apart(self) -> list:
        def generate(contexts, attempt):
            start, lengths = max(map(len, contexts)), [row[attempt - 1] for row in self.lengths]
            output = self._generate(contexts, lambda ids: [length + start - ids.size(1) for length in lengths])
            return [row[start : start + length] for row, length in zip(output.tolist(), lengths, strict=True)], None

        return roll_out(self.prompts, generate, lambda attempt, ids: self.bridges).attempts

    def check(self, attempts: list):
        assert [list(map(len, row)) for row in attempts] == self.lengths


def main() -> None:
    parser = argparse.ArgumentParser(description="Two attempts, in one call and in two.")
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=["tiny", "30m"], help="Sizes, with random weights."
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 200], help="Mean tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of the longest bridge.")
    parser.add_argument("--batch", type=int, default=16, help="Rollouts in a batch.")
    parser.add_argument("--repeats", type=int, default=5, help="Pairs of rollouts, each of other lengths.")
    args = parser.parse_args()

    for size in args.models:
        model = make_model(size).eval()
        model.generation_config.eos_token_id = None
        header(
            model.num_parameters(),
            f"{args.batch} rollouts of 2 attempts, prompts of {args.prompt // 2} to {args.prompt} tokens, bridges of "
            f"{args.bridge // 2} to {args.bridge}",
        )
        columns("ratios")
        for mean in args.lengths:
            pairs = []
            for repeat in range(args.repeats):
                torch.manual_seed(repeat)
                prompts, bridges = (
                    random_ids(most, args.batch, model.config.vocab_size) for most in (args.prompt, args.bridge)
                )
                sampling = Sampling(model, prompts, bridges, ragged_lengths(mean, args.batch, 2))
                ways = [sampling.together, sampling.apart]
                if not pairs:
                    cpu_seconds(sampling.together)
                spent = {
                    way.__name__: cpu_seconds(way, sampling.check) for way in (ways if repeat % 2 else ways[::-1])
                }
                pairs.append(spent)
            line(
                f"{mean:,} tokens: one call / a call for each attempt",
                [each["together"] / each["apart"] for each in pairs],
            )


if __name__ == "__main__":
    main()
