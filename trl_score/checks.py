"""What cannot work is refused before any model is loaded."""

from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from transformers import AutoConfig
from trl import is_conversational
from trl.trainer.utils import get_config_model_id

from .first_attempts import attempt_tokens
from .score_config import SCoReConfig


if TYPE_CHECKING:
    from .score_trainer import SCoReTrainer

ROWS_CHECKED = 10_000  # prompts tokenized at construction to check the context length
TRAINED_FLAG = "score_trained"  # in the config.json of a model that SCoRe trained: it is no base model any more


def check_datasets(train_dataset, eval_dataset, args: SCoReConfig):
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
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


def check_first_attempts(dataset):
    """Every problem has stored first attempts."""
    rows = dataset if isinstance(dataset, Dataset) else dataset.take(1)
    if "first_attempts" not in next(iter(rows)):
        raise ValueError(
            "`offline_first_attempts` takes first attempts from a column `first_attempts`, which `train_dataset` has not. "
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


def check_model(model, args: SCoReConfig):
    """A model that SCoRe has trained is not the base model, so it must not silently become the reference."""
    if args.beta == 0 or args.reference_model_name_or_path is not None:
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


def check_shards(trainer: "SCoReTrainer"):
    """What needs whole weights is refused where no process has them."""
    if trainer.args.reference_model_name_or_path is not None and (trainer._dist.is_zero3 or trainer._dist.is_fsdp):
        raise ValueError(
            "`reference_model_name_or_path` loads whole weights into the reference model, which ZeRO-3 and FSDP shard. "
            "Start from the base model itself and leave it out, or train with DDP or ZeRO-2."
        )


class ContextCheck:
    """All attempts of a prompt fit the model's context: asked of the longest one at construction, and of every batch."""

    def __init__(self, trainer: "SCoReTrainer"):
        args, tokenizer, rows = trainer.args, trainer._tokenizer, trainer.train_dataset
        rows = list(
            rows.take(100) if isinstance(rows, IterableDataset) else rows.select(range(min(len(rows), ROWS_CHECKED)))
        )
        if is_conversational(rows[0]) and tokenizer.chat_template is None:
            raise ValueError(
                "The dataset's prompts are chat messages, but the tokenizer has no chat template. Use a tokenizer that has "
                "one, set `tokenizer.chat_template`, or give the prompts as text."
            )
        prompt_ids, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
        longest = max(range(len(rows)), key=lambda i: len(prompt_ids[i]))
        instruction = max((row.get("correction_instruction") or args.correction_instruction for row in rows), key=len)
        # Of training, and of evaluation if there is one.
        self.num_attempts = max(args.num_attempts, args.num_attempts_eval if trainer.eval_dataset else 0)
        self.bridge_tokens = sum(
            len(trainer._bridge([rows[longest]["prompt"]], [instruction], attempt, [[]])[0])
            for attempt in range(1, self.num_attempts)
        )
        stored = [ids for row in rows for ids in row["first_attempts"]] if args.num_offline else []
        self.longest_stored = max((len(attempt_tokens(ids, tokenizer)) for ids in stored), default=0)
        self.max_completion_length = trainer.max_completion_length
        self.limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        if trainer.use_vllm and args.vllm_max_model_length is not None:
            self.limit = min(self.limit or args.vllm_max_model_length, args.vllm_max_model_length)
        self.check(len(prompt_ids[longest]))

    def check(self, prompt_length: int):
        longer = max(0, self.longest_stored - self.max_completion_length)
        needed = prompt_length + self.num_attempts * self.max_completion_length + longer + self.bridge_tokens
        if self.limit is not None and needed > self.limit:
            raise ValueError(
                f"The model's context of {self.limit} tokens is too short: a prompt of {prompt_length} tokens, "
                f"{self.num_attempts} attempts of up to {self.max_completion_length} tokens (`max_completion_length` holds "
                f"for each) and {self.bridge_tokens} tokens of correction instructions need {needed}. Lower "
                "`max_completion_length` or drop the longest prompts."
            )
