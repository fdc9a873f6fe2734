"""
A job: attempts at the problems of a task, to be sampled and graded with the rollout, the correction instruction and the grading of
training. Evaluation, collection and scaling are jobs.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from . import fingerprints
from .arguments import RolloutArguments
from .checks import check_prompts
from .decoding import Decoding
from .fingerprints import hub_arguments
from .metrics import edit_distance_ratio
from .records import Store, check_folder
from .rollout import load_rollout_settings
from .sampling import Sampler, keep_random_state, open_model
from .tasks import Task, get_task
from .tasks.base import first
from .tasks.dataset import DatasetTask


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Job(RolloutArguments):
    """
    Attempts to be sampled and graded: what `evaluate`, `collect` and `scale` share, and what their `settings.json` holds.

    The caller's arguments are those of [`evaluate_self_correction`], and `token_ids`, which keeps the tokens of the attempts. The
    fields from `model` on are found when the model is opened, and tell the results from those of another model or other problems.
    """

    task: str
    self_refine: bool = False
    feedback_instruction: str | None = None
    refine_instruction: str | None = None
    token_ids: bool = False
    num_given_attempts: int = 0

    model: str = ""
    backend: str = ""
    weights: str | None = None
    dtype: str | None = None
    quantization: dict | str | None = None
    tokenizer: dict | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    decoding: str = ""
    extra_body: dict = field(default_factory=dict)
    num_problems: int = 0
    data: str = ""
    grader: str = ""

    def __post_init__(self):
        if self.num_attempts < 1 or self.num_samples < 1 or self.batch_size < 1 or self.max_completion_length < 1:
            raise ValueError(
                f"`num_attempts={self.num_attempts}`, `num_samples={self.num_samples}`, `batch_size={self.batch_size}` and "
                f"`max_completion_length={self.max_completion_length}`: set each to 1 or more."
            )
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError(
                f"`temperature={self.temperature}` and `top_p={self.top_p}`: set the first to 0 or more, the second above 0 and at "
                "most to 1."
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"`num_samples={self.num_samples}` with `temperature={self.temperature}`: greedy decoding gives the same rollout "
                "every time. Set `temperature` above 0, or `num_samples` to 1."
            )

    @property
    def turns(self) -> list[str]:
        """What the user says from an attempt to the next. In Self-Refine the model's feedback is between the two turns."""
        if self.self_refine:
            return [self.feedback_instruction, self.refine_instruction]
        return [self.correction_instruction]


