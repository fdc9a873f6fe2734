"""Self-Refine: what the model is asked, from which tokens it answers, and what is kept of it."""

import os
import re
import types
from pathlib import Path

import pytest
from datasets import Dataset

from trl_score import cli, evaluate_self_correction
from trl_score.evaluation import load_evaluation
from trl_score.report import write_report
from trl_score.report.tables import paired_difference
from trl_score.rollout import Bridge
from trl_score.sampling import Attempt, EndpointSampler, Sampler, TransformersSampler
from trl_score.tasks import TASKS, Arithmetic, Task, get_task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH, HINT
from trl_score.tasks.math import ANSWER_FORM


BASE = str(BASE_MODEL_PATH)
DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
SETTINGS = {"max_completion_length": 8, "batch_size": 16, "limit": 20}
VERDICT = re.compile(
    r"(?i)\b(in)?(correct|valid|accurate)\w*|\b(wrong|right|true|false|error|mistake|bug|flaw|fault|fail|fix|broken|solved)\w*"
)


class Letters(Task):
    """Two problems: say A, say B."""

    name = "letters"
    correction_instruction = "again"
    feedback_instruction = "what of it?"
    refine_instruction = "and now?"

    def load(self, split):
        prompts = [[{"role": "user", "content": f"say {letter}"}] for letter in "AB"]
        return Dataset.from_dict({"prompt": prompts, "letter": ["A", "B"]})

    def reward(self, completions, letter, **kwargs):
        return [float(c[0]["content"] == right) for c, right in zip(completions, letter, strict=True)]


class Repair(Letters):
    """Attempt 1, a C, is given."""

    num_given_attempts = 1

    def load(self, split):
        given = [{"role": "assistant", "content": "C"}, {"role": "user", "content": self.correction_instruction}]
        rows = super().load(split)
        return Dataset.from_dict({"prompt": [[*p, *given] for p in rows["prompt"]], "letter": rows["letter"]})


class Scripted(Sampler):
    """Says the same texts to every problem, and keeps what it was asked."""

    name, backend = "scripted", "transformers"

    def __init__(self, *says):
        self.says, self.asked = says, []

    def length(self, prompt):
        return 1

    def sample(self, prompts, instructions, decoding, seed, given=0):
        assert len(self.says) == len(instructions) + 1
        self.asked.append((prompts, instructions, given))
        return [[Attempt(text, 10 + n, False) for n, text in enumerate(self.says)] for _ in prompts]


# --- what is asked ---


def test_each_correction_is_feedback_and_a_new_attempt():
    """Three attempts: C, feedback, A, feedback, B."""
    sampler = Scripted("C", "that is C", "A", "fine", "B")
    evaluation = evaluate_self_correction(sampler, Letters(), self_refine=True, num_attempts=3)
    ((prompts, instructions, given),) = sampler.asked
    assert instructions == ["what of it?", "and now?", "what of it?", "and now?"] and given == 0
    assert prompts == [[{"role": "user", "content": "say A"}], [{"role": "user", "content": "say B"}]]
    for row, correct in zip(evaluation.rollouts, [[False, True, False], [False, False, True]], strict=True):
        assert row["attempts"] == ["C", "A", "B"] and row["correct"] == correct
        assert row["feedback"] == ["that is C", "fine"] and row["feedback_num_tokens"] == [11, 13]
        assert row["num_tokens"] == [10, 12, 14] and row["truncated"] == [False] * 3
        assert len(row["edit_distance_ratio"]) == 2
    assert evaluation.summary["metrics"]["num_tokens_t2"]["value"] == 12
    assert str(evaluation).startswith("| | scripted, Self-Refine |")


def test_offline_repair_asks_for_feedback_on_the_given_attempt():
    sampler = Scripted("that is C", "A", "fine", "B")
    evaluation = evaluate_self_correction(sampler, Repair(), self_refine=True, num_attempts=3)
    ((prompts, instructions, given),) = sampler.asked
    assert instructions == ["and now?", "what of it?", "and now?"] and given == 1
    assert [(turn["role"], turn["content"]) for turn in prompts[0]] == [
        ("user", "say A"), ("assistant", "C"), ("user", "what of it?")
    ]  # fmt: skip
    row = evaluation.rollouts[0]
    assert (
        row["attempts"] == ["C", "A", "B"] and row["correct"] == [False, True, False] and row["prompt"] == prompts[0]
    )
    assert row["feedback"] == ["that is C", "fine"] and row["feedback_num_tokens"] == [10, 12]
    assert row["num_tokens"] == [None, 11, 13]


