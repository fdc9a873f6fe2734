"""Tables and figures over several seeds."""

import json

import numpy as np
import pytest

from comparison import (
    comparison_table,
    curves,
    curves_figure,
    edit_distances_figure,
    interval,
    tokens_figure,
    tokens_until,
    values,
)
from trl_score.evaluation import Evaluation


def evaluation(verdicts, indices=None, ratio=0.25):
    rollouts = [
        {"index": index, "sample": 0, "correct": list(row), "edit_distance_ratio": [ratio]}
        for index, row in zip(indices or range(len(verdicts)), verdicts, strict=True)
    ]
    return Evaluation({"model": "m"}, rollouts, {"metrics": {}})


IC, CI, CC, II = (False, True), (True, False), (True, True), (False, False)


def test_values_are_by_seed_and_problem():
    found = values([evaluation([IC, CI, CC, II]), evaluation([CC, CC, CC, IC])])
    assert found["accuracy_t1"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert found["accuracy_t2"].tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert found["delta_t1_t2"].tolist() == [[1, -1, 0, 0], [0, 0, 0, 1]]
    assert found["delta_i_to_c"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert found["delta_c_to_i"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_with_three_attempts_changes_are_from_the_first_to_the_last():
    found = values([evaluation([(False, True, False), (True, False, True), (False, True, True), (True, True, False)])])
    assert list(found) == [*(f"accuracy_t{k}" for k in (1, 2, 3)), "delta_t1_t3", "delta_i_to_c", "delta_c_to_i"]
    assert found["accuracy_t2"].tolist() == [[1, 0, 1, 1]] and found["accuracy_t3"].tolist() == [[0, 1, 1, 0]]
    assert found["delta_t1_t3"].tolist() == [[0, 0, 1, -1]]
    three = {"base": [evaluation([(False, True, False)])], "SCoRe": [evaluation([(False, False, True)])]}
    head, _, base, _ = comparison_table(three).splitlines()
    assert "| Accuracy@t3 | Δ(t1,t3) |" in head and head.endswith("| @t3 minus SCoRe's |")
    assert base.endswith("| -100.0 [-100.0, -100.0] |")
    with pytest.raises(ValueError, match="different numbers of attempts"):
        comparison_table(three | {"other": [evaluation([IC])]})


@pytest.mark.parametrize(
    "runs, message",
    [
        ([evaluation([IC]), evaluation([IC, CC])], "not of the same problems"),
        ([evaluation([IC, CC], indices=[3, 3])], "not of the same problems with one rollout each"),
        ([evaluation([(None, True)])], "could not be graded"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        values(runs)


def test_interval_covers_the_mean_in_95_of_100_studies():
    """Values with an effect of the seed, of the problem and of both: 300 simulated studies of 5 seeds and 60 problems."""
    rng, covered = np.random.default_rng(0), 0
    for study in range(300):
        found = 0.3 + rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.3, (8, 60))
        value, low, high = interval(found, resamples=1000, seed=study)
        assert value == pytest.approx(found.mean())
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 300 <= 0.99


def test_interval_of_one_seed_is_over_problems_and_of_equal_problems_over_seeds():
    """One seed: the binomial's deviation, 0.5 / sqrt(400) = 0.025. One value per seed: that of their mean."""
    one = (np.arange(400) % 2 == 0)[None].astype(float)
    _, low, high = interval(one)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.025, rel=0.05)
    by_seed = np.repeat(np.linspace(0, 1, 40)[:, None], 3, axis=1)
    _, low, high = interval(by_seed)
    assert (high - low) / 2 == pytest.approx(1.96 * by_seed[:, 0].std() / 40**0.5, rel=0.05)


def test_difference_pairs_the_problems():
    """Two methods that differ by 0.1 on every problem: what the problems have in common cancels."""
    problems = np.random.default_rng(0).normal(0, 1, (1, 200))
    value, low, high = interval(problems + 0.1, problems)
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1))
    alone = interval(problems + 0.1)
    assert alone[2] - alone[1] > 0.2


def test_table_has_the_columns_of_the_paper_and_the_difference():
    methods = {"base": [evaluation([CI, CC, II, II])], "SCoRe": [evaluation([IC, CC, IC, IC]), evaluation([CC] * 4)]}
    head, _, base, score = comparison_table(methods).splitlines()
    assert head == ("| method | seeds | Accuracy@t1 | Accuracy@t2 | Δ(t1,t2) | Δ(i→c) | Δ(c→i) | @t2 minus SCoRe's |")
    assert base.startswith("| base | 1 | 50.0 [") and "| -25.0 [" in base and "| -75.0 [" in base
    assert score.startswith("| SCoRe | 2 | 62.5 [") and "| 100.0 [100.0, 100.0] |" in score and score.endswith("|  |")
    assert "minus" not in comparison_table({"base": methods["base"]})
    more = comparison_table(methods, more={"tokens": {"SCoRe": "12"}}).splitlines()
    assert "| Δ(c→i) | tokens | @t2 minus SCoRe's |" in more[0]
    assert "] |  | -75.0 [" in more[2] and more[3].endswith("| 12 |  |")


def test_figures_show_every_method(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        logs = [
            {"step": step, "accuracy_t1": 0.5, "accuracy_t2": 0.1 * step + 0.01 * seed, "changed_ratio": 0.2}
            for step in range(1, 5 - seed)
        ]
        (tmp_path / str(seed) / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    steps, found = curves([tmp_path / "0", tmp_path / "1"], "accuracy_t2")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(found, [[0.1, 0.2, 0.3], [0.11, 0.21, 0.31]])
    figure = curves_figure({"SCoRe": [tmp_path / "0", tmp_path / "1"], "no bonus": [tmp_path / "0"]})
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([10.5, 20.5, 30.5])
    methods = {name: [evaluation([IC, CC])] for name in "abcdefg"}
    shown = [axes for axes in edit_distances_figure(methods).axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list("abcdefg")
    assert all(sum(bar.get_height() for bar in axes.patches) == pytest.approx(100) for axes in shown)


def test_tokens_until_an_accuracy_is_reached(tmp_path):
    """Evaluated three times; logs of training are between them, and the final evaluation repeats the last."""
    for name, found in {
        "fast": (0.2, 0.96, 0.9, 0.9),
        "slow": (0.2, 0.3, 0.95, 0.95),
        "never": (0.2, 0.3, 0.4, 0.4),
    }.items():
        logs = []
        for step, (tokens, accuracy) in enumerate(zip((0, 1000, 2000, 2000), found, strict=True)):
            step = min(step, 2)
            logs.append({"step": step, "accuracy_t1": 0.5, "accuracy_t2": 1.0, "num_generated_tokens": tokens})
            logs.append(
                {
                    "step": step,
                    "eval_accuracy_t1": 1.0,
                    "eval_accuracy_t2": accuracy,
                    "eval_num_generated_tokens": tokens,
                }
            )
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert [tokens_until(tmp_path / name, 0.95) for name in ("fast", "slow", "never")] == [1000, 2000, None]
    figure = tokens_figure({"a": [tmp_path / "fast", tmp_path / "slow"], "b": [tmp_path / "never"]}, {"b": 500})
    first, second = figure.axes[0].lines
    assert first.get_xdata().tolist() == [0, 1, 2] and second.get_xdata().tolist() == [0.5, 1.5, 2.5]
    assert first.get_ydata() == pytest.approx([20, 63, 92.5])
