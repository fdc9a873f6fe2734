"""What cannot work is refused before any model is loaded."""

from datasets import Dataset
from transformers import AutoConfig
from trl.trainer.utils import get_config_model_id

from .score_config import SCoReConfig


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
