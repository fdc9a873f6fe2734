"""The command line, as a user types it."""

import json
import logging
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from trl_score import cli
from trl_score.baselines import BaselineArguments
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.training import TrainArguments


ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).parent / "trl-score")
BASE = str(BASE_MODEL_PATH)
SMALL = ["--task", "arithmetic", "--model", BASE, "--max_completion_length", "8", "--limit", "20"]


def run(*arguments):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def options_of(command: str) -> set[str]:
    """The options that a command has, by its own parser."""
    if command == "report":
        text = run("report", "--help").stdout
        return set(re.findall(r"--\w+", text)) - {"--help"}
    if command in ("train", "baselines"):
        return {
            f"--{each.name}" for each in fields({"train": TrainArguments, "baselines": BaselineArguments}[command])
        }
    kinds = {"evaluate": cli.EvaluateArguments, "scale": cli.ScaleArguments, "collect": cli.CollectArguments}
    return {f"--{each.name}" for each in fields(kinds[command])}


@pytest.mark.parametrize("command", ["train", "baselines", "collect", "evaluate", "scale", "report"])
def test_every_option_is_documented_and_every_documented_one_exists(command):
    text = (ROOT / "docs" / "cli.md").read_text()
    section = re.search(rf"^## trl-score {command}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    documented = set(re.findall(r"^\| `(--\w+)`", section, re.M))
    assert documented == options_of(command)
    helped = run(command, "--help")
    assert helped.returncode == 0 and all(option in helped.stdout for option in documented)


def test_help_is_instant_and_complete():
    for arguments in ([], ["--help"], ["evaluate", "--help"], ["report", "--help"]):
        assert run(*arguments).returncode == 0
    assert all(command in run("--help").stdout for command in cli.COMMANDS)
    code = "import sys, trl_score.cli; sys.exit('torch' in sys.modules or 'transformers.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # what would make it slow is not loaded


def test_evaluate_scale_and_report(tmp_path):
    done = run("evaluate", *SMALL, "--output_dir", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert "| Accuracy@t1 |" in done.stdout and "20 x 1" in done.stdout and "greedy, 8 tokens" in done.stdout
    config = tmp_path / "scale.yaml"
    config.write_text(
        json.dumps({"task": "arithmetic", "model": BASE, "max_completion_length": 8, "limit": 20, "max_budget": 4})
    )
    done = run("scale", "--config", config, "--output_dir", tmp_path / "scale", "--temperature", "1.0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 4 \| \d", done.stdout, re.M)
    assert json.loads((tmp_path / "scale" / "corrected" / "settings.json").read_text())["temperature"] == 1.0
    done = run(
        "report", tmp_path / "eval", tmp_path / "scale", "--output", tmp_path / "r.html", "--figures", tmp_path / "f"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size > 10_000 and (tmp_path / "f" / "scaling.png").exists()


def test_train_is_launched_by_accelerate(tmp_path):
    """The embedded task needs no other option than its name and a folder; the rest here makes it short."""
    short = ["--num_eval_problems", "8", "--save_strategy", "steps", "--keep_best_checkpoint"]
    short += ["--load_best_checkpoint_at_end", "--max_steps", "2", "--stage1_steps", "0.5", "--logging_steps", "1"]
    done = run("train", "--num_processes", "1", "--task", "arithmetic", *short, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 held-out problems" in done.stdout and (tmp_path / "model.safetensors").exists()
    best = tmp_path / "_best-stage2" / "model.safetensors"
    assert best.read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_environment_is_told():
    done = run("env")
    assert done.returncode == 0 and re.search(r"^trl \d", done.stdout, re.M) and "CPU cores" in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("Sandbox for programs")] == []


def test_no_command_is_greeted_by_a_kernel_that_is_not_there(caplog):
    """PEFT imports bitsandbytes, which says so on CPUs with AVX512-BF16; everything else that it says is shown."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("Failed to load the library")
    assert [record.message for record in caplog.records] == ["Failed to load the library"]


def test_packages_that_only_some_need_are_not_loaded():
    code = (
        "import sys; from trl_score import *; from trl_score import training, collection, cli, tasks\n"
        "sys.exit(str({'evaluate', 'scipy.stats', 'matplotlib', 'vllm'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evalute"], 2, "trl-score: unknown command 'evalute'. Expected one of: train, baselines"),
        (["evaluate", "--task", "arithmetic"], 2, "trl-score evaluate: error: --model is missing"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--split", "dev"], 1, "trl-score evaluate: Unknown split 'dev'"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--model", "no/model"], 1, "trl-score evaluate: "),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--base_url", "http://x"], 1, "trl-score evaluate: `base_url` has no meaning"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--self_refine", "--correction_instruction", "x"], 1, "trl-score evaluate: `self_refine=True` asks"),
        (["scale", *SMALL, "--output_dir", "{tmp}", "--max_budget", "3"], 1, "trl-score scale: `max_budget=3` is no power of 2"),
        (["report", "{tmp}"], 1, "trl-score report: '"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--temperatur", "1"], 2, "trl-score evaluate: error: "),
        (["train", "--task", "maths", "--output_dir", "{tmp}"], 1, "Unknown task 'maths'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_have_an_exit_code(tmp_path, capfd, arguments, code, message):
    """The first and the launched command in a process of their own, as a user runs them; the others in this one."""
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if arguments[0] in ("evalute", "train"):
        done = run(*arguments)
        returned, errors = done.returncode, done.stderr
    else:
        try:
            returned = cli.main(arguments)
        except SystemExit as stop:  # of the parser
            returned = stop.code
        finally:
            logging.getLogger("trl_score").setLevel(logging.NOTSET)  # the command has set it for its process
        errors = capfd.readouterr().err
    assert returned == code, errors
    last = [line for line in errors.splitlines() if line.startswith(("trl-score", "Unknown"))][-1]
    assert last.startswith(message) and "Traceback" not in errors
