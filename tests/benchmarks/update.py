"""
What an update costs beside stock GRPO on the same rows, and beside an update with one forward for each attempt, on this machine:

    python tests/benchmarks/update.py

Loss and backward of an optimizer step on rollouts of two attempts by random models of 1M and 30M parameters, the three kinds in turn
within one run. `--ragged` draws the lengths of the attempts from a log-normal distribution (the usual case), else all have the same
length. Stock GRPO gets the rows as TRL makes them, padded to the longest of the generation. With one forward for each attempt the rows
are `[x | y1]` and `[x | y1 | bridge | y2]`, padded in the same way, and each is trained on its last attempt alone. On a CPU TRL's head
scores every position; "with the head of a GPU" it scores labelled positions only, in both kinds that are compared. CPU seconds of this
process, or seconds on a GPU. Medians of the ratios of neighbouring updates, with the smallest and the largest, and the ratio of the
memory that an update takes at most beside what was there before. `--help` shows the sizes.
"""

import argparse
import tempfile
from functools import partial

import torch
from common import (
    DEVICE,
    SIZES,
    columns,
    cpu_seconds,
    header,
    line,
    peak_bytes,
    problems,
    ragged_lengths,
    random_ids,
    reward,
    save_model,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad, split_tensor_dict

from trl_score import SCoReConfig, SCoReTrainer
from trl_score.objective import kl_weights, spread_to_tokens, stage_one
from trl_score.padding import ScoredTokens, by_length
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
    """For each kind of update the losses whose gradients it adds up, and the share of real tokens among those of the padded rows."""
    torch.manual_seed(length)
    vocabulary, number = ours.model.config.vocab_size, args.batch * args.micro_batches
    prompts, bridges = (random_ids(most, number, vocabulary) for most in (args.prompt, args.bridge))
    lengths = ragged_lengths(length, number, 2) if args.ragged else [[length] * 2] * number
    attempts = [[torch.randint(1, vocabulary - 1, (each,)).tolist() for each in row] for row in lengths]
    rollouts = Rollouts(prompts, attempts, [[bridge] for bridge in bridges])

    inputs = rows(prompts, rollouts.completion_ids, vocabulary)
    ids = [torch.tensor(each, device=DEVICE) for each in rollouts.attempt_ids]
    ids = pad(ids, padding_value=0, padding_side="right")
    inputs["tool_mask"] = (ids > 0).long()
    advantages = torch.randn(number, 2, device=DEVICE)
    weights = kl_weights(stage_one(2), beta=0.01, stage1_beta=0.1, num_attempts=2).to(DEVICE)
    of_attempts = {
        "attempt_ids": ids,
        "advantages": spread_to_tokens(advantages, ids),
        "kl_weights": spread_to_tokens(weights, ids),
    }
    apart = [rows(rollouts.context_ids(k), [row[k - 1] for row in attempts], vocabulary) for k in (1, 2)]
    split = partial(split_tensor_dict, num_chunks=args.micro_batches)
    loss = partial(stock._compute_loss, stock.model)
    micro_batches = {
        "ours": [
            partial(ours._compute_loss, ours.model, x)
            for x in by_length(split(inputs | of_attempts), args.micro_batches)
        ],
        "stock": [partial(loss, x) for x in split(inputs | {"advantages": advantages[:, 1]})],
        "apart": [
            partial(loss, x) for k, each in enumerate(apart) for x in split(each | {"advantages": advantages[:, k]})
        ],
        "apart as on a GPU": [
            partial(
                stock._compute_loss, ScoredTokens(stock.model, stock.model, torch.ones_like(x["completion_ids"])), x
            )
            for k, each in enumerate(apart)
            for x in split(each | {"advantages": advantages[:, k]})
        ],
    }
    masks = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    updates = {kind: (stock if kind != "ours" else ours, losses) for kind, losses in micro_batches.items()}
    return updates, make_references(ours, stock, inputs | of_attempts, args), masks.float().mean().item()


def make_references(ours: SCoReTrainer, stock: GRPOTrainer, inputs: dict, args: argparse.Namespace) -> dict:
    """For each kind the log-probabilities of the rows under the reference."""
    ids, mask = (
        torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    scored = ScoredTokens(ours.model, ours.model, inputs["attempt_ids"] > 0)
    arguments = (ids, mask, inputs["completion_ids"].size(1), args.batch)
    return {
        "ours": partial(ours._get_per_token_logps_and_entropies, scored, *arguments),
        "stock": partial(stock._get_per_token_logps_and_entropies, stock.model, *arguments),
    }


def seconds(trainer: GRPOTrainer, losses: list) -> float:
    trainer.model.zero_grad()

    def update():
        for loss in losses:
            loss().backward()

    return cpu_seconds(update)


def main() -> None:
    parser = argparse.ArgumentParser(description="An update beside stock GRPO, and beside a forward for each attempt.")
    parser.add_argument("--models", nargs="+", default=["tiny", "30m"], choices=SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="Tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of the longest bridge.")
    parser.add_argument("--batch", type=int, default=4, help="Rollouts in a micro-batch.")
    parser.add_argument("--micro_batches", type=int, default=4, help="Micro-batches in an optimizer step.")
    parser.add_argument(
        "--ragged", action="store_true", help="Attempts of log-normal length, --lengths being the means."
    )
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
            f"{args.micro_batches} x {args.batch} rollouts of 2 attempts, prompts of {args.prompt // 2} to {args.prompt} tokens, bridges of "
            f"{args.bridge // 2} to {args.bridge}",
        )
        columns("ratios")
        for length in args.lengths:
            updates, references, real = make_updates(ours, stock, length, args)
            for update in updates.values():
                seconds(*update)
            found = []
            for repeat in range(args.repeats):
                order = list(updates) if repeat % 2 else list(updates)[::-1]
                found.append({kind: seconds(*updates[kind]) for kind in order})
            what = f"{length:,} tokens, {real:.0%} of the padded rows: "
            line(f"{what}time, ours / stock", [each["ours"] / each["stock"] for each in found])
            line(f"{what}time, ours / a forward for each attempt", [each["ours"] / each["apart"] for each in found])
            line(
                f"{what}time, ours / that with the head of a GPU",
                [each["ours"] / each["apart as on a GPU"] for each in found],
            )
            found = []
            for repeat in range(args.repeats):
                order = list(references) if repeat % 2 else list(references)[::-1]
                with torch.no_grad():
                    found.append({kind: cpu_seconds(references[kind]) for kind in order})
            line(f"{what}time of the reference, ours / stock", [each["ours"] / each["stock"] for each in found])
            peaks = {kind: peak_bytes(partial(seconds, *updates[kind])) for kind in ("ours", "stock")}
            line(f"{what}most memory, ours / stock", [peaks["ours"] / peaks["stock"]])


if __name__ == "__main__":
    main()
