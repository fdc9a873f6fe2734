"""Training an adapter on weights in 4 bits."""

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """
    Let gradients pass through 4-bit weights also after the model has generated.

    On CPUs with AVX512-BF16 bitsandbytes (0.50) repacks the weights of a `Linear4bit` for inference when it first runs in
    evaluation mode, and does not undo it. Training then multiplies by a kernel without a backward pass, so the layers below lose
    that part of their gradient without an error, and the scales are rounded to bfloat16. This function turns the packing off and
    unpacks weights that are packed already (their scales stay rounded).

    Args:
        model (`torch.nn.Module`):
            Any model. One without such layers stays as it is.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks
