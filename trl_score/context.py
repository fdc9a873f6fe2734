"""All attempts at a problem fit the model's context: every row of the data is checked at construction, every batch when it is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import is_conversational

from .checks import Rows
from .first_attempts import attempt_tokens
from .rollout import Bridge, check_chat_template


if TYPE_CHECKING:
    from .score_config import SCoReConfig


ROWS_AT_A_TIME = 1000  # prompts tokenized in one call


def context_limit(config: PretrainedConfig, args: SCoReConfig | None = None) -> int | None:
    """Tokens that the model can read, and vLLM if a trainer samples with it; `None` if there is no limit."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None)]
    limits += [args.vllm_max_model_length] if args is not None and args.use_vllm else []
    return min((limit for limit in limits if limit is not None), default=None)


class ContextTooShort(ValueError):
    """Rollouts can become longer than the model's context."""


@dataclass(frozen=True)
class _Rollout:
    """The longest that a rollout can become, in tokens: its prompt, its first attempt, the attempts after it and all bridges."""

    where: str
    prompt: int
    first: int
    others: int
    bridges: int

    @property
    def needed(self) -> int:
        return self.prompt + self.first + self.others + self.bridges


class ContextCheck:
    """
    Refuses rollouts that can become longer than the model's context.

    Args:
        limit (`int`, *optional*):
            Tokens of the model's context; `None` if it has no limit.
        max_completion_length (`int`):
            Tokens of one attempt.
        bridge ([`~trl_score.rollout.Bridge`]):
            Tokens between two attempts.
    """

    def __init__(self, limit: int | None, max_completion_length: int, bridge: Bridge):
        self.limit, self.max_completion_length, self.bridge = limit, max_completion_length, bridge

    def check_batch(
        self,
        prompt_ids: list[list[int]],
        bridge: Callable[[int, int, list[int]], list[int]],
        num_attempts: int,
        stored: list[list[int] | None],
        largest: Callable[[int], int] = int,
    ):
        """
        Check a batch of rollouts.

        Args:
            prompt_ids (`list[list[int]]`):
                Tokens of the `B` prompts.
            bridge (`Callable[[int, int, list[int]], list[int]]`):
                Their bridges: [`~trl_score.rollout.Bridge.by_row`].
            num_attempts (`int`):
                Attempts in a rollout.
            stored (`list[list[int] | None]`):
                `B` stored first attempts, `None` for one that is sampled.
            largest (`Callable[[int], int]`, *optional*):
                The largest of the numbers of all processes: they stop together, so that none waits for one that has stopped. By
                default, a process stops alone.
        """
        if self.limit is None:
            return
        others = (num_attempts - 1) * self.max_completion_length
        rollouts = [
            _Rollout(
                f"row {row} of a batch",
                len(ids),
                self._longest(own),
                others,
                _bridge_tokens(bridge, row, num_attempts),
            )
            for row, (ids, own) in enumerate(zip(prompt_ids, stored, strict=True))
        ]
        longest = max(rollouts, key=lambda rollout: rollout.needed)
        most = largest(longest.needed)
        if most > self.limit:
            where = longest.where if longest.needed == most else "a row of another process"
            self._refuse(replace(longest, where=where), most, num_attempts)

    def _longest(self, stored: list[int] | None) -> int:
        return self.max_completion_length if stored is None else len(stored)

    def check_datasets(self, datasets: dict[str, Rows], args: SCoReConfig, tokenize: Callable):
        """
        Check the rows of all datasets.

        Args:
            datasets (`dict[str, Rows]`):
                Their rows, by their names in errors.
            args ([`SCoReConfig`]):
                Settings.
            tokenize (`Callable[[list], list[list[int]]]`):
                Token ids of a list of prompts.
        """
        for name, rows in datasets.items():
            if name == "train_dataset":
                first = longest_first_attempt(args, self.bridge.tokenizer)
                self.check_rows(name, rows, tokenize, args.correction_instruction, args.num_attempts, first)
            else:
                self.check_rows(name, rows, tokenize, args.correction_instruction, args.num_attempts_eval)

    def check_rows(
        self,
        name: str,
        rows: Rows,
        tokenize: Callable[[list], list[list[int]]],
        instruction: str,
        num_attempts: int,
        first_attempt: Callable[[dict], int] | None = None,
    ):
        """
        Check rows.

        Args:
            name (`str`):
                Name of the dataset in errors.
            rows (`~datasets.Dataset` or `list[dict]`):
                Its rows, or the first rows of a stream.
            tokenize (`Callable`):
                Token ids of a list of prompts.
            instruction (`str`):
                The correction instruction of rows without one.
            num_attempts (`int`):
                Attempts in a rollout.
            first_attempt (`Callable[[dict], int]`, *optional*):
                Tokens that the longest first attempt of a row can have; `max_completion_length` if not given.
        """
        columns = ("prompt", "correction_instruction", "first_attempts")
        if isinstance(rows, list):
            rows = Dataset.from_list([{key: row[key] for key in columns if key in row} for row in rows])
        elif rows.format["type"] != "custom":  # else a transform makes these columns from others
            rows = rows.select_columns([each for each in columns if each in rows.column_names])
        row = rows[0]
        if is_conversational(row):
            check_chat_template(self.bridge.tokenizer)
        self._bridge_tokens_of(row["prompt"], row.get("correction_instruction") or instruction, num_attempts)
        if self.limit is None:
            return
        rollouts = self._rollouts(name, rows, tokenize, instruction, num_attempts, first_attempt)
        too_long = [rollout for rollout in rollouts if rollout.needed > self.limit]
        if too_long:
            longest = max(too_long, key=lambda rollout: rollout.needed)
            more = f" {len(too_long)} rows of `{name}` are too long." if len(too_long) > 1 else ""
            self._refuse(longest, longest.needed, num_attempts, more)

    def longest(self, rows: Dataset, tokenize: Callable, instruction: str, num_attempts: int) -> int:
        """Tokens of the longest rollout that can come up. The arguments are those of [`ContextCheck.check_rows`]."""
        rollouts = self._rollouts("rows", rows, tokenize, instruction, num_attempts)
        return max(rollout.needed for rollout in rollouts)

    def _rollouts(
        self,
        name: str,
        dataset: Dataset,
        tokenize: Callable,
        instruction: str,
        num_attempts: int,
        first_attempt: Callable[[dict], int] | None = None,
    ) -> Iterator[_Rollout]:
        others, between = (num_attempts - 1) * self.max_completion_length, {}
        for index, (row, length) in enumerate(_with_lengths(dataset, tokenize)):
            own = row.get("correction_instruction") or instruction
            # Hardly any template makes the bridges depend on the prompt. Each batch is checked to the token.
            if own not in between:
                between[own] = self._bridge_tokens_of(row["prompt"], own, num_attempts)
            first = self.max_completion_length if first_attempt is None else first_attempt(row)
            yield _Rollout(f"row {index} of `{name}`", length, first, others, between[own])

    def _bridge_tokens_of(self, prompt: str | list[dict], instruction: str, num_attempts: int) -> int:
        return _bridge_tokens(self.bridge.by_row([prompt], lambda attempt: [instruction]), 0, num_attempts)

    def _refuse(self, rollout: _Rollout, needed: int, num_attempts: int, more: str = ""):
        length = self.max_completion_length
        attempts = f"{num_attempts} attempts of up to {length} tokens (`max_completion_length` holds for each)"
        if rollout.first != length:
            attempts = (
                f"a stored first attempt of up to {rollout.first} tokens, {num_attempts - 1} more of up to {length}"
            )
        raise ContextTooShort(
            f"The model's context of {self.limit} tokens is too short: a prompt of {rollout.prompt} tokens ({rollout.where}), "
            f"{attempts} and {rollout.bridges} tokens of correction instructions need {needed}.{more} Lower "
            "`max_completion_length`, shorten the correction instruction, or drop the longest rows."
        )


def _bridge_tokens(bridge: Callable[[int, int, list[int]], list[int]], row: int, num_attempts: int) -> int:
    """Tokens of all bridges of a rollout."""
    return sum(len(bridge(attempt, row, [])) for attempt in range(1, num_attempts))


def _with_lengths(dataset: Dataset, tokenize: Callable) -> Iterator[tuple[dict, int]]:
    """Each row with the number of tokens of its prompt."""
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        rows = list(dataset.select(range(start, min(start + ROWS_AT_A_TIME, len(dataset)))))
        yield from zip(rows, map(len, tokenize([row["prompt"] for row in rows])), strict=True)


def longest_first_attempt(args: SCoReConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], int] | None:
    """How long the first attempts of a row can be: its stored ones, and the sampled ones unless all are stored."""
    if not args.num_offline:
        return None
    sampled = args.max_completion_length if args.num_offline < args.num_generations else 0
    return lambda row: max(sampled, *(len(attempt_tokens(attempt, tokenizer)) for attempt in row["first_attempts"]))
