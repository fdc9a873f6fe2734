"""Evaluation: the rollouts of training, statistics worked by hand, resuming, and where attempts come from."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import evaluate as hf_evaluate
import numpy as np
import pytest
import torch
from huggingface_hub import ChatCompletionOutput
from peft import LoraConfig, get_peft_model
from processes import ranks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_score import evaluate_self_correction
from trl_score.evaluation import Evaluation, load_evaluation, summarize, table
from trl_score.jobs import by_prompt_length, grade
from trl_score.metrics import bootstrap_intervals, mcnemar
from trl_score.sampling import Decoding, EndpointSampler, TransformersSampler, VLLMSampler
from trl_score.sandbox import Sandbox
from trl_score.tasks import Arithmetic, get_task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BASE = str(BASE_MODEL_PATH)
DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "mbpp").exists(), reason="no shared data")
SETTINGS = {"max_completion_length": 8, "batch_size": 16, "limit": 40}
SAMPLED = {**SETTINGS, "temperature": 1.0, "num_samples": 2, "num_attempts": 3}


# --- the same as training ---


def test_attempts_and_metrics_are_those_of_the_trainer(make_arithmetic_trainer):
    task = Arithmetic(num_test=64)
    trainer = make_arithmetic_trainer(max_steps=1)
    trainer.eval_dataset = task.load("test")
    of_trainer = trainer.generate_attempts(trainer.eval_dataset["prompt"])
    logged = trainer.evaluate()
    evaluation = evaluate_self_correction(BASE, task, max_completion_length=8, batch_size=7)
    assert [row["attempts"] for row in evaluation.rollouts] == of_trainer
    metrics = evaluation.summary["metrics"]
    for name in ("accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i"):
        assert metrics[name]["value"] == pytest.approx(logged[f"eval_{name}"])
    assert metrics["num_tokens_t2"]["value"] == pytest.approx(logged["eval_completions/mean_length_t2"])


def test_a_model_and_its_folder_give_the_same():
    task = Arithmetic()
    model = AutoModelForCausalLM.from_pretrained(BASE)
    one = evaluate_self_correction(model, task, **SETTINGS)
    assert one.rollouts == evaluate_self_correction(BASE, "arithmetic", **SETTINGS).rollouts
    assert one.settings["model"] == BASE


def test_ten_attempts():
    evaluation = evaluate_self_correction(BASE, "arithmetic", num_attempts=10, **SETTINGS)
    assert all(len(row["attempts"]) == 10 for row in evaluation.rollouts)
    assert {"accuracy_t10", "delta_t9_t10", "delta_t1_t10"} <= evaluation.summary["metrics"].keys()


def test_samples_differ_and_repeat_with_their_seed():
    one = evaluate_self_correction(BASE, "arithmetic", **SAMPLED)
    assert one.rollouts == evaluate_self_correction(BASE, "arithmetic", **SAMPLED).rollouts
    assert one.rollouts != evaluate_self_correction(BASE, "arithmetic", **SAMPLED, seed=1).rollouts
    samples = [[row["attempts"] for row in one.rollouts if row["sample"] == k] for k in (0, 1)]
    assert len(one.rollouts) == 80 and samples[0] != samples[1]
    assert one.summary["mcnemar_p"] is None and "40 x 2" in str(one) and "temperature 1" in str(one)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_is_loaded_on_top_of_its_base(tmp_path, quantized):
    torch.manual_seed(0)
    kwargs = {}
    if quantized:
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(BASE, **kwargs)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (BASE_MODEL_PATH / name).exists():
            (tmp_path / name).write_bytes((BASE_MODEL_PATH / name).read_bytes())
    adapted = evaluate_self_correction(str(tmp_path), "arithmetic", **SETTINGS, **kwargs)
    base = evaluate_self_correction(BASE, "arithmetic", **SETTINGS, **kwargs)
    assert [row["attempts"] for row in adapted.rollouts] != [row["attempts"] for row in base.rollouts]


@pytest.mark.parametrize("settings", [{}, {"self_refine": True}, {"reuse_cache": False}])
def test_rollouts_that_can_leave_the_context_are_warned_of_once(settings):
    settings = SETTINGS | settings | {"max_completion_length": 32}
    sampler = TransformersSampler(BASE, reuse_cache=settings.pop("reuse_cache", True))
    with pytest.warns(
        UserWarning, match=r"context of 64 tokens .* Lower `max_completion_length`, .* sampled nevertheless"
    ) as caught:
        evaluate_self_correction(sampler, "arithmetic", **settings)
    assert len([each for each in caught if "context" in str(each.message)]) == 1


@needs_data
def test_offline_repair_grades_the_given_attempt_and_samples_the_second(chat_model):
    sandbox = Sandbox(allow_code_execution=True)
    task = get_task("humanevalfix", data_dir=str(DATA), sandbox=sandbox)
    evaluation = evaluate_self_correction(chat_model, task, limit=3, max_completion_length=4)
    for row in evaluation.rollouts:
        assert "def " in row["attempts"][0] and row["correct"] == [False, False]
        assert row["num_tokens"][0] is None and row["num_tokens"][1] <= 4
        assert len(row["attempts"]) == 2
    with pytest.raises(ValueError, match="'humanevalfix' gives 1 attempts"):
        evaluate_self_correction(chat_model, task, num_attempts=1)
    task.close()


@needs_data
def test_levels_are_reported(chat_model):
    task = get_task("math", data_dir=str(DATA))
    evaluation = evaluate_self_correction(chat_model, task, limit=4, max_completion_length=4)
    assert sum(level["num_problems"] for level in evaluation.summary["by_level"].values()) == 4
    task.close()


# --- results that survive ---


class Killed(Exception):
    pass


class Fragile(TransformersSampler):
    """Stops after some batches."""

    def __init__(self, batches):
        super().__init__(BASE)
        self.batches = batches

    def sample(self, *args, **kwargs):
        if self.batches == 0:
            raise Killed
        self.batches -= 1
        return super().sample(*args, **kwargs)


@pytest.mark.parametrize("settings", [SETTINGS, SAMPLED, {**SETTINGS, "self_refine": True}])
def test_an_interrupted_evaluation_goes_on_without_repeating_or_losing_a_row(tmp_path, settings):
    whole = evaluate_self_correction(BASE, "arithmetic", **settings, output_dir=tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        evaluate_self_correction(Fragile(2), "arithmetic", **settings, output_dir=broken)
    assert not (broken / "summary.json").exists()
    file = broken / "rollouts.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 32
    file.write_bytes(b"".join(lines[:-5]) + lines[-5][:40])  # killed while it wrote a batch
    sampler = Fragile(100)
    resumed = evaluate_self_correction(sampler, "arithmetic", **settings, output_dir=broken)
    batches = -(-len(whole.rollouts) // 16)
    assert 100 - sampler.batches == batches - 1  # one batch was whole
    assert resumed.rollouts == whole.rollouts
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(whole.rollouts) == len({(row["index"], row["sample"]) for row in rows})
    # finished: nothing is loaded or sampled again
    again = evaluate_self_correction(Fragile(0), "arithmetic", **settings, output_dir=broken)
    assert again.rollouts == whole.rollouts
    assert load_evaluation(broken).rollouts == whole.rollouts
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["metrics"] == json.loads(json.dumps(whole.summary["metrics"]))


def test_a_folder_holds_one_evaluation(tmp_path):
    evaluate_self_correction(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path)
    with pytest.raises(ValueError, match="holds another evaluation: seed 42 instead of 7"):
        evaluate_self_correction(BASE, "arithmetic", **SETTINGS, output_dir=tmp_path, seed=7)
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        load_evaluation(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attempts": 1}, "`num_attempts=1` leaves nothing to compare"),
        ({"num_samples": 4}, "greedy decoding gives the same rollout"),
        ({"batch_size": 0}, "`batch_size=0`"),
        (
            {"self_refine": True, "correction_instruction": "again"},
            "`correction_instruction` would never be said. Leave one",
        ),
        ({"backend": "llama"}, "Unknown backend 'llama'"),
        ({"split": "dev"}, "Unknown split 'dev'"),
    ],
)
def test_what_cannot_work_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_self_correction(BASE, "arithmetic", **settings)


# --- statistics ---


def rollout(index, correct, sample=0, **more):
    return {
        "index": index, "sample": sample, "correct": correct, "edit_distance_ratio": [0.5] * (len(correct) - 1),
        "changed_answer": correct[0] != correct[-1], "num_tokens": [4] * len(correct), "truncated": [False] * len(correct), **more,
    }  # fmt: skip


def test_metrics_are_those_worked_by_hand():
    """Five problems, one ungraded: c->c, i->c, i->c, c->i, i->i among the graded."""
    verdicts = [[True, True], [False, True], [False, True], [True, False], [False, False], [None, True]]
    summary = summarize([rollout(i, row, level=1 + i % 2) for i, row in enumerate(verdicts)])
    values = {name: metric["value"] for name, metric in summary["metrics"].items()}
    assert values["accuracy_t1"] == 0.4 and values["accuracy_t2"] == pytest.approx(0.6)
    assert values["delta_t1_t2"] == pytest.approx(0.2)
    assert values["delta_i_to_c"] == 0.4 and values["delta_c_to_i"] == 0.2
    assert values["correction_rate"] == pytest.approx(2 / 3)  # of three wrong ones
    assert values["changed_answers"] == pytest.approx(0.6) and values["edit_distance_ratio"] == 0.5
    assert values["num_tokens_t1"] == 4 and values["truncated_t2"] == 0
    assert summary["num_ungraded"] == 1 and summary["num_problems"] == 6
    assert summary["mcnemar_p"] == 1.0  # 2 against 1
    assert summary["by_level"]["1"]["accuracy_t2"]["value"] == pytest.approx(2 / 3)


def test_cut_off_attempts_are_counted_also_where_tokens_are_not():
    """An endpoint without `usage`."""
    rows = [rollout(i, [True, True], num_tokens=[None, None], truncated=[i == 0, False]) for i in range(4)]
    metrics = summarize(rows)["metrics"]
    assert metrics["truncated_t1"]["value"] == 0.25 and not {"truncated_t2", "num_tokens_t1"} & metrics.keys()


def test_samples_of_a_problem_are_averaged_before_problems_are():
    rows = [rollout(0, [False, True], s) for s in range(3)] + [rollout(1, [False, False], 0)]
    assert summarize(rows)["metrics"]["accuracy_t2"]["value"] == 0.5


def test_what_has_no_value_is_none_and_an_empty_cell(tmp_path):
    """All right from the start, so there is nothing to correct; nothing graded at all; a reward that is no number."""
    summary = summarize([rollout(i, [True, i > 0]) for i in range(3)])
    assert summary["metrics"]["correction_rate"] == {"value": None, "low": None, "high": None}
    text = table([Evaluation({"model": "m", "temperature": 0, "top_p": 1, "max_completion_length": 8}, [], summary)])
    assert "| corrected, of the wrong ones |  |" in text and "nan" not in text.lower()
    assert "| edit-distance ratio | 0.50 [0.50, 0.50] |" in text and "Percent" in text and "95 %" in text
    assert "| Δ(i→c) | 0.0 [0.0, 0.0] |" in text

    class Odd(Arithmetic):
        def reward(self, completions, **kwargs):
            return [float("nan")] * len(completions)

    evaluation = evaluate_self_correction(BASE, Odd(), **SETTINGS | {"limit": 4}, output_dir=tmp_path)
    assert evaluation.rollouts[0]["rewards"] == [None, None] and evaluation.summary["num_ungraded"] == 4
    for file in tmp_path.iterdir():
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=pytest.fail)  # NaN, Infinity


def test_the_table_has_the_metrics_of_every_evaluation():
    settings = {"model": "m", "temperature": 0.0, "top_p": 1.0, "max_completion_length": 8}

    def of(*correct):
        row = {
            "index": 0,
            "sample": 0,
            "correct": list(correct),
            "num_tokens": [None] * len(correct),
            "changed_answer": False,
        }
        return Evaluation(settings, [row | {"edit_distance_ratio": [0.0] * (len(correct) - 1)}])

    assert "| Accuracy@t3 |  | 100.0 [100.0, 100.0] |" in table([of(True, False), of(True, True, True)])
    assert "| Accuracy@t2 |  | 0.0 [0.0, 0.0] |" in table([of(None, None), of(True, False)])


def test_a_level_that_is_not_there_is_none(tmp_path):
    """NaN, as pandas has it: `null` in a file, which no level can be compared with."""

    class Levels(Arithmetic):
        def load(self, split):
            return super().load(split).select(range(3)).add_column("level", [2.0, float("nan"), 1.0])

    settings = SETTINGS | {"output_dir": tmp_path}
    for _ in range(2):
        found = evaluate_self_correction(BASE, Levels(), **settings).summary["by_level"]
        assert list(found) == ["1.0", "2.0"]


def test_an_infinite_temperature_is_refused():
    with pytest.raises(ValueError, match=r"`temperature=inf` .* set the first to 0 or more"):
        evaluate_self_correction(BASE, "arithmetic", temperature=float("inf"))


@pytest.mark.parametrize(
    ("rewards", "got"), [([1.0] * 3, "3 rewards"), ([1.0] * 5, "5 rewards"), (None, "`NoneType`")]
)
def test_a_task_that_does_not_grade_each_attempt_is_refused(rewards, got):
    """One reward too many would give the attempts those of others."""
    rows = Arithmetic().load("test").select(range(4))

    class Own(Arithmetic):
        def reward(self, completions, **kwargs):
            return rewards

    with pytest.raises(ValueError, match=rf"'Own.reward' returned {got} for 4 completions of attempt 1"):
        list(grade(Own(), rows, [["1", "2"]] * 4))


def test_a_sampler_that_leaves_out_attempts_is_refused(monkeypatch):
    """With one attempt each there would be no correction to measure, and no word."""
    sampler = TransformersSampler(BASE)
    sample = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *arguments: [row[:1] for row in sample(*arguments)])
    with pytest.raises(
        ValueError, match=r"returned 4 rows of \[1\] attempts .* must return a row of 2 for each prompt"
    ):
        evaluate_self_correction(sampler, "arithmetic", **SETTINGS | {"limit": 4})


def test_a_single_attempt_has_its_own_metrics():
    summary = summarize([rollout(i, [i > 0]) for i in range(4)])
    assert list(summary["metrics"]) == ["accuracy_t1", "truncated_t1", "num_tokens_t1"]
    assert summary["metrics"]["accuracy_t1"]["value"] == 0.75


def test_intervals_cover_and_pair():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_intervals((rng.random(100) < 0.3).astype(float), resamples=1000, seed=seed)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199  # 95 % of 200, four standard errors
    first = (rng.random(300) < 0.5).astype(float)
    last = np.where(rng.random(300) < 0.05, 1.0, first)  # nearly the same problems
    low, high = bootstrap_intervals(last - first)
    apart = [np.subtract(*[rng.choice(values, 300).mean() for values in (last, first)]) for _ in range(500)]
    assert high - low < 0.5 * np.subtract(*np.quantile(apart, [0.975, 0.025]))
    assert all(map(np.isnan, bootstrap_intervals(np.array([]))))
    assert bootstrap_intervals(np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == [0.5, 0.5]
    both = bootstrap_intervals(np.stack([first, last], axis=1))
    assert both.shape == (2, 2) and both[:, 1].tolist() == bootstrap_intervals(last).tolist()


def test_mcnemar_is_the_exact_binomial_test():
    """8 corrected, 2 broken: twice the chance of at most 2 heads in 10 throws, 2 (1 + 10 + 45) / 1024."""
    assert mcnemar([False] * 8 + [True] * 2, [True] * 8 + [False] * 2) == pytest.approx(112 / 1024)
    assert mcnemar([True, False], [True, False]) == mcnemar([], []) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0  # one each: 2 (1 + 2) / 4, at most 1
    many = mcnemar([False] * 3000 + [True] * 2000, [True] * 3000 + [False] * 2000)  # more than a float can count
    assert many == pytest.approx(1.3002310005203e-45)


METRIC = str(Path(sys.modules["trl_score"].__file__).parent / "metrics" / "self_correction")


def test_metric_loads_offline_and_adds_batches(tmp_path):
    metric = hf_evaluate.load(METRIC, cache_dir=str(tmp_path))
    metric.add_batch(predictions=[[0, 1], [1, 1]])
    metric.add_batch(predictions=[[1, 0], [0, 1]])
    found = metric.compute()
    assert found["accuracy_t2"] == 0.75 and found["correction_rate"] == 1.0 and found["num_rollouts"] == 4
    with pytest.raises(ValueError, match="same number of attempts"):
        metric.compute(predictions=[[1, 0], [1, 0, 1]])
    with pytest.raises(ValueError, match="1 rollouts have an attempt that was not graded"):
        metric.compute(predictions=[[1, 0], [float("nan"), 0]])


def test_metric_computes_in_double_precision(tmp_path):
    metric = hf_evaluate.load(METRIC, cache_dir=str(tmp_path))
    found = metric.compute(predictions=[[0.1, 0.7], [0.2, 0.6], [0.7, 0.1]])
    assert found["accuracy_t1"] == np.mean([0.1, 0.2, 0.7]) and found["delta_i_to_c"] == pytest.approx(
        1 / 3, abs=1e-15
    )


def test_an_attempt_that_is_half_right_is_wrong_in_the_test(tmp_path):
    """Eight from 0 to a half and none back; everywhere else an attempt is right from 1 on."""
    metric = hf_evaluate.load(METRIC, cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[0, 0.5]] * 8)["mcnemar_p"] == 1.0
    assert metric.compute(predictions=[[0, 1]] * 8)["mcnemar_p"] == 2 / 2**8


def test_metric_gathers_over_processes(tmp_path):
    """Two processes, each with half of the rollouts: the first gets the metric of all."""
    code = (
        "import os, evaluate\nrank = int(os.environ['RANK'])\n"
        f"metric = evaluate.load({METRIC!r}, num_process=2, process_id=rank, experiment_id='two', cache_dir={str(tmp_path)!r})\n"
        "metric.add_batch(predictions=[[0, 1], [1, 1]] if rank else [[1, 0], [0, 1]])\n"
        "found = metric.compute()\nprint(rank, found and (found['accuracy_t2'], found['num_rollouts']))"
    )
    done = ranks(2, "-c", code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()[-2:]) == ["0 (0.75, 4)", "1 None"]


# --- where attempts come from ---


class ByLength(TransformersSampler):
    """Takes the given lengths for those of the prompts, and remembers the lengths in each batch."""

    def __init__(self, lengths):
        super().__init__(BASE)
        self.lengths, self.batches = lengths, []

    def length(self, prompt):
        return self.lengths[prompt[-1]["content"]]

    def sample(self, prompts, *args, **kwargs):
        self.batches.append([self.length(prompt) for prompt in prompts])
        return super().sample(prompts, *args, **kwargs)


def test_a_long_prompt_does_not_pad_the_others():
    """As MBPP's problem with a test of 4,000 tokens, among problems of 700: the other rows of its batch would be padding."""
    task = Arithmetic()
    problems = [prompt[-1]["content"] for prompt in task.load("test")["prompt"][:7]]
    sampler = ByLength(dict(zip(problems, [11, 900, 12, 10, 901, 9, 4000], strict=True)))
    whole = evaluate_self_correction(sampler, task, **SETTINGS | {"batch_size": 3, "limit": 7})
    assert sampler.batches == [[4000], [901, 900], [12, 11, 10], [9]]
    assert whole.rollouts == evaluate_self_correction(BASE, task, **SETTINGS | {"limit": 7}).rollouts


