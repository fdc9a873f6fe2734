r"""
All attempts of a batch in one `generate` of transformers.

A row whose attempt has ended reads its bridge, one token in each decoding step, and continues with its next attempt while other rows
are still in the attempt before. No row waits for the longest attempt of another one, and nothing is read twice. While all rows are in a
bridge, a step reads several tokens:

    step    1 2 3 4 5 6 7 8 9
    row 1   y y p p p y y y y       y: sampled tokens of attempts, p: tokens of the bridge
    row 2   y y y y y p p p y ..

A row that has ended all attempts leaves the batch.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .rollout import Rollouts


# Options that treat a token by what is before it. Others count from the start of the call (`min_new_tokens`) or hold something for
# each of its rows (`repetition_penalty`).
OPTIONS = {
    *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias", "use_cache"),
    *("renormalize_logits", "remove_invalid_values", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("disable_compile", "transformers_version"),
}
NEUTRAL = {"repetition_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1}


def can_generate_all(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> bool:
    """
    Whether all attempts can be generated in one call: by a text-only decoder, without virtual tokens or an adapter that starts
    at a token of its own (aLoRA), with options that do not count from the start of the call.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that generates.
        config (`GenerationConfig`):
            How.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        not any(each.is_prompt_learning or getattr(each, "alora_invocation_tokens", None) for each in adapters)
        and not base.config.is_encoder_decoder
        and base.config.get_text_config(decoder=True) is base.config
        and "generate" not in {*vars(model), *vars(base)}  # somebody else's
        and {name for name, value in config.to_diff_dict().items() if value not in (None, NEUTRAL.get(name))}
        <= OPTIONS
    )


