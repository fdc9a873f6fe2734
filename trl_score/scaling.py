"""
Inference-compute scaling (Section 6.2): at the same number of samples, is it better to vote over first attempts, or to
correct half as many and vote over the corrections?
"""

from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from .evaluation import evaluate
from .jobs import Plan, sample_rollouts
from .metrics import bootstrap_intervals, metric
from .records import processes, write_json
from .tasks import Task


SCALING = "scaling.json"
ARMS = ("corrected", "parallel")  # folders of its rollouts


def majority(clusters: list[int | None]) -> int | None:
    """
    Position of the answer that wins a vote: the first sample of the largest cluster, of the earlier one in a tie; `None` if
    nobody gave an answer.

    Args:
        clusters (`list[int | None]`):
            The cluster of each sample's answer; `None` for a sample without one.

    Example:
    ```python
    >>> majority([3, 5, None, 5])
    1
    ```
    """
    counts = defaultdict(int)
    for cluster in clusters:
        if cluster is not None:
            counts[cluster] += 1
    if not counts:
        return None
    most = max(counts.values())
    return next(i for i, cluster in enumerate(clusters) if cluster is not None and counts[cluster] == most)


def cluster(task: Task, answers: dict[int, list[str | None]]) -> dict[int, list[int | None]]:
    """
    Answers that mean the same, by the task.

    Args:
        task ([`Task`]):
            Its [`Task.same_answers`] decides.
        answers (`dict[int, list[str | None]]`):
            By problem, the answers of its samples.

    Returns:
        `dict[int, list[int | None]]`: by problem, the cluster of each answer; `None` for none.
    """
    distinct = {
        index: list(dict.fromkeys(answer for answer in row if answer is not None)) for index, row in answers.items()
    }
    pairs = [(index, one, other) for index, row in distinct.items() for one, other in combinations(range(len(row)), 2)]
    same = task.same_answers([distinct[i][one] for i, one, _ in pairs], [distinct[i][other] for i, _, other in pairs])
    parent = {index: list(range(len(row))) for index, row in distinct.items()}
    for (index, one, other), equal in zip(pairs, same, strict=True):
        if equal:
            row = parent[index]
            row[:] = [row[one] if each == row[other] else each for each in row]
    number = {index: dict(zip(row, parent[index], strict=True)) for index, row in distinct.items()}
    return {index: [number[index].get(answer) for answer in row] for index, row in answers.items()}


def vote(clusters: list[int | None], correct: list[bool | None], size: int) -> float:
    """
    Mean accuracy of the vote over disjoint groups of `size` samples. An ungraded sample does not vote, and a group in which no
    sample is graded is left out.

    Args:
        clusters (`list[int | None]`):
            The cluster of each sample's answer; `None` for a sample without one.
        correct (`list[bool | None]`):
            Whether each sample is right; `None` if it is ungraded.
        size (`int`):
            Samples of a group.

    Returns:
        `float`: NaN if no sample is graded.
    """
    voters = [None if right is None else each for each, right in zip(clusters, correct, strict=True)]
    found = []
    for start in range(0, len(voters) - size + 1, size):
        if any(right is not None for right in correct[start : start + size]):
            winner = majority(voters[start : start + size])
            found.append(winner is not None and correct[start + winner])
    return float(np.mean(found)) if found else float("nan")