def test_batches_hold_each_rollout_once_and_are_padded_to_at_most_twice_a_prompt():
    random = np.random.default_rng(0)
    for size in (1, 4, 32):
        lengths = (random.lognormal(5, 1, 200) + 1).astype(int).tolist()
        rollouts = [(index, sample) for index in range(200) for sample in range(2)]
        batches = by_prompt_length(rollouts, lengths, size)
        assert sorted(rollout for batch in batches for rollout in batch) == rollouts
        longest = [max(lengths[index] for index, _ in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)
        assert all(len(batch) <= size for batch in batches)
        assert all(
            2 * lengths[index] >= most for batch, most in zip(batches, longest, strict=True) for index, _ in batch
        )
        splits = sum(len(batch) < size for batch in batches)
        assert splits <= 1 + np.log2(max(lengths) / min(lengths))


def test_vllm_gets_tokens_and_gives_tokens(monkeypatch):
    """A stand-in with vLLM's interface, which cannot be installed here."""
    real, asked = TransformersSampler(BASE), []

    class LLM:
        def __init__(self, model, **kwargs):
            assert kwargs == {"dtype": "float32"}

        def generate(self, prompts, params, use_tqdm):
            asked.append(params)
            ids = real.generate(
                [prompt["prompt_token_ids"] for prompt in prompts], Decoding(max_completion_length=8), 0
            )
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=row)]) for row in ids]

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "vllm", module)
    found = evaluate_self_correction(BASE, "arithmetic", backend="vllm", dtype="float32", **SETTINGS)
    assert [row["attempts"] for row in found.rollouts] == [
        row["attempts"] for row in evaluate_self_correction(BASE, "arithmetic", **SETTINGS).rollouts
    ]
    assert {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8}.items() <= asked[0][0].items()
    assert len({params["seed"] for batch in asked for params in batch}) == sum(map(len, asked))


