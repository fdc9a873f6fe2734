"""Trimmed micro-batches of rows sorted by length: the same loss and gradients as TRL's padded batch, of far fewer tokens."""

import random
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_score_trainer import LORA, gradients, move, rollouts
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer

from trl_score import SCoReTrainer
from trl_score.padding import ScoredTokens, by_length, width
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


def ragged(trainer, lengths=(1, 8)):
    """Let the trainer sample attempts of random lengths, most of them short."""

    def generate(prompt_ids, *args, **kwargs):
        rng = random.Random(sum(map(sum, prompt_ids)))
        number = [max(lengths[0], min(lengths[1], round(rng.lognormvariate(0.7, 0.8)))) for _ in prompt_ids]
        return [[rng.randrange(10) for _ in range(each)] for each in number], None

    trainer._generate_single_turn = generate
    return trainer


def reward(completions, **kwargs):
    return [sum(map(ord, completion[0]["content"])) % 7 / 6 for completion in completions]


def untrimmed(trainer):
    """The trainer computes all columns and rows as TRL does."""
    vars(trainer)["_get_per_token_logps_and_entropies"] = lambda model, *args, **kwargs: (
        GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, model.model if isinstance(model, ScoredTokens) else model, *args, **kwargs
        )
    )
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("num_attempts", [2, 3])
@pytest.mark.parametrize("stage1_steps", [0, 4])
def test_loss_gradients_and_reference_are_those_of_the_padded_batch(
    make_arithmetic_trainer, num_attempts, stage1_steps, adapter
):
    trainer = make_arithmetic_trainer(
        {"reward_funcs": reward, "peft_config": LoraConfig(**LORA) if adapter else None},
        num_attempts=num_attempts, stage1_steps=stage1_steps, beta=0.3, num_iterations=2,
    )  # fmt: skip
    ragged(trainer)
    move(trainer)
    ours = rollouts(trainer)
    plain = rollouts(untrimmed(trainer))
    del trainer._get_per_token_logps_and_entropies
    ids = ours["attempt_ids"]
    assert torch.equal(ids, plain["attempt_ids"]) and (ids == 0).any(1).all()
    for name in ("ref_per_token_logps", "old_per_token_logps"):
        torch.testing.assert_close(ours[name][ids > 0], plain[name][ids > 0], atol=1e-5, rtol=1e-5)
        assert (ours[name][ids == 0] == 0).all()
    loss = trainer._compute_loss(trainer.model, ours)
    got = gradients(trainer, loss)
    padded = untrimmed(trainer)._compute_loss(trainer.model, plain)
    torch.testing.assert_close(loss, padded, atol=1e-6, rtol=1e-5)
    expected = gradients(trainer, padded)
    assert max(each.abs().max() for each in expected) > 1e-4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 1},
    {"gradient_accumulation_steps": 4},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 6},
    {"gradient_accumulation_steps": 4, "loss_type": "dapo"},
    {"gradient_accumulation_steps": 4, "loss_type": "bnpo"},
    {"gradient_accumulation_steps": 4, "entropy_coef": 1.0},
], ids=str)  # fmt: skip
def test_training_ends_with_the_weights_of_padded_training(make_arithmetic_trainer, tmp_path, monkeypatch, options):
    """Two steps of Stage I and two of Stage II: sorting rows within a step leaves its gradient as it is."""
    found = []
    settings = {"optim": "sgd", "learning_rate": 0.1, "stage1_steps": 2, "per_device_train_batch_size": 4}
    for number in range(2):
        trainer = ragged(
            make_arithmetic_trainer(
                {"reward_funcs": reward}, output_dir=str(tmp_path / str(number)), **(settings | options)
            )
        )
        if number:
            untrimmed(trainer)
            monkeypatch.setattr(SCoReTrainer, "_sorts_rows", False)
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        found.append(trainer.model.state_dict())
    assert max((found[0][name] - value).abs().max() for name, value in start.items()) > 1e-3
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=2e-6, rtol=1e-4, msg=name)


