r"""
The mathematics of SCoRe: Eqs. 1-4 and the bonus of Section 5.2 of [Training Language Models to Self-Correct via
Reinforcement Learning](https://huggingface.co/papers/2409.12917), tensors in, tensors out.

Shapes: `B` rollouts, `K` attempts in each, `T` tokens after the prompt. Attempts are numbered from 1, and column
`k - 1` of a `(B, K)` tensor belongs to attempt `k`. One integer tensor `attempt_ids` of shape `(B, T)` says which
tokens are whose: `k` at the tokens of attempt `k`, 0 at instruction and padding.

The loss that `SCoReTrainer` minimizes is, with these functions' results spread over the tokens,

$$- \sum_k A_k \log \pi(y_k \mid x_k) + \sum_k w_k \, \mathrm{KL}(\pi(\cdot \mid x_k) \,\|\, \pi_\mathrm{ref}(\cdot \mid x_k))$$

with $A$ = [`leave_one_out_advantages`] (or [`tree_advantages`]) of the [`shaped_rewards`] and $w$ = [`kl_weights`]. With a sequence-level KL the
second term goes into the [`shaped_rewards`].
"""

import torch
from torch import Tensor


def resolve_stage1_steps(stage1_steps: float, max_steps: int) -> int:
    """
    Number of optimizer steps of Stage I.

    Args:
        stage1_steps (`float`):
            Steps, or a share of `max_steps` if below 1.
        max_steps (`int`):
            Optimizer steps of the whole run.

    Returns:
        `int`: between 0 (Stage II only) and any number (Stage I only from `max_steps` on).
    """
    return round(stage1_steps * max_steps) if stage1_steps < 1 else int(stage1_steps)


