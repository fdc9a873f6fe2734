"""
Collecting rollouts of a model on training problems: for the baselines that fine-tune, and as stored first attempts (Section
5.3). A collection is a folder as an evaluation's, with the attempts' tokens.
"""

import logging
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .fingerprints import of_tokenizer
from .jobs import Plan, sample_rollouts
from .metrics import metric
from .records import load_rollouts
from .tasks import Task


logger = logging.getLogger(__name__)


def collect(
    model,
    task: str | Task,
    *,
    split: str = "train",
    num_attempts: int = 2,
    num_samples: int = 8,
    temperature: float = 1.0,
    **settings,
) -> list[dict]:
    """
    Sample and grade rollouts, with the rollout of training. Under `accelerate launch` the processes share the work.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split of the task to take the problems from.
        num_attempts (`int`, *optional*, defaults to `2`):
            Number of attempts in a rollout. With 1 only first attempts are sampled.
        num_samples (`int`, *optional*, defaults to `8`):
            Number of rollouts per problem.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. The default is the temperature of the paper's training.
        model, task, **settings:
            These and the other arguments are described for [`~trl_score.evaluation.evaluate_self_correction`].

    Returns:
        `list[dict]`: the rollouts, as in [`~trl_score.evaluation.Evaluation`], with the `token_ids` of each attempt (`None` from a
        chat endpoint, which does not return tokens).

    Raises:
        `ValueError`: If a setting cannot work, or the folder holds something else.
    """
    own = {"split": split, "num_attempts": num_attempts, "num_samples": num_samples, "temperature": temperature}
    plan = Plan.of(model, task, token_ids=True, **own, **settings)
    plan = replace(plan, one_instruction=settings.get("correction_instruction") is not None)
    if plan.task.num_given_attempts:
        raise ValueError(
            f"'{plan.task.name}' gives the first attempts: it is for evaluation. Collect on another task."
        )
    _, store = sample_rollouts(plan)
    return store.all_rollouts()


def describe(rollouts: list[dict]) -> str:
    """What was collected, in a line."""
    graded = [row["correct"] for row in rollouts if None not in row["correct"]]
    parts = [f"{len(rollouts)} rollouts at {len({row['index'] for row in rollouts})} problems"]
    if graded:
        parts += [
            f"{shown.label} {shown.cell(sum(row[k] for row in graded) / len(graded))} %"
            for k in range(len(graded[0]))
            for shown in [metric(f"accuracy_t{k + 1}")]
        ]
    return ", ".join(parts)


def with_first_attempts(
    dataset: Dataset,
    folder: str | Path,
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """
    Add the column `first_attempts` to problems: the first attempts of a collection, as token ids.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems of the split that was collected on, in the same order. They can be fewer than all: then the first problems.
        folder (`str`):
            The folder that [`collect`] wrote.
        task ([`~trl_score.tasks.Task`], *optional*):
            The task of the problems. If given, it is compared with the task of the collection.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the model to be trained. If given, it is compared with the tokenizer of the collection.

    Raises:
        `FileNotFoundError`: If the folder holds no collection.
        `ValueError`: If the collection is of other problems or of another tokenizer, or lacks some of the problems.
    """
    settings, rollouts = load_rollouts(folder)
    if not settings.get("token_ids"):
        raise ValueError(
            f"'{folder}' holds an evaluation, which keeps no tokens. Sample first attempts with `trl-score collect`."
        )
    if tokenizer is not None:
        _check_tokenizer(folder, settings, rollouts, tokenizer)
    # The name of a file of problems may have another path.
    is_other = task is not None and task.name != settings["task"] and task.grader != settings.get("grader")
    attempts = [[] for _ in dataset]
    for row in rollouts:
        if row["index"] < len(attempts):
            if row["prompt"] != dataset[row["index"]]["prompt"] or is_other:
                raise ValueError(
                    f"'{folder}' holds attempts at other problems (task '{settings['task']}', split "
                    f"'{settings['split']}'). Collect on the problems that are trained on."
                )
            attempts[row["index"]].append(row["attempts"][0] if row["token_ids"][0] is None else row["token_ids"][0])
    if missing := sum(not row for row in attempts):
        raise ValueError(
            f"'{folder}' has no first attempts of {missing} of the {len(attempts)} problems. Finish the collection, or train "
            "on the first problems alone (`num_train_problems`)."
        )
    return dataset.add_column("first_attempts", attempts)


def _check_tokenizer(folder: str | Path, settings: dict, rollouts: list[dict], tokenizer) -> None:
    if all(row["token_ids"][0] is None for row in rollouts):
        return  # texts, of an endpoint
    if settings.get("tokenizer") is None:
        logger.warning(
            f"'{folder}' does not say which tokenizer made its token ids, so they are used unchecked. Make sure that it is the "
            "tokenizer of the model to be trained, or collect again."
        )
    elif settings["tokenizer"]["vocabulary"] != of_tokenizer(tokenizer)["vocabulary"]:
        raise ValueError(
            f"'{folder}' holds token ids of another tokenizer, the one of '{settings['model']}': the model to be trained would read them "
            "as other words. Collect with a model that has the same tokenizer."
        )
