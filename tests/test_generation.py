"""All attempts in one `generate`: what is sampled, and from which logits, is as with a reading of the whole context for each attempt."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_score.generation import AllAttempts, can_generate_all
from trl_score.rollout import roll_out
from trl_score.sampling import Decoding, TransformersSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


VOCABULARY, END, LIMIT = 12, 11, 6
ENDS = [9, 10, END]  # so many attempts end early, and some are cut off
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR = {
    **{
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
MODELS = {
    "llama": ("llama", LLAMA),
    "llama, yarn": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 64, "max_position_embeddings": 128}),
    "sliding window": ("mistral", {**LLAMA, "sliding_window": 8}),
    "sliding and full": ("gemma3_text", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
    "linear attention": ("qwen3_next", {**LLAMA, **LINEAR}),
    "state space": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "without position ids": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
SAMPLED, GREEDY = {"do_sample": True, "temperature": 1.0, "top_k": 0}, {"do_sample": False}
PLAIN = GenerationConfig(max_new_tokens=LIMIT, **GREEDY)


def make(kind, settings):
    torch.manual_seed(0)
    special = {"eos_token_id": END, "pad_token_id": END, "bos_token_id": None, "initializer_range": 0.5}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, **special)).eval()


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules="all-linear", r=4)).eval()


def padded(contexts):
    longest = max(map(len, contexts))
    ids = torch.tensor([[END] * (longest - len(each)) + each for each in contexts])
    return ids, torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in contexts])


def problems(rows, attempts=3):
    """Prompts and, for each attempt but the last, bridges, of different lengths in each row."""
    draw = random.Random(0)

    def ids(least, most):
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(least, most))]

    return [ids(1, 9) for _ in range(rows)], [[ids(1, 7) for _ in range(rows)] for _ in range(attempts - 1)]


def config(limit=LIMIT, **how):
    return GenerationConfig(max_new_tokens=limit, eos_token_id=ENDS, pad_token_id=END, **how)


def one_by_one(model, how=GREEDY, rows=7, attempts=3, first=None):
    """A `generate` for each attempt, which reads the whole context. `first`: first attempts that are not sampled."""
    prompts, bridges = problems(rows, attempts)

    def generate(contexts, attempt):
        ids, mask = padded(contexts)
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config(**how))
        output = output[:, ids.size(1) :].tolist()
        ends = [next((i for i, token in enumerate(row) if token in ENDS), LIMIT) for row in output]
        sampled = [row[: end + 1] for row, end in zip(output, ends, strict=True)]
        if attempt == 1 and first:
            sampled = [given or ids for given, ids in zip(first, sampled, strict=True)]
        return sampled, None

    return roll_out(prompts, generate, lambda attempt, _: bridges[attempt - 1], attempts)


class Forwards:
    """What goes through a model: columns and rows of each forward, and the logits of each sampled token."""

    def __init__(self, model, loop):
        self.loop, self.columns, self.rows, self.logits = loop, [], [], {}
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.hook = base.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        rows, columns = kwargs["input_ids"].shape
        self.rows.append(rows)
        self.columns.append(columns)
        for place, row in enumerate(self.loop.rows):
            if not (row.ended or row.unread):
                token = row.index, len(row.attempts) - 1, len(row.attempts[-1])
                self.logits[token] = output.logits[place, -1]


def together(model, how=GREEDY, rows=7, attempts=3, **options):
    """The same in one `generate`."""
    prompts, bridges = problems(rows, attempts)
    loop = AllAttempts(prompts, lambda attempt, row, _: bridges[attempt - 1][row], ENDS, attempts, **options)
    ids, mask = padded(loop.contexts)
    forwards = Forwards(model, loop)
    torch.manual_seed(0)
    with loop.instead_of_generate(model), torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config(**how))
    forwards.hook.remove()
    for row, tokens in enumerate(output.tolist()):
        expected = prompts[row] + loop.rollouts.completion_ids[row]
        start = ids.size(1) - len(loop.contexts[row])
        assert tokens[start : start + len(expected)] == expected
    return loop.rollouts, forwards


@pytest.fixture(params=[*MODELS, "lora"])
def model(request):
    return with_adapter(make(*MODELS["llama"])) if request.param == "lora" else make(*MODELS[request.param])


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("how", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_logits_are_those_of_the_whole_context(model, how, rows):
    """Each step of each attempt, against one forward over the row's tokens alone, without padding."""
    rollouts, forwards = together(model, how, rows)
    lengths = {len(attempt) for row in rollouts.attempts for attempt in row}
    assert rows == 1 or (min(lengths) < LIMIT and max(lengths) == LIMIT)
    for k in range(3):
        for row, context in enumerate(rollouts.context_ids(k + 1)):
            attempt = rollouts.attempts[row][k]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([context + attempt])).logits[0, len(context) - 1 : -1]
            got = torch.stack([forwards.logits.pop((row, k, i)) for i in range(len(attempt))])
            # A recurrent state adds up the rounding of all tokens before.
            atol = 1e-3 if getattr(model.config, "model_type", "") == "qwen3_next" else 2e-5
            torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)
    assert not forwards.logits


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 1e-6, "top_k": 0, "top_p": 0.5, "min_p": 0.1},
        {**GREEDY, "no_repeat_ngram_size": 2, "suppress_tokens": [3]},
        {**GREEDY, "use_cache": False},
    ],
    ids=["greedy", "top_k", "temperature", "no_repeat_ngram_size", "use_cache"],
)
def test_attempts_are_those_of_a_call_for_each(model, how):
    if how.get("use_cache") is False and model.config.model_type in ("mamba", "qwen3_next"):
        pytest.skip("recurrent models are read with a cache")
    assert together(model, how)[0] == one_by_one(model, how)


