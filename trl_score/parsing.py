"""
The parser of the commands and scripts: TRL's, with configurations by name, errors of one line that name the nearest option, and a
help that shows this package's options first.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Iterable
from dataclasses import MISSING
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


CONFIGS = Path(__file__).parent / "configs"
"""Folder of the configurations that come with the package."""
METHOD, MOST_USED = "The method", "Training (the options of TRL that are used most)"
ORDER = ("Problems", "Baseline", METHOD, "Model", "Attempts", MOST_USED)  # of the groups in a help; then the others
# Types of options whose values in a configuration are checked.
OF_YAML = {bool, int, float, str, list, dict, NoneType, Any}
OURS = "SCoReConfig"  # the class whose own fields are the method's
# The model of a command that trains, and of one that samples.
OTHER_COMMANDS = {"--model": "--model_name_or_path", "--model_name_or_path": "--model"}
TRAINING = (
    *("model_name_or_path", "dtype", "use_peft", "lora_r", "load_in_4bit", "output_dir", "resume_from_checkpoint"),
    *("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_generations", "max_completion_length", "temperature", "use_vllm", "bf16", "use_cpu", "seed"),
    *("eval_strategy", "logging_steps", "log_completions", "report_to", "save_strategy", "save_steps", "push_to_hub"),
)


class Parser(TrlParser):
    """
    A parser of options that are fields of dataclasses.

    Args:
        kinds (`Iterable[type]`):
            The dataclasses. A class attribute `title` names the group of a class's own fields in the help.
        command (`str`):
            The command, for errors and help.
        description (`str`, *optional*):
            What it does.
        required (`Iterable[str]`, *optional*):
            Options that have to be given; a tuple stands for one of several.
        more (`str`, *optional*):
            Last lines of the help.
        launched (`bool`, *optional*, defaults to `False`):
            Whether `accelerate launch` starts the command, whose options may stand in the configuration too.
    """

    def __init__(
        self,
        kinds: Iterable[type],
        command: str,
        description: str | None = None,
        required: Iterable[str | tuple[str, ...]] = (),
        more: str = "",
        launched: bool = False,
    ):
        super().__init__(
            tuple(kinds), prog=f"trl-score {command}", description=description, allow_abbrev=False, add_help=False
        )
        self.needed = [each if isinstance(each, tuple) else (each,) for each in required]
        self.more, self.launched = more, launched
        self.add_argument("--config", metavar="FILE.yaml or NAME", default=argparse.SUPPRESS)
        self.add_argument("-h", "--help", nargs="?", const="", default=argparse.SUPPRESS, action=_Help)
        for action in self._actions:
            if action.dest == "report_to":  # a list in transformers, which its parser reads as one name
                action.nargs = "+"

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple:
        """
        As TRL's, and `--config` takes the name of a configuration of the package too.

        Raises:
            `SystemExit`: With code 2 and one line, if an option is unknown, is missing or has no such value, or the configuration
                cannot be read.
        """
        args = self._with_config(list(sys.argv[1:] if args is None else args))
        *parsed, of_file, of_line = super().parse_args_and_config(args, True, True, True)
        if not return_remaining_strings and fail_with_unknown_args:
            self.refuse(of_file, "in the configuration", launch_options() if of_file and self.launched else ())
            self.refuse(of_line)
        for each in parsed:  # a shell expands `--model ~/m`, but not `--model=~/m`, nor what stands in a file
            vars(each).update({k: os.path.expanduser(v) for k, v in vars(each).items() if str(v).startswith("~/")})
        for names in self.needed:
            if not any(getattr(each, name, None) is not None for each in parsed for name in names):
                shown = " or ".join(f"--{name}" for name in names)
                self.error(f"{shown} is missing: {self.help_of(names[0]).removeprefix('Required. ')}")
        if return_remaining_strings:
            return (*parsed, of_file, of_line) if separate_remaining_strings else (*parsed, of_file + of_line)
        return tuple(parsed)

    def _with_config(self, args: list[str]) -> list[str]:
        """The arguments, with the path of the configuration."""
        args = [part for each in args for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
        if "--config" not in args:
            return args
        index = args.index("--config")
        if len(args) == index + 1:
            self.error("--config needs the file of a configuration or its name; `trl-score configs` lists them.")
        file = find_config(args[index + 1])
        if file is None:
            close = get_close_matches(args[index + 1], configs(), 1)
            near = f" Did you mean {close[0]}?" if close else ""
            self.error(
                f"--config {args[index + 1]}: there is no such file or configuration.{near} `trl-score configs` lists them."
            )
        try:
            settings = yaml.safe_load(file.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"--config {file} is no YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            self.error(f"--config {file} holds no mapping of options to values, such as `alpha: 10`.")
        args[index + 1] = str(file)
        return args

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        """
        As TRL's, which takes any value, for values that are of the type of their option.

        Raises:
            `SystemExit`: With code 2 and one line, for a value of another type.
        """
        for name in ("config", "help"):
            if name in kwargs:
                self.error(f"`{name}` has no meaning in a configuration. Give it on the command line.")
        for kind in self.dataclass_types:
            hints = get_type_hints(kind)
            for name in hints.keys() & kwargs.keys():
                try:
                    kwargs[name] = of_type(kwargs[name], hints[name])
                except TypeError as error:
                    self.error(f"`{name}: {kwargs[name]}` in the configuration: {error}.")
        return super().set_defaults_with_config(**kwargs)

    def refuse(self, unknown: list[str], where: str = "", known: Iterable[str] = ()) -> None:
        """
        Say which arguments are unknown, if any.

        Args:
            unknown (`list[str]`):
                What was not understood.
            where (`str`, *optional*):
                Where it stands, if not on the command line.
            known (`Iterable[str]`, *optional*):
                Options beside this parser's own.
        """
        names = [each.split("=")[0] for each in unknown if each.startswith("--")]
        names = [name for name in names if name not in known]
        if names:
            options = [each for each in (*self._option_string_actions, *known) if each.startswith("--")]
            other = OTHER_COMMANDS.get(names[0])
            close = [other] if other in options else get_close_matches(names[0], options, 1)
            near = f" Did you mean {close[0]}?" if close else " `--help all` shows all options."
            self.error(f"unknown option {names[0]}{where and ' ' + where}.{near}")
        if unknown and not known:
            self.error(f"unexpected argument '{unknown[0]}'.")

    def error(self, message: str):
        """One line, in place of argparse's usage of several hundred."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def help_of(self, name: str) -> str:
        return next((action.help or "" for action in self._actions if action.dest == name), "")

    def groups(self) -> list[tuple[str | None, list[argparse.Action]]]:
        """The options by the title of their group, in the order of the help; the last title, `None`, is that of all others."""
        found: dict[str | None, list] = {}
        for action in self._actions:
            if action.dest not in ("help", "config") and not action.option_strings[0].startswith("--no_"):
                found.setdefault(self._group(action.dest), []).append(action)
        if MOST_USED in found:
            found[MOST_USED].sort(key=lambda action: TRAINING.index(action.dest))
        order = [*ORDER, *(title for title in found if title and title not in ORDER), None]
        return sorted(found.items(), key=lambda group: order.index(group[0]))

    def format_help(self, everything: bool = False) -> str:
        """The help: the options in groups, this package's first; with `everything`, the others of TRL and transformers too."""
        formatter = _Formatter(self.prog)
        formatter.add_text(f"usage: {self.prog} [OPTIONS]")
        if self.description:
            formatter.add_text(self.description[0].upper() + self.description[1:] + ".")
        rest = 0
        for title, actions in self.groups():
            if title is None and not everything:
                rest = len(actions)
                continue
            formatter.start_section(title or "All other options of TRL and transformers")
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(
            "--config FILE.yaml reads options from a file, and --config NAME from a configuration of `trl-score configs`. Options on the "
            "command line override the file."
        )
        if rest:
            formatter.add_text(f"--help all shows {rest} more options of TRL and transformers.")
        if self.more:
            formatter.add_text(self.more)
        return formatter.format_help()

    def _group(self, name: str) -> str | None:
        for kind in self.dataclass_types:
            for base in kind.__mro__:
                if name in inspect.get_annotations(base) and "title" in vars(base):
                    return base.title
        if name in TRAINING:
            return MOST_USED
        bases = [base for kind in self.dataclass_types for base in kind.__mro__]
        return (
            METHOD if any(base.__name__ == OURS and name in inspect.get_annotations(base) for base in bases) else None
        )


