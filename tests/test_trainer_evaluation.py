"""What the trainer measures while it trains: of the model's own distribution, each problem once, and nothing that training notices."""

import json
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from processes import ranks
from test_distributed import WORKER
from test_score_trainer import move, rollouts
from transformers import GenerationConfig

from trl_score import SCoReConfig
from trl_score.sampling import TransformersSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


# The distribution


EVERYTHING = {
    **{"do_sample": True, "temperature": 0.3, "top_p": 0.2, "top_k": 2, "min_p": 0.5, "typical_p": 0.3},
    **{"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "suppress_tokens": [3, 4], "min_new_tokens": 6},
    **{"begin_suppress_tokens": [5], "bad_words_ids": [[6]], "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    **{"forced_eos_token_id": 7, "sequence_bias": [[[8], 5.0]], "exponential_decay_length_penalty": [2, 1.5]},
    **{"renormalize_logits": True, "remove_invalid_values": True, "encoder_repetition_penalty": 1.5},
}


@pytest.fixture
def opinionated_model(tmp_path):
    """The embedded base with a `generation_config.json` that sets every field which changes what is sampled."""
    folder = tmp_path / "opinionated"
    shutil.copytree(BASE_MODEL_PATH, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | EVERYTHING))
    return str(folder)


def processors(trainer, run):
    """Which logits processors `generate` used, for each call of it while something runs."""
    model, seen = trainer.model, []
    get = model._get_logits_processor

    def keep(*args, **kwargs):
        found = get(*args, **kwargs)
        seen.append([type(each).__name__ for each in found])
        return found

    model._get_logits_processor = keep
    try:
        run()
    finally:
        del model._get_logits_processor
    return seen


@pytest.mark.parametrize("eval_temperature", [0.0, 0.7])
def test_generation_config_of_a_checkpoint_changes_nothing(
    make_arithmetic_trainer, opinionated_model, eval_temperature
):
    found = []
    for model in (str(BASE_MODEL_PATH), opinionated_model):
        trainer = make_arithmetic_trainer(
            {"model": model}, temperature=2.0, eval_temperature=eval_temperature, num_test=8
        )
        torch.manual_seed(0)
        metrics = {}
        names = processors(trainer, lambda: (rollouts(trainer), metrics.update(trainer.evaluate())))  # noqa: B023
        kept = {name: value for name, value in metrics.items() if "time" not in name and "per_second" not in name}
        found.append((trainer._batch.rollouts.attempts, names, kept))
    assert found[0] == found[1]
    assert trainer.model.generation_config.repetition_penalty == 3.0  # saved with the model as it was


def test_evaluation_ignores_what_cuts_the_distribution_in_training(make_arithmetic_trainer):
    found = []
    for options in ({}, {"top_p": 0.1, "repetition_penalty": 5.0, "generation_kwargs": {"min_new_tokens": 7}}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = make_arithmetic_trainer(num_test=8, eval_temperature=0.7, **options)
        torch.manual_seed(0)
        trainer.evaluate()
        found.append(trainer._batch.rollouts.attempts)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "kwargs", [{"top_p": 0.5}, {"min_p": 0.1}, {"suppress_tokens": [3]}, {"do_sample": False}, {"temperature": 0.5}]
)
def test_generation_kwargs_that_change_the_distribution_warn(tmp_path, kwargs):
    with pytest.warns(UserWarning, match="generation_kwargs=.*: attempts are sampled from another distribution"):
        SCoReConfig(str(tmp_path), bf16=False, generation_kwargs=kwargs)


def test_generation_kwargs_that_do_not_change_it_are_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kwargs = {"top_p": 1.0, "use_cache": True, "temperature": 1.0, "eos_token_id": [3, 4]}
        SCoReConfig(str(tmp_path), bf16=False, generation_kwargs=kwargs)


def test_every_field_of_a_generation_config_is_neutral_technical_or_warned_of(tmp_path):
    """A field of a newer transformers is warned of, not overlooked: only known ones are silent."""
    from trl_score.score_config import NEUTRAL_GENERATION_KWARGS, TECHNICAL_GENERATION_KWARGS

    known = TECHNICAL_GENERATION_KWARGS | NEUTRAL_GENERATION_KWARGS.keys()
    assert {name for name in EVERYTHING if name in TECHNICAL_GENERATION_KWARGS} == set()
    assert "temperature" not in known and hasattr(GenerationConfig(), "temperature")


# The run does not notice


@pytest.mark.parametrize("eval_temperature", [0.0, 1.0])
def test_run_with_evaluations_equals_the_one_without(make_arithmetic_trainer, tmp_path, eval_temperature):
    found = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = make_arithmetic_trainer(
            num_test=9, eval_temperature=eval_temperature, output_dir=str(tmp_path / str(len(found))), **options
        )
        trainer.train()
        found.append(dict(trainer.model.state_dict()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_prediction_leaves_nothing_in_the_next_evaluation(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(num_test=8)
    expected = trainer.evaluate()
    impossible = trainer.eval_dataset.map(lambda row: {"answer": "x"})
    predicted = trainer.predict(impossible).metrics
    assert predicted["test_accuracy_t1"] == 0.0 and predicted["test_reward_t2"] == 0.0
    found = trainer.evaluate()
    for name in ("accuracy_t1", "accuracy_t2", "reward_t2", "reward", "kl_t1", "completions/mean_length_t1"):
        assert found[f"eval_{name}"] == expected[f"eval_{name}"], name


# Names of several sets


def test_several_sets_have_names_of_their_own(make_arithmetic_trainer):
    task = Arithmetic(num_test=8)
    sets = {"possible": task.load("test"), "impossible": task.load("test").map(lambda row: {"answer": "x"})}
    trainer = make_arithmetic_trainer(
        {"eval_dataset": sets},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="eval_possible_accuracy_t1",
        load_best_model_at_end=True,
    )
    trainer.train()
    logs = trainer.state.log_history
    assert all(log["eval_possible_accuracy_t1"] > 0 for log in logs if "eval_possible_loss" in log)
    assert all(log["eval_impossible_accuracy_t1"] == 0 for log in logs if "eval_impossible_loss" in log)
    assert not any(name.startswith("eval_accuracy") for log in logs for name in log)
    assert trainer.state.best_metric == max(log.get("eval_possible_accuracy_t1", 0) for log in logs)
    metrics = trainer.evaluate()
    assert metrics["eval_possible_accuracy_t1"] > 0 == metrics["eval_impossible_accuracy_t1"]
    assert metrics["eval_possible_num_problems"] == metrics["eval_impossible_num_problems"] == 8
    assert "held_out_kl_t1" in trainer.evaluate(sets["possible"], metric_key_prefix="held_out")
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "`possible`" in card and "`impossible`" in card
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert (f"| step {step}, best eval_possible_accuracy_t1 |" in card) == (step < 2)


def test_a_metric_of_no_evaluation_set_cannot_choose_the_best_model(make_arithmetic_trainer):
    sets = {"easy": Arithmetic(num_test=8).load("test"), "hard": Arithmetic(num_test=8).load("test")}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy_t2"}
    with pytest.raises(ValueError, match=r"does not say which of the evaluation sets .*: 'easy_accuracy_t2'"):
        make_arithmetic_trainer({"eval_dataset": sets}, **settings)
    make_arithmetic_trainer({"eval_dataset": sets}, **settings | {"metric_for_best_model": "hard_accuracy_t2"})
    make_arithmetic_trainer(**settings)


# Each problem once


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_of_two_processes_counts_each_problem_once(tmp_path, streamed):
    """Nine problems in batches of four over two processes: five rows fill up the last round, and none of them is counted."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = {"evaluate_only": True, "generated": True, "num_test": 9, "per_device_eval_batch_size": 4}
        settings |= {"per_device_train_batch_size": 8 // processes, "max_steps": 1, "stage1_steps": 0}
        settings["streamed"] = streamed
        done = ranks(processes, WORKER, folder, json.dumps(settings), ACCELERATE_USE_CPU="true", timeout=120)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads((folder / "metrics.json").read_text()))
    one, two = found
    assert one["eval_num_problems"] == two["eval_num_problems"] == 9
    compared = [
        *("accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i", "reward_t1", "reward_t2")
    ]
    compared += ["kl_t1", "kl_t2", "edit_distance_ratio", "changed_ratio", "completions/mean_length_t2", "reward"]
    compared += ["completions/clipped_ratio_t1", "completions/mean_length", "rewards/reward/mean"]
    for name in compared:
        assert two[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], abs=1e-6), name
    assert one["eval_kl_t1"] > 1e-3


def test_smaller_last_batch_counts_its_rollouts_not_itself(make_arithmetic_trainer):
    """KL too: three problems in batches of two give the mean over all tokens, as in one batch of three."""
    found = []
    for batch_size in (2, 3):
        trainer = make_arithmetic_trainer(num_test=3, per_device_eval_batch_size=batch_size)
        move(trainer, scale=0.3)
        found.append(trainer.evaluate())
    for name in ("kl_t1", "kl_t2", "accuracy_t1", "reward_t2", "completions/mean_length_t1", "reward"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-6), name


def test_dropping_the_last_batch_is_for_training(make_arithmetic_trainer):
    """With `dataloader_drop_last` the Trainer leaves problems out of an evaluation, or all if they are fewer than a batch."""
    for batch_size in (2, 8):
        trainer = make_arithmetic_trainer(num_test=3, per_device_eval_batch_size=batch_size, dataloader_drop_last=True)
        assert trainer.evaluate()["eval_num_problems"] == 3 and trainer.args.dataloader_drop_last
        assert trainer.predict(trainer.eval_dataset).metrics["test_num_problems"] == 3


def test_each_dataset_is_evaluated_itself(make_arithmetic_trainer):
    """Also a stream in a prediction, and one dataset after another with workers that persist."""
    rows = Arithmetic(num_test=5).load("test")
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_arithmetic_trainer(num_test=3, **options)
    assert trainer.evaluate()["eval_num_problems"] == 3
    assert trainer.evaluate(rows)["eval_num_problems"] == 5
    assert trainer.predict(rows).metrics["test_num_problems"] == 5
    assert trainer.evaluate()["eval_num_problems"] == 3
    stream = IterableDataset.from_generator(lambda: iter(list(rows)))
    trainer = make_arithmetic_trainer(num_generations_eval=2)
    assert trainer.predict(stream).metrics["test_num_rollouts"] == 10


def test_another_dataset_is_checked_when_it_is_evaluated(make_arithmetic_trainer):
    """As those that the trainer was constructed with: a chat template writes a missing text as the word None."""
    trainer = make_arithmetic_trainer()
    rows = Arithmetic(num_test=2).load("test")
    missing = Dataset.from_list([rows[0], rows[1] | {"prompt": [{"role": "user", "content": None}]}])
    for evaluate in (trainer.evaluate, trainer.predict, lambda rows: trainer.evaluate({"hard": rows})):
        with pytest.raises(ValueError, match="no problem in row 1"):
            evaluate(missing)
        with pytest.raises(ValueError, match="has a column `attempt`, the keyword"):
            evaluate(rows.add_column("attempt", [1, 2]))
    assert trainer.evaluate(rows)["eval_num_problems"] == 2


# Another number of attempts


@pytest.mark.parametrize(("train", "evaluated"), [(2, 3), (3, 2), (1, 2)])
def test_another_number_of_attempts_in_evaluation(make_arithmetic_trainer, train, evaluated):
    """In every stage (with three attempts I(a), I(b) and II), and in the completions table."""
    trainer = make_arithmetic_trainer(
        num_attempts=train, num_attempts_eval=evaluated, num_test=8, log_completions=True, max_steps=4,
        stage1_steps=0 if train == 1 else 3, eval_strategy="steps", eval_steps=1, num_completions_to_print=0,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    assert all(f"accuracy_t{train}" in log and f"accuracy_t{train + 1}" not in log for log in logs if "loss" in log)
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) == 4
    for log in evaluations:
        assert f"eval_kl_t{evaluated}" in log and f"eval_accuracy_t{evaluated + 1}" not in log
    folder = Path(trainer.args.output_dir, "completions")
    assert sorted(file.name for file in folder.iterdir()) == [
        f"completions_{name}0000{step}.parquet" for name in ("", "eval_") for step in (1, 2, 3, 4)
    ]
    for name, attempts in (("completions_00003", train), ("completions_eval_00003", evaluated)):
        table = pd.read_parquet(folder / f"{name}.parquet")
        assert len(table) == 8 and set(table["step"]) == {3}
        assert f"reward/attempt_{attempts}" in table and f"reward/attempt_{attempts + 1}" not in table


def test_each_evaluation_has_its_own_completions(make_arithmetic_trainer):
    """Also those of more rows than a generation has."""
    rows = Arithmetic(num_test=20).load("test")
    sets = {"openai/small": rows.select(range(3)), "large": rows}
    trainer = make_arithmetic_trainer(
        {"eval_dataset": sets}, log_completions=True, max_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1,
        num_completions_to_print=0,
    )  # fmt: skip
    trainer.train()
    folder = Path(trainer.args.output_dir, "completions")
    found = {file.stem.removeprefix("completions_"): len(pd.read_parquet(file)) for file in folder.iterdir()}
    assert found == {"00001": 8, "00002": 8, "eval_openai-small_00002": 3, "eval_large_00002": 20}


# Overrides count


def test_an_overridden_reward_hook_changes_training(make_arithmetic_trainer, arithmetic_config):
    from trl_score import SCoReTrainer

    class Tripled(SCoReTrainer):
        def _calculate_rewards(self, *args):
            return 3 * super()._calculate_rewards(*args)

    task = Arithmetic(num_train=32)
    reward = lambda completions, **_: [float(len(str(each)) % 3) for each in completions]  # noqa: E731
    found = []
    for kind in (SCoReTrainer, Tripled):
        trainer = kind(
            str(BASE_MODEL_PATH), reward, SCoReConfig(**arithmetic_config, temperature=3.0), task.load("train")
        )
        torch.manual_seed(0)
        found.append(rollouts(trainer)["advantages"])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], 3 * found[0])


def test_how_often_the_bonus_leaves_out_a_function_is_logged(make_letters_trainer):
    def judge(completions, attempt, **_):
        return [None if attempt == 1 and i % 4 == 0 else 0.5 for i in range(len(completions))]

    def accuracy(completions, **_):
        return [0.0] * len(completions)

    trainer = make_letters_trainer([accuracy, judge], stage1_steps=0, num_generations=4, max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["bonus_abstained_ratio"] == 0.25
    assert set(trainer._logs["extra"]["advantage/attempt_2"]) == {0.0}


def test_trained_model_brings_its_chat_template_arguments(make_arithmetic_trainer, tmp_path):
    """Evaluation by `trl-score evaluate` renders the attempts as training did, with nothing to repeat."""
    trainer = make_arithmetic_trainer(chat_template_kwargs={"enable_thinking": False}, max_steps=1)
    trainer.save_model(str(tmp_path / "model"))
    sampler = TransformersSampler(str(tmp_path / "model"))
    assert sampler.chat_template_kwargs == {"enable_thinking": False}
    other = TransformersSampler(str(tmp_path / "model"), chat_template_kwargs={"enable_thinking": True})
    assert other.chat_template_kwargs == {"enable_thinking": True}
