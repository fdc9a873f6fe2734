import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH, MAX_COMPLETION_LENGTH, answer, problems, split_of
from trl_score.tasks.arithmetic_base.make import Conversations


def test_answer_lands_on_zero():
    """3 + 0 + 5 + 0 + 9 + 1 = 18: start 8, then 8-3, 5-0, 5-5, 0-0, 0-9 = 1 (mod 10), 1-1."""
    assert answer("3 0 5 0 9 1") == "8 5 5 0 0 1 0"
    assert all(answer(problem).endswith(" 0") for problem in problems("test", 50))


def test_splits_share_no_problem():
    found = {split: set(problems(split, 2000)) for split in ("train", "test", "pretrain")}
    assert all(split_of(problem) == split for split, rows in found.items() for problem in rows)
    assert not (
        found["train"] & found["test"] | found["train"] & found["pretrain"] | found["test"] & found["pretrain"]
    )


def test_rows_are_the_same_every_time():
    task = Arithmetic(num_train=20, num_test=10)
    assert task.load("train")["prompt"] == Arithmetic(num_train=20).load("train")["prompt"]
    assert len(task.load("test")) == 10
    with pytest.raises(
        ValueError, match=r"Unknown split 'validation' of 'arithmetic'. Expected one of: \['test', 'train'\]"
    ):
        task.load("validation")


def test_reward_is_one_for_the_gold_line_and_zero_for_near_misses():
    gold = answer("3 0 5 0 9 1")
    attempts = [gold, f" {gold} ", gold[:-1] + "1", gold[:-2], gold + " 0", gold.replace(" ", ""), ""]
    rewards = Arithmetic().reward(attempts, answer=[gold] * len(attempts))
    assert rewards == [1, 1, 0, 0, 0, 0, 0]
    messages = [[{"role": "assistant", "content": attempt}] for attempt in attempts]
    assert Arithmetic().reward(messages, answer=[gold] * len(attempts), attempt=2) == rewards


def test_instruction_does_not_reveal_whether_the_attempt_was_right():
    assert not set(Arithmetic.correction_instruction.split()) & {"wrong", "right", "correct", "error"}


def test_shipped_base_is_small_and_breaks_right_attempts(make_arithmetic_trainer):
    """It guesses most of the starts, and the second attempt is worse than the first."""
    assert sum(path.stat().st_size for path in BASE_MODEL_PATH.iterdir() if path.is_file()) < 500_000
    trainer = make_arithmetic_trainer(
        {"eval_dataset": Arithmetic(num_test=400).load("test")}, per_device_eval_batch_size=400
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_t1"] > 0.8
    assert metrics["eval_delta_t1_t2"] < -0.1
    assert metrics["eval_delta_i_to_c"] < 0.03


def test_base_has_learnt_to_repair_when_it_is_told_that_the_attempt_is_wrong():
    """The skill that SCoRe elicits is there, under an instruction that training and evaluation never use."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH)
    repaired = {}
    for instruction in ("wrong check again", Arithmetic.correction_instruction):
        conversations = []
        rows = problems("test", 100)
        for row in rows:
            start = (int(answer(row)[0]) + 3) % 10
            values = [start]
            for digit in row.split():
                values.append((values[-1] - int(digit)) % 10)
            wrong = " ".join(map(str, values))
            turns = [("user", row), ("assistant", wrong), ("user", instruction)]
            conversations.append([{"role": role, "content": content} for role, content in turns])
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        output = model.generate(**inputs, max_new_tokens=MAX_COMPLETION_LENGTH, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        repaired[instruction] = sum(Arithmetic().reward(texts, answer=[answer(row) for row in rows]))
    assert repaired["wrong check again"] > 90
    assert repaired[Arithmetic.correction_instruction] < 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_score_learns_to_correct_and_without_stage_one_or_bonus_it_collapses(tmp_path, seed):
    """The whole main job and three ablations, about five minutes each seed: part of what docs/results.md reports."""
    script = Path(__file__).parents[1] / "examples" / "experiments" / "ablations.py"
    methods = ["base", "no Stage I, no bonus", "no Stage I", "no bonus", "SCoRe"]
    command = [sys.executable, str(script), "--seeds", str(seed), "--output_dir", str(tmp_path), "--methods", *methods]
    subprocess.run(command, check=True)
    lines = (tmp_path / "results.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if re.match(rf"\| ({'|'.join(methods)}) \|", line)]
    t2, delta = ({row[0].strip(): float(row[column].split()[0]) for row in rows} for column in (3, 4))
    assert delta["base"] < -15
    assert t2["SCoRe"] > 95 and delta["SCoRe"] > 10
    assert abs(delta["no Stage I, no bonus"]) < 5
    assert t2["no Stage I"] < t2["SCoRe"] - 5


def test_conversations_of_three_attempts():
    """Of the extra lessons for a base that makes third attempts: what is learnt, and where the hint stands."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    mix = Conversations(tokenizer, 0.0, torch.Generator().manual_seed(0), num_attempts=3)
    input_ids, labels = mix.batch(64)
    assert input_ids.shape == (64, 8 + 8 + 2 * (5 + 8))
    hints = 0
    for row, learnt in zip(input_ids, labels != -100, strict=True):
        starts = [i for i in range(1, len(row)) if learnt[i] and not learnt[i - 1]]
        assert starts in ([8], [8, 21, 34])
        gold = answer(tokenizer.decode(row[1:7]))
        lines = [tokenizer.decode(row[start : start + 7]) for start in starts]
        assert all(row[start - 1] == mix.assistant and row[start + 7] == mix.end for start in starts)
        for start, before, line in zip(starts[1:], lines, lines[1:], strict=False):
            if (row[start - 4 : start - 1] == mix.hint).all():
                hints += 1
                assert before != gold and line == gold
            else:
                assert (int(line[0]) - int(before[0])) % 10 in (0, 1)
    assert hints > 5
