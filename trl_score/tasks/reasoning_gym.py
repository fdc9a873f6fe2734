"""Endless problems with verifiers, from the package reasoning-gym: `reasoning_gym:NAME`, such as `reasoning_gym:chain_sum`."""

import re

from datasets import Dataset

from .base import Task, text_of
from .math_grading import after_reasoning


PREFIX = "reasoning_gym:"
ANSWER_FORM = "Give only the answer."
SEEDS = {"train": 1, "test": 2}


class ReasoningGym(Task):
    """
    Problems of one of the package's generators, graded by the package: an attempt is right if `score_answer` gives it 1. The
    graders of some generators evaluate an answer with sympy, in this process.

    The answer of an attempt is the text between `<answer>` and `</answer>`, as the package has it; without these tags, the whole
    attempt after its reasoning (`</think>`). No problem of the test split is in the training split.

    Args:
        generator (`str`):
            Name of the generator, such as `"chain_sum"`.
        num_train, num_test (`int`, *optional*, default to `1000` and `500`):
            Problems to generate for each split. Repeated ones are dropped.
        answer_form (`str`, *optional*, defaults to `"Give only the answer."`):
            What the prompt says after the question.
        **settings:
            Arguments of the generator, which set how hard its problems are, such as `min_terms=4`.

    Raises:
        `ImportError`: If the package is not installed.
        `ValueError`: If there is no such generator, or it does not take the settings.
    """

    correction_instruction = (
        "There might be an error in the answer above. Check it, and write the right answer. " + ANSWER_FORM
    )

    def __init__(
        self,
        generator: str,
        num_train: int = 1000,
        num_test: int = 500,
        answer_form: str = ANSWER_FORM,
        **settings,
    ):
        factory = _package()
        if generator not in factory.DATASETS:
            raise ValueError(f"reasoning-gym has no '{generator}'. It has: {', '.join(generators())}.")
        self.name, self.answer_form = f"{PREFIX}{generator}", answer_form
        try:
            self._data = {
                split: factory.create_dataset(generator, size=size, seed=SEEDS[split], **settings)
                for split, size in (("train", num_train), ("test", num_test))
            }
        except (TypeError, AssertionError) as error:
            raise ValueError(f"'{self.name}' does not take the settings {settings}: {error}") from error
        self._entries: dict[str, list[dict]] = {}

    def entries(self, split: str) -> list[dict]:
        """All problems of a split, as the package makes them: the same ones in every process."""
        if split not in self._data:
            raise ValueError(f"Unknown split {split!r} of '{self.name}'. Expected one of: {sorted(self._data)}.")
        if split not in self._entries:
            self._entries[split] = list(self._data[split])
        return self._entries[split]

    def load(self, split: str) -> Dataset:
        """Rows `{prompt, answer, split, number}`, of which the last two say which problem it is; see [`Task.load`]."""
        seen = set() if split == "test" else {entry["question"] for entry in self.entries("test")}
        rows = []
        for number, entry in enumerate(self.entries(split)):
            if entry["question"] not in seen:
                seen.add(entry["question"])
                text = f"{entry['question'].strip()}\n{self.answer_form}".strip()
                prompt = [{"role": "user", "content": text}]
                rows.append({"prompt": prompt, "answer": str(entry["answer"]), "split": split, "number": number})
        if not rows:
            raise ValueError(f"'{self.name}' makes too few different problems: all of them are in the test split.")
        return Dataset.from_list(rows)

    def reward(self, completions: list, split: list[str], number: list[int], **kwargs) -> list[float]:
        """1.0 if the package's grader gives 1, else 0.0; see [`Task.reward`]."""
        return [
            float(self._score(split, number, self.answer(text_of(completion))) >= 1)
            for completion, split, number in zip(completions, split, number, strict=True)
        ]

    def _score(self, split: str, number: int, answer: str | None) -> float:
        grade, entry = self._data[split].score_answer, self.entries(split)[number]
        try:
            return grade(answer, entry)
        except Exception:  # some graders raise where they cannot read an answer
            if grade(str(entry["answer"]), entry) < 1:
                raise  # nor the right one: the grader is to blame
            return 0.0

    def answer(self, text: str, **row) -> str | None:
        """The text between the tags, or all of it, without the reasoning before `</think>`; see [`Task.answer`]."""
        text = after_reasoning(text)
        found = re.findall(r"<answer>(.*?)</answer>", text, re.S)
        return (found[-1] if found else text).strip() or None


def _package():
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ImportError(
            f"The tasks `{PREFIX}NAME` need the package reasoning-gym: pip install 'trl-score[reasoning-gym]'."
        ) from error
    return factory


def generators() -> list[str]:
    """The names of the generators; none if the package is not installed."""
    try:
        return sorted(_package().DATASETS)
    except ImportError:
        return []
