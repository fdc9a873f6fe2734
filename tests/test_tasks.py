"""The tasks on their real rows, from a folder and from a repository in the Hub's layout."""

import ast
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from processes import python

from trl_score.sandbox import Sandbox, Submission, Verdict
from trl_score.sandbox.names import free_names
from trl_score.tasks import TASKS, CodeTask, MathTask, Task, get_task, sources
from trl_score.tasks.code import names_used, one_assert_each, with_imports
from trl_score.tasks.programs import extract_program


DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "mbpp").exists(), reason="no shared data")


def rows_of(name: str) -> list[dict]:
    return sources.from_folder(name, DATA).to_list()


@pytest.fixture(scope="module")
def sandbox():
    # A reference program of MBPP takes 5 s on a slow core, more on a busy one: what is tested is not how fast it is.
    sandbox = Sandbox(cpu_seconds=60, wall_seconds=180, allow_code_execution=True)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def task(sandbox):
    """Tasks by name, on the shared data."""
    made = {}

    def make(name: str) -> Task:
        if name not in made:
            arguments = {"sandbox": sandbox} if issubclass(TASKS[name], CodeTask) else {}
            made[name] = get_task(name, data_dir=str(DATA), **arguments)
        return made[name]

    yield make
    for each in made.values():
        each.close()


@needs_data
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("math", 11980, 500), ("gsm8k", 7473, 1319), ("mbpp", 464, 500), ("humaneval", None, 164), ("mbpp_repair", None, 614),
     ("humanevalfix", None, 164)],
)  # fmt: skip
def test_splits_have_their_rows_and_no_problem_is_in_two(task, name, train, test):
    held_out = task(name).load("test")
    assert len(held_out) == test
    if train is None:
        with pytest.raises(ValueError, match="Unknown split 'train'"):
            task(name).load("train")
    else:
        rows = task(name).load("train")
        assert len(rows) == train
        last = {row["prompt"][-1]["content"] for row in rows}
        # MBPP has a few problems twice, with other tests and in other splits
        assert len(last & {row["prompt"][-1]["content"] for row in held_out}) == 0


@needs_data
def test_rows_without_a_usable_gold_answer_are_dropped_and_counted(task, caplog):
    task("math").rows("train")
    assert "2 of 12000 rows dropped: their solution has no answer" in caplog.text
    assert "18 of 11998 rows dropped: their solution has several boxes" in caplog.text


def test_the_prompts_are_the_papers():
    if not (DATA / "paper_prompts.json").exists():
        pytest.skip("no shared data")
    paper = json.loads((DATA / "paper_prompts.json").read_text())
    from trl_score.tasks import code, math

    assert math.PROMPT == paper["math_zero_shot"]
    assert math.CORRECTION_INSTRUCTION == paper["math_correction_instruction"]
    assert code.PROMPT == paper["code_first_line"]
    assert code.CORRECTION_INSTRUCTION == paper["code_correction_instruction"]
    assert list(code.SHOTS) == paper["mbpp_three_shot_task_ids"]