def test_offline_repair_with_another_instruction_is_at_the_same_problems():
    plain = evaluate_self_correction(Scripted("C"), Repair())
    asked = evaluate_self_correction(Scripted("A"), Repair(), correction_instruction="Is it right?")
    refined = evaluate_self_correction(Scripted("fine", "A"), Repair(), self_refine=True)
    for other in (asked, refined):
        found, number = paired_difference(plain, other)
        assert number == len(plain.rollouts) and found["accuracy_t2"]["value"] == 0.5  # "A" at one of two problems


def test_a_plain_evaluation_asks_as_it_did():
    sampler = Scripted("C", "A", "B")
    evaluation = evaluate_self_correction(sampler, Letters(), num_attempts=3)
    assert sampler.asked[0][1] == ["again", "again"]
    assert "feedback" not in evaluation.rollouts[0] and not evaluation.settings["self_refine"]
    assert evaluation.settings["correction_instruction"] == "again"
    sampler = Scripted("A")
    evaluate_self_correction(sampler, Repair())
    assert sampler.asked[0][1:] == ([], 1) and sampler.asked[0][0][0][-1]["content"] == "again"


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_holds_a_verdict(name):
    """The answer's form in the paper's words, "I hope it is correct", is of the attempt to come."""
    task = TASKS[name]
    for text in (task.feedback_instruction, task.refine_instruction):
        assert text.strip() and not VERDICT.search(text.replace(ANSWER_FORM, ""))
    assert VERDICT.search(HINT) and VERDICT.search("There is an error in the code above")  # it would find them


def test_prompts_ask_for_the_form_that_is_graded():
    for name in ("math", "gsm8k"):
        assert TASKS[name].refine_instruction.endswith(ANSWER_FORM)
    for name in ("mbpp", "humaneval", "mbpp_repair", "humanevalfix"):
        assert "Only output the final Python program" in TASKS[name].refine_instruction
    known = TransformersSampler(BASE).tokenizer
    for text in (Arithmetic.feedback_instruction, Arithmetic.refine_instruction):
        assert known.unk_token_id not in known(text)["input_ids"]


def test_an_endpoint_hears_the_same_after_a_right_and_a_wrong_attempt():
    """The messages of each request, for a model that always says A."""
    sampler, heard = EndpointSampler("model", base_url="http://127.0.0.1:9/v1"), []

    def chat_completion(messages, **kwargs):
        heard.append([turn["content"] for turn in messages])
        message = types.SimpleNamespace(content="A")
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=message, finish_reason="stop")])

    sampler.client = types.SimpleNamespace(chat_completion=chat_completion)
    evaluation = evaluate_self_correction(sampler, Letters(), self_refine=True)
    assert [row["correct"] for row in evaluation.rollouts] == [[True, True], [False, False]]
    for problem in ("say A", "say B"):
        assert [asked for asked in heard if asked[0] == problem] == [
            [problem], [problem, "A", "what of it?"], [problem, "A", "what of it?", "A", "and now?"]
        ]  # fmt: skip
    assert evaluation.rollouts[0]["feedback"] == ["A"] and evaluation.rollouts[0]["feedback_num_tokens"] == [None]


# --- tokens in, tokens out ---


class Recording(TransformersSampler):
    """Keeps the contexts and what was sampled from them."""

    def __init__(self, model):
        super().__init__(model)
        self.contexts, self.sampled = [], []

    def generate(self, contexts, decoding, seed):
        self.contexts.append(contexts)
        self.sampled.append(super().generate(contexts, decoding, seed))
        return self.sampled[-1]


