"""`SCoReTrainer`: rollout, reward and objective in TRL's `GRPOTrainer`. With `resuming.py`, the only file that knows TRL's internals."""

import math
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from .batch import Batch
from .cache import can_reuse_cache, reused_cache
from .callbacks import arrange, checkpoint_to_load, open_trackio
from .checks import (
    TRAINED_FLAG,
    ContextCheck,
    check_datasets,
    check_model,
    check_reference_is_fixed,
    check_schedule,
    check_shards,
    check_start,
    check_trainable,
    copy_weights,
    length_of_run,
    longest_first_attempt,
    named_datasets,
    warn_of_dropout,
)
from .decoding import Decoding, keep_random_state, load_generation_config, neutral_generation, with_end_token
from .first_attempts import is_stored, sample_or_take, stored_attempts
from .metrics import attempt_changes, self_correction_values
from .model_card import write_model_card
from .objective import (
    Stage,
    balanced_stage1_beta,
    spread_to_tokens,
    sum_per_attempt,
    targets,
    two_stages,
)
from .padding import ScoredTokens, by_length, width
from .quantization import keep_differentiable
from .resuming import save_run, start_run, whole_checkpoint
from .reward_errors import graded, unique_names
from .rollout import Bridge, Rollouts, decode_attempts, roll_out, save_rollout_settings
from .score_config import TECHNICAL_GENERATION_KWARGS, SCoReConfig
from .tasks.base import text_of
from .tasks.math import CORRECTION_INSTRUCTION
from .transcripts import transcript


logger = get_logger(__name__)