@needs_data
def test_prompts_have_the_form_they_should(task):
    (turn,) = task("gsm8k").load("test")[0]["prompt"]
    assert (
        turn["role"] == "user" and turn["content"].startswith("You are a math expert.") and "ducks" in turn["content"]
    )

    prompt = task("mbpp").load("test")[0]["prompt"]
    assert [turn["role"] for turn in prompt] == ["user", "assistant"] * 3 + ["user"]
    assert all(
        turn["content"].startswith("[BEGIN]\n") and turn["content"].endswith("\n[DONE]") for turn in prompt[1::2]
    )
    assert (
        "similar_elements" in prompt[0]["content"]
        and "\r" not in str(prompt)
        and prompt[-1]["content"].count("assert ") == 3
    )

    for row in task("humaneval").load("test"):
        (turn,) = row["prompt"]
        assert row["context"].strip() in turn["content"] and "assert candidate" not in turn["content"]

    for name in ("mbpp_repair", "humanevalfix"):
        assert task(name).num_given_attempts == 1
        prompt = task(name).load("test")[0]["prompt"]
        assert prompt[-1] == {"role": "user", "content": task(name).correction_instruction}
        assert prompt[-2]["role"] == "assistant" and "def " in prompt[-2]["content"]


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_math_rewards_the_gold_answer_and_not_a_near_miss(task, name):
    rows = task(name).load("test").select(range(100))
    golds = rows["answer"]
    right = [f"Final Answer: The final answer is ${gold}$. I hope it is correct." for gold in golds]
    wrong = [f"Final Answer: The final answer is $({gold}) + 1$. I hope it is correct." for gold in golds]
    assert task(name).reward(right, answer=golds) == [1.0] * 100
    assert sum(task(name).reward(wrong, answer=golds)) == 0


def answers(name: str) -> dict:
    """A right program for each row, as a model would write it; by task_id."""
    if name == "humaneval":
        return {row["task_id"]: f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows_of(name)}
    if name == "humanevalfix":
        return {
            row["task_id"]: f"Fixed:\n```\n{row['declaration']}{row['canonical_solution']}```" for row in rows_of(name)
        }
    return {row["task_id"]: f"[BEGIN]\n{row['code']}\n[DONE]" for row in rows_of("mbpp")}


@needs_data
@pytest.mark.parametrize(
    ("name", "split"), [("mbpp", "train"), ("mbpp", "test"), ("humaneval", "test"), ("humanevalfix", "test"), ("mbpp_repair", "test")]
)  # fmt: skip
def test_code_rewards_every_reference_program(task, name, split):
    rows, right = task(name).load(split), answers(name)
    # Problems come with several programs to repair.
    once = {(row["task_id"], row["tests"]): row for row in rows}.values()
    columns = {column: [row[column] for row in once] for column in ("tests", "names", "context")}
    assert task(name).reward([right[row["task_id"]] for row in once], **columns) == [1.0] * len(once)


@needs_data
@pytest.mark.parametrize("name", ["mbpp_repair", "humanevalfix"])
def test_code_rewards_no_program_that_is_to_be_repaired(sandbox, name):
    """The attempt given in the prompt, handed in again. A short limit: many of these programs never end."""
    hasty = Sandbox(cpu_seconds=0.5, allow_code_execution=True)
    task = get_task(name, data_dir=str(DATA), sandbox=hasty)
    rows = task.load("test")
    columns = {column: rows[column] for column in ("tests", "names", "context")}
    given = [prompt[-2]["content"] for prompt in rows["prompt"]]
    assert task.reward(given, **columns) == [0.0] * len(rows)
    hasty.close()


@needs_data
def test_reference_programs_of_mbpp_pass_further_tests(task, sandbox):
    """
    The 11 rows with challenge tests, the 10 that are in no split of the task, and 427 of 427 sanitized ones. The other 953 of 974
    are those of [`test_code_rewards_every_reference_program`].
    """
    submissions, done = [], {i for split in ("train", "test") for i in task("mbpp").load(split)["task_id"]}
    for row in rows_of("mbpp"):
        if row["challenge_test_list"] or row["task_id"] not in done:
            tests = "\n".join([row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]])
            submissions.append(Submission(row["code"], tests, defined(row["code"])))
    sanitized = sources.load_dataset("json", data_files=str(DATA / "mbpp" / "mbpp_sanitized.jsonl.gz"), split="train")
    for row in sanitized:
        tests = "\n".join([*row["test_imports"], *row["test_list"]])
        submissions.append(Submission(row["code"], tests, defined(row["code"])))
    assert len(submissions) == 21 + 427
    assert [verdict for verdict in sandbox.run(submissions) if not verdict.passed] == []


