"""Numbers worked by hand, then identities."""

import itertools

import pytest
import torch

from trl_score.objective import (
    Stage,
    balanced_stage1_beta,
    kl_weights,
    leave_one_out_advantages,
    resolve_stage1_steps,
    shaped_rewards,
    spread_to_tokens,
    stage_one,
    stage_two,
    sum_per_attempt,
    targets,
    two_stages,
)


NAN = float("nan")
ONE, TWO = stage_one(2), stage_two(2)


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)


def test_stage_is_a_function_of_the_step():
    def stages(stage1_steps):
        return [two_stages(step, 5, stage1_steps=stage1_steps, num_attempts=2) for step in range(5)]

    assert stages(3) == [stage_one(2)] * 3 + [stage_two(2)] * 2
    assert stages(0.6) == stages(3)
    assert stages(0) == [stage_two(2)] * 5 and stages(5) == [stage_one(2)] * 5


def test_stage_one_takes_the_attempts_in_turn():
    """Five steps for three turns (attempts 2, 3, 4): 0 -> 2, 1 -> 2, 2 -> 3, 3 -> 3, 4 -> 4."""
    turns = [two_stages(step, 6, stage1_steps=5, num_attempts=4) for step in range(6)]
    assert [stage.credited for stage in turns] == [(2,), (2,), (3,), (3,), (4,), (1, 2, 3, 4)]
    assert [stage.held for stage in turns] == [(1,), (1,), (1, 2), (1, 2), (1, 2, 3), ()]


def test_a_stage_credits_attempts_numbered_from_one():
    for wrong in ({"credited": ()}, {"credited": (0, 1)}, {"credited": (1,), "held": (0,)}):
        with pytest.raises(ValueError, match="Credit at least one"):
            Stage(1, **wrong)


def test_stage1_steps_below_one_are_a_share():
    assert resolve_stage1_steps(0.5, 3000) == 1500
    assert resolve_stage1_steps(0, 3000) == 0
    assert resolve_stage1_steps(1, 3000) == 1
    assert resolve_stage1_steps(200.0, 100) == 200


REWARDS = [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]  # i→c, c→c, c→i, i→i


def test_stage_one_rewards_the_last_attempt_only():
    close(shaped_rewards(torch.tensor(REWARDS), ONE, alpha=10.0), [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])


def test_bonus_penalizes_breaking_a_correct_answer():
    """r2 + 10 (r2 - r1): 1 + 10, 1 + 0, 0 - 10, 0 + 0."""
    expected = [[0.0, 11.0], [1.0, 1.0], [1.0, -10.0], [0.0, 0.0]]
    close(shaped_rewards(torch.tensor(REWARDS), TWO, alpha=10.0), expected)


def test_alpha_zero_gives_equation_four():
    close(shaped_rewards(torch.tensor(REWARDS), TWO, alpha=0.0), REWARDS)


def test_bonus_is_between_neighbours_in_three_attempts():
    """0, 1 + 2 (1 - 0), 0 + 2 (0 - 1)."""
    close(shaped_rewards(torch.tensor([[0.0, 1.0, 0.0]]), stage_two(3), alpha=2.0), [[0.0, 3.0, -2.0]])


def test_first_sub_stage_trains_the_second_of_three_attempts():
    close(shaped_rewards(torch.tensor([[1.0, 1.0, 1.0]]), stage_one(2), alpha=10.0), [[0.0, 1.0, 0.0]])


def test_discount_credits_an_attempt_with_what_comes_after():
    """alpha = 1, gamma = 0.5, r = (1, 0): attempt 2 gets 0 - 1, attempt 1 gets 1 + 0.5 * (-1)."""
    close(shaped_rewards(torch.tensor([[1.0, 0.0]]), TWO, alpha=1.0, gamma=0.5), [[0.5, -1.0]])


def test_first_attempt_never_gets_one_minus_alpha():
    """With gamma = 0 attempt 1 gets r1 alone, at every alpha; with gamma = 1 it gets r1 (1 - alpha) + .., the known trap."""
    for alpha in (0.0, 1.0, 10.0):
        close(shaped_rewards(torch.tensor(REWARDS), TWO, alpha=alpha)[:, 0], [0.0, 1.0, 1.0, 0.0])
    close(shaped_rewards(torch.tensor([[1.0, 0.0]]), TWO, alpha=10.0, gamma=1.0)[:, 0], [-9.0])


