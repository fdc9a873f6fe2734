"""The configuration of `SCoReTrainer`."""

import math
import warnings
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig

from .decoding import NEUTRAL_GENERATION_KWARGS, TECHNICAL_GENERATION_KWARGS


def lacks_bfloat16(args: TrainingArguments) -> bool:
    """Whether training is asked in bfloat16, which this machine cannot do."""
    is_half = not args.fp16 if args.bf16 is None else args.bf16  # TRL's default
    return bool(is_half) and not (args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available())


def check_bfloat16(args: TrainingArguments) -> None:
    """
    Check that the machine can train as asked. transformers also refuses bfloat16 without a GPU, but does not say what to set.

    Raises:
        `ValueError`: If it cannot.
    """
    if lacks_bfloat16(args):
        raise ValueError(
            "Training is in bfloat16 by default (`bf16=True`), and this machine has no GPU that supports it. Set `use_cpu=True` to "
            "train on the CPU in bfloat16, or `bf16=False` to train in float32."
        )


POSITIVE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("generation_batch_size", "per_device_eval_batch_size", "num_generations_eval"),
)


@dataclass
class SCoReConfig(GRPOConfig):
    r"""
    Configuration class for the [`SCoReTrainer`]: a [`~trl.GRPOConfig`] with the options that SCoRe adds or changes. Section,
    equation and appendix numbers refer to [Training Language Models to Self-Correct via Reinforcement
    Learning](https://huggingface.co/papers/2409.12917). Defaults follow its MATH column (Appendix B).

    Parameters:
        > Parameters that control the attempts

        num_attempts (`int`, *optional*, defaults to `2`):
            Number of attempts in a rollout. `max_completion_length` holds for each of them. With 1 this is single-attempt RL,
            the paper's ablation (Section 6.3), which has no Stage I.
        correction_instruction (`str`, *optional*):
            The user's turn between two attempts (Appendix C). It must not say whether the attempt was right. `trl-score
            train` takes that of the task by default. Otherwise the default is the paper's instruction for MATH, so pass
            `task.correction_instruction` for another task. A dataset column of the same name overrides it row by row.
        offline_first_attempts (`float`, *optional*, defaults to `0.0`):
            Share of the rollouts of each problem whose first attempt is drawn from the dataset's column `first_attempts`
            instead of the policy (Section 5.3). The column has lists of texts or of token ids, sampled from the base model.
            These first attempts are graded but not trained. With 1 no first attempt is sampled, which is the paper's ablation
            (Section 6.3).
        reuse_cache (`bool`, *optional*, defaults to `True`):
            Whether to generate all attempts in one call of `generate`, in which no token is read twice and no row waits for an
            attempt of another row. With False there is a call for each attempt, which reads its whole context. The option applies
            to generation by transformers without continuous batching. `docs/rollout.md` lists the models and options that always
            have a call for each attempt.
        > Parameters that control the two stages

        stage1_steps (`float`, *optional*, defaults to `0.5`):
            Number of optimizer steps of Stage I, or their share of `max_steps` if below 1. With 0 there is only Stage II, and
            with `max_steps` or more only Stage I. The float 1.0 (also a 1 on the command line) is refused, because it can mean
            one step or the whole run; the integer 1 is one step. With more than two attempts, Stage I trains the attempts 2, 3, ..
            in turn (Appendix A.1).
        alpha (`float`, *optional*, defaults to `10.0`):
            Weight of the bonus that Stage II adds for improving on the previous attempt (Section 5.2). With 0 there is no
            bonus.
        gamma (`float`, *optional*, defaults to `0.0`):
            Discount between attempts, from 0 to 1. Above 0, an attempt is also credited with the credits of later attempts. In
            the paper, training then collapses to not correcting (Appendix A.4).
        beta (`float`, *optional*, defaults to `0.01`):
            Weight of the KL penalty to the reference model on every attempt in both stages, $\beta_1$ (Eq. 2).
        stage1_beta (`float`, *optional*, defaults to `0.1`):
            Weight of the KL penalty that Stage I adds on the attempts before the one that it trains, $\beta_2$ (Eq. 3). The
            paper uses 0.25 for MBPP.
        adaptive_stage1_beta (`bool`, *optional*, defaults to `False`):
            Whether to adapt $\beta_2$ after each batch of Stage I, starting from `stage1_beta` (Section 5.3). The adaptation makes
            $\beta_2$ times the KL of the held attempts about as large as the mean absolute advantage of the trained attempt. The
            formula is ours: [`~trl_score.objective.balanced_stage1_beta`].
        kl_level (`str`, *optional*, defaults to `"token"`):
            Where the KL penalties are applied. With `"token"` the loss of each token has the KL of the next-token distributions.
            With `"sequence"` the reward of each attempt is reduced by its log-ratio to the reference, before the baseline. This is
            exactly Eq. 2, as in RLOO. Each token is then also penalized for the tokens that follow it, and the variance is higher.
        reference_model_name_or_path (`str`, *optional*):
            Reference model in full fine-tuning. By default, it is the given model itself. Set it if training starts from a model
            that SCoRe has trained. It must have the same architecture. It does not work with ZeRO-3 and FSDP.

        > Parameters that control evaluation and grading

        eval_temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature in evaluation. 0 is greedy decoding, as in the paper.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Number of rollouts per problem in evaluation.
        num_attempts_eval (`int`, *optional*):
            Number of attempts in a rollout in evaluation. By default it is `num_attempts`, and at least 2.

        > Parameters whose default differs from GRPO's

        learning_rate (`float`, *optional*, defaults to `5e-6`):
            Initial learning rate for AdamW. The paper uses 5e-6 for MATH and 1e-5 for MBPP.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule. The paper keeps the learning rate fixed.
        loss_type (`str`, *optional*, defaults to `"dr_grpo"`):
            Normalization of the loss. `"dr_grpo"` divides by a constant, so that the expected gradient is exactly proportional to
            the gradient of the paper's objective. `"grpo"`, `"bnpo"`, `"dapo"` and `"cispo"` are also supported. `"cispo"` needs an
            `epsilon_high` of 1 or above.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            Scaling of the advantages. The leave-one-out advantages are not scaled, and only `"none"` is supported.
    """

    learning_rate: float = field(
        default=5e-6,
        metadata={"help": "Initial learning rate for AdamW. The paper uses 5e-6 for MATH and 1e-5 for MBPP."},
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning rate schedule. The paper keeps the learning rate fixed."}
    )
    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Normalization of the loss. 'dr_grpo' divides by a constant, so the expected gradient is proportional to the "
            "gradient of the paper's objective. 'grpo', 'bnpo', 'dapo' and 'cispo' are also supported."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Scaling of the advantages. The leave-one-out advantages are not scaled, and only 'none' is supported."
        },
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
            "help": "Number of attempts in a rollout. `max_completion_length` holds for each of them. With 1 this is "
            "single-attempt RL, which has no Stage I."
        },
    )
    num_attempts_eval: int | None = field(
        default=None,
        metadata={
            "help": "Number of attempts in a rollout in evaluation. By default it is `num_attempts`, and at least 2."
        },
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
            "help": "The user's turn between two attempts (Appendix C). `trl-score train` takes that of the task by default. "
            "Otherwise it is the paper's instruction for MATH. A dataset column of the same name overrides it row by row."
        },
    )
    reuse_cache: bool = field(
        default=True,
        metadata={
            "help": "Whether to generate all attempts in one call of `generate`, in which no token is read twice and no row waits for "
            "an attempt of another row. With False there is a call for each attempt, which reads its whole context."
        },
    )
    stage1_steps: float = field(
        default=0.5,
        metadata={
            "help": "Number of optimizer steps of Stage I, or their share of `max_steps` if below 1. With 0 there is only "
            "Stage II, and with `max_steps` or more only Stage I."
        },
    )
    alpha: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the bonus that Stage II adds for improving on the previous attempt (Section 5.2). With 0 "
            "there is no bonus."
        },
    )
    gamma: float = field(
        default=0.0,
        metadata={
            "help": "Discount between attempts, from 0 to 1. Above 0, an attempt is also credited with the credits of later "
            "attempts (Appendix A.4)."
        },
    )
    stage1_beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the KL penalty that Stage I adds on the attempts before the one that it trains (beta2, Eq. 3)."
        },
    )
    adaptive_stage1_beta: bool = field(
        default=False,
        metadata={
            "help": "Whether to adapt beta2 after each batch of Stage I, starting from `stage1_beta`. This balances the KL of the held "
            "attempts with the policy objective of the trained attempt (Section 5.3)."
        },
    )
    kl_level: str = field(
        default="token",
        metadata={
            "help": "Where the KL penalties are applied: in the loss of each token ('token'), or in the reward of each attempt before "
            "the baseline, as in RLOO ('sequence')."
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model in full fine-tuning. By default, it is the given model itself. It must have the same "
            "architecture. It does not work with ZeRO-3 and FSDP."
        },
    )
    eval_temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature in evaluation. 0 is greedy decoding."}
    )

    def __post_init__(self):
        if self.num_attempts_eval is None:
            self.num_attempts_eval = max(self.num_attempts, 2)
        self._check_attempts()
        self._check_stages()
        self._check_first_attempts()
        self._check_unsupported()
        check_bfloat16(self)
        # TRL sets options whose names transformers has replaced. Under the new names they mean the same, without a warning.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", ...) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
                setattr(self, f"gradient_{name}", None)
        super().__post_init__()
        if self.num_generations_eval is None:
            self.num_generations_eval = 1
        self._check_evaluation()
        self._check_generation_kwargs()
        self._warn_of_mismatch()

    @property
    def num_offline(self) -> int:
        """Rollouts of each problem that have a stored first attempt."""
        return round(self.offline_first_attempts * self.num_generations)

    def _check_attempts(self):
        if self.num_attempts < 1:
            raise ValueError(
                f"A rollout has at least one attempt, got `num_attempts={self.num_attempts}`. Set it to 2 or more, or to 1 for "
                "single-attempt RL."
            )
        if self.num_attempts == 1 and self.stage1_steps > 0:
            raise ValueError(
                "Stage I trains the second attempt, but `num_attempts=1` has none. Set `stage1_steps=0` for single-attempt RL."
            )
        if self.num_attempts_eval < 2:
            raise ValueError(
                f"`num_attempts_eval={self.num_attempts_eval}` would measure no correction. Set it to 2 or more."
            )
        if self.num_generations < 2:
            raise ValueError(
                f"The leave-one-out baseline needs two rollouts per problem, got `num_generations={self.num_generations}`."
                " Set it to 2 or more."
            )
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(
                    f"`{name}={value}` would leave no rollouts to train or evaluate on. Set it to 1 or more."
                )
        if self.correction_instruction is not None and not self.correction_instruction.strip():
            raise ValueError(
                "`correction_instruction` is empty, so the second attempt would not be asked to correct the first. Set "
                "it to a sentence that does not say whether the attempt was right."
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` is the most tokens of one attempt. Set it to 1 or more."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"`temperature={self.temperature}` leaves nothing to sample, and without different attempts at a problem there is "
                "nothing to compare. Set it to a number above 0; the paper uses 1.0. Evaluation has `eval_temperature`."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p={self.top_p}` is no share of the probability. Set it above 0 and at most to 1.")
        if not 0 <= self.eval_temperature < math.inf:
            raise ValueError(
                f"`eval_temperature={self.eval_temperature}` is no temperature. Set it to 0 for greedy decoding, or to a number above."
            )

    def _check_stages(self):
        numbers = {name: [getattr(self, name)] for name in ("alpha", "beta", "stage1_beta")}
        for name, values in (numbers | {"reward_weights": self.reward_weights or []}).items():
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is not finite, so rewards, advantages or losses would not be either. Set it to a number."
                )
        if not 0 <= self.stage1_steps < math.inf or (self.stage1_steps > 1 and self.stage1_steps % 1 != 0):
            raise ValueError(
                f"`stage1_steps={self.stage1_steps}` is neither a number of steps nor a share of them. Set a share below "
                "1, a whole number of steps, or 0 for Stage II only."
            )
        if isinstance(self.stage1_steps, float) and self.stage1_steps == 1:
            raise ValueError(
                "`stage1_steps=1.0` can mean one step or the whole run. For Stage I only set it to `max_steps` or more. For a "
                "single step, set the integer 1 in Python or YAML. The command line reads every number as a float, so set there "
                "a share of `max_steps` that rounds to one step."
            )
        if self.alpha < 0:
            raise ValueError(
                f"`alpha={self.alpha}` would reward turning right attempts into wrong ones. Set it to 0 (no bonus) or "
                "above; the paper uses 10."
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma={self.gamma}` is not a discount. Set it from 0 to 1; the paper uses 0.")
        for name in ("beta", "stage1_beta"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is negative, so it would reward leaving the reference model. Set it to 0 or "
                    "above."
                )
        if self.beta == 0 and self.stage1_beta > 0 and self.stage1_steps > 0:
            raise ValueError(
                "Stage I penalizes the first attempt's KL to a reference model (Eq. 3), but `beta=0.0` makes TRL load "
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

    def _check_first_attempts(self):
        share = f"`offline_first_attempts={self.offline_first_attempts}`"
        if not 0 <= self.offline_first_attempts <= 1:
            raise ValueError(f"{share} is a share of the rollouts. Set it from 0 to 1.")
        if self.offline_first_attempts > 0 and self.num_attempts == 1:
            raise ValueError(
                "With `num_attempts=1` a stored first attempt would leave nothing to train. Set `offline_first_attempts=0`."
            )
        if self.offline_first_attempts > 0 and self.num_offline == 0:
            raise ValueError(
                f"{share} rounds to zero of the `num_generations={self.num_generations}` rollouts. Increase one of the two."
            )
        if self.num_generations - self.num_offline == 1:
            raise ValueError(
                f"{share} of `num_generations={self.num_generations}` rollouts leaves a single first attempt of each problem to be "
                "sampled, which has no baseline. Set `offline_first_attempts` so that two or more are sampled, or to 1 for none."
            )

    def _check_evaluation(self):
        """TRL checks the batch only if `eval_strategy` is set."""
        if (self.metric_for_best_model or "").split("_")[-1] == "loss":  # transformers' default
            raise ValueError(
                f"`metric_for_best_model={self.metric_for_best_model!r}` would choose the checkpoint that has learned least: the loss of "
                "an evaluation is its KL to the reference. Set it to 'accuracy_t2' or another metric of docs/metrics.md."
            )
        rows = self.per_device_eval_batch_size * self.world_size
        if rows % self.num_generations_eval:
            raise ValueError(
                f"`num_generations_eval={self.num_generations_eval}` does not divide the {rows} rollouts of a batch in evaluation "
                f"(`per_device_eval_batch_size={self.per_device_eval_batch_size}` x {self.world_size} processes), so rollouts of a "
                "problem would be in different batches. Set `per_device_eval_batch_size` to a multiple of it."
            )

    def _check_generation_kwargs(self):
        length = "attempts would have another length than `max_completion_length`, which the checks and the loss read. Set that."
        number = "each row would have several attempts. Set `num_generations`."
        broken = dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), (self.max_completion_length, length))
        broken |= {"num_return_sequences": (1, number), "n": (1, number)}
        broken["return_dict_in_generate"] = (False, "TRL reads the tokens alone. Leave it out.")
        if not self.use_vllm:
            remedy = "Use `eos_token_id`, or vLLM and its option `stop`."
            broken["stop_strings"] = (None, f"they need a tokenizer, which TRL does not give to `generate`. {remedy}")
        for name, (neutral, reason) in broken.items():
            value = (self.generation_kwargs or {}).get(name)
            if value not in (None, neutral):
                raise ValueError(f"`{name}={value!r}` in `generation_kwargs` is not supported by SCoRe: {reason}")

    def _check_unsupported(self):
        unsupported = {
            "importance_sampling_level": (
                self.importance_sampling_level != "token",
                "one ratio for all attempts would give each attempt the other's. Set it to 'token'.",
            ),
            "loss_type": (
                self.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
                "its weights are made for one advantage per rollout. Set it to 'dr_grpo', 'grpo', 'bnpo', 'dapo' or 'cispo'.",
            ),
            "epsilon_high": (
                self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1),
                "with `loss_type='cispo'` it bounds the importance ratio itself, which is 1 on the policy, so every token's gradient "
                "would be scaled down beside its KL. Set it to 1 or above; TRL recommends 5.0.",
            ),
            "neftune_noise_alpha": (
                self.neftune_noise_alpha is not None,
                "each forward pass adds other noise to the embeddings, so log-probabilities would not be those of the sampled policy "
                "or the reference. Set it to None.",
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
