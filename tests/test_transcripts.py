"""`log_completions`: rollouts as dialogues that fit the console."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from trl_score.batch import Batch
from trl_score.objective import Stage
from trl_score.transcripts import transcript


def made(texts, rewards, num_generations=1):
    """A batch with the texts and rewards of each attempt."""
    stage, rows = Stage(2, credited=(1, 2), held=()), len(texts[0])
    completions = [[[{"role": "assistant", "content": text}] for text in each] for each in texts]
    rewards = [torch.tensor(each).view(rows, -1) for each in rewards]
    return Batch(
        "train",
        stage,
        2,
        num_generations,
        ["please check again"] * rows,
        [None] * rows,
        completions=completions,
        rewards=rewards,
    )


def test_a_rollout_is_a_dialogue_with_its_verdicts():
    batch = made([["1 2"], ["1 3"]], [[[0.0, 0.123456]], [[1.0, float("nan")]]])
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is it?"}]
    assert transcript(batch, [prompt], 20).splitlines() == [
        "",
        "step 20, stage 2, rollout 0 " + "-" * 52,
        "problem:",
        "  What is it?",
        "attempt 1: wrong, reward 0 + 0.12",
        "  1 2",
        "instruction:",
        "  please check again",
        "attempt 2: right, reward 1 + none",
        "  1 3",
    ]


def test_no_line_is_wider_than_the_console_and_paragraphs_stay():
    text = transcript(made([["word " * 60 + "\n\nend"], ["x" * 300]], [[0.0], [float("nan")]]), ["problem " * 40], 1)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "  end" in lines and "" in lines[2:]
    assert "attempt 2: not graded, reward none" in lines


def test_different_problems_are_shown_first():
    """Three rollouts of each of two problems: one of each, then the second ones."""
    batch = made([list("abcdef")] * 2, [[0.0] * 6] * 2, num_generations=3)
    shown = [line for line in transcript(batch, list("pppqqq"), 1).splitlines() if line.startswith("step")]
    assert [line.split("rollout ")[1].split()[0] for line in shown] == ["0", "3", "1", "4"]
    assert transcript(batch, [None, None, *"pqqq"], 1, number=1).count("rollout 3") == 1
    assert transcript(batch, list("pppqqq"), 1, number=6).count("problem:") == 6


def test_a_training_shows_them(make_arithmetic_trainer, capsys):
    trainer = make_arithmetic_trainer(log_completions=True, num_completions_to_print=2, max_steps=2)
    trainer.train()
    out = capsys.readouterr().out
    trainer.evaluate()
    evaluated = capsys.readouterr().out
    for text, blocks in ((out, 4), (evaluated, 2)):
        assert text.count("please check again") == text.count("problem:") == blocks
        assert text.count("right, reward 1") + text.count("wrong, reward 0") == 2 * blocks
        lines = [line for line in text.splitlines() if not line.startswith("{")]  # those are transformers' own logs
        assert max(map(len, lines)) <= 80 and "Advantage" not in text
    problem = evaluated.split("problem:\n  ")[1].split("\n")[0]
    row = trainer.eval_dataset["prompt"].index([{"role": "user", "content": problem}])
    attempt = evaluated.split("attempt 1: ")[1]
    verdict, said = attempt.split(",")[0], attempt.split("\n  ")[1].split("\n")[0]
    assert (said.split() == trainer.eval_dataset["answer"][row].split()) == (verdict == "right")  # of the same row


def test_trls_table_is_kept_in_files_and_not_printed(make_arithmetic_trainer, capsys, monkeypatch):
    """Also without the package `rich`, which TRL's table needs. The number to print is the user's again after a log."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_rich_available", lambda: False)
    trainer = make_arithmetic_trainer(log_completions=True, num_completions_to_print=2, max_steps=1)
    trainer.log({"before": 1.0})  # nothing was sampled yet
    assert "problem:" not in capsys.readouterr().out and trainer.num_completions_to_print == 2
    trainer.train()
    assert capsys.readouterr().out.count("problem:") == 2
    trainer.log({"after": 1.0})  # the same rollouts
    assert "problem:" not in capsys.readouterr().out
    (file,) = Path(trainer.args.output_dir, "completions").glob("completions_00001.parquet")
    table = pd.read_parquet(file)
    assert len(table) == len(trainer._logs["prompt"]) and {"reward/attempt_1", "advantage/attempt_2"} <= set(table)

    def fail(*args):
        raise OSError("no disk")

    monkeypatch.setattr("transformers.Trainer.log", fail)
    with pytest.raises(OSError, match="no disk"):
        trainer.log({})
    assert trainer.num_completions_to_print == 2
