"""Problems of one's own: a class in a file or a package, a dataset with reward functions, a generator of reasoning-gym."""

import json
import linecache
import logging
import sys
from functools import partial

import pytest
from datasets import Dataset

from trl_score import cli, evaluate_self_correction, training
from trl_score.collection import collect
from trl_score.evaluation import load_evaluation
from trl_score.fingerprints import of_grader
from trl_score.jobs import grade
from trl_score.records import strict_json
from trl_score.sampler import Attempt, Sampler
from trl_score.scaling import votes
from trl_score.tasks import GSM8K, Arithmetic, HumanEval, catalogue, get_task, reasoning_gym
from trl_score.tasks.arithmetic import BASE_MODEL_PATH, answer, problems
from trl_score.tasks.dataset import DatasetTask


BASE = str(BASE_MODEL_PATH)
TASK = """
from trl_score.tasks import Arithmetic, Task

class Small(Arithmetic):
    name = "small"
    def __init__(self):
        super().__init__(num_train=32, num_test=20)

class Nameless(Task):
    def load(self, split): ...
    def reward(self, completions, **kwargs): ...

class Abstract(Task):
    name = "abstract"

ready = Small()
number = 3

def same(completions, solution, **kwargs):
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(text.split() == gold.split()) for text, gold in zip(texts, solution, strict=True)]

def with_prompts(prompts, completions, solution, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return same(completions, solution)

def second_attempts(completions, attempt, **kwargs):
    return [float(attempt == 2)] * len(completions)

async def asynchronous(completions, solution, **kwargs):
    return same(completions, solution)

def of_numpy(completions, solution, **kwargs):
    import numpy as np
    return [np.mean([each]) for each in same(completions, solution)]

def lengths(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]

def broken(completions, solution, **kwargs):
    return [1 / (text != "2") for text in [each[0]["content"] for each in completions]]

def too_few(completions, **kwargs):
    return [1.0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a task of one's own and a dataset, which commands are run in."""
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "broken_task.py").write_text("1 / 0")
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 1), ("test", 2)):
        rows = [{"problem": digits, "answer": answer(digits)} for digits in problems(split, 20, seed)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs a command in this process; returns its exit code and what it printed."""

    def command(*arguments):
        try:
            code = cli.main([str(each) for each in arguments])
        except SystemExit as stop:
            code = stop.code
        finally:
            logging.getLogger("trl_score").setLevel(logging.NOTSET)
        done = capsys.readouterr()
        return code, done.out, done.err

    return command


@pytest.mark.parametrize(
    "name", ["my_task.py:Small", "{folder}/my_task.py:Small", "my_task:Small", "my_task.py:ready"]
)
def test_a_class_in_a_file_or_a_module_is_a_task(folder, name):
    task = get_task(name.format(folder=folder))
    assert task.name == "small" and len(task.load("test")) == 20


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("my_tsk.py:Small", OSError, "there is no file 'my_tsk.py'"),
        ("my_task.py:Smal", ValueError, "'my_task.py' has no 'Smal'"),
        ("no_such_module:Small", ImportError, "No module named 'no_such_module'"),
        ("broken_task.py:Small", ValueError, "fails when it is loaded: ZeroDivisionError: division by zero"),
        ("my_task.py:number", ValueError, "is not a subclass of `trl_score.tasks.Task`"),
        ("my_task.py:Nameless", ValueError, "has no `name`. Set it in the class"),
        ("my_task.py:Abstract", ValueError, "cannot be made: Can't instantiate abstract class"),
        ("maths", ValueError, "Unknown task 'maths'. Expected one of"),
    ],
)
def test_what_is_no_task_is_said(folder, name, kind, message):
    with pytest.raises(kind, match=message):
        get_task(name)


def test_a_task_that_takes_no_folder_says_so(folder):
    with pytest.raises(ValueError, match="unexpected keyword argument 'data_dir'"):
        get_task("my_task.py:Small", data_dir="x")


def test_a_dataset_is_a_task(folder):
    """A folder with two splits, a single file, other names of the splits; columns get the names that TRL's functions read."""
    task = DatasetTask("data")
    assert task.has("test") and task.load("test").column_names == ["solution", "prompt"]
    assert task.load("train")[0]["prompt"] == [{"role": "user", "content": problems("train", 1, 1)[0]}]
    file = DatasetTask("data/train.jsonl")
    assert len(file.load("train")) == 20 and not file.has("test")
    with pytest.raises(ValueError, match="has no split 'test', only \\['train'\\]"):
        file.load("test")
    turned = DatasetTask("data", splits={"train": "test", "test": "train"})
    assert turned.load("train")["solution"] == task.load("test")["solution"]


def test_reward_functions_are_trl_s_or_ones_own(folder):
    task = DatasetTask("data", reward_funcs=["my_task.py:same", "think_format_reward"])
    gold = task.load("test")["solution"][0]
    for completions in (
        [gold, "1"],
        [[{"role": "assistant", "content": gold}], [{"role": "assistant", "content": "1"}]],
    ):
        assert task.reward(completions, solution=[gold, gold]) == [1.0, 0.0]
    assert [each.__name__ for each in task.reward_funcs] == ["same", "think_format_reward"]
    assert DatasetTask("data", reward_funcs=["my_task.same"]).reward([gold], solution=[gold]) == [1.0]
    assert DatasetTask("data").reward(["It is \\boxed{3}.", "\\boxed{4}"], solution=["$3$", "$3$"]) == [1.0, 0.0]
    for name in ("acuracy_reward", "my_task.py:number"):
        with pytest.raises(ValueError, match=f"`reward_funcs` has no function '{name}'"):
            DatasetTask("data", reward_funcs=[name])


def test_gold_answers_of_a_dataset_are_in_the_form_that_the_grader_reads():
    rows = Dataset.from_dict({"solution": ["72", "$3$"]})
    task = DatasetTask("d")
    assert task.gold(rows) == ["\\boxed{72}", "\\boxed{3}"]
    assert task.reward(task.gold(rows), solution=rows["solution"]) == [1.0, 1.0]
    rows = Dataset.from_dict({"solution": ["3 + 4 = <<3+4=7>>7\n#### 7", "18 dollars", "It is 7", "So $\\boxed{4}$"]})
    assert task.gold(rows) == ["\\boxed{7}", "\\boxed{18}", "\\boxed{7}", "So $\\boxed{4}$"]
    assert task.reward(task.gold(rows), solution=rows["solution"]) == [1.0] * 4


@pytest.mark.parametrize("column", ["answer", "solution"])
@pytest.mark.parametrize(
    ("answers", "attempts", "rewards"),
    [
        (["2\\sqrt{3}", "3\\pi"], ["The answer is $\\boxed{2\\sqrt{3}}$.", "So $\\boxed{3\\pi}$"], [1.0, 1.0]),
        (["2\\sqrt{3}", "3\\pi"], ["The answer is $\\boxed{2}$.", "So $\\boxed{3}$"], [0.0, 0.0]),
        ([5, 7], ["$\\boxed{5}$", "$\\boxed{8}$"], [1.0, 0.0]),
        (["5 million", "$3 = 3.00$\n#### 4 pens"], ["$\\boxed{5000000}$", "$\\boxed{4}$"], [1.0, 1.0]),
        (["5 million", "50% is 7.\n#### 8"], ["$\\boxed{5}$", "$\\boxed{7}$"], [0.0, 0.0]),
        (["18 dollars", "\\$18.50"], ["$\\boxed{18}$", "$\\boxed{18.5}$"], [1.0, 1.0]),
        (["12 cm^2", "100°"], ["$\\boxed{12}$", "$\\boxed{100^\\circ}$"], [1.0, 1.0]),
        (["12 cm^2", "100°"], ["$\\boxed{144}$", "$\\boxed{10}$"], [0.0, 0.0]),
        (["100°", "12 km/h"], ["$\\boxed{100°}$", "$\\boxed{12 km/h}$"], [1.0, 1.0]),
        (
            ["1 1/2", "2½", "twelve", "101_2"],
            ["$\\boxed{1.5}$", "$\\boxed{2.5}$", "$\\boxed{12}$", "$\\boxed{5}$"],
            [1.0, 1.0, 1.0, 0.0],
        ),
        (["$\\frac{1}{2}$", "So it is $\\boxed{4}$"], ["$\\boxed{0.5}$", "$\\boxed{4}$"], [1.0, 1.0]),
    ],
)
def test_a_column_of_answers_is_read_as_mathematics(tmp_path, column, answers, attempts, rewards):
    """Bare LaTeX and integers too, of which TRL's reward by itself finds a part or nothing."""
    rows = [{"problem": "?", column: answer} for answer in answers]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = DatasetTask(str(tmp_path / "d.jsonl"))
    assert task.reward(attempts, solution=task.load("train")["solution"]) == rewards


# what the trainer gives to reward functions, evaluation gives too


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("with_prompts", [[1.0, 0.0], [0.0, 1.0]]),
        ("second_attempts", [[0.0, 1.0], [0.0, 1.0]]),
        ("asynchronous", [[1.0, 0.0], [0.0, 1.0]]),
        ("of_numpy", [[1.0, 0.0], [0.0, 1.0]]),
        ("lengths", [[1.0, 2.0], [3.0, 4.0]]),
    ],
)
def test_reward_functions_that_training_takes_grade_an_evaluation(folder, name, expected):
    task = DatasetTask("data", reward_funcs=[f"my_task.py:{name}"])
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]] * 2, "solution": ["1", "2"]})
    tokens = [[[0], [0] * 2], [[0] * 3, [0] * 4]]
    records = list(grade(task, rows, [["1", "2"], ["1", "2"]], tokens))
    assert [record["rewards"] for record in records] == expected
    assert json.loads(strict_json(records))[0]["correct"] == [each >= 1 for each in expected[0]]


