"""Writes options.md from the docstring of `SCoReConfig`: `python docs/make_options.py`. A test compares the page with what this makes."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from trl import GRPOConfig

from trl_score import SCoReConfig


PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

This page is for readers who ask: what can I set, what did the paper use, and does it matter? `SCoReConfig` is a
[`GRPOConfig`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig), so TRL's options work too. The page has the fields that
SCoRe adds, and the fields of TRL whose default SCoRe changes. `docs/make_options.py` writes the page from the docstring.

"Measured" is the difference in Accuracy@t2 to the recipe on the embedded task, in points, with five seeds and a 95 % interval
([results.md](results.md)).
"""
PAPER = {  # Appendix B: MATH, MBPP
    "num_attempts": "2; 3 in Appendix A.1",
    "correction_instruction": "Appendix C, one for MATH and one for code",
    "offline_first_attempts": "mixed in, share not given (Section 5.3)",
    "stage1_steps": "not given",
    "alpha": "10",
    "gamma": "0",
    "beta": "0.01",
    "stage1_beta": "0.1 for MATH, 0.25 for MBPP",
    "adaptive_stage1_beta": "optional, formula not given (Section 5.3)",
    "kl_level": "Eq. 2 is `sequence`",
    "eval_temperature": "0",
    "num_generations_eval": "1",
    "num_attempts_eval": "2; up to 10 in Appendix A.3",
    "learning_rate": "5e-6 for MATH, 1e-5 for MBPP",
    "lr_scheduler_type": "fixed",
    "scale_rewards": "none (RLOO)",
}
MEASURED = {
    "num_attempts": "1 (single-attempt RL): −30.2 [−33.3, −27.4]",
    "offline_first_attempts": "0.5: −1.0 [−3.0, 0.1], with 21 % fewer tokens; 1: −2.7 [−5.5, −0.7], and first attempts are lost",
    "stage1_steps": "0 (no Stage I): −17.0 [−21.4, −13.4]",
    "alpha": "0 (no bonus): −14.3 [−16.7, −12.0]",
    "gamma": "0.8 with `alpha=1`: −14.8 [−17.1, −12.5]; 1: −17.1 [−21.9, −13.3]",
    "adaptive_stage1_beta": "True: −1.5 [−3.4, 0.1]",
    "kl_level": "`sequence`: −0.1 [−0.5, 0.2]",
    "reuse_cache": "speed only ([performance.md](performance.md))",
}


def documented() -> dict[str, list[tuple[str, str]]]:
    """By group, the fields in the order of the docstring, each with its description."""
    text = inspect.getdoc(SCoReConfig).partition("Parameters:")[2]
    groups = {}
    for group in re.split(r"\n +> ", text)[1:]:
        heading, _, rest = group.partition("\n")
        found = re.findall(r"^ {4}(\w+) \(.*?\):\n((?:(?: {8}.*)?\n)+)", rest.rstrip(" ") + "\n", re.M)
        groups[heading.strip()] = [(name, " ".join(body.split())) for name, body in found]
    return groups


def page() -> str:
    default = {field.name: field.default for field in fields(SCoReConfig)}
    parts = [HEAD]
    for heading, found in documented().items():
        parts.append(f"## {heading}\n")
        for name, text in found:
            shown = f"default `{default[name]!r}`"
            lines = [f"### `{name}`\n", f"{text}\n", f"- {shown[0].upper()}{shown[1:]}"]
            lines += [f"- Paper: {PAPER[name]}"] if name in PAPER else []
            lines += [f"- Measured: {MEASURED[name]}"] if name in MEASURED else []
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def own_fields() -> set[str]:
    """The fields that SCoRe adds, or whose default it changes."""
    inherited = {field.name: field.default for field in fields(GRPOConfig)}
    return {field.name for field in fields(SCoReConfig) if inherited.get(field.name, object) != field.default}


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
