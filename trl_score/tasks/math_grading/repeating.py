r"""
Answers that only repeat the problem: "Simplify $\sqrt{50}$" answered by $\sqrt{50}$. Their value is right, and nothing was
done. So expressions are compared here by form, not by value.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from sympy import Add, Basic, Mul

from .notation import notation, without_units
from .reading import sympy_of


FORMULA = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation)\*?\}(.+?)\\end", re.DOTALL
)
TYPED = [  # formulas in a statement without the marks of mathematics, with letters in them and without
    re.compile(r"(?:sqrt|\d|[()+*/^!√×·÷−%.-]|\s|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]))+"),
    re.compile(r"(?:sqrt|\d|[()+*/^!√×·÷−%.-]|\s)+"),
]
SIDES = re.compile(r"=|<|>|\\(?:leq?|geq?|neq?|approx|equiv|quad|qquad)(?![a-zA-Z])|,|;|\\\\|&|:")
RECURRING = re.compile(r"\\(?:overline|bar|dot)(?![a-zA-Z])|dots(?![a-zA-Z])|\.\.\.")
PLAIN = re.compile(r"[-+]?(?:\d*(?:\.\d+)?(?:\\?%)?|[a-zA-Z]|\\pi|\\infty)")
NUMBER = re.compile(r"(?<![\w.\\])(?<!_\{)\d+(?:\.\d+)?")


def is_asked(latex: str, problem: str | None) -> bool:
    """Whether the left side of an equation is a formula of the problem: 3x = 6 is an answer to "What is $3x$?"."""
    return problem is not None and form(latex.split("=")[0]) in _asked(problem)


def _formulas(problem: str) -> list[str]:
    formulas = [next(filter(None, groups)) for groups in FORMULA.findall(problem)]
    rest = FORMULA.sub(" . ", problem)
    typed = [
        run.strip(" .\n")
        for pattern in TYPED
        for run in pattern.findall(rest)
        if re.search(r"[\d)a-z]\s*[-+*/^!√×·÷−%(]|sqrt|√", run)
    ]
    return [
        without_units(notation(formula.strip(" .,\n"))) for formula in [*formulas, *typed] if formula.strip(" .,\n")
    ]


@lru_cache(maxsize=64)
def _asked(problem: str) -> frozenset[str]:
    return frozenset(form(formula) for formula in _formulas(problem) if not SIDES.search(formula))


@lru_cache(maxsize=64)
def _expressions(problem: str) -> frozenset[str]:
    """The forms of all expressions of a statement."""
    found = set()
    for formula in _formulas(problem):
        for part in {formula, *SIDES.split(formula)}:
            if part.strip():
                found.update(forms(part.strip()))
    return frozenset(found)


def repeats(problem: str, answer: str, found: str, expected: str) -> bool:
    """
    Whether an answer is an expression of the statement, and not of the gold answer's form. A number stays an answer.

    Args:
        problem (`str`):
            The statement.
        answer, found (`str`):
            The answer as it is stated, and as it was read.
        expected (`str`):
            The gold answer as it was read.
    """
    if RECURRING.search(answer):  # read as a fraction
        return _compact(answer) in _compact(problem) and not RECURRING.search(expected)
    last, gold = (latex.split("=")[-1].strip() for latex in (found, expected))
    ours = {form(side) for side in (found, last) if not is_plain(side)}
    return bool(ours & _expressions(problem)) and form(found) != form(expected) and form(last) != form(gold)


def _compact(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)


def form(latex: str) -> str:
    r"""
    The form of an expression, not its value: equal for $2\cdot3$ and $3 \times 2$, and another for $6$. Numbers become
    names before math-verify reads the expression, so that nothing is worked out.
    """
    return forms(latex)[0]


@lru_cache(maxsize=256)
def forms(latex: str) -> list[str]:
    """The form of an expression, then those of the expressions in it."""
    named = NUMBER.sub(lambda number: f"n_{{{number.group().replace('.', 'd')}}}", _spelled(latex))
    try:
        tree = sympy_of(named)
    except Exception:
        tree = None
    if tree is None:
        return [re.sub(r"[\s{}]|\\cdot(?![a-zA-Z])|\\times(?![a-zA-Z])", "", named)]
    return [_form(part) for part in _parts(tree)]


def is_plain(latex: str) -> bool:
    """Whether nothing is left to do in it: a number or a name, or a list, pair or interval of such."""
    bare = re.sub(r"(?:(?<=[,;])|^)[\s([{\\]+(?![a-z])|[\s)\]}\\]+(?=[,;]|$)", "", latex)
    return all(PLAIN.fullmatch(element) for element in re.split("[,;]", bare))


def _spelled(latex: str) -> str:
    r"""Short forms written out: \frac12, \sqrt2, x^2."""
    latex = re.sub(r"(\\[a-zA-Z]+)(?=\d)", r"\1 ", re.sub(r"\\[dtc]frac", r"\\frac", latex)).replace(r"\%", r"\cdot p")
    latex = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", latex)
    latex = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}", latex)
    latex = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", latex)
    latex = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", latex)
    return re.sub(r"\^\s*(\d+)", r"^{\1}", latex)


def _parts(tree: object) -> Iterator[object]:
    yield tree
    for argument in getattr(tree, "args", ()):
        yield from _parts(argument)


def _operands(tree: object) -> Iterator[object]:
    for argument in getattr(tree, "_unsorted_args", tree.args):
        if isinstance(tree, Add | Mul) and isinstance(argument, type(tree)):
            yield from _operands(argument)
        else:
            yield argument


def _form(tree: object) -> str:
    if not isinstance(tree, Basic) or not tree.args:
        return str(tree)
    operands = [_form(operand) for operand in _operands(tree)]
    if isinstance(tree, Add | Mul):
        neutral = ("n_0", "0") if isinstance(tree, Add) else ("n_1", "1", "Pow(n_1,-1)")
        operands = sorted(operand for operand in operands if operand not in neutral)
        if len(operands) == 1:
            return operands[0]
    return f"{type(tree).__name__}({','.join(operands)})"