def test_no_token_is_read_twice_and_no_row_waits_for_another(model):
    """After the prompts the forwards read as many columns as the longest rollout has tokens, but for the last one."""
    rollouts, forwards = together(model)
    assert sum(forwards.columns) == max(map(len, rollouts.prompt_ids)) + max(map(len, rollouts.completion_ids)) - 1
    assert set(forwards.columns[1:]) == {1}  # no step finds all seven rows in a bridge


def test_a_bridge_that_all_rows_are_in_is_read_at_once(model):
    """One row is all rows. The state of a recurrent layer takes one token at a time."""
    rollouts, forwards = together(model, rows=1)
    columns = [len(rollouts.prompt_ids[0])]
    for attempt, bridge in zip(rollouts.attempts[0], [*rollouts.bridges[0], []], strict=True):
        columns += [1] * len(attempt) + [len(bridge)]
    if getattr(model.config, "model_type", "") in ("mamba", "qwen3_next"):
        columns = [columns[0]] + [1] * sum(columns[1:])
        assert forwards.columns == columns[:-1]
    else:
        assert forwards.columns == columns[:-2]


def test_a_state_beside_plain_layers_takes_one_token_at_a_time():
    """MiniMax has a cache of its own. One row, as its states do not leave out padding."""
    settings = {**LLAMA, "head_dim": 8, "num_local_experts": 2, "block_size": 8, "layer_types": LINEAR["layer_types"]}
    model = make("minimax", settings)
    assert together(model, rows=1)[0] == one_by_one(model, rows=1)


def test_rows_that_have_ended_are_dropped(model):
    _, forwards = together(model, rows=16)
    assert forwards.rows[0] == 16 and forwards.rows[-1] < 8
    assert forwards.rows == sorted(forwards.rows, reverse=True)


def test_attempts_are_sampled_from_the_distribution_of_the_model():
    """Chi-squared of 6,000 pairs of first tokens of both attempts, of at most two tokens, against their exact probabilities."""
    model, number, limit = make(*MODELS["llama"]), 6000, 2
    prompt, bridge = [1, 2, 3], [4, 5]
    loop = AllAttempts([prompt] * number, lambda *_: bridge, ENDS)
    torch.manual_seed(0)
    with torch.no_grad():
        model.generate(
            input_ids=torch.tensor([prompt] * number),
            generation_config=config(limit, **SAMPLED),
            custom_generate=loop,
        )

        def next_token(contexts):
            return model(input_ids=torch.tensor(contexts)).logits[:, -1].softmax(-1)

        first = next_token([prompt])[0]
        expected = torch.zeros(VOCABULARY, VOCABULARY)
        for token in range(VOCABULARY):
            if token in ENDS:
                expected[token] = first[token] * next_token([[*prompt, token, *bridge]])[0]
            else:
                second = next_token([[*prompt, token]])[0]
                after = next_token([[*prompt, token, other, *bridge] for other in range(VOCABULARY)])
                expected[token] = first[token] * (second @ after)
    counts = Counter((one[0], two[0]) for one, two in loop.rollouts.attempts)
    expected = expected.flatten() * number
    got = torch.tensor([counts[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]).float()
    common = expected >= 5
    freedom = int(common.sum()) - 1
    assert freedom > 20
    chi_squared = ((got - expected)[common].square() / expected[common]).sum().item()
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_stored_first_attempts_are_part_of_the_context(model):
    """Of some rows. One is empty, one is longer than an attempt may be."""
    first = [None, [1, 2], None, [], [3] * 9, [END], None]
    rollouts, forwards = together(model, stored=first)
    assert [row[0] for row, ids in zip(rollouts.attempts, first, strict=True) if ids is not None] == [
        ids for ids in first if ids is not None
    ]
    read = [sum(map(len, row)) for row in rollouts.attempts]
    read = [n + sum(map(len, row)) for n, row in zip(read, rollouts.bridges, strict=True)]
    before = [0 if ids is None else len(ids) + len(row[0]) for ids, row in zip(first, rollouts.bridges, strict=True)]
    assert sum(forwards.columns[1:]) == max(n - known for n, known in zip(read, before, strict=True)) - 1
    assert not any(k == 0 and first[row] is not None for row, k, _ in forwards.logits)
    greedy = one_by_one(model, first=first)
    for row, ids in enumerate(first):
        if ids != []:  # which the other function cannot be told
            assert rollouts.attempts[row] == greedy.attempts[row]


def test_a_bridge_depends_on_its_attempt():
    """Of attempts that were cut off and of attempts that ended, by different tokens."""
    model, seen = make(*MODELS["llama"]), []
    prompts, _ = problems(9)

    def bridge(attempt, row, ids):
        seen.append((attempt, row, list(ids)))
        return [ids[-1], attempt] if ids[-1] in ENDS else [attempt] * 3

    loop = AllAttempts(prompts, bridge, ENDS, 3)
    ids, mask = padded(prompts)
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config(**GREEDY), custom_generate=loop)
    assert len(seen) == 18
    for attempt, row, ids in seen:
        assert loop.rollouts.attempts[row][attempt - 1] == ids
        expected = [ids[-1], attempt] if ids[-1] in ENDS else [attempt] * 3
        assert loop.rollouts.bridges[row][attempt - 1] == expected
    assert len({ids[-1] in ENDS for _, _, ids in seen}) == 2


