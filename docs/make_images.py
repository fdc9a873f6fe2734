"""
Makes the pictures of README.md and of reading_a_run.md: `python docs/make_images.py`, some minutes on two CPU cores.

Two runs of the embedded task: README's first command, and one without Stage I and without the bonus, which collapses to copying. A
run that is in the folder already is used again. The picture of the report needs Chromium and `pip install playwright`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from trl_score import evaluate_self_correction, inference_scaling
from trl_score.report import STATE, write_report
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


IMAGES = Path(__file__).parents[1] / "docs" / "images"
COMMAND = [sys.executable, "-m", "trl_score.cli", "train", "--task", "arithmetic", "--use_cpu"]
RUNS = {"SCoRe": [], "collapsed": ["--stage1_steps", "0", "--alpha", "0"]}
PANELS = (  # title, and a label for each key
    ("accuracy", {"accuracy_t1": "attempt 1", "accuracy_t2": "attempt 2"}),
    ("share of rollouts", {"changed_ratio": "changed", "delta_i_to_c": "i→c", "delta_c_to_i": "c→i"}),
    ("KL to the base model, nats per token", {"kl_t1": "attempt 1", "kl_t2": "attempt 2"}),
)
COLORS = ("tab:blue", "tab:orange", "tab:green")


def run(folder: Path, changes: list[str]) -> list[dict]:
    """Train the embedded task with further options. Returns the logs with a stage."""
    if not (folder / STATE).exists():
        subprocess.run([*COMMAND, "--output_dir", str(folder), *changes], check=True)
    return [log for log in json.loads((folder / STATE).read_text())["log_history"] if "stage" in log]


def draw(histories: dict[str, list[dict]]) -> Figure:
    """The curves of several runs, a row for each run."""
    figure = Figure(figsize=(11, 2.6 * len(histories)), layout="constrained")
    axes = figure.subplots(len(histories), len(PANELS), sharex=True, sharey="col", squeeze=False)
    for row, (name, history) in zip(axes, histories.items(), strict=True):
        stage2 = [log["step"] for log in history if log["stage"] == 2]
        for ax, (title, keys) in zip(row, PANELS, strict=True):
            for color, (key, label) in zip(COLORS, keys.items(), strict=False):
                ax.plot([log["step"] for log in history], [log[key] for log in history], color=color, label=label)
            if history[0]["stage"] == 1:
                ax.axvline(stage2[0] - history[0]["step"], color="gray", linestyle=":")
            ax.set_title(f"{name}: {title}", fontsize=9, loc="left")
            ax.legend(frameon=False, fontsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    return figure


def picture_of_report(trained: Path, folder: Path) -> None:
    """Evaluate base and trained model, write the report on both, and take a picture of its first part."""
    from playwright.sync_api import sync_playwright

    base, score, votes = folder / "results" / "base", folder / "results" / "score", folder / "results" / "votes"
    settings = {"task": "arithmetic", "max_completion_length": 8, "batch_size": 500}
    evaluate_self_correction(str(BASE_MODEL_PATH), output_dir=base, **settings)
    evaluate_self_correction(str(trained), output_dir=score, **settings)
    inference_scaling(str(trained), output_dir=votes, limit=200, max_budget=16, **settings)
    page = write_report([base, score, trained, votes], folder / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 1840}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=IMAGES / "report.png")
        browser.close()


def main(folder: Path) -> None:
    histories = {name: run(folder / name, changes) for name, changes in RUNS.items()}
    figure = draw({"healthy": histories["SCoRe"], "collapsed": histories["collapsed"]})
    figure.savefig(IMAGES / "healthy_and_collapsed.png", dpi=110)
    picture_of_report(folder / "SCoRe", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/images"))
