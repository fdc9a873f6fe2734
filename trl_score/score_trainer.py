"""
`SCoReTrainer`: rollout, reward and objective of SCoRe in the hooks of TRL's `GRPOTrainer`, in the order in which TRL calls them:

    _prepare_inputs                              a micro-batch: of new rollouts, or of rollouts that are in use
        _generate_and_score_completions          a new batch of rollouts
            _generate > _roll_out                all attempts, in tokens
            _get_per_token_logps_and_entropies   their log-probabilities under the policy and the reference
            _calculate_rewards                   once for each attempt
            _targets                             advantages and KL weights of each attempt (Eqs. 3 and 4)
    _compute_loss                                TRL's loss with these weights; the KL of Stage I is applied here

The hooks that start, save and resume a run are in `resuming.py`, those that evaluate in `trainer_evaluation.py`, and how attempts are decoded
is in `decoding.py`. No other file knows TRL's internals.
"""

import math
import textwrap
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id

from .batch import Batch
from .callbacks import open_trackio
from .checks import (
    Rows,
    check_best_metric,
    check_datasets,
    check_log_probabilities,
    check_number_of_steps,
    check_reward_functions,
    check_schedule,
    check_special_tokens,
    check_stage1_steps,
    check_trainable,
    check_unsupported,
    check_vocabulary,
    in_one_shard,
    length_of_run,
    rows_to_check,
    warn_of_dropout,
    warn_of_emulated_bfloat16,
)
from .context import ContextCheck, context_limit
from .decoding import temporarily, trainer_decoding, trainer_tokenizer
from .first_attempts import is_stored, most_sampled, sample_or_take, stored_attempts
from .generation import AllAttempts, can_generate_all
from .model_card import own_card, write_model_card
from .objective import (
    Stage,
    balanced_stage1_beta,
    importance_ratios,
    spread_to_tokens,
    sum_per_attempt,
    targets,
    two_stages,
)
from .padding import ScoredTokens, by_length, compute_by_length, has_virtual_tokens
from .quantization import keep_differentiable
from .reference import (
    TRAINED_FLAG,
    check_base,
    check_reference_is_fixed,
    check_shards,
    check_start,
    is_exact,
    set_reference,
    start_kl,
)
from .resuming import ResumableTrainer
from .reward_errors import graded, unique_names
from .rollout import Bridge, Rollouts, decode_attempts, roll_out, save_rollout_settings
from .rollout_metrics import TOKENS, empty_table, fill_table, kl_sums, means, rollout_values
from .score_config import SCoReConfig
from .tasks.base import text_of
from .tasks.math import CORRECTION_INSTRUCTION
from .trainer_evaluation import EvaluatingTrainer
from .transcripts import transcript


logger = get_logger(__name__)
# TRL 1.16 uses these names in every step. Nobody who trains can do anything about it.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)