def test_fractional_reward_is_the_share_of_the_assertions(sandbox):
    """Of x = 3; f(1) == 1; f(2) == 4; f(x) == 9; f(4) == 16: all for the square, 1 for the identity, none for nonsense."""
    tests = "x = 3\nassert f(1) == 1\nassert f(2) == 4\nassert f(x) == 9\nassert f(4) == 16"
    in_function = "def check(f):\n    assert f(1) == 1\n    assert f(2) == 4\ncheck(f)"
    programs = [
        "def f(x): return x * x",
        "def f(x): return x",
        "def f(x) return",
        "def f(x): return [1, 4, 9, 0][x - 1]",
    ]

    def rewards(tests, **options):
        columns = {"tests": [tests] * 4, "names": [["f"]] * 4, "context": [""] * 4}
        return CodeTask(sandbox=sandbox, **options).reward(programs, **columns)

    assert rewards(tests, fractional_reward=True) == [1.0, 0.25, 0.0, 0.75]
    assert rewards(tests) == [1.0, 0.0, 0.0, 0.0]
    assert rewards(in_function, fractional_reward=True) == [1.0, 0.0, 0.0, 1.0]


@needs_data
def test_no_row_takes_a_name_from_the_program_that_is_no_entry_point(task):
    """MBPP 596 uses `sys` in its tests: they import it, as the reference program does."""
    for name in ("mbpp", "humaneval", "humanevalfix", "mbpp_repair"):
        for split in ("train", "test") if name == "mbpp" else ("test",):
            for row in task(name).load(split):
                free = free_names(row["tests"])
                assert {each for each in free if not hasattr(builtins, each)} <= set(row["names"]) and row["names"]
                assert {each for each in row["names"] if hasattr(builtins, each)} <= {"sum"}  # MBPP 126 asks for `sum`
    rows = sources.load_dataset("json", data_files=str(DATA / "mbpp" / "mbpp_sanitized.jsonl.gz"), split="train")
    for row in rows:
        tests = with_imports(row["code"], "\n".join([*row["test_imports"], *row["test_list"]]))
        free = {each for each in free_names(tests) if not hasattr(builtins, each)}
        assert free <= set(names_used(row["code"], tests))


@needs_data
def test_a_program_cannot_bring_the_modules_of_its_tests(task):
    row = next(row for row in task("mbpp").load("train") if row["task_id"] == 596)
    columns = {column: [row[column]] for column in ("tests", "names", "context")}
    forged = "class sys:\n    getsizeof = staticmethod(lambda x: 7)\ndef tuple_size(x): return 7"
    assert task("mbpp").reward([forged], **columns) == [0.0]


def test_what_tests_use_of_a_reference():
    reference = (
        "import sys\nfrom math import pi as p, e\nLIMIT: int = 3\na, b = 1, 2\nclass C: pass\ndef f(): return sys"
    )
    tests = "assert f() is sys and LIMIT == a == p and C"
    assert names_used(reference, tests) == ["LIMIT", "a", "C", "f"]
    assert with_imports(reference, tests) == f"import sys\nfrom math import pi as p\n{tests}"
    assert with_imports(reference, "import sys, math as p\n" + tests) == "import sys, math as p\n" + tests


class Own(CodeTask):
    name = "own"

    def __init__(self, tests="assert f(1) == 2", names=("f",), **kwargs):
        self.row = {"prompt": [], "tests": tests, "names": list(names), "context": ""}
        super().__init__(**kwargs)

    def rows(self, split):
        return [self.row]

    def grade(self, *programs):
        columns = {column: [value] * len(programs) for column, value in self.row.items() if column != "prompt"}
        return self.reward(list(programs), **columns)


def test_tests_that_use_what_nothing_defines_stop_the_load(sandbox):
    with pytest.raises(ValueError, match=r"Row 0 of 'own': its tests use \['helper'\].*`names`"):
        Own("assert f(1) == helper(2)", sandbox=sandbox).load("test")
    assert len(Own("assert f(1) == helper(2)", ("f", "helper"), sandbox=sandbox).load("test")) == 1
    assert len(Own("from math import *\nassert f(1) == sin(2)", sandbox=sandbox).load("test")) == 1


