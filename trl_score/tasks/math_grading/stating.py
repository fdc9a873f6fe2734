r"""
Where an attempt states its answer. A text that states none has none: no number is picked out of the working.

An answer is stated in one of these forms. The first row that the attempt has counts, and in it the last statement:

1. the form that the prompt asks for: "The final answer is $..$. I hope it is correct.";
2. a closed box; "the (final) answer is .."; "Answer: .." or "A: .."; ".. is the answer"; "the correct option is .."; GSM8K's "#### .."; <answer>..</answer>;
3. a last line that is nothing but the answer.

A statement that the attempt itself denies ("it is not \boxed{5}", "\boxed{5} is wrong") is none, nor is one of an earlier answer or
of a part of the answer ("the previous answer was 5", "half of the answer is 5"), nor one in the reasoning before `</think>`.
"""

import re
from collections.abc import Iterator


MAX_TEXT = 20_000  # characters of an attempt that are looked at, from its end
MAX_ANSWER = 1000  # characters of an answer; a longer one is not looked at
MAX_STATEMENTS = 50  # statements of one form that are looked at, from the last

# --- forms of a statement ---

ADVERB = r"(?: (?:therefore|thus|then|hence|simply|just|actually|still|now|again|indeed|clearly|also)\b)?"
HOPE = re.compile(
    rf"final answer is\b{ADVERB}:?((?:(?!final answer is\b)[\s\S]){{0,1500}}?)I hope it is correct", re.IGNORECASE
)
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
LABEL = re.compile(
    rf"\banswers?\b(?: (?:to|for|of) [^.:=\n]{{1,80}}?)?[\"'*_]*\s*(?:\b(?:is|are|was|remains|becomes|equals|(?:would|will|must|should) be)\b{ADVERB}|[:=])[:*_,]*"
    r"|\b(?:solution|(?:correct|right) (?:option|choice)) is\b:?|\bans\b\.?\s*[:=]|\bans\.(?=\s*[-$\\\d])|^\W{0,4}A:(?![^\n]*\n+\W{0,4}B:)|^[^\w\n]{0,8}(?:(?:the )?final )?answer[^\w\n]{0,6}$|^\W{0,4}answer\s+(?=\$|\\[(\[]|-?\d)|^\s*####(?=\s*\S)",
    re.IGNORECASE | re.MULTILINE,
)
IS_THE_ANSWER = re.compile(  # the other way round: "$x < 2$ is our answer"
    r"(\$[^$\n]+\$|\\\([^\n]+?\\\)|(?<![\w.,$])-?\d[\d,./]*)[*_]* is (?:the|our|my) (?:final |correct )?(?:answer|solution)\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(
    r"(?=</answer>)|(?<![ap]\.m)(?<!\bvs)(?<!\\)[.!?](?=[*_\"')]*(?:\s|$))|(?<=[.!?]\$)(?=\s)|(?<=[.!?]\\\))(?=\s)",
    re.IGNORECASE,
)
REASON = re.compile(
    r",?\s*\b(?:because|since|which|hence|therefore|instead of|rather than)\b.*|, (?:(?:and )?not|as|so|where|confirming|matching|and the (?:solution|previous|original|earlier|above))\b.*|\s*\(not\b[^)]*\)",
    re.IGNORECASE | re.DOTALL,
)
BOLD = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]+)(?<=\S)\*\*(?![\w(*])")  # no power
CHECKED = re.compile(
    r"\b(?:verify|check|confirm)(?:ing)? (?!that\b)(?:\w+ ){0,2}$", re.IGNORECASE
)  # "let us check our answer: .."
NOT_BUT = re.compile(  # "not 17 but 18"
    r"^[\s*]*not\b[^.;:\n]{1,60}?,?\s*\bbut\s+(?:(?:rather|actually|in fact|instead)\s+)?(?=[-$\\\d*])", re.IGNORECASE
)
DIRECT = re.compile(  # begins with a number, a formula or a letter: "5 cm", not "clear, since 3 + 4 = 7"
    r"[\W_]*(?:(?:about|approximately|exactly|only|just|simply|either|both|equal to)\s+)?[\W_]*"
    r"(?:\d|[$\\]|\(?[a-zA-Z]\)?(?:\s*[-=^_(+*/]|\s*$)|[A-Z]{2,3}\b|\([A-J]\)\s|[A-J][).:]\s)"
)
UNIT_WORDS = r"(?:\s+[a-zA-Z]+){0,2}(?:\s+per\s+[a-zA-Z]+)?"
BARE = re.compile(  # a line that is nothing but an answer, after the marks around it are gone
    r"(?:(?:[a-zA-Z]|\\[a-z]+|[a-zA-Z]\([a-z]\))(?:_\{?\w+\}?)?\s*(?:=|\\in\b)\s*)?"  # x =
    rf"(?:[-+]?[$€£]?\s?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s*(?:%|\\%|°|[$€£])?{UNIT_WORDS}"  # 5, 5 apples
    r"|(?=[^=]*$)(?:\\(?:begin|end)\{\w+\}|\\(?:text\w*|mathrm|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?!\\?[a-zA-Z]{2})[^=])++"  # a formula
    r"|\(?[A-Z]\)?|[A-Za-z]{2,20})"
)
FORMULA = re.compile(r"\$\$?[^$]+\$\$?|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]", re.DOTALL)
DISPLAY = re.compile(r"(?:\\\[|\$\$)((?:(?!\\\[|\$\$)[\s\S]){1,400}?)(?:\\\]|\$\$)\W{0,3}$")  # at the end
NUMBERED = re.compile(r"\d{1,2}[.)]")  # of a list that has just begun its next point
MONEY = re.compile(rf"[-+]?\$?\d[\d,.]*\$?{UNIT_WORDS}")
MONEY_SIGN = re.compile(r"(?<![\\$\w])\$(?=-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?![\w\\^_{$]))|(?<=\d)\$(?![\w\\$])")
TAGGED = re.compile(r"<answer>((?:(?!</?answer>)[\s\S]){1,1000})</answer>", re.IGNORECASE)
BULLET = re.compile(r"\s*[-*•]\s+")  # of a list, here of one point
# Of a model whose tokenizer takes them for text.
END_TOKENS = re.compile(r"(?:\s*(?:<\|\w+\|>|</?s>|<(?:end_of_turn|eos|pad)>))+\s*$")
# With text below it: "#### 1. Add", "#### Solution".
HEADING = re.compile(rf"\s*\d{{1,2}}[.)]\s+[^\W\d]|(?!{DIRECT.pattern})")
FENCE = re.compile(r"^\s*(?:`{3}\w*|</?\w+>|<\|\w+\|>|[}\]\\]?)\s*$")

# --- parts of one answer, and alternatives to it ---

NAME = r"\b[a-zA-Z](?:_\{?\d\}?)?\s*="
BOX_NAME = re.compile(rf"({NAME})[\s$]*(?:\\[(\[]\s*)?$")
JOINT = re.compile(  # between two boxes of one answer: marks, "and" and "x ="; or an "or" in the same sentence
    rf"(?:[\s$,;&/|]|\\quad|\\[()\[\]]|{NAME}|\b(?:and|or)\b|\\text\s*\{{\s*(?:and|or)\s*\}})*|[^.\n]{{0,40}}\bor\b[^.\n]{{0,40}}"
)
OR_AFTER = re.compile(
    r"[\s$*)\]\\]*(?:\bor\b|\bvs\b)[^.\n]{0,40}?(?=\d|\\)([^\s.]*(?:\.\d+)?)", re.IGNORECASE
)  # \boxed{3} or 4
OR_BEFORE = re.compile(r"(?:\beither\b|\banswer(?: is\b|:))[^.\n,]{0,40}\bor\b[^.\n,]{0,20}$", re.IGNORECASE)

# --- denials ---

NOT = r"(?:\bnot\b|n't\b|\bnever\b|\bcannot\b|\bneither\b|\binstead of\b|\brather than\b|\bunlike\b)"
VERDICT = r"(?:wrong|incorrect|false|impossible|mistaken|a mistake|an error|the wrong \w+)\b"
DENIED_BEFORE = re.compile(
    rf"(?:{NOT}(?:\s+(?:be|been|equal|equals|to|the|an?|answer|final|correct|right|value|just|simply|actually|really"
    r"|definitely|possibly))*|(?:\bnot|n't)\s+(?:the case|true|think|believe|say|claim|mean|sure)\b(?:(?!\b(?:so|but|thus|hence|therefore)\b)[^.,;:\n]){0,40}"
    r"|\b(?:wrong|incorrect|false)\b[\s,:]*(?:answer|value|solution)?(?:\s*(?:is|was|would be|:))?)"
    r"[\s$*(\[\\]*(?:[a-zA-Z]\s*=\s*)?$",
    re.IGNORECASE,
)
SO_SAYS = r"(?:(?:this|that|it)(?:\s+(?:answer|result|solution|value))?|which)"
OF_ELSE = r"(?! (?:to|for|that)\b| (?:only )?(?:if|when)\b)"  # "it is wrong to say 41"
TURNS = r"(?:\b(?:wait|hm+|no|oops|oh|sorry|but|and|however|actually|hold on)\b[\s,.!…–—-]*)*"  # "Wait, no:"
DENIED_AFTER = re.compile(
    rf"[\s$*)\]\\.,…–—-]*\(?{TURNS}(?:"
    rf"(?:{SO_SAYS}\s+)?(?:is|was|are|would be|must be|seems|looks) (?:(?!not\b)\w+ )?{VERDICT}{OF_ELSE}"
    rf"|{SO_SAYS}['’]s (?:(?!not\b)\w+ )?{VERDICT}{OF_ELSE}"
    rf"|(?:{SO_SAYS}\s+)?(?:(?:is|was|are|would|ca|could|must|should)n['’]t|(?:is|was|are|would|can|could|must|should) ?not|{SO_SAYS}['’]s not)"
    rf"(?: \w+)?(?: be)? (?:the\b[\w ]{{0,16}}\banswer|(?:right|correct|it|true|valid|possible)\b{OF_ELSE})"
    rf"|(?:{SO_SAYS}\s+)?does(?:n['’]t| not) (?:work|make sense|(?:seem|look|sound|feel)(?: \w+){{0,3}}? (?:right|correct))\b"
    r"|(?<=\()(?:wrong|incorrect|(?:not|no)(?=\)| (?:right|correct|the answer)))\b|(?<=[–—-] )(?:wrong|incorrect)\b|[❌✗✘]"
    r"|\?\s*(?:no|wrong)\b)|[\s$*)\]\\.,…–—-]*\b(?:wait|hm+|no|oops|actually|hold on)\b[\s,.!…–—-]*"
    r"(?:I(?:['’]ve| have)? (?:just )?made (?:a|an)(?: \w+)? (?:mistake|error)\b(?![^.\n]*\b(?:previous|earlier|first|original|initial|above|before)\b)"
    r"|(?:actually,? )?(?:it|this|that) (?:should|must)(?: actually)? (?:be|have been) (?=[$\\*\d-]))",
    re.IGNORECASE,
)

# --- what is said of another answer ---

EARLIER = re.compile(
    r"\b(?:previous|prior|earlier|original|initial|first|old|former|student['’]?s) +(?:(?:final|boxed|numerical) +)?$",
    re.IGNORECASE,
)
EARLIER_WAS = re.compile(  # "in the solution above the answer was 5"
    r"\b(?:above|before|previously|earlier|originally|initially|at first|attempt|solution),?\s+(?:the\s+|my\s+|our\s+)?$",
    re.IGNORECASE,
)
EARLIER_BOX = re.compile(EARLIER.pattern[:-1] + r"(?:answer|solution|result|value)\b[^.\n]{0,12}$", re.IGNORECASE)
AFFIRMED = re.compile(
    r"\b(?:is|was|remains|stays)\s+(?:(?!not\b)\w+\s+)?(?:correct|right|valid)\b|\bstill (?:holds|stands)\b",
    re.IGNORECASE,
)
PART = re.compile(
    r"\b(?:of|twice|half|double|triple|in)\s+(?:the|our|my|this)\s+(?:final\s+|correct\s+)?$", re.IGNORECASE
)
HYPOTHETICAL = re.compile(  # "it is a mistake to say the answer is 5", "if we had .., the answer would be 5"
    r"\b(?:mistake|error|trap|tempting|tempted|easy|wrong|incorrect)\b[^.;\n]{0,30}\bto (?:say|think|claim|assume|conclude|believe)\b[^.;\n]{0,30}$"
    r"|\b(?:if\b[^.\n]{0,80}\bhad|without(?! loss))\b(?:(?!\b(?:so|thus|hence|therefore)\b)[^.\n]){0,80}\bwould\b[^.\n]{0,20}$",
    re.IGNORECASE,
)

# --- marks around an answer ---

MATH_MARKS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
WRAPPED = re.compile(r"^(?:\*+|\$+|\\\(|\\\[|`+|_{2})\s*(.*?)\s*(?:\*+|\$+|\\\)|\\\]|`+|_{2})$", re.DOTALL)
EDGES = re.compile(r"^(?:\\[,;:! ]|~|\\q?quad\b)+|(?:\\[,;:!\\ ]|~|\\q?quad)+$|(?<!\\)\\$")
# Quotes, ticks, and one mark at the end: "3..." continues.
ENDS = re.compile(r"""^\\?["“]|\\?["”]$|^[✅✔☑✓]\ufe0f?|\s*[✅✔☑✓🎉]\ufe0f?$|(?<![.,;:])[.,;:]$""")


def after_reasoning(text: str) -> str:
    """
    What stands behind the reasoning of a text, without the end tokens that were written as text; nothing if the reasoning is cut
    off before its `</think>`.
    """
    rest = text.rsplit("</think>", 1)[-1]
    rest = rest[:-500] + END_TOKENS.sub("", rest[-500:])  # its time grows with the square
    return "" if rest.lstrip().startswith("<think>") else rest


def unwrapped(answer: str) -> str:
    """Without the marks around it: dollars, bold, brackets, a closing full stop."""
    before = None
    while answer != before:
        before, answer = answer, re.sub(r"^\*\*+|\*\*+$", "", answer.strip()).strip()
        answer = ENDS.sub("", EDGES.sub("", answer)).strip()
        if answer.count("$") % 2:  # one of a pair that was lost
            answer = answer.strip("$")
        if (wrapped := WRAPPED.match(answer)) and not MATH_MARKS.search(wrapped.group(1)):
            answer = wrapped.group(1)
    return answer


def _last(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The matches from the last on, but not endlessly many: degenerate text repeats itself."""
    return list(pattern.finditer(text))[: -MAX_STATEMENTS - 1 : -1]


def _braced(text: str, start: int) -> str | None:
    """The contents of the braces that open at `start`; `None` if they do not close in time."""
    depth = 0
    for position in range(start, min(len(text), start + MAX_ANSWER)):
        before = text[start:position]
        if text[position] in "{}" and (len(before) - len(before.rstrip("\\"))) % 2 == 0:
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
    return None


def _is_denied(text: str, start: int, end: int | None = None) -> bool:
    """Whether the words before the statement, or those after it, say that this is not the answer."""
    before = text[max(0, start - 200) : start]
    if DENIED_BEFORE.search(before[-100:]) or HYPOTHETICAL.search(before):
        return True
    return end is not None and DENIED_AFTER.match(text[end : end + 120]) is not None


def _is_of_another(text: str, label: re.Match, stop: int) -> bool:
    """Whether the statement is of an earlier answer, and does not say that it was right, or of a part of the answer."""
    before = text[max(0, label.start() - 60) : label.start()]
    if PART.search(before) or HYPOTHETICAL.search(text[max(0, label.start() - 200) : label.end()]):
        return True
    earlier = EARLIER.search(before) or (label.group().rstrip(" :*_,").endswith("was") and EARLIER_WAS.search(before))
    return bool(earlier) and not AFFIRMED.search(text[label.end() : stop + 40])


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    r"""
    Closed boxes from the last on, each with its place: `\boxed{..}`, `\fbox{..}` or `\boxed 5`. Boxes with nothing but a
    comma, an "and" or an "x =" between them are the parts of one answer; with an "or" too, so that "3 or 4" is not the answer 4.
    """
    parts: list[tuple[str, str]] = []  # each with the "x =" before it
    begin = place = 0  # where the first of the parts begins, and the last one ends

    def whole() -> tuple[int, str]:
        alternative = OR_BEFORE.search(text[max(0, begin - 90) : begin])
        names = {name for name, _ in parts}
        named = len(names) == len(parts) > 1 and "" not in names  # x = \boxed{1}, y = \boxed{2}
        shown = [name * named + content for name, content in parts]
        return place, ", ".join(["or", *shown] if alternative else shown)

    for box in _last(BOX, text):
        if text[box.end() : box.end() + 1] == "{":
            content = _braced(text, box.end())
            end = box.end() + len(content or "") + 2
        else:
            content = re.match(r"[^\s$.,;]*", text[box.end() :]).group() or None
            end = box.end() + len(content or "")
        if content is None or _is_denied(text, box.start(), end):
            continue
        if EARLIER_BOX.search(text[max(0, box.start() - 60) : box.start()]) and not AFFIRMED.search(
            text[end : end + 40]
        ):
            continue
        if parts and not JOINT.fullmatch(text, end, begin):
            yield whole()
            parts = []
        if not parts:
            place = end
            if alternative := OR_AFTER.match(text, end):
                parts = [("", MATH_MARKS.sub("", alternative.group(1)))]
        named = BOX_NAME.search(text[max(0, box.start() - 20) : box.start()])
        name = named[1] if named else ""
        if not any(content == other and (not name or of in ("", name)) for of, other in parts):
            parts.insert(0, (name, content))
        begin = box.start()
    if parts:
        yield whole()


def _without_reason(sentence: str) -> tuple[str, str]:
    """A sentence without marks of bold and the reason that it gives, and this reason."""
    sentence = BOLD.sub(r"\1", sentence)
    reason = REASON.search(sentence)
    return REASON.sub("", sentence), reason.group() if reason else ""


def _labelled(text: str) -> Iterator[tuple[int, str]]:
    """What stands behind "the answer is", or before "is the answer", each with its place."""
    for label in _last(LABEL, text):
        rest = text[label.end() :]
        lines = [line for line in rest.split("\n", 8)[:8] if re.search(r"\w", line)]  # here, or the next with words
        if not lines:
            continue
        if "####" in label.group() and len(lines) > 1 and HEADING.match(lines[0]):
            continue
        if text[text.rfind("\n", 0, label.start()) + 1 : label.end()].count("**") % 2:  # **Answer: 5** and so on
            lines[0] = lines[0].split("**")[0]
        elif lines[0] != rest.split("\n", 1)[0] and BULLET.match(lines[0]):
            if BULLET.match("".join(lines[1:2])):
                continue  # several points
            lines[0] = BULLET.sub("", lines[0])
        end = None if "####" in label.group() else SENTENCE_END.search(lines[0])
        sentence, reason = _without_reason(lines[0][: end.start()] if end else lines[0])
        sentence = NOT_BUT.sub("", sentence)
        if display := re.match(r"\s*(?:\\\[|\$\$)\s*([\s\S]{1,400}?)(?:\\\]|\$\$)", rest):
            sentence = display.group(1)
        elif all(len(MATH_MARKS.findall(each)) % 2 for each in (sentence, MONEY_SIGN.sub("", sentence))):
            continue  # cut off in a formula, and no money
        stop = label.end() + rest.index(lines[0]) + (end.start() if end else len(lines[0]))
        denied = "####" not in label.group() and (
            _is_denied(text, label.start(), stop) or _is_of_another(text, label, stop) or DENIED_AFTER.match(reason)
        )
        if (
            BOX.search(sentence)
            or denied
            or CHECKED.search(text[max(0, label.start() - 40) : label.start()])
            or re.match(r"[\s*]*(?:definitely |certainly )?not\b", sentence)
        ):
            continue  # a box is a statement of its own
        if sentence.count("}") > sentence.count("{"):  # of JSON
            sentence = sentence.rstrip(' }]"')
        if len(sentence) <= MAX_ANSWER and (answer := unwrapped(sentence)) and not answer.startswith("```"):
            yield label.end(), answer
    for stated in _last(TAGGED, text):
        if not BOX.search(stated.group(1)):
            yield stated.start(), unwrapped(stated.group(1))
    for stated in _last(IS_THE_ANSWER, text):
        if not _is_denied(text, stated.start()):
            yield stated.start(), unwrapped(stated.group(1))


def _is_bare(line: str) -> bool:
    return len(line) <= 200 and bool(FORMULA.fullmatch(line.strip(" *.")) or BARE.fullmatch(unwrapped(line)))


def _last_line(text: str) -> str | None:
    """The last line, if it is nothing but an answer; not of a list of such lines, and no formula that is cut off."""
    if display := DISPLAY.search(text[-500:]):
        lines = [display.group()]
    else:
        lines = [line.strip() for line in text[-3000:].split("\n") if not FENCE.match(line)][-2:]
    last = lines[-1] if lines else ""
    if not _is_bare(last) or (
        len(lines) > 1
        and ((re.search(r"\d|^\W*[A-Z]\W*$", lines[0]) and _is_bare(lines[0])) or NUMBERED.fullmatch(last))
    ):
        return None
    if last.count("{") != last.count("}") or (
        len(MATH_MARKS.findall(last)) % 2 and not MONEY.fullmatch(last.strip(" *."))
    ):
        return None
    return unwrapped(last)


def extract_answer(text: str) -> str | None:
    """
    The answer that a text states.

    Args:
        text (`str`):
            An attempt.

    Returns:
        `str` or `None`: LaTeX or a sentence; `None` if the text states no answer.
    """
    text = after_reasoning(text)[-MAX_TEXT:]
    if finals := _last(HOPE, text):
        final, reason = _without_reason(finals[0].group(1))
        if _is_denied(text, finals[0].start(), finals[0].end()) or DENIED_AFTER.match(reason):
            return ""
        box = next(_boxes(finals[0].group(1)), None)
        answer = unwrapped(box[1] if box else final)
        return answer if len(answer) <= MAX_ANSWER and re.sub(r"[\s$*.]|\\\W", "", answer) else ""
    said = None
    boxes, labelled = [(*box, True) for box in _boxes(text)], [(*label, False) for label in _labelled(text)]
    for _, answer, is_box in sorted([*boxes, *labelled], reverse=True):
        if is_box or DIRECT.match(answer):
            return unwrapped(answer)
        said = said or answer  # a sentence: perhaps in passing, "our answer is correct, since 3 + 4 = 7"
    return said or _last_line(text)
