"""Evaluations as logs of Inspect, read back by Inspect itself."""

import pytest
from test_report import save_evaluation

from trl_score.cli import main
from trl_score.report.inspect_logs import write_inspect_logs


def test_inspect_reads_the_dialogues_and_the_scores(tmp_path, capsys):
    log_module = pytest.importorskip("inspect_ai.log", reason="Inspect is not installed")
    asked = {"correction_instruction": "Check it.", "num_problems": 2}
    save_evaluation(tmp_path / "base", "me/base", [[False, True], [None, True]], **asked)
    save_evaluation(tmp_path / "half", "me/half", [[False, True]], **asked)
    command = ["report", str(tmp_path / "base"), str(tmp_path / "half"), "--format", "inspect"]
    assert main([*command, "--output", str(tmp_path / "logs")]) == 0
    assert "2 logs" in capsys.readouterr().out
    log = log_module.read_eval_log(str(tmp_path / "logs" / "base.eval"))
    assert log.status == "success" and log.eval.model == "base" and log.eval.task == "arithmetic"
    first, second = log.samples
    assert [(message.role, message.content) for message in first.messages] == [
        ("user", "problem number 0"),
        ("assistant", "first line of 0\nanswer one"),
        ("user", "Check it."),
        ("assistant", "first line of 0\nanswer two"),
    ]
    assert {name: (score.value, score.answer) for name, score in first.scores.items()} == {
        "attempt_1": (0, "a"),
        "attempt_2": (1, "b"),
    }
    assert second.scores.keys() == {"attempt_2"} and second.metadata["transition"] == "?"
    metrics = {score.name: score.metrics for score in log.results.scores}
    assert metrics["attempt_2"]["accuracy"].value == 1 and metrics["self_correction"]["delta_i_to_c"].value == 1
    assert log_module.read_eval_log(str(tmp_path / "logs" / "half.eval")).status == "cancelled"


def test_inspect_reads_feedback_as_turns_of_the_model(tmp_path):
    log_module = pytest.importorskip("inspect_ai.log", reason="Inspect is not installed")
    turns = {"self_refine": True, "feedback_instruction": "Feedback?", "refine_instruction": "Refine."}
    save_evaluation(tmp_path / "refined", "me/base", [[False, True]], **turns)
    (file,) = write_inspect_logs([tmp_path / "refined"], tmp_path / "logs")
    messages = log_module.read_eval_log(str(file)).samples[0].messages
    assert [message.role for message in messages] == ["user", "assistant"] * 3
    assert messages[2].content == "Feedback?" and messages[4].content == "Refine."


def test_without_evaluations_or_without_inspect_the_error_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai.log", None)
    save_evaluation(tmp_path / "base", "me/base", [[False, True]])
    assert main(["report", str(tmp_path / "base"), "--format", "inspect"]) == 1
    assert "pip install 'trl-score[inspect]'" in capsys.readouterr().err
