"""A run that was stopped and resumed ends with the weights of the uninterrupted run, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from processes import python, ranks
from resume_worker import PROMPTS, make_trainer
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from trl_score.objective import Stage
from trl_score.resuming import STATE_FILE, whole_checkpoint


WORKER = Path(__file__).parent / "resume_worker.py"
KEYS = ("stage", "stage1_beta", "num_generated_tokens", "epoch", "loss")


class Run:
    """A run over nine problems, two for each micro-batch."""

    def __init__(self, model, folder, checkpoint=None, **settings):
        self.trainer, self.seen = make_trainer(model, folder, **settings)
        self.start = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.trainer.train(resume_from_checkpoint=checkpoint)
        self.weights = self.trainer.model.state_dict()
        self.logged = [[log.get(key) for key in KEYS] for log in self.trainer.state.log_history if "stage" in log]
        self.stages = [int(log["stage"]) for log in self.trainer.state.log_history if "stage" in log]

    def checkpoint(self, step):
        return str(Path(self.trainer.args.output_dir, f"checkpoint-{step}"))

    def equals(self, other):
        return all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


@pytest.fixture
def run(letters_model, tmp_path):
    number = iter(range(100))
    return lambda checkpoint=None, **settings: Run(
        letters_model, settings.pop("folder", tmp_path / str(next(number))), checkpoint, **settings
    )


@pytest.fixture
def messages(caplog):
    """What the package has logged."""
    records = lambda: [each for each in caplog.records if each.name.startswith("trl_score")]  # noqa: E731
    return lambda: [each.getMessage().removeprefix("[RANK 0] ") for each in records()]


# Each setting with the steps to resume after. An epoch is four generations of two problems, two of four, or one of six.
SETTINGS = {
    "one update for each generation": ({}, (2, 4, 5)),
    "accumulated gradients": ({"gradient_accumulation_steps": 3}, (1, 2, 3)),
    "several updates for each generation": ({"steps_per_generation": 3}, (1, 3, 5)),
    "rollouts used twice": ({"steps_per_generation": 2, "num_iterations": 2}, (3, 4, 6)),
    "accumulation inside a generation": ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, (1, 2, 3)),
    "accumulation over generations": (
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "num_iterations": 2},
        (1, 2, 3),
    ),
    "in the order of the data": ({"shuffle_dataset": False, "steps_per_generation": 2}, (3, 5)),
    "three attempts": ({"num_attempts": 3, "stage1_steps": 4}, (2, 5)),
    "adaptive beta2": (
        {"adaptive_stage1_beta": True, "steps_per_generation": 2, "stage1_steps": 6, "seed": 4},
        (1, 4),
    ),
    "stream": ({"stream": True}, (2, 4, 5)),
    "stream, several updates for each generation": ({"stream": True, "steps_per_generation": 3}, (2, 3, 5)),
    "stream, accumulation over epochs": (
        {"stream": True, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
        (1, 2, 3),
    ),
}


@pytest.mark.parametrize(("settings", "steps"), SETTINGS.values(), ids=SETTINGS.keys())
def test_resumed_run_is_bit_identical(run, settings, steps):
    """Seven updates, in Stage I and Stage II, over more than one epoch; gradients are accumulated across the end of an epoch."""
    settings = {"max_steps": 7, "stage1_steps": 3} | settings
    whole = run(**settings)
    assert len({tuple(prompts) for _, prompts in whole.seen}) > 1
    assert any(not torch.equal(value, whole.weights[name]) for name, value in whole.start.items())
    for step in steps:
        resumed = run(whole.checkpoint(step), **settings)
        assert resumed.equals(whole), f"resumed after step {step}"
        assert resumed.logged == whole.logged
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
        assert all(before >= step for before, _ in resumed.seen)


def test_epochs_of_an_uninterrupted_run_have_the_order_of_trl(run):
    from trl.trainer.utils import RepeatSampler

    sampler = RepeatSampler(PROMPTS, mini_repeat_count=2, batch_size=2, seed=42)
    expected = [
        sorted({PROMPTS[i] for i in rows}) for _ in range(2) for rows in zip(*[iter(sampler)] * 4, strict=True)
    ]
    assert [prompts for _, prompts in run(max_steps=8).seen] == expected


def test_checkpoint_brings_its_own_rollouts_wherever_it_lies(run, tmp_path):
    """The folder that it was saved in now holds another run's checkpoint of the same step."""
    settings = {"max_steps": 7, "steps_per_generation": 3}
    whole = run(folder=tmp_path / "run", **settings)
    renamed = shutil.move(whole.checkpoint(4), tmp_path / "run" / "the good one")
    other = run(seed=1, **settings)
    shutil.copytree(other.checkpoint(4), whole.checkpoint(4))
    assert run(str(renamed), **settings).equals(whole)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "no rollouts": lambda path: path.write_text("rollouts"),
}


