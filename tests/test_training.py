"""What `trl-score train` and the example scripts share."""

import asyncio
import errno
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerState
from transformers.integrations import TensorBoardCallback
from trl import ModelConfig

from trl_score import CollapseAlarm, KeepBestCheckpoint, SCoReConfig, SCoReTrainer
from trl_score import training as module
from trl_score.fingerprints import of_checkpoint
from trl_score.records import check_folder
from trl_score.reward_errors import graded
from trl_score.sampling import TransformersSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.training import (
    TrainArguments,
    TrainConfig,
    by_mode,
    check_precision,
    checkpoint_to_resume,
    held_out,
    line_of,
    train,
    with_examples,
)


BASE = str(BASE_MODEL_PATH)


@pytest.fixture
def run(arithmetic_config):
    """Train for a step; keyword arguments go to the configuration."""

    def run(callbacks=None, num_test=20, **settings):
        task = Arithmetic(num_train=16, num_test=num_test)
        config = SCoReConfig(
            **arithmetic_config | {"max_steps": 2, "stage1_steps": 1, "per_device_eval_batch_size": 20} | settings
        )
        rows = task.load("train"), task.load("test") if num_test else None
        return train(*rows, task.reward, config, ModelConfig(BASE), callbacks=callbacks)

    return run


def test_held_out_problems_of_another_task_are_graded_by_that_task(arithmetic_config, capsys):
    """Whose grader gives 0 to all here."""
    task = Arithmetic(num_train=16, num_test=20)
    config = SCoReConfig(**arithmetic_config | {"max_steps": 1, "per_device_eval_batch_size": 20, "stage1_steps": 0})
    zero = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    rows = task.load("train"), task.load("test")
    trainer = train(*rows, task.reward, config, ModelConfig(BASE), eval_reward=zero)
    evaluations = [log for log in trainer.state.log_history if "eval_stage" in log]
    assert [log["eval_accuracy_t1"] for log in evaluations] == [0, 0]
    assert next(log for log in trainer.state.log_history if "loss" in log)["accuracy_t1"] > 0
    first, other = by_mode([task.reward, zero], zero, lambda: False)
    assert (first(completions=["1"], answer=["1"]), other(completions=["1"])) == ([0.0], [None])


def test_an_async_reward_is_awaited_where_another_task_grades_the_evaluation():
    async def one(completions, **kwargs):
        return [1.0] * len(completions)

    def zero(completions, **kwargs):
        return [0.0] * len(completions)

    for training, evaluation in ((one, zero), (zero, one)):
        for is_training in (True, False):
            reward = by_mode(training, evaluation, lambda is_training=is_training: is_training)
            rewards = asyncio.run(graded(reward, "reward", 1)(completions=["1", "2"]))
            assert rewards == [1.0 if is_training == (training is one) else 0.0] * 2


def test_a_task_of_a_file_is_named_in_the_card_without_its_path(tmp_path, monkeypatch):
    found, file = [], tmp_path / "tasks.py"
    file.write_text("from trl_score.tasks import Arithmetic\nclass Own(Arithmetic):\n    name = 'own'\n")
    monkeypatch.setattr(module, "train", lambda *arguments: found.append(arguments[6:8]))
    more = ["--model_name_or_path", BASE, "--bf16", "false", "--output_dir", str(tmp_path / "new")]
    for task, eval_task in (("arithmetic", f"{file}:Own"), (f"{file}:Own", "arithmetic"), (f"{file}:Own", None)):
        module.main(["--task", task, *(["--eval_task", eval_task] if eval_task else []), *more])
    assert found == [("arithmetic", "own"), ("own", "arithmetic"), ("own", "own")]


def test_table_has_all_attempts_and_the_temperature(run, capsys, tmp_path):
    run(num_attempts=3, eval_temperature=0.7, stage1_steps=0)
    printed = capsys.readouterr().out
    assert "20 held-out problems, temperature 0.7, percent" in printed
    table = json.loads((tmp_path / "run" / "self_correction.json").read_text())["table"]
    assert {
        "Accuracy@t1",
        "Accuracy@t2",
        "Accuracy@t3",
        "Δ(t1,t3)",
        "Δ(i→c)",
        "Δ(c→i)",
        "unchanged attempts",
    } == table.keys()
    assert "Accuracy@t3" in printed.split("held-out")[0]  # the lines of the steps