class SCoReTrainer(ResumableTrainer, EvaluatingTrainer):
    """
    Trainer for SCoRe, the method of [Training Language Models to Self-Correct via Reinforcement
    Learning](https://huggingface.co/papers/2409.12917). It is a [`~trl.GRPOTrainer`] in which a completion is several attempts at a
    problem with a correction instruction between them. Every attempt has its own reward, advantage and KL weight. One `train()` runs
    Stage I and Stage II.

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
            Model to be trained, as in [`~trl.GRPOTrainer`]. The reference model is always the base model: the given model in
            full fine-tuning, or the model under the adapter with PEFT. This also holds if the given model carries a trained
            adapter.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions, as in [`~trl.GRPOTrainer`]. Each is called once per attempt: `completions` and
            `completion_ids` contain only this attempt, and the keyword `attempt`, for functions that take it, is its number,
            from 1. An attempt counts as right in the accuracy metrics if the first reward function gives it at least 1.
        args ([`SCoReConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data with a column `prompt` (chat messages or text). A column `correction_instruction` overrides the
            configured one row by row; all other columns reach the reward functions.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            The same as in [`~trl.GRPOTrainer`].
        schedule (`Callable[[int, int], Stage]`, *optional*):
            Function from the optimizer steps done so far and `max_steps` to the [`~trl_score.objective.Stage`] of the next step.
            By default it is the paper's schedule, [`~trl_score.objective.two_stages`] with `stage1_steps`.

    Raises:
        `ValueError`: for data, a model or settings that cannot work, such as a dataset without `prompt`, a context too short for
            the prompt and all attempts, or an option of [`~trl.GRPOTrainer`] that SCoRe does not support.
        `TypeError`: if `args` is not a [`SCoReConfig`], or the schedule returns no stage.
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
    """Name of the task of the training data, for the model card. Set it if there is one."""
    eval_task: str | None = None
    """Name of the task of the evaluation data, for the model card. Set it if there is one."""

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
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = SCoReConfig(f"{name.split('/')[-1]}-SCoRe")
        elif not isinstance(args, SCoReConfig):
            raise TypeError(
                f"`args` must be a `SCoReConfig`, got `{type(args).__name__}`. Change the name of the class: it takes the options "
                "of `GRPOConfig` too."
            )
        check_unsupported(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
        if args.correction_instruction is None:
            args.correction_instruction = CORRECTION_INSTRUCTION
        loading = args.model_init_kwargs or {}
        if loading.get("trust_remote_code"):
            args.trust_remote_code = True  # of tokenizer, configuration and reference as well
        datasets = rows_to_check(train_dataset, eval_dataset, args)
        check_datasets(datasets, args)
        check_best_metric(eval_dataset, args)
        if type(self)._calculate_rewards is GRPOTrainer._calculate_rewards:  # an override may call them in another way
            check_reward_functions(reward_funcs, datasets, args)
        if isinstance(train_dataset, IterableDataset) and args.world_size > 1 and train_dataset.num_shards > 1:
            train_dataset = in_one_shard(train_dataset)
        num_problems = None if isinstance(train_dataset, IterableDataset) else len(train_dataset)
        max_steps, generation_starts = length_of_run(num_problems, args)
        check_number_of_steps(max_steps, args)
        if schedule is None:
            check_stage1_steps(args.stage1_steps, max_steps, args.num_attempts)
            schedule = partial(two_stages, stage1_steps=args.stage1_steps, num_attempts=args.num_attempts)
        check_schedule(schedule, max_steps, generation_starts, args.num_attempts)
        self.schedule = schedule
        check_base(model, peft_config, args)
        revision = loading.get("revision") if isinstance(model, str) else None
        if peft_config is not None and revision is not None:
            peft_config.revision = revision  # saved with the adapter, for those who load its base model
        processing_class = trainer_tokenizer(
            processing_class, model, name, revision=revision, trust_remote_code=args.trust_remote_code
        )

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
        keep_differentiable(self.model)
        check_trainable(self.model)
        self._set_reference(model)
        self._check_log_probabilities()
        warn_of_dropout(self.model)
        warn_of_emulated_bfloat16(self.model, autocast=args.bf16)
        self._set_rollout(datasets)
        self._new_run(max(args.max_steps, 1))

    def _set_reference(self, given: "str | PreTrainedModel | PeftModel"):
        """Make the base model the reference of the KL penalties, and check that training leaves it as it is."""
        named = self.args.reference_model_name_or_path
        check_shards(named, self._is_sharded)
        reference = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        set_reference(self.model, reference, self.args, is_copied=not (isinstance(given, str) or self._is_sharded))
        if is_peft_model(self.model) and self.beta != 0.0 and not self._is_sharded:
            check_reference_is_fixed(self.model)
        is_base = not isinstance(given, PeftModel) and named in (None, get_config_model_id(self.model.config))
        self._starts_at_reference = self.beta != 0.0 and is_base  # until the first batch is checked

    @property
    def _is_sharded(self) -> bool:
        """Whether no process has the whole weights."""
        return self._dist.is_zero3 or self._dist.is_fsdp

    def _check_log_probabilities(self):
        is_placed = self.model.get_input_embeddings().weight.device.type == self.accelerator.device.type
        if self._is_sharded or not is_placed or has_virtual_tokens(self.model):
            return

        def score(ids, mask, number):
            with torch.no_grad():
                logps, *_ = self._get_per_token_logps_and_entropies(
                    ScoredTokens(self.model, self.model, mask[:, -number:]),
                    ids,
                    mask,
                    number,
                    compute_aux_loss=self.aux_loss_enabled,
                )
            return logps

        # TRL reports how long it took, also before a tracker is open.
        with temporarily(self.args, report_to=[]), self.accelerator.autocast():
            limit = 0.01 if is_exact(self.model, self.args) else 0.5
            check_log_probabilities(self.model, score, self.temperature, limit)

    def _set_rollout(self, datasets: dict[str, Rows]):
        """Let TRL sample rollouts of several attempts, and check that these fit the context."""
        args = self.args
        self.reward_func_names = unique_names(self.reward_func_names)
        self._batch: Batch | None = None  # the one that is being made
        self._shown: Batch | None = None  # the one that the console has
        if (given := (args.generation_kwargs or {}).get("eos_token_id")) is not None:
            self.eos_token_ids = [given] if isinstance(given, int) else list(given)
        self._bridge = Bridge(self._tokenizer, self.chat_template_kwargs, self.eos_token_ids)
        self.rollout_func = self._roll_out  # TRL's hook for rollouts, which `_generate` calls
        # TRL looks at a row's last token and drops whole rows. Here truncation is per attempt, see `_roll_out`.
        self.mask_truncated_completions = False
        # Training and evaluation can have different columns, so each has its table of completions.
        self._tables = {"train": self._logs, "eval": empty_table(self._logs)}
        vocabulary = self.model.config.get_text_config().vocab_size
        check_special_tokens(self._tokenizer, vocabulary)
        if args.offline_first_attempts > 0:
            check_vocabulary(datasets["train_dataset"], vocabulary)
        limit = context_limit(self.model.config, args)
        self._context = ContextCheck(limit, self.max_completion_length, self._bridge)
        self._context.check_datasets(datasets, args, lambda prompts: self._tokenize_prompts(prompts)[0])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("correction_instruction", "first_attempts"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    # A micro-batch

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
        is_mean_of_micro_batch = self.loss_type == "bnpo" or self._entropy_bonus_enabled or self.aux_loss_enabled
        return not is_mean_of_micro_batch and self.top_entropy_quantile == 1.0

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
        kl = start_kl(policy, reference, inputs["attempt_ids"] > 0)
        total, tokens = self.accelerator.reduce(kl, reduction="sum").tolist()
        check_start(total / max(tokens, 1.0), is_exact(model, self.args))

    # A batch of rollouts

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step, counted from 0. After the last step it is the stage of that step."""
        last = max(self._planned_steps, self.state.max_steps) - 1  # a resumed run can be longer than planned
        return self.schedule(min(step, last), self._planned_steps)

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

    def _generate_and_score_completions(self, inputs):
        begin = time.perf_counter()
        batch = self._batch = self._new_batch(
            [row.get("correction_instruction") or self.args.correction_instruction for row in inputs]
        )
        first_row = self.accelerator.process_index * len(inputs)
        own = slice(first_row, first_row + len(inputs))  # the rows of this process in tensors of all processes
        if batch.mode == "train" and self.args.num_offline:
            batch.stored = stored_attempts(inputs, first_row, self.args, self.state.global_step, self._tokenizer)
        self._logs = self._tables[batch.mode]
        self._calculate_rewards = self._rewards_of_all_attempts
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            del self._calculate_rewards  # uncovers the method
        attempt_ids = _padded(batch.trained, output["completion_ids"].size(1)).to(self.accelerator.device)  # (B, T)
        output["attempt_ids"] = attempt_ids
        rewards = batch.reward_by_function(self.reward_weights)  # (B of all processes, K, F)
        advantages, weights = self._targets(output, rewards)
        output["advantages"] = spread_to_tokens(advantages[own], attempt_ids)
        output["kl_weights"] = spread_to_tokens(weights, attempt_ids)
        if "importance_sampling_ratio" in output and output["importance_sampling_ratio"].size(1) == 1:
            output["importance_sampling_ratio"] = self._importance_sampling_ratio(output)
        counted = self._counted(len(advantages))
        if batch.mode == "eval":
            output["counted"] = counted[own]
        self._log_rollouts(rewards, advantages, counted)
        self._metrics[batch.mode]["time/batch"].append(time.perf_counter() - begin)
        return output

    # Rollout

    def _generate(self, prompts: list):
        start = time.perf_counter()
        prompt_ids, completion_ids, tool_mask, completions, *rest = super()._generate(prompts)
        batch = self._batch
        self._metrics[batch.mode]["time/rollout"].append(time.perf_counter() - start)
        if is_conversational({"prompt": prompts[0]}):  # the completions table shows one message per turn
            completions = []
            for instruction, first, *others in zip(batch.instructions, *batch.completions, strict=True):
                user = {"role": "user", "content": instruction}
                completions.append(first + [message for attempt in others for message in (user, *attempt)])
        return prompt_ids, completion_ids, tool_mask, completions, *rest

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        open_trackio(self)
        batch = self._batch
        prompt_ids = self._prompt_ids(prompts)
        bridge = self._bridge.by_row(prompts, lambda attempt: batch.instructions)
        self._context.check_batch(prompt_ids, bridge, batch.num_attempts, batch.stored, self._largest)

        with trainer_decoding(self, batch.mode):
            generate = self._generate_all if self._generates_all else self._generate_each
            batch.rollouts = rollouts = generate(prompts, prompt_ids)
        self.model.train(batch.mode == "train")  # TRL's continuous batching leaves it in training mode
        batch.completions = [
            decode_attempts(self._tokenizer, prompts, rollouts, k + 1) for k in range(batch.num_attempts)
        ]
        batch.truncated = batch.find_truncated(self.eos_token_ids, self.max_completion_length)
        batch.trained = batch.trained_ids(self.args.mask_truncated_completions)
        return {
            "prompt_ids": rollouts.prompt_ids,
            "completion_ids": rollouts.completion_ids,
            "logprobs": rollouts.completion_logprobs,
            "env_mask": [[int(k > 0) for k in row] for row in batch.trained],
        }

    @property
    def _generates_all(self) -> bool:
        """Whether one `generate` of transformers makes all attempts."""
        return (
            self.args.reuse_cache
            and not (self.use_vllm or self.use_transformers_continuous_batching)
            # An override may sample in another way.
            and getattr(self._generate_single_turn, "__func__", None) is GRPOTrainer._generate_single_turn
            and can_generate_all(self.accelerator.unwrap_model(self.model), self.generation_config)
        )

    def _generate_all(self, prompts: list, prompt_ids: list[list[int]]) -> Rollouts:
        batch = self._batch
        attempts = AllAttempts(
            prompt_ids,
            self._bridge.by_row(prompts, lambda attempt: batch.instructions),
            self.eos_token_ids,
            batch.num_attempts,
            batch.stored,
            synced=self._is_sharded and self.accelerator.num_processes > 1,
        )
        with attempts.instead_of_generate(self.accelerator.unwrap_model(self.model)):
            self._generate_single_turn(attempts.contexts, None, {}, num_generations=1)
        return attempts.rollouts

    def _generate_each(self, prompts: list, prompt_ids: list[list[int]]) -> Rollouts:
        """One attempt after the other."""
        batch = self._batch

        def sample(contexts, num_generations):
            return self._generate_single_turn(contexts, None, {}, num_generations=num_generations)

        def generate(contexts, attempt):
            if attempt > 1:  # the rollouts of a problem share their prompt, but not their first attempt
                return sample(contexts, 1)
            if self.args.num_offline and batch.mode == "train":
                most = most_sampled(len(contexts), self.accelerator.num_processes, self.args)
                return sample_or_take(contexts, batch.stored, sample, most)
            return sample(contexts, batch.num_generations)

        def bridge(attempt, attempt_ids):
            return self._bridge(prompts, batch.instructions, attempt, attempt_ids)

        return roll_out(prompt_ids, generate, bridge, batch.num_attempts)

    def _prompt_ids(self, prompts: list) -> list[list[int]]:
        """Token ids of each prompt. The rollouts of a problem are consecutive, and their prompt is tokenized once."""
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
        prompt_ids, _, _ = self._tokenize_prompts([prompt for prompt, _ in groups])
        return [list(ids) for ids, (_, number) in zip(prompt_ids, groups, strict=True) for _ in range(number)]

    def _largest(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        return self.accelerator.gather(torch.tensor(number, device=self.accelerator.device)).max().item()

    @property
    def _rollouts(self) -> Rollouts | None:
        """The rollouts of the last batch. Published scripts read them by this name."""
        return None if self._batch is None else self._batch.rollouts

    # Log-probabilities

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """TRL's, for the tokens of attempts only, and without padding (`padding.py`)."""
        start = time.perf_counter()
        if isinstance(model, ScoredTokens):
            model, scored = model.model, model.scored
        else:  # while a batch is made
            scored = _padded(self._batch.trained, logits_to_keep).to(input_ids.device)
        unwrapped, stock = self.accelerator.unwrap_model(model), super()._get_per_token_logps_and_entropies

        def compute(ids, mask, scored):
            return stock(ScoredTokens(model, unwrapped, scored), ids, mask, scored.size(1), **kwargs)

        keeps_prompts = has_virtual_tokens(unwrapped)
        results = compute_by_length(compute, input_ids, attention_mask, scored, batch_size, keeps_prompts)
        if self.model.training and not torch.is_grad_enabled():
            self._metrics["train"]["time/reference"].append(time.perf_counter() - start)
        return results

    def _policy_logps(self, output: dict[str, Tensor]) -> Tensor:
        """
        Log-probabilities of the rollouts' tokens under the policy that sampled them, (B, T). They are computed here if TRL did
        not need them.
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
        return importance_ratios(
            (output["old_per_token_logps"] - output["sampling_per_token_logps"]).nan_to_num(0.0),
            output["attempt_ids"],
            self._batch.num_attempts,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
            is_masked=self.vllm_importance_sampling_mode == "sequence_mask",
        )

    # Rewards

    def _rewards_of_all_attempts(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """Stands in for `_calculate_rewards` when TRL calls it, and calls the method for each attempt, also an overridden one."""
        start = time.perf_counter()
        batch, reward_funcs = self._batch, self.reward_funcs
        try:
            for k in range(batch.num_attempts):
                batch.attempt = k + 1
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
        super()._log_completion_extra(f"{column}/attempt_{self._batch.attempt}", values)

    def _log_metric(self, name: str, value: float):
        super()._log_metric(f"{name}/attempt_{self._batch.attempt}", value)

    # Advantages and KL weights

    def _targets(self, output: dict[str, Tensor], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """[`~trl_score.objective.targets`] of the batch of all processes. Also adapts beta2 for the next batch."""
        batch, args = self._batch, self.args
        in_reward = args.kl_level == "sequence" and self.beta != 0.0
        adapts = args.adaptive_stage1_beta and batch.mode == "train" and batch.stage.held
        log_ratio = kl = stored = None
        if in_reward or adapts:
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
        if adapts:  # for later batches only: a batch must not be weighted by its own rewards
            self._adapt_stage1_beta(advantages, kl)
        return advantages, weights

    def _adapt_stage1_beta(self, advantages: Tensor, kl: Tensor):
        stage = self._batch.stage
        self._metrics["train"]["stage1_beta"].append(self._stage1_beta)
        self._stage1_beta = balanced_stage1_beta(
            self._stage1_beta,
            kl=kl[:, [k - 1 for k in stage.held]].sum(1).mean().item(),
            advantage=advantages[:, stage.credited[-1] - 1].abs().mean().item(),
            start=self.args.stage1_beta,
        )

    # Loss

    def _compute_loss(self, model, inputs):
        """TRL's, in which the KL of each token has the weight of its attempt: `beta`, and in Stage I `stage1_beta` on top."""
        model = ScoredTokens(model, self.accelerator.unwrap_model(model), inputs["attempt_ids"] > 0)
        if self.beta == 0.0:
            return super()._compute_loss(model, inputs)
        weights = _TokenWeights(inputs["kl_weights"])
        with temporarily(self, beta=weights):
            loss = super()._compute_loss(model, inputs)
        self._log_kl(weights.values.detach(), inputs)
        return loss

    # Logs

    def _log_rollouts(self, rewards: Tensor, advantages: Tensor, counted: Tensor):
        """Log a batch: rewards (B, K, F), advantages (B, K) and which rollouts are counted (B,), all of all processes."""
        batch, metrics = self._batch, self._metrics[self._batch.mode]
        values = rollout_values(batch, rewards, counted, self.accelerator.gather)
        metrics["stage"].append(batch.stage.number)
        for name, each in values.items():
            metrics[name].extend(each.tolist())
        attempts = range(1, batch.num_attempts + 1)
        if batch.mode == "eval":  # TRL's means include the rows that are not counted
            last = batch.rewards[-1][counted]
            stock = {f"rewards/{name}/mean": last[:, i] for i, name in enumerate(self.reward_func_names)}
            stock["reward"] = values[f"reward_t{batch.num_attempts}"]
            stock["completions/mean_length"] = sum(values[f"completions/mean_length_t{k}"] for k in attempts)
            for name, each in stock.items():
                metrics[name][-1:] = each.tolist()
        else:
            count = torch.tensor(batch.num_generated_tokens, device=rewards.device)
            self._num_generated_tokens += self.accelerator.gather(count).sum().item()
        metrics["num_generated_tokens"] = [self._num_generated_tokens]

        fill_table(self._logs, rewards, advantages)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._logs, metrics = self._tables[mode], self._metrics[mode]
        found = means(metrics)
        metrics.clear()
        metrics.update({name: [math.nan if value is None else value] for name, value in found.items()})
        no_table = temporarily(self, num_completions_to_print=-1)  # TRL's is wider than a console
        with no_table, nullcontext() if mode == "train" else self._file_of_evaluation():
            super().log(logs, start_time)
        if self.log_completions and self.accelerator.is_main_process:
            self._print_rollouts()

    def _print_rollouts(self):
        """The last rollouts of this process, once, if they are what is logged."""
        batch, before, self._shown = self._batch, self._shown, self._batch
        if batch is not before and batch.mode == ("train" if self.model.training else "eval"):
            number, prompts = len(batch.instructions), self._logs["prompt"]
            missing = number * self.accelerator.num_processes - len(prompts)  # TRL keeps the last ones only
            prompts = [*[None] * missing, *list(prompts)[max(0, -missing) :]][:number]
            print(transcript(batch, prompts, self.state.global_step, self.num_completions_to_print))

    def _log_kl(self, kl: Tensor, inputs: dict[str, Tensor]):
        """Log the KL of each attempt's tokens, whose mean is over all micro-batches (`means`)."""
        mode, attempt_ids = "train" if self.model.training else "eval", inputs["attempt_ids"]
        if "counted" in inputs:
            attempt_ids = attempt_ids * inputs["counted"].unsqueeze(1)
        number = self.args.num_attempts if mode == "train" else self.args.num_attempts_eval
        sums = self.accelerator.reduce(kl_sums(kl, attempt_ids, number), reduction="sum")  # (2, K)
        for k, (total, tokens) in enumerate(sums.T.tolist(), start=1):
            self._metrics[mode][f"kl_t{k}"].append(total)
            self._metrics[mode][f"kl_t{k}{TOKENS}"].append(tokens)

    # Attempts outside of training

    def generate_attempts(self, prompts: list, instructions: list[str] | None = None) -> list[list[str]]:
        """
        Sample all attempts at some problems, in one batch, decoded as in evaluation (`eval_temperature`).

        Args:
            prompts (`list`):
                Prompts, chat messages or text.
            instructions (`list[str]`, *optional*):
                Correction instruction of each prompt. By default, it is `correction_instruction` of the configuration.

        Returns:
            `list[list[str]]`: the text of each attempt of each problem.

        Raises:
            `ValueError`: if `prompts` is one prompt or none, or there is not one instruction for each.
        """
        prompts = [] if isinstance(prompts, str) else list(prompts)
        if not prompts or isinstance(prompts[0], dict):
            raise ValueError("`prompts` must be a list of prompts. Give one prompt as `[prompt]`.")
        if isinstance(instructions, str) or len(instructions or prompts) != len(prompts):
            raise ValueError(
                f"`instructions` must be a list with one instruction for each of the {len(prompts)} prompts."
            )
        training = self.model.training
        self.model.eval()
        try:
            self._batch = self._new_batch(instructions or [self.args.correction_instruction] * len(prompts))
            self._batch.num_generations = 1  # no two rows share a problem
            self._roll_out(prompts, self)
        finally:
            self.model.train(training)
        return [list(row) for row in zip(*(map(text_of, each) for each in self._batch.completions), strict=True)]

    # Saving

    def _save(self, output_dir: str | None = None, state_dict=None):
        setattr(self.model.config, TRAINED_FLAG, True)
        try:
            with own_card(self.args.output_dir, output_dir or self.args.output_dir):
                super()._save(output_dir, state_dict)
        finally:
            delattr(self.model.config, TRAINED_FLAG)
        if self.args.should_save:
            save_rollout_settings(
                output_dir or self.args.output_dir,
                chat_template_kwargs=self.chat_template_kwargs,
                correction_instruction=self.args.correction_instruction,
                **{TRAINED_FLAG: True},
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


def _padded(rows: list[list[int]], width: int) -> Tensor:
    """Rows of attempt numbers, with 0 on the right: (B, width)."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


class _TokenWeights:
    """
    Stands in for TRL's scalar `beta` while the loss is computed. TRL adds `beta * per_token_kl` to the loss of each token, and with
    this object the factor is the KL weight of the token's attempt. The KL estimator, its importance correction and the
    normalization are still TRL's.
    """

    def __init__(self, weights: Tensor):
        self.weights = weights  # (B, T)

    def __ne__(self, other) -> bool:  # TRL asks `beta != 0.0`
        return True

    def __mul__(self, per_token_kl: Tensor) -> Tensor:
        self.values = per_token_kl  # (B, T)
        return self.weights * per_token_kl
