r"""
The mathematics of SCoRe: Eqs. 1-4 and the bonus of Section 5.2 of [Training Language Models to Self-Correct via
Reinforcement Learning](https://huggingface.co/papers/2409.12917), tensors in, tensors out.

Shapes: `B` rollouts, `K` attempts in each, `T` tokens after the prompt. Attempts are numbered from 1, and column
`k - 1` of a `(B, K)` tensor belongs to attempt `k`. One integer tensor `attempt_ids` of shape `(B, T)` says which
tokens are whose: `k` at the tokens of attempt `k`, 0 at instruction and padding.

The loss that `SCoReTrainer` minimizes is, with these functions' results spread over the tokens,

$$- \sum_k A_k \log \pi(y_k \mid x_k) + \sum_k w_k \, \mathrm{KL}(\pi(\cdot \mid x_k) \,\|\, \pi_\mathrm{ref}(\cdot \mid x_k))$$

with $A$ and $w$ from [`targets`]: the [`leave_one_out_advantages`] of the [`shaped_rewards`], and the [`kl_weights`]. With a
sequence-level KL the second term is part of $A$.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Stage:
    r"""
    The objective of an optimizer step: which attempts are rewarded, and which are held to the reference model.

    | | credited | held |
    |---|---|---|
    | Stage I of two attempts (Eq. 3) | 2 | 1 |
    | Stage I(b) of three attempts (Appendix A.1) | 3 | 1, 2 |
    | Stage II (Eq. 4 with the bonus) | all | none |

    Attributes:
        number (`int`):
            1 or 2, as logged.
        credited (`tuple[int, ...]`):
            Attempts whose reward is credited, from 1. An attempt whose predecessor is credited too gets the bonus.
        held (`tuple[int, ...]`):
            Attempts on which $\beta_2$ is added to the weight of the KL penalty.

    Raises:
        `ValueError`: if no attempt is credited, or attempts are not numbered from 1.
    """

    number: int
    credited: tuple[int, ...]
    held: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.credited or min((*self.credited, *self.held)) < 1:
            raise ValueError(
                f"`credited={self.credited}` and `held={self.held}` are attempts, numbered from 1. Credit at least one."
            )


def stage_one(target: int) -> Stage:
    """Stage I that trains attempt `target`, 2 or higher, and holds all earlier attempts (Eq. 3, Appendix A.1)."""
    return Stage(1, (target,), tuple(range(1, target)))


def stage_two(num_attempts: int) -> Stage:
    """Stage II: all attempts are credited, none is held (Eq. 4)."""
    return Stage(2, tuple(range(1, num_attempts + 1)))


def two_stages(step: int, max_steps: int, *, stage1_steps: float, num_attempts: int) -> Stage:
    """
    The paper's schedule: Stage I, which trains the attempts 2 .. N in turn and in equal shares of its steps (Appendix A.1),
    then Stage II.

    Args:
        step (`int`):
            Optimizer steps done so far.
        max_steps (`int`):
            Optimizer steps of the whole run.
        stage1_steps (`float`):
            Optimizer steps of Stage I, or their share of `max_steps` if below 1.
        num_attempts (`int`):
            Attempts in a rollout.

    Example:
    ```python
    >>> [two_stages(step, 6, stage1_steps=4, num_attempts=3).credited for step in range(5)]
    [(2,), (2,), (3,), (3,), (1, 2, 3)]
    ```
    """
    stage1_steps = resolve_stage1_steps(stage1_steps, max_steps)
    if step >= stage1_steps:
        return stage_two(num_attempts)
    return stage_one(2 + step * (num_attempts - 1) // stage1_steps)


def shaped_rewards(rewards: Tensor, stage: Stage, *, alpha: float, gamma: float = 0.0) -> Tensor:
    r"""
    Reward credited to the tokens of each attempt. An attempt that the stage credits gets its reward. If the stage credits the
    previous attempt too, it also gets the bonus $\alpha (\hat r(y_k) - \hat r(y_{k-1}))$ (Section 5.2). So Stage I credits the
    attempt that it trains (Eq. 3), and Stage II credits all attempts, each but the first with the bonus (Eq. 4).

    Args:
        rewards (`torch.Tensor` of shape `(B, K)` or `(B, K, F)`):
            Reward of each attempt, by each of `F` reward functions; NaN where a function could not score the attempt.
        stage ([`Stage`]):
            The stage says which attempts are credited. Attempts beyond `K` are ignored: an evaluation can have fewer attempts.
        alpha (`float`):
            Bonus weight, no unit. The paper uses 10.
        gamma (`float`, *optional*, defaults to `0.0`):
            Discount between attempts, in [0, 1]. Above 0 an attempt is also credited with the credits of later attempts. The
            paper uses 0: instantaneous rewards keep training from collapsing to no correction (Appendix A.4).

    Returns:
        `torch.Tensor` of the shape of `rewards`: NaN where the function did not score the attempt, or another attempt that
        the credit depends on.

    Example:
    ```python
    >>> shaped_rewards(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), stage_two(2), alpha=10.0)  # i→c, c→i
    tensor([[  0.,  11.],
            [  1., -10.]])
    ```
    """
    credit = torch.zeros_like(rewards)
    for k in (k for k in stage.credited if k <= rewards.size(1)):
        credit[:, k - 1] = rewards[:, k - 1]
        if alpha != 0 and k - 1 in stage.credited:  # without a bonus, an unscored attempt leaves the next one scored
            credit[:, k - 1] += alpha * (rewards[:, k - 1] - rewards[:, k - 2])
    if gamma != 0:
        for k in range(rewards.size(1) - 2, -1, -1):
            credit[:, k] += gamma * credit[:, k + 1]
    return credit


def kl_weights(stage: Stage, *, beta: float, stage1_beta: float, num_attempts: int) -> Tensor:
    r"""
    Weight of the KL penalty on the tokens of each attempt: $\beta_1$ on all of them in both stages (Eqs. 2 and 4), and
    $\beta_2$ added on the attempts that the stage holds to the reference model (Eq. 3).

    Args:
        stage ([`Stage`]):
            The stage says which attempts are held.
        beta (`float`):
            $\beta_1$, reward per nat. The paper uses 0.01.
        stage1_beta (`float`):
            $\beta_2$, reward per nat. The paper uses 0.1 for MATH and 0.25 for MBPP.
        num_attempts (`int`):
            Attempts in a rollout, `K`.

    Returns:
        `torch.Tensor` of shape `(K,)`.

    Example:
    ```python
    >>> kl_weights(stage_one(2), beta=0.01, stage1_beta=0.1, num_attempts=2)
    tensor([0.1100, 0.0100])
    ```
    """
    return torch.tensor([beta + stage1_beta * (k in stage.held) for k in range(1, num_attempts + 1)])


def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    r"""
    Each attempt's credit minus the mean credit of the same attempt in the other rollouts of its problem (RLOO, [Ahmadian
    et al., 2024](https://huggingface.co/papers/2402.14740), the estimator of Section 3). The baseline does not depend on
    the rollout it is subtracted from, so the gradient stays unbiased.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)` or `(B, K, F)`):
            Credit of each attempt, the rollouts of a problem in consecutive rows; NaN where there is none.
        num_generations (`int`):
            Rollouts per problem.

    Returns:
        `torch.Tensor` of the shape of `rewards`: 0 where the credit is NaN, and where no other rollout of the problem has
        one (so also everywhere for `num_generations=1`). NaN credits are left out of the baselines.

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
    groups = rewards.unflatten(0, (-1, num_generations))  # (B / G, G, K) or (B / G, G, K, F)
    scored = ~groups.isnan()
    credit = groups.nan_to_num(0.0)
    others = scored.sum(1, keepdim=True) - 1  # right where the rollout itself is scored
    baseline = (credit.sum(1, keepdim=True) - credit) / others.clamp(min=1)
    return torch.where(scored & (others > 0), credit - baseline, 0.0).flatten(0, 1)


def targets(
    rewards: Tensor,
    stage: Stage,
    *,
    num_generations: int,
    alpha: float,
    beta: float,
    stage1_beta: float,
    gamma: float = 0.0,
    log_ratio: Tensor | None = None,
    stored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    The advantage $A$ of each attempt and the weight $w$ of its KL penalty, which the loss reads. The trainer and the proof by
    enumeration both call this composition of [`shaped_rewards`], [`leave_one_out_advantages`] and [`kl_weights`].

    Each reward function is shaped and compared on its own, and the advantages are added. So a function that abstains on an attempt
    never makes the bonus or the baseline compare sums of different functions.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)` or `(B, K, F)`):
            Reward of each attempt, the rollouts of a problem in consecutive rows; with `F` reward functions, the weighted
            reward of each. NaN where a function could not score the attempt.
        stage ([`Stage`]):
            The stage that the rollouts are made for.
        num_generations (`int`):
            Rollouts per problem.
        alpha, gamma (`float`):
            See [`shaped_rewards`].
        beta, stage1_beta (`float`):
            See [`kl_weights`].
        log_ratio (`torch.Tensor` of shape `(B, K)`, *optional*):
            Log-ratio of each attempt to the reference model, nats. If given, the KL penalty is part of the credit (Eq. 2 to
            the letter, as in RLOO) and not of the loss.
        stored (`torch.Tensor` of shape `(B,)`, *optional*):
            Whether the first attempt is a stored one (Section 5.3). It is not trained, and not in the baseline of others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: $A$ of shape `(B, K)` and $w$ of shape `(K,)`.

    Example:
    ```python
    >>> rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]])  # i→c, c→c
    >>> advantages, weights = targets(rewards, stage_two(2), num_generations=2, alpha=10.0, beta=0.01, stage1_beta=0.1)
    >>> advantages
    tensor([[ -1.,  10.],
            [  1., -10.]])
    ```
    """
    weights = kl_weights(stage, beta=beta, stage1_beta=stage1_beta, num_attempts=rewards.size(1)).to(rewards.device)
    credit = shaped_rewards(rewards if rewards.dim() == 3 else rewards.unsqueeze(-1), stage, alpha=alpha, gamma=gamma)
    if log_ratio is not None:
        penalty = -weights * log_ratio  # (B, K), discounted like a reward
        everything = Stage(stage.number, tuple(range(1, rewards.size(1) + 1)), ())
        penalty = shaped_rewards(penalty, everything, alpha=0.0, gamma=gamma)
        credit = torch.cat([credit, penalty.unsqueeze(-1).to(credit)], dim=-1)
        weights = torch.zeros_like(weights)
    if stored is not None:
        credit[stored, 0] = torch.nan
    return leave_one_out_advantages(credit, num_generations).sum(-1), weights


def balanced_stage1_beta(
    stage1_beta: float, *, kl: float, advantage: float, start: float, rate: float = 0.1, bound: float = 10.0
) -> float:
    r"""
    $\beta_2$ for the next batch of Stage I. It keeps the two terms of Eq. 3 equally large: $\beta_2$ times the KL of the held
    attempts, and the mean absolute advantage of the trained attempt. In each batch $\beta_2$ moves by a bounded factor towards the
    value at which both are equal, and remains within bounds. The paper has an adaptive $\beta_2$ (Section 5.3) but gives no formula.
    This formula is ours.

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
            $\beta_2$ is multiplied or divided by at most `1 + rate` in a batch.
        bound (`float`, *optional*, defaults to `10.0`):
            $\beta_2$ stays between `start / bound` and `start * bound`.

    Returns:
        `float`: $\beta_2$; `stage1_beta` unchanged if `kl` or `advantage` is 0, as there is nothing to balance.

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
    Give every token the value of its attempt.

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
            One value per token. Values at instruction and padding are ignored.
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