@pytest.mark.parametrize("before", [4, 0])
def test_after_a_resume_each_evaluation_says_what_it_was_measured_on(run, capsys, tmp_path, before):
    """The first part of the run evaluated on four problems, or on none."""
    folder = tmp_path / "run"
    run(num_test=before, max_steps=1, save_steps=1)
    capsys.readouterr()
    run(save_steps=1, resume_from_checkpoint="true")
    printed, card = capsys.readouterr().out, (folder / "README.md").read_text()
    start, steps, rows = ("base", [0, 2], [("0", "4")]) if before else ("step 1", [1, 2], [])
    assert f"20 held-out problems, greedy decoding, percent{start:>10}     SCoRe" in printed
    assert ("\nbase: 4 held-out problems\n" in printed) == ("Step 0 is the base model" in card) == bool(before)
    assert re.findall(r"^\| (\d) \| (\d+) \| ", card, re.M) == [*rows, ("1", "20"), ("2", "20")]
    numbers = json.loads((folder / "self_correction.json").read_text())
    assert (numbers["steps"], numbers["num_problems"]) == (steps, 20)
    assert held_out({"eval_accuracy_t1": 1.0}) == "an unknown number of held-out problems"  # of an older version


def test_table_says_how_many_could_not_be_graded(arithmetic_config, capsys, tmp_path):
    """The grader knows only the answers of half of the problems."""
    task = Arithmetic(num_train=16, num_test=20)
    rows = task.load("test").map(lambda row, i: {"answer": row["answer"] if i % 2 else None}, with_indices=True)

    def grade(completions, answer, **_):
        verdicts = task.reward(completions=completions, answer=[each or "0" for each in answer])
        return [None if each is None else verdict for each, verdict in zip(answer, verdicts, strict=True)]

    config = SCoReConfig(**arithmetic_config | {"max_steps": 1})
    trainer = train(task.load("train"), rows, grade, config, ModelConfig(BASE))
    log = trainer.state.log_history[-1]
    assert [log[f"eval_num_{name}"] for name in ("problems", "rollouts", "graded")] == [20, 20, 10]
    assert "\n20 held-out problems (10 not graded), greedy" in capsys.readouterr().out
    assert "| 20 (10 not graded) | " in (tmp_path / "run" / "README.md").read_text()


def test_weights_of_a_loaded_checkpoint_are_not_those_of_the_last_step(arithmetic_config, capsys, tmp_path):
    """The training reward falls, so that step 1 of 2 is loaded. The card keeps the evaluation of step 2."""
    task, calls = Arithmetic(num_train=16, num_test=20), itertools.count(1)

    def fading(completions, **_):
        share = 1 / next(calls)
        return [share * (i % 2) for i in range(len(completions))]

    each_step = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "stage1_steps": 0}
    config, best = SCoReConfig(**arithmetic_config | each_step), KeepBestCheckpoint(1, load_at_end=True)
    rows = task.load("train"), task.load("test")
    train(*rows, fading, config, ModelConfig(BASE), callbacks=[best], eval_reward=task.reward)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| checkpoint loaded when training ended | step 1, highest training reward |" in card
    table = dict(re.findall(r"^\| (\d|weights of step \d) (\| 20 .*)", card, re.M))
    assert list(table) == ["0", "1", "2", "weights of step 1"] and table["weights of step 1"] == table["1"]
    assert "checkpoint loaded" not in (tmp_path / "run" / "checkpoint-2" / "README.md").read_text()
    assert "\nSCoRe: weights of step 1, highest training reward\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "self_correction.json").read_text())["steps"] == [0, 1]


def fail(*args, **kwargs):
    raise RuntimeError("no luck\ntoday")


