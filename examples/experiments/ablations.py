# /// script
# dependencies = ["trl-score"]
# ///
"""
The paper's comparison on the embedded task: base model, Self-Refine, Pair-SFT, STaR, the ablations of SCoRe, and SCoRe, at equal
numbers of sampled attempts and optimizer steps, over several seeds.

    python examples/experiments/ablations.py                  # five seeds: about an hour on 2 CPU cores
    python examples/experiments/ablations.py --quick          # one seed: about ten minutes
    python examples/experiments/ablations.py --study options  # what SCoReConfig offers beside the paper's recipe, and what it costs in tokens
    python examples/experiments/ablations.py --study three    # three attempts

writes tables with intervals and figures to `results.md` in the output folder. Runs that are done are kept, so it can be
interrupted. `--methods` runs some of them, `--stage1_steps 20 40 60` with several lengths of Stage I, `--model_name_or_path`
on other base models, made by `python -m trl_score.tasks.arithmetic_base.make --seed 2 --output_dir DIR`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comparison import (
    comparison_table,
    curves,
    curves_figure,
    edit_distances_figure,
    tokens_figure,
    tokens_until,
)
from trl_score.evaluation import Evaluation, evaluate_self_correction
from trl_score.records import load_rollouts
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


EXAMPLES = Path(__file__).parents[1]
BASELINES = {
    "Pair-SFT D": ["--method", "pair_sft"],
    "Pair-SFT D+": ["--method", "pair_sft", "--plus", "true"],
    "STaR D": ["--method", "star"],
    "STaR D+": ["--method", "star", "--plus", "true"],
}
ABLATIONS = {
    "single-attempt RL": ["--num_attempts", "1", "--stage1_steps", "0"],
    "no Stage I, no bonus": ["--stage1_steps", "0", "--alpha", "0"],
    "no Stage I": ["--stage1_steps", "0"],
    "no bonus": ["--alpha", "0"],
    "STaR in Stage II": [],
    "no online first attempts": ["--offline_first_attempts", "1"],
    "gamma = 0.8, alpha = 1": ["--gamma", "0.8", "--alpha", "1"],
    "gamma = 1": ["--gamma", "1"],
}
OPTIONS = {  # each changes one thing of the recipe
    "adaptive beta2": ["--adaptive_stage1_beta", "true"],
    "sequence-level KL": ["--kl_level", "sequence"],
    "offline first attempts, half": ["--offline_first_attempts", "0.5"],
    "half the rollouts": [],
    "two updates per batch": ["--num_iterations", "2"],
    "offline half, two updates": ["--offline_first_attempts", "0.5", "--num_iterations", "2"],
}
STORED = 8  # first attempts at each problem, for half of the rollouts
THREE = {"three attempts": ["--num_attempts", "3"]}
STUDIES = {
    "paper": ["base", "Self-Refine", *BASELINES, *ABLATIONS, "SCoRe"],
    "options": ["base", *OPTIONS, "SCoRe"],
    "three": ["base", *THREE, "SCoRe"],
}
CHANGES = ABLATIONS | OPTIONS | THREE
NOT_TRAINED = ("base", "Self-Refine")
WITHOUT_STAGE1 = {*NOT_TRAINED, *BASELINES, "single-attempt RL", "no Stage I, no bonus", "no Stage I"}
TARGET = 0.95  # Accuracy@t2 at held-out problems, for the tokens that it takes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="0 1 2 3 4 by default")
    parser.add_argument("--study", choices=STUDIES, default="paper", help="which methods")
    every = list(dict.fromkeys(method for methods in STUDIES.values() for method in methods))
    parser.add_argument("--methods", nargs="+", default=None, choices=every, metavar="METHOD", help="some of them")
    parser.add_argument("--model_name_or_path", nargs="+", default=[str(BASE_MODEL_PATH)])
    parser.add_argument("--stage1_steps", type=int, nargs="+", default=[20])
    parser.add_argument("--max_steps", type=int, default=90)
    parser.add_argument("--rollouts_per_step", type=int, default=512)
    parser.add_argument("--num_train_problems", type=int, default=500)
    parser.add_argument("--num_eval_problems", type=int, default=1000)
    parser.add_argument("--num_parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=None, help="outputs/ablations/STUDY by default")
    args = parser.parse_args()
    args.output_dir = args.output_dir or Path("outputs/ablations", args.study)
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2, 3, 4])
    methods = args.methods or STUDIES[args.study]

    groups = {}  # (model, method, steps of Stage I) -> folder of each seed
    for model in args.model_name_or_path:
        for method in methods:
            for steps in [None] if method in WITHOUT_STAGE1 else args.stage1_steps:
                name = "-".join(map(str, filter(None, [Path(model).name, method.replace(" ", "_"), steps])))
                folders = [args.output_dir / f"{name}-{seed}" for seed in seeds]
                groups[model, method, steps] = folders[:1] if method in NOT_TRAINED else folders
    jobs = [
        (args, *key, seed, folder)
        for key, folders in groups.items()
        for seed, folder in zip(seeds, folders, strict=False)
    ]
    start = time.time()
    with ThreadPoolExecutor(args.num_parallel) as pool:
        evaluations = list(pool.map(lambda job: run(*job), jobs))
    by_folder = {job[-1]: evaluation for job, evaluation in zip(jobs, evaluations, strict=True)}
    text = [
        f"`{' '.join(['python', 'examples/experiments/ablations.py', *sys.argv[1:]])}`",
        "",
        machine(time.time() - start),
    ]
    for model in args.model_name_or_path:
        named = {
            f"{method}, {steps} steps of Stage I" if steps and len(args.stage1_steps) > 1 else method: folders
            for (of_model, method, steps), folders in groups.items()
            if of_model == model
        }
        found = {name: [by_folder[folder] for folder in folders] for name, folders in named.items()}
        trained = {name: folders for name, folders in named.items() if (folders[0] / "rl.json").exists()}
        columns, figures = None, {}
        if args.study == "paper":
            figures["edit_distances"] = edit_distances_figure(found)
            if trained:
                figures["accuracy"] = curves_figure(trained)
        elif args.study == "options" and trained:
            before = {name: stored_tokens(folders[0]) for name, folders in trained.items()}
            columns, figures["tokens"] = token_columns(trained), tokens_figure(trained, before)
        text += ["", f"## {Path(model).name}", "", comparison_table(found, more=columns)]
        for name, figure in figures.items():
            file = args.output_dir / f"{Path(model).name}_{name}.png"
            figure.savefig(file, dpi=150)
            text += ["", f"![{name.replace('_', ' ')}]({file.name})"]
    (args.output_dir / "results.md").write_text("\n".join(text) + "\n", "utf-8")
    print("\n".join(text))


def run(args, model: str, method: str, steps: int | None, seed: int, folder: Path) -> Evaluation:
    """Train, if it is not done, and evaluate."""
    done, start = folder / "seconds.json", time.time()
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left, which no training overwrites
        folder.mkdir(parents=True)
        for command in commands(args, model, method, steps, seed, folder):
            with (folder / "log.txt").open("a") as log:
                environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.num_parallel))}
                code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
            if code:
                raise RuntimeError(f"{' '.join(command)} failed, see {folder / 'log.txt'}")
    evaluation = evaluate_self_correction(
        model if method in NOT_TRAINED else str(folder),
        Arithmetic(args.num_train_problems),
        num_attempts=3 if args.study == "three" else 2,
        self_refine=method == "Self-Refine",
        max_completion_length=8,
        batch_size=500,
        limit=args.num_eval_problems,
        output_dir=folder / "evaluation",
    )
    if not done.exists():
        done.write_text(json.dumps(round(time.time() - start, 1)))
        print(f"{folder.name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return evaluation


def commands(args, model: str, method: str, steps: int | None, seed: int, folder: Path) -> list[list[str]]:
    """What trains a method, in processes one after the other."""
    attempts = args.max_steps * args.rollouts_per_step * 2 // args.num_train_problems  # sampled for each problem
    shared = ["--seed", seed, "--num_train_problems", args.num_train_problems]
    if args.study == "options":
        shared += ["--num_eval_problems", args.num_eval_problems, "--eval_strategy", "steps", "--eval_steps", 5]
    else:
        shared += ["--num_eval_problems", 0]
    rl = [
        EXAMPLES / "math.py",
        "--config",
        EXAMPLES / "configs" / "arithmetic.yaml",
        *shared,
        "--max_steps",
        args.max_steps,
    ]
    rl += ["--model_name_or_path", model, "--output_dir", folder, "--stage1_steps", steps or 0]
    rl += ["--per_device_train_batch_size", args.rollouts_per_step * (2 if method == "single-attempt RL" else 1)]
    sft = [EXAMPLES / "baselines.py", "--config", EXAMPLES / "configs" / "arithmetic_baselines.yaml", *shared]
    sft += ["--output_dir", folder, "--per_device_train_batch_size", args.rollouts_per_step]
    rl += CHANGES.get(method, [])
    if method in NOT_TRAINED:
        found = []
    elif method in BASELINES:
        pairs = "pair_sft" in BASELINES[method]
        of_iteration = args.max_steps if pairs else args.max_steps // 3
        budget = ["--num_samples", attempts, "--max_steps", of_iteration]
        found = [[*sft, *BASELINES[method], *budget, "--model_name_or_path", model]]
    elif method == "STaR in Stage II":
        left = args.max_steps - steps
        budget = ["--num_samples", max(6, attempts * left // args.max_steps), "--max_steps", max(1, left // 3)]
        stage1 = [*rl, "--max_steps", steps, "--output_dir", folder / "stage1"]
        found = [stage1, [*sft, *budget, "--model_name_or_path", folder / "stage1"]]
    else:
        found = []
        if "--offline_first_attempts" in rl:
            number = attempts // 2 if method == "no online first attempts" else STORED
            first = ["-m", "trl_score.cli", "collect", "--model", model, "--task", "arithmetic", "--num_attempts", 1]
            first += ["--num_samples", number, "--limit", args.num_train_problems, "--max_completion_length", 8]
            first += ["--batch_size", 1000, "--seed", seed, "--output_dir", folder / "first"]
            found, rl = [first], [*rl, "--first_attempts", folder / "first"]
        if method == "half the rollouts":
            rl += ["--per_device_train_batch_size", args.rollouts_per_step // 2]
        elif method in THREE:  # another turn of Stage I, and as much again for Stage II
            rl += ["--stage1_steps", 2 * steps, "--max_steps", args.max_steps + 2 * steps]
        found.append(rl)
        (folder / "rl.json").write_text(json.dumps(method))
    return [[sys.executable, *map(str, command)] for command in found]


def stored_tokens(folder: Path) -> int:
    """Of the first attempts that were collected for a run."""
    folder = folder / "first"
    return sum(sum(row["num_tokens"]) for row in load_rollouts(folder)[1]) if folder.exists() else 0


def token_columns(runs: dict[str, list[Path]]) -> dict[str, dict[str, str]]:
    """What each run sampled in all and until its held-out accuracy reached the target: mean over the seeds, least and most."""
    whole, until = "thousand tokens sampled", f"until @t2 ≥ {TARGET:.0%}"
    columns = {whole: {}, until: {}}
    for name, folders in runs.items():
        ends = {
            whole: [curves([folder], "eval_num_generated_tokens")[1].max() for folder in folders],
            until: [tokens_until(folder, TARGET) for folder in folders],
        }
        for column, numbers in ends.items():
            pairs = zip(folders, numbers, strict=True)
            tokens = [(stored_tokens(folder) + number) / 1000 for folder, number in pairs if number is not None]
            text = f"{sum(tokens) / len(tokens):.0f} [{min(tokens):.0f}, {max(tokens):.0f}]" if tokens else "never"
            reached = f", {len(tokens)} of {len(folders)} seeds" if column == until and tokens else ""
            columns[column][name] = text + reached
    return columns


def machine(seconds: float) -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}; this time it ran {seconds / 60:.0f} minutes."


if __name__ == "__main__":
    main()
