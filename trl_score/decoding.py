"""
How an attempt is decoded, the same on every path: from the model's own distribution, shaped by a temperature and `top_p` and by
nothing else. A checkpoint's `generation_config.json` often says more (`repetition_penalty`, `min_p`, `suppress_tokens`, ..). Of it
only the special tokens are used: with the rest, a measurement would be of another distribution than the one that is trained.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .fingerprints import base_of_adapter, hub_arguments


@dataclass(frozen=True)
class Decoding:
    """
    How an attempt is decoded.

    Args:
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the most likely tokens whose probabilities add up to this share.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Tokens of one attempt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int = 1024

    def generation_config(self, end_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """What `generate` of transformers is called with. The model's own configuration has to be [`neutral_generation`]'s."""
        sampling = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            eos_token_id=list(end_token_ids),
            pad_token_id=pad_token_id,
            **sampling,
        )


@contextmanager
def neutral_generation(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Within this context the model's `generation_config` holds its special tokens and nothing else. `generate` fills every field
    that its caller left unset from there, so passing a `GenerationConfig` of one's own is not enough. The model's own
    configuration is back afterwards.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that generates.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    neutral = GenerationConfig(**{name: getattr(before, name) for name in names})
    # An adapter's model may have a reference of its own, and hands it to the model below when it generates.
    holders = [(each, vars(each)["generation_config"]) for each in (base, model) if "generation_config" in vars(each)]
    for each, _ in holders:
        each.generation_config = neutral
    try:
        yield
    finally:
        for each, own in holders:
            each.generation_config = own


def load_generation_config(name: str, **kwargs) -> GenerationConfig | None:
    """
    The `generation_config` of a model that is not loaded; `None` if it has none and its configuration names no end tokens.

    Args:
        name (`str`):
            Hub id or folder of a model, or of an adapter, whose base model is looked at.
        **kwargs:
            As for `from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `trust_remote_code`.
    """
    where = hub_arguments(kwargs)
    name = base_of_adapter(name, **where) or name
    try:
        return GenerationConfig.from_pretrained(name, **where)
    except OSError:  # it has no such file
        try:
            code = {"trust_remote_code": True} if kwargs.get("trust_remote_code") else {}
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **where, **code))
        except (OSError, ValueError):
            return None


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end an attempt: the tokenizer's end of sequence, and all that the model's configuration names."""
    found = [tokenizer.eos_token_id]
    of_model = getattr(generation_config, "eos_token_id", None)
    found += of_model if isinstance(of_model, list | tuple) else [of_model]
    return list(dict.fromkeys(token for token in found if token is not None))


def with_end_token(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, name: str = "this model"
) -> PreTrainedTokenizerBase:
    """
    The tokenizer, or a copy of it whose end of sequence is the model's where it has none of its own.

    Raises:
        `ValueError`: If neither has one.
    """
    if tokenizer.eos_token_id is not None:
        return tokenizer
    ends = end_token_ids(tokenizer, generation_config)
    if not ends:
        raise ValueError(
            f"Neither the tokenizer of '{name}' nor its `generation_config.json` has an end-of-sequence token, so no attempt would "
            "end. Set `tokenizer.eos_token` to the token that ends the assistant's turn."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


@contextmanager
def keep_random_state() -> Iterator[None]:
    """The random state of the process, of Python, NumPy and PyTorch on all devices, is afterwards what it was before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    every = "_all" if hasattr(device, "get_rng_state_all") else ""  # MPS has one device
    of_device = None
    # A CUDA context is not made for this: vLLM starts its processes by fork, which must not have one.
    if device is not None and getattr(device, "is_initialized", lambda: True)():
        of_device = getattr(device, f"get_rng_state{every}")()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if of_device is not None:
            getattr(device, f"set_rng_state{every}")(of_device)
        elif device is not None:  # as PyTorch seeds it when it is first used
            device.manual_seed_all(torch.initial_seed())