@dataclass(frozen=True)
class Plan:
    """
    A job, and what it is done with.

    Attributes:
        job ([`Job`]):
            How attempts are sampled.
        task ([`~trl_score.tasks.Task`]):
            Whose problems they are at, and what grades them.
        open (`Callable`):
            Opens the model, once: [`~trl_score.sampling.open_model`].
        limit (`int`, *optional*):
            Use the first problems only.
        output_dir (`str`, *optional*):
            Folder for the results; without one they stay in memory.
        shuffled (`bool`, *optional*, defaults to `False`):
            Take the problems in a random order, by the job's seed: many datasets are sorted.
        one_instruction (`bool`, *optional*, defaults to `False`):
            Refuse problems that bring their own correction instruction.
    """

    job: Job
    task: Task
    open: Callable[[], tuple[dict, Callable[[], Sampler]]]
    limit: int | None = None
    output_dir: str | Path | None = None
    shuffled: bool = False
    one_instruction: bool = False

    @classmethod
    def of(
        cls,
        model,
        task: str | Task,
        *,
        data_dir: str | None = None,
        limit: int | None = None,
        output_dir: str | Path | None = None,
        correction_instruction: str | None = None,
        self_refine: bool = False,
        **settings,
    ) -> "Plan":
        """
        A plan from the arguments of [`~trl_score.evaluation.evaluate_self_correction`]. No model is opened yet.

        Raises:
            `ValueError`: If a setting cannot work.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"`limit={limit}` leaves no problem. Set it to 1 or more, or leave it out.")
        if correction_instruction is not None and not correction_instruction.strip():
            raise ValueError(
                "`correction_instruction` is empty, so the second attempt would not be asked to correct the first. Set it to a "
                "sentence that does not say whether the attempt was right, or leave it out for the model's or the task's."
            )
        if self_refine and correction_instruction:
            raise ValueError(
                "`self_refine=True` asks with the task's `feedback_instruction` and `refine_instruction`, so a "
                "`correction_instruction` would never be said. Leave one of the two out."
            )
        if output_dir is not None:
            check_folder(output_dir)
        if isinstance(task, str):
            task = get_task(task, data_dir=data_dir)
        if self_refine:
            turns = {name: getattr(task, name) for name in ("feedback_instruction", "refine_instruction")}
        else:
            trained = None if correction_instruction else trained_instruction(model, **settings)
            turns = {"correction_instruction": correction_instruction or trained or task.correction_instruction}
            if trained not in (None, task.correction_instruction):
                logger.info(
                    f"The user's turn between the attempts is the one that '{model}' was trained with: {trained!r}. "
                    "`correction_instruction` sets another one."
                )
        own = {each.name for each in fields(RolloutArguments)} | {"token_ids"}
        job = Job(
            task=task.name,
            self_refine=self_refine,
            num_given_attempts=task.num_given_attempts,
            **turns,
            **{name: settings.pop(name) for name in own & settings.keys()},
        )
        return cls(job, task, cache(partial(open_model, model, **settings)), limit, output_dir)

    def asked(self, rows: Dataset) -> Dataset:
        """Problems as the model is asked: a prompt of offline repair ends with the first turn."""
        job = self.job
        if job.num_given_attempts:
            asked = self.instructions(rows) or [job.turns[0]] * len(rows)
            rows = rows.map(
                lambda row, i: {"prompt": [*row["prompt"][:-1], {"role": "user", "content": asked[i]}]},
                with_indices=True,
            )
        return rows

    def problems(self) -> Dataset:
        """The problems, as the task gives them."""
        rows, job = self.task.load(self.job.split), self.job
        if len(rows) == 0:
            raise ValueError(f"The split '{job.split}' of '{self.task.name}' has no problems. Take another split.")
        check_prompts(f"The split '{job.split}' of '{self.task.name}'", rows)
        return first(rows.shuffle(seed=job.seed % 2**32) if self.shuffled else rows, self.limit)  # -1 is a seed too

    def instructions(self, rows: Dataset) -> list[str] | None:
        """
        The correction instruction of each problem, if the rows have a column `correction_instruction`; `None` where all are asked
        with the same turns, as in Self-Refine.

        Raises:
            `ValueError`: If an instruction is empty, or the plan allows for no such column.
        """
        if "correction_instruction" not in rows.column_names or self.job.self_refine or self.job.num_attempts == 1:
            return None
        if self.one_instruction:
            raise ValueError(
                "`correction_instruction` is set, but the rows have a column `correction_instruction`, which would override it row "
                "by row. Leave the argument out, or remove the column. The baselines need one instruction for all rows: for them, "
                "remove the column."
            )
        own = list(rows["correction_instruction"])
        for index, instruction in enumerate(own):
            if instruction is not None and not instruction.strip():
                raise ValueError(
                    f"The column `correction_instruction` is empty in row {index}, which would not ask for a correction. Set it to a "
                    "sentence, or to None for the common one."
                )
        return [instruction or self.job.correction_instruction for instruction in own]


@keep_random_state()
def sample_rollouts(plan: Plan) -> tuple[Job, Store]:
    """
    Sample and grade the rollouts of a plan that are not in its folder yet. Batches are divided among the processes. If nothing is
    missing, no model is loaded.

    Returns:
        The job with the identity of model and problems, and its rollouts.
    """
    task = plan.task
    identity, make_sampler = plan.open()
    given = plan.problems()
    problems = fingerprints.of_rows(given)  # the same for every instruction, so that evaluations can be compared
    rows = plan.asked(given)
    found = {"num_problems": len(rows), "data": fingerprints.fingerprint(problems), "grader": task.grader}
    job = replace(plan.job, **identity, **found)
    by_problem = plan.instructions(rows)
    # Not in older folders, whose rollouts were sampled without the column.
    by_row = {} if by_problem is None else {"correction_instructions": "by row"}
    store = Store(plan.output_dir, asdict(job) | by_row, problems)
    todo = [(index, sample) for index in range(len(rows)) for sample in range(job.num_samples)]
    if len(store.done) == len(todo):
        return job, store
    sampler, prompts = make_sampler(), rows["prompt"]
    lengths = [sampler.length(prompt) for prompt in prompts]
    batches = by_prompt_length(todo, lengths, job.batch_size)
    own = batches[store.state.process_index :: store.state.num_processes]
    for batch in tqdm(own, desc=f"{task.name}: {len(todo)} rollouts", unit="batch"):
        missing = [i for i, item in enumerate(batch) if item not in store.done]
        if missing:
            # Sampled with the whole batch, so that an interrupted run ends with the rollouts of an uninterrupted one.
            turns = job.turns if by_problem is None else [[by_problem[index] for index, _ in batch]]
            rollouts = _sample_batch(job, sampler, batch, [prompts[index] for index, _ in batch], turns)
            if by_problem is not None:
                rollouts = [row | {"correction_instruction": by_problem[row["index"]]} for row in rollouts]
            rows_of_batch = rows.select([batch[i][0] for i in missing])
            rollouts = [rollouts[i] for i in missing]
            texts, token_ids = ([rollout[name] for rollout in rollouts] for name in ("attempts", "token_ids"))
            graded = grade(task, rows_of_batch, texts, token_ids)
            records = [rollout | record for rollout, record in zip(rollouts, graded, strict=True)]
            if not job.token_ids:
                for record in records:
                    del record["token_ids"]
            store.add(records)
    return job, store


def by_prompt_length(
    rollouts: list[tuple[int, int]], lengths: list[int], batch_size: int
) -> list[list[tuple[int, int]]]:
    """
    Batches of at most `batch_size` rollouts, given as problem and sample, with the longest prompts first. Each prompt is at least
    half as long as the longest of its batch, so that one long prompt does not pad the others.
    """
    batches = []
    for rollout in sorted(rollouts, key=lambda rollout: (-lengths[rollout[0]], rollout)):
        length = lengths[rollout[0]]
        if not batches or len(batches[-1]) == batch_size or 2 * length < lengths[batches[-1][0][0]]:
            batches.append([])
        batches[-1].append(rollout)
    return batches


def _sample_batch(
    job: Job, sampler: Sampler, batch: list[tuple[int, int]], prompts: list, turns: list[str | list[str]]
) -> list[dict]:
    """Rollouts before they are graded: the attempts, and the feedback between them in Self-Refine."""
    given, step = job.num_given_attempts, len(turns)
    instructions = turns * (job.num_attempts - max(given, 1))
    if given:  # the prompt ends with the first
        instructions = instructions[1:]
    # Of the texts that are sampled, the last is an attempt, and so is each `step`-th before it; the others are feedback.
    offset = len(instructions) % step
    decoding = Decoding(job.temperature, job.top_p, job.max_completion_length)
    sampled = sampler.sample(prompts, instructions, decoding, seed_of(job.seed, batch), given)
    if list(map(len, sampled)) != [len(instructions) + 1] * len(prompts):
        raise ValueError(
            f"`{type(sampler).__name__}.sample` returned {len(sampled)} rows of {sorted(set(map(len, sampled)))} attempts for "
            f"{len(prompts)} prompts and {len(instructions)} instructions. It must return a row of {len(instructions) + 1} for each prompt."
        )
    rollouts = []
    for (index, sample), prompt, texts in zip(batch, prompts, sampled, strict=True):
        attempts = texts[offset::step]
        before = [turn["content"] for turn in prompt if turn["role"] == "assistant"][-given:] if given else []
        rollout = {
            "index": index,
            "sample": sample,
            "attempts": [*before, *(attempt.text for attempt in attempts)],
            "num_tokens": [None] * given + [attempt.num_tokens for attempt in attempts],
            "truncated": [False] * given + [attempt.truncated for attempt in attempts],
            "token_ids": [None] * given + [attempt.token_ids for attempt in attempts],
        }
        if job.self_refine:
            feedback = texts[1 - offset :: step]
            rollout["feedback"] = [each.text for each in feedback]
            rollout["feedback_num_tokens"] = [each.num_tokens for each in feedback]
        rollouts.append(rollout)
    return rollouts


def trained_instruction(model, backend: str = "transformers", **kwargs) -> str | None:
    """The correction instruction that a model was trained with, if it is saved beside it; an endpoint does not say."""
    if not isinstance(model, str) or backend == "endpoint":
        return None
    return load_rollout_settings(model, **hub_arguments(kwargs)).get("correction_instruction")


def seed_of(seed: int, batch: list[tuple[int, int]]) -> int:
    """Of a batch: the same for the same rollouts, and unrelated to that of any other batch, also after another `batch_size`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:4]) >> 1


