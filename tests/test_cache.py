"""An attempt that goes on from the cache of the one before is the attempt that a reading of the whole context gives."""

import random
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_score import cache
from trl_score.cache import can_reuse_cache, reused_cache
from trl_score.rollout import roll_out
from trl_score.sampling import Decoding, TransformersSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


VOCABULARY, END, LIMIT = 12, 11, 6
ENDS = [9, 10, END]  # so many attempts end early, and some are cut off
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
MODELS = {
    "llama": ("llama", LLAMA),
    "llama, yarn": (
        "llama",
        {
            **LLAMA,
            "rope_parameters": {
                **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
            },
        },
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8}),
    "mistral without a window": ("mistral", {**LLAMA, "sliding_window": None}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 64, "max_position_embeddings": 128}),
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
UNSUPPORTED = {
    "sliding window": ("mistral", {**LLAMA, "sliding_window": 8}),
    "sliding and full": ("gemma3_text", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
    "linear attention": ("qwen3_next", {**LLAMA, "layer_types": ["linear_attention", "full_attention"]}),
    "state space": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}),
    "without position ids": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "frequencies of the length": ("llama", {**LLAMA, "rope_parameters": DYNAMIC}),
}
SAMPLED, GREEDY = {"do_sample": True, "temperature": 1.0, "top_k": 0}, {"do_sample": False}


def make(kind, settings):
    torch.manual_seed(0)
    special = {"eos_token_id": END, "pad_token_id": END, "bos_token_id": None, "initializer_range": 0.5}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, **special)).eval()


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules="all-linear", r=4)).eval()


class Reads:
    """For each `generate`: the columns that each forward got, and the logits of each row after it."""

    def __init__(self, model):
        self.columns, self.logits = [], []
        self.hook = model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.columns[-1].append(kwargs["input_ids"].size(1))
        self.logits[-1].append(output.logits[:, -1])

    def start(self):
        self.columns.append([])
        self.logits.append([])


def run(model, reuse, how=SAMPLED, rows=7, attempts=3):
    """Prompts, attempts and bridges of different lengths in each row."""
    draw = random.Random(0)

    def ids(least, most):
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(least, most))]

    prompts = [ids(1, 9) for _ in range(rows)]
    reads = Reads(model.get_base_model() if hasattr(model, "peft_config") else model)
    torch.manual_seed(0)

    def generate(contexts, attempt):
        reads.start()
        longest = max(map(len, contexts))
        padded = torch.tensor([[END] * (longest - len(each)) + each for each in contexts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in contexts])
        config = GenerationConfig(max_new_tokens=LIMIT, eos_token_id=ENDS, pad_token_id=END, **how)
        with torch.no_grad():
            out = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        ends = [next((i for i, token in enumerate(row) if token in ENDS), LIMIT) for row in out]
        return [row[: end + 1] for row, end in zip(out, ends, strict=True)], None

    with reused_cache(model) if reuse else nullcontext():
        rollouts = roll_out(prompts, generate, lambda attempt, before: [ids(1, 7) for _ in before], attempts)
    reads.hook.remove()
    return rollouts, reads


@pytest.fixture(params=[*MODELS, "lora"])
def model(request):
    return with_adapter(make(*MODELS["llama"])) if request.param == "lora" else make(*MODELS[request.param])


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("how", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_logits_are_those_of_the_whole_context(model, how, rows):
    """Each step of each attempt, against one forward over the row's tokens alone, without padding."""
    rollouts, reads = run(model, reuse=True, how=how, rows=rows)
    lengths = {len(attempt) for row in rollouts.attempts for attempt in row}
    assert rows == 1 or (min(lengths) < LIMIT and max(lengths) == LIMIT)
    for k in range(3):
        for row, context in enumerate(rollouts.context_ids(k + 1)):
            attempt = rollouts.attempts[row][k]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([context + attempt])).logits[0, len(context) - 1 : -1]
            got = torch.stack([logits[row] for logits in reads.logits[k][: len(attempt)]])
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_attempts_are_the_same_with_and_without(model, how):
    assert run(model, True, how)[0] == run(model, False, how)[0]


def test_no_token_is_read_twice(model):
    """Of a later context only the longest bridge is read, and the last token where an attempt was cut off."""
    rollouts, reads = run(model, reuse=True)
    for k in (1, 2):
        new = [
            len(bridges[k - 1]) + (len(attempts[k - 1]) == max(len(row[k - 1]) for row in rollouts.attempts))
            for attempts, bridges in zip(rollouts.attempts, rollouts.bridges, strict=True)
        ]
        assert reads.columns[k] == [max(new)] + [1] * (len(reads.columns[k]) - 1)
    _, reads = run(model, reuse=False)
    assert [columns[0] for columns in reads.columns] == [max(map(len, rollouts.context_ids(k))) for k in (1, 2, 3)]