def test_what_the_sandbox_does_not_do_is_logged_once(sandbox, caplog):
    task = Own("assert C() > 3", ("C",), sandbox=sandbox)
    right = "class C:\n    def __gt__(self, other): return True"
    assert task.grade(right, right, "class C: pass") == [0.0, 0.0, 0.0]
    assert "an ordering (`gt`) between an object of the program and a test's value" in caplog.text
    assert len(caplog.records) == 1


def test_a_row_says_whether_its_tests_see_changed_arguments(sandbox):
    task = Own("x = [2, 1]\nf(x)\nassert x == [1, 2]", sandbox=sandbox)
    assert task.grade("def f(x): x.sort()") == [0.0]
    task.row["mutable_arguments"] = True
    assert task.grade("def f(x): x.sort()", "def f(x): pass") == [1.0, 0.0]


def run_in_plain_processes(submissions):
    """A runner as a user would write it: one Python process per program, with its tests after it."""
    verdicts = []
    for submission in submissions:
        script = f"{submission.program}\n{submission.tests}"
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=20)
        verdicts.append(Verdict(done.returncode == 0, done.stderr.strip().rpartition("\n")[2] or "passed"))
    return verdicts


def test_a_runner_of_the_users_own_takes_the_place_of_the_sandbox(sandbox, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)  # consent is for ours
    task = Own(runner=run_in_plain_processes)
    assert task.grade("```python\ndef f(x): return x + 1\n```", "def f(x): return x", "def f(x) return") == [
        1.0,
        0.0,
        0.0,
    ]
    share = Own("assert f(1) == 2\nassert f(2) == 9", runner=run_in_plain_processes, fractional_reward=True)
    assert share.grade("def f(x): return x + 1") == [0.5]
    task.close()
    with pytest.raises(ValueError, match="`sandbox` and `runner`"):
        Own(sandbox=sandbox, runner=run_in_plain_processes)
    for wrong in (lambda submissions: [], lambda submissions: [True] * len(submissions)):
        with pytest.raises(TypeError, match="one `Verdict` per submission"):
            Own(runner=wrong).grade("def f(x): return x")


ELSEWHERE = """
import math_verify, os, socket, sys
for name in [*sys.modules]:
    if name.partition(".")[0] == "trl_score": del sys.modules[name]
missing = {"resource", "fcntl", "termios", "pwd", "grp"}
class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name in missing: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotThere())
for name in missing: sys.modules.pop(name, None)
child = os.fork()  # once for both systems
sys.platform = "win32" if child else "darwin"
if child:
    os.waitpid(child, 0)
    del socket.send_fds, socket.recv_fds, os.fork, os.setsid
del os.sched_getaffinity, os.memfd_create
import trl_score, trl_score.cli
from trl_score import SCoReConfig
from trl_score.sandbox import Sandbox
from trl_score.tasks import CodeTask, MathTask, get_task
CodeTask(runner=lambda submissions: [])
for start in (lambda: Sandbox(allow_code_execution=True), lambda: MathTask(num_workers=1).reward(["1"], answer=["1"])):
    try: print(sys.platform, start(), flush=True)
    except (RuntimeError, OSError) as error: print(sys.platform, error, flush=True)
"""


def test_it_can_be_imported_on_other_systems():
    """What does not work there says so in one sentence when it is used."""
    done = python("-c", ELSEWHERE)
    assert done.returncode == 0, done.stderr[-2000:]
    mac_programs, mac_mathematics, windows_programs, windows_mathematics = done.stdout.strip().splitlines()
    assert "this is darwin" in mac_programs and mac_mathematics == "darwin [1.0]"
    assert windows_programs == windows_mathematics and "which this system (Windows) cannot send" in windows_programs