def test_a_model_is_saved_whatever_fails_after_its_training(run, tmp_path, monkeypatch, capsys):
    evaluate, folder = SCoReTrainer.evaluate, tmp_path / "run"

    def fail_at_the_end(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) if self.is_in_train else fail()

    monkeypatch.setattr(SCoReTrainer, "evaluate", fail_at_the_end)
    with pytest.raises(SystemExit) as error:
        run()
    message = (
        f"The model is trained and saved in {folder}, but: The last evaluation failed: RuntimeError: no luck today"
    )
    assert error.value.code == message
    assert {"model.safetensors", "trainer_state.json", "README.md"} <= {path.name for path in folder.iterdir()}
    assert "held-out problems" not in capsys.readouterr().out  # a table of the base model alone would mislead


def test_every_failure_is_told_and_nothing_else_is_lost(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("trl_score.model_card.write_figure", fail)
    monkeypatch.setattr(TensorBoardCallback, "on_log", fail)
    monkeypatch.setattr(SCoReTrainer, "push_to_hub", fail)
    monkeypatch.setattr(SCoReTrainer, "init_hf_repo", lambda self: None)
    with pytest.raises(SystemExit) as error:
        run(report_to="tensorboard", push_to_hub=True, save_strategy="no")
    for what in ("The model card failed: ", "The upload failed: ", "TensorBoardCallback failed: "):
        assert f"{what}RuntimeError: no luck today" in error.value.code
    assert "20 held-out problems" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_accuracy_t2" in log for log in state["log_history"]) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"report_to": "wandb"}, r"WandbCallback requires wandb to be installed\. Run `pip install wandb`"),
        ({"push_to_hub": True}, "The repository for `--push_to_hub` cannot be made: Cannot reach"),
    ],
)
def test_what_a_run_lacks_beside_the_model_is_said_in_one_line(run, monkeypatch, option, message):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        run(**option)


