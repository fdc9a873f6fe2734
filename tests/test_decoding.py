"""Attempts are decoded by temperature and top_p alone, whatever the checkpoint's generation_config says, on every path."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import ModelConfig, SFTConfig

from trl_score import baselines, evaluate_self_correction, inference_scaling
from trl_score.collection import collect
from trl_score.decoding import end_token_ids, neutral_generation, with_end_token
from trl_score.sampling import Decoding, TransformersSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BASE = str(BASE_MODEL_PATH)
SMALL = {"max_completion_length": 8, "batch_size": 8, "limit": 6}
EVERYTHING = {
    "do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.4, "min_p": 0.5, "top_h": 0.4, "typical_p": 0.5,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 1.8, "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "renormalize_logits": True,
    "forced_bos_token_id": 3, "forced_eos_token_id": 4, "remove_invalid_values": True,
    "exponential_decay_length_penalty": [2, 1.5], "suppress_tokens": [7, 8], "begin_suppress_tokens": [5],
    "sequence_bias": [[[6], -10.0]], "guidance_scale": 1.5, "min_length": 30, "min_new_tokens": 8,
    "max_length": 3, "max_new_tokens": 2, "max_time": 1e-9, "stop_strings": ["1"], "num_beams": 3, "length_penalty": 2.0,
    "early_stopping": True, "num_return_sequences": 2, "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 5.0, "hashing_key": 1, "seeding_scheme": "lefthash", "context_width": 1},
}  # fmt: skip


def checkpoint(folder, **fields):
    """The base model with more in its generation_config."""
    shutil.copytree(BASE_MODEL_PATH, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A checkpoint that sets every field."""
    return checkpoint(tmp_path_factory.mktemp("loaded") / "model", **EVERYTHING)


@pytest.fixture
def prepared(monkeypatch):
    """For each `generate`: how the next token is chosen, and when it stops."""
    found, kind = [], type(AutoModelForCausalLM.from_pretrained(BASE))
    processors, criteria = kind._get_logits_processor, kind._get_stopping_criteria

    def state(each):
        return type(each).__name__, sorted((k, str(v)) for k, v in vars(each).items() if k != "prompt_length_to_skip")

    def get_logits_processor(self, generation_config, **kwargs):
        made = processors(self, generation_config, **kwargs)
        found.append((str(generation_config.get_generation_mode()), [state(each) for each in made]))
        return made

    def get_stopping_criteria(self, *args, **kwargs):
        made = criteria(self, *args, **kwargs)
        found.append(sorted(type(each).__name__ for each in made))
        return made

    monkeypatch.setattr(kind, "_get_logits_processor", get_logits_processor)
    monkeypatch.setattr(kind, "_get_stopping_criteria", get_stopping_criteria)
    return found


