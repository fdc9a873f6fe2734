"""A task is data and grading. It knows no reinforcement learning."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from datasets import Dataset


logger = logging.getLogger(__name__)

# What a reward function gets besides the columns of the dataset. TRL leaves out a column `completion_ids` by itself.
KEYWORDS = {
    "attempt": "is told which attempt it grades",
    "prompts": "gets the problems",
    "completions": "gets the attempts",
    "trainer_state": "gets the state of the run",
    "log_extra": "adds columns to the table of completions",
    "log_metric": "logs metrics",
}
GRADING = ("reward", "grade", "verdicts", "answer", "same_answers")  # methods of tasks that stored grades depend on


class Task(ABC):
    """
    Problems with oracle answers, the verifier that grades an attempt, and the correction instruction between attempts.

    Subclass it, set the class attributes, and write [`Task.load`] and [`Task.reward`].

    Attributes:
        name (`str`):
            Name on the command line and in the model card.
        correction_instruction (`str`):
            The user's turn after an attempt (Section 3). It must not say whether the attempt was right.
        feedback_instruction, refine_instruction (`str`, have defaults):
            The user's turns of Self-Refine. The first asks for feedback on an attempt. The second follows the feedback and asks for the
            next attempt. They must not say whether the attempt was right.
        num_given_attempts (`int`, defaults to `0`):
            Number of attempts that the prompts of this task already hold, each followed by the correction instruction. It is
            1 for offline repair, where the first generated attempt is attempt 2.
    """

    name: ClassVar[str]
    correction_instruction: ClassVar[str]
    # Our own words: Madaan et al. 2023 tell the model "There is an error in the code above", which is a verdict.
    feedback_instruction: ClassVar[str] = (
        "Review your attempt above step by step. Say what holds up and what you would change, if anything. Do not rewrite it "
        "yet."
    )
    refine_instruction: ClassVar[str] = (
        "Rewrite your attempt with the help of this feedback. Only output the new attempt!"
    )
    num_given_attempts: ClassVar[int] = 0

    @abstractmethod
    def load(self, split: str) -> Dataset:
        """
        Load a split.

        Args:
            split (`str`):
                `"train"` or `"test"`.

        Returns:
            [`~datasets.Dataset`] with a `prompt` column (chat messages or text) and the columns that
            [`Task.reward`] reads.
        """

    @abstractmethod
    def reward(self, completions: list, **kwargs) -> list[float | None]:
        """
        Grade attempts, as a TRL reward function does: 1.0 for a right attempt, 0.0 for a wrong one, and `None` if the row
        cannot be graded.

        Args:
            completions (`list`):
                One attempt per row, as text or as chat messages.
            **kwargs:
                The other dataset columns, one list each.
        """

    @property
    def grader(self) -> str:
        """
        What tells this grader from others: stored grades are not reused by another one. By default, `reward` and its source file, and those
        of other methods that grade or compare, if a class of yours defines them elsewhere.
        """
        from ..fingerprints import of_grader  # here, so that a list of tasks does without torch

        methods = [getattr(type(self), name) for name in GRADING if hasattr(type(self), name)]
        first, *others = map(of_grader, methods)
        return " ".join([first, *(other for other in others if other.partition(" ")[2] not in first)])

    def answer(self, text: str, **row) -> str | None:
        """
        The answer an attempt gives, for counting changed answers and votes; `None` if it gives none. By default, the whole
        text without the white space around it.

        Args:
            text (`str`):
                The attempt.
            **row:
                The other columns of its row.
        """
        return text.strip() or None

    def gold(self, rows: Dataset) -> list[str | None]:
        """
        For each row an attempt that is right, to check the grader with; `None` where the row does not tell. By default, the
        column `answer`, `solution` or `gold`.
        """
        column = next((name for name in ("answer", "solution", "gold") if name in rows.column_names), None)
        return [None] * len(rows) if column is None else [str(value) for value in rows[column]]

    def same_answers(self, first: list[str], second: list[str]) -> list[bool]:
        """Whether answers (of [`Task.answer`]) mean the same, pair by pair. By default, whether they are equal."""
        return [one == other for one, other in zip(first, second, strict=True)]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def text_of(completion: str | list[dict]) -> str:
    """The text of an attempt, given as text or as chat messages (TRL's two forms)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def check_keywords(name: str, columns: Iterable[str]) -> None:
    """
    Raises:
        `ValueError`: If a column of the rows has the name of another argument of reward functions.
    """
    for column, meaning in KEYWORDS.items():
        if column in columns:
            raise ValueError(
                f"{name} has a column `{column}`, the keyword by which a reward function {meaning}. Rename the column."
            )


def first(rows: Dataset, number: int | None) -> Dataset:
    """The first `number` rows, or all rows if it is `None`."""
    return rows if number is None else rows.select(range(min(number, len(rows))))


def drop(rows: Dataset, unusable: Callable[[dict], bool], why: str) -> Dataset:
    """Leave out the rows that cannot be used, and log how many they are."""
    kept = rows.filter(lambda row: not unusable(row))
    if dropped := len(rows) - len(kept):
        logger.warning(f"{dropped} of {len(rows)} rows dropped: {why}.")
    return kept
