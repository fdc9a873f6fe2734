"""The tables of a report: a heading and cells of text for each row, evaluations or runs side by side."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation import Evaluation, left_out
from ..metrics import bootstrap_intervals, label, metric, self_correction_values
from ..metrics.statistics import detectable_difference, pass_at_k, problems_needed, standard_error
from .folders import Found, instruction


CLUSTERS = ("subject", "level")  # columns of a task that problems are grouped by
DIFFERENCES = (0.01, 0.02, 0.05)  # of accuracy, that an evaluation may have to find


@dataclass
class Row:
    """
    A row of a table.

    Attributes:
        label (`str`):
            Its heading.
        cells (`list[tuple[str, str]]`):
            A value and its interval for each column; the interval may be empty.
        sure (`list[bool]`):
            Which cells are a difference whose interval leaves out 0.
    """

    label: str
    cells: list[tuple[str, str]]
    sure: list[bool] | None = None


def metric_rows(found: Found) -> list[Row]:
    """The metrics of the evaluations, and how they were evaluated."""
    evaluations = list(found.evaluations.values())
    names = dict.fromkeys(name for each in evaluations for name in each.summary["metrics"])
    rows = [Row(label(name), [metric(name).parts(_metrics(each).get(name)) for each in evaluations]) for name in names]
    rows.append(_text_row("p, last attempt against first", evaluations, _p))
    rows.append(
        _text_row("task, split", evaluations, lambda each: f"{each.settings['task']}, {each.settings['split']}")
    )
    rows.append(_text_row("problems × samples", evaluations, _size))
    rows.append(_text_row("decoding", evaluations, _decoding))
    if len(found.instructions) > 1:
        rows.append(_text_row("correction instruction", evaluations, found.instruction_of))
    return rows


def _metrics(evaluation: Evaluation) -> dict:
    return evaluation.summary["metrics"]


def _text_row(name: str, columns: list, text) -> Row:
    return Row(name, [(text(each), "") for each in columns])


def _p(evaluation: Evaluation) -> str:
    p = evaluation.summary["mcnemar_p"]
    return "" if p is None else f"{p:.2g}"


def _size(evaluation: Evaluation) -> str:
    number, samples = evaluation.summary["num_problems"], evaluation.summary["num_samples"]
    planned = evaluation.settings.get("num_problems", number) * evaluation.settings.get("num_samples", samples)
    unfinished = f" ({len(evaluation.rollouts)} of {planned} so far)" if len(evaluation.rollouts) < planned else ""
    return f"{number} × {samples}{unfinished}{left_out(evaluation)}"


def _decoding(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    return how if settings["top_p"] == 1 else f"{how}, top-p {settings['top_p']:g}"


# --- differences between models ---


def problem_names(evaluation: Evaluation) -> dict[int, str]:
    """For each problem its fingerprint; one that the data hold several times is told apart by a number, as it counts several times."""
    found, seen = {}, Counter()
    for row in evaluation.rollouts:
        if row["index"] not in found:
            problem = row.get("problem", str(row["index"]))
            seen[problem] += 1
            found[row["index"]] = f"{problem} {seen[problem]}"
    return found


def problem_values(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The metrics of Section 3 of each problem, the mean of its samples: by metric, then by the problem's name."""
    graded = [row for row in evaluation.rollouts if None not in row["correct"]]
    if not graded:
        return {}
    names = problem_names(evaluation)
    problems = [names[row["index"]] for row in graded]
    values = self_correction_values(torch.tensor([row["correct"] for row in graded], dtype=torch.float64))
    found = {}
    for name, column in values.items():
        by_problem = defaultdict(list)
        for problem, value in zip(problems, column.tolist(), strict=True):
            by_problem[problem].append(value)
        found[name] = {problem: float(np.mean(each)) for problem, each in by_problem.items()}
    return found


