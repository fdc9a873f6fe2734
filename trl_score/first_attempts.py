"""First attempts that are not sampled from the policy but taken from the dataset (Section 5.3)."""

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .score_config import SCoReConfig


Sampled = tuple[list[list[int]], list[list[float]] | None]


def is_stored(index: int, args: SCoReConfig) -> bool:
    """Whether the rollout at an index of the batch of all processes has a stored first attempt."""
    return index % args.num_generations >= args.num_generations - args.num_offline


def most_sampled(rows: int, num_processes: int, args: SCoReConfig) -> int:
    """
    Number of first attempts that each process samples, with `rows` rows on each: as many as the process that needs most. Generation
    can be collective, so all processes have to take part in it.
    """
    starts = range(0, num_processes * rows, rows)
    return max(sum(not is_stored(start + i, args) for i in range(rows)) for start in starts)


def attempt_tokens(attempt: str | list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a stored attempt, which is a text or token ids."""
    is_text = isinstance(attempt, str)
    return tokenizer(text=attempt, add_special_tokens=False)["input_ids"] if is_text else list(attempt)


def stored_attempts(
    rows: list[dict], start: int, args: SCoReConfig, step: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | None]:
    """
    Draw the stored first attempts of a batch. The rollouts of a problem get different ones as long as there are enough. The draw is
    the same on all processes and after a resume.

    Args:
        rows (`list[dict]`):
            The `B` rows of this process.
        start (`int`):
            Index of the first row in the batch of all processes.
        args ([`SCoReConfig`]):
            Settings.
        step (`int`):
            Optimizer step, part of the seed of the draw.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.

    Returns:
        `list[list[int] | None]`: for each row the token ids of its stored first attempt, or `None` if the policy samples it.
    """
    stored = []
    for index, row in enumerate(rows, start=start):
        ids = None
        if is_stored(index, args):
            order = list(range(len(row["first_attempts"])))
            random.Random(f"{args.seed} {step} {row['prompt']}").shuffle(order)
            rank = index % args.num_generations - (args.num_generations - args.num_offline)
            ids = attempt_tokens(row["first_attempts"][order[rank % len(order)]], tokenizer)
        stored.append(ids)
    return stored


def sample_or_take(
    contexts: list[list[int]],
    stored: list[list[int] | None],
    sample: Callable[[list[list[int]], int], Sampled],
    num_sampled: int,
) -> Sampled:
    """
    First attempts of this process.

    Args:
        contexts (`list[list[int]]`):
            Token ids of `B` prompts.
        stored (`list[list[int] | None]`):
            For each row its stored first attempt, `None` for one to be sampled.
        sample (`Callable[[list[list[int]], int], Sampled]`):
            From contexts and the number of attempts at each to token ids, and their log-probabilities or `None`.
        num_sampled (`int`):
            Attempts to sample, at least one for each row without a stored attempt ([`most_sampled`]). Attempts beyond that are
            dropped.

    Returns:
        `tuple[list[list[int]], list[list[float]] | None]`: token ids of `B` attempts and their log-probabilities, 0.0 for
        stored ones.
    """
    attempts = list(stored)
    logprobs = [[0.0] * len(ids or []) for ids in attempts]
    online = [i for i, ids in enumerate(attempts) if ids is None]
    values = None
    if num_sampled:
        sampled, values = sample([contexts[i] for i in online + [0] * (num_sampled - len(online))], 1)
        for position, i in enumerate(online):
            attempts[i] = sampled[position]
            logprobs[i] = values[position] if values is not None else []
    return attempts, logprobs if values is not None else None
