"""
Finds the program in a model's text. It uses regular expressions alone, because parsing hostile source can crash the interpreter.

A text is cut into pieces of code at its markers and fences. The pieces that bind the names that the tests use are the program. The
other pieces lend it the imports and helpers that it needs. docs/tasks.md has the policy as a table.
"""

import builtins
import re
from collections import defaultdict
from typing import NamedTuple

from .math_grading import after_reasoning


MAX_TEXT = 50_000  # characters of an attempt that are looked at, from its end
TRIPLE = r'("""|\'\'\')(?:\\.|(?!\1)[^\\]){0,3000}+\1'  # a triple-quoted string that is closed
HIDDEN = re.compile(  # what is no code, whatever it looks like; a triple quote that is never closed is matched alone
    TRIPLE + r"""|\"{3}|'{3}|"(?:\\.|[^"\\\n]){0,1000}+"|'(?:\\.|[^'\\\n]){0,1000}+'|\#[^\n]*|\\\n""", re.DOTALL
)
BRACKET = re.compile(r"^(?:(?:(?:async\s+)?def|class|import|from)\b|@)|[()\[\]{}]", re.MULTILINE)
INVISIBLE = re.compile(HIDDEN.pattern + "|(?P<odd>[\ufeff\u200b\u2060\xa0\u2002-\u200a\u202f\u3000]+)", re.DOTALL)
SPACES = {ord(c): " " for c in "\xa0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"}
NO_SPACES = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))

# --- the statements of a piece of code ---

KEYWORDS = r"(?:and|or|not|in|is|if|else|for|lambda|await|as)\b"
# No two words side by side.
NO_PROSE = rf"(?!.*\b(?!{KEYWORDS}|(?:return|raise)\b)[A-Za-z_]\w*[ ]+(?!{KEYWORDS})[A-Za-z])"
MODULES = r"[\w.]+(?:\s+as\s+\w+)?"
TARGET = r"[A-Za-z_][\w.]*(?:\[[^\]=\n]*\])*"
# A line that can start a statement at the top level.
STARTS = re.compile(
    rf"""from\s+[\w.]+\s+import\b|import\s+{MODULES}(?:\s*,\s*{MODULES})*\s*(?:;|$)|@\w|(?:async\s+)?def\s+\w+\s*[\[(]"""
    rf"""|class\s+\w+\s*[:(\[]|(?:async\s+)?for\s.*\sin\s.*:|(?:async\s+with|if|while|with|match)\b{NO_PROSE}.*:|try\s*:"""
    rf"""|assert\s|print\(|{TARGET}(?:\s*,\s*\*?{TARGET})*\s*(?::[\w\[\], .|"']*+)?(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)"""
    r"""|[A-Za-z_][\w.]*\(.*\)\s*$|["']\s*$"""
)
LEAVES = re.compile(r"(?:return|yield|raise)\b")  # also starts a statement, in the body of a function
CLAUSE = re.compile(  # continues a statement
    r"[)\]}]|(?:else|finally)\s*:|(?:elif|except)\b.*:|case\s.*:"
)
DEFINITION = re.compile(r"(?:async\s+)?(?:def|class)\s+(\w+)")
STUB = re.compile(r"""(?:[rRuU]?["']|\.\.\.|pass\b|raise NotImplementedError\b.*)\s*""")  # says what is to be written
HEADER = re.compile(rf"class\b.*:\s*$|(?!class\b).*:\s*(?:{STUB.pattern})?$")  # no body, or none yet
IMPORT = re.compile(r"(from\s+[\w.]+\s+)?import\b(.*)")
FUTURE = re.compile(r"\s*from\s+__future__\s+import\b")
HEAD = re.compile(r"(?:if|elif|else|try|except|finally|for|while|with)\b[^:]*:\s*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)*)\s*(?::[^=]*+)?=(?!=)\s*")
NO_CALLABLE = re.compile(r"""[-\d\[{"']|[rbfuRBFU]{1,2}["']|(?:True|False|None)\b|$""")
CALLABLE, IMPORTED, OTHER = 3, 2, 1  # what a name is bound to, the likeliest function first