def test_vllm_ends_and_decodes_as_transformers_does(monkeypatch, tmp_path):
    """
    Its parameters are built from nothing, with the end tokens of the checkpoint. An attempt that vLLM ended at another token is
    not cut off either (r15: 14), one at the limit is.
    """
    shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [17, 5], "repetition_penalty": 1.5}))
    asked, loaded = [], []

    class LLM:
        def __init__(self, model, **kwargs):
            loaded.append(kwargs)

        def generate(self, prompts, params, use_tqdm):
            asked.extend(params)
            ends = [([3, 4, 14], "stop"), ([3, 5], "stop"), ([3] * 8, "length"), ([3, 17], "stop")]
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids, finish_reason=reason)])
                for ids, reason in (ends[i % 4] for i in range(len(prompts)))
            ]

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "vllm", module)
    settings = {"backend": "vllm", "revision": "main", "trust_remote_code": True, "temperature": 0.7, "limit": 8}
    found = evaluate_self_correction(
        str(tmp_path / "model"), "arithmetic", **SETTINGS | settings, output_dir=tmp_path / "results"
    )
    assert loaded == [{"revision": "main", "trust_remote_code": True}]
    assert found.summary["metrics"]["truncated_t1"]["value"] == 0.25
    assert {name for params in asked for name in params} == {
        *("temperature", "top_p", "max_tokens", "stop_token_ids", "seed"),
    }
    assert asked[0]["stop_token_ids"] == [5, 17]
    scale = json.loads(file.read_text()) | {"eos_token_id": 17}
    file.write_text(json.dumps(scale))
    with pytest.raises(ValueError, match="weights"):
        evaluate_self_correction(
            str(tmp_path / "model"), "arithmetic", **SETTINGS | settings, output_dir=tmp_path / "results"
        )