@contextmanager
def contiguous_head(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Within this context the language-model head gets a contiguous input. For the logits of the last position transformers hands it
    a slice, and on a CPU PyTorch multiplies a slice by a frozen matrix (of a model under an adapter) as a batch: it copies the
    matrix for each row, which takes `B * vocabulary * hidden` numbers and more time than all layers.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model that generates.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@dataclass(eq=False)
class Row:
    """
    One rollout that is being generated.

    Attributes:
        index (`int`):
            Its place in the batch.
        attempts (`list[list[int]]`):
            Tokens of the attempts so far. The last one is being sampled.
        bridges (`list[list[int]]`):
            Tokens of the bridges before it.
        unread (`deque[int]`):
            Tokens of the last bridge that the model has not read yet.
        ended (`bool`):
            Whether all attempts have ended.
    """

    index: int
    attempts: list[list[int]] = field(default_factory=lambda: [[]])
    bridges: list[list[int]] = field(default_factory=list)
    unread: deque[int] = field(default_factory=deque)
    ended: bool = False


class AllAttempts:
    """
    The decoding loop of all attempts of a batch, for one call of `generate` (as its `custom_generate`).

    Args:
        prompt_ids (`list[list[int]]`):
            Token ids of the `B` prompts.
        bridge (`Callable[[int, int, list[int]], list[int]]`):
            `bridge(attempt, row, attempt_ids)` returns the tokens between attempt `attempt`, from 1, of row `row`, from 0, whose
            tokens it gets, and the next one.
        eos_token_ids (`Collection[int]`):
            The tokens that end an attempt.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout.
        stored (`list[list[int] | None]`, *optional*):
            For each row the tokens of a first attempt that is read and not sampled, or `None`.
        synced (`bool`, *optional*, defaults to `False`):
            Whether the model's forward passes are collective (ZeRO-3, FSDP): a process then continues until all have finished.

    Attributes:
        rows (`list[Row]`):
            The rows that are in the batch, in its order. At first all `B`.
    """

    def __init__(
        self,
        prompt_ids: list[list[int]],
        bridge: Callable[[int, int, list[int]], list[int]],
        eos_token_ids: Collection[int],
        num_attempts: int = 2,
        stored: list[list[int] | None] | None = None,
        synced: bool = False,
    ):
        self.prompt_ids, self.bridge, self.num_attempts = prompt_ids, bridge, num_attempts
        self.eos_token_ids, self.synced = frozenset(eos_token_ids), synced
        self.rows = self._all_rows = [Row(index) for index in range(len(prompt_ids))]
        for row, ids in zip(self.rows, stored or [], strict=stored is not None):
            if ids is not None:
                row.attempts = [list(ids)]
                self._end_attempt(row)
                row.unread.clear()  # part of the context
        self.contexts = [prompt + ids for prompt, ids in zip(prompt_ids, self.rollouts.completion_ids, strict=True)]

    @property
    def rollouts(self) -> Rollouts:
        """What has been generated so far."""
        rows = self._all_rows
        return Rollouts(self.prompt_ids, [row.attempts for row in rows], [row.bridges for row in rows])

    @property
    def ended(self) -> bool:
        return all(row.ended for row in self.rows)

    @contextmanager
    def instead_of_generate(self, model: PreTrainedModel | PeftModel) -> Iterator[None]:
        """Within this context `model.generate` of `contexts` generates all attempts, for callers that know nothing of them."""
        model.generate = partial(model.generate, custom_generate=self)
        try:
            yield
        finally:
            del model.generate  # the class's own is back

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        stopping_criteria=None,
        **model_kwargs,
    ) -> Tensor:
        """
        What `generate` calls after its preparations.

        Returns:
            `torch.Tensor` of shape `(B, T)`: contexts, padded on the left, then attempts and bridges, padded on the right.
        """
        contexts, step = input_ids, None
        self._limit = generation_config.max_new_tokens
        while model._has_unfinished_sequences(self.ended, self.synced, input_ids.device):
            if self.ended:  # a forward for the other processes
                model(input_ids=contexts[:1, :1])
                continue
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=step, is_first_iteration=input_ids is contexts, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
            number = self._num_read(model_kwargs)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=number)
            step = number if model_kwargs.get("use_cache") else None
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)  # (B, V)
            del outputs
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                sampled = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                sampled = scores.argmax(-1)
            read = [self._next(row, token, number) for row, token in zip(self.rows, sampled.tolist(), strict=True)]
            input_ids = torch.cat([input_ids, input_ids.new_tensor(read)], dim=1)
            input_ids = self._drop_ended(input_ids, model_kwargs)
        known = [len(ids) - len(prompt) for ids, prompt in zip(self.contexts, self.prompt_ids, strict=True)]
        generated = [torch.tensor(ids[n:]) for ids, n in zip(self.rollouts.completion_ids, known, strict=True)]
        padding = generation_config.pad_token_id or 0
        return torch.cat([contexts, pad_sequence(generated, True, padding).to(contexts)], dim=1)

    def _num_read(self, model_kwargs: dict) -> int:
        """
        How many tokens of each row the model reads next: 1, or more while all rows are in a bridge. So short attempts that end
        together, as those that are cut off do, cost one forward pass for their bridges and not one for each of the tokens.
        """
        unread = [len(row.unread) for row in self.rows if not row.ended]  # none while other processes are not done
        number = min(unread, default=0)
        if number <= 1:
            return 1
        caches = [each for each in model_kwargs.values() if isinstance(each, Cache)]
        layers = [layer for cache in caches for layer in getattr(cache, "layers", [None])]
        # The state of a recurrent layer takes one token at a time. Some caches hold it beside plain layers (MiniMax).
        is_recurrent = not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        is_recurrent = is_recurrent or not {type(cache) for cache in caches} <= {DynamicCache}
        return 1 if is_recurrent or (model_kwargs.get("use_cache") and not caches) else number

    def _next(self, row: Row, sampled: int, number: int) -> list[int]:
        """The `number` tokens that the model reads next in a row."""
        if row.unread:
            return [row.unread.popleft() for _ in range(number)]
        if not row.ended:
            row.attempts[-1].append(sampled)
            if sampled in self.eos_token_ids or len(row.attempts[-1]) == self._limit:
                self._end_attempt(row)
        return [sampled] * number

    def _end_attempt(self, row: Row):
        number = len(row.attempts)
        if number == self.num_attempts:
            row.ended = True
            return
        row.bridges.append(self.bridge(number, row.index, row.attempts[-1]))
        row.unread.extend(row.bridges[-1])
        row.attempts.append([])

    def _drop_ended(self, input_ids: Tensor, model_kwargs: dict) -> Tensor:
        """The tokens of the rows that have not ended. `model_kwargs` are changed in place."""
        kept = [place for place, row in enumerate(self.rows) if not row.ended]
        caches = [each for each in model_kwargs.values() if isinstance(each, Cache)]
        of_rows = {name: each for name, each in model_kwargs.items() if isinstance(each, Tensor)}
        if (
            not 0 < len(kept) < len(self.rows)
            or list(map(type, caches)) != [DynamicCache]
            or any(each.dim() != 2 for each in of_rows.values())
        ):
            return input_ids
        self.rows = [self.rows[place] for place in kept]
        kept = torch.tensor(kept, device=input_ids.device)
        caches[0].reorder_cache(kept)
        for name, each in of_rows.items():
            model_kwargs[name] = each[kept.to(each.device)]
        return input_ids[kept]
