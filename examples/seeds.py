# /// script
# dependencies = ["trl-score"]
# ///
"""
Train on the embedded task with several seeds, by SCoRe and by naive multi-attempt RL (no Stage I, no bonus), and print a
table of all runs.

    python examples/seeds.py

runs examples/math.py ten times, one after the other: about 10 minutes on 2 CPU cores. `--model_name_or_path` takes another
base model, made by `python -m trl_score.tasks.arithmetic_base.make --seed 2 --output_dir DIR`. Runs that are done are kept.
"""

import sys


sys.path.pop(0)  # this folder: to Python its math.py would be the standard library's

import argparse
import json
import statistics
import subprocess
from pathlib import Path


METHODS = {"SCoRe": [], "naive": ["--stage1_steps", "0", "--alpha", "0"]}
HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeds"))
    args = parser.parse_args()

    results = {method: [run(args, method, seed) for seed in args.seeds] for method in METHODS}
    labels = list(results["SCoRe"][0])
    print("| method | seed |", " | ".join(labels), "|")
    print("|---|---:|" + "---:|" * len(labels))
    print("| base | |", " | ".join(f"{results['SCoRe'][0][label][0]:.1f}" for label in labels), "|")
    for method, tables in results.items():
        for seed, table in zip(args.seeds, tables, strict=True):
            print(f"| {method} | {seed} |", " | ".join(f"{table[label][1]:.1f}" for label in labels), "|")
        columns = [[table[label][1] for table in tables] for label in labels]
        if len(args.seeds) > 1:
            values = [f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in columns]
            print(f"| **{method}** | mean ± sd |", " | ".join(values), "|")


def run(args: argparse.Namespace, method: str, seed: int) -> dict[str, list[float]]:
    folder = args.output_dir / f"{method}-{seed}"
    result = folder / "self_correction.json"
    if not result.exists():
        command = [sys.executable, str(HERE / "math.py"), "--config", str(HERE / "configs" / "arithmetic.yaml")]
        command += ["--seed", str(seed), "--output_dir", str(folder), *METHODS[method]]
        if args.model_name_or_path is not None:
            command += ["--model_name_or_path", args.model_name_or_path]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(result.read_text())["table"]


if __name__ == "__main__":
    main()