def test_a_run_resumes_from_its_last_checkpoint(run, tmp_path):
    folder = tmp_path / "run"
    callbacks = [KeepBestCheckpoint(1)]
    run(callbacks, save_steps=1)
    best = json.loads((folder / "_best-stage1" / "best.json").read_text())
    with pytest.raises(SystemExit) as error:
        run(save_steps=1)
    assert error.value.code == (
        f"'{folder}' has checkpoints of an earlier run. Resume that run with `--resume_from_checkpoint true`, or start a new "
        "one with another `--output_dir`."
    )
    trainer = run([KeepBestCheckpoint(1)], save_steps=1, max_steps=3, resume_from_checkpoint="true")
    assert trainer._first_step == 2  # the shares of the time are of the steps since
    steps = [log["step"] for log in trainer.state.log_history if "stage" in log]
    assert steps == [1, 2, 3] and trainer.state.global_step == 3
    assert json.loads((folder / "_best-stage1" / "best.json").read_text()) == best
    assert json.loads((folder / "_best-stage2" / "best.json").read_text())["run"] == best["run"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("true", "checkpoint-10"),  # 9 is less, 11 was interrupted
        ("True", "checkpoint-10"),
        (True, "checkpoint-10"),  # from a YAML file
        ("{folder}/checkpoint-9", "checkpoint-9"),
        ("{folder}/renamed", "renamed"),
    ],
)
def test_a_checkpoint_to_resume_is_found(tmp_path, asked, found):
    for name in ("checkpoint-9", "checkpoint-10", "renamed", "checkpoint-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    asked = asked.format(folder=tmp_path) if isinstance(asked, str) else asked
    config = SCoReConfig(output_dir=str(tmp_path), bf16=False, resume_from_checkpoint=asked)
    assert checkpoint_to_resume(config) == str(tmp_path / found)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("true", "there is none. Leave the option out"),
        ("{folder}/checkpoint-7", "is no checkpoint: it has no trainer_state.json"),
        ("last", "`--resume_from_checkpoint last` is no checkpoint"),
        (None, None),
        ("false", None),
        (False, None),
    ],
)
def test_a_checkpoint_that_is_missing_is_said(tmp_path, asked, message):
    (tmp_path / "checkpoint-7").mkdir()  # interrupted while it was written
    asked = asked.format(folder=tmp_path) if isinstance(asked, str) else asked
    config = SCoReConfig(output_dir=str(tmp_path), bf16=False, resume_from_checkpoint=asked)
    if message is None:
        assert checkpoint_to_resume(config) is None
    else:
        with pytest.raises(SystemExit, match=message):
            checkpoint_to_resume(config)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors", "score_run.json"]
)
def test_the_model_of_an_earlier_run_is_not_overwritten(run, tmp_path, name):
    """It may have no checkpoints, and a LoRA adapter beside it would be evaluated as the old model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("trained")
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == (
        f"`output_dir='{folder}'` holds the model of an earlier run, which a new run would overwrite. Give another folder, or "
        "remove this one."
    )
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, "trained")]


def test_an_adapter_and_its_card_name_the_revision_of_the_base_model(arithmetic_config, tmp_path, monkeypatch):
    """It is evaluated on that revision, whatever was pushed to `main` since; in a folder and at a revision of its own on the Hub."""

    def in_cache(name, folder, branch, commit):
        repository = tmp_path / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return repository / "snapshots" / commit

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    in_cache("tiny", BASE, "old", "1" * 40)
    weights = in_cache("tiny", BASE, "main", "2" * 40) / "model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights, {"format": "pt"})

    task = Arithmetic(num_train=16)
    config = SCoReConfig(**arithmetic_config | {"max_steps": 1, "stage1_steps": 0, "save_strategy": "no"})
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    train(task.load("train"), None, task.reward, config, ModelConfig("me/tiny", model_revision="old", **lora))

    card = Path(config.output_dir, "README.md").read_text()
    assert "model_revision: old" in card and "| base model | me/tiny, revision old |" in card
    in_cache("adapter", config.output_dir, "trained", "3" * 40)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for name, where in ((config.output_dir, {}), ("me/adapter", {"revision": "trained"})):
        assert of_checkpoint(name, **where).endswith(f" on {'1' * 40}")
        loaded, embedding = (
            TransformersSampler(name, tokenizer, **where).model.state_dict(),
            "model.embed_tokens.weight",
        )
        assert torch.equal(loaded[embedding], load_file(Path(BASE, "model.safetensors"))[embedding])
        assert any("lora_" in each for each in loaded)


def test_examples_are_of_each_kind():
    def reward(completions, gold, **kwargs):
        return [None if text == "?" else float(text == right) for text, right in zip(completions, gold, strict=True)]

    examples, prompts = {}, ["p0", "p1", "p2", "p3", "p4"]
    rewarded = with_examples(reward, examples, 2)
    assert rewarded.__name__ == "reward"
    attempts = (["a", "x", "x", "?", "a"], ["a", "a", "y", "a", "x"])
    for attempt, texts in enumerate(attempts, start=1):
        rewards = rewarded(prompts=prompts, completions=texts, gold=["a"] * 5, attempt=attempt)
        assert rewards == reward(texts, ["a"] * 5)
    assert examples == {
        "c→c": ("p0", [("a", True), ("a", True)]),
        "i→c": ("p1", [("x", False), ("a", True)]),
        "i→i": ("p2", [("x", False), ("y", False)]),
        "c→i": ("p4", [("a", True), ("x", False)]),
    }
    assert with_examples("a/reward-model", examples, 2) == "a/reward-model"


@pytest.mark.parametrize("rewards", [[1.0], None, 1.0])
def test_examples_leave_the_error_of_a_wrong_result_as_it_is(rewards):
    rewarded = graded(with_examples(lambda **_: rewards, {}, 2), "mine", 1)
    with pytest.raises(ValueError, match=r"'mine' returned .* for 2 completions of attempt 1. It must return a list"):
        rewarded(prompts=["p", "q"], completions=["a", "b"])


def test_a_rollout_that_was_graded_with_nan_is_no_example():
    examples = {}
    rewarded = with_examples(lambda **_: [math.nan, 1.0], examples, 2)
    for attempt in (1, 2):
        rewarded(prompts=["p", "q"], completions=["a", "b"], attempt=attempt)
    assert examples == {"c→c": ("q", [("b", True)] * 2)}


def test_examples_are_printed_with_their_verdicts(run, capsys):
    run()
    text = capsys.readouterr().out
    assert "attempt 1  right  " in text and "attempt 2  wrong  " in text
    assert 2 <= text.count("attempt 1  ") <= 3


def test_callbacks_come_from_the_arguments():
    (alarm,) = TrainArguments().callbacks()
    assert isinstance(alarm, CollapseAlarm) and alarm.window == 10
    settings = {"keep_best_checkpoint": True, "best_checkpoint_window": 3, "load_best_checkpoint_at_end": True}
    (best,) = TrainArguments(collapse_window=0, **settings).callbacks()
    assert isinstance(best, KeepBestCheckpoint) and (best.window, best.load_at_end) == (3, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_checkpoint_at_end": True}, "nothing to load without `keep_best_checkpoint`"),
        ({"collapse_window": -1}, "`collapse_window=-1` is a number of steps"),
        ({"best_checkpoint_window": 0}, "`best_checkpoint_window=0` a number of logs"),
    ],
)
def test_arguments_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(**settings)


@pytest.mark.parametrize(
    ("settings", "model", "bf16"),
    [
        ({}, BASE, False),
        ({"bf16": False}, "other", False),
        ({"use_cpu": True}, "other", True),
        ({"bf16": True, "use_cpu": True}, BASE, True),
        ({}, "other", None),  # nobody said that a CPU will do
        ({"bf16": True}, BASE, None),
        ({"bf16": True}, "other", None),
    ],
)
def test_a_machine_without_bfloat16_trains_or_says_what_to_add(tmp_path, monkeypatch, settings, model, bf16):
    monkeypatch.setattr("trl_score.score_config.is_torch_bf16_gpu_available", lambda: False)
    config = TrainConfig(output_dir=str(tmp_path), **settings)
    if bf16 is None:
        with pytest.raises(SystemExit, match="Add `--use_cpu` to train on the CPU"):
            check_precision(config, model)
    else:
        check_precision(config, model)
        assert config.bf16 == bf16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "maths", "--model_name_or_path", "x"], "Unknown task 'maths'"),
        (["--task", "arithmetic", "--model_name_or_path", "no/such-model", "--bf16", "false"], "The model 'no/such-model'"),
        (["--task", "arithmetic", "--resume_from_checkpoint", "true", "--model_name_or_path", "x"], "there is none"),
        (["--task", "arithmetic", "--model_name_or_path", "x"], "Add `--use_cpu`"),
        (["--task", "arithmetic", "--keep_best_checkpoint"], "writes none. Set it to 'steps'"),
        (["--bf16", "true"], "Which problems"),
        (["--task", "arithmetic", "--alpha", "-1"], "`alpha=-1.0` would reward"),
        (["--task", "arithmetic", "--correction_instruction", " "], "`correction_instruction` is empty"),
        (["--task", "arithmetic", "--num_train_problems", "0"], "--num_train_problems 0 leaves no problem"),
        (["--task", "no_such.py:Task", "--model_name_or_path", "x"], "there is no file 'no_such.py'"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_line_and_before_devices(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("trl_score.score_config.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert message in error.value.code and "\n" not in error.value.code
    assert not list(tmp_path.iterdir())


def test_processes_of_the_embedded_task_divide_the_cores_of_their_machine(tmp_path, monkeypatch):
    """Four processes on two machines of eight cores: four threads each."""
    numbers = []
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="leaves no problem"):
        module.main(["--task", "arithmetic", "--num_train_problems", "0", "--output_dir", str(tmp_path)])
    assert numbers == [4]


def test_a_folder_that_cannot_be_written_is_blamed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        module.main(["--task", "arithmetic", "--output_dir", str(tmp_path / "file" / "run")])
    assert (
        error.value.code
        == f"`output_dir='{tmp_path}/file/run'` is no folder: '{tmp_path}/file' is a file. Give another one."
    )
    check_folder(tmp_path / "new" / "run")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]  # looking leaves nothing

    def full(*args, **kwargs):  # root may write everywhere
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(PermissionError, match=r"'.*' does not allow it \(No space left on device\)\. Give another"):
        check_folder(tmp_path / "new" / "run")


# what a run says while it trains


def test_a_log_is_one_line():
    logs = {
        "stage": 1.0,
        "accuracy_t1": 0.5,
        "delta_i_to_c": 0.031,
        "kl": 0.01234,
        "num_generated_tokens": 12345.0,
        "step_time": 3.21,
    }
    line = "step    20  stage 1  Accuracy@t1  50.0  Δ(i→c)   3.1  KL 0.0123  12,345 tokens  3.2 s/step"
    assert line_of(20, logs) == line


def test_the_time_left_counts_from_the_step_that_a_run_resumes_from():
    """20 of 30 steps were done before: one more in a second leaves nine seconds, not half a second."""
    bar, state = module.Progress(), TrainerState(max_steps=30, global_step=20, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    state.global_step = 21
    bar.on_step_end(None, state, None)
    shown = bar.training_bar.format_dict
    assert (shown["n"], shown["initial"], shown["total"]) == (21, 20, 30)
    assert bar.training_bar.format_meter(**shown | {"elapsed": 1.0, "rate": None}).endswith("[00:01<00:09,  1.00it/s]")
    bar.on_train_end(None, state, None)


# Ctrl-C


@pytest.mark.parametrize("save_steps", [1, 500])
def test_an_interrupted_training_says_what_is_kept(run, tmp_path, monkeypatch, capsys, save_steps):
    step = SCoReTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SCoReTrainer, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(save_steps=save_steps)
    last = capsys.readouterr().err.splitlines()[-1]
    kept = f"1 of 2 steps were done; '{tmp_path}/run/checkpoint-1' is kept. The same command with `--resume_from_checkpoint true`"
    nothing = "1 of 2 steps were done, and nothing is kept: no checkpoint was written yet"
    assert stop.value.code == 130 and last.startswith(f"Interrupted. {kept if save_steps == 1 else nothing}")


def test_after_training_an_interruption_costs_no_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 130 and (tmp_path / "run" / "model.safetensors").exists()
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"Interrupted. The model is trained and saved in '{tmp_path}/run'."
    )


def test_the_embedded_task_has_the_settings_of_its_configuration():
    file = Path(__file__).parents[1] / "examples" / "configs" / "arithmetic.yaml"
    settings = yaml.safe_load(file.read_text())
    assert {"task": "arithmetic", "output_dir": "outputs/arithmetic"} | module.EMBEDDED == settings
    arguments = ["--task", "arithmetic", "--output_dir", "x", "--max_steps", "5"]
    _, args, _ = module.train_parser(arguments).parse_args_and_config(arguments)
    assert (args.max_steps, args.learning_rate, args.per_device_train_batch_size) == (5, 5e-4, 256)
    arguments += ["--model_name_or_path", BASE, "--bf16", "false"]
    _, args, _ = module.train_parser(arguments).parse_args_and_config(arguments)
    assert args.learning_rate == SCoReConfig.learning_rate


def test_damaged_weights_are_told_in_one_sentence(tmp_path):
    """As an interrupted copy or a full disk leaves them."""
    folder = shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(
        OSError, match=r"The weights of the model '.*' are damaged: Error .* Copy or download them again"
    ):
        TransformersSampler(str(folder))
    options = ["--task", "arithmetic", "--model_name_or_path", str(folder), "--max_completion_length", "8"]
    with pytest.raises(SystemExit, match=r"The model '.*' cannot be loaded: Error while deserializing header"):
        module.main([*options, "--bf16", "false", "--report_to", "none", "--output_dir", str(tmp_path / "run")])
