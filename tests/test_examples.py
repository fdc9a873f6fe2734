"""The example scripts, each in a process of its own; the first as `accelerate launch` starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

from trl_score.tasks.arithmetic import BASE_MODEL_PATH


EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = ["--model_name_or_path", str(BASE_MODEL_PATH)]
SMALL = ["--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none", "--max_completion_length", "8"]
SMALL += ["--max_steps", "2", "--num_generations", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "mbpp").exists(), reason="no shared data")


def run(*arguments, script="math.py", **environment):
    return python(EXAMPLES / script, *arguments, **environment)


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i} {i + 1}", "answer": f"${2 * i + 1}$"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_embedded_run_evaluates_trains_and_saves(tmp_path):
    command = [Path(sys.executable).parent / "accelerate", "launch", EXAMPLES / "math.py", "--output_dir", tmp_path]
    command += [
        "--max_steps",
        "2",
        "--stage1_steps",
        "0.5",
        "--per_device_train_batch_size",
        "16",
        "--logging_steps",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1000 held-out problems, greedy decoding" in done.stdout
    assert done.stdout.count("attempt 1  ") == 3
    assert "Accuracy@t2 " in done.stdout and "unchanged" not in done.stderr
    numbers = json.loads((tmp_path / "self_correction.json").read_text())
    assert numbers["table"]["Δ(t1,t2)"][0] < -5
    card = (tmp_path / "README.md").read_text()
    assert re.search(
        r"^\| 0 \| 1000 \| 86\.1 \[8[34]\.\d, 88\.\d\] \| 67\.9 \[6\d\.\d, 7\d\.\d\] \| -18\.2 \[-2\d\.\d, -1\d\.\d\] \|",
        card,
        re.M,
    )
    assert str(tmp_path) not in card and str(BASE_MODEL_PATH) not in card
    assert (tmp_path / "model.safetensors").exists()


def test_other_model_and_local_dataset_with_a_quantized_adapter(tmp_path, problems):
    arguments = [
        *MODEL,
        *SMALL,
        "--dataset_name",
        problems,
        "--use_peft",
        "--load_in_4bit",
        "--output_dir",
        tmp_path / "out",
    ]
    arguments += ["--lora_target_modules", "q_proj", "v_proj", "--correction_instruction", "again"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_settings_are_read_from_a_file(tmp_path, problems):
    file = tmp_path / "config.yaml"
    settings = {"model_name_or_path": str(BASE_MODEL_PATH), "dataset_name": str(problems), "max_steps": 1}
    settings |= {"output_dir": str(tmp_path / "out"), "correction_instruction": "again", "num_attempts": 3}
    file.write_text(json.dumps(settings))  # JSON is YAML
    done = run(
        "--config",
        file,
        *[item for item in SMALL if item not in ("--max_steps", "2")][:8],
        "--num_generations",
        2,
        "--per_device_train_batch_size",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "| attempts | 3 |" in (tmp_path / "out" / "README.md").read_text()


def test_attempts_that_cannot_be_graded_do_not_stop_the_run(tmp_path):
    """math-verify cannot read these solutions, so no attempt has a reward."""
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "solution": ""} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        *MODEL,
        *SMALL,
        "--dataset_name",
        tmp_path,
        "--correction_instruction",
        "again",
        "--output_dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "Accuracy@t2   nan" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL], "Which problems? Give --task, or --dataset_name"),
        (["--dataset_name", "no/such-dataset"], "The dataset 'no/such-dataset' cannot be loaded: "),
        ([*MODEL, "--dataset_name", "missing.jsonl"], "The dataset 'missing.jsonl' cannot be loaded: "),
        (
            ["--model_name_or_path", "no/such-model", "--task", "arithmetic"],
            "The model 'no/such-model' cannot be",
        ),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(tmp_path, arguments, message):
    done = run(*arguments, *SMALL, "--output_dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_dataset_alone_asks_for_a_model(tmp_path, problems):
    done = run("--dataset_name", problems, *SMALL, "--output_dir", tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("Which model?")


TINY = ["--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none", "--max_completion_length", "16"]
TINY += ["--max_steps", "2", "--num_generations", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
TINY += ["--gradient_accumulation_steps", "1", "--num_eval_problems", "4", "--per_device_eval_batch_size", "4"]
TINY += ["--eval_strategy", "no", "--data_dir", str(DATA)]


@needs_data
@pytest.mark.parametrize("task", [pytest.param("math", marks=pytest.mark.slow), "gsm8k"])
def test_mathematics_on_real_problems(tmp_path, chat_model, task):
    arguments = ["--task", task, "--model_name_or_path", chat_model, *TINY, "--output_dir", tmp_path]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "4 held-out problems" in done.stdout and "Accuracy@t2" in done.stdout
    assert "You are a math expert." in done.stdout  # the problem, as the model saw it
    assert (tmp_path / "model.safetensors").exists()


@needs_data
@pytest.mark.parametrize("eval_task", ["humaneval", pytest.param("mbpp", marks=pytest.mark.slow)])
def test_programs_on_real_problems(tmp_path, chat_model, eval_task):
    arguments = ["--model_name_or_path", chat_model, "--eval_task", eval_task, *TINY, "--output_dir", tmp_path]
    done = run(*arguments, script="code.py", HF_ALLOW_CODE_EVAL="1")
    assert done.returncode == 0, done.stderr
    assert "4 held-out problems" in done.stdout and "You are an expert Python programmer" in done.stdout
    card = (tmp_path / "README.md").read_text()
    assert "0.25" in card  # stage1_beta of the paper's MBPP column
    assert f"problems of the task `{eval_task}` (test split)" in card and "| mbpp, 464 problems |" in card
    assert re.search(r"^\| 0 \| 4 \| .*\n\| \d+ \| 4 \| ", card, re.M)  # optimizer steps, problems


def test_programs_need_consent(tmp_path, chat_model):
    arguments = ["--model_name_or_path", chat_model, *TINY, "--output_dir", tmp_path]
    done = run(*arguments, script="code.py", HF_ALLOW_CODE_EVAL="0")
    assert done.returncode == 1 and "HF_ALLOW_CODE_EVAL=1" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_task_of_ones_own(tmp_path, chat_model):
    settings = [*SMALL, "--per_device_eval_batch_size", "2"]
    done = run("--model_name_or_path", chat_model, *settings, "--output_dir", tmp_path, script="custom_task.py")
    assert done.returncode == 0, done.stderr
    assert "Write 'house' backwards." in done.stdout


@needs_data
def test_a_task_is_had_or_said_in_one_line(tmp_path, chat_model):
    for arguments, message in (
        (["--task", "maths"], "Unknown task 'maths'. Expected one of"),
        (["--task", "humaneval", "--data_dir", DATA], "Unknown split 'train' of 'humaneval'"),
        (["--task", "gsm8k", "--data_dir", tmp_path], f"`data_dir='{tmp_path}'` has no gsm8k/train.jsonl"),
        (["--task", "arithmetic", "--data_dir", tmp_path], "The problems of 'arithmetic' are generated"),
    ):
        settings = ["--model_name_or_path", chat_model, "--bf16", "false", "--output_dir", tmp_path]
        done = run(*settings, *arguments, HF_ALLOW_CODE_EVAL="1")
        assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
        assert "Traceback" not in done.stderr


TINY_STUDY = ["--max_steps", "4", "--stage1_steps", "2", "--rollouts_per_step", "32", "--num_train_problems", "16"]
TINY_STUDY += ["--num_eval_problems", "50"]


def test_baseline_on_the_embedded_task(tmp_path):
    """STaR D+ at a tenth of its samples, started twice."""
    arguments = ["--plus", "true", "--num_samples", "18", "--max_steps", "2", "--num_eval_problems", "40"]
    for _ in range(2):
        done = run(*arguments, "--output_dir", tmp_path, script="baselines.py")
        assert done.returncode == 0, done.stderr
        assert "star D+: 9000 attempts sampled" in done.stdout and done.stdout.count("2 optimizer steps") == 3
        assert re.search(r"^\| Accuracy@t2 \| \d\d\.\d \[.*\] \| \d\d\.\d \[", done.stdout, re.M)
    assert "Loading weights" not in done.stderr  # the second time nothing is left to do
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "evaluation" / "summary.json").exists()


@pytest.mark.slow
def test_ablations_write_their_table_and_figures(tmp_path):
    methods = ["base", "Self-Refine", "Pair-SFT D+", "single-attempt RL", "no online first attempts", "SCoRe"]
    arguments = ["--quick", *TINY_STUDY, "--output_dir", tmp_path, "--methods"]
    done = run(*arguments, *methods, script="experiments/ablations.py")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.md").read_text()
    assert text in done.stdout and "`python examples/experiments/ablations.py --quick" in text
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["method", *methods]
    for image in re.findall(r"\]\((.*?\.png)\)", text):
        assert (tmp_path / image).stat().st_size > 5000
    again = run(*arguments, *methods, script="experiments/ablations.py")
    assert again.returncode == 0 and again.stdout.count("|") == done.stdout.count("|")
    assert not re.search(r"^arithmetic_base.*\d s$", again.stderr, re.M)  # nothing is run again


@pytest.mark.slow
def test_options_have_their_tokens_in_the_table(tmp_path):
    arguments = ["--quick", *TINY_STUDY, "--study", "options", "--output_dir", tmp_path, "--methods"]
    done = run(*arguments, "offline half, two updates", "SCoRe", script="experiments/ablations.py")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.md").read_text()
    head, _, offline, score = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head[7:] == ["thousand tokens sampled", "until @t2 ≥ 95%", "@t2 minus SCoRe's |"]
    assert score[7] == "2 [2, 2]"  # 3 steps of 32 rollouts of two attempts of up to 8 tokens: 1.5
    assert offline[7] == "2 [2, 2]"  # and 16 problems with 8 stored attempts of up to 8 tokens: 1.0
    assert (tmp_path / "arithmetic_base_tokens.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize(("study", "methods"), [("paper", 15), ("options", 14), ("three", 4)])
def test_all_ablations_at_a_small_size(tmp_path, study, methods):
    sizes = ["--max_steps", "6", "--stage1_steps", "2", "--rollouts_per_step", "128", "--num_train_problems", "64"]
    sizes += ["--num_eval_problems", "100", "--study", study]
    done = run("--quick", *sizes, "--output_dir", tmp_path, script="experiments/ablations.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.md").read_text().count("\n| ") == methods + 1
