r"""
Reuses the key-value cache of the previous attempt, so that `generate` processes only the new tokens of the context (the bridge).

TRL and [`~trl_score.sampling.TransformersSampler`] call `generate` once for each attempt, with whole contexts, padded on the left.
The cache is padded in another way, and has entries of padding behind an attempt that ended early. So it is brought into the layout of
the new call:

    in the cache    . . x x y y -             x: prompt, y: attempt 1, -: padding behind its end
                    x x x x y y y             (the last token of an attempt that was cut off is missing)
    new contexts    . . . x x y y p p p       p: bridge
                    x x x x y y y y p p
    cut to          . . . x x y y             the columns from here on are read
                    x x x x y y y

The layout of the call stays as it was, and with it the positions, the attention mask, the logits processors and the random numbers.
Cached tokens are used as far as they equal the tokens of the new context.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode


def can_reuse_cache(model: PreTrainedModel | PeftModel) -> bool:
    """
    Whether a model's cache holds the keys and values of all tokens, each a function of the tokens before and the position: full
    attention in all layers, with no adapter but LoRA. Not so with sliding windows, recurrent states or encoders, with rotary
    frequencies that depend on the length of the context, and in models for more than text.
    """
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            if adapter.peft_type != PeftType.LORA or getattr(adapter, "alora_invocation_tokens", None) is not None:
                return False
    base = _base(model)
    config = base.config
    return (
        config.get_text_config(decoder=True) is config
        and not (config.is_encoder_decoder or base._is_stateful)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and {"position_ids", "past_key_values"} <= inspect.signature(base.forward).parameters.keys()
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and not any("dynamic" in rope or "longrope" in rope for rope in _rope_types(config))
        and "generate" not in {*vars(model), *vars(base)}  # somebody else's
    )


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _rope_types(config) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type", "default") for each in (parameters, *by_layer_type)}


@contextmanager
def reused_cache(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Within this context each `generate` of the model reuses the cache of the previous call, as far as the contexts agree. The
    weights must not change in between. The cache is dropped at the end.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A model for which [`can_reuse_cache`] holds.
    """
    model.generate = _CachedGenerate(model)
    try:
        yield
    finally:
        del model.generate  # the class's own is back


class _CachedGenerate:
    """Stands in for a model's `generate`: the same arguments, by keyword, the same result."""

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model, self.generate = model, model.generate
        self.kept: tuple[DynamicCache, Tensor, Tensor] | None = None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **kwargs) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not all(map(_is_plain, (self.model.generation_config, kwargs.get("generation_config")))):
            return self.generate(**inputs, **kwargs)
        cache = self._cache_for(input_ids, attention_mask)
        sequences = self.generate(**inputs, past_key_values=cache, **kwargs)
        # All but the last token went through the model, unless it kept to itself what it did.
        if cache.get_seq_length() == sequences.size(1) - 1:
            self.kept = cache, sequences, attention_mask
        return sequences

    def _cache_for(self, input_ids: Tensor, attention_mask: Tensor) -> DynamicCache:
        """The cache of the call before, in the layout of this one and cut to where their tokens agree in all rows, or a new one."""
        kept, self.kept = self.kept, None
        if kept is not None and len(kept[1]) == len(input_ids):
            cache, sequences, mask = kept
            padding = [(each == 0).sum(1, keepdim=True) for each in (mask, attention_mask)]  # (B, 1), on the left
            columns = torch.arange(input_ids.size(1), device=input_ids.device) + padding[0] - padding[1]  # (B, T)
            cached = (columns >= 0) & (columns < cache.get_seq_length())
            columns = columns.clamp(0, cache.get_seq_length() - 1)
            agree = (attention_mask == 0) | (cached & (sequences.gather(1, columns) == input_ids))
            length = int(agree.all(0)[:-1].cumprod(0).sum())  # one token is always read, for its logits
            if length > 0:
                for layer in cache.layers:  # of shape (B, heads, tokens, size)
                    index = columns[:, None, :length, None].to(layer.keys.device)
                    layer.keys = layer.keys.take_along_dim(index, dim=2)
                    layer.values = layer.values.take_along_dim(index, dim=2)
                return cache
        return DynamicCache(config=_base(self.model).config)


def _is_plain(config: GenerationConfig | None) -> bool:
    """Sampling or greedy decoding with the default cache, one sequence for each context."""
    return config is None or (
        config.get_generation_mode() in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
        and config.num_return_sequences in (None, 1)
        and config.use_cache is not False
        and config.cache_implementation is None
    )
