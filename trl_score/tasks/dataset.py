"""Problems of any dataset, graded by reward functions, as TRL's own scripts take them."""

import asyncio
import re
import threading
from collections.abc import Callable
from functools import cache, cached_property, wraps
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..worker_pool import CAN_SEND_DESCRIPTORS
from .base import Task, check_keywords, first_line
from .math import CORRECTION_INSTRUCTION, MathTask
from .math_grading.reading import read


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
# How `load_dataset` names the kind of a file.
FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class DatasetTask(Task):
    """
    A dataset as a task. A column `prompt` holds the problems (chat messages or text); without one, `problem` or `question`
    becomes the user's message. The other columns are given to the reward functions; `answer` is renamed to `solution` if there
    is no such column, which is the name that TRL's functions read.

    Args:
        dataset_name (`str`):
            Hub id, folder, or a file (JSON lines, CSV or Parquet; also with `.gz`), which is the split `train`.
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        reward_funcs (`list[str]`, *optional*, defaults to `["accuracy_reward"]`):
            Reward functions: names of TRL's (`accuracy_reward`, which compares mathematics with the column `solution`;
            `reasoning_accuracy_reward`, `think_format_reward`), or functions of one's own, as `PACKAGE.MODULE.FUNCTION` or
            `FILE.py:FUNCTION`. The first one grades: an attempt is right if it gives 1 or more. In training, the rewards are added.
        splits (`dict[str, str]`, *optional*):
            Names of the dataset's splits for `train` and `test`, where they have others.

    Raises:
        `ValueError`: If there is no such reward function.
    """

    correction_instruction = CORRECTION_INSTRUCTION

    def __init__(
        self,
        dataset_name: str,
        dataset_config: str | None = None,
        reward_funcs: list[str] | None = None,
        splits: dict[str, str] | None = None,
    ):
        self.name, self.config, self.splits = dataset_name, dataset_config, splits or {}
        self.reads_mathematics = (reward_funcs or TRL_REWARDS)[0] == "accuracy_reward"
        self.reward_funcs = [reward_function(name) for name in reward_funcs or TRL_REWARDS[:1]]
        self._rows: DatasetDict | None = None

    def load(self, split: str) -> Dataset:
        """
        Rows of a split; see [`Task.load`].

        Raises:
            `OSError`: If the dataset cannot be loaded.
            `ValueError`: If it has no such split, no column with the problems, or a column with the name of another argument of
                reward functions.
        """
        rows, split = self._load(), self.splits.get(split, split)
        if split not in rows:
            raise ValueError(
                f"The dataset '{self.name}' has no split '{split}', only {sorted(rows)}. Give one of these."
            )
        rows = rows[split]
        check_keywords(f"The dataset '{self.name}'", rows.column_names)
        problem = next((column for column in ("problem", "question") if column in rows.column_names), None)
        if "prompt" not in rows.column_names:
            if problem is None:
                raise ValueError(
                    f"The dataset '{self.name}' has no column `prompt`, `problem` or `question`, only {sorted(rows.column_names)}. "
                    "Rename the column that holds the problems."
                )
            rows = rows.map(
                lambda row: {"prompt": [{"role": "user", "content": row[problem]}]}, remove_columns=problem
            )
        if "solution" not in rows.column_names and "answer" in rows.column_names:
            rows = rows.rename_column("answer", "solution")
        if self.reads_mathematics and "solution" not in rows.column_names:
            raise ValueError(
                f"The dataset '{self.name}' has no column `solution` or `answer` for `accuracy_reward` to compare with, only "
                f"{sorted(rows.column_names)}. Rename the column that holds the answers, or give `reward_funcs` that do not need it."
            )
        return rows

    def has(self, split: str) -> bool:
        """Whether the dataset has a split."""
        return self.splits.get(split, split) in self._load()

    def _load(self) -> DatasetDict:
        if self._rows is None:
            try:
                if (kind := FILES.get(Path(self.name.removesuffix(".gz")).suffix)) is not None:
                    self._rows = load_dataset(kind, data_files={"train": self.name})
                else:
                    self._rows = load_dataset(self.name, name=self.config)
            except Exception as error:  # of whatever kind: what failed is said in one line
                if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
                    error = error.__cause__  # it says that it failed, and its cause says why
                raise OSError(f"The dataset '{self.name}' cannot be loaded: {first_line(error)}") from error
        return self._rows

    def reward(self, completions: list, **kwargs) -> list[float | None]:
        """
        What the first reward function gives; see [`Task.reward`]. An async function is run to its end.

        Args:
            completions (`list`):
                One attempt per row, as text or as chat messages.
            **kwargs:
                Lists with one entry per row: the other dataset columns, and the `prompts` and `completion_ids` that a trainer
                gives to reward functions. Also `attempt`, the number of the attempt, from 1.

        Raises:
            `RuntimeError`: If the function raises an error.
            `ValueError`: If it does not return one reward per completion.
        """
        from ..reward_errors import graded  # here, so that a list of tasks does without TRL

        func = self.reward_funcs[0]
        call = graded(func, getattr(func, "__name__", type(func).__name__), kwargs.pop("attempt", 1))
        rewards = call(completions=completions, **kwargs)
        return _result(rewards) if asyncio.iscoroutine(rewards) else rewards

    @property
    def grader(self) -> str:
        """The first reward function, which grades; see [`Task.grader`]."""
        from ..fingerprints import of_grader  # here, so that a list of tasks does without torch

        return of_grader(self.reward_funcs[0])

    def answer(self, text: str, **row) -> str | None:
        """The final answer, for a reward that reads mathematics, and otherwise the whole text; see [`Task.answer`]."""
        return self._math.answer(text) if self.reads_mathematics else super().answer(text, **row)

    def same_answers(self, first: list[str], second: list[str]) -> list[bool]:
        """Whether math-verify takes the answers for equal, for a reward that reads mathematics; see [`Task.same_answers`]."""
        if self.reads_mathematics and CAN_SEND_DESCRIPTORS:
            return self._math.same_answers(first, second)
        return super().same_answers(first, second)

    @cached_property
    def _math(self) -> MathTask:
        return MathTask()

    def gold(self, rows: Dataset) -> list[str | None]:
        """The column `solution` in a box, for the rewards that read mathematics; see [`Task.gold`]."""
        if "solution" not in rows.column_names or not self.reads_mathematics:
            return [None] * len(rows)
        texts = [re.sub(r"^\$(\\boxed\{[^$]*\})\$$", r"\1", _mathematics(answer) or "") for answer in rows["solution"]]
        return [each if "\\boxed" in each else f"\\boxed{{{each.strip('$')}}}" for each in texts]


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, since a client that a reward function keeps belongs to a loop; in a thread, as notebooks have their own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _result(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop()).result()


