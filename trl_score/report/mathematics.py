"""
Formulas in what a model wrote, as MathML, which browsers show without a script or a network. latex2mathml converts them; only elements
and attributes of MathML that draw something are taken from it, so a formula cannot bring a link, a style or a script.
"""

import html
import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element


# `$..$` as pandoc reads it, `$$..$$`, `\(..\)`, `\[..\]`; the page gets these two expressions in its data.
FENCE = r"```[\s\S]*?(?:```|$)"  # code has none
LONGEST = 2000  # characters of a formula
# Inside of `\[..\]` there is no other `\[`, but `\\[6pt]` in a matrix. So the time grows with the length of a text.
FORMULA = (
    rf"\$\$[\s\S]{{1,{LONGEST}}}?\$\$|\\\[(?:(?!(?<!\\)\\\[)[\s\S]){{1,{LONGEST}}}?\\\]|\\\((?:(?!(?<!\\)\\\()[\s\S]){{1,{LONGEST}}}?\\\)"
    rf"|(?<!\\)\$(?![\s$])(?:\\.|[^$\\\n]){{0,{LONGEST}}}?(?<!\s)\$(?!\d)"
)
PARTS = re.compile(f"({FENCE})|({FORMULA})")
ELEMENTS = {
    *("math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup"),
    *("munder", "mover", "munderover", "mtable", "mtr", "mtd", "menclose", "mstyle", "mpadded", "mphantom"),
}
ATTRIBUTES = {
    *("accent", "columnalign", "displaystyle", "fence", "form", "largeop", "linethickness", "lspace", "mathvariant"),
    *("maxsize", "minsize", "movablelimits", "notation", "rspace", "scriptlevel", "separator", "stretchy", "width"),
}

Tree = list  # [element, attributes, *children], in which a child is a tree or text


def formulas(texts: Iterable[str]) -> dict[str, Tree]:
    """
    The formulas in some texts.

    Args:
        texts (`Iterable[str]`):
            Texts with LaTeX between `$`, `$$`, `\\(` and `\\)`, or `\\[` and `\\]`.

    Returns:
        `dict[str, list]`: each formula, with its delimiters, and its MathML as nested lists `[element, attributes, *children]`.
        What cannot be converted is left out.
    """
    found = {}
    for text in texts:
        for _, formula in PARTS.findall(text):
            if formula and formula not in found:
                found[formula] = convert(formula)
    return {formula: tree for formula, tree in found.items() if tree is not None}


def convert(formula: str) -> Tree | None:
    """A formula with its delimiters as a tree; `None` if it is no LaTeX that is known."""
    is_display = formula.startswith(("$$", "\\["))
    edge = 2 if is_display or formula.startswith("\\") else 1
    try:
        element = convert_to_element(formula[edge:-edge], display="block" if is_display else "inline")
        return _tree(element)
    except Exception:  # its parser raises many kinds of errors, and a tree may be too deep
        return None


def _tree(element: Element) -> Tree | None:
    text = html.unescape(element.text or "")
    # A backslash is a command that was not understood.
    if element.tag not in ELEMENTS or "href" in element.attrib or "\\" in text:
        return None
    attributes = {name: value for name, value in element.attrib.items() if name in ATTRIBUTES}
    if element.tag == "math" and element.get("display") == "block":
        attributes["display"] = "block"
    children = [_tree(child) for child in element]
    if None in children:
        return None
    return [element.tag, attributes, *([text] if text else []), *children]