def test_an_evaluation_gives_the_tokens_of_the_attempts(folder):
    task = DatasetTask("data", reward_funcs=["my_task.py:lengths"])
    (row,) = evaluate_self_correction(BASE, task, max_completion_length=8, limit=1).rollouts
    assert row["rewards"] == row["num_tokens"] and "token_ids" not in row


def test_grades_of_another_grader_are_not_reused(folder):
    def evaluated(name):
        settings = {
            "limit": 4,
            "max_completion_length": 8,
            "output_dir": folder / "out",
            "correction_instruction": "Again.",
        }
        return evaluate_self_correction(BASE, DatasetTask("data", reward_funcs=[f"my_task.py:{name}"]), **settings)

    before = evaluated("second_attempts").rollouts
    assert evaluated("second_attempts").rollouts == before
    with pytest.raises(ValueError, match=r"another evaluation: grader 'second_attempts .*' instead of 'same .*'"):
        evaluated("same")
    file = folder / "my_task.py"
    file.write_text(file.read_text() + "# mended\n")
    linecache.clearcache()
    with pytest.raises(ValueError, match="another evaluation: grader 'second_attempts"):
        evaluated("second_attempts")
    settings = json.loads((folder / "out" / "settings.json").read_text())
    del settings["grader"]  # a folder of an earlier version
    (folder / "out" / "settings.json").write_text(json.dumps(settings))
    assert evaluated("second_attempts").rollouts == before


