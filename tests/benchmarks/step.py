"""
What a step of training costs, where its time goes, and what the same takes with stock GRPO, on this machine:

    python tests/benchmarks/step.py --model 30m
    python tests/benchmarks/step.py --model 1.5b --qlora --gradient_checkpointing --optim adamw_8bit --batch 32 --length 512
    python tests/benchmarks/step.py --model tiny --figure linear.png

Runs of a few real steps, the first half of them in Stage I, by a random model of the size named (`0.5b`, `1.5b` and `7b`: the shapes
of Qwen2.5), on a CUDA GPU if there is one; nothing is downloaded. All attempts have the same length. The model's time is that in
`generate`, forward, backward, clipping and optimizer; all else is overhead: bridges, decoding, rewards, advantages, the loss beside
the model, metrics, data loading, logging, of TRL and of ours. Stock GRPO trains on as many rows, of one completion as long as all
attempts and their bridges together, in runs that alternate with ours.

`--figure`: seconds per step over generated tokens, by rollouts, length of an attempt and number of attempts, each varied on its own,
with straight lines. `--help` shows the sizes.
"""

import argparse
import cProfile
import pstats
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from common import (
    DEVICE,
    SIZES,
    TURN,
    Clock,
    columns,
    header,
    line,
    model_config,
    problems,
    reward,
    save_model,
    synchronize,
    text,
)
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import trl_score
from trl_score import SCoReConfig, SCoReTrainer
from trl_score.report import COLORS


PACKAGE = str(Path(trl_score.__file__).parent)


class Run(TrainerCallback):
    """Seconds of a run of some steps, and those of the model among them."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.clock, self.seconds = trainer, None, 0.0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.patches = ExitStack()
        if self.clock is not None:
            functions = [
                (
                    type(model),
                    "generate",
                    "generate",
                ),  # of the class: an instance's own would be taken for somebody else's
                (model, "forward", "forward"),
                (self.trainer.accelerator, "backward", "backward"),
                (self.trainer.accelerator, "clip_grad_norm_", "optimizer"),
                (optimizer, "step", "optimizer"),
            ]
            if self.trainer.ref_model is not None:
                functions.append((self.trainer.ref_model, "forward", "forward"))
            self.patches.enter_context(self.clock.on(functions))
        synchronize()
        self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds = time.perf_counter() - self.started
        self.patches.close()


def make_trainer(folder: str, args: argparse.Namespace, stock: bool = False) -> GRPOTrainer:
    bridges = (args.attempts - 1) * args.bridge
    length = args.attempts * args.length + bridges if stock else args.length
    generations = max(n for n in range(2, args.generations + 1) if args.batch % n == 0)
    settings = {
        "output_dir": folder,
        "model_init_kwargs": {"dtype": args.dtype},
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "num_generations": generations,
        "max_completion_length": length,
        "generation_kwargs": {"suppress_tokens": [model_config(args.model).eos_token_id]},
        "loss_type": "dr_grpo",
        "beta": 0.01,
        "learning_rate": 1e-6,
        "optim": args.optim,
        "use_cpu": DEVICE == "cpu",
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": args.gradient_checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if stock:
        config = GRPOConfig(**settings)
    else:
        config = SCoReConfig(
            **settings,
            num_attempts=args.attempts,
            stage1_steps=args.steps // 2,
            correction_instruction=text(args.bridge - TURN),
        )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )
    trainer = (GRPOTrainer if stock else SCoReTrainer)(
        folder,
        reward,
        config,
        train_dataset=problems(args.prompt, args.steps * args.batch // generations),
        quantization_config=nf4 if args.qlora else None,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if args.lora or args.qlora
        else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.run = Run(trainer)
    trainer.add_callback(trainer.run)
    return trainer


def train(trainer: GRPOTrainer, clock: Clock | None = None) -> float:
    """Seconds per step."""
    trainer.run.clock = clock
    trainer.train()
    return trainer.run.seconds / trainer.args.max_steps


def parts(trainer: SCoReTrainer, seconds: float) -> dict[str, float]:
    """Seconds per step of the last run, by what they were for."""
    logs = [log for log in trainer.state.log_history if "step_time" in log]

    def mean(name):
        return statistics.mean(log[name] for log in logs)

    found = {
        "rollout": mean("time/rollout"),
        "reference": mean("time/reference"),
        "rewards": mean("time/reward"),
        "update, without the optimizer": mean("step_time") - mean("time/batch"),
    }
    return found | {"the rest: optimizer, advantages, metrics, logs": seconds - sum(found.values())}


def peak_gib() -> float:
    """Of the GPU's memory, or of the process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def largest(profile: cProfile.Profile, most: int) -> Iterator[tuple[str, float]]:
    """
    Functions of ours and their seconds: with all that they call, or, where that includes the model, without what they call.
    """
    # function -> calls, primitive calls, own seconds, seconds with all that it calls, callers
    stats = pstats.Stats(profile).stats
    holds_model, todo = set(), [function for function in stats if function[2] == "timed"]
    while todo:
        callers = set(stats[todo.pop()][4]) - holds_model
        holds_model |= callers
        todo += callers
    seconds = {
        function: own if function in holds_model else cumulative
        for function, (_, _, own, cumulative, _) in stats.items()
        if function[0].startswith(PACKAGE)
    }
    for function in sorted(seconds, key=seconds.get, reverse=True)[:most]:
        file, number, name = function
        yield f"{Path(file).name}:{number} {name}{', itself' * (function in holds_model)}", seconds[function]