def _mathematics(answer: object, as_it_stands: bool = False) -> str | None:
    r"""
    An answer as TRL's rewards read it: they find no LaTeX outside of dollars, and take the 2 of `2\sqrt{3}` for the answer. A number
    loses its units and other marks that they do not read, unless it is to stay as it stands.
    """
    if answer is None:
        return None
    text = str(answer).rsplit("####", 1)[-1].strip()  # of GSM8K
    if re.search(r"(?<!\\)\$|\\boxed|\n", text):
        return text
    reading = read(text, parse=False)
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}|^-?[\d.,]+\s+[a-zA-Z]{3,}$", text):
        if reading.refused:
            return text
        text = reading.latex  # of 18 dollars, 5 million, "It is 7"
    elif not (
        as_it_stands
        or reading.refused
        or reading.base
        or re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", reading.latex))
    ):
        text = reading.latex  # a number: of 12 cm^2, 100°, 1 1/2, twelve
    return f"$\\boxed{{{text}}}$"


def reward_function(name: str) -> Callable:
    """
    A reward function by its name; see [`DatasetTask`].

    Raises:
        `ValueError`: If there is none.
    """
    if name in TRL_REWARDS:
        from trl import rewards

        return for_text(getattr(rewards, name))
    from . import named_object

    found = (
        named_object(name if ":" in name else ":".join(name.rsplit(".", 1)), f"`reward_funcs` '{name}'")
        if "." in name
        else None
    )
    if not callable(found):
        raise ValueError(
            f"`reward_funcs` has no function '{name}'. Give {', '.join(TRL_REWARDS)}, or one of yours as PACKAGE.MODULE.FUNCTION or "
            "FILE.py:FUNCTION."
        )
    return found


def for_text(reward: Callable) -> Callable:
    """A reward function of TRL, which reads chat messages, for plain text too, and for answers that are bare LaTeX or numbers."""

    @wraps(reward)
    def call(completions, **kwargs):
        messages = [
            [{"role": "assistant", "content": each}] if isinstance(each, str) else each for each in completions
        ]
        if "solution" not in kwargs:
            return reward(messages, **kwargs)
        answers = kwargs.pop("solution")
        solutions = [_mathematics(answer) for answer in answers]
        rewards = reward(messages, solution=solutions, **kwargs)
        # An attempt may have the marks too: 100° for 100°.
        missed = {i: _mathematics(answers[i], as_it_stands=True) for i, found in enumerate(rewards) if not found}
        again = {i: literal for i, literal in missed.items() if literal != solutions[i]}
        if again:
            more = reward([messages[i] for i in again], solution=[*again.values()])
            for i, found in zip(again, more, strict=True):
                rewards[i] = found or rewards[i]
        return rewards

    return call
