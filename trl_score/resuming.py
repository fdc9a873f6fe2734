"""
Saving and resuming a run, so that a resumed run equals the uninterrupted run. A checkpoint of `SCoReTrainer` has these files besides
the Trainer's:

- `score_state.json`: the `max_steps` and `stage1_steps` that the stages were planned with, the current `stage1_beta`, the number
  of generated tokens, the settings of the rollouts in use and how many updates on them are done.
- `rollouts_<process>.pt`: the rollouts in use, if there are more updates on them to do.

The Trainer writes `trainer_state.json` last, when the files of all processes are there. So a folder with a readable
`trainer_state.json` is a whole checkpoint.
"""

import json
import math
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn
from torch.optim import Optimizer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from .callbacks import arrange, checkpoint_to_load
from .objective import resolve_stage1_steps
from .records import write_atomically


logger = get_logger(__name__)

STATE_FILE = "score_state.json"
# Of a trained model; the last one is written with its card.
MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "score_run.json")
# With another value of one of these, stored rollouts have other shapes, tensors or weights than the loss expects.
ROLLOUT_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "num_attempts",
    "temperature",
    "beta",
    "kl_level",
    "use_vllm",
    "vllm_importance_sampling_correction",
)
# With another value of one of these, an adapter's weights are another model.
ADAPTER_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_parameters"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices"),
)


