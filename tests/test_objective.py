"""Numbers worked by hand, then identities."""

import pytest
import torch

from trl_score.objective import (
    balanced_stage1_beta,
    kl_weights,
    leave_one_out_advantages,
    mixed_reference,
    resolve_stage1_steps,
    shaped_rewards,
    shared_first_credit,
    spread_to_tokens,
    stage_at,
    sum_per_attempt,
    tree_advantages,
    whitened_advantages,
)


NAN = float("nan")


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)


def test_stage_is_a_function_of_the_step():
    assert [stage_at(step, stage1_steps=3)[0] for step in range(5)] == [1, 1, 1, 2, 2]
    assert stage_at(0, stage1_steps=0) == (2, 2)


def test_stage_one_takes_the_attempts_in_turn():
    """Five steps for three turns (attempts 2, 3, 4): 0 -> 2, 1 -> 2, 2 -> 3, 3 -> 3, 4 -> 4."""
    assert [stage_at(step, 5, num_attempts=4) for step in range(6)] == [(1, 2), (1, 2), (1, 3), (1, 3), (1, 4), (2, 4)]


def test_each_cycle_has_its_share_of_stage_one_first():
    """Nine steps in three cycles of three; six steps of Stage I are two in each, one for each of the attempts 2 and 3."""
    assert [stage_at(step, 6, cycles=3, max_steps=9)[0] for step in range(10)] == [1, 1, 2] * 3 + [2]
    turns = [stage_at(step, 6, 3, cycles=3, max_steps=9) for step in range(9)]
    assert turns == [(1, 2), (1, 3), (2, 3)] * 3
    # Ten steps in four cycles of two and a half, half of them Stage I: from 0, 2.5, 5 and 7.5, for 1.25 steps.
    assert [stage_at(step, 5, cycles=4, max_steps=10)[0] for step in range(10)] == [1, 1, 2, 1, 2, 1, 1, 2, 1, 2]


def test_half_as_many_cycles_as_steps_alternate():
    assert [stage_at(step, 5, cycles=5, max_steps=10)[0] for step in range(10)] == [1, 2] * 5


@pytest.mark.parametrize("stage1_steps", [0, 3, 7, 12])
def test_one_cycle_is_the_run(stage1_steps):
    for step in range(9):
        assert stage_at(step, stage1_steps, 3, cycles=1, max_steps=8) == stage_at(step, stage1_steps, 3)


def test_stage1_steps_below_one_are_a_share():
    assert resolve_stage1_steps(0.5, 3000) == 1500
    assert resolve_stage1_steps(0, 3000) == 0
    assert resolve_stage1_steps(1, 3000) == 1
    assert resolve_stage1_steps(200.0, 100) == 200


REWARDS = [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]  # i→c, c→c, c→i, i→i


def test_stage_one_rewards_the_last_attempt_only():
    close(shaped_rewards(torch.tensor(REWARDS), stage=1, alpha=10.0), [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])


def test_bonus_penalizes_breaking_a_correct_answer():
    """r2 + 10 (r2 - r1): 1 + 10, 1 + 0, 0 - 10, 0 + 0."""
    expected = [[0.0, 11.0], [1.0, 1.0], [1.0, -10.0], [0.0, 0.0]]
    close(shaped_rewards(torch.tensor(REWARDS), stage=2, alpha=10.0), expected)


def test_alpha_zero_gives_equation_four():
    close(shaped_rewards(torch.tensor(REWARDS), stage=2, alpha=0.0), REWARDS)


def test_bonus_is_between_neighbours_in_three_attempts():
    """0, 1 + 2 (1 - 0), 0 + 2 (0 - 1)."""
    close(shaped_rewards(torch.tensor([[0.0, 1.0, 0.0]]), stage=2, alpha=2.0), [[0.0, 3.0, -2.0]])


def test_first_sub_stage_trains_the_second_of_three_attempts():
    close(shaped_rewards(torch.tensor([[1.0, 1.0, 1.0]]), stage=1, alpha=10.0, target=2), [[0.0, 1.0, 0.0]])


def test_discount_credits_an_attempt_with_what_comes_after():
    """alpha = 1, gamma = 0.5, r = (1, 0): attempt 2 gets 0 - 1, attempt 1 gets 1 + 0.5 * (-1)."""
    close(shaped_rewards(torch.tensor([[1.0, 0.0]]), stage=2, alpha=1.0, gamma=0.5), [[0.5, -1.0]])


