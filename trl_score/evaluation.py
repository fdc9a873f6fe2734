"""
How well a model corrects itself: `N` attempts at the problems of a task, with the rollout, the correction instruction and the
grading of training.

An evaluation is a folder: `settings.json` (a [`Job`]), `rollouts.jsonl` (one line per rollout, with all attempts) and
`summary.json` (the metrics with their intervals). One that was interrupted is completed when it is started again.
"""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from .jobs import Plan, sample_rollouts
from .metrics import bootstrap_intervals, mcnemar, metric, not_graded, self_correction_values
from .records import SUMMARY, load_rollouts
from .tasks import Task


def evaluate_self_correction(model, task: str | Task, **settings) -> "Evaluation":
    """
    Sample `num_attempts` attempts of a model at each problem of a split, and grade all of them. The random state of the process is
    restored afterwards.

    Args:
        model (`str`, `PreTrainedModel` or [`~trl_score.sampling.Sampler`]):
            Hub id or folder of a model or adapter, a model object, or a sampler.
        task (`str` or [`Task`]):
            A task, or its name.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the task to take the problems from.
        num_attempts (`int`, *optional*, defaults to `2`):
            Number of attempts in a rollout, including attempts that a task gives (offline repair). The paper uses up to 10 (Appendix
            A.3).
        temperature, top_p (`float`, *optional*, default to `0.0` and `1.0`):
            Options of decoding. Temperature 0 is greedy decoding. Other options in the checkpoint's `generation_config.json` are
            ignored.
        num_samples (`int`, *optional*, defaults to `1`):
            Number of rollouts per problem. With more than one, every metric is the mean over samples (Avg@k).
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of one attempt.
        correction_instruction (`str`, *optional*):
            The user's turn between two attempts. By default, it is the instruction that the model was trained with, which is saved
            beside the model, else the instruction of the task.
        self_refine (`bool`, *optional*, defaults to `False`):
            Whether to use Self-Refine (Madaan et al. 2023, https://huggingface.co/papers/2303.17651) instead of the correction
            instruction. After an attempt the model is asked for feedback on the attempt (`task.feedback_instruction`), and then for
            the next attempt (`task.refine_instruction`).
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template, such as `{"enable_thinking": False}`. By default, the arguments that the model was
            trained with, which are saved beside the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of rollouts that are sampled at a time. It may change when an evaluation is resumed.
        limit (`int`, *optional*):
            Number of problems to use, the first ones. It may change when an evaluation is resumed.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling. Attempts with a temperature repeat with the same seed, problems and `batch_size`.
        output_dir (`str`, *optional*):
            Folder for the results. Rollouts in this folder are reused if they have the same model, decoding, problems and grader.
            Without a folder nothing is written.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, `"vllm"` or `"endpoint"`, if `model` is a name.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, if it is not the model's own.
        data_dir (`str`, *optional*):
            Folder with the task's rows, if `task` is a name.
        **settings:
            Arguments of the backend: `quantization_config`, `dtype`, `revision`, `trust_remote_code`, `base_url`, ..

    Returns:
        [`Evaluation`].

    Raises:
        `OSError`: If the model is not available.
        `ValueError`: If a setting cannot work, or the folder holds other results.
    """
    plan = Plan.of(model, task, **settings)
    given, attempts = plan.task.num_given_attempts, plan.job.num_attempts
    if attempts <= max(given, 1):
        raise ValueError(
            f"`num_attempts={attempts}` leaves nothing to compare: '{plan.task.name}' gives {given} attempts, and a correction "
            f"needs one before it. Set it to {max(given, 1) + 1} or more."
        )
    return evaluate(plan)


def evaluate(plan: Plan) -> "Evaluation":
    """[`evaluate_self_correction`] of a plan."""
    job, store = sample_rollouts(plan)
    evaluation = Evaluation(asdict(job), store.all_rollouts())
    store.write(SUMMARY, evaluation.settings | evaluation.summary)
    return evaluation


@dataclass
class Evaluation:
    """
    The result of an evaluation.

    Attributes:
        settings (`dict`):
            The settings of the evaluation: the fields of [`Job`].
        rollouts (`list[dict]`):
            One dictionary per rollout, ordered by problem and sample: `index`, `sample`, `prompt`, `attempts` (text), `rewards`,
            `correct`, `answers`, `num_tokens`, `truncated`, `edit_distance_ratio`, `changed_answer`, `problem` (a fingerprint of the
            row), and `level` and `subject` if the task has them. In Self-Refine also `feedback` (text) and `feedback_num_tokens`, for
            the feedback between the attempts.
        summary (`dict`):
            `metrics`: name to `{value, low, high}`, with 95 % bootstrap intervals over problems; `by_level`; `mcnemar_p`.
    """

    settings: dict
    rollouts: list[dict]
    summary: dict = field(default_factory=dict)

    def __post_init__(self):
        self.summary = self.summary or summarize(self.rollouts)

    @property
    def mode(self) -> str:
        """What a table says after the model's name."""
        return ", Self-Refine" if self.settings.get("self_refine") else ""

    def __str__(self) -> str:
        return table([self])


def load_evaluation(folder: str | Path) -> Evaluation:
    """
    Read an evaluation from its folder.

    Raises:
        `FileNotFoundError`: If the folder holds none.
    """
    return Evaluation(*load_rollouts(folder))


