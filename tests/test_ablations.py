"""What the ablations of Section 6.3 switch off by configuration: second attempts, and first attempts of the policy."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_score_trainer import per_token_gradient, rollouts

from trl_score.first_attempts import attempt_tokens, most_sampled, sample_or_take, stored_attempts
from trl_score.objective import leave_one_out_advantages
from trl_score.tasks import Arithmetic


def with_stored(rows=32, attempts=("1 2 3 4 5 6 0", "9 8 7 6 5 4 0", "0 0 0 0 0 0 0")):
    """Training problems with three stored first attempts each; the second one is the gold answer."""
    data = Arithmetic(num_train=rows).load("train")
    first, _, third = attempts
    return data.map(lambda row: {"first_attempts": [first, row["answer"], third]})


# Single-attempt RL


def test_single_attempt_rl_trains_one_attempt_and_measures_two(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(num_attempts=1, stage1_steps=0, max_steps=2)
    inputs = rollouts(trainer)
    assert set(inputs["attempt_ids"].unique().tolist()) <= {0, 1}
    rewards = trainer._batch.rewards[0]
    expected = leave_one_out_advantages(rewards, trainer.num_generations)
    torch.testing.assert_close(inputs["advantages"][:, 0], expected[:, 0])
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_accuracy_t1", "eval_accuracy_t2", "eval_delta_t1_t2", "eval_changed_ratio"} <= set(metrics)
    logged = next(log for log in trainer.state.log_history if "accuracy_t1" in log)
    assert logged["stage"] == 2 and not {"accuracy_t2", "delta_t1_t2", "changed_ratio"} & set(logged)


def test_evaluation_can_have_more_attempts_than_training(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(num_attempts_eval=4)
    metrics = trainer.evaluate()
    assert {"eval_accuracy_t4", "eval_delta_t3_t4", "eval_delta_t1_t4"} <= set(metrics)
    assert [len(row) for row in trainer.generate_attempts(trainer.eval_dataset[:2]["prompt"])] == [4, 4]


# Stored first attempts


def test_stored_first_attempts_are_used_graded_and_not_trained(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()}, offline_first_attempts=1.0, stage1_steps=0, beta=0.5, num_generations=4
    )
    inputs = rollouts(trainer)
    stored = [set(trainer.train_dataset[i]["first_attempts"]) for i in range(2)]
    texts = [completion[0]["content"] for completion in trainer._batch.completions[0]]
    assert set(texts[:4]) == stored[0] and set(texts[4:]) == stored[1]  # all three, before one comes again
    gold = [trainer.train_dataset[i // 4]["answer"] for i in range(8)]
    assert trainer._batch.rewards[0][:, 0].tolist() == [float(t == g) for t, g in zip(texts, gold, strict=True)]
    assert 1 not in inputs["attempt_ids"] and 2 in inputs["attempt_ids"]
    gradient, _ = per_token_gradient(trainer, inputs)
    assert (gradient[inputs["attempt_ids"] == 0] == 0).all() and (gradient != 0).any()
    end = trainer._tokenizer.eos_token_id  # the stored text does not end its turn; the bridge does, as context
    assert (inputs["completion_ids"][:, 7] == end).all()


def test_sampled_and_stored_first_attempts_in_one_group(make_arithmetic_trainer):
    """Half of each group of 4: the first two are sampled and have their own baseline, the last two are stored."""
    trainer = make_arithmetic_trainer(
        {"train_dataset": with_stored()}, offline_first_attempts=0.5, stage1_steps=0, alpha=10.0
    )
    calls = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *args, **kwargs: (
        calls.append(len(ids)) or generate(ids, *args, **kwargs)
    )
    inputs = rollouts(trainer)
    assert calls == [4, 8]  # first attempts of half of the rows, second ones of all
    has_first = (inputs["attempt_ids"] == 1).any(1).tolist()
    assert has_first == [True, True, False, False] * 2
    first, second = (values[:, 0] for values in trainer._batch.rewards)
    for start in (0, 4):
        first_token = inputs["advantages"][start : start + 2, 0]
        torch.testing.assert_close(first_token, first[start : start + 2] - first[start : start + 2].flip(0))
        credit = (second + 10 * (second - first))[start : start + 4]
        expected = credit - (credit.sum() - credit) / 3
        of_second = (inputs["attempt_ids"][start : start + 4] == 2).int().argmax(1)
        got = inputs["advantages"][start : start + 4].gather(1, of_second[:, None])[:, 0]
        torch.testing.assert_close(got, expected)


def test_the_draw_of_stored_attempts_is_the_same_on_all_processes_and_differs_between_steps(make_arithmetic_trainer):
    rows = with_stored(attempts=("1", "2", "3"))
    trainer = make_arithmetic_trainer({"train_dataset": rows}, offline_first_attempts=1.0)
    batch = [trainer.train_dataset[i // 4] for i in range(8)]

    def stored(rows, start=0, step=0):
        return stored_attempts(rows, start, trainer.args, step, trainer._tokenizer)

    parts = []
    for start in range(0, 8, 2):  # four processes
        parts += stored(batch[start : start + 2], start)
    assert parts == stored(batch)
    drawn = [stored(batch, step=step) for step in range(6)]
    assert len({str(each) for each in drawn}) > 1


def test_a_process_without_a_row_to_sample_takes_part_in_the_generation(make_arithmetic_trainer):
    """Groups of 4 over two processes of 2 rows: the second process has the stored half."""
    trainer = make_arithmetic_trainer({"train_dataset": with_stored()}, offline_first_attempts=0.5)
    trainer.accelerator = SimpleNamespace(process_index=1, num_processes=2)
    calls = []
    trainer._generate_single_turn = lambda ids, *_, **__: (calls.append(ids) or [[7]] * len(ids), None)
    sample = lambda contexts, num_generations: trainer._generate_single_turn(contexts)  # noqa: E731
    most = most_sampled(2, trainer.accelerator.num_processes, trainer.args)
    taken = sample_or_take([[5], [6]], [[1, 2], [3]], sample, most)
    assert taken == ([[1, 2], [3]], None)
    assert calls == [[[5], [5]]]


def test_evaluation_samples_its_first_attempts(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer({"train_dataset": with_stored()}, offline_first_attempts=1.0)
    plain = make_arithmetic_trainer()
    assert trainer.evaluate()["eval_accuracy_t1"] == plain.evaluate()["eval_accuracy_t1"] > 0


def test_token_ids_and_text_are_the_same_stored_attempts(make_arithmetic_trainer):
    texts = with_stored()
    trainer = make_arithmetic_trainer({"train_dataset": texts}, offline_first_attempts=1.0)
    ids = [[attempt_tokens(text, trainer._tokenizer) for text in row] for row in texts["first_attempts"]]
    other = make_arithmetic_trainer(
        {"train_dataset": texts.remove_columns("first_attempts").add_column("first_attempts", ids)},
        offline_first_attempts=1.0,
    )
    torch.manual_seed(0)
    first = rollouts(trainer)
    torch.manual_seed(0)
    assert torch.equal(first["completion_ids"], rollouts(other)["completion_ids"])


def test_missing_empty_and_overlong_stored_attempts_are_refused(make_arithmetic_trainer):
    rows = Arithmetic(num_train=4).load("train")
    with pytest.raises(ValueError, match="a column `first_attempts`, which `train_dataset` does not have"):
        make_arithmetic_trainer({"train_dataset": rows}, offline_first_attempts=0.5)
    with pytest.raises(ValueError, match="no `first_attempts` in row 1"):
        make_arithmetic_trainer(
            {"train_dataset": rows.add_column("first_attempts", [["1"], [], ["1"], ["1"]])}, offline_first_attempts=0.5
        )
    streamed = Dataset.to_iterable_dataset(rows.add_column("first_attempts", [[""]] * 4))
    with pytest.raises(ValueError, match="no `first_attempts` in row 0"):
        make_arithmetic_trainer({"train_dataset": streamed}, offline_first_attempts=0.5)
    long = rows.add_column("first_attempts", [[" ".join("1" * 50)]] * 4)
    with pytest.raises(ValueError, match="context of 64 tokens is too short"):
        make_arithmetic_trainer({"train_dataset": long}, offline_first_attempts=0.5)
    of_another_model = rows.add_column("first_attempts", [[[1, 2]], [[1], [2, 500]], [[1]], [[1]]])
    with pytest.raises(ValueError, match="the token id 500 in row 1, but the model has 19 tokens"):
        make_arithmetic_trainer({"train_dataset": of_another_model}, offline_first_attempts=0.5)


def test_a_run_with_stored_first_attempts_trains_both_stages(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer({"train_dataset": with_stored()}, offline_first_attempts=0.5, max_steps=4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())
    assert {log["stage"] for log in trainer.state.log_history if "stage" in log} == {1, 2}
