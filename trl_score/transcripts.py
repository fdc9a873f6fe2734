"""Rollouts as dialogues, for the console: what `log_completions` shows."""

import math
import textwrap

from .batch import Batch
from .tasks.base import text_of


WIDTH = 80
SHOWN = 4  # rollouts, if nobody says how many


def transcript(batch: Batch, prompts: list, step: int, number: int | None = None) -> str:
    """
    The first rollouts of a batch as text of 80 columns: problem, attempt, instruction, attempt, with each attempt's verdict and
    reward.

    Args:
        batch ([`~trl_score.batch.Batch`]):
            Rollouts of this process, graded.
        prompts (`list`):
            Their `B` prompts, `None` for a rollout that is not shown.
        step (`int`):
            The optimizer step.
        number (`int`, *optional*, defaults to `4`):
            Rollouts to show. Of one problem there are several, so one is taken from each as far as possible.
    """
    rows = sorted(
        (row for row, prompt in enumerate(prompts) if prompt is not None),
        key=lambda row: (row % batch.num_generations, row),
    )
    lines = []
    for row in rows[: SHOWN if number is None else number]:
        lines += ["", f"step {step}, stage {batch.stage.number}, rollout {row} ".ljust(WIDTH, "-")]
        lines += _turn("problem", text_of(prompts[row]))
        for k, completions in enumerate(batch.completions):
            if k:
                lines += _turn("instruction", batch.instructions[row])
            reward = batch.rewards[k][row].tolist()
            lines += _turn(
                f"attempt {k + 1}", text_of(completions[row]), f"{_verdict(reward[0])}, reward {_rounded(reward)}"
            )
    return "\n".join(lines)


def _turn(title: str, text: str, note: str = "") -> list[str]:
    head = [f"{title}: {note}" if note else f"{title}:"]
    paragraphs = [
        textwrap.wrap(line, WIDTH - 2, replace_whitespace=False) or [""] for line in text.strip().split("\n")
    ]
    return head + [f"  {line}".rstrip() for paragraph in paragraphs for line in paragraph]


def _verdict(reward: float) -> str:
    return "not graded" if math.isnan(reward) else "right" if reward >= 1 else "wrong"


def _rounded(rewards: list[float]) -> str:
    return " + ".join("none" if math.isnan(each) else f"{each:.2f}".rstrip("0").rstrip(".") for each in rewards)