def test_a_process_takes_part_until_all_have_finished(monkeypatch):
    """With weights in shards every forward is collective: here another process needs four steps more."""
    model = make(*MODELS["llama"])
    alone, forwards = together(model)
    more = iter([True] * 4 + [False])
    monkeypatch.setattr(
        type(model),
        "_has_unfinished_sequences",
        lambda self, finished, synced, device: (not finished) or (synced and next(more)),
    )
    synced, others = together(model, synced=True)
    assert synced == alone and len(others.columns) == len(forwards.columns) + 4


def test_a_processor_of_the_caller_finds_the_rows():
    """Rows leave the batch, so a logits processor looks at `rows`. Benchmarks set the lengths of attempts in this way."""
    lengths = [[4, 2], [1, 3], [3, 3], [2, 1], [1, 1]]
    prompts, bridges = problems(5, 2)
    loop = AllAttempts(prompts, lambda attempt, row, _: bridges[0][row], [END])

    class Lengths(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for place, row in enumerate(loop.rows):
                last = len(row.attempts[-1]) + 1 == lengths[row.index][len(row.attempts) - 1]
                scores[place, END] = torch.inf if last else -torch.inf
            return scores

    ids, mask = padded(prompts)
    make(*MODELS["llama"]).generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(max_new_tokens=LIMIT, do_sample=False),
        logits_processor=LogitsProcessorList([Lengths()]),
        custom_generate=loop,
    )
    assert [list(map(len, row)) for row in loop.rollouts.attempts] == lengths


# What cannot be supported


