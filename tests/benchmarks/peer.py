"""
A step of training beside a step of a plain loop as other implementations have it, on this machine:

    OMP_NUM_THREADS=1 python tests/benchmarks/peer.py

The plain loop generates each attempt in a call of its own that reads the whole context, and has a forward of the policy and one of
the reference for each attempt, over the whole batch padded to its longest row, with logits at all positions; the reward of attempt 2
weighs both attempts, without a baseline. Ours is `SCoReTrainer.train()`. Both train a random model with AdamW on as many rollouts of
two attempts, of the same log-normal lengths, in turn within one run. CPU seconds of this process, or seconds on a GPU. Medians of the
ratios of neighbouring steps, with the smallest and the largest; and the most memory that a step takes beside what was there before
(models and optimizer states are there before). `--help` shows the sizes.
"""

import argparse
import tempfile
from functools import partial
from unittest.mock import patch

import torch
from common import (
    DEVICE,
    SIZES,
    columns,
    cpu_seconds,
    header,
    line,
    make_model,
    peak_bytes,
    problems,
    ragged_lengths,
    random_ids,
    reward,
    save_model,
    text,
)
from rollout import Lengths, Sampling
from torch import Tensor
from transformers import LogitsProcessorList, PrinterCallback

from trl_score import SCoReConfig, SCoReTrainer


class PlainLoop:
    """Two generations, two forwards of policy and reference, one loss for each attempt."""

    def __init__(self, size: str, batch: int, prompt: int, bridge: int):
        self.policy, self.reference = make_model(size), make_model(size).eval()
        self.policy.generation_config.eos_token_id = None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        vocabulary = self.policy.config.vocab_size
        self.prompts, self.bridges = (random_ids(most, batch, vocabulary) for most in (prompt, bridge))

    def step(self, lengths: list[list[int]]):
        attempts = Sampling(self.policy, self.prompts, self.bridges, lengths).apart()
        rewards = torch.tensor([float(row[1][0] % 2) for row in attempts], device=DEVICE)
        self.optimizer.zero_grad()
        contexts = self.prompts
        for k in range(2):
            sampled = [row[k] for row in attempts]
            ids, mask, scored = self._padded(contexts, sampled)
            logps = self._logps(self.policy, ids, mask)
            with torch.no_grad():
                reference = self._logps(self.reference, ids, mask)
            difference = reference - logps
            kl = difference.exp() - difference - 1
            (((0.01 * kl - rewards[:, None] * logps) * scored).sum() / scored.sum()).backward()
            contexts = [ids + new + bridge for ids, new, bridge in zip(contexts, sampled, self.bridges, strict=True)]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    @staticmethod
    def _padded(contexts: list, sampled: list) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and mask, (B, T), and which tokens but the first are scored, (B, T - 1)."""
        rows = [context + new for context, new in zip(contexts, sampled, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=DEVICE)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
        scored = torch.tensor([[0] * (longest - len(new)) + [1] * len(new) for new in sampled], device=DEVICE)
        return ids, mask, scored[:, 1:]

    @staticmethod
    def _logps(model, ids: Tensor, mask: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


class Ours:
    """`SCoReTrainer`, one `train()` of one step."""

    def __init__(self, size: str, folder: str, args: argparse.Namespace):
        save_model(size, folder)
        self.trainer = SCoReTrainer(
            folder,
            reward,
            SCoReConfig(
                output_dir=folder,
                max_steps=1,
                stage1_steps=0,
                per_device_train_batch_size=args.micro_batch,
                gradient_accumulation_steps=args.batch // args.micro_batch,
                num_generations=min(8, args.batch),
                max_completion_length=5 * max(args.lengths),
                correction_instruction=text(args.bridge // 2),
                learning_rate=1e-6,
                use_cpu=DEVICE == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=problems(args.prompt, 8),
        )
        self.trainer.remove_callback(PrinterCallback)

    def step(self, lengths: list[list[int]]):
        kind = type(self.trainer.model)
        generate, end = kind.generate, self.trainer.model.config.vocab_size - 1

        def with_lengths(model, *args, custom_generate, **kwargs):
            def left(input_ids):
                rows = custom_generate.rows
                return [lengths[row.index][len(row.attempts) - 1] - len(row.attempts[-1]) for row in rows]

            processors = LogitsProcessorList([Lengths(left, end)])
            return generate(model, *args, logits_processor=processors, custom_generate=custom_generate, **kwargs)

        with patch.object(kind, "generate", with_lengths):
            self.trainer.train()
        assert [list(map(len, row)) for row in self.trainer._rollouts.attempts] == lengths


def main() -> None:
    parser = argparse.ArgumentParser(description="A step beside a step of a plain loop.")
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=["tiny", "30m"], help="Sizes, with random weights."
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 200], help="Mean tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of the longest bridge.")
    parser.add_argument("--batch", type=int, default=16, help="Rollouts in a step.")
    parser.add_argument("--micro_batch", type=int, default=4, help="Rollouts in a forward of ours.")
    parser.add_argument("--repeats", type=int, default=5, help="Pairs of steps, each of other lengths.")
    args = parser.parse_args()

    for size in args.models:
        plain = PlainLoop(size, args.batch, args.prompt, args.bridge)
        with tempfile.TemporaryDirectory() as folder:
            ours = Ours(size, folder, args)
            header(
                plain.policy.num_parameters(),
                f"{args.batch} rollouts of 2 attempts, prompts of {args.prompt // 2} to {args.prompt} tokens",
            )
            columns("ratios")
            for mean in args.lengths:
                pairs = []
                for repeat in range(args.repeats + 1):  # the first warms up
                    torch.manual_seed(repeat)
                    lengths = ragged_lengths(mean, args.batch, 2)
                    order = (ours, plain) if repeat % 2 else (plain, ours)
                    pairs.append({each: cpu_seconds(partial(each.step, lengths)) for each in order})
                what = f"{mean:,} tokens: a step, ours / the plain loop"
                line(what, [each[ours] / each[plain] for each in pairs[1:]])
                peaks = {each: peak_bytes(partial(each.step, lengths)) for each in (ours, plain)}
                line(f"{mean:,} tokens: its most memory, likewise", [peaks[ours] / peaks[plain]])


if __name__ == "__main__":
    main()
