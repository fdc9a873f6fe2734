"""
One HTML page from training runs, evaluations and scaling studies: tables with intervals, figures, a browser of rollouts. It
needs no network and no other file. What a model wrote is data in it, never markup.
"""

import io
import json
import logging
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from .evaluation import Evaluation, load_evaluation
from .metrics import metric
from .records import SETTINGS
from .scaling import SCALING


logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
COLORS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#78350f", "#475569"]
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "trl-score",  # the same figure, the same file
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


@dataclass
class Found:
    """What the folders hold, each with a name that tells it from the others."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    runs: dict[str, list[dict]] = field(default_factory=dict)
    scalings: dict[str, list[dict]] = field(default_factory=dict)


def _unique(name: str, folder: Path, taken: dict) -> str:
    if name in taken:
        name = f"{name} ({folder.name})"
    number, first = 2, name
    while name in taken:
        name, number = f"{first} {number}", number + 1
    return name


def find(folders: list[str | Path]) -> Found:
    """
    Read evaluations (`settings.json`), training runs (`trainer_state.json`) and scaling studies (`scaling.json`) from folders
    and from the folders directly in them, each once. Collections of rollouts to learn from are left out.

    Raises:
        `FileNotFoundError`: If a folder holds none of them.
    """
    found, seen = Found(), set()
    for given in map(Path, folders):
        if not given.is_dir():
            raise FileNotFoundError(f"'{given}' is no folder.")
        if given.resolve() in seen:
            continue
        before = [len(found.evaluations), len(found.runs), len(found.scalings)]
        # Checkpoints, and copies of them that `KeepBestCheckpoint` keeps, have the run's own history.
        inside = sorted(
            path for path in given.iterdir() if path.is_dir() and not path.name.startswith(("checkpoint-", "_"))
        )
        shown = any(folder.resolve() in seen for folder in inside)
        for folder in [given, *inside]:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if is_evaluation(folder):
                evaluation = load_evaluation(folder)
                name = _unique(Path(evaluation.settings["model"]).name + evaluation.mode, folder, found.evaluations)
                found.evaluations[name] = evaluation
            if (folder / STATE).exists():
                history = json.loads((folder / STATE).read_text("utf-8"))["log_history"]
                if history := [log for log in history if "stage" in log]:
                    found.runs[_unique(folder.resolve().name, folder, found.runs)] = history
            if (folder / SCALING).exists():
                study = json.loads((folder / SCALING).read_text("utf-8"))
                name = _unique(Path(study["settings"]["model"]).name, folder, found.scalings)
                found.scalings[name] = study["budgets"]
        if not shown and before == [len(found.evaluations), len(found.runs), len(found.scalings)]:
            raise FileNotFoundError(
                f"'{given}' holds no evaluation ({SETTINGS}), training run ({STATE}) or scaling study ({SCALING})."
            )
    return found


def is_evaluation(folder: Path) -> bool:
    """Not the rollouts of a scaling study, nor a collection."""
    file = folder / SETTINGS
    if not file.exists() or (folder.parent / SCALING).exists():
        return False
    return not json.loads(file.read_text("utf-8")).get("token_ids")


# --- figures ---


def training_figure(history: list[dict]) -> Figure:
    """Curves of a training run over optimizer steps, with the boundary between Stage I and II."""
    attempts = [k for k in range(1, 11) if f"accuracy_t{k}" in history[0]]
    pairs = [
        (f"delta_t1_t{attempts[-1]}", "Δ"),
        ("delta_i_to_c", "i→c"),
        ("delta_c_to_i", "c→i"),
        ("changed_ratio", "changed"),
    ]
    panels = {
        "accuracy": [(f"accuracy_t{k}", f"attempt {k}") for k in attempts],
        "change between attempts": pairs,
        "reward": [(f"reward_t{k}", f"attempt {k}") for k in attempts],
        "KL to the base model, nats per token": [(f"kl_t{k}", f"attempt {k}") for k in attempts],
    }
    figure = Figure(figsize=(9, 5.4))
    steps = [log["step"] for log in history]
    last_of_stage1 = max((log["step"] for log in history if log["stage"] == 1), default=None)
    first_of_stage2 = min((log["step"] for log in history if log["stage"] == 2), default=steps[-1])
    two_stages = last_of_stage1 is not None and last_of_stage1 < first_of_stage2  # and not several cycles of them
    for axes, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for color, (key, name) in zip(COLORS, lines, strict=False):
            values = [np.nan if log.get(key) is None else log[key] for log in history]
            axes.plot(steps, values, color=color, label=name, linewidth=1.4)
        if two_stages:
            axes.axvline(last_of_stage1, color="#555", linestyle=":", linewidth=1)
            axes.annotate(
                "Stage I | II",
                (last_of_stage1, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
            )
        axes.set_title(title, fontsize=9, loc="left", pad=12 if two_stages else 6)
        axes.legend(fontsize=7, ncols=2)
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimizer steps")
    return figure


def edit_distance_figure(evaluations: dict[str, Evaluation]) -> Figure:
    """Histogram of the edit-distance ratio of neighbouring attempts (Section 4); a peak at 0 is collapse."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.subplots()
    bins = np.linspace(0, 1, 26)
    for color, (name, evaluation) in zip(COLORS, evaluations.items(), strict=False):
        ratios = [ratio for row in evaluation.rollouts for ratio in row["edit_distance_ratio"]]
        weights = np.full(len(ratios), 1 / max(len(ratios), 1))
        axes.hist(ratios, bins, weights=weights, histtype="stepfilled", alpha=0.25, color=color)
        axes.hist(ratios, bins, weights=weights, histtype="step", color=color, label=name, linewidth=1.4)
    axes.set(xlabel="edit distance over the sum of the lengths", ylabel="share of pairs", xlim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def attempts_figure(evaluations: dict[str, Evaluation]) -> Figure:
    """Accuracy over attempts (Appendix A.3), with 95 % intervals."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.subplots()
    for color, (name, evaluation) in zip(COLORS, evaluations.items(), strict=False):
        metrics = evaluation.summary["metrics"]
        found = [metrics[f"accuracy_t{k}"] for k in range(1, 11) if f"accuracy_t{k}" in metrics]
        _line(axes, range(1, len(found) + 1), found, color, name)
    axes.set(xlabel="attempt", ylabel="accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure


def scaling_figure(scalings: dict[str, list[dict]]) -> Figure:
    """Accuracy of a vote over the number of samples (Section 6.2), with 95 % intervals."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.subplots()
    colors = iter(COLORS * 2)
    for name, budgets in scalings.items():
        for kind, how in (("parallel", "first attempts"), ("corrected", "corrected attempts")):
            _line(
                axes,
                [row["budget"] for row in budgets],
                [row[kind] for row in budgets],
                next(colors),
                f"{name}: {how}",
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="samples per problem", ylabel="accuracy of the vote, %")
    axes.legend(fontsize=8)
    return figure


def _line(axes, x, found: list[dict], color: str, name: str) -> None:
    values, low, high = (
        [np.nan if entry[key] is None else 100 * entry[key] for entry in found] for key in ("value", "low", "high")
    )
    axes.plot(x, values, color=color, marker="o", markersize=3, label=name, linewidth=1.4)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def figures(found: Found) -> dict[str, tuple[str, Figure]]:
    """All figures that can be made: file name to title and figure."""
    made = {}
    for i, (name, history) in enumerate(found.runs.items()):
        made["training" if i == 0 else f"training-{i + 1}"] = (f"Training: {name}", training_figure(history))
    if found.evaluations:
        made["attempts"] = ("Accuracy over attempts", attempts_figure(found.evaluations))
        made["edit-distance"] = (
            "How much an attempt differs from the one before",
            edit_distance_figure(found.evaluations),
        )
    if found.scalings:
        made["scaling"] = ("Votes at equal numbers of samples", scaling_figure(found.scalings))
    return made


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# --- the page ---


def metric_rows(evaluations: dict[str, Evaluation]) -> list[dict]:
    """The table side by side: a label and one cell for each evaluation."""
    names = list(dict.fromkeys(name for each in evaluations.values() for name in each.summary["metrics"]))
    rows = []
    for name in names:
        cells = [metric(name).parts(each.summary["metrics"].get(name)) for each in evaluations.values()]
        rows.append({"label": metric(name).label, "cells": cells})
    return rows


def _transition(row: dict) -> str:
    if None in row["correct"]:
        return "?"
    return "→".join("c" if right else "i" for right in (row["correct"][0], row["correct"][-1]))


def browser_data(evaluations: dict[str, Evaluation], limit: int) -> list[dict]:
    """The rollouts for the browser; texts only, which the page puts in as text."""
    data = []
    for name, evaluation in evaluations.items():
        rows = [
            {
                "problem": row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"],
                "attempts": row["attempts"],
                "feedback": row.get("feedback", []),
                "correct": row["correct"],
                "transition": _transition(row),
                "id": f"{row['index']}" + (f".{row['sample']}" if evaluation.summary["num_samples"] > 1 else ""),
            }
            for row in evaluation.rollouts[:limit]
        ]
        data.append({"name": name, "rows": rows, "all": len(evaluation.rollouts)})
    return data


def write_report(
    folders: list[str | Path], output: str | Path, *, figure_dir: str | Path | None = None, max_rollouts: int = 5000
) -> Path:
    """
    Write the page.

    Args:
        folders (`list[str | Path]`):
            Folders of evaluations, training runs and scaling studies; see [`collect`].
        output (`str`):
            The file.
        figure_dir (`str`, *optional*):
            Folder for the figures as PNG and SVG.
        max_rollouts (`int`, *optional*, defaults to `5000`):
            Rollouts of each evaluation in the browser. The tables and figures are of all.

    Raises:
        `FileNotFoundError`: If a folder holds nothing to report.
    """
    found = find(folders)
    made = figures(found)
    if figure_dir is not None:
        folder = Path(figure_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, figure) in made.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
            (folder / f"{name}.svg").write_text(svg(figure), "utf-8")
    template = resources.files("trl_score").joinpath("templates/report.html").read_text("utf-8")
    data = json.dumps(browser_data(found.evaluations, max_rollouts), ensure_ascii=False)
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            evaluations=found.evaluations,
            parts=lambda name, entry: metric(name).parts(entry),
            label=lambda name: metric(name).label,
            rows=metric_rows(found.evaluations) if found.evaluations else [],
            figures=[(title, svg(figure)) for title, figure in made.values()],
            # Inside a script element only "<" could end it or begin a comment.
            data=data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        )
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, "utf-8", errors="replace")
    return output
