"""
Fingerprints of models, tokenizers and problems. A stored result is reused only if all of its fingerprints match.

Files and weights are read in full. That is what loading a model does anyway, at one to two gigabytes per second, and it takes
seconds where sampling takes minutes. Sizes and dates would miss a model that was trained further and saved where it was.
"""

import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Arguments of `from_pretrained` that say which files are meant."""

# The files that determine a model. Other files of its folder (the model card, the trainer's state, results) change nothing.
MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "*.gguf"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "adapter_model.bin"),
)
NOT_OF_THE_FUNCTION = {"_name_or_path", "transformers_version", "use_cache", "pad_token_id", "dtype"}


def fingerprint(*parts) -> str:
    """64 bits of a hash, in hexadecimal."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def of_rows(rows: Dataset) -> list[str]:
    """A fingerprint of each problem, with all its columns."""
    return [fingerprint(row) for row in rows]


def of_grader(grader: Callable) -> str:
    """
    The name of a class or function that grades. One that is not ours or TRL's is told from others by its source file too; in a script
    or notebook, by its own source. A `functools.partial` is told by its function and arguments.
    """
    grader = inspect.unwrap(grader)
    if isinstance(grader, functools.partial):
        arguments = re.sub(r" at 0x\w+", "", repr((grader.args, grader.keywords)))  # functions without their addresses
        return f"{of_grader(grader.func)} {fingerprint(arguments)}"
    grader = grader if hasattr(grader, "__qualname__") else type(grader)
    name = grader.__qualname__
    if grader.__module__.split(".")[0] in ("trl_score", "trl"):
        return name
    try:
        whole = sys.modules[grader.__module__] if grader.__module__ != "__main__" else grader
        return f"{name} {fingerprint(inspect.getsource(whole))}"
    except (OSError, TypeError, KeyError):  # its source is nowhere
        return name


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """
    Fingerprints of a tokenizer: `vocabulary` (which id is which token), `rules` (how text becomes tokens) and `chat_template`.
    """
    rules = None
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for state_of_the_last_call in ("padding", "truncation"):
            rules.pop(state_of_the_last_call, None)
    return {
        "vocabulary": fingerprint(sorted(tokenizer.get_vocab().items())),
        "rules": fingerprint(rules, tokenizer.eos_token_id, tokenizer.bos_token_id),
        "chat_template": fingerprint(tokenizer.chat_template),
    }


def of_checkpoint(name: str, **kwargs) -> str:
    """
    Fingerprint of a checkpoint: the content of the model's files in a folder, or the commit on the Hub. For an adapter it also has
    the fingerprint of the base model.

    Args:
        name (`str`):
            Folder or Hub id.
        **kwargs:
            Arguments of `from_pretrained`. Those that say which files are meant (`revision`, `subfolder`, ..) count.

    Raises:
        `OSError`: If there is no such model.
    """
    where = hub_arguments(kwargs)
    folder, base = Path(name, where.get("subfolder", "")), base_of_adapter(name, **where)
    if folder.is_dir():
        own = _of_folder(folder)
    else:
        file = cached_file(name, "config.json" if base is None else "adapter_config.json", **where)
        own = extract_commit_hash(file, None)
    chosen = {name: kwargs[name] for name in ("subfolder", "variant", "gguf_file") if kwargs.get(name)}
    own = " ".join([own, *(f"{name}={value}" for name, value in chosen.items())])
    if base is None:
        return own
    base, where = base
    return f"{own} on {of_checkpoint(base, **where)}"


def hub_arguments(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` that say which files are meant."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def base_of_adapter(name: str, **where) -> tuple[str, dict] | None:
    """
    The base model of an adapter and the arguments that say which of its files are meant; `None` for a whole model. Its revision is
    the one that the adapter was trained on, if the adapter names it.
    """
    folder = Path(name, where.get("subfolder", ""))
    if folder.is_dir():
        file = folder / "adapter_config.json"
        file = file if file.exists() and not (folder / "config.json").exists() else None
    else:
        file = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **where)
    if file is None:
        return None
    config = json.loads(Path(file).read_text("utf-8"))
    where = {name: value for name, value in where.items() if name != "subfolder"}
    if config.get("revision") is not None:
        where["revision"] = config["revision"]
    return config["base_model_name_or_path"], where


def _of_folder(folder: Path) -> str:
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    stats = [(file, file.stat()) for file in files]
    digests = [(file.name, _digest(file.resolve(), stat.st_size, stat.st_mtime_ns)) for file, stat in stats]
    generation = folder / "generation_config.json"  # only its end tokens are used
    ends = json.loads(generation.read_text("utf-8")).get("eos_token_id") if generation.exists() else None
    return fingerprint(digests, ends)


@functools.cache
def _digest(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def of_model(model: PreTrainedModel | PeftModel) -> str:
    """Fingerprint of a model in memory: its configuration, its end tokens, its weights, and which adapters are on."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_OF_THE_FUNCTION}
    ends = getattr(model.generation_config, "eos_token_id", None)
    digest = hashlib.sha256(fingerprint(config, ends).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
            continue
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.device.type != "meta":  # offloaded to the disk
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            state = (module.disable_adapters, module.active_adapters, getattr(module, "scaling", None))
            digest.update(f"{name} {state}".encode())
    return digest.hexdigest()[:16]