def test_tests_that_are_no_python_are_an_error_also_one_by_one():
    assert one_assert_each("assert f(1 ==") == ["assert f(1 =="]


@needs_data
@pytest.mark.slow
def test_fractional_reward_of_every_reference_program_is_one(sandbox):
    task = get_task("mbpp", data_dir=str(DATA), sandbox=sandbox, fractional_reward=True)
    rows, right = task.load("train"), answers("mbpp")
    columns = {column: rows[column] for column in ("tests", "names", "context")}
    assert task.reward([right[i] for i in rows["task_id"]], **columns) == [1.0] * len(rows)


def defined(program: str) -> tuple[str, ...]:
    return tuple(node.name for node in ast.parse(program).body if hasattr(node, "name"))


KNOWN = {  # verdicts that differ from the recorded run, and why
    "cg-00212": "does not keep a helper function of the prompt that only the tests use; our tests bring their own",
    "cg-01860": "its result hangs on the order of a set of strings, which is random in a plain run",
}
RECOVERED = {"cg-01630": "a syntax error in what follows the program"}


def plain(completion: str) -> str:
    return completion


def in_prose(completion: str) -> str:
    return f"Here is the solution:\n\n```python\n{completion}\n```\n\nIt works because it is right."


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("form", [plain, in_prose])
def test_verdicts_on_real_programs_are_the_recorded_ones(task, sandbox, form):
    """2,634 programs by nine models, found in their text and run against the tests of their task."""
    generations = sources.load_dataset(
        "json", data_files=str(DATA / "generations" / "code_generations.jsonl.gz"), split="train"
    )
    rows = {
        row["task_id"]: row
        for name, split in (("humaneval", "test"), ("mbpp", "train"), ("mbpp", "test"))
        for row in task(name).load(split)
    }
    rows_by_generation = [rows[int(i) if i.isdigit() else i] for i in map(str, generations["task_id"])]
    programs = [
        extract_program(form(completion), row["names"], row["context"])
        for completion, row in zip(generations["completion"], rows_by_generation, strict=True)
    ]
    verdicts = sandbox.run(
        [
            Submission(program, row["tests"], tuple(row["names"]))
            for program, row in zip(programs, rows_by_generation, strict=True)
        ]
    )
    different = {
        i
        for i, passed, verdict in zip(generations["id"], generations["passed"], verdicts, strict=True)
        if passed != verdict.passed
    }
    assert len(generations) == 2634 and different == KNOWN.keys() | RECOVERED.keys()


# --- the Hub's layout ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Local repositories with the files and columns that the Hub's have, in the table of sources."""

    def make(name: str, files: dict[str, list[dict]], config: str | None) -> None:
        repository = tmp_path / name.replace("/", "--")
        lines = ["configs:", f"- config_name: {config or 'default'}", "  data_files:"]
        features = Dataset.from_list([row for rows in files.values() for row in rows]).features
        for split, rows in files.items():
            file = repository / (config or "data") / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(file)
            lines += [f"  - split: {split}", f"    path: {file.relative_to(repository)}"]
        (repository / "README.md").write_text("\n".join(["---", *lines, "---"]))
        source = sources.HUB[name]
        monkeypatch.setitem(
            sources.HUB, name, sources.Source(str(repository), source.revision, source.config, source.splits)
        )

    return make


