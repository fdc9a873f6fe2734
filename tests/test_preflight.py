"""`trl-score check`: what it finds before a training, and what it advises."""

import json
import logging
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_score import cli, preflight
from trl_score.jobs import Job, Plan
from trl_score.preflight import (
    Check,
    Finding,
    check,
    check_grader,
    check_instruction,
    check_memory,
    estimate_memory,
    judge,
)
from trl_score.sampling import Decoding, TokenSampler, TransformersSampler
from trl_score.tasks import Arithmetic, get_task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BASE = str(BASE_MODEL_PATH)
SMALL = {"max_completion_length": 8, "limit": 8}


def metrics(right, corrected):
    return {"accuracy_t1": {"value": right}, "delta_i_to_c": {"value": corrected}}


@pytest.mark.parametrize(
    ("right", "corrected", "worth", "advice"),
    [
        (0.5, 0.1, "yes", None),
        (0.25, 0.04, "yes", None),
        (0.70, 0.04, "yes", None),
        (0.5, 0.03, "perhaps", "few to learn from"),
        (0.5, 0.02, "perhaps", "compare several --correction_instruction"),
        (0.5, 0.01, "no", "too few to learn from"),
        (0.24, 0.2, "no", "Only 24% of the first attempts are right (25% or more are needed): take easier problems"),
        (0.71, 0.2, "no", "take harder problems"),
    ],
)
def test_the_verdict_follows_the_thresholds(right, corrected, worth, advice):
    found, said = judge(metrics(right, corrected))
    assert found == worth and (said == [] if advice is None else advice in said[0])


def test_nothing_graded_is_not_worth_it():
    assert judge({})[0] == "no"


def test_a_fault_makes_it_not_worth_it_whatever_the_numbers():
    good = Check([Finding("grader", "ok", "")], metrics(0.5, 0.1), "greedy")
    bad = Check([Finding("grader", "bad", ""), Finding("memory", "look", "")], metrics(0.5, 0.1), "greedy")
    assert (good.worth, good.exit_code, bad.worth, bad.exit_code) == ("yes", 0, "no", 3)
    assert bad.advice == ["Mend the grader first."]


class Task(Arithmetic):
    def __init__(self, empty=0.0, right=1.0):
        super().__init__(num_train=16)
        self.empty, self.right = empty, right

    def reward(self, completions, answer, **kwargs):
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        return [self.empty if not text else self.right for text in texts]


def test_the_grader_is_tried_on_right_and_on_empty_attempts():
    rows = Arithmetic().load("train").select(range(4))
    assert check_grader(Arithmetic(), rows) == Finding("grader", "ok", "4 right attempts get 1, 4 empty ones 0")
    found = check_grader(Task(right=0.0), rows)
    assert found.state == "bad" and found.text.startswith("4 of 4 right attempts do not get 1, such as '")
    found = check_grader(Task(empty=1.0), rows)
    assert (
        found.state == "bad" and "empty attempts get a reward at 4 of 4 problems, such as 1 at problem 0" in found.text
    )
    found = check_grader(Task(right=None), rows)
    assert found.state == "bad"
    rows = rows.rename_column("answer", "line")

    class Silent(Task):
        def reward(self, completions, line, **kwargs):
            return super().reward(completions, line)

    assert check_grader(Silent(), rows).state == "look"  # nothing right to try


@pytest.mark.parametrize("name", ["arithmetic", "math", "gsm8k", "mbpp"])
def test_instructions_of_the_tasks_give_no_verdict(name):
    more = {"runner": list} if name == "mbpp" else {}
    assert check_instruction(get_task(name, **more).correction_instruction).state == "ok"


@pytest.mark.parametrize(
    "text",
    [
        "Your answer is wrong. Try again.",
        "There is an error in the code above.",
        "You made a mistake.",
        "That isn't right.",
        "That's wrong. Try again.",
        "There's an error in the solution.",
        "You've made a mistake.",
        "Your solution above contains an error.",
        "There is at least one error above.",
    ],
)
def test_an_instruction_with_a_verdict_is_noticed(text):
    assert check_instruction(text).state == check_instruction("Check again.", text).state == "look"


@pytest.mark.parametrize(
    "text",
    [
        "If the answer is wrong, correct it.",
        "Check whether your solution has a mistake.",
        "There might be an error above.",
        "If it contains an error, fix it.",
    ],
)
def test_an_instruction_that_leaves_it_open_gives_no_verdict(text):
    assert check_instruction(text).state == "ok"