def measure(folder: str, args: argparse.Namespace) -> None:
    ours = make_trainer(folder, args)
    train(ours)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the model was made there
    found = []
    for _ in range(args.repeats):
        clock = Clock()
        seconds = train(ours, clock)
        inside = {name: value / args.steps for name, value in clock.seconds.items()}
        found.append((seconds, parts(ours, seconds), inside))
    peak = peak_gib()
    tokens = args.batch * args.attempts * args.length

    columns("seconds per step")
    line("all", [seconds for seconds, _, _ in found])
    for name in found[0][1]:
        line(f"  {name}", [by_purpose[name] for _, by_purpose, _ in found])
    columns("seconds per step in the model")
    for name in found[0][2]:
        line(f"  {name}", [inside[name] for _, _, inside in found])
    columns("")
    line(
        "overhead outside of the model, % of a step",
        [100 * (1 - sum(inside.values()) / seconds) for seconds, _, inside in found],
    )
    line("tokens generated per second of a step", [tokens / seconds for seconds, _, _ in found], 1)
    line("tokens generated per second of a rollout", [tokens / each["rollout"] for _, each, _ in found], 1)
    line("rollouts per second of a step", [args.batch / seconds for seconds, _, _ in found])
    line(f"most memory of the {'GPU' if DEVICE == 'cuda' else 'process'}, GiB", [peak])

    profile, clock = cProfile.Profile(), Clock()
    profile.enable()
    seconds = train(ours, clock) * args.steps
    profile.disable()
    print(f"\n{'largest functions of trl_score, under a profiler':<62}{'ms/step':>10}{'% of it':>10}")
    for name, value in largest(profile, 10):
        print(f"  {name:<60}{1000 * value / args.steps:>10.2f}{100 * value / seconds:>10.2f}", flush=True)

    if args.no_stock:
        return
    stock = make_trainer(folder, args, stock=True)
    train(stock)
    pairs = []
    for repeat in range(args.repeats):
        order = (ours, stock) if repeat % 2 else (stock, ours)
        pairs.append({trainer: train(trainer) for trainer in order})
    print()
    columns("ratios")
    line("a step, ours / stock", [pair[ours] / pair[stock] for pair in pairs])


def draw(folder: str, args: argparse.Namespace) -> None:
    panels = {
        "rollouts": [{"batch": args.batch * k} for k in range(1, args.points + 1)],
        "tokens of an attempt": [{"length": args.length * k} for k in range(1, args.points + 1)],
        "attempts": [{"attempts": args.attempts + k} for k in range(args.points)],
    }
    figure = Figure(figsize=(9, 2.8))
    for color, axes, (what, changes) in zip(COLORS, figure.subplots(1, 3), panels.items(), strict=False):
        variants = [argparse.Namespace(**(vars(args) | change)) for change in changes]
        trainers = [make_trainer(folder, variant) for variant in variants]
        for trainer in trainers:
            train(trainer)
        seconds = [[] for _ in trainers]
        for repeat in range(args.repeats):
            order = list(enumerate(trainers))
            for i, trainer in order if repeat % 2 else order[::-1]:
                seconds[i].append(train(trainer))
        x = np.array([variant.batch * variant.attempts * variant.length for variant in variants])
        y = np.median(seconds, axis=1)
        slope, start = np.polyfit(x, y, 1)
        r2 = 1 - np.square(y - slope * x - start).sum() / np.square(y - y.mean()).sum()
        axes.plot([0, x.max()], [start, start + slope * x.max()], color=color, linewidth=1)
        axes.errorbar(x, y, [y - np.min(seconds, axis=1), np.max(seconds, axis=1) - y], fmt="o", color=color)
        for tokens, value, change in zip(x, y, changes, strict=True):
            axes.annotate(*change.values(), (tokens, value), (4, -9), textcoords="offset points", fontsize=7)
        axes.set(title=f"{what}: R² = {r2:.4f}", xlabel="generated tokens", xlim=(0, None), ylim=(0, None))
        columns(f"seconds per step by {what}, R² = {r2:.4f}")
        for tokens, each, change in zip(x, seconds, changes, strict=True):
            line(f"  {next(iter(change.values()))}: {tokens:,} generated tokens", each)
    figure.axes[0].set_ylabel("seconds per step")
    figure.savefig(args.figure, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of training: its time, its memory, its overhead.")
    parser.add_argument("--model", default="30m", choices=SIZES)
    parser.add_argument("--lora", action="store_true", help="Train an adapter of rank 16 on all linear layers.")
    parser.add_argument("--qlora", action="store_true", help="The same on a base model in 4 bits (NF4).")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--optim", default="adamw_torch", help="Such as adamw_8bit.")
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--batch", type=int, default=8, help="Rollouts in a step.")
    parser.add_argument("--generations", type=int, default=4, help="Rollouts of a problem, at most.")
    parser.add_argument("--attempts", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="Tokens of an attempt.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of the longest prompt.")
    parser.add_argument("--bridge", type=int, default=48, help="Tokens of a bridge.")
    parser.add_argument("--steps", type=int, default=2, help="Of a run.")
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each kind.")
    parser.add_argument("--no_stock", action="store_true", help="Leave out stock GRPO.")
    parser.add_argument("--figure", help="Draw the cost over generated tokens into this file instead.")
    parser.add_argument("--points", type=int, default=4, help="Of each panel of the figure.")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(args.model, folder, getattr(torch, args.dtype))
        kind = "QLoRA" if args.qlora else "LoRA" if args.lora else "all weights"
        header(
            parameters,
            f"{args.dtype}, {kind}, {args.optim}, {args.batch} rollouts of {args.attempts} attempts of {args.length} tokens, "
            f"prompts of {args.prompt // 2} to {args.prompt}, bridges of {args.bridge}",
        )
        (draw if args.figure else measure)(folder, args)


if __name__ == "__main__":
    main()
