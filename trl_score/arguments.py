"""
The options of every command and script, each defined once, and the parser that reads them.

A class is a group of options with a title. A command combines groups, and changes a default with [`changed`]. The options of the
three functions that sample ([`~trl_score.evaluation.evaluate_self_correction`], [`~trl_score.collection.collect`] and
[`~trl_score.scaling.inference_scaling`]) are fields of [`~trl_score.jobs.Job`].
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .tasks import Task


CONFIGS = Path(__file__).parent / "configs"
SAMPLES_OF_ROLLOUT = {"star": 2, "pair_sft": 1}  # attempts that a baseline samples for one rollout
ITERATIONS = {"star": 3, "pair_sft": 1}


def option(default, text: str, **metadata) -> Any:
    """An option with its default and its help."""
    return field(default=default, metadata={"help": text, **metadata})


def changed(kind: type, name: str, default, text: str | None = None) -> Any:
    """An option of another class with another default, and with another help if there is one."""
    metadata = kind.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**metadata, **({"help": text} if text else {})})


@dataclass
class ProblemArguments:
    """
    Which problems: a task, or a dataset with reward functions.

    Args:
        task (`str`, *optional*):
            Name of a task, or a class of one's own; see [`~trl_score.tasks.get_task`].
        data_dir (`str`, *optional*):
            Folder with the rows of the task as JSON lines (docs/tasks.md). By default, they come from the Hub.
        dataset_name, dataset_config, reward_funcs (*optional*):
            A dataset in place of a task; see [`~trl_score.tasks.dataset.DatasetTask`].
    """

    title = "Problems"
    task: str | None = option(
        None,
        "Name of a task (`trl-score tasks` lists them), or a class of yours: FILE.py:CLASS or PACKAGE.MODULE:CLASS.",
    )
    data_dir: str | None = option(
        None, "Folder with the task's rows as JSON lines. By default, they come from the Hub."
    )
    dataset_name: str | None = option(
        None, "A dataset in place of a task: Hub id, folder, or file (JSON lines, CSV, Parquet)."
    )
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that grade the dataset: accuracy_reward (default), another function of TRL, or your own as "
            "PACKAGE.MODULE.FUNCTION or FILE.py:FUNCTION. An attempt is right if the first function gives 1 or more. In training the "
            "rewards are added."
        },
    )

    def open_task(self, splits: dict[str, str] | None = None) -> "Task":
        """
        The task that these arguments name.

        Raises:
            `OSError`, `ValueError`, `ImportError`: If there is none.
        """
        if self.task is not None and self.dataset_name is not None:
            raise ValueError("--task and --dataset_name both say which problems. Give one of them.")
        if self.task is not None:
            for name in ("dataset_config", "reward_funcs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is for --dataset_name; the task '{self.task}' has its own. Leave it out."
                    )
            from .tasks import get_task

            return get_task(self.task, data_dir=self.data_dir)
        if self.dataset_name is None:
            raise ValueError(
                "Which problems? Give --task, or --dataset_name: a Hub id, a folder, a .jsonl, .csv or .parquet file. `trl-score tasks` "
                "lists the tasks."
            )
        if self.data_dir is not None:
            raise ValueError(
                "--data_dir is for the tasks; --dataset_name takes a folder itself. Leave --data_dir out."
            )
        from .tasks.dataset import DatasetTask

        names = [self.reward_funcs] if isinstance(self.reward_funcs, str) else self.reward_funcs  # in a YAML file
        return DatasetTask(self.dataset_name, self.dataset_config, names, splits)


@dataclass
class TaskArguments(ProblemArguments):
    """
    Which problems, for a script that trains.

    Args:
        eval_task (`str`, *optional*):
            The task to evaluate on. By default, it is the task that is trained on.
        dataset_train_split, dataset_test_split (`str`, *optional*, default to `"train"` and `"test"`):
            Splits of the dataset to train and to evaluate on. Without the second there is no evaluation.
        num_train_problems (`int`, *optional*):
            Number of problems of the training split to use, the first ones.
        num_eval_problems (`int`, *optional*):
            Number of problems of the test split to use, the first ones. With 0 there is no evaluation.
    """

    title = "Problems"
    eval_task: str | None = option(None, "Task to evaluate on. By default, it is the task that is trained on.")
    dataset_train_split: str = option("train", "Split of the dataset to train on.")
    dataset_test_split: str = option(
        "test", "Split of the dataset to evaluate on. Without this split there is no evaluation."
    )
    num_train_problems: int | None = option(None, "Number of problems of the training split to use, the first ones.")
    num_eval_problems: int | None = option(
        None, "Number of problems of the test split to use, the first ones. With 0 there is no evaluation."
    )

    def open_tasks(self) -> "tuple[Task, Task | None]":
        """
        The task to train on, and the one to evaluate on, if any.

        Raises:
            `OSError`, `ValueError`, `ImportError`: If there is none.
        """
        if self.num_train_problems is not None and self.num_train_problems < 1:
            raise ValueError(f"--num_train_problems {self.num_train_problems} leaves no problem. Set it to 1 or more.")
        if self.num_eval_problems is not None and self.num_eval_problems < 0:
            raise ValueError(
                f"--num_eval_problems {self.num_eval_problems} is no number of problems. Set it to 0 or more."
            )
        task = self.open_task({"train": self.dataset_train_split, "test": self.dataset_test_split})
        if self.num_eval_problems == 0:
            return task, None
        if self.eval_task not in (None, self.task):
            from .tasks import get_task

            other = {"sandbox": task.sandbox} if hasattr(task, "sandbox") else {}
            return task, get_task(self.eval_task, data_dir=self.data_dir, **other)
        has_test = task.has("test") if hasattr(task, "has") else True
        return task, task if has_test else None


@dataclass
class TrainArguments(TaskArguments):
    """
    Which problems to train on by reinforcement, and what watches the run.

    Args:
        first_attempts (`str`, *optional*):
            Folder of `trl-score collect` with first attempts at the problems to train on, for `offline_first_attempts`.
        collapse_window (`int`, *optional*, defaults to `10`):
            Number of optimizer steps without corrections after which the collapse alarm warns. With 0 there is no alarm.
        keep_best_checkpoint (`bool`, *optional*, defaults to `False`):
            Keep the checkpoint with the highest training reward of the last attempt, for each stage.
        best_checkpoint_window (`int`, *optional*, defaults to `10`):
            Number of logs over which this reward is averaged.
        load_best_checkpoint_at_end (`bool`, *optional*, defaults to `False`):
            Load the best checkpoint of the last stage when training ends.
    """

    title = "Watching the run"
    first_attempts: str | None = option(
        None, "Folder of `trl-score collect` with first attempts, for `offline_first_attempts`."
    )
    collapse_window: int = option(
        10,
        "Number of optimizer steps without corrections after which the collapse alarm warns. With 0 there is no alarm.",
    )
    keep_best_checkpoint: bool = option(
        False,
        "Keep the checkpoint with the highest training reward of the last attempt, for each stage, in `_best-stage1` and "
        "`_best-stage2` of the output folder.",
    )
    best_checkpoint_window: int = option(10, "Number of logs over which this reward is averaged.")
    load_best_checkpoint_at_end: bool = option(False, "Load the best checkpoint of the last stage when training ends.")

    def __post_init__(self):
        if self.collapse_window < 0 or self.best_checkpoint_window < 1:
            raise ValueError(
                f"`collapse_window={self.collapse_window}` is a number of steps and "
                f"`best_checkpoint_window={self.best_checkpoint_window}` a number of logs. Set the first to 0 or more, the second to 1 "
                "or more."
            )
        if self.load_best_checkpoint_at_end and not self.keep_best_checkpoint:
            raise ValueError(
                "`load_best_checkpoint_at_end` has nothing to load without `keep_best_checkpoint`. Set that to True too."
            )

    def callbacks(self) -> list:
        """The callbacks that these arguments ask for."""
        from .callbacks import CollapseAlarm, KeepBestCheckpoint

        found = [CollapseAlarm(self.collapse_window)] if self.collapse_window else []
        if self.keep_best_checkpoint:
            found.append(KeepBestCheckpoint(self.best_checkpoint_window, self.load_best_checkpoint_at_end))
        return found


@dataclass
class AttemptArguments:
    """How one attempt is sampled and what the user says after it."""

    title = "Attempts"
    temperature: float = option(0.0, "Sampling temperature. 0 is greedy decoding.")
    max_completion_length: int = option(1024, "Maximum number of tokens of one attempt.")
    correction_instruction: str | None = option(
        None, "The user's turn between two attempts. By default, it is the instruction of the task."
    )


@dataclass
class JobArguments(AttemptArguments):
    """What the three sampling functions share: see [`~trl_score.evaluation.evaluate_self_correction`]."""

    title = "Attempts"
    correction_instruction: str | None = changed(
        AttemptArguments,
        "correction_instruction",
        None,
        "The user's turn between two attempts. By default, it is the instruction that the model was trained with, else the "
        "instruction of the task.",
    )
    split: str = option("test", "Split of the task to take the problems from.")
    top_p: float = option(1.0, "Sample from the most likely tokens whose probabilities add up to this share.")
    batch_size: int = option(32, "Number of rollouts that are sampled at a time.")
    seed: int = option(42, "Seed of the sampling.")


@dataclass
class RolloutArguments(JobArguments):
    """[`JobArguments`] of a function that lets the caller choose the number of attempts and of samples."""

    title = "Attempts"
    num_attempts: int = option(2, "Number of attempts in a rollout. The paper uses up to 10.")
    num_samples: int = option(1, "Number of rollouts per problem. More than one needs a temperature above 0.")


@dataclass
class TemplateArguments:
    """Arguments of the chat template."""

    title = "Model"
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the chat template as JSON, such as '{\"enable_thinking\": false}'. By default, those "
            "the model was trained with."
        },
    )

    def __post_init__(self):
        self.chat_template_kwargs = as_dict(self.chat_template_kwargs, "chat_template_kwargs")


@dataclass
class ModelArguments(TemplateArguments):
    """Which model attempts are sampled from, and where."""

    title = "Model"
    model: str | None = option(None, "Required. Hub id or folder of a model or an adapter.")
    backend: str = option("transformers", "What samples the attempts.", choices=["transformers", "vllm", "endpoint"])
    base_url: str | None = option(None, "Address of the endpoint, such as http://127.0.0.1:8000/v1.")
    extra_body: dict | str | None = field(
        default=None, metadata={"help": "Further fields of each request to the endpoint, as JSON."}
    )
    dtype: str | None = option(None, "Type of the weights, such as bfloat16.")
    revision: str | None = option(None, "Commit, branch or tag of the model on the Hub.")
    attn_implementation: str | None = option(
        None, "Attention implementation, such as flash_attention_2 (transformers only)."
    )
    trust_remote_code: bool = option(False, "Run the code that a model's repository brings along.")
    load_in_4bit: bool = option(False, "Quantize the model to 4 bits (NF4, bitsandbytes; transformers only).")

    def __post_init__(self):
        super().__post_init__()
        self.extra_body = as_dict(self.extra_body, "extra_body")

    def loading(self) -> dict:
        """
        What the backend is given beside the model.

        Raises:
            `ValueError`: If an option has no meaning with the backend, or the type of the weights is none.
        """
        given = {name: getattr(self, name) for name in BACKENDS_OF}
        given = {name: value for name, value in given.items() if value not in (None, False)}
        for name in given:
            if self.backend not in BACKENDS_OF[name]:
                raise ValueError(f"`{name}` has no meaning with `backend={self.backend!r}`. Leave it out.")
        if given.pop("load_in_4bit", False):
            given["quantization_config"] = four_bits(given)
        return given


BACKENDS_OF = {  # which backends an option has a meaning with
    "base_url": ("endpoint",),
    "extra_body": ("endpoint",),
    "dtype": ("transformers", "vllm"),
    "revision": ("transformers", "vllm"),
    "trust_remote_code": ("transformers", "vllm"),
    "attn_implementation": ("transformers",),
    "load_in_4bit": ("transformers",),
}


def four_bits(kwargs: dict):
    """The quantization of `--load_in_4bit`, with the type of the weights for the arithmetic."""
    import torch
    from transformers import BitsAndBytesConfig

    from .sampling import check_dtype

    check_dtype(kwargs)
    dtype = kwargs.get("dtype", "auto")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


@dataclass
class SampleArguments(ProblemArguments, ModelArguments, JobArguments):
    """What `evaluate`, `scale` and `collect` share: the arguments of [`~trl_score.evaluation.evaluate_self_correction`]."""

    title = "Results"
    output_dir: str | None = option(
        None, "Required. Folder for the results. Rollouts of the same settings in it are reused."
    )
    limit: int | None = option(None, "Number of problems to use, the first ones. By default, all problems.")

    def keywords(self) -> dict:
        """The arguments as the function that samples takes them."""
        loaded = self.loading()
        left_out = {*BACKENDS_OF, *(each.name for each in fields(ProblemArguments))}
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}
        return given | loaded | {"task": self.open_task()}


@dataclass
class EvaluateArguments(RolloutArguments, SampleArguments):
    title = "Attempts"
    self_refine: bool = option(
        False, "Use Self-Refine: ask for feedback on each attempt, and then to rewrite the attempt."
    )


@dataclass
class CollectArguments(RolloutArguments, SampleArguments):
    title = "Attempts"
    split: str = changed(JobArguments, "split", "train")
    num_attempts: int = changed(
        RolloutArguments, "num_attempts", 2, "Number of attempts in a rollout. With 1 only first attempts are sampled."
    )
    temperature: float = changed(
        AttemptArguments, "temperature", 1.0, "Sampling temperature. The default is the same as in training."
    )
    num_samples: int = changed(RolloutArguments, "num_samples", 8, "Number of rollouts per problem.")


@dataclass
class ScaleArguments(SampleArguments):
    title = "Attempts"
    temperature: float = changed(AttemptArguments, "temperature", 0.7, "Sampling temperature. The paper uses 0.7.")
    max_budget: int = option(64, "Largest number of samples per problem, a power of 2.")


@dataclass
class CheckArguments(SampleArguments):
    title = "Check"
    split: str = changed(JobArguments, "split", "train")
    temperature: float = changed(
        AttemptArguments, "temperature", 1.0, "Sampling temperature. The default is the same as in training."
    )
    limit: int | None = changed(SampleArguments, "limit", 64, "Number of problems to sample, drawn at random.")
    num_samples: int = changed(RolloutArguments, "num_samples", 1, "Number of rollouts per problem.")
    output_dir: str | None = changed(
        SampleArguments, "output_dir", None, "Folder for the rollouts. By default, rollouts are not kept."
    )
    json: bool = option(False, "Print the result as JSON.")

    def keywords(self) -> dict:
        given = super().keywords()
        del given["json"]
        return given


@dataclass
class BaselineArguments(TaskArguments, AttemptArguments, TemplateArguments):
    """
    How the traces of a baseline are made.

    Args:
        method (`str`, *optional*, defaults to `"star"`):
            `"star"` or `"pair_sft"`.
        plus (`bool`, *optional*, defaults to `False`):
            Whether to learn also from traces with two right attempts ($D^+$).
        num_samples (`int`, *optional*, defaults to `30`):
            Number of attempts that are sampled for each problem over all iterations. To compare methods at equal samples: SCoRe
            samples steps x rollouts per step x attempts / problems.
        num_iterations (`int`, *optional*):
            Number of rounds of sampling and fine-tuning, each from the base model. By default 3 for STaR, and 1 for Pair-SFT.
        learn (`str`, *optional*, defaults to `"right"`):
            Attempts to learn: every right attempt (`"right"`), or only the second attempt (`"last"`).
        max_per_problem (`int`, *optional*):
            Maximum number of traces of each kind (i→c, c→c) for a problem.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of one attempt.
        sampling_batch_size (`int`, *optional*, defaults to `32`):
            Number of rollouts that are sampled at a time.
        backend (`str`, *optional*, defaults to `"transformers"`):
            What samples the attempts: `"transformers"` or `"vllm"`.
        correction_instruction (`str`, *optional*):
            The user's turn between two attempts. By default, it is the instruction of the task.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template; by default, those the base model was trained with.

    Raises:
        `ValueError`: If the samples are too few for the iterations, or an option has no such value.
    """

    title = "Baseline"
    method: str = option("star", "The baseline: star or pair_sft.", choices=["star", "pair_sft"])
    plus: bool = option(False, "Also learn from traces with two right attempts (D+).")
    num_samples: int = option(30, "Number of attempts that are sampled for each problem over all iterations.")
    num_iterations: int | None = option(
        None,
        "Number of rounds of sampling and fine-tuning, each from the base model. By default 3 for star, and 1 for pair_sft.",
    )
    learn: str = option(
        "right",
        "Attempts to learn: every right attempt (right), or only the last attempt (last).",
        choices=["right", "last"],
    )
    max_per_problem: int | None = option(None, "Maximum number of traces of each kind (i→c, c→c) for a problem.")
    temperature: float = changed(AttemptArguments, "temperature", 1.0)
    sampling_batch_size: int = option(32, "Number of rollouts that are sampled at a time.")
    backend: str = option("transformers", "What samples the attempts.", choices=["transformers", "vllm"])

    def __post_init__(self):
        super().__post_init__()
        if self.method not in ITERATIONS:
            raise ValueError(f"Unknown method {self.method!r}. Expected one of: {sorted(ITERATIONS)}.")
        self.num_iterations = ITERATIONS[self.method] if self.num_iterations is None else self.num_iterations
        needed = SAMPLES_OF_ROLLOUT[self.method] * self.num_iterations
        if self.num_iterations < 1 or self.num_samples < needed:
            raise ValueError(
                f"`num_samples={self.num_samples}` attempts per problem are too few for `num_iterations={self.num_iterations}` "
                f"of {self.method}. Set it to {max(needed, 1)} or more, and the iterations to 1 or more."
            )

    @property
    def rollouts_per_iteration(self) -> int:
        return self.num_samples // (SAMPLES_OF_ROLLOUT[self.method] * self.num_iterations)


def as_dict(value: str | dict | None, name: str) -> dict | None:
    """An option that is JSON on the command line and may be a mapping in a YAML file."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"`{name}={value}` is no JSON: {error}. Quote it as in '{{\"enable_thinking\": false}}'."
            ) from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"`{name}={value!r}` is no mapping of names to values, such as '{{\"enable_thinking\": false}}'."
        )
    return value
