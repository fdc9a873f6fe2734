"""An error in a reward function names the row, and no other row is graded again."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from trl_score.reward_errors import graded, unique_names
from trl_score.training import with_examples


NUMBER, AT = 6, 3


def rows(is_text=False):
    """Six completions, of which the one at 3 is bad; the first two rows share their prompt."""
    texts = [f"answer {i}" if i != AT else "bad answer" for i in range(NUMBER)]
    prompts = [[{"role": "user", "content": f"problem {i // 2}"}] for i in range(0, NUMBER, 2) for _ in range(2)]
    completions = texts if is_text else [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompts": prompts, "completions": completions, "answer": [f"gold {i}" for i in range(NUMBER)], "level": 3}


def judge(text):
    if "bad" in text:
        raise ConnectionError("lost")
    return 1.0


def in_a_loop(completions, **_):
    return [judge(completion[0]["content"]) for completion in completions]


def by_index(completions, **_):
    rewards = []
    for i in range(len(completions)):
        rewards.append(judge("" + completions[i][0]["content"].strip() + " "))
    return rewards


def zipped(completions, answer, **_):
    return [judge(completion[0]["content"] + gold) for completion, gold in zip(completions, answer, strict=True)]


def contents_first(completions, **_):
    contents = [completion[0]["content"] for completion in completions]
    return list(map(judge, contents))


def by_column(completions, answer, **_):
    texts = iter(completions)
    return [judge(next(texts)[0]["content"] * len(gold)) for gold in answer]


def in_threads(completions, **_):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda completion: judge(completion[0]["content"]), completions))


def by_prompt(prompts, completions, **_):
    """The prompt of two rows is in the innermost frame, their completion is in the one above."""

    def compare(prompt, text):
        return judge(f"{prompt}{text}")

    return [compare(prompt, c[0]["content"]) for prompt, c in zip(prompts, completions, strict=True)]


def counted(func):
    sizes = []

    def call(**kwargs):
        sizes.append(len(kwargs["completions"]))
        return func(**kwargs)

    return sizes, call


@pytest.mark.parametrize(
    "func", [in_a_loop, by_index, zipped, contents_first, by_column, in_threads, by_prompt], ids=lambda f: f.__name__
)
def test_the_failing_row_is_named_and_only_it_is_graded_again(func):
    sizes, call = counted(func)
    with pytest.raises(RuntimeError, match=rf"'judge' raised ConnectionError on attempt 2, in row {AT}: .*problem 1"):
        graded(call, "judge", 2)(**rows())
    assert sizes == [NUMBER, 1]


def test_texts_are_found_as_messages_are():
    sizes, call = counted(lambda completions, **_: [judge(text) for text in completions])
    with pytest.raises(RuntimeError, match=f"in row {AT}: "):
        graded(call, "judge", 1)(**rows(is_text=True))
    assert sizes == [NUMBER, 1]


@pytest.mark.parametrize("gather", [False, True])
def test_an_async_function_is_asked_again_for_one_row(gather):
    sizes = []

    async def ask(completion):
        await asyncio.sleep(0)
        return judge(completion[0]["content"])

    async def call(completions, **_):
        sizes.append(len(completions))
        if gather:
            return await asyncio.gather(*map(ask, completions))
        return [await ask(completion) for completion in completions]

    with pytest.raises(RuntimeError, match=f"on attempt 1, in row {AT}: "):
        asyncio.run(graded(call, "judge", 1)(**rows()))
    assert sizes == [NUMBER, 1]


def no_trace(completions, **_):
    """Everything at once, as a request for a whole batch."""
    joined = " ".join(completion[0]["content"] for completion in completions)
    raise ConnectionError(len(joined))


def test_the_number_of_attempts_is_no_row():
    """Training wraps a reward function in another one, whose frame has the completions and the number of attempts."""
    reward = with_examples(no_trace, {}, num_attempts=2)
    with pytest.raises(RuntimeError, match="on attempt 1, in a row that could not be found"):
        graded(reward, "judge", 1)(**rows())


@pytest.mark.parametrize("again", [0, 1])
def test_a_row_that_cannot_be_told_is_said_and_no_batch_is_graded_again(again):
    """An error of the whole batch; and one that does not come again, as of a network."""

    def once(completions, **_):
        for completion in completions:
            if len(completions) > 1 and "bad" in completion[0]["content"]:
                raise ConnectionError("for once")
        return [0.0] * len(completions)

    sizes, call = counted(once if again else no_trace)
    with pytest.raises(
        RuntimeError, match="raised ConnectionError on attempt 1, in a row that could not be found"
    ) as error:
        graded(call, "judge", 1)(**rows())
    assert sizes == [NUMBER] + [1] * again and isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize("infinite", [math.inf, -math.inf, numpy.float32("-inf"), torch.tensor(math.inf), 1e39])
def test_an_infinite_reward_is_refused(infinite):
    """One of them makes the advantages of its group infinite, and the update turns all weights into NaN."""
    rewards = [1.0] * AT + [infinite] + [None] * (NUMBER - AT - 1)
    with pytest.raises(
        ValueError, match=rf"'judge' returned (-?inf|1e\+39) for attempt 2 in row {AT}: .*problem 1.* no baseline"
    ):
        graded(lambda **_: rewards, "judge", 2)(**rows())


@pytest.mark.parametrize("other", [["1.0"] * NUMBER, torch.ones(NUMBER, 1), [[1.0]] * NUMBER])
def test_a_reward_that_is_no_number_is_refused(other):
    with pytest.raises(ValueError, match=r"'judge' returned .* for attempt 1 in row 0: .*A reward is a number"):
        graded(lambda **_: other, "judge", 1)(**rows())


def test_a_dict_of_rewards_is_refused():
    with pytest.raises(ValueError, match="'judge' returned `dict` for"):
        graded(lambda **_: dict.fromkeys(range(NUMBER), 1.0), "judge", 1)(**rows())


@pytest.mark.parametrize(
    "rewards",
    [
        numpy.ones(NUMBER, "float16"),
        torch.ones(NUMBER, dtype=torch.bfloat16),
        [True] * NUMBER,
        [None, math.nan] * (NUMBER // 2),
        [3e38] * NUMBER,
    ],
)
def test_numbers_of_every_kind_are_rewards(rewards):
    assert graded(lambda **_: rewards, "judge", 1)(**rows()) is rewards


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["f", "f", "f"], ["f", "f_2", "f_3"]),
        (["f", "f_2", "f"], ["f", "f_2", "f_3"]),
        (["f", "f", "f_2"], ["f", "f_3", "f_2"]),
        ([], []),
    ],
)
def test_names_of_reward_functions_are_unique(names, expected):
    assert unique_names(names) == expected
