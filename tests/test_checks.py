"""A run that cannot work is refused before it trains, and the reference is the model that the run starts from."""

import shutil
import warnings
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import transformers
from conftest import make_qwen2
from datasets import Dataset, IterableDataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    KasaConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import create_model_from_path

from trl_score.checks import check_devices, check_schedule, check_stage1_steps, length_of_run, warn_of_dropout
from trl_score.context import ContextCheck
from trl_score.objective import Stage, stage_one, stage_two, two_stages
from trl_score.reference import check_adapter, check_reference_is_fixed, check_start
from trl_score.rollout import Bridge
from trl_score.sampling import TransformersSampler
from trl_score.score_trainer import SCoReTrainer
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def first_kl(trainer):
    trainer.args.save_strategy = "no"
    trainer.train()
    return next(log["kl"] for log in trainer.state.log_history if "kl" in log)


def base_model(**kwargs):
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH, **kwargs)


# The reference: adapters


@pytest.mark.parametrize(
    "setting",
    [
        *({"init_lora_weights": init} for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")),
        pytest.param(
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            marks=pytest.mark.skipif(find_spec("scipy") is None, reason="PEFT needs scipy for it"),
        ),
        {"kasa_config": KasaConfig()},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_adapters_that_rewrite_or_train_the_base_are_refused(make_arithmetic_trainer, setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"`{name}.*the model under the adapter.* (Set it to|Leave it out)"):
        make_arithmetic_trainer({"peft_config": LoraConfig(**LINEAR, **setting)})


def test_adapter_that_rewrote_the_base_is_refused_when_it_is_given(make_arithmetic_trainer):
    model = get_peft_model(base_model(), LoraConfig(r=4, init_lora_weights="pissa", **LINEAR))
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` changes the weights under the adapter"):
        make_arithmetic_trainer({"model": model})


def test_without_a_reference_any_adapter_trains(make_arithmetic_trainer):
    adapter = LoraConfig(r=4, init_lora_weights="olora", **LINEAR)
    make_arithmetic_trainer({"peft_config": adapter}, beta=0.0, stage1_beta=0.0, max_steps=1).train()


ADAPTERS = {
    "LoRA": LoraConfig(**LINEAR),
    "rsLoRA": LoraConfig(use_rslora=True, **LINEAR),
    "DoRA": LoraConfig(use_dora=True, **LINEAR),
    "gaussian": LoraConfig(init_lora_weights="gaussian", **LINEAR),
    "orthogonal": LoraConfig(init_lora_weights="orthogonal", r=4, **LINEAR),
    "lora_bias": LoraConfig(lora_bias=True, **LINEAR),
    "modules_to_save": LoraConfig(modules_to_save=["embed_tokens"], **LINEAR),
    "norms": LoraConfig(modules_to_save=["norm"], **LINEAR),
    "tokens": LoraConfig(trainable_token_indices=[1, 2, 3], **LINEAR),
    "IA3": IA3Config(feedforward_modules=["up_proj"], **LINEAR),
    "AdaLoRA": AdaLoraConfig(total_step=100, **LINEAR),
    "VeRA": VeraConfig(**LINEAR | {"target_modules": ["q_proj"]}),
    "LoHa": LoHaConfig(**LINEAR),
    "LN": LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_whose_base_comes_back_are_accepted(name):
    """Measured: whatever is trained, the disabled adapter gives the base model back."""
    model, ids = make_qwen2(), torch.arange(8)[None]
    before = model(ids).logits
    adapted = get_peft_model(model, ADAPTERS[name])
    check_adapter(ADAPTERS[name])
    check_reference_is_fixed(adapted)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, before)
    assert not torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize("name", ["DoRA", "modules_to_save", "tokens", "IA3"])
def test_a_run_with_an_adapter_starts_at_the_reference(make_arithmetic_trainer, name):
    assert first_kl(make_arithmetic_trainer({"peft_config": ADAPTERS[name]}, max_steps=1)) < 1e-6


@pytest.mark.parametrize("where", ["lm_head", "norm", "q_proj"])
def test_base_parameters_that_train_beside_the_adapter_are_refused(make_arithmetic_trainer, where):
    model = get_peft_model(base_model(), LoraConfig(**LINEAR))
    for name, parameter in model.named_parameters():
        if where in name and "lora_" not in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="Training would move the reference"):
        make_arithmetic_trainer({"model": model})


def test_what_is_measured_on_the_adapter_leaves_it_as_it_was():
    """A user's own frozen adapter parameters stay frozen, and the model stays in its mode."""
    model = get_peft_model(make_qwen2(), LoraConfig(**LINEAR)).train()
    next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    check_reference_is_fixed(model)
    assert before == [parameter.requires_grad for parameter in model.parameters()] and model.training


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_are_found_by_measurement(kind):
    model = get_peft_model(make_qwen2(), LoraConfig(bias=kind, **LINEAR))
    with pytest.raises(ValueError, match=r"trained parameters, such as '.*bias'"):
        check_reference_is_fixed(model)
    check_adapter(LoraConfig(**LINEAR))


# The reference: models


def merged_model():
    """As after supervised fine-tuning: base and trained adapter in one."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(), LoraConfig(r=4, init_lora_weights=False, **LINEAR)).merge_and_unload()
    return model.requires_grad_(True)


def resized_model():
    model = base_model()
    model.resize_token_embeddings(model.config.vocab_size + 5)
    return model


def edited_model():
    model = base_model()
    with torch.no_grad():
        model.lm_head.weight[3] += 0.5
    return model


@pytest.mark.parametrize(("make", "dtype"), [
    (merged_model, torch.float32), (edited_model, torch.float32), (resized_model, torch.float32), (resized_model, torch.bfloat16)
], ids=lambda value: getattr(value, "__name__", str(value)))  # fmt: skip
def test_the_reference_of_a_model_object_has_the_weights_of_the_object(make_arithmetic_trainer, make, dtype):
    model = make().to(dtype)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_arithmetic_trainer({"model": model}, max_steps=1)
    assert first_kl(trainer) <= (0 if dtype == torch.float32 else 1e-3)
    reference = trainer.ref_model.state_dict()
    assert expected.keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in expected.items())


def test_a_model_object_under_an_adapter_is_its_own_reference(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer({"model": merged_model(), "peft_config": LoraConfig(**LINEAR)}, max_steps=1)
    assert first_kl(trainer) == 0


def test_a_model_object_from_no_folder_is_refused(make_arithmetic_trainer):
    for path in ("", "/nowhere/at/all"):
        model = base_model()
        model.config._name_or_path = path
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
        with pytest.raises(ValueError, match=r"the folder that it was loaded from, which was not found .* Save it"):
            make_arithmetic_trainer({"model": model, "processing_class": tokenizer})


def test_a_model_object_with_other_layers_than_its_folder_is_refused(make_arithmetic_trainer):
    model = base_model()
    del model.model.layers[1]
    with pytest.raises(ValueError, match="has other weights than its folder"):
        make_arithmetic_trainer({"model": model})


@pytest.mark.parametrize("given", ["model", "folder"])
def test_an_adapter_that_transformers_loaded_is_refused(make_arithmetic_trainer, tmp_path, given):
    """It is no `PeftModel`, so TRL would not disable it for the reference."""
    model = base_model()
    model.add_adapter(LoraConfig(r=4, **LINEAR))
    if given == "folder":
        model.save_pretrained(tmp_path)
        model = str(tmp_path)
        shutil.copytree(BASE_MODEL_PATH, model, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="carries an adapter that transformers loaded into it"):
        make_arithmetic_trainer({"model": model})


UNSCORABLE = {
    "RecurrentGemma": {"num_attention_heads": 2, "lru_width": 16, "logits_soft_cap": 0.5, "initializer_range": 1.0},
    "Rwkv": {"attention_hidden_size": 16},
    "GraniteMoe": {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2},
    "Llama": {"num_attention_heads": 2, "tie_word_embeddings": True},
}


def random_model(kind, folder, seed=0, scale=4.0):
    """A random model of some kind, by default far from uniform, with the tokenizer of the embedded one."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    special = {"eos_token_id": 17, "pad_token_id": 14, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**sizes, **special, **UNSCORABLE[kind])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE_MODEL_PATH / name, folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "how"), [("RecurrentGemma", {}), ("Rwkv", {}), ("Rwkv", {"seed": 23, "scale": 1.0})])
def test_a_model_that_samples_from_other_logits_than_are_scored_is_refused(
    make_arithmetic_trainer, tmp_path, kind, how
):
    """The first bounds its logits under a name of its own, the second reads the padding before a prompt, the third by 0.03 nats."""
    match = f"of this `{kind}ForCausalLM` differ from those that it samples from"
    with pytest.raises(ValueError, match=match):
        make_arithmetic_trainer({"model": random_model(kind, tmp_path / "model", **how)})


def test_what_trl_cannot_score_is_refused_with_the_remedy(make_arithmetic_trainer, tmp_path):
    """The experts of Granite have another name, and PEFT's wrapper of a tied head has no bias. Both remedies train."""
    granite, tied = (random_model(kind, tmp_path / kind) for kind in ("GraniteMoe", "Llama"))
    with pytest.raises(ValueError, match=r"`GraniteMoeForCausalLM`: .* set `router_aux_loss_coef=0`"):
        make_arithmetic_trainer({"model": granite})
    make_arithmetic_trainer({"model": granite}, router_aux_loss_coef=0.0, max_steps=2).train()
    tokens = LoraConfig(trainable_token_indices=[1, 2], **LINEAR)
    with pytest.raises(ValueError, match=r"`LlamaForCausalLM`: .* use `modules_to_save=\['embed_tokens'\]`"):
        make_arithmetic_trainer({"model": tied, "peft_config": tokens})
    embeddings = LoraConfig(modules_to_save=["embed_tokens"], **LINEAR)
    make_arithmetic_trainer({"model": tied, "peft_config": embeddings}, max_steps=2).train()


def test_an_adapter_of_another_name_than_trls_is_refused(make_arithmetic_trainer):
    model = get_peft_model(base_model(), LoraConfig(r=2, **LINEAR), adapter_name="mine")
    with pytest.raises(ValueError, match=r"named 'mine', but TRL reads the one named 'default'. Load it without"):
        make_arithmetic_trainer({"model": model})


def test_a_frozen_model_is_refused(make_arithmetic_trainer):
    model = merged_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"All parameters of the given model are frozen.*`merge_and_unload`"):
        make_arithmetic_trainer({"model": model})
    with pytest.raises(ValueError, match="All parameters of the given model are frozen"):
        make_arithmetic_trainer({"model": model}, beta=0.0, stage1_beta=0.0)


# The guard


def moved(trainer, scale):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return trainer


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 0.1),
        ({"peft_config": LoraConfig(**LINEAR)}, 0.1),
        ({"peft_config": LoraConfig(init_lora_weights=False, **LINEAR)}, 0.0),
        ({"peft_config": LoHaConfig(init_weights=False, **LINEAR)}, 0.0),
    ],
    ids=["full", "LoRA", "random LoRA", "random LoHa"],
)
def test_a_fresh_run_that_does_not_start_at_its_reference_stops(make_arithmetic_trainer, options, scale):
    """Whatever the cause: here weights that change between construction and training, or an adapter that is not zero."""
    trainer = moved(make_arithmetic_trainer(options), scale)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Before the first update the KL to the reference is .* per token, not 0"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_guard_sees_what_only_the_configuration_changed(make_arithmetic_trainer):
    model = base_model()
    model.config.rms_norm_eps = 1.0
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0
    with pytest.raises(ValueError, match="weights or a configuration that were edited after loading"):
        make_arithmetic_trainer({"model": model}).train()


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        ({}, {"bf16": True}),
        ({}, {"model_init_kwargs": {"dtype": "bfloat16"}}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"steps_per_generation": 2, "num_iterations": 2, "stage1_steps": 0}),
        ({"peft_config": LoraConfig(lora_dropout=0.5, **LINEAR)}, {}),
        ({"peft_config": LoraConfig(use_dora=True, **LINEAR)}, {"model_init_kwargs": {"dtype": "bfloat16"}}),
        (
            {
                "peft_config": LoraConfig(**LINEAR),
                "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            },
            {"bf16": True},
        ),
        ({}, {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_guard_lets_a_fresh_run_start_in_every_precision(make_arithmetic_trainer, trainer, settings):
    make_arithmetic_trainer(trainer, **{"max_steps": 2, **settings}).train()


def test_the_guard_looks_past_the_dropout_of_the_model(tmp_path, make_arithmetic_trainer):
    """The KL of a policy with dropout to its reference is not 0, and dropout of its base is also in an adapter's reference."""
    size = base_model().config.vocab_size
    GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, eos_token_id=17, pad_token_id=14)
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE_MODEL_PATH).save_pretrained(tmp_path)
    for adapter in (None, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")):
        trainer = make_arithmetic_trainer({"model": str(tmp_path), "peft_config": adapter}, max_steps=1)
        trainer.train()


def test_the_guard_leaves_runs_alone_that_do_not_start_at_their_reference(make_arithmetic_trainer, tmp_path):
    """A trained adapter, a named reference, a second call of `train`, and a resumed run."""
    model = get_peft_model(base_model(), LoraConfig(init_lora_weights=False, r=4, **LINEAR))
    model.save_pretrained(tmp_path / "adapter")
    given = PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True)
    make_arithmetic_trainer({"model": given}, max_steps=1).train()

    edited_model().save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(BASE_MODEL_PATH).save_pretrained(tmp_path / "other")
    options = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
    trainer = make_arithmetic_trainer(reference_model_name_or_path=str(tmp_path / "other"), **options)
    trainer.train()
    trainer.train()
    make_arithmetic_trainer(**options).train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")


@pytest.mark.parametrize(("kl", "is_float32", "stops"), [
    (0.0, True, False), (1e-9, True, False), (3e-5, True, True), (3e-5, False, False), (1e-3, False, False),
    (0.05, False, True), (6.0, False, True), (float("nan"), False, True), (float("inf"), True, True),
])  # fmt: skip
def test_the_bound_of_the_guard(kl, is_float32, stops):
    if stops:
        with pytest.raises(ValueError, match="the reference is not the model that this run starts from"):
            check_start(kl, is_float32)
    else:
        check_start(kl, is_float32)


# Stages and generations


RUNS = [
    {"steps_per_generation": 1},
    {"steps_per_generation": 2},
    {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 17},
    {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
    {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "max_steps": 5},
    {"steps_per_generation": 3, "gradient_accumulation_steps": 4, "max_steps": 7},
    {"max_steps": -1, "num_train_epochs": 1.5, "steps_per_generation": 3, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_generations_begin_where_they_are_expected(make_letters_trainer, settings):
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "stage1_steps": 0, **settings}
    trainer = make_letters_trainer(**settings)
    seen, make = [], trainer._generate_and_score_completions

    def generate(inputs):
        seen.append(trainer.state.global_step)
        return make(inputs)

    trainer._generate_and_score_completions = generate
    steps = trainer.train().global_step
    assert length_of_run(len(trainer.train_dataset), trainer.args) == (steps, sorted(set(seen)))


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"steps_per_generation": 8, "max_steps": 8}, 2),
        ({"num_iterations": 8, "max_steps": 8}, 2),
        ({"num_iterations": 4, "max_steps": 4, "stage1_steps": 0.25}, 2),
        ({"num_iterations": 4, "max_steps": 7, "stage1_steps": 5}, 2),
        ({"num_iterations": 4, "max_steps": 8, "stage1_steps": 6, "num_attempts": 3}, 2),
        ({"num_iterations": 4, "max_steps": 8, "stage1_steps": 4, "num_attempts": 3}, 1),  # Stage I(b)
        ({"steps_per_generation": 8, "max_steps": -1, "num_train_epochs": 1}, 2),
        ({"steps_per_generation": 16, "gradient_accumulation_steps": 2, "max_steps": 6}, 2),
    ],
    ids=str,
)
def test_a_stage_that_the_generation_window_skips_is_refused(make_letters_trainer, settings, stage):
    settings = {"per_device_train_batch_size": 2, "num_generations": 2} | settings
    if settings["steps_per_generation" if "steps_per_generation" in settings else "num_iterations"] == 16:
        settings["per_device_train_batch_size"] = 1
    with pytest.raises(ValueError, match=rf"Stage {stage} .* would be skipped.*`steps_per_generation`"):
        make_letters_trainer(**settings)


def test_a_stage_of_an_own_schedule_is_refused_if_it_is_skipped_or_nothing():
    alternating = lambda step, max_steps: stage_one(2) if step % 2 == 0 else stage_two(2)  # noqa: E731
    check_schedule(alternating, 8, list(range(8)), num_attempts=2)
    with pytest.raises(
        ValueError, match=r"Stage 2 \(attempts \(1, 2\) are credited\) would be skipped: it holds in 4"
    ):
        check_schedule(alternating, 8, [0, 2, 4, 6], num_attempts=2)
    held = lambda step, _: Stage(1, (2,), (1,) if step < 3 else ())  # noqa: E731
    with pytest.raises(ValueError, match=r"Stage 1 .* would be skipped: it holds in 1 steps from step 3 on"):
        check_schedule(held, 4, [0, 2], num_attempts=2)
    lists = lambda step, _: Stage(2, credited=[1, 2], held=[1])  # noqa: E731
    check_schedule(lists, 4, [0, 2], num_attempts=2)
    with pytest.raises(ValueError, match=r"credits the attempts \(3,\), but a rollout has `num_attempts=2`"):
        check_schedule(lambda step, _: Stage(1, (3,)), 4, [0, 2], num_attempts=2)
    with pytest.raises(TypeError, match=r"`schedule\(0, 4\)` returned `int`. Return a `trl_score.objective.Stage`"):
        check_schedule(lambda step, _: 1, 4, [0, 2], num_attempts=2)
    check_schedule(lambda s, m: two_stages(s, m, stage1_steps=9, num_attempts=2), 8, [0], num_attempts=2)


@pytest.mark.parametrize(("share", "max_steps", "message"), [
    (0.1, 4, r"`stage1_steps=0.1` rounds to none of the 4 steps, so Stage I would be left out"),
    (0.9, 4, r"`stage1_steps=0.9` rounds to all of the 4 steps, so Stage II would be left out"),
    (0.5, 2, None), (0.1, 10, None), (0, 4, None), (4, 4, None), (1, 4, None), (0.5, 1, None),
])  # fmt: skip
def test_a_share_that_leaves_out_a_stage_is_refused(make_letters_trainer, share, max_steps, message):
    """A share asks for both stages; 0 and `max_steps` ask for one, and a run of a single step has one."""
    if message is None:
        check_stage1_steps(share, max_steps)
        return
    with pytest.raises(ValueError, match=message):
        make_letters_trainer(stage1_steps=share, max_steps=max_steps)


def test_fewer_steps_than_attempts_to_train_are_warned_about():
    check_stage1_steps(2, 8, num_attempts=3)
    with pytest.warns(
        UserWarning, match=r"attempts 2 to 4 in turn, but `stage1_steps=2` gives it 2 of the 8 steps.*Set it to 3"
    ):
        check_stage1_steps(2, 8, num_attempts=4)


def test_more_steps_of_stage_one_than_the_run_has_are_warned_about(make_letters_trainer, recwarn):
    check_stage1_steps(4, 4)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="`stage1_steps=500` is more than the 4 steps of the run, so Stage II never"):
        make_letters_trainer(stage1_steps=500, max_steps=-1, num_train_epochs=1)


def test_a_share_of_epochs_is_checked_and_a_schedule_of_ones_own_is_not(make_letters_trainer, make_arithmetic_trainer):
    with pytest.raises(ValueError, match="rounds to none of the 4 steps"):
        make_letters_trainer(stage1_steps=0.1, max_steps=-1, num_train_epochs=1)
    own = {"schedule": lambda step, max_steps: stage_two(2)}
    assert make_arithmetic_trainer(own, stage1_steps=0.1, max_steps=4).stage_at(0) == stage_two(2)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("number", "settings"), [(7, {"per_device_train_batch_size": 32}), (1, {}), (
    3, {"per_device_train_batch_size": 4, "steps_per_generation": 4}
)])  # fmt: skip
def test_fewer_problems_than_a_generation_needs_are_refused(make_arithmetic_trainer, number, settings, is_streamed):
    rows = Arithmetic(num_train=number).load("train")
    rows = stream(list(rows)) if is_streamed else rows
    with pytest.raises(ValueError, match=rf"`train_dataset` has {number} problems, but one generation takes"):
        make_arithmetic_trainer({"train_dataset": rows, "eval_dataset": None}, **settings)


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_a_run_without_a_step_is_refused(make_letters_trainer, settings):
    with pytest.raises(ValueError, match=r"`max_steps=.*` and `num_train_epochs=.*` leave no step to train"):
        make_letters_trainer(**settings)


def test_as_many_problems_as_a_generation_needs_train(make_arithmetic_trainer):
    for rows in (Arithmetic(num_train=2).load("train"), stream(list(Arithmetic(num_train=2).load("train")))):
        trainer = make_arithmetic_trainer({"train_dataset": rows, "eval_dataset": None}, max_steps=1)
        assert trainer.train().global_step == 1


# Context


def long_rows(at, number=30, **columns):
    """Rows of the embedded task, of which one has a prompt of 60 numbers."""
    rows = list(Arithmetic(num_train=number).load("train"))
    rows[at]["prompt"] = [{"role": "user", "content": " ".join("1" * 60)}]
    return rows


@pytest.mark.parametrize("at", [0, 17, 29])
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "eval_dataset['hard']"])
def test_a_row_that_does_not_fit_the_context_is_refused_wherever_it_stands(
    make_arithmetic_trainer, where, at, monkeypatch
):
    monkeypatch.setattr("trl_score.context.ROWS_AT_A_TIME", 8)
    rows = Dataset.from_list(long_rows(at))
    name = where.partition("[")[0]
    options = {name: {"easy": Arithmetic().load("test"), "hard": rows} if "hard" in where else rows}
    with pytest.raises(ValueError) as error:
        make_arithmetic_trainer(options)
    assert f"a prompt of 62 tokens (row {at} of `{where}`)" in str(error.value)


def test_each_row_is_checked_with_its_own_instruction_and_stored_attempts(make_arithmetic_trainer):
    """Rows of 8 + 2 * 12 + 6 tokens in a context of 64: an instruction of 40 tokens, or a stored attempt of 60, is too long."""
    rows = Arithmetic(num_train=8).load("train")
    instructions = [None] * 5 + [" ".join("1" * 40)] + [None] * 2
    with pytest.raises(ValueError, match=r"row 5 of `train_dataset`.* 4\d tokens of correction instructions"):
        make_arithmetic_trainer({"train_dataset": rows.add_column("correction_instruction", instructions)})
    stored = [[["1"], ["2"]]] * 6 + [[["1"], [" ".join("1" * 50)]]] + [[["1"], ["2"]]]
    stored = rows.add_column("first_attempts", [[text for [text] in row] for row in stored])
    with pytest.raises(ValueError, match=r"row 6 of `train_dataset`\), a stored first attempt of up to 50 tokens"):
        make_arithmetic_trainer({"train_dataset": stored}, offline_first_attempts=0.5)
    make_arithmetic_trainer({"train_dataset": stored})  # they are not used


def test_the_number_of_attempts_counts_where_it_holds(make_arithmetic_trainer):
    """Evaluation with 5 attempts does not fit; it is no matter of a training with 2."""
    with pytest.raises(ValueError, match=r"of `eval_dataset`\), 5 attempts"):
        make_arithmetic_trainer(num_attempts_eval=5)
    make_arithmetic_trainer({"eval_dataset": None}, num_attempts_eval=5)


def test_how_many_rows_are_too_long_is_said(make_arithmetic_trainer):
    rows = Dataset.from_list([*long_rows(2)[:5], *long_rows(1)[:5]])
    with pytest.raises(ValueError, match="2 rows of `train_dataset` are too long"):
        make_arithmetic_trainer({"train_dataset": rows})


def test_a_streamed_row_that_does_not_fit_stops_when_it_comes(make_arithmetic_trainer, monkeypatch):
    monkeypatch.setattr("trl_score.checks.STREAMED_ROWS", 4)
    rows = stream(long_rows(5))
    trainer = make_arithmetic_trainer({"train_dataset": rows, "eval_dataset": None}, shuffle_dataset=False)
    with pytest.raises(ValueError, match=r"a prompt of 62 tokens \(row \d of a batch\)"):
        trainer.train()


def test_the_first_rows_of_a_stream_are_read_once_for_all_checks(make_arithmetic_trainer):
    rows, starts = [row | {"first_attempts": ["1"]} for row in Arithmetic(num_train=8).load("train")], []

    def read():
        starts.append(None)
        yield from rows

    given = {"train_dataset": IterableDataset.from_generator(read), "eval_dataset": None}
    make_arithmetic_trainer(given, offline_first_attempts=0.5)
    assert len(starts) == 1


def test_processes_stop_together_at_a_row_that_is_too_long():
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    check = ContextCheck(30, 8, Bridge(tokenizer))
    prompt = [{"role": "user", "content": "1"}]
    batch = [[1, 2, 3]], check.bridge.by_row([prompt], lambda attempt: ["2"]), 2, [None]
    check.check_batch(*batch)
    with pytest.raises(ValueError, match=r"\(a row of another process\).* need 31"):
        check.check_batch(*batch, largest=lambda number: 31)
    with pytest.raises(ValueError, match="a stored first attempt of up to 20 tokens, 1 more of up to 8"):
        check.check_batch(*batch[:3], [[1] * 20])


# Tokenizers


@pytest.mark.parametrize("given", ["path", "model", "tokenizer", "config"])
def test_a_tokenizer_without_an_end_token_takes_the_models(make_arithmetic_trainer, tmp_path, given):
    shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected, tokenizer.eos_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(tmp_path / "model")
    if given == "config":
        (tmp_path / "model" / "generation_config.json").unlink()
    options = {"model": str(tmp_path / "model")}
    options |= {"model": AutoModelForCausalLM.from_pretrained(tmp_path / "model")} if given == "model" else {}
    options |= {"processing_class": tokenizer} if given == "tokenizer" else {}
    trainer = make_arithmetic_trainer(options, max_steps=1)
    trainer.train()
    assert trainer.processing_class.eos_token == expected


def test_no_end_token_anywhere_is_refused(make_arithmetic_trainer):
    tokenizer, model = AutoTokenizer.from_pretrained(BASE_MODEL_PATH), base_model()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"end-of-sequence token, so no attempt would end. Set `tokenizer.eos_token`"):
        make_arithmetic_trainer({"model": model, "processing_class": tokenizer})


def test_stored_first_attempts_are_checked_under_an_adapter_of_the_embeddings(make_arithmetic_trainer):
    lora = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    for token, context in ((3, nullcontext()), (99, pytest.raises(ValueError, match="with the token id 99 in row 0"))):
        rows = Arithmetic(num_train=8).load("train").add_column("first_attempts", [[[token]]] * 8)
        with context:
            make_arithmetic_trainer({"train_dataset": rows, "peft_config": lora}, offline_first_attempts=1.0)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
def test_a_special_token_that_the_model_does_not_have_is_refused(make_arithmetic_trainer, name):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    size = len(tokenizer)
    tokenizer.add_special_tokens({name: "[NEW]"})
    match = rf"`{name}` '\[NEW\]' has the id {size}, but the model has {size} tokens.*resize_token_embeddings"
    with pytest.raises(ValueError, match=match):
        make_arithmetic_trainer({"processing_class": tokenizer})
    model = base_model()
    model.resize_token_embeddings(len(tokenizer))
    make_arithmetic_trainer({"processing_class": tokenizer, "model": model})


def test_loading_options_reach_tokenizer_and_reference(make_arithmetic_trainer, tmp_path, monkeypatch):
    """A checkpoint with code of its own is loaded by `model_init_kwargs` alone, the reference with the same attention."""
    shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")
    asked = []

    def load(name, **kwargs):
        asked.append(kwargs)
        return AutoTokenizer.from_pretrained(name)

    monkeypatch.setattr("trl_score.decoding.AutoProcessor.from_pretrained", load)
    kwargs = {"trust_remote_code": True, "revision": "main", "attn_implementation": "eager"}
    loaded = []

    def create(name, **kwargs):
        loaded.append(kwargs)
        return create_model_from_path(name, **kwargs)

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", create)
    monkeypatch.setattr("trl_score.reference.create_model_from_path", create)
    trainer = make_arithmetic_trainer(
        {"model": str(tmp_path / "model")}, model_init_kwargs=kwargs, reference_model_name_or_path=str(BASE_MODEL_PATH)
    )
    assert asked[0]["trust_remote_code"] and asked[0]["revision"] == "main"
    assert len(loaded) == 3 and all(each["trust_remote_code"] for each in loaded)
    assert trainer.ref_model.config._attn_implementation == "eager"


# Warnings and the rest


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"peft_config": LoraConfig(lora_dropout=0.05, **LINEAR)}, {}, "`lora_dropout=0.05`.*Set it to 0"),
        ({"peft_config": LoraConfig(**LINEAR)}, {}, None),
        ({"peft_config": LoraConfig(lora_dropout=0.05, **LINEAR)}, {"disable_dropout": True}, None),
        ({}, {"model_init_kwargs": {"attention_dropout": 0.1}}, "`attention_dropout=0.1`.*`model_init_kwargs"),
        ({}, {}, None),
    ],
)
def test_dropout_in_training_is_warned_about_by_name(make_arithmetic_trainer, options, settings, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_arithmetic_trainer(options, **settings)
    found = [str(each.message) for each in caught if "dropout" in str(each.message)]
    if message is None:
        assert found == []
    else:
        with pytest.warns(UserWarning, match=message):
            [warnings.warn(each, stacklevel=1) for each in found]
        assert len(found) == 1


def test_dropout_of_the_model_itself_is_warned_about():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match=r"`transformer.drop=0.1`.*Set `disable_dropout=True`"):
        warn_of_dropout(model)


@pytest.mark.parametrize(
    ("capability", "settings", "is_warned"),
    [
        ("AVX2", {"bf16": True}, True),
        ("AVX2", {"model_init_kwargs": {"dtype": "bfloat16"}}, True),
        ("AVX2", {}, False),
        ("AVX512", {"bf16": True}, False),
    ],
)
def test_bfloat16_is_warned_about_where_the_cpu_emulates_it(
    monkeypatch, make_arithmetic_trainer, capability, settings, is_warned
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_arithmetic_trainer(**settings)
        TransformersSampler(str(BASE_MODEL_PATH), **settings.get("model_init_kwargs", {}))
    found = [str(each.message) for each in caught if "no instructions" in str(each.message)]
    assert len(found) == (0 if not is_warned else 2 if "model_init_kwargs" in settings else 1)
    assert all("Set `dtype='float32'`, and in training `bf16=False`." in each for each in found)


def test_vllm_in_several_processes_needs_a_gpu_for_each():
    check_devices(["GPU-a"])
    check_devices(["GPU-a", "GPU-b"])
    with pytest.raises(ValueError, match="`backend='vllm'` in 3 processes would start 2 engines on one GPU"):
        check_devices(["GPU-a", "GPU-b", "GPU-a"])


def test_the_rollouts_of_the_last_batch_can_be_read(make_letters_trainer):
    trainer = make_letters_trainer(max_steps=1)
    assert trainer._rollouts is None
    trainer.train()
    assert len(trainer._rollouts.attempts) == 4 and isinstance(trainer, SCoReTrainer)
