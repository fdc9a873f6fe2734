"""
Is a model's answer the gold answer? math-verify does the mathematics; ours is where in the text the answer stands, and
what it may be taken for.

Everything here runs in the calling process without a limit of time: a hostile answer can take minutes or gigabytes.
[`trl_score.tasks.math.MathTask`] runs it in workers that have both limits.
"""

import importlib.util
import json
import logging
import re
import socket
import sys
from functools import lru_cache
from pathlib import Path

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, UnevaluatedExpr
from sympy.core.function import AppliedUndef


MAX_TEXT = 20_000  # characters of an attempt that are looked at, from its end
MAX_ANSWER = 1000  # characters of an answer; what is longer is none
MAX_STATEMENTS = 50  # boxes or "final answers" that are looked at, from the last

FINAL_ANSWER = re.compile(r"final answer is\b:?", re.IGNORECASE)  # the paper's form (Appendix C)
HOPE = re.compile(r"I hope it is correct", re.IGNORECASE)
ALTERNATIVES = re.compile(r"\banswer(?: is\b|:)(?=[^.\n]{0,60}\bor\b)([^\n]*)", re.I)  # "The answer is 3 or 4"
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
JOINT = re.compile(  # what may stand between two boxes of one answer: marks and "and"; or an "or" in the same sentence
    r"(?:[\s$,;&/|]|\\quad|\\[()\[\]]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})*|[^.\n]{0,40}\bor\b[^.\n]{0,40}"
)
GSM8K = re.compile(r"^\s*####\s*(.+?)\s*$", re.MULTILINE)
MATH_MARKS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
WRAPPED = re.compile(r"^(?:\*+|\$+|\\\(|\\\[|`+)\s*(.*?)\s*(?:\*+|\$+|\\\)|\\\]|`+)$", re.DOTALL)
FUNCTION = r"sqrt|sin|cos|tan|cot|sec|csc|arc|log|ln|exp|mod|over|plus|minus|times|percent|pct|and\b|or\b"
PROSE = re.compile(  # "it takes two", "21 dogs"; not "2 sin x"
    rf"(?<![\\a-zA-Z{{])[a-zA-Z]{{2,}}\s+[a-zA-Z]{{2,}}|[\d}})]\s+(?:vs\b|(?!{FUNCTION})[a-zA-Z]{{3,}})"
)
# Words between two answers, in which math-verify sees variables: 12 vs 0 would be a product, and 0.
HEDGE = re.compile(r"\b(?:vs|versus|not|nor|but|except|maybe|perhaps|xor|then|otherwise)\b", re.IGNORECASE)
ITEM = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")  # what a sentence can name as its answer
SEVERAL = re.compile(
    r"[^\s$]\s*\$\s*\$\s*[^\s$]|\\[)\]]\s*\\[(\[]"
)  # formulas side by side: a product without the marks
CLOCK = re.compile(
    r"(?:\\text\s*\{)?\s*(\d{1,2})(?::|\{:\})([0-5]\d)\b(?:[\s~}]|\\[ ,]|\\text\s*\{)*(?:([ap])\.?m\b.*)?", re.I
)
ENDS = re.compile(r"""^\\?["“]|\\?["”]$|(?<![.,;:])[.,;:]$""")  # quotes, and one mark at the end: "3..." goes on
TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}")
BASE = re.compile(r"_\{?(\d+)\}?\s*$")

