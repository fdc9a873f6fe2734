"""Where the rows of the tasks come from: the Hugging Face Hub, at a pinned revision, or JSON lines in a folder."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from .base import first_line


@dataclass(frozen=True)
class Source:
    """
    One dataset.

    Args:
        repository (`str`):
            Its id on the Hub.
        revision (`str`):
            The commit.
        config (`str` or `None`):
            Its configuration.
        splits (`tuple[str, ...]`):
            Splits that are joined.
    """

    repository: str
    revision: str
    config: str | None
    splits: tuple[str, ...]


# MATH itself is no longer on the Hub (taken down on the request of a rights holder, January 2025). This copy has all of
# its 12,500 problems with their levels, in plain Parquet; MATH-500 names the 500 of the paper's test split.
MATH = "DigitalLearningGmbH/MATH-lighteval", "0530c78699ea5e8eb5530600900e1f328b48acad"
MATH_500 = "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
GSM8K = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"  # the authors' own
MBPP = "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"  # the authors' own, now in Parquet
HUMANEVAL = "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"  # the authors' own
HUMANEVALPACK = (
    "bigcode/humanevalpack",
    "9a41762f73a8cb23bb5811b73d5aab164efcf378",
)  # the first without a loading script

HUB: dict[str, Source] = {
    "math/all": Source(*MATH, "default", ("train", "test")),
    "math/test": Source(*MATH_500, None, ("test",)),
    "gsm8k/train": Source(*GSM8K, "main", ("train",)),
    "gsm8k/test": Source(*GSM8K, "main", ("test",)),
    "mbpp": Source(*MBPP, "full", ("train", "validation", "test", "prompt")),
    "humaneval": Source(*HUMANEVAL, None, ("test",)),
    "humanevalfix": Source(*HUMANEVALPACK, "python", ("test",)),
}

FILES: dict[str, str] = {
    "math/train": "math/train.jsonl",
    "math/test": "math/math500.jsonl",
    "gsm8k/train": "gsm8k/train.jsonl",
    "gsm8k/test": "gsm8k/test.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
    "mbpp_repair": "mbpp_repair/mbpp_repair.jsonl",
    "humaneval": "humaneval/humaneval.jsonl",
    "humanevalfix": "humanevalfix/humanevalfix.jsonl",
}
"""Paths below `data_dir`. Each file may also end in `.gz`."""


def from_hub(name: str) -> Dataset:
    """
    Load rows from the Hub as they are there, and add a column `split`.

    Raises:
        `OSError`: If the rows cannot be loaded. The message says what to do instead.
    """
    source = HUB[name]
    parts = []
    for split in source.splits:
        try:
            part = load_dataset(source.repository, name=source.config, revision=source.revision, split=split)
        except Exception as error:  # of whatever kind: no network, no such repository, no such split
            raise OSError(
                f"The rows of '{name}' ({source.repository} at {source.revision[:7]}, split '{split}') cannot be loaded from "
                f"the Hub: {first_line(error)} Set `data_dir` to a folder with {FILES.get(name, 'the files')} "
                "to read them from there."
            ) from error
        if "split" not in part.column_names:
            part = part.add_column("split", [split] * len(part))
        parts.append(part)
    return concatenate_datasets(parts)


def from_folder(name: str, data_dir: str | Path) -> Dataset:
    """
    Read the rows of a file of JSON lines.

    Raises:
        `FileNotFoundError`: If the folder has no such file.
    """
    plain = Path(data_dir).expanduser() / FILES[name]
    candidates = [plain, plain.with_name(plain.name + ".gz")]
    for file in candidates:
        if file.exists():
            return load_dataset("json", data_files=str(file), split="train")
    raise FileNotFoundError(f"`data_dir={str(data_dir)!r}` has no {FILES[name]} (nor .gz), which this task reads.")
