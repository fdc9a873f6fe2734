"""Checks at construction: a run that cannot work is refused, most of them before a model is loaded."""

import math
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig
from trl import is_conversational
from trl.trainer.utils import get_config_model_id

from .first_attempts import attempt_tokens
from .objective import Stage
from .rollout import Bridge
from .score_config import SCoReConfig


ROWS_AT_A_TIME = 1000  # prompts tokenized in one call
STREAMED_ROWS = 100  # read from a streamed dataset to check it; the rest is checked batch by batch
TRAINED_FLAG = "score_trained"  # in the config.json of a model that SCoRe trained: it is no base model any more
# PEFT's initializations that subtract the new adapter from the base weights, or quantize them.
REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Largest KL of the first batch to the reference, nats per token. The same model on the same tokens twice differs by 0. Measured on
# the embedded model: 1e-5 for a DoRA adapter at its start in bfloat16, 3e-5 for bfloat16 against float32 weights, up to 9e-5 for
# bfloat16 in training mode against evaluation mode, 0 for LoRA in float32, bfloat16 and 4 bits, with dropout too. On the other
# side: 3e-5 for float32 weights that are off by 1 % of their spread, 6 for PiSSA, OLoRA and a merged adapter.
MAX_START_KL = {"float32": 1e-5, "half": 5e-3}


def named_datasets(train_dataset, eval_dataset) -> dict:
    """All datasets, by what error messages call them."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    return datasets


def check_datasets(train_dataset, eval_dataset, args: SCoReConfig):
    for name, dataset in named_datasets(train_dataset, eval_dataset).items():
        if dataset is None:
            raise ValueError(f"`{name}` is missing. Pass a dataset with a column `prompt`.")
        row = next(iter(dataset), None)
        if row is None:
            raise ValueError(f"`{name}` has no rows.")
        columns = sorted(row)
        if "prompt" not in columns:
            raise ValueError(
                f"`{name}` has no column `prompt`, only {columns}. Rename the column that holds the problem: "
                "`dataset.rename_column(..., 'prompt')`."
            )
        if "attempt" in columns:
            raise ValueError(
                f"`{name}` has a column `attempt`, the keyword by which a reward function is told which attempt it grades. "
                "Rename the column."
            )
        if "image" in columns or "images" in columns:
            raise ValueError(f"`{name}` has images, which SCoRe does not support. Remove the column.")
        if "correction_instruction" in columns and isinstance(dataset, Dataset):
            for index, instruction in enumerate(dataset["correction_instruction"]):
                if instruction is not None and not instruction.strip():
                    raise ValueError(
                        f"`{name}` has an empty `correction_instruction` in row {index}. Set it to a sentence, or to None "
                        "for the configured one."
                    )
    if args.offline_first_attempts > 0:
        check_first_attempts(train_dataset)
    check_number_of_problems(train_dataset, args)


def check_first_attempts(dataset):
    """Every problem has stored first attempts."""
    rows = dataset if isinstance(dataset, Dataset) else dataset.take(1)
    if "first_attempts" not in next(iter(rows)):
        raise ValueError(
            "`offline_first_attempts` takes first attempts from a column `first_attempts`, which `train_dataset` does not have. "
            "Sample them from the base model with `trl-score collect` and add them with "
            "`trl_score.collection.with_first_attempts`, or set `offline_first_attempts=0`."
        )
    rows = rows["first_attempts"] if isinstance(rows, Dataset) else [row["first_attempts"] for row in rows]
    for index, attempts in enumerate(rows):
        if not attempts or any(not attempt for attempt in attempts) or isinstance(attempts, str):
            raise ValueError(
                f"`train_dataset` has no `first_attempts` in row {index}, or an empty one. Give every problem a list of texts "
                "or of token ids, or drop it."
            )


def check_number_of_problems(dataset, args: SCoReConfig):
    """There are enough problems for one generation: an epoch drops the problems that do not fill one up."""
    needed = args.generation_batch_size // args.num_generations
    is_streamed = isinstance(dataset, IterableDataset)
    number = sum(1 for _ in dataset.take(needed)) if is_streamed else len(dataset)
    if number < needed:
        raise ValueError(
            f"`train_dataset` has {number} problems, but one generation takes {needed}, so no step would be trained: "
            f"`generation_batch_size={args.generation_batch_size}` (`per_device_train_batch_size="
            f"{args.per_device_train_batch_size}` x `steps_per_generation={args.steps_per_generation}` x {args.world_size} "
            f"processes) / `num_generations={args.num_generations}`. Lower one of the first two, or add problems."
        )


def length_of_run(num_problems: int | None, args: SCoReConfig) -> tuple[int, list[int]]:
    """
    The optimizer steps of a run, and those at which it makes new rollouts: `steps_per_generation * num_iterations` forward
    passes share one generation, and `gradient_accumulation_steps` forward passes make a step, the last of an epoch fewer.

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
    passes = num_problems // (args.generation_batch_size // args.num_generations) * window
    steps_of_epoch = math.ceil(passes / accumulated)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_of_epoch)
    starts = {
        first + start // accumulated
        for first in range(0, max_steps, steps_of_epoch)
        for start in range(0, passes, window)
    }
    return max_steps, sorted(start for start in starts if start < max_steps)


