"""Collected rollouts: their tokens, what is shared between processes, and as stored first attempts."""

import json

import pytest
from datasets import Dataset
from processes import python, ranks

from trl_score import cli
from trl_score.collection import collect, describe, with_first_attempts
from trl_score.evaluation import evaluate_self_correction
from trl_score.sampling import Attempt, Sampler, TransformersSampler
from trl_score.tasks import Arithmetic, Task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BASE = str(BASE_MODEL_PATH)
SETTINGS = {"max_completion_length": 8, "num_samples": 3, "batch_size": 16, "limit": 20}


def test_records_have_the_tokens_that_were_sampled():
    sampler = TransformersSampler(BASE)
    rollouts = collect(sampler, "arithmetic", **SETTINGS)
    assert [(row["index"], row["sample"]) for row in rollouts] == [(i, k) for i in range(20) for k in range(3)]
    for row in rollouts:
        assert [sampler.tokenizer.decode(ids, skip_special_tokens=True) for ids in row["token_ids"]] == row["attempts"]
        assert [len(ids) for ids in row["token_ids"]] == row["num_tokens"]
    rows = Arithmetic().load("train")
    assert [row["prompt"] for row in rollouts[::3]] == rows[:20]["prompt"]
    gold = [answer for answer in rows[:20]["answer"] for _ in range(3)]
    assert [row["correct"][1] for row in rollouts] == [
        r["attempts"][1] == g for r, g in zip(rollouts, gold, strict=True)
    ]
    assert len({tuple(row["token_ids"][0]) for row in rollouts[:3]}) > 1  # sampled
    share = 100 * sum(row["correct"][0] for row in rollouts) / 60
    assert describe(rollouts).startswith(f"60 rollouts at 20 problems, Accuracy@t1 {share:.1f} %, Accuracy@t2 ")


def test_first_attempts_alone_are_those_of_the_same_seed():
    both, one = (collect(BASE, "arithmetic", **SETTINGS, num_attempts=n) for n in (2, 1))
    assert [row["token_ids"][0] for row in both] == [row["token_ids"][0] for row in one]
    assert all(len(row["attempts"]) == 1 for row in one)


def test_two_processes_collect_what_one_does(tmp_path):
    """Each in a file of its own; then one process finds all of it done."""
    expected = collect(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path / "one")
    arguments = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = ["-m", "trl_score.cli", "collect", "--model", BASE, "--task", "arithmetic", *arguments]
    done = ranks(2, *command, "--output_dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("60 rollouts at 20 problems") == 1  # said by the main process
    counts = [
        len((tmp_path / "two" / name).read_text().splitlines()) for name in ("rollouts.jsonl", "rollouts-1.jsonl")
    ]
    assert sum(counts) == 60 and min(counts) > 20
    again = collect(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path / "two")
    assert again == expected


def test_an_interrupted_collection_goes_on(tmp_path):
    whole = collect(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path / "whole")
    file = tmp_path / "part" / "rollouts.jsonl"
    file.parent.mkdir()
    (tmp_path / "part" / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
    lines = (tmp_path / "whole" / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:16]) + lines[16][:40])
    assert collect(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path / "part") == whole
    with pytest.raises(ValueError, match="holds another evaluation: temperature 1"):
        collect(BASE, "arithmetic", **SETTINGS, temperature=0.5, output_dir=tmp_path / "part")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.0}, "greedy decoding gives the same rollout every time"),
        ({"num_attempts": 0}, "`num_attempts=0`"),
        ({"backend": "x"}, "Unknown backend 'x'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        collect(BASE, "arithmetic", **SETTINGS | changes)


def test_given_attempts_are_not_collected():
    class Repair(Task):
        name, correction_instruction, num_given_attempts = "repair", "again", 1

        def load(self, split):
            raise AssertionError

        def reward(self, completions, **kwargs):
            raise AssertionError

    with pytest.raises(ValueError, match="'repair' gives the first attempts: it is for evaluation"):
        collect(BASE, Repair())


# Stored first attempts


def test_stored_first_attempts_are_a_column_of_their_problems(tmp_path):
    rollouts = collect(BASE, "arithmetic", **SETTINGS, num_attempts=1, output_dir=tmp_path)
    rows = Arithmetic().load("train").select(range(12))  # fewer than were collected on
    stored = with_first_attempts(rows, tmp_path, Arithmetic())["first_attempts"]
    assert stored == [[rollouts[3 * i + k]["token_ids"][0] for k in range(3)] for i in range(12)]
    named = type("Named", (Arithmetic,), {"name": "./arithmetic"})()  # as a file of problems with another path
    assert with_first_attempts(rows, tmp_path, named)["first_attempts"] == stored
    other = type("Other", (Arithmetic,), {"name": "other", "grader": "other"})()
    with pytest.raises(ValueError, match="holds attempts at other problems"):
        with_first_attempts(rows, tmp_path, other)
    with pytest.raises(ValueError, match="has no first attempts of 10 of the 30 problems"):
        with_first_attempts(Arithmetic().load("train").select(range(30)), tmp_path)
    with pytest.raises(ValueError, match="holds attempts at other problems"):
        with_first_attempts(Arithmetic().load("test").select(range(5)), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        with_first_attempts(rows, tmp_path / "nowhere")


def test_an_evaluation_is_no_collection_of_first_attempts(tmp_path):
    evaluate_self_correction(BASE, "arithmetic", split="train", max_completion_length=8, limit=2, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds an evaluation, which keeps no tokens. Sample .* `trl-score collect`"):
        with_first_attempts(Arithmetic().load("train").select(range(2)), tmp_path)


def test_attempts_of_an_endpoint_are_stored_as_text(tmp_path):
    class Says(Sampler):
        name, backend = "says", "endpoint"

        def length(self, prompt):
            return 1

        def sample(self, prompts, instructions, decoding, seed, given=0):
            return [[Attempt(f"1 2 {seed % 7}", None, False)] for _ in prompts]

    collect(Says(), "arithmetic", num_attempts=1, num_samples=1, limit=4, output_dir=tmp_path)
    rows = with_first_attempts(Arithmetic().load("train").select(range(4)), tmp_path)
    assert all(attempts[0].startswith("1 2 ") for attempts in rows["first_attempts"])
    assert isinstance(rows, Dataset)


def test_collect_and_train_on_stored_first_attempts_by_command(tmp_path, capsys):
    settings = ["--limit", "8", "--num_attempts", "1", "--max_completion_length", "8", "--num_samples", "2"]
    where = ["--output_dir", str(tmp_path / "first")]
    assert cli.main(["collect", "--model", BASE, "--task", "arithmetic", *settings, *where]) == 0
    assert "16 rollouts at 8 problems, Accuracy@t1" in capsys.readouterr().out
    command = ["-m", "trl_score.training", "--task", "arithmetic", "--num_train_problems", "8"]
    command += [
        "--first_attempts",
        str(tmp_path / "first"),
        "--offline_first_attempts",
        "0.5",
        "--num_eval_problems",
        "10",
    ]
    command += [
        "--max_steps",
        "2",
        "--num_generations",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--logging_steps",
        "1",
    ]
    command += [
        "--max_completion_length",
        "8",
        "--bf16",
        "false",
        "--gradient_checkpointing",
        "false",
        "--report_to",
        "none",
    ]
    done = python(*command, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "| share of first attempts that were stored ones | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "self_correction.json").read_text())["num_problems"] == 10
