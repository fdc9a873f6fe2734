"""The command line, as a user types it."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from processes import python
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_score import baselines, cli, training
from trl_score.arguments import EvaluateArguments
from trl_score.baselines import BaselineArguments
from trl_score.parsing import Parser
from trl_score.sampling import TransformersSampler
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.training import TrainArguments


ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).parent / "trl-score")
BASE = str(BASE_MODEL_PATH)
SMALL = ["--task", "arithmetic", "--model", BASE, "--max_completion_length", "8", "--limit", "20"]


def run(*arguments):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def run_imported(*arguments):
    """The same command in a process that need not import anything first."""
    return python("-m", "trl_score.cli", *arguments)


def help_of(command: str, capsys, *more: str) -> str:
    try:
        assert cli.main([command, "--help", *more]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


def options_of(command: str, text: str) -> set[str]:
    """The options that a command has, by its own parser."""
    if command in ("report", "tasks", "configs"):
        return set(re.findall(r"^  (--\w+)", text, re.M))
    kinds = {"train": TrainArguments, "baselines": BaselineArguments, **cli.SAMPLING}
    return {f"--{each.name}" for each in fields(kinds[command])}


@pytest.mark.parametrize(
    "command", ["train", "baselines", "collect", "check", "evaluate", "scale", "report", "tasks", "configs"]
)
def test_every_option_is_documented_and_every_documented_one_exists(command, capsys, monkeypatch):
    text = (ROOT / "docs" / "cli.md").read_text()
    section = re.search(rf"^## trl-score {command}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    documented = set(re.findall(r"^\| `(--\w+)`", section, re.M))
    helped = help_of(command, capsys)
    assert documented == options_of(command, helped)
    assert all(option in helped for option in documented)


def test_tables_of_the_page_are_what_the_options_say():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (ROOT / "docs" / "cli.md").read_text() == make_cli.page(), "run python docs/make_cli.py"


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
    done = run_imported("scale", "--config", config, "--output_dir", tmp_path / "scale", "--temperature", "1.0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 4 \| \d", done.stdout, re.M)
    assert json.loads((tmp_path / "scale" / "corrected" / "settings.json").read_text())["temperature"] == 1.0
    done = run_imported(
        "report", tmp_path / "eval", tmp_path / "scale", "--output", tmp_path / "r.html", "--figures", tmp_path / "f"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size > 10_000 and (tmp_path / "f" / "scaling.png").exists()


def test_train_is_launched_by_accelerate(tmp_path):
    """The embedded task needs no other option than its name and a folder; the rest here makes it short."""
    short = ["--num_eval_problems", "8", "--save_strategy", "steps", "--keep_best_checkpoint"]
    short += ["--load_best_checkpoint_at_end", "--max_steps", "2", "--stage1_steps", "0.5", "--logging_steps", "1"]
    short += ["--per_device_train_batch_size", "16"]
    done = run_imported("train", "--num_processes", "1", "--task", "arithmetic", *short, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 held-out problems" in done.stdout and (tmp_path / "model.safetensors").exists()
    assert done.stdout.rstrip().endswith(str(tmp_path))
    assert "FutureWarning" not in done.stderr and "not passed to `accelerate launch`" not in done.stderr
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
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--limit", "0"], 1, "trl-score evaluate: `limit=0` leaves no problem. Set it"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--top_p", "7"], 1, "trl-score evaluate: `temperature=0.0` and `top_p=7.0`: set"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--correction_instruction", " "], 1, "trl-score evaluate: `correction_instruction` is empty"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--dtype", "int8"], 1, "trl-score evaluate: `dtype='int8'` is no type of weights. Set it"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}/file/x"], 1, "trl-score evaluate: `output_dir='{tmp}/file/x'` is no folder: '{tmp}/file' is a file"),
        (["evaluate", *SMALL, "--output_dir", "{tmp}", "--model", "{tmp}"], 1, "trl-score evaluate: The model '{tmp}' is not available: the folder has no config.json"),
        (["evaluate", *SMALL, "--output_dir", ""], 1, "trl-score evaluate: `output_dir` is empty. Give the name of a folder"),
        (["collect", *SMALL, "--output_dir", "{tmp}", "--data_dir", "x"], 1, "trl-score collect: The problems of 'arithmetic' are generated"),
        (["check", *SMALL, "--task", "my_task.py:Mine"], 1, "trl-score check: The task 'my_task.py:Mine': there is no file 'my_task.py'"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "--alpah", "3"], 2, "trl-score train: error: unknown option --alpah. Did you mean --alpha?"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "--model", "m"], 2, "trl-score train: error: unknown option --model. Did you mean --model_name_or_path?"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "--num_proceses", "2"], 2, "trl-score train: error: unknown option --num_proceses. Did you mean --num_processes?"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "stray"], 2, "trl-score train: error: unexpected argument 'stray'"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "--alpha", "-1"], 1, "trl-score train: `alpha=-1.0` would reward"),
        (["train", "--task", "arithmetic", "--output_dir", "{tmp}", "--top_p", "7"], 1, "trl-score train: `top_p=7.0`"),
        (["train", "--config", "{tmp}/broken.yaml"], 2, "trl-score train: error: --config {tmp}/broken.yaml is no YAML"),
        (["baselines", "--method", "sft"], 2, "trl-score baselines: error: argument --method: invalid choice: 'sft'"),
        (["baselines", "--num_samples", "1"], 1, "trl-score baselines: `num_samples=1` attempts per problem are too few"),
        (["train", "--task", "maths", "--output_dir", "{tmp}"], 1, "Unknown task 'maths'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_have_an_exit_code(tmp_path, capfd, arguments, code, message):
    """The first and the launched command in a process of their own, as a user runs them; the others in this one."""
    arguments, message = [argument.format(tmp=tmp_path) for argument in arguments], message.format(tmp=tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "broken.yaml").write_text("a: [")
    if arguments[0] == "evalute" or "maths" in arguments:
        done = (run if arguments[0] == "evalute" else run_imported)(*arguments)
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("limit: 2.5", "`limit: 2.5` in the configuration: it takes int"),
        ("limit: true", "`limit: True` in the configuration: it takes int"),
        ("limit: [4]", "`limit: [4]` in the configuration: it takes int"),
        ("temperature: true", "`temperature: True` in the configuration: it takes float"),
        ("batch_size:", "`batch_size: None` in the configuration: it takes int"),
        ("self_refine: 1", "`self_refine: 1` in the configuration: it takes bool"),
        ("task: [arithmetic]", "`task: ['arithmetic']` in the configuration: it takes str"),
        ("chat_template_kwargs: [1]", "`chat_template_kwargs: [1]` in the configuration: it takes dict or str"),
        ("config: other.yaml", "`config` has no meaning in a configuration"),
    ],
)
def test_a_value_of_another_type_in_a_configuration_is_refused(tmp_path, capsys, line, message):
    (tmp_path / "config.yaml").write_text(line)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["evaluate", *SMALL, "--output_dir", str(tmp_path / "results"), "--config", str(tmp_path / "config.yaml")]
        )
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"trl-score evaluate: error: {message}")
    assert not (tmp_path / "results").exists()


def test_a_configuration_may_have_numbers_for_texts_and_texts_for_numbers(tmp_path):
    lines = ["revision: 1.0", "split: 2024", "temperature: 1", "top_p: 1e-1", "limit:", "extra_body: {top_k: -1}"]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "trust_remote_code: 'no'"]))
    (parsed,) = Parser((EvaluateArguments,), "evaluate").parse_args_and_config(
        ["--config", str(tmp_path / "config.yaml")]
    )
    assert (parsed.revision, parsed.split, parsed.temperature, parsed.top_p) == ("1.0", "2024", 1, 0.1)
    assert parsed.limit is None and parsed.extra_body == {"top_k": -1} and parsed.trust_remote_code is False


def test_the_home_folder_is_found_also_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("output_dir: ~/results")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--model=~/model"]
    (parsed,) = Parser((EvaluateArguments,), "evaluate").parse_args_and_config(arguments)
    assert parsed.output_dir == f"{tmp_path}/results" and parsed.model == f"{tmp_path}/model"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["configs"], ["configs", "--help"]])
def test_a_reader_that_has_read_enough_is_no_error(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def run_here(arguments, capfd):
    try:
        return cli.main([str(each) for each in arguments]), capfd.readouterr().err
    finally:
        logging.getLogger("trl_score").setLevel(logging.NOTSET)


def test_what_is_not_an_option_of_training_is_accelerate_s(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    given = [
        "--task",
        "arithmetic",
        "--num_processes",
        "2",
        "--max_steps",
        "2",
        "--cpu",
        "--output_dir",
        str(tmp_path),
    ]
    assert cli.main(["train", *given]) == 0
    (launch,) = launched
    assert (launch.num_processes, launch.cpu, launch.training_script, launch.module) == (
        2,
        True,
        "trl_score.training",
        True,
    )
    assert launch.training_script_args == ["--task", "arithmetic", "--max_steps", "2", "--output_dir", str(tmp_path)]


@pytest.mark.parametrize(("command", "module"), [("train", training), ("baselines", baselines)])
def test_options_of_accelerate_may_stand_in_the_configuration(monkeypatch, tmp_path, capfd, command, module):
    """The launcher reads them there, and the process that it starts reads the same file for the others."""
    launched, started = [], []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(training, "load_task", lambda *given: started.append(given) or sys.exit())
    monkeypatch.setattr(baselines, "run", lambda *given: started.append(given))
    ours, file = {"task": "arithmetic", "output_dir": str(tmp_path), "bf16": False}, tmp_path / "config.yaml"
    for options in ({"num_processes": 1, "cpu": True, "debug": False}, {"accelerate_config": "single_gpu"}):
        file.write_text(json.dumps(ours | options))
        assert run_here([command, "--config", file], capfd)[0] == 0
        with contextlib.suppress(SystemExit):
            module.main(launched[-1].training_script_args)
        assert started[-1][0].task == "arithmetic"
    first, second = launched
    assert (first.num_processes, first.cpu, bool(first.debug)) == (1, True, False)
    assert Path(second.config_file).name == "single_gpu.yaml" and len(started) == 2
    file.write_text(json.dumps(ours | {"num_proceses": 1}))
    with pytest.raises(SystemExit):
        module.main(["--config", str(file)])
    assert (
        "unknown option --num_proceses in the configuration. Did you mean --num_processes?" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (subprocess.CalledProcessError(7, "python"), 7),
        (ChildFailedError("x", {0: ProcessFailure(0, 1, 3, "/nowhere")}), 3),
        (SignalException("", signal.SIGINT), 130),
    ],
)
def test_the_launcher_adds_no_error_of_its_own(monkeypatch, tmp_path, capfd, failure, code):
    def fail(*_):
        raise failure

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    before = signal.getsignal(signal.SIGINT)
    assert run_here(["train", "--task", "arithmetic", "--output_dir", tmp_path], capfd) == (code, "")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_a_signal_has_ended_is_said(monkeypatch, tmp_path, capfd):
    """It cannot say so itself, for instance when memory was short."""

    def fail(*_):
        raise subprocess.CalledProcessError(-signal.SIGKILL, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    code, err = run_here(["train", "--task", "arithmetic", "--output_dir", tmp_path], capfd)
    assert code == 1 and "ended by SIGKILL" in err and "`--resume_from_checkpoint true`" in err


def test_an_endpoint_that_does_not_answer_is_said(monkeypatch, tmp_path, capfd):
    def refuse(*_, **__):
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.InferenceClient.chat_completion", refuse)
    where = ["--backend", "endpoint", "--base_url", "http://127.0.0.1:9/v1", "--output_dir", tmp_path / "new"]
    code, errors = run_here(["evaluate", *SMALL, *where], capfd)
    assert code == 1 and not (tmp_path / "new").exists() and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(
        f"trl-score evaluate: The endpoint (http://127.0.0.1:9/v1) did not answer for the model '{BASE}': [Errno 111] Connection "
        "refused. Check that it runs"
    )


def test_a_folder_with_checkpoints_alone_names_one(monkeypatch, tmp_path, capfd):
    (tmp_path / "checkpoint-20").mkdir()
    code, errors = run_here(["evaluate", *SMALL, "--model", tmp_path, "--output_dir", tmp_path / "new"], capfd)
    assert code == 1 and errors.endswith(
        f"no config.json, but checkpoints. Give one of them, such as '{tmp_path}/checkpoint-20'.\n"
    )


def test_an_interrupted_evaluation_says_what_is_kept(monkeypatch, tmp_path, capfd):
    sample = TransformersSampler.sample
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(TransformersSampler, "sample", interrupted)
    arguments = ["evaluate", *SMALL, "--batch_size", "12", "--output_dir", tmp_path / "results"]
    with pytest.raises(SystemExit) as stop:
        run_here(arguments, capfd)
    message = f"12 rollouts are kept in '{tmp_path / 'results'}': the same command continues from them."
    assert stop.value.code == 130 and message in capfd.readouterr().err
    calls[:] = [None] * 5
    assert run_here(arguments, capfd)[0] == 0 and len(calls) == 6  # only the other 8