class SCoReTrainer(GRPOTrainer):
    """
    Trainer for SCoRe, the method of [Training Language Models to Self-Correct via Reinforcement
    Learning](https://huggingface.co/papers/2409.12917): a [`~trl.GRPOTrainer`] in which a completion is several attempts
    at a problem with a correction instruction between them, and every attempt has its own reward, advantage and KL weight.
    One `train()` runs Stage I and Stage II.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_score import SCoReTrainer

    >>> trainer = SCoReTrainer(
    ...     model="Qwen/Qwen2.5-1.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.GRPOTrainer`]. The reference model is always the base model: the given one in
            full fine-tuning, the one under the adapter with PEFT, also when the given model already carries a trained
            adapter.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions, as in [`~trl.GRPOTrainer`]. Each is called once per attempt: `completions` and
            `completion_ids` hold that attempt alone, and the keyword `attempt` says which it is, from 1. An attempt counts
            as right in the accuracy metrics when the first reward function gives it at least 1.
        args ([`SCoReConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data with a column `prompt` (chat messages or text). A column `correction_instruction` overrides the
            configured one row by row; all other columns reach the reward functions.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.GRPOTrainer`].
        schedule (`Callable[[int, int], Stage]`, *optional*):
            What each optimizer step optimizes: from the steps done so far and `max_steps` to a
            [`~trl_score.objective.Stage`]. By default the paper's, [`~trl_score.objective.two_stages`] with `stage1_steps`.

    Raises:
        `ValueError`: for a dataset without `prompt`, chat messages without a chat template, a context too short for the
            prompt and all attempts, or an option of [`~trl.GRPOTrainer`] that SCoRe does not support.
    """

    _tag_names = ["trl", "score", "trl-score"]
    _name = "SCoRe"
    _paper = {
        "title": "Training Language Models to Self-Correct via Reinforcement Learning",
        "id": "2409.12917",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{kumar2025training,
                title        = {{Training Language Models to Self-Correct via Reinforcement Learning}},
                author       = {Aviral Kumar and Vincent Zhuang and Rishabh Agarwal and Yi Su and John D. Co-Reyes and Avi Singh and Kate Baumli and Shariq Iqbal and Colton Bishop and Rebecca Roelofs and Lei M. Zhang and Kay McKinney and Disha Shrivastava and Cosmin Paduraru and George Tucker and Doina Precup and Feryal Behbahani and Aleksandra Faust},
                year         = 2025,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2409.12917},
            }"""),
    }

    task: str | None = None
    """Name of the task it trains on, for the model card; set it if there is one."""
    eval_task: str | None = None
    """Name of the task of the evaluation data, for the model card."""

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "str | PreTrainedModel | Callable | list",
        args: SCoReConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None" = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        schedule: "Callable[[int, int], Stage] | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SCoReConfig(f"{name.split('/')[-1]}-SCoRe")
        elif not isinstance(args, SCoReConfig):
            raise TypeError(f"`args` must be a `SCoReConfig`, got `{type(args).__name__}`.")
        if args.correction_instruction is None:
            args.correction_instruction = CORRECTION_INSTRUCTION
        for name, value in {
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
        }.items():
            if value is not None:
                raise ValueError(f"`{name}` is not supported by SCoRe, whose rollout is the attempts. Leave it out.")
        if (args.model_init_kwargs or {}).get("trust_remote_code"):
            args.trust_remote_code = True  # of tokenizer, configuration and reference as well
        check_datasets(train_dataset, eval_dataset, args)
        self.schedule = schedule or partial(two_stages, stage1_steps=args.stage1_steps, num_attempts=args.num_attempts)
        num_problems = None if isinstance(train_dataset, IterableDataset) else len(train_dataset)
        check_schedule(self.schedule, *length_of_run(num_problems, args), args.num_attempts)
        check_model(model, peft_config, args)
        processing_class = self._with_end_token(processing_class, model, args)
        is_given_adapter = isinstance(model, PeftModel)

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.reward_func_names = unique_names(self.reward_func_names)
        is_sharded = self._dist.is_zero3 or self._dist.is_fsdp
        check_shards(args.reference_model_name_or_path, is_sharded)
        keep_differentiable(self.model)
        check_trainable(self.model)
        self._set_reference(copy_from=None if isinstance(model, str) or is_sharded else self.model)
        if is_peft_model(self.model) and self.beta != 0.0 and not is_sharded:
            check_reference_is_fixed(self.model)
        reference = args.reference_model_name_or_path or get_config_model_id(self.model.config)
        self._starts_at_reference = (
            self.beta != 0.0 and not is_given_adapter and reference == get_config_model_id(self.model.config)
        )
        warn_of_dropout(self.model)

        self._bridge = Bridge(self._tokenizer, self.chat_template_kwargs, self.eos_token_ids)
        # TRL looks at a row's last token and drops whole rows; truncation is per attempt here, see `_roll_out`.
        self.mask_truncated_completions = False
        # TRL's own hook for rollouts: `_generate` does the bookkeeping on what it returns.
        self.rollout_func = self._roll_out
        self._planned_steps = max(args.max_steps, 1)  # `max_steps` when the run began
        self._batch: Batch | None = None  # the one that is being made
        self._shown: Batch | None = None  # the one that the console has
        self._attempt: int | None = None  # the one that is being graded
        self._uncounted: int | None = None  # rollouts of the current evaluation
        self._kl_sums: Tensor | float = 0.0  # of that evaluation: KL and tokens of each attempt
        # Training and evaluation can have different columns, so each has a completions table of its own.
        self._tables = {"train": self._logs, "eval": deepcopy(self._logs)}
        self._stage1_beta = args.stage1_beta  # of the next batch
        self._num_generated_tokens = 0  # of all processes, in training
        self._reuses_cache = (
            args.reuse_cache
            and not (args.use_vllm or args.use_transformers_continuous_batching)
            # With ZeRO-3 and FSDP, a process keeps generating until all processes have finished.
            and not is_sharded
            and can_reuse_cache(self.model)
        )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.use_vllm and args.vllm_max_model_length is not None:
            limit = min(limit or args.vllm_max_model_length, args.vllm_max_model_length)
        self._context = ContextCheck(limit, self.max_completion_length, self._bridge)
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset).items():
            number, first_attempts = args.num_attempts_eval, None
            if name == "train_dataset":
                number, first_attempts = args.num_attempts, longest_first_attempt(args, self._tokenizer)
            self._context.check_rows(
                name,
                dataset,
                lambda prompts: self._tokenize_prompts(prompts)[0],
                args.correction_instruction,
                number,
                first_attempts,
            )

    @staticmethod
    def _with_end_token(processing_class, model, args: SCoReConfig) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded as TRL does if it is not given, with the model's end-of-sequence token if it has none."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        where = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                name, truncation_side="left", padding_side="left", **where
            )
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError("Images are not supported by SCoRe. Pass a tokenizer as `processing_class`.")
        if not isinstance(processing_class, PreTrainedTokenizerBase) or processing_class.eos_token_id is not None:
            return processing_class
        if not isinstance(model, str):
            return with_end_token(processing_class, model.generation_config, name)
        return with_end_token(processing_class, load_generation_config(name, **where), name)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        arrange(self)
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if (folder := checkpoint_to_load(self.callback_handler.callbacks, self.args, self.state)) is not None:
            self.state.best_model_checkpoint = folder
            self._load_best_model()
        return output

    # Reference model

    def _set_reference(self, copy_from: nn.Module | None):
        """The base model as the reference: the one under the adapter, the named one, or the given one (`copy_from`)."""
        if is_peft_model(self.model):
            if self.args.reference_model_name_or_path is not None:
                raise ValueError(
                    "`reference_model_name_or_path` is for full fine-tuning: with an adapter the reference is the model "
                    "under it. Leave it out."
                )
            if "ref" in self.model.peft_config:
                # TRL cloned the given adapter as the reference. Without the clone it uses the base model.
                self.model.delete_adapter("ref")
                logger.warning(
                    "The given model carries an adapter. The reference of the KL penalties is the base model under it, as "
                    "in both stages of the paper. If the adapter is part of your base model, merge it first."
                )
        elif self.ref_model is not None and self.args.reference_model_name_or_path is not None:
            path = self.args.reference_model_name_or_path
            reference = create_model_from_path(
                path, dtype=self.model.dtype, device_map=None, trust_remote_code=self.args.trust_remote_code
            )
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(reference.state_dict())
        elif self.ref_model is not None and copy_from is not None:
            copy_weights(copy_from, self.accelerator.unwrap_model(self.ref_model))

    def _check_start(self, inputs: dict):
        """Compare policy and reference on the first batch of a run, without the dropout of training."""
        model = self.accelerator.unwrap_model(self.model)
        self.model.eval()
        try:
            policy = self._logps(inputs, self.model)
            with model.disable_adapter() if is_peft_model(model) else nullcontext():
                reference = self._logps(inputs, self.model if self.ref_model is None else self.ref_model)
        finally:
            self.model.train()
        difference = (reference - policy).float()
        scored = inputs["attempt_ids"] > 0
        kl = (difference.exp() - difference - 1) * scored
        kl, tokens = self.accelerator.reduce(torch.stack([kl.sum(), scored.sum()]), reduction="sum")
        is_half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
        is_quantized = getattr(model, "hf_quantizer", None) is not None
        check_start((kl / tokens.clamp(min=1)).item(), is_float32=not (is_half or is_quantized))

    # Attempts and stages

    @property
    def _rollouts(self) -> Rollouts | None:
        """The rollouts of the last batch, by the name under which published scripts read them."""
        return None if self._batch is None else self._batch.rollouts

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step, counted from 0."""
        return self.schedule(step, self._planned_steps)

    def _new_batch(self, instructions: list[str]) -> Batch:
        training = self.model.training
        return Batch(
            mode="train" if training else "eval",
            stage=self.stage_at(self.state.global_step),
            num_attempts=self.args.num_attempts if training else self.args.num_attempts_eval,
            num_generations=self.num_generations if training else self.num_generations_eval,
            instructions=instructions,
            stored=[None] * len(instructions),
        )

    # Rollout

    def generate_attempts(self, prompts: list, instructions: list[str] | None = None) -> list[list[str]]:
        """
        All attempts at some problems, in one batch, decoded as in evaluation (`eval_temperature`).

        Args:
            prompts (`list`):
                Prompts, chat messages or text.
            instructions (`list[str]`, *optional*):
                Correction instruction of each; the configured one if not given.

        Returns:
            `list[list[str]]`: the text of each attempt of each problem.
        """
        prompts = list(prompts)
        training = self.model.training
        self.model.eval()
        try:
            self._batch = self._new_batch(instructions or [self.args.correction_instruction] * len(prompts))
            self._batch.num_generations = 1  # each row is a problem of its own
            self._roll_out(prompts, self)
        finally:
            self.model.train(training)
        return [list(row) for row in zip(*(map(text_of, each) for each in self._batch.completions), strict=True)]

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        open_trackio(self)
        batch = self._batch
        prompt_ids = self._prompt_ids(prompts)

        def largest(number: int) -> int:
            return self.accelerator.gather(torch.tensor(number, device=self.accelerator.device)).max().item()

        self._context.check_batch(prompts, prompt_ids, batch.instructions, batch.num_attempts, batch.stored, largest)

        def sample(contexts, num_generations):
            return self._generate_single_turn(contexts, None, {}, num_generations=num_generations)

        def generate(contexts, attempt):
            if attempt > 1:  # the rollouts of a problem share their prompt, but not their first attempt
                return sample(contexts, 1)
            if self.args.num_offline and batch.mode == "train":
                return sample_or_take(contexts, batch.stored, sample, self._num_sampled)
            return sample(contexts, batch.num_generations)

        def bridge(attempt, attempt_ids):
            return self._bridge(prompts, batch.instructions, attempt, attempt_ids)

        with (
            self._decoding(batch.mode),
            reused_cache(self.model) if self._reuses_cache else nullcontext(),
        ):
            batch.rollouts = rollouts = roll_out(prompt_ids, generate, bridge, batch.num_attempts)
        self.model.train(batch.mode == "train")  # TRL's continuous batching leaves it in training mode
        batch.completions = [
            decode_attempts(self._tokenizer, prompts, rollouts, k + 1) for k in range(batch.num_attempts)
        ]
        masked = batch.truncated(self.eos_token_ids) if self.args.mask_truncated_completions else None
        batch.trained = batch.trained_ids(masked)
        return {
            "prompt_ids": rollouts.prompt_ids,
            "completion_ids": rollouts.completion_ids,
            "logprobs": rollouts.completion_logprobs,
            "env_mask": [[int(k > 0) for k in row] for row in batch.trained],
        }

    def _num_sampled(self, rows: int) -> int:
        """First attempts that the process which needs most of them samples: generation can be collective."""
        each = range(self.accelerator.num_processes)
        return max(sum(not is_stored(p * rows + i, self.args) for i in range(rows)) for p in each)

    def _prompt_ids(self, prompts: list) -> list[list[int]]:
        """Token ids of each prompt; those of a problem's rollouts, which are consecutive, are made once."""
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
        prompt_ids, _, _ = self._tokenize_prompts([prompt for prompt, _ in groups])
        return [list(ids) for ids, (_, number) in zip(prompt_ids, groups, strict=True) for _ in range(number)]

    @contextmanager
    def _decoding(self, mode: str):
        """
        Training samples from the policy, evaluation decodes at `eval_temperature`: both from the model's own distribution,
        whatever the checkpoint's `generation_config` says. Evaluation also ignores what cuts the distribution in training.
        """
        with ExitStack() as stack:
            if not self.use_vllm:
                stack.enter_context(neutral_generation(self.accelerator.unwrap_model(self.model)))
            if mode == "eval":
                given = self.args.generation_kwargs or {}
                technical = {name: given[name] for name in given.keys() & TECHNICAL_GENERATION_KWARGS}
                decoding = Decoding(self.args.eval_temperature, max_completion_length=self.max_completion_length)
                if self.use_vllm:
                    neutral = {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
                    neutral |= {"repetition_penalty": 1.0, "generation_kwargs": technical}
                    stack.enter_context(_replaced(self.vllm_generation, neutral))
                else:
                    config = decoding.generation_config(self.eos_token_ids, self._tokenizer.pad_token_id)
                    config.update(
                        **technical, cache_implementation=self.args.cache_implementation, disable_compile=True
                    )
                    changed = {"generation_config": config, "generation_kwargs": config.to_diff_dict()}
                    stack.enter_context(_replaced(self, changed))
            yield

    def _generate(self, prompts: list):
        start = time.perf_counter()
        prompt_ids, completion_ids, tool_mask, completions, *rest = super()._generate(prompts)
        batch = self._batch
        self._metrics[batch.mode]["time/rollout"].append(time.perf_counter() - start)
        if is_conversational({"prompt": prompts[0]}):  # for the completions table: one message per turn
            completions = []
            for instruction, first, *others in zip(batch.instructions, *batch.completions, strict=True):
                user = {"role": "user", "content": instruction}
                completions.append(first + [message for attempt in others for message in (user, *attempt)])
        return prompt_ids, completion_ids, tool_mask, completions, *rest

    # Rewards

    def _rewards_of_all_attempts(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """What TRL calls as `_calculate_rewards`: that method for each attempt, so that an override of it counts."""
        start = time.perf_counter()
        batch, reward_funcs = self._batch, self.reward_funcs
        try:
            for k in range(batch.num_attempts):
                self._attempt = k + 1
                self.reward_funcs = [
                    func if isinstance(func, nn.Module) else graded(func, name, k + 1)
                    for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
                ]
                attempt_ids = [attempts[k] for attempts in batch.rollouts.attempts]
                rewards = type(self)._calculate_rewards(self, inputs, prompts, batch.completions[k], attempt_ids)
                batch.rewards.append(rewards)
        finally:
            self.reward_funcs = reward_funcs
        self._metrics[batch.mode]["time/reward"].append(time.perf_counter() - start)
        return batch.rewards[-1]

    def _log_completion_extra(self, column: str, values: list):
        super()._log_completion_extra(f"{column}/attempt_{self._attempt}", values)

    def _log_metric(self, name: str, value: float):
        super()._log_metric(f"{name}/attempt_{self._attempt}", value)

    # Advantages and KL weights

    def _generate_and_score_completions(self, inputs):
        begin = time.perf_counter()
        batch = self._batch = self._new_batch(
            [row.get("correction_instruction") or self.args.correction_instruction for row in inputs]
        )
        first_row = self.accelerator.process_index * len(inputs)
        if batch.mode == "train" and self.args.num_offline:
            batch.stored = stored_attempts(inputs, first_row, self.args, self.state.global_step, self._tokenizer)
        self._logs = self._tables[batch.mode]
        self._calculate_rewards = self._rewards_of_all_attempts
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            del self._calculate_rewards  # the class's own is back
        length = output["completion_ids"].size(1)
        output["attempt_ids"] = _padded(batch.trained, length).to(self.accelerator.device)  # (B, T)
        advantages, weights = self._targets(output, batch.reward_by_function(self.reward_weights))
        output["advantages"] = spread_to_tokens(advantages[first_row : first_row + len(inputs)], output["attempt_ids"])
        output["kl_weights"] = spread_to_tokens(weights, output["attempt_ids"])
        if "importance_sampling_ratio" in output and output["importance_sampling_ratio"].size(1) == 1:
            output["importance_sampling_ratio"] = self._importance_sampling_ratio(output)
        counted = self._counted(len(advantages))
        if batch.mode == "eval":
            output["counted"] = counted[first_row : first_row + len(inputs)]
        self._log_rollouts(advantages, counted)
        self._metrics[batch.mode]["time/batch"].append(time.perf_counter() - begin)
        return output

    def _targets(self, output: dict[str, Tensor], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """[`~trl_score.objective.targets`] of the batch of all processes, and the next batch's adaptive beta2."""
        batch, args = self._batch, self.args
        in_reward = args.kl_level == "sequence" and self.beta != 0.0
        adapt = args.adaptive_stage1_beta and batch.mode == "train" and batch.stage.held
        log_ratio = kl = stored = None
        if in_reward or adapt:
            per_token = self._policy_logps(output) - output["ref_per_token_logps"]  # (B, T)
            estimate = (-per_token).exp() + per_token - 1  # as TRL estimates the KL; not negative
            log_ratio, kl = (  # of all processes: (B, K)
                self.accelerator.gather(sum_per_attempt(each, output["attempt_ids"], batch.num_attempts))
                for each in (per_token, estimate)
            )
        if batch.mode == "train" and args.num_offline:
            stored = torch.tensor([is_stored(index, args) for index in range(len(rewards))], device=rewards.device)
        advantages, weights = targets(
            rewards,
            batch.stage,
            num_generations=batch.num_generations,
            alpha=args.alpha,
            gamma=args.gamma,
            beta=self.beta,
            stage1_beta=self._stage1_beta,
            log_ratio=log_ratio if in_reward else None,
            stored=stored,
        )
        if adapt:  # only for the batches to come, so that no batch is weighted by what it was sampled to be
            self._metrics["train"]["stage1_beta"].append(self._stage1_beta)
            self._stage1_beta = balanced_stage1_beta(
                self._stage1_beta,
                kl=kl[:, [k - 1 for k in batch.stage.held]].sum(1).mean().item(),
                advantage=advantages[:, batch.stage.credited[-1] - 1].abs().mean().item(),
                start=args.stage1_beta,
            )
        return advantages, weights

    def _policy_logps(self, output: dict[str, Tensor]) -> Tensor:
        """
        Log-probabilities of the rollouts' tokens under the policy that sampled them, (B, T): TRL's, or computed here where it
        did without.
        """
        return output["old_per_token_logps"] if "old_per_token_logps" in output else self._logps(output, self.model)

    def _logps(self, output: dict[str, Tensor], model: nn.Module) -> Tensor:
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, *_ = self._get_per_token_logps_and_entropies(
                ScoredTokens(model, self.accelerator.unwrap_model(model), output["attempt_ids"] > 0),
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return logps

    def _importance_sampling_ratio(self, output: dict[str, Tensor]) -> Tensor:
        """TRL's sequence-level correction of vLLM's log-probabilities, per attempt instead of per row: (B, T)."""
        difference = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).nan_to_num(0.0)
        ratio = sum_per_attempt(difference, output["attempt_ids"], self._batch.num_attempts).exp()  # (B, K)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        clamped = ratio if low is None and high is None else ratio.clamp(low, high)
        if self.vllm_importance_sampling_mode == "sequence_mask":
            ratio = torch.where(ratio == clamped, ratio, 0.0)
        else:
            ratio = clamped
        return spread_to_tokens(ratio, output["attempt_ids"])

    def _log_rollouts(self, advantages: Tensor, counted: Tensor):
        batch, metrics = self._batch, self._metrics[self._batch.mode]
        attempts = range(1, batch.num_attempts + 1)
        by_function = batch.reward_by_function(self.reward_weights)  # (B of all processes, K, F)
        abstained = by_function.isnan()
        rewards = torch.where(abstained.all(-1), torch.nan, by_function.nansum(-1))  # (B of all processes, K)
        metrics["stage"].append(batch.stage.number)
        # One value per rollout, not per batch, so that a smaller last batch does not count more.
        unweighted = torch.stack(batch.rewards, dim=1)[counted]
        correct = unweighted[:, :, 0]
        correct = torch.where(correct.isnan(), correct, (correct >= 1).float())
        values = self_correction_values(correct) | {f"reward_t{k}": rewards[counted, k - 1] for k in attempts}
        own = {  # of this process: (B, K) or (B, 2)
            tuple(f"completions/clipped_ratio_t{k}" for k in attempts): batch.truncated(self.eos_token_ids),
            tuple(f"completions/mean_length_t{k}" for k in attempts): [
                [len(ids) for ids in row] for row in batch.rollouts.attempts
            ],
        }
        if batch.num_attempts > 1:
            own["edit_distance_ratio", "changed_ratio"] = attempt_changes(batch.rollouts.attempts).tolist()
            values["bonus_abstained_ratio"] = (abstained[:, 1:] != abstained[:, :-1]).any(-1).any(-1)[counted].float()
        columns = torch.cat([torch.tensor(each).float() for each in own.values()], dim=1).to(rewards.device)
        columns = self.accelerator.gather(columns)[counted]
        values |= dict(zip((name for each in own for name in each), columns.T, strict=True))
        for name, each in values.items():
            metrics[name].extend(each.tolist())
        if batch.mode == "eval":  # TRL's means have the rows in them that are not counted
            stock = {f"rewards/{name}/mean": unweighted[:, -1, i] for i, name in enumerate(self.reward_func_names)}
            stock |= {"reward": rewards[counted, -1]}
            stock |= {"completions/mean_length": sum(values[f"completions/mean_length_t{k}"] for k in attempts)}
            for name, each in stock.items():
                metrics[name][-1:] = each.tolist()
        if batch.mode == "train":
            count = torch.tensor(batch.num_generated_tokens, device=rewards.device)
            self._num_generated_tokens += self.accelerator.gather(count).sum().item()
        metrics["num_generated_tokens"] = [self._num_generated_tokens]

        # The completions table: TRL wrote its own advantages of the last attempt.
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages[:, -1].tolist())
        for k in attempts:
            self._logs["extra"][f"reward/attempt_{k}"].extend(rewards[:, k - 1].tolist())
            self._logs["extra"][f"advantage/attempt_{k}"].extend(advantages[:, k - 1].tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with patch.object(grpo_trainer, "print_prompt_completions_sample", self._print_rollouts):
            super().log(logs, start_time)

    def _print_rollouts(self, prompts: list, *args, **kwargs):
        """In place of TRL's table: the last rollouts of this process, once, if they are what is logged."""
        batch, before, self._shown = self._batch, self._shown, self._batch
        if batch is not before and batch.mode == ("train" if self.model.training else "eval"):
            number = len(batch.instructions)
            missing = number * self.accelerator.num_processes - len(prompts)  # TRL keeps the last ones only
            prompts = [*[None] * missing, *list(prompts)[max(0, -missing) :]][:number]
            print(transcript(batch, prompts, self.state.global_step, self.num_completions_to_print))

    # Evaluation

    def evaluate(self, *args, **kwargs):
        with keep_random_state():  # a run with evaluations equals one without
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with keep_random_state():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """TRL's, with the metrics of the rollouts in its result, under the prefix of the evaluation set."""
        self._metrics["eval"].clear()
        self._kl_sums = 0.0
        rows = dataloader.dataset
        self._uncounted = len(rows) * self.num_generations_eval if hasattr(rows, "__len__") else None
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            for name, values in self._metrics["eval"].items():
                valid = [value for value in values if not math.isnan(value)]
                output.metrics[f"{metric_key_prefix}_{name}"] = sum(valid) / len(valid) if valid else None
        finally:
            self._metrics["eval"].clear()
        return output

    def _counted(self, number: int) -> Tensor:
        """
        Which rollouts of all processes, (B,), are counted: all in training. In evaluation with several processes, rows from
        the start of the data fill up the last batch, and these are not counted again.
        """
        last = number
        if self._batch.mode == "eval":
            state = self.accelerator.gradient_state
            if self._uncounted is not None:
                last = min(number, self._uncounted)
                self._uncounted -= last
            elif state.end_of_dataloader and state.remainder > 0:  # streamed data
                last = state.remainder
        return torch.arange(number, device=self.accelerator.device) < last

    # Loss

    def _prepare_inputs(self, generation_batch):
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not buffered and self._sorts_rows:
            self._buffered_inputs = by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        if self.model.training and self._step == 0 and self.state.global_step == 0 and self._starts_at_reference:
            self._check_start(inputs)
            self._starts_at_reference = False  # `train` may be called again
        return inputs

    @property
    def _sorts_rows(self) -> bool:
        """Whether a step's gradient is a sum over its rows, however they are divided into micro-batches."""
        return self.loss_type != "bnpo" and self.top_entropy_quantile == 1.0 and not self.aux_loss_enabled

    def _compute_loss(self, model, inputs):
        model = ScoredTokens(model, self.accelerator.unwrap_model(model), inputs["attempt_ids"] > 0)
        if self.beta == 0.0:
            return super()._compute_loss(model, inputs)
        beta, weights = self.beta, _TokenWeights(inputs["kl_weights"])
        self.beta = weights
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        kl, attempt_ids = weights.values.detach(), inputs["attempt_ids"]
        mode = "train" if self.model.training else "eval"
        number = self.args.num_attempts if mode == "train" else self.args.num_attempts_eval
        if mode == "eval":
            counted = inputs.get("counted", torch.ones_like(attempt_ids[:, 0], dtype=torch.bool))
            attempt_ids = torch.where(counted.unsqueeze(1), attempt_ids, 0)
        sums = [sum_per_attempt(each, attempt_ids, number).sum(0) for each in (kl, torch.ones_like(kl))]
        sums = self.accelerator.reduce(torch.stack(sums), reduction="sum")  # (2, K)
        if mode == "eval":  # over all batches of the evaluation, as its last one can be smaller
            sums = self._kl_sums = self._kl_sums + sums
        for k, value in enumerate((sums[0] / sums[1].clamp(min=1.0)).tolist(), start=1):
            values = self._metrics[mode][f"kl_t{k}"]
            if mode == "eval":
                values.clear()
            values.append(value)
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """TRL's, of the tokens that count: rows of similar length together, without padding, attempts' tokens only."""
        start = time.perf_counter()
        if isinstance(model, ScoredTokens):
            model, scored = model.model, model.scored
        else:  # while a batch is made
            scored = _padded(self._batch.trained, logits_to_keep).to(input_ids.device)
        unwrapped, found = self.accelerator.unwrap_model(model), []
        order = attention_mask.sum(1).argsort(stable=True)
        for rows in order.split(batch_size or len(order)):
            mask, ids = attention_mask[rows], input_ids[rows]
            first, end = width(mask, logits_to_keep)
            left_out = mask.size(1) - end
            result = super()._get_per_token_logps_and_entropies(
                ScoredTokens(model, unwrapped, scored[rows, : logits_to_keep - left_out]),
                ids[:, first:end],
                mask[:, first:end],
                logits_to_keep - left_out,
                **kwargs,
            )
            found.append(
                [
                    each if each is None or each.dim() == 0 else nn.functional.pad(each, (0, left_out))
                    for each in result
                ]
            )
        back = order.argsort()
        logps, entropies, aux_losses = zip(*found, strict=True)
        if self.model.training and not torch.is_grad_enabled():
            self._metrics["train"]["time/reference"].append(time.perf_counter() - start)
        return (
            torch.cat(logps)[back],
            None if entropies[0] is None else torch.cat(entropies)[back],
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    # Saving and resuming

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

    def _save(self, output_dir: str | None = None, state_dict=None):
        setattr(self.model.config, TRAINED_FLAG, True)
        try:
            super()._save(output_dir, state_dict)
        finally:
            delattr(self.model.config, TRAINED_FLAG)
        if self.args.should_save:
            save_rollout_settings(
                output_dir or self.args.output_dir,
                chat_template_kwargs=self.chat_template_kwargs,
                correction_instruction=self.args.correction_instruction,
            )

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None):
        model_name = model_name or (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        try:
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
            if self.is_world_process_zero():
                write_model_card(Path(self.args.output_dir) / "README.md", self)
        except Exception as error:
            if not self.is_in_train:  # in training, TRL writes a card with every checkpoint
                raise
            logger.warning(f"The model card was not written, and training continues: {error!r}")

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("correction_instruction", "first_attempts"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)


def _padded(rows: list[list[int]], width: int) -> Tensor:
    """Rows of attempt numbers, with 0 on the right: (B, width)."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


@contextmanager
def _replaced(holder: object, values: dict):
    """Within this context an object has these attributes, and its own again afterwards."""
    before = {name: getattr(holder, name) for name in values}
    vars(holder).update(values)
    try:
        yield
    finally:
        vars(holder).update(before)


class _TokenWeights:
    """
    Stands in for TRL's scalar `beta` while the loss is computed: TRL adds `beta * per_token_kl` to the loss of each token,
    which with this object is the KL weight of the token's attempt. So the KL estimator, its importance correction and the
    normalization stay TRL's own.
    """

    def __init__(self, weights: Tensor):
        self.weights = weights  # (B, T)

    def __ne__(self, other) -> bool:  # TRL asks `beta != 0.0`
        return True

    def __mul__(self, per_token_kl: Tensor) -> Tensor:
        self.values = per_token_kl  # (B, T)
        return self.weights * per_token_kl
