"""
Attempts by continuous batching of transformers, and through TRL's vLLM interface. vLLM itself is not installed for the tests.
Stand-ins at two places: one with the interface of TRL's `VLLMGeneration` samples from the policy and records its calls; below
that, TRL's own `VLLMGeneration` runs with an engine, or a client of a server, that samples from a copy of the weights which only
a synchronization changes. That the real vLLM does what TRL asks of it is not tested here.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


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
        self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.generation_kwargs = 1.0, 0, 0.0, 1.0, {}
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
    rollouts = trainer._batch.rollouts
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


# TRL's own VLLMGeneration


class Weights:
    """What vLLM would hold: a copy of the base model's weights, which only what TRL sends changes. Records the order of events."""

    def __init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH).eval()
        self.events, self.used = [], []  # `used`: the weights that each call sampled from

    def load_weights(self, named):
        parameters = dict(self.model.named_parameters())
        for name, value in named:
            parameters[name].data.copy_(value)

    def sample(self, prompts, temperature, max_tokens):
        """Tokens of each prompt, and their log-probabilities."""
        self.used.append(copy.deepcopy(self.model.state_dict()))
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        sampled = []
        for prompt in prompts:
            with torch.no_grad():
                output = self.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=max_tokens, **sampling)[
                    0
                ]
                logits = self.model(input_ids=output[None]).logits[0, len(prompt) - 1 : -1]
            ids = output[len(prompt) :]
            sampled.append((ids.tolist(), logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1).tolist()))
        return sampled


class Engine(Weights):
    """`vllm.LLM`. It is only used awake, and loses its weights in its sleep (level 2)."""

    def __init__(self, enable_sleep_mode=False, **kwargs):
        super().__init__()
        self.awake, self.prompts = {"weights", "kv_cache"}, []
        runner = SimpleNamespace(model=self)
        driver = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=driver)

    def wake_up(self, tags):
        self.events.append(f"wake {tags[0]}")
        self.awake |= set(tags)

    def sleep(self, level):
        self.events.append("sleep")
        self.awake = set()
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def load_weights(self, named):
        assert "weights" in self.awake
        if self.events[-1:] != ["load"]:
            self.events.append("load")
        super().load_weights(named)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        self.events.append("generate")
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        self.prompts.append(prompts)
        assert sampling_params.n == 1
        outputs = []
        for prompt, (ids, values) in zip(
            prompts, self.sample(prompts, sampling_params.temperature, sampling_params.max_tokens), strict=True
        ):
            logprobs = [{i: SimpleNamespace(rank=1, logprob=value)} for i, value in zip(ids, values, strict=True)]
            output = SimpleNamespace(token_ids=ids, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=[output]))
        return outputs


class Client(Weights):
    """TRL's `VLLMClient` of a server."""

    def __init__(self, **kwargs):
        super().__init__()
        self.requests = []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named):
        named = list(named)
        assert [(name, list(value.shape)) for name, value in named] == [(name, shape) for name, _, shape in metadata]
        self.events.append("load")
        self.load_weights(named)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, n, temperature, max_tokens, **kwargs):
        self.events.append("generate")
        self.requests.append({"prompts": prompts, "n": n, "temperature": temperature})
        sampled = self.sample([prompt for prompt in prompts for _ in range(n)], temperature, max_tokens)
        return {
            "prompt_ids": prompts,
            "completion_ids": [ids for ids, _ in sampled],
            "logprobs": [[[value] for value in values] for _, values in sampled],
        }


@pytest.fixture
def make_trl_vllm_trainer(make_arithmetic_trainer, monkeypatch):
    """A trainer with TRL's `VLLMGeneration`, and what it takes for vLLM."""

    def make(mode, **kwargs):
        monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
        monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
        monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
        monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
        monkeypatch.setattr(vllm_generation, "empty_cache", lambda: None)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # it sets them
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        trainer = make_arithmetic_trainer(use_vllm=True, vllm_mode=mode, **kwargs)
        generation = trainer.vllm_generation
        return trainer, generation.llm if mode == "colocate" else generation.vllm_client

    return make


