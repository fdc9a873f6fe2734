"""Callbacks of a training run: an alarm for collapse, the best checkpoint of each stage, and trackers whose errors do not end the run."""

import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable
from functools import wraps
from itertools import count
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .objective import Stage


logger = logging.getLogger(__name__)

CHANGED_AT_LEAST = 0.01  # share of attempts that differ from the previous one
CORRECTED_AT_LEAST = 0.002  # share of rollouts
BEST = "best.json"
ADVICE = {
    1: "A longer Stage I does not help here. Try another `correction_instruction` (measure how often the base model corrects "
    "itself with it), another `temperature`, or a lower `learning_rate`.",
    2: "Try a longer Stage I (`stage1_steps`), a larger bonus (`alpha`), a lower `learning_rate`, or more problems.",
}


def recent(history: list[dict], key: str, stage: int, window: int) -> list[float]:
    """The last values of a key in the logs of a stage, at most `window`. Values that are not numbers are left out."""
    values = [log[key] for log in history if log.get("stage") == stage and log.get(key) is not None]
    return [value for value in values if not math.isnan(value)][-window:]


class CollapseAlarm(TrainerCallback):
    """
    Warns once in each stage when self-correction has collapsed (Section 4). It has collapsed if attempts are copies of the previous
    attempts: `changed_ratio` is below 1 % (with three or more attempts, for any attempt while it is trained). It has also collapsed
    if wrong first attempts are not corrected: `delta_i_to_c` is below 0.2 %, with more than 5 % of the first attempts wrong. The
    callback adds `collapse` to each log: 1 from the warning on in this stage, else 0.

    Args:
        window (`int`, *optional*, defaults to `10`):
            Number of optimizer steps of the stage over which the metrics are averaged. With `logging_steps` above 1, the mean is
            over the logs that cover these steps, and over at least two logs.

    Raises:
        `ValueError`: if the window is below 1.
    """

    def __init__(self, window: int = 10):
        if window < 1:
            raise ValueError(f"`window={window}` is a number of steps. Set it to 1 or more, or leave the alarm out.")
        self.window, self.collapsed = window, set()
        self.stage_at: Callable[[int], Stage] | None = None  # of the trainer, see `arrange`

    def on_train_begin(self, args, state, control, **kwargs):
        self.collapsed = {int(log["stage"]) for log in state.log_history if log.get("collapse")}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "stage" not in logs or args.num_attempts == 1:
            return
        stage = int(logs["stage"])  # 1 if an interval has steps of both stages
        if logs["stage"] == stage and stage not in self.collapsed:
            self._look(state, stage, args.num_attempts)
        logs["collapse"] = float(stage in self.collapsed)
        if state.log_history:  # the Trainer has written the log already
            state.log_history[-1]["collapse"] = logs["collapse"]

    def _look(self, state, stage: int, num_attempts: int):
        number = self._number_of_logs(state.log_history)

        def mean(key: str, history: list[dict] = state.log_history) -> float:
            values = recent(history, key, stage, number)
            return sum(values) / len(values) if len(values) == number else float("nan")

        changed = {"the previous one": mean("changed_ratio")}  # by the attempt that they differ from
        if num_attempts > 2:
            changed = {
                f"attempt {k}": mean(f"changed_ratio_t{k}_t{k + 1}", self._logs_that_train(k + 1, state.log_history))
                for k in range(1, num_attempts)
            }
            changed = {other: share for other, share in changed.items() if not math.isnan(share)}
        corrected, right = mean("delta_i_to_c"), mean("accuracy_t1")
        unchanged = any(share < CHANGED_AT_LEAST for share in changed.values())
        uncorrected = corrected < CORRECTED_AT_LEAST and right < 0.95
        if not (unchanged or uncorrected):
            return
        self.collapsed.add(stage)
        if state.is_world_process_zero:
            differ = "".join(f"{share:.2%} of the attempts differ from {other}, " for other, share in changed.items())
            logger.warning(
                f"Self-correction has collapsed in Stage {'I' * stage} (step {state.global_step}): over the last "
                f"{number} logs, {differ}and {corrected:.2%} of the rollouts turn from wrong to right, with {1 - right:.1%} of "
                f"the first attempts wrong. {ADVICE[stage]}"
            )

    def _logs_that_train(self, attempt: int, history: list[dict]) -> list[dict]:
        """Stage I trains one attempt after the other. What the base model does at the others is not a collapse."""
        if self.stage_at is None:
            return history
        return [log for log in history if "stage" in log and attempt in self.stage_at(log["step"] - 1).credited]

    def _number_of_logs(self, history: list[dict]) -> int:
        """The logs that cover the window. A log averages over the steps since the log before it."""
        steps = [log["step"] for log in history if "stage" in log and "step" in log]
        interval = max(steps[-1] - steps[-2], 1) if len(steps) > 1 else 1
        return max(math.ceil(self.window / interval), min(self.window, 2))