def check_schedule(schedule: Callable[[int, int], Stage], max_steps: int, starts: list[int], num_attempts: int):
    """
    Rollouts keep the stage of the step that they were made in, so each stage of the schedule holds at such a step.

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
    stages = {step: schedule(step, max_steps) for step in range(max_steps)}
    for step, stage in stages.items():
        if not isinstance(stage, Stage):
            raise TypeError(
                f"`schedule({step}, {max_steps})` returned `{type(stage).__name__}`. Return a `trl_score.objective.Stage`."
            )
        if min(stage.credited) > num_attempts:
            raise ValueError(
                f"`schedule({step}, {max_steps})` credits the attempts {tuple(stage.credited)}, but a rollout has "
                f"`num_attempts={num_attempts}`, so nothing would be trained. Credit an attempt that exists."
            )
    made = {_key(stages[step]) for step in starts}
    for stage in stages.values():
        if _key(stage) not in made:
            steps = [s for s, other in stages.items() if _key(other) == _key(stage)]
            window = max(b - a for a, b in zip(starts, [*starts[1:], max_steps], strict=True))
            raise ValueError(
                f"Stage {stage.number} (attempts {tuple(stage.credited)} are credited) would be skipped: it holds in {len(steps)} "
                f"steps from step {steps[0]} on, but new rollouts are made every {window} steps, and keep the stage of the step "
                "in which they are made (`steps_per_generation` x `num_iterations` / `gradient_accumulation_steps`). Lower "
                "`steps_per_generation` or `num_iterations`, or change `stage1_steps` or the `schedule`."
            )


def _key(stage: Stage) -> tuple:
    return stage.number, tuple(stage.credited), tuple(stage.held)


def check_model(model, peft_config: PeftConfig | None, args: SCoReConfig):
    """
    The reference is the base model. So an adapter must not change it, a model object must come from a folder (TRL reads the
    reference from there), and a model that SCoRe has trained must not silently become the reference.
    """
    if args.beta == 0:
        return
    if peft_config is not None:
        check_adapter(peft_config)
    elif isinstance(model, PeftModel):
        for config in model.peft_config.values():
            check_adapter(config)
    elif not isinstance(model, str):
        check_folder(model, args)
    if args.reference_model_name_or_path is not None:
        return
    if isinstance(model, str):
        kwargs = args.model_init_kwargs or {}
        config = AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    else:
        config = model.config
    if getattr(config, TRAINED_FLAG, False):
        raise ValueError(
            f"'{get_config_model_id(config) or model}' was trained by SCoRe, so it is not the base model that both stages "
            "hold to, and TRL would make it the reference. Train both stages in one run (`stage1_steps`), continue a run "
            "with `resume_from_checkpoint`, or set `reference_model_name_or_path` to the base model. If it is meant as the "
            f"base of a new run, remove `{TRAINED_FLAG}` from its config.json."
        )


def check_folder(model, args: SCoReConfig):
    """TRL makes the reference of a model object from its folder; its weights are then replaced by those of the object."""
    name = get_config_model_id(model.config)
    try:
        if not name:
            raise OSError("`config._name_or_path` is empty.")
        AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"The reference of a model that is passed as an object is made from the folder that it was loaded from, which was not "
            f"found ('{name}'). Save it with `model.save_pretrained` and `tokenizer.save_pretrained`, and pass the folder."
        ) from error


def copy_weights(model: nn.Module, reference: nn.Module):
    """
    Make the weights of the given model those of its reference, which TRL read from the folder that the model came from: the
    model can have been changed since.

    Raises:
        `ValueError`: if the model has other weights than a model from its folder.
    """
    vocabulary = model.get_input_embeddings().weight.size(0)
    if reference.get_input_embeddings().weight.size(0) != vocabulary:
        reference.resize_token_embeddings(vocabulary, mean_resizing=False)
    try:
        reference.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "The given model has other weights than its folder "
            f"('{get_config_model_id(model.config)}') names, so the reference cannot be made from there: layers were added, removed "
            "or resized. Save it with `model.save_pretrained` and pass the folder."
        ) from error


def check_adapter(config: PeftConfig):
    """The model under an adapter is the reference, so an adapter must neither rewrite nor train its weights."""
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(REWRITING_INITS):
        raise ValueError(
            f"`init_lora_weights={init!r}` changes the weights under the adapter, but the model under the adapter is the reference "
            "of the KL penalties. Set it to True, 'gaussian' or 'eva'."
        )
    bias = getattr(config, "bias", "none")
    if bias not in ("none", False, None):
        raise ValueError(
            f"`bias={bias!r}` trains biases of the model under the adapter, but this model is the reference of the KL penalties. "
            "Set it to 'none'."
        )


def check_reference_is_fixed(model: PeftModel):
    """With the adapter disabled, the output must not depend on any parameter that is trained."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    model.eval()
    try:
        with model.disable_adapter(), torch.enable_grad():
            for parameter in trained.values():  # PEFT freezes what it disables
                parameter.requires_grad_(True)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()
            gradients = [None] * len(trained)
            if output.requires_grad:
                gradients = torch.autograd.grad(output, list(trained.values()), allow_unused=True)
    finally:
        model.train(training)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
    moving = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    if moving:
        raise ValueError(
            f"Training would move the reference: {len(moving)} trained parameters, such as '{moving[0]}', belong to the model "
            "under the adapter, and this model is the reference of the KL penalties. Freeze them "
            "(`parameter.requires_grad_(False)`), or use full fine-tuning without an adapter."
        )