def summarize(rollouts: list[dict]) -> dict:
    """
    The metrics of Section 3 and others, with 95 % bootstrap intervals over problems.

    Args:
        rollouts (`list[dict]`):
            See [`Evaluation`].

    Returns:
        `dict`: `metrics`, `by_level` (the accuracies), `mcnemar_p` (of the last attempt against the first; `None` with
        several samples per problem, which are not independent), `num_problems`, `num_samples`, `num_ungraded`. Shares are from
        0 to 1; a number that has no value is `None`.
    """
    graded = [row for row in rollouts if None not in row["correct"]]
    samples = max(Counter(row["index"] for row in rollouts).values(), default=0)
    by_level = defaultdict(list)
    for row in graded:
        if row.get("level") is not None:
            by_level[row["level"]].append(row)
    return {
        "metrics": _metrics(graded),
        "by_level": {
            str(level): {
                "num_problems": len({row["index"] for row in by_level[level]}),
                **_metrics(by_level[level], "accuracy"),
            }
            for level in sorted(by_level)
        },
        "mcnemar_p": mcnemar([row["correct"][0] for row in graded], [row["correct"][-1] for row in graded])
        if samples == 1 and graded
        else None,
        "num_problems": len({row["index"] for row in rollouts}),
        "num_samples": samples,
        "num_ungraded": len(rollouts) - len(graded),
    }


def _metrics(rollouts: list[dict], only: str = "") -> dict[str, dict[str, float | None]]:
    if not rollouts:
        return {}
    correct = torch.tensor([row["correct"] for row in rollouts], dtype=torch.float64)  # (B, K)
    values = {name: value.numpy() for name, value in self_correction_values(correct).items()}
    weights = {}  # of a ratio of two sums; a mean over rollouts has none
    if correct.size(1) > 1:
        values["correction_rate"] = values["delta_i_to_c"]
        weights["correction_rate"] = 1 - values["accuracy_t1"]  # of those that were wrong
        values["edit_distance_ratio"] = np.array([np.mean(row["edit_distance_ratio"]) for row in rollouts])
        values["changed_answers"] = np.array([row["changed_answer"] for row in rollouts], float)
    for k in range(correct.size(1)):
        counted = all(row["num_tokens"][k] is not None for row in rollouts)
        truncated = ["truncated" in row and row["truncated"][k] for row in rollouts]
        if counted or any(truncated):  # an endpoint may count no tokens and say all the same what was cut off
            values[f"truncated_t{k + 1}"] = np.array(truncated, float)
        if counted:
            values[f"num_tokens_t{k + 1}"] = np.array([row["num_tokens"][k] for row in rollouts], float)
    values = {name: value for name, value in values.items() if name.startswith(only)}
    # Mean over the samples of each problem, (P, M).
    _, problem, samples = np.unique([row["index"] for row in rollouts], return_inverse=True, return_counts=True)
    ones = np.ones(len(rollouts))
    numerators, denominators = (
        np.stack([np.bincount(problem, column) / samples for column in columns], axis=1)
        for columns in (values.values(), [weights.get(name, ones) for name in values])
    )
    low, high = bootstrap_intervals(numerators, denominators)
    with np.errstate(invalid="ignore"):
        mean = numerators.sum(axis=0) / denominators.sum(axis=0)
    return {
        name: {
            key: float(number) if np.isfinite(number) else None
            for key, number in (("value", mean[i]), ("low", low[i]), ("high", high[i]))
        }
        for i, name in enumerate(values)
    }


def table(evaluations: list[Evaluation]) -> str:
    """Evaluations side by side as a table in Markdown, with 95 % intervals, number of problems and decoding."""
    names = dict.fromkeys(name for each in evaluations for name in each.summary["metrics"])
    names = [name for name in names if not name.startswith("num_tokens")]
    lines = [
        "| | " + " | ".join(f"{evaluation.settings['model']}{evaluation.mode}" for evaluation in evaluations) + " |"
    ]
    lines.append("|---|" + "---:|" * len(evaluations))
    for name in names:
        cells = [metric(name).cell(evaluation.summary["metrics"].get(name)) for evaluation in evaluations]
        lines.append(f"| {metric(name).label} | " + " | ".join(cells) + " |")
    for name, text in (
        ("p (exact McNemar test, last against first)", _p),
        ("problems x samples", _size),
        ("decoding", _decoding),
    ):
        lines.append(f"| {name} | " + " | ".join(map(text, evaluations)) + " |")
    return "\n".join(
        [*lines, "", "Percent, but the edit-distance ratio, which is from 0 to 1. In brackets: 95 % intervals."]
    )


def _p(evaluation: Evaluation) -> str:
    p = evaluation.summary["mcnemar_p"]
    return "" if p is None else f"{p:.2g}"


def _size(evaluation: Evaluation) -> str:
    return f"{evaluation.summary['num_problems']} x {evaluation.summary['num_samples']}{left_out(evaluation)}"


def left_out(evaluation: Evaluation) -> str:
    """How many rollouts could not be graded, in brackets; nothing if all could."""
    return not_graded(evaluation.summary.get("num_ungraded", 0))


def _decoding(evaluation: Evaluation) -> str:
    temperature = evaluation.settings["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    if evaluation.settings["top_p"] != 1:
        how += f", top-p {evaluation.settings['top_p']:g}"
    return f"{how}, {evaluation.settings['max_completion_length']} tokens"
