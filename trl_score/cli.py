"""
The command line: `trl-score train | baselines | collect | check | evaluate | scale | report | tasks | configs | env`.

Each command parses its arguments, calls one function and prints what it returns. Everything heavy is imported inside, so that
`--help` is instant.
"""

import argparse
import importlib.metadata
import logging
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from .arguments import CheckArguments, CollectArguments, EvaluateArguments, ScaleArguments


COMMANDS = {
    "train": "train a model to correct itself; also takes options of accelerate launch",
    "baselines": "fine-tune by STaR or Pair-SFT instead; also takes options of accelerate launch",
    "tasks": "list the tasks; with a name, show the problems, the prompt, the instruction and the grader",
    "configs": "list the configurations for --config; with a name, print it",
    "check": "say before training whether a model, a task and an instruction are worth it",
    "collect": "sample and grade a model's attempts at problems to train on",
    "evaluate": "measure a model's attempts at a task's problems",
    "scale": "compare votes over first attempts with votes over corrected attempts, at equal numbers of samples",
    "report": "write one HTML page from training runs and evaluations",
    "env": "print versions and hardware, for a bug report",
}
SAMPLING = {
    "evaluate": EvaluateArguments,
    "scale": ScaleArguments,
    "collect": CollectArguments,
    "check": CheckArguments,
}
LAUNCHED = "All other options are passed to `accelerate launch`, such as --num_processes 2 or --config_file FILE.yaml."
INTERRUPTED = 130  # exit code, as a shell has it after Ctrl-C


def sample(command: str, arguments: list[str]) -> tuple[str, int]:
    """What a command that samples prints, and its exit code."""
    from .parsing import Parser

    required = ["model", ("task", "dataset_name")] + ["output_dir"] * (command != "check")
    parser = Parser((SAMPLING[command],), command, COMMANDS[command], required)
    (parsed,) = parser.parse_args_and_config(arguments)
    with kept_rollouts(command, parsed.output_dir):
        if command == "check":
            from .preflight import check

            verdict = check(**parsed.keywords())
            return verdict.json() if parsed.json else str(verdict), verdict.exit_code
        if command == "collect":
            from .collection import collect, describe

            return f"{describe(collect(**parsed.keywords()))}: {parsed.output_dir}", 0
        if command == "scale":
            from .scaling import inference_scaling, table

            return table(inference_scaling(**parsed.keywords())), 0
        from .evaluation import evaluate_self_correction

        return str(evaluate_self_correction(**parsed.keywords())), 0


@contextmanager
def kept_rollouts(command: str, folder: str | None):
    """After Ctrl-C, one line says what is kept and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        files = [] if folder is None else Path(folder).rglob("rollouts*.jsonl")
        number = sum(file.read_bytes().count(b"\n") for file in files)
        kept = (
            f"{number} rollouts are kept in '{folder}': the same command continues from them"
            if number
            else "nothing is kept"
        )
        print(f"trl-score {command}: interrupted; {kept}.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def launch(command: str, arguments: list[str]) -> int:
    """As `trl grpo` does: what the command does not know is for `accelerate launch`."""
    if command == "train":
        from .training import train_parser

        parser, module = train_parser(arguments, description=COMMANDS[command], more=LAUNCHED), "trl_score.training"
    else:
        from .baselines import baselines_parser

        parser, module = baselines_parser(description=COMMANDS[command], more=LAUNCHED), "trl_score.baselines"
    *_, of_file, of_line = parser.parse_args_and_config(
        list(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .parsing import launch_options

    parser.refuse(of_file, "in the configuration", launch_options())
    parser.refuse(of_line, known=launch_options())
    launcher = launch_command_parser()
    of_file = as_typed(of_file, launcher)
    rest = iter(of_line)
    left_out = next(rest, None)
    ours = []
    for argument in arguments:  # the arguments without those of accelerate, in their order
        if argument == left_out:
            left_out = next(rest, None)
        else:
            ours.append(argument)
    parsed = launcher.parse_args([*resolve_accelerate_config_argument(of_file + of_line), "--module", module, *ours])
    if parsed.training_script != module:
        parser.error(f"unexpected argument '{parsed.training_script}'.")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process has said what failed
    if torch.cuda.device_count() < 2:  # it names its defaults, of which one process on one device is what was meant
        logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    # After Ctrl-C the processes say what is kept, and this one waits for them.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:
        return failed(command, error.returncode)
    except ChildFailedError as error:
        return failed(command, error.get_first_failure()[1].exitcode)
    except SignalException:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def failed(command: str, code: int) -> int:
    """The exit code after a process has failed. One that a signal has ended could not say so itself."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", as the system does when memory is short" if name == "SIGKILL" else ""
        resume = " with `--resume_from_checkpoint true`" if command == "train" else ""
        print(
            f"trl-score {command}: the process was ended by {name}{memory}. The same command{resume} continues from the last "
            "checkpoint, if there is one.",
            file=sys.stderr,
        )
    return max(code, 1)


def as_typed(of_file: list[str], launcher: argparse.ArgumentParser) -> list[str]:
    """Options of a configuration as on a command line, where a switch such as `cpu: true` has no value."""
    switches = {name for name, action in launcher._option_string_actions.items() if action.nargs == 0}
    typed = []
    for name, value in zip(of_file[::2], of_file[1::2], strict=True):
        if name not in switches:
            typed += [name, value]
        elif value == "True":
            typed.append(name)
    return typed


