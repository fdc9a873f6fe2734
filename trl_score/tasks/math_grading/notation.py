r"""
One notation for answers: LaTeX that math-verify reads, without units. Each row of `REWRITES` is something that it does not
know, or takes for something else.
"""

import re

from .stating import ENDS, MATH_MARKS


SPACE = r"(?:\s|~|\\[ ,;:!]|\\q?quad\b)"
TEXT = re.compile(r"\\(?:text(?:bf|rm|it|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\*?\s*\{([^{}]*)\}")
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
LETTERS = "alpha|beta|theta|pi|phi|lambda|mu|omega|sigma|infty"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
VULGAR = {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16", "⅚": "56",
          "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78"}  # fmt: skip
SYMBOLS = str.maketrans(
    {"−": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "π": r"\pi ",
     "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ",
     "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "√": "sqrt ", "θ": r"\theta ", "α": r"\alpha ",
     "β": r"\beta ", "…": r"\ldots ", "’": "'", "“": '"', "”": '"', "€": "", "¢": "", "£": "", "¥": "", "₹": "", "\u00a0": " ", "\u2009": " ",
     "\u202f": " ", **{sign: rf"\frac{{{digits[0]}}}{{{digits[1]}}}" for sign, digits in VULGAR.items()}}
)  # fmt: skip


# --- units ---

SHORT = r"(?:km|cm|mm|dm|nm|kg|mg|gm|lb|lbs|oz|ft|in|yd|mi|hr|hrs|min|sec|ml|mL|mph|kph|km/h|kmh|kmph|m/s|ft/s|cc|rpm|[kMG]?Hz|[kMG]?Pa|[kMG]?eV|kJ|[kM]W|kWh|kN|k?mol|k?cal|kV|m[VA]|sq\.?|cu\.?|USD|pts?)"
WORD = rf"(?!(?:{FUNCTIONS}|{LETTERS}|sqrt|and|or|mod|matrix)\b)[a-zA-Z]{{3,}}\.?"
UNIT = rf"(?:(?:{SHORT}|[msghlL])(?![a-zA-Z])|{WORD})"
POWER = r"(?:\s*\^\s*\{?\s*-?[1-3]\s*\}?)?"
ITEM_END = rf"(?={SPACE}*(?:$|[,;)\]]|\\\}}|\\text\s*\{{\s*(?:and|or)))"
UNITS = [
    re.compile(SPACE + r"*\\frac\s*\{\s*\\text\s*\{[^{}]*\}[^{}]*\}\s*\{\s*\\text\s*\{[^{}]*\}[^{}]*\}(?=[\s.]*$)"),
    re.compile(rf"(?<=[\d}})!%.a-zA-Z]){SPACE}*\\text\s*\{{(?!\s*,?\s*(?:and|or)\s*\}})[^{{}}]*\}}{POWER}(?:\s*(?:/|\\cdot)\s*\\text\{{[^{{}}]*\}}{POWER})*{ITEM_END}"),
    re.compile(rf"(?:(?<=[\d}})%])|(?<=\\pi)){SPACE}+{UNIT}{POWER}(?:{SPACE}*(?:/|{SPACE}per{SPACE}|-|{SPACE}){SPACE}*{UNIT}{POWER})*{ITEM_END}"),
    re.compile(rf"(?<=[\d}}]){SPACE}*(?:\\text\s*\{{\s*)?\(\s*(?!dozen|hundred|thousand|[mbt]r?illion)(?:\\text\s*\{{\s*)?(?:{SHORT}|{WORD}(?:\s+{WORD})?)\s*\}}?{POWER}[\s}}]*\)[\s}}]*$"),  # 12 (apples)
    re.compile(rf"(?<=[\d}})]){SPACE}*{SHORT}{POWER}(?:/{UNIT}{POWER})?(?![a-zA-Z]){ITEM_END}"),
    re.compile(rf"(?<=\d){SPACE}*/{SPACE}*(?:{WORD}|\\text\s*\{{[^{{}}]*\}}){ITEM_END}"),
    re.compile(rf"{SPACE}*\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)(?:{SPACE}*(?:[CF]|\\text\s*\{{\s*[CF]\s*\}})(?![a-zA-Z]))?"),
    re.compile(r"\\?\$(?=\s*[\d.\\])"),
    re.compile(r"(?<=\d)(?:cents?|dollars|euros|degrees|inches|feet|miles|meters|hours|minutes|seconds|days|weeks|years|units|pounds|points)(?![a-zA-Z])"),
]  # fmt: skip

# --- spellings ---

RANGE = re.compile(r"\$?\s*\d[\d.,]*\s*[–~]\s*\$?\s*\d[\d.,]*")
COUNTS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
).split()
for tens in "twenty thirty forty fifty sixty seventy eighty ninety".split():
    COUNTS += [tens, *(f"{tens}-{one}" for one in COUNTS[1:10])]
