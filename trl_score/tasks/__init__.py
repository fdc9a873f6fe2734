"""The tasks, by name."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .arithmetic import Arithmetic
from .base import Task
from .code import MBPP, CodeTask, HumanEval, HumanEvalFix, MBPPRepair
from .math import GSM8K, Math, MathTask


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Arithmetic, Math, GSM8K, MBPP, HumanEval, MBPPRepair, HumanEvalFix)
}


def get_task(name: str, **kwargs) -> Task:
    """
    A task by its name.

    Args:
        name (`str`):
            A key of `TASKS`; `reasoning_gym:GENERATOR` ([`~trl_score.tasks.reasoning_gym.ReasoningGym`]); or a class of one's own,
            as `FILE.py:CLASS` or `PACKAGE.MODULE:CLASS`.
        **kwargs:
            Arguments of its class, such as `data_dir`. An argument that is `None` keeps the default of the class.

    Raises:
        `ValueError`: If there is no such task, it is no [`Task`], or it does not take the arguments.
        `OSError`: If there is no such file.
        `ImportError`: If a module or package is not installed.
    """
    kwargs = {argument: value for argument, value in kwargs.items() if value is not None}
    if name in TASKS:
        if name == Arithmetic.name and "data_dir" in kwargs:
            raise ValueError("The problems of 'arithmetic' are generated, so it has no `data_dir`. Leave it out.")
        return TASKS[name](**kwargs)
    if ":" not in name:
        raise ValueError(
            f"Unknown task {name!r}. Expected one of: {sorted(TASKS)}, reasoning_gym:NAME, or a class of yours as FILE.py:CLASS."
        )
    if name.startswith("reasoning_gym:"):
        from .reasoning_gym import ReasoningGym

        kind, arguments = ReasoningGym, (name.partition(":")[2],)
    else:
        kind, arguments = named_object(name, f"The task '{name}'"), ()
    task = kind
    if isinstance(kind, type):
        try:
            task = kind(*arguments, **kwargs)
        except TypeError as error:
            raise ValueError(f"The task '{name}' cannot be made: {error}.") from error
    if not isinstance(task, Task):
        raise ValueError(f"'{name}' is no task: it is not a subclass of `trl_score.tasks.Task`.")
    if missing := [each for each in ("name", "correction_instruction") if not getattr(task, each, None)]:
        raise ValueError(f"The task '{name}' has no `{missing[0]}`. Set it in the class.")
    return task


def named_object(name: str, what: str) -> Any:
    """
    What `FILE.py:NAME` or `PACKAGE.MODULE:NAME` names. Modules are looked for in the current folder too.

    Args:
        name (`str`):
            The name.
        what (`str`):
            What errors call it.

    Raises:
        `OSError`: If there is no such file.
        `ImportError`: If there is no such module.
        `ValueError`: If the module has no such name, or fails when it is loaded.
    """
    where, _, attribute = name.rpartition(":")
    try:
        if where.endswith(".py"):
            file = Path(where).expanduser().resolve()
            if not file.exists():
                raise FileNotFoundError(f"{what}: there is no file '{where}'.")
            module = sys.modules.get(key := f"trl_score_file_{file}")
            if module is None:
                spec = importlib.util.spec_from_file_location(key, file)
                module = importlib.util.module_from_spec(spec)
                sys.modules[key] = module  # so that classes in it can be pickled, as for any module
                try:
                    spec.loader.exec_module(module)
                except BaseException:
                    del sys.modules[key]
                    raise
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(where)
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: '{where}' fails when it is loaded: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{what}: '{where}' has no '{attribute}'.")
    return getattr(module, attribute)


__all__ = [
    "GSM8K",
    "MBPP",
    "TASKS",
    "Arithmetic",
    "CodeTask",
    "HumanEval",
    "HumanEvalFix",
    "MBPPRepair",
    "Math",
    "MathTask",
    "Task",
    "get_task",
]
