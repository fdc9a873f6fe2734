"""
The command line: `trl-score train | baselines | collect | evaluate | scale | report | env`.

Each command parses its arguments, calls one function and prints what it returns. Everything heavy is imported inside, so that
`--help` is instant.
"""

import argparse
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field, fields


COMMANDS = {
    "train": "train a model to correct itself; takes accelerate's launch arguments too",
    "baselines": "fine-tune by STaR or Pair-SFT instead; takes accelerate's launch arguments too",
    "collect": "sample and grade a model's attempts at problems to train on",
    "evaluate": "measure a model's attempts at a task's problems",
    "scale": "vote over first attempts against corrected ones, at equal numbers of samples",
    "report": "one HTML page from runs and evaluations",
    "env": "versions and hardware, for a bug report",
}


@dataclass
class SampleArguments:
    """What `evaluate`, `scale` and `collect` share: the arguments of [`~trl_score.evaluation.evaluate_self_correction`]."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder of a model or an adapter."})
    task: str | None = field(default=None, metadata={"help": "Name of the task."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results. Rollouts of the same settings in it are reused."}
    )
    split: str = field(default="test", metadata={"help": "Split of the task that the problems are from."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the task's rows as JSON lines. By default, from the Hub."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens whose probabilities add up to this share."}
    )
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens of one attempt."})
    correction_instruction: str | None = field(
        default=None, metadata={"help": "The user's turn between the attempts, if not the task's."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the chat template as JSON, such as '{\"enable_thinking\": false}'. By default, "
            "those the model was trained with."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Rollouts at a time."})
    limit: int | None = field(default=None, metadata={"help": "Use the first problems only."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    backend: str = field(
        default="transformers",
        metadata={"help": "Where attempts come from.", "choices": ["transformers", "vllm", "endpoint"]},
    )
    base_url: str | None = field(
        default=None, metadata={"help": "Address of the endpoint, such as http://127.0.0.1:8000/v1."}
    )
    extra_body: str | None = field(
        default=None, metadata={"help": "Further fields of each request to the endpoint, as JSON."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Type of the weights, such as bfloat16."})
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of the model on the Hub."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, such as flash_attention_2 (transformers only)."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model's repository brings along."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantize the model to 4 bits (NF4, bitsandbytes; transformers only)."}
    )


@dataclass
class EvaluateArguments(SampleArguments):
    num_attempts: int = field(default=2, metadata={"help": "Attempts in a rollout, up to 10 in the paper."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    num_samples: int = field(default=1, metadata={"help": "Rollouts per problem; more than one need a temperature."})
    self_refine: bool = field(
        default=False, metadata={"help": "Ask for feedback on each attempt, then to rewrite it (Self-Refine)."}
    )


@dataclass
class CollectArguments(SampleArguments):
    split: str = field(default="train", metadata={"help": "Split of the task that the problems are from."})
    num_attempts: int = field(default=2, metadata={"help": "Attempts in a rollout; 1 for first attempts alone."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; the default is training's."})
    num_samples: int = field(default=8, metadata={"help": "Rollouts per problem."})


@dataclass
class ScaleArguments(SampleArguments):
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; the paper uses 0.7."})
    max_budget: int = field(default=64, metadata={"help": "Samples per problem, a power of 2."})


BACKENDS_OF = {  # which backends an option has a meaning with
    "base_url": ("endpoint",),
    "extra_body": ("endpoint",),
    "dtype": ("transformers", "vllm"),
    "revision": ("transformers", "vllm"),
    "trust_remote_code": ("transformers", "vllm"),
    "attn_implementation": ("transformers",),
    "load_in_4bit": ("transformers",),
}


def parse(kind: type, command: str, arguments: list[str]):
    """Arguments from the command line and from `--config FILE.yaml`."""
    from trl import TrlParser

    parser = TrlParser(kind, allow_abbrev=False, prog=f"trl-score {command}", description=COMMANDS[command])
    try:
        (parsed,) = parser.parse_args_and_config(arguments)
    except ValueError as error:  # an option that there is not
        parser.error(str(error))
    for name in ("model", "task", "output_dir"):
        if getattr(parsed, name) is None:
            parser.error(f"--{name} is missing: {next(f for f in fields(kind) if f.name == name).metadata['help']}")
    return parsed


def sample(command: str, arguments: list[str]) -> str:
    kinds = {"evaluate": EvaluateArguments, "scale": ScaleArguments, "collect": CollectArguments}
    args = vars(parse(kinds[command], command, arguments))
    from .sampling import as_dict, check_dtype

    for name in ("chat_template_kwargs", "extra_body"):
        args[name] = as_dict(args[name], name)
    own = {name: args.pop(name) for name in BACKENDS_OF}
    own = {name: value for name, value in own.items() if value not in (None, False)}
    for name in own:
        if args["backend"] not in BACKENDS_OF[name]:
            raise ValueError(f"`{name}` has no meaning with `backend={args['backend']!r}`. Leave it out.")
    if own.pop("load_in_4bit", False):
        import torch
        from transformers import BitsAndBytesConfig

        check_dtype(own)
        dtype = own.get("dtype", "auto")
        own["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        )
    if command == "collect":
        from .collection import collect, describe

        return f"{describe(collect(**args, **own))}: {args['output_dir']}"
    if command == "scale":
        from .scaling import inference_scaling, table

        return table(inference_scaling(**args, **own))
    from .evaluation import evaluate_self_correction

    return str(evaluate_self_correction(**args, **own))


def launch(command: str, arguments: list[str]) -> int:
    """As `trl grpo` does: what the command does not know is for `accelerate launch`."""
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    texts = {"prog": f"trl-score {command}", "description": COMMANDS[command]}
    if command == "train":
        from .training import train_parser

        parser, module = train_parser(arguments, **texts), "trl_score.training"
    else:
        from trl import ModelConfig, SFTConfig, TrlParser

        from .baselines import BaselineArguments

        parser, module = TrlParser((BaselineArguments, SFTConfig, ModelConfig), **texts), "trl_score.baselines"
    *_, of_file, of_line = parser.parse_args_and_config(
        list(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    launch = resolve_accelerate_config_argument(of_file + of_line)
    rest = iter(of_line)
    left_out = next(rest, None)
    ours = []
    for argument in arguments:  # the arguments without those of accelerate, in their order
        if argument == left_out:
            left_out = next(rest, None)
        else:
            ours.append(argument)
    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        launch_command(launch_command_parser().parse_args([*launch, "--module", module, *ours]))
    except subprocess.CalledProcessError as error:  # the process has said what failed
        return max(error.returncode, 1)
    return 0


def report(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="trl-score report", description=COMMANDS["report"], allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="Folder of an evaluation, training run or scaling study."
    )
    parser.add_argument(
        "--format",
        choices=["html", "inspect"],
        default="html",
        help="A page, or a folder of logs for Inspect's viewer, one of each evaluation. (default: %(default)s)",
    )
    parser.add_argument("--output", help="The page or the folder. (default: report.html, or inspect_logs)")
    parser.add_argument("--figures", metavar="DIR", help="Write the figures there as PNG and SVG too.")
    parser.add_argument(
        "--max_rollouts",
        type=int,
        default=5000,
        help="Rollouts of each evaluation in the browser. (default: %(default)s)",
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
    lines = [
        "usage: trl-score COMMAND [OPTIONS]",
        "",
        "Train a language model to correct its own mistakes (SCoRe).",
        "",
    ]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            *lines,
            "",
            "trl-score COMMAND --help shows the options of a command; --config FILE.yaml reads them from a file.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for an error, reported in one line, 2 for wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command == "--version":
        print(importlib.metadata.version("trl-score"))
        return 0
    if command not in COMMANDS:
        print(
            f"{usage()}\n\ntrl-score: unknown command '{command}'. Expected one of: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_score").setLevel(logging.INFO)
    try:
        if command in ("train", "baselines"):
            return launch(command, rest)
        if command == "env":
            print(environment())
        elif command == "report":
            print(report(rest))
        else:
            text = sample(command, rest)
            from .records import disconnect, processes

            if processes().is_main_process:
                print(text)
            disconnect()
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # what the user can mend is said in one line
        if os.environ.get("TRL_SCORE_TRACEBACK"):
            raise
        print(f"trl-score {command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
