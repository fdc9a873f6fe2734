"""pass@k, clustered standard errors and the power of a paired comparison."""

import doctest
import math
from itertools import combinations

import numpy as np
import pytest

from trl_score.metrics import statistics
from trl_score.metrics.statistics import detectable_difference, pass_at_k, problems_needed, standard_error


def test_examples_in_docstrings_are_true():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name in ("pass_at_k", "standard_error", "detectable_difference", "problems_needed"):
        docstring = getattr(statistics, name).__doc__.replace("```python", "").replace("```", "")
        runner.run(parser.get_doctest(docstring, vars(statistics), name, None, None))
    assert runner.summarize().attempted >= 5 and not runner.summarize().failed


def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one():
    for right in ([0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]):
        for k in range(1, 6):
            draws = [any(draw) for draw in combinations(right, k)]
            assert pass_at_k([sum(right)], [5], k)[0] == pytest.approx(np.mean(draws))
    with pytest.raises(ValueError, match="one has 3"):
        pass_at_k([1, 1], [4, 3], 4)


def test_clusters_of_one_problem_give_the_ordinary_error():
    values = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    expected = values.std(ddof=1) / math.sqrt(50)
    assert standard_error(values) == pytest.approx(expected)
    assert standard_error(values, range(50)) == pytest.approx(expected)
    assert math.isnan(standard_error([])) and math.isnan(standard_error(values, ["same"] * 50))


def test_copies_of_a_problem_are_one_problem():
    """Ten copies of each of 30 problems tell no more than the 30: the error is that of the cluster means."""
    values = np.random.default_rng(1).integers(0, 2, 30).astype(float)
    copies, names = np.repeat(values, 10), np.repeat(np.arange(30), 10)
    assert standard_error(copies, names) == pytest.approx(standard_error(values))
    assert standard_error(copies) < 0.4 * standard_error(values)


def test_the_power_is_what_simulated_comparisons_have():
    """Where 10 % of the attempts are corrected and 4.4 % broken, 80 % of the evaluations of this size find Δ."""
    up, down = 0.1, 0.044
    difference = up - down
    variance = up + down - difference**2
    size = problems_needed(difference, variance)
    assert detectable_difference(variance, size) <= difference < detectable_difference(variance, size - 1)
    rng = np.random.default_rng(0)
    drawn = rng.choice([1, -1, 0], p=[up, down, 1 - up - down], size=(4000, size))
    z = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(size))
    assert np.mean(abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="difference=0"):
        problems_needed(0.0, 0.1)