def test_rows_that_do_not_agree_are_read_again():
    """Also where nothing agrees, in the number of rows or in their tokens; and rows that changed places."""
    model = make(*MODELS["llama"])
    rows = torch.tensor([[END, 1, 2, 3], [4, 5, 6, 7]])
    masks = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    swapped, reversed_ids, one = (
        (rows.flip(0), masks.flip(0)),
        (rows.flip(1), masks.flip(1).fill_(1)),
        (rows[1:], masks[1:]),
    )
    settings = {"generation_config": GenerationConfig(max_new_tokens=3, min_new_tokens=3, pad_token_id=END)}
    calls = [(rows, masks), (rows, masks), swapped, reversed_ids, one]
    expected = [model.generate(input_ids=ids, attention_mask=mask, **settings) for ids, mask in calls]
    reads = Reads(model)
    with reused_cache(model):
        for (ids, mask), tokens in zip(calls, expected, strict=True):
            reads.start()
            assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), tokens)
    assert [columns[0] for columns in reads.columns] == [4, 1, 4, 4, 4]


def test_cache_is_gone_after_the_last_attempt(monkeypatch):
    model, made = make(*MODELS["llama"]), []

    class Recorded(cache.DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(cache, "DynamicCache", Recorded)
    run(model, reuse=True)
    assert len(made) == 1 and made[0]() is None  # one for all attempts
    assert "generate" not in vars(model)


# What cannot be supported


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_caches_are_not_reused(name):
    assert not can_reuse_cache(make(*UNSUPPORTED[name]))


def test_supported_models_are_known():
    for settings in MODELS.values():
        assert can_reuse_cache(make(*settings))
    model = make(*MODELS["llama"])
    assert can_reuse_cache(with_adapter(model))
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not can_reuse_cache(get_peft_model(make(*MODELS["llama"]), virtual))
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert not can_reuse_cache(T5ForConditionalGeneration(t5))


@pytest.mark.parametrize(
    "option",
    [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda option: next(iter(option)),
)
def test_other_decoding_is_left_alone(option):
    model = make(*MODELS["llama"])
    how = {"do_sample": False, "disable_compile": True, **option}
    rows = 1 if "prompt_lookup_num_tokens" in option else 3  # for one row only
    assert run(model, True, how, rows, attempts=2)[0] == run(model, False, how, rows, attempts=2)[0]


# In training and in evaluation


@pytest.fixture
def first_forwards(monkeypatch):
    """Columns of the contexts of each attempt, and those that the first forward got."""
    found = []
    generate = GenerationMixin.generate

    def counted(self, *args, **kwargs):
        reads = Reads(self)
        reads.start()
        try:
            return generate(self, *args, **kwargs)
        finally:
            reads.hook.remove()
            found.append((kwargs["input_ids"].size(1), reads.columns[0][0]))
            assert set(reads.columns[0][1:]) <= {1}

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    return found


def logs(trainer):
    trainer.train()
    compared = ("loss", "grad_norm", "reward_t1", "reward_t2", "kl_t1", "kl_t2", "edit_distance_ratio")
    return [[log[key] for key in compared] for log in trainer.state.log_history if "loss" in log]


LORA = {"trainer": {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)}}


@pytest.mark.parametrize(
    "options",
    [{"num_attempts": 3}, {"gradient_checkpointing": True}, LORA, {"bf16": True}],
    ids=["three attempts", "gradient checkpointing", "lora", "bf16"],
)
def test_training_reads_the_first_context_only(options, make_arithmetic_trainer, first_forwards):
    trainer = make_arithmetic_trainer(max_steps=2, stage1_steps=1, **options)
    trainer.train()
    trainer.evaluate()
    attempts = trainer.args.num_attempts
    for k, (context, read) in enumerate(first_forwards):
        assert read == context if k % attempts == 0 else read <= 14 < context
    assert len(first_forwards) == attempts * (2 + 3)  # 20 problems of the evaluation in batches of 8


def test_training_is_the_same_with_and_without(make_arithmetic_trainer, first_forwards):
    expected = logs(make_arithmetic_trainer(num_attempts=3, reuse_cache=False))
    assert all(context == read for context, read in first_forwards)
    assert logs(make_arithmetic_trainer(num_attempts=3)) == [pytest.approx(log, abs=1e-4) for log in expected]


def test_stored_first_attempts_are_read(make_arithmetic_trainer, first_forwards):
    """They were not generated; with three attempts the third goes on from the second. No attempt is another one for it."""
    task = Arithmetic(num_train=32)
    rows = task.load("train").map(lambda row: {"first_attempts": ["1 + 1 = 2 .", "7"]})
    options = {"offline_first_attempts": 0.5, "num_attempts": 3, "trainer": {"train_dataset": rows}}
    trained = logs(make_arithmetic_trainer(**options))
    (first, second, third), *_ = zip(*[iter(first_forwards)] * 3, strict=True)
    assert first[0] == first[1] and second[0] == second[1] and third[1] < third[0]
    expected = logs(make_arithmetic_trainer(reuse_cache=False, **options))
    assert trained == [pytest.approx(log, abs=1e-4) for log in expected]


def test_evaluation_goes_on_from_the_cache(first_forwards):
    prompts, instructions = Arithmetic().load("test")["prompt"][:20], [Arithmetic.correction_instruction] * 2
    decoding = Decoding(temperature=1.0, max_completion_length=8)
    attempts = {
        reuse: TransformersSampler(str(BASE_MODEL_PATH), reuse_cache=reuse).sample(prompts, instructions, decoding, 0)
        for reuse in (True, False)
    }
    assert attempts[True] == attempts[False]
    assert [context == read for context, read in first_forwards] == [True, False, False, True, True, True]
