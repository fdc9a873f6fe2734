"""Rollouts that share their first attempt (`second_attempts_per_first`), in the trainer."""

from types import SimpleNamespace

import pytest
import torch
from test_ablations import with_stored
from test_generation_backends import make_vllm_trainer  # noqa: F401
from test_schedule_and_kl import first_token
from test_score_trainer import move, rollouts

from trl_score.objective import kl_weights, shaped_rewards, shared_first_credit, sum_per_attempt, tree_advantages


def count_calls(trainer):
    """The number of contexts of each generation from now on."""
    calls, generate = [], trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *args, **kwargs: (
        calls.append((len(ids), kwargs["num_generations"])) or generate(ids, *args, **kwargs)
    )
    return calls


def lengths(trainer):
    return [[len(ids) for ids in row] for row in trainer._rollouts.attempts]


def advantages_of(inputs, num_attempts=2):
    return torch.stack(
        [first_token(inputs["advantages"], inputs["attempt_ids"], k + 1) for k in range(num_attempts)], 1
    )


@pytest.mark.parametrize("step", [0, 2])
def test_first_attempts_are_sampled_once_and_shared(make_arithmetic_trainer, step):
    trainer = make_arithmetic_trainer(second_attempts_per_first=2, stage1_steps=2)
    calls = count_calls(trainer)
    inputs = rollouts(trainer, step)
    assert calls == [(4, 2), (8, 1)]
    firsts = [tuple(row[0]) for row in trainer._rollouts.attempts]
    assert firsts[::2] == firsts[1::2] and len(set(firsts)) > 2
    assert len({tuple(row[1]) for row in trainer._rollouts.attempts}) > 4
    assert ((inputs["attempt_ids"] == 1).any(1) & (inputs["attempt_ids"] == 2).any(1)).all()
    rewards = torch.cat(trainer._attempt_rewards, dim=1)
    expected = tree_advantages(shaped_rewards(rewards, stage=1 + step // 2, alpha=10.0), 4, 2)
    torch.testing.assert_close(advantages_of(inputs), expected)
    weights = kl_weights(1 + step // 2, beta=0.01, stage1_beta=0.1)
    torch.testing.assert_close(first_token(inputs["kl_weights"], inputs["attempt_ids"], 1), weights[:1].expand(8))
    assert trainer._metrics["train"]["num_generated_tokens"] == [
        sum(second + first * (i % 2 == 0) for i, (first, second) in enumerate(lengths(trainer)))
    ]


def test_three_attempts_go_on_from_the_shared_first(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(num_attempts=3, second_attempts_per_first=2, stage1_steps=0, gamma=0.5)
    calls = count_calls(trainer)
    inputs = rollouts(trainer)
    assert calls == [(4, 2), (8, 1), (8, 1)]
    rewards = torch.cat(trainer._attempt_rewards, dim=1)
    credit = shared_first_credit(shaped_rewards(rewards, stage=2, alpha=10.0, gamma=0.5), 2)
    torch.testing.assert_close(advantages_of(inputs, 3), tree_advantages(credit, 4, 2))


def test_the_tree_can_wait_for_stage_two(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(
        second_attempts_per_first=2, second_attempts_from_stage=2, stage1_steps=2, max_steps=4
    )
    calls = count_calls(trainer)
    trainer.train()
    assert calls == [(8, 4), (8, 1)] * 2 + [(4, 2), (8, 1)] * 2
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1, 1, 2, 2]


def test_evaluation_has_no_tree_and_generates_no_training_tokens(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(second_attempts_per_first=2, num_generations_eval=2)
    calls = count_calls(trainer)
    metrics = trainer.evaluate()
    assert {size for size, _ in calls} == {8} and metrics["eval_num_generated_tokens"] == 0
    assert metrics["eval_accuracy_t1"] == make_arithmetic_trainer().evaluate()["eval_accuracy_t1"]


def test_generated_tokens_add_up_over_the_run(make_arithmetic_trainer):
    """One process, every token of both attempts, step after step."""
    trainer = make_arithmetic_trainer(max_steps=3)
    counted, log_rollouts = [], trainer._log_rollouts
    trainer._log_rollouts = lambda *args, **kwargs: (
        counted.append(sum(map(sum, lengths(trainer)))) or log_rollouts(*args, **kwargs)
    )
    trainer.train()
    logged = [log["num_generated_tokens"] for log in trainer.state.log_history if "num_generated_tokens" in log]
    assert logged == [sum(counted[:1]), sum(counted[:2]), sum(counted[:3])]
    assert trainer.evaluate()["eval_num_generated_tokens"] == logged[-1]


def test_stored_first_attempts_are_shared_too(make_arithmetic_trainer):
    """Groups of 8 in runs of 2: two sampled first attempts and two stored ones. Stored tokens are not generated."""
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()},
        **{"offline_first_attempts": 0.5, "stage1_steps": 0, "second_attempts_per_first": 2, "num_generations": 8},
        **{"per_device_train_batch_size": 16, "kl_level": "sequence"},
    )
    move(trainer)
    calls = count_calls(trainer)
    inputs = rollouts(trainer, rows=16)
    assert calls == [(4, 1), (16, 1)]
    firsts = [tuple(row[0]) for row in trainer._rollouts.attempts]
    assert firsts[::2] == firsts[1::2]
    for start, problem in ((0, 0), (8, 1)):
        stored = {tuple(trainer._attempt_tokens(text)) for text in trainer.train_dataset[problem]["first_attempts"]}
        assert len(set(firsts[start + 4 : start + 8])) == 2 and set(firsts[start + 4 : start + 8]) <= stored
    advantages = advantages_of(inputs).view(2, 8, 2)
    assert advantages[:, 4:, 0].isnan().all()
    torch.testing.assert_close(advantages[:, 0, 0], -advantages[:, 2, 0])  # only the two sampled ones are compared
    torch.testing.assert_close(advantages[:, ::2, 1], -advantages[:, 1::2, 1])
    sampled = [second + first * (i % 8 in (0, 2)) for i, (first, second) in enumerate(lengths(trainer))]
    assert trainer._num_generated_tokens == sum(sampled)


def test_odd_shares_of_stored_attempts_are_whole_runs(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()},
        **{"offline_first_attempts": 0.3, "second_attempts_per_first": 2, "num_generations": 8},
    )
    assert trainer.args.num_offline == 2


def test_processes_ask_for_equally_many_first_attempts(make_arithmetic_trainer):
    """Groups of 8 in runs of 2, the second half stored, over two processes of 4 rows: the second one asks for two in vain."""
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()},
        **{"offline_first_attempts": 0.5, "second_attempts_per_first": 2, "num_generations": 8},
    )
    trainer.model.train()
    asked = []
    trainer._generate_single_turn = lambda ids, *_, **__: (asked.append(ids) or [[len(asked)]] * len(ids), None)
    got = []
    for process, stored in ((0, [None] * 4), (1, [[1], [1], [2], [2]])):
        trainer.accelerator = SimpleNamespace(process_index=process, num_processes=2)
        trainer._stored = stored
        got.append(trainer._sample_or_take([[5], [5], [6], [6]])[0])
    assert got == [[[1]] * 4, [[1], [1], [2], [2]]]
    assert asked == [[[5], [6]], [[5], [5]]]


