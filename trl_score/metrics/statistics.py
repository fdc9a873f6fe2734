"""
How much an evaluation can tell: pass@k, standard errors when problems belong together, and how many problems a difference needs.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np


def pass_at_k(num_right: Sequence[int], num_samples: Sequence[int], k: int) -> np.ndarray:
    r"""
    Probability that at least one of `k` samples of a problem is right: the unbiased estimate
    $1 - \binom{n - c}{k} / \binom{n}{k}$ from $n$ samples with $c$ right ones (Chen et al. 2021,
    https://huggingface.co/papers/2107.03374).

    Args:
        num_right (`Sequence[int]` of `P` numbers):
            Right samples of each problem, $c$.
        num_samples (`Sequence[int]` of `P` numbers):
            Samples of each problem, $n$.
        k (`int`):
            Samples that are drawn without replacement.

    Returns:
        `np.ndarray` of shape `(P,)`: one probability per problem; pass@k is their mean.

    Raises:
        `ValueError`: If a problem has fewer than `k` samples.

    Example:
    ```python
    >>> [float(value) for value in pass_at_k([0, 1, 4], [4, 4, 4], k=2)]
    [0.0, 0.5, 1.0]
    ```
    """
    if k < 1 or min(num_samples, default=k) < k:
        raise ValueError(
            f"`k={k}` samples are drawn of each problem, but one has {min(num_samples, default=0)}. Set `k` from 1 to the "
            "smallest number of samples."
        )
    return np.array(
        [1 - math.comb(n - right, k) / math.comb(n, k) for right, n in zip(num_right, num_samples, strict=True)]
    )


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    r"""
    Standard error of a mean over problems. Problems of one cluster (a subject, a passage, a level) may be right or wrong
    together: then the error is $\sqrt{\frac{G}{G - 1} \sum_g (\sum_{i \in g} (v_i - \bar v))^2} / P$ over $G$ clusters (Miller
    2024, https://huggingface.co/papers/2411.00640). With few clusters it is itself uncertain.

    Args:
        values (`Sequence[float]` of `P` numbers):
            One value per problem.
        clusters (`Sequence[Hashable]` of `P` names, *optional*):
            The cluster of each problem. By default, each problem is its own.

    Returns:
        `float`: the error, in the unit of the values; NaN with fewer than two clusters.

    Example:
    ```python
    >>> standard_error([0.0, 0.0, 1.0, 1.0])
    0.28867513459481287
    >>> standard_error([0.0, 0.0, 1.0, 1.0], ["algebra", "algebra", "geometry", "geometry"])
    0.5
    ```
    """
    values = np.asarray(values, float)
    _, cluster = np.unique(
        range(len(values)) if clusters is None else [str(each) for each in clusters], return_inverse=True
    )
    number = cluster.max(initial=-1) + 1
    if number < 2:
        return math.nan
    sums = np.bincount(cluster, values - values.mean())
    return float(math.sqrt(number / (number - 1) * (sums**2).sum()) / len(values))


def detectable_difference(variance: float, num_problems: int, *, power: float = 0.8, level: float = 0.05) -> float:
    r"""
    The smallest difference that a paired comparison over so many problems finds with a given probability:
    $(z_{1 - \text{level} / 2} + z_\text{power}) \sqrt{\text{variance} / P}$.

    Args:
        variance (`float`):
            Variance of the difference of one problem. For Δ(t1,t2) with one rollout per problem it is
            Δ(i→c) + Δ(c→i) - Δ².
        num_problems (`int`):
            Problems, $P$.
        power (`float`, *optional*, defaults to `0.8`):
            Probability of finding the difference.
        level (`float`, *optional*, defaults to `0.05`):
            Probability of finding one where there is none, two-sided.

    Returns:
        `float`: the difference, in the unit of the values.

    Example:
    ```python
    >>> round(detectable_difference(0.1, 500), 4)
    0.0396
    ```
    """
    return _quantiles(power, level) * math.sqrt(variance / num_problems)


def problems_needed(difference: float, variance: float, *, power: float = 0.8, level: float = 0.05) -> int:
    """
    How many problems a paired comparison needs to find a difference: the inverse of [`detectable_difference`].

    Args:
        difference (`float`):
            The difference to find, not 0.
        variance, power, level (`float`):
            As for [`detectable_difference`].

    Returns:
        `int`: the number of problems, at least 2.

    Raises:
        `ValueError`: If the difference is 0, which no number of problems can find.

    Example:
    ```python
    >>> problems_needed(0.02, variance=0.1)
    1963
    ```
    """
    if difference == 0:
        raise ValueError("`difference=0` cannot be told from no difference. Set it to the smallest one that matters.")
    return max(2, math.ceil(variance * (_quantiles(power, level) / difference) ** 2))


def _quantiles(power: float, level: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)
