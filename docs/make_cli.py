"""Writes the tables of options in docs/cli.md from `trl_score/arguments.py`: python docs/make_cli.py"""

import re
from dataclasses import fields
from pathlib import Path

from trl_score.arguments import BaselineArguments, TrainArguments
from trl_score.cli import SAMPLING
from trl_score.parsing import Parser, shown_default


PAGE = Path(__file__).with_name("cli.md")
KINDS = {"train": TrainArguments, "baselines": BaselineArguments, **SAMPLING}


def table(kind: type) -> str:
    """The options of a class in Markdown, in the order of the help."""
    parser = Parser((kind,), "")
    rows = ["| option | default | meaning |", "|---|---|---|"]
    by_name = {field.name: field for field in fields(kind)}
    for _, actions in parser.groups():
        for action in actions:
            field = by_name[action.dest]
            default = f"`{default}`" if (default := shown_default(field.default)) else ""
            text = field.metadata["help"].replace("|", "\\|")
            if "choices" in field.metadata and not all(each in text for each in field.metadata["choices"]):
                text += f" One of {', '.join(f'`{each}`' for each in field.metadata['choices'])}."
            rows.append(f"| `--{field.name}` | {default} | {text} |")
    return "\n".join(rows)


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text("utf-8")
    for command, kind in KINDS.items():
        pattern = rf"(<!-- options of {command} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, kind=kind: f"{found[1]}{table(kind)}\n{found[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