def grade(
    task: Task, rows: Dataset, texts: list[list[str]], token_ids: list[list[list[int] | None]] | None = None
) -> Iterator[dict]:
    """Records of rollouts: their attempts graded, and compared with the ones before. `token_ids` are the attempts', if known."""
    from .reward_errors import checked  # here, so that a finished evaluation does without TRL's trainers

    columns = rows[:]
    prompts = columns.pop("prompt")
    chat = not isinstance(prompts[0], str)
    rewards = []
    for k, attempt in enumerate(zip(*texts, strict=True)):
        completions = [[{"role": "assistant", "content": text}] for text in attempt] if chat else list(attempt)
        more = {}
        if isinstance(task, DatasetTask):  # what the trainer gives to reward functions
            more = {"prompts": prompts, "attempt": k + 1}
            ids = [row[k] for row in token_ids] if token_ids else [None if text else [] for text in attempt]
            if None not in ids:
                more["completion_ids"] = ids
        given = checked(
            task.reward(completions, **columns | more), f"{type(task).__name__}.reward", len(texts), k + 1, prompts
        )
        rewards.append([None if reward is None else float(reward) for reward in given])
    other = [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
    answers = [
        [task.answer(text, **{name: value for name, value in row.items() if name != "text"}) for text in attempts]
        for attempts, row in zip(texts, other, strict=True)
    ]
    pairs = [(first, last) for first, last in ((row[0], row[-1]) for row in answers) if first and last]
    same = (
        dict(zip(pairs, task.same_answers([a for a, _ in pairs], [b for _, b in pairs]), strict=True)) if pairs else {}
    )
    for i, attempts in enumerate(texts):
        first, last = answers[i][0], answers[i][-1]
        scores = [None if reward[i] is None or math.isnan(reward[i]) else reward[i] for reward in rewards]
        yield {
            "prompt": prompts[i],
            "rewards": scores,
            "correct": [None if score is None else score >= 1 for score in scores],
            "answers": answers[i],
            "edit_distance_ratio": [edit_distance_ratio(one, other) for one, other in pairwise(attempts)],
            "changed_answer": not same[first, last] if first and last else first != last,
            **{name: group for name in ("level", "subject") if (group := _group(other[i].get(name))) is not None},
        }


def _group(value) -> str | int | float | None:
    """A level or subject that rollouts are grouped by; `None` if the row has none."""
    if value is None or value != value:  # NaN
        return None
    return value if isinstance(value, str | int | float) else str(value)
