"""
A run that cannot work is refused when the trainer is constructed, most of the time before a model is loaded.

Every check takes values and settings, never the trainer. It returns nothing, or raises an error that says what was set, why it cannot
work and what to do. Checks of the settings alone are in `score_config.py`, checks of the reference model in `reference.py`, and checks
of the context length in `context.py`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name

from .objective import Stage, resolve_stage1_steps
from .reward_errors import signature_of, takes_attempt
from .score_config import SCoReConfig
from .tasks.base import KEYWORDS, check_keywords


def check_unsupported(**arguments):
    """No argument of [`~trl.GRPOTrainer`] replaces the rollout."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"`{name}` is not supported by SCoRe, whose rollout is the attempts. Leave it out.")


# --- data ---

STREAMED_ROWS = 100  # read from a streamed dataset to check it
Rows = Dataset | list[dict]  # all rows of a dataset, or the first ones of a stream


def rows_to_check(train_dataset, eval_dataset, args: SCoReConfig) -> dict[str, Rows]:
    """The rows of all datasets, by the names that error messages give them. Of a stream the first rows are read, once for all checks."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    return {name: first_rows(name, dataset, problems_needed(args)) for name, dataset in datasets.items()}


def first_rows(name: str, dataset: Dataset | IterableDataset | None, number: int = 0) -> Rows:
    """A dataset as it is, and `STREAMED_ROWS` of a stream, or `number` if this is more."""
    if dataset is None:
        raise ValueError(f"`{name}` is missing. Pass a dataset with a column `prompt`.")
    if isinstance(dataset, dict):
        raise ValueError(
            f"`{name}` is not one dataset but several, {list(dataset)}. Pass one of them: `dataset[...]`."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Make one of a list of rows with "
            "`Dataset.from_list`."
        )
    return list(dataset.take(max(STREAMED_ROWS, number))) if isinstance(dataset, IterableDataset) else dataset


def check_datasets(datasets: dict[str, Rows], args: SCoReConfig):
    """All datasets have the columns that SCoRe reads, and the training data has enough problems."""
    for name, rows in datasets.items():
        check_columns(name, rows)
    if args.offline_first_attempts > 0:
        check_first_attempts(datasets["train_dataset"])
    check_number_of_problems(len(datasets["train_dataset"]), args)


def check_best_metric(eval_dataset, args: SCoReConfig):
    """Of several evaluation sets, one chooses the best checkpoint. transformers would stop at the first evaluation."""
    metric = args.metric_for_best_model
    if not (isinstance(eval_dataset, dict) and eval_dataset) or metric is None or args.eval_strategy == "no":
        return
    name = metric.removeprefix("eval_")
    if not any(name.startswith(f"{each}_") for each in eval_dataset):
        raise ValueError(
            f"`metric_for_best_model={metric!r}` does not say which of the evaluation sets chooses the best checkpoint. Put the name of "
            f"one of {', '.join(map(repr, eval_dataset))} in front: '{next(iter(eval_dataset))}_{name}'."
        )


def column_of(rows: Rows, name: str) -> Iterable:
    """A column. Where a transform makes the rows (`set_transform`), the stored columns are other ones."""
    is_stored = isinstance(rows, Dataset) and rows.format["type"] != "custom"
    return rows[name] if is_stored else (row.get(name) for row in rows)


def check_columns(name: str, rows: Rows):
    """A dataset has a prompt in each row, and nothing that SCoRe does not support."""
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"`{name}` has no rows. Pass a dataset with at least one problem.")
    if "prompt" not in row:
        raise ValueError(
            f"`{name}` has no column `prompt`, only {sorted(row)}. Rename the column that holds the problem: "
            "`dataset.rename_column(..., 'prompt')`."
        )
    check_keywords(f"`{name}`", row)
    if "image" in row or "images" in row:
        raise ValueError(f"`{name}` has images, which SCoRe does not support. Remove the column.")
    check_prompts(f"`{name}`", rows)
    if "correction_instruction" in row:
        for index, instruction in enumerate(column_of(rows, "correction_instruction")):
            if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
                what = "an empty" if isinstance(instruction, str) else f"a `{type(instruction).__name__}` as"
                raise ValueError(
                    f"`{name}` has {what} `correction_instruction` in row {index}, which would not ask for a correction. "
                    "Set it to a sentence, or to None for the configured one."
                )


def check_prompts(name: str, rows: Rows):
    """Each row has a problem. A chat template would write a missing text as the word None."""
    for index, prompt in enumerate(column_of(rows, "prompt")):
        turns = prompt if isinstance(prompt, list) else []
        if not (isinstance(prompt, str | list | None) and all(isinstance(turn, dict) for turn in turns)):
            raise ValueError(
                f"{name} has a `prompt` in row {index} that is neither text nor a list of chat messages: {prompt!r}. Write it as "
                "`[{'role': 'user', 'content': ...}]`."
            )
        if not prompt or any(turn.get("content") is None and not turn.get("tool_calls") for turn in turns):
            raise ValueError(
                f"{name} has no problem in row {index}, where `prompt` is {prompt!r}. Write one, or drop the row with "
                "`dataset.filter`."
            )


def check_reward_functions(reward_funcs, datasets: dict[str, Rows], args: SCoReConfig):
    """Every reward function can be called as TRL calls it, with the columns of each dataset."""
    named = {name: next(iter(rows)).keys() for name, rows in datasets.items()}
    for func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(func, str | nn.Module):
            continue
        if not callable(func):
            raise TypeError(
                f"`reward_funcs` has a `{type(func).__name__}`, which is neither a function nor a reward model. Pass a function, or a list "
                "of functions."
            )
        if (signature := signature_of(func)) is None:
            continue
        for name, columns in named.items():
            columns = columns - {"prompt", "completion", "completion_ids"}  # as TRL
            if args.remove_unused_columns:
                columns &= {"correction_instruction", "first_attempts"}
            keywords = KEYWORDS.keys() | {"completion_ids"} | columns
            if not takes_attempt(func):
                keywords -= {"attempt"}
            try:
                signature.bind(**dict.fromkeys(keywords))
            except TypeError as error:
                raise ValueError(
                    f"The reward function '{get_callable_name(func)}' cannot be called for `{name}`: {error}. It is called with the "
                    f"keywords {', '.join(sorted(keywords))}. Name the ones that it reads, and end its signature with `**kwargs`."
                ) from error


def in_one_shard(dataset: IterableDataset) -> IterableDataset:
    """
    The same rows in the same order. Of a stream in several shards accelerate gives each process some of its own, after TRL has repeated
    the rows, so the rollouts of a problem would be of different ones and some problems would not be sampled.
    """
    return IterableDataset.from_generator(dataset.__iter__, features=dataset.features)


def check_first_attempts(rows: Rows):
    """Every problem has stored first attempts."""
    if "first_attempts" not in next(iter(rows)):
        raise ValueError(
            "`offline_first_attempts` takes first attempts from a column `first_attempts`, which `train_dataset` does not have. "
            "Sample them from the base model with `trl-score collect` and add them with "
            "`trl_score.collection.with_first_attempts`, or set `offline_first_attempts=0`."
        )
    for index, attempts in enumerate(column_of(rows, "first_attempts")):
        if not attempts or any(not attempt for attempt in attempts) or isinstance(attempts, str):
            raise ValueError(
                f"`train_dataset` has no `first_attempts` in row {index}, or an empty one. Give every problem a list of texts "
                "or of token ids, or drop it."
            )


def check_vocabulary(rows: Rows, size: int):
    """Stored first attempts that are token ids are of the model's vocabulary, which has `size` tokens."""
    for index, attempts in enumerate(column_of(rows, "first_attempts")):
        largest = max((max(attempt) for attempt in attempts if not isinstance(attempt, str)), default=0)
        if largest >= size:
            raise ValueError(
                f"`train_dataset` has a stored first attempt with the token id {largest} in row {index}, but the model has {size} "
                "tokens. It was sampled from another model. Sample first attempts from this one (`trl-score collect`), or store texts."
            )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, size: int):
    """The tokens that stand in every batch are of the model's vocabulary, which has `size` tokens."""
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= size:
            raise ValueError(
                f"The tokenizer's `{name}` {getattr(tokenizer, name)!r} has the id {token_id}, but the model has {size} tokens: it was "
                "added to the tokenizer alone. Set it to a token that the model knows, or load the model, call "
                "`model.resize_token_embeddings(len(tokenizer))` and pass the model."
            )