class KeepBestCheckpoint(TrainerCallback, ExportableState):
    """
    Keeps a copy of the checkpoint with the highest training reward of the last attempt, for each stage (the paper's choice
    of checkpoint, Appendix B). The copies are `_best-stage1` and `_best-stage2` in the output folder, and an upload to the Hub
    leaves them out. A copy belongs to the run that made it. A copy from an earlier run is renamed (`_best-stage2.1`) and ignored. The
    same holds for a copy of a later step than the step from which a run is resumed.

    Args:
        window (`int`, *optional*, defaults to `10`):
            Number of logs of the stage over which the reward is averaged.
        load_at_end (`bool`, *optional*, defaults to `False`):
            Load the best checkpoint of the run's last stage when training ends.

    Raises:
        `ValueError`: if the window is below 1, or if the run writes no checkpoints.
    """

    def __init__(self, window: int = 10, load_at_end: bool = False):
        if window < 1:
            raise ValueError(f"`window={window}` is a number of logs. Set it to 1 or more.")
        self.window, self.load_at_end, self.run = window, load_at_end, None

    def state(self) -> dict:
        """The run's identity, which its checkpoints carry in `trainer_state.json`."""
        return {"args": {"window": self.window, "load_at_end": self.load_at_end}, "attributes": {"run": self.run}}

    def on_init_end(self, args, state, control, **kwargs):
        if args.save_strategy == "no":
            raise ValueError(
                "`KeepBestCheckpoint` chooses among the checkpoints, but `save_strategy='no'` writes none. Set it to 'steps'."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        self.run = saved["attributes"]["run"] if saved else secrets.token_hex(4)
        if not state.is_world_process_zero:
            return
        for stage in (1, 2):
            kept = best_checkpoint(args.output_dir, stage)
            if kept is not None and not self._is_own(kept, state.global_step):
                name = next(name for i in count(1) if not (name := Path(f"{kept}.{i}")).exists())
                kept.rename(name)
                logger.warning(
                    f"'{kept}' belongs to an earlier run, or to a later step of this run. It was renamed to '{name.name}'."
                )

    def _is_own(self, kept: Path, step: int) -> bool:
        found = json.loads((kept / BEST).read_text())
        return found.get("run") == self.run and found["step"] <= step

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # every process writes its own part of a checkpoint
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        stages = [log["stage"] for log in state.log_history if "stage" in log]
        if not state.is_world_process_zero or not stages or not checkpoint.exists():
            return
        stage, key = int(stages[-1]), f"reward_t{args.num_attempts}"
        rewards = recent(state.log_history, key, stage, self.window)
        if not rewards:
            return
        reward = sum(rewards) / len(rewards)
        found = {"run": self.run, "step": state.global_step, "stage": stage, "reward": reward, "logs": len(rewards)}
        kept = best_checkpoint(args.output_dir, stage)
        if kept is not None and json.loads((kept / BEST).read_text())["reward"] >= reward:
            return
        new, final = (Path(args.output_dir) / f"{prefix}-stage{stage}" for prefix in ("_new-best", "_best"))
        try:
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(checkpoint, new)  # no links: a later write to the checkpoint would change the copy
            (new / BEST).write_text(json.dumps(found, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            new.rename(final)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            logger.warning(f"The checkpoint of step {state.global_step} is the best so far, but was not kept: {error}")
            return
        logger.info(f"Best checkpoint of Stage {'I' * stage}: step {state.global_step}, {key} {reward:.4f}.")


def best_checkpoint(output_dir: str | Path, stage: int | None = None) -> Path | None:
    """
    The folder that [`KeepBestCheckpoint`] keeps for a stage; by default for Stage II, or for Stage I if there is none of Stage
    II. `None` if there is no such folder.
    """
    for each in (2, 1) if stage is None else (stage,):
        if (folder := Path(output_dir) / f"_best-stage{each}" / BEST).exists():
            return folder.parent
    return None


def loaded_step(trainer) -> int | None:
    """The step of the checkpoint that was loaded when training ended. `None` if the weights are those of the last step."""
    args, state = trainer.args, trainer.state
    is_asked = args.load_best_model_at_end or _loads_best(trainer.callback_handler.callbacks)
    if trainer.is_in_train or not is_asked or state.best_model_checkpoint is None:
        return None
    file = Path(state.best_model_checkpoint, TRAINER_STATE_NAME)
    if not file.exists():  # another node may not see the files
        return None
    step = TrainerState.load_from_json(file).global_step
    return step if step != state.global_step else None


def _loads_best(callbacks: list[TrainerCallback]) -> bool:
    return any(isinstance(callback, KeepBestCheckpoint) and callback.load_at_end for callback in callbacks)


# --- called by the trainer ---


def checkpoint_to_load(callbacks: list[TrainerCallback], args, state) -> str | None:
    """
    The checkpoint to load when training has ended, if a [`KeepBestCheckpoint`] asks for it: the best one of the last stage that
    the run reached. The main process looks for it and tells the others, which may not see the files.
    """
    if not _loads_best(callbacks):
        return None
    found = [None]
    if state.is_world_process_zero:
        stage = max((int(log["stage"]) for log in state.log_history if "stage" in log), default=1)
        kept = best_checkpoint(args.output_dir, stage)
        if kept is None:
            logger.warning(
                f"No best checkpoint of Stage {'I' * stage} was kept, so the model stays as it is after the last step. "
                "Set `save_steps` and `logging_steps` so that the stage has checkpoints and logs."
            )
        found = [kept and str(kept)]
    return broadcast_object_list(found)[0]


def arrange(trainer) -> None:
    """
    Put the alarm before the trackers and progress bars, so that these show `collapse`, chart the attempts in TensorBoard, and keep
    errors of a tracker of `report_to` from ending the run.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, CollapseAlarm))
    for callback in callbacks:
        if isinstance(callback, CollapseAlarm):
            callback.stage_at = trainer.stage_at
    for callback in trackers(callbacks):
        if not hasattr(callback, "failure"):
            if isinstance(callback, TensorBoardCallback):
                _chart_attempts(callback, trainer.args)
            _let_fail(callback, trainer.args)
    open_trackio(trainer)


def trackers(callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """The trackers of `report_to` among some callbacks."""
    return [callback for callback in callbacks if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))]


def _chart_attempts(tracker: TensorBoardCallback, args) -> None:
    """Add charts to TensorBoard's tab "Custom Scalars" that show the attempts in one another, when the tracker has begun."""
    begin = tracker.on_train_begin

    @wraps(begin)
    def call(*arguments, **kwargs):
        begin(*arguments, **kwargs)
        if tracker.tb_writer is not None:
            tracker.tb_writer.add_custom_scalars({"Attempts": _charts(args.num_attempts, args.num_attempts_eval)})

    tracker.on_train_begin = call


def _charts(num_attempts: int, num_attempts_eval: int) -> dict[str, list]:
    """By title, the kind of chart and the tags of its lines."""
    train = {
        "accuracy": "accuracy_t",
        "reward": "reward_t",
        "KL, nats per token": "kl_t",
        "cut off": "completions/clipped_ratio_t",
    }
    found = {
        title: ["Multiline", [f"train/{key}{k}" for k in range(1, num_attempts + 1)]] for title, key in train.items()
    }
    held_out = [f"eval/accuracy_t{k}" for k in range(1, num_attempts_eval + 1)]
    changes = ["train/delta_i_to_c", "train/delta_c_to_i"]
    return found | {"accuracy, held out": ["Multiline", held_out], "corrected and broken": ["Multiline", changes]}


def _let_fail(tracker: TrainerCallback, args) -> None:
    """Turn the first error of a tracker into a warning, and report nothing to it from then on."""
    tracker.failure = None

    def guarded(event):
        @wraps(event)
        def call(*arguments, **kwargs):
            if tracker.failure is not None:
                return None
            try:
                return event(*arguments, **kwargs)
            except Exception as error:
                tracker.failure = error
                # TRL also logs to some trackers by itself, as long as `report_to` names them.
                args.report_to = [
                    each for each in args.report_to if INTEGRATION_TO_CALLBACK[each] is not type(tracker)
                ]
                logger.warning(f"{type(tracker).__name__} failed, so the run continues without it: {error!r}")
                return None

        return call

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(tracker, name, guarded(getattr(tracker, name)))


def open_trackio(trainer) -> None:
    """
    Open the run of trackio, or resume it by its name, if it is not open. TRL logs to trackio in every generation, which fails
    without an open run, and the callback of trackio closes the run when `train()` ends.
    """
    args = trainer.args
    for callback in trackers(trainer.callback_handler.callbacks):
        if isinstance(callback, INTEGRATION_TO_CALLBACK["trackio"]):
            if args.run_name is None:
                args.run_name = f"{Path(args.output_dir).name}-{secrets.token_hex(3)}"
            callback.on_train_begin(args, trainer.state, trainer.control, model=trainer.model)
