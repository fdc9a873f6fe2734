"""STaR and Pair-SFT: which traces they learn from, which tokens, and that what was interrupted goes on."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer

from trl_score import baselines
from trl_score.baselines import (
    BaselineArguments,
    check_held_out,
    fine_tune,
    pair_traces,
    run_baseline,
    star_traces,
    tokenized,
)
from trl_score.collection import collect
from trl_score.rollout import Bridge
from trl_score.sampling import Attempt, Sampler
from trl_score.tasks import Arithmetic, get_task
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BASE = str(BASE_MODEL_PATH)
DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "mbpp").exists(), reason="no shared data")


def rollout(index, sample, correct, tokens=None):
    """A rollout whose attempt k has the tokens [index, sample, k]."""
    tokens = tokens or [[index, sample, k] for k in range(1, len(correct) + 1)]
    prompt = [{"role": "user", "content": f"problem {index}"}]
    return {"index": index, "sample": sample, "prompt": prompt, "correct": correct, "token_ids": tokens}


W, R = False, True
TWO_ATTEMPTS = [
    *(
        rollout(0, 0, [W, R]),
        rollout(0, 1, [R, R]),
        rollout(0, 2, [R, W]),
        rollout(0, 3, [W, W]),
        rollout(0, 4, [W, R]),
    ),
    *(rollout(1, 0, [R, R]), rollout(1, 1, [None, R]), rollout(1, 2, [W, None])),
    rollout(2, 0, [W, W]),
]


def kept(traces):
    return [(row["index"], row["kind"], row["attempts"], row["learn"]) for row in traces]


# STaR


def test_star_keeps_the_rollouts_that_turn_wrong_into_right():
    """Of problem 0 samples 0 and 4; of the others none: c→c is not in D, and what could not be graded in neither."""
    assert kept(star_traces(TWO_ATTEMPTS)) == [
        (0, "i_to_c", [[0, 0, 1], [0, 0, 2]], [False, True]),
        (0, "i_to_c", [[0, 4, 1], [0, 4, 2]], [False, True]),
    ]


@pytest.mark.parametrize("learn, of_right", [("right", [True, True]), ("last", [False, True])])
def test_star_plus_keeps_right_ones_that_stay_right_too(learn, of_right):
    assert kept(star_traces(TWO_ATTEMPTS, plus=True, learn=learn)) == [
        (0, "i_to_c", [[0, 0, 1], [0, 0, 2]], [False, True]),
        (0, "i_to_c", [[0, 4, 1], [0, 4, 2]], [False, True]),
        (0, "c_to_c", [[0, 1, 1], [0, 1, 2]], of_right),
        (1, "c_to_c", [[1, 0, 1], [1, 0, 2]], of_right),
    ]


def test_no_problem_gives_more_traces_of_a_kind_than_it_may():
    traces = star_traces(TWO_ATTEMPTS, plus=True, max_per_problem=1)
    assert [(row["index"], row["kind"]) for row in traces] == [(0, "i_to_c"), (0, "c_to_c"), (1, "c_to_c")]


def test_a_prompt_goes_with_its_own_attempts():
    for row in star_traces(TWO_ATTEMPTS, plus=True):
        assert row["prompt"][0]["content"] == f"problem {row['index']}"
        assert {tokens[0] for tokens in row["attempts"]} == {row["index"]}


# Pair-SFT


def first_attempts():
    """Problem 0: wrong 0, 1, 2 and right 3, 4; problem 1: right 0 to 4 only; problem 2: wrong only; problem 3: one each."""
    verdicts = {0: [W, W, W, R, R], 1: [R] * 5, 2: [W] * 3, 3: [R, W, None]}
    return [rollout(index, i, [right]) for index, row in verdicts.items() for i, right in enumerate(row)]


def test_pairs_are_a_wrong_and_a_right_attempt_at_the_same_problem():
    """min(wrong, right) pairs: two of problem 0, none of 1 and 2, one of 3. No attempt is used twice."""
    traces = pair_traces(first_attempts())
    assert traces["index"] == [0, 0, 3] and set(traces["kind"]) == {"i_to_c"}
    assert all(row["learn"] == [False, True] for row in traces)
    wrong, right = zip(*traces["attempts"], strict=True)
    assert all(first[0] == second[0] for first, second in traces["attempts"])
    assert {tuple(row) for row in right} == {(0, 3, 1), (0, 4, 1), (3, 0, 1)}
    assert {tuple(row) for row in wrong} < {(0, 0, 1), (0, 1, 1), (0, 2, 1), (3, 1, 1)} and len(
        set(map(tuple, wrong))
    ) == 3


def test_plus_adds_pairs_of_two_different_right_attempts():
    """Right ones in pairs: one of problem 0, two of problem 1 (the fifth is left over), none of 3."""
    traces = pair_traces(first_attempts(), plus=True)
    added = [row for row in traces if row["kind"] == "c_to_c"]
    assert [row["index"] for row in added] == [0, 1, 1] and all(row["learn"] == [True, True] for row in added)
    used = [tuple(tokens) for row in added for tokens in row["attempts"]]
    assert len(set(used)) == len(used) == 6 and all(
        index == row["index"] for row in added for index, *_ in row["attempts"]
    )
    assert [row for row in traces if row["kind"] == "i_to_c"] == list(pair_traces(first_attempts()))


def test_pairing_is_random_and_reproducible():
    many = [rollout(0, i, [i % 2 == 0]) for i in range(20)]
    assert kept(pair_traces(many)) == kept(pair_traces(many)) != kept(pair_traces(many, seed=1))
    assert len(pair_traces(many, max_per_problem=3)) == 3


@pytest.mark.parametrize(
    "make, rollouts", [(star_traces, [rollout(0, 0, [R, R])]), (pair_traces, [rollout(0, 0, [R])])]
)
def test_nothing_to_learn_is_an_error(make, rollouts):
    with pytest.raises(ValueError, match="There is nothing to learn from: of 1 rollouts none"):
        make(rollouts)


def test_traces_of_an_endpoint_have_no_tokens():
    with pytest.raises(ValueError, match="have no tokens"):
        star_traces([rollout(0, 0, [W, R], tokens=[None, None])])


# Tokens and labels


@pytest.mark.parametrize("learn", [[False, True], [True, True], [True, False]])
def test_loss_is_on_the_attempts_to_learn_and_nothing_else(learn):
    """Token by token: <user> 1 2 <assistant> | 3 4 <end> | <user> please check again <assistant> | 5 <end>."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer.convert_tokens_to_ids
    end = tokenizer.eos_token_id
    attempts = [[ids("3"), ids("4"), end], [ids("5"), end]]
    prompt = [{"role": "user", "content": "1 2"}]
    traces = Dataset.from_list(
        [{"index": 0, "kind": "i_to_c", "prompt": prompt, "attempts": attempts, "learn": learn}]
    )
    row = tokenized(traces, tokenizer, "please check again")[0]
    words = [
        "<user>",
        "1",
        "2",
        "<assistant>",
        "3",
        "4",
        "<end>",
        "<user>",
        "please",
        "check",
        "again",
        "<assistant>",
        "5",
        "<end>",
    ]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == words
    of_first, of_second = ([t if on else -100 for t in a] for a, on in zip(attempts, learn, strict=True))
    assert row["labels"] == [-100] * 4 + of_first + [-100] * 5 + of_second


