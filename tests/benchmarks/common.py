"""What the benchmarks share: random models with a tokenizer, problems, seconds inside of functions, lines of numbers."""

import functools
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from itertools import islice, product
from string import ascii_lowercase
from unittest.mock import patch

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TURN = 21  # tokens of a bridge beside the instruction
QWEN = {  # of Qwen2.5
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
}
LLAMA = {
    "tiny": (96, 288, 3, 4, 2, 8192),
    "30m": (512, 1536, 8, 8, 4, 8192),
    "135m": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
}
SIZES = [*LLAMA, *QWEN]
logging.disable_progress_bar()


def model_config(size: str) -> PreTrainedConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = (LLAMA | QWEN)[size]
    return (LlamaConfig if size in LLAMA else Qwen2Config)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=size != "7b",
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def make_model(size: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, made where it is to run."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(model_config(size), dtype=dtype)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Reads text byte by byte, in ChatML; writes a word for each of the other tokens."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = islice(product(ascii_lowercase, repeat=4), vocabulary - len(letters) - len(SPECIAL))
    tokens = [*letters, *("Ġ" + "".join(word) for word in words), *SPECIAL]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[:1]})
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def save_model(size: str, folder: str, dtype: torch.dtype = torch.float32) -> int:
    """Model and tokenizer, to be read from the folder as any model is. Returns the number of parameters."""
    model = make_model(size, dtype)
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return model.num_parameters()


def lengths(most: int, number: int) -> list[int]:
    """From half of it on."""
    return torch.linspace(most // 2, most, number).long().tolist()


def random_ids(most: int, number: int, vocabulary: int) -> list[list[int]]:
    return [torch.randint(1, vocabulary - 1, (length,)).tolist() for length in lengths(most, number)]


def text(tokens: int) -> str:
    return ("Think again. " * tokens)[:tokens]


def problems(most: int, number: int) -> Dataset:
    """Prompts of up to so many tokens."""
    rows = [[{"role": "user", "content": text(max(1, length - TURN + 2))}] for length in lengths(most, number)]
    return Dataset.from_dict({"prompt": rows})


def reward(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ragged_lengths(mean: int, rows: int, attempts: int, group: int = 8) -> list[list[int]]:
    """
    Tokens of each attempt of each rollout: log-normal, with about this mean and at most five times as many. Half of the variance
    of the logarithm is that of the problem, which so many rollouts in a row share.
    """
    sigma = 0.8
    problem = torch.randn(-(-rows // group), 1).repeat_interleave(group, 0)[:rows]
    z = (problem + torch.randn(rows, attempts)) * 0.5**0.5
    drawn = torch.exp(z * sigma - sigma**2 / 2) * mean
    return drawn.round().clamp(1, 5 * mean).int().tolist()


def cpu_seconds(function: Callable, check: Callable | None = None) -> float:
    """
    What a call takes: seconds on a GPU, else CPU seconds of this process, which other processes on a busy machine change
    little. `check` gets the result afterwards.
    """
    synchronize()
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    started = clock()
    result = function()
    synchronize()
    spent = clock() - started
    if check is not None:
        check(result)
    return spent


def peak_bytes(function: Callable) -> int:
    """Most memory in use during a call, beside what was there before, summed from PyTorch's allocations."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return in_use.max().item()


class Clock:
    """Seconds inside of functions, by name. What such a function calls is its own."""

    def __init__(self):
        self.seconds = Counter()
        self.running = False

    def around(self, function, name: str):
        @functools.wraps(function)  # transformers looks at what `forward` takes
        def timed(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running = True
            synchronize()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                self.seconds[name] += time.perf_counter() - started
                self.running = False

        return timed

    @contextmanager
    def on(self, functions: list[tuple[object, str, str]]):
        """For (object or class, its attribute, name)."""
        with ExitStack() as stack:
            for owner, attribute, name in functions:
                stack.enter_context(patch.object(owner, attribute, self.around(getattr(owner, attribute), name)))
            yield


def header(parameters: int, rest: str) -> None:
    where = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    )
    print(f"{where}, torch {torch.__version__}, {parameters / 1e6:,.0f}M parameters, {rest}")


def columns(what: str) -> None:
    print(f"{what:<62}{'median':>10}{'least':>10}{'most':>10}")


def line(what: str, values: list[float], digits: int = 3) -> None:
    numbers = (statistics.median(values), min(values), max(values))
    print(f"{what:<62}" + "".join(f"{number:>10,.{digits}f}" for number in numbers), flush=True)