@pytest.mark.parametrize("cut_off", [False, True])
def test_contexts_are_the_tokens_that_were_sampled_and_the_bridges_between_them(chat_model, cut_off):
    sampler, task = Recording(chat_model if cut_off else BASE), Letters() if cut_off else Arithmetic(num_test=2)
    evaluation = evaluate_self_correction(sampler, task, self_refine=True, batch_size=1, max_completion_length=8)
    (first, feedback, last), (y1, said, y2) = (
        [row[0] for row in rows[:3]] for rows in (sampler.contexts, sampler.sampled)
    )
    prompts = [task.load("test")["prompt"][evaluation.rollouts[0]["index"]]]
    bridge = Bridge(sampler.tokenizer)
    assert first == sampler.tokenize(prompts[0])
    assert feedback == first + y1 + bridge(prompts, [task.feedback_instruction], 1, [y1])[0]
    assert last == feedback + said + bridge(prompts, [task.refine_instruction], 2, [said])[0]
    row = evaluation.rollouts[0]
    assert row["num_tokens"] == [len(y1), len(y2)] and row["feedback_num_tokens"] == [len(said)]
    if not cut_off:
        text = sampler.tokenizer.decode(last)
        assert text == (
            f"<user> {prompts[0][0]['content']} <assistant> {row['attempts'][0]} <end> "
            f"<user> please check <assistant> {row['feedback'][0]} <end> <user> please check again <assistant>"
        )


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "num_samples": 2}])
def test_attempt_1_is_that_of_a_plain_evaluation(more):
    refined, plain = (
        evaluate_self_correction(BASE, "arithmetic", **SETTINGS, **more, self_refine=mode) for mode in (True, False)
    )
    assert [row["attempts"][0] for row in refined.rollouts] == [row["attempts"][0] for row in plain.rollouts]
    assert refined.rollouts != plain.rollouts


@pytest.mark.skipif(not (DATA / "humanevalfix").exists(), reason="no shared data")
def test_repair_of_real_programs(chat_model):
    sampler = Recording(chat_model)
    task = get_task("humanevalfix", data_dir=str(DATA), allow_code_execution=True)
    evaluation = evaluate_self_correction(sampler, task, self_refine=True, limit=2, max_completion_length=4)
    task.close()
    for context in sampler.contexts[0]:
        assert task.correction_instruction not in sampler.tokenizer.decode(context)
        assert task.feedback_instruction in sampler.tokenizer.decode(context)
    for row in evaluation.rollouts:
        assert "def " in row["attempts"][0] and len(row["attempts"]) == 2 and len(row["feedback"]) == 1


# --- what is kept ---


def test_a_folder_holds_one_mode(tmp_path):
    plain = evaluate_self_correction(Scripted("A", "B"), Letters(), output_dir=tmp_path / "plain")
    refined = evaluate_self_correction(
        Scripted("A", "b", "B"), Letters(), self_refine=True, output_dir=tmp_path / "refined"
    )
    turns = {
        "self_refine": (False, True),
        "correction_instruction": ("again", None),
        "feedback_instruction": (None, "what of it?"),
        "refine_instruction": (None, "and now?"),
    }
    different = {name for name in plain.settings if plain.settings[name] != refined.settings[name]}
    assert {name: (plain.settings[name], refined.settings[name]) for name in different} == turns
    with pytest.raises(ValueError, match=r"holds another evaluation: .*self_refine False instead of True"):
        evaluate_self_correction(Scripted(), Letters(), self_refine=True, output_dir=tmp_path / "plain")
    with pytest.raises(ValueError, match="holds another evaluation: correction_instruction None instead of 'again'"):
        evaluate_self_correction(Scripted(), Letters(), output_dir=tmp_path / "refined")
    again = evaluate_self_correction(Scripted(), Letters(), self_refine=True, output_dir=tmp_path / "refined")
    assert again.rollouts == refined.rollouts  # finished: nothing is asked


def test_command_line_and_report(tmp_path, capsys):
    arguments = [
        "--model",
        BASE,
        "--task",
        "arithmetic",
        "--max_completion_length",
        "8",
        "--limit",
        "4",
        "--self_refine",
    ]
    assert cli.main(["evaluate", *arguments, "--output_dir", str(tmp_path / "refined")]) == 0
    assert f"| | {BASE}, Self-Refine |" in capsys.readouterr().out
    found = load_evaluation(tmp_path / "refined")
    assert found.settings["feedback_instruction"] == "please check" and len(found.rollouts[0]["feedback"]) == 1
    page = write_report([tmp_path / "refined"], tmp_path / "report.html").read_text("utf-8")
    assert re.search("<th[^>]*>arithmetic_base, Self-Refine</th>", page) and '"feedback": ["' in page