def _masked(code: str) -> str:
    """The code at its length with blanks for strings, comments and line ends in brackets: each line starts a statement."""
    mask = HIDDEN.sub(lambda found: (found[0][0] if found[0][0] in "\"'" else " ").ljust(len(found[0])), code)
    opened, pairs = [], []
    for found in BRACKET.finditer(mask):
        if found[0] in "([{":
            opened.append(found.start())
        elif found[0] not in ")]}":  # a bracket that is still open here is no code's
            opened.clear()
        elif opened:
            start = opened.pop()
            while pairs and pairs[-1][0] > start:
                pairs.pop()
            pairs.append((start, found.end()))
    parts, end = [], 0
    for start, after in pairs:
        parts += [mask[end:start], mask[start:after].replace("\n", " ")]
        end = after
    return "".join([*parts, mask[end:]])


def _lines(code: str) -> list[tuple[str, str]]:
    """The lines of a code, of which a string or brackets may take several, each with its mask."""
    lines, offset = [], 0
    for mask in _masked(code).split("\n"):
        lines.append((code[offset : offset + len(mask)], mask))
        offset += len(mask) + 1
    return lines


def _statements(code: str) -> list[str]:
    """The statements at the top level, with their decorators and clauses."""
    statements, decorated = [], False
    for line, mask in _lines(code):
        opens = bool(mask[:1].strip()) and not CLAUSE.match(mask)
        if statements and (decorated or not opens):
            statements[-1].append(line)
        else:
            statements.append([line])
        decorated = mask.startswith("@") if opens else decorated
    return ["\n".join(lines) for lines in statements]


def _words(code: str) -> set[str]:
    return set(re.findall(r"[^\W\d]\w*", code))


def _indent(mask: str) -> int:
    return len(mask) - len(mask.lstrip())


def _bound(code: str) -> dict[str, int]:
    """Names that a program binds at its top level, also in an `if` or `try` there, with the kind of what they are bound to."""
    bound = defaultdict(int)
    lines = [mask for _, mask in _lines(code) if mask.strip()]
    inside = within = None  # how far the function or class is indented in which a line stands, and its definition
    for mask in lines:
        if inside is not None and _indent(mask) > inside:
            if within[0].startswith("class") or not STUB.fullmatch(mask.strip()):
                bound[within[1]] = CALLABLE
            continue
        inside = None
        if found := DEFINITION.match(mask.lstrip()):
            inside, within = _indent(mask), found
            if not HEADER.match(mask.lstrip()):
                bound[found[1]] = CALLABLE
            continue
        head = HEAD.match(mask.strip())
        for statement in map(str.strip, mask.strip()[head.end() if head else 0 :].split(";")):
            if found := IMPORT.match(statement):
                for part in filter(None, map(str.strip, found[2].strip("() \t").split(","))):
                    name = part.split()[-1] if found[1] or " as " in part else part.split(".")[0]
                    bound[name] = max(bound[name], IMPORTED)
                continue
            targets, end = [], 0
            while found := ASSIGNMENT.match(statement, end):
                targets += re.findall(r"\w+", found[1])
                end = found.end()
            plain = len(targets) == 1 and NO_CALLABLE.match(statement, end)
            used = _words(statement[end:].split("lambda")[0])
            for name in targets:  # `area = area(3)` is a use of the function, not the function
                bound[name] = max(bound[name], OTHER if plain or name in used else CALLABLE)
    return dict(bound)


# --- the pieces of a text ---

MARK = re.compile(  # the delimiters of MBPP's prompt, at the start or at the end of a line
    TRIPLE
    + r"|(?:^[ \t]*(?P<first>\[BEGIN\]|\[DONE\])(?![ \t]*[,=.)\]+])|(?<![\w)\]}\x22\x27])(?P<last>\[BEGIN\]|\[DONE\])[ \t]*$)",
    re.DOTALL | re.MULTILINE,
)
FENCE = re.compile(
    TRIPLE + r"""|^(?P<before>(?:(?!\"{3}|'{3}|`{3}|~{3})[^\n])*+)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$""",
    re.DOTALL | re.MULTILINE,
)
CLOSING = re.compile(HIDDEN.pattern + r"|(?P<fence>`{3,}|^[ \t]*~{3,})", re.DOTALL | re.MULTILINE)
FENCE_LINE = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})", re.MULTILINE)
LIST_ITEM = re.compile(r"\s*(?:(?:[-*+]|\d+[.)])\s+)?")
INFO = re.compile(
    r"[{.\s]*(?P<python>(?:lang(?:uage)?-)?i?py(?:thon|con)?(?![a-z])[\w.:{}/-]*)?\s*(?P<rest>.*?)\s*$", re.IGNORECASE
)
CODE = re.compile(rf"\s*?(?:^[ \t]+\S|^(?:{STARTS.pattern}|{LEAVES.pattern}|>>> |#))", re.MULTILINE)


