import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from trl_score import SCoReConfig
from trl_score.callbacks import CollapseAlarm, KeepBestCheckpoint, best_checkpoint


def log(alarm, state, **values):
    logs = {"stage": 2, "changed_ratio": 0.5, "delta_i_to_c": 0.1, "accuracy_t1": 0.5, **values}
    state.global_step += 1
    state.log_history.append(dict(logs))
    alarm.on_log(None, state, None, logs=logs)
    return logs["collapse"]


@pytest.mark.parametrize(
    ("values", "collapses"),
    [
        ({"changed_ratio": 0.0, "delta_i_to_c": 0.0}, True),
        ({"delta_i_to_c": 0.0}, True),  # changed, but never for the better
        ({"changed_ratio": 0.0, "delta_i_to_c": 0.0, "stage": 1}, False),  # Stage I starts there
        ({"delta_i_to_c": 0.0, "accuracy_t1": 0.99}, False),  # hardly anything to correct
        ({}, False),
    ],
)
def test_the_alarm_goes_off_once_and_only_for_collapse(values, collapses, caplog):
    alarm, state = CollapseAlarm(3), TrainerState()
    assert [log(alarm, state) for _ in range(3)] == [0.0] * 3
    found = [log(alarm, state, **values) for _ in range(5)]
    assert found == ([0, 0, 1, 1, 1] if collapses else [0] * 5)
    assert state.log_history[-1]["collapse"] == float(collapses)
    assert caplog.text.count("Self-correction has collapsed (step 6)") == int(collapses)
    if collapses:
        assert "50.0% of the first attempts wrong" in caplog.text and "`stage1_steps`" in caplog.text


def test_nothing_is_said_before_the_window_is_full(caplog):
    alarm, state = CollapseAlarm(4), TrainerState()
    assert [log(alarm, state, changed_ratio=0.0) for _ in range(3)] == [0.0] * 3 and not caplog.text


def test_naive_training_sets_off_the_alarm(make_arithmetic_trainer, caplog):
    """A real run: the second attempt always repeats the first, as after collapse."""
    trainer = make_arithmetic_trainer(
        max_steps=3, stage1_steps=0, logging_steps=1, collapse_window=2, per_device_train_batch_size=16
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


class Tracker(TrainerCallback):
    """What TensorBoard, trackio and W&B get through `report_to`: the logs that callbacks see."""

    def __init__(self):
        self.keys = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.keys |= logs.keys()


def test_trackers_get_every_key(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(max_steps=1, per_device_train_batch_size=16)
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert trainer.state.log_history[0].keys() - {"step"} <= tracker.keys
    assert {"collapse", "accuracy_t1", "delta_i_to_c", "kl_t2", "stage"} <= tracker.keys


def save(callback, state, folder, reward, stage):
    state.global_step += 1
    state.log_history.append({"stage": stage, "reward_t2": reward})
    checkpoint = folder / f"checkpoint-{state.global_step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(str(state.global_step))
    callback.on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    return checkpoint


def step_of(folder, stage):
    kept = best_checkpoint(folder, stage)
    return kept and int((kept / "weights").read_text())


def test_the_best_checkpoint_of_each_stage_is_kept_by_a_moving_average(tmp_path):
    """Window 2: rewards 0, 1, 0.2 | 0.9, 0.5 average to 0, 0.5, 0.6 | 0.9, 0.7."""
    callback, state = KeepBestCheckpoint(2), TrainerState()
    for reward, stage, best in ((0, 1, 1), (1, 1, 2), (0.2, 1, 3)):
        checkpoint = save(callback, state, tmp_path, reward, stage)
        assert step_of(tmp_path, 1) == best
    assert best_checkpoint(tmp_path) == tmp_path / "_best-stage1"
    for reward, best in ((0.9, 4), (0.5, 4)):
        checkpoint = save(callback, state, tmp_path, reward, 2)
        assert (step_of(tmp_path, 1), step_of(tmp_path, 2)) == (3, best)
    assert json.loads((tmp_path / "_best-stage2" / "best.json").read_text()) == {
        "step": 4,
        "stage": 2,
        "reward": 0.9,
        "logs": 1,
    }
    assert os.stat(tmp_path / "_best-stage2" / "weights").st_nlink == 2  # linked, not copied
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "weights").unlink()
    assert step_of(tmp_path, 2) == 4
    resumed = KeepBestCheckpoint(2)  # what was kept before is remembered
    save(resumed, state, tmp_path, 0.8, 2)
    assert step_of(tmp_path, 2) == 4


def test_training_keeps_and_loads_it(make_arithmetic_trainer, tmp_path):
    settings = {
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "stage1_steps": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    settings |= {
        "save_total_limit": 1,
        "keep_best_checkpoint": True,
        "best_checkpoint_window": 1,
        "load_best_checkpoint_at_end": True,
    }
    trainer = make_arithmetic_trainer(**settings)
    trainer.train()
    folder = best_checkpoint(trainer.args.output_dir)
    assert folder.name == "_best-stage2" and best_checkpoint(trainer.args.output_dir, 1) is not None
    step = json.loads((folder / "best.json").read_text())["step"]
    rewards = {entry["step"]: entry["reward_t2"] for entry in trainer.state.log_history if "reward_t2" in entry}
    assert step == max((3, 4), key=lambda each: (rewards[each], -each))
    weights = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items() if name in weights
    )
    checkpoints = [name for name in os.listdir(trainer.args.output_dir) if name.startswith("checkpoint-")]
    assert checkpoints == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_checkpoint_at_end": True}, "nothing to load without `keep_best_checkpoint`"),
        ({"keep_best_checkpoint": True, "save_strategy": "no"}, "writes none"),
        ({"collapse_window": -1}, "numbers of logs"),
        ({"best_checkpoint_window": 0}, "numbers of logs"),
    ],
)
def test_what_cannot_work_is_said(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SCoReConfig(output_dir=str(tmp_path), bf16=False, **settings)
