"""What a task is: data and grading. A task knows no reinforcement learning."""

from abc import ABC, abstractmethod
from typing import ClassVar

from datasets import Dataset


class Task(ABC):
    """
    Problems with oracle answers, the verifier that grades an attempt, and the correction instruction between attempts.

    Subclass it, set the class attributes, and write [`Task.load`] and [`Task.reward`].

    Attributes:
        name (`str`):
            Name on the command line and in the model card.
        correction_instruction (`str`):
            The user's turn after an attempt (Section 3). It must not say whether the attempt was right.
    """

    name: ClassVar[str]
    correction_instruction: ClassVar[str]

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
        Grade attempts, as a TRL reward function: 1.0 for a right attempt, 0.0 for a wrong one, `None` where the row
        cannot be graded.

        Args:
            completions (`list`):
                One attempt per row, as text or as chat messages.
            **kwargs:
                The other dataset columns, one list each.
        """
