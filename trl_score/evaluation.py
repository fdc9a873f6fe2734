"""
How well a model corrects itself: `N` attempts at the problems of a task, with the rollout, the correction instruction and the
grading of training.

An evaluation is a folder: `settings.json` (what was asked for), `rollouts.jsonl` (one line per rollout, with all attempts)
and `summary.json` (the metrics with their intervals). One that was interrupted goes on where it stopped.
"""

import json
import logging
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from .metrics import bootstrap_intervals, edit_distance_ratio, label, mcnemar
from .sampling import BACKENDS, Decoding, Sampler, as_sampler, name_of
from .tasks import Task, get_task
from .tasks.base import first


logger = logging.getLogger(__name__)

ROLLOUTS, SETTINGS, SUMMARY = "rollouts.jsonl", "settings.json", "summary.json"


@dataclass
class Evaluation:
    """
    What an evaluation found.

    Attributes:
        settings (`dict`):
            What was evaluated and how: model, task, split, problems, attempts, decoding, seed, versions.
        rollouts (`list[dict]`):
            One per rollout, by problem and sample: `index`, `sample`, `prompt`, `attempts` (text), `rewards`, `correct`,
            `num_tokens`, `truncated`, `edit_distance_ratio`, `changed_answer`, and `level` where the task has one. In
            Self-Refine also `feedback` (text) and `feedback_num_tokens`, of the feedback between the attempts.
        summary (`dict`):
            `metrics`: name to `{value, low, high}`, with 95 % bootstrap intervals over problems; `by_level`; `mcnemar_p`.
    """

    settings: dict
    rollouts: list[dict]
    summary: dict = field(default_factory=dict)

    def __post_init__(self):
        self.summary = self.summary or summarize(self.rollouts)

    @property
    def mode(self) -> str:
        """What a table says after the model's name."""
        return ", Self-Refine" if self.settings.get("self_refine") else ""

    def __str__(self) -> str:
        return table([self])