def test_an_endpoint_is_told_how_to_decode(tmp_path):
    """What every server takes; more by `extra_body`. Both are in the settings."""
    heard = []

    def chat_completion(messages, **kwargs):
        heard.append(kwargs)
        choice = types.SimpleNamespace(message=types.SimpleNamespace(content="1"), finish_reason="stop")
        return types.SimpleNamespace(choices=[choice])

    body = {"repetition_penalty": 1.0, "top_k": -1}
    sampler = EndpointSampler("m", base_url="http://127.0.0.1:9/v1", extra_body=body, chat_template_kwargs={"x": 1})
    sampler.client = types.SimpleNamespace(chat_completion=chat_completion)
    evaluation = evaluate_self_correction(sampler, "arithmetic", **SETTINGS | {"limit": 2}, output_dir=tmp_path)
    asked = heard[0]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["frequency_penalty"]) == (
        0.0,
        1.0,
        8,
        0.0,
    )
    assert asked["extra_body"] == {**body, "chat_template_kwargs": {"x": 1}} and 0 <= asked["seed"] < 2**31
    assert evaluation.settings["extra_body"] == body and evaluation.settings["chat_template_kwargs"] == {"x": 1}
    assert evaluation.settings["decoding"] == "what the server adds"
    assert evaluation.settings["weights"] == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"extra_body": {"top_k": -1, "temperature": 1.0}},
            "`extra_body` has `temperature`, which each request sets itself",
        ),
        ({"extra_body": {"n": 4}}, "`extra_body` has `n`"),
        ({"extra_body": {"max_tokens": 4}}, "`max_completion_length` and `num_samples` are arguments"),
        ({"base_url": "127.0.0.1:8000/v1"}, "`base_url='127.0.0.1:8000/v1'` is no address. Give one with http://"),
        ({"base_url": ""}, "`base_url=''` is no address"),
    ],
)
def test_an_endpoint_refuses_what_would_change_the_requests(settings, message):
    """They would sample otherwise than the results say, or go to another address."""
    settings = {"base_url": "http://127.0.0.1:9/v1"} | settings
    with pytest.raises(ValueError, match=re.escape(message)):
        EndpointSampler("m", **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_self_correction("m", "arithmetic", backend="endpoint", **settings)


def test_prompts_may_have_instructions_of_their_own(monkeypatch):
    prompts = [[{"role": "user", "content": digits}] for digits in ("6 0 4 6 1 0", "8 6 1 3 1 0")]
    own = ["please check again", "wrong check again"]
    sampler, decoding = TransformersSampler(BASE), Decoding(max_completion_length=8)
    both = sampler.sample(prompts, [own], decoding, 0)
    assert both == [sampler.sample([prompts[i]], [own[i]], decoding, 0)[0] for i in (0, 1)]
    asked = []
    message = types.SimpleNamespace(message=types.SimpleNamespace(content="1"), finish_reason="stop")
    endpoint = EndpointSampler("m", base_url="http://localhost:1/v1")
    monkeypatch.setattr(
        endpoint,
        "_ask",
        lambda messages, **_: asked.append(messages[-1]["content"]) or types.SimpleNamespace(choices=[message]),
    )
    endpoint.sample(prompts, [own], decoding, 0)
    assert sorted(asked) == sorted([*own, *(prompt[0]["content"] for prompt in prompts)])


def test_vllm_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"trl-score\[vllm\]"):
        VLLMSampler(BASE)