def paired_difference(base: Evaluation, other: Evaluation) -> tuple[dict[str, dict[str, float]], int]:
    """
    How much the metrics of an evaluation are above those of another one at the same problems, with 95 % bootstrap intervals over
    these problems. What makes a problem hard for both models is no part of the difference, so the interval is narrower than
    those of the models.

    Args:
        base, other ([`~trl_score.evaluation.Evaluation`]):
            Evaluations of the same task.

    Returns:
        `tuple`: metric to `{value, low, high}`, as shares, empty without common problems; and the number of common problems.
    """
    before, after = problem_values(base), problem_values(other)
    names = [name for name in after if name in before]
    common = [problem for problem in after[names[0]] if problem in before[names[0]]] if names else []
    if not common:
        return {}, 0
    values = np.array([[after[name][each] - before[name][each] for name in names] for each in common])  # (P, M)
    low, high = bootstrap_intervals(values)
    mean = values.mean(0)
    return {
        name: {"value": float(mean[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(names)
    }, len(common)


def difference_rows(evaluations: dict[str, Evaluation]) -> tuple[list[str], list[Row]]:
    """The evaluations that share problems with the first one, and their paired differences to it."""
    (_, base), *others = evaluations.items()
    compared = {name: paired_difference(base, each) for name, each in others}
    compared = {name: (found, number) for name, (found, number) in compared.items() if number}
    names = dict.fromkeys(name for found, _ in compared.values() for name in found)
    rows = []
    for name in names:
        cells = [found.get(name) for found, _ in compared.values()]
        sure = [cell is not None and not cell["low"] <= 0 <= cell["high"] for cell in cells]
        rows.append(Row(label(name), [_signed(name, cell) for cell in cells], sure))
    if compared:
        rows.append(Row("common problems", [(str(number), "") for _, number in compared.values()]))
    return list(compared), rows


def _signed(name: str, cell: dict | None) -> tuple[str, str]:
    value, interval = metric(name).parts(cell)
    return (f"+{value}" if cell is not None and cell["value"] > 0 and float(value) else value), interval


# --- levels ---


def level_rows(evaluations: dict[str, Evaluation]) -> tuple[list[tuple[str, list[str]]], list[Row]]:
    """
    Accuracies by level. Returns for each evaluation with levels its name and metrics, which are the columns, and a row for each
    level.
    """
    groups = [
        (name, [key for key in _metrics(each) if key.startswith("accuracy_")])
        for name, each in evaluations.items()
        if each.summary["by_level"]
    ]
    levels = sorted({level for name, _ in groups for level in evaluations[name].summary["by_level"]}, key=_natural)
    rows = []
    for level in levels:
        cells, counts = [], []
        for name, keys in groups:
            found = evaluations[name].summary["by_level"].get(level, {})
            counts.append(found.get("num_problems", 0))
            cells += [metric(key).parts(found.get(key)) for key in keys]
        number = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        rows.append(Row(f"{level} ({number} problems)", cells))
    return [(name, [label(key) for key in keys]) for name, keys in groups], rows


def _natural(level: str) -> tuple:
    return (0, float(level), "") if level.replace(".", "", 1).isdecimal() else (1, 0.0, level)


# --- statistics ---


def statistics_rows(evaluations: dict[str, Evaluation]) -> list[Row]:
    """Standard errors, pass@k, and what difference an evaluation of this size finds."""
    columns = [_statistics(evaluation) for evaluation in evaluations.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    ordered = sorted(names, key=lambda name: not name.startswith("pass@"))
    return [Row(name, [(column.get(name, ""), "") for column in columns]) for name in ordered]


def _statistics(evaluation: Evaluation) -> dict[str, str]:
    rows = [row for row in evaluation.rollouts if None not in row["correct"]]
    values = problem_values(evaluation)
    if len(values) < 4:  # nothing graded, or a single attempt
        return {}
    attempts = len(rows[0]["correct"])
    last, delta = f"accuracy_t{attempts}", f"delta_t1_t{attempts}"
    names = problem_names(evaluation)
    first_row = {names[row["index"]]: row for row in reversed(rows)}
    percent, result = metric("accuracy").number, {}
    for name in (last, delta):
        each = list(values[name].values())
        title = f"standard error of {label(name)}"
        result[title] = percent(standard_error(each))
        for column in CLUSTERS:
            clusters = [first_row[problem].get(column) for problem in values[name]]
            if None not in clusters and 1 < len(set(clusters)) < len(clusters):
                error = percent(standard_error(each, clusters))
                result[f"{title}, by {column}"] = f"{error} ({len(set(clusters))} clusters)"
    each = np.array(list(values[delta].values()))
    if len(each) > 1 and (variance := float(each.var(ddof=1))) > 0:
        result[f"smallest {label(delta)} that is found"] = percent(detectable_difference(variance, len(each)))
        for difference in DIFFERENCES:
            name = f"problems to find {label(delta)} of {100 * difference:g}"
            result[name] = f"{problems_needed(difference, variance):,}"
    return result | _pass_at_k(rows, attempts)


def _pass_at_k(rows: list[dict], attempts: int) -> dict[str, str]:
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["index"]].append(row["correct"])
    samples = [len(each) for each in by_problem.values()]
    result, k = {}, 1
    while min(samples) > 1 and k <= min(samples):
        for attempt in (1, attempts):
            right = [sum(correct[attempt - 1] for correct in each) for each in by_problem.values()]
            result[f"pass@{k}, attempt {attempt}"] = metric("accuracy").number(pass_at_k(right, samples, k).mean())
        k *= 2
    return result


# --- trainings ---


def settings_rows(found: Found) -> tuple[list[str], list[Row]]:
    """The settings of the training runs that recorded them: names of the runs, and a row for each setting."""
    runs = {name: run for name, run in found.runs.items() if run.settings}
    names = dict.fromkeys(name for run in runs.values() for name in run.settings)
    return list(runs), [
        _text_row(name, list(runs.values()), lambda run, n=name: run.settings.get(n, "")) for name in names
    ]


def instructions(found: Found) -> list[tuple[str, str]]:
    """A name and the text of each correction instruction."""
    several = len(found.instructions) > 1
    used = [instruction(each) for each in found.evaluations.values()]
    return [
        (f"Correction instruction {letter}" if several else "Correction instruction", text)
        for letter, text in found.instructions.items()
        if text in used and text
    ]