def test_a_grader_is_told_by_all_that_grades(tmp_path):
    """Not `reward` alone, which a task of one's own may inherit; and the arguments of a function made from another."""
    file = tmp_path / "graders.py"

    def graders(version):
        file.write_text(
            "from functools import partial\n"
            "from trl_score.tasks import GSM8K\n"
            "def near(completions, tolerance, **kwargs): return [tolerance] * len(completions)\n"
            "right = partial(near, tolerance=0.5)\n"
            "class Strict(GSM8K):\n"
            f"    def grade(self, *args, **kwargs): return super().grade(*args, **kwargs)  # {version}\n"
            "class Renamed(GSM8K):\n"
            "    name = 'renamed'\n"
        )
        sys.modules.pop(f"trl_score_file_{file}", None)
        linecache.clearcache()
        functions = [get_task(f"{file}:{name}").grader for name in ("Strict", "Renamed")]
        return [*functions, DatasetTask("x", reward_funcs=[f"{file}:right"]).grader]

    one, other = graders("one"), graders("other")
    assert one == graders("one") and one[0] != other[0] and one[2] != other[2]
    assert one[1] == other[1] == GSM8K().grader == "MathTask.reward"
    assert len({of_grader(partial(max, 1, key=key)) for key in (len, abs)}) == 2

    def runner(submissions):
        return []

    assert HumanEval(runner=runner).grader != HumanEval(allow_code_execution=True).grader


@pytest.mark.parametrize("command_line", ["evaluate", "scale", "tasks"])
def test_no_problems_are_an_error_in_one_line(folder, command, command_line):
    (folder / "none.py").write_text(
        "from trl_score.tasks import Arithmetic\n"
        "class Empty(Arithmetic):\n    name = 'empty'\n    def load(self, split): return super().load(split).select([])\n"
    )
    sampled = ["--model", BASE, "--output_dir", "out", "--task"] if command_line != "tasks" else []
    code, _, err = command(command_line, *sampled, "none.py:Empty")
    assert code == 1 and "of 'empty' has no problems" in err and "Traceback" not in err
    assert not (folder / "out").exists()