def test_a_model_with_an_embedding_of_each_position_reads_a_row_alike_in_every_batch(
    make_arithmetic_trainer, tmp_path
):
    """Without a step of the optimizer the KL stays 0, and what is scored has the positions of what was generated."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": 17, "pad_token_id": 14}
    sizes = {"vocab_size": 19, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 1.0}
    GPT2LMHeadModel(GPT2Config(**sizes, **special)).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE_MODEL_PATH / name, tmp_path / "gpt2")
    rows = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": digits}] for digits in ["1", "1 2 3 4 5 6 7"] * 8]
    })  # fmt: skip
    trainer = make_arithmetic_trainer(
        {"model": str(tmp_path / "gpt2"), "reward_funcs": reward, "train_dataset": rows},
        learning_rate=0.0, gradient_accumulation_steps=2, num_generations=2, max_steps=2, disable_dropout=True,
    )  # fmt: skip
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        assert abs(log["kl_t1"]) < 1e-6 and abs(log["kl_t2"]) < 1e-6


def test_virtual_tokens_are_not_scored(make_arithmetic_trainer):
    """Prompt tuning has no reference to start at, so it trains without KL."""
    prompt_tuning = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}
    with pytest.raises(
        ValueError, match=r"`PromptTuningConfig` puts random virtual tokens .* `beta=0` and `stage1_beta=0`"
    ):
        make_arithmetic_trainer(prompt_tuning)
    trainer = make_arithmetic_trainer(prompt_tuning, beta=0.0, stage1_beta=0.0, num_iterations=2)
    ragged(trainer)
    ours, plain = rollouts(trainer), rollouts(untrimmed(trainer))
    scored, name = ours["attempt_ids"] > 0, "old_per_token_logps"
    torch.testing.assert_close(ours[name][scored], plain[name][scored], atol=1e-5, rtol=1e-5)


def test_virtual_tokens_stay_as_far_from_the_prompt_in_every_batch(make_arithmetic_trainer):
    """They stand before the padding, and PEFT takes no positions: with another padding a row has other log-probabilities."""
    rows = [{"prompt": [{"role": "user", "content": digits}], "answer": "0"} for digits in ["1", "1 2 3 4 5 6"] * 4]
    trainer = make_arithmetic_trainer(
        {
            "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "train_dataset": Dataset.from_list(rows),
        },
        beta=0.0, stage1_beta=0.0, num_iterations=2,
    )  # fmt: skip
    inputs = rollouts(ragged(trainer))
    alone = [
        trainer._logps({name: each[i : i + 1] for name, each in inputs.items() if each.dim()}, trainer.model)
        for i in range(8)
    ]
    torch.testing.assert_close(torch.cat(alone), inputs["old_per_token_logps"], atol=1e-5, rtol=1e-5)


def test_rows_are_sorted_within_an_optimizer_step_only():
    """Eight rows in four micro-batches, two of them a step: the rows of a step stay in it, and lengths grow within it."""
    lengths = [5, 1, 4, 2, 9, 3, 8, 6]
    batches = [
        {
            "prompt_ids": torch.zeros(2, 1),
            "prompt_mask": torch.ones(2, 1),
            "completion_mask": torch.tensor([[1] * n + [0] * (9 - n) for n in lengths[i : i + 2]]),
            "row": torch.tensor(lengths[i : i + 2]),
            "num_items_in_batch": torch.tensor(38),
        }
        for i in range(0, 8, 2)
    ]
    assert [each["row"].tolist() for each in by_length(batches, 2)] == [[1, 2], [4, 5], [3, 6], [8, 9]]
    assert [each["row"].tolist() for each in by_length(batches, 4)] == [[1, 2], [3, 4], [5, 6], [8, 9]]
    assert [each["row"].tolist() for each in by_length(batches, 1)] == [[1, 5], [2, 4], [3, 9], [6, 8]]
    assert [each["row"].tolist() for each in by_length(batches, 8)] == [[1, 2], [3, 4], [5, 6], [8, 9]]
    assert all(each["num_items_in_batch"] == 38 for each in by_length(batches, 2))


def test_width_keeps_a_prompt_and_a_completion_token():
    """Prompts of three columns, completions of four."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]])
    assert width(mask, 4) == (1, 5)
    assert width(torch.tensor([[0, 0, 0, 0, 1, 0, 0]]), 4) == (2, 5)
    assert width(torch.tensor([[1, 1, 1, 0, 0, 0, 0]]), 4) == (0, 4)


def test_at_most_a_quarter_of_the_computed_tokens_is_padding(make_letters_trainer):
    """Attempts of log-normal length, mean 200, up to 1,024 in units of 64 here; 64 rollouts, eight at a time."""
    trainer = make_letters_trainer(
        max_completion_length=8, per_device_train_batch_size=8, gradient_accumulation_steps=8, num_generations=8,
        max_steps=1, stage1_steps=0,
    )  # fmt: skip
    generate = random.Random(0)
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: (
        [[0] * max(1, min(8, round(generate.lognormvariate(0.7, 0.8)))) for _ in prompt_ids],
        None,
    )
    computed, model_forward = [], trainer.model.model.forward

    def count(*args, **kwargs):
        if torch.is_grad_enabled():  # an update
            computed.append(kwargs["attention_mask"])
        return model_forward(*args, **kwargs)

    trainer.model.model.forward = count
    trainer.train()
    real, all_of_them = sum(int(mask.sum()) for mask in computed), sum(mask.numel() for mask in computed)
    assert len(computed) == 8 and all_of_them / real <= 1.25