def problems_needed(args: SCoReConfig) -> int:
    """Problems of one generation."""
    return args.generation_batch_size // args.num_generations


def check_number_of_problems(number: int, args: SCoReConfig):
    """There are enough problems for one generation: an epoch drops the problems that do not fill one up."""
    if number < problems_needed(args):
        raise ValueError(
            f"`train_dataset` has {number} problems, but one generation takes {problems_needed(args)}, so no step would be trained: "
            f"`generation_batch_size={args.generation_batch_size}` (`per_device_train_batch_size="
            f"{args.per_device_train_batch_size}` x `steps_per_generation={args.steps_per_generation}` x {args.world_size} "
            f"processes) / `num_generations={args.num_generations}`. Lower one of the first two, or add problems."
        )


# --- stages ---


def length_of_run(num_problems: int | None, args: SCoReConfig) -> tuple[int, list[int]]:
    """
    The optimizer steps of a run, and those in which it makes new rollouts: `steps_per_generation * num_iterations` forward
    passes share one generation, and `gradient_accumulation_steps` forward passes make a step. The last step of an epoch can
    have fewer.

    Args:
        num_problems (`int`, *optional*):
            Rows of the training data; `None` for streamed data, which have no epochs.
        args ([`SCoReConfig`]):
            Settings.

    Returns:
        `tuple[int, list[int]]`: the number of steps, and the steps, counted from 0, in which a generation begins.
    """
    window, accumulated = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if num_problems is None:
        return args.max_steps, sorted(
            {start // accumulated for start in range(0, args.max_steps * accumulated, window)}
        )
    passes = num_problems // problems_needed(args) * window
    steps_of_epoch = math.ceil(passes / accumulated)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_of_epoch)
    starts = {
        first + start // accumulated
        for first in range(0, max_steps, steps_of_epoch)
        for start in range(0, passes, window)
    }
    return max_steps, sorted(start for start in starts if start < max_steps)


