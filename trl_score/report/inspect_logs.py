"""
Evaluations as logs of Inspect (https://inspect.aisi.org.uk), for its viewer and its data frames. It needs
`pip install trl-score[inspect]`.
"""

import re
from datetime import UTC, datetime
from pathlib import Path

from ..evaluation import Evaluation
from .folders import find
from .page import transition


def write_inspect_logs(folders: list[str | Path], output_dir: str | Path) -> list[Path]:
    """
    Write each evaluation as a log: a rollout is a sample with the whole dialogue, an attempt is a score with its verdict and
    answer, and the metrics are those of the report. A log of the same evaluation is written over.

    Args:
        folders (`list[str | Path]`):
            Folders of evaluations; see [`~trl_score.report.find`]. Training runs and scaling studies in them are left out.
        output_dir (`str`):
            Folder for the logs, one `.eval` file each. `inspect view --log-dir` shows it.

    Returns:
        `list[Path]`: the files.

    Raises:
        `FileNotFoundError`: If there is no evaluation in the folders.
        `ImportError`: If Inspect is not installed.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise ImportError("`--format inspect` needs Inspect. Install it: pip install 'trl-score[inspect]'.") from error
    evaluations = find(folders).evaluations
    if not evaluations:
        raise FileNotFoundError("These folders hold no evaluation. Logs for Inspect are written only for evaluations.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for name, evaluation in evaluations.items():
        files.append(output_dir / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')}.eval")
        if files[-1] in files[:-1]:
            files[-1] = files[-1].with_stem(f"{files[-1].stem}-{len(files)}")
        write_eval_log(inspect_log(name, evaluation), str(files[-1]))
    return files


def inspect_log(name: str, evaluation: Evaluation):
    """An evaluation as an `inspect_ai.log.EvalLog`."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats
    from inspect_ai.model import GenerateConfig

    settings, summary = evaluation.settings, evaluation.summary
    planned = settings.get("num_problems", summary["num_problems"]) * settings["num_samples"]
    done, now = len(evaluation.rollouts), datetime.now(UTC).isoformat(timespec="seconds")
    return EvalLog(
        status="success" if done >= planned else "cancelled",
        eval=EvalSpec(
            created=now,
            task=settings["task"],
            task_display_name=name,
            dataset=EvalDataset(name=settings["task"], location=settings["split"], samples=summary["num_problems"]),
            model=Path(settings["model"]).name,
            model_generate_config=GenerateConfig(
                temperature=settings["temperature"],
                top_p=settings["top_p"],
                max_tokens=settings["max_completion_length"],
                seed=settings.get("seed"),
            ),
            config=EvalConfig(epochs=settings["num_samples"]),
            packages=settings.get("versions", {}),
            metadata={
                key: settings.get(key)
                for key in ("split", "num_attempts", "correction_instruction", "self_refine", "weights", "backend")
            },
        ),
        stats=EvalStats(started_at=now, completed_at=now),
        results=EvalResults(total_samples=planned, completed_samples=done, scores=_results(evaluation)),
        samples=[_sample(row, settings) for row in evaluation.rollouts],
    )


def _results(evaluation: Evaluation) -> list:
    """One score for each attempt with its accuracy, and one with the changes between the attempts."""
    from inspect_ai.log import EvalMetric, EvalScore

    found = {metric: entry for metric, entry in evaluation.summary["metrics"].items() if entry["value"] is not None}
    scores = []
    for metric, entry in found.items():
        if metric.startswith("accuracy_t"):
            limits = {key: EvalMetric(name=key, value=entry[key]) for key in ("low", "high") if entry[key] is not None}
            accuracy = EvalMetric(name="accuracy", value=entry["value"])
            name = f"attempt_{metric.removeprefix('accuracy_t')}"
            scores.append(EvalScore(name=name, scorer=name, metrics={"accuracy": accuracy, **limits}))
    others = {
        metric: EvalMetric(name=metric, value=entry["value"])
        for metric, entry in found.items()
        if not metric.startswith("accuracy_t")
    }
    return [*scores, EvalScore(name="self_correction", scorer="self_correction", metrics=others)]


def _sample(row: dict, settings: dict):
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    messages = dialogue(row, settings)
    answers = row.get("answers") or [None] * len(row["attempts"])
    return EvalSample(
        id=row["index"],
        epoch=row["sample"] + 1,
        input=row["prompt"] if isinstance(row["prompt"], str) else messages[: len(row["prompt"])],
        target="",
        messages=messages,
        output=ModelOutput.from_content(Path(settings["model"]).name, row["attempts"][-1]),
        scores={
            f"attempt_{k}": Score(value=int(right), answer=answer)
            for k, (right, answer) in enumerate(zip(row["correct"], answers, strict=True), start=1)
            if right is not None
        },
        metadata={
            "transition": transition(row),
            **{key: row[key] for key in ("level", "subject", "num_tokens", "truncated") if key in row},
        },
    )


def dialogue(row: dict, settings: dict) -> list:
    """The messages of a rollout: the problem, the attempts, and what was said between them."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    messages = [kinds[turn["role"]](content=turn["content"]) for turn in prompt]
    given = settings.get("num_given_attempts", 0)  # they are in the prompt, which ends with the first instruction
    for k, attempt in enumerate(row["attempts"][given:], start=given):
        if k > given:
            if settings.get("self_refine"):
                messages.append(ChatMessageUser(content=settings["feedback_instruction"]))
                messages.append(ChatMessageAssistant(content=row["feedback"][k - 1 - given]))
                messages.append(ChatMessageUser(content=settings["refine_instruction"]))
            else:
                said = row.get("correction_instruction") or settings["correction_instruction"]
                messages.append(ChatMessageUser(content=said))
        messages.append(ChatMessageAssistant(content=attempt))
    return messages
