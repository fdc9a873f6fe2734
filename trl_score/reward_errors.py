"""An error in a reward function names the function, the attempt and the row."""

from collections.abc import Callable, Iterator
from types import TracebackType

from trl.trainer.utils import is_async_callable


def unique_names(names: list[str]) -> list[str]:
    """Names of reward functions, under which they are logged: those that come again get `_2`, `_3`, .. behind them."""
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
    A reward function for one attempt: it gets the keyword `attempt`, and an error in it names the function, the attempt and
    the row. The row is read from the traceback, and confirmed by one more call with this row alone: no other row is graded
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

    def checked(rewards, completions):
        if hasattr(rewards, "__len__") and len(rewards) == len(completions):
            return rewards
        got = f"{len(rewards)} rewards" if hasattr(rewards, "__len__") else f"`{type(rewards).__name__}`"
        raise ValueError(
            f"The reward function '{name}' returned {got} for {len(completions)} completions of attempt {attempt}. It must "
            "return a list with one reward per completion, `None` where a completion cannot be scored."
        )

    def failure(error, row, kwargs):
        where = f"in row {row}: {kwargs['prompts'][row]}" if row is not None else "in a row that could not be found"
        return RuntimeError(
            f"The reward function '{name}' raised {type(error).__name__} on attempt {attempt}, {where}. A wrong answer is a "
            "reward of 0 and an answer that cannot be scored is `None`; an exception stops the run. The last checkpoint is "
            "intact."
        )

    if is_async_callable(func):

        async def call(**kwargs):
            kwargs["attempt"] = attempt
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
                raise failure(error, row, kwargs) from error
            return checked(rewards, kwargs["completions"])

    else:

        def call(**kwargs):
            kwargs["attempt"] = attempt
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
                raise failure(error, row, kwargs) from error
            return checked(rewards, kwargs["completions"])

    return call


def failing_row(traceback: TracebackType | None, kwargs: dict) -> int | None:
    """
    The row that a reward function worked on when it raised: the innermost frame of the traceback that holds an object of one
    row and of no other, such as its completion, the text of it, or the row's entry in a column, or that holds the index of the
    row.

    Args:
        traceback (`TracebackType`, *optional*):
            Of the error.
        kwargs (`dict`):
            What the reward function was called with.
    """
    row_of = {}
    for key, values in kwargs.items():
        if _is_column(values, kwargs):
            for row, value in enumerate(values):
                for each in _parts(value) if key != "completion_ids" else [value]:
                    # An object that several rows share, such as the prompt of a problem's rollouts, tells nothing.
                    row_of[id(each)] = row if row_of.get(id(each), row) == row else None
    columns = {id(values) for values in kwargs.values() if _is_column(values, kwargs)}
    found = None
    while traceback is not None:
        own = {name: value for name, value in traceback.tb_frame.f_locals.items() if name not in kwargs}
        rows = {row_of.get(id(value)) for value in traceback.tb_frame.f_locals.values()} - {None}
        if not rows and columns.intersection(map(id, traceback.tb_frame.f_locals.values())):  # a loop over indices
            rows = {value for value in own.values() if type(value) is int and 0 <= value < len(kwargs["completions"])}
        if len(rows) == 1:
            found = rows.pop()  # an inner frame's comes later
        traceback = traceback.tb_next
    return found


def _parts(value) -> Iterator:
    """An entry of a column and what is in it, without the objects that Python shares between equal values."""
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