def check_number_of_steps(max_steps: int, args: SCoReConfig):
    """A run, of which `max_steps` is [`length_of_run`], has a step. Else the untrained model would be saved as if it were trained."""
    if max_steps < 1 or args.max_steps == 0:
        raise ValueError(
            f"`max_steps={args.max_steps}` and `num_train_epochs={args.num_train_epochs}` leave no step to train. Set `max_steps` to 1 or "
            "more, or leave it out and set `num_train_epochs` above 0; streamed data need `max_steps`."
        )


def check_stage1_steps(stage1_steps: float, max_steps: int, num_attempts: int = 2):
    """
    A share of the run that is above 0 and below 1 asks for both stages, so it must not round to none or all of the steps. A run
    of a single step is exempt, as it has one stage in any case. With fewer steps than attempts to train, or more than the run has,
    there is a warning.

    Args:
        stage1_steps (`float`):
            Steps of Stage I, or their share if below 1.
        max_steps (`int`):
            Steps of the run.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout.
    """
    steps = resolve_stage1_steps(stage1_steps, max_steps)
    if 0 < stage1_steps < 1 < max_steps and steps in (0, max_steps):
        number, missing = ("none", "Stage I") if steps == 0 else ("all", "Stage II")
        raise ValueError(
            f"`stage1_steps={stage1_steps}` rounds to {number} of the {max_steps} steps, so {missing} would be left out. Set it to a "
            f"number of steps, to 0 for Stage II only, or to `max_steps` for Stage I only."
        )
    if steps > max_steps:
        warnings.warn(
            f"`stage1_steps={stage1_steps}` is more than the {max_steps} steps of the run, so Stage II never begins. Set it to a share of "
            "the run, such as 0.5, or to fewer steps. If Stage I alone is meant, set it to `max_steps`.",
            stacklevel=3,
        )
    if 0 < steps < min(num_attempts - 1, max_steps):
        warnings.warn(
            f"Stage I trains the attempts 2 to {num_attempts} in turn, but `stage1_steps={stage1_steps}` gives it {steps} of the "
            f"{max_steps} steps, so it leaves out the last ones. Set it to {num_attempts - 1} steps or more, or to 0 for Stage II only.",
            stacklevel=3,
        )