@pytest.fixture(scope="module")
def endpoint():
    """`transformers serve` with the embedded task's base model."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        BASE,
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(360):  # a busy machine takes its time
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def online(monkeypatch):
    """The Hub's client asks no address at all when it is offline, not even this machine's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("self_refine", [False, True])
def test_a_chat_endpoint_gives_what_the_model_gives(endpoint, tmp_path, online, self_refine):
    """Greedy, on text that survives decoding and encoding: the attempts are those of the tokens."""
    settings = {**SETTINGS, "limit": 12, "self_refine": self_refine}
    found = evaluate_self_correction(
        BASE, "arithmetic", backend="endpoint", base_url=endpoint, **settings, output_dir=tmp_path
    )
    exact = evaluate_self_correction(BASE, "arithmetic", **settings)
    assert [row["attempts"] for row in found.rollouts] == [row["attempts"] for row in exact.rollouts]
    assert [row.get("feedback") for row in found.rollouts] == [row.get("feedback") for row in exact.rollouts]
    assert found.summary["metrics"]["accuracy_t1"] == exact.summary["metrics"]["accuracy_t1"]
    assert found.rollouts[0]["num_tokens"][0] is not None


def answering(monkeypatch, *answers):
    """An endpoint whose client gives or raises one of these after the other, and the seconds that were waited."""
    answers, waited = list(answers), []

    def chat_completion(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return ChatCompletionOutput.parse_obj_as_instance(answer)

    sampler = EndpointSampler("m", base_url="http://x/v1", max_concurrency=1)
    monkeypatch.setattr(sampler.client, "chat_completion", chat_completion)
    monkeypatch.setattr("trl_score.endpoint.time.sleep", waited.append)
    return sampler, waited


def answer_of(content):
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}