@pytest.mark.parametrize("stage1_steps", [0, 4])
def test_sequence_kl_and_whitening_know_the_tree(make_arithmetic_trainer, stage1_steps):
    trainer = make_arithmetic_trainer(
        **{"second_attempts_per_first": 2, "kl_level": "sequence", "stage1_steps": stage1_steps, "beta": 0.3},
        **{"whiten_advantages": True, "stage1_beta": 0.7},
    )
    move(trainer)
    inputs = rollouts(trainer)
    kl = sum_per_attempt(trainer._policy_logps(inputs) - inputs["ref_per_token_logps"], inputs["attempt_ids"], 2)
    torch.testing.assert_close(kl[::2, 0], kl[1::2, 0], atol=1e-4, rtol=1e-4)
    stage = 2 if stage1_steps == 0 else 1
    rewards = torch.cat(trainer._attempt_rewards, dim=1)
    penalty = kl_weights(stage, beta=0.3, stage1_beta=0.7) * kl
    expected = tree_advantages(shaped_rewards(rewards, stage=stage, alpha=10.0, penalty=penalty), 4, 2)
    expected = expected / (expected.square().mean(0).sqrt() + 1e-4)
    torch.testing.assert_close(advantages_of(inputs), expected, atol=1e-3, rtol=1e-3)


def test_a_run_with_everything_trains_both_stages(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(
        **{
            "second_attempts_per_first": 2,
            "adaptive_stage1_beta": True,
            "steps_per_generation": 2,
            "num_iterations": 2,
        },
        max_steps=8,
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())
    assert {log["stage"] for log in trainer.state.log_history if "stage" in log} == {1, 2}


def test_vllm_samples_the_first_attempts_of_a_problem_together(make_vllm_trainer):  # noqa: F811
    trainer, vllm = make_vllm_trainer(second_attempts_per_first=2, max_steps=1)
    output = rollouts(trainer)
    assert [(len(call["prompts"]), call["num_generations"]) for call in vllm.calls] == [(4, 2), (8, 1)]
    mask = output["attempt_ids"] > 0
    sampled, computed = output["sampling_per_token_logps"], output["old_per_token_logps"]
    torch.testing.assert_close(sampled[mask], computed[mask], atol=1e-4, rtol=1e-4)
