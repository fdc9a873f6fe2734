"""The page: figures, tables and rollouts put into one file."""

import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from .figures import COLORS, figures, svg, svg_for_page
from .folders import Found, find, instruction
from .mathematics import FENCE, FORMULA, formulas
from .tables import difference_rows, instructions, level_rows, metric_rows, settings_rows, statistics_rows


def asset(name: str) -> str:
    """A file of the page, as text."""
    return resources.files(__package__).joinpath("assets", name).read_text("utf-8")


def browser_data(found: Found, limit: int) -> dict:
    """
    The rollouts for the browser; texts only, which the page puts in as text.

    Args:
        found ([`Found`]):
            The evaluations.
        limit (`int`):
            Rollouts of each evaluation.

    Returns:
        `dict`: `problems`, the text of each; `evaluations`, with `name`, `instruction`, `all` (how many rollouts there are)
        and `rows`, in which `problem` is a position in `problems`; `formulas` of [`~trl_score.report.mathematics.formulas`]; and
        the `patterns` by which it finds them.
    """
    problems, evaluations = {}, []
    for name, evaluation in found.evaluations.items():
        rows = []
        for row in evaluation.rollouts[:limit]:
            # A given attempt and the instruction after it are part of the prompt.
            problem = -1 - 2 * evaluation.settings.get("num_given_attempts", 0)
            text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][problem]["content"]
            text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)  # parts of a message
            key = (row.get("problem", text), text)
            rows.append(
                {
                    "problem": problems.setdefault(key, len(problems)),
                    "attempts": row["attempts"],
                    "feedback": row.get("feedback", []),
                    "instruction": row.get("correction_instruction", ""),
                    "correct": row["correct"],
                    "transition": transition(row),
                    "level": str(row["level"]) if row.get("level") is not None else "",
                    "id": f"{row['index']}" + (f".{row['sample']}" if evaluation.summary["num_samples"] > 1 else ""),
                }
            )
        evaluations.append(
            {"name": name, "instruction": instruction(evaluation), "rows": rows, "all": len(evaluation.rollouts)}
        )
    written = [text for each in evaluations for row in each["rows"] for text in (*row["attempts"], *row["feedback"])]
    texts = [text for _, text in problems]
    return {
        "problems": texts,
        "evaluations": evaluations,
        "formulas": formulas([*texts, *written]),
        "patterns": {"fence": FENCE, "formula": FORMULA},
    }


def transition(row: dict) -> str:
    """The first and the last attempt, right (c) or wrong (i); "?" if one was not graded."""
    if None in row["correct"]:
        return "?"
    return "→".join("c" if right else "i" for right in (row["correct"][0], row["correct"][-1]))


def write_report(
    folders: list[str | Path], output: str | Path, *, figure_dir: str | Path | None = None, max_rollouts: int = 5000
) -> Path:
    """
    Write the HTML page of evaluations, training runs and scaling studies.

    Args:
        folders (`list[str | Path]`):
            Folders of evaluations, training runs and scaling studies; see [`find`]. Models are compared with the first
            evaluation.
        output (`str`):
            File of the page.
        figure_dir (`str`, *optional*):
            Folder for the figures as PNG and SVG.
        max_rollouts (`int`, *optional*, defaults to `5000`):
            Maximum number of rollouts of each evaluation that the page shows. Tables and figures use all rollouts.

    Raises:
        `FileNotFoundError`: If a folder holds nothing to report.
        `ValueError`: If `max_rollouts` is negative.
    """
    if max_rollouts < 0:
        raise ValueError(
            f"`max_rollouts={max_rollouts}` is negative. Set it to 0 for a page without rollouts, or above."
        )
    found = find(folders)
    made = figures(found)
    if figure_dir is not None:
        folder = Path(figure_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, _, figure) in made.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
            (folder / f"{name}.svg").write_text(svg(figure), "utf-8")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(found, made, max_rollouts), "utf-8", errors="replace")
    return output


def page(found: Found, made: dict, max_rollouts: int) -> str:
    """The HTML of what was found and the figures that were made of it."""
    browser = browser_data(found, max_rollouts)
    data = json.dumps(browser, ensure_ascii=False)
    evaluations = found.evaluations
    compared, differences = difference_rows(evaluations) if evaluations else ([], [])
    level_columns, levels = level_rows(evaluations) if evaluations else ([], [])
    runs, settings = settings_rows(found)
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(asset("report.html"))
        .render(
            evaluations=evaluations,
            trained=found.trained,
            colors={name: i % len(COLORS) for i, name in enumerate(evaluations)},
            rows=metric_rows(found) if evaluations else [],
            instructions=instructions(found),
            base=next(iter(evaluations), ""),
            compared=compared,
            differences=differences,
            level_columns=level_columns,
            levels=levels,
            statistics=statistics_rows(evaluations),
            runs=runs,
            settings=settings,
            figures=[(name, title, svg_for_page(figure, name, text)) for name, (title, text, figure) in made.items()],
            css=asset("report.css"),
            js=asset("report.js"),
            mathematics=bool(browser["formulas"]),
            # Inside a script element only "<" could end it or begin a comment.
            data=data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        )
    )
