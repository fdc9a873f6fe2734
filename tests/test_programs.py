"""The program in a model's text, in the forms that models use."""

import pytest

from trl_score.tasks.code import MBPP
from trl_score.tasks.programs import extract_program


PROGRAM = "import math\n\ndef area(r):\n    return math.pi * r ** 2"
CONTEXT = 'from typing import List\n\ndef half(x):\n    return x / 2\n\ndef mean(xs: List[float]) -> float:\n    """Mean.\n    """\n'
BODY = "    return sum(xs) / len(xs)"


@pytest.mark.parametrize(
    "text",
    [
        PROGRAM,
        f"```python\n{PROGRAM}\n```",
        f"```\n{PROGRAM}\n```",
        f"~~~py\n{PROGRAM}\n~~~",
        f"Here you go:\n\n```python\n{PROGRAM}\n```\n\nThis uses `math.pi`.",
        f"```python\n{PROGRAM}",
        f"```python\n{PROGRAM}\n```\nExample:\n```python\nprint(1)\n```\nOutput:\n```text\n1\n```",
        f"```bash\npip install x\n```\n```Python\n{PROGRAM}\n```",
        f"First try:\n```python\ndef area(r): return 0\n```\nCorrected:\n```python\n{PROGRAM}\n```",
        f"[BEGIN]\n{PROGRAM}\n[DONE]",
        f"[BEGIN]\n{PROGRAM}",
        f"{PROGRAM}<|im_end|>",
        f"{PROGRAM}</s>\n",
        f"{PROGRAM}\n[DONE]\n\nYou are an expert Python programmer, and here is your task",
        f"[BEGIN]\ndef area(r): pass\n[DONE]\nNo.\n[BEGIN]\n{PROGRAM}\n[DONE]",
        f"[BEGIN]\n```python\n{PROGRAM}\n```\n[DONE]",
        f"Sure! Here is the program.\n\n{PROGRAM}\n\nThe mistake was the square.",
        PROGRAM.replace("\n", "\r\n"),
        f"  Text.\n```python\n{PROGRAM}\n```".replace("\n", "\r\n"),
    ],
)
def test_the_program_is_found(text):
    assert extract_program(text, ["area"]).strip() == PROGRAM


def test_blocks_that_only_together_define_what_is_used_are_joined():
    text = "```python\nclass Node:\n    pass\n```\nand\n```python\ndef depth(n):\n    return 1\n```"
    assert extract_program(text, ["Node", "depth"]).count("\n\n") <= 1
    assert "class Node" in extract_program(text, ["Node", "depth"]) and "def depth" in extract_program(
        text, ["Node", "depth"]
    )


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        BODY + "\n",
        f"\n{BODY}\n\n\ndef another(x):\n    return x\n",
        f"```python\n{BODY}\n```",
        "```python\nreturn sum(xs) / len(xs)\n```",
        f"{CONTEXT}{BODY}",
        f"```python\n{CONTEXT}{BODY}\n```",
        f"def mean(xs: List[float]) -> float:\n{BODY}",
        f"```python\ndef mean(xs: List[float]):\n{BODY}\n```\nDone.",
        f"{BODY}\n\nThat is all.\n",
        f"```python\nassert True\n```\n```python\n{BODY}\n```\n```python\nprint(1)\n```",
    ],
)
def test_a_program_goes_on_from_its_context_or_repeats_it(text):
    namespace = {}
    exec(extract_program(text, ["mean"], CONTEXT), namespace)
    assert namespace["mean"]([1.0, 2.0]) == 1.5 and namespace["half"](4) == 2


# --- f(1) is 2 if the program is found: each kind of text, with variants ---

F = "def f(x):\n    return x + 1"
NAIVE = "def f(x):\n    return x"
G = "def g(x):\n    return x + 1"
USES_G = "def f(x):\n    return g(x)"
USES_COS = "def f(x):\n    return x + int(cos(0))"
HEAD = 'from typing import List\n\ndef half(x):\n    return x / 2\n\ndef f(x: int) -> int:\n    """Add one.\n    """\n'


def block(code: str, info: str = "python", fence: str = "```", indent: str = "") -> str:
    return "\n".join(indent + line for line in [fence + info, *code.split("\n"), fence])


def blocks(*codes: str) -> str:
    return "\n\nThen:\n\n".join(map(block, codes))