def test_first_attempt_never_gets_one_minus_alpha():
    """With gamma = 0 attempt 1 gets r1 alone, at every alpha; with gamma = 1 it gets r1 (1 - alpha) + .., the known trap."""
    for alpha in (0.0, 1.0, 10.0):
        close(shaped_rewards(torch.tensor(REWARDS), stage=2, alpha=alpha)[:, 0], [0.0, 1.0, 1.0, 0.0])
    close(shaped_rewards(torch.tensor([[1.0, 0.0]]), stage=2, alpha=10.0, gamma=1.0)[:, 0], [-9.0])


def test_penalty_is_taken_off_before_discounting():
    """Stage II, alpha = 1: 0 - 1, 2 - 3. Stage I: 0 - 1, 1 - 3. With gamma = 0.5: -1 + 0.5 * (-1), -1."""
    rewards, penalty = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    close(shaped_rewards(rewards, stage=2, alpha=1.0, penalty=penalty), [[-1.0, -1.0]])
    close(shaped_rewards(rewards, stage=1, alpha=1.0, penalty=penalty), [[-1.0, -2.0]])
    close(shaped_rewards(rewards, stage=2, alpha=1.0, gamma=0.5, penalty=penalty), [[-1.5, -1.0]])
    close(rewards, [[0.0, 1.0]])