def test_a_dataset_without_answers_is_refused_before_the_first_reward(folder):
    (folder / "d.jsonl").write_text(json.dumps({"problem": "?", "reply": "1"}))
    with pytest.raises(ValueError, match="has no column `solution` or `answer` for `accuracy_reward`"):
        DatasetTask("d.jsonl").load("train")
    assert len(DatasetTask("d.jsonl", reward_funcs=["my_task.py:second_attempts"]).load("train")) == 1


@pytest.mark.parametrize("name", ["d.csv", "d.parquet", "d.jsonl", "d.jsonl.gz"])
def test_a_file_is_a_dataset(folder, name):
    rows = Dataset.from_dict({"problem": ["1 + 1?", "2 + 2?"], "answer": [2, 4]})
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(name.split(".")[1], rows.to_json)(name)
    task = DatasetTask(name)
    loaded = task.load("train")
    assert loaded["prompt"][1] == [{"role": "user", "content": "2 + 2?"}]
    assert task.reward(task.gold(loaded), solution=loaded["solution"]) == [1.0, 1.0]


def test_a_file_that_cannot_be_read_is_an_error_that_says_why(folder):
    (folder / "d.jsonl").write_text('{"problem": "?", "answer": "1"}\n{"problem": "?",')
    with pytest.raises(OSError, match=r"'d.jsonl' cannot be loaded: JSON parse error"):
        DatasetTask("d.jsonl").load("train")


@pytest.mark.parametrize("prompt", [None, [], [{"role": "user", "content": None}]])
def test_a_row_without_a_problem_is_refused(folder, command, prompt):
    rows = [{"prompt": [{"role": "user", "content": "?"}], "answer": "1"}, {"prompt": prompt, "answer": "1"}]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--dataset_name", "d.jsonl", "--split", "train", "--output_dir", "out")
    code, _, err = command("evaluate", "--model", BASE, *options)
    assert code == 1 and "The split 'train' of 'd.jsonl' has no problem in row 1" in err


def test_an_empty_file_is_no_dataset(folder, command):
    (folder / "empty.jsonl").write_text("")
    code, _, err = command(
        "evaluate", "--model", BASE, "--dataset_name", "empty.jsonl", "--split", "train", "--output_dir", "out"
    )
    assert code == 1 and "The dataset 'empty.jsonl' cannot be loaded: " in err and "Traceback" not in err


def test_levels_and_subjects_that_are_lists_are_texts(folder):
    rows = Dataset.from_dict(
        {"prompt": ["?"] * 2, "solution": ["1", "2"], "level": [[1], [2]], "subject": [["a"], ["b"]]}
    )
    graded = list(grade(DatasetTask("data", reward_funcs=["my_task.py:same"]), rows, [["1", "1"], ["1", "2"]]))
    assert [(row["level"], row["subject"]) for row in graded] == [("[1]", "['a']"), ("[2]", "['b']")]


def test_an_error_of_a_reward_function_is_said_in_one_line(folder):
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]] * 2, "solution": ["1", "2"]})
    texts = [["1", "1"], ["1", "2"]]
    with pytest.raises(
        RuntimeError, match=r"'broken' raised ZeroDivisionError on attempt 2, .* says: division by zero\. An"
    ):
        list(grade(DatasetTask("data", reward_funcs=["my_task.py:broken"]), rows, texts))
    with pytest.raises(ValueError, match="'too_few' returned 1 rewards for 2 completions of attempt 1"):
        list(grade(DatasetTask("data", reward_funcs=["my_task.py:too_few"]), rows, texts))


def test_a_column_that_takes_a_keyword_of_reward_functions_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "?", "attempt": 1}))
    with pytest.raises(ValueError, match=r"has a column `attempt`, the keyword .* Rename"):
        DatasetTask(str(tmp_path / "d.jsonl")).load("train")


def test_answers_that_read_mathematics_vote_together_in_any_words():
    """Seven of eight say 4 in other words; by whole texts each is a vote of its own, and the first, which is wrong, wins."""
    task = DatasetTask("data")
    texts = ["It is \\boxed{5}.", *(f"After {k} steps: $\\boxed{{{k + 3}-{k - 1}}}$" for k in range(1, 8))]
    rows = Dataset.from_dict({"prompt": ["?"] * 8, "solution": ["$4$"] * 8})
    records = list(grade(task, rows, [[text, "So \\boxed{4}"] for text in texts]))
    assert [record["changed_answer"] for record in records] == [True] + [False] * 7
    rollouts = [record | {"index": 0, "sample": k} for k, record in enumerate(records)]
    assert votes(task, rollouts[:4], rollouts[4:], 8)[-1]["parallel"]["value"] == 1.0
    assert task.answer("I do not know.") is None
    other = DatasetTask("data", reward_funcs=["think_format_reward"])
    assert other.answer(" So \\boxed{4} ") == "So \\boxed{4}" and other.same_answers(["0.5"], ["1/2"]) == [False]


