"""
GPU memory of the configurations in examples/configs, estimated from the shapes of the models (docs/one_gpu.md has the formula):

    python tests/benchmarks/memory.py            # the table of the docs
    python tests/benchmarks/memory.py --check    # the parts of the formula, measured on the CPU

Nothing of this is measured on a GPU, and nothing is downloaded.
"""

import argparse
import weakref
from pathlib import Path

import torch
import yaml
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Qwen2Config, Qwen2ForCausalLM


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
GB = 1024**3
SMALL = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
LARGE = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
MODELS = {
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        **SMALL, num_hidden_layers=28, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        **LARGE, num_hidden_layers=28, vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=32768
    ),
}
MODELS["Qwen/Qwen2.5-Coder-1.5B-Instruct"] = MODELS["Qwen/Qwen2.5-1.5B-Instruct"]

# per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, per_device_eval_batch_size; the file has the first.
SIZES = {
    "math_1.5b_lora": {24: (8, 16, 4, 16), 48: (16, 8, 8, 32), 80: (32, 4, 4, 64)},
    "math_1.5b_lora_alpha1": {24: (8, 16, 4, 16), 48: (16, 8, 8, 32), 80: (32, 4, 4, 64)},
    "math_1.5b_qlora": {24: (8, 16, 8, 16), 48: (16, 8, 8, 32), 80: (32, 4, 4, 64)},
    "math_7b_qlora": {24: (4, 32, 8, 8), 48: (8, 16, 8, 16), 80: (16, 8, 8, 32)},
    "gsm8k_1.5b_lora": {24: (16, 8, 8, 32), 48: (32, 4, 4, 64), 80: (64, 2, 2, 128)},
    "mbpp_1.5b_lora": {24: (8, 16, 8, 32), 48: (16, 8, 8, 64), 80: (32, 4, 4, 128)},
}
PROMPT = {"math": 1850, "gsm8k": 450, "mbpp": 1000}  # tokens of the longest one, from its characters
BRIDGE = 96  # tokens of the correction instruction and of the chat template around it
CONTEXT = 1.0 * GB  # CUDA context, cuBLAS workspaces, loaded kernels
ALLOCATOR = 1.15  # of what comes and goes: blocks that the allocator holds and cannot use
HEAD_TILE = 4096 * 32768 * 2  # TRL computes logits tile by tile: 4,096 tokens x 32,768 entries of the vocabulary
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 scales
# Bytes for each token in one layer, in units of intermediate_size and hidden_size (`--check`).
UPDATE = {"float32": (14, 46), "bfloat16": (12, 28)}  # by the precision of the adapter
NO_GRAD = (8, 13)
PREFILL = {"float32": (14, 0), "bfloat16": (8, 7)}  # generation has no autocast


def adapter_parameters(config: Qwen2Config, rank: int) -> int:
    """Of rank x (inputs + outputs) in each of the seven matrices of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    return config.num_hidden_layers * rank * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner))


def parameters(config: Qwen2Config) -> tuple[int, int]:
    """In the matrices of the layers, and elsewhere: embeddings, the head if it is not tied, norms and biases."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    layers = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    small = config.num_hidden_layers * (3 * hidden + 2 * kv) + hidden
    return layers, config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + small


