r"""
What a stated answer says. math-verify reads the LaTeX; ours is the notation that it does not know or takes for something
else, and the answers that are not one answer.

[`read`] refuses hedges ("4 or so, maybe 5"), relations to a number ("less than 5", "half of 5"), and formulas of which
math-verify would read a part. What is refused, or cannot be read, is compared letter by letter.
"""

import re
from dataclasses import dataclass

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy import FiniteSet

from .notation import COUNTS, PARTS, RANGE, SPACE, TEXT, notation, plain, without_units
from .stating import MATH_MARKS, MAX_ANSWER


@dataclass(frozen=True)
class Reading:
    """
    An answer: its LaTeX in one notation; what math-verify reads in it, `None` if that is not one thing; the number base and
    the modulus that it names; and whether its words are why it is not read.
    """

    latex: str
    value: object = None
    base: str | None = None
    modulus: str | None = None
    refused: bool = False


CONFIG = [
    LatexExtractionConfig(
        boxed_match_priority=-1,
        # Units are ours: math-verify takes 4t for 4, and 5 million for 5.
        normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none"),
    )
]

# --- answers that are refused ---

HEDGE = r"vs|versus|not|nor|but|except|maybe|perhaps|possibly|probably|xor|then|otherwise|if|unless|when|either"
RELATION = (  # to a number, which is not that number
    r"less|greater|fewer|larger|smaller|bigger|higher|lower|below|above|least|most|half|halves|thirds|quarters?|fourths|fifths"
    r"|tenths|hundredths|thousandths|twice|double|triple|thrice|times|almost|nearly|close|near|between|than|multiple|squared|cubed|factorial|reciprocal"
    r"|opposite|negative|minus|plus|root|square root|logarithm|power|remainder|modulo|divided|divides|through|point|approaches|beyond|exceeds?"
    r"|or (?:more|less|fewer|so|greater|under|over)|digits? of|up to|at most|at least|unknown|undetermined"
)
REFUSED = re.compile(rf"(?<![\\a-zA-Z])(?:{HEDGE}|{RELATION})(?![a-zA-Z])", re.IGNORECASE)
HARMLESS = re.compile(  # a number may have these words before or after it
    r"(?<![\\a-zA-Z])(?:(?<!or )(?:more|less|fewer)(?=\W*$)|(?<!or )(?:more|fewer|less)(?= [a-z]+\W*$)(?! than)|either(?=.*\bor\b)"
    r"|(?<=\d)(?:st|nd|rd|th)(?![a-zA-Z])|(?<=[\d}] )\s*(?:more )?(?:times|quarters)(?=\W*$|\s+(?:a|per|each|every)\b)"
    r"|(?<=[\d}] )\s*(?:double|negative|power)(?=\s+[a-z]+s\W*$))",
    re.IGNORECASE,
)
PARTITIVE = re.compile(  # "the cube of 5", "next to 5", "5 of 6"; but "a total of 5"
    r"(?<!total )(?<!sum )(?<!equal )(?<!comes )(?<!amounts )(?<!adds up )(?<![\\a-zA-Z])(?:of|to|by|from|over|under|within|before|after|until|past|per|for|as|in|on"
    r"|without|with|around half)\b[\s$(\\]*(?=-?\d)|(?<=\d)\s+(?:out of|in|of)\s+(?=\d)",
    re.IGNORECASE,
)
ELLIPSIS = re.compile(r"\\[lcd]?dots(?:[a-z](?![a-z]))?(?![a-zA-Z])|\.\s?\.\s?\.")
SEVERAL = re.compile(r"[^\s$]\s*\$\s*\$\s*[^\s$]|\\[)\]]\s*\\[(\[]")  # side by side: without the marks, a product
UNREADABLE = [  # read in part, or as a product
    re.compile(r"(?<!frac )(?<!binom )(?<!_)\d(?:\s|~|\\[ ,;:])+\d"),  # "3 4", added up
    re.compile(r"[\d})](?:\s|~|\\[ ,;:])+0(?![.\d])"),  # multiplied, so 0
    re.compile(r"\d\s*'"),  # feet or minutes
    re.compile(r"\d[a-zA-Z]\d"),  # 0x10, a product
    re.compile(r"\\(?:lor|vee|land|wedge|to|mid|parallel|Rightarrow|iff|implies|bmod|mod|neg)(?![a-zA-Z])|\\\\"),
    re.compile(r"=.*(?:\\mid\b|\|).*=", re.DOTALL),
    re.compile(r"\\text"),  # words inside of a formula
]
PROSE = re.compile(
    r"(?<![\\a-zA-Z{_])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}|[\d}})]\s+(?:vs\b|[a-zA-Z]{3,})|(?<![\\a-zA-Z{_])(?!\bdx\b)[a-zA-Z]{4,}"
)
SAYS = r"(?:(?:will|would|can|could|must|should|to) [a-z]+|[a-z]+(?:s|ve|ed)|\w*be|cost|need|make|spend|pay|get|earn|answer|to|of|:|=|\\approx)"
NAMED = re.compile(  # a sentence that names one number: "Each of them needs 101 stamps"
    rf"(?:[^\d\\{{}}=]*(?:\b{SAYS}|^)\s*)?(?:\\?\$\s*)?(?P<item>-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\\frac\{{\d+\}}\{{\d+\}})"
    r"(?P<after>(?:\s*(?:\\%|%))?(?:[\s-]+[a-zA-Z'/]+){0,6})",
    re.IGNORECASE,
)

