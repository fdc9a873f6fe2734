import json
import os
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from trl_score import CollapseAlarm, KeepBestCheckpoint, SCoReTrainer
from trl_score.callbacks import best_checkpoint
from trl_score.objective import two_stages


TWO_ATTEMPTS = SimpleNamespace(num_attempts=2)
EACH_STEP = {"max_steps": 3, "stage1_steps": 1, "save_steps": 1, "per_device_train_batch_size": 16}


def log(alarm, state, **values):
    logs = {"stage": 2, "changed_ratio": 0.5, "delta_i_to_c": 0.1, "accuracy_t1": 0.5, **values}
    state.global_step += 1
    state.log_history.append(dict(logs))
    alarm.on_log(TWO_ATTEMPTS, state, None, logs=logs)
    return logs["collapse"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("values", "collapses"),
    [
        ({"changed_ratio": 0.0, "delta_i_to_c": 0.0}, True),
        ({"delta_i_to_c": 0.0}, True),  # changed, but never for the better
        ({"changed_ratio": 0.0}, True),
        ({"delta_i_to_c": 0.0, "accuracy_t1": 0.99}, False),  # hardly anything to correct
        ({"delta_i_to_c": None, "changed_ratio": float("nan")}, False),  # nothing was measured
        ({"stage": 1.5, "changed_ratio": 0.0}, False),  # logs of both stages
        ({}, False),
    ],
)
def test_the_alarm_goes_off_once_and_only_for_collapse(values, collapses, stage, caplog):
    alarm, state = CollapseAlarm(3), TrainerState()
    assert [log(alarm, state, stage=stage) for _ in range(3)] == [0.0] * 3
    found = [log(alarm, state, **{"stage": stage} | values) for _ in range(5)]
    assert found == ([0, 0, 1, 1, 1] if collapses else [0] * 5)
    assert state.log_history[-1]["collapse"] == float(collapses)
    assert caplog.text.count(f"Self-correction has collapsed in Stage {'I' * stage} (step 6)") == int(collapses)
    if collapses:
        assert "50.0% of the first attempts wrong" in caplog.text
        assert ("A longer Stage I does not help" in caplog.text) == (stage == 1)
        assert ("`correction_instruction`" if stage == 1 else "`stage1_steps`") in caplog.text


def test_each_stage_has_its_alarm_which_a_resume_remembers(caplog):
    alarm, state = CollapseAlarm(2), TrainerState()
    assert [log(alarm, state, stage=1, changed_ratio=0.0) for _ in range(3)] == [0, 1, 1]
    assert [log(alarm, state) for _ in range(2)] == [0, 0]
    resumed = CollapseAlarm(2)
    resumed.on_train_begin(TWO_ATTEMPTS, state, None)
    assert log(resumed, state, stage=1) == 1 and log(resumed, state) == 0
    assert caplog.text.count("has collapsed") == 1
    alarm.on_train_begin(TWO_ATTEMPTS, TrainerState(), None)  # another run of the same trainer
    assert log(alarm, TrainerState(), stage=1) == 0


def test_nothing_is_said_before_the_window_is_full_or_of_single_attempts(caplog):
    alarm, state = CollapseAlarm(4), TrainerState()
    assert [log(alarm, state, changed_ratio=0.0) for _ in range(3)] == [0.0] * 3 and not caplog.text
    logs = {"stage": 2, "reward_t1": 0.0}
    alarm.on_log(SimpleNamespace(num_attempts=1), state, None, logs=logs)
    assert "collapse" not in logs


@pytest.mark.parametrize(("interval", "window", "sets_off"), [
    (10, 10, 2), (5, 10, 2), (2, 10, 5), (1, 10, 10), (10, 40, 4), (10, 1, 1),
])  # fmt: skip
def test_the_alarm_counts_steps_however_many_a_log_covers(interval, window, sets_off):
    """Copies in a short Stage I: with a log for 10 steps, the default of TRL, the second log sets it off and not the tenth."""
    alarm, state, found = CollapseAlarm(window), TrainerState(), []
    for number in range(1, 13):
        logs = {"stage": 1.0, "changed_ratio": 0.0, "delta_i_to_c": 0.0, "accuracy_t1": 0.5}
        state.global_step = number * interval
        state.log_history.append(logs | {"step": state.global_step})
        alarm.on_log(TWO_ATTEMPTS, state, None, logs=logs)
        found.append(logs["collapse"])
    assert found.index(1.0) + 1 == sets_off


def of_three(alarm, state, **changed):
    logs = {"stage": 2.0, "changed_ratio": 0.5, "delta_i_to_c": 0.1, "accuracy_t1": 0.5, **changed}
    state.global_step += 1
    state.log_history.append(logs | {"step": state.global_step})
    alarm.on_log(SimpleNamespace(num_attempts=3), state, None, logs=logs)
    return logs["collapse"]


