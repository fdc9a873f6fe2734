"""MATH and GSM8K, zero-shot with chain of thought, graded by math-verify (Section 6, Appendix C)."""

import json
import logging
import os
import re
import sys
from pathlib import Path

from datasets import Dataset, Value

from ..worker_pool import WorkerPool
from . import math_grading, sources
from .base import Task, drop, text_of


logger = logging.getLogger(__name__)

# Kumar et al. 2024, Appendix C, word for word.
ANSWER_FORM = (
    "At the end of the Solution, when you give your final answer, write it in the form "
    '"Final Answer: The final answer is $answer$. I hope it is correct."'
)
PROMPT = (
    "You are a math expert. When you respond, respond only with the Solution of the final Problem, thinking step by step. "
    + ANSWER_FORM
)
CORRECTION_INSTRUCTION = (
    "There might be an error in the solution above because of lack of understanding of the question. Please correct the "
    "error, if any, and rewrite the solution. Only output the final solution! " + ANSWER_FORM
)
REFINE_INSTRUCTION = (  # our own; the paper has none
    "Rewrite the solution above with the help of this feedback. Only output the final solution! " + ANSWER_FORM
)


def math_prompt(problem: str) -> list[dict]:
    """The paper's zero-shot prompt for a problem, as one user's turn: not every chat template has a system's."""
    return [{"role": "user", "content": f"{PROMPT}\n\nProblem:\n{problem}"}]


class MathTask(Task):
    """
    Mathematics with one right answer. Subclass it and write `rows` for problems of your own.

    Args:
        data_dir (`str`, *optional*):
            Folder with the rows as JSON lines (docs/tasks.md). By default, they come from the Hub.
        time_limit (`float`, *optional*, defaults to `5.0`):
            Seconds that grading one attempt may take. An attempt that takes longer is wrong.
        memory (`int`, *optional*, defaults to `4 * 2**30`):
            Bytes of address space of a worker that grades.
        num_workers (`int`, *optional*):
            Number of attempts to grade at a time. Defaults to the usable CPU cores, divided among the processes of `accelerate`.
    """

    correction_instruction = CORRECTION_INSTRUCTION
    refine_instruction = REFINE_INSTRUCTION

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        time_limit: float = 5.0,
        memory: int = 4 * 2**30,
        num_workers: int | None = None,
    ):
        self.data_dir, self.time_limit = data_dir, time_limit
        environment = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
        self._pool = WorkerPool(
            [sys.executable, "-P", str(Path(math_grading.__file__).with_name("worker.py")), str(memory)],
            {**environment, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            num_workers,
        )

    def rows(self, split: str) -> Dataset:
        """Rows with the columns `problem` and `answer` (LaTeX, without dollars or box)."""
        raise NotImplementedError

    def load(self, split: str) -> Dataset:
        """
        Rows `{prompt, problem, answer, ..}`; see [`Task.load`].

        Raises:
            `ValueError`: If there is no such split, or a gold answer cannot be parsed.
            `OSError`: If the rows cannot be loaded.
        """
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split!r} of '{self.name}'. Expected one of: ['test', 'train'].")
        rows = self.rows(split)
        if rows.features["answer"].dtype != "string":  # numbers
            rows = rows.cast_column("answer", Value("string"))
        unreadable = self.unreadable_golds(rows["answer"])
        if unreadable:
            raise ValueError(
                f"{len(unreadable)} gold answers of '{self.name}' cannot be parsed, such as {unreadable[:3]}. Drop the "
                "rows, or give the answers as LaTeX without dollars or box."
            )
        return rows.map(lambda row: {"prompt": math_prompt(row["problem"])})

    def unreadable_golds(self, golds: list[str]) -> list[str]:
        """The gold answers that cannot be parsed, each once."""
        different = list(dict.fromkeys(golds))
        chunks = [different[start : start + 64] for start in range(0, len(different), 64)]
        outcomes = self._pool.map([json.dumps({"golds": chunk}).encode() for chunk in chunks], 64 * self.time_limit)
        results = [
            json.loads(outcome.result) if outcome.result else chunk
            for outcome, chunk in zip(outcomes, chunks, strict=True)
        ]
        return [gold for result in results for gold in result]

    def grade(self, texts: list[str], golds: list[str], problems: list[str] | None = None) -> list[bool]:
        """
        Whether each text gives its gold answer. A text never raises an error, and never takes longer than the time limit. May
        be called from any thread.

        Args:
            texts (`list[str]`):
                Attempts.
            golds (`list[str]`):
                Their gold answers.
            problems (`list[str]`, *optional*):
                The statements of their problems. An answer that only repeats an expression of the statement is wrong.

        Raises:
            `ValueError`: If a gold answer cannot be parsed.
        """
        ends = [math_grading.after_reasoning(text)[-math_grading.MAX_TEXT :] for text in texts]
        jobs = [
            json.dumps({"text": text, "gold": gold, "problem": problem}).encode()
            for text, gold, problem in zip(ends, golds, problems or [None] * len(texts), strict=True)
        ]
        verdicts, outcomes = [], self._pool.map(jobs, self.time_limit)
        if lost := [outcome.lost for outcome in outcomes if outcome.lost]:
            logger.warning(f"{len(lost)} attempts could not be graded ({lost[0]}) and count as wrong.")
        for outcome in outcomes:
            verdict = (
                json.loads(outcome.result) if outcome.result else False
            )  # its worker was lost: too hard, so wrong
            if isinstance(verdict, str):
                raise ValueError(verdict)
            verdicts.append(verdict)
        return verdicts

    def reward(self, completions: list, answer: list[str], problem: list[str] | None = None, **kwargs) -> list[float]:
        """1.0 if the attempt states the gold answer, and not only repeats the problem; see [`Task.reward`]."""
        texts = [text_of(completion) for completion in completions]
        return [float(right) for right in self.grade(texts, answer, problem)]

    def answer(self, text: str, **row) -> str | None:
        """The final answer as it stands in the attempt; see [`Task.answer`]."""
        return math_grading.extract_answer(text) or None  # a final answer that is denied or empty

    def same_answers(self, first: list[str], second: list[str]) -> list[bool]:
        """Whether math-verify takes the answers for equal; see [`Task.same_answers`]."""
        pairs = list(zip(first, second, strict=True))
        different = list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))
        outcomes = self._pool.map([json.dumps({"same": pair}).encode() for pair in different], self.time_limit)
        same = {
            pair: bool(outcome.result) and json.loads(outcome.result)
            for pair, outcome in zip(different, outcomes, strict=True)
        }
        return [one == other or same[one, other] for one, other in pairs]

    def gold(self, rows: Dataset) -> list[str]:
        """The gold answers in the form that the prompt asks for; see [`Task.gold`]."""
        return [f"Final Answer: The final answer is ${each}$. I hope it is correct." for each in rows["answer"]]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