# a column `correction_instruction`


class Echo(Sampler):
    """Every attempt but the first repeats what the user has said before it."""

    name, backend = "echo", "none"

    def length(self, prompt):
        return len(prompt)

    def sample(self, prompts, instructions, decoding, seed, given=0):
        said = [[each] * len(prompts) if isinstance(each, str) else each for each in instructions]
        return [[Attempt(text, 1, False) for text in ["1", *row]] for row in zip(*said, strict=True)]


def by_row(folder, *instructions):
    rows = [
        {"problem": f"{k} 1", "answer": "1", "correction_instruction": each} for k, each in enumerate(instructions)
    ]
    (folder / "by_row.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetTask("by_row.jsonl", reward_funcs=["my_task.py:same"], splits={"test": "train"})


def test_a_row_s_own_correction_instruction_is_said(folder):
    task = by_row(folder, "Look again.", None, "Is that so?")
    found = evaluate_self_correction(
        Echo(), task, num_attempts=3, batch_size=2, correction_instruction="Check.", output_dir="out"
    )
    assert [row["attempts"][1:] for row in found.rollouts] == [
        ["Look again."] * 2,
        ["Check."] * 2,
        ["Is that so?"] * 2,
    ]
    assert json.loads((folder / "out" / "settings.json").read_text())["correction_instructions"] == "by row"
    refined = evaluate_self_correction(Echo(), task, self_refine=True)  # which has turns of its own
    assert {row["attempts"][1] for row in refined.rollouts} == {task.refine_instruction}
    assert [row["attempts"][1] for row in collect(Echo(), task, num_samples=1)][::2] == ["Look again.", "Is that so?"]


def test_rollouts_from_before_the_column_was_read_are_not_reused(folder):
    task = by_row(folder, "Look again.", "Is that so?")
    evaluate_self_correction(Echo(), task, output_dir="out")
    settings = json.loads((folder / "out" / "settings.json").read_text())
    del settings["correction_instructions"]
    (folder / "out" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="correction_instructions None instead of 'by row'"):
        evaluate_self_correction(Echo(), task, output_dir="out")


def test_an_instruction_by_row_that_cannot_be_said_is_refused(folder):
    with pytest.raises(ValueError, match="`correction_instruction` is empty in row 1"):
        evaluate_self_correction(Echo(), by_row(folder, "Look again.", " "))
    with pytest.raises(ValueError, match="The baselines need one instruction for all rows"):
        collect(Echo(), by_row(folder, "Look again."), correction_instruction="Check.")


SMALL = ["--model", BASE, "--max_completion_length", "8", "--limit", "4"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--task", "my_task.py:Small"], "small"),
        (["--dataset_name", "data", "--reward_funcs", "my_task.py:same", "--correction_instruction", "please check again"], "data"),
    ],
)  # fmt: skip
def test_commands_that_sample_take_them(folder, command, given, name):
    code, out, err = command("evaluate", *SMALL, *given, "--output_dir", "results")
    assert code == 0 and "| Accuracy@t1 |" in out, err
    assert load_evaluation("results").settings["task"] == name
    code, out, err = command("collect", *SMALL, *given, "--num_samples", "1", "--output_dir", "rollouts")
    assert code == 0 and out.startswith("4 rollouts at 4 problems"), err


