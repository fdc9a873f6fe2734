"""The tasks in words: what `trl-score tasks` prints."""

import inspect
import re
import textwrap

from . import TASKS, get_task
from .base import Task
from .code import CodeTask
from .reasoning_gym import PREFIX, generators


WIDTH = 100


def sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, without marks."""
    text = " ".join((inspect.cleandoc(docstring or "").split("\n\n")[0]).split()).replace("`", "")
    return re.split(r"(?<! al)\. (?=[A-Z])|; ", text)[0].removesuffix(".") + "."


def overview() -> str:
    """A line for each task."""
    lines = [
        textwrap.fill(f"{name:<16}{sentence(kind.__doc__)}", WIDTH, subsequent_indent=" " * 16)
        for name, kind in TASKS.items()
    ]
    found = generators()
    more = f"{len(found)} generators: {', '.join(found)}" if found else "pip install 'trl-score[reasoning-gym]'"
    lines += ["", *textwrap.wrap(f"{PREFIX}NAME  {more}", WIDTH, subsequent_indent="  "), ""]
    lines.append(
        "A task of yours: --task FILE.py:CLASS or PACKAGE.MODULE:CLASS; a dataset: --dataset_name with --reward_funcs."
    )
    lines.append("trl-score tasks NAME shows one.")
    return "\n".join(lines)


def describe(name: str, data_dir: str | None = None, split: str | None = None) -> str:
    """
    A task: how many problems, and of one of them the prompt, the instruction, an attempt that is right, and what grades.

    Raises:
        `OSError`, `ValueError`: If there is no such task, or its rows cannot be loaded.
    """
    shown_only = {"runner": _not_run} if issubclass(TASKS.get(name, Task), CodeTask) else {}
    task = get_task(name, data_dir=data_dir, **shown_only)
    loaded = {}
    for each in [split] if split else ["train", "test"]:
        try:
            loaded[each] = task.load(each)
        except (OSError, ValueError):
            if split or (each == "test" and not loaded):
                raise
    chosen, rows = list(loaded.items())[-1]
    if len(rows) == 0:
        raise ValueError(f"The split '{chosen}' of '{task.name}' has no problems.")
    prompt = rows[0]["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "text", "content": prompt}]
    gold = task.gold(rows.select(range(1)))[0]
    parts = {
        "task": f"{task.name}: {sentence(type(task).__doc__)}",
        "problems": ", ".join(f"{len(each)} ({key})" for key, each in loaded.items()),
        "columns": ", ".join(rows.column_names),
        f"prompt of problem 0 ({chosen})": "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt),
        "correction instruction": task.correction_instruction,
        "an attempt that is right": "The rows do not tell one." if gold is None else gold,
        "grader": sentence(type(task).reward.__doc__),
    }
    return "\n\n".join(f"{title}\n{textwrap.indent(text, '    ')}" for title, text in parts.items())


def _not_run(submissions):
    raise RuntimeError("This task is only shown.")