def stage_at(
    step: int, stage1_steps: int, num_attempts: int = 2, *, cycles: int = 1, max_steps: int | None = None
) -> tuple[int, int]:
    """
    The stage of an optimizer step, and the attempt that Stage I trains. Stage I takes the attempts 2 .. N in turn, in
    equal shares of its steps (Appendix A.1; for two attempts there is one turn). With several cycles the run is divided into
    as many equal parts, and each begins with its share of Stage I; with `max_steps / 2` of them, Stage I having half of the
    steps, the two objectives alternate.

    Args:
        step (`int`):
            Optimizer steps done so far.
        stage1_steps (`int`):
            Steps of Stage I.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout.
        cycles (`int`, *optional*, defaults to `1`):
            Cycles of Stage I and Stage II.
        max_steps (`int`, *optional*):
            Optimizer steps of the whole run; needed for more than one cycle.

    Returns:
        `tuple[int, int]`: stage (1 or 2) and target attempt (2 .. N; N in Stage II).

    Example:
    ```python
    >>> [stage_at(step, stage1_steps=4, num_attempts=3) for step in (0, 1, 2, 3, 4)]
    [(1, 2), (1, 2), (1, 3), (1, 3), (2, 3)]
    >>> [stage_at(step, stage1_steps=4, cycles=2, max_steps=8)[0] for step in range(8)]
    [1, 1, 2, 2, 1, 1, 2, 2]
    >>> [stage_at(step, stage1_steps=4, cycles=4, max_steps=8)[0] for step in range(8)]
    [1, 2, 1, 2, 1, 2, 1, 2]
    ```
    """
    if cycles > 1:  # in units of 1 / cycles of a step a cycle is as long as the run, and so is its Stage I
        step = step * cycles - min(step * cycles // max_steps, cycles - 1) * max_steps
    if step >= stage1_steps:
        return 2, num_attempts
    return 1, 2 + step * (num_attempts - 1) // stage1_steps


def shaped_rewards(
    rewards: Tensor,
    *,
    stage: int,
    alpha: float,
    gamma: float = 0.0,
    target: int | None = None,
    penalty: Tensor | float = 0.0,
) -> Tensor:
    r"""
    Reward credited to the tokens of each attempt. Stage I credits its target attempt only (Eq. 3); Stage II credits
    every attempt (Eq. 4) and adds the bonus $\alpha (\hat r(y_k) - \hat r(y_{k-1}))$ to each but the first (Section
    5.2). With a discount above 0 an attempt is also credited with what comes after it; the paper uses 0, as instantaneous
    rewards are what keeps training from collapsing to no correction (Appendix A.4).

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Reward of each attempt; NaN where no reward function could score it.
        stage (`int`):
            1 or 2.
        alpha (`float`):
            Bonus weight, no unit. The paper uses 10.
        gamma (`float`, *optional*, defaults to `0.0`):
            Discount between attempts, in [0, 1]. At 1 every attempt is credited with the sum of its own and all later
            rewards.
        target (`int`, *optional*):
            Attempt that Stage I trains; the last one if not given.
        penalty (`torch.Tensor` of shape `(B, K)`, *optional*, defaults to `0.0`):
            What is taken off each attempt's credit, before discounting: its weighted sequence-level KL, where that stands in
            the reward and not in the loss (RLOO's own form of Eq. 2).

    Returns:
        `torch.Tensor` of shape `(B, K)`: NaN where the attempt, or another one that its credit depends on, is unscored.

    Raises:
        `ValueError`: if `stage` is not 1 or 2.

    Example:
    ```python
    >>> shaped_rewards(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), stage=2, alpha=10.0)  # i→c, c→i
    tensor([[  0.,  11.],
            [  1., -10.]])
    ```
    """
    if stage == 1:
        index = (target or rewards.size(1)) - 1
        credit = torch.zeros_like(rewards)
        credit[:, index] = rewards[:, index]
    elif stage == 2:
        credit = rewards.clone()
        if alpha != 0:  # else an unscored attempt would make its successor unscored for nothing
            credit[:, 1:] += alpha * (rewards[:, 1:] - rewards[:, :-1])
    else:
        raise ValueError(f"`stage` is 1 or 2, got {stage}.")
    credit = credit - penalty
    if gamma != 0:
        for k in range(rewards.size(1) - 2, -1, -1):
            credit[:, k] += gamma * credit[:, k + 1]
    return credit


def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    r"""
    Each attempt's credit minus the mean credit of the same attempt in the other rollouts of its problem (RLOO, [Ahmadian
    et al., 2024](https://huggingface.co/papers/2402.14740), the estimator of Section 3). The baseline does not depend on
    the rollout it is subtracted from, so the gradient stays unbiased.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Credit of each attempt, the rollouts of a problem in consecutive rows; NaN where there is none.
        num_generations (`int`):
            Rollouts per problem.

    Returns:
        `torch.Tensor` of shape `(B, K)`: 0 where the credit is NaN, and where no other rollout of the problem has one (so
        also everywhere for `num_generations=1`). NaN credits are left out of the baselines.

    Raises:
        `ValueError`: if `B` is not a multiple of `num_generations`.

    Example:
    ```python
    >>> leave_one_out_advantages(torch.tensor([[1.0], [0.0], [0.0]]), num_generations=3)
    tensor([[ 1.0000],
            [-0.5000],
            [-0.5000]])
    ```
    """
    if rewards.size(0) % num_generations:
        raise ValueError(f"{rewards.size(0)} rollouts are not whole groups of `num_generations={num_generations}`.")
    groups = rewards.view(-1, num_generations, rewards.size(1))  # (B / G, G, K)
    scored = ~groups.isnan()
    credit = groups.nan_to_num(0.0)
    others = scored.sum(1, keepdim=True) - 1  # (B / G, 1, K), right where the rollout itself is scored
    baseline = (credit.sum(1, keepdim=True) - credit) / others.clamp(min=1)
    return torch.where(scored & (others > 0), credit - baseline, 0.0).view_as(rewards)


def shared_first_credit(rewards: Tensor, second_attempts: int) -> Tensor:
    r"""
    The credit of a first attempt that several rollouts share: the mean of what they would credit it with. They agree, unless
    a discount above 0 credits it with second attempts, or a sequence-level KL or a reward function is not exactly repeated.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Credit of each attempt, the rollouts that share a first attempt in consecutive rows; NaN where there is none.
        second_attempts (`int`):
            Rollouts that share a first attempt.

    Returns:
        `torch.Tensor` of shape `(B, K)`: `rewards` with another first column, NaN where none of the sharing rollouts has one.

    Example:
    ```python
    >>> shared_first_credit(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), second_attempts=2)
    tensor([[2., 5.],
            [2., 7.]])
    ```
    """
    first = rewards[:, 0].view(-1, second_attempts).nanmean(1)  # (B / m,)
    return torch.cat([first.repeat_interleave(second_attempts).unsqueeze(1), rewards[:, 1:]], dim=1)


def tree_advantages(rewards: Tensor, num_generations: int, second_attempts: int) -> Tensor:
    r"""
    Leave-one-out advantages where each first attempt $y_1$ is shared by several rollouts. The baseline of a first attempt is
    over the problem's other first attempts, each counted once; that of a later attempt is over the other rollouts of the same
    $(x, y_1)$, in which what the credit owes to $y_1$ (the $- \alpha \hat r(y_1)$ of the bonus) cancels. Neither depends on
    what it is subtracted from, so the gradient stays unbiased.

    Every row has its first attempt's advantage. A mean over rows is then a mean over first attempts, each counted once: a
    further factor $1 / m$ would take it away from the first attempts.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Of [`shared_first_credit`], the rollouts of a problem in consecutive rows.
        num_generations (`int`):
            Rollouts per problem.
        second_attempts (`int`):
            Rollouts that share a first attempt, $m$. 1: [`leave_one_out_advantages`], in which all attempts have the other
            rollouts of the problem as their baseline.

    Returns:
        `torch.Tensor` of shape `(B, K)`: 0 where the credit is NaN, and where there is nothing to compare it with.

    Example:
    ```python
    >>> credit = torch.tensor([[0.0, 11.0], [0.0, 0.0], [1.0, 1.0], [1.0, -10.0]])  # r2 + 10 (r2 - r1)
    >>> tree_advantages(credit, num_generations=4, second_attempts=2)
    tensor([[ -1.,  11.],
            [ -1., -11.],
            [  1.,  11.],
            [  1., -11.]])
    ```
    """
    if second_attempts == 1:
        return leave_one_out_advantages(rewards, num_generations)
    first = leave_one_out_advantages(rewards[::second_attempts, :1], num_generations // second_attempts)
    later = leave_one_out_advantages(rewards[:, 1:], second_attempts)
    return torch.cat([first.repeat_interleave(second_attempts, dim=0), later], dim=1)


def whitened_advantages(advantages: Tensor, credited: Tensor) -> Tensor:
    r"""
    Each attempt's advantages divided by their own standard deviation over the batch, never by another attempt's. Their mean
    is zero in each group already. Not in the paper: it makes Stage II weigh all attempts alike, so it cancels the factor
    $1 + \alpha$ that the bonus gives to those after the first.

    Args:
        advantages (`torch.Tensor` of shape `(B, K)`):
            Of [`leave_one_out_advantages`] or [`tree_advantages`].
        credited (`torch.Tensor` of shape `(B, K)`):
            Whether the attempt has a credit; the others' zeros do not count.

    Returns:
        `torch.Tensor` of shape `(B, K)`: 0 for an attempt whose advantages are all 0.

    Example:
    ```python
    >>> whitened_advantages(torch.tensor([[1.0, 8.0], [-1.0, -8.0]]), credited=torch.ones(2, 2)).round(decimals=2)
    tensor([[ 1.,  1.],
            [-1., -1.]])
    ```
    """
    variance = advantages.square().sum(0) / credited.sum(0).clamp(min=1)  # (K,)
    return advantages / (variance.sqrt() + 1e-4)  # as TRL: rounding errors of equal rewards stay small


def kl_weights(
    stage: int, *, beta: float, stage1_beta: float, num_attempts: int = 2, target: int | None = None
) -> Tensor:
    r"""
    Weight of the KL penalty on the tokens of each attempt: $\beta_1$ on all of them in both stages (Eqs. 2 and 4), and
    $\beta_2$ added in Stage I on the attempts before the one it trains, which hold to the reference model (Eq. 3).

    Args:
        stage (`int`):
            1 or 2.
        beta (`float`):
            $\beta_1$, reward per nat. The paper uses 0.01.
        stage1_beta (`float`):
            $\beta_2$, reward per nat. The paper uses 0.1 for MATH and 0.25 for MBPP.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout.
        target (`int`, *optional*):
            Attempt that Stage I trains; the last one if not given.

    Returns:
        `torch.Tensor` of shape `(K,)`.

    Example:
    ```python
    >>> kl_weights(1, beta=0.01, stage1_beta=0.1)
    tensor([0.1100, 0.0100])
    ```
    """
    weights = torch.full((num_attempts,), float(beta))
    if stage == 1:
        weights[: (target or num_attempts) - 1] += stage1_beta
    return weights


def mixed_reference(reference: Tensor, other: Tensor, weights: Tensor, other_weights: Tensor) -> Tensor:
    r"""
    One reference in place of two: the weighted mean of their log-probabilities. With weights $w$ and $v$

    $$w \, \mathrm{KL}(\pi \| p) + v \, \mathrm{KL}(\pi \| q) = (w + v) \, \mathrm{KL}(\pi \| p^{w / (w + v)} q^{v / (w + v)}) +
    \text{constant}$$

    so the gradients are the same (the mixture needs no normalization: that is part of the constant).

    Args:
        reference, other (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the two references.
        weights, other_weights (`torch.Tensor` of shape `(B, T)`):
            Weights of their KL penalties, not negative.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the reference of the penalty with the weight `weights + other_weights`; `reference`
        where that is 0.

    Example:
    ```python
    >>> mixed_reference(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-3.0, -3.0]]), torch.tensor(0.5), torch.tensor([[1.5, 0.0]]))
    tensor([[-2.5000, -1.0000]])
    ```
    """
    total = weights + other_weights
    return torch.where(total > 0, (weights * reference + other_weights * other) / total, reference)


def balanced_stage1_beta(
    stage1_beta: float, *, kl: float, advantage: float, start: float, rate: float = 0.1, bound: float = 10.0
) -> float:
    r"""
    $\beta_2$ for the next batch of Stage I, so that the two terms of Eq. 3 stay of one size: $\beta_2$ times the KL of the
    held attempts, and the mean size of the trained attempt's advantage. It moves towards their ratio, by a bounded factor
    a batch and within bounds. The paper has such an adaptive $\beta_2$ (Section 5.3) but gives no formula; this one is ours.

    Args:
        stage1_beta (`float`):
            $\beta_2$ of this batch, reward per nat.
        kl (`float`):
            Mean KL of a rollout's held attempts to the reference model in this batch, nats.
        advantage (`float`):
            Mean absolute advantage of the attempt that Stage I trains in this batch, reward.
        start (`float`):
            $\beta_2$ of the first batch.
        rate (`float`, *optional*, defaults to `0.1`):
            $\beta_2$ grows at most by this share of itself in a batch, and shrinks by no more than undoes that.
        bound (`float`, *optional*, defaults to `10.0`):
            It stays between `start / bound` and `start * bound`.

    Returns:
        `float`: `stage1_beta` itself where `kl` or `advantage` is 0, as then there is nothing to balance.

    Example:
    ```python
    >>> balanced_stage1_beta(0.1, kl=4.0, advantage=0.42, start=0.1)  # nearly there: 0.42 / 4
    0.105
    >>> balanced_stage1_beta(0.1, kl=4.0, advantage=0.2, start=0.25, rate=0.25)  # towards 0.05
    0.08
    ```
    """
    if kl <= 0 or advantage <= 0:
        return stage1_beta
    balanced = min(max(advantage / kl, stage1_beta / (1 + rate)), stage1_beta * (1 + rate))
    return min(max(balanced, start / bound), start * bound)


def spread_to_tokens(values: Tensor, attempt_ids: Tensor) -> Tensor:
    """
    Give every token its attempt's value.

    Args:
        values (`torch.Tensor` of shape `(B, K)` or `(K,)`):
            One value per attempt.
        attempt_ids (`torch.Tensor` of shape `(B, T)`):
            Attempt of each token, 0 at instruction and padding.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 at instruction and padding.

    Example:
    ```python
    >>> spread_to_tokens(torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 1, 0, 2, 0]]))
    tensor([[0.5000, 0.5000, 0.0000, 2.0000, 0.0000]])
    ```
    """
    values = values.expand(attempt_ids.size(0), -1)  # (B, K)
    return torch.cat([values.new_zeros(values.size(0), 1), values], dim=1).gather(1, attempt_ids)


def sum_per_attempt(token_values: Tensor, attempt_ids: Tensor, num_attempts: int) -> Tensor:
    """
    Sum each attempt's token values.

    Args:
        token_values (`torch.Tensor` of shape `(B, T)`):
            One value per token; what stands at instruction and padding does not matter.
        attempt_ids (`torch.Tensor` of shape `(B, T)`):
            Attempt of each token, 0 at instruction and padding.
        num_attempts (`int`):
            Attempts in a rollout.

    Returns:
        `torch.Tensor` of shape `(B, K)`.

    Example:
    ```python
    >>> sum_per_attempt(torch.tensor([[1.0, 2.0, 9.0, 4.0]]), torch.tensor([[1, 1, 0, 2]]), num_attempts=2)
    tensor([[3., 4.]])
    ```
    """
    attempts = torch.arange(1, num_attempts + 1, device=attempt_ids.device)
    is_attempt = attempt_ids.unsqueeze(-1) == attempts  # (B, T, K)
    return torch.where(is_attempt, token_values.unsqueeze(-1), 0.0).sum(1)
