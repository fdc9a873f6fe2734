"""One generation of rollouts, from dataset rows to what the loss reads."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .objective import Stage
from .rollout import Rollouts


@dataclass
class Batch:
    """
    The rollouts that are being made, graded and credited. TRL calls the trainer's hooks one after the other and passes none of this
    between them. So the trainer holds the batch, and each hook fills in its part.

    Attributes:
        mode (`str`):
            `"train"` or `"eval"`.
        stage ([`~trl_score.objective.Stage`]):
            The stage that the rollouts are made for. It does not change, however long they are trained on.
        num_attempts (`int`):
            Attempts in a rollout, `K`.
        num_generations (`int`):
            Rollouts of a problem, in consecutive rows.
        instructions (`list[str]`):
            The user's turn between two attempts, for each of the `B` rows of this process.
        stored (`list[list[int] | None]`):
            For each row the tokens of a stored first attempt, which is neither sampled nor trained, or `None`.
        rollouts ([`~trl_score.rollout.Rollouts`]):
            Filled in by generation.
        completions (`list[list]`):
            Filled in by generation: for each attempt, `B` texts or chat messages, as the reward functions see them.
        truncated (`list[list[bool]]`):
            Filled in by generation: [`Batch.find_truncated`].
        trained (`list[list[int]]`):
            Filled in by generation: [`Batch.trained_ids`] of each row.
        attempt (`int`):
            The attempt that is being graded, from 1.
        rewards (`list[torch.Tensor]`):
            Filled in by grading: for each attempt, a tensor of shape `(B of all processes, number of reward functions)`, NaN
            where a function abstained.
    """

    mode: str
    stage: Stage
    num_attempts: int
    num_generations: int
    instructions: list[str]
    stored: list[list[int] | None]
    rollouts: Rollouts | None = None
    completions: list[list] = field(default_factory=list)
    truncated: list[list[bool]] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)
    attempt: int | None = None
    rewards: list[Tensor] = field(default_factory=list)

    def find_truncated(self, eos_token_ids: set[int], limit: int) -> list[list[bool]]:
        """
        Per rollout and attempt, whether it was cut off at `limit` tokens, without an end-of-sequence token. A shorter one that
        lacks the token is stored text, or ended with a stop string.
        """
        return [
            [not ids or (len(ids) >= limit and ids[-1] not in eos_token_ids) for ids in row]
            for row in self.rollouts.attempts
        ]

    def trained_ids(self, mask_truncated: bool) -> list[list[int]]:
        """
        For each token after the prompt its attempt, or 0 if the attempt is not trained. Stored attempts are not trained, nor are
        truncated ones if `mask_truncated`.
        """
        untrained = self.truncated if mask_truncated else [[False] * self.num_attempts for _ in self.stored]
        untrained = [[row[0] or ids is not None, *row[1:]] for row, ids in zip(untrained, self.stored, strict=True)]
        return [
            [0 if k == 0 or row[k - 1] else k for k in ids]
            for ids, row in zip(self.rollouts.attempt_ids, untrained, strict=True)
        ]

    def reward_by_function(self, weights: Tensor) -> Tensor:
        """Weighted reward of each attempt by each reward function: (B of all processes, K, F), NaN where it abstained."""
        rewards = torch.stack(self.rewards, dim=1)
        return rewards * weights.to(rewards.device)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that this process sampled from the policy: no instructions, no stored first attempts."""
        stored = sum(len(ids) for ids in self.stored if ids is not None)
        return sum(len(ids) for row in self.rollouts.attempts for ids in row) - stored