def evaluate_self_correction(
    model,
    task: str | Task,
    *,
    split: str = "test",
    num_attempts: int = 2,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    max_completion_length: int = 1024,
    correction_instruction: str | None = None,
    self_refine: bool = False,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 42,
    output_dir: str | Path | None = None,
    backend: str = "transformers",
    tokenizer=None,
    data_dir: str | None = None,
    **kwargs,
) -> Evaluation:
    """
    Have a model make `num_attempts` attempts at each problem of a split, and grade all of them.

    Args:
        model (`str`, `PreTrainedModel` or [`Sampler`]):
            Hub id or folder of a model or adapter, the model itself, or where attempts come from.
        task (`str` or [`Task`]):
            A task, or its name.
        split (`str`, *optional*, defaults to `"test"`):
            Which problems.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout, with those that a task gives (offline repair). The paper goes up to 10 (Appendix A.3).
        temperature, top_p (`float`, *optional*, default to `0.0` and `1.0`):
            Decoding; temperature 0 is greedy.
        num_samples (`int`, *optional*, defaults to `1`):
            Rollouts per problem. With more than one, every metric is the mean over samples (Avg@k).
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Tokens of one attempt.
        correction_instruction (`str`, *optional*):
            Instead of the task's.
        self_refine (`bool`, *optional*, defaults to `False`):
            Self-Refine (Madaan et al. 2023, https://huggingface.co/papers/2303.17651) instead of the correction instruction:
            after an attempt the model is asked for feedback on it (`task.feedback_instruction`), then for the next attempt
            (`task.refine_instruction`).
        batch_size (`int`, *optional*, defaults to `32`):
            Rollouts at a time.
        limit (`int`, *optional*):
            Only the first problems.
        seed (`int`, *optional*, defaults to `42`):
            Of the sampling.
        output_dir (`str`, *optional*):
            Folder for the results. One that was started with the same settings is finished; without a folder nothing is
            written.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, `"vllm"` or `"endpoint"`, if `model` is a name.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            If it is not the model's own.
        data_dir (`str`, *optional*):
            Folder with the task's rows, if `task` is a name.
        **kwargs:
            For the backend: `quantization_config`, `dtype`, `base_url`, ..

    Returns:
        [`Evaluation`].

    Raises:
        `ValueError`: If a setting cannot work, or the folder holds another evaluation.
    """
    if isinstance(task, str):
        task = get_task(task, data_dir=data_dir)
    given = task.num_given_attempts
    if num_attempts <= max(given, 1):
        raise ValueError(
            f"`num_attempts={num_attempts}` leaves nothing to compare: '{task.name}' gives {given} attempts, and a correction "
            f"needs one before it. Set it to {max(given, 1) + 1} or more."
        )
    if num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ValueError(
            f"`num_samples={num_samples}` with `temperature={temperature}`: greedy decoding gives the same rollout every time. "
            "Set `temperature` above 0, or `num_samples` to 1."
        )
    if batch_size < 1 or max_completion_length < 1 or temperature < 0:
        raise ValueError(
            f"`batch_size={batch_size}`, `max_completion_length={max_completion_length}` and `temperature={temperature}`: set "
            "the first two to 1 or more, the last to 0 or more."
        )
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Expected one of: {sorted(BACKENDS)}.")
    if self_refine and correction_instruction:
        raise ValueError(
            "`self_refine=True` asks with the task's `feedback_instruction` and `refine_instruction`, so a "
            "`correction_instruction` would never be said. Leave one of the two out."
        )
    rows = first(task.load(split), limit)
    if self_refine:
        turns = {name: getattr(task, name) for name in ("feedback_instruction", "refine_instruction")}
    else:
        turns = {"correction_instruction": correction_instruction or task.correction_instruction}
    if given:  # the prompt ends with the first of them
        asked = {"role": "user", "content": next(iter(turns.values()))}
        rows = rows.map(lambda row: {"prompt": [*row["prompt"][:-1], asked]})
    decoding = Decoding(temperature, top_p, max_completion_length)
    settings = {
        "model": name_of(model),
        "backend": backend if isinstance(model, str) else getattr(model, "backend", "transformers"),
        "task": task.name,
        "split": split,
        "num_problems": len(rows),
        "num_attempts": num_attempts,
        "num_samples": num_samples,
        **asdict(decoding),
        **({"self_refine": True} if self_refine else {}),  # what plain ones do not have: their older folders go on
        **turns,
        "batch_size": batch_size,
        "seed": seed,
    }
    store = Store(output_dir, settings)
    make_sampler = partial(as_sampler, model, backend, tokenizer, **kwargs)
    run(make_sampler, task, rows, num_samples, store, list(turns.values()), num_attempts, decoding, batch_size, seed)
    return store.finish()


def run(
    make_sampler: Callable[[], Sampler],
    task: Task,
    rows: Dataset,
    num_samples: int,
    store: "Store",
    turns: list[str],
    num_attempts: int,
    decoding: Decoding,
    batch_size: int,
    seed: int,
) -> None:
    """
    Make and grade the rollouts that the store has not, in batches of prompts of like length, the longest first. `turns` are
    what the user says from an attempt to the next: the correction instruction, or the two of Self-Refine, whose feedback is
    between them. Of several processes each takes its share of the batches. Where nothing is left to do, no sampler is made.
    """
    todo = [(index, sample) for index in range(len(rows)) for sample in range(num_samples)]
    if len(store.done) >= len(todo):
        return
    sampler = make_sampler()
    prompts = rows["prompt"]
    lengths = [sampler.length(prompt) for prompt in prompts]
    todo = sorted(todo, key=lambda item: (-lengths[item[0]], item))
    given, keep_tokens = task.num_given_attempts, store.settings.get("token_ids", False)
    instructions = turns * (num_attempts - max(given, 1))
    if given:  # the prompt ends with the first
        instructions = instructions[1:]
    # Of the texts that are sampled, the last is an attempt, and so is each `step`-th before it; the others are feedback.
    step = len(turns)
    offset = len(instructions) % step
    own = range(store.state.process_index * batch_size, len(todo), store.state.num_processes * batch_size)
    for start in tqdm(own, desc=f"{task.name}: {len(todo)} rollouts", unit="batch"):
        batch = todo[start : start + batch_size]  # the same batches, with the same seeds, also when it goes on
        missing = [i for i, item in enumerate(batch) if item not in store.done]
        if not missing:
            continue
        sampled = sampler.sample(
            [prompts[index] for index, _ in batch], instructions, decoding, seed + 1000 * start, given
        )
        rollouts = [row[offset::step] for row in sampled]
        feedback = [row[1 - offset :: step] for row in sampled] if step == 2 else None
        chosen = rows.select([batch[i][0] for i in missing])
        texts = [
            [*_given_attempts(prompts[batch[i][0]], given), *(attempt.text for attempt in rollouts[i])]
            for i in missing
        ]
        store.add(
            [
                {
                    "index": batch[i][0],
                    "sample": batch[i][1],
                    **record,
                    "num_tokens": [None] * given + [attempt.num_tokens for attempt in rollouts[i]],
                    "truncated": [False] * given + [attempt.truncated for attempt in rollouts[i]],
                    **({"token_ids": [attempt.token_ids for attempt in rollouts[i]]} if keep_tokens else {}),
                    **(
                        {
                            "feedback": [each.text for each in feedback[i]],
                            "feedback_num_tokens": [each.num_tokens for each in feedback[i]],
                        }
                        if feedback
                        else {}
                    ),
                }
                for i, record in zip(missing, grade(task, chosen, texts), strict=True)
            ]
        )


