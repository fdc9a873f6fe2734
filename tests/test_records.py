"""What a results folder belongs to: reused for the same model, decoding and problems, refused for any other, never claimed in vain."""

import errno
import json
import logging
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_score import cli, evaluate_self_correction, inference_scaling
from trl_score.collection import collect, with_first_attempts
from trl_score.evaluation import load_evaluation
from trl_score.fingerprints import of_checkpoint, of_model, of_tokenizer
from trl_score.jobs import Job
from trl_score.records import Store, processes, read_rollouts, strict_json
from trl_score.sampling import EndpointSampler, TransformersSampler, keep_random_state
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.tasks.dataset import DatasetTask


BASE = str(BASE_MODEL_PATH)
SMALL = {"max_completion_length": 8, "batch_size": 4, "limit": 4}


def evaluate(model, folder, task=None, **settings):
    return evaluate_self_correction(model, task or Arithmetic(), **SMALL | settings, output_dir=folder)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")


@pytest.fixture
def adapter(tmp_path, model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


# --- another model in the same place ---


def scale_weights(folder):
    """Trained further and saved where it was."""
    (file,) = folder.glob("*.safetensors")
    save_file({name: value * 0.5 for name, value in load_file(file).items()}, file, {"format": "pt"})


def edit(name, **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def edit_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def edit_rules(folder):
    """The same vocabulary, other rules."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES = {
    "weights": (scale_weights, "weights"),
    "configuration": (edit("config.json", rms_norm_eps=1e-3), "weights"),
    "end tokens": (edit("generation_config.json", eos_token_id=[17, 3]), "weights"),
    "chat template": (edit_template, "tokenizer.chat_template"),
    "rules of the tokenizer": (edit_rules, "tokenizer.rules"),
    "arguments of the template": (edit("score.json", chat_template_kwargs={"x": 1}), "chat_template_kwargs"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES.keys())
def test_a_model_that_changed_at_its_path_is_another_one(model, tmp_path, change, name):
    (model / "score.json").write_text("{}")
    before = evaluate(str(model), tmp_path / "results")
    change(model)
    with pytest.raises(ValueError, match=f"holds another evaluation: .*{name} .* instead of .*Take another folder"):
        evaluate(str(model), tmp_path / "results")
    assert load_evaluation(tmp_path / "results").rollouts == before.rollouts


def test_a_model_may_be_moved(model, tmp_path, caplog):
    before = evaluate(str(model), tmp_path / "results")
    assert evaluate(f"{model}/", tmp_path / "results").rollouts == before.rollouts
    moved = model.rename(tmp_path / "moved")
    evaluation = evaluate(str(moved), tmp_path / "results", limit=5)
    assert evaluation.rollouts[:4] == before.rollouts and evaluation.settings["model"] == str(moved)
    assert "4 of 5 rollouts are reused" in caplog.text


def test_a_file_of_problems_may_be_named_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    Path("d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("e.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    first = evaluate(BASE, "results", DatasetTask("d.jsonl"), split="train")
    for name in ("./d.jsonl", str(tmp_path / "d.jsonl")):
        assert evaluate(BASE, "results", DatasetTask(name), split="train").rollouts == first.rollouts
    with pytest.raises(ValueError, match="holds another evaluation: task"):
        evaluate(BASE, "results", DatasetTask("e.jsonl"), split="train")


def test_an_endpoint_may_be_named_with_a_slash_at_its_end(tmp_path):
    addresses = ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/"]
    assert len({str(EndpointSampler("m", base_url=each).identity()) for each in addresses}) == 1


@pytest.mark.parametrize(
    "change",
    [
        edit("generation_config.json", repetition_penalty=1.5, temperature=0.3),
        lambda folder: (folder / "README.md").write_text("text"),
        lambda folder: (folder / "trainer_state.json").write_text("{}"),
        lambda folder: torch.save({}, folder / "training_args.bin"),
        lambda folder: (folder / "checkpoint-1").mkdir(),
    ],
)
def test_files_that_decide_nothing_do_not_count(model, tmp_path, change):
    before = evaluate(str(model), tmp_path / "results")
    change(model)
    assert evaluate(str(model), tmp_path / "results").rollouts == before.rollouts


def test_an_adapter_is_told_by_itself_and_by_its_base(model, adapter, tmp_path):
    evaluate(str(adapter), tmp_path / "results")
    before = of_checkpoint(str(adapter))
    scale_weights(adapter)
    with pytest.raises(ValueError, match="weights"):
        evaluate(str(adapter), tmp_path / "results")
    changed = of_checkpoint(str(adapter))
    scale_weights(model)
    assert len({before, changed, of_checkpoint(str(adapter))}) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"dtype": "bfloat16"}, "dtype 'auto' instead of 'bfloat16'"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "quantization None instead of"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs {} instead of"),
        ({"top_p": 0.9}, "top_p 1.0 instead of 0.9"),
        ({"max_completion_length": 7}, "max_completion_length 8 instead of 7"),
        ({"correction_instruction": "check again"}, "correction_instruction"),
    ],
)
def test_other_settings_are_refused(tmp_path, settings, name):
    evaluate(BASE, tmp_path)
    with pytest.raises(ValueError, match=f"holds another evaluation: .*{name}"):
        evaluate(BASE, tmp_path, **settings)


def hub_cache(folder, commits, main):
    """What the Hub's client keeps of a repository `me/tiny`."""
    repository = folder / "models--me--tiny"
    for commit, branch in commits.items():
        shutil.copytree(BASE_MODEL_PATH, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    (repository / "refs" / "main").write_text(main)


def test_a_branch_of_the_hub_is_its_commit(tmp_path):
    one, two = "1" * 40, "2" * 40
    hub_cache(tmp_path / "cache", {one: "first", two: "second"}, main=one)
    cache = {"cache_dir": str(tmp_path / "cache")}
    evaluation = evaluate("me/tiny", tmp_path / "results", **cache)
    assert evaluation.settings["weights"] == one
    assert evaluate("me/tiny", tmp_path / "results", **cache, revision="first").rollouts == evaluation.rollouts
    with pytest.raises(ValueError, match=f"weights '{one}' instead of '{two}'"):
        evaluate("me/tiny", tmp_path / "results", **cache, revision="second")
    (tmp_path / "cache" / "models--me--tiny" / "refs" / "main").write_text(two)  # pushed since
    with pytest.raises(ValueError, match="weights"):
        evaluate("me/tiny", tmp_path / "results", **cache)


def test_a_model_in_memory_is_told_by_its_weights(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    first = evaluate(model, tmp_path)
    assert evaluate(AutoModelForCausalLM.from_pretrained(BASE), tmp_path).rollouts == first.rollouts
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 0.5
    with pytest.raises(ValueError, match="weights"):
        evaluate(model, tmp_path)
    with pytest.raises(ValueError, match="weights"):
        evaluate(TransformersSampler(model), tmp_path)


def test_a_model_in_memory_is_told_by_its_end_tokens(tmp_path):
    """As the end tokens in `generation_config.json` of a folder are: attempts end elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    evaluate(model, tmp_path)
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, 5]
    with pytest.raises(ValueError, match="holds another evaluation: weights"):
        evaluate(model, tmp_path, limit=8)


def test_an_adapter_in_memory_is_told_on_and_off():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    plain = of_model(base)
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    on = of_model(model)
    with model.disable_adapter():
        off = of_model(model)
    assert of_model(model) == on and len({plain, on, off}) == 3
    assert of_model(model.to(torch.bfloat16)) not in (plain, on, off)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.set_adapter("default")
    one = of_model(model)
    model.set_adapter("other")
    assert of_model(model) != one


def test_a_fingerprint_of_a_tokenizer_does_not_depend_on_its_calls():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    before = of_tokenizer(tokenizer)
    tokenizer(["1", "1 2"], padding=True, truncation=True, max_length=1)
    assert of_tokenizer(tokenizer) == before


# --- other problems ---


class Changed(Arithmetic):
    """The problems, with some rows of them changed."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def load(self, split):
        rows = super().load(split).to_list()
        self.change(rows)
        return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda rows: rows[2].update(answer="1"), 2),
        (lambda rows: rows[0].update(prompt=[{"role": "user", "content": "1 2 3 4 5 6"}]), 0),
        (lambda rows: rows.insert(1, dict(rows[7])), 1),
        (lambda rows: rows.reverse(), 0),
    ],
)
def test_rollouts_of_problems_that_changed_are_refused(tmp_path, change, number):
    evaluate(BASE, tmp_path)
    with pytest.raises(ValueError, match=f"holds rollouts of other problems: number {number} has changed"):
        evaluate(BASE, tmp_path, Changed(change))


def test_problems_after_those_that_were_sampled_may_change(tmp_path):
    first = evaluate(BASE, tmp_path)
    assert evaluate(BASE, tmp_path, Changed(lambda rows: rows[4].update(answer="1"))).rollouts == first.rollouts


# --- what may change ---


class Counting(TransformersSampler):
    def __init__(self):
        super().__init__(BASE)
        self.sampled = 0

    def sample(self, prompts, *args, **kwargs):
        self.sampled += len(prompts)
        return super().sample(prompts, *args, **kwargs)


@pytest.mark.parametrize("kind", ["evaluate", "collect", "scale"])
def test_limit_may_grow_and_shrink_and_batch_size_may_change(tmp_path, caplog, kind):
    def run(sampler, **settings):
        settings = SMALL | settings
        if kind == "evaluate":
            return evaluate_self_correction(sampler, "arithmetic", **settings, output_dir=tmp_path).rollouts
        if kind == "collect":
            return collect(sampler, "arithmetic", num_samples=2, **settings, output_dir=tmp_path)
        inference_scaling(sampler, "arithmetic", max_budget=4, **settings, output_dir=tmp_path)
        return read_rollouts(tmp_path / "corrected")

    folder = tmp_path / "corrected" if kind == "scale" else tmp_path
    few = run(Counting())
    assert not caplog.records
    per_problem = {"evaluate": 1, "collect": 2, "scale": 4}[kind]
    sampler = Counting()
    more = run(sampler, limit=7, batch_size=1)
    assert sampler.sampled == 3 * per_problem and more[: len(few)] == few
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    samples = {"evaluate": 1, "collect": 2, "scale": 2}[kind]
    assert f"{4 * samples} of {7 * samples} rollouts are reused from an earlier run in '{folder}'." in messages
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["num_problems"] == 7 and settings["batch_size"] == 1
    sampler = Counting()
    run(sampler, limit=2)
    assert sampler.sampled == 0
    assert len(load_evaluation(folder).rollouts) == 2 * samples
    if kind == "evaluate":
        assert json.loads((folder / "summary.json").read_text())["num_problems"] == 2
        assert run(sampler, limit=7) == more and sampler.sampled == 0


def test_an_evaluation_that_grows_has_no_summary_until_it_is_done(tmp_path):
    class Fails(Counting):
        def sample(self, *args, **kwargs):
            if self.sampled:
                raise KeyboardInterrupt
            return super().sample(*args, **kwargs)

    evaluate(BASE, tmp_path)
    settings = {**asdict_of(tmp_path)}
    with pytest.raises(ValueError, match="weights"):  # a sampler is told by its weights, a name by its files
        evaluate(Fails(), tmp_path, limit=12)
    assert asdict_of(tmp_path) == settings
    shutil.rmtree(tmp_path)
    evaluate(Counting(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fails(), tmp_path, limit=12)
    assert not (tmp_path / "summary.json").exists() and len(read_rollouts(tmp_path)) == 8


def asdict_of(folder):
    return json.loads((folder / "settings.json").read_text())


def test_seeds_belong_to_the_rollouts_of_a_batch(tmp_path):
    sampled = {"temperature": 1.0, "num_samples": 4, "limit": 6}
    one, again, other = (evaluate(BASE, None, **sampled, batch_size=size).rollouts for size in (4, 4, 6))
    assert one == again and one != other


# --- a folder is claimed by its first rollout ---


@pytest.mark.parametrize(
    ("model", "settings", "error"),
    [
        ("no/model", {}, "The model 'no/model' is not available"),
        ("/nowhere/model", {}, "The model '/nowhere/model' is not available"),
        (BASE, {"dtype": "bloat16"}, "`dtype='bloat16'` is no type of weights"),
        (BASE, {"dtype": "int8"}, "dtype"),
        (BASE, {"backend": "vlm"}, "Unknown backend"),
        (BASE, {"limit": 0}, "`limit=0` leaves no problem"),
        (BASE, {"top_p": 0}, "top_p"),
        (BASE, {"temperature": math.nan}, "temperature"),
        (BASE, {"attn_implementation": "flash"}, "flash"),
        (BASE, {"backend": "endpoint", "base_url": "http://127.0.0.1:9/v1"}, ""),
    ],
)
def test_what_cannot_start_leaves_nothing(tmp_path, model, settings, error):
    for run in (evaluate, lambda *args, **more: collect(model, "arithmetic", **SMALL | more, output_dir=args[1])):
        with pytest.raises(Exception, match=error):
            run(model, tmp_path / "out", **settings)
    with pytest.raises(Exception, match=error):
        inference_scaling(model, "arithmetic", **SMALL | settings, max_budget=2, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_leaves_nothing(model, tmp_path):
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(Exception):  # noqa: B017 (whichever it is)
        evaluate(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_of_an_earlier_version_are_read_but_not_continued(tmp_path):
    evaluate(BASE, tmp_path)
    settings = {name: value for name, value in asdict_of(tmp_path).items() if name not in ("weights", "data")}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert len(load_evaluation(tmp_path).rollouts) == 4
    with pytest.raises(ValueError, match="results of an earlier version of trl-score"):
        evaluate(BASE, tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds rollouts, but no settings.json"):
        evaluate(BASE, tmp_path)


def test_arguments_without_a_meaning_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(ValueError, match="`dtype` is for a model that is loaded by its name"):
        evaluate(model, tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="`chat_template_kwargs` is for a model, but `model` is a sampler"):
        evaluate(TransformersSampler(model), tmp_path, chat_template_kwargs={})


LOCKED = """
import sys, time
from trl_score.records import Store
store = Store(sys.argv[1], {"weights": "1"}, ["a", "b"])
store.add([{"index": 0, "sample": 0}])
print("written", flush=True)
sys.stdin.read()
store.add([{"index": 1, "sample": 0}])
store.all_rollouts()
"""


def test_two_commands_do_not_write_one_folder_at_the_same_time(tmp_path):
    early = Store(tmp_path / "results", {"weights": "1"}, ["a", "b"])  # it read the folder before the other one wrote
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "results")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"written\n"
        with pytest.raises(ValueError, match=r"Another command writes to `output_dir=.*results'` at the same time"):
            Store(tmp_path / "results", {"weights": "1"}, ["a", "b"])
        with pytest.raises(ValueError, match="Another command"):
            early.add([{"index": 0, "sample": 0}])
        other.communicate()
    with pytest.raises(ValueError, match="Another command"):  # it does not know what the other one wrote
        early.add([{"index": 0, "sample": 0}])
    store = Store(tmp_path / "results", {"weights": "1"}, ["a", "b", "c"])
    assert [row["index"] for row in store.rollouts] == [0, 1]
    store.add([{"index": 2, "sample": 0}])
    again = Store(
        tmp_path / "results", {"weights": "1"}, ["a", "b", "c"]
    )  # of one process, as after an error in a notebook
    assert len(again.all_rollouts()) == 3 == len((tmp_path / "results" / "rollouts.jsonl").read_text().splitlines())


def test_reading_does_not_touch_a_line_that_is_being_written(tmp_path):
    evaluate(BASE, tmp_path)
    file = tmp_path / "rollouts.jsonl"
    with file.open("a") as handle:
        handle.write('{"index": 4, ')
    before = file.read_bytes()
    assert len(load_evaluation(tmp_path).rollouts) == 4 and file.read_bytes() == before
    evaluate(BASE, tmp_path)  # this run may write, so it mends the file
    assert file.read_bytes() == before[: -len('{"index": 4, ')]


@pytest.mark.parametrize(
    "damaged", [b'{"index": 1, "sam{"index": 1}\n', b"\0" * 50 + b"\n", b'{"index": 1}\n', b"null\n"]
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    store = Store(tmp_path, {"weights": "1"}, ["a", "b", "c"])
    store.add([{"index": 0, "sample": 0}])
    with store.file.open("ab") as handle:
        handle.write(damaged)
    store.add([{"index": 2, "sample": 0}])
    with pytest.raises(ValueError, match=r"rollouts.jsonl', line 2, is damaged: .* Remove the line"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize("name", ["rollouts.jsonl", "summary.json"])
def test_files_of_another_program_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds (rollouts|a summary\.json), but no settings.json"):
        evaluate(BASE, tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_damaged_settings_are_named(tmp_path):
    Store(tmp_path, {"weights": "1"}, ["a"]).add([{"index": 0, "sample": 0}])
    (tmp_path / "settings.json").write_text("null")
    for read in (load_evaluation, lambda folder: evaluate(BASE, folder)):
        with pytest.raises(ValueError, match=r"settings.json' is damaged: it has no fields. Restore it"):
            read(tmp_path)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    folder, write_text = tmp_path / "results", Path.write_text
    evaluate(BASE, folder)
    inference_scaling(BASE, Arithmetic(), **SMALL, max_budget=2, output_dir=tmp_path / "votes")
    files = [folder / "summary.json", tmp_path / "votes" / "scaling.json"]
    before = [file.read_text() for file in files]

    def fill(path, text, *more):
        if "settings" in path.name:
            return write_text(path, text, *more)
        write_text(path, text[: len(text) // 2], *more)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space"):
        evaluate(BASE, folder)
    monkeypatch.setattr("trl_score.records.Store.write", lambda *_: None)
    with pytest.raises(OSError, match="No space"):
        inference_scaling(BASE, Arithmetic(), **SMALL, max_budget=2, output_dir=tmp_path / "votes")
    assert [file.read_text() for file in files] == before


def test_settings_are_the_job(tmp_path):
    evaluation = evaluate(BASE, tmp_path)
    written = asdict_of(tmp_path)
    assert written.pop("versions")["python"]
    assert written == evaluation.settings == asdict(Job(**written))
    assert written["decoding"] == "nothing else" and len(written["weights"]) == 16
    sampler = EndpointSampler("m", base_url="http://me:secret@127.0.0.1:9/v1", api_key="secret")
    assert sampler.decoding == "what the server adds" and "secret" not in json.dumps(sampler.identity())


# --- strict JSON ---


def test_what_has_no_value_is_null_in_files_and_empty_in_tables(tmp_path):
    """All right from the start: nothing to correct."""
    store = Store(tmp_path, {"weights": None, "model": "m"}, ["a", "b"])
    assert strict_json({"a": [math.nan, 1.0, math.inf], "b": (None,)}, indent=None) == (
        '{"a": [null, 1.0, null], "b": [null]}'
    )
    assert not tmp_path.joinpath("settings.json").exists()
    store.add([{"index": 0, "sample": 0, "rewards": [math.nan]}])
    line = (tmp_path / "rollouts.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["rewards"] == [None]


# --- the random state ---


def states():
    return [repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()]


RUNS = {
    "evaluate": lambda _: evaluate(BASE, None),
    "evaluate with a temperature": lambda _: evaluate(BASE, None, temperature=1.0),
    "collect": lambda _: collect(BASE, "arithmetic", **SMALL, num_samples=1),
    "scale": lambda folder: inference_scaling(BASE, "arithmetic", **SMALL, max_budget=2, output_dir=folder),
    "an adapter": lambda folder: evaluate(str(folder / "adapter"), None),
    "a sampler alone": lambda _: Counting().sample([[{"role": "user", "content": "1"}]], ["2"], decoding(), seed=3),
}


def decoding():
    from trl_score.sampling import Decoding

    return Decoding(1.0, 1.0, 4)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_random_state_is_as_it_was(run, adapter, tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = states()
    run(tmp_path)
    assert states() == before


def test_the_random_state_is_as_it_was_after_an_error():
    before = states()
    with pytest.raises(KeyboardInterrupt), keep_random_state():
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyboardInterrupt
    assert states() == before


# --- stored first attempts ---


def test_token_ids_of_another_tokenizer_are_refused(tmp_path, chat_model, caplog):
    collect(BASE, "arithmetic", num_attempts=1, num_samples=2, output_dir=tmp_path, **SMALL)
    rows, own = Arithmetic().load("train").select(range(4)), AutoTokenizer.from_pretrained(BASE)
    own.chat_template, own.padding_side = "other", "right"  # the tokens are the same
    assert "first_attempts" in with_first_attempts(rows, tmp_path, tokenizer=own).column_names
    other = AutoTokenizer.from_pretrained(chat_model)
    with pytest.raises(ValueError, match="holds token ids of another tokenizer, the one of"):
        with_first_attempts(rows, tmp_path, tokenizer=other)
    assert len(with_first_attempts(rows, tmp_path)) == 4
    settings = asdict_of(tmp_path) | {"tokenizer": None}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert len(with_first_attempts(rows, tmp_path, tokenizer=other)) == 4
    assert "does not say which tokenizer" in caplog.text


# --- processes and the command line ---


WORKER = """
import datetime, json, sys, time
from pathlib import Path

import torch
import torch.distributed.distributed_c10d as c10d

c10d._get_default_timeout = lambda backend: datetime.timedelta(seconds=2)  # what a run would wait for by default
from trl_score import evaluate_self_correction, inference_scaling
from trl_score.collection import collect
from trl_score.records import disconnect, processes
from trl_score.sampling import TransformersSampler

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
sampler, slept = TransformersSampler(sys.argv[3]), []
sample = sampler.sample

def slowly(*args, **kwargs):
    if processes().process_index == 1 and not slept:
        slept.append(time.sleep(3))
    return sample(*args, **kwargs)

sampler.sample = slowly
torch.manual_seed(processes().process_index)
before = torch.get_rng_state()
evaluate_self_correction(sampler, "arithmetic", **settings, output_dir=folder / "evaluate")
collect(sampler, "arithmetic", num_samples=1, **settings, output_dir=folder / "collect")
inference_scaling(sampler, "arithmetic", max_budget=2, **settings, output_dir=folder / "scale")
assert torch.equal(torch.get_rng_state(), before)
disconnect()
"""


def test_two_processes_do_what_one_does_and_wait_for_the_slower(tmp_path):
    """Seven problems in batches of two: the first process has four of them, the second three."""
    settings = {"max_completion_length": 8, "batch_size": 2, "limit": 7}
    (tmp_path / "worker.py").write_text(WORKER)
    for number, folder in ((1, "one"), (2, "two")):
        arguments = [tmp_path / "worker.py", tmp_path / folder, json.dumps(settings), BASE]
        done = ranks(number, *arguments, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("evaluate", "collect", "scale/corrected", "scale/parallel"):
        one, two = tmp_path / "one" / kind, tmp_path / "two" / kind
        assert read_rollouts(one) == read_rollouts(two) and len(read_rollouts(two)) == 7
        assert len((two / "rollouts-1.jsonl").read_text().splitlines()) == 3
        assert asdict_of(one) == asdict_of(two)
    for name in ("evaluate/summary.json", "scale/scaling.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_processes_that_do_not_share_the_folder_are_an_error(tmp_path):
    """As on two nodes, each with a disk of its own: the first would give the metrics of its half."""
    (tmp_path / "worker.py").write_text(
        "import sys\n"
        "from trl_score import evaluate_self_correction\n"
        "from trl_score.records import processes\n"
        "folder = f'{sys.argv[1]}/{processes().process_index}'\n"
        "evaluate_self_correction(sys.argv[2], 'arithmetic', max_completion_length=8, batch_size=2, limit=7, output_dir=folder)\n"
    )
    done = ranks(2, tmp_path / "worker.py", tmp_path, BASE, ACCELERATE_USE_CPU="true")
    assert done.returncode != 0 and "has 4 of 7 rollouts, as process 0 sees it" in done.stderr
    assert not (tmp_path / "0" / "summary.json").exists()


def test_processes_wait_as_long_as_the_slowest_needs(monkeypatch):
    asked = {}
    monkeypatch.setattr("trl_score.records.PartialState", lambda **kwargs: asked.update(kwargs))
    processes()
    assert asked["timeout"] >= timedelta(days=30)


def test_the_command_line_says_what_is_reused(tmp_path, capsys, caplog):
    arguments = ["evaluate", "--model", BASE, "--task", "arithmetic", "--max_completion_length", "8"]
    arguments += ["--output_dir", str(tmp_path), "--limit"]
    assert cli.main([*arguments, "3"]) == 0 and "reused" not in caplog.text
    assert cli.main([*arguments, "5"]) == 0
    assert f"3 of 5 rollouts are reused from an earlier run in '{tmp_path}'." in caplog.text
    out = capsys.readouterr().out
    assert "95 %" in out and "Percent" in out
    assert cli.main([*arguments, "5", "--dtype", "bloat16", "--load_in_4bit"]) == 1
    assert "`dtype='bloat16'` is no type of weights" in capsys.readouterr().err