def test_unscored_attempt_takes_only_what_depends_on_it_along():
    rewards = torch.tensor([[NAN, 1.0, 1.0], [1.0, NAN, 1.0]])
    close(shaped_rewards(rewards, stage_two(3), alpha=10.0), [[NAN, NAN, 1.0], [1.0, NAN, NAN]])
    close(shaped_rewards(rewards, stage_two(3), alpha=0.0), [[NAN, 1.0, 1.0], [1.0, NAN, 1.0]])
    close(shaped_rewards(rewards, stage_one(3), alpha=10.0), [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def test_shaping_leaves_its_input_alone():
    rewards = torch.tensor(REWARDS)
    shaped_rewards(rewards, TWO, alpha=10.0, gamma=1.0)
    close(rewards, REWARDS)


def test_baseline_is_the_mean_of_the_others():
    """Group (3, 0, 0): 3 - 0, 0 - 3/2, 0 - 3/2. Group (1, 2, 6): 1 - 4, 2 - 7/2, 6 - 3/2. Attempts do not mix."""
    rewards = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 6.0], [1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
    expected = [[3.0, -3.0], [-1.5, -1.5], [-1.5, 4.5], [-3.0, 0.0], [-1.5, 0.0], [4.5, 0.0]]
    close(leave_one_out_advantages(rewards, num_generations=3), expected)


def test_unscored_rollouts_stay_out_of_the_baseline():
    """(1, NaN, 0): 1 - 0, nothing, 0 - 1. (NaN, NaN, 5): there is nothing to compare 5 with."""
    close(leave_one_out_advantages(torch.tensor([[1.0], [NAN], [0.0]]), 3), [[1.0], [0.0], [-1.0]])
    close(leave_one_out_advantages(torch.tensor([[NAN], [NAN], [5.0]]), 3), [[0.0], [0.0], [0.0]])


def test_equal_rewards_and_single_rollouts_have_zero_advantage():
    close(leave_one_out_advantages(torch.full((4, 2), 0.7), 4), [[0.0, 0.0]] * 4)
    close(leave_one_out_advantages(torch.tensor([[1.0, 2.0]]), 1), [[0.0, 0.0]])


def test_advantages_of_a_group_sum_to_zero():
    torch.manual_seed(0)
    advantages = leave_one_out_advantages(torch.rand(12, 3), 4)
    torch.testing.assert_close(advantages.view(3, 4, 3).sum(1), torch.zeros(3, 3), atol=1e-6, rtol=0)


def test_incomplete_groups_are_an_error():
    with pytest.raises(ValueError, match="5 rollouts are not whole groups of `num_generations=2`"):
        leave_one_out_advantages(torch.zeros(5, 2), 2)


def test_stage_one_holds_the_attempts_before_its_target():
    def weights(stage, num_attempts=2):
        return kl_weights(stage, beta=0.01, stage1_beta=0.1, num_attempts=num_attempts)

    close(weights(stage_one(2)), [0.11, 0.01])
    close(weights(stage_two(2)), [0.01, 0.01])
    close(weights(stage_one(2), 3), [0.11, 0.01, 0.01])
    close(weights(stage_one(3), 3), [0.11, 0.11, 0.01])
    close(weights(stage_one(3), 2), [0.11, 0.11])  # an evaluation with fewer attempts


def test_adaptive_beta_moves_to_the_balance_of_both_terms():
    """
    Balance at 0.3 / 6 = 0.05. From 0.1, at most a quarter up and back: 0.08, 0.064, 0.0512, 0.05, and there it stays. From
    0.03: 0.0375, 0.046875, 0.05. Nothing to balance: nothing moves. Bounds of 2: 0.05 to 0.2 from 0.1.
    """

    def path(beta, steps, **values):
        settings = {"kl": 6.0, "advantage": 0.3, "start": 0.1, "rate": 0.25} | values
        return [beta := balanced_stage1_beta(beta, **settings) for _ in range(steps)]

    assert path(0.1, 5) == pytest.approx([0.08, 0.064, 0.0512, 0.05, 0.05])
    assert path(0.03, 4) == pytest.approx([0.0375, 0.046875, 0.05, 0.05])
    assert path(0.1, 2, kl=0.0) == path(0.1, 2, advantage=0.0) == [0.1, 0.1]
    assert path(0.1, 9, kl=100.0, bound=2.0)[-1] == pytest.approx(0.05)
    assert path(0.1, 9, kl=0.001, bound=2.0)[-1] == pytest.approx(0.2)


def test_tokens_get_their_attempts_value_and_the_others_zero():
    ids = torch.tensor([[1, 1, 0, 2, 0], [1, 0, 0, 2, 2]])
    close(
        spread_to_tokens(torch.tensor([[5.0, 7.0], [2.0, 3.0]]), ids), [[5.0, 5.0, 0, 7.0, 0], [2.0, 0, 0, 3.0, 3.0]]
    )
    close(spread_to_tokens(torch.tensor([5.0, 7.0]), ids), [[5.0, 5.0, 0, 7.0, 0], [5.0, 0, 0, 7.0, 7.0]])


def test_sums_per_attempt_ignore_what_stands_elsewhere():
    ids = torch.tensor([[1, 1, 0, 2, 0]])
    close(sum_per_attempt(torch.tensor([[1.0, 2.0, NAN, 4.0, float("inf")]]), ids, 2), [[3.0, 4.0]])


# The composition of the above


SETTINGS = {"num_generations": 4, "alpha": 10.0, "beta": 0.01, "stage1_beta": 0.1}


def case_by_case(rewards, stage, target, *, alpha, gamma, penalty=0.0):
    """The credit as the paper writes it, stage by stage: Eq. 3 for one attempt; Eq. 4 and the bonus of Section 5.2."""
    num_attempts = rewards.size(1)
    credit = torch.zeros_like(rewards)
    for k in range(num_attempts):
        if stage == 1 and k == target - 1:
            credit[:, k] = rewards[:, k]
        if stage == 2:
            credit[:, k] = rewards[:, k]
            if k > 0 and alpha > 0:
                credit[:, k] = rewards[:, k] + alpha * (rewards[:, k] - rewards[:, k - 1])
    credit = credit - penalty
    later = [sum(gamma ** (j - k) * credit[:, j] for j in range(k + 1, num_attempts)) for k in range(num_attempts)]
    return torch.stack([credit[:, k] + (later[k] if gamma > 0 else 0.0) for k in range(num_attempts)], dim=1)


@pytest.mark.parametrize("num_attempts", [1, 2, 3, 4])
def test_stages_as_data_equal_the_equations_case_by_case(num_attempts):
    """In all stages, with every bonus and discount, with unscored attempts, and with the KL in the reward."""
    torch.manual_seed(0)
    rewards, log_ratio = torch.rand(16, num_attempts), torch.randn(16, num_attempts)
    unscored = torch.where(torch.rand(16, num_attempts) < 0.2, NAN, rewards)
    stages = [(2, None, stage_two(num_attempts))]
    stages += [(1, target, stage_one(target)) for target in range(2, num_attempts + 1)]
    for number, target, stage in stages:
        weights = torch.full((num_attempts,), 0.01)
        if number == 1:
            weights[: target - 1] += 0.1
        for alpha, gamma in itertools.product((0.0, 1.0, 10.0), (0.0, 0.8, 1.0)):
            shaping = {"alpha": alpha, "gamma": gamma}
            close_to = torch.testing.assert_close
            expected = case_by_case(unscored, number, target, **shaping)
            close_to(shaped_rewards(unscored, stage, **shaping), expected, equal_nan=True)
            got, got_weights = targets(unscored, stage, **(SETTINGS | shaping))
            close_to(got, leave_one_out_advantages(expected, 4))
            close_to(got_weights, weights)
            got, got_weights = targets(rewards, stage, **(SETTINGS | shaping), log_ratio=log_ratio)
            penalized = case_by_case(rewards, number, target, **shaping, penalty=weights * log_ratio)
            close_to(got, leave_one_out_advantages(penalized, 4), atol=1e-5, rtol=1e-5)
            close_to(got_weights, torch.zeros(num_attempts))


def test_a_function_that_abstains_does_not_change_what_the_bonus_compares():
    """
    Two functions: 0 for all attempts, and a judge that gives 0.5 to all and abstains on the first attempt of row 0. All second
    attempts are equally good, so none has an advantage, nor has any first attempt.
    """
    rewards = torch.zeros(4, 2, 2)
    rewards[:, :, 1] = 0.5
    rewards[0, 0, 1] = NAN
    advantages, _ = targets(rewards, TWO, **SETTINGS)
    close(advantages, [[0.0, 0.0]] * 4)


def test_functions_are_compared_one_by_one():
    """
    alpha = 1, groups of two. Function 1: (0, 1) and (1, 1), credits of attempt 2: 2 and 1, so 1 and -1. Function 2 abstains on
    attempt 2 of row 0: nothing to compare row 1 with. First attempts: 0 - 1 and back, 0.2 - 0.6 and back.
    """
    rewards = torch.tensor([[[0.0, 0.2], [1.0, NAN]], [[1.0, 0.6], [1.0, 0.9]]])
    advantages, _ = targets(rewards, TWO, **(SETTINGS | {"num_generations": 2, "alpha": 1.0}))
    close(advantages, [[-1.4, 1.0], [1.4, -1.0]])


def test_functions_that_score_everything_are_one_sum():
    torch.manual_seed(0)
    rewards = torch.rand(8, 3, 2)
    for stage in (stage_one(2), stage_one(3), stage_two(3)):
        torch.testing.assert_close(
            targets(rewards, stage, **SETTINGS)[0], targets(rewards.sum(-1), stage, **SETTINGS)[0]
        )


def test_stored_first_attempts_are_neither_trained_nor_compared_with():
    """Attempt 1: 1 - 0 and 0 - 1 without the stored rows. Attempt 2, in Stage I: 1 - 1/3, 0 - 2/3, 1 - 1/3, 0 - 2/3."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    stored = torch.tensor([False, False, True, True])
    close(targets(rewards, TWO, **SETTINGS, stored=stored)[0][:, 0], [1.0, -1.0, 0.0, 0.0])
    close(targets(rewards, ONE, **SETTINGS, stored=stored)[0][:, 1], [2 / 3, -2 / 3, 2 / 3, -2 / 3])
    penalty = targets(rewards, ONE, **SETTINGS, stored=stored, log_ratio=torch.ones(4, 2))[0]
    close(penalty[:, 0], [0.0] * 4)
