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
from .objective import resolve_stage1_steps


if TYPE_CHECKING:
    from .score_trainer import SCoReTrainer

FIGURE = "images/training.png"
OPTIONS = (  # shown where not the default
    *("stage_schedule", "stage1_cycles", "adaptive_stage1_beta", "stage1_reference", "kl_level"),
    *("whiten_advantages", "second_attempts_per_first", "second_attempts_from_stage"),
)


def measured(log: dict, num_attempts: int, num_problems: int | None) -> dict[str, dict[str, float]]:
    """
    The metrics of an evaluation by the trainer: `value`, and with the number of problems `low` and `high`, the limits of a 95 %
    bootstrap interval over problems. With one greedy rollout per problem the shares of right attempts, of i→c and of c→i are
    all that the bootstrap needs: it is over as many problems with these verdicts.

    Args:
        log (`dict`):
            An entry of the trainer's log.
        num_attempts (`int`):
            Attempts in a rollout.
        num_problems (`int`, *optional*):
            Problems with one rollout each; without it, there are no limits.
    """
    names = [f"accuracy_t{k + 1}" for k in range(num_attempts)]
    found = {}
    for name in [*names, f"delta_t1_t{num_attempts}", "delta_i_to_c", "delta_c_to_i"]:
        found[name] = {"value": log[f"eval_{name}"]}
        if num_problems:
            both = "delta_i_to_c", "delta_c_to_i"
            shares = (
                [log[f"eval_{each}"] for each in both] if name.startswith("delta_t") else [log[f"eval_{name}"], 0.0]
            )
            low, high = _limits(*(round(share * num_problems) for share in shares), num_problems)
            found[name] |= {"low": low, "high": high}
    return found


@functools.cache
def _limits(up: int, down: int, number: int) -> tuple[float, float]:
    """Of the mean of so many 1, -1 and 0. The card of each checkpoint has the evaluations before it again."""
    low, high = bootstrap_intervals(np.repeat([1.0, -1.0, 0.0], [up, down, number - up - down]))
    return float(low), float(high)


def evaluations_of(trainer: "SCoReTrainer") -> dict[int, dict[str, dict[str, float]]]:
    """By optimizer step, what the trainer measured on its evaluation data; an evaluation without verdicts is left out."""
    config, rows = trainer.args, trainer.eval_dataset
    one_each = config.num_generations_eval == 1 and hasattr(rows, "__len__") and not isinstance(rows, dict)
    num_problems = len(rows) if one_each else None
    needed = [f"eval_accuracy_t{k + 1}" for k in range(config.num_attempts_eval)] + [
        "eval_delta_i_to_c",
        "eval_delta_c_to_i",
    ]
    return {
        log["step"]: measured(log, config.num_attempts_eval, num_problems)
        for log in trainer.state.log_history
        if all(log.get(name) is not None for name in needed)
    }


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
    rows = []
    if evaluations:
        names = list(next(iter(evaluations.values())))
        rows = [["optimizer steps", *map(label, names)], ["---:"] * (len(names) + 1)]
        rows += [
            [str(step), *(metric(name).cell(found[name]) for name in names)] for step, found in evaluations.items()
        ]
    chat = isinstance(next(iter(trainer.train_dataset))["prompt"], list)
    template = Template(
        resources.files("trl_score").joinpath("templates/score_model_card.md").read_text("utf-8"),
        trim_blocks=True,
    )
    num_problems = len(trainer.eval_dataset) if hasattr(trainer.eval_dataset, "__len__") else None
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
        results="\n".join(f"| {' | '.join(row)} |" for row in rows) or None,
        num_problems=num_problems,
        num_train=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        decoding="greedy decoding" if config.eval_temperature == 0 else f"temperature {config.eval_temperature}",
        max_steps=state.max_steps,
        stage1_steps=min(resolve_stage1_steps(config.stage1_steps, state.max_steps), state.max_steps),
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
        last = evaluations[max(evaluations)]
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=trainer.eval_task,
                dataset_name=trainer.eval_task,
                metric_type="accuracy",
                metric_name=label(f"accuracy_t{k + 1}"),
                metric_value=round(last[f"accuracy_t{k + 1}"]["value"], 4),
            )
            for k in range(config.num_attempts_eval)
        ]
        card.data["model-index"] = eval_results_to_model_index(card.data.model_name or path.parent.name, results)
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