def test_unreadable_rollouts_are_dropped(run, messages, tmp_path):
    settings = {"max_steps": 4, "steps_per_generation": 3}
    whole = run(**settings)
    for number, (name, damage) in enumerate(DAMAGE.items()):
        checkpoint = shutil.copytree(whole.checkpoint(1), tmp_path / name)
        damage(checkpoint / "rollouts_0.pt")
        resumed = run(str(checkpoint), **settings)
        assert resumed.trainer.state.global_step == 4
        message = messages()[number]
        assert "`rollouts_0.pt`" in message
        assert "dropped" in message
        assert [step for step, _ in resumed.seen] == [1, 3]  # at once, and where the next generation begins
    assert len(messages()) == len(DAMAGE)


OTHER = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "num_attempts": 3,
    "temperature": 0.7,
    "beta": 0.0,
    "kl_level": "sequence",
}


@pytest.mark.parametrize("stream", [False, True], ids=["data set", "stream"])
def test_rollouts_that_were_made_with_other_settings_are_dropped(run, messages, stream):
    settings = {"max_steps": 5, "steps_per_generation": 3, "stage1_steps": 0, "stage1_beta": 0.0, "stream": stream}
    whole = run(**settings)
    for number, (name, value) in enumerate(list(OTHER.items())[: 4 if stream else None]):
        resumed = run(whole.checkpoint(2), **settings | {name: value})
        assert resumed.trainer.state.global_step == 5
        assert f"`{name}` is {value} instead of " in messages()[number]
        assert resumed.seen[0][0] == 2
        problems = resumed.trainer.args.generation_batch_size // resumed.trainer.num_generations
        assert {len(prompts) for _, prompts in resumed.seen} == {problems}
    assert len(messages()) == number + 1


def test_between_two_generations_nothing_is_dropped(run, messages):
    settings = {"max_steps": 5, "steps_per_generation": 3}
    whole = run(**settings)
    run(whole.checkpoint(3), **settings | {"num_generations": 4})
    assert messages() == []


def test_skipping_no_data_drops_the_rollouts_in_progress(run, messages):
    settings = {"max_steps": 6, "steps_per_generation": 3}
    whole = run(**settings)
    resumed = run(whole.checkpoint(4), ignore_data_skip=True, **settings)
    assert ["dropped" in message for message in messages()] == [True]
    assert [step for step, _ in resumed.seen] == [4]


def test_settings_that_the_optimizer_brings_along_are_told(run, messages):
    """The Trainer restores them with the moments, so another `learning_rate` would change nothing."""
    first = run(max_steps=2, learning_rate=1e-3, weight_decay=0.1)
    second = run(
        first.checkpoint(2), max_steps=4, stage1_steps=1, learning_rate=1e-5, weight_decay=0.0, adam_beta2=0.9
    )
    told = [message for message in messages() if "the optimizer of the checkpoint" in message]
    assert [message.partition(". ")[0] for message in told] == [
        "`learning_rate` is 1e-05, but the optimizer of the checkpoint continues with 0.001",
        "`weight_decay` is 0.0, but the optimizer of the checkpoint continues with 0.1",
        "`betas of Adam` is (0.9, 0.9), but the optimizer of the checkpoint continues with (0.9, 0.999)",
    ]
    assert second.trainer.optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_longer_run_stays_in_stage_two(run, messages):
    """Half of four steps is Stage I. The boundary stays when the run is continued, also a second time."""
    first = run(max_steps=4, stage1_steps=0.5)
    second = run(first.checkpoint(4), max_steps=6, stage1_steps=0.5)
    assert second.stages == [1, 1, 2, 2, 2, 2]
    assert messages() == [
        "`max_steps` is 6 instead of 4 when the run began. The stages end where they were planned for 4 steps. To move the end "
        "of Stage I, set `stage1_steps` to a number of steps."
    ]
    assert run(second.checkpoint(6), max_steps=8, stage1_steps=0.5).stages == [1, 1, 2, 2, 2, 2, 2, 2]
    assert run(first.checkpoint(1), max_steps=8, stage1_steps=0.5).stages == [1, 1, 2, 2, 2, 2, 2, 2]