def _plain(text: str) -> str:
    """The end of a text after its reasoning, with Python's line ends, and without spaces in it that Python does not know."""
    text = re.sub("\r\n?", "\n", after_reasoning(text)[-MAX_TEXT:])
    if re.search(r"^[ \t]*> ?(?:`{3}|~{3})", text, re.MULTILINE):  # quoted
        text = re.sub(r"^[ \t]*> ?(?!>)", "", text, flags=re.MULTILINE)
    return INVISIBLE.sub(lambda found: found[0].translate(SPACES | NO_SPACES) if found["odd"] else found[0], text)


def _marked(text: str) -> list[str]:
    """What stands between `[BEGIN]` and `[DONE]`, either of which may be missing, the last first; then the text without them."""
    parts, rest, start, end = [], [], 0, 0
    for mark in MARK.finditer(text):
        kind = mark["first"] or mark["last"]
        if kind:
            if start is not None and (kind == "[DONE]" or parts or start):
                parts.append(text[start : mark.start()])
            rest.append(text[end : mark.start()])
            end = mark.end()
            start = end if kind == "[BEGIN]" else None
    if end and start is not None:
        parts.append(text[start:])
    return [*reversed(parts), "\n".join([*rest, text[end:]])]


def _closing(text: str, start: int, fence: str) -> re.Match | None:
    """The fence that closes a block: the first that is in no string, or if a string stays open, the first."""
    for found in CLOSING.finditer(text, start):
        if (found["fence"] or "").lstrip().startswith(fence):
            return found
        if found[0] in ('"""', "'''"):
            break
    return next((found for found in FENCE_LINE.finditer(text, start) if found["fence"].startswith(fence)), None)


def _segments(text: str, marked: bool = False) -> list[tuple[bool, str]]:
    """
    A text cut at its fences: blocks of Python (`True`), and what stands outside of these. A text between marks is itself a
    block: what it has outside of its own blocks is a program as it stands, or none.
    """
    segments, outside, position = [], 0, 0
    while found := FENCE.search(text, position):
        position = found.end()
        if not found["fence"]:  # a string
            continue
        before, fence, info = found["before"], found["fence"], INFO.match(found["info"])
        own_line, rest = LIST_ITEM.fullmatch(before), info["rest"]
        if not own_line and (fence[0] == "~" or rest):
            continue  # characters in a line of code or prose
        code_here = bool(STARTS.match(rest))
        start = found.start("info") + info.start("rest") if code_here else found.end()
        closing = _closing(text, start, fence)
        content = text[start : closing.start() if closing else len(text)].removeprefix("\n")
        if own_line:
            content = re.sub(rf"^[ \t]{{0,{len(before)}}}", "", content, flags=re.MULTILINE)
        opens = not rest and (own_line or before.rstrip().endswith(":")) and CODE.match(content)
        python = info["python"] or code_here or opens
        between = text[outside : found.start() if own_line else found.start("fence")]
        if not (segments or python or marked) and CODE.match(between):
            segments += [
                (True, run) for run in _runs(between)
            ]  # the prompt, or nobody, has opened the block that ends
        segments.append((False, between))
        if python:
            segments.append((True, content))
        elif re.fullmatch(r"[\w+#.-]+", rest):  # another language, or text that has blocks of its own
            segments += _segments(content)
        else:  # a closing fence without a block
            outside = found.start("info")
            continue
        outside = position = closing.end() if closing else len(text)
        if closing and INFO.match(text[position : (text + "\n").index("\n", position)])["python"]:
            outside = position = closing.start()  # the block was never closed, and the next one starts here
    if marked:
        return [(True, text), *(segment for segment in segments if segment[0])]
    return [*segments, (False, text[outside:])]


def _dedented(code: str) -> str:
    """The code moved to the left by the indentation of its first line, and taken out of a transcript with `>>>`."""
    first = next((line for line in code.split("\n") if line.strip()), "")
    code = re.sub(rf"^[ \t]{{0,{_indent(first)}}}", "", code, flags=re.MULTILINE)
    if first.lstrip().startswith(">>> "):
        code = "\n".join(line[4:] for line in code.split("\n") if re.match(r">>> |\.\.\.( |$)", line))
    return code