def _given_attempts(prompt: str | list[dict], given: int) -> list[str]:
    """The attempts that a prompt of offline repair holds."""
    return [turn["content"] for turn in prompt if turn["role"] == "assistant"][-given:] if given else []


def grade(task: Task, rows: Dataset, texts: list[list[str]]) -> Iterator[dict]:
    """Records of rollouts: their attempts graded, and compared with the ones before."""
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    prompts = rows["prompt"]
    chat = not isinstance(prompts[0], str)
    rewards = []
    for attempt in zip(*texts, strict=True):
        completions = [[{"role": "assistant", "content": text}] for text in attempt] if chat else list(attempt)
        rewards.append(task.reward(completions, **columns))
    other = [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
    answers = [
        [task.answer(text, **_without(row, "text")) for text in attempts]
        for attempts, row in zip(texts, other, strict=True)
    ]
    pairs = [(first, last) for first, last in ((row[0], row[-1]) for row in answers) if first and last]
    same = (
        dict(zip(pairs, task.same_answers([a for a, _ in pairs], [b for _, b in pairs]), strict=True)) if pairs else {}
    )
    for i, attempts in enumerate(texts):
        first, last = answers[i][0], answers[i][-1]
        scores = [reward[i] for reward in rewards]
        yield {
            "prompt": prompts[i],
            "attempts": attempts,
            "rewards": scores,
            "correct": [None if score is None or math.isnan(score) else score >= 1 for score in scores],
            "answers": answers[i],
            "edit_distance_ratio": [edit_distance_ratio(one, other) for one, other in pairwise(attempts)],
            "changed_answer": not same[first, last] if first and last else first != last,
            **({"level": other[i]["level"]} if other[i].get("level") is not None else {}),
        }


def _without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


def processes() -> PartialState:
    """The processes that `accelerate launch` started, also without an accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def disconnect() -> None:
    """For the end of a script: no process goes before all are done, nor while its connections still have work."""
    state = processes()
    state.wait_for_everyone()
    if state.use_distributed:
        time.sleep(0.1)  # gloo's thread frees the tensors of the last call, and aborts if Python is gone by then
    state.destroy_process_group()


class Store:
    """
    The rollouts of an evaluation, in a folder or in memory. In a folder, the processes of `accelerate launch` share the work:
    each writes a file of its own, and reads all.
    """

    def __init__(self, output_dir: str | Path | None, settings: dict):
        self.folder = None if output_dir is None else Path(output_dir)
        self.settings = settings
        self.rollouts: list[dict] = []
        self.state = processes()
        if self.folder is not None:
            with self.state.main_process_first():
                self._open(output_dir)
            self.state.wait_for_everyone()  # nobody writes while another still reads
        elif self.state.num_processes > 1:
            raise ValueError("Processes share their rollouts through a folder, but `output_dir` is None. Set it.")
        self.done = {(row["index"], row["sample"]) for row in self.rollouts}
        if self.done:
            logger.info(f"{len(self.done)} rollouts are already in {self.folder}.")

    def _open(self, output_dir: str | Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        if file.exists():
            before = json.loads(file.read_text("utf-8"))
            different = [name for name in self.settings if before.get(name) != self.settings[name]]
            if different:
                changes = ", ".join(
                    f"{name} {before.get(name)!r} instead of {self.settings[name]!r}" for name in different
                )
                raise ValueError(
                    f"`output_dir={str(output_dir)!r}` holds another evaluation: {changes}. Take another folder."
                )
        else:
            text = json.dumps(self.settings | {"versions": versions()}, indent=2, ensure_ascii=False)
            file.write_text(text, "utf-8")
        self.rollouts = read_rollouts(self.folder)

    @property
    def file(self) -> Path:
        """Where this process writes."""
        number = self.state.process_index
        return self.folder / (f"rollouts-{number}.jsonl" if number else ROLLOUTS)

    def add(self, records: list[dict]) -> None:
        self.rollouts += records
        self.done |= {(row["index"], row["sample"]) for row in records}
        if self.folder is not None:
            lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
            with self.file.open("ab") as handle:
                handle.write(lines)

    def all_rollouts(self) -> list[dict]:
        """Those of all processes, by problem and sample."""
        if self.state.num_processes > 1:
            self.state.wait_for_everyone()
            self.rollouts = read_rollouts(self.folder)
        self.rollouts.sort(key=position)
        return self.rollouts

    def finish(self) -> Evaluation:
        evaluation = Evaluation(self.settings, self.all_rollouts())
        if self.folder is not None and self.state.is_main_process:
            text = json.dumps(self.settings | evaluation.summary, indent=2, ensure_ascii=False)
            (self.folder / SUMMARY).write_text(text, "utf-8")
        return evaluation


def position(row: dict) -> tuple[int, int]:
    return row["index"], row["sample"]


def read_rollouts(folder: Path) -> list[dict]:
    """What a folder has; a line that was being written when a process stopped is dropped, also from its file."""
    rollouts = {}
    for file in sorted(folder.glob("rollouts*.jsonl")):
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with file.open("r+b") as handle:
                handle.truncate(len(whole))
        for line in whole.splitlines():
            row = json.loads(line)
            rollouts[position(row)] = row
    return sorted(rollouts.values(), key=position)


def versions() -> dict[str, str]:
    names = ("trl-score", "trl", "transformers", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def load_rollouts(folder: str | Path) -> tuple[dict, list[dict]]:
    """
    Settings and rollouts of an evaluation or a collection, by problem and sample.

    Raises:
        `FileNotFoundError`: If the folder holds none.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"'{folder}' holds no evaluation: it has no {SETTINGS}.")
    return json.loads((folder / SETTINGS).read_text("utf-8")), read_rollouts(folder)


