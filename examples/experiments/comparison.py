"""
Methods side by side over several seeds: the layout of the paper's tables, with intervals over seeds and problems, and the
figures of Section 4 and 5.
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from trl_score.evaluation import Evaluation
from trl_score.metrics import label, metric, self_correction_values
from trl_score.report import COLORS, STATE


def values(runs: list[Evaluation]) -> dict[str, np.ndarray]:
    """
    The metrics of Section 3 by seed and problem.

    Args:
        runs (`list[Evaluation]`):
            `S` evaluations of the same `P` problems, one rollout each, the model trained with another seed in each.

    Returns:
        `dict[str, np.ndarray]`: arrays of shape `(S, P)`; a metric is their mean. With more than two attempts the changes are
        from the first to the last.

    Raises:
        `ValueError`: If the evaluations are not of the same problems, or an attempt could not be graded.
    """
    problems = [[row["index"] for row in run.rollouts] for run in runs]
    if any(each != problems[0] for each in problems) or len(set(problems[0])) != len(problems[0]):
        raise ValueError("The evaluations to compare are not of the same problems with one rollout each.")
    if any(None in row["correct"] for run in runs for row in run.rollouts):
        raise ValueError("An attempt could not be graded, so the evaluations cannot be compared problem by problem.")
    correct = torch.tensor([row["correct"] for run in runs for row in run.rollouts], dtype=torch.float64)  # (S * P, K)
    number = correct.size(1)
    columns = [*(f"accuracy_t{k + 1}" for k in range(number)), f"delta_t1_t{number}", "delta_i_to_c", "delta_c_to_i"]
    found = self_correction_values(correct)
    return {name: found[name].numpy().reshape(len(runs), -1) for name in columns}


def interval(
    found: np.ndarray, other: np.ndarray | None = None, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """
    A mean with its 95 % percentile bootstrap interval over seeds and problems: both are drawn with replacement, as the runs of
    one seed share what the seed decided and the runs at one problem share the problem.

    Args:
        found (`np.ndarray` of shape `(S, P)`):
            Values by seed and problem.
        other (`np.ndarray` of shape `(R, P)`, *optional*):
            Values of another method at the same problems: then of the difference of the means, the problems paired and the
            seeds drawn on their own.

    Returns:
        `tuple[float, float, float]`: value, low, high.

    Example:
    ```python
    >>> interval(np.ones((3, 10)), np.zeros((2, 10)))
    (1.0, 1.0, 1.0)
    ```
    """
    rng, number = np.random.default_rng(seed), found.shape[1]
    means = []
    for _ in range(0, resamples, 500):
        weights = rng.multinomial(number, np.full(number, 1 / number), size=500) / number  # (500, P)
        drawn = 0.0
        for sign, each in ((1, found), (-1, other)):
            if each is not None:
                seeds = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), size=500) / len(each)
                drawn = drawn + sign * ((seeds @ each) * weights).sum(1)
        means.append(drawn)
    value = found.mean() - (0.0 if other is None else other.mean())
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(value), float(low), float(high)


def cell(name: str, numbers: tuple[float, float, float]) -> str:
    return metric(name).cell(dict(zip(("value", "low", "high"), numbers, strict=True)))


def comparison_table(
    methods: dict[str, list[Evaluation]],
    against: str = "SCoRe",
    more: dict[str, dict[str, str]] | None = None,
) -> str:
    """
    The layout of the paper's tables in Markdown: percent with 95 % intervals over seeds and problems ([`interval`]).

    Args:
        methods (`dict[str, list[Evaluation]]`):
            By name, an evaluation for each seed, all with as many attempts.
        against (`str`, *optional*, defaults to `"SCoRe"`):
            A last column has the method's last attempt minus this one's.
        more (`dict[str, dict[str, str]]`, *optional*):
            Further columns: by heading, a cell for each method.

    Raises:
        `ValueError`: If the numbers of attempts differ.
    """
    found = {name: values(runs) for name, runs in methods.items()}
    columns = next(iter(found.values())).keys()
    if any(each.keys() != columns for each in found.values()):
        raise ValueError("The evaluations to compare have different numbers of attempts.")
    last, more = [column for column in columns if column.startswith("accuracy")][-1], more or {}
    names = ["method", "seeds", *map(label, columns), *more]
    if against in found:
        names.append(f"@{last.removeprefix('accuracy_')} minus {against}'s")
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for name, runs in methods.items():
        cells = [name, str(len(runs)), *(cell(column, interval(found[name][column])) for column in columns)]
        cells += [column.get(name, "") for column in more.values()]
        if against in found:
            cells.append("" if name == against else cell(last, interval(found[name][last], found[against][last])))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(folders: list[str | Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """
    A logged value over the optimizer steps of several runs.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the steps that all runs logged, shape `(T,)`, and the values, `(S, T)`.
    """
    logs = []
    for folder in folders:
        history = json.loads((Path(folder) / STATE).read_text("utf-8"))["log_history"]
        logs.append({log["step"]: log[key] for log in history if key in log})
    steps = sorted(set.intersection(*map(set, logs)))
    return np.array(steps), np.array([[log[step] for step in steps] for log in logs])


def tokens_until(folder: str | Path, accuracy: float) -> int | None:
    """
    Tokens that a training run had sampled when the accuracy of its last attempt at the evaluation's problems first reached a
    value, as far as it was evaluated while it trained; `None` if it never did.

    Args:
        folder (`str` or `Path`):
            Of the run.
        accuracy (`float`):
            A share, from 0 to 1.
    """
    tokens, found = curves([folder], "eval_num_generated_tokens")[1][0], last_attempt([folder])[1][0]
    return next((int(number) for number, value in zip(tokens, found, strict=True) if value >= accuracy), None)


def last_attempt(folders: list[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """[`curves`] of the accuracy of the last attempt at the evaluation's problems."""
    history = json.loads((Path(folders[0]) / STATE).read_text("utf-8"))["log_history"]
    found = {key for log in history for key in log if key.startswith("eval_accuracy_t")}
    return curves(folders, max(found, key=lambda key: int(key.removeprefix("eval_accuracy_t"))))


