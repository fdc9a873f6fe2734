"""An error in a reward function names the function, the attempt and the row."""

import inspect
import math
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from trl.trainer.utils import is_async_callable


LARGEST = torch.finfo(torch.float32).max  # in which TRL holds rewards


def unique_names(names: list[str]) -> list[str]:
    """Names under which reward functions are logged: repeated names get the suffixes `_2`, `_3`, .."""
    unique = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def graded(func: Callable, name: str, attempt: int) -> Callable:
    """
    Wrap a reward function for one attempt: it gets the keyword `attempt` if it takes it, and an error in it names the function, the
    attempt and the row. The row is read from the traceback, and confirmed by one more call with this row alone. No other row is graded
    again, as a grader can be slow or paid.

    Args:
        func (`Callable`):
            Reward function of TRL's kind, sync or async.
        name (`str`):
            Its name.
        attempt (`int`):
            The attempt, from 1.

    Returns:
        `Callable`: of the same kind. It raises `RuntimeError` where `func` raises, and `ValueError` where `func` does not
        return one reward per completion.
    """

    more = {"attempt": attempt} if takes_attempt(func) else {}
    if is_async_callable(func):

        async def call(**kwargs):
            kwargs |= more
            try:
                rewards = await func(**kwargs)
            except Exception as error:
                row = failing_row(error.__traceback__, kwargs)
                if row is not None:
                    try:
                        await func(**_row(kwargs, row))
                        row = None
                    except Exception:
                        pass
                raise _failure(error, name, row, kwargs, attempt) from error
            return checked(rewards, name, len(kwargs["completions"]), attempt, kwargs.get("prompts"))

    else:

        def call(**kwargs):
            kwargs |= more
            try:
                rewards = func(**kwargs)
            except Exception as error:
                row = failing_row(error.__traceback__, kwargs)
                if row is not None:
                    try:
                        func(**_row(kwargs, row))
                        row = None
                    except Exception:
                        pass
                raise _failure(error, name, row, kwargs, attempt) from error
            return checked(rewards, name, len(kwargs["completions"]), attempt, kwargs.get("prompts"))

    return call


def signature_of(func: Callable) -> inspect.Signature | None:
    """What a reward function can be called with; `None` where that cannot be told. A wrapper is called by its own signature."""
    try:
        return inspect.signature(func, follow_wrapped=False)
    except (TypeError, ValueError):  # of a builtin
        return None


def takes_attempt(func: Callable) -> bool:
    """Whether a reward function can be given the keyword `attempt`, which TRL does not have."""
    signature = signature_of(func)
    parameters = () if signature is None else signature.parameters.values()
    return signature is None or any(each.kind is each.VAR_KEYWORD or each.name == "attempt" for each in parameters)


def checked(rewards, name: str, number: int, attempt: int, prompts: list | None = None):
    """
    The rewards of a reward function for `number` completions of attempt `attempt`. An error shows the prompt, if there are `prompts`.

    Raises:
        `ValueError`: If there is not one reward for each completion, or if one is infinite in float32 or no number.
    """
    is_list = hasattr(rewards, "__len__") and not isinstance(rewards, dict)
    if not is_list or len(rewards) != number:
        got = f"{len(rewards)} rewards" if is_list else f"`{type(rewards).__name__}`"
        raise ValueError(
            f"The reward function '{name}' returned {got} for {number} completions of attempt {attempt}. It must return a list with "
            "one reward per completion, `None` where a completion cannot be scored."
        )
    for row, reward in enumerate(rewards):
        where = f"for attempt {attempt} in row {row}" + (f": {prompts[row]}" if prompts else "")
        try:
            if getattr(reward, "ndim", 0) > 0:
                raise TypeError("an array")
            is_infinite = reward is not None and (math.isinf(reward) or abs(float(reward)) > LARGEST)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The reward function '{name}' returned {reward!r} {where}. A reward is a number, or `None` where a completion cannot "
                "be scored."
            ) from error
        if is_infinite:
            raise ValueError(
                f"The reward function '{name}' returned {float(reward)} {where}. A reward that is infinite in float32 has no baseline, and one update "
                "with it would destroy the weights. Return a finite number, or `None` where a completion cannot be scored."
            )
    return rewards


def _failure(error: Exception, name: str, row: int | None, kwargs: dict, attempt: int) -> RuntimeError:
    """The error to raise in place of one that a reward function raised in a row."""
    where = f"in row {row}: {kwargs['prompts'][row]}" if row is not None else "in a row that could not be found"
    said = next(iter(str(error).splitlines()), "")
    return RuntimeError(
        f"The reward function '{name}' raised {type(error).__name__} on attempt {attempt}, {where}. "
        f"{f'The exception says: {said}. ' if said else ''}An exception stops the run; what was saved before is intact. Return 0 "
        "for a wrong answer, and `None` for an answer that cannot be scored."
    )


def failing_row(traceback: TracebackType | None, kwargs: dict) -> int | None:
    """
    The row that a reward function worked on when it raised. It is found in the innermost frame of the traceback that holds the
    index of a row, or an object of one row and of no other: its completion, the text of it, or its entry in a column.

    Args:
        traceback (`TracebackType`, *optional*):
            The traceback of the error.
        kwargs (`dict`):
            The arguments of the reward function.

    Returns:
        `int` or `None`: the row, if one was found.
    """
    row_of = {}
    for key, values in kwargs.items():
        if _is_column(values, kwargs):
            for row, value in enumerate(values):
                for each in _parts(value) if key != "completion_ids" else [value]:
                    # An object that several rows share, such as the prompt of a problem's rollouts, does not name a row.
                    row_of[id(each)] = row if row_of.get(id(each), row) == row else None
    columns = {id(values) for values in kwargs.values() if _is_column(values, kwargs)}
    found = None
    while traceback is not None:
        # A variable of an enclosing function, such as the number of attempts, is no index of a loop in this one.
        not_own = {*kwargs, *traceback.tb_frame.f_code.co_freevars}
        own = {name: value for name, value in traceback.tb_frame.f_locals.items() if name not in not_own}
        rows = {row_of.get(id(value)) for value in traceback.tb_frame.f_locals.values()} - {None}
        if not rows and columns.intersection(map(id, traceback.tb_frame.f_locals.values())):  # a loop over indices
            rows = {value for value in own.values() if type(value) is int and 0 <= value < len(kwargs["completions"])}
        if len(rows) == 1:
            found = rows.pop()  # an inner frame's comes later
        traceback = traceback.tb_next
    return found


def _parts(value) -> Iterator:
    """An entry of a column and the objects in it, except for objects that Python shares between equal values."""
    if isinstance(value, list | tuple | dict):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _parts(each)
    elif isinstance(value, str) and len(value) > 1 and value not in ("assistant", "user", "system"):
        yield value


def _is_column(values, kwargs: dict) -> bool:
    return isinstance(values, list) and len(values) == len(kwargs["completions"])


def _row(kwargs: dict, row: int) -> dict:
    """A reward function's arguments for one row."""
    return {key: [value[row]] if _is_column(value, kwargs) else value for key, value in kwargs.items()}