def estimate(settings: dict, sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """
    Bytes of each part, and their `total`: what is always there, and the largest of what comes and goes.

    Args:
        settings (`dict`):
            Of a file in examples/configs.
        sizes (`tuple`):
            `per_device_train_batch_size`, `gradient_accumulation_steps`, `steps_per_generation`, `per_device_eval_batch_size`.
    """
    config, quantized = MODELS[settings["model_name_or_path"]], settings.get("load_in_4bit", False)
    train, _, steps, evaluation = sizes
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices, others = parameters(config)
    weights = matrices * (NF4 if quantized else 2) + others * 2
    states = 2 if "8bit" in settings.get("optim", "") else 8
    precision = "bfloat16" if quantized else "float32"
    adapter = adapter_parameters(config, settings["lora_r"]) * ((2 + 2 if quantized else 4 + 4) + states)

    prompt, length = PROMPT[settings["task"]], settings["max_completion_length"]
    tokens = prompt + 2 * length + BRIDGE  # of a rollout whose attempts are both cut off
    kv = layers * 2 * hidden // config.num_attention_heads * config.num_key_value_heads * 2
    dequantized = 2 * hidden * inner if quantized else 0  # one matrix at a time

    def layer(factors: tuple[int, int]) -> int:
        return factors[0] * inner + factors[1] * hidden

    def generation(rows: int) -> float:
        cache = rows * tokens * kv * (1 + 1 / layers)  # each layer's is copied when a token is added
        return max(cache + rows * config.vocab_size * 14, rows * prompt * layer(PREFILL[precision]))

    update = train * tokens * (2 * hidden * (layers - 1) + layer(UPDATE[precision]))
    forward = evaluation * tokens * layer(NO_GRAD)
    moments = {
        "generation": generation(train * steps) + dequantized,
        "update": update + HEAD_TILE + dequantized,
        "evaluation": max(generation(evaluation), forward + HEAD_TILE) + dequantized,
    }
    parts = {"weights": weights, "adapter": adapter, **moments}
    return parts | {"total": CONTEXT + weights + adapter + ALLOCATOR * max(moments.values())}


def table() -> str:
    """In Markdown, in GB."""
    names = ("weights", "adapter", "generation", "update", "evaluation", "total")
    lines = [
        "| configuration | GPU | train | accumulate | generate | eval | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * (4 + len(names)),
    ]
    for name, gpus in SIZES.items():
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        for gpu, sizes in gpus.items():
            parts = estimate(settings, sizes)
            values = [f"{parts[part] / GB:.1f}" for part in names[:-1]] + [f"**{parts['total'] / GB:.0f}**"]
            first = f"[{name}](../trl_score/configs/{name}.yaml)" if gpu == 24 else ""
            lines.append("| " + " | ".join([first, str(gpu), *map(str, sizes), *values]) + " |")
    return "\n".join(lines)


class Peak(TorchDispatchMode):
    """The most bytes that are allocated at a time within it, by tensors that it has seen made."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.now, self.most = WeakIdKeyDictionary(), 0, 0
        for tensor in known:
            self.seen[tensor.untyped_storage()] = 0

    def _gone(self, size: int):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


def measured(
    shape: dict,
    layers: int,
    precision: str,
    checkpointing: bool = True,
    grad: bool = True,
    autocast: bool = True,
    tokens: int = 512,
) -> float:
    """Bytes for each token, of a forward pass and, with `grad`, of the backward pass, on the CPU."""
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_hidden_layers=layers, vocab_size=512, tie_word_embeddings=True))
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, precision))
            parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    ids, mask = torch.randint(0, 512, (1, tokens)), torch.ones(1, tokens, dtype=torch.long)
    mask[:, :3] = 0  # padding, which makes attention take a mask
    with torch.set_grad_enabled(grad), Peak([*known, *model.buffers()]) as peak:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = (
                model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            )
        if grad:
            states.sum().backward()
    return peak.most / tokens


def check() -> None:
    for name in ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"):
        with torch.device("meta"):
            model = Qwen2ForCausalLM(MODELS[name])
            count = sum(parameter.numel() for parameter in model.parameters())
            adapted = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        print(f"{name}: {count:,} parameters, formula {sum(parameters(MODELS[name])):,}")
        print(f"{name}: {trainable:,} in an adapter of rank 32, formula {adapter_parameters(MODELS[name], 32):,}")

    matrix = torch.randn(1024, 1024, dtype=torch.bfloat16)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    size = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    print(f"NF4, bytes per weight: {size / matrix.numel():.4f}, formula {NF4:.4f}")

    print("\nbytes for each token (PyTorch's tensors, on the CPU, 512 tokens)   measured   formula   ratio")
    for label, shape in (("1.5B", SMALL), ("7B", LARGE)):
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        for precision, (a, b) in UPDATE.items():
            value = measured(shape, 1, precision)
            line(f"{label}, update, one layer, {precision} adapter", value, a * inner + b * hidden)
        value = measured(shape, 1, "float32", grad=False)
        line(f"{label}, no gradient, one layer", value, NO_GRAD[0] * inner + NO_GRAD[1] * hidden)
        for precision, (a, b) in PREFILL.items():
            value = measured(shape, 1, precision, grad=False, autocast=False)
            line(f"{label}, reading a prompt, one layer, {precision} adapter", value, a * inner + b * hidden)
    more = measured(SMALL, 3, "float32") - measured(SMALL, 2, "float32")
    line("1.5B, each more layer, with checkpointing", more, 2 * SMALL["hidden_size"])
    plain = [measured(SMALL, layers, "float32", checkpointing=False) for layers in (2, 3)]
    line("1.5B, each more layer, without checkpointing", plain[1] - plain[0], None)


def line(what: str, value: float, formula: float | None) -> None:
    rest = "" if formula is None else f"{formula:>10,.0f}{value / formula:>8.2f}"
    print(f"{what:<66}{value:>9,.0f}{rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated GPU memory of the configurations.")
    parser.add_argument("--check", action="store_true", help="Measure the parts of the formula on the CPU.")
    if parser.parse_args().check:
        check()
    else:
        print(table())


if __name__ == "__main__":
    main()