def tokens_figure(runs: dict[str, list[str | Path]], before: dict[str, int] | None = None) -> Figure:
    """
    Accuracy of the last attempt at the evaluation's problems over the tokens sampled for training, by name the folder of each
    seed: the mean over seeds.

    Args:
        runs (`dict[str, list[str]]`):
            Folders of training runs.
        before (`dict[str, int]`, *optional*):
            Tokens sampled before the training, by name: stored first attempts.
    """
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for number, (name, folders) in enumerate(runs.items()):
        tokens = (curves(folders, "eval_num_generated_tokens")[1].mean(0) + (before or {}).get(name, 0)) / 1000
        found = 100 * last_attempt(folders)[1].mean(0)
        style = {"color": COLORS[number % len(COLORS)], "linestyle": "-" if number < len(COLORS) else "--"}
        axes.plot(tokens, found, label=name, **style)
    axes.set_xlabel("tokens sampled, thousands")
    axes.set_ylabel("accuracy of the last attempt, held-out problems, %")
    figure.legend(loc="outside right center")
    return figure


def curves_figure(runs: dict[str, list[str | Path]]) -> Figure:
    """
    Training runs of several methods, by name the folder of each seed: accuracy of both attempts, and share of changed attempts,
    on the training rollouts; line: mean over seeds, band: smallest to largest.
    """
    figure = Figure(figsize=(10, 3.2))
    panels = ("accuracy_t1", "accuracy_t2", "changed_ratio")
    for axes, key in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for color, (name, folders) in zip(COLORS, runs.items(), strict=False):
            steps, found = curves(folders, key)
            if len(steps):
                axes.plot(steps, 100 * found.mean(0), color=color, label=name)
                axes.fill_between(steps, 100 * found.min(0), 100 * found.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_title("changed attempts" if key == "changed_ratio" else label(key))
        axes.set_xlabel("optimizer steps")
    figure.axes[0].set_ylabel("%, training rollouts")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5))
    return figure


def edit_distances_figure(methods: dict[str, list[Evaluation]]) -> Figure:
    """Histograms of the edit-distance ratio between the attempts (Section 4), all seeds of a method together."""
    columns = min(len(methods), 5)
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.7 * rows + 0.3))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, (name, runs) in zip(grid.flat, methods.items(), strict=False):
        ratios = [row["edit_distance_ratio"][0] for run in runs for row in run.rollouts]
        share = 100 * np.ones(len(ratios)) / len(ratios)
        axes.hist(ratios, bins=np.linspace(0, 1, 21), weights=share, color=COLORS[0])
        axes.set_title(name, fontsize=8)
    figure.supxlabel("edit-distance ratio between the attempts", fontsize=9)
    figure.supylabel("% of problems", fontsize=9)
    return figure
