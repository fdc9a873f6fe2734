"""
What the grader of mathematics accepts, against labels of others and against answers that only repeat the problem:

    python tests/benchmarks/math_policy.py

Needs `TRL_SCORE_DATA`. Attempts: 2,102 by seven models with published labels, graded with and without their problems. Repeated
formulas: those in the statements of 1,500 problems of MATH, each given as the answer to its own problem.
"""

import gzip
import json
import os
import random
import re
from pathlib import Path

from trl_score.tasks import MathTask
from trl_score.tasks.math_grading import extract_answer


DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[3] / "shared" / "data"))
FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\[(.+?)\\\]", re.DOTALL)
SIDES = re.compile(r"=|<|>|\\le|\\ge|,")


def rows(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def attempts(task: MathTask) -> None:
    problems = {row["unique_id"]: row["problem"] for name in ("math/train", "math/math500") for row in rows(name)}
    problems |= {row["id"]: row["question"] for name in ("gsm8k/train", "gsm8k/test") for row in rows(name)}
    labelled = [row for row in rows("generations/math_generations") if row["label"] is not None]
    texts, golds = [row["completion"] for row in labelled], [row["gold"] for row in labelled]
    for what, given in (
        ("without problems", None),
        ("with problems", [problems[row["problem_id"]] for row in labelled]),
    ):
        verdicts = list(zip(labelled, task.grade(texts, golds, given), strict=True))
        agree = sum(verdict == row["label"] for row, verdict in verdicts)
        accepted = [row["id"] for row, verdict in verdicts if verdict and not row["label"]]
        withheld = [row for row, verdict in verdicts if row["label"] and not verdict]
        print(f"{what}: {agree} of {len(labelled)} agree ({agree / len(labelled):.2%})")
        print(f"  accepted against the label: {len(accepted)} ({', '.join(accepted)})")
        print(f"  withheld against the label: {len(withheld)}")
        for row in withheld:
            print(f"    {row['id']}: {'states' if extract_answer(row['completion']) else 'does not state'} an answer")


def repeated(task: MathTask) -> None:
    chosen = rows("math/train")
    random.Random(0).shuffle(chosen)
    jobs = []
    for row in (row for row in chosen[:1500] if row["answer"]):
        found = dict.fromkeys(
            part.strip(" .,\n")
            for groups in FORMULA.findall(row["problem"])
            for part in [max(groups), *SIDES.split(max(groups))]
        )
        jobs += [
            (row, part)
            for part in found
            if len(part) < 200
            and re.search(r"\d|\\frac|\\sqrt|[a-z]\s*[-+^(]", part)
            and not re.fullmatch(r"[-\d.,\s]+|[a-zA-Z]", part)
        ]
    texts, golds = [rf"\boxed{{{part}}}" for _, part in jobs], [row["answer"] for row, _ in jobs]
    print(
        f"formulas of {len({row['unique_id'] for row, _ in jobs})} statements as answers to their problems: {len(jobs)}"
    )
    for what, given in (("without problems", None), ("with problems", [row["problem"] for row, _ in jobs])):
        verdicts = task.grade(texts, golds, given)
        right = {row["unique_id"] for (row, _), verdict in zip(jobs, verdicts, strict=True) if verdict}
        print(f"  {what}: {sum(verdicts)} accepted, in {len(right)} problems")


def main() -> None:
    task = MathTask()
    attempts(task)
    repeated(task)
    task.close()


if __name__ == "__main__":
    main()
