import pytest
import torch

from trl_score.metrics import attempt_changes, edit_distance_ratio, metric, self_correction_values


NAN = float("nan")


def means(correct):
    return {name: value.mean().item() for name, value in self_correction_values(torch.tensor(correct)).items()}


def test_metrics_of_the_four_transitions():
    """2 of i→c, 1 of c→c, 1 of c→i, 1 of i→i: t1 = 2/5, t2 = 3/5, i→c = 2/5, c→i = 1/5."""
    expected = {"accuracy_t1": 0.4, "accuracy_t2": 0.6, "delta_t1_t2": 0.2, "delta_i_to_c": 0.4, "delta_c_to_i": 0.2}
    assert means([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]) == pytest.approx(expected)


def test_three_attempts_compare_neighbours_and_the_ends():
    values = means([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    expected = {
        "accuracy_t1": 0.25,
        "accuracy_t2": 0.75,
        "accuracy_t3": 0.75,
        "delta_t1_t2": 0.5,
        "delta_t2_t3": 0.0,
        "delta_t1_t3": 0.5,
        "delta_i_to_c": 0.75,
        "delta_c_to_i": 0.25,
    }
    assert values == pytest.approx(expected)


def test_ungraded_attempts_leave_the_metrics_that_need_them():
    values = self_correction_values(torch.tensor([[NAN, 1.0], [0.0, NAN], [0.0, 1.0]]))
    assert values["accuracy_t1"].tolist() == [0.0, 0.0]
    assert values["accuracy_t2"].tolist() == [1.0, 1.0]
    assert values["delta_t1_t2"].tolist() == [1.0]


def test_edit_distance_ratio_by_hand():
    """One substitution in 3 + 3 tokens; 2 insertions in 1 + 3 tokens; nothing in common."""
    assert edit_distance_ratio([1, 2, 3], [1, 2, 4]) == pytest.approx(1 / 6)
    assert edit_distance_ratio([1], [1, 2, 3]) == pytest.approx(1 / 2)
    assert edit_distance_ratio([1, 2], [3, 4]) == pytest.approx(1 / 2)
    assert edit_distance_ratio("kitten", "sitting") == pytest.approx(3 / 13)
    assert edit_distance_ratio([], []) == 0.0


def test_changes_of_all_neighbours():
    """Pairs of the second rollout: equal (0), then one of 2 + 2 tokens changed (1/4)."""
    changes = attempt_changes([[[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [1, 3]]])
    torch.testing.assert_close(changes, torch.tensor([[0.0, 0.0], [0.0, 0.25]]))


@pytest.mark.parametrize(
    ("name", "label", "cell"),
    [
        ("accuracy_t1", "Accuracy@t1", "50.0 [25.0, 75.0]"),
        ("delta_t1_t2", "Δ(t1,t2)", "50.0 [25.0, 75.0]"),
        ("delta_i_to_c", "Δ(i→c)", "50.0 [25.0, 75.0]"),
        ("delta_c_to_i", "Δ(c→i)", "50.0 [25.0, 75.0]"),
        ("truncated_t2", "cut off @t2", "50.0 [25.0, 75.0]"),
        ("correction_rate", "corrected, of the wrong ones", "50.0 [25.0, 75.0]"),
        ("changed_answers", "changed answers", "50.0 [25.0, 75.0]"),
        ("edit_distance_ratio", "edit-distance ratio", "0.50 [0.25, 0.75]"),
    ],
)
def test_a_metric_is_shown_in_its_unit(name, label, cell):
    found = {"value": 0.5, "low": 0.25, "high": 0.75}
    assert (metric(name).label, metric(name).cell(found)) == (label, cell)


def test_cells_without_a_value_or_without_limits():
    assert metric("num_tokens_t2").cell({"value": 12.4, "low": 10.0, "high": 13.6}) == "12 [10, 14]"
    assert metric("num_tokens_t2").label == "tokens @t2"
    shown = metric("accuracy_t1")
    assert shown.cell(None) == shown.cell(NAN) == shown.cell({"value": None, "low": None, "high": None}) == ""
    assert shown.cell(0.5) == shown.cell({"value": 0.5, "low": NAN, "high": NAN}) == "50.0"
    assert shown.cell(-0.0001) == shown.cell(-0.0) == "0.0"