LEFT_SIDE = re.compile(  # names that math-verify does not read
    r"^(?:\\text\s*\{[^{}\d]+\}|[a-zA-Z]\s*\^\s*\{\s*-\s*1\s*\}\s*\([^()=]*\)|[A-Za-z]{3,}(?: [a-z]+)*|m?\s*\\angle\s*[A-Z]{1,3}|[PEn]\s*\([^()=]*\)|\|[A-Z]{2}\|"
    r"|\\(?:det|dim|deg|gcd|lim|max|min|sup|inf|sin|cos|tan|cot|sec|csc)(?![a-zA-Z])[^=]*|\\(?:text|operatorname)\s*\{[^{}\d]+\}\s*\([^()=]*\)|\\\|[^=|]+\\\||[A-Z]\s*\^\s*\{\s*-\s*1\s*\}"
    r"|\\frac\s*\{\s*d\s*[a-z]\s*\}\s*\{\s*d\s*[a-z]\s*\}|[a-zA-Z]\s*_\s*(?:\\(?:min|max)|\{\s*\\(?:min|max|(?:text|operatorname)\s*\{[^{}\d]+\})\s*\}))\s*=\s*"
)
BASE = re.compile(
    r"(?<=\d)\s*(?:\}\s*)?_\s*\{?\s*(?:\\text\s*\{\s*)?(?:base\s*\}?\s*)?(\w+)\s*\}?\s*\}?\s*$|(?<=\d)\s*\(?\s*(?:in )?base\s+(\w+)\s*\)?$"
)
MODULUS = re.compile(
    rf"{SPACE}*(?:\\pmod\s*(?:\{{([^{{}}]+)\}}|(\w))|\(?\s*(?:\\b?mod|\\text\s*\{{\s*mod\s*\}}|(?<![a-z\\])mod\b)\s*\{{?\s*(\w+)\s*\}}?\s*\)?)\s*$"
)
BUILDER = re.compile(r"^\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|:|\||\\vert)\s*(.*)\\\}$")


def in_both_cases(*formulas: str) -> str:
    """The letters that one of the formulas has as capital and as small letter, such as the R and r of two circles."""
    bare = (re.sub(r"\\[a-zA-Z]+|_\s*(?:\{[^{}]*\}|\w)", " ", TEXT.sub(" ", formula)) for formula in formulas)
    return "".join(sorted({letter for each in bare for letter in each if letter.isupper() and letter.lower() in each}))