class _Help(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if values not in ("", "all"):
            parser.error(f"--help takes nothing or `all`, not '{values}'.")
        parser._print_message(parser.format_help(values == "all"), sys.stdout)
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """One name for each option, its choices or what it takes, and its default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action) -> str:
        if action.choices is not None:
            takes = "{" + ",".join(map(str, action.choices)) + "}"
        elif action.type is not None and action.type.__name__ == "string_to_bool":
            takes = ""  # alone it means true
        else:
            takes = getattr(action.type, "__name__", "value").upper() + (" .." if action.nargs == "+" else "")
        return f"{action.option_strings[0]} {takes}".strip()

    def _get_help_string(self, action) -> str:
        default = shown_default(action.default)
        return f"{action.help or ''}{default and f' (default: {default})'}".replace("%", "%%")


def shown_default(value) -> str:
    """A default as the help and the docs show it: the number 0 is shown, and None, False and empty values are not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number or (value and value not in (argparse.SUPPRESS, MISSING)) else ""


def of_type(value, hint):
    """
    A value in a YAML file as its option takes it. A text stays, to be read as on the command line; a number for an option that is a text
    becomes one.

    Args:
        value:
            The value.
        hint:
            The type of the option. Types that are not of YAML take any value.

    Raises:
        `TypeError`: If the value is of another type.
    """
    hints = [hint] if get_origin(hint) in (None, list, dict) else get_args(hint)
    kinds = {get_origin(each) or each for each in hints}
    known = {*kinds, *(inner for each in hints for inner in get_args(each))} <= OF_YAML
    if isinstance(value, str) or type(value) in kinds or not known or (type(value) is int and float in kinds):
        return value
    if str in kinds and not isinstance(value, list | dict | NoneType):
        return str(value)
    raise TypeError(f"it takes {' or '.join(sorted(kind.__name__ for kind in kinds - {NoneType}))}")


def launch_options() -> set[str]:
    """The options of `accelerate launch`, and TRL's for its configurations of accelerate."""
    from accelerate.commands.launch import launch_command_parser

    return {*launch_command_parser()._option_string_actions, "--accelerate_config"}


def configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def find_config(name: str) -> Path | None:
    """A configuration by its path or by its name; `None` if there is none."""
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".yaml")
    return CONFIGS / f"{stem}.yaml" if stem in configs() else None