def test_math_from_the_hub_is_all_but_math_500(hub):
    """Invented problems. The copy on the Hub has no column `answer` and no split of 12,000."""
    problems = [(f"What is {i} + {i}?", f"It is $\\boxed{{{2 * i}}}$.") for i in range(6)]
    columns = [
        {"problem": problem, "level": "Level 3", "type": "Algebra", "solution": text} for problem, text in problems
    ]
    columns[5] = {**columns[5], "level": "Level ?", "solution": "No answer."}
    hub("math/all", {"train": columns[:3], "test": columns[3:]}, "default")
    held_out = {
        "problem": "What is  4 + 4?",
        "answer": "8",
        "solution": "",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "x",
    }
    hub("math/test", {"test": [held_out]}, None)
    math = get_task("math")
    train, test = math.load("train"), math.load("test")
    assert (
        train["answer"] == ["0", "2", "4", "6"] and train["level"] == [3] * 4 and train["subject"] == ["Algebra"] * 4
    )
    assert test["answer"] == ["8"] and test["level"] == [2]
    math.close()


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "mbpp", "humaneval", "humanevalfix"])
def test_rows_of_the_hub_are_those_of_a_folder(hub, task, sandbox, name):
    """The same rows in the Hub's columns and splits give the same task."""
    if name == "gsm8k":
        for split in ("train", "test"):
            rows = [{"question": row["question"], "answer": row["answer"]} for row in rows_of(f"gsm8k/{split}")[:50]]
            hub(f"gsm8k/{split}", {split: rows}, "main")
        found = get_task(name)
    elif name == "mbpp":
        columns = ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")
        splits = {split: [] for split in ("train", "validation", "test", "prompt")}
        for row in rows_of("mbpp"):
            splits[row["split"]].append({column: row[column] for column in columns})
        hub("mbpp", splits, "full")
        found = get_task(name, sandbox=sandbox)
    else:
        hub(name, {"test": rows_of(name)}, "python" if name == "humanevalfix" else None)
        found = get_task(name, sandbox=sandbox)
    for split in ("train", "test") if name in ("gsm8k", "mbpp") else ("test",):
        ours, theirs = found.load(split).to_list(), task(name).load(split).to_list()
        assert sorted(map(str, ours)) == sorted(map(str, theirs[: len(ours)]))


def test_the_hub_is_asked_for_a_pinned_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or Dataset.from_list([{"a": 1}])
    )
    for name, source in sources.HUB.items():
        sources.from_hub(name)
        assert len(source.revision) == 40 and int(source.revision, 16)
        assert asked[-1] == (
            (source.repository,),
            {"name": source.config, "revision": source.revision, "split": source.splits[-1]},
        )


# --- errors ---


def test_what_cannot_be_had_is_said(tmp_path, sandbox):
    with pytest.raises(ValueError, match=r"Unknown task 'maths'\. Expected one of: \['arithmetic', 'gsm8k'"):
        get_task("maths")
    with pytest.raises(FileNotFoundError, match=r"has no gsm8k/test\.jsonl"):
        get_task("gsm8k", data_dir=str(tmp_path)).load("test")
    with pytest.raises(OSError, match=r"openai/gsm8k at 740312a, split 'test'.*Set `data_dir`"):
        get_task("gsm8k").load("test")
    with pytest.raises(FileNotFoundError, match="not on the Hub: set `data_dir`"):
        get_task("mbpp_repair", sandbox=sandbox).load("test")
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        get_task("gsm8k").load("dev")


def test_code_needs_consent_at_construction(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for name in ("mbpp", "humaneval", "mbpp_repair", "humanevalfix"):
        with pytest.raises(PermissionError, match="HF_ALLOW_CODE_EVAL=1"):
            get_task(name)


def test_gold_answers_of_a_users_own_that_cannot_be_parsed_stop_the_load():
    class Mine(MathTask):
        name = "mine"

        def rows(self, split):
            return Dataset.from_list([{"problem": "1?", "answer": "1"}, {"problem": "?", "answer": " "}])

    mine = Mine()
    with pytest.raises(ValueError, match=r"1 gold answers of 'mine' cannot be parsed, such as \[' '\]"):
        mine.load("train")
    mine.rows = lambda split: Dataset.from_dict({"problem": ["2 + 3?"], "answer": [5]})
    rows = mine.load("train")  # a number is as good as a text
    assert mine.reward(["The answer is 5."], answer=rows["answer"]) == [1.0]
    mine.close()
