"""MBPP, HumanEval and offline repair, graded by their tests in a sandbox (Section 6, Appendix C)."""

import ast
import logging
from collections.abc import Callable, Sequence

from datasets import Dataset

from ..sandbox import Sandbox, Submission, Verdict, undefined_names
from ..sandbox.names import free_names
from . import sources
from .base import Task, text_of
from .programs import extract_program


logger = logging.getLogger(__name__)

# Kumar et al. 2024, Appendix C, word for word.
PROMPT = (
    "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n{tests}"
)
CORRECTION_INSTRUCTION = (
    "# There might be an error in the code above because of lack of understanding of the question. Please correct the "
    "error, if any, and rewrite the solution. Only output the final correct Python program!"
)
REFINE_INSTRUCTION = (  # our own; the paper has none
    "Rewrite the program above with the help of this feedback. Only output the final Python program!"
)
SHOTS = (2, 3, 4)  # MBPP's own examples, by task_id

# The paper has no prompt for HumanEval; this one shows what the benchmark shows and none of its tests.
HUMANEVAL_PROMPT = (
    "You are an expert Python programmer, and here is your task: Complete this function. Write the whole function, with "
    "its imports, in one block of code.\n\n```python\n{code}\n```"
)


def names_used(reference: str, tests: str) -> list[str]:
    """The names of functions, classes and variables of a reference program that the tests use."""
    defined = []
    for node in ast.parse(reference).body:
        targets = [*getattr(node, "targets", []), *([node.target] if isinstance(node, ast.AnnAssign) else [])]
        defined += [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        defined += [node.name] if hasattr(node, "name") else []
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    return [name for name in dict.fromkeys(defined) if name in used]


def with_imports(reference: str, tests: str) -> str:
    """
    Add to the tests the imports that they use and that only the reference program has. A name that is no entry point never comes
    from the program under test.

    Example:
    ```python
    >>> with_imports("import sys\ndef size(x): return sys.getsizeof(x)", "assert size(1) == sys.getsizeof(1)")
    'import sys\nassert size(1) == sys.getsizeof(1)'
    ```
    """
    missing = free_names(tests)
    imports = []
    for node in ast.parse(reference).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [name for name in node.names if (name.asname or name.name).partition(".")[0] in missing]
            node.names = kept
            imports += [ast.unparse(node)] if kept else []
    return "\n".join([*imports, tests])


def one_assert_each(tests: str) -> list[str]:
    """
    Divide tests into one program for each assertion at their top level, together with all code that is not an assertion. Tests
    without such an assertion, and tests that are not Python, stay as they are.

    Example:
    ```python
    >>> one_assert_each("x = 1\\nassert f(x) == 1\\nassert f(2) == 4")
    ['x = 1\\nassert f(x) == 1', 'x = 1\\nassert f(2) == 4']
    ```
    """
    try:
        nodes = ast.parse(tests).body
    except SyntaxError:
        return [tests]
    asserts = [node for node in nodes if isinstance(node, ast.Assert)]
    kept = [[node for node in nodes if node is one or node not in asserts] for one in asserts]
    return ["\n".join(map(ast.unparse, each)) for each in kept] or [tests]


def without_form(program: str) -> str:
    """
    What a program does: equal for programs that differ in spaces, blank lines, comments and docstrings alone. What is not Python
    stays as it is.

    Example:
    ```python
    >>> without_form("def f(x):\n    \"\"\"One more.\"\"\"\n\n    return x+1  # done")
    'def f(x):\n    return x + 1'
    ```
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return program
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    try:
        return ast.unparse(tree)
    except RecursionError:
        return program


Runner = Callable[[Sequence[Submission]], Sequence[Verdict]]


class CodeTask(Task):
    """
    Programs that have to pass tests. Subclass it and write `rows` for problems of your own.

    Args:
        data_dir (`str`, *optional*):
            Folder with the rows as JSON lines (docs/tasks.md). By default, they come from the Hub.
        sandbox (`Sandbox`, *optional*):
            The sandbox in which the programs run. By default, it has the best backend that this machine allows.
        runner (`Callable[[Sequence[Submission]], Sequence[Verdict]]`, *optional*):
            A function that runs programs against their tests in place of the sandbox, for instance in a container or by a
            service. It returns one [`Verdict`] per [`Submission`], in their order. The function is responsible for what the
            programs do, so no consent is needed. See docs/sandbox.md.
        allow_code_execution (`bool`, *optional*):
            Consent to run programs that a model wrote; see [`Sandbox`].
        fractional_reward (`bool`, *optional*, defaults to `False`):
            Whether to reward the share of the assertions that hold, instead of 1 if all hold and 0 otherwise. Each assertion is run
            by itself. Tests without assertions at their top level, such as HumanEval's, still give 0 or 1. An attempt counts as right
            only if all assertions hold.

    Raises:
        `PermissionError`: Without consent.
        `ValueError`: With both a sandbox and a runner.
    """

    correction_instruction = CORRECTION_INSTRUCTION
    refine_instruction = REFINE_INSTRUCTION

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        sandbox: Sandbox | None = None,
        runner: Runner | None = None,
        allow_code_execution: bool | None = None,
        fractional_reward: bool = False,
    ):
        if sandbox is not None and runner is not None:
            raise ValueError("`sandbox` and `runner` both say where programs run. Pass one of them.")
        self.data_dir, self.fractional_reward = data_dir, fractional_reward
        self.sandbox = sandbox
        if runner is None and sandbox is None:
            self.sandbox = Sandbox(allow_code_execution=allow_code_execution)
        self.runner = runner or self.sandbox.run
        self._reported: set[str] = set()

    def rows(self, split: str) -> list[dict]:
        """
        Rows with the columns `prompt` (chat messages), `tests` (source), `names` (the names that the tests get from the
        program, and no others) and `context` (the start of the program if the prompt gives one, else ""). The optional column
        `mutable_arguments` says whether changes that a program makes to its arguments reach the tests.
        """
        raise NotImplementedError

    def load(self, split: str) -> Dataset:
        """
        Rows `{prompt, tests, names, context, ..}`; see [`Task.load`].

        Raises:
            `ValueError`: If there is no such split, or the tests of a row use a name that nothing defines.
            `OSError`: If the rows cannot be loaded.
        """
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r} of '{self.name}'. Expected one of: {sorted(self.splits)}.")
        rows = self.rows(split)
        for number, row in enumerate(rows):
            if missing := undefined_names(row["tests"]) - set(row["names"]):
                raise ValueError(
                    f"Row {number} of '{self.name}': its tests use {sorted(missing)}, which they do not define and which are "
                    "not among its `names`. Only `names` come from the program. Add them there if the program has to define "
                    f"them; otherwise import or define them in the tests:\n{row['tests'][:500]}"
                )
        return Dataset.from_list(rows)

    splits: Sequence[str] = ("train", "test")

    def source(self, name: str) -> Dataset:
        return sources.from_hub(name) if self.data_dir is None else sources.from_folder(name, self.data_dir)

    @property
    def grader(self) -> str:
        """See [`Task.grader`]."""
        from ..fingerprints import of_grader  # here, so that a list of tasks does without torch

        runner = f", {of_grader(self.runner)}" if self.sandbox is None else ""
        return super().grader + ", fractional" * self.fractional_reward + runner

    def reward(
        self,
        completions: list,
        tests: list[str],
        names: list[list[str]],
        context: list[str],
        mutable_arguments: list[bool] | None = None,
        **kwargs,
    ) -> list[float]:
        """1.0 if the attempt's program passes all of the tests, else 0.0 or their share; see [`Task.reward`]."""
        parts = [one_assert_each(test) if self.fractional_reward else [test] for test in tests]
        mutable = mutable_arguments or [False] * len(tests)
        submissions = [
            Submission(extract_program(text_of(completion), list(used), start), test, tuple(used), bool(changes))
            for completion, several, used, start, changes in zip(
                completions, parts, names, context, mutable, strict=True
            )
            for test in several
        ]
        passed = iter([verdict.passed for verdict in self.verdicts(submissions)])
        return [sum(next(passed) for _ in several) / len(several) for several in parts]

    def verdicts(self, submissions: list[Submission]) -> list[Verdict]:
        """
        The runner's verdicts. A program whose tests the runner does not support gets no reward, although it may be right. Each
        reason is logged once.

        Raises:
            `TypeError`: If the runner returns no list of verdicts, one per submission.
        """
        verdicts = list(self.runner(submissions))
        if len(verdicts) != len(submissions) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
            raise TypeError(
                f"A runner returns one `Verdict` per submission, in their order. This one got {len(submissions)} submissions "
                f"and returned {len(verdicts)} values of {sorted({type(each).__name__ for each in verdicts})}."
            )
        for verdict, submission in zip(verdicts, submissions, strict=True):
            if verdict.unsupported and verdict.unsupported not in self._reported and len(self._reported) < 100:
                self._reported.add(verdict.unsupported)
                logger.warning(
                    f"A program got no reward for tests that the sandbox does not run as a plain run would: {verdict.reason}. "
                    f"docs/sandbox.md says what to write in place of it. The tests:\n{submission.tests[:500]}"
                )
        return verdicts

    def answer(self, text: str, *, names: list[str], context: str, **row) -> str | None:
        """The program; see [`Task.answer`]."""
        return extract_program(text, list(names), context).strip() or None

    def same_answers(self, first: list[str], second: list[str]) -> list[bool]:
        """Whether programs are the same but for spaces, comments and docstrings; see [`Task.same_answers`]."""
        content = {program: without_form(program) for program in {*first, *second}}  # a vote compares each with many
        return [content[one] == content[other] for one, other in zip(first, second, strict=True)]

    def references(self) -> dict:
        """The reference programs by `task_id`; see [`CodeTask.gold`]."""
        return {}

    def gold(self, rows: Dataset) -> list[str | None]:
        """The reference programs of rows with a column `task_id`, each in a block of code; see [`Task.gold`]."""
        if "task_id" not in rows.column_names:
            return [None] * len(rows)
        programs = self.references()
        found = [programs.get(each) for each in rows["task_id"]]
        return [None if program is None else f"```python\n{program}\n```" for program in found]

    def close(self) -> None:
        """End the workers of the sandbox."""
        if self.sandbox is not None:
            self.sandbox.close()


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


class MBPP(CodeTask):
    """
    Mostly basic Python problems (Austin et al. 2021): 464 to train on (its training and validation splits), 500 to test.
    Three solved examples, its own, come before the problem, as turns of the conversation; three tests are shown with it,
    and are the ones that grade. See [`CodeTask`] for the arguments.
    """

    name = "mbpp"

    def all_rows(self) -> dict[int, dict]:
        return {row["task_id"]: row for row in self.source("mbpp")}

    def references(self) -> dict:
        return {number: _unix(row["code"]) for number, row in self.all_rows().items()}

    @staticmethod
    def question(row: dict) -> dict:
        tests = "\n".join(test.strip() for test in row["test_list"])
        return {"role": "user", "content": PROMPT.format(task=row["text"], tests=tests)}

    @staticmethod
    def program(code: str) -> dict:
        return {"role": "assistant", "content": f"[BEGIN]\n{_unix(code).strip()}\n[DONE]"}

    def shots(self, rows: dict[int, dict]) -> list[dict]:
        return [turn for i in SHOTS for turn in (self.question(rows[i]), self.program(rows[i]["code"]))]

    @staticmethod
    def graded(row: dict, reference: str) -> dict:
        tests = with_imports(_unix(reference), _unix("\n".join([row["test_setup_code"] or "", *row["test_list"]])))
        return {"tests": tests, "names": names_used(_unix(reference), tests), "context": "", "task_id": row["task_id"]}

    def rows(self, split: str) -> list[dict]:
        rows = self.all_rows()
        shots = self.shots(rows)
        splits = ("train", "validation") if split == "train" else ("test",)
        return [
            {"prompt": [*shots, self.question(row)], **self.graded(row, row["code"])}
            for row in rows.values()
            if row["split"] in splits
        ]


class MBPPRepair(MBPP):
    """
    Offline repair of MBPP, the paper's MBPP-R: a wrong program by another model is attempt 1, given in the prompt with the
    correction instruction after it; what is generated is attempt 2. Only from `data_dir`: the paper's rows are not public.
    """

    name = "mbpp_repair"
    num_given_attempts = 1
    splits = ("test",)

    def rows(self, split: str) -> list[dict]:
        if self.data_dir is None:
            raise FileNotFoundError(
                "'mbpp_repair' is not on the Hub: set `data_dir` to a folder with mbpp_repair/mbpp_repair.jsonl (docs/tasks.md "
                "says which columns)."
            )
        shots = self.shots(self.all_rows())
        instruction = {"role": "user", "content": self.correction_instruction}
        return [
            {
                "prompt": [*shots, self.question(row), self.program(row["buggy_code"]), instruction],
                **self.graded(row, row["reference_code"]),
            }
            for row in self.source("mbpp_repair")
        ]

    def references(self) -> dict:
        return {row["task_id"]: _unix(row["reference_code"]) for row in self.source("mbpp_repair")}


class HumanEval(CodeTask):
    """
    HumanEval (Chen et al. 2021), zero-shot: 164 problems to test. A prompt has the function's signature and docstring; its
    tests are never shown. See [`CodeTask`] for the arguments.
    """

    name = "humaneval"
    splits = ("test",)

    def references(self) -> dict:
        rows = [row for row in self.source("humaneval") if row.get("canonical_solution")]
        return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows}

    @staticmethod
    def question(code: str) -> dict:
        return {"role": "user", "content": HUMANEVAL_PROMPT.format(code=code.strip())}

    @staticmethod
    def graded(row: dict, start: str, check: str) -> dict:
        """The tests come with the prompt's own helper functions: the program's may not stand in for them."""
        tree = ast.parse(start + "    pass\n")
        entry = row["entry_point"]
        helpers = [node for node in tree.body if getattr(node, "name", None) != entry]
        tests = "\n".join([*map(ast.unparse, helpers), row["test"], check])
        return {"tests": tests, "names": [entry], "context": start, "task_id": row["task_id"]}

    def rows(self, split: str) -> list[dict]:
        return [
            {
                "prompt": [self.question(row["prompt"])],
                **self.graded(row, row["prompt"], f"check({row['entry_point']})"),
            }
            for row in self.source("humaneval")
        ]


class HumanEvalFix(HumanEval):
    """
    Offline repair of HumanEval (HumanEvalFix, Muennighoff et al. 2023): a program with a bug set by hand is attempt 1,
    given in the prompt with the correction instruction after it; what is generated is attempt 2.
    """

    name = "humanevalfix"
    num_given_attempts = 1

    def references(self) -> dict:
        rows = [row for row in self.source("humanevalfix") if row.get("canonical_solution")]
        return {row["task_id"]: row["declaration"] + row["canonical_solution"] for row in rows}

    def rows(self, split: str) -> list[dict]:
        instruction = {"role": "user", "content": self.correction_instruction}
        return [
            {
                "prompt": [
                    self.question(row["prompt"]),
                    {"role": "assistant", "content": f"```python\n{row['declaration']}{row['buggy_solution']}```"},
                    instruction,
                ],
                **self.graded(row, row["prompt"], ""),  # its tests call `check` themselves
            }
            for row in self.source("humanevalfix")
        ]