def weights_before_each_step(trainer):
    """Filled while it trains."""
    found, step = [], trainer.training_step

    def training_step(model, *args, **kwargs):
        found.append(copy.deepcopy(trainer.model.state_dict()))
        return step(model, *args, **kwargs)

    trainer.training_step = training_step
    return found


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_both_attempts_of_a_step_come_from_its_current_weights(make_trl_vllm_trainer, mode):
    trainer, vllm = make_trl_vllm_trainer(mode, max_steps=3, stage1_steps=1)
    current = weights_before_each_step(trainer)
    trainer.train()
    assert vllm.events == ["load", "generate", "generate"] * 3
    for step in range(3):
        assert equal(current[step], vllm.used[2 * step]) and equal(current[step], vllm.used[2 * step + 1])
    assert not equal(current[0], current[1]) and not equal(current[1], current[2])
    trainer.evaluate()  # of the weights after the last step
    assert vllm.events[9:11] == ["load", "generate"]
    assert all(equal(trainer.model.state_dict(), used) for used in vllm.used[6:])


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_rollouts_that_are_used_for_several_steps_keep_their_sampler(make_trl_vllm_trainer, mode):
    trainer, vllm = make_trl_vllm_trainer(mode, max_steps=4, stage1_steps=2, num_iterations=2)
    trainer.train()
    assert vllm.events == ["load", "generate", "generate"] * 2


def test_engine_is_awake_for_every_attempt_and_asleep_afterwards(make_trl_vllm_trainer):
    """Level 2 loses the weights, so each attempt has them loaded again: TRL puts the engine to sleep after each `generate`."""
    trainer, vllm = make_trl_vllm_trainer(
        "colocate", vllm_enable_sleep_mode=True, max_steps=2, stage1_steps=1, num_attempts=3
    )
    current = weights_before_each_step(trainer)
    trainer.train()
    attempt = ["wake weights", "load", "wake kv_cache", "generate", "sleep"]
    assert vllm.events == ["sleep"] + attempt * 3 * 2
    assert all(equal(current[i // 3], used) for i, used in enumerate(vllm.used))
    trainer.evaluate()
    assert vllm.awake == set()


def test_server_gets_problems_for_the_first_attempt_and_contexts_for_the_second(make_trl_vllm_trainer):
    trainer, vllm = make_trl_vllm_trainer("server", max_steps=1, stage1_steps=1)
    trainer.train()
    first, second = vllm.requests
    rollouts = trainer._batch.rollouts
    assert (first["n"], second["n"]) == (4, 1)
    assert first["prompts"] == rollouts.prompt_ids[::4] and len(first["prompts"]) == 2
    assert second["prompts"] == [
        prompt + attempts[0] + bridges[0]
        for prompt, attempts, bridges in zip(rollouts.prompt_ids, rollouts.attempts, rollouts.bridges, strict=True)
    ]
    trainer.evaluate()
    assert {(request["n"], request["temperature"]) for request in vllm.requests[2:]} == {(1, 0.0)}


def test_engine_gets_every_row_for_every_attempt(make_trl_vllm_trainer):
    trainer, vllm = make_trl_vllm_trainer("colocate", max_steps=1, stage1_steps=1)
    trainer.train()
    assert [len(prompts) for prompts in vllm.prompts] == [8, 8]


def test_log_probabilities_of_the_engine_are_those_of_the_trainer(make_trl_vllm_trainer):
    trainer, _ = make_trl_vllm_trainer("colocate")
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows(trainer))
    mask = output["attempt_ids"] > 0
    torch.testing.assert_close(
        output["sampling_per_token_logps"][mask], output["old_per_token_logps"][mask], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_best_checkpoint_reaches_vllm(make_trl_vllm_trainer, tmp_path, mode):
    """An evaluation at the last step has loaded that step's weights; then the trainer goes back to better ones."""
    trainer, vllm = make_trl_vllm_trainer(
        mode, max_steps=2, stage1_steps=1, save_steps=1, eval_steps=2, eval_strategy="steps"
    )
    trainer.train()
    last = copy.deepcopy(trainer.model.state_dict())
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer._load_best_model()
    assert not equal(trainer.model.state_dict(), last)
    trainer.evaluate()
    assert equal(trainer.model.state_dict(), vllm.used[-1])
