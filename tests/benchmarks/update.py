"""
What an update costs beside stock GRPO on the same rows, and beside an update with one forward for each attempt, on this machine:

    python tests/benchmarks/update.py

Loss and backward of rollouts of two attempts by random models of 1M and 30M parameters, the three kinds in turn within one run,
all attempts of the same length. Medians of the ratios of neighbouring updates, with the smallest and the largest, and the ratio of
the memory that an update takes at most beside what was there before. With one forward for each attempt the rows are `[x | y1]`
and `[x | y1 | bridge | y2]`, and each is trained on its last attempt alone. `--help` shows the sizes.
"""

import argparse
import tempfile
import time
from functools import partial

import torch
from common import DEVICE, SIZES, columns, header, line, problems, random_ids, reward, save_model, synchronize
from torch.profiler import ProfilerActivity, profile
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from trl_score import SCoReConfig, SCoReTrainer
from trl_score.objective import kl_weights, spread_to_tokens, stage_one
from trl_score.rollout import Rollouts


def make_trainer(trainer: type, config: type, folder: str, args: argparse.Namespace) -> GRPOTrainer:
    made = trainer(
        folder,
        reward,
        config(
            output_dir=folder,
            per_device_train_batch_size=2,  # these three do not matter here
            num_generations=2,
            max_completion_length=8,
            loss_type="dr_grpo",
            beta=0.01,
            use_cpu=DEVICE == "cpu",
            bf16=False,
            gradient_checkpointing=args.gradient_checkpointing,
            report_to="none",
        ),
        train_dataset=problems(args.prompt, 1),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def rows(contexts: list, completions: list, vocabulary: int) -> dict[str, torch.Tensor]:
    """The inputs of an update, by tokens."""
    inputs = {}
    for name, ids, side in (("prompt", contexts, "left"), ("completion", completions, "right")):
        ids = [torch.tensor(each, device=DEVICE) for each in ids]
        inputs[f"{name}_ids"] = pad(ids, padding_value=0, padding_side=side)
        inputs[f"{name}_mask"] = pad([torch.ones_like(each) for each in ids], padding_value=0, padding_side=side)
    uniform = torch.full(inputs["completion_ids"].shape, 1 / vocabulary, device=DEVICE).log()  # about the model's
    for name in ("ref_per_token_logps", "old_per_token_logps"):
        inputs[name] = uniform + 0.1 * torch.randn_like(uniform)
    return inputs


def make_updates(ours: SCoReTrainer, stock: GRPOTrainer, length: int, args: argparse.Namespace) -> dict:
    """For each kind of update the losses whose gradients it adds up."""
    vocabulary = ours.model.config.vocab_size
    prompts, bridges = (random_ids(most, args.batch, vocabulary) for most in (args.prompt, args.bridge))
    attempts = [torch.randint(1, vocabulary - 1, (2, length)).tolist() for _ in prompts]
    rollouts = Rollouts(prompts, attempts, [[bridge] for bridge in bridges])

    inputs = rows(prompts, rollouts.completion_ids, vocabulary)
    ids = [torch.tensor(each, device=DEVICE) for each in rollouts.attempt_ids]
    ids = pad(ids, padding_value=0, padding_side="right")
    inputs["tool_mask"] = (ids > 0).long()
    advantages = torch.randn(args.batch, 2, device=DEVICE)
    weights = kl_weights(stage_one(2), beta=0.01, stage1_beta=0.1, num_attempts=2).to(DEVICE)
    of_attempts = {
        "attempt_ids": ids,
        "advantages": spread_to_tokens(advantages, ids),
        "kl_weights": spread_to_tokens(weights, ids),
    }
    apart = [rows(rollouts.context_ids(k), [row[k - 1] for row in attempts], vocabulary) for k in (1, 2)]
    loss = partial(stock._compute_loss, stock.model)
    return {
        "ours": (ours, [partial(ours._compute_loss, ours.model, inputs | of_attempts)]),
        "stock": (stock, [partial(loss, inputs | {"advantages": advantages[:, 1]})]),
        "apart": (stock, [partial(loss, each | {"advantages": advantages[:, k]}) for k, each in enumerate(apart)]),
    }


def seconds(trainer: GRPOTrainer, losses: list) -> float:
    trainer.model.zero_grad()
    synchronize()
    started = time.perf_counter()
    for loss in losses:
        loss().backward()
    synchronize()
    return time.perf_counter() - started


def peak_bytes(trainer: GRPOTrainer, losses: list) -> int:
    """Most memory in use during an update, beside what was before."""
    trainer.model.zero_grad()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(trainer, losses)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds(trainer, losses)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return in_use.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="An update beside stock GRPO, and beside a forward for each attempt.")
    parser.add_argument("--models", nargs="+", default=["tiny", "30m"], choices=SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="Tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of the longest bridge.")
    parser.add_argument("--batch", type=int, default=4, help="Rollouts in an update.")
    parser.add_argument("--repeats", type=int, default=7, help="Updates of each kind.")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()

    for size in args.models:
        with tempfile.TemporaryDirectory() as folder:
            parameters = save_model(size, folder)
            ours = make_trainer(SCoReTrainer, SCoReConfig, folder, args)
            stock = make_trainer(GRPOTrainer, GRPOConfig, folder, args)
        header(
            parameters,
            f"{args.batch} rollouts of 2 attempts, prompts of {args.prompt // 2} to {args.prompt} tokens, bridges of "
            f"{args.bridge // 2} to {args.bridge}",
        )
        columns("ratios")
        for length in args.lengths:
            updates = make_updates(ours, stock, length, args)
            for update in updates.values():
                seconds(*update)
            found = []
            for repeat in range(args.repeats):
                order = list(updates) if repeat % 2 else list(updates)[::-1]
                found.append({kind: seconds(*updates[kind]) for kind in order})
            what = f"{length:,} tokens: "
            line(f"{what}time, ours / stock", [each["ours"] / each["stock"] for each in found])
            line(f"{what}time, ours / a forward for each attempt", [each["ours"] / each["apart"] for each in found])
            peaks = {kind: peak_bytes(*updates[kind]) for kind in ("ours", "stock")}
            line(f"{what}most memory, ours / stock", [peaks["ours"] / peaks["stock"]])


if __name__ == "__main__":
    main()
