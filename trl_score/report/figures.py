"""The figures of a report, and how they are put into a page."""

import io
import math
import re
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..evaluation import Evaluation
from ..metrics import metric
from ..model_card import attempts_in
from .folders import Found


COLORS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#78350f", "#475569"]
ON_DARK = [
    "#60a5fa",
    "#f87171",
    "#34d399",
    "#fbbf24",
    "#a78bfa",
    "#22d3ee",
    "#f472b6",
    "#a3e635",
    "#d6a46c",
    "#94a3b8",
]
DASHES = ["-", "--", ":", "-."]
MOST_LEGEND_ENTRIES = 4  # inside of the axes; more stand below the figure
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


def style(number: int, emphasized: bool = False) -> dict:
    """How the line of a number is drawn: forty of them look different. An emphasized one is thicker and above the others."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
        "linewidth": 2.6 if emphasized else 1.3,
        "zorder": 3 if emphasized else 2,
    }


# --- training ---


def training_figure(history: list[dict]) -> Figure:
    """
    Curves of a training run over optimizer steps: smoothed, with the logged values behind them, and with the boundary between
    Stage I and II.

    Args:
        history (`list[dict]`):
            The training logs, those with a `stage`.
    """
    figure, steps = Figure(figsize=(9, 5.4)), [log["step"] for log in history]
    boundaries = stage_boundaries(history)
    for axes, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, _panels(history).items(), strict=True):
        for number, (key, name) in enumerate(lines):
            values = np.array([np.nan if log.get(key) is None else log[key] for log in history], float)
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smoothed(steps, values, boundaries), color=color, label=name, linewidth=1.7)
        for step in boundaries:
            axes.axvline(step, color="#555555", linestyle=":", linewidth=1)
        if len(boundaries) == 1:  # and not several cycles of the stages
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 7}
            axes.annotate("Stage I | II", (boundaries[0], 1), **place)
        axes.set_title(title, fontsize=9, loc="left", pad=12 if boundaries else 6)
        axes.legend(fontsize=7, ncols=2)
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimizer steps")
    return figure


def _panels(history: list[dict]) -> dict[str, list[tuple[str, str]]]:
    """By panel, the logged keys and their names."""
    attempts = _attempts(history[0])
    return {
        "accuracy": [(f"accuracy_t{k}", f"attempt {k}") for k in attempts],
        "change between attempts": [
            (f"delta_t1_t{attempts[-1]}", "Δ"),
            ("delta_i_to_c", "i→c"),
            ("delta_c_to_i", "c→i"),
            ("changed_ratio", "changed"),
        ],
        "reward": [(f"reward_t{k}", f"attempt {k}") for k in attempts],
        "KL to the base model, nats per token": [(f"kl_t{k}", f"attempt {k}") for k in attempts],
    }


def _attempts(found: dict) -> range:
    """The numbers of the attempts that a log or the metrics of an evaluation have."""
    return range(1, attempts_in(found) + 1)


def stage_boundaries(history: list[dict]) -> list[float]:
    """
    The optimizer steps after which the stage changes. A log is a mean over the steps since the one before, so its `stage` says
    where in the interval the change was: 1.4 means that 60 % of the steps were in Stage I.
    """
    found, stage, before = [], 2 if history[0]["stage"] == 2 else 1, 0
    for log in history:
        value = log["stage"]
        share = abs(value - stage)  # of the steps after the change
        if share > 1e-6:
            found.append(log["step"] - share * (log["step"] - before))
            stage = 3 - stage
        before = log["step"]
    return found


def smoothed(steps: Sequence[float], values: np.ndarray, boundaries: Sequence[float] = ()) -> np.ndarray:
    """
    The mean over the neighbours of each value, a twentieth of the values on either side, and over no boundary.

    Args:
        steps (`Sequence[float]` of `N` numbers):
            Where the values were logged.
        values (`np.ndarray` of shape `(N,)`):
            Values; NaN where there is none.
        boundaries (`Sequence[float]`, *optional*):
            Steps after which another stage begins.

    Returns:
        `np.ndarray` of shape `(N,)`.
    """
    reach, stage = len(values) // 20, np.searchsorted(boundaries, steps, side="left")
    result = np.full(len(values), np.nan)
    for i in range(len(values)):
        near = np.arange(max(i - reach, 0), min(i + reach + 1, len(values)))
        near = values[near[stage[near] == stage[i]]]
        if np.isfinite(values[i]):
            result[i] = near[np.isfinite(near)].mean()
    return result


# --- evaluations ---


def attempts_figure(evaluations: dict[str, Evaluation], emphasized: set[str] = frozenset()) -> Figure:
    """Accuracy over attempts (Appendix A.3), with 95 % intervals; of many evaluations, only of the emphasized ones."""
    figure, axes = _axes(evaluations)
    for number, (name, evaluation) in enumerate(evaluations.items()):
        metrics = evaluation.summary["metrics"]
        found = [metrics[f"accuracy_t{k}"] for k in _attempts(metrics)]
        band = name in emphasized or len(evaluations) <= MOST_LEGEND_ENTRIES  # more of them would hide each other
        _line(axes, range(1, len(found) + 1), found, name, style(number, name in emphasized), band)
    axes.set(xlabel="attempt", ylabel="accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure


def edit_distance_figure(evaluations: dict[str, Evaluation], emphasized: set[str] = frozenset()) -> Figure:
    """Histogram of the edit-distance ratio of neighbouring attempts (Section 4); a peak at 0 is collapse."""
    figure, axes = _axes(evaluations)
    bins = np.linspace(0, 1, 26)
    for number, (name, evaluation) in enumerate(evaluations.items()):
        ratios = [ratio for row in evaluation.rollouts for ratio in row["edit_distance_ratio"]]
        weights, drawn = np.full(len(ratios), 1 / max(len(ratios), 1)), style(number, name in emphasized)
        if len(evaluations) <= MOST_LEGEND_ENTRIES:
            axes.hist(ratios, bins, weights=weights, histtype="stepfilled", alpha=0.2, color=drawn["color"])
        axes.hist(ratios, bins, weights=weights, histtype="step", label=_literal(name), **drawn)
    axes.set(xlabel="edit distance over the sum of the lengths", ylabel="share of pairs", xlim=(0, 1))
    _legend(figure, axes)
    return figure


def scaling_figure(scalings: dict[str, list[dict]], emphasized: set[str] = frozenset()) -> Figure:
    """Accuracy of a vote over the number of samples (Section 6.2), with 95 % intervals."""
    ways = {"parallel": "first attempts", "corrected": "corrected attempts"}
    figure, axes = _axes([f"{name}: {how}" for name in scalings for how in ways.values()])
    axes.set_xscale("log", base=2)  # before the lines: without a value to draw it would have no ticks
    number = 0
    for name, budgets in scalings.items():
        for kind, how in ways.items():
            found = [row[kind] for row in budgets]
            drawn = style(number, name in emphasized and kind == "corrected")
            _line(axes, [row["budget"] for row in budgets], found, f"{name}: {how}", drawn, True)
            number += 1
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="samples per problem", ylabel="accuracy of the vote, %")
    _legend(figure, axes)
    return figure


def _axes(names: Iterable[str]) -> tuple[Figure, Axes]:
    """A figure with space below for the names, if they are too many or too long for a legend in the axes."""
    inside, columns = _layout(list(names))
    below = 0.0 if inside else 0.17 * math.ceil(len(names) / columns) + 0.1
    figure = Figure(figsize=(6, 2.8 + below))
    return figure, figure.subplots()


def _layout(names: list[str]) -> tuple[bool, int]:
    """Whether the legend stands in the axes, and its columns."""
    longest = max(map(len, names), default=0)
    return len(names) <= MOST_LEGEND_ENTRIES and longest <= 40, 2 if longest <= 40 else 1


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    # A histogram's handle is a box; its line says more.
    lines = [
        each
        if isinstance(each, Line2D)
        else Line2D([], [], color=each.get_edgecolor(), linestyle=each.get_linestyle(), linewidth=each.get_linewidth())
        for each in handles
    ]
    (inside, columns), names = _layout(names), [_shortened(name) for name in names]
    if inside:
        axes.legend(lines, names, fontsize=8)
    else:
        figure.legend(lines, names, fontsize=8, ncols=columns, loc="outside lower center")


def _shortened(name: str) -> str:
    return name if len(name) <= 85 else f"{name[:40]} .. {name[-40:]}"


def _literal(name: str) -> str:
    """A name as matplotlib shows it as it is: a dollar begins no formula, and an underscore does not hide it from the legend."""
    return re.sub("^_", " _", name.replace("$", r"\$"))


def _line(axes: Axes, x, found: list[dict], name: str, drawn: dict, band: bool) -> None:
    values, low, high = (
        [np.nan if entry[key] is None else 100 * entry[key] for entry in found] for key in ("value", "low", "high")
    )
    axes.plot(x, values, marker="o", markersize=3, label=_literal(name), **drawn)
    if band:
        axes.fill_between(x, low, high, color=drawn["color"], alpha=0.15, linewidth=0)


# --- all of them ---


def figures(found: Found) -> dict[str, tuple[str, str, Figure]]:
    """All figures that can be made: file name to title, text for who cannot see it, and figure."""
    made = {}
    for i, (name, run) in enumerate(found.runs.items()):
        title = f"Training: {name}"
        if run.step < run.max_steps:
            title += f", {run.step} of {run.max_steps} steps"
        made["training" if i == 0 else f"training-{i + 1}"] = (
            title,
            f"{title}. {described_training(run.history)}",
            training_figure(run.history),
        )
    if found.evaluations:
        title = "Accuracy over attempts"
        text = f"{title}: {_listed(found.evaluations, _accuracies)}."
        made["attempts"] = (title, text, attempts_figure(found.evaluations, found.trained))
        title = "How much an attempt differs from the one before"
        text = f"Histogram of edit-distance ratios. Mean ratio: {_listed(found.evaluations, _mean_ratio)}."
        made["edit-distance"] = (title, text, edit_distance_figure(found.evaluations, found.trained))
    if found.scalings:
        title = "Votes at equal numbers of samples"
        text = f"{title}: {_listed(found.scalings, _largest_budget)}."
        made["scaling"] = (title, text, scaling_figure(found.scalings, found.trained))
    return made


def described_training(history: list[dict]) -> str:
    """The training figure in words: where each curve begins and ends."""
    first, last, parts = history[0], history[-1], []
    for title, lines in _panels(history).items():
        ends = [
            f"{name} {first[key]:.2f} to {last[key]:.2f}"
            for key, name in lines
            if first.get(key) is not None and last.get(key) is not None
        ]
        parts.append(f"{title}: {', '.join(ends)}")
    text = f"From step {first['step']} to {last['step']}, {'; '.join(parts)}."
    for step in stage_boundaries(history)[:1]:
        text += f" Stage II begins after step {step:g}."
    return text


def _listed(items: dict, text) -> str:
    return "; ".join(f"{name} {text(item)}" for name, item in items.items())


def _accuracies(evaluation: Evaluation) -> str:
    found = evaluation.summary["metrics"]
    return ", ".join(f"{metric('accuracy').number(found[f'accuracy_t{k}']['value'])} %" for k in _attempts(found))


def _mean_ratio(evaluation: Evaluation) -> str:
    return metric("edit_distance_ratio").cell(evaluation.summary["metrics"].get("edit_distance_ratio"))


def _largest_budget(budgets: list[dict]) -> str:
    last = budgets[-1]
    shares = (metric("accuracy").number(last[kind]["value"]) for kind in ("parallel", "corrected"))
    return "with {} samples, first attempts {} %, corrected attempts {} %".format(last["budget"], *shares)


# --- as SVG ---


def svg(figure: Figure) -> str:
    """A figure as SVG, to be kept as a file."""
    return _svg(figure, transparent=False)


def svg_for_page(figure: Figure, name: str, text: str) -> str:
    """
    A figure as SVG for a page: its colors are the page's CSS variables, so that they follow the color scheme; its ids begin
    with its name, so that figures do not share them; `text` is read to who cannot see it.
    """
    drawn = _svg(figure, transparent=True)
    for color, variable in {
        **{each: f"--c{i}" for i, each in enumerate(COLORS)},
        **{"#000000": "--ink", "#b0b0b0": "--soft", "#555555": "--soft"},
    }.items():
        drawn = drawn.replace(color, f"var({variable})")
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r"url\(#", f"url(#{name}-", drawn)
    drawn = re.sub(r'href="#', f'href="#{name}-', drawn)
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def _svg(figure: Figure, transparent: bool) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