def test_training_takes_them(folder, monkeypatch, capsys):
    tiny = [
        "--model_name_or_path",
        BASE,
        "--max_steps",
        "1",
        "--stage1_steps",
        "0",
        "--max_completion_length",
        "8",
        "--use_cpu",
    ]
    tiny += ["--num_generations", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--bf16", "false"]
    tiny += ["--save_strategy", "no", "--correction_instruction", "please check again", "--logging_steps", "1"]
    training.main(["--task", "my_task.py:Small", *tiny, "--output_dir", "own"])
    assert "20 held-out problems" in capsys.readouterr().out
    given = ["--dataset_name", "data", "--reward_funcs", "my_task.py:same", "my_task.py:same"]
    trainers, train = [], training.train
    monkeypatch.setattr(training, "train", lambda *args: trainers.append(train(*args)))
    training.main([*given, *tiny, "--output_dir", "other"])
    (log,) = [log for log in trainers[0].state.log_history if "reward_t1" in log]
    assert log["reward_t1"] == pytest.approx(2 * log["accuracy_t1"])  # added in training, and right by the first


# reasoning-gym


@pytest.fixture
def gym():
    pytest.importorskip("reasoning_gym")
    return get_task("reasoning_gym:chain_sum")


def test_problems_of_reasoning_gym_are_graded_by_it(gym):
    rows = gym.load("test").select(range(8))
    gold = gym.gold(rows)
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    assert gym.reward(gold, **columns) == [1.0] * 8
    assert gym.reward([f"Let me see. <answer> {each} </answer>" for each in gold], **columns) == [1.0] * 8
    assert (
        gym.reward(["" for _ in gold], **columns) == gym.reward([f"{each}0" for each in gold], **columns) == [0.0] * 8
    )
    assert gym.answer("So <answer>3</answer>, no, <answer>4</answer>") == "4" and gym.answer("  ") is None


def test_the_answer_to_reasoning_gym_stands_behind_the_reasoning():
    read = partial(reasoning_gym.ReasoningGym.answer, None)
    assert (
        read("<think>\n1 + 2, so <answer>4</answer>?\nNo.</think>\n\n3")
        == read("<think></think><answer> 3</answer>")
        == "3"
    )
    assert read("<think>\n1 + 2, so <answer>3</answer>? Wait") is None


def test_splits_of_reasoning_gym_are_the_same_each_time_and_disjoint(gym):
    train, test = (gym.load(split)["prompt"] for split in ("train", "test"))
    assert train == get_task("reasoning_gym:chain_sum").load("train")["prompt"]
    texts = [each[0]["content"] for each in [*train, *test]]
    assert len(set(texts)) == len(texts) > 900


def test_an_attempt_that_the_grader_cannot_read_is_wrong(gym, monkeypatch):
    kind = type(gym._data["test"])
    grade = kind.score_answer
    monkeypatch.setattr(kind, "score_answer", lambda self, answer, entry: grade(self, str(int(answer)), entry))
    assert gym.reward(["?"], split=["test"], number=[0]) == [0.0]


def test_a_grader_that_fails_on_the_right_answer_is_an_error(gym, monkeypatch):
    monkeypatch.setattr(type(gym._data["test"]), "score_answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gym.reward(["?"], split=["test"], number=[0])


def test_what_reasoning_gym_does_not_have_is_said(gym):
    with pytest.raises(ValueError, match=r"reasoning-gym has no 'chain_sums'\. It has: "):
        get_task("reasoning_gym:chain_sums")
    with pytest.raises(ValueError, match=r"does not take the settings \{'min_term': 4\}"):
        get_task("reasoning_gym:chain_sum", min_term=4)
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        gym.load("dev")


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    assert reasoning_gym.generators() == []
    with pytest.raises(ImportError, match="pip install 'trl-score\\[reasoning-gym\\]'"):
        get_task("reasoning_gym:chain_sum")


# what `trl-score tasks` prints


def test_tasks_are_listed(command):
    code, out, _ = command("tasks")
    assert code == 0 and "gsm8k" in out and "reasoning_gym:NAME" in out and "FILE.py:CLASS" in out
    assert (
        catalogue.sentence("Words (Cobbe et al. 2021): `train` or test. More.")
        == "Words (Cobbe et al. 2021): train or test."
    )


def test_a_task_is_shown(folder, command):
    code, out, _ = command("tasks", "my_task.py:Small")
    gold = Arithmetic(num_test=1).load("test")["answer"][0]
    assert code == 0 and "32 (train), 20 (test)" in out and f"    {gold}\n" in out
    assert "user: " in out and "please check again" in out and "1.0 if the whole line is right" in out
    code, _, err = command("tasks", "my_task.py:Smal")
    assert code == 1 and err == "trl-score tasks: The task 'my_task.py:Smal': 'my_task.py' has no 'Smal'.\n"


def test_configurations_are_listed_and_printed(command):
    code, out, _ = command("configs")
    assert code == 0 and "\nmath_1.5b_lora " in out
    code, out, _ = command("configs", "math_1.5b_lora")
    assert code == 0 and "task: math" in out
    code, _, err = command("configs", "math_1.5_lora")
    assert code == 1 and "Did you mean 'math_1.5b_lora'?" in err