def check_schedule(schedule: Callable[[int, int], Stage], max_steps: int, starts: list[int], num_attempts: int):
    """
    Rollouts keep the stage of the step that they were made in, so each stage of the schedule holds in such a step.

    Args:
        schedule (`Callable[[int, int], Stage]`):
            From a step and `max_steps` to a stage.
        max_steps (`int`):
            Steps of the run.
        starts (`list[int]`):
            Steps in which rollouts are made.
        num_attempts (`int`):
            Attempts in a rollout of training.
    """
    holds = {}  # what is credited and held -> steps
    for step in range(max_steps):
        stage = schedule(step, max_steps)
        if not isinstance(stage, Stage):
            raise TypeError(
                f"`schedule({step}, {max_steps})` returned `{type(stage).__name__}`. Return a `trl_score.objective.Stage`."
            )
        if min(stage.credited) > num_attempts:
            raise ValueError(
                f"`schedule({step}, {max_steps})` credits the attempts {tuple(stage.credited)}, but a rollout has "
                f"`num_attempts={num_attempts}`, so nothing would be trained. Credit an attempt that exists."
            )
        holds.setdefault((stage.number, tuple(stage.credited), tuple(stage.held)), []).append(step)
    for (number, credited, _), steps in holds.items():
        if not set(steps).intersection(starts):
            window = max(b - a for a, b in zip(starts, [*starts[1:], max_steps], strict=True))
            raise ValueError(
                f"Stage {number} (attempts {credited} are credited) would be skipped: it holds in {len(steps)} "
                f"steps from step {steps[0]} on, but new rollouts are made every {window} steps, and keep the stage of the step "
                "in which they are made (`steps_per_generation` x `num_iterations` / `gradient_accumulation_steps`). Lower "
                "`steps_per_generation` or `num_iterations`, or change `stage1_steps` or the `schedule`."
            )


# --- model and machine ---


