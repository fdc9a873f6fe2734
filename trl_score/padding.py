"""
Leaves out tokens that do not count. TRL pads a batch to its longest prompt and its longest completion and never trims it. If lengths
differ much, more than half of the computed tokens are padding. Here rows of similar length are computed together, each micro-batch is
trimmed, and the language-model head scores the tokens of attempts alone. Loss and gradients equal those of the padded batch, up to
rounding.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn


class ScoredTokens:
    """
    A model that scores some of the tokens after the prompt. It is called with `labels`, like a model with TRL's fused head, and
    returns log-probabilities (and entropies) at all positions, 0 where a token is not scored. TRL's head computes labelled
    positions only on GPUs, and all positions elsewhere. This one computes labelled positions only, on every device.

    Args:
        model (`Callable`):
            The model, or its wrapper (DDP, FSDP, DeepSpeed).
        unwrapped (`torch.nn.Module`):
            The causal language model inside of it, or the adapter's model.
        scored (`torch.Tensor` of shape `(B, T)`):
            Whether a token after the prompt is scored.
    """

    def __init__(self, model: Callable, unwrapped: nn.Module, scored: Tensor):
        self.model, self.unwrapped, self.scored = model, unwrapped, scored

    def __call__(self, *, labels: Tensor, **inputs):
        mask = labels[:, 1:] != -100  # (B, P + T - 1), by the position that predicts the token
        mask[:, -self.scored.size(1) :] &= self.scored.bool()
        if not mask.any():  # TRL's head needs a position, and the graph has to be whole
            mask[0, -1] = True
        targets = labels[:, 1:][mask].clamp(min=0)

        def keep_scored(module, args, output):
            hidden = output.last_hidden_state[:, -mask.size(1) - 1 : -1]  # without the virtual tokens of an adapter
            output.last_hidden_state = hidden[mask.to(hidden.device)].unsqueeze(0)  # (1, N, hidden)
            return output

        base = self.unwrapped.get_base_model() if hasattr(self.unwrapped, "get_base_model") else self.unwrapped
        if takes_positions(self.unwrapped, base):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        handle = base.base_model.register_forward_hook(keep_scored)
        try:
            output = self.model(**inputs, shift_labels=targets.unsqueeze(0))
        finally:
            handle.remove()
        for name in ("log_probs", "entropy"):
            values = getattr(output, name)
            if values is not None:
                setattr(output, name, values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values))
        return output


def takes_positions(model: nn.Module, base: nn.Module) -> bool:
    """
    Whether a model is told the position of each token in its row, as `generate` tells it. Else models with an embedding of each
    position (GPT-2) count from the first column, and a row would have other positions in each micro-batch.
    """
    return not has_virtual_tokens(model) and _has_position_ids(type(base.base_model))


def has_virtual_tokens(model: nn.Module) -> bool:
    """
    Whether an adapter puts virtual tokens in the first columns. With them PEFT takes no positions, so the padding between them and
    a prompt counts, and has to stay as it is.
    """
    adapter = getattr(model, "active_peft_config", None)
    return adapter is not None and adapter.is_prompt_learning


@cache
def _has_position_ids(model: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def width(attention_mask: Tensor, logits_to_keep: int) -> tuple[int, int]:
    """
    The part of a batch that has tokens.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            Prompts padded on the left, completions padded on the right.
        logits_to_keep (`int`):
            Columns of the completions, `T`.

    Returns:
        `tuple[int, int]`: the first column to keep, and the one after the last. They include a column of the prompts and one of
        the completions.
    """
    used = attention_mask.any(0).nonzero().flatten()
    first_completion = attention_mask.size(1) - logits_to_keep
    return min(int(used[0]), first_completion - 1), max(int(used[-1]), first_completion) + 1


def compute_by_length(
    compute: Callable[[Tensor, Tensor, Tensor], tuple],
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Tensor,
    batch_size: int | None = None,
    keeps_prompts: bool = False,
) -> tuple:
    """
    Compute values of the tokens after the prompts. Rows of similar length are computed together, in micro-batches without padded
    columns.

    Args:
        compute (`Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple]`):
            From the ids, the mask and the scored tokens of a micro-batch to results, each of them `None`, a scalar that is a
            mean, or one value for each token after the prompt.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P + T)`):
            Prompts padded on the left, and `T` tokens padded on the right.
        scored (`torch.Tensor` of shape `(B, T)`):
            Whether a token after the prompt is scored.
        batch_size (`int`, *optional*):
            Rows of a micro-batch; all rows by default.
        keeps_prompts (`bool`, *optional*, defaults to `False`):
            Leave the padding before the prompts as it is.

    Returns:
        `tuple`: the results of all rows in their given order, those for each token of shape `(B, T)`.
    """
    found, number = [], scored.size(1)
    order = attention_mask.sum(1).argsort(stable=True)
    for rows in order.split(batch_size or len(order)):
        first, end = width(attention_mask[rows], number)
        first = 0 if keeps_prompts else first
        left_out = attention_mask.size(1) - end
        results = compute(
            input_ids[rows, first:end], attention_mask[rows, first:end], scored[rows, : number - left_out]
        )
        found.append([
            nn.functional.pad(each, (0, left_out)) if each is not None and each.dim() > 0 else each for each in results
        ])  # fmt: skip
    back = order.argsort()
    return tuple(
        None if each[0] is None else torch.cat(each)[back] if each[0].dim() > 0 else torch.stack(each).mean()
        for each in zip(*found, strict=True)
    )


def by_length(batches: list[dict[str, Tensor]], steps: int) -> list[dict[str, Tensor]]:
    """
    Sort the rows of each optimizer step by length. No row changes its step, so the gradient of a step is the same sum.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            The micro-batches of a generation.
        steps (`int`):
            Micro-batches of an optimizer step.

    Returns:
        `list[dict[str, torch.Tensor]]`: as many micro-batches of the same sizes.
    """
    group = math.gcd(len(batches), steps)  # a generation can be shorter or longer than an optimizer step
    result = []
    for start in range(0, len(batches), group):
        of_step = batches[start : start + group]
        sizes = [len(batch["prompt_ids"]) for batch in of_step]
        rows = {
            name: torch.cat([batch[name] for batch in of_step])
            for name, value in of_step[0].items()
            if isinstance(value, Tensor) and value.dim() > 0
        }
        length = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
        parts = length.argsort(stable=True).split(sizes)
        result += [
            batch | {name: value[part] for name, value in rows.items()}
            for batch, part in zip(of_step, parts, strict=True)
        ]
    return result
