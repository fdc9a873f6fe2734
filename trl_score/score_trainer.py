"""`SCoReTrainer`: rollout, reward and objective in TRL's `GRPOTrainer`. The only file that knows TRL's internals."""

import json
import os
import random
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import create_model_from_path, get_config_model_id, pad

from .cache import can_reuse_cache, reused_cache
from .callbacks import CollapseAlarm, KeepBestCheckpoint, best_checkpoint
from .checks import TRAINED_FLAG, check_datasets, check_model
from .grading import graded
from .metrics import attempt_changes, self_correction_values
from .model_card import write_model_card
from .objective import (
    balanced_stage1_beta,
    kl_weights,
    mixed_reference,
    resolve_stage1_steps,
    shaped_rewards,
    shared_first_credit,
    spread_to_tokens,
    stage_at,
    sum_per_attempt,
    tree_advantages,
    whitened_advantages,
)
from .quantization import keep_differentiable
from .rollout import Bridge, Rollouts, decode_attempts, roll_out
from .score_config import SCoReConfig
from .snapshot import Snapshot


logger = get_logger(__name__)

STATE_FILE, PREVIOUS_FILE = "score_state.json", "stage1_reference.pt"  # in a checkpoint
ROWS_CHECKED = 10_000  # prompts tokenized at construction to check the context length


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
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SCoReConfig(f"{name.split('/')[-1]}-SCoRe")
        elif not isinstance(args, SCoReConfig):
            raise TypeError(f"`args` must be a `SCoReConfig`, got `{type(args).__name__}`.")
        for name, value in {
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
        }.items():
            if value is not None:
                raise ValueError(f"`{name}` is not supported by SCoRe, whose rollout is the attempts. Leave it out.")
        if args.stage2_learning_rate is not None and optimizers[1] is not None:
            raise ValueError(
                "`stage2_learning_rate` scales the schedule of `lr_scheduler_type`, but `optimizers` has a scheduler of its own. "
                "Leave one of the two out."
            )
        check_datasets(train_dataset, eval_dataset, args)
        check_model(model, args)

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
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("Images are not supported by SCoRe. Pass a tokenizer as `processing_class`.")
        self._check_shards()
        keep_differentiable(self.model)
        self._set_reference()

        self._bridge = Bridge(self._tokenizer, self.chat_template_kwargs)
        # TRL looks at a row's last token and drops whole rows; truncation is per attempt here, see `_roll_out`.
        self.mask_truncated_completions = False
        # TRL's own hook for rollouts: `_generate` does the bookkeeping on what it returns.
        self.rollout_func = self._roll_out
        self._instructions: list[str] = []
        self._stored: list[list[int] | None] = []  # per row, a first attempt that is not sampled
        self._rollouts: Rollouts | None = None
        self._attempt_ids: list[list[int]] = []  # per row, 0 also at attempts that are not trained
        self._completions: list[list] = []  # per attempt, what the reward functions see
        self._attempt_rewards: list[Tensor] = []  # per attempt, of all processes: (B, number of reward functions)
        self._attempt: int | None = None
        self._stage1_beta = args.stage1_beta  # of the next batch
        self._num_generated_tokens = 0  # of all processes, in training
        self._previous: Snapshot | None = None  # what Stage I(b) and later ones hold to
        self._reuses_cache = (
            args.reuse_cache
            and not (args.use_vllm or args.use_transformers_continuous_batching)
            # There a process whose attempts have ended goes on as long as another one has not.
            and not (self._dist.is_zero3 or self._dist.is_fsdp)
            and can_reuse_cache(self.model)
        )
        self._check_context()
        # First, so that trackers and progress bars see what the alarm adds to a log.
        if args.collapse_window and args.num_attempts > 1:
            self.callback_handler.callbacks.insert(0, CollapseAlarm(args.collapse_window, args.num_attempts))
        if args.keep_best_checkpoint:
            self.add_callback(KeepBestCheckpoint(args.best_checkpoint_window, args.num_attempts))

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.args.load_best_checkpoint_at_end:
            self.accelerator.wait_for_everyone()
            if (folder := best_checkpoint(self.args.output_dir)) is not None:
                self.state.best_model_checkpoint = str(folder)
                self._load_best_model()
        return output

    # Reference model

    def _set_reference(self):
        if is_peft_model(self.model):
            if self.args.reference_model_name_or_path is not None:
                raise ValueError(
                    "`reference_model_name_or_path` is for full fine-tuning: with an adapter the reference is the model "
                    "under it. Leave it out."
                )
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(
                    "The given adapter is frozen, so nothing would be trained. Load it with `is_trainable=True`."
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
            reference = create_model_from_path(path, dtype=self.model.dtype, device_map=None)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(reference.state_dict())

    # Attempts and stages

    @property
    def num_attempts(self) -> int:
        """Attempts in a rollout, in training or in evaluation."""
        return self.args.num_attempts if self.model.training else self.args.num_attempts_eval

    @property
    def second_attempts_per_first(self) -> int:
        """Rollouts that share a first attempt: consecutive ones, all on one process. 1 in evaluation."""
        if not self.model.training or self._stage_and_target()[0] < self.args.second_attempts_from_stage:
            return 1
        return self.args.second_attempts_per_first

    def _stage_and_target(self) -> tuple[int, int]:
        max_steps = self.state.max_steps if self.state.max_steps > 0 else max(self.args.max_steps, 1)
        return self._stage_at(self.state.global_step, max_steps)

    def _stage_at(self, step: int, max_steps: int) -> tuple[int, int]:
        stage1_steps = resolve_stage1_steps(self.args.stage1_steps, max_steps)
        return stage_at(
            step, stage1_steps, self.args.num_attempts, cycles=self.args.stage1_cycles, max_steps=max_steps
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if created and self.args.stage2_learning_rate is not None:
            ratio = self.args.stage2_learning_rate / self.args.learning_rate

            def scaled(schedule):
                return lambda step: schedule(step) * (ratio if self._stage_at(step, num_training_steps)[0] == 2 else 1)

            scheduler.lr_lambdas = [scaled(schedule) for schedule in scheduler.lr_lambdas]
        return scheduler

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
        self._stored = [None] * len(prompts)
        self._instructions = instructions or [self.args.correction_instruction] * len(prompts)
        training = self.model.training
        self.model.eval()
        try:
            self._roll_out(prompts, self)
        finally:
            self.model.train(training)
        texts = [
            [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
            for completions in self._completions
        ]
        return [list(row) for row in zip(*texts, strict=True)]

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        mode = "train" if self.model.training else "eval"
        prompt_ids = self._prompt_ids(prompts)
        # The rollouts of a problem share their prompt, but not their first attempt, unless they are asked to.
        partly = mode == "train" and (self.args.num_offline > 0 or self.second_attempts_per_first > 1)
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        self._check_length(max(map(len, prompt_ids)))

        def generate(contexts, attempt):
            if attempt == 1 and partly:
                return self._sample_or_take(contexts)
            return self._generate_single_turn(contexts, None, {}, num_generations=group_size if attempt == 1 else 1)

        def bridge(attempt, attempt_ids):
            return self._bridge(prompts, self._instructions, attempt, attempt_ids)

        with (
            self._eval_decoding() if mode == "eval" else nullcontext(),
            reused_cache(self.model) if self._reuses_cache else nullcontext(),
        ):
            rollouts = roll_out(prompt_ids, generate, bridge, self.num_attempts)
        self.model.train(mode == "train")  # TRL's continuous batching leaves it in training mode
        self._rollouts = rollouts
        attempts = range(1, self.num_attempts + 1)
        self._completions = [decode_attempts(self._tokenizer, prompts, rollouts, k) for k in attempts]

        trained = rollouts.attempt_ids
        untrained = [[ids is not None] + [False] * (self.num_attempts - 1) for ids in self._stored]
        if self.args.mask_truncated_completions:
            untrained = [
                [one or other for one, other in zip(*rows, strict=True)]
                for rows in zip(untrained, self._truncated(rollouts), strict=True)
            ]
        trained = [
            [0 if k == 0 or masked[k - 1] else k for k in row] for row, masked in zip(trained, untrained, strict=True)
        ]
        self._attempt_ids = trained
        return {
            "prompt_ids": rollouts.prompt_ids,
            "completion_ids": rollouts.completion_ids,
            "logprobs": rollouts.completion_logprobs,
            "env_mask": [[int(k > 0) for k in row] for row in trained],
        }

    def _prompt_ids(self, prompts: list) -> list[list[int]]:
        """Token ids of each prompt; those of a problem's rollouts, which are consecutive, are made once."""
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
        prompt_ids, _, _ = self._tokenize_prompts([prompt for prompt, _ in groups])
        return [list(ids) for ids, (_, number) in zip(prompt_ids, groups, strict=True) for _ in range(number)]

    def _is_offline(self, index: int) -> bool:
        """Whether the rollout at a position of the whole batch, over all processes, has a stored first attempt."""
        return index % self.num_generations >= self.num_generations - self.args.num_offline

    def _stored_attempts(self, inputs: list[dict]) -> list[list[int] | None]:
        """
        For each row its stored first attempt, or `None` where the policy samples it. The rollouts of a problem get different
        ones while there are enough; the same draw on all processes, and after a resume.
        """
        if not self.model.training or self.args.num_offline == 0:
            return [None] * len(inputs)
        start, stored = self.accelerator.process_index * len(inputs), []
        for index, row in enumerate(inputs, start=start):
            ids = None
            if self._is_offline(index):
                order = list(range(len(row["first_attempts"])))
                random.Random(f"{self.args.seed} {self.state.global_step} {row['prompt']}").shuffle(order)
                rank = index % self.num_generations - (self.num_generations - self.args.num_offline)
                rank //= self.second_attempts_per_first
                ids = self._attempt_tokens(row["first_attempts"][order[rank % len(order)]])
            stored.append(ids)
        return stored

    def _attempt_tokens(self, attempt: str | list[int]) -> list[int]:
        is_text = isinstance(attempt, str)
        return self._tokenizer(text=attempt, add_special_tokens=False)["input_ids"] if is_text else list(attempt)

    def _sample_or_take(self, contexts: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        """First attempts: the stored ones, and for the other rows sampled ones, each for all rows that share it."""
        attempts = list(self._stored)
        logprobs = [[0.0] * len(ids or []) for ids in attempts]
        shared = self.second_attempts_per_first
        online = [i for i in range(0, len(contexts), shared) if attempts[i] is None]
        # Generation can be collective, so every process asks for as many as the one that needs most.
        size, processes = len(contexts), self.accelerator.num_processes
        most = max(sum(not self._is_offline(p * size + i) for i in range(0, size, shared)) for p in range(processes))
        if most:
            rows = online + [0] * (most - len(online))
            group_size = 1 if self.args.num_offline else self.num_generations // shared
            sampled, values = self._generate_single_turn(
                [contexts[i] for i in rows], None, {}, num_generations=group_size
            )
            for position, first in enumerate(online):
                for i in range(first, first + shared):
                    attempts[i] = sampled[position]
                    logprobs[i] = values[position] if values is not None else []
        return attempts, logprobs if self.use_vllm else None

    @contextmanager
    def _eval_decoding(self):
        """Decode with `eval_temperature` instead of sampling as in training."""
        temperature = self.args.eval_temperature
        if self.use_vllm:
            sampling = self.vllm_generation.temperature
            self.vllm_generation.temperature = temperature
            try:
                yield
            finally:
                self.vllm_generation.temperature = sampling
            return
        sampling = self.generation_config, self.generation_kwargs
        kwargs = dict(self.generation_kwargs)
        if temperature == 0:
            kwargs = {name: kwargs[name] for name in kwargs.keys() - {"temperature", "top_p", "top_k", "min_p"}}
            kwargs["do_sample"] = False
        else:
            kwargs["temperature"] = temperature
        self.generation_config, self.generation_kwargs = GenerationConfig(**kwargs, disable_compile=True), kwargs
        try:
            yield
        finally:
            self.generation_config, self.generation_kwargs = sampling

    def _truncated(self, rollouts: Rollouts) -> list[list[bool]]:
        """Per rollout and attempt: it was cut off before an end-of-sequence token."""
        return [[not ids or ids[-1] not in self.eos_token_ids for ids in row] for row in rollouts.attempts]

    def _generate(self, prompts: list):
        start = time.perf_counter()
        prompt_ids, completion_ids, tool_mask, completions, *rest = super()._generate(prompts)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["time/rollout"].append(time.perf_counter() - start)
        if is_conversational({"prompt": prompts[0]}):  # for the completions table: one message per turn
            completions = []
            for instruction, first, *others in zip(self._instructions, *self._completions, strict=True):
                user = {"role": "user", "content": instruction}
                completions.append(first + [message for attempt in others for message in (user, *attempt)])
        return prompt_ids, completion_ids, tool_mask, completions, *rest

    # Rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        start = time.perf_counter()
        reward_funcs = self.reward_funcs
        self._attempt_rewards = []
        try:
            for k in range(self.num_attempts):
                self._attempt = k + 1
                self.reward_funcs = [
                    func if isinstance(func, nn.Module) else graded(func, name, k + 1)
                    for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
                ]
                attempt_ids = [attempts[k] for attempts in self._rollouts.attempts]
                self._attempt_rewards.append(
                    super()._calculate_rewards(inputs, prompts, self._completions[k], attempt_ids)
                )
        finally:
            self.reward_funcs = reward_funcs
            self._attempt = None
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["time/reward"].append(time.perf_counter() - start)
        return self._attempt_rewards[-1]

    def _log_completion_extra(self, column: str, values: list):
        super()._log_completion_extra(f"{column}/attempt_{self._attempt}", values)

    def _log_metric(self, name: str, value: float):
        super()._log_metric(f"{name}/attempt_{self._attempt}", value)

    # Advantages and KL weights

    def _generate_and_score_completions(self, inputs):
        begin = time.perf_counter()
        mode = "train" if self.model.training else "eval"
        self._instructions = [row.get("correction_instruction") or self.args.correction_instruction for row in inputs]
        self._stored = self._stored_attempts(inputs)
        output = super()._generate_and_score_completions(inputs)

        per_func = torch.stack(self._attempt_rewards, dim=1)  # (B of all processes, K, number of reward functions)
        rewards = (per_func * self.reward_weights.to(per_func.device)).nansum(-1)
        rewards[per_func.isnan().all(-1)] = torch.nan
        stage, target = self._stage_and_target()
        kl_stage = 1 if self.args.stage_schedule == "joint" else stage
        weights = kl_weights(
            kl_stage,
            beta=self.beta,
            stage1_beta=self._stage1_beta,
            num_attempts=self.num_attempts,
            target=target,
        ).to(rewards.device)
        attempt_ids = pad(  # (B, T)
            [torch.tensor(ids) for ids in self._attempt_ids],
            padding_value=0,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(rewards.device)
        if self.args.stage1_reference == "previous":
            if mode == "train":
                self._update_previous(stage, target)
            if self._previous is not None:
                output["ref_per_token_logps"] = self._mixed_reference(output, weights, attempt_ids)
        adapt = self.args.adaptive_stage1_beta and mode == "train" and kl_stage == 1
        in_reward = self.args.kl_level == "sequence" and self.beta != 0.0
        if adapt or in_reward:
            log_ratio = self._policy_logps(output) - output["ref_per_token_logps"]  # (B, T)
        penalty = 0.0
        if in_reward:
            sequence_log_ratio = sum_per_attempt(log_ratio, attempt_ids, self.num_attempts)  # (B, K), if trained
            penalty = self.accelerator.gather(weights * sequence_log_ratio)
            weights = torch.zeros_like(weights)  # none in the loss
        credit = shaped_rewards(
            rewards, stage=stage, alpha=self.args.alpha, gamma=self.args.gamma, target=target, penalty=penalty
        )
        if mode == "train" and self.args.num_offline:
            # Not sampled from the policy, so neither trained nor in the baseline of those that are.
            credit[[self._is_offline(index) for index in range(len(credit))], 0] = torch.nan
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        credit = shared_first_credit(credit, self.second_attempts_per_first)
        advantages = tree_advantages(credit, group_size, self.second_attempts_per_first)  # (B of all processes, K)
        if self.args.whiten_advantages:
            advantages = whitened_advantages(advantages, credited=~credit.isnan())
        if adapt:
            self._adapt_stage1_beta(log_ratio, attempt_ids, advantages, target)

        # Frozen here: the stage of the rollouts is the stage they were made for, however long they are trained on.
        start = self.accelerator.process_index * len(inputs)
        output["attempt_ids"] = attempt_ids
        output["advantages"] = spread_to_tokens(advantages[start : start + len(inputs)], attempt_ids)
        output["kl_weights"] = spread_to_tokens(weights, attempt_ids)
        if "importance_sampling_ratio" in output and output["importance_sampling_ratio"].size(1) == 1:
            output["importance_sampling_ratio"] = self._importance_sampling_ratio(output)

        self._log_rollouts(mode, stage, rewards, correct=per_func[:, :, 0], advantages=advantages)
        self._metrics[mode]["time/batch"].append(time.perf_counter() - begin)
        return output

    def _adapt_stage1_beta(self, log_ratio: Tensor, attempt_ids: Tensor, advantages: Tensor, target: int):
        """Only for the batches to come, so that no batch is weighted by what it was sampled to be."""
        token_kl = (-log_ratio).exp() + log_ratio - 1  # as TRL estimates it; not negative
        held_kl = sum_per_attempt(token_kl, attempt_ids, self.num_attempts)[:, : target - 1].sum(1)  # (B,)
        self._metrics["train"]["stage1_beta"].append(self._stage1_beta)
        self._stage1_beta = balanced_stage1_beta(
            self._stage1_beta,
            kl=self.accelerator.gather(held_kl).mean().item(),
            advantage=advantages[:, target - 1].abs().mean().item(),
            start=self.args.stage1_beta,
        )

    def _update_previous(self, stage: int, target: int):
        if stage == 2 or target == 2:
            self._previous = None
        elif self._previous is None or self._previous.target != target:
            self._previous = Snapshot.of(self.model, target)

    def _mixed_reference(self, output: dict[str, Tensor], weights: Tensor, attempt_ids: Tensor) -> Tensor:
        with self._previous.in_place_of_the_weights(self.model):
            previous = self._logps(output)
        beta = torch.full_like(weights, self.beta)
        both = [spread_to_tokens(each, attempt_ids) for each in (beta, weights - beta)]
        return mixed_reference(output["ref_per_token_logps"], previous, *both)

    def _policy_logps(self, output: dict[str, Tensor]) -> Tensor:
        """
        Log-probabilities of the rollouts' tokens under the policy that sampled them, (B, T): TRL's, or computed here where it
        did without.
        """
        return output["old_per_token_logps"] if "old_per_token_logps" in output else self._logps(output)

    def _logps(self, output: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return logps

    def _importance_sampling_ratio(self, output: dict[str, Tensor]) -> Tensor:
        """TRL's sequence-level correction of vLLM's log-probabilities, per attempt instead of per row: (B, T)."""
        difference = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).nan_to_num(0.0)
        ratio = sum_per_attempt(difference, output["attempt_ids"], self.num_attempts).exp()  # (B, K)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        clamped = ratio.clamp(low, high)
        if self.vllm_importance_sampling_mode == "sequence_mask":
            ratio = torch.where(ratio == clamped, ratio, 0.0)
        else:
            ratio = clamped
        return spread_to_tokens(ratio, output["attempt_ids"])

    def _log_rollouts(self, mode: str, stage: int, rewards: Tensor, correct: Tensor, advantages: Tensor):
        metrics = self._metrics[mode]
        metrics["stage"].append(stage)
        # One value per rollout, not per batch, so that a smaller last batch does not count more.
        correct = torch.where(correct.isnan(), correct, (correct >= 1).float())
        for name, values in self_correction_values(correct).items():
            metrics[name].extend(values.tolist())
        for k in range(self.num_attempts):
            metrics[f"reward_t{k + 1}"].extend(rewards[:, k].tolist())
        rollouts = self._rollouts
        columns = [
            torch.tensor(self._truncated(rollouts)).float(),
            torch.tensor([[len(ids) for ids in row] for row in rollouts.attempts]).float(),
        ]
        names = [
            *(f"completions/clipped_ratio_t{k + 1}" for k in range(self.num_attempts)),
            *(f"completions/mean_length_t{k + 1}" for k in range(self.num_attempts)),
        ]
        if self.num_attempts > 1:
            columns.append(attempt_changes(rollouts.attempts))
            names += ["edit_distance_ratio", "changed_ratio"]
        if mode == "train":
            self._count_generated_tokens(rewards.device)
        metrics["num_generated_tokens"] = [self._num_generated_tokens]
        values = self.accelerator.gather(torch.cat(columns, dim=1).to(rewards.device))
        for name, column in zip(names, values.T, strict=True):
            metrics[name].extend(column.tolist())

        # The completions table: TRL wrote its own advantages of the last attempt.
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages[:, -1].tolist())
        for k in range(self.num_attempts):
            self._logs["extra"][f"reward/attempt_{k + 1}"].extend(rewards[:, k].tolist())
            self._logs["extra"][f"advantage/attempt_{k + 1}"].extend(advantages[:, k].tolist())

    def _count_generated_tokens(self, device: torch.device):
        """What the policy has sampled: no bridges, no stored first attempts, and shared ones once."""
        lengths = [[len(ids) for ids in row] for row in self._rollouts.attempts]
        for i, stored in enumerate(self._stored):
            if stored is not None or i % self.second_attempts_per_first:
                lengths[i][0] = 0
        count = torch.tensor(sum(map(sum, lengths)), device=device)
        self._num_generated_tokens += self.accelerator.gather(count).sum().item()

    # Loss

    def _compute_loss(self, model, inputs):
        if self.beta == 0.0:
            return super()._compute_loss(model, inputs)
        beta, weights = self.beta, _TokenWeights(inputs["kl_weights"])
        self.beta = weights
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        attempt_ids = inputs["attempt_ids"]
        kl = weights.values.detach()
        sums = [sum_per_attempt(x, attempt_ids, self.num_attempts).sum(0) for x in (kl, torch.ones_like(kl))]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum")
        mode = "train" if self.model.training else "eval"
        for k, value in enumerate((totals[0] / totals[1].clamp(min=1.0)).tolist(), start=1):
            self._metrics[mode][f"kl_t{k}"].append(value)
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        start = time.perf_counter()
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.model.training and not torch.is_grad_enabled():
            self._metrics["train"]["time/reference"].append(time.perf_counter() - start)
        return result

    # Saving and resuming

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        # Between two generations the updates still to come need the rollouts they belong to.
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            torch.save(self._buffered_inputs, self._rollouts_file(self._get_output_dir(trial), self.state.global_step))
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            state = {"stage1_beta": self._stage1_beta, "num_generated_tokens": self._num_generated_tokens}
            (folder / STATE_FILE).write_text(json.dumps(state))
        if self._previous is not None and self.args.should_save:
            torch.save(vars(self._previous), folder / PREVIOUS_FILE)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        path = self._rollouts_file(Path(checkpoint).parent, self.state.global_step)
        if path.exists():
            self._buffered_inputs = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        path = Path(checkpoint, STATE_FILE)
        if path.exists():
            state = json.loads(path.read_text())
            self._num_generated_tokens = state["num_generated_tokens"]
            if self.args.adaptive_stage1_beta:
                self._stage1_beta = state["stage1_beta"]
        path = Path(checkpoint, PREVIOUS_FILE)
        if self.args.stage1_reference == "previous" and path.exists():
            self._previous = Snapshot(**torch.load(path, map_location=self.accelerator.device, weights_only=True))

    def _load_best_model(self):
        super()._load_best_model()
        self._last_loaded_step = -1  # vLLM has other weights of the same step

    def _rollouts_file(self, folder: "str | os.PathLike", step: int) -> Path:
        return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / f"rollouts_{self.accelerator.process_index}.pt"

    def _save(self, output_dir: str | None = None, state_dict=None):
        setattr(self.model.config, TRAINED_FLAG, True)
        try:
            super()._save(output_dir, state_dict)
        finally:
            delattr(self.model.config, TRAINED_FLAG)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None):
        model_name = model_name or (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            write_model_card(Path(self.args.output_dir) / "README.md", self)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("correction_instruction", "first_attempts"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    # Checks

    def _check_shards(self):
        """What needs whole weights cannot be had where no process has them."""
        if self.args.stage1_reference == "previous" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "`stage1_reference='previous'` copies the weights, which DeepSpeed and FSDP shard. Set it to 'base'."
            )
        if self.args.reference_model_name_or_path is not None and (self._dist.is_zero3 or self._dist.is_fsdp):
            raise ValueError(
                "`reference_model_name_or_path` loads whole weights into the reference model, which ZeRO-3 and FSDP shard. "
                "Start from the base model itself and leave it out, or train with DDP or ZeRO-2."
            )

    def _check_context(self):
        """All attempts of the longest prompt fit the model's context."""
        rows = self.train_dataset
        rows = (
            rows.take(100) if isinstance(rows, IterableDataset) else rows.select(range(min(len(rows), ROWS_CHECKED)))
        )
        rows = list(rows)
        if is_conversational(rows[0]) and self._tokenizer.chat_template is None:
            raise ValueError(
                "The dataset's prompts are chat messages, but the tokenizer has no chat template. Use a tokenizer that has "
                "one, set `tokenizer.chat_template`, or give the prompts as text."
            )
        prompt_ids, _, _ = self._tokenize_prompts([row["prompt"] for row in rows])
        longest = max(range(len(rows)), key=lambda i: len(prompt_ids[i]))
        instruction = max(
            (row.get("correction_instruction") or self.args.correction_instruction for row in rows), key=len
        )
        prompt = rows[longest]["prompt"]
        # Of training, and of evaluation if there is one.
        self._most_attempts = max(self.args.num_attempts, self.args.num_attempts_eval if self.eval_dataset else 0)
        lengths = [
            len(self._bridge([prompt], [instruction], attempt, [[]])[0]) for attempt in range(1, self._most_attempts)
        ]
        self._bridge_tokens = sum(lengths)
        self._longest_stored = max(
            (len(self._attempt_tokens(ids)) for row in rows for ids in row["first_attempts"])
            if self.args.num_offline
            else (),
            default=0,
        )
        self._check_length(len(prompt_ids[longest]))

    def _check_length(self, prompt_length: int):
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.use_vllm and self.args.vllm_max_model_length is not None:
            limit = min(limit or self.args.vllm_max_model_length, self.args.vllm_max_model_length)
        longer = max(0, self._longest_stored - self.max_completion_length)
        needed = prompt_length + self._most_attempts * self.max_completion_length + longer + self._bridge_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"The model's context of {limit} tokens is too short: a prompt of {prompt_length} tokens, "
                f"{self._most_attempts} attempts of up to {self.max_completion_length} tokens (`max_completion_length` holds "
                f"for each) and {self._bridge_tokens} tokens of correction instructions need {needed}. Lower "
                "`max_completion_length` or drop the longest prompts."
            )


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
