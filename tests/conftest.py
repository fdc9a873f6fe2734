"""Fixtures. Each imports what it needs, so that the process which only hands out the tests to others is ready at once."""

import gc
import os
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never touch a hub
os.environ.setdefault("TRACKIO_DIR", os.path.join(tempfile.gettempdir(), "trl-score-tests-trackio"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores
    sharing = os.environ["PYTEST_XDIST_WORKER_COUNT"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(sharing))))
    os.environ.setdefault("LOCAL_WORLD_SIZE", sharing)  # divides the workers that grade

import pytest


def pytest_collection_finish():
    """Each training collects garbage. The million objects of the imported modules are none, so they need no look."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory):
    """A random model over three tokens (`a`, `b` and the end of sequence): all its attempts can be listed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("letters")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=1.0,  # far from uniform
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A random model that reads and writes any text, byte by byte, in ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("chat")
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[1], pad_token=special[1])
    fast.add_special_tokens({"additional_special_tokens": special[:1]})
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        pad_token_id=vocabulary["<|im_end|>"],
        eos_token_id=vocabulary["<|im_end|>"],
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def make_letters_trainer(letters_model, tmp_path):
    """A trainer over the letters model; keyword arguments go to the configuration."""
    from datasets import Dataset

    from trl_score import SCoReConfig, SCoReTrainer

    def make(reward=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path),
            "correction_instruction": "a b",
            "max_completion_length": 2,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "steps" if "save_steps" in kwargs else "no",
            "report_to": "none",
            "use_cpu": True,
        }
        return SCoReTrainer(
            letters_model,
            reward or (lambda completions, **_: [float("a" in completion) for completion in completions]),
            SCoReConfig(**(defaults | kwargs)),
            train_dataset=Dataset.from_dict({"prompt": ["a", "b b"] * 4}),
        )

    return make


@pytest.fixture
def arithmetic_config(tmp_path):
    """The configuration of a run of a few steps on the embedded task, as keyword arguments."""
    from trl_score.tasks import Arithmetic
    from trl_score.tasks.arithmetic import MAX_COMPLETION_LENGTH

    return {
        "output_dir": str(tmp_path / "run"),
        "correction_instruction": Arithmetic.correction_instruction,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
    }


@pytest.fixture
def make_arithmetic_trainer(arithmetic_config):
    """A trainer on the embedded task; keyword arguments go to the configuration, `trainer` ones to the trainer."""
    from trl_score import SCoReConfig, SCoReTrainer
    from trl_score.tasks import Arithmetic
    from trl_score.tasks.arithmetic import BASE_MODEL_PATH

    def make(trainer=None, num_test=20, **kwargs):
        task = Arithmetic(num_train=32, num_test=num_test)
        kwargs = {"save_strategy": "steps" if "save_steps" in kwargs else "no"} | kwargs
        defaults = {
            "model": str(BASE_MODEL_PATH),
            "reward_funcs": task.reward,
            "train_dataset": task.load("train"),
            "eval_dataset": task.load("test"),
        }
        return SCoReTrainer(args=SCoReConfig(**(arithmetic_config | kwargs)), **(defaults | (trainer or {})))

    return make


def make_qwen2():
    """A random model whose attention has biases."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=24, num_key_value_heads=2, max_position_embeddings=64, **sizes))
