"""
Attempts by continuous batching of transformers, and through TRL's vLLM interface. vLLM itself is not installed for the tests: a
stand-in with the interface of TRL's `VLLMGeneration` samples from the policy and records its calls. That the real vLLM does what
TRL asks of it is not tested here.
"""

import pytest
import torch

from trl_score.tasks import Arithmetic


def rows(trainer, groups=2):
    return [trainer.train_dataset[i] for i in range(groups) for _ in range(trainer.num_generations)]


# Continuous batching

CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
}


def test_continuous_batching_gives_the_attempts_of_plain_generation(make_arithmetic_trainer):
    """Greedy, 20 problems: each second attempt belongs to its own first."""
    plain, continuous = make_arithmetic_trainer(), make_arithmetic_trainer(**CONTINUOUS)
    problems = plain.eval_dataset["prompt"]
    assert continuous.generate_attempts(problems) == plain.generate_attempts(problems)


def test_continuous_batching_trains_and_evaluates(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(max_steps=2, stage1_steps=1, **CONTINUOUS)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 2]
    assert "eval_kl_t2" in trainer.evaluate()
    assert not trainer._metrics["train"]  # all of the evaluation went to the evaluation's metrics


# vLLM


class StandIn:
    """TRL's `VLLMGeneration` on a CPU. `offset(attempt)` is added to the log-probabilities it reports."""

    created = None

    def __init__(self, model, processing_class, max_completion_length, temperature, **kwargs):
        self.model, self.tokenizer = model, processing_class
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.calls, self.syncs = [], 0
        self.offset = lambda attempt, row: 0.0
        StandIn.created = self

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        attempt = 1 + sum(instruction_ends(prompts[0], self.tokenizer))
        training = self.model.training
        self.model.eval()
        completions, logprobs = [], []
        for row, prompt in enumerate(prompts):
            sampling = (
                {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
            )
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=torch.tensor([prompt]), max_new_tokens=self.max_completion_length, **sampling
                )[0]
                logits = self.model(input_ids=output[None]).logits[0, len(prompt) - 1 : -1]
            ids = output[len(prompt) :]
            values = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
            completions.append(ids.tolist())
            # The whole deviation on the first token of the attempt.
            values[0] += self.offset(attempt, row)
            logprobs.append([[value] for value in values.tolist()])
        self.model.train(training)
        self.calls.append({"prompts": prompts, "num_generations": num_generations, "temperature": self.temperature})
        return prompts, completions, logprobs, [[[token] for token in ids] for ids in completions]


def instruction_ends(ids, tokenizer):
    """One `True` for each correction instruction in a context."""
    last_word = tokenizer.convert_tokens_to_ids(Arithmetic.correction_instruction.split()[-1])
    return [token == last_word for token in ids if token == last_word]


@pytest.fixture
def make_vllm_trainer(make_arithmetic_trainer, monkeypatch):
    def make(**kwargs):
        monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StandIn)
        trainer = make_arithmetic_trainer(use_vllm=True, vllm_mode="colocate", **kwargs)
        return trainer, StandIn.created

    return make


def test_vllm_samples_groups_for_the_first_attempt_and_one_each_for_the_second(make_vllm_trainer):
    trainer, vllm = make_vllm_trainer(max_steps=2)
    trainer.train()
    assert [call["num_generations"] for call in vllm.calls] == [4, 1, 4, 1]
    assert [call["temperature"] for call in vllm.calls] == [1.0] * 4
    assert vllm.syncs == 2  # once per step, not per attempt
    rollouts = trainer._rollouts
    expected = [
        prompt + attempts[0] + bridges[0]
        for prompt, attempts, bridges in zip(rollouts.prompt_ids, rollouts.attempts, rollouts.bridges, strict=True)
    ]
    assert vllm.calls[-1]["prompts"] == expected


def test_vllm_decodes_greedily_in_evaluation_only(make_vllm_trainer):
    trainer, vllm = make_vllm_trainer()
    trainer.evaluate()
    assert {(call["temperature"], call["num_generations"]) for call in vllm.calls} == {(0.0, 1)}
    assert vllm.temperature == 1.0


def test_log_probabilities_of_vllm_stay_aligned(make_vllm_trainer):
    """They equal those the trainer computes, token by token, and are 0 at the instruction."""
    trainer, _ = make_vllm_trainer()
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows(trainer))
    mask = output["attempt_ids"] > 0
    sampled, computed = output["sampling_per_token_logps"], output["old_per_token_logps"]
    torch.testing.assert_close(sampled[mask], computed[mask], atol=1e-4, rtol=1e-4)
    assert (sampled[~mask] == 0).all() and (~mask).any()
    torch.testing.assert_close(output["importance_sampling_ratio"][mask], torch.ones(mask.sum()), atol=1e-3, rtol=0)


def ratios(trainer, vllm, first, second):
    """The importance ratio that attempt 1 and attempt 2 of each row get when vLLM's log-probabilities are off by so much."""
    vllm.offset = lambda attempt, row: -(first, second)[attempt - 1]
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows(trainer))
    assert output["importance_sampling_ratio"].shape == output["attempt_ids"].shape
    ids, ratio = output["attempt_ids"], output["importance_sampling_ratio"]
    return [sorted({round(value, 2) for value in ratio[ids == k].tolist()}) for k in (1, 2)]


def test_sequence_mask_looks_at_each_attempt_by_itself(make_vllm_trainer):
    """Ratios e^0.8 = 2.23 and e^0.9 = 2.46 are below the clip of 3; their product, 5.47, would have masked every row."""
    trainer, vllm = make_vllm_trainer()
    assert trainer.vllm_importance_sampling_mode == "sequence_mask"
    assert ratios(trainer, vllm, 0.8, 0.9) == [[2.23], [2.46]]


def test_attempt_beyond_the_clip_is_masked_alone(make_vllm_trainer):
    """e^1.5 = 4.48 is above 3."""
    trainer, vllm = make_vllm_trainer()
    assert ratios(trainer, vllm, 1.5, 0.9) == [[0.0], [2.46]]
    assert ratios(trainer, vllm, 0.8, 1.5) == [[2.23], [0.0]]


def test_sequence_truncate_clips_each_attempt_by_itself(make_vllm_trainer):
    trainer, vllm = make_vllm_trainer(vllm_importance_sampling_mode="sequence_truncate")
    assert ratios(trainer, vllm, 1.5, 0.9) == [[3.0], [2.46]]


def test_token_modes_stay_per_token(make_vllm_trainer):
    """The deviation is on each attempt's first token; the others have a ratio of 1."""
    trainer, vllm = make_vllm_trainer(vllm_importance_sampling_mode="token_truncate")
    assert ratios(trainer, vllm, 1.5, 0.9) == [[1.0, 3.0], [1.0, 2.46]]


def test_training_through_vllm_moves_the_policy(make_vllm_trainer):
    trainer, _ = make_vllm_trainer(stage1_steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert [log["stage"] for log in trainer.state.log_history if "loss" in log] == [1, 1, 2, 2]