@pytest.mark.parametrize("copied", [1, 2])
def test_one_copied_attempt_of_three_sets_off_the_alarm(caplog, copied):
    """Half of the neighbours differ on average, and one attempt is always a copy."""
    alarm, state = CollapseAlarm(3), TrainerState()
    changed = {f"changed_ratio_t{k}_t{k + 1}": float(k != copied) for k in (1, 2)}
    assert [of_three(alarm, state, **changed) for _ in range(4)] == [0, 0, 1, 1]
    assert f"0.00% of the attempts differ from attempt {copied}" in caplog.text
    assert f"100.00% of the attempts differ from attempt {3 - copied}" in caplog.text


def test_copies_of_an_attempt_that_is_not_trained_yet_are_no_collapse():
    """Stage I trains attempt 2 in steps 1 to 4 and attempt 3 in steps 5 to 8: only copies of the latter steps count."""
    alarm, state = CollapseAlarm(2), TrainerState()
    alarm.stage_at = partial(two_stages, max_steps=12, stage1_steps=8, num_attempts=3)
    changed = {"stage": 1.0, "changed_ratio_t1_t2": 1.0, "changed_ratio_t2_t3": 0.0}
    assert [of_three(alarm, state, **changed) for _ in range(6)] == [0, 0, 0, 0, 0, 1]


class Tracker(TrainerCallback):
    """What TensorBoard, trackio and W&B get through `report_to`: the logs that callbacks see."""

    def __init__(self):
        self.keys = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.keys |= logs.keys()


@pytest.mark.parametrize("stage1_steps", [0, 3])
def test_naive_training_sets_off_the_alarm(make_arithmetic_trainer, caplog, stage1_steps):
    """A real run: the second attempt always repeats the first, as after collapse. A tracker sees all that is logged."""
    tracker = Tracker()
    trainer = make_arithmetic_trainer(
        {"callbacks": [tracker, CollapseAlarm(2)]},
        max_steps=3,
        stage1_steps=stage1_steps,
        per_device_train_batch_size=16,
    )
    trainer._roll_out, original = None, trainer._roll_out

    def repeat(prompts, self):
        output = original(prompts, self)
        for row in trainer._batch.rollouts.attempts:
            row[1] = row[0]
        return output

    trainer.rollout_func = repeat
    trainer.train()
    logged = [entry["collapse"] for entry in trainer.state.log_history if "stage" in entry]
    assert logged == [0.0, 1.0, 1.0] and caplog.text.count("has collapsed") == 1
    assert trainer.state.log_history[0].keys() - {"step"} <= tracker.keys
    assert {"collapse", "accuracy_t1", "delta_i_to_c", "kl_t2", "stage"} <= tracker.keys


def test_a_copied_second_attempt_is_seen_beside_a_third_that_changes(make_arithmetic_trainer, caplog):
    """A real run, whose third attempts differ from the second, which are copies of the first."""
    trainer = make_arithmetic_trainer(
        {"callbacks": [CollapseAlarm(2)]},
        max_steps=3,
        stage1_steps=0,
        num_attempts=3,
        per_device_train_batch_size=16,
    )
    trainer._roll_out, original = None, trainer._roll_out

    def repeat(prompts, self):
        output = original(prompts, self)
        for row in trainer._batch.rollouts.attempts:
            row[1], row[2] = row[0], [*row[0], row[0][-1]]
        return output

    trainer.rollout_func = repeat
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "stage" in entry]
    assert [entry["collapse"] for entry in logs] == [0.0, 1.0, 1.0]
    for entry in logs:
        assert (entry["changed_ratio_t1_t2"], entry["changed_ratio_t2_t3"], entry["changed_ratio"]) == (0, 1, 0.5)
        assert entry["edit_distance_ratio_t1_t2"] == 0 and 0 < entry["edit_distance_ratio_t2_t3"]
        assert entry["edit_distance_ratio"] == pytest.approx(entry["edit_distance_ratio_t2_t3"] / 2)
    assert "differ from attempt 1" in caplog.text


