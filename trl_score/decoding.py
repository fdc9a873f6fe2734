"""
How an attempt is decoded, in training and in evaluation: from the model's distribution, shaped by a temperature and `top_p` and by
nothing else. A checkpoint's `generation_config.json` often has more options (`repetition_penalty`, `min_p`, `suppress_tokens`, ..).
Only its special tokens are used. With the other options, evaluation would measure another distribution than the trained one.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .fingerprints import base_of_adapter, hub_arguments
from .generation import contiguous_head


# Options in `generation_kwargs` that do not change the distribution that attempts are sampled from ..
TECHNICAL_GENERATION_KWARGS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "stop", "stop_strings", "stop_token_ids", "tokenizer", "seed"),
    *("max_length", "max_new_tokens", "max_tokens", "max_time", "use_cache", "cache_implementation", "cache_config"),
    *("disable_compile", "compile_config", "prefill_chunk_size", "low_memory", "detokenize", "skip_special_tokens"),
    *("logprobs", "prompt_logprobs", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "return_legacy_cache", "synced_gpus"),
}
# .. and the values with which other options do not change it either. An option in neither list is neutral if it is None.
NEUTRAL_GENERATION_KWARGS = {
    **{"do_sample": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0},
    **{"eta_cutoff": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1},
    **{"num_return_sequences": 1, "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0},
    **{"renormalize_logits": False, "remove_invalid_values": False, "guidance_scale": 1.0, "length_penalty": 1.0},
}


@dataclass(frozen=True)
class Decoding:
    """
    Temperature, `top_p` and length of an attempt.

    Args:
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature. 0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the most likely tokens whose probabilities add up to this share.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of one attempt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int = 1024

    def generation_config(self, end_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """The argument of `generate` of transformers. The model has to be within [`neutral_generation`] when it is called."""
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
    Within this context the `generation_config` of a model has its special tokens and nothing else. It is needed because `generate`
    fills every field that its caller left unset from there. The former configuration is back afterwards.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that generates.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    neutral = GenerationConfig(**{name: getattr(before, name) for name in names})
    # An adapter's model may hold the configuration too, and hands it to the model below when it generates.
    holders = [(each, vars(each)["generation_config"]) for each in (base, model) if "generation_config" in vars(each)]
    for each, _ in holders:
        each.generation_config = neutral
    try:
        yield
    finally:
        for each, own in holders:
            each.generation_config = own


@contextmanager
def temporarily(holder: object, **attributes) -> Iterator[None]:
    """Within this context an object has other attributes. The former ones are back afterwards."""
    before = {name: getattr(holder, name) for name in attributes}
    vars(holder).update(attributes)
    try:
        yield
    finally:
        vars(holder).update(before)


@contextmanager
def trainer_decoding(trainer, mode: str) -> Iterator[None]:
    """
    Within this context a trainer generates from the policy's distribution, whatever the checkpoint's `generation_config` says.
    Evaluation decodes at `eval_temperature`, and ignores options that cut the distribution in training.

    Args:
        trainer ([`~trl_score.SCoReTrainer`]):
            The trainer that generates, by transformers or by vLLM.
        mode (`str`):
            `"train"` or `"eval"`.
    """
    with ExitStack() as stack:
        if not trainer.use_vllm:
            model = trainer.accelerator.unwrap_model(trainer.model)
            stack.enter_context(neutral_generation(model))
            stack.enter_context(contiguous_head(model))
        if mode == "eval":
            holder, settings = _evaluation_settings(trainer)
            stack.enter_context(temporarily(holder, **settings))
        yield


def _evaluation_settings(trainer) -> tuple[object, dict]:
    """The object from which TRL reads how to generate, and its attributes in evaluation."""
    args = trainer.args
    decoding = Decoding(args.eval_temperature, max_completion_length=trainer.max_completion_length)
    given = args.generation_kwargs or {}
    technical = {name: given[name] for name in given.keys() & TECHNICAL_GENERATION_KWARGS}
    if trainer.use_vllm:
        neutral = {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return trainer.vllm_generation, neutral | {"repetition_penalty": 1.0, "generation_kwargs": technical}
    config = decoding.generation_config(trainer.eos_token_ids, trainer._tokenizer.pad_token_id)
    config.update(**technical, cache_implementation=args.cache_implementation, disable_compile=True)
    return trainer, {"generation_config": config, "generation_kwargs": config.to_diff_dict()}


def load_generation_config(name: str, **kwargs) -> GenerationConfig | None:
    """
    The `generation_config` of a model that is not loaded; `None` if it has none and its configuration names no end tokens.

    Args:
        name (`str`):
            Hub id or folder of a model, or of an adapter. For an adapter the base model is read.
        **kwargs:
            Arguments of `from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `trust_remote_code`.
    """
    where = hub_arguments(kwargs)
    name, where = base_of_adapter(name, **where) or (name, where)
    try:
        return GenerationConfig.from_pretrained(name, **where)
    except OSError:  # it has no such file
        try:
            code = {"trust_remote_code": True} if kwargs.get("trust_remote_code") else {}
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **where, **code))
        except (OSError, ValueError):
            return None


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end an attempt: the tokenizer's end-of-sequence token, and all that the model's configuration names."""
    found = [tokenizer.eos_token_id]
    of_model = getattr(generation_config, "eos_token_id", None)
    found += of_model if isinstance(of_model, list | tuple) else [of_model]
    return list(dict.fromkeys(token for token in found if token is not None))


def with_end_token(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, name: str = "this model"
) -> PreTrainedTokenizerBase:
    """
    The tokenizer, or a copy of it with the model's end-of-sequence token if the tokenizer has none.

    Raises:
        `ValueError`: if neither has one.
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


def trainer_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: str | PreTrainedModel, name: str, **kwargs
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model to be trained, with an end-of-sequence token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The given one. By default it is loaded as [`~trl.GRPOTrainer`] loads it.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, which names the end-of-sequence token if the tokenizer has none.
        name (`str`):
            Folder or Hub id of the model.
        **kwargs:
            Arguments of `from_pretrained`: `revision`, `trust_remote_code`.

    Raises:
        `ValueError`: for a processor of images, or if neither the tokenizer nor the model has an end-of-sequence token.
    """
    if tokenizer is None:
        tokenizer = AutoProcessor.from_pretrained(name, truncation_side="left", padding_side="left", **kwargs)
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError("Images are not supported by SCoRe. Pass a tokenizer as `processing_class`.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.eos_token_id is not None:
        return tokenizer
    is_loaded = not isinstance(model, str)
    generation = model.generation_config if is_loaded else load_generation_config(name, **kwargs)
    return with_end_token(tokenizer, generation, name)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Keep the random state of the process: Python, NumPy, and PyTorch on all devices are afterwards in the state from before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    every = "_all" if hasattr(device, "get_rng_state_all") else ""  # MPS has one device
    of_device = None
    # This must not create a CUDA context: vLLM starts its processes by fork, which fails with one.
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
