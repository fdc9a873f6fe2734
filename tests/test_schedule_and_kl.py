"""Options of the KL penalties and of the stages that are not on by default."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from test_ablations import with_stored
from test_score_trainer import LORA, base_log_probs, move, per_token_gradient, rollouts

from trl_score import SCoReConfig
from trl_score.objective import (
    balanced_stage1_beta,
    kl_weights,
    leave_one_out_advantages,
    shaped_rewards,
    sum_per_attempt,
)
from trl_score.snapshot import Snapshot


def first_token(values, attempt_ids, attempt):
    """The value at the first token of an attempt of each row: (B,), NaN where the attempt is not trained."""
    is_attempt = attempt_ids == attempt
    found = values.gather(1, is_attempt.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(is_attempt.any(1), found, torch.nan)


# KL of whole attempts, inside the reward


@pytest.mark.parametrize("options", [{}, {"steps_per_generation": 2}], ids=["logps of ours", "logps of TRL"])
@pytest.mark.parametrize("step", [0, 2])
def test_sequence_kl_stands_in_the_advantages_and_not_in_the_loss(make_arithmetic_trainer, step, options):
    trainer = make_arithmetic_trainer(kl_level="sequence", stage1_steps=2, beta=0.3, stage1_beta=0.7, **options)
    move(trainer)
    inputs = rollouts(trainer, step)
    ids = inputs["attempt_ids"]
    assert ("old_per_token_logps" in inputs) == bool(options)
    with torch.no_grad():
        policy, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            ids.size(1),
        )
    kl = sum_per_attempt(policy - inputs["ref_per_token_logps"], ids, 2)
    assert kl.abs().max() > 0.01
    rewards = torch.cat(trainer._attempt_rewards, dim=1)
    stage = 1 if step == 0 else 2
    credit = shaped_rewards(rewards, stage=stage, alpha=10.0) - kl_weights(stage, beta=0.3, stage1_beta=0.7) * kl
    expected = leave_one_out_advantages(credit, 4)
    for k in (1, 2):
        torch.testing.assert_close(first_token(inputs["advantages"], ids, k), expected[:, k - 1], atol=1e-5, rtol=1e-4)
    assert (inputs["kl_weights"] == 0).all()
    trainer._compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["kl_t1"][-1] > 0


def test_attempts_that_are_not_trained_are_left_alone_by_the_sequence_kl(make_arithmetic_trainer):
    """A stored first attempt has no KL, neither of its own nor in the baseline of the sampled ones."""
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()}, offline_first_attempts=0.5, stage1_steps=4, beta=0.3, kl_level="sequence",
        temperature=3.0,  # so that the sampled ones differ
    )  # fmt: skip
    move(trainer)
    inputs = rollouts(trainer)
    ids, advantages = inputs["attempt_ids"], inputs["advantages"]
    assert (advantages[ids == 0] == 0).all()
    first = first_token(advantages, ids, 1).view(2, 4)
    assert first[:, 2:].isnan().all()
    # Stage I credits first attempts with nothing else, so those of a group of two are opposite.
    torch.testing.assert_close(first[:, 0], -first[:, 1])
    assert (first[:, 0] != 0).all()


def test_truncated_attempts_have_no_sequence_kl(make_letters_trainer):
    """With Stage I crediting a first attempt with its KL alone, a masked one counts 0 in the baseline of the others."""
    trainer = make_letters_trainer(
        kl_level="sequence", mask_truncated_completions=True, beta=0.3, stage1_beta=0.7, num_generations=4
    )
    move(trainer, scale=0.5)
    inputs = rollouts(trainer, rows=32)
    ids = inputs["attempt_ids"]
    kl = sum_per_attempt(trainer._policy_logps(inputs) - inputs["ref_per_token_logps"], ids, 2)
    masked = ~(ids == 1).any(1)
    assert masked.any() and (kl[masked, 0] == 0).all()
    expected = torch.where(masked, torch.nan, leave_one_out_advantages(-kl, 4)[:, 0])
    torch.testing.assert_close(first_token(inputs["advantages"], ids, 1), expected, equal_nan=True)


def test_sequence_kl_without_any_kl_is_nothing(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(kl_level="sequence", beta=0.0, stage1_beta=0.0, max_steps=1)
    trainer.train()


# Adaptive beta2


def test_adaptive_beta_is_that_of_the_batches_before_and_rests_in_stage_two(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(adaptive_stage1_beta=True, stage1_steps=2, beta=0.01, stage1_beta=0.1)
    move(trainer)
    inputs = rollouts(trainer)
    ids = inputs["attempt_ids"]
    torch.testing.assert_close(first_token(inputs["kl_weights"], ids, 1), torch.full((8,), 0.11))
    log_ratio = trainer._policy_logps(inputs) - inputs["ref_per_token_logps"]
    kl = (((-log_ratio).exp() + log_ratio - 1) * (ids == 1)).sum() / 8
    advantage = first_token(inputs["advantages"], ids, 2).abs().mean()
    expected = balanced_stage1_beta(0.1, kl=kl.item(), advantage=advantage.item(), start=0.1)
    assert trainer._stage1_beta == pytest.approx(expected) != 0.1
    inputs = rollouts(trainer)
    got = first_token(inputs["kl_weights"], inputs["attempt_ids"], 1)
    torch.testing.assert_close(got, torch.full((8,), 0.01 + expected))
    assert trainer._metrics["train"]["stage1_beta"] == [0.1, pytest.approx(expected)]
    before = trainer._stage1_beta
    rollouts(trainer, step=2)
    trainer.evaluate()
    assert trainer._stage1_beta == before


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
def test_adaptive_beta_is_logged_and_moves(make_arithmetic_trainer, kl_level):
    trainer = make_arithmetic_trainer(adaptive_stage1_beta=True, stage1_steps=3, kl_level=kl_level)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "stage" in log]
    assert logs[0]["stage1_beta"] == 0.1 and logs[2]["stage1_beta"] != 0.1
    assert "stage1_beta" not in logs[3]


# Cycles, and both stages at once


def test_cycles_of_both_stages(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(stage1_cycles=2, max_steps=4)
    trainer.train()
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1, 2, 1, 2]
    trainer.create_model_card()
    assert "| other options | stage1_cycles=2 |" in Path(trainer.args.output_dir, "README.md").read_text()


def test_joint_stage_has_the_bonus_and_the_strict_kl(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(stage_schedule="joint", num_attempts=3, max_steps=2, adaptive_stage1_beta=True)
    inputs = rollouts(trainer)
    rewards = torch.cat(trainer._attempt_rewards, dim=1)
    advantages = leave_one_out_advantages(shaped_rewards(rewards, stage=2, alpha=10.0), 4)
    for k, weight in ((1, 0.11), (2, 0.11), (3, 0.01)):
        ids = inputs["attempt_ids"]
        torch.testing.assert_close(first_token(inputs["advantages"], ids, k), advantages[:, k - 1])
        torch.testing.assert_close(first_token(inputs["kl_weights"], ids, k), torch.full((8,), weight))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "stage" in log]
    assert [log["stage"] for log in logs] == [2, 2] and all("stage1_beta" in log for log in logs)


def test_joint_configuration_can_be_read_again(tmp_path):
    config = SCoReConfig(str(tmp_path), bf16=False, stage_schedule="joint")
    assert config.stage1_steps == 0
    SCoReConfig(str(tmp_path), bf16=False, stage_schedule="joint", stage1_steps=config.stage1_steps)


# Stage I(b)'s reference


@pytest.mark.parametrize("peft", [False, True])
def test_second_sub_stage_holds_to_the_model_that_the_first_produced(make_arithmetic_trainer, peft):
    """
    The gradient at a held token is beta1 (log pi - log pi_base) + beta2 (log pi - log pi_a); at a token of attempt 3, beta1's
    and the advantage alone.
    """
    trainer = make_arithmetic_trainer(
        {"peft_config": LoraConfig(**LORA)} if peft else {},
        num_attempts=3,
        stage1_steps=4,
        stage1_reference="previous",
        beta=0.2,
        stage1_beta=0.6,
    )

    def shift():
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)

    rollouts(trainer, step=1)
    assert trainer._previous is None  # Stage I(a)
    shift()
    rollouts(trainer, step=2)
    assert trainer._previous.target == 3
    produced = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    shift()
    inputs = rollouts(trainer, step=3)
    gradient, policy = per_token_gradient(trainer, inputs)
    ids = inputs["attempt_ids"]
    base = base_log_probs(trainer, inputs)
    trainer.model.load_state_dict(produced)
    _, former = per_token_gradient(trainer, inputs)
    assert (policy - former).abs()[ids > 0].max() > 0.01 and (base - former).abs()[ids > 0].max() > 0.01
    held = (ids == 1) | (ids == 2)
    expected = 0.2 * (policy - base) + 0.6 * (policy - former) * held - inputs["advantages"]
    torch.testing.assert_close(gradient[ids > 0] * len(ids) * 8, expected[ids > 0], atol=2e-5, rtol=1e-3)
    rollouts(trainer, step=4)
    assert trainer._previous is None  # Stage II


def test_snapshot_gives_the_weights_back(make_arithmetic_trainer):
    model = make_arithmetic_trainer().model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    snapshot = Snapshot.of(model, target=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    with pytest.raises(KeyError), snapshot.in_place_of_the_weights(model):
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + 1.0) and parameter.requires_grad


# Advantages of one size


def test_whitened_advantages_have_the_deviation_one_in_each_attempt(make_arithmetic_trainer):
    """Over the credited attempts: the stored first ones have none."""
    trainer = make_arithmetic_trainer(
        {
            "train_dataset": with_stored(),
            "reward_funcs": lambda completions, **_: [float(sum(map(ord, str(c))) % 7) for c in completions],
        },
        whiten_advantages=True,
        offline_first_attempts=0.5,
        stage1_steps=0,
        per_device_train_batch_size=32,
    )
    inputs = rollouts(trainer, rows=32)
    for k, credited in ((1, 16), (2, 32)):
        advantages = first_token(inputs["advantages"], inputs["attempt_ids"], k)
        assert (~advantages.isnan()).sum() == credited
        assert advantages.nanmean().item() == pytest.approx(0.0, abs=1e-4)
        assert advantages.square().nanmean().item() == pytest.approx(1.0, abs=1e-3)


# Learning rate of Stage II


def learning_rates(trainer, **kwargs):
    trainer.train(**kwargs)
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 0.25, 0.25, 0.25]),
        ({"stage1_cycles": 3}, [1, 0.25, 1, 0.25, 1, 0.25]),
        ({"lr_scheduler_type": "linear"}, [1, 5 / 6, 4 / 6, 3 / 24, 2 / 24, 1 / 24]),
    ],
    ids=["sequential", "alternating", "linear"],
)
def test_stage_two_has_its_own_learning_rate(make_arithmetic_trainer, options, expected):
    options = {"max_steps": 6, "stage1_steps": 3, "learning_rate": 4e-4, "stage2_learning_rate": 1e-4} | options
    assert learning_rates(make_arithmetic_trainer(**options)) == pytest.approx([4e-4 * rate for rate in expected])


def test_learning_rate_of_stage_two_is_right_after_a_resume(make_arithmetic_trainer, tmp_path):
    options = {
        "max_steps": 4,
        "stage1_steps": 2,
        "learning_rate": 4e-4,
        "stage2_learning_rate": 1e-4,
        "save_strategy": "steps",
    }
    make_arithmetic_trainer(**options, save_steps=1, output_dir=str(tmp_path)).train()
    for step in (1, 2, 3):
        trainer = make_arithmetic_trainer(**options, output_dir=str(tmp_path))
        found = learning_rates(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert found == pytest.approx([4e-4, 4e-4, 1e-4, 1e-4])


def test_a_given_scheduler_and_a_learning_rate_of_stage_two_are_refused(make_arithmetic_trainer):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="`optimizers` has a scheduler of its own"):
        make_arithmetic_trainer({"optimizers": (optimizer, scheduler)}, stage2_learning_rate=1e-4)
