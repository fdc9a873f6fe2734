import json
import math

import pytest

from trl_score import inference_scaling
from trl_score.scaling import cluster, majority, table, vote, votes
from trl_score.tasks import Arithmetic, get_task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.tasks.math import MathTask


BASE = str(BASE_MODEL_PATH)


def test_the_largest_cluster_wins_and_the_earlier_in_a_tie():
    assert majority([1, 2, 2]) == 1 and majority([1, 2, 2, 1]) == 0 and majority([None, 4, None]) == 1
    assert majority([None, None]) is None


def test_a_vote_over_groups_worked_by_hand():
    """Answers a a b | b b c with a right: the first group votes right, the second wrong."""
    clusters, correct = [0, 0, 1, 1, 1, 2], [True, True, False, False, False, False]
    assert vote(clusters, correct, 3) == 0.5
    assert vote(clusters, correct, 6) == 0.0  # three b against two a
    assert vote(clusters, correct, 1) == pytest.approx(2 / 6)
    assert vote([None] * 2, [False] * 2, 2) == 0.0


def test_answers_that_mean_the_same_vote_together():
    """Not by string: one half, 0.5 and 1/2 are three votes for one answer."""
    task = MathTask()
    found = cluster(task, {7: [r"\frac{1}{2}", "3", "0.5", None, "3", "1/2"], 8: []})
    assert found[7][0] == found[7][2] == found[7][5] != found[7][1] == found[7][4] and found[7][3] is None
    assert found[8] == [] and majority(found[7]) == 0
    task.close()


def row(index, sample, answers, correct):
    return {"index": index, "sample": sample, "answers": answers, "correct": correct}


def test_budgets_count_samples():
    """Budget 4 is four first attempts, or two corrected ones (two samples each)."""
    corrected = [row(0, 0, ["a", "b"], [True, False]), row(0, 1, ["c", "b"], [False, False])]
    parallel = [row(0, 0, ["a"], [True]), row(0, 1, ["d"], [False])]
    two, four = votes(Arithmetic(), corrected, parallel, 4)
    assert (two["budget"], four["budget"]) == (2, 4)
    assert two["parallel"]["value"] == 1.0  # a c | a d: ties go to the first
    assert four["parallel"]["value"] == 1.0  # a c a d
    assert two["corrected"]["value"] == four["corrected"]["value"] == 0.0


def test_ungraded_attempts_do_not_vote():
    """Problem 0: the ungraded b, two against one, does not win against a. Problem 1 has no graded correction, and is left out."""
    assert vote([0, 1, 1], [True, None, None], 3) == 1.0
    assert vote([1, 1, 0, 0], [None, None, True, True], 2) == 1.0  # the first group has no graded sample
    corrected = [
        row(0, 0, ["b", "b"], [None, None]),
        row(0, 1, ["a", "a"], [True, True]),
        row(1, 0, ["a", "a"], [False, None]),
        row(1, 1, ["a", "a"], [False, None]),
    ]
    parallel = [row(0, 0, ["b"], [None]), row(0, 1, ["a"], [True]), *(row(1, k, ["a"], [False]) for k in (0, 1))]
    for entry in votes(Arithmetic(), corrected, parallel, 4):
        assert entry["parallel"]["value"] == entry["corrected"]["value"] == 1.0
    (entry,) = votes(Arithmetic(), [row(0, 0, ["a", "a"], [None, None])], [row(0, 0, ["a"], [None])], 2)
    assert math.isnan(entry["parallel"]["value"]) and "|  |  |" in table([entry])


def test_one_pass_serves_all_budgets_and_is_resumed(tmp_path):
    settings = {"max_completion_length": 8, "limit": 20, "max_budget": 8, "batch_size": 64, "output_dir": tmp_path}
    found = inference_scaling(BASE, "arithmetic", **settings)
    assert [entry["budget"] for entry in found] == [2, 4, 8]
    sizes = [len((tmp_path / name / "rollouts.jsonl").read_text().splitlines()) for name in ("corrected", "parallel")]
    assert sizes == [20 * 4, 20 * 4]
    lines = (tmp_path / "parallel" / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parallel" / "rollouts.jsonl").write_text("".join(lines[:30]))
    assert inference_scaling(BASE, "arithmetic", **settings) == found
    assert json.loads((tmp_path / "scaling.json").read_text())["budgets"] == found
    for entry in found:
        for kind in ("parallel", "corrected"):
            assert 0 <= entry[kind]["low"] <= entry[kind]["value"] <= entry[kind]["high"] <= 1


def test_what_cannot_work_is_said(tmp_path):
    with pytest.raises(ValueError, match="`max_budget=6` is no power of 2"):
        inference_scaling(BASE, "arithmetic", max_budget=6, output_dir=tmp_path)
    with pytest.raises(ValueError, match="needs samples that differ"):
        inference_scaling(BASE, "arithmetic", temperature=0, output_dir=tmp_path)
    repair = get_task("humanevalfix", allow_code_execution=True)
    with pytest.raises(ValueError, match="'humanevalfix' gives the first attempts"):
        inference_scaling(BASE, repair, output_dir=tmp_path)
    repair.close()