@pytest.mark.parametrize("when", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_does_not_end_the_run(make_arithmetic_trainer, caplog, monkeypatch, when):
    pytest.importorskip("tensorboard")

    def fail(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TensorBoardCallback, when, fail)
    trainer = make_arithmetic_trainer(max_steps=2, save_strategy="no", report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == 2 and len(trainer.state.log_history) == 3
    assert caplog.text.count("TensorBoardCallback failed, so the run continues without it") == 1
    assert "no route to host" in caplog.text and trainer.args.report_to == []


def test_tensorboard_shows_the_attempts_in_one_another(make_arithmetic_trainer):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    trainer = make_arithmetic_trainer(max_steps=1, report_to="tensorboard", eval_strategy="steps", save_strategy="no")
    trainer.train()
    (folder,) = {file.parent for file in Path(trainer.args.output_dir).rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tensor = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(tensor)
    shown = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert shown["accuracy"] == ["train/accuracy_t1", "train/accuracy_t2"]
    logged = set(events.Tags()["scalars"])
    assert {tag for tags in shown.values() for tag in tags} <= logged


def test_a_figure_that_fails_does_not_end_the_run(make_arithmetic_trainer, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("trl_score.model_card.write_figure", fail)
    trainer = make_arithmetic_trainer(max_steps=2, save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 2 and "The model card was not written" in caplog.text
    with pytest.raises(RuntimeError, match="no fonts"):
        trainer.create_model_card()


def test_trackio_takes_evaluations_outside_of_training(make_arithmetic_trainer):
    """TRL logs the time of each generation to trackio, which fails where no run is open. All of it is one run."""
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = f"score-{uuid.uuid4().hex}"
    trainer = make_arithmetic_trainer(max_steps=1, report_to=["trackio"], project=project, save_strategy="no")
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.generate_attempts(["1 2 3 4 5 6"])
    trackio.finish()
    (run,) = trackio.Api().runs(project)
    keys = [entry.keys() for entry in SQLiteStorage.get_logs(project, run.name)]
    assert sum("eval/accuracy_t2" in each for each in keys) == 2 and any("train/reward_t2" in each for each in keys)


def save(callback, state, folder, reward, stage):
    state.global_step += 1
    state.log_history.append({"stage": stage, "reward_t2": reward})
    checkpoint = folder / f"checkpoint-{state.global_step}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "weights").write_text(str(state.global_step))
    callback.on_save(SimpleNamespace(output_dir=str(folder), num_attempts=2), state, None)
    return checkpoint


def step_of(folder, stage):
    kept = best_checkpoint(folder, stage)
    return kept and int((kept / "weights").read_text())


def begin(callback, folder, resumed=None):
    state = TrainerState() if resumed is None else resumed
    state.stateful_callbacks = {} if resumed is None else {"KeepBestCheckpoint": callback.state()}
    begun = KeepBestCheckpoint(callback.window)
    begun.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    return begun, state


def test_the_best_checkpoint_of_each_stage_is_kept_by_a_moving_average(tmp_path):
    """Window 2: rewards 0, 1, 0.2 | 0.9, 0.5 average to 0, 0.5, 0.6 | 0.9, 0.7."""
    callback, state = begin(KeepBestCheckpoint(2), tmp_path)
    for reward, stage, best in ((0, 1, 1), (1, 1, 2), (0.2, 1, 3)):
        checkpoint = save(callback, state, tmp_path, reward, stage)
        assert step_of(tmp_path, 1) == best
    assert best_checkpoint(tmp_path) == tmp_path / "_best-stage1"
    for reward, best in ((0.9, 4), (0.5, 4), (float("nan"), 4), (None, 4)):
        save(callback, state, tmp_path, reward, 2)
        assert (step_of(tmp_path, 1), step_of(tmp_path, 2)) == (3, best)
    found = json.loads((tmp_path / "_best-stage2" / "best.json").read_text())
    assert found == {"run": callback.run, "step": 4, "stage": 2, "reward": 0.9, "logs": 1}
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "weights").write_text("another run's")  # in place, as safetensors and torch write
    assert step_of(tmp_path, 2) == 4
    resumed, state = begin(callback, tmp_path, state)  # what was kept before is remembered
    save(resumed, state, tmp_path, 0.6, 2)
    assert step_of(tmp_path, 2) == 4 and resumed.run == callback.run


def test_best_checkpoints_belong_to_their_run(tmp_path, caplog):
    first, state = begin(KeepBestCheckpoint(1), tmp_path)
    for reward, stage in ((0.9, 1), (0.8, 2), (0.95, 2)):
        save(first, state, tmp_path, reward, stage)
    second, state = begin(KeepBestCheckpoint(1), tmp_path)
    assert second.run != first.run and best_checkpoint(tmp_path) is None
    assert "'_best-stage1.1'" in caplog.text
    save(second, state, tmp_path, 0.1, 1)  # worse than the first run's
    assert step_of(tmp_path, 1) == 1 and step_of(tmp_path, 2) is None
    third, state = begin(KeepBestCheckpoint(1), tmp_path)
    for reward in (0.2, 0.3):
        save(third, state, tmp_path, reward, 1)
    earlier = [
        json.loads((tmp_path / f"_best-stage{name}" / "best.json").read_text()) for name in ("1.1", "2.1", "1.2")
    ]
    assert [(each["run"], each["step"]) for each in earlier] == [(first.run, 1), (first.run, 3), (second.run, 1)]

    # A resume from step 1 knows nothing of step 2, and one from step 2 does.
    state.global_step, state.log_history = 2, state.log_history[:2]
    resumed, state = begin(third, tmp_path, state)
    assert (resumed.run, step_of(tmp_path, 1)) == (third.run, 2)
    state.global_step, state.log_history = 1, state.log_history[:1]
    resumed, state = begin(third, tmp_path, state)
    assert resumed.run == third.run and step_of(tmp_path, 1) is None
    save(resumed, state, tmp_path, 0.25, 1)
    assert step_of(tmp_path, 1) == 2


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    callback, state = begin(KeepBestCheckpoint(1), tmp_path)
    save(callback, state, tmp_path, 0.5, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    save(callback, state, tmp_path, 0.9, 1)
    assert step_of(tmp_path, 1) == 1 and "was not kept: [Errno 28]" in caplog.text


@pytest.fixture
def no_cards(monkeypatch):
    """A card with its figure for every checkpoint takes longer than these runs."""
    monkeypatch.setattr(SCoReTrainer, "create_model_card", lambda self, *args, **kwargs: None)


def trained(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_best_is_loaded(trainer):
    folder = best_checkpoint(trainer.args.output_dir)
    assert folder.name == "_best-stage2" and best_checkpoint(trainer.args.output_dir, 1) is not None
    found = json.loads((folder / "best.json").read_text())
    rewards = {entry["step"]: entry["reward_t2"] for entry in trainer.state.log_history if "reward_t2" in entry}
    assert found["step"] == max((2, 3), key=lambda each: (rewards[each], -each))
    weights = load_file(next(folder.glob("*model.safetensors")))
    for name, value in trained(trainer).items():
        assert torch.equal(value, weights[name.replace(".default", "")])
    assert all(os.stat(path).st_nlink == 1 for path in folder.rglob("*") if path.is_file())
    return found, weights


def test_training_keeps_and_loads_the_best_adapter(make_arithmetic_trainer, no_cards):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    callbacks = [KeepBestCheckpoint(1, load_at_end=True)]
    trainer = make_arithmetic_trainer(
        {"peft_config": adapter, "callbacks": callbacks}, **EACH_STEP, save_total_limit=1
    )
    trainer.train()
    assert_best_is_loaded(trainer)
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_second_run_and_a_resume_have_their_own_best(make_arithmetic_trainer, no_cards):
    """The second run has lower rewards than the first; it loads its own best, and the first one's stays as it was."""

    def make(reward):
        callbacks = [KeepBestCheckpoint(1, load_at_end=True)]
        return make_arithmetic_trainer({"callbacks": callbacks, "reward_funcs": reward}, **EACH_STEP)

    first = make(lambda completions, **_: [1.0 - 0.5 * (len(str(each)) % 2) for each in completions])
    first.train()
    run, weights = assert_best_is_loaded(first)
    second = make(lambda completions, **_: [0.1 * (len(str(each)) % 2) for each in completions])
    second.train()
    found, _ = assert_best_is_loaded(second)
    assert found["run"] != run["run"] and found["reward"] < 0.2
    output_dir = Path(second.args.output_dir)
    for name, value in load_file(output_dir / "_best-stage2.1" / "model.safetensors").items():
        assert torch.equal(value, weights[name])

    third = make(lambda completions, **_: [0.0 for _ in completions])
    third.train(resume_from_checkpoint=str(output_dir / "checkpoint-2"))
    again = json.loads((output_dir / "_best-stage2" / "best.json").read_text())
    assert (again["run"], again["step"]) == (found["run"], 2 if found["step"] == 2 else 3)


def test_weights_of_a_stage_without_a_best_checkpoint_stay_as_they_are(make_arithmetic_trainer, no_cards, caplog):
    """All that was kept is of Stage I."""

    class KeepsTheFirst(KeepBestCheckpoint):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 1:
                super().on_save(args, state, control, **kwargs)

    settings = EACH_STEP | {"max_steps": 2, "stage1_steps": 1}
    trainer = make_arithmetic_trainer({"callbacks": [KeepsTheFirst(1, load_at_end=True)]}, **settings)
    trainer.train()
    weights = load_file(Path(trainer.args.output_dir) / "checkpoint-2" / "model.safetensors")
    for name, value in trained(trainer).items():
        assert torch.equal(value, weights[name])
    assert "No best checkpoint of Stage II was kept" in caplog.text
    assert best_checkpoint(trainer.args.output_dir, 1) is not None


def test_what_cannot_work_is_said(make_arithmetic_trainer):
    with pytest.raises(ValueError, match="writes none"):
        make_arithmetic_trainer({"callbacks": [KeepBestCheckpoint()]}, save_strategy="no")
    for kind, unit in ((CollapseAlarm, "steps"), (KeepBestCheckpoint, "logs")):
        with pytest.raises(ValueError, match=f"`window=0` is a number of {unit}. Set it to 1 or more"):
            kind(0)