def check_trainable(model: nn.Module):
    """Something is trained, and an adapter is one that can be disabled."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The given model carries an adapter that transformers loaded into it, so there is no model under it to be the reference. "
            "Load the base model and the adapter as a `PeftModel` (`PeftModel.from_pretrained(base, folder, is_trainable=True)`), or "
            "merge the adapter first."
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError("The given adapter is frozen, so nothing would be trained. Load it with `is_trainable=True`.")
    raise ValueError(
        "All parameters of the given model are frozen, so nothing would be trained; `merge_and_unload` of PEFT leaves a model so. "
        "Call `model.requires_grad_(True)`, or pass a `peft_config`."
    )


def check_log_probabilities(
    model: nn.Module, score: Callable[[Tensor, Tensor, int], Tensor], temperature: float, limit: float
):
    """
    What is scored is what is sampled. TRL computes log-probabilities from the last hidden states and the weights of the language-model
    head. Some models do more with them (RecurrentGemma bounds its logits), and some read the padding before a prompt (RWKV).

    Args:
        model (`torch.nn.Module`):
            The policy, which is on its device.
        score (`Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]`):
            From ids and mask of padded rows and a number of tokens to the log-probabilities of so many last tokens, as training
            computes them.
        temperature (`float`):
            What the logits are divided by.
        limit (`float`):
            Largest difference that is rounding, nats.
    """
    kind = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    padding, scored, embeddings = 3, 4, model.get_input_embeddings().weight
    ids = torch.arange(2 * (padding + 1 + scored), device=embeddings.device).view(2, -1) % embeddings.size(0)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    training = model.training
    model.eval()
    try:
        found = score(ids, mask, scored)
        rows = [ids[:1], ids[1:, padding:]]
        with torch.no_grad():
            logits = [model(input_ids=row, attention_mask=torch.ones_like(row)).logits.float() for row in rows]
    except AttributeError as error:
        raise ValueError(
            f"TRL cannot compute the log-probabilities of this `{kind}`: {error}. If it is a mixture of experts, set "
            "`router_aux_loss_coef=0`. If it has `trainable_token_indices` and its head is tied to its embeddings, use "
            "`modules_to_save=['embed_tokens']`."
        ) from error
    finally:
        model.train(training)
    for row, each, own in zip(rows, logits, found, strict=True):
        expected = (each[0] / temperature).log_softmax(-1)[:-1].gather(1, row[0, 1:, None])[-scored:, 0]
        difference = (own - expected.to(own)).abs().median().item()
        if not difference <= limit:
            raise ValueError(
                f"The log-probabilities that TRL computes of this `{kind}` differ from those that it samples from, by {difference:.2g} "
                "nats per token: its forward does more than the hidden states times the weights of the language-model head, or it "
                "does not leave out the padding before a prompt. Its gradients would be wrong, so use another model."
            )


def warn_of_dropout(model: nn.Module):
    """Training samples in training mode, so with dropout it samples and trains other models than the one that is evaluated."""
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    for name, module in model.named_modules():  # not a layer in most architectures
        if isinstance(rate := getattr(module, "attention_dropout", None), float):
            rates[f"{name}.attention_dropout"] = rate
    name, rate = next(((name, rate) for name, rate in rates.items() if rate > 0), (None, 0.0))
    if name is None:
        return
    remedy = "Set `disable_dropout=True`."
    if "lora_dropout" in name:
        name, remedy = "lora_dropout", "Set it to 0 (on the command line the default of `--lora_dropout` is 0.05)."
    elif "attention_dropout" in name:
        name, remedy = "attention_dropout", 'Set `model_init_kwargs={"attention_dropout": 0.0}`.'
    warnings.warn(
        f"`{name}={rate:g}`: attempts are sampled with dropout in training, each token with other neurons switched off, so the "
        f"policy that is sampled and trained is not the one that is evaluated. {remedy}",
        stacklevel=3,
    )


def warn_of_emulated_bfloat16(model: nn.Module, autocast: bool = False):
    """Without instructions for bfloat16 a CPU emulates it, which takes several times as long as float32 (docs/faq.md)."""
    halves = (parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
    parameter = next(model.parameters() if autocast else halves, None)
    if parameter is None or parameter.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return
    warnings.warn(
        "The model computes in bfloat16, for which this CPU has no instructions (its best are AVX2), so it takes several times as "
        "long as in float32. Set `dtype='float32'`, and in training `bf16=False`.",
        stacklevel=3,
    )


def check_devices(devices: list[str]):
    """
    In an evaluation with vLLM, no two processes share a GPU.

    Args:
        devices (`list[str]`):
            For each process the identity of the GPU that it uses, such as its UUID.
    """
    device, number = Counter(devices).most_common(1)[0]
    if number > 1:
        raise ValueError(
            f"`backend='vllm'` in {len(devices)} processes would start {number} engines on one GPU ({device}). Start one process "
            "(without `accelerate launch`; `tensor_parallel_size` uses several GPUs), or give each process a GPU of its own with "
            "`CUDA_VISIBLE_DEVICES`."
        )