def tasks(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="trl-score tasks", description=COMMANDS["tasks"], allow_abbrev=False)
    parser.add_argument("task", nargs="?", help="Name of a task, FILE.py:CLASS or PACKAGE.MODULE:CLASS.")
    parser.add_argument("--data_dir", help="Folder with the task's rows as JSON lines. By default, from the Hub.")
    parser.add_argument("--split", help="Split to show. (default: test, or the only one)")
    args = parser.parse_args(arguments)
    from .tasks.catalogue import describe, overview

    return overview() if args.task is None else describe(args.task, args.data_dir, args.split)


def configs(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="trl-score configs", description=COMMANDS["configs"], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="Name of a configuration.")
    args = parser.parse_args(arguments)
    from .parsing import CONFIGS
    from .parsing import configs as names

    if args.name is None:
        lines = [f"{name:<24}{title(CONFIGS / f'{name}.yaml')}" for name in names()]
        return "\n".join([*lines, "", "trl-score train --config NAME uses one; trl-score configs NAME prints it."])
    if args.name not in names():
        raise ValueError(f"There is no configuration '{args.name}'.{nearest(args.name, names())}")
    return (CONFIGS / f"{args.name}.yaml").read_text("utf-8").rstrip()


def title(config: Path) -> str:
    """The first sentence of a configuration, which is a comment."""
    comment = " ".join(
        line.removeprefix("# ") for line in config.read_text("utf-8").splitlines()[:3] if line.startswith("#")
    )
    return comment.split(". ")[0].removesuffix(".") + "."


def nearest(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, 1)
    return f" Did you mean '{close[0]}'?" if close else f" Expected one of: {', '.join(names)}."


def report(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="trl-score report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="Folder of an evaluation, training run or scaling study."
    )
    parser.add_argument(
        "--format",
        choices=["html", "inspect"],
        default="html",
        help="html writes a page; inspect writes a folder of logs for Inspect's viewer, one for each evaluation. (default: %(default)s)",
    )
    parser.add_argument(
        "--output", help="File of the page, or folder of the logs. (default: report.html, or inspect_logs)"
    )
    parser.add_argument("--figures", metavar="DIR", help="Also write the figures to this folder, as PNG and SVG.")
    parser.add_argument(
        "--max_rollouts",
        type=int,
        default=5000,
        help="Maximum number of rollouts of each evaluation that the page shows. (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    if args.format == "inspect":
        from .report.inspect_logs import write_inspect_logs

        output = args.output or "inspect_logs"
        number = len(write_inspect_logs(args.folders, output))
        return f"{number} logs. Open them with: inspect view --log-dir {output}"
    from .report import write_report

    output = args.output or "report.html"
    page = write_report(args.folders, output, figure_dir=args.figures, max_rollouts=args.max_rollouts)
    return f"Report: {page.resolve()}"


def environment() -> str:
    import torch

    lines = [f"Python {platform.python_version()}, {platform.platform()}"]
    for name in (
        "trl-score",
        "trl",
        "transformers",
        "torch",
        "accelerate",
        "peft",
        "bitsandbytes",
        "datasets",
        "math-verify",
        "vllm",
    ):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"GPU: {', '.join(devices) or 'none'}; CPU cores: {os.cpu_count()}")
    if sys.platform == "linux":
        lines.append(f"sandbox: {sandbox_backend()}")
    return "\n".join(lines)


def sandbox_backend() -> str:
    from .sandbox import Sandbox

    try:
        sandbox = Sandbox(num_workers=1, allow_code_execution=True)  # it runs one line of its own
    except RuntimeError as error:
        return str(error)
    sandbox.close()
    return sandbox.backend


def usage() -> str:
    return "\n".join(
        [
            "usage: trl-score COMMAND [OPTIONS]",
            "",
            "Train a language model to correct its own mistakes (SCoRe).",
            "",
            *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
            "",
            "trl-score COMMAND --help shows the options of a command; --config FILE.yaml reads them from a file.",
        ]
    )


def say(text: str = "", end: str = "\n") -> None:
    """Print, to a reader that may have read enough and gone, as `head` does."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:  # Python would notice it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """
    Run a command. Returns its exit code: 0; 1 for an error, reported in one line; 2 for wrong arguments; 3 if `check` advises
    against training; 130 after Ctrl-C.
    """
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    finally:
        say(end="")  # what a parser printed may be in a buffer still


def run(arguments: list[str]) -> int:
    """[`main`] with the arguments of the command line."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        say(usage())
        return 0
    if command == "--version":
        say(importlib.metadata.version("trl-score"))
        return 0
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, 1)
        near = f"Did you mean '{close[0]}'?" if close else "`trl-score --help` describes them."
        print(
            f"trl-score: unknown command '{command}'. Expected one of: {', '.join(COMMANDS)}. {near}", file=sys.stderr
        )
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself
    logging.getLogger("trl_score").setLevel(logging.INFO)
    try:
        if command in ("train", "baselines"):
            return launch(command, rest)
        if command in SAMPLING:
            text, code = sample(command, rest)
            from .records import disconnect, processes

            if processes().is_main_process:
                say(text)
            disconnect()
            return code
        say(
            environment()
            if command == "env"
            else {"report": report, "tasks": tasks, "configs": configs}[command](rest)
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # what the user can mend is said in one line
        if os.environ.get("TRL_SCORE_TRACEBACK"):
            raise
        print(f"trl-score {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"trl-score {command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