def check_start(kl: float, is_float32: bool):
    """A fresh run starts from its reference: the KL of its first batch is 0 up to rounding."""
    limit = MAX_START_KL["float32" if is_float32 else "half"]
    if not kl <= limit:
        raise ValueError(
            f"Before the first update the KL to the reference is {kl:.3g} per token, not 0 (up to {limit:g} for rounding), so the "
            "reference is not the model that this run starts from. Check what changed either of them: an adapter that does not "
            "start at zero (`init_lora_weights`), or weights or a configuration that were edited after loading (save the model "
            "and pass its folder). An adapter that is already trained is passed as a `PeftModel`."
        )


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


def check_shards(reference_model_name_or_path: str | None, is_sharded: bool):
    """A named reference is loaded as whole weights, which no process has if the model is sharded."""
    if reference_model_name_or_path is not None and is_sharded:
        raise ValueError(
            "`reference_model_name_or_path` loads whole weights into the reference model, which ZeRO-3 and FSDP shard. "
            "Start from the base model itself and leave it out, or train with DDP or ZeRO-2."
        )


def check_devices(devices: list[str]):
    """
    An evaluation with vLLM in several processes: each has a GPU of its own.

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


class ContextCheck:
    """
    All attempts at a problem fit the model's context: checked for every row of the data at construction, and for every batch.

    Args:
        limit (`int`, *optional*):
            Tokens of the model's context; `None` if it has no limit.
        max_completion_length (`int`):
            Tokens of one attempt.
        bridge ([`~trl_score.rollout.Bridge`]):
            Tokens between two attempts.
    """

    def __init__(self, limit: int | None, max_completion_length: int, bridge: Bridge):
        self.limit, self.max_completion_length, self.bridge = limit, max_completion_length, bridge

    def bridge_tokens(self, prompts: list, instructions: list[str], num_attempts: int) -> list[int]:
        """Tokens of all bridges of each rollout."""
        empty = [[] for _ in prompts]
        each = [self.bridge(prompts, instructions, attempt, empty) for attempt in range(1, num_attempts)]
        return [sum(map(len, row)) for row in zip(*each, strict=True)] if each else [0] * len(prompts)

    def check_batch(
        self,
        prompts: list,
        prompt_ids: list[list[int]],
        instructions: list[str],
        num_attempts: int,
        stored: list[list[int] | None],
        largest: Callable[[int], int],
    ):
        """
        Check a batch of rollouts.

        Args:
            prompts, prompt_ids, instructions (`list`):
                `B` prompts, their tokens, and their correction instructions.
            num_attempts (`int`):
                Attempts in a rollout.
            stored (`list[list[int] | None]`):
                `B` stored first attempts, `None` for one that is sampled.
            largest (`Callable[[int], int]`):
                The largest of the numbers of all processes: they stop together, so that none waits for one that has stopped.
        """
        if self.limit is None:
            return
        bridges = self.bridge_tokens(prompts, instructions, num_attempts)
        firsts = [self.max_completion_length if ids is None else len(ids) for ids in stored]
        needed = [
            len(ids) + first + (num_attempts - 1) * self.max_completion_length + between
            for ids, first, between in zip(prompt_ids, firsts, bridges, strict=True)
        ]
        most = largest(max(needed))
        if most > self.limit:
            row = max(range(len(needed)), key=needed.__getitem__)
            where = f"row {row} of a batch" if needed[row] == most else "a row of another process"
            self._refuse(where, most, len(prompt_ids[row]), firsts[row], num_attempts, bridges[row])

    def check_rows(
        self,
        name: str,
        dataset,
        tokenize: Callable[[list], list[list[int]]],
        instruction: str,
        num_attempts: int,
        first_attempts: Callable[[dict], int] | None = None,
    ):
        """
        Check all rows of a dataset, of a streamed one the first.

        Args:
            name (`str`):
                What errors call it.
            dataset (`~datasets.Dataset` or `~datasets.IterableDataset`):
                The rows.
            tokenize (`Callable`):
                Token ids of a list of prompts.
            instruction (`str`):
                The correction instruction of rows without one.
            num_attempts (`int`):
                Attempts in a rollout.
            first_attempts (`Callable[[dict], int]`, *optional*):
                Tokens that the longest first attempt of a row can have; `max_completion_length` if not given.
        """
        columns = ("prompt", "correction_instruction", "first_attempts")
        if isinstance(dataset, IterableDataset):
            rows = [{key: row[key] for key in columns if key in row} for row in dataset.take(STREAMED_ROWS)]
            dataset = Dataset.from_list(rows)
        dataset = dataset.select_columns([each for each in columns if each in dataset.column_names])
        row = dataset[0]
        if is_conversational(row) and self.bridge.tokenizer.chat_template is None:
            raise ValueError(
                "The dataset's prompts are chat messages, but the tokenizer has no chat template. Use a tokenizer that has "
                "one, set `tokenizer.chat_template`, or give the prompts as text."
            )
        self.bridge_tokens([row["prompt"]], [row.get("correction_instruction") or instruction], num_attempts)
        if self.limit is None:
            return
        too_long, worst, between = 0, None, {}
        for start in range(0, len(dataset), ROWS_AT_A_TIME):
            rows = list(dataset.select(range(start, min(start + ROWS_AT_A_TIME, len(dataset)))))
            for offset, (row, ids) in enumerate(zip(rows, tokenize([row["prompt"] for row in rows]), strict=True)):
                own = row.get("correction_instruction") or instruction
                # Hardly any template makes it depend on the prompt; each batch is checked to the token.
                if own not in between:
                    [between[own]] = self.bridge_tokens([row["prompt"]], [own], num_attempts)
                first = self.max_completion_length if first_attempts is None else first_attempts(row)
                needed = len(ids) + first + (num_attempts - 1) * self.max_completion_length + between[own]
                too_long += needed > self.limit
                if worst is None or needed > worst[1]:
                    worst = (f"row {start + offset} of `{name}`", needed, len(ids), first, num_attempts, between[own])
        if too_long:
            self._refuse(*worst, f" {too_long} rows of `{name}` are too long." if too_long > 1 else "")

    def _refuse(self, where, needed, prompt, first, num_attempts, bridges, more=""):
        attempts = f"{num_attempts} attempts of up to {self.max_completion_length} tokens (`max_completion_length` holds for each)"
        if first != self.max_completion_length:
            attempts = f"a stored first attempt of up to {first} tokens, {num_attempts - 1} more of up to {self.max_completion_length}"
        raise ValueError(
            f"The model's context of {self.limit} tokens is too short: a prompt of {prompt} tokens ({where}), {attempts} and "
            f"{bridges} tokens of correction instructions need {needed}.{more} Lower `max_completion_length` or drop the longest "
            "rows."
        )


def longest_first_attempt(args: SCoReConfig, tokenizer) -> "Callable[[dict], int] | None":
    """How long the first attempts of a row can be: its stored ones, and the sampled ones unless all are stored."""
    if not args.num_offline:
        return None
    sampled = args.max_completion_length if args.num_offline < args.num_generations else 0
    return lambda row: max(sampled, *(len(attempt_tokens(attempt, tokenizer)) for attempt in row["first_attempts"]))
