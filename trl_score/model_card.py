"""The card of a trained model: TRL's, with how SCoRe trained it, what was measured, and how to use it as trained."""

import functools
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from jinja2 import Template

from ._version import __version__
from .metrics import bootstrap_intervals, label, metric


if TYPE_CHECKING:
    from .score_trainer import SCoReTrainer

FIGURE = "images/training.png"
OPTIONS = ("adaptive_stage1_beta", "kl_level")  # shown where not the default


def measured(log: dict, prefix: str, num_attempts: int, num_problems: int | None) -> dict[str, dict[str, float]]:
    """
    The metrics of an evaluation by the trainer: `value`, and with the number of problems `low` and `high`, the limits of a 95 %
    bootstrap interval over problems. With one greedy rollout per problem the shares of right attempts, of i→c and of c→i are
    all that the bootstrap needs: it is over as many problems with these verdicts.

    Args:
        log (`dict`):
            An entry of the trainer's log.
        prefix (`str`):
            The beginning of the metrics' names: `"eval"`, or `"eval_"` and the name of the evaluation set.
        num_attempts (`int`):
            Attempts in a rollout.
        num_problems (`int`, *optional*):
            Problems with one rollout each; without it, there are no limits.
    """
    names = [f"accuracy_t{k + 1}" for k in range(num_attempts)]
    found = {}
    for name in [*names, f"delta_t1_t{num_attempts}", "delta_i_to_c", "delta_c_to_i"]:
        found[name] = {"value": log[f"{prefix}_{name}"]}
        if num_problems:
            both = "delta_i_to_c", "delta_c_to_i"
            shares = (
                [log[f"{prefix}_{each}"] for each in both]
                if name.startswith("delta_t")
                else [log[f"{prefix}_{name}"], 0.0]
            )
            low, high = _limits(*(round(share * num_problems) for share in shares), num_problems)
            found[name] |= {"low": low, "high": high}
    return found


@functools.cache
def _limits(up: int, down: int, number: int) -> tuple[float, float]:
    """Of the mean of so many 1, -1 and 0. The card of each checkpoint has the evaluations before it again."""
    low, high = bootstrap_intervals(np.repeat([1.0, -1.0, 0.0], [up, down, number - up - down]))
    return float(low), float(high)


def evaluations_of(trainer: "SCoReTrainer") -> dict[str | None, dict[int, dict[str, dict[str, float]]]]:
    """
    The trainer's evaluations, by evaluation set (`None` if there is one set without a name) and optimizer step; an evaluation
    without verdicts is left out.
    """
    config, sets = trainer.args, trainer.eval_dataset
    sets = sets if isinstance(sets, dict) else {None: sets}
    needed = [f"accuracy_t{k + 1}" for k in range(config.num_attempts_eval)] + ["delta_i_to_c", "delta_c_to_i"]
    found = {}
    for name, rows in sets.items():
        prefix = "eval" if name is None else f"eval_{name}"
        num_problems = len(rows) if config.num_generations_eval == 1 and hasattr(rows, "__len__") else None
        found[name] = {
            log["step"]: measured(log, prefix, config.num_attempts_eval, num_problems)
            for log in trainer.state.log_history
            if all(log.get(f"{prefix}_{each}") is not None for each in needed)
        }
    return {name: steps for name, steps in found.items() if steps}


def tables(evaluations: dict[str | None, dict[int, dict]]) -> str | None:
    """A table for each evaluation set, in Markdown."""
    result = []
    for name, steps in evaluations.items():
        names = list(next(iter(steps.values())))
        rows = [["optimizer steps", *map(label, names)], ["---:"] * (len(names) + 1)]
        rows += [[str(step), *(metric(each).cell(found[each]) for each in names)] for step, found in steps.items()]
        heading = [] if name is None else [f"Evaluation set `{name}`:\n"]
        result.append("\n".join([*heading, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(result) or None


def write_model_card(path: Path, trainer: "SCoReTrainer") -> None:
    """
    Amend the card that TRL wrote: its quick start gives way to the attempts as they were trained; the settings, the training
    figure and the evaluations of the run are added, the last one also as metadata for the Hub. What was not measured is left
    out.

    Args:
        path (`Path`):
            The card.
        trainer ([`SCoReTrainer`]):
            The trainer that wrote it.
    """
    config, state = trainer.args, trainer.state
    evaluations = evaluations_of(trainer)
    chat = isinstance(next(iter(trainer.train_dataset))["prompt"], list)
    template = Template(
        resources.files("trl_score").joinpath("templates/score_model_card.md").read_text("utf-8"),
        trim_blocks=True,
    )
    num_problems = None  # of several sets, each has its own number
    if hasattr(trainer.eval_dataset, "__len__") and not isinstance(trainer.eval_dataset, dict):
        num_problems = len(trainer.eval_dataset)
    section = template.render(
        config=config,
        options=", ".join(
            f"{name}={getattr(config, name)}"
            for name in OPTIONS
            if getattr(config, name) != getattr(type(config), name)
        ),
        chat=chat,
        task=trainer.task,
        eval_task=trainer.eval_task,
        model_id=config.hub_model_id or "path or Hub id of this model",
        instruction=json.dumps(config.correction_instruction, ensure_ascii=False),
        results=tables(evaluations),
        num_problems=num_problems,
        num_train=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        decoding="greedy decoding" if config.eval_temperature == 0 else f"temperature {config.eval_temperature}",
        max_steps=state.max_steps,
        stage1_steps=sum(trainer.stage_at(step).number == 1 for step in range(state.max_steps)),
        rollouts_per_step=config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps,
        schedule=getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type),
        figure=FIGURE if write_figure(path.parent / FIGURE, state.log_history) else None,
        version=__version__,
    )
    card = ModelCard.load(path)
    before, _, rest = card.text.partition("## Quick start")
    _, _, after = rest.partition("## Training procedure")
    if card.data.base_model is None:  # a local base model has no name that means anything elsewhere
        before = before.replace("of [None](https://huggingface.co/None)", "of a local model")
    card.text = f"{before}{section}\n\n## Training procedure{after}"
    if evaluations and trainer.eval_task is not None:
        entries = [
            EvalResult(
                task_type="text-generation",
                dataset_type=name or trainer.eval_task,
                dataset_name=name or trainer.eval_task,
                metric_type="accuracy",
                metric_name=label(f"accuracy_t{k + 1}"),
                metric_value=round(steps[max(steps)][f"accuracy_t{k + 1}"]["value"], 4),
            )
            for name, steps in evaluations.items()
            for k in range(config.num_attempts_eval)
        ]
        card.data["model-index"] = eval_results_to_model_index(card.data.model_name or path.parent.name, entries)
    card.save(path)


def write_figure(path: Path, history: list[dict]) -> bool:
    """The training curves as a PNG, if there is more than one log to draw."""
    from .report import training_figure  # here, so that a trainer does without matplotlib until it saves

    history = [log for log in history if "stage" in log]
    if len(history) < 2:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    training_figure(history).savefig(path, dpi=120)
    return True