class Told(Arithmetic):
    def load(self, split):
        rows = super().load(split)
        return rows.add_column("correction_instruction", [None, "again, it is wrong"] * (len(rows) // 2))


def test_instructions_of_the_rows_are_looked_at():
    findings = {finding.name: finding for finding in check(BASE, Told(), **SMALL).findings}
    assert findings["instruction"].state == "look" and "'is wrong'" in findings["instruction"].text


def look(model, task=None, **settings):
    task = task or Arithmetic()
    job = Job(task="t", correction_instruction=task.correction_instruction, **settings)
    found = preflight.check_tokens(task, task.load("train").select(range(4)), TransformersSampler(model), job)
    return {finding.name: finding for finding in found}


def test_template_turn_end_and_context_are_looked_at(letters_model):
    found = look(BASE, max_completion_length=8)
    assert {name: each.state for name, each in found.items()} == {"turn": "ok", "end token": "ok", "context": "ok"}
    assert (
        found["turn"].text == "the same 5 tokens after a right and a wrong attempt"
        and "<end>" in found["end token"].text
    )
    assert found["context"].text.endswith("tokens of 64")
    found = look(BASE, max_completion_length=40)
    assert found["context"].state == "bad" and "context of 64 tokens is too short" in found["context"].text
    assert AutoTokenizer.from_pretrained(letters_model).chat_template is None
    assert look(letters_model)["template"].state == "bad"


def test_the_longest_rollout_is_counted_to_the_token():
    """A rollout whose attempts are all cut off has as many tokens as the estimate for the same rows."""
    task, sampler = Arithmetic(), TransformersSampler(BASE)
    rows = task.load("train").select(range(16))
    job = Job(task="t", correction_instruction=task.correction_instruction, max_completion_length=3)
    digit = sampler.tokenizer.convert_tokens_to_ids("1")
    sampler.generate = lambda contexts, decoding, seed: [[digit] * 3 for _ in contexts]
    rollouts = TokenSampler.roll_out(
        sampler,
        [sampler.tokenize(prompt) for prompt in rows["prompt"]],
        sampler.bridge.by_row(rows["prompt"], lambda attempt: [job.correction_instruction] * len(rows)),
        2,
        Decoding(max_completion_length=3),
        seed=0,
    )
    sampled = [len(ids) + len(own) for ids, own in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    assert preflight.longest(rows, sampler, job) == max(sampled)


def test_a_model_without_a_chat_template_is_told_so(letters_model):
    """Nothing else is estimated of a prompt that cannot be rendered."""
    found = check(letters_model, Arithmetic(), limit=2)
    assert (found.worth, found.advice) == ("no", ["Mend the template first."]) and not found.metrics


def test_memory_is_that_of_the_weights_and_of_the_rollouts(monkeypatch):
    """Four bits take less than LoRA, LoRA less than all weights: 20 bytes against 2 for each weight."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    number = sum(each.numel() for each in model.parameters())
    short, long = estimate_memory(model, 10), estimate_memory(model, 1000)
    assert long["all weights"] > long["LoRA"] > long["LoRA on 4 bits"] and long["LoRA"] > short["LoRA"]
    assert 15 * number < short["all weights"] - short["LoRA"] < 20 * number
    assert check_memory(model, 10).state == "ok"
    monkeypatch.setattr(preflight, "memory", lambda: (1, "this machine has free"))
    assert check_memory(model, 10).state == "bad" and check_memory(model, 10).text.endswith("what fits: nothing")


def test_a_check_says_what_it_found(tmp_path):
    found = check(BASE, "arithmetic", output_dir=tmp_path / "rollouts", **SMALL)
    names = {finding.name for finding in found.findings}
    assert names == {"grader", "instruction", "turn", "end token", "context", "memory", "lengths"}
    assert found.metrics.keys() == {"accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i"}
    text = str(found)
    assert "8 problems, temperature 1" in text and "25 to 70" in text and "Worth training? " in text
    assert (tmp_path / "rollouts" / "summary.json").exists()


def test_problems_are_drawn_from_the_whole_split():
    """Datasets are often sorted, by subject or by how hard they are."""
    whole = list(Arithmetic().load("train")["prompt"])
    plan = Plan.of(BASE, "arithmetic", limit=64, split="train", temperature=1.0)
    assert list(plan.problems()["prompt"]) == whole[:64]
    drawn = list(replace(plan, shuffled=True).problems()["prompt"])
    places = [whole.index(each) for each in drawn]
    assert len(set(places)) == 64 and max(places) > 400
    assert drawn == list(replace(plan, shuffled=True).problems()["prompt"])
    assert len(Plan.of(BASE, "arithmetic", limit=4, split="train", seed=-1).problems()) == 4
    other = replace(Plan.of(BASE, "arithmetic", limit=64, split="train", seed=-1), shuffled=True)
    assert list(other.problems()["prompt"]) != drawn


def test_nothing_is_sampled_before_a_fault_is_mended():
    found = check(BASE, Task(right=0.0), **SMALL)
    assert (found.worth, found.metrics, found.exit_code) == ("no", {}, 3)
    assert str(found).endswith("Worth training? No. Mend the grader first.") and "Accuracy" not in str(found)


def test_long_attempts_are_noticed():
    found = check(BASE, "arithmetic", limit=4, max_completion_length=3)
    (lengths,) = [finding for finding in found.findings if finding.name == "lengths"]
    assert (
        lengths.state == "look"
        and "100% and 100% of the first and second attempts are cut off at 3 tokens" in lengths.text
    )


def test_offline_repair_is_not_trained_on(tmp_path):
    task = Arithmetic()
    task.num_given_attempts = 1
    with pytest.raises(ValueError, match="it is for evaluation"):
        check(BASE, task, **SMALL)


def test_the_command_has_an_exit_code_and_json(capsys, monkeypatch):
    given = [
        "check",
        "--task",
        "arithmetic",
        "--model",
        BASE,
        "--max_completion_length",
        "8",
        "--limit",
        "4",
        "--json",
    ]
    codes = []
    for threshold in (0.0, 1.1):
        monkeypatch.setattr(preflight, "FIRST_ATTEMPT", (0.0, 1.0))
        monkeypatch.setattr(preflight, "CORRECTED", threshold)
        monkeypatch.setattr(preflight, "CORRECTED_WELL", threshold)
        codes.append(cli.main(given))
        found = json.loads(capsys.readouterr().out)
        assert (
            found["worth"] == ("yes" if threshold == 0 else "no")
            and found["thresholds"]["delta_i_to_c"][0] == threshold
        )
        assert found["metrics"]["accuracy_t1"].keys() == {"value", "low", "high"}
    logging.getLogger("trl_score").setLevel(logging.NOTSET)
    assert codes == [0, 3]