class Math(MathTask):
    """
    MATH (Hendrycks et al. 2021) in the paper's split: 12,000 problems to train on, of which 4,500 were in its original
    test set, and the 500 of MATH-500 (Lightman et al. 2023) to test. The columns `level` (1 to 5) and `subject` are kept.
    See [`MathTask`] for the arguments.
    """

    name = "math"

    def rows(self, split: str) -> Dataset:
        if self.data_dir is not None:
            rows = sources.from_folder(f"math/{split}", self.data_dir)
        elif split == "test":
            rows = sources.from_hub("math/test")
            rows = rows.map(lambda row: {"level": int(row["level"])}, remove_columns="level")
        else:
            held_out = {" ".join(problem.split()) for problem in sources.from_hub("math/test")["problem"]}
            rows = sources.from_hub("math/all")
            rows = rows.filter(lambda row: " ".join(row["problem"].split()) not in held_out)
            rows = rows.rename_column("type", "subject").map(
                lambda row: {
                    "answer": math_grading.extract_answer(row["solution"]) or "",
                    "level": int(row["level"].removeprefix("Level ")) if row["level"][-1].isdigit() else None,
                },
                remove_columns="level",
            )
        rows = drop(rows, lambda row: not row["answer"], "their solution has no answer in its box")
        if split == "train":
            several = rows.filter(lambda row: len(re.findall(r"\\f?box", row["solution"])) > 1)
            right = self.grade(several["solution"], several["answer"])
            wrong = {problem for problem, ok in zip(several["problem"], right, strict=True) if not ok}
            drop_why = "their solution has several boxes, and the answer is not what it comes to"
            rows = drop(rows, lambda row: row["problem"] in wrong, drop_why)
        return rows.select_columns(["problem", "answer", "level", "subject"])


class GSM8K(MathTask):
    """
    Grade-school word problems (Cobbe et al. 2021), with the prompts of MATH: 7,473 to train on, 1,319 to test. See
    [`MathTask`] for the arguments.
    """

    name = "gsm8k"

    def rows(self, split: str) -> Dataset:
        name = f"gsm8k/{split}"
        rows = sources.from_hub(name) if self.data_dir is None else sources.from_folder(name, self.data_dir)
        rows = rows.map(
            lambda row: {
                "problem": row["question"],
                "answer": (math_grading.extract_answer(row["answer"]) or "").replace(",", ""),
            }
        )
        rows = drop(rows, lambda row: not row["answer"], "they have no line '#### answer'")
        return rows.select_columns(["problem", "answer"])