def load_evaluation(folder: str | Path) -> Evaluation:
    """
    An evaluation from its folder.

    Raises:
        `FileNotFoundError`: If the folder holds none.
    """
    return Evaluation(*load_rollouts(folder))


def summarize(rollouts: list[dict]) -> dict:
    """
    The metrics of Section 3 and others, with 95 % bootstrap intervals over problems.

    Args:
        rollouts (`list[dict]`):
            See [`Evaluation`].

    Returns:
        `dict`: `metrics`, `by_level` (the accuracies), `mcnemar_p` (of the last attempt against the first; `None` with
        several samples per problem, which are not independent), `num_problems`, `num_samples`, `num_ungraded`.
    """
    graded = [row for row in rollouts if None not in row["correct"]]
    problems = defaultdict(list)
    for row in graded:
        problems[row["index"]].append(row)
    groups = list(problems.values())
    samples = max(Counter(row["index"] for row in rollouts).values(), default=0)
    by_level = defaultdict(list)
    for group in groups:
        if "level" in group[0]:
            by_level[group[0]["level"]].append(group)
    summary = {
        "metrics": _metrics(groups),
        "by_level": {
            str(level): {"num_problems": len(by_level[level]), **_metrics(by_level[level], "accuracy")}
            for level in sorted(by_level)
        },
        "mcnemar_p": mcnemar([row["correct"][0] for row in graded], [row["correct"][-1] for row in graded])
        if samples == 1 and graded
        else None,
        "num_problems": len({row["index"] for row in rollouts}),
        "num_samples": samples,
        "num_ungraded": len(rollouts) - len(graded),
    }
    return summary


