"""Reward functions, called once per attempt."""

from collections.abc import Callable

from trl.trainer.utils import is_async_callable


def graded(func: Callable, name: str, attempt: int) -> Callable:
    """
    A reward function for one attempt: it gets the keyword `attempt`, and an error in it names the function, the attempt and
    the row.

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
        where = "on no single row" if row is None else f"in row {row}: {kwargs['prompts'][row]}"
        return RuntimeError(
            f"The reward function '{name}' raised {type(error).__name__} on attempt {attempt}, {where}. A wrong answer is a "
            "reward of 0 and an answer that cannot be scored is `None`; an exception stops the run. The last checkpoint is "
            "intact."
        )

    # After an error the rows are graded one by one, to find the one at fault.
    if is_async_callable(func):

        async def call(**kwargs):
            kwargs["attempt"] = attempt
            try:
                rewards = await func(**kwargs)
            except Exception as error:
                for row, single in enumerate(_rows(kwargs)):
                    try:
                        await func(**single)
                    except Exception:
                        raise failure(error, row, kwargs) from error
                raise failure(error, None, kwargs) from error
            return checked(rewards, kwargs["completions"])

    else:

        def call(**kwargs):
            kwargs["attempt"] = attempt
            try:
                rewards = func(**kwargs)
            except Exception as error:
                for row, single in enumerate(_rows(kwargs)):
                    try:
                        func(**single)
                    except Exception:
                        raise failure(error, row, kwargs) from error
                raise failure(error, None, kwargs) from error
            return checked(rewards, kwargs["completions"])

    return call


def _rows(kwargs: dict) -> list[dict]:
    """A reward function's arguments, row by row."""
    size = len(kwargs["completions"])
    columns = {key for key, value in kwargs.items() if isinstance(value, list) and len(value) == size}
    return [{key: [value[row]] if key in columns else value for key, value in kwargs.items()} for row in range(size)]
