import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification
from trl import GRPOTrainer

from trl_score import SCoReTrainer
from trl_score.objective import spread_to_tokens
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

LOGGED = [
    *("accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i", "reward_t1", "reward_t2"),
    *("kl_t1", "kl_t2", "completions/clipped_ratio_t1", "completions/clipped_ratio_t2", "edit_distance_ratio"),
    *("completions/mean_length_t1", "completions/mean_length_t2", "changed_ratio", "stage"),
]


def rollouts(trainer, step=0, rows=8):
    """The inputs of one update, as the trainer makes them at an optimizer step."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.global_step = step
    groups = rows // trainer.num_generations
    problems = [trainer.train_dataset[i] for i in range(groups) for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(problems)


def move(trainer, scale=0.1):
    """Take the policy away from the reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter) * parameter.std()


def gradients(trainer, loss):
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters)


def per_token_gradient(trainer, inputs):
    """Gradient of the loss with respect to the log-probability of each token after the prompt: (B, T), and those."""
    kept = []
    compute = trainer._get_per_token_logps_and_entropies

    def keep(*args, **kwargs):
        result = compute(*args, **kwargs)
        kept.append(result[0])
        return result

    trainer._get_per_token_logps_and_entropies = keep
    try:
        loss = trainer._compute_loss(trainer.model, inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return torch.autograd.grad(loss, kept[0])[0], kept[0].detach()


# The loss beside stock TRL


@pytest.mark.parametrize("num_attempts", [2, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_uniform_kl_weight_gives_the_stock_loss_and_gradients(make_arithmetic_trainer, loss_type, num_attempts):
    trainer = make_arithmetic_trainer(
        num_attempts=num_attempts, loss_type=loss_type, epsilon_high=5.0 if loss_type == "cispo" else None
    )
    inputs = rollouts(trainer)
    move(trainer)
    inputs["advantages"] = torch.randn_like(inputs["advantages"]) * (inputs["attempt_ids"] > 0)
    inputs["kl_weights"] = torch.full_like(inputs["kl_weights"], 0.05)
    trainer.beta = 0.05
    off_policy = inputs["ref_per_token_logps"] + 0.3 * torch.randn_like(inputs["ref_per_token_logps"])
    for old in ({}, {"old_per_token_logps": off_policy}):
        ours = trainer._compute_loss(trainer.model, inputs | old)
        stock = GRPOTrainer._compute_loss(trainer, trainer.model, inputs | old)
        torch.testing.assert_close(ours, stock, atol=1e-7, rtol=1e-6)
        for got, expected in zip(gradients(trainer, ours), gradients(trainer, stock), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert trainer.beta == 0.05


@pytest.mark.parametrize("step", [0, 3])
def test_instruction_and_padding_tokens_have_no_gradient(make_arithmetic_trainer, step):
    trainer = make_arithmetic_trainer(stage1_steps=2, beta=0.5)
    inputs = rollouts(trainer, step)
    move(trainer)
    gradient, _ = per_token_gradient(trainer, inputs)
    ids = inputs["attempt_ids"]
    assert (ids == 0).any() and (gradient[ids == 0] == 0).all()
    assert (gradient[ids > 0] != 0).float().mean() > 0.8
    # After an attempt's end of sequence comes the instruction: exactly one token of each attempt is the last.
    end = trainer._tokenizer.eos_token_id
    for row, completion in zip(ids.tolist(), inputs["completion_ids"].tolist(), strict=True):
        for k in (1, 2):
            attempt = [token for token, owner in zip(completion, row, strict=True) if owner == k]
            assert end not in attempt[:-1]


def test_stage_one_trains_the_first_attempt_by_its_kl_alone(make_arithmetic_trainer):
    """
    At an attempt-1 token the gradient with respect to its log-probability is (beta1 + beta2) (log pi - log pi_ref) over the
    normalizer B * max_completion_length, and nothing of the reward: descending it moves the policy to the reference.
    """
    trainer = make_arithmetic_trainer(stage1_steps=4, beta=0.01, stage1_beta=0.1)
    inputs = rollouts(trainer, rows=64)
    move(trainer)
    gradient, logps = per_token_gradient(trainer, inputs)
    first, second = (inputs["attempt_ids"] == k for k in (1, 2))
    assert (inputs["advantages"][first] == 0).all()
    assert (inputs["advantages"][second] != 0).any()
    expected = 0.11 * (logps - inputs["ref_per_token_logps"]) / (len(logps) * 8)
    torch.testing.assert_close(gradient[first], expected[first], atol=1e-7, rtol=1e-3)
    assert expected[first].abs().max() > 1e-5
    expected = (0.01 * (logps - inputs["ref_per_token_logps"]) - inputs["advantages"]) / (len(logps) * 8)
    torch.testing.assert_close(gradient[second], expected[second], atol=1e-7, rtol=1e-3)


def test_strict_kl_brings_the_first_attempt_back_to_the_reference(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(stage1_steps=4, beta=0.01, stage1_beta=1.0)
    fixed = rollouts(trainer, rows=128)
    input_ids = torch.cat([fixed["prompt_ids"], fixed["completion_ids"]], dim=1)
    first = (fixed["attempt_ids"] == 1).float()

    def divergence():
        """KL of the next-token distributions at the first attempts of a fixed batch, in nats per token."""
        with torch.no_grad():
            policy, reference = (
                model(input_ids=input_ids).logits[:, -first.size(1) - 1 : -1].log_softmax(-1)
                for model in (trainer.model, trainer.ref_model)
            )
        return ((policy.exp() * (policy - reference)).sum(-1) * first).sum() / first.sum()

    move(trainer, scale=0.3)
    before = divergence()
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        trainer._compute_loss(trainer.model, rollouts(trainer, rows=64)).backward()
        optimizer.step()
    assert divergence() < 0.5 * before


def test_left_padding_changes_nothing(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(beta=0.5)
    inputs = rollouts(trainer)
    move(trainer)
    plain = trainer._compute_loss(trainer.model, inputs)
    size = (len(inputs["prompt_ids"]), 5)
    padding = {
        "prompt_ids": torch.full(size, trainer._tokenizer.pad_token_id),
        "prompt_mask": torch.zeros(size).long(),
    }
    padded = inputs | {name: torch.cat([pad, inputs[name]], dim=1) for name, pad in padding.items()}
    shifted = trainer._compute_loss(trainer.model, padded)
    torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-5)
    for got, expected in zip(gradients(trainer, shifted), gradients(trainer, plain), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_buffered_inputs_are_not_changed_by_the_loss(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer()
    inputs = rollouts(trainer)
    before = {name: value.clone() for name, value in inputs.items()}
    trainer._compute_loss(trainer.model, inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


# Credit, frozen at generation


def test_each_attempt_gets_its_own_advantage(make_letters_trainer):
    """
    One problem, rewards r1 = (1, 0), r2 = (0, 1), alpha = 10: Stage I credits (0, 0), (0, 1); Stage II (1, -10), (0, 11).
    Leave-one-out in a group of two is the difference: Stage I (0, -1), (0, 1); Stage II (1, -21), (-1, 21).
    """

    def reward(completions, attempt, **kwargs):
        return [1.0, 0.0] if attempt == 1 else [0.0, 1.0]

    trainer = make_letters_trainer(reward, stage1_steps=2, beta=0.01, stage1_beta=0.1)
    expected = {0: [[0.0, -1.0], [0.0, 1.0]], 2: [[1.0, -21.0], [-1.0, 21.0]]}
    for step, advantages in expected.items():
        inputs = rollouts(trainer, step, rows=2)
        spread = spread_to_tokens(torch.tensor(advantages), inputs["attempt_ids"])
        torch.testing.assert_close(inputs["advantages"], spread)
        weights = torch.tensor([0.11, 0.01] if step == 0 else [0.01, 0.01])
        torch.testing.assert_close(inputs["kl_weights"], spread_to_tokens(weights, inputs["attempt_ids"]))
        assert trainer._logs["advantages"][-1] == advantages[-1][-1]


def test_stage_of_a_buffered_batch_is_the_one_it_was_generated_in(make_arithmetic_trainer):
    """Four updates per generation: the boundary at step 2 falls into the first window, whose rollouts stay Stage I's."""
    trainer = make_arithmetic_trainer(
        stage1_steps=2, steps_per_generation=4, gradient_accumulation_steps=1, max_steps=8, num_generations=8
    )
    seen = []
    compute = trainer._compute_loss

    def spy(model, inputs):
        seen.append(round(inputs["kl_weights"].max().item(), 2))
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert seen == [0.11] * 4 + [0.01] * 4


def test_unscorable_attempts_are_left_out_of_baseline_and_bonus(make_letters_trainer):
    """Attempt 1 of row 0 cannot be scored: no advantage for it, nor for attempt 2, whose bonus compares with it."""

    def reward(completions, attempt, **kwargs):
        return [None, 1.0, 0.0, 1.0] if attempt == 1 else [1.0, 1.0, 0.0, 0.0]

    trainer = make_letters_trainer(reward, stage1_steps=0, num_generations=4, alpha=1.0)
    inputs = rollouts(trainer, rows=4)
    # Attempt 1: (-, 1, 0, 1) -> 1 - 1/2, 0 - 1, 1 - 1/2. Attempt 2: (-, 1, 0, -1) -> 1 + 1/2, 0 - 0, -1 - 1/2.
    expected = [[0.0, 0.0], [0.5, 1.5], [-1.0, 0.0], [0.5, -1.5]]
    torch.testing.assert_close(inputs["advantages"], spread_to_tokens(torch.tensor(expected), inputs["attempt_ids"]))


def test_truncated_attempts_are_masked_one_by_one(make_letters_trainer):
    trainer = make_letters_trainer(
        mask_truncated_completions=True, num_generations=32, per_device_train_batch_size=256
    )
    inputs = rollouts(trainer, rows=256)
    kept = [
        [(row == k).any().item() for k in (1, 2)] for row in inputs["attempt_ids"]
    ]  # an attempt is kept if it ended by itself
    ended = [[ids[-1] == 2 for ids in attempts] for attempts in trainer._batch.rollouts.attempts]
    assert kept == ended
    assert {(True, False), (False, True)} <= {tuple(row) for row in kept}


# Rewards


def test_reward_functions_see_one_attempt_at_a_time(make_arithmetic_trainer):
    calls = []

    def reward(prompts, completions, completion_ids, answer, attempt, trainer_state, **kwargs):
        calls.append((attempt, prompts, completions, completion_ids, answer))
        return [0.0] * len(prompts)

    trainer = make_arithmetic_trainer({"reward_funcs": reward})
    rollouts(trainer)
    assert [call[0] for call in calls] == [1, 2]
    for attempt, prompts, completions, completion_ids, answer in calls:
        assert list(completion_ids) == [row[attempt - 1] for row in trainer._batch.rollouts.attempts]
        for completion, ids in zip(completions, completion_ids, strict=True):
            assert completion == [
                {"role": "assistant", "content": trainer._tokenizer.decode(ids, skip_special_tokens=True)}
            ]
        assert prompts[0] == trainer.train_dataset[0]["prompt"]
        assert answer[0] == trainer.train_dataset[0]["answer"]


def test_a_reward_function_with_trls_keywords_alone_is_called_without_attempt(make_arithmetic_trainer):
    calls = []

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        calls.append(len(completions))
        return [1.0] * len(completions)

    rollouts(make_arithmetic_trainer({"reward_funcs": reward}))
    assert calls == [8, 8]


def test_several_rewards_async_ones_and_a_reward_model_work_together(make_arithmetic_trainer, tmp_path):
    task = Arithmetic()
    config = LlamaConfig.from_pretrained(BASE_MODEL_PATH, num_labels=1)
    torch.manual_seed(0)
    reward_model = LlamaForSequenceClassification(config)
    reward_model.config._name_or_path = str(BASE_MODEL_PATH)  # where its tokenizer lies

    async def length(completions, **kwargs):
        return [len(completion[0]["content"]) / 10 for completion in completions]

    def sometimes(completions, attempt, log_extra, log_metric, **kwargs):
        log_extra("first_letter", [completion[0]["content"][:1] for completion in completions])
        log_metric("one", attempt)
        return [None if attempt == 1 else 1.0 for _ in completions]

    functions = [task.reward, length, sometimes, reward_model]
    trainer = make_arithmetic_trainer(
        {"reward_funcs": functions}, reward_weights=[1.0, 0.5, 2.0, 0.1], log_completions=True, max_steps=1
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["one/attempt_1"] == 1 and log["one/attempt_2"] == 2
    rewards = torch.stack(trainer._batch.rewards, dim=1)  # (B, 2, 4)
    assert rewards[:, 0, 2].isnan().all() and (rewards[:, 1, 2] == 1).all()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.1])
    total = (rewards.nan_to_num(0) * weights).sum(-1)
    assert log["reward_t1"] == pytest.approx(total[:, 0].mean().item(), abs=1e-4)
    assert log["reward_t2"] == pytest.approx(total[:, 1].mean().item(), abs=1e-4)
    assert log["reward"] == pytest.approx(log["reward_t2"], abs=1e-6)
    assert log["accuracy_t2"] == pytest.approx((rewards[:, 1, 0] >= 1).float().mean().item())

    table = pd.read_parquet(next(Path(trainer.args.output_dir, "completions").glob("*.parquet")))
    assert len(table) == 8
    assert {"first_letter/attempt_1", "first_letter/attempt_2", "reward/attempt_1", "advantage/attempt_2"} <= {*table}
    roles = [message["role"] for message in table["completion"][0]]
    assert roles == ["assistant", "user", "assistant"]
    assert table["completion"][0][1]["content"] == Arithmetic.correction_instruction


@pytest.mark.parametrize("is_async", [False, True])
def test_reward_error_names_function_attempt_and_row_and_keeps_the_checkpoint(make_arithmetic_trainer, is_async):
    task = Arithmetic()

    def verifier(completions, attempt, trainer_state, **kwargs):
        for row, completion in enumerate(completions):
            if trainer_state.global_step == 2 and attempt == 2 and (row == 5 or len(completions) == 1):
                raise KeyError(completion[0]["content"])
        return task.reward(completions, **kwargs)

    async def async_verifier(**kwargs):
        return verifier(**kwargs)

    function = async_verifier if is_async else verifier
    trainer = make_arithmetic_trainer(
        {"reward_funcs": function}, save_steps=1, num_generations=8, save_strategy="steps"
    )
    with pytest.raises(
        RuntimeError, match=r"'(async_)?verifier' raised KeyError on attempt 2, in row 5: .*content"
    ) as error:
        trainer.train()
    assert isinstance(error.value.__cause__, KeyError)
    checkpoint = Path(trainer.args.output_dir, "checkpoint-2")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not Path(trainer.args.output_dir, "checkpoint-3").exists()


def test_reward_functions_of_one_name_are_logged_apart(make_arithmetic_trainer):
    functions = [lambda completions, **_: [1.0] * len(completions), lambda completions, **_: [0.5] * len(completions)]
    trainer = make_arithmetic_trainer({"reward_funcs": functions}, max_steps=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
    assert (log["rewards/<lambda>/mean"], log["rewards/<lambda>_2/mean"]) == (1.0, 0.5)


@pytest.mark.parametrize(("output", "said"), [([1.0], "1 rewards"), (None, "`NoneType`"), (1.0, "`float`")])
def test_wrong_number_of_rewards_is_an_error_that_names_the_function(make_arithmetic_trainer, output, said):
    def short(completions, **kwargs):
        return output

    trainer = make_arithmetic_trainer({"reward_funcs": short})
    with pytest.raises(ValueError, match=f"'short' returned {said} for 8 completions of attempt 1"):
        trainer.train()


# Training


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def base_log_probs(trainer, inputs, **kwargs):
    """Log-probabilities of the completion under the base model, computed without any of TRL."""
    # In training mode, as the reference: in evaluation bitsandbytes has another 4-bit kernel on some CPUs.
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH, dtype=torch.float32, **kwargs).train()
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return logps[:, -inputs["completion_ids"].size(1) :]


def assert_reference_is_base(trainer, atol=1e-5, **kwargs):
    for step in (0, trainer.args.max_steps):
        inputs = rollouts(trainer, step)
        mask = inputs["attempt_ids"] > 0  # the bridge is not scored
        got, expected = inputs["ref_per_token_logps"][mask], base_log_probs(trainer, inputs, **kwargs)[mask]
        torch.testing.assert_close(got, expected, atol=atol, rtol=1e-3)
        _, policy = per_token_gradient(trainer, inputs)
        assert (policy[mask] - expected).abs().max() > 10 * atol  # else the comparison would say nothing


def test_full_fine_tuning_runs_both_stages_and_logs_the_contract(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(stage1_steps=2, eval_strategy="steps", eval_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer.model).items())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2]
    for log in logs:
        assert all(math.isfinite(log[name]) for name in LOGGED)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2
    for log in evaluations:
        assert all(math.isfinite(log[f"eval_{name}"]) for name in LOGGED)
    assert_reference_is_base(trainer)


def test_lora_trains_and_its_reference_is_the_base(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer({"peft_config": LoraConfig(**LORA)}, stage1_steps=2, learning_rate=1e-1)
    before = weights_of(trainer.model)
    trainer.train()
    moved = {name for name, value in weights_of(trainer.model).items() if not torch.equal(before[name], value)}
    assert moved and all("lora_" in name for name in moved)
    assert_reference_is_base(trainer)


def test_qlora_trains_and_its_reference_is_the_quantized_base(make_arithmetic_trainer):
    quantization = BitsAndBytesConfig(**NF4)
    trainer = make_arithmetic_trainer(
        {"peft_config": LoraConfig(**LORA), "quantization_config": quantization}, stage1_steps=2, learning_rate=1e-1
    )
    assert trainer.model.is_loaded_in_4bit
    before = weights_of(trainer.model)
    trainer.train()
    moved = {name for name, value in weights_of(trainer.model).items() if not torch.equal(before[name], value)}
    assert moved and all("lora_" in name for name in moved)
    assert_reference_is_base(trainer, quantization_config=quantization)


@pytest.mark.parametrize("given", ["before it generates", "after it generated"])
def test_qlora_has_the_same_gradients_after_generating(make_arithmetic_trainer, given):
    """bitsandbytes packs the weights for inference on some CPUs, and no gradient goes through packed weights."""
    ids = torch.arange(5, 15)[None]
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH, quantization_config=BitsAndBytesConfig(**NF4))

    def gradients(model):
        """Of the embeddings, behind all layers."""
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.train()
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        return embeddings.grad

    expected = gradients(model)
    if given == "after it generated":
        model.generate(ids, max_new_tokens=2, do_sample=False)
    trainer = make_arithmetic_trainer({"peft_config": LoraConfig(**LORA), "model": model})
    tolerance = {"rtol": 0, "atol": 0}
    if given == "after it generated":  # packing had rounded the scales of the weights to bfloat16
        tolerance = {"rtol": 0, "atol": 0.03 * expected.abs().max().item()}
    torch.testing.assert_close(gradients(trainer.model), expected, **tolerance)  # LoRA starts at zero
    trainer.generate_attempts([[{"role": "user", "content": "1 2 3 4 5 6"}]])
    torch.testing.assert_close(gradients(trainer.model), expected, **tolerance)


def test_reference_of_a_model_that_carries_an_adapter_is_the_base_under_it(make_arithmetic_trainer, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = make_arithmetic_trainer({"model": model}, stage1_steps=2)
    assert_reference_is_base(trainer)
    trainer.train()
    assert_reference_is_base(trainer)


@pytest.mark.parametrize("peft", [False, True])
def test_reference_after_resuming_is_the_base(make_arithmetic_trainer, peft):
    options = {"peft_config": LoraConfig(**LORA)} if peft else {}
    settings = {"stage1_steps": 2, "save_steps": 2, "learning_rate": 1e-2}
    first = make_arithmetic_trainer(dict(options), **settings)
    first.train()
    second = make_arithmetic_trainer(dict(options), **settings)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-2")))
    assert_reference_is_base(second)


def test_reference_can_be_named_when_training_goes_on_from_a_trained_model(make_arithmetic_trainer, tmp_path):
    first = make_arithmetic_trainer(max_steps=2, learning_rate=1e-2)
    first.train()
    first.save_model(tmp_path / "trained")
    with pytest.raises(ValueError, match="was trained by SCoRe, so it is not the base model"):
        make_arithmetic_trainer({"model": str(tmp_path / "trained")})
    second = make_arithmetic_trainer(
        {"model": str(tmp_path / "trained")}, reference_model_name_or_path=str(BASE_MODEL_PATH)
    )
    assert_reference_is_base(second)


def test_an_adapter_is_no_base_model_by_itself_nor_merged(make_arithmetic_trainer, tmp_path):
    first = make_arithmetic_trainer({"peft_config": LoraConfig(**LORA)}, max_steps=2, learning_rate=1e-2)
    first.train()
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    first.save_model(adapter)
    with pytest.raises(ValueError, match=r"adapter' is an adapter\. To continue its run, resume it"):
        make_arithmetic_trainer({"model": str(adapter)})
    AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(merged)
    shutil.copy(adapter / "score.json", merged)
    with pytest.raises(ValueError, match="was trained by SCoRe, so it is not the base model"):
        make_arithmetic_trainer({"model": str(merged)})


def test_plain_text_prompts_train(make_letters_trainer):
    trainer = make_letters_trainer(stage1_steps=2, logging_steps=1, learning_rate=1e-2)
    before = weights_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer.model).items())
    texts = trainer.generate_attempts(["a", "b b"])
    assert len(texts) == 2 and all(len(row) == 2 and set(" ".join(row)) <= {"a", "b", " "} for row in texts)


@pytest.mark.parametrize("prompts", ["a b", [], [{"role": "user", "content": "a"}]])
def test_one_prompt_is_not_taken_for_several(make_letters_trainer, prompts):
    """Each letter of a text was a problem."""
    with pytest.raises(ValueError, match=r"Give one prompt as `\[prompt\]`"):
        make_letters_trainer().generate_attempts(prompts)


@pytest.mark.parametrize("instructions", ["ab", ["a"], ["a"] * 3])
def test_each_prompt_has_one_instruction(make_letters_trainer, instructions):
    with pytest.raises(ValueError, match="one instruction for each of the 2 prompts"):
        make_letters_trainer().generate_attempts(["a", "b"], instructions)


def test_three_attempts_train_the_second_then_the_third_then_all(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(num_attempts=3, stage1_steps=2, max_steps=3)
    weights = []
    compute = trainer._compute_loss

    def spy(model, inputs):
        ids = inputs["attempt_ids"]
        weights.append([round(inputs["kl_weights"][ids == k].mean().item(), 2) for k in (1, 2, 3)])
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert weights == [[0.11, 0.01, 0.01], [0.11, 0.11, 0.01], [0.01, 0.01, 0.01]]
    log = trainer.state.log_history[0]
    assert {"accuracy_t3", "delta_t2_t3", "delta_t1_t3", "kl_t3", "reward_t3"} <= log.keys()


def test_training_without_any_kl_loads_no_reference(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(beta=0.0, stage1_beta=0.0, max_steps=2)
    assert trainer.ref_model is None
    trainer.train()
    assert "kl_t1" not in trainer.state.log_history[0]


def test_instruction_of_the_row_overrides_the_configured_one(make_arithmetic_trainer):
    rows = Arithmetic(num_train=2).load("train").add_column("correction_instruction", ["wrong check again", None])
    trainer = make_arithmetic_trainer({"train_dataset": rows}, remove_unused_columns=False)
    rollouts(trainer)
    said = [
        trainer._tokenizer.decode(between[0], skip_special_tokens=True) for between in trainer._batch.rollouts.bridges
    ]
    assert said == ["wrong check again"] * 4 + ["please check again"] * 4


# Evaluation


def test_evaluation_is_greedy_unless_asked_and_training_samples(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer()
    problems = trainer.eval_dataset["prompt"]
    assert trainer.generate_attempts(problems) == trainer.generate_attempts(problems)
    inputs = torch.stack([rollouts(trainer)["completion_ids"] for _ in range(2)])
    assert not torch.equal(inputs[0], inputs[1])
    metrics = trainer.evaluate()
    assert trainer.generation_config.do_sample  # training samples again afterwards
    assert metrics == pytest.approx({**metrics, **{k: v for k, v in trainer.evaluate().items() if "accuracy" in k}})
    trainer.args.eval_temperature = 1.0
    assert trainer.generate_attempts(problems) != trainer.generate_attempts(problems)


def test_evaluation_counts_each_problem_once_whatever_the_batch_size(make_arithmetic_trainer):
    """20 problems in batches of 8, 8 and 4: the accuracy is that of the 20 problems."""
    trainer = make_arithmetic_trainer()
    attempts = trainer.generate_attempts(trainer.eval_dataset["prompt"])
    right = [
        [text.split() == answer.split() for text in row]
        for row, answer in zip(attempts, trainer.eval_dataset["answer"], strict=True)
    ]
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_t1"] == pytest.approx(sum(row[0] for row in right) / 20)
    assert metrics["eval_accuracy_t2"] == pytest.approx(sum(row[1] for row in right) / 20)


def test_evaluation_agrees_with_generate_on_the_whole_conversation(make_arithmetic_trainer):
    """The second attempt is what the model says when it is given the first and the instruction as chat messages."""
    trainer = make_arithmetic_trainer()
    prompts = trainer.eval_dataset["prompt"][:8]
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH)
    for prompt, attempts in zip(prompts, trainer.generate_attempts(prompts), strict=True):
        messages = list(prompt)
        for attempt in attempts:
            inputs = trainer._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].size(1) :]
            assert trainer._tokenizer.decode(output, skip_special_tokens=True) == attempt
            messages += [
                {"role": "assistant", "content": attempt},
                {"role": "user", "content": Arithmetic.correction_instruction},
            ]


def test_subclass_can_be_used_with_any_dataset_column(make_letters_trainer):
    """A plain list column reaches the reward function as it is."""
    seen = []

    def reward(completions, tags, **kwargs):
        seen.extend(tags)
        return [1.0] * len(completions)

    of = make_letters_trainer()
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "tags": [["x", "y"]] * 4})
    trainer = SCoReTrainer(of.model, reward, of.args, train_dataset=rows, processing_class=of.processing_class)
    rollouts(trainer, rows=4)
    assert seen == [["x", "y"]] * 8
    assert isinstance(trainer, SCoReTrainer)


def test_a_prompt_is_tokenized_once_for_its_rollouts(make_arithmetic_trainer, monkeypatch):
    trainer = make_arithmetic_trainer()
    tokenize, seen = trainer._tokenize_prompts, []
    monkeypatch.setattr(trainer, "_tokenize_prompts", lambda prompts: seen.append(len(prompts)) or tokenize(prompts))
    prompts = [trainer.train_dataset[i]["prompt"] for i in (0, 0, 0, 1, 1, 0)]
    assert trainer._prompt_ids(prompts) == tokenize(prompts)[0]
    assert seen == [3]
