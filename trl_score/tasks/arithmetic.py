"""
The embedded task: sums that are easy to check and hard to guess. It needs no download and no GPU.

A problem is six digits `d1 .. d6`. Its answer is the line of seven running values `s0 .. s6` with `s_i = s_{i-1} - d_i`
(mod 10) that lands on zero: `s6 = 0`. The start `s0` is the digits' sum mod 10 and has to be written first, before any
of the steps that would produce it, which a two-layer model does badly; the steps after it are easy. A wrong start makes
an attempt that ends in `s6 != 0`: the error stands in the attempt's own text, and says by how much to move the start.
So an attempt can be corrected by reading it, without an oracle.

>>> answer("3 0 5 0 9 1")
'8 5 5 0 0 1 0'
"""

import random
from pathlib import Path

from datasets import Dataset

from .base import Task


NUM_DIGITS = 6
ZERO_PROBABILITY = 0.4  # each digit is set to 0 with this probability: sums of fewer digits are easier to guess
MAX_COMPLETION_LENGTH = NUM_DIGITS + 2  # tokens of one attempt: seven values and the end of the turn

BASE_MODEL_PATH = Path(__file__).parent / "arithmetic_base"
"""The tiny base model, made by the `make.py` that lies beside it."""

USER, ASSISTANT, END, PAD, UNKNOWN = "<user>", "<assistant>", "<end>", "<pad>", "<unk>"
HINT = "wrong check again"  # said in the base model's training data only; it does reveal that the attempt was wrong

SPLITS = {"test": [0], "train": [1], "pretrain": [2, 3, 4, 5, 6, 7, 8, 9]}  # buckets of each


def answer(digits: str) -> str:
    """The line of running values for a problem, both as digits with spaces between them."""
    steps = [int(digit) for digit in digits.split()]
    values = [sum(steps) % 10]
    for step in steps:
        values.append((values[-1] - step) % 10)
    return " ".join(map(str, values))


def bucket_of(key):
    """A hash from 0 to 9 of a problem's digits read as one number (an `int` or a tensor of them)."""
    return (key * 2654435761 % 2**32 >> 16) % 10


def split_of(digits: str) -> str:
    """The split a problem belongs to, by a hash of the problem: no problem is in two splits."""
    bucket = bucket_of(int(digits.replace(" ", "")))
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def problems(split: str, num_problems: int, seed: int = 0) -> list[str]:
    """`num_problems` different problems of a split, always the same ones for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, None] = {}
    while len(found) < num_problems:
        digits = [0 if rng.random() < ZERO_PROBABILITY else rng.randrange(10) for _ in range(NUM_DIGITS)]
        problem = " ".join(map(str, digits))
        if split_of(problem) == split:
            found[problem] = None
    return list(found)


class Arithmetic(Task):
    """
    The embedded task.

    Args:
        num_train (`int`, *optional*, defaults to `500`):
            Number of training problems.
        num_test (`int`, *optional*, defaults to `1000`):
            Number of held-out problems. None of them is in the training split or in the base model's own data.
    """

    name = "arithmetic"
    correction_instruction = "please check again"
    feedback_instruction = "please check"  # the tiny model has no other words for it
    refine_instruction = correction_instruction

    def __init__(self, num_train: int = 500, num_test: int = 1000):
        self.sizes = {"train": num_train, "test": num_test}

    def load(self, split: str) -> Dataset:
        """Rows `{prompt, answer}`; see [`Task.load`]."""
        if split not in self.sizes:
            raise ValueError(f"Unknown split {split!r} of 'arithmetic'. Expected one of: {sorted(self.sizes)}.")
        rows = problems(split, self.sizes[split])
        return Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": row}] for row in rows],
                "answer": [answer(row) for row in rows],
            }
        )

    def reward(self, completions: list, answer: list[str], **kwargs) -> list[float]:
        """1.0 if the whole line is right; see [`Task.reward`]."""
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        return [float(text.split() == gold.split()) for text, gold in zip(texts, answer, strict=True)]