# What math-verify misreads, and what it gets in its place.
SYMBOLS = str.maketrans(
    {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ",
     "≥": r"\ge ", "∪": r"\cup ", "€": "", "£": "", "¥": "", "\u00a0": " "}
)  # fmt: skip
IN_TEXTS = [
    (re.compile(r"\\mathrm\s*\{([ei])\}"), r"{\1}"),  # a number, read as a unit
    (re.compile(r"(?<=\d)i(?![a-zA-Z])"), " i"),  # 3i, whose i is another one than that of 3 i
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
]
REWRITES = [
    *IN_TEXTS,
    (re.compile(r"\\(?:bold(?:symbol)?|bm|pmb|displaystyle)(?![a-zA-Z])"), " "),
    (re.compile(r"^\\text\s*\{\s*(-?\d[\d,.]*)([a-zA-Z\s]*)\}$"), r"\1\\text{\2}"),  # \text{12 cm}, read as a name
    (re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 3/4, read as (2+3)/4
    (re.compile(r"(?<![\w.\\^{])(\d+)\s*\((?=\s*-?\d)"), r"\1\\cdot("),  # 3(4), read as 3+4
    (re.compile(r"(?<=\d)(?:(?:\s|~|\\[ ,;:])+|,?\s*\\!\s*)(?=\d{3}(?!\d))"), ""),  # 12 345 and 12\,345, added up
    (
        re.compile(r"(?<==)\s*-?\d{1,3}(?:,\d{3})+(?=(?:\.\d+)?$)"),
        lambda number: number.group().replace(",", ""),
    ),  # x=12,345
    (re.compile(r"\\q?quad\s*(?=\\text\s*\{(?!\s*(?:and|or)\s*\})|\(|\\pmod)"), " "),  # 5 \quad \text{cm}
    (re.compile(r"[\s,;]*\\q?quad(?:[\s,;]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\})*"), ", "),  # a list, multiplied
    # 4t and a + b + c, read as 4 and a + b with a unit; but 12 m is a length
    (re.compile(r"^(?!(?:.*=)?\s*-?[\d.,]+\s+[mshglL]$)(.*[\d}\s])(?<!,\s)(ab|bc|cc|[a-zA-Z])$"), r"\1{\2}"),
]
# Read in part, so that of two answers one would count: compared as it stands.
UNREADABLE = [
    re.compile(r"(?<!frac )(?<!binom )\d(?:\s|~|\\[ ,;:])+\d"),  # "3 4", added up
    re.compile(r"[\d})](?:\s|~|\\[ ,;:])+0(?![.\d])"),  # multiplied, so 0
    re.compile(  # only what follows the last "="
        r"=.*(?:\\\\|\\lor\b|\\vee\b|\\mid\b|\\to\b|\\text\s*\{(?!\s*(?:and|or)\s*\})|\|).*=", re.DOTALL
    ),
    re.compile(  # only what stands before the first "unit"
        r"[\w}]\W*\\(?:text\w*|mbox|mathrm)\s*\{(?!\s*,?\s*(?:and|or)\s*\})[^{}]*\}.*(?<!\^)(?<!\^\{)\d", re.DOTALL
    ),
]

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_MATH = [*_LATEX, ExprExtractionConfig()]  # whole texts only: a number that it finds in an answer is a part of it


def _last(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The matches from the last on, but not endlessly many: degenerate text repeats itself."""
    return list(pattern.finditer(text))[: -MAX_STATEMENTS - 1 : -1]


def _braced(text: str, start: int) -> str | None:
    """The contents of the braces that open at `start`; `None` if they do not close in time."""
    depth = 0
    for position in range(start, min(len(text), start + MAX_ANSWER)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
    return None


def _last_box(text: str) -> str | None:
    r"""
    The contents of the last box that is closed: `\boxed{..}`, `\fbox{..}` or `\boxed 5`. Boxes with nothing but a comma or
    an "and" between them are the parts of one answer; with an "or" too, so that "3 or 4" is not the answer 4.
    """
    parts: list[str] = []
    begin = 0  # of the part found last, which is the first in the text
    for box in _last(BOX, text):
        if text[box.end() : box.end() + 1] == "{":
            content = _braced(text, box.end())
            end = box.end() + len(content or "") + 2
        else:
            content = re.match(r"[^\s$.,;]*", text[box.end() :]).group() or None
            end = box.end() + len(content or "")
        if content is None:
            continue
        if parts and not JOINT.fullmatch(text, end, begin):
            break
        parts.insert(0, content)
        begin = box.start()
    return ", ".join(parts) if parts else None


def _unwrapped(answer: str) -> str:
    """Without the marks around it: dollars, bold, brackets, a closing full stop."""
    before = None
    while answer != before:
        before, answer = answer, answer.strip().removeprefix("**").removesuffix("**").strip()
        answer = ENDS.sub("", answer).strip()
        if answer.count("$") % 2:  # one of a pair that was lost
            answer = answer.strip("$")
        if (wrapped := WRAPPED.match(answer)) and not MATH_MARKS.search(wrapped.group(1)):
            answer = wrapped.group(1)
    return answer


def _plain(answer: str) -> str:
    """Without the marks of text: names are compared by letter."""
    return re.sub(r"(?<=[a-zA-Z)])\s*,\s*", ",", TEXT.sub(r"\1", answer)).strip().lower()


def _is_prose(answer: str) -> bool:
    return PROSE.search(answer) is not None and "\\text" not in answer


def extract_answer(text: str) -> str | None:
    r"""
    The answer that a text states, by the first of these that it has: the last "Final Answer: The final answer is ..",
    the last closed `\boxed{}`, GSM8K's last `#### ..`, a sentence that says what the final answer is.

    Args:
        text (`str`):
            An attempt.

    Returns:
        `str` or `None`: LaTeX or a sentence; `None` if the text states its answer in none of these forms.
    """
    said = None
    for final in _last(FINAL_ANSWER, text):
        rest = text[final.end() :]
        if hope := HOPE.search(rest):
            rest = rest[: hope.start()]
        elif _last_box(rest) is None:  # then it is on the same line, or on the next one that has more than marks
            rest = next((line for line in rest.splitlines() if re.search(r"\w", line)), "")
        answer = _last_box(rest) or rest
        if hope and not re.sub(r"[\s$*.]|\\\W", "", answer):
            return ""  # what stands before the statement is no answer either
        if len(answer) > MAX_ANSWER or not (answer := _unwrapped(answer)) or answer.startswith("```"):
            continue
        if hope or not _is_prose(answer):
            return answer
        said = said or answer  # perhaps in passing: "the final answer is a common mistake"
    if (box := _last_box(text)) is not None:
        return _unwrapped(box)
    if lines := _last(GSM8K, text):
        return _unwrapped(lines[0].group(1))
    if said is None and (alternatives := _last(ALTERNATIVES, text)):
        return _unwrapped(alternatives[0].group(1))
    return said


def _rewritten(text: str, rewrites: list) -> str:
    for pattern, rewritten in rewrites:
        text = pattern.sub(rewritten, text)
    return text


def _parse_answer(answer: str) -> list:
    """What math-verify reads in a stated answer; nothing if that is not one thing."""
    answer = answer.translate(SYMBOLS).strip()
    if not answer or len(answer) > MAX_ANSWER:
        return []
    # Without marks it is one formula: of several, math-verify takes the last.
    latex = ENDS.sub("", " ".join(MATH_MARKS.sub(" ", answer).split()))
    if HEDGE.search(TEXT.sub(" ", latex)) or SEVERAL.search(answer):
        return _words(answer)
    if _is_prose(latex):
        named = {MATH_MARKS.sub("", item).strip() for item in ITEM.findall(answer)}
        if len(named) != 1:
            return _words(answer)
        latex = named.pop()
    latex = _rewritten(latex, REWRITES)
    without_matrices = re.sub(r"\\begin\{(\w*matrix|array)\}.*?\\end\{\1\}", " ", latex, flags=re.DOTALL)
    if any(pattern.search(without_matrices) for pattern in UNREADABLE):
        return [latex]
    return parse(f"${latex}$", _LATEX, extraction_mode="first_match", parsing_timeout=None)


def _words(answer: str) -> list:
    """A sentence without a number is compared as it stands; one with several, such as "3 or 4", is no answer."""
    return [] if ITEM.search(answer) else [" ".join(answer.lower().split())]


@lru_cache(maxsize=4096)
def parse_gold(answer: str) -> list:
    """
    What [`is_correct`] compares with.

    Args:
        answer (`str`):
            A bare gold answer, in LaTeX, without dollars or box.

    Raises:
        `ValueError`: If it cannot be read as an answer.
    """
    parsed = _parse_answer(_unwrapped(answer))
    if not parsed:
        raise ValueError(f"The gold answer {answer!r} cannot be parsed. Drop the row, or give the answer as LaTeX.")
    return parsed


def _contradicts_itself(parsed: list) -> bool:
    """Whether it equates two numbers that are different: "3 = 4", of which math-verify takes the 4."""
    relations = getattr(parsed[0], "_unsorted_args", parsed[:1])
    sides = [(relation.lhs, relation.rhs) for relation in relations if isinstance(relation, Eq)]
    return any(
        not (left.free_symbols or left.has(AppliedUndef) or verify(left, right, timeout_seconds=None))
        for left, right in sides
    )


def _agree_in_five_digits(gold: list, parsed: list) -> bool:
    """Of numbers only; math-verify compares six decimals, in which all small numbers are 0."""
    gold, parsed = (value.rhs if isinstance(value, Eq) else value for value in (gold[0], parsed[0]))
    if gold == parsed or not all(
        isinstance(value, Expr) and value.is_number and value.is_finite for value in (gold, parsed)
    ):
        return True
    scales = (1, 100, 0.01) if gold.has(UnevaluatedExpr) or parsed.has(UnevaluatedExpr) else (1,)  # percent
    if gold.is_zero or parsed.is_zero:
        return gold.is_zero is not False and parsed.is_zero is not False
    ratio = complex((parsed.doit() / gold.doit()).evalf())
    return any(abs(ratio * scale - 1) < 1e-5 for scale in scales)


def is_correct(text: str, gold: str) -> bool:
    """
    Whether an attempt gives the gold answer.

    Args:
        text (`str`):
            The attempt.
        gold (`str`):
            The bare gold answer.

    Returns:
        `bool`: `False` also where the attempt's answer cannot be parsed.

    Raises:
        `ValueError`: If the gold answer cannot be parsed; never for the attempt.
    """
    expected = parse_gold(gold)
    text = text[-MAX_TEXT:]
    try:
        answer = extract_answer(text)
        if answer is None:
            parsed = parse(_rewritten(text, IN_TEXTS), _MATH, parsing_timeout=None)
        elif _plain(answer) == _plain(_unwrapped(gold)):
            return True
        elif (time := CLOCK.fullmatch(gold.lower())) and ":" not in answer:
            return False  # math-verify takes 1{:}45 for 1
        elif time and (stated := CLOCK.fullmatch(answer.lower())):
            return time.groups() == stated.groups()
        else:
            bases = {base.group(1) for base in map(BASE.search, (answer, gold)) if base}
            parsed = _parse_answer(answer) if len(bases) < 2 else []  # math-verify takes 25_6 and 25_7 for 25
        return (
            bool(parsed)
            and verify(expected, parsed, allow_set_relation_comp=True, timeout_seconds=None)
            and not (answer is not None and _contradicts_itself(parsed))
            and _agree_in_five_digits(expected, parsed)
        )
    except Exception:  # of a parser, on a text that nobody foresaw: that is no answer
        return False


def _handle(job: bytes) -> bytes:
    """One job of [`trl_score.tasks.math.MathTask`]: a verdict, the reason why there is none, the unreadable golds, or
    whether two answers are the same."""
    job = json.loads(job)
    if "golds" in job:
        return json.dumps([gold for gold in job["golds"] if not _is_readable(gold)]).encode()
    if "same" in job:
        first, second = job["same"]
        return json.dumps(_is_readable(second) and is_correct(rf"\boxed{{{first}}}", second)).encode()
    try:
        return json.dumps(is_correct(job["text"], job["gold"])).encode()
    except ValueError as error:
        return json.dumps(str(error)).encode()


def _is_readable(gold: str) -> bool:
    try:
        return bool(parse_gold(gold))
    except Exception:
        return False


if __name__ == "__main__":  # a worker: `python math_grading.py MEMORY CHANNEL`, which imports nothing else of ours
    logging.disable()
    is_correct(r"The final answer is $\frac{1}{2}$. I hope it is correct.", "2")  # load and compile what is needed
    import resource  # not on Windows, where nothing starts a worker

    memory, channel = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    specification = importlib.util.spec_from_file_location("worker_pool", Path(__file__).parents[1] / "worker_pool.py")
    worker_pool = importlib.util.module_from_spec(specification)
    sys.modules["worker_pool"] = worker_pool
    specification.loader.exec_module(worker_pool)
    worker_pool.serve(socket.socket(fileno=channel), _handle)