def test_unscored_attempt_takes_only_what_depends_on_it_along():
    rewards = torch.tensor([[NAN, 1.0, 1.0], [1.0, NAN, 1.0]])
    close(shaped_rewards(rewards, stage=2, alpha=10.0), [[NAN, NAN, 1.0], [1.0, NAN, NAN]])
    close(shaped_rewards(rewards, stage=2, alpha=0.0), [[NAN, 1.0, 1.0], [1.0, NAN, 1.0]])
    close(shaped_rewards(rewards, stage=1, alpha=10.0), [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def test_shaping_leaves_its_input_alone():
    rewards = torch.tensor(REWARDS)
    shaped_rewards(rewards, stage=2, alpha=10.0, gamma=1.0)
    close(rewards, REWARDS)


def test_unknown_stage_is_an_error():
    with pytest.raises(ValueError, match="1 or 2, got 3"):
        shaped_rewards(torch.zeros(2, 2), stage=3, alpha=1.0)


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


def test_baselines_of_a_tree_are_over_first_attempts_and_within_each():
    """
    Three first attempts (r1 = 0, 1, 1) with two second ones each; alpha = 10. First attempts: 0 - (1 + 1) / 2, 1 - (0 + 1) / 2
    twice. Second ones, credits (11, 0), (1, -10) and (1, 1): 11 - 0 and back, 1 - (-10) and back, nothing. So r1 is nowhere in
    them: they are 11 (r2 - the other's r2).
    """
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    credit = shared_first_credit(shaped_rewards(rewards, stage=2, alpha=10.0), 2)
    got = tree_advantages(credit, num_generations=6, second_attempts=2)
    close(got, [[-1.0, 11.0], [-1.0, -11.0], [0.5, 11.0], [0.5, -11.0], [0.5, 0.0], [0.5, 0.0]])


def test_shared_first_attempt_is_credited_with_the_mean_of_its_second_attempts():
    """
    alpha = 1, gamma = 0.5. Attempt 2: (2, 0) at r1 = 0, (1, -1) at r1 = 1. Attempt 1: 0 + 0.5 * (2 + 0) / 2 = 0.5 and
    1 + 0.5 * (1 - 1) / 2 = 1, so the advantages are -0.5 and 0.5.
    """
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    credit = shared_first_credit(shaped_rewards(rewards, stage=2, alpha=1.0, gamma=0.5), 2)
    close(credit, [[0.5, 2.0], [0.5, 0.0], [1.0, 1.0], [1.0, -1.0]])
    close(tree_advantages(credit, 4, 2), [[-0.5, 2.0], [-0.5, -2.0], [0.5, 2.0], [0.5, -2.0]])


def test_unscored_attempts_of_a_tree_stay_out_of_its_means():
    """A first attempt is credited by the scored ones of its rollouts; a run without any leaves the baseline."""
    credit = shared_first_credit(
        torch.tensor([[2.0, 5.0], [NAN, NAN], [NAN, 1.0], [NAN, 0.0], [1.0, 3.0], [1.0, 1.0]]), 2
    )
    close(credit[:, 0], [2.0, 2.0, NAN, NAN, 1.0, 1.0])
    close(tree_advantages(credit, 6, 2), [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 2.0], [-1.0, -2.0]])


def test_tree_with_one_second_attempt_is_the_plain_estimator():
    torch.manual_seed(0)
    credit = torch.randn(8, 3)
    credit[2, 0] = credit[5, 1] = NAN
    close(shared_first_credit(credit, 1), credit.tolist())
    close(tree_advantages(credit, 4, 1), leave_one_out_advantages(credit, 4).tolist())


def test_whitening_divides_each_attempt_by_its_own_deviation():
    """
    Attempt 1: (3, -3, 0, 0), all credited: the deviation is sqrt(18 / 4). Attempt 2: (20, -20) and two without credit:
    sqrt(800 / 2) = 20. Attempt 3: nothing to divide.
    """
    advantages = torch.tensor([[3.0, 20.0, 0.0], [-3.0, -20.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    credited = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1]]).bool()
    got = whitened_advantages(advantages, credited)
    value = 3 / (4.5**0.5 + 1e-4)
    close(got, [[value, 20 / 20.0001, 0.0], [-value, -20 / 20.0001, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_whitening_cancels_the_weight_of_the_bonus():
    """Where first attempts are all alike, r2 + alpha (r2 - r1) is (1 + alpha) r2 and a constant."""
    torch.manual_seed(0)
    rewards = torch.stack([torch.zeros(16), torch.rand(16)], dim=1)
    got = []
    for alpha in (0.0, 10.0):
        advantages = leave_one_out_advantages(shaped_rewards(rewards, stage=2, alpha=alpha), 4)
        got.append(whitened_advantages(advantages, torch.ones(16, 2)))
    torch.testing.assert_close(*got, atol=1e-3, rtol=1e-3)


def test_stage_one_holds_the_attempts_before_its_target():
    close(kl_weights(1, beta=0.01, stage1_beta=0.1), [0.11, 0.01])
    close(kl_weights(2, beta=0.01, stage1_beta=0.1), [0.01, 0.01])
    close(kl_weights(1, beta=0.01, stage1_beta=0.1, num_attempts=3, target=2), [0.11, 0.01, 0.01])
    close(kl_weights(1, beta=0.01, stage1_beta=0.1, num_attempts=3), [0.11, 0.11, 0.01])


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


def test_mixed_reference_has_the_gradient_of_both_penalties():
    """By hand: (0.1 * -1 + 0.3 * -5) / 0.4 = -4. Then the gradient over a whole distribution of four tokens."""
    weight, other_weight = torch.tensor(0.1), torch.tensor(0.3)
    close(mixed_reference(torch.tensor([[-1.0]]), torch.tensor([[-5.0]]), weight, other_weight), [[-4.0]])
    close(mixed_reference(torch.tensor([[-1.0]]), torch.tensor([[-5.0]]), weight * 0, weight * 0), [[-1.0]])
    torch.manual_seed(0)
    logits = torch.randn(4, requires_grad=True)
    policy, reference, other = logits.log_softmax(0), torch.randn(4).log_softmax(0), torch.randn(4).log_softmax(0)
    both = (policy.exp() * (0.1 * (policy - reference) + 0.3 * (policy - other))).sum()
    one = 0.4 * (policy.exp() * (policy - mixed_reference(reference, other, weight, other_weight))).sum()
    expected, got = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (both, one))
    torch.testing.assert_close(got, expected)


def test_tokens_get_their_attempts_value_and_the_others_zero():
    ids = torch.tensor([[1, 1, 0, 2, 0], [1, 0, 0, 2, 2]])
    close(
        spread_to_tokens(torch.tensor([[5.0, 7.0], [2.0, 3.0]]), ids), [[5.0, 5.0, 0, 7.0, 0], [2.0, 0, 0, 3.0, 3.0]]
    )
    close(spread_to_tokens(torch.tensor([5.0, 7.0]), ids), [[5.0, 5.0, 0, 7.0, 0], [5.0, 0, 0, 7.0, 7.0]])


def test_sums_per_attempt_ignore_what_stands_elsewhere():
    ids = torch.tensor([[1, 1, 0, 2, 0]])
    close(sum_per_attempt(torch.tensor([[1.0, 2.0, NAN, 4.0, float("inf")]]), ids, 2), [[3.0, 4.0]])