def passes(text: str, context: str = "") -> bool:
    namespace = {"__name__": "program"}
    try:
        exec(compile(extract_program(text, ["f"], context), "program", "exec"), namespace)
        return namespace["f"](1) == 2
    except Exception:
        return False


FORMS = {
    "a closing fence too many": [
        f"{F}\n```",
        f"{F}\n```\nThis adds one.",
        f"{F}\n``` This adds one.",
        f"{F}```\nThis adds one.",
        f"{F}\n~~~\nThis adds one.",
        f"{F}\n```\n```\nDone.",
        f"{F}\n```\n\nThe naive version:\n\n{NAIVE}\n",
        f"{F}\n```\n\n{block('print(f(2))')}",
        f"Here is the code:\n{F}\n```\n\nExplanation: it adds one.",
        f"{block(F)}\n```\nThis adds one.\n",
        f"{block(F)}\n```\nprint(f(1))\n",
        f"{block(F)}\n```\nThe naive version:\n{NAIVE}\n```",
        f"```\n{block(F)}\n```",
        f"```python\n```\n{F}\n```",
        f"{NAIVE}\n```\nThe corrected version:\n\n{block(F)}\n",
        f"{G}\n```\n\n{USES_G}\n```\n",
    ],
    "text on the line of a fence": [
        f"```python\n{F}\n```This adds one.",
        f"```python\n{F}\n``` adds one. And\nso on.\n```\nprint(f(1))\n```",
        f"```python\n{F}\n```Done",
        f"```python\n{F}\n```: done\n\nMore.",
        f"```python\n{F}```",
        f"```python\n{F}``` and more",
        f"```python\n{F}\n```python\nprint(f(1))\n```",  # never closed
        "```python def f(x): return x + 1```",
        "```def f(x):\n    return x + 1\n```\nText",
        f"Here's the code: {block(F)}",
        f"The function `f`: {block(F)}",
        f"Here's the code:{block(F, '')}",
    ],
    "in a list or a quote": [
        f"1. Solution:\n\n{block(F, indent='   ')}\n\n2. Text",
        "- x\n\t```python\n\tdef f(x):\n\t\treturn x + 1\n\t```\n",
        f"- x\n  ```python\n{F}\n  ```\n",
        "- x\n  ```python\n      def f(x):\n          return x + 1\n  ```\n",
        f"1. a\n   - b\n\n{block(F, 'py', indent='     ')}",
        "- ```python\n  def f(x):\n      return x + 1\n  ```\n- Text",
        "1. ```python\n   def f(x):\n       return x + 1\n   ```\n",
        f"Text:\n{block(F, indent='> ')}\n",
        "My solution:\n\n    def f(x):\n        return x + 1\n\nIt works.",
        "    def f(x):\n        return x + 1",
        block(">>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2", "pycon"),
    ],
    "helpers and imports in blocks of their own": [
        blocks(G, USES_G),
        blocks(USES_G, G),
        blocks(f"{G}\n\nprint(g(1))", USES_G),
        f"First a helper:\n\n{G}\n\nThen the function:\n\n{USES_G}\n\nDone.",
        blocks("from math import cos", USES_COS),
        f"from math import cos\n\n{block(USES_COS)}",
        blocks("try:\n    from math import cos\nexcept ImportError:\n    cos = None", USES_COS),
        blocks("from math import (sin,\n  cos)", USES_COS),
        blocks("import math as m, sys", USES_COS.replace("cos", "m.cos")),
        blocks("from math import *", USES_COS),
        blocks("ONE = 1", "def f(x):\n    return x + ONE"),
        blocks("from math import cos", USES_COS.replace("f(", "g("), USES_G, "assert f(1) == 2"),
        blocks(f"import functools\n@functools.cache\n{G}", USES_G),
        blocks("class G:\n    def add(self, x):\n        return x + 1", "def f(x):\n    return G().add(x)"),
        blocks("from __future__ import annotations\nfrom math import cos", USES_COS.replace("(x)", "(x: Later)", 1)),
    ],
    "not replaced by what comes after it": [
        blocks(F, "x = 3\nf = f(x)"),
        blocks(F, "f = 5.0"),
        blocks(F, "def f(x):"),
        blocks(F, "def f(x): ..."),
        blocks(F, "def f(x):\n    # to be written\n    pass"),
        blocks(F, 'def f(x):\n    """\n    Adds one.\n    """\n'),
        blocks(F, 'def f(x):\n    """Adds one."""\n    raise NotImplementedError("f")'),
        blocks(F, "from solution import f\nassert f(1) == 2"),
        blocks("def f(x):\n    result = x + 1\n    return result", "result = f(int(input()))"),
        blocks(F, "import unittest\nclass TestF(unittest.TestCase):\n    def test(self):\n        assert f(1) == 2"),
        blocks(F, "if True:\n    print(f(1))"),
        block(F) + "\nOutput:\n" + block("2", ""),
        block(F) + "\n```python\nprint(f(",
    ],
    "replaced by a corrected version": [
        blocks(NAIVE, F),
        blocks(NAIVE, "f = lambda x: x + 1"),
        blocks(NAIVE, "if True:\n    def f(x):\n        return x + 1"),
        f"{NAIVE}\n\nWait, that is wrong.\n\n{F}\n",
    ],
    "a fence in a string": [
        block('def f(x):\n    """\n    Adds.\n\n    ```python\n    >>> f(1)\n    ```\n    """\n    return x + 1')
        + "\nText",
        block('def f(x):\n    """\nAdds.\n```\nf(1)\n```\n    """\n    return x + 1'),
        block("def f(x):\n    '''\n```\nf(1)\n```\n    '''\n    return x + 1"),
        block(f'"""Module\n```\nf(1)\n```\n"""\n{F}'),
        'def f(x):\n    """\n    ```python\n    def f(x): return x\n    ```\n    """\n    return x + 1\n',
        'def f(x):\n    s = "```"\n    t = "```python"\n    return x + len([s])\n',
        block('def f(x):\n    s = "```"\n    t = "```python"\n    return x + len([s])'),
        block("def f(x):\n    # use ``` here\n    return x + 1"),
        '[BEGIN]\ndef f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n[DONE]',
        block("def f(x):\n    s = '''\n```\n'''\n    return x + 1", fence="~~~"),
        block('def f(x):\n    """Oops') + "\nSorry:\n" + block('def f(x):\n    """Adds."""\n    return x + 1'),
    ],
    "[BEGIN] in a string": [
        'def f(x):\n    s = "[BEGIN]"\n    return x + 1',
        block('def f(x):\n    s = "[BEGIN]".replace("[DONE]", "")\n    return x + 1'),
        '[BEGIN]\ndef f(x):\n    s = "[BEGIN]" + "[DONE]"\n    return x + 1\n[DONE]',
        '[BEGIN]\ndef f(x):\n    """\n    [BEGIN]\n    x\n    [DONE]\n    """\n    return x + 1\n[DONE]',
        'def f(x):\n    """\n    [BEGIN]\n    x\n    [DONE]\n    """\n    return x + 1\n',
        "BEGIN = 1\nS = [\n    [BEGIN],\n]\ndef f(x):\n    return x + {1: 1}[BEGIN]\n",
        "def f(x):\n    # between [BEGIN] and [DONE] here\n    return x + 1  # [DONE]\n",
        "[BEGIN] def f(x): return x + 1 [DONE]",
        f"[BEGIN]\n{F}\n[DONE]\nAnd here is your next task\n[BEGIN]\ndef other(y):\n    return y\n[DONE]",
        f"[BEGIN]\n{F}\n[DONE]\n[BEGIN]\n[DONE]",
        f"I put it between [BEGIN] and [DONE].\n[BEGIN]\n{F}\n[DONE]",
    ],
    "characters that are not seen": [
        "\ufeff" + F,
        "\ufeff" + block(F),
        block("\ufeff" + F),
        block("\u200b" + F),
        block(F).replace("    ", "\xa0" * 4),
        "def f(x):\n    return\xa0x + 1",
        block(F).replace("\n", "\r\n"),
        block(F).replace("\n", "\r"),
        'def f(x):\n    s = "a\u2028b\x0cc"\n    return x + 1\n',
    ],
    "a callable that is assigned": [
        *[
            blocks(code, "print(f(1))")
            for code in (
                "f = lambda x: x + 1",
                "g = f = lambda x: x + 1",
                "g, f = None, lambda x: x + 1",
                "f = (\n    lambda x:\n    x + 1\n)",
                "from typing import Callable\nf: Callable[[int], int] = lambda x: x + 1",
                "import functools, operator\nf = functools.partial(operator.add, 1)",
                f"{G}\n\nf = g",
                "class G:\n    def __call__(self, x):\n        return x + 1\nf = G()",
                f"{F}\nimport functools\nf = functools.cache(f)",
                "if True:\n    def f(x):\n        return x + 1",
                "try:\n    from nowhere import f\nexcept ImportError:\n    def f(x):\n        return x + 1",
                "if 1 > 2:\n    f = None\nelse:\n    f = lambda x: x + 1",
            )
        ],
        blocks(G, "f = g", "print(f(1))"),
        "f = lambda x: x + 1\n\nText is here",
    ],
    "tags, and none": [
        *[
            block(F, info)
            for info in ("python3", "Python", "{.python .numbered}", 'python title="a.py"', "python:a.py")
        ],
        *[block(F, info) for info in ("py3", "text", "code")],
        f"````markdown\n# Title\n{block(F)}\ntext\n````",
        f"```markdown\n# Title\n{block(F)}\n```",
        f"````python\n{F}\n````",
        f"[PYTHON]\n{F}\n[/PYTHON]\n[TESTS]\nassert f(1) == 2\n[/TESTS]",
        f"<think>\nfor example: we add.\n</think>\n<answer>\n{block(F)}\n</answer>",
        f"<think>\n{block(F.replace('+', '-'))}\nNo.\n</think>\n\n{F}",
        f"<think>\n[BEGIN]\n{F.replace('+', '-')}\n[DONE]\nNo.\n</think>\n\n{block(F)}",
        f"if you want this:\n{F}\nDone",
        f"# Solution\n\nWe add.\n\n{F}\n\n# Explanation\nf(1) returns 2.",
        "Text.\nTABLE = [\n1,\n2,\n]\n\ndef f(x):\n    return x + TABLE[0]\nDone.",
        'Text\nS = """\nsome text\n"""\ndef f(x):\n    return x + 1\nSo.',
    ],
}