@pytest.mark.parametrize(
    "option",
    [
        *(
            {"num_beams": 2},
            {"cache_implementation": "static"},
            {"prompt_lookup_num_tokens": 2},
            {"num_return_sequences": 2, "do_sample": True},
        ),
        *(
            {"min_new_tokens": 2},
            {"repetition_penalty": 1.2},
            {"stop_strings": ["."]},
            {"max_time": 1.0},
            {"guidance_scale": 2.0},
        ),
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_count_from_the_start_of_the_call_are_left_alone(option):
    model = make(*MODELS["llama"])
    assert can_generate_all(model, PLAIN)
    assert can_generate_all(model, GenerationConfig(max_new_tokens=LIMIT, repetition_penalty=1.0, **SAMPLED))
    assert not can_generate_all(model, GenerationConfig(max_new_tokens=LIMIT, **option))


def test_models_that_are_left_alone():
    model = make(*MODELS["llama"])
    assert can_generate_all(with_adapter(make(*MODELS["llama"])), PLAIN)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not can_generate_all(get_peft_model(make(*MODELS["llama"]), virtual), PLAIN)
    activated = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    assert not can_generate_all(get_peft_model(make(*MODELS["llama"]), activated), PLAIN)
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert not can_generate_all(T5ForConditionalGeneration(t5), PLAIN)
    model.generate = lambda **_: None  # somebody else's
    assert not can_generate_all(model, PLAIN)


# In training and in evaluation


@pytest.fixture
def calls(monkeypatch):
    """The rows of each `generate`, and the columns that its forwards read."""
    found, generate = [], GenerationMixin.generate

    def counted(self, *args, **kwargs):
        forwards = Forwards(self, SimpleNamespace(rows=[]))
        try:
            return generate(self, *args, **kwargs)
        finally:
            forwards.hook.remove()
            found.append((len(kwargs["input_ids"]), kwargs["input_ids"].size(1), forwards.columns))

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    return found


LORA = {"trainer": {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)}}


@pytest.mark.parametrize(
    "options",
    [{"num_attempts": 3}, {"gradient_checkpointing": True}, LORA, {"bf16": True}],
    ids=["three attempts", "gradient checkpointing", "lora", "bf16"],
)
def test_training_generates_once_for_all_attempts(options, make_arithmetic_trainer, calls):
    trainer = make_arithmetic_trainer(max_steps=2, stage1_steps=1, **options)
    trainer.train()
    trainer.evaluate()
    assert [rows for rows, _, _ in calls] == [8, 8, 8, 8, 4]  # two steps, 20 problems
    # No context is read again: a forward reads one token, or a bridge that all rows are in.
    assert all(columns[0] == context and max(columns[1:]) < context for _, context, columns in calls)
    assert "generate" not in vars(trainer.model)


def test_the_trainer_decodes_the_attempts_of_a_call_for_each(make_arithmetic_trainer, calls):
    apart, one = make_arithmetic_trainer(num_attempts=3, reuse_cache=False), make_arithmetic_trainer(num_attempts=3)
    problems = one.eval_dataset["prompt"]
    assert one.generate_attempts(problems) == apart.generate_attempts(problems)
    assert len(calls) == 1 + 3


def test_an_override_of_the_trainers_sampling_counts(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer()
    trainer._generate_single_turn = lambda ids, *_, **__: ([[7]] * len(ids), None)
    trainer.generate_attempts(trainer.eval_dataset["prompt"][:2])
    assert trainer._batch.rollouts.attempts == [[[7], [7]]] * 2


def test_stored_first_attempts_are_read_in_the_same_call(make_arithmetic_trainer, calls):
    """Half of the rollouts have one. No attempt is another one for it."""
    rows = Arithmetic(num_train=32).load("train").map(lambda row: {"first_attempts": ["1 2", "7"]})
    trainer = make_arithmetic_trainer(
        offline_first_attempts=0.5, num_attempts=3, max_steps=1, trainer={"train_dataset": rows}
    )
    trainer.train()
    assert [rows for rows, _, _ in calls] == [8] and max(calls[0][2][1:]) < calls[0][1]
    texts = [trainer._tokenizer.decode(row[0]) for row in trainer._batch.rollouts.attempts]
    stored = [ids is not None for ids in trainer._batch.stored]
    assert stored == [False, False, True, True] * 2
    assert {text for text, given in zip(texts, stored, strict=True) if given} == {"1 2", "7"}
    assert all(len(row) == 3 and len(row[1]) > 0 for row in trainer._batch.rollouts.attempts)


def test_evaluation_generates_once_for_all_attempts(calls):
    prompts, instructions = Arithmetic().load("test")["prompt"][:20], [Arithmetic.correction_instruction] * 2
    decoding = Decoding(max_completion_length=8)
    attempts = {
        reuse: TransformersSampler(str(BASE_MODEL_PATH), reuse_cache=reuse).sample(prompts, instructions, decoding, 0)
        for reuse in (True, False)
    }
    assert attempts[True] == attempts[False]
    assert len(calls) == 1 + 3


def test_a_seed_repeats_the_attempts_of_an_evaluation():
    sampler, prompts = TransformersSampler(str(BASE_MODEL_PATH)), Arithmetic().load("test")["prompt"][:20]
    one, same, other = (
        sampler.sample(prompts, [Arithmetic.correction_instruction], Decoding(1.0, max_completion_length=8), seed)
        for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_the_head_gets_no_slice(make_arithmetic_trainer, reuse_cache):
    """A frozen head would be copied for each row of it, on a CPU."""
    trainer = make_arithmetic_trainer(reuse_cache=reuse_cache, **LORA)
    sampler = TransformersSampler(str(BASE_MODEL_PATH), reuse_cache=reuse_cache)
    prompts, seen = trainer.eval_dataset["prompt"][:4], []
    for model in (trainer.model, sampler.model):
        model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(args[0]))
    trainer.generate_attempts(prompts)
    in_training = len(seen)
    sampler.sample(prompts, [Arithmetic.correction_instruction], Decoding(max_completion_length=8), 0)
    assert 0 < in_training < len(seen)
    assert all(each.is_contiguous() for each in seen)
    assert not trainer.model.get_output_embeddings()._forward_pre_hooks