def importance_ratios(
    log_ratio: Tensor,
    attempt_ids: Tensor,
    num_attempts: int,
    *,
    low: float | None,
    high: float | None,
    is_masked: bool,
) -> Tensor:
    """
    Importance ratio of each attempt as a whole, between the policy as it is trained and as vLLM sampled it. TRL has one such
    ratio for a row, which would be a product over all attempts.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`):
            Log-ratio of each token, nats.
        attempt_ids (`torch.Tensor` of shape `(B, T)`):
            Attempt of each token, 0 at instruction and padding.
        num_attempts (`int`):
            Attempts in a rollout.
        low, high (`float`, *optional*):
            Bounds of the ratio; `None` for no bound.
        is_masked (`bool`):
            Whether a ratio outside of the bounds becomes 0 instead of the bound.

    Returns:
        `torch.Tensor` of shape `(B, T)`: for each token the ratio of its attempt, 0 at instruction and padding.

    Example:
    ```python
    >>> log_ratio, ids = torch.tensor([[0.1, 0.1, 5.0, 2.0]]), torch.tensor([[1, 1, 0, 2]])
    >>> importance_ratios(log_ratio, ids, 2, low=None, high=3.0, is_masked=False)
    tensor([[1.2214, 1.2214, 0.0000, 3.0000]])
    ```
    """
    ratio = sum_per_attempt(log_ratio, attempt_ids, num_attempts).exp()  # (B, K)
    bounded = ratio if low is None and high is None else ratio.clamp(low, high)
    if is_masked:
        bounded = torch.where(ratio == bounded, ratio, 0.0)
    return spread_to_tokens(bounded, attempt_ids)