@pytest.mark.parametrize("is_text", [False, True])
def test_a_cut_off_attempt_gets_its_end_as_context(chat_model, is_text):
    """An attempt without an end of turn: the bridge has it, and it is not learnt. In chat and in plain text."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    text = tokenizer("what?")["input_ids"]
    attempts = [text, [*text, tokenizer.eos_token_id]]
    prompt = "say" if is_text else [{"role": "user", "content": "say"}]
    traces = Dataset.from_list([{"prompt": prompt, "attempts": attempts, "learn": [True, True]}])
    row = tokenized(traces, tokenizer, "again")[0]
    bridge = Bridge(tokenizer)([prompt], ["again"], 1, [text])[0]
    start = len(row["input_ids"]) - len(text) * 2 - 1 - len(bridge)
    assert bridge[0] == tokenizer.eos_token_id
    assert row["input_ids"][start:] == text + bridge + attempts[1]
    assert row["labels"] == [-100] * start + text + [-100] * len(bridge) + attempts[1]


def test_traces_are_rendered_as_they_were_sampled_where_the_tokenizer_has_no_end(sft, tmp_path, monkeypatch):
    """The model names the end token. In plain text a cut-off attempt has it as context, in the samples and in the traces."""
    model, found = shutil.copytree(BASE, tmp_path / "model"), []
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    assert AutoTokenizer.from_pretrained(model).eos_token is None
    cut_off = [rollout(0, 0, [W], [[1, 2]]), rollout(0, 1, [R], [[3, 4]])]
    monkeypatch.setattr(baselines, "collect", lambda *_, **__: [row | {"prompt": "1 2"} for row in cut_off])
    monkeypatch.setattr(baselines, "fine_tune", lambda _, dataset, *__: found.append(dataset[0]["input_ids"]) or 1)
    run_baseline(ModelConfig(str(model)), TASK, arguments(method="pair_sft", plus=False), sft)
    end = AutoTokenizer.from_pretrained(BASE).eos_token_id
    start = len(AutoTokenizer.from_pretrained(BASE)("1 2")["input_ids"])
    assert found[0][start : start + 3] == [1, 2, end]


def test_the_loss_of_the_trainer_is_the_mean_over_the_learnt_tokens(tmp_path):
    rows = Arithmetic(num_train=4).load("train")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    gold = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for answer in rows["answer"]]
    traces = Dataset.from_list(
        [
            {"prompt": row["prompt"], "attempts": [gold[0], ids], "learn": [i % 2 == 0, True]}
            for i, (row, ids) in enumerate(zip(rows, gold, strict=True))
        ]
    )
    dataset = tokenized(traces, tokenizer, Arithmetic.correction_instruction)
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, learning_rate=0.0, max_length=None, bf16=False,
        use_cpu=True, report_to="none", gradient_checkpointing=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(BASE, args=args, train_dataset=dataset)
    trainer.train()
    input_ids, labels = torch.tensor(dataset["input_ids"]), torch.tensor(dataset["labels"])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(BASE)(input_ids=input_ids).logits[:, :-1]
    taken = labels[:, 1:] != -100
    assert taken.sum() == 6 * 8
    expected = -logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0][taken].mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


# Whole baselines


@pytest.fixture
def sft(tmp_path):
    return SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=16, max_steps=2, learning_rate=1e-3, max_length=None, bf16=False,
        use_cpu=True, report_to="none", gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def arguments(**changes):
    settings = {
        "task": "arithmetic",
        "num_samples": 24,
        "max_completion_length": 8,
        "sampling_batch_size": 200,
        "plus": True,
    }
    return BaselineArguments(**settings | changes)


TASK = Arithmetic(num_train=60)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_star_interrupted_in_its_second_iteration_ends_with_the_same_weights(tmp_path, sft, monkeypatch):
    model = ModelConfig(BASE)
    whole = run_baseline(model, TASK, arguments(), replace(sft, output_dir=str(tmp_path / "whole")))
    assert [entry["rollouts"] for entry in whole["iterations"]] == [60 * 4] * 3  # 24 = 3 iterations x 4 x 2 attempts
    assert whole["attempts_sampled"] == 60 * 24 and all(entry["steps"] == 2 for entry in whole["iterations"])

    fine_tune, calls = baselines.fine_tune, []

    def breaks(base, *args):
        calls.append(base)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fine_tune(base, *args)

    monkeypatch.setattr(baselines, "fine_tune", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_baseline(model, TASK, arguments(), sft)
    result = run_baseline(model, TASK, arguments(), sft)
    assert calls == [BASE] * 4  # iteration 1, 2 (broken), 2, 3: each from the base model
    strip = lambda found: [{**entry, "seconds": 0} for entry in found["iterations"]]  # noqa: E731
    assert strip(result) == strip(whole) == strip(json.loads((Path(sft.output_dir) / "baseline.json").read_text()))
    got, expected = weights(sft.output_dir), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    base = weights(BASE)
    assert any((got[name] != base[name]).any() for name in base)
    sampled = [
        json.loads((Path(sft.output_dir) / f"rollouts-{k}" / "settings.json").read_text())["model"] for k in (1, 2, 3)
    ]
    assert [name.split("/")[-1] for name in sampled] == ["arithmetic_base", "iteration-1", "iteration-2"]

    monkeypatch.setattr(baselines, "fine_tune", None)
    assert run_baseline(model, TASK, arguments(num_eval_problems=5), sft) == result  # finished: nothing is done again
    with pytest.raises(ValueError, match="holds another baseline: plus True instead of False"):
        run_baseline(model, TASK, arguments(plus=False), sft)


def test_the_last_model_alone_goes_to_the_hub_with_what_its_rollouts_were_rendered_with(sft, monkeypatch):
    pushed = []

    def push(trainer, **kwargs):
        pushed.append({file.name for file in Path(trainer.args.output_dir).iterdir()})

    monkeypatch.setattr(SFTTrainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(SFTTrainer, "push_to_hub", push)
    run_baseline(ModelConfig(BASE), TASK, arguments(num_iterations=2), replace(sft, push_to_hub=True))
    (files,) = pushed
    assert {"iteration-1", "model.safetensors", "score.json"} <= files


PAIRS = {"method": "pair_sft", "num_samples": 8}


@pytest.fixture
def interrupted(sft, monkeypatch):
    """A Pair-SFT of four steps with a checkpoint after each, interrupted when a method of the trainer is called for the nth time."""

    def run(method, n=1, **changes):
        args = replace(sft, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 1} | changes)
        calls, original = [], getattr(SFTTrainer, method)

        def breaks(self, *args, **kwargs):
            calls.append(method)
            if len(calls) == n:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, method, breaks)
            with pytest.raises(KeyboardInterrupt):
                run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args)
        return args

    return run


def steps_trained(monkeypatch):
    """A list that gets an entry for each training step from now on."""
    steps, training_step = [], SFTTrainer.training_step
    monkeypatch.setattr(
        SFTTrainer, "training_step", lambda *args, **kwargs: steps.append(1) or training_step(*args, **kwargs)
    )
    return steps


def test_checkpoints_of_other_settings_are_refused_before_the_first_iteration_ends(interrupted):
    args = interrupted("training_step", n=3)
    found = json.loads((Path(args.output_dir) / "baseline.json").read_text())
    assert found["settings"]["learning_rate"] == 1e-3 and found["iterations"] == []
    for changed, message in (
        ((arguments(**PAIRS), replace(args, learning_rate=1e-7)), "learning_rate 0.001 instead of 1e-07"),
        ((arguments(**PAIRS | {"plus": False}), args), "plus True instead of False"),
    ):
        with pytest.raises(ValueError, match=f"holds another baseline: {message}"):
            run_baseline(ModelConfig(BASE), TASK, *changed)
    assert json.loads((Path(args.output_dir) / "baseline.json").read_text()) == found


def test_checkpoints_of_other_settings_are_refused_in_the_first_iteration_of_star(sft, monkeypatch):
    """They are in `iteration-1`, not in the output folder."""
    args = replace(sft, save_strategy="steps", save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "save_state", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_baseline(ModelConfig(BASE), TASK, arguments(num_samples=6), args)
    assert not list(Path(args.output_dir).glob("checkpoint-*"))
    with pytest.raises(ValueError, match=r"holds another baseline: learning_rate 0\.001 instead of 0\.01"):
        run_baseline(ModelConfig(BASE), TASK, arguments(num_samples=6), replace(args, learning_rate=1e-2))


def test_checkpoints_of_unknown_settings_are_refused(interrupted):
    args = interrupted("training_step", n=2)
    (Path(args.output_dir) / "baseline.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"holds checkpoints, but no baseline\.json that says with which settings"):
        run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args)


@pytest.fixture
def finished(sft, monkeypatch):
    """A folder with a finished Pair-SFT whose fine-tuning was left out."""
    monkeypatch.setattr(baselines, "fine_tune", lambda *args: 2)
    result = run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), sft)
    assert result == json.loads((Path(sft.output_dir) / "baseline.json").read_text())
    return result


def test_every_option_that_changes_the_weights_is_compared(finished, sft):
    """Others may change, and an adapter of other options is not printed as the new result."""
    harmless = {"logging_steps": 1, "save_strategy": "epoch", "report_to": "none", "per_device_eval_batch_size": 1}
    harmless |= {"gradient_checkpointing": True, "run_name": "other", "eval_strategy": "no", "hub_token": "secret"}
    assert run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), replace(sft, **harmless)) == finished
    changed = {"gradient_accumulation_steps": 4, "weight_decay": 0.5, "max_grad_norm": float("inf"), "eos_token": "1"}
    for model, changes, message in (
        (ModelConfig(BASE, use_peft=True, lora_r=4), {}, "use_peft False instead of True, lora_r 16 instead of 4"),
        *((ModelConfig(BASE), {name: value}, f"{name} .* instead of ") for name, value in changed.items()),
    ):
        with pytest.raises(ValueError, match=f"holds another baseline: {message}"):
            run_baseline(model, TASK, arguments(**PAIRS), replace(sft, **changes))


def test_a_folder_with_few_recorded_options_is_continued(finished, sft):
    """As versions before wrote it: five options of the fine-tuning, and none of the model."""
    file = Path(sft.output_dir) / "baseline.json"
    few = {"learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed"}
    training = baselines.training_options(sft, ModelConfig(BASE)).keys() - few - {"dtype"}
    settings = {name: value for name, value in finished["settings"].items() if name not in training}
    file.write_text(json.dumps(finished | {"settings": settings}))
    assert run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), sft)["settings"] == settings
    with pytest.raises(ValueError, match="holds another baseline: seed 42 instead of 1"):
        run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), replace(sft, seed=1))


def test_a_number_that_json_lacks_is_no_change(sft, monkeypatch):
    monkeypatch.setattr(baselines, "fine_tune", lambda *args: 2)
    args = replace(sft, max_grad_norm=float("inf"), model_init_kwargs={"dtype": torch.float32})
    results = [run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args) for _ in range(2)]
    assert results[0] == results[1]


def test_the_model_of_another_run_is_not_overwritten(sft):
    folder = Path(sft.output_dir)
    folder.mkdir()
    (folder / "model.safetensors").write_text("trained")
    with pytest.raises(ValueError, match="holds the model of an earlier run, which a new run would overwrite"):
        run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), sft)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("model.safetensors", "trained")]


def test_settings_may_change_before_the_first_checkpoint(interrupted, monkeypatch):
    """Rollouts have settings of their own, so that a training out of memory starts again with smaller batches."""
    args = interrupted("training_step", n=1)
    monkeypatch.setattr("trl_score.jobs._sample_batch", None)
    changed = replace(args, learning_rate=1e-4, per_device_train_batch_size=8)
    result = run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), changed)
    assert result == json.loads((Path(args.output_dir) / "baseline.json").read_text())
    assert result["settings"]["learning_rate"] == 1e-4 and result["iterations"][0]["steps"] == 4


def test_a_checkpoint_that_was_not_fully_written_is_skipped(interrupted, tmp_path, monkeypatch):
    """Killed in checkpoint 3 of 4: two steps are left, and the weights are those of an uninterrupted run."""
    args = interrupted("training_step", n=4)
    (Path(args.output_dir) / "checkpoint-3" / "trainer_state.json").unlink()
    steps = steps_trained(monkeypatch)
    result = run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args)
    assert len(steps) == 2 and result["iterations"][0]["steps"] == 4
    run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), replace(args, output_dir=str(tmp_path / "whole")))
    got, expected = weights(args.output_dir), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_training_starts_again_if_its_only_checkpoint_was_not_fully_written(interrupted, monkeypatch):
    args = interrupted("training_step", n=2)
    (Path(args.output_dir) / "checkpoint-1" / "trainer_state.json").write_text('{"global_')
    steps = steps_trained(monkeypatch)
    result = run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args)
    assert len(steps) == result["iterations"][0]["steps"] == 4


@pytest.mark.parametrize("changes", [{}, {"max_steps": -1, "num_train_epochs": 0.3}])
def test_a_finished_training_takes_no_further_step(interrupted, monkeypatch, changes):
    """Interrupted after the last checkpoint, before `baseline.json` says so: the model has the weights of that checkpoint."""
    args = interrupted("save_state", **changes)
    last = max(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    steps = steps_trained(monkeypatch)
    result = run_baseline(ModelConfig(BASE), TASK, arguments(**PAIRS), args)
    assert steps == [] and result["iterations"][0]["steps"] == int(last.name.split("-")[1])
    got, expected = weights(args.output_dir), weights(last)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_pair_sft_trains_an_adapter_once(sft):
    model = ModelConfig(BASE, use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    result = run_baseline(model, TASK, arguments(method="pair_sft"), sft)
    (entry,) = result["iterations"]
    assert entry["rollouts"] == 60 * 24 and entry["i_to_c"] > 100 and entry["c_to_c"] > 100
    assert (Path(sft.output_dir) / "adapter_model.safetensors").exists()
    lines = (Path(sft.output_dir) / "rollouts-1" / "rollouts.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["attempts"]) == 1 for line in lines)


def test_an_adapter_names_the_revision_of_its_base_model(sft, monkeypatch):
    made = []
    monkeypatch.setattr(baselines, "ResumableSFTTrainer", lambda **given: made.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fine_tune(BASE, {"input_ids": [[1]]}, sft, ModelConfig(BASE, model_revision="old", use_peft=True))
    assert made[0]["peft_config"].revision == made[0]["args"].model_init_kwargs["revision"] == "old"


def test_a_held_out_problem_is_not_learnt_from(sft):
    with pytest.raises(ValueError, match="A problem of the test split is also in the training data"):
        run_baseline(ModelConfig(BASE), TASK, arguments(), sft, held_out=TASK.load("train").select([59]))


def test_a_held_out_problem_is_noticed_whatever_the_order_of_its_keys():
    rollouts = [{"prompt": [{"role": "user", "content": "x"}]}]
    check_held_out(rollouts, Dataset.from_list([{"prompt": [{"content": "y", "role": "user"}]}]))
    with pytest.raises(ValueError, match="A problem of the test split"):
        check_held_out(rollouts, Dataset.from_list([{"prompt": [{"content": "x", "role": "user"}]}]))


def test_another_task_is_evaluated_with_the_instruction_that_was_trained(tmp_path, sft, monkeypatch):
    file, asked = tmp_path / "own.py", []
    file.write_text(
        "from trl_score.tasks import MathTask\nclass Own(MathTask):\n    name = 'own'\n    correction_instruction = 'Sure?'\n"
    )
    monkeypatch.setattr(baselines, "run_baseline", lambda *_: None)
    monkeypatch.setattr(
        baselines,
        "evaluate_self_correction",
        lambda *_, correction_instruction, **__: asked.append(correction_instruction),
    )
    for name in ("describe", "table"):
        monkeypatch.setattr(baselines, name, lambda _: "")
    given = {"task": f"{file}:Own", "eval_task": "arithmetic", "method": "pair_sft"}
    for instruction in (None, "again"):
        baselines.run(BaselineArguments(**given, correction_instruction=instruction), sft, ModelConfig(BASE))
    assert asked == ["Sure?"] * 2 + ["again"] * 2


def test_an_adapter_cannot_be_sampled_by_vllm(sft):
    with pytest.raises(ValueError, match="samples from whole models, and `use_peft=True` trains an adapter"):
        run_baseline(ModelConfig(BASE, use_peft=True), TASK, arguments(backend="vllm"), sft)


def test_a_trace_that_would_be_cut_is_refused(sft):
    with pytest.raises(ValueError, match="`max_length=20` is too short for a trace of 29 tokens"):
        run_baseline(ModelConfig(BASE), TASK, arguments(), replace(sft, max_length=20))


class Scripted(Sampler):
    """Says one of a problem's texts, a right or a wrong one, in the tokens of a model."""

    name, backend = "scripted", "transformers"

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.calls = tokenizer, texts, 0

    def length(self, prompt):
        return 1

    def sample(self, prompts, instructions, decoding, seed, given=0):
        rows = []
        for prompt in prompts:
            self.calls += 1
            says = [self.texts[prompt[-1]["content"]][(self.calls + k) % 2] for k in range(len(instructions) + 1)]
            ids = [[*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id] for text in says]
            rows.append([Attempt(text, len(each), False, each) for text, each in zip(says, ids, strict=True)])
        return rows


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "mbpp"])
def test_real_problems_become_traces_that_are_learnt(chat_model, sft, name):
    """Attempts that are the row's own solution or a wrong one; graded by the task, paired, learnt by a tiny model."""
    consent = {"allow_code_execution": True} if name == "mbpp" else {}
    task = get_task(name, data_dir=str(DATA), **consent)
    rows = task.load("train").select(range(6))
    if name == "mbpp":
        programs = {number: row["code"] for number, row in task.all_rows().items()}
        wrong, right = "def f():\n    return 1", [programs[number] for number in rows["task_id"]]
    else:
        say = "The final answer is ${}$. I hope it is correct.".format
        wrong, right = say(-1), [say(answer) for answer in rows["answer"]]
    texts = {prompt[-1]["content"]: (wrong, text) for prompt, text in zip(rows["prompt"], right, strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    shared = {"limit": 6, "num_samples": 2, "batch_size": 3}
    two = collect(Scripted(tokenizer, texts), task, **shared)
    one = collect(Scripted(tokenizer, texts), task, num_attempts=1, **shared)
    getattr(task, "close", lambda: None)()
    assert sorted(map(tuple, [row["correct"] for row in two])) == [(False, True)] * 6 + [(True, False)] * 6
    for traces in (star_traces(two), pair_traces(one)):
        assert traces["index"] == list(range(6)) and set(traces["kind"]) == {"i_to_c"}
        dataset = tokenized(traces, tokenizer, task.correction_instruction)
        for row, prompt in zip(dataset, traces["prompt"], strict=True):
            kept = [token for token in row["labels"] if token != -100]
            assert tokenizer.decode(kept, skip_special_tokens=True) == texts[prompt[-1]["content"]][1]
            assert task.correction_instruction in tokenizer.decode(row["input_ids"])
    assert fine_tune(chat_model, dataset, replace(sft, per_device_train_batch_size=2), ModelConfig(chat_model)) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "raft"}, "Unknown method 'raft'"),
        (
            {"num_samples": 5},
            "`num_samples=5` attempts per problem are too few for `num_iterations=3` of star. Set it to 6",
        ),
        ({"num_iterations": 0}, "iterations to 1 or more"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_a_machine_without_bfloat16_is_told_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_score.score_config.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=r"Set `use_cpu=True` to train on the CPU in bfloat16, or `bf16=False`"):
        baselines.BaselineConfig(str(tmp_path))
    assert baselines.BaselineConfig(str(tmp_path), use_cpu=True, bf16=False).bf16 is False
