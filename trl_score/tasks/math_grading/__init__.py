"""
Is a model's answer the gold answer? Three questions, one module each:

- `stating`: where does the attempt state its answer? A text that states none gets no reward.
- `reading`: what does the answer say? Hedges and relations to a number say nothing.
- `comparing`: is that the gold answer, in value and in kind?

`notation` is the spelling of answers, for `reading`. `repeating` finds answers that only repeat an expression of the problem.

math-verify does the mathematics. docs/tasks.md has the policy in one table. Everything here runs in the calling process
without a limit of time: a hostile answer can take minutes or gigabytes. [`trl_score.tasks.math.MathTask`] runs it in workers
(`worker`) that have both limits. Nothing else of the package is imported, so that a worker starts fast.
"""

import re
from functools import lru_cache

from . import comparing
from .notation import option, plain
from .reading import Reading, elements, in_both_cases, read, with_cases
from .repeating import FORMULA, is_asked, repeats
from .stating import MAX_TEXT, after_reasoning, extract_answer, unwrapped


__all__ = ["MAX_TEXT", "after_reasoning", "extract_answer", "is_correct", "is_readable", "parse_gold"]

AT_ONCE = re.compile(  # no powers of powers, factorials, sums or numbers of ten digits
    r"(?!.*\d{10})(?:[a-zA-Z]\^(?:\d(?!\d)|\{\d\d?\})(?!\s*\^)|\^\{?\\circ\}?|[\w\s.,+*/()\[\]{}=<>:|&$-]|\\[ ,!;{}%$\\]"
    r"|\\(?:[dt]?frac|sqrt|pi|theta|infty|left|right|cup|cap|in|cdot|times|pm|text|mbox|begin|end|[lg]eq?)(?![a-zA-Z]))*+",
    re.DOTALL,
)
CLOCK = re.compile(
    r"(?:\\text\s*\{)?\s*(?P<hour>\d{1,2})(?:(?::|\{:\})(?P<minute>[0-5]\d))?(?:[\s~}]|\\[ ,]|\\text\s*\{)*"
    r"(?:(?P<half>[ap])\.?\s?m\b\.?\D*)?",
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def parse_gold(answer: str) -> Reading:
    """
    What [`is_correct`] compares with.

    Args:
        answer (`str`):
            A bare gold answer, in LaTeX, without dollars or box.

    Raises:
        `ValueError`: If it cannot be read as an answer.
    """
    bare = unwrapped(answer)
    reading = read(bare)
    if not _says_something(bare, reading):
        raise ValueError(f"The gold answer {answer!r} cannot be parsed. Drop the row, or give the answer as LaTeX.")
    return reading


def is_readable(gold: str) -> bool:
    """Whether [`parse_gold`] reads a gold answer, in a tenth of the time: what math-verify parses at once, it need not parse."""
    bare = unwrapped(gold)
    try:
        return _says_something(bare, read(bare, parse=not AT_ONCE.fullmatch(bare)))
    except Exception:
        return False


def _says_something(bare: str, reading: Reading) -> bool:
    return bool(bare) and not (reading.refused and len(re.findall(r"\d+", bare)) > 1)


def is_correct(text: str, gold: str, problem: str | None = None) -> bool:
    """
    Whether an attempt gives the gold answer.

    Args:
        text (`str`):
            The attempt.
        gold (`str`):
            The bare gold answer.
        problem (`str`, *optional*):
            The problem's statement. An answer that only repeats one of its expressions is wrong, unless the gold answer has
            the same form.

    Returns:
        `bool`: `False` also where the attempt states no answer, or one that cannot be read.

    Raises:
        `ValueError`: If the gold answer cannot be parsed; never for the attempt.
    """
    expected = parse_gold(gold)
    try:
        answer = extract_answer(text)
        return answer is not None and _is_gold(answer, unwrapped(gold), expected, problem)
    except Exception:  # of a parser, on a text that nobody foresaw: that is no answer
        return False


def _is_gold(answer: str, gold: str, expected: Reading, problem: str | None) -> bool:
    if plain(answer) == plain(gold):
        return bool(answer)
    if gold_option := option(gold):
        letter, content = gold_option
        if answer_option := option(answer):
            return answer_option[0] == letter and plain(answer_option[1]) == plain(content)
        return plain(answer) == letter or _is_gold(answer, content, parse_gold(content), problem)
    if answer_option := option(answer):
        letter, content = answer_option
        return plain(gold) == letter or _is_gold(content, gold, expected, problem)
    gold_time, time = (CLOCK.fullmatch(re.sub(r"\\!|(?<!\\)\$", "", each)) for each in (gold, answer))
    if gold_time and (gold_time["minute"] or gold_time["half"]):
        return time is not None and _time(gold_time) == _time(time)
    if time and time["half"]:
        return False
    cases = in_both_cases(gold, answer, " ".join(map(" ".join, FORMULA.findall(problem or ""))))
    if cases:
        expected, problem = read(gold, cases=cases), problem and with_cases(problem, cases)
    found = read(answer, cases=cases)
    if found.value is None or expected.value is None or not _same_notation(expected, found):
        return False
    value = found.value
    sides = comparing.chain_of(value)
    if sides and not comparing.chain_of(expected.value):
        if comparing.is_name(sides[-1]) and not comparing.is_name(sides[0]):  # 5 = x
            sides.reverse()
        named = comparing.is_name(sides[0]) or comparing.is_number(sides[0])
        if not comparing.is_consistent(sides) or not (named or is_asked(found.latex, problem)):
            return False
        value = sides[-1]
        names, parts = comparing.named_values(expected.value), [str(part) for part in getattr(sides[0], "args", ())]
        if names and parts and parts != list(names):  # (y, x) = (1, 2) for x = 1, y = 2
            return False
    gold_value = expected.value
    if not sides and re.search(r"\\in(?![a-z])", expected.latex):  # 1 < x < 2 for x \in (1, 2)
        gold_value = (comparing.chain_of(gold_value) or [gold_value])[-1]
    if comparing.is_set(gold_value) and re.search(r"\bor\b", found.latex):
        value = comparing.union_of(value)
    if comparing.is_set(gold_value) or comparing.is_set(value):
        gold_value, value = (
            comparing.as_set(each, re.search(r"\band\b", one.latex) is None)
            for each, one in ((gold_value, expected), (value, found))
        )
    # One answer in several forms: 1/2, 0.5; but not 5, 5.
    written = elements(re.sub(r"\\text\s*\{\s*or\s*\}|\bor\b", ",", found.latex))
    items = comparing.items_of(value) or []
    if len(items) == len(set(written)) > 1 and not comparing.items_of(gold_value):
        if all(comparing.same(gold_value, item) for item in items):
            return True
    return comparing.same(gold_value, value) and not (
        problem and repeats(problem, answer, found.latex, expected.latex)
    )


def _time(match: re.Match) -> tuple:
    return int(match["hour"]), match["minute"] or "00", (match["half"] or "").lower()


def _same_notation(expected: Reading, found: Reading) -> bool:
    """Number bases and moduli: an answer may leave out the one that the gold answer has, and must not name another."""
    pairs = (expected.base, found.base), (expected.modulus, found.modulus)
    return all(theirs is None or ours is None or ours == theirs for ours, theirs in pairs)