def inference_scaling(
    model, task: str | Task, *, output_dir: str | Path, max_budget: int = 64, temperature: float = 0.7, **settings
) -> list[dict]:
    """
    Compare two majority votes at budgets of 2, 4, .. samples per problem: a vote over that many first attempts, and a vote over half
    as many second attempts, each with its own first attempt. All budgets use the samples of the largest budget. The value of a
    smaller budget is the mean over disjoint groups of these samples.

    Attempts that the reward left ungraded (`None`) do not vote. A problem is left out of both votes, at all budgets, if none of
    its first attempts or none of its second attempts is graded.

    Args:
        max_budget (`int`, *optional*, defaults to `64`):
            Largest number of samples per problem, a power of 2.
        output_dir (`str`):
            Folder for the rollouts (`corrected/`, `parallel/`) and `scaling.json`. Rollouts in this folder are reused if they have the
            same model, decoding, problems and grader.
        model, task, **settings:
            These and the other arguments are described for [`~trl_score.evaluation.evaluate_self_correction`].

    Returns:
        `list[dict]`: for each budget `budget`, `parallel` and `corrected`, each with `value`, `low` and `high` (accuracy and
        its 95 % bootstrap interval over problems). NaN if no problem is left.

    Raises:
        `ValueError`: If a setting cannot work, or the folder holds something else.
    """
    if max_budget < 2 or max_budget & (max_budget - 1):
        raise ValueError(f"`max_budget={max_budget}` is no power of 2. Set it to 2, 4, .. 64.")
    if temperature <= 0:
        raise ValueError(
            f"`temperature={temperature}`: a vote needs samples that differ. Set it above 0; the paper uses 0.7."
        )
    folder = Path(output_dir)
    own = {"num_attempts": 2, "num_samples": max_budget // 2, "temperature": temperature}
    plan = Plan.of(model, task, output_dir=folder / "corrected", **own, **settings)
    task, job = plan.task, plan.job
    if task.num_given_attempts:
        raise ValueError(f"'{task.name}' gives the first attempts, so there is nothing to vote over in parallel.")
    corrected = evaluate(plan)
    parallel = replace(job, num_attempts=1, seed=job.seed + 1)
    _, others = sample_rollouts(replace(plan, job=parallel, output_dir=folder / "parallel"))
    result = votes(task, corrected.rollouts, others.all_rollouts(), max_budget)
    if processes().is_main_process:
        write_json(folder / SCALING, {"settings": corrected.settings, "budgets": result})
    return result


def table(budgets: list[dict]) -> str:
    """The result of [`inference_scaling`] in Markdown, in percent."""
    lines = [
        "| samples per problem | vote over first attempts | vote over corrected attempts |",
        "|---:|---:|---:|",
    ]
    for row in budgets:
        cells = [metric("accuracy").cell(row[kind]) for kind in ("parallel", "corrected")]
        lines.append(f"| {row['budget']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Accuracy of the vote in percent. In brackets: 95 % intervals over problems."])


def votes(task: Task, corrected: list[dict], parallel: list[dict], max_budget: int) -> list[dict]:
    """The accuracies of [`inference_scaling`], from rollouts of two attempts and of one."""
    answers = {"parallel": defaultdict(list), "corrected": defaultdict(list)}
    verdicts = {"parallel": defaultdict(list), "corrected": defaultdict(list)}
    for row in [*corrected, *parallel]:
        answers["parallel"][row["index"]].append(row["answers"][0])
        verdicts["parallel"][row["index"]].append(row["correct"][0])
    for row in corrected:
        answers["corrected"][row["index"]].append(row["answers"][-1])
        verdicts["corrected"][row["index"]].append(row["correct"][-1])
    graded = {
        kind: {index for index, row in verdicts[kind].items() if any(right is not None for right in row)}
        for kind in verdicts
    }
    problems = sorted(graded["parallel"] & graded["corrected"])
    clusters = {kind: cluster(task, answers[kind]) for kind in answers}
    result, budget = [], 2
    while budget <= max_budget:
        entry = {"budget": budget}
        for kind, size in (("parallel", budget), ("corrected", budget // 2)):
            values = np.array([vote(clusters[kind][i], verdicts[kind][i], size) for i in problems])
            low, high = bootstrap_intervals(values)
            entry[kind] = {
                "value": float(values.mean()) if problems else float("nan"),
                "low": float(low),
                "high": float(high),
            }
        result.append(entry)
        budget *= 2
    return result
