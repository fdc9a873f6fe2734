"""The card of a trained model: TRL's, with how SCoRe trained it and what was measured."""

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from jinja2 import Template

from .objective import resolve_stage1_steps


if TYPE_CHECKING:
    from .score_trainer import SCoReTrainer


def write_model_card(path: Path, trainer: "SCoReTrainer") -> None:
    """
    Amend the card that TRL wrote: its quick start gives way to the attempts, and the settings and the evaluations of the
    run are added. What was not measured is left out.

    Args:
        path (`Path`):
            The card.
        trainer ([`SCoReTrainer`]):
            The trainer that wrote it.
    """
    config, state = trainer.args, trainer.state
    names = [f"accuracy_t{k + 1}" for k in range(config.num_attempts)]
    names += [f"delta_t1_t{config.num_attempts}", "delta_i_to_c", "delta_c_to_i"]
    columns = [f"Accuracy@t{k + 1}" for k in range(config.num_attempts)]
    columns += [f"Δ(t1,t{config.num_attempts})", "Δ(i→c)", "Δ(c→i)"]
    evaluations = [
        [str(log["step"]), *(f"{100 * log[f'eval_{name}']:.1f}" for name in names)]
        for log in state.log_history
        if all(log.get(f"eval_{name}") is not None for name in names)
    ]
    table = [["optimizer steps", *columns], ["---:"] * (len(columns) + 1), *evaluations]
    template = Template(
        resources.files("trl_score").joinpath("templates/score_model_card.md").read_text("utf-8"),
        trim_blocks=True,
    )
    section = template.render(
        config=config,
        model_id=config.hub_model_id or "path or Hub id of this model",
        instruction=json.dumps(config.correction_instruction, ensure_ascii=False),
        results="\n".join(f"| {' | '.join(row)} |" for row in table) if evaluations else None,
        decoding="greedy decoding" if config.eval_temperature == 0 else f"temperature {config.eval_temperature}",
        max_steps=state.max_steps,
        stage1_steps=min(resolve_stage1_steps(config.stage1_steps, state.max_steps), state.max_steps),
        rollouts_per_step=config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps,
        schedule=getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type),
    )
    card = ModelCard.load(path)
    before, _, rest = card.text.partition("## Quick start")
    _, _, after = rest.partition("## Training procedure")
    if card.data.base_model is None:  # a local base model has no name that means anything elsewhere
        before = before.replace("of [None](https://huggingface.co/None)", "of a local model")
    card.text = f"{before}{section}\n\n## Training procedure{after}"
    card.save(path)
