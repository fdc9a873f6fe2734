"""The card of a trained model: TRL's, with how SCoRe trained it, what was measured, and how to use it as trained."""

import functools
import importlib.metadata
import json
import logging
import re
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.repocard_data import eval_results_to_model_index
from jinja2 import Template
from peft import PeftConfig
from trl.trainer.utils import get_config_model_id

from ._version import __version__
from .callbacks import BEST, loaded_step
from .metrics import bootstrap_intervals, label, metric, not_graded
from .records import write_json
from .tasks import TASKS, Arithmetic, MathTask
from .tasks.math import math_prompt
from .tasks.sources import HUB


if TYPE_CHECKING:
    from .score_config import SCoReConfig
    from .score_trainer import SCoReTrainer

logger = logging.getLogger(__name__)

FIGURE = "images/training.png"
RUN = "score_run.json"  # the settings of a run, as its card shows them
OPTIONS = ("adaptive_stage1_beta", "kl_level", "loss_type", "top_p", "top_k")  # shown where not the default
EXAMPLE = "How many positive whole numbers divide 360 without a remainder?"
REPEATED = (  # options that a run is repeated with, whatever their defaults will be
    *("num_attempts", "num_attempts_eval", "correction_instruction", "stage1_steps", "alpha", "gamma", "beta"),
    *("stage1_beta", "adaptive_stage1_beta", "kl_level", "offline_first_attempts", "loss_type", "scale_rewards"),
    *("epsilon", "epsilon_high", "num_generations", "num_iterations", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "chat_template_kwargs", "max_steps", "num_train_epochs", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "seed"),
    *("data_seed", "mask_truncated_completions", "steps_per_generation", "num_generations_eval"),
)
WHEN_SET = (  # options that change a run, and that few set
    *("disable_dropout", "cast_lm_head_to_fp32", "shuffle_dataset", "generation_kwargs", "use_vllm", "vllm_mode"),
    *("delta", "reward_weights", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min"),
    *("entropy_coef_max", "entropy_coef_delta", "entropy_target", "vllm_importance_sampling_correction"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    *("use_bias_correction_kl", "reuse_cache", "eval_temperature", "router_aux_loss_coef", "trust_remote_code"),
)


def measured(log: dict, prefix: str, num_attempts: int, num_graded: int | None) -> dict[str, dict[str, float]]:
    """
    The metrics of an evaluation by the trainer: `value`, and with the number of graded problems `low` and `high`, the limits of
    a 95 % bootstrap interval over them. With one greedy rollout per problem the shares of right attempts, of i→c and of c→i are
    all that the bootstrap needs: it is over as many problems with these verdicts.

    Args:
        log (`dict`):
            An entry of the trainer's log.
        prefix (`str`):
            The beginning of the metrics' names: `"eval"`, or `"eval_"` and the name of the evaluation set.
        num_attempts (`int`):
            Attempts in a rollout.
        num_graded (`int`, *optional*):
            Problems with one rollout each, whose first and last attempt were graded; without it, there are no limits.
    """
    names = [f"accuracy_t{k + 1}" for k in range(num_attempts)]
    found = {}
    for name in [*names, f"delta_t1_t{num_attempts}", "delta_i_to_c", "delta_c_to_i"]:
        found[name] = {"value": log[f"{prefix}_{name}"]}
        if num_graded:
            both = "delta_i_to_c", "delta_c_to_i"
            shares = (
                [log[f"{prefix}_{each}"] for each in both]
                if name.startswith("delta_t")
                else [log[f"{prefix}_{name}"], 0.0]
            )
            low, high = _limits(*(round(share * num_graded) for share in shares), num_graded)
            found[name] |= {"low": low, "high": high}
    return found


@functools.cache
def _limits(up: int, down: int, number: int) -> tuple[float, float]:
    """Of the mean of so many 1, -1 and 0. The card of each checkpoint has the evaluations before it again."""
    low, high = bootstrap_intervals(np.repeat([1.0, -1.0, 0.0], [up, down, number - up - down]))
    return float(low), float(high)


def evaluations_of(trainer: "SCoReTrainer") -> dict[str | None, dict[tuple[str, str], dict[str, dict[str, float]]]]:
    """
    The trainer's evaluations, by evaluation set (`None` if there is one set without a name), and by the optimizer steps and the
    number of problems, as the table shows them. An evaluation without verdicts is left out. One that does not say of how many
    problems it is, from before this was logged, has no limits, and neither has one with several rollouts per problem.
    """
    num_attempts, sets = trainer.args.num_attempts_eval, trainer.eval_dataset
    sets = sets if isinstance(sets, dict) else {None: sets}
    needed = [f"accuracy_t{k + 1}" for k in range(num_attempts)] + ["delta_i_to_c", "delta_c_to_i"]
    found = {}
    for name in sets:
        prefix = "eval" if name is None else f"eval_{name}"
        found[name] = {}
        for log in trainer.state.log_history:
            has_verdicts = all(log.get(f"{prefix}_{each}") is not None for each in needed)
            if has_verdicts and attempts_in(log, f"{prefix}_") == num_attempts:
                is_one_each = log.get(f"{prefix}_num_rollouts") == log.get(f"{prefix}_num_problems")
                num_graded = log.get(f"{prefix}_num_graded") if is_one_each else None
                loaded = log.get(f"{prefix}_loaded_step")
                steps = f"{log['step']}" if loaded is None else f"weights of step {loaded}"
                row = steps, f"{log.get(f'{prefix}_num_problems', '')}{left_out(log, prefix)}"
                found[name][row] = measured(log, prefix, num_attempts, num_graded)
    return {name: rows for name, rows in found.items() if rows}


def attempts_in(log: dict, prefix: str = "") -> int:
    """How many attempts the rollouts of a log had. A run can be resumed with another number; then evaluations are not comparable."""
    return sum(key.startswith(f"{prefix}accuracy_t") for key in log)


def left_out(log: dict, prefix: str) -> str:
    """How many rollouts of an evaluation could not be graded, in brackets; nothing if all could, or if it is not known."""
    return not_graded(log.get(f"{prefix}_num_rollouts", 0) - log.get(f"{prefix}_num_graded", 0))


def tables(evaluations: dict[str | None, dict[tuple[str, str], dict]]) -> str | None:
    """A table for each evaluation set, in Markdown."""
    result = []
    for name, evaluated in evaluations.items():
        names = list(next(iter(evaluated.values())))
        rows = [["optimizer steps", "problems", *map(label, names)], ["---:"] * (len(names) + 2)]
        rows += [[*row, *(metric(each).cell(found[each]) for each in names)] for row, found in evaluated.items()]
        heading = [] if name is None else [f"Evaluation set `{name}`:\n"]
        result.append("\n".join([*heading, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(result) or None


def write_model_card(path: Path, trainer: "SCoReTrainer") -> None:
    """
    Amend the card that TRL wrote: its quick start gives way to the attempts as they were trained; the settings, the training
    figure and the evaluations of the run are added, the last one also as metadata for the Hub. What was not measured is left
    out. The settings are also written to `score_run.json` beside the card, where `trl-score report` reads them.

    Args:
        path (`Path`):
            The card.
        trainer ([`SCoReTrainer`]):
            The trainer that wrote it.
    """
    config, state = trainer.args, trainer.state
    evaluations = evaluations_of(trainer)
    card = ModelCard.load(path)
    settings = settings_of(trainer, card.data.base_model)
    section = Template(
        resources.files("trl_score").joinpath("templates/score_model_card.md").read_text("utf-8"),
        trim_blocks=True,
    ).render(
        config=config,
        problem=_literal(example_problem(trainer)),
        model_id=trainer.hub_model_id or config.hub_model_id,
        instruction=_literal(config.correction_instruction),
        task=trainer.task,
        eval_task=trainer.eval_task,
        results=tables(evaluations),
        has_base=any(steps == "0" for evaluated in evaluations.values() for steps, _ in evaluated),
        decoding=decoding_of(config),
        settings={name: _cell(value) for name, value in settings.items()},
        command=yaml.safe_dump(
            command_of(trainer, card.data.base_model), sort_keys=False, allow_unicode=True, width=100
        ),
        figure=FIGURE if write_figure(path.parent / FIGURE, state.log_history) else None,
        version=__version__,
    )
    before, _, rest = card.text.partition("## Quick start")
    _, _, after = rest.partition("## Training procedure")
    if card.data.base_model is None:  # a local base model has no name that means anything elsewhere
        before = before.replace("of [None](https://huggingface.co/None)", "of a local model")
    card.text = f"{before}{section}\n\n## Training procedure{after}"
    card.data.model_name = card.data.model_name or path.resolve().parent.name  # of the folder "."
    _describe(card.data, trainer, evaluations)
    card.save(path)
    write_json(path.parent / RUN, {"settings": settings})


@contextmanager
def own_card(output_dir: str | Path, folder: str | Path):
    """
    While a model is saved into a folder: PEFT writes a card of its own, or into the one that is there. Afterwards the folder
    has the card of the run, if one was written, with its figure and its settings.
    """
    output_dir, folder = Path(output_dir), Path(folder)
    card = output_dir / "README.md"
    text = card.read_bytes() if card.exists() and (output_dir / RUN).exists() else None
    yield
    if text is None:
        return
    (folder / card.name).write_bytes(text)
    for name in (FIGURE, RUN):
        if folder.resolve() != output_dir.resolve() and (output_dir / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(output_dir / name, folder / name)


def _describe(data: ModelCardData, trainer: "SCoReTrainer", evaluations: dict) -> None:
    """The metadata for the Hub: what TRL leaves out, and the results."""
    if hasattr(data, "licence"):  # TRL's placeholder, in another spelling than the Hub's
        del data.licence
    data.pipeline_tag = "text-generation"
    adapter = adapter_of(trainer)
    if adapter is not None:
        data.library_name = "peft"
        data.tags = [*data.tags, adapter.peft_type.value.lower()]
        data.base_model_relation = "adapter"
    base = card_of_base(get_config_model_id(trainer.model.config))
    for name in ("license", "license_name", "license_link"):
        if (value := getattr(base, name, None)) is not None:
            setattr(data, name, value)
    datasets = datasets_of(trainer.task) if trainer.task else []
    data.datasets = data.datasets or datasets or None
    data.language = getattr(base, "language", None) or ("en" if datasets else None)  # the datasets are in English
    if not evaluations or trainer.eval_task is None:
        return
    entries = []
    for name, evaluated in evaluations.items():
        last = list(evaluated.values())[-1]
        task = name or trainer.eval_task
        names = datasets_of(task, "test")
        for k in range(trainer.args.num_attempts_eval):
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=names[0] if names else task,
                    dataset_name=task,
                    dataset_split="test",
                    metric_type="accuracy",
                    metric_name=label(f"accuracy_t{k + 1}"),
                    metric_value=round(last[f"accuracy_t{k + 1}"]["value"], 4),
                )
            )
    data["model-index"] = eval_results_to_model_index(data.model_name, entries)


@functools.cache
def card_of_base(name: str | None) -> ModelCardData | None:
    """
    What the card of a base model says of its licence and language; `None` if it has no card, or the Hub is away. A run asks
    once.
    """
    try:
        folder = Path(name)
        file = folder / "README.md" if folder.is_dir() else hf_hub_download(name, "README.md", etag_timeout=5)
        return ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception as error:  # the card of a trained model is written all the same
        logger.info(f"The card of the base model '{name}' cannot be read, so the licence is left out: {error}")
        return None


def datasets_of(task: str, split: str | None = None) -> list[str]:
    """The datasets of a task on the Hub, of one split if it has a dataset of its own; empty for other tasks."""
    found = {name: source.repository for name, source in HUB.items() if name.partition("/")[0] == task}
    own = [repository for name, repository in found.items() if split and name.endswith(f"/{split}")]
    return own or list(dict.fromkeys(found.values()))


def adapter_of(trainer: "SCoReTrainer") -> PeftConfig | None:
    """The configuration of the adapter that is trained, if one is."""
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).get("default")


def revision_of(config: "SCoReConfig") -> str | None:
    """The revision of the base model, if not `main`."""
    revision = (config.model_init_kwargs or {}).get("revision")
    return None if revision == "main" else revision


def quantization_of(trainer: "SCoReTrainer") -> dict:
    """How the weights under an adapter are quantized; empty if they are not."""
    found = getattr(trainer.model.config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def settings_of(trainer: "SCoReTrainer", base_model: str | None) -> dict[str, str]:
    """
    The settings of a run and what it was made with, as the card and the report show them: name to text. Paths are left out.

    Args:
        trainer ([`SCoReTrainer`]):
            The trainer, in training or after it.
        base_model (`str`, *optional*):
            The base model's id on the Hub.
    """
    config, state, found = trainer.args, trainer.state, {}
    found["base model"] = base_model or "a local model"
    if base_model and (revision := revision_of(config)):
        found["base model"] += f", revision {revision}"
    if trainer.task:
        number = f", {len(trainer.train_dataset)} problems" if hasattr(trainer.train_dataset, "__len__") else ""
        found["task (training split)"] = f"{trainer.task}{number}"
    found["attempts"] = f"{config.num_attempts}"
    if config.offline_first_attempts:
        found["share of first attempts that were stored ones"] = f"{config.offline_first_attempts}"
    done, stage1 = state.global_step, sum(trainer.stage_at(step).number == 1 for step in range(state.global_step))
    planned = f" of {state.max_steps} planned" if done < state.max_steps else ""
    found["optimizer steps, of them Stage I"] = f"{done}{planned}, {stage1}"
    if (loaded := loaded_weights(trainer)) is not None:
        found["checkpoint loaded when training ended"] = loaded
    found["alpha (bonus), gamma (discount)"] = f"{config.alpha}, {config.gamma}"
    found["beta1 (KL, every attempt), beta2 (KL added in Stage I)"] = f"{config.beta}, {config.stage1_beta}"
    if options := [f"{name}={getattr(config, name)}" for name in OPTIONS if _is_set(config, name)]:
        found["other options"] = ", ".join(options)
    schedule, warmup = _plain(config.lr_scheduler_type), f"{config.warmup_steps:g} steps of warm-up"
    if config.lr_scheduler_kwargs:
        schedule += f" ({', '.join(f'{name}={value}' for name, value in config.lr_scheduler_kwargs.items())})"
    found["learning rate, schedule"] = f"{config.learning_rate}, {schedule}, {warmup}"
    betas = f"betas {config.adam_beta1}, {config.adam_beta2}"
    found["optimizer"] = f"{_plain(config.optim)}, {betas}, weight decay {config.weight_decay}"
    found["gradient clipping (norm)"] = f"{config.max_grad_norm}"
    rollouts = config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps
    found["rollouts per optimizer step, of them per problem"] = f"{rollouts}, {config.num_generations}"
    if config.num_iterations > 1:
        found["updates on each batch of rollouts"] = f"{config.num_iterations}"
    found["tokens per attempt, sampling temperature"] = f"{config.max_completion_length}, {config.temperature}"
    if (adapter := adapter_of(trainer)) is not None:
        found["adapter"] = _adapter(adapter)
    if quantization := quantization_of(trainer):
        four = quantization.get("load_in_4bit")
        found["base model's weights"] = (
            f"4 bits ({quantization.get('bnb_4bit_quant_type')})" if four else f"{quantization.get('quant_method')}"
        )
    trained = next(each.dtype for each in trainer.model.parameters() if each.requires_grad)
    computed = "bfloat16" if config.bf16 else "float16" if config.fp16 else str(trained).removeprefix("torch.")
    found["trained weights, computation"] = f"{str(trained).removeprefix('torch.')}, {computed}"
    found["seed"] = f"{config.seed}"
    kind = trainer.accelerator.device.type
    device = torch.cuda.get_device_name() if kind == "cuda" else kind.upper()
    seconds = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
    time = f", {seconds / 3600:.1f} hours" if seconds and seconds > 3600 else f", {seconds:.0f} s" if seconds else ""
    found["hardware"] = f"{config.world_size} x {device}{time}"
    names = [
        "trl-score",
        "trl",
        "transformers",
        "torch",
        *(["peft"] if adapter else []),
        *(["bitsandbytes"] if quantization else []),
    ]
    found["versions"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    found["date"] = datetime.now(UTC).date().isoformat()
    return found


def loaded_weights(trainer: "SCoReTrainer") -> str | None:
    """The step of the checkpoint that was loaded when training ended, and why this one; `None` if none was loaded."""
    if (step := loaded_step(trainer)) is None:
        return None
    is_kept = Path(trainer.state.best_model_checkpoint, BEST).exists()
    return f"step {step}, {'highest training reward' if is_kept else f'best {trainer.args.metric_for_best_model}'}"


def _adapter(adapter: PeftConfig) -> str:
    parts = [adapter.peft_type.value]
    if hasattr(adapter, "r"):
        parts += [f"rank {adapter.r}", f"alpha {adapter.lora_alpha}", f"dropout {adapter.lora_dropout}"]
    modules = getattr(adapter, "target_modules", None)
    if modules:
        parts.append(f"modules {modules if isinstance(modules, str) else ', '.join(sorted(modules))}")
    return ", ".join(parts)


def decoding_of(config: "SCoReConfig") -> str:
    """How attempts are decoded in evaluation."""
    return "greedy decoding" if config.eval_temperature == 0 else f"temperature {config.eval_temperature}"


def command_of(trainer: "SCoReTrainer", base_model: str | None) -> dict:
    """
    The options of `trl-score train` that repeat a run; of one with other problems or a local base model, as far as they can
    be named.
    """
    config, found = trainer.args, {}
    if trainer.task:
        found["task"] = trainer.task
        if hasattr(trainer.train_dataset, "__len__"):
            found["num_train_problems"] = len(trainer.train_dataset)
    if trainer.eval_task not in (None, trainer.task):
        found["eval_task"] = trainer.eval_task
    if base_model:
        found["model_name_or_path"] = base_model
        if revision := revision_of(config):
            found["model_revision"] = revision
    if dtype := (config.model_init_kwargs or {}).get("dtype"):
        found["dtype"] = str(dtype).removeprefix("torch.")
    if (adapter := adapter_of(trainer)) is not None and hasattr(adapter, "r"):
        found |= {"use_peft": True, "lora_r": adapter.r, "lora_alpha": adapter.lora_alpha}
        found["lora_dropout"] = adapter.lora_dropout
        if adapter.target_modules:
            found["lora_target_modules"] = _modules(adapter.target_modules)
        if adapter.modules_to_save:
            found["lora_modules_to_save"] = sorted(adapter.modules_to_save)
        found |= {name: True for name in ("use_rslora", "use_dora") if getattr(adapter, name, False)}
    if (quantization := quantization_of(trainer)).get("load_in_4bit"):
        found |= {"load_in_4bit": True, "bnb_4bit_quant_type": quantization["bnb_4bit_quant_type"]}
        found["use_bnb_nested_quant"] = quantization["bnb_4bit_use_double_quant"]
    reference = config.reference_model_name_or_path
    if reference is not None and not Path(reference).exists():
        found["reference_model_name_or_path"] = reference
    names = [*REPEATED, *(name for name in WHEN_SET if _is_set(config, name))]
    values = {name: _plain(getattr(config, name)) for name in names}
    return found | {name: value for name, value in values.items() if value not in (None, {})}


def _modules(target_modules: str | Iterable[str]) -> list[str]:
    """As `lora_target_modules` has them. TRL takes a list of one for a regular expression, so a single name becomes one."""
    if isinstance(target_modules, str):
        return [target_modules]
    names = sorted(target_modules)
    return names if len(names) > 1 else [rf"(.*\.)?{re.escape(names[0])}"]


def _cell(text: str) -> str:
    """A text in a cell of a table in Markdown, where a regular expression has characters with a meaning."""
    return re.sub(r"([\\|*])", r"\\\1", text)


def _plain(value):
    """A value of an option as YAML has it."""
    return getattr(value, "value", value)


def _is_set(config, name: str) -> bool:
    return getattr(config, name) != getattr(type(config), name)


def _literal(value) -> str:
    """As it stands in Python code."""
    return json.dumps(value, ensure_ascii=False)


def example_problem(trainer: "SCoReTrainer") -> str | list[dict]:
    """A problem for the snippet, in the form of the training problems and not one of them."""
    kind = TASKS.get(trainer.task)
    if kind is Arithmetic:
        text = "3 0 5 0 9 1"
    elif kind is not None and issubclass(kind, MathTask):
        return math_prompt(EXAMPLE)
    else:
        text = EXAMPLE
    chat = isinstance(next(iter(trainer.train_dataset))["prompt"], list)
    return [{"role": "user", "content": text}] if chat else text


def write_figure(path: Path, history: list[dict]) -> bool:
    """The training curves as a PNG, if there is more than one log to draw."""
    from .report import training_figure  # here, so that a trainer does without matplotlib until it saves

    history = [log for log in history if "stage" in log]
    if len(history) < 2:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    training_figure(history).savefig(path, dpi=120)
    return True