@pytest.mark.parametrize("context", ["", HEAD])
@pytest.mark.parametrize("form", FORMS)
def test_the_program_is_found_in_each_form(form, context):
    assert [text for text in FORMS[form] if not passes(text, context)] == []


@pytest.mark.parametrize(
    "text",
    [
        "  return x + 1",
        "   return x + 1",
        "\treturn x + 1",
        "        return x + 1",
        "  if x:\n    y = x\n  else:\n    y = 0\n  return y + 1\n",
        "\tif x:\n\t\ty = x\n\treturn y + 1\n",
        block("\tif x:\n\t\ty = x\n\treturn y + 1"),
        '  s = """\nabc\n  d\n"""\n  assert s == "\\nabc\\n  d\\n"\n  return x + 1\n',
        "  y = [\n1,\n]\n  return x + y[0]\n",
        "  return g(x)\n\ndef g(x):\n  return x + 1\n\nprint(f(1))",
        "  return x + 1\n\nThis adds one to x.",
        "if x is None:\n        return 0\n    return x + 1\n",  # stripped
        "y = x\n    y += 1\n    return y",
        "   y = x\n    y += 1\n    return y",  # a tokenizer took a space
        "for i in range(1):\n    x += 1\nreturn x",
        "y = x + 1\nreturn y\n```\nText",
        "    return x + 1\n```\nThis adds one.",
        f"1. Body:\n{block('    return x + 1', indent='   ')}",
        "The body is:\n\n    return x + 1\n\nDone.",
        blocks("return x + 1", "print(f(1))"),
        blocks('def f(x):\n    """Adds one."""', "    return x + 1"),  # the prompt repeated, then the body
        "if x == 1: return x + 1\n    return None",
        blocks("import math", "    return x + int(math.cos(0))"),
        "from __future__ import annotations\n\ndef f(x: Later) -> int:\n    return x + 1",
        block("# comment\nfrom __future__ import annotations\nimport math\n\ndef f(x: Later):\n    return x + 1"),
        "from __future__ import (\n    annotations,\n    division,\n)\n\ndef f(x: Later) -> int:\n    return x + 1",
        "    from __future__ import division\n    return x + 1",
        "from __future__ import division\nimport math\nreturn x + 1",
        "\ufeff    return x + 1",
        "    y = x\n# add\n    return y + 1",
        '    """\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n',
        "    return x + 1\n\nif True:\n    print(f(1))\n",
        "  def g(y):\n    return y + 1\n  return g(x)\n",
        "[BEGIN]\n    return x + 1\n[DONE]\nYour next task:\n[BEGIN]\ndef other(y):\n    return y\n[DONE]",
    ],
)
def test_a_body_is_indented_as_its_signature_wants(text):
    assert passes(text, HEAD)