def _runs(text: str, body: bool = False) -> list[str]:
    """The lines of a text that can be Python, cut where one cannot; those of a function's body may be indented or return."""
    runs, going = [], False
    for line, mask in _lines(text):
        starts = STARTS.match(mask) or (body and (LEAVES.match(mask) or re.match(r"[ \t]+\S", mask)))
        if starts and not going:
            runs.append([])
        going = bool(starts or (going and (not mask[:1].strip() or CLAUSE.match(mask))))
        if going:
            runs[-1].append(line)
    return ["\n".join(run) for run in runs]


class Piece(NamedTuple):
    code: str
    fenced: bool
    segment: int  # its number


def _pieces(segments: list[tuple[bool, str]]) -> list[Piece]:
    """The code in the segments of a text: each block, and each run of lines outside of blocks that can be Python."""
    pieces = []
    for i, (fenced, text) in enumerate(segments):
        if fenced:
            codes = [_dedented(text)]
        else:
            codes = _runs(text)
            if not codes and (found := re.search(rf"(?m)^[ \t]+(?={STARTS.pattern}|>>> )", text)):
                codes = _runs(_dedented(text[found.start() :]))
        pieces += [Piece(code, fenced, i) for code in codes]
    return pieces


# --- the program ---


def _holders(pieces: list[Piece], names: list[str]) -> list[Piece]:
    """The pieces that together bind all of the names: for each the last that binds it, to a function and in a fence if any."""
    bound = [_bound(piece.code) for piece in pieces]
    holders = set()
    for name in names or [None]:  # without names, any function will do
        fits = [
            (kind, piece.fenced, i)
            for i, piece in enumerate(pieces)
            if (kind := bound[i].get(name, 0) if name else CALLABLE * (CALLABLE in bound[i].values()))
        ]
        if not fits:
            return []
        holders.add(max(fits)[2])
    return [pieces[i] for i in sorted(holders)]


def _lent(program: str, pieces: list[Piece], names: list[str]) -> list[str]:
    """
    The imports, definitions and constants in other pieces that a program needs. A piece that binds one of the names is
    another version of the program, and one that uses them outside of a function is an example or a test: they lend nothing.
    """
    statements, binders = [], defaultdict(list)
    names = set(names)
    assigned = set(re.findall(r"\b(\w++)\s*+(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)", program))
    for piece in pieces:
        candidates = []
        for statement in _statements(piece.code):
            bound = _bound(statement)
            used = _words(_masked(statement))
            defines = re.match(r"\s*(?:@|from\b|import\b|(?:async\s+)?def\b|class\b)", _masked(statement))
            if names & bound.keys() or any(name.lower().startswith("test") for name in bound):
                break
            if not defines and used & names:
                break
            if bound and (defines or not (used & {"input", "print", "open"} or assigned & bound.keys())):
                candidates.append((statement, bound))
        else:
            for statement, bound in candidates:
                for name in bound:
                    binders[name].append(len(statements))
                statements.append(statement)
    wanted = [*(_words(program) - _bound(program).keys() - vars(builtins).keys()), "*", "annotations"]
    lent = set()
    while wanted:
        new = set(binders.pop(wanted.pop(), ())) - lent
        lent |= new
        wanted += [word for i in new for word in _words(statements[i]) - vars(builtins).keys()]
    return [statements[i] for i in sorted(lent)]


def _body(code: str, indent: str) -> str:
    """A function's body, indented as its signature wants; what follows it is kept if it is code."""
    lines = _lines(code.strip("\n"))
    depth = [_indent(mask) if mask.strip() else None for _, mask in lines]
    shown = [i for i, each in enumerate(depth) if each is not None]
    if not shown:
        return ""
    first = shown[0]
    end = next((i for i in shown[1:] if depth[i] == 0), len(lines))
    inner = [depth[i] for i in shown[1:] if i < end]
    suite = lines[first][1].rstrip().endswith(":") and inner and inner[0] == min(inner)
    if inner and depth[first] < min(inner) and not suite:  # the text was stripped, or lost a space
        depth[first] = min(inner)
    elif depth[first] == 0:  # the chat models' way: the body alone, not indented
        end = len(lines)
    base = min(depth[i] for i in shown if i < end)
    body = []
    for i, (line, _) in enumerate(lines[:end]):
        own = line[: len(line) - len(line.lstrip())]
        if depth[i] is not None:
            line = indent + own[base:] + line.lstrip()
        body.append(line)
    rest = "\n".join(line for line, _ in lines[end:])
    code = end < len(lines) and STARTS.match(lines[end][1])
    return "\n".join([*body, *(_runs(rest)[:1] if code else [])])


