"""
The self-correction metrics of Section 3 and the edit-distance ratio of Section 4, how sure they are, and how they are shown. Files
and logs hold shares, from 0 to 1; tables show percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor


def self_correction_values(correct: Tensor) -> dict[str, Tensor]:
    r"""
    The metrics of Section 3 as one value per rollout; a metric is the mean of its values.

    - `accuracy_t{k}`: attempt $k$ is right. Of a single attempt there is nothing else.
    - `delta_t{k}_t{k+1}`: the change from one attempt to the next; with more than two attempts also from the first to the
      last.
    - `delta_i_to_c`, `delta_c_to_i`: the first attempt is wrong and the last right, and the reverse. Both are shares of all
      rollouts, so their difference is the change from the first attempt to the last.

    Args:
        correct (`torch.Tensor` of shape `(B, K)`):
            1 for a right attempt, 0 for a wrong one, NaN for one that could not be graded.

    Returns:
        `dict[str, torch.Tensor]`: values of shape `(n,)`, where the `n <= B` rollouts are those in which all attempts that
        the metric compares were graded.

    Example:
    ```python
    >>> values = self_correction_values(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    >>> {name: value.mean().item() for name, value in values.items()}
    {'accuracy_t1': 0.5, 'accuracy_t2': 0.75, 'delta_t1_t2': 0.25, 'delta_i_to_c': 0.5, 'delta_c_to_i': 0.25}
    ```
    """
    attempts = range(1, correct.size(1) + 1)
    values = {f"accuracy_t{k}": correct[:, k - 1] for k in attempts}
    for k in attempts[:-1]:
        values[f"delta_t{k}_t{k + 1}"] = correct[:, k] - correct[:, k - 1]
    if len(attempts) == 1:
        return {name: value[~value.isnan()] for name, value in values.items()}
    delta = correct[:, -1] - correct[:, 0]
    values[f"delta_t1_t{len(attempts)}"] = delta
    values["delta_i_to_c"] = delta.clamp(min=0)
    values["delta_c_to_i"] = (-delta).clamp(min=0)
    return {name: value[~value.isnan()] for name, value in values.items()}


def edit_distance_ratio(first: Sequence, second: Sequence) -> float:
    """
    Edit distance between two attempts over the sum of their lengths (Section 4): 0 for equal attempts, at most 1.

    Args:
        first (`Sequence`):
            Token ids, or text.
        second (`Sequence`):
            Token ids, or text.

    Example:
    ```python
    >>> edit_distance_ratio([1, 2, 3], [1, 2, 4])
    0.16666666666666666
    ```
    """
    total = len(first) + len(second)
    return Levenshtein.distance(first, second) / total if total else 0.0


def attempt_changes(attempts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """
    How much each attempt differs from the one before: the [`edit_distance_ratio`] of every two neighbours.

    Args:
        attempts (`Sequence`):
            `B` rollouts of `K` attempts, each a sequence of token ids.

    Returns:
        `torch.Tensor` of shape `(B, K - 1)`: 0 for an attempt that repeats the one before.
    """
    return torch.tensor(
        [[edit_distance_ratio(first, second) for first, second in pairwise(rollout)] for rollout in attempts]
    )


def bootstrap_intervals(
    numerators: np.ndarray,
    denominators: np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """
    Percentile bootstrap intervals of means over problems, or of ratios of two sums over problems. Problems are drawn with
    replacement, each with all that belongs to it (its samples, its attempts), so differences between attempts are paired.

    Args:
        numerators (`np.ndarray` of shape `(P,)` or `(P, M)`):
            One value per problem and metric.
        denominators (`np.ndarray` of the same shape, *optional*):
            Ones by default.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage.
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `np.ndarray` of shape `(2,)` or `(2, M)`: the limits; NaN where there is nothing to draw from.
    """
    values = np.asarray(numerators, float)
    number, shape = len(values), values.shape[1:]
    if number == 0:
        return np.full((2, *shape), np.nan)
    values = values.reshape(number, -1)
    weights = np.ones_like(values) if denominators is None else np.asarray(denominators, float).reshape(values.shape)
    rng, ratios, chunk = np.random.default_rng(seed), [], 500
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * number).reshape(
            size, number
        )  # how often each problem came up
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios.append((counts @ values) / (counts @ weights))
    ratios = np.concatenate(ratios)  # (resamples, M)
    limits = np.full((2, ratios.shape[1]), np.nan)
    for column, found in enumerate(ratios.T):
        if len(found := found[np.isfinite(found)]):
            limits[:, column] = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return limits.reshape(2, *shape)


def mcnemar(first: Sequence[bool], last: Sequence[bool]) -> float:
    """
    p-value of the exact two-sided McNemar test: were as many attempts corrected as broken? 1.0 if none changed.

    Args:
        first (`Sequence[bool]`):
            Whether the first attempt is right, per problem.
        last (`Sequence[bool]`):
            Whether the last attempt is right.

    Example:
    ```python
    >>> mcnemar([False] * 8 + [True] * 2, [True] * 8 + [False] * 2)
    0.109375
    ```
    """
    corrected = sum(not before and after for before, after in zip(first, last, strict=True))
    broken = sum(before and not after for before, after in zip(first, last, strict=True))
    changed = corrected + broken
    tail = sum(
        comb(changed, i) for i in range(min(corrected, broken) + 1)
    )  # of 2^changed, one side of a symmetric binomial
    return min(1.0, 2 * tail / 2**changed)


@dataclass(frozen=True)
class Metric:
    """
    How a metric is shown, in every table and figure.

    Attributes:
        label (`str`):
            Its name, as the paper writes it.
        unit (`str`):
            The unit in tables: `"%"`, `"tokens"`, or none for a ratio.
        digits (`int`):
            Digits after the point.
    """

    label: str
    unit: str = "%"
    digits: int = 1

    def number(self, value: float | None) -> str:
        """A value in the metric's unit; empty where there is none."""
        if value is None or not math.isfinite(value):
            return ""
        return f"{round((100 if self.unit == '%' else 1) * value, self.digits) + 0.0:.{self.digits}f}"  # no minus zero

    def parts(self, found: "float | Mapping[str, float | None] | None") -> tuple[str, str]:
        """A value, or one with its limits (`value`, `low`, `high`), as two texts: the value, and the interval in brackets."""
        if not isinstance(found, Mapping):
            found = {"value": found}
        value, low, high = (self.number(found.get(key)) for key in ("value", "low", "high"))
        return value, f"[{low}, {high}]" if value and low and high else ""

    def cell(self, found: "float | Mapping[str, float | None] | None") -> str:
        """The cell of a table: [`Metric.parts`] side by side."""
        return " ".join(filter(None, self.parts(found)))


_FIXED = {
    "delta_i_to_c": Metric("Δ(i→c)"),
    "delta_c_to_i": Metric("Δ(c→i)"),
    "correction_rate": Metric("corrected, of the wrong ones"),
    "edit_distance_ratio": Metric("edit-distance ratio", "", 2),
    "changed_answers": Metric("changed answers"),
    "changed_ratio": Metric("changed"),
}


def metric(name: str) -> Metric:
    """A metric by its name in logs and files, such as `accuracy_t1`."""
    if name in _FIXED:
        return _FIXED[name]
    kind, _, attempts = name.partition("_")
    if kind == "delta":
        return Metric(f"Δ({','.join(attempts.split('_'))})")
    if kind == "num":
        return Metric(f"tokens @{attempts.removeprefix('tokens_')}", "tokens", 0)
    known = {"accuracy": "Accuracy@", "truncated": "cut off @"}
    return Metric(f"{known[kind]}{attempts}" if kind in known else name)


def label(name: str) -> str:
    """A metric's name as the paper writes it."""
    return metric(name).label


def not_graded(number: int) -> str:
    """How many rollouts a number of problems leaves out, for the text behind it."""
    return f" ({number} not graded)" if number else ""
