"""
Collecting rollouts of a model on training problems: for the baselines that fine-tune, and as stored first attempts (Section
5.3). A collection is a folder as an evaluation's, with the attempts' tokens.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from datasets import Dataset

from .evaluation import Store, load_rollouts, run
from .metrics import label
from .sampling import BACKENDS, Decoding, as_sampler, name_of
from .tasks import Task, get_task
from .tasks.base import first


def collect(
    model,
    task: str | Task,
    *,
    output_dir: str | Path | None = None,
    split: str = "train",
    num_attempts: int = 2,
    num_samples: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_completion_length: int = 1024,
    correction_instruction: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 42,
    backend: str = "transformers",
    tokenizer=None,
    data_dir: str | None = None,
    **kwargs,
) -> list[dict]:
    """
    Sample and grade rollouts, with the rollout of training. Under `accelerate launch` the processes share the work.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Which problems.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout; 1 for first attempts alone.
        num_samples (`int`, *optional*, defaults to `8`):
            Rollouts per problem.
        temperature (`float`, *optional*, defaults to `1.0`):
            As in the paper's training.
        output_dir (`str`, *optional*):
            Folder for the rollouts. One that was started with the same settings is finished.
        model, task, **kwargs:
            And the other arguments as for [`~trl_score.evaluation.evaluate_self_correction`].

    Returns:
        `list[dict]`: by problem and sample, as [`~trl_score.evaluation.Evaluation`]'s `rollouts`, and `token_ids` of each
        attempt (`None` from a chat endpoint, which does not say).

    Raises:
        `ValueError`: If a setting cannot work, or the folder holds something else.
    """
    if isinstance(task, str):
        task = get_task(task, data_dir=data_dir)
    if task.num_given_attempts:
        raise ValueError(f"'{task.name}' gives the first attempts: it is for evaluation. Collect on another task.")
    if num_attempts < 1 or num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ValueError(
            f"`num_attempts={num_attempts}`, `num_samples={num_samples}` and `temperature={temperature}`: set the first two to "
            "1 or more, and the last above 0 for more than one sample, as greedy ones are all the same."
        )
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Expected one of: {sorted(BACKENDS)}.")
    rows = first(task.load(split), limit)
    instruction = correction_instruction or task.correction_instruction
    decoding = Decoding(temperature, top_p, max_completion_length)
    settings = {
        "model": name_of(model),
        "task": task.name,
        "split": split,
        "num_problems": len(rows),
        "num_attempts": num_attempts,
        "num_samples": num_samples,
        **asdict(decoding),
        "correction_instruction": instruction,
        "batch_size": batch_size,
        "seed": seed,
        "token_ids": True,
    }
    store = Store(output_dir, settings)
    make_sampler = partial(as_sampler, model, backend, tokenizer, **kwargs)
    run(make_sampler, task, rows, num_samples, store, [instruction], num_attempts, decoding, batch_size, seed)
    return store.all_rollouts()


def describe(rollouts: list[dict]) -> str:
    """What was collected, in a line."""
    graded = [row["correct"] for row in rollouts if None not in row["correct"]]
    parts = [f"{len(rollouts)} rollouts at {len({row['index'] for row in rollouts})} problems"]
    if graded:
        parts += [
            f"{label(f'accuracy_t{k + 1}')} {100 * sum(row[k] for row in graded) / len(graded):.1f} %"
            for k in range(len(graded[0]))
        ]
    return ", ".join(parts)


def with_first_attempts(dataset: Dataset, folder: str | Path, task: Task | None = None) -> Dataset:
    """
    Problems with the column `first_attempts`: the first attempts of a collection, in tokens.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems of the split that was collected on, in its order; the first ones, if not all.
        folder (`str`):
            Of [`collect`].
        task ([`~trl_score.tasks.Task`], *optional*):
            Their task, to be compared with the collection's.

    Raises:
        `FileNotFoundError`: If the folder holds no collection.
        `ValueError`: If it is of other problems, or does not have all of them.
    """
    settings, rollouts = load_rollouts(folder)
    attempts = [[] for _ in dataset]
    for row in rollouts:
        if row["index"] < len(attempts):
            if row["prompt"] != dataset[row["index"]]["prompt"] or (task and task.name != settings["task"]):
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