def busy(status, **headers):
    error = OSError(f"{status} for url: http://x/v1.")
    error.response = types.SimpleNamespace(status_code=status, headers=headers)
    return error


def saying(status, text):
    error = busy(status)
    error.response.text = text
    return error


def test_half_a_character_of_an_endpoint_is_written_as_such(monkeypatch, tmp_path):
    """JSON may hold the first half of a pair, where the tokens end; no file can."""
    sampler, _ = answering(monkeypatch, answer_of("\ud83d\ude00 \ud83d"), answer_of("\udc00"))
    settings = SETTINGS | {"limit": 1}
    (row,) = evaluate_self_correction(sampler, "arithmetic", **settings, output_dir=tmp_path).rollouts
    assert row["attempts"] == ["😀 \ufffd", "\ufffd"] and load_evaluation(tmp_path).rollouts == [row]


def test_an_endpoint_that_has_too_much_to_do_is_asked_again(monkeypatch):
    refused = busy(429), busy(503, **{"Retry-After": "7"}), busy(429, **{"Retry-After": "9999"})
    sampler, waited = answering(monkeypatch, *refused, answer_of("one"), answer_of(None))
    (attempts,) = sampler.sample(["x"], ["again"], Decoding(), seed=0)
    assert [attempt.text for attempt in attempts] == ["one", ""] and waited == [1, 7, 60]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (busy(400), r"did not answer for the model 'm': 400 for url: http://x/v1\. Check that it runs"),
        (
            saying(400, '{"detail": "the context\n is too long"}'),
            r'v1, and said: \{"detail": "the context is too long"\}\. Check',
        ),
        (saying(404, "<html>"), r"http://x/v1\. Check that it runs"),
        ({"choices": []}, "gave no attempt for the model 'm', but an answer without text"),
        ({"error": {"message": "overloaded"}}, "gave no attempt for the model 'm', but {'message': 'overloaded'}"),
        ({"choices": [{"index": 0}]}, "gave no attempt"),
        (answer_of([{"type": "text", "text": "one"}]), "gave no attempt"),
    ],
)
def test_an_endpoint_that_gives_no_attempt_is_an_error_in_one_line(monkeypatch, answer, message):
    sampler, waited = answering(monkeypatch, answer)
    with pytest.raises(OSError, match=message):
        sampler.sample(["x"], ["again"], Decoding(), seed=0)
    assert not waited


def test_an_endpoint_that_is_always_busy_is_an_error(monkeypatch):
    sampler, waited = answering(monkeypatch, *[busy(429)] * 6)
    with pytest.raises(OSError, match=r"429 for url.* too much to do: set `batch_size` lower"):
        sampler.sample(["x"], ["again"], Decoding(), seed=0)
    assert waited == [1, 2, 4, 8, 16]


def test_an_endpoint_that_is_not_there_is_an_error_and_no_reward(tmp_path, online):
    with pytest.raises(Exception, match=r"(?i)connect"):
        sampler = EndpointSampler(BASE, base_url="http://127.0.0.1:9/v1")
        evaluate_self_correction(sampler, "arithmetic", **SETTINGS, output_dir=tmp_path)
    assert not (tmp_path / "rollouts.jsonl").exists()