def test_longer_run_of_epochs_keeps_its_stages(run):
    first = run(max_steps=-1, num_train_epochs=1, stage1_steps=0.5)  # of 4 steps
    second = run(first.checkpoint(4), max_steps=-1, num_train_epochs=2, stage1_steps=0.5)
    assert second.stages == [1, 1, 2, 2, 2, 2, 2, 2]


def test_schedule_is_given_the_steps_that_it_was_planned_with(run):
    asked = []

    def schedule(step, max_steps):
        asked.append(max_steps)
        return Stage(2, (1, 2))

    first = run(max_steps=2)
    run(first.checkpoint(2), max_steps=4, schedule=schedule)
    assert set(asked[-2:]) == {2}  # before, the whole run was looked at when the trainer was made


@pytest.mark.parametrize(
    ("stage1_steps", "stages"), [(5, [1] * 5 + [2]), (0.5, [1] * 3 + [2] * 3), (0, [1] * 2 + [2] * 4)]
)
def test_stage1_steps_set_anew_move_the_boundary(run, messages, stage1_steps, stages):
    first = run(max_steps=4, stage1_steps=2)
    second = run(first.checkpoint(2), max_steps=6, stage1_steps=stage1_steps)
    assert second.stages == stages
    (message,) = messages()
    end = stages.count(1) if stage1_steps else 0
    assert f"`stage1_steps` is {stage1_steps} instead of 2" in message
    assert f"ends after step {end}" in message
    # The new plan is the one that is saved.
    assert run(second.checkpoint(6), max_steps=8, stage1_steps=stage1_steps).stages == [*stages, 2, 2]


def test_finished_run_is_not_trained_further(run):
    first = run(max_steps=4)
    again = run(first.checkpoint(4), max_steps=4)
    assert again.trainer.state.global_step == 4
    assert again.seen == []
    assert again.equals(first)
    assert run(first.checkpoint(4), max_steps=4, stream=True).seen == []


def test_second_run_of_a_trainer_starts_anew(run):
    """Three of four updates on the second generation were done when the first run ended."""
    settings = {
        "max_steps": 7,
        "steps_per_generation": 4,
        "adaptive_stage1_beta": True,
        "per_device_train_batch_size": 2,
    }
    trainer = run(**settings).trainer
    trainer.train()
    logs = [log for log in trainer.state.log_history if "stage" in log]
    assert logs[0]["stage1_beta"] == trainer.args.stage1_beta
    assert logs[0]["num_generated_tokens"] <= 2 * 2 * 8
    assert trainer._step == 7


def test_run_resumes_without_the_state_file(run, messages):
    settings = {"max_steps": 4, "steps_per_generation": 3}
    whole = run(**settings)
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(Path(whole.checkpoint(2), STATE_FILE))
        assert run(whole.checkpoint(2), **settings).trainer.state.global_step == 4
        assert STATE_FILE in messages()[-1]


def test_half_written_checkpoint_is_not_resumed_from(run, messages):
    whole = run(max_steps=4)
    folder = Path(whole.trainer.args.output_dir)
    (folder / "checkpoint-4" / TRAINER_STATE_NAME).write_text('{"global_step": 4')
    (folder / "checkpoint-3" / TRAINER_STATE_NAME).unlink()
    (folder / "checkpoint-best").mkdir()
    assert whole_checkpoint(True, folder) == str(folder / "checkpoint-2")
    assert [message.partition("'")[2].partition("'")[0] for message in messages()] == [
        str(folder / "checkpoint-4"),
        str(folder / "checkpoint-3"),
    ]
    resumed = run(True, folder=folder, max_steps=4)
    assert resumed.equals(whole)
    with pytest.raises(ValueError, match=r"checkpoint-none.*is not a whole checkpoint.*Resume from an earlier"):
        run(str(folder / "checkpoint-none"), max_steps=4)


