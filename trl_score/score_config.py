"""The configuration of `SCoReTrainer`."""

import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig


# Of `generation_kwargs`: what does not change the distribution that attempts are sampled from ..
TECHNICAL_GENERATION_KWARGS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "stop", "stop_strings", "stop_token_ids", "tokenizer", "seed"),
    *("max_length", "max_new_tokens", "max_tokens", "max_time", "use_cache", "cache_implementation", "cache_config"),
    *("disable_compile", "compile_config", "prefill_chunk_size", "low_memory", "detokenize", "skip_special_tokens"),
    *("logprobs", "prompt_logprobs", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "return_legacy_cache", "synced_gpus"),
}
# .. and the values with which the rest does not change it either. All others are neutral as None.
NEUTRAL_GENERATION_KWARGS = {
    **{"do_sample": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0},
    **{"eta_cutoff": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1},
    **{"num_return_sequences": 1, "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0},
    **{"renormalize_logits": False, "remove_invalid_values": False, "guidance_scale": 1.0, "length_penalty": 1.0},
}


@dataclass
class SCoReConfig(GRPOConfig):
    r"""
    Configuration class for the [`SCoReTrainer`]: a [`~trl.GRPOConfig`] and what SCoRe adds or changes. Section, equation
    and appendix numbers are those of [Training Language Models to Self-Correct via Reinforcement
    Learning](https://huggingface.co/papers/2409.12917); defaults follow its MATH column (Appendix B).

    Parameters:
        > Parameters that control the attempts

        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout. `max_completion_length` holds for each of them. 1: single-attempt RL, the paper's ablation
            (Section 6.3), which has no Stage I.
        correction_instruction (`str`, *optional*):
            The user's turn between two attempts (Appendix C). It must not say whether the attempt was right. By default, the
            instruction of the task that is trained on, and the paper's instruction for MATH if there is no task. A dataset
            column of the same name overrides it row by row.
        offline_first_attempts (`float`, *optional*, defaults to `0.0`):
            Share of the rollouts of each problem whose first attempt is drawn from the dataset's column `first_attempts`
            (lists of texts or of token ids, sampled from the base model) instead of the policy (Section 5.3). Their first
            attempts are graded, and not trained. 1: no online first attempts, the paper's ablation (Section 6.3).
        reuse_cache (`bool`, *optional*, defaults to `True`):
            Generate all attempts in one call of `generate`, in which no token is read twice and no row waits for the attempt of
            another one. False: a call for each attempt, which reads its whole context. For generation by transformers, not by its
            continuous batching; `docs/rollout.md` lists the models and options that always get a call for each attempt.
        > Parameters that control the two stages

        stage1_steps (`float`, *optional*, defaults to `0.5`):
            Optimizer steps of Stage I, or their share of `max_steps` if below 1. 0: Stage II only; `max_steps` or more:
            Stage I only. 1.0 is refused, as it could mean one step or the whole run; the integer 1 is one step. With more than
            two attempts Stage I trains the attempts 2, 3, .. in turn (Appendix A.1).
        alpha (`float`, *optional*, defaults to `10.0`):
            Weight of the bonus for improving on the attempt before, in Stage II (Section 5.2). 0: no bonus.
        gamma (`float`, *optional*, defaults to `0.0`):
            Discount between attempts, from 0 to 1. Above 0 an attempt is also credited with the rewards of later ones;
            in the paper training then collapses to not correcting (Appendix A.4).
        beta (`float`, *optional*, defaults to `0.01`):
            Weight of the KL penalty to the reference model on every attempt in both stages, $\beta_1$ (Eq. 2).
        stage1_beta (`float`, *optional*, defaults to `0.1`):
            Weight of the KL penalty that Stage I adds on the attempts before the one it trains, $\beta_2$ (Eq. 3). The
            paper uses 0.25 for MBPP.
        adaptive_stage1_beta (`bool`, *optional*, defaults to `False`):
            Adapt $\beta_2$ after each batch of Stage I, from `stage1_beta` on, so that $\beta_2$ times the KL of the held
            attempts is about as large as the trained attempt's mean absolute advantage (Section 5.3; the formula is ours:
            [`~trl_score.objective.balanced_stage1_beta`]).
        kl_level (`str`, *optional*, defaults to `"token"`):
            Where the KL penalties stand. `"token"`: in the loss, for each token the KL of the next-token distributions.
            `"sequence"`: in the reward, before the baseline, for each attempt its log-ratio to the reference (Eq. 2 to the
            letter, as in RLOO), so each token is also penalized for the tokens that follow it. This has higher variance.
        reference_model_name_or_path (`str`, *optional*):
            Model to use as the reference in full fine-tuning when it is not the given model itself, for instance when
            training starts from a model that SCoRe has trained. It needs the same architecture. Not with ZeRO-3 and FSDP.

        > Parameters that control evaluation and grading

        eval_temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature in evaluation. 0: greedy decoding, as in the paper.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Rollouts per problem in evaluation.
        num_attempts_eval (`int`, *optional*):
            Attempts in a rollout in evaluation; by default as in training, and at least 2.

        > Parameters whose default differs from GRPO's

        learning_rate (`float`, *optional*, defaults to `5e-6`):
            The paper uses 1e-5 for MBPP.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            The paper keeps the learning rate fixed.
        loss_type (`str`, *optional*, defaults to `"dr_grpo"`):
            Normalization of the loss. This one divides by a constant, so that the expected gradient is exactly
            proportional to that of the paper's objective; `"grpo"`, `"bnpo"`, `"dapo"` and `"cispo"` also work.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            The leave-one-out advantages are not scaled; no other value is supported.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "The learning rate schedule. The paper keeps the learning rate fixed."}
    )
    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Normalization of the loss. 'dr_grpo' (default) divides by a constant, so the expected gradient is "
            "proportional to that of the paper's objective. Also supported: 'grpo', 'bnpo', 'dapo', 'cispo'."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "The leave-one-out advantages are not scaled. No value but 'none' is supported."},
    )
    beta: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the KL penalty to the reference model on every attempt in both stages (beta1, Eq. 2)."
        },
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Number of rollouts per problem in evaluation."}
    )
    num_attempts: int = field(
        default=2,
        metadata={
            "help": "Attempts in a rollout. `max_completion_length` holds for each of them. 1: single-attempt RL, without "
            "Stage I."
        },
    )
    num_attempts_eval: int | None = field(
        default=None,
        metadata={"help": "Attempts in a rollout in evaluation; by default as in training, and at least 2."},
    )
    offline_first_attempts: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rollouts of each problem whose first attempt is drawn from the dataset's column "
            "`first_attempts` instead of the policy, and is not trained (Section 5.3)."
        },
    )
    correction_instruction: str | None = field(
        default=None,
        metadata={
            "help": "The user's turn between two attempts (Appendix C). A dataset column of the same name overrides it "
            "row by row. By default, the instruction of the task, or the paper's instruction for MATH where there is no task."
        },
    )
    reuse_cache: bool = field(
        default=True,
        metadata={
            "help": "Generate all attempts in one call of `generate`, in which no token is read twice and no row waits for the "
            "attempt of another one. False: a call for each attempt, which reads its whole context."
        },
    )
    stage1_steps: float = field(
        default=0.5,
        metadata={
            "help": "Optimizer steps of Stage I, or their share of `max_steps` if below 1. 0: Stage II only; `max_steps` "
            "or more: Stage I only."
        },
    )
    alpha: float = field(
        default=10.0,
        metadata={"help": "Weight of the bonus for improving on the attempt before, in Stage II (Section 5.2)."},
    )
    gamma: float = field(
        default=0.0,
        metadata={
            "help": "Discount between attempts, from 0 to 1. Above 0 an attempt is also credited with the rewards of "
            "later ones (Appendix A.4)."
        },
    )
    stage1_beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the KL penalty that Stage I adds on the attempts before the one it trains (beta2, Eq. 3)."
        },
    )
    adaptive_stage1_beta: bool = field(
        default=False,
        metadata={
            "help": "Adapt beta2 after each batch of Stage I, from `stage1_beta` on, to balance the KL of the held attempts and "
            "the policy objective of the trained one (Section 5.3)."
        },
    )
    kl_level: str = field(
        default="token",
        metadata={
            "help": "Where the KL penalties stand: 'token' (default), in the loss, for each token; 'sequence', in the reward "
            "of each attempt, before the baseline, as in RLOO."
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to use as the reference in full fine-tuning when it is not the given model itself. It needs "
            "the same architecture. Not with ZeRO-3 and FSDP."
        },
    )
    eval_temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature in evaluation. 0: greedy decoding."}
    )

    def __post_init__(self):
        if self.num_attempts < 1:
            raise ValueError(
                f"A rollout has at least one attempt, got `num_attempts={self.num_attempts}`. Set it to 2 or more, or to 1 for "
                "single-attempt RL."
            )
        if self.num_attempts == 1 and self.stage1_steps > 0:
            raise ValueError(
                "Stage I trains the second attempt, but `num_attempts=1` has none. Set `stage1_steps=0` for single-attempt RL."
            )
        if self.num_attempts_eval is None:
            self.num_attempts_eval = max(self.num_attempts, 2)
        if self.num_attempts_eval < 2:
            raise ValueError(
                f"`num_attempts_eval={self.num_attempts_eval}` would measure no correction. Set it to 2 or more."
            )
        if self.num_generations < 2:
            raise ValueError(
                f"The leave-one-out baseline needs two rollouts per problem, got `num_generations={self.num_generations}`."
                " Set it to 2 or more."
            )
        if self.correction_instruction is not None and not self.correction_instruction.strip():
            raise ValueError(
                "`correction_instruction` is empty, so the second attempt would not be asked to correct the first. Set "
                "it to a sentence that does not say whether the attempt was right."
            )
        if self.stage1_steps < 0 or (self.stage1_steps > 1 and self.stage1_steps != int(self.stage1_steps)):
            raise ValueError(
                f"`stage1_steps={self.stage1_steps}` is neither a number of steps nor a share of them. Set a share below "
                "1, a whole number of steps, or 0 for Stage II only."
            )
        if isinstance(self.stage1_steps, float) and self.stage1_steps == 1:
            raise ValueError(
                "`stage1_steps=1.0` can mean one step or the whole run. For Stage I only set it to `max_steps` or more; for a single "
                "step set the integer 1 in Python or YAML, and on the command line a share of `max_steps` that rounds to one step."
            )
        if self.alpha < 0:
            raise ValueError(
                f"`alpha={self.alpha}` would reward turning right attempts into wrong ones. Set it to 0 (no bonus) or "
                "above; the paper uses 10."
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma={self.gamma}` is not a discount. Set it from 0 to 1; the paper uses 0.")
        for name in ("beta", "stage1_beta", "eval_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}={getattr(self, name)}` is negative. Set it to 0 or above.")
        if self.beta == 0 and self.stage1_beta > 0 and self.stage1_steps > 0:
            raise ValueError(
                "`stage=1` penalizes the first attempt's KL to a reference model (Eq. 3), but `beta=0.0` makes TRL load "
                "none. Set `beta` above 0; the paper uses 0.01. To train without any KL set `stage1_beta=0` too."
            )
        if self.adaptive_stage1_beta and (self.stage1_beta == 0 or self.stage1_steps == 0):
            raise ValueError(
                f"`adaptive_stage1_beta` has nothing to adapt with `stage1_beta={self.stage1_beta}` and "
                f"`stage1_steps={self.stage1_steps}`. Set both above 0; the paper starts from 0.1."
            )
        if self.kl_level not in ("token", "sequence"):
            raise ValueError(
                f"Unknown `kl_level={self.kl_level!r}`. Set it to 'token' (KL in the loss) or 'sequence' (KL in the reward)."
            )
        if not 0 <= self.offline_first_attempts <= 1:
            raise ValueError(
                f"`offline_first_attempts={self.offline_first_attempts}` is a share of the rollouts. Set it from 0 to 1."
            )
        if self.offline_first_attempts > 0 and self.num_attempts == 1:
            raise ValueError(
                "With `num_attempts=1` a stored first attempt would leave nothing to train. Set `offline_first_attempts=0`."
            )
        if self.offline_first_attempts > 0 and self.num_offline == 0:
            raise ValueError(
                f"`offline_first_attempts={self.offline_first_attempts}` of `num_generations={self.num_generations}` rollouts "
                "rounds to none of them. Increase one of the two."
            )
        if self.num_generations - self.num_offline == 1:
            raise ValueError(
                f"`offline_first_attempts={self.offline_first_attempts}` of `num_generations={self.num_generations}` rollouts leaves "
                "a single first attempt of each problem to be sampled, which has no baseline. Set `offline_first_attempts` so that "
                "two or more are sampled, or to 1 for none."
            )
        self._refuse_unsupported()
        # TRL sets options whose names transformers has replaced: under the new names they mean the same, without a warning.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", ...) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
                setattr(self, f"gradient_{name}", None)
        super().__post_init__()
        if self.num_generations_eval is None:
            self.num_generations_eval = 1
        self._warn_of_mismatch()

    @property
    def num_offline(self) -> int:
        """Rollouts of each problem that have a stored first attempt."""
        return round(self.offline_first_attempts * self.num_generations)

    def _refuse_unsupported(self):
        unsupported = {
            "importance_sampling_level": (
                self.importance_sampling_level != "token",
                "one ratio for all attempts would give each attempt the other's. Set it to 'token'.",
            ),
            "loss_type": (
                self.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
                "its weights are made for one advantage per rollout. Set it to 'dr_grpo', 'grpo', 'bnpo', 'dapo' or 'cispo'.",
            ),
            "multi_objective_aggregation": (
                self.multi_objective_aggregation != "sum_then_normalize",
                "the bonus compares the summed rewards of two attempts. Set it to 'sum_then_normalize'.",
            ),
            "scale_rewards": (
                self.scale_rewards not in ("none", False),
                "dividing each attempt's advantages by their deviation cancels the bonus weight. Set it to 'none'.",
            ),
            "off_policy_mask_threshold": (
                self.off_policy_mask_threshold is not None,
                "it drops whole rows by the mean of all their attempts. Set it to None.",
            ),
            "sync_ref_model": (
                self.sync_ref_model,
                "the reference of Eqs. 2-4 is the base model throughout. Set it to False.",
            ),
        }
        for name, (is_set, reason) in unsupported.items():
            if is_set:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not supported by SCoRe: {reason}")

    def _warn_of_mismatch(self):
        changed = {
            "top_p": self.top_p != 1.0,
            "top_k": bool(self.top_k),
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1.0,
        }
        names = [f"`{name}={getattr(self, name)}`" for name, is_changed in changed.items() if is_changed]
        given = {
            name: value
            for name, value in (self.generation_kwargs or {}).items()
            if name not in TECHNICAL_GENERATION_KWARGS and value != NEUTRAL_GENERATION_KWARGS.get(name)
        }
        if given.get("temperature") == self.temperature:
            del given["temperature"]
        if given:
            names.append(f"`generation_kwargs={given}`")
        if names:
            warnings.warn(
                f"{', '.join(names)}: attempts are sampled from another distribution than the one that is trained, so "
                "the policy gradient is biased. The paper samples at temperature 1.0 with nothing cut off.",
                stacklevel=3,
            )