def _body_in(parts: list[list[tuple[bool, str]]]) -> tuple[str, int, int]:
    """
    The code that is likeliest a function's body, and the numbers of its part and segment: the last block that is indented,
    else the last that returns, else the first text outside of blocks that does one of these, else what comes nearest.
    """
    found = []
    for part, segments in enumerate(parts):
        for place, (fenced, text) in enumerate(segments):
            indented = text.strip("\n")[:1].isspace()
            for code in [text] if fenced or indented else [*_runs(text, body=True), text]:
                if code.strip():
                    unlike = 0 if indented else 1 if _leaves(_dedented(code)) else 4
                    found.append((unlike + (0 if fenced else 2), part, -place if fenced else place, code))
    if not found:
        return "", 0, 0
    _, part, place, code = min(found, key=lambda each: each[:3])
    return code, part, abs(place)


def _leaves(code: str) -> bool:
    """Whether a code returns at its top level, as only the body of a function can."""
    return any(LEAVES.match(mask) for _, mask in _lines(code))


def _futures(code: str) -> tuple[list[str], str]:
    """The imports from `__future__` that a code begins with, and the rest: they may only stand at the start of a file."""
    futures, rest = [], []
    lines = _lines(code)
    for i, (line, mask) in enumerate(lines):
        if FUTURE.match(mask):
            futures.append(line.strip())
        elif mask.strip() and not re.fullmatch(r"\s*[\"']\s*", mask):
            rest += [line for line, _ in lines[i:]]
            break
        else:
            rest.append(line)
    return futures, "\n".join(rest)


def extract_program(text: str, names: list[str], context: str = "") -> str:
    """
    The program that an attempt gives: the last code that binds the names, with the imports and helpers that stand in a
    block of their own. docs/tasks.md says which code is taken from which form of a text.

    `context` is the start of a program, as HumanEval gives it. If the attempt repeats its last signature, the code above that
    signature (imports and helpers) is put before the attempt's program. If no code binds the names, the attempt is read as
    the body of the last function in `context`.

    Args:
        text (`str`):
            An attempt.
        names (`list[str]`):
            Functions and classes that the tests use.
        context (`str`, *optional*):
            A program's start: imports, helpers, the signature and docstring of the function asked for.

    Returns:
        `str`: A program, or what comes nearest to one: whether it runs is for the sandbox to see.
    """
    parts = _marked(_plain(text))
    cut = [*(_segments(part, marked=True) for part in parts[:-1]), _segments(parts[-1])]
    pieces = [_pieces(segments) for segments in cut]
    signatures = [found.start() for found in re.finditer(r"^(?:@.*\n)*(?:async\s+)?def\s", context, re.MULTILINE)]
    signature = signatures[-1] if signatures else len(context)
    start, futures = context[:signature], []
    bound = {name for each in pieces for piece in each for name in _bound(piece.code)}
    found = [(each, mains) for each in pieces if (mains := _holders(each, names))]
    if not found and (some := [name for name in names if name in bound]):
        found = [(each, mains) for each in pieces if (mains := _holders(each, some))]
    if found:
        all_pieces, mains = found[0]
        program = "\n".join(piece.code for piece in mains)
        lent = _lent(program, [piece for piece in all_pieces if piece not in mains], names)
    elif context:
        body, part, place = _body_in(cut)
        lent = _lent(body, [piece for piece in pieces[part] if piece.segment != place], names)
        futures, body = _futures(body)
        indents = re.findall(r"^([ \t]+)\S", context[signature:], re.MULTILINE)
        head = context[signature:].rstrip(" \t")
        program = head + "\n" * (not head.endswith("\n")) + _body(body, indents[0] if indents else "    ") + "\n"
    else:
        return _nearest(parts, cut)
    if start or lent:
        more, program = _futures(program)
        futures += [*more, *(each for each in lent if FUTURE.match(each))]
        lent = [each for each in lent if not FUTURE.match(each)]
    return "".join(f"{line}\n" for line in futures) + start + "".join(f"{each}\n" for each in lent) + program


def _nearest(parts: list[str], cut: list[list[tuple[bool, str]]]) -> str:
    """Where no code binds the names: the last block, else the first lines that can be Python, else the text."""
    for part, segments in zip(parts, cut, strict=True):
        blocks = [_dedented(text) for python, text in segments if python and text.strip()]
        if blocks or part.strip():
            return blocks[-1] if blocks else [*_runs(part), part][0]
    return ""