@pytest.mark.parametrize("context", ["", HEAD])
@pytest.mark.parametrize(
    "text",
    [
        blocks(f"from math import cos\n{NAIVE}", USES_COS),  # an earlier version lends nothing
        blocks(USES_COS, "from math import cos\nprint(f(1))"),  # nor does an example or a test
        blocks(USES_G, f"{G}\ndef test_f():\n    assert f(1) == 2"),
        blocks(F, NAIVE),
        block(f"{F}\nthis is wrong"),
        block(f"{F}\nraise ValueError"),
        block(f'"""\n{F}\n"""\ng = 1'),
        block("def g():\n    def f(x):\n        return x + 1"),
        block("class Solution:\n    @staticmethod\n    def f(x):\n        return x + 1"),
        "class Solution:\n    @staticmethod\n    def f(x):\n        return x + 1\n",
        block("# def f(x): return x + 1"),
        block("def f(x):\n    s = \u201ca\u201d\n    return x + 1"),
        f"if True:\n{F}",
        f"[BEGIN]\n{F}\n```\n[DONE]",  # between marks, the text is the program as it stands
        f"[BEGIN]\nreturn y\n\n{F}\n[DONE]",
    ],
)
def test_a_wrong_program_is_not_mended(text, context):
    assert not passes(text, context)