def with_cases(latex: str, cases: str) -> str:
    """The LaTeX with other names for some capital letters, since math-verify makes small letters of all."""
    return re.sub(
        r"\\[a-zA-Z]+|_\s*(?:\{[^{}]*\}|\w)|([A-Z])(?:_\s*(?:\{(\w+)\}|(\w)))?",
        lambda m: f"{m[1]}_{{cap{m[2] or m[3] or ''}}}" if m[1] and m[1] in cases else m[0],
        latex,
    )


def read(answer: str, parse: bool = True, cases: str = "") -> Reading:
    """
    What a stated answer says; see [`Reading`]. Without `parse` the mathematics is left out, which takes nearly all of the time. The
    capital letters in `cases` are told from small ones.
    """
    if not answer.strip() or len(answer) > MAX_ANSWER or SEVERAL.search(answer):
        return Reading(plain(answer))
    latex = notation(answer)
    said = plain(latex).lower().replace(" ", "-")
    if said in COUNTS:
        latex = str(COUNTS.index(said))
    elif said.removeprefix("one-") in PARTS:
        latex = PARTS[said.removeprefix("one-")]
    words = HARMLESS.sub(" ", TEXT.sub(r" \1 ", latex))
    if REFUSED.search(words) or PARTITIVE.search(words):
        return Reading(plain(answer), refused=True)
    if not latex or ELLIPSIS.search(latex) or RANGE.fullmatch(latex):
        return Reading(plain(answer))
    latex = LEFT_SIDE.sub("", latex)
    modulus = MODULUS.search(latex)
    latex = MODULUS.sub("", latex)
    base = BASE.search(latex) if re.fullmatch(r"[\d{}\\a-z()\s_A-Z]*", latex) else None
    base_name = base and (base[1] or base[2])
    if base_name in COUNTS:
        base_name = str(COUNTS.index(base_name))
    latex = without_units(BASE.sub("", latex) if base else latex)
    latex = BUILDER.sub(r"\2", latex)
    if re.fullmatch(r"[^,:()=]+(?::[^,:()=]+){2,}", latex):
        latex = f"({latex.replace(':', ',')})"
    if PROSE.search(
        re.sub(r"\\(?:begin|end)\s*\{\w+\}|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", latex)
    ):
        if not (named := NAMED.fullmatch(MATH_MARKS.sub("", latex))):
            return Reading(plain(answer), refused=True)
        latex = named["item"]
    unmatrixed = re.sub(r"\\begin\{(\w*matrix|array)\}.*?\\end\{\1\}", " ", latex, flags=re.DOTALL)
    unmatrixed = re.sub(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}", ",", unmatrixed)
    if any(pattern.search(unmatrixed) for pattern in UNREADABLE):
        return Reading(plain(answer))
    latex = with_cases(latex, cases) if cases else latex
    value = sympy_of(latex) if parse else None
    if (
        isinstance(value, FiniteSet)
        and not re.search(r"\\pm|;", latex)
        and len(getattr(value, "_unsorted_args", value.args)) < len(elements(latex))
    ):
        value = None  # 5, 5 is no answer 5
    return Reading(latex, value, base_name, modulus and next(filter(None, modulus.groups())).strip())


def elements(latex: str) -> list[str]:
    """The elements of a list or set as they are written."""
    found, depth = [""], 0
    for mark in re.sub(r"\\[,;]", " ", latex.removeprefix("\\{").removesuffix("\\}")):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(mark, 0)
        if depth == 0 and mark in ",;":
            found.append("")
        else:
            found[-1] += mark
    return [element.strip() for element in found]


def sympy_of(latex: str) -> object:
    """What math-verify reads in LaTeX; `None` if nothing."""
    parsed = parse(f"${latex}$", CONFIG, extraction_mode="first_match", parsing_timeout=None)
    if parsed and not isinstance(parsed[0], str):
        return parsed[0]
    if latex.count("\\pm") == 1:  # inside of a fraction, which math-verify does not read
        both = [sympy_of(latex.replace("\\pm", sign)) for sign in "+-"]
        return None if None in both else FiniteSet(*both)
    return None
