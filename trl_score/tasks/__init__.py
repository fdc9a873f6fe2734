"""The tasks, by name."""

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
            A key of `TASKS`.
        **kwargs:
            Arguments of its class, such as `data_dir`. An argument that is `None` keeps the default of the class.

    Raises:
        `ValueError`: If there is no such task, or it has no data to read.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}. Expected one of: {sorted(TASKS)}.")
    kwargs = {argument: value for argument, value in kwargs.items() if value is not None}
    if name == Arithmetic.name and "data_dir" in kwargs:
        raise ValueError("'arithmetic' is made, not read: it has no `data_dir`.")
    return TASKS[name](**kwargs)


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
