"""Options of the KL penalties and of the stages that are not on by default."""

import pytest
import torch
from test_ablations import with_stored
from test_score_trainer import move, rollouts

from trl_score.objective import (
    Stage,
    balanced_stage1_beta,
    leave_one_out_advantages,
    shaped_rewards,
    stage_one,
    stage_two,
    sum_per_attempt,
    two_stages,
)


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
    rewards = torch.cat(trainer._batch.rewards, dim=1)
    credit = shaped_rewards(rewards, stage_one(2) if step == 0 else stage_two(2), alpha=10.0)
    weights = torch.tensor([1.0, 0.3] if step == 0 else [0.3, 0.3])
    expected = leave_one_out_advantages(credit - weights * kl, 4)
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


# Schedules of one's own


def test_a_schedule_says_what_each_step_optimizes(make_arithmetic_trainer):
    """Two cycles of two steps, as in the docs' recipe."""

    def two_cycles(step, max_steps):
        return two_stages(step % 2, 2, stage1_steps=1, num_attempts=2)

    trainer = make_arithmetic_trainer({"schedule": two_cycles}, max_steps=4)
    trainer.train()
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1, 2, 1, 2]


def test_a_schedule_is_asked_for_no_step_beyond_the_run(make_arithmetic_trainer):
    """The last evaluation has the stage of the last step; a resumed run that is longer has the stages of its steps."""
    stages = [stage_one(2), stage_one(2), stage_two(2), stage_one(2)]
    trainer = make_arithmetic_trainer(
        {"schedule": lambda step, _: stages[step]}, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    assert [log["eval_stage"] for log in trainer.state.log_history if "eval_stage" in log] == [2, 1]


def test_mean_kl_is_that_of_all_tokens_whatever_the_micro_batches(make_arithmetic_trainer):
    """Half of the first attempts are stored ones, which have no KL: micro-batches of one rollout have none or all of it."""
    found = []
    for size in (8, 1):
        trainer = make_arithmetic_trainer(
            {"train_dataset": with_stored()}, offline_first_attempts=0.5, max_steps=1, stage1_steps=0,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        move(trainer, scale=0.3)
        trainer._starts_at_reference = False
        trainer.train()
        found.append(trainer.state.log_history[0])
    assert found[0]["kl_t1"] > 1e-3
    for name in ("kl_t1", "kl_t2"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)
    assert found[0]["completions/clipped_ratio_t1"] <= 0.5  # the stored ones, of three tokens, are not cut off


def test_joint_schedule_has_the_bonus_and_the_strict_kl(make_arithmetic_trainer):
    joint = Stage(2, credited=(1, 2, 3), held=(1, 2))
    trainer = make_arithmetic_trainer(
        {"schedule": lambda step, max_steps: joint}, num_attempts=3, max_steps=2, adaptive_stage1_beta=True
    )
    inputs = rollouts(trainer)
    rewards = torch.cat(trainer._batch.rewards, dim=1)
    advantages = leave_one_out_advantages(shaped_rewards(rewards, stage_two(3), alpha=10.0), 4)
    for k, weight in ((1, 0.11), (2, 0.11), (3, 0.01)):
        ids = inputs["attempt_ids"]
        torch.testing.assert_close(first_token(inputs["advantages"], ids, k), advantages[:, k - 1])
        torch.testing.assert_close(first_token(inputs["kl_weights"], ids, k), torch.full((8,), weight))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "stage" in log]
    assert [log["stage"] for log in logs] == [2, 2] and all("stage1_beta" in log for log in logs)