def _metrics(groups: list[list[dict]], only: str = "") -> dict[str, dict[str, float]]:
    if not groups:
        return {}
    attempts = range(len(groups[0][0]["correct"]))
    last = attempts[-1]
    values = {f"accuracy_t{k + 1}": lambda row, k=k: row["correct"][k] for k in attempts}
    values |= {
        f"delta_t{k}_t{k + 1}": lambda row, k=k: row["correct"][k] - row["correct"][k - 1] for k in attempts[1:]
    }
    values |= {
        f"delta_t1_t{last + 1}": lambda row: row["correct"][-1] - row["correct"][0],
        "delta_i_to_c": lambda row: row["correct"][-1] and not row["correct"][0],
        "delta_c_to_i": lambda row: row["correct"][0] and not row["correct"][-1],
        "correction_rate": lambda row: row["correct"][-1] and not row["correct"][0],
        "edit_distance_ratio": lambda row: sum(row["edit_distance_ratio"]) / last,
        "changed_answers": lambda row: row["changed_answer"],
    }
    for k in attempts:
        if all(row["num_tokens"][k] is not None for group in groups for row in group):
            values[f"truncated_t{k + 1}"] = lambda row, k=k: row["truncated"][k]
            values[f"num_tokens_t{k + 1}"] = lambda row, k=k: row["num_tokens"][k]
    values = {name: value for name, value in values.items() if name.startswith(only)}
    numerators = np.array(
        [[np.mean([float(value(row)) for row in group]) for value in values.values()] for group in groups]
    )
    denominators = np.ones_like(numerators)
    for column, name in enumerate(values):
        if name == "correction_rate":  # of those that were wrong
            denominators[:, column] = [np.mean([not row["correct"][0] for row in group]) for group in groups]
    low, high = bootstrap_intervals(numerators, denominators)
    with np.errstate(invalid="ignore"):
        mean = numerators.sum(axis=0) / denominators.sum(axis=0)
    return {
        name: {"value": float(mean[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(values)
    }


def table(evaluations: list[Evaluation]) -> str:
    """Evaluations side by side as a table in Markdown: percent, with 95 % intervals, number of problems and decoding."""
    names = [name for name in evaluations[0].summary["metrics"] if not name.startswith("num_tokens")]
    lines = [
        "| | " + " | ".join(f"{evaluation.settings['model']}{evaluation.mode}" for evaluation in evaluations) + " |"
    ]
    lines.append("|---|" + "---:|" * len(evaluations))
    for name in names:
        cells = []
        for evaluation in evaluations:
            metric = evaluation.summary["metrics"].get(name)
            cells.append(
                ""
                if metric is None
                else "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * v for k, v in metric.items()})
            )
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    for name, text in (
        ("p (exact McNemar test, last against first)", _p),
        ("problems x samples", _size),
        ("decoding", _decoding),
    ):
        lines.append(f"| {name} | " + " | ".join(map(text, evaluations)) + " |")
    return "\n".join(lines)


def _p(evaluation: Evaluation) -> str:
    p = evaluation.summary["mcnemar_p"]
    return "" if p is None else f"{p:.2g}"


def _size(evaluation: Evaluation) -> str:
    return f"{evaluation.summary['num_problems']} x {evaluation.summary['num_samples']}"


def _decoding(evaluation: Evaluation) -> str:
    temperature = evaluation.settings["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    if evaluation.settings["top_p"] != 1:
        how += f", top-p {evaluation.settings['top_p']:g}"
    return f"{how}, {evaluation.settings['max_completion_length']} tokens"
