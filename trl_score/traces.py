"""
What STaR and Pair-SFT learn from (Section 4), in tokens: STaR from rollouts that turned wrong into right (Zelikman et al., 2022),
Pair-SFT from wrong and right attempts that are paired afterwards (Welleck et al., 2023).

A trace is a problem's prompt, its attempts in tokens, and which of the attempts to learn. The others are context.
"""

import random
from collections import defaultdict

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .rollout import Bridge, Rollouts, tokenize_prompt


def trace(row: dict, kind: str, attempts: list[list[int]], learn: list[bool]) -> dict:
    return {"index": row["index"], "kind": kind, "prompt": row["prompt"], "attempts": attempts, "learn": learn}


def by_problem(rollouts: list[dict]) -> list[list[dict]]:
    """The rollouts of each problem whose attempts could all be graded."""
    problems = defaultdict(list)
    for row in rollouts:
        if None in row["token_ids"]:
            raise ValueError(
                "The rollouts have no tokens, as a chat endpoint does not give them. Collect them with the backend "
                "'transformers' or 'vllm'."
            )
        if None not in row["correct"]:
            problems[row["index"]].append(row)
    return [problems[index] for index in sorted(problems)]


def star_traces(
    rollouts: list[dict], *, plus: bool = False, learn: str = "right", max_per_problem: int | None = None
) -> Dataset:
    r"""
    The traces of STaR: rollouts with a wrong first and a right second attempt ($D$). With `plus` also rollouts with two right
    attempts ($D^+$).

    Args:
        rollouts (`list[dict]`):
            Rollouts of two attempts, from [`~trl_score.collection.collect`].
        plus (`bool`, *optional*, defaults to `False`):
            Whether to keep c→c rollouts as well as i→c rollouts.
        learn (`str`, *optional*, defaults to `"right"`):
            Attempts to learn: every right attempt (`"right"`), so that a wrong attempt is only context, or only the second attempt
            (`"last"`).
        max_per_problem (`int`, *optional*):
            Maximum number of traces of each kind for a problem. The first traces are kept.

    Returns:
        [`~datasets.Dataset`] with the columns `index` (of the problem), `kind` (`"i_to_c"` or `"c_to_c"`), `prompt`,
        `attempts` (token ids of each), `learn` (whether to learn each).

    Raises:
        `ValueError`: If no rollout can be kept.
    """
    traces = []
    for rows in by_problem(rollouts):
        kinds = {"i_to_c": [False, True]} | ({"c_to_c": [True, True]} if plus else {})
        for kind, verdicts in kinds.items():
            kept = [row for row in rows if row["correct"] == verdicts][:max_per_problem]
            traces += [trace(row, kind, row["token_ids"], learnt(verdicts, learn)) for row in kept]
    return as_dataset(traces, len(rollouts), "turned a wrong attempt into a right one")


def pair_traces(
    rollouts: list[dict],
    *,
    plus: bool = False,
    learn: str = "right",
    max_per_problem: int | None = None,
    seed: int = 42,
) -> Dataset:
    r"""
    The traces of Pair-SFT: pairs of a wrong and a right first attempt at the same problem, which were sampled independently ($D$).
    With `plus` also pairs of two right attempts ($D^+$). Attempts are paired at random. In the pairs of one kind each attempt is
    used once.

    Args:
        rollouts (`list[dict]`):
            Rollouts from [`~trl_score.collection.collect`]. Only their first attempts are used.
        plus, learn, max_per_problem:
            As for [`star_traces`].
        seed (`int`, *optional*, defaults to `42`):
            Seed of the pairing.

    Returns:
        [`~datasets.Dataset`], as of [`star_traces`].

    Raises:
        `ValueError`: If no problem has a wrong and a right attempt.
    """
    rng, traces = random.Random(seed), []
    for rows in by_problem(rollouts):
        wrong = [row["token_ids"][0] for row in rows if not row["correct"][0]]
        right = [row["token_ids"][0] for row in rows if row["correct"][0]]
        rng.shuffle(wrong)
        rng.shuffle(right)
        pairs = {"i_to_c": (list(zip(wrong, right, strict=False)), [False, True])}
        if plus:
            pairs["c_to_c"] = (list(zip(right[::2], right[1::2], strict=False)), [True, True])
        for kind, (found, verdicts) in pairs.items():
            traces += [trace(rows[0], kind, list(pair), learnt(verdicts, learn)) for pair in found[:max_per_problem]]
    return as_dataset(traces, len(rollouts), "was right where another one at the same problem was wrong")


def learnt(verdicts: list[bool], learn: str) -> list[bool]:
    if learn not in ("right", "last"):
        raise ValueError(f"Unknown `learn={learn!r}`. Expected 'right' (every right attempt) or 'last' (the second).")
    return [right and (learn == "right" or k == len(verdicts) - 1) for k, right in enumerate(verdicts)]


def as_dataset(traces: list[dict], number: int, what: str) -> Dataset:
    if not traces:
        raise ValueError(
            f"There is nothing to learn from: of {number} rollouts none {what}. Sample more (`num_samples`), at a higher "
            "temperature, or take easier problems."
        )
    return Dataset.from_list(traces)


def tokenized(
    traces: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    correction_instruction: str,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """
    Traces in the form that `SFTTrainer` takes: the tokens of [`~trl_score.rollout`], with the loss only on the attempts to learn.

    Args:
        traces ([`~datasets.Dataset`]):
            Traces from [`star_traces`] or [`pair_traces`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that the attempts were sampled with.
        correction_instruction (`str`):
            The user's turn between the attempts.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template, as for the sampling.

    Returns:
        [`~datasets.Dataset`] with the columns `input_ids` and `labels` (-100 where there is no loss).
    """
    bridge = Bridge(tokenizer, chat_template_kwargs)

    def convert(rows: dict) -> dict:
        prompts, attempts = rows["prompt"], rows["attempts"]
        between = []
        for k in range(1, len(attempts[0])):
            instructions = [correction_instruction] * len(prompts)
            between.append(bridge(prompts, instructions, k, [row[k - 1] for row in attempts]))
        rollouts = Rollouts(
            [tokenize_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts],
            attempts,
            [list(row) for row in zip(*between, strict=True)],
        )
        result = {"input_ids": [], "labels": []}
        for prompt, completion, owners, learn in zip(
            rollouts.prompt_ids, rollouts.completion_ids, rollouts.attempt_ids, rows["learn"], strict=True
        ):
            labels = [token if k and learn[k - 1] else -100 for token, k in zip(completion, owners, strict=True)]
            result["input_ids"].append(prompt + completion)
            result["labels"].append([-100] * len(prompt) + labels)
        return result

    return traces.map(convert, batched=True, remove_columns=traces.column_names)