def run_star(model, folder, monkeypatch):
    """The sampling of a baseline."""
    monkeypatch.setattr(baselines, "fine_tune", lambda *args: 0)
    arguments = baselines.BaselineArguments(
        task="arithmetic", num_samples=8, num_iterations=1, max_completion_length=8, num_train_problems=20, plus=True
    )
    sft = SFTConfig(str(folder / "star"), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    baselines.run_baseline(ModelConfig(model), Arithmetic(), arguments, sft)
    return [json.loads(line)["attempts"] for line in (folder / "star" / "rollouts-1" / "rollouts.jsonl").open()]


PATHS = {
    "evaluate": lambda model, *_: evaluate_self_correction(model, "arithmetic", **SMALL).rollouts,
    "evaluate with a temperature": lambda model, *_: (
        evaluate_self_correction(model, "arithmetic", **SMALL, temperature=0.8, top_p=0.9, num_samples=2).rollouts
    ),
    "Self-Refine": lambda model, *_: evaluate_self_correction(model, "arithmetic", **SMALL, self_refine=True).rollouts,
    "collect": lambda model, *_: collect(model, "arithmetic", **SMALL, num_samples=2),
    "scale": lambda model, folder, _: inference_scaling(
        model, "arithmetic", **SMALL, max_budget=4, output_dir=folder / "scale"
    ),
    "baselines": run_star,
    "a model in memory": lambda model, *_: collect(
        AutoModelForCausalLM.from_pretrained(model), "arithmetic", **SMALL, num_samples=2
    ),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_the_checkpoint_changes_neither_the_distribution_nor_the_end(path, loaded, prepared, tmp_path, monkeypatch):
    """Mode, logits processors, stopping criteria and what is sampled are those of a checkpoint that sets nothing."""
    (tmp_path / "one").mkdir(), (tmp_path / "other").mkdir()
    expected = path(BASE, tmp_path / "one", monkeypatch)
    of_base, prepared[:] = list(prepared), []
    assert path(loaded, tmp_path / "other", monkeypatch) == expected
    assert prepared == of_base and len(of_base) > 0


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_an_adapter_is_decoded_like_its_base_and_gets_its_configuration_back(loaded, reuse_cache):
    texts = []
    for name in (BASE, loaded):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(name)
        model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        own = model.generation_config
        before = own.to_dict()
        sampler = TransformersSampler(model, AutoTokenizer.from_pretrained(name), reuse_cache)
        prompts = Arithmetic().load("test")[:4]["prompt"]
        texts.append(sampler.sample(prompts, ["please check again"], Decoding(1.0, 0.9, 8), seed=1))
        assert model.generation_config is own is base.generation_config and own.to_dict() == before
    assert texts[0] == texts[1]


def test_the_configuration_is_back_after_an_error(loaded):
    model = AutoModelForCausalLM.from_pretrained(loaded)
    own = model.generation_config
    with pytest.raises(KeyboardInterrupt), neutral_generation(model):
        assert model.generation_config.repetition_penalty is None and model.generation_config.eos_token_id == 17
        with neutral_generation(model):
            raise KeyboardInterrupt
    assert model.generation_config is own and own.repetition_penalty == 1.8


def test_only_the_end_tokens_of_the_checkpoint_are_used(tmp_path):
    """`0` is made an end token: attempts stop there, and are not cut off."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    zero = tokenizer.convert_tokens_to_ids("0")
    model = checkpoint(tmp_path / "model", eos_token_id=[17, zero])
    rollouts = collect(model, "arithmetic", **SMALL, num_samples=1)
    ends = {ids[-1] for row in rollouts for ids in row["token_ids"]}
    assert zero in ends and not any(zero in ids[:-1] for row in rollouts for ids in row["token_ids"])
    assert not any(row["truncated"][k] for row in rollouts for k in (0, 1) if row["token_ids"][k][-1] == zero)


# A tokenizer without an end token


def test_a_tokenizer_without_an_end_takes_the_models(tmp_path):
    expected = evaluate_self_correction(BASE, "arithmetic", **SMALL)
    shutil.copytree(BASE_MODEL_PATH, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    found = evaluate_self_correction(str(tmp_path / "model"), "arithmetic", **SMALL)
    assert found.rollouts == expected.rollouts
    assert evaluate_self_correction(BASE, "arithmetic", tokenizer=tokenizer, **SMALL).rollouts == expected.rollouts
    assert tokenizer.eos_token is None  # the caller's own is left as it is
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert evaluate_self_correction(model, "arithmetic", **SMALL).rollouts == expected.rollouts


def test_an_adapter_takes_the_end_of_its_base(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    expected = evaluate_self_correction(BASE, "arithmetic", **SMALL)
    found = evaluate_self_correction(str(tmp_path), "arithmetic", **SMALL)  # the adapter is zero
    assert [row["attempts"] for row in found.rollouts] == [row["attempts"] for row in expected.rollouts]


def test_without_any_end_token_it_is_said(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Neither the tokenizer of 'me/model' nor .* has an end-of-sequence token"):
        with_end_token(tokenizer, GenerationConfig(), "me/model")
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[3, 4])) == [3, 4]
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no attempt would end"):
        evaluate_self_correction(model, "arithmetic", tokenizer=tokenizer, output_dir=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
