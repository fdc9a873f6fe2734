"""
The metrics that the trainer logs of its rollouts (docs/metrics.md lists them): one value for each rollout, and the KL of each attempt.
A logged metric is the mean of its values, so a smaller last batch does not count more than its rollouts.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .batch import Batch
from .metrics import attempt_changes, self_correction_values
from .objective import sum_per_attempt


TOKENS = (
    "/tokens"  # behind the name of a metric that is a sum of each batch: the tokens that it is divided by in the end
)


def rollout_values(
    batch: Batch, rewards: Tensor, counted: Tensor, gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """
    The metrics of a batch, by their names in the logs.

    Args:
        batch ([`~trl_score.batch.Batch`]):
            Generated and graded.
        rewards (`torch.Tensor` of shape `(B of all processes, K, F)`):
            Weighted reward of each attempt by each reward function, NaN where the function abstained.
        counted (`torch.Tensor` of shape `(B of all processes,)`):
            Whether a rollout is counted.
        gather (`Callable[[torch.Tensor], torch.Tensor]`):
            Function from a tensor of the rows of this process to one of the rows of all processes.

    Returns:
        `dict[str, torch.Tensor]`: for each metric the values of the counted rollouts, of shape `(n,)`. Rollouts in which an attempt
        could not be graded have no value of the metrics that compare it.
    """
    attempts = range(1, batch.num_attempts + 1)
    first_function = torch.stack(batch.rewards, dim=1)[counted, :, 0]  # an attempt is right if it gives 1
    correct = torch.where(first_function.isnan(), first_function, (first_function >= 1).float())
    values = self_correction_values(correct)
    abstained = rewards.isnan()
    total = total_rewards(rewards)
    values |= {f"reward_t{k}": total[counted, k - 1] for k in attempts}
    own = {}  # of the rows of this process
    truncated = zip(*batch.truncated, strict=True)
    own |= {f"completions/clipped_ratio_t{k}": each for k, each in enumerate(truncated, start=1)}
    lengths = zip(*([len(ids) for ids in row] for row in batch.rollouts.attempts), strict=True)
    own |= {f"completions/mean_length_t{k}": each for k, each in enumerate(lengths, start=1)}
    if batch.num_attempts > 1:
        distances = attempt_changes(batch.rollouts.attempts)  # (B of this process, K - 1)
        for name, changes in (("edit_distance_ratio", distances), ("changed_ratio", (distances > 0).float())):
            own[name] = changes.mean(1)
            if batch.num_attempts > 2:
                own |= {f"{name}_t{k}_t{k + 1}": each for k, each in enumerate(changes.T, start=1)}
        differ = (abstained[:, 1:] != abstained[:, :-1]).any(-1).any(-1)
        values["bonus_abstained_ratio"] = differ[counted].float()
    columns = torch.stack([torch.as_tensor(each).float() for each in own.values()], dim=1).to(rewards.device)
    return values | dict(zip(own, gather(columns)[counted].T, strict=True))


def total_rewards(rewards: Tensor) -> Tensor:
    """
    Sum over reward functions.

    Args:
        rewards (`torch.Tensor` of shape `(B, K, F)`):
            NaN where a function abstained.

    Returns:
        `torch.Tensor` of shape `(B, K)`: NaN where all functions abstained.
    """
    return torch.where(rewards.isnan().all(-1), torch.nan, rewards.nansum(-1))


def empty_table(logs: dict) -> dict:
    """A table of completions with TRL's columns and room for the rows of a whole evaluation."""
    return {name: deque() if isinstance(column, deque) else defaultdict(deque) for name, column in logs.items()}


def fill_table(logs: dict, rewards: Tensor, advantages: Tensor):
    """
    Write the rewards and advantages of each attempt into TRL's table of completions, which has TRL's own advantages of the last
    attempt.

    Args:
        logs (`dict`):
            TRL's columns of the table.
        rewards (`torch.Tensor` of shape `(B, K, F)`):
            Weighted reward of each attempt by each reward function.
        advantages (`torch.Tensor` of shape `(B, K)`):
            Advantage of each attempt.
    """
    for _ in range(min(len(advantages), len(logs["advantages"]))):
        logs["advantages"].pop()
    logs["advantages"].extend(advantages[:, -1].tolist())
    columns = {"reward": total_rewards(rewards), "advantage": advantages}
    for name, values in columns.items():
        for k, each in enumerate(values.T.tolist(), start=1):
            logs["extra"][f"{name}/attempt_{k}"].extend(each)


def kl_sums(kl: Tensor, attempt_ids: Tensor, num_attempts: int) -> Tensor:
    """
    The KL of each attempt.

    Args:
        kl (`torch.Tensor` of shape `(B, T)`):
            KL of each token to the reference model, nats.
        attempt_ids (`torch.Tensor` of shape `(B, T)`):
            Attempt of each token, 0 at a token that is not counted.
        num_attempts (`int`):
            Attempts in a rollout.

    Returns:
        `torch.Tensor` of shape `(2, K)`: the sums over tokens, and the numbers of tokens.
    """
    return torch.stack([
        sum_per_attempt(each, attempt_ids, num_attempts).sum(0) for each in (kl, torch.ones_like(kl))
    ])  # fmt: skip


def means(metrics: Mapping[str, list[float]]) -> dict[str, float | None]:
    """
    The metrics of a whole evaluation, or of the steps since the last log.

    Args:
        metrics (`Mapping[str, list[float]]`):
            The values of each metric; for one with a second list under its name and [`TOKENS`], sums over the tokens of each
            batch, and the numbers of tokens.

    Returns:
        `dict[str, float | None]`: means over all values that are numbers, or over all tokens. `None` if there is no value.
    """
    found = {}
    for name, values in metrics.items():
        valid = [value for value in values if not math.isnan(value)]
        if name + TOKENS in metrics:
            tokens = sum(metrics[name + TOKENS])
            found[name] = sum(valid) / tokens if tokens else None
        elif not name.endswith(TOKENS):
            found[name] = sum(valid) / len(valid) if valid else None
    return found