def test_resume_into_an_empty_folder_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"holds no whole checkpoint. Leave it out"):
        run(True, folder=tmp_path / "empty")


def worker(*runs, processes=1):
    """Run after run in a process of its own, or in several."""
    if processes == 1:
        return python(WORKER, json.dumps(runs))
    return ranks(processes, WORKER, json.dumps(runs), ACCELERATE_USE_CPU="true")


def test_run_that_was_killed_resumes_from_the_last_whole_checkpoint(tmp_path, messages):
    """SIGKILL between two updates on the same rollouts, then while a checkpoint is being written; the embedded model."""
    settings = {"max_steps": 6, "steps_per_generation": 2, "save_total_limit": 2}
    killed = settings | {"model": "arithmetic", "folder": str(tmp_path / "killed")}
    assert worker(killed | {"kill": [3, "training"]}).returncode == -signal.SIGKILL
    assert worker(killed | {"kill": [5, "saving"], "resume": True}).returncode == -signal.SIGKILL
    folders = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert folders == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}
    resumed = Run("arithmetic", tmp_path / "killed", checkpoint=True, **settings)
    assert [("checkpoint-5" in message, "not fully written" in message) for message in messages()] == [(True, True)]
    assert [step for step, _ in resumed.seen] == [4]
    whole = Run("arithmetic", tmp_path / "whole", **settings)
    assert resumed.equals(whole)
    assert resumed.logged == whole.logged


def test_resume_on_several_processes(run, messages, letters_model, tmp_path):
    """
    Two processes resume bit-identically in the middle of a generation, in the second epoch. Both drop their rollouts if one of
    them cannot read its own, and if there were more or fewer processes.
    """
    settings = {"max_steps": 5, "steps_per_generation": 3, "gradient_accumulation_steps": 2}
    one = run(**settings)
    two = settings | {"model": letters_model, "per_device_train_batch_size": 2}
    first = tmp_path / "two" / "checkpoint-3"
    done = worker(
        two | {"folder": str(tmp_path / "two")},
        two | {"folder": str(tmp_path / "resumed"), "resume": str(first)},
        two | {"folder": str(tmp_path / "dropped"), "resume": str(first), "remove": str(first / "rollouts_1.pt")},
        two | {"folder": str(tmp_path / "more"), "resume": one.checkpoint(3)},
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    end = {
        name: load_file(tmp_path / name / "end" / "model.safetensors")
        for name in ("two", "resumed", "dropped", "more")
    }
    assert all(torch.equal(value, end["resumed"][name]) for name, value in end["two"].items())
    assert not all(torch.equal(value, end["dropped"][name]) for name, value in end["two"].items())
    warnings = [line for line in done.stderr.splitlines() if "rollouts in progress are dropped" in line]
    assert ["`rollouts_1.pt` cannot be read" in line for line in warnings] == [True, False]
    assert "`number of processes` is 2 instead of 1" in warnings[1]
    fewer = run(str(first), **settings)
    assert fewer.trainer.state.global_step == 5
    assert "`number of processes` is 1 instead of 2" in messages()[-1]


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"target_modules": ["v_proj"]}, {"r": 2}], ids=str)
def test_another_adapter_than_the_checkpoints_is_refused(make_arithmetic_trainer, other):
    """PEFT left out the weights of other modules with no more than a warning, so Stage II began with an untrained adapter."""

    def make(**settings):
        settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
        return make_arithmetic_trainer({"peft_config": LoraConfig(**settings)}, save_steps=1, max_steps=2)

    make().train()
    with pytest.raises(
        ValueError, match=f"The adapter has `{next(iter(other))}=.* the resumed model would be another"
    ):
        make(**other).train(resume_from_checkpoint=True)
    assert make(lora_dropout=0.1).train(resume_from_checkpoint=True).global_step == 2