COUNTS.append("one-hundred")
PARTS = {
    **{"half": r"\frac12", "third": r"\frac13", "two-thirds": r"\frac23"},
    **{"quarter": r"\frac14", "fourth": r"\frac14", "three-quarters": r"\frac34", "three-fourths": r"\frac34"},
}
MULTIPLIERS = {
    "dozen": "12",
    "score": "20",
    "gross": "144",
    "lakh": "10^{5}",
    "crore": "10^{7}",
    "mil": "10^{6}",
    "hundred": "100",
    "thousand": "1000",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}


def _recurring(match: re.Match) -> str:
    whole, start, period = match["whole"] or "0", match["start"] or "", match["period"]
    number = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{number}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _percent(match: re.Match) -> str:
    """A fraction of a percent: a decimal, if there is one."""
    whole, above, below = (int(each or 0) for each in match.groups())
    above += whole * below
    if below and 1000 % below == 0:
        return rf"{above / below:g}\%"
    return rf"\frac{{{above}}}{{{below}}}"


REWRITES = [
    # words
    (re.compile(r"(?i)\\text\s*\{\s*(?:all )?real(?: number)?s\s*\}|\b(?:all )?real numbers\b|\ball reals\b"), r"\\mathbb{R}"),
    (re.compile(r"(?i)^(?:\\(?:text|mathrm|mbox)\s*\{)?\s*(?:no (?:real )?solutions?(?: exists?)?|(?:the )?empty set)[\s.}]*$"), r"\\emptyset "),
    # LaTeX
    (re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|ex|em|mm|cm)\s*\]"), r"\\\\"),  # of a matrix
    (re.compile(r"\\(?:text|mathrm)\s*\{\s*\\?\$\s*\}"), ""),
    (re.compile(r"\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(rf"(?:(?<=[^,;]),|;){SPACE}*(?:\\text\s*\{{[^{{}}]*\}})?{SPACE}*[a-zA-Z]{SPACE}*\\in{SPACE}*\\(?:mathbb|mathbf){SPACE}*\{{?\s*[ZN]\s*\}}?$"), ""),  # of a family of solutions
    (re.compile(r"\\\\(?=[a-zA-Z])(?!.*\\begin)"), r"\\"),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"\\text\s*\{\s*,\s*\}"), ", "),
    (re.compile(r"(?:\s|~|\\[,;: ])+(?=,)|(?<=,)(?:\s|~|\\[,;: ])+"), " "),  # of a list
    (re.compile(r"\\([dtc]?frac)\s*(\\(?:pi|theta|alpha|beta))\s*(\d|\\(?:pi|theta|alpha|beta))(?![a-zA-Z])"), r"\\\1{\2}{\3}"),
    (re.compile(r"\\(sqrt|[dtc]?frac)\s*(\\(?:pi|theta|alpha|beta))(?![a-zA-Z])"), r"\\\1{\2}"),
    (re.compile(r"(?<=\{)\s*\d{1,3}(?:,\d{3})+\s*(?=\})|^-?\d{1,3}(?:,\d{3})+(?=\s*\\(?:pi|sqrt))"), lambda m: m.group().replace(",", "")),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+"), lambda power: f"^{{{power.group().translate(SUPERSCRIPTS)}}}"),
    (re.compile(r"\\(?:text)?color\s*\{\w+\}|\\underline(?![a-zA-Z])"), ""),
    (re.compile(r"\\mathbf(?=\s*\{[^{}]*=)|\\(?:bold(?:symbol)?|bm|pmb|displaystyle|limits|bf|rm|it|large|Large|huge|phantom)(?![a-zA-Z])|\\[mb]?(?:left|right)(?=\s*[.])\s*\."), " "),
    (re.compile(r"\\(?:left|right|[bB]ig+[lr]?)(?![a-zA-Z])\s*"), ""),
    (re.compile(rf"\\(?:math(?:rm|it)|text|operatorname)\s*\{{\s*({FUNCTIONS})\s*\}}"), r"\\\1 "),
    (re.compile(r"\\(?:math(?:rm|bf|it)|text)\s*\{\s*(-?\d[\d,.]*|[ei])\s*\}"), r"{\1}"),
    (re.compile(r"\\(?:text(?:bf|rm|it|normal)|math(?:rm|it)|mbox)(?![a-zA-Z])"), r"\\text"),
    (re.compile(r"(?<![\\a-zA-Z])a(sin|cos|tan)(?![a-zA-Z])"), r"arc\1"),
    (re.compile(r"(?<![\\a-zA-Z])log(\d+)\s*\("), r"\\log_{\1}("),
    (re.compile(r"(?<![\\a-zA-Z])abs\(([^()]*)\)"), r"|\1|"),
    (re.compile(rf"(?<![\\a-zA-Z])({FUNCTIONS}|{LETTERS})(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|oo)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\?(?<![a-zA-Z])sqrt\s*(\d+|[a-zA-Z](?![a-zA-Z]))"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*\[\s*2\s*\]"), r"\\sqrt"),
    (re.compile(r"^\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}$"), r"\1"),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10}"),
    (re.compile(r"\\var(?:nothing)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\(?:langle|lbrack)(?![a-zA-Z])"), "("),
    (re.compile(r"\\(?:rangle|rbrack)(?![a-zA-Z])"), ")"),
    (re.compile(r"<\s*="), r"\\le "),
    (re.compile(r">\s*="), r"\\ge "),
    (re.compile(r"\+\s*/?\s*-(?=\s*[\d\\a-z(])"), r"\\pm "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"\\backslash(?![a-zA-Z])"), r"\\setminus "),
    (re.compile(r"^\]([^\[\]]*)(?=[\[\]]$)"), r"(\1"),
    (re.compile(r"(?<=^[(\[])([^\[\]]*)\[$"), r"\1)"),
    (re.compile(r"\\sqrt\s*\[\s*(\d*[13579])\s*\]\s*\{\s*-\s*([^{}+-]+)\}"), r"(-\\sqrt[\1]{\2})"),  # read as a complex root
    (re.compile(r"\{:\}"), ":"),
    (re.compile(rf"(?<=\d)\s*\((?:{'|'.join(COUNTS)})\)$"), ""),
    (re.compile(r"(?<=\d)(?:\s+x\s+(?=\d)|x(?=10\^))"), r"\\times "),
    (re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])"), r"\\cup "),
    (re.compile(r"^(\d+)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(\d+)$"), r"\1:\2"),
    (re.compile(r"(?<=\d)(?:(?:st|nd|rd|th)(?![a-zA-Z])|\^\s*\{?\s*\\?(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?)"), ""),
    (re.compile(SPACE + r"*\\?%|\s*\b(?:percent|pct)\b|\\text\s*\{\s*(?:percent|\\?%)\s*\}"), r"\\% "),
    (re.compile(r"(\^\s*\{[^{}]*\}|\^\s*\w)\s*(_\s*\{[^{}]*\}|_\s*\w)"), r"\2\1"),  # x^2_1
    # numbers
    (re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"), r"\\overline{\1\2\3}"),
    (re.compile(r"(?P<whole>\d+)?\.(?P<start>\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(?P<period>\d+)\s*\}?)"), _recurring),
    (re.compile(r"(?P<whole>\d+)\.(?P<start>\d*)\((?P<period>\d+)\)"), _recurring),
    (re.compile(r"(?P<whole>\d+)\.(?P<start>\d*?)(?P<period>\d+?)(?P=period){2,}\s*(?:\\[lc]?dots|\.\.\.)"), _recurring),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])"), r"\1\\cdot 10^{\2}"),
    (re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 3/4, read as (2+3)/4
    (re.compile(r"(\d+)?\s*\\[dtc]?frac\s*\{?\s*(\d{1,4}?)\s*\}?\s*\{?\s*(\d{1,4})\s*\}?\s*\\%"), _percent),  # 33\frac13\%, not read
    (re.compile(r"(?<![\w.}^_)/])(\d+)/(\d+)(?=\s+(?:\\(?:pi|sqrt)|[a-zA-Z])(?![a-zA-Z]))"), r"\\frac{\1}{\2}"),  # 4/3 pi, read as 4/(3 pi)
    (re.compile(r"(?<![\w.\\^{])(\d+)\s*\((?=\s*-?\d)"), r"\1\\cdot("),  # 3(4), read as 3+4
    (re.compile(r"(?<=\d)(?:(?:\s|~|\\[ ,;:])+|\{,\})(?=\d{3}(?!\d))"), ""),  # 12 345 and 12\,345, added up
    (re.compile(r"(?<==)\s*-?\d{1,3}(?:,\d{3})+(?=(?:\.\d+)?$)"), lambda number: number.group().replace(",", "")),  # x=12,345
    (
        re.compile(rf"(-?\d[\d,]*(?:\.\d+)?)((?:{SPACE}|-)*)(\\text\s*\{{\s*)?\b({'|'.join(MULTIPLIERS)})\b"),
        lambda m: rf"({m[1].replace(',', '')}\cdot {MULTIPLIERS[m[4]]}) {m[3] or ''}",
    ),
    (re.compile(r"\\text\s*\{\s*\}"), ""),
    # lists
    (re.compile(r"[\s,;]*\\q?quad(?:[\s,;]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\})*(?!\\text\s*\{|\(|\\pmod|[a-zA-Z]{3})"), ", "),
    (re.compile(r"\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"^\\text\s*\{([^{}]*\d[^{}]*)\}$"), r"\1"),  # \text{12 cm}, read as a name
    (re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*(\(?)\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(\)?)"), r"\\\1(\\frac{\3\\pi}{180})"),
]  # fmt: skip
LEAD = re.compile(
    r"^(?:the answer|answer|it|that|this|which|there|is|are|equal to|equals?|exactly|only|just|simply|about|around|approximately|roughly"
    r"|a total of|both|\\approx|[:=]|\\text\s*\{\s*(?:Rs\.?|(?:the )?(?:final )?answer(?: is)?\s*[:=]?)\s*\}|Rs\.?|(?:US|USD)(?=\s*\\?\$?\s*\d))(?![a-zA-Z])\s*",
    re.IGNORECASE,
)


def _call_to_braces(latex: str) -> str:
    """`sqrt(..)` with any brackets inside becomes `\\sqrt{..}`."""
    while call := re.search(r"\\?(?<![a-zA-Z])sqrt\s*\(", latex):
        depth = 0
        for position in range(call.end() - 1, len(latex)):
            depth += {"(": 1, ")": -1}.get(latex[position], 0)
            if depth == 0:
                break
        else:
            return latex
        latex = rf"{latex[: call.start()]}\sqrt{{{latex[call.end() : position]}}}{latex[position + 1 :]}"
    return latex


def notation(answer: str) -> str:
    """The answer in one notation, without the marks of text and mathematics around it."""
    text = answer.translate(SYMBOLS)
    if not RANGE.fullmatch(text.strip()):
        text = text.replace("–", "-")
    text = ENDS.sub("", " ".join(MATH_MARKS.sub(" ", text).split())).strip()
    for _ in range(3):
        text = LEAD.sub("", text)
    for pattern, rewritten in REWRITES:
        text = pattern.sub(rewritten, text)
    return _call_to_braces(text).strip()


def without_units(latex: str) -> str:
    for pattern in UNITS:
        latex = pattern.sub("", latex)
    return latex.strip()


def plain(answer: str) -> str:
    """Without the marks of text: names are compared by letter. In mathematics, `R` is not `r`."""
    answer = re.sub(r"(?<=\d)\\[,; ](?=\d)(?!\d{3}(?!\d))", " ", answer)  # 3\,4 is no 34
    answer = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;! ]", "", TEXT.sub(r"\1", answer).replace("~", " "))
    answer = re.sub(r"^\s*(?:an?|the)\s+(?!and\b)(?=[a-z]{3})", "", answer, flags=re.IGNORECASE)
    answer = re.sub(r"(?<=[a-zA-Z)])\s*(?:,|,?\s\band\b)\s*", ",", answer)
    answer = re.sub(r"(?<=[a-zA-Z])\{(\w)\}", r" \1", answer)  # \mathbb{Z} and \mathbb Z
    answer = " ".join(re.sub(r"\{(\w)\}", r"\1", answer).split())
    answer = re.sub(r" (?!\w)|(?<!\w) |(?<=\d) (?=[a-zA-Z](?![a-zA-Z]))", "", answer).removesuffix(".")  # 3 m and 3m
    if not re.search(r"[\\^_=+*/<>|-]", answer) or re.fullmatch(r"[a-zA-Z]{2,}(?:-[a-zA-Z]+)+", answer):
        answer = answer.lower()
    option = re.fullmatch(r"(?:option |choice )?\(?([a-z])\)?", answer)
    return option[1] if option else answer


OPTION = re.compile(  # with its text: no sum, product or set that begins with a letter in brackets
    r"(?:(?i:option|choice)\s+)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).])(?:\s*(?![-+*/^_=|<>]|\\(?:cup|cap|times|cdot|in|setminus)\b)|\s+(?=-\d))(?=\S)"
)
ANOTHER_OPTION = re.compile(
    r"\(\s*[A-J]\s*\)|(?<![\w\\])[A-J][).:]|(?:\b(?:or|and)\b|[,;/&])\s*[A-J](?![\w+*/^=-])|^\W*[A-J]\W*$"
)


def option(answer: str) -> tuple[str, str] | None:
    """The letter and the text of an option of a multiple choice that is written out: "(B) 42"; `None` for anything else."""
    bare = TEXT.sub(r"\1 ", MATH_MARKS.sub(" ", answer))
    bare = re.sub(rf"\\(?:left|right)(?![a-zA-Z])|(?:{SPACE})+", " ", bare).strip()
    found = OPTION.match(bare)
    if not found or ANOTHER_OPTION.search(content := bare[found.end() :]):
        return None
    return (found[1] or found[2]).lower(), content