def test_a_name_may_also_be_a_variable():
    text = blocks("LIMIT = 5\n\n" + F, "print(f(LIMIT))")
    assert extract_program(text, ["f", "LIMIT"]) == f"LIMIT = 5\n\n{F}\n"


def test_without_names_the_last_function_counts():
    assert extract_program(blocks(F, "print(f(1))"), []) == F + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "I do not know.",
        "```",
        "[BEGIN]",
        "[DONE]",
        "(" * 100_000,
        "```python\n" * 20_000,
        "\ud800",
        "a" * 50_000,
        "a=" * 25_000,
        "\n" * 50_000,
        '```python\n"""\n```\n' * 2_500,
        "(" * 25_000 + ")" * 25_000,
    ],
)
def test_no_text_raises(text):
    assert isinstance(extract_program(text, ["area"]), str)
    assert isinstance(extract_program(text, ["mean"], CONTEXT), str)


def test_the_program_of_the_reasoning_is_none():
    assert "def" not in extract_program(f"<think>\n{block(F)}\n</think>\n\nI cannot solve this.", ["f"])
    assert "def" not in extract_program(f"<think>\n{block(F)}\nWait, this is wrong" + " again" * 10_000, ["f"])
    other = "def g(x):\n    return x"
    assert extract_program(f"<think>\n{block(F)}\n</think>\n{block(other)}", ["f"]).strip() == other


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (PROGRAM, PROGRAM.replace("\n\n", "\n\n\n"), True),
        (PROGRAM, PROGRAM.replace(" ** ", "**") + "  # of a circle", True),
        (PROGRAM, PROGRAM.replace("(r):", '(r):\n    """Of a circle."""'), True),
        (PROGRAM, PROGRAM.replace("** 2", "** 3"), False),
        (PROGRAM, PROGRAM.replace("area", "size"), False),
        ("x = 'a b'", "x = 'a  b'", False),  # spaces of a string count
        ("def f():\n    'a'", "def f():\n    'b'", True),  # both do nothing
        ("def f():\n    'a'\n    return 1", "def f():\n    return 1", True),
        ("async def f():\n    'a'\n    return 1", "class f:\n    'a'\n    x = 1", False),
        ("def f(:", "def f(:", True),  # not Python
        ("def f(:", "def f( :", False),
        ("(" * 5000 + ")" * 5000, "1", False),
        ("x = 1\0", "x = 1", False),
    ],
)
def test_programs_are_the_same_but_for_their_form(first, second, same):
    task = MBPP(runner=lambda submissions: [])
    assert task.same_answers([first, second], [second, first]) == [same, same]
