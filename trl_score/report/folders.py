"""What the folders of a report hold: evaluations, training runs and scaling studies, each with a name of its own."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from ..evaluation import Evaluation, load_evaluation
from ..model_card import RUN
from ..records import SETTINGS, read_json
from ..resuming import checkpoints, is_whole
from ..scaling import ARMS, SCALING


STATE = "trainer_state.json"
# Settings that tell evaluations of one model apart, in the order in which they are tried, and how a name has them.
NAMED = {
    "instruction": "instruction {}",
    "temperature": "temperature {:g}",
    "num_attempts": "{} attempts",
    "task": "{}",
    "split": "{} split",
    "num_samples": "{} samples",
    "max_completion_length": "{} tokens",
    "quantization": "quantized",
    "dtype": "{}",
    "backend": "{}",
    "chat_template_kwargs": "{}",
    "top_p": "top-p {:g}",
    "seed": "seed {}",
    "num_problems": "{} problems",
}


@dataclass
class Run:
    """
    A training.

    Attributes:
        history (`list[dict]`):
            The training logs, by optimizer step.
        settings (`dict[str, str]`):
            The settings as the model card shows them; empty if the run wrote none.
        step, max_steps (`int`):
            Optimizer steps done and planned. Of a run that is not finished, `step` is that of the last checkpoint.
    """

    history: list[dict]
    settings: dict[str, str] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0


@dataclass
class Found:
    """
    What the folders hold, by name.

    Attributes:
        instructions (`dict[str, str]`):
            The correction instructions of the evaluations, by letter.
        trained (`set[str]`):
            Names of the evaluations of models that SCoRe trained.
    """

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    scalings: dict[str, list[dict]] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)

    def instruction_of(self, evaluation: Evaluation) -> str:
        """The letter of an evaluation's instruction."""
        said = instruction(evaluation)
        return next((letter for letter, text in self.instructions.items() if text == said), "")


def find(folders: list[str | Path]) -> Found:
    """
    Read evaluations (`settings.json`), training runs (`trainer_state.json`, of a run that is not finished in its last
    checkpoint) and scaling studies (`scaling.json`) from folders and from the folders directly in them, each once. Collections
    of rollouts to learn from are left out.

    Raises:
        `FileNotFoundError`: If a folder holds none of them.
    """
    found, seen, evaluations = Found(), set(), []
    for given in map(Path, folders):
        if not given.is_dir():
            raise FileNotFoundError(f"'{given}' is no folder.")
        if given.resolve() in seen:
            continue
        inside = sorted(path for path in given.iterdir() if path.is_dir())
        shown = any(folder.resolve() in seen for folder in inside)
        for folder in [given, *inside]:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if is_evaluation(folder):
                evaluations.append((folder, load_evaluation(folder)))
                shown = True
            # Checkpoints, and copies of them that `KeepBestCheckpoint` keeps, have the run's own history.
            copy = folder != given and folder.name.startswith(("checkpoint-", "_"))
            if not copy and (run := read_run(folder)) is not None:
                found.runs[_unique(folder.resolve().name, folder, found.runs)] = run
                shown = True
            if (folder / SCALING).exists():
                study = read_json(folder / SCALING)
                found.scalings[_unique(_model(study["settings"]), folder, found.scalings)] = study["budgets"]
                shown = True
        if not shown:
            raise FileNotFoundError(
                f"'{given}' holds no evaluation ({SETTINGS}), training run ({STATE}, in the folder or in a checkpoint) or "
                f"scaling study ({SCALING})."
            )
    said = list(dict.fromkeys(instruction(evaluation) for _, evaluation in evaluations))
    found.instructions = {_letters(i): text for i, text in enumerate(said)}
    for (folder, evaluation), name in zip(evaluations, _names(found, evaluations), strict=True):
        name = _unique(name, folder, found.evaluations)
        found.evaluations[name] = evaluation
        model = Path(evaluation.settings["model"])
        if (
            "score" in model.name.lower()
            or {model.name, model.parent.name} & found.runs.keys()
            or os.path.exists(model / RUN)  # False for a name that no file can have
        ):
            found.trained.add(name)
    return found


def read_run(folder: Path) -> Run | None:
    """
    The training whose output folder or checkpoint this is, from the newest state in it; `None` if it has no logs yet.
    """
    states = [each for each in (folder, *checkpoints(folder)[:2]) if is_whole(each)]
    states = [(each, read_json(each / STATE)) for each in states]
    if not states:
        return None
    where, state = max(states, key=lambda pair: len(pair[1]["log_history"]))
    history = [log for log in state["log_history"] if "stage" in log]
    if not history:
        return None
    settings = {}
    for file in (folder / RUN, where / RUN, folder.parent / RUN):
        if file.exists() and (file.parent != folder.parent or folder.name.startswith("checkpoint-")):
            settings = read_json(file)["settings"]
            break
    step = state.get("global_step", history[-1]["step"])
    return Run(history, settings, step, state.get("max_steps", step))


def is_evaluation(folder: Path) -> bool:
    """Not the rollouts of a scaling study, nor a collection, nor another program's settings."""
    file = folder / SETTINGS
    if (
        not file.exists()
        or not any(folder.glob("rollouts*.jsonl"))
        or (folder.name in ARMS and (folder.parent / SCALING).exists())
    ):
        return False
    return not read_json(file).get("token_ids")


def instruction(evaluation: Evaluation) -> str:
    """What the user says between the attempts; in Self-Refine, the two turns."""
    settings = evaluation.settings
    if settings.get("correction_instructions"):
        return "Each problem has its own, in its column `correction_instruction`."
    if settings.get("self_refine"):
        turns = settings.get("feedback_instruction"), settings.get("refine_instruction")
        return "\n\n".join(filter(None, turns))
    return settings.get("correction_instruction") or ""


def _model(settings: dict) -> str:
    """The last part of the model's name; of a checkpoint, with its run."""
    path = Path(settings["model"])
    is_checkpoint = path.name.startswith(("checkpoint-", "_best-"))
    return f"{path.parent.name}/{path.name}" if is_checkpoint else path.name or str(path)  # the folder "." has no name


def _names(found: Found, evaluations: list[tuple[Path, Evaluation]]) -> list[str]:
    """The model of each evaluation, and as many settings as tell it from other evaluations of that model."""
    names, groups = [], defaultdict(list)
    for i, (_, evaluation) in enumerate(evaluations):
        names.append(_model(evaluation.settings) + evaluation.mode)
        groups[names[i]].append(i)
    for group in groups.values():
        for key, text in NAMED.items():
            if len({names[i] for i in group}) == len(group):
                break
            values = {i: evaluations[i][1].settings.get(key) for i in group}
            if key == "instruction":
                values = {i: found.instruction_of(evaluations[i][1]) for i in group}
            if len(set(map(str, values.values()))) > 1:
                for i, value in values.items():
                    if value not in (None, "", {}):
                        names[i] += ", greedy" if (key, value) == ("temperature", 0) else f", {text.format(value)}"
    return names


def _letters(number: int) -> str:
    """A, B, .. Z, AA, AB, .."""
    letters = ascii_uppercase[number % 26]
    return letters if number < 26 else _letters(number // 26 - 1) + letters


def _unique(name: str, folder: Path, taken: dict) -> str:
    if name in taken:
        name = f"{name} ({folder.name})"
    number, first = 2, name
    while name in taken:
        name, number = f"{first} {number}", number + 1
    return name