class ResumableTrainer(GRPOTrainer):
    """The hooks of [`~trl_score.SCoReTrainer`] that start, save and resume a run."""

    def _new_run(self, max_steps: int):
        """The state of a run at its start. Checkpoints save it."""
        self._planned_steps = max_steps  # `max_steps` when the run began
        self._first_step = self.state.global_step  # of this process; above 0 in a run that is resumed
        self._stage1_beta = self.args.stage1_beta  # of the next batch
        self._num_generated_tokens = 0  # of all processes, in training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        arrange(self)
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
            check_adapter_of_checkpoint(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if (folder := checkpoint_to_load(self.callback_handler.callbacks, self.args, self.state)) is not None:
            self.state.best_model_checkpoint = folder
            self._load_best_model()
        return output

    def _get_train_sampler(self, dataset: Dataset | None = None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return start_run(self, max_steps, resume_from_checkpoint, *place)

    def _load_optimizer_and_scheduler(self, checkpoint):
        given = optimizer_settings(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        for name, value in optimizer_settings(self.optimizer).items():
            if value != given.get(name, value):
                logger.warning(
                    f"`{name}` is {given[name]}, but the optimizer of the checkpoint continues with {value}. To train with another one, "
                    "start a new run from the model of the checkpoint."
                )

    def _save_checkpoint(self, model, trial):
        save_run(self, Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # `trainer_state.json` is next, and says that all files are there

    def _load_best_model(self):
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        whole = [] if sharded else [each.data for each in self.model.parameters() if each.requires_grad]
        if sharded or self.is_world_process_zero():  # another node may not see the files
            super()._load_best_model()
        for weights in whole:
            broadcast(weights)
        self._last_loaded_step = -1  # vLLM has other weights of the same step


def whole_checkpoint(checkpoint: "str | os.PathLike | bool", output_dir: "str | os.PathLike") -> str:
    """
    The folder of a checkpoint to resume from.

    Args:
        checkpoint (`str` or `bool`):
            A checkpoint's folder, or `True` for the last one in `output_dir` that was fully written.
        output_dir (`str`):
            The run's folder.

    Raises:
        `ValueError`: if there is no such checkpoint, or it was not fully written.
    """
    if checkpoint is not True:
        if not is_whole(checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint={str(checkpoint)!r}` is not a whole checkpoint: `{TRAINER_STATE_NAME}`, which is "
                "written last, is missing or unreadable. Resume from an earlier checkpoint."
            )
        return str(checkpoint)
    if (folder := last_whole_checkpoint(output_dir)) is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but '{output_dir}' holds no whole checkpoint. Leave it out to start a new run."
        )
    return str(folder)


def check_adapter_of_checkpoint(model: nn.Module, checkpoint: str) -> None:
    """
    Raises:
        `ValueError`: if the adapter of the model is another one than the checkpoint's. PEFT would leave out the weights of other modules,
            and scale them by another `lora_alpha`.
    """
    own = getattr(model, "peft_config", {}).get("default")  # the one that PEFT saves in the folder itself
    if own is None or not Path(checkpoint, CONFIG_NAME).exists():
        return
    saved = PeftConfig.from_pretrained(checkpoint)
    for name in ADAPTER_SETTINGS:
        now, before = (_in_order(getattr(config, name, None)) for config in (own, saved))
        if now != before:
            raise ValueError(
                f"The adapter has `{name}={now!r}`, but the one of the checkpoint '{checkpoint}' has {before!r}, so the resumed model "
                "would be another one. Resume with the settings of the checkpoint, or start a new run."
            )


def _in_order(value):
    return sorted(value) if isinstance(value, set | list | tuple) else value


def optimizer_settings(optimizer: Optimizer | None) -> dict:
    """The settings that an optimizer saves with its state, so that a resumed run has those of the checkpoint."""
    names = {
        "initial_lr": "learning_rate",
        "weight_decay": "weight_decay",
        "betas": "betas of Adam",
        "eps": "adam_epsilon",
    }
    groups = getattr(optimizer, "param_groups", [])
    return {name: group[key] for group in groups[:1] for key, name in names.items() if key in group}


def last_whole_checkpoint(output_dir: "str | os.PathLike") -> Path | None:
    """The last checkpoint in a run's folder that was fully written, if there is one. Warns of each later one."""
    for folder in checkpoints(output_dir):
        if is_whole(folder):
            return folder
        logger.warning(f"'{folder}' was not fully written. Looking for an earlier checkpoint to resume from.")
    return None


def checkpoints(output_dir: "str | os.PathLike") -> list[Path]:
    """All checkpoints in a run's folder, the last one first, whether or not they were fully written."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = [path.name.removeprefix(prefix) for path in Path(output_dir).glob(f"{prefix}*")]
    steps = sorted((int(step) for step in steps if step.isdecimal()), reverse=True)
    return [Path(output_dir, f"{prefix}{step}") for step in steps]


def is_whole(folder: "str | os.PathLike") -> bool:
    """Whether a checkpoint was fully written: its last file, `trainer_state.json`, is readable."""
    try:
        json.loads(Path(folder, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def has_model(folder: "str | os.PathLike") -> bool:
    """Whether a run has saved its model in a folder."""
    return any(any(Path(folder).glob(pattern)) for pattern in MODEL_FILES)


def check_no_model(folder: "str | os.PathLike") -> None:
    """
    Raises:
        `ValueError`: If an earlier run has saved its model in a folder, which a new run would overwrite.
    """
    if has_model(folder):
        raise ValueError(
            f"`output_dir={str(folder)!r}` holds the model of an earlier run, which a new run would overwrite. Give another folder, "
            "or remove this one."
        )


def save_run(trainer, folder: Path) -> None:
    """Write the state that [`start_run`] reads, before the Trainer writes its files into the same folder."""
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        # An earlier run's file must not say that the folder is whole while this run writes into it.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    position = trainer._step % _batches_per_rollouts(trainer)
    if position:  # there are more updates on these rollouts
        folder.mkdir(parents=True, exist_ok=True)  # on each node
        write_atomically(_rollouts_file(trainer, folder), lambda path: torch.save(trainer._buffered_inputs, path))
    if trainer.args.should_save:
        state = {
            "max_steps": trainer._planned_steps,
            "stage1_steps": trainer.args.stage1_steps,
            "stage1_beta": trainer._stage1_beta,
            "num_generated_tokens": trainer._num_generated_tokens,
            "settings": _rollout_settings(trainer),
            "position": position,
            "stream": _place_in_stream(trainer) if isinstance(trainer.train_dataset, IterableDataset) else None,
        }
        write_atomically(folder / STATE_FILE, lambda path: path.write_text(json.dumps(state, indent=2)))


def start_run(trainer, max_steps: int, checkpoint: str | None, epoch: int, batches: int) -> tuple[int, int]:
    """
    Reset the state of an earlier `train()`, and restore the state that [`save_run`] wrote if the run is resumed.

    Args:
        trainer ([`~trl_score.SCoReTrainer`]):
            The trainer, in which the Trainer has restored its part of the state.
        max_steps (`int`):
            Optimizer steps of the whole run.
        checkpoint (`str`, *optional*):
            Folder to resume from.
        epoch, batches (`int`):
            The epoch in which the Trainer would start, and the number of its micro-batches to skip.

    Returns:
        `tuple[int, int]`: the epoch to start in, and the number of its micro-batches to skip.
    """
    trainer._new_run(max_steps)
    trainer._step, trainer._buffered_inputs = 0, None
    trainer._last_loaded_step = -1  # vLLM may hold other weights of the same step
    if checkpoint is None:
        return epoch, batches
    state = _read_state(Path(checkpoint))
    _resume_schedule(trainer, state, max_steps)
    trainer._num_generated_tokens = state.get("num_generated_tokens", 0)
    if trainer.args.adaptive_stage1_beta:
        trainer._stage1_beta = state.get("stage1_beta", trainer._stage1_beta)
    if trainer.state.global_step >= max_steps:
        return trainer.state.num_train_epochs, 0  # the run is finished; the Trainer would add a step
    if not isinstance(trainer.train_dataset, IterableDataset):
        for _ in range(epoch):  # each epoch takes the next permutation from the sampler's generator
            next(iter(trainer._train_sampler), None)
    elif state.get("stream"):
        epoch, batches = _resumed_in_stream(trainer, state["stream"])
    trainer._step = batches  # every epoch starts with new rollouts, so the epochs before do not matter
    trainer._buffered_inputs = _read_rollouts(trainer, Path(checkpoint), state)
    return epoch, batches


def _read_state(folder: Path) -> dict:
    """Read `score_state.json` in the main process and send it to all processes."""
    state = {}
    if PartialState().is_main_process:
        try:
            state = json.loads((folder / STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            logger.warning(
                f"`{STATE_FILE}` of the checkpoint cannot be read ({error}). The stages are planned with the current "
                "`max_steps`, `stage1_beta` and `num_generated_tokens` start anew, and rollouts in progress are dropped."
            )
    return broadcast_object_list([state])[0]


def _resume_schedule(trainer, state: dict, max_steps: int) -> None:
    """Keep the stages where they were planned, unless the user has changed `stage1_steps`."""
    stage1_steps, planned = trainer.args.stage1_steps, state.get("max_steps", max_steps)
    if stage1_steps != state.get("stage1_steps", stage1_steps):
        logger.warning(
            f"`stage1_steps` is {stage1_steps} instead of {state['stage1_steps']} in the checkpoint: Stage I now ends after "
            f"step {resolve_stage1_steps(stage1_steps, max_steps)}. The run resumes after step {trainer.state.global_step}."
        )
    elif planned != max_steps:
        trainer._planned_steps = planned
        logger.warning(
            f"`max_steps` is {max_steps} instead of {planned} when the run began. The stages end where they were planned "
            f"for {planned} steps. To move the end of Stage I, set `stage1_steps` to a number of steps."
        )


def _read_rollouts(trainer, folder: Path, state: dict) -> list[dict] | None:
    """
    The rollouts in use on this process. `None` on all processes if there are none, if a setting has changed, or if a process cannot
    read its file.
    """
    if not state.get("position"):
        return None
    rollouts = reason = None
    settings, path = _rollout_settings(trainer), _rollouts_file(trainer, folder)
    changed = [
        f"`{key}` is {settings[key]} instead of {value}"
        for key, value in state["settings"].items()
        if settings[key] != value
    ]
    if changed:
        reason = ", ".join(changed)
    elif trainer._step % _batches_per_rollouts(trainer) != state["position"]:
        reason = "the run resumes at another place in the training data"
    else:
        try:
            rollouts = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise errors of many types
            reason = f"`{path.name}` cannot be read ({error})"
    reasons = [each for each in gather_object([reason]) if each is not None]
    if reasons:
        logger.warning(
            f"The checkpoint's rollouts in progress are dropped, and new ones are sampled: {reasons[0]}. The resumed run is "
            "not bit-identical to an uninterrupted one."
        )
        return None
    return send_to_device(rollouts, trainer.accelerator.device)


def _batches_per_rollouts(trainer) -> int:
    """Micro-batches that are trained on one generation of rollouts."""
    return trainer.args.steps_per_generation * trainer.num_iterations


def _rollouts_file(trainer, folder: Path) -> Path:
    return folder / f"rollouts_{trainer.accelerator.process_index}.pt"


def _rollout_settings(trainer) -> dict:
    settings = {name: getattr(trainer.args, name) for name in ROLLOUT_SETTINGS}
    return settings | {"number of processes": trainer.accelerator.num_processes}


def _problems_per_batch(trainer) -> float:
    """Problems that a micro-batch takes from a stream, on average over a generation of rollouts."""
    return trainer.args.generation_batch_size / trainer.num_generations / _batches_per_rollouts(trainer)


def _place_in_stream(trainer) -> dict:
    """
    The place to which an `IterableDataset` has been read. The Trainer does not know the length of its epochs: `state.epoch` counts the
    micro-batches of an epoch as shares of those of the whole run.
    """
    state = trainer.state
    epoch = max(math.ceil(state.epoch) - 1, 0)
    batches = round((state.epoch - epoch) * state.max_steps * trainer.args.gradient_accumulation_steps)
    return {"epoch": epoch, "problems": batches * _problems_per_batch(trainer)}


def _resumed_in_stream(trainer, place: dict) -> tuple[int, int]:
    """The epoch and micro-batch of a place in a stream. With other batch sizes it is rounded down to a whole update."""
    if trainer.args.ignore_data_skip:
        return place["epoch"], 0
    batches = int(round(place["problems"] / _problems_per_batch(trainer), 6))
    return place["epoch"], batches - batches % trainer.args.gradient_accumulation_steps
