"""Bad input is refused at construction, with what was set, why it cannot work and what to do."""

import warnings

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, TrlParser

from trl_score import SCoReConfig, SCoReTrainer
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


BAD_CONFIGURATIONS = [
    ({"num_generations": 1}, "leave-one-out baseline needs two rollouts per problem, got `num_generations=1`"),
    ({"num_attempts": 0}, "A rollout has at least one attempt, got `num_attempts=0`"),
    ({"num_attempts": 1}, "Stage I trains the second attempt, but `num_attempts=1` has none. Set `stage1_steps=0`"),
    ({"num_attempts_eval": 1}, "`num_attempts_eval=1` would measure no correction"),
    (
        {"num_generations_eval": 3, "per_device_eval_batch_size": 8},
        "`num_generations_eval=3` does not divide the 8 rollouts of a batch in evaluation",
    ),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        "`metric_for_best_model='loss'` would choose the checkpoint that has learned least",
    ),
    (
        {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "eval_hard_loss"},
        "Set it to 'accuracy_t2' or another metric",
    ),
    ({"offline_first_attempts": 1.5}, "`offline_first_attempts=1.5` is a share of the rollouts"),
    ({"offline_first_attempts": 0.01}, "rounds to zero of the `num_generations=8` rollouts"),
    (
        {"offline_first_attempts": 0.5, "num_generations": 2},
        "leaves a single first attempt of each problem to be sampled",
    ),
    ({"offline_first_attempts": 0.9}, "a single first attempt of each problem to be sampled, which has no baseline"),
    ({"offline_first_attempts": 7 / 8}, "Set `offline_first_attempts` so that two or more are sampled, or to 1"),
    ({"stage1_steps": 1.0}, "`stage1_steps=1.0` can mean one step or the whole run"),
    ({"offline_first_attempts": 1, "num_attempts": 1, "stage1_steps": 0}, "would leave nothing to train"),
    ({"alpha": -1.0}, "`alpha=-1.0` would reward turning right attempts into wrong ones"),
    ({"gamma": 1.5}, "`gamma=1.5` is not a discount"),
    ({"gamma": -0.1}, "`gamma=-0.1` is not a discount"),
    ({"beta": 0.0}, "`beta=0.0` makes TRL load none. Set `beta` above 0; the paper uses 0.01"),
    ({"beta": -0.1}, "`beta=-0.1` is negative"),
    ({"stage1_beta": -0.1}, "`stage1_beta=-0.1` is negative"),
    ({"eval_temperature": -1.0}, "`eval_temperature=-1.0` is no temperature"),
    ({"eval_temperature": float("inf")}, "`eval_temperature=inf` is no temperature"),
    ({"temperature": float("nan")}, "`temperature=nan` leaves nothing to sample"),
    ({"num_iterations": 0}, "`num_iterations=0` would leave no rollouts"),
    ({"steps_per_generation": 0}, "`steps_per_generation=0` would leave no rollouts"),
    ({"num_generations_eval": 0}, "`num_generations_eval=0` would leave no rollouts"),
    ({"temperature": 0.0}, "`temperature=0.0` leaves nothing to sample"),
    ({"max_completion_length": 0}, "`max_completion_length=0` is the most tokens of one attempt"),
    ({"max_completion_length": None}, "`max_completion_length=None` is the most tokens of one attempt"),
    ({"generation_kwargs": {"max_new_tokens": 2}}, "`max_new_tokens=2` in `generation_kwargs` is not supported"),
    ({"generation_kwargs": '{"max_length": 2}'}, "another length than `max_completion_length`"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, "several attempts. Set `num_generations`"),
    ({"generation_kwargs": {"return_dict_in_generate": True}}, "TRL reads the tokens alone"),
    ({"generation_kwargs": {"stop_strings": ["."]}}, "Use `eos_token_id`, or vLLM and its option `stop`"),
    ({"stage1_steps": -1}, "`stage1_steps=-1` is neither a number of steps nor a share"),
    ({"stage1_steps": 2.5}, "`stage1_steps=2.5` is neither a number of steps nor a share"),
    ({"stage1_steps": float("inf")}, "`stage1_steps=inf` is neither a number of steps nor a share"),
    ({"stage1_steps": float("nan")}, "`stage1_steps=nan` is neither a number of steps nor a share"),
    ({"alpha": float("nan")}, "`alpha=nan` is not finite"),
    ({"beta": float("inf")}, "`beta=inf` is not finite"),
    ({"stage1_beta": float("nan")}, "`stage1_beta=nan` is not finite"),
    ({"reward_weights": [1.0, float("nan")]}, "`reward_weights=[1.0, nan]` is not finite"),
    ({"correction_instruction": " "}, "`correction_instruction` is empty"),
    ({"importance_sampling_level": "sequence"}, "`importance_sampling_level='sequence'` is not supported"),
    ({"loss_type": "cispo"}, "`epsilon_high=None` is not supported by SCoRe: with `loss_type='cispo'` it bounds"),
    ({"loss_type": "cispo", "epsilon_high": 0.2}, "Set it to 1 or above; TRL recommends 5.0"),
    ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha=5.0` is not supported"),
    ({"loss_type": "sapo"}, "`loss_type='sapo'` is not supported"),
    ({"loss_type": "vespo"}, "`loss_type='vespo'` is not supported"),
    ({"loss_type": "luspo"}, "`loss_type='luspo'` is not supported"),
    (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "`multi_objective_aggregation='normalize_then_sum'` is not",
    ),
    (
        {"adaptive_stage1_beta": True, "stage1_steps": 0},
        "nothing to adapt with `stage1_beta=0.1` and `stage1_steps=0`",
    ),
    ({"adaptive_stage1_beta": True, "stage1_beta": 0.0}, "nothing to adapt with `stage1_beta=0.0`"),
    ({"kl_level": "attempt"}, "Unknown `kl_level='attempt'`. Set it to 'token' (KL in the loss) or 'sequence'"),
    ({"scale_rewards": "group"}, "`scale_rewards='group'` is not supported"),
    ({"sync_ref_model": True}, "`sync_ref_model=True` is not supported"),
    ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold=0.5` is not supported"),
]


@pytest.mark.parametrize(("setting", "message"), BAD_CONFIGURATIONS, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError) as error:
        SCoReConfig(str(tmp_path), bf16=False, **setting)
    assert message in str(error.value)


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_sampling_from_another_distribution_than_the_trained_one_warns(tmp_path, setting):
    (name, value), *_ = setting.items()
    with pytest.warns(UserWarning, match=f"`{name}={value}`: attempts are sampled from another distribution"):
        SCoReConfig(str(tmp_path), bf16=False, **setting)


def test_defaults_are_the_papers_and_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = SCoReConfig(str(tmp_path), bf16=False)
    paper = {"alpha": 10.0, "gamma": 0.0, "beta": 0.01, "stage1_beta": 0.1, "learning_rate": 5e-6, "temperature": 1.0}
    assert {name: getattr(config, name) for name in paper} == paper
    assert (config.num_attempts, config.num_generations_eval, config.eval_temperature) == (2, 1, 0.0)


REMOVED = [
    *(
        "second_attempts_per_first",
        "second_attempts_from_stage",
        "stage1_cycles",
        "stage_schedule",
        "stage1_reference",
    ),
    *(
        "whiten_advantages",
        "stage2_learning_rate",
        "collapse_window",
        "keep_best_checkpoint",
        "best_checkpoint_window",
    ),
    "load_best_checkpoint_at_end",
]


@pytest.mark.parametrize("name", REMOVED)
def test_removed_options_are_unknown_fields(tmp_path, name):
    with pytest.raises(TypeError, match=name):
        SCoReConfig(str(tmp_path), bf16=False, **{name: 1})


def test_one_step_of_stage_one_is_an_integer_or_a_share(tmp_path):
    """From arguments a number is a float, so 1 is ambiguous there; in Python and YAML the integer is one step."""
    assert SCoReConfig(str(tmp_path), bf16=False, stage1_steps=1).stage1_steps == 1
    SCoReConfig(str(tmp_path), bf16=False, stage1_steps=1 / 8, max_steps=8)
    SCoReConfig(str(tmp_path), bf16=False, stage1_steps=8.0, max_steps=8)
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path}\nstage1_steps: 1\nbf16: false\n")
    [config] = TrlParser(SCoReConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert config.stage1_steps == 1
    with pytest.raises(
        ValueError, match=r"`stage1_steps=1.0` can mean one step or the whole run. For Stage I only set"
    ):
        TrlParser(SCoReConfig).parse_args_and_config(["--output_dir", str(tmp_path), "--stage1_steps", "1"])


@pytest.mark.parametrize("asked", [{}, {"bf16": True}])
def test_bfloat16_without_a_gpu_says_what_to_set(tmp_path, asked, monkeypatch):
    """transformers only says that the setup does not support it."""
    monkeypatch.setattr("trl_score.score_config.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"no GPU that supports it. Set `use_cpu=True` to .* `bf16=False` to train in float32"
    ):
        SCoReConfig(str(tmp_path), **asked)
    assert SCoReConfig(str(tmp_path), use_cpu=True, **asked).bf16
    assert not SCoReConfig(str(tmp_path), bf16=False).bf16


def test_training_without_any_kl_is_allowed(tmp_path):
    SCoReConfig(str(tmp_path), bf16=False, beta=0.0, stage1_beta=0.0)
    SCoReConfig(str(tmp_path), bf16=False, beta=0.0, stage1_steps=0)


def test_configuration_is_read_from_arguments_and_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("alpha: 2.0\nstage1_steps: 0.25\nbf16: false\n")
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--num_attempts", "3", "--gamma", "0.5"]
    (config,) = TrlParser(SCoReConfig).parse_args_and_config(arguments)
    assert (config.alpha, config.stage1_steps, config.num_attempts, config.gamma) == (2.0, 0.25, 3, 0.5)


# The trainer


def refused(error, match, make, *args, **kwargs):
    with pytest.raises(error, match=match):
        make(*args, **kwargs)


def test_dataset_without_prompt_is_refused(make_arithmetic_trainer):
    rows = Arithmetic(num_train=8).load("train").rename_column("prompt", "problem")
    match = r"`train_dataset` has no column `prompt`, only \['answer', 'problem'\]"
    refused(ValueError, match, make_arithmetic_trainer, {"train_dataset": rows})
    refused(ValueError, "`eval_dataset` has no column `prompt`", make_arithmetic_trainer, {"eval_dataset": rows})
    rows = Dataset.from_dict({"prompt": ["1 + 1?", None], "answer": ["2", "4"]})
    match = "`eval_dataset` has no problem in row 1, where `prompt` is None"
    refused(ValueError, match, make_arithmetic_trainer, {"eval_dataset": rows})
    evaluation = {"hard": rows}
    refused(ValueError, r"`eval_dataset\['hard'\]` has no", make_arithmetic_trainer, {"eval_dataset": evaluation})


def test_a_list_of_rows_is_no_dataset(make_arithmetic_trainer):
    rows = Arithmetic(num_train=8).load("train").to_list()
    for name in ("train_dataset", "eval_dataset"):
        match = rf"`{name}` must be a `Dataset` or `IterableDataset`, got `list`.*Dataset\.from_list"
        refused(TypeError, match, make_arithmetic_trainer, {name: rows})


def test_missing_and_empty_datasets_are_refused(make_arithmetic_trainer):
    refused(ValueError, "`train_dataset` is missing", make_arithmetic_trainer, {"train_dataset": None})
    empty = Arithmetic(num_train=8).load("train").select([])
    refused(ValueError, "`train_dataset` has no rows", make_arithmetic_trainer, {"train_dataset": empty})


def test_all_splits_in_place_of_one_are_refused(make_arithmetic_trainer):
    """`load_dataset` without `split` returns all of them."""
    splits = DatasetDict(train=Arithmetic(num_train=8).load("train"))
    match = r"is not one dataset but several, \['train'\]. Pass one of them"
    refused(ValueError, f"`train_dataset` {match}", make_arithmetic_trainer, {"train_dataset": splits})
    refused(ValueError, rf"`eval_dataset\['a'\]` {match}", make_arithmetic_trainer, {"eval_dataset": {"a": splits}})


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("attempt", [1] * 8, "column `attempt`, the keyword by which a reward function"),
        ("prompts", ["x"] * 8, "column `prompts`, the keyword by which a reward function gets the problems"),
        ("completions", ["x"] * 8, "column `completions`, the keyword by which a reward function gets the attempts"),
        ("trainer_state", ["x"] * 8, "column `trainer_state`, the keyword by which a reward function gets the state"),
        ("log_extra", ["x"] * 8, "column `log_extra`, the keyword by which a reward function"),
        ("log_metric", ["x"] * 8, "column `log_metric`, the keyword by which a reward function"),
        ("image", ["x"] * 8, "has images, which SCoRe does not support"),
        ("correction_instruction", ["ok"] * 7 + [""], "empty `correction_instruction` in row 7"),
        ("correction_instruction", [None] + [3] * 7, "has a `int` as `correction_instruction` in row 1"),
    ],
)
def test_columns_that_cannot_work_are_refused(make_arithmetic_trainer, column, values, match):
    rows = Arithmetic(num_train=8).load("train").add_column(column, values)
    refused(ValueError, match, make_arithmetic_trainer, {"train_dataset": rows})


def missing_column(completions, solution, **kwargs): ...


def fixed_signature(completions, answer): ...


@pytest.mark.parametrize(
    ("reward", "options", "match"),
    [
        (missing_column, {}, "'missing_column' cannot be called for `train_dataset`: missing a required argument: 'solution'"),
        ([fixed_signature], {}, r"'fixed_signature' .*got an unexpected keyword argument .*end its signature with `\*\*kwargs`"),
        (Arithmetic().reward, {"remove_unused_columns": True}, "missing a required argument: 'answer'"),
    ],
)  # fmt: skip
def test_reward_functions_that_cannot_be_called_are_refused(make_arithmetic_trainer, reward, options, match):
    """The first two are called with columns that they do not expect, or without those that they do."""
    refused(ValueError, match, make_arithmetic_trainer, {"reward_funcs": reward}, **options)


def test_reward_functions_are_checked_with_the_columns_of_each_dataset(make_arithmetic_trainer):
    held_out = {"a": Arithmetic().load("test"), "b": Arithmetic().load("test").remove_columns("answer")}
    match = r"cannot be called for `eval_dataset\['b'\]`: missing a required argument: 'answer'"
    refused(ValueError, match, make_arithmetic_trainer, {"eval_dataset": held_out})
    refused(TypeError, "`reward_funcs` has a `tuple`", make_arithmetic_trainer, {"reward_funcs": (print,)})


def test_chat_messages_without_a_chat_template_are_refused(make_arithmetic_trainer):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    tokenizer.chat_template = None
    match = "chat messages, but the tokenizer has no chat template"
    refused(ValueError, match, make_arithmetic_trainer, {"processing_class": tokenizer})


def test_chat_template_that_hides_the_first_attempt_is_refused(make_arithmetic_trainer):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    tokenizer.chat_template = "<user> {{ messages[-1].content }} <assistant> "
    match = "does not render the assistant's turn"
    refused(ValueError, match, make_arithmetic_trainer, {"processing_class": tokenizer})


def test_context_too_short_for_all_attempts_is_refused(make_arithmetic_trainer):
    """A context of 64 tokens, prompts of 8: with 5 instruction tokens and 2 attempts of 25 it is one token too much."""
    make_arithmetic_trainer(max_completion_length=25)
    match = r"context of 64 tokens is too short: a prompt of 8 tokens \(row 0 of `train_dataset`\), 2 attempts of up to 26 tokens .* and 6 tokens .* 66"
    refused(ValueError, match, make_arithmetic_trainer, max_completion_length=26)
    refused(ValueError, "3 attempts", make_arithmetic_trainer, max_completion_length=16, num_attempts=3)


def test_options_of_the_parent_that_are_not_supported_are_refused(make_arithmetic_trainer):
    for name, value in {"tools": [print], "rollout_func": print, "environment_factory": print}.items():
        refused(ValueError, f"`{name}` is not supported by SCoRe", make_arithmetic_trainer, {name: value})


def test_configuration_of_another_trainer_is_refused(tmp_path):
    rows = Arithmetic(num_train=8)
    match = "`args` must be a `SCoReConfig`, got `GRPOConfig`"
    config = GRPOConfig(str(tmp_path), bf16=False)
    refused(TypeError, match, SCoReTrainer, str(BASE_MODEL_PATH), rows.reward, config, rows.load("train"))


def test_frozen_adapter_is_refused(make_arithmetic_trainer):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE_MODEL_PATH), LoraConfig(target_modules=["q_proj"])
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused(ValueError, "adapter is frozen", make_arithmetic_trainer, {"model": model})


def test_named_reference_beside_an_adapter_is_refused(make_arithmetic_trainer):
    options = {"peft_config": LoraConfig(target_modules=["q_proj"])}
    path = str(BASE_MODEL_PATH)
    refused(ValueError, "is for full fine-tuning", make_arithmetic_trainer, options, reference_model_name_or_path=path)


def test_streamed_datasets_are_checked_by_their_first_rows(make_arithmetic_trainer):
    def stream(column):
        def rows():
            yield from ({column: "a", "answer": "b"} for _ in range(8))

        return IterableDataset.from_generator(rows)

    trainer = make_arithmetic_trainer({"train_dataset": stream("prompt"), "eval_dataset": None})
    assert isinstance(trainer.train_dataset, IterableDataset)
    refused(ValueError, "no column `prompt`", make_arithmetic_trainer, {"train_dataset": stream("problem")})


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"prompt": None}, {}, "has no problem in row 3, where `prompt` is None"),
        ({"prompt": [{"role": "user", "content": None}]}, {}, "has no problem in row 3"),
        ({"prompt": 5}, {}, "`prompt` in row 3 that is neither text nor a list of chat messages: 5"),
        ({"prompt": ["a"]}, {}, r"neither text nor a list of chat messages: \['a'\]"),
        ({"correction_instruction": " "}, {}, "empty `correction_instruction` in row 3"),
        ({"first_attempts": []}, {"offline_first_attempts": 1.0}, "no `first_attempts` in row 3"),
    ],
    ids=str,
)
def test_broken_rows_of_a_stream_are_refused(make_arithmetic_trainer, row, options, match):
    good = {"prompt": "a", "answer": "b", "correction_instruction": None, "first_attempts": ["a"]}
    rows = [good] * 3 + [good | row] + [good] * 4
    stream = IterableDataset.from_generator(lambda: iter(rows))
    refused(ValueError, match, make_arithmetic_trainer, {"train_dataset": stream, "eval_dataset": None}, **options)


def test_rows_that_a_transform_makes_are_checked_and_trained(make_arithmetic_trainer):
    """`set_transform` makes the columns when a row is read, so the stored ones are others."""
    stored = Arithmetic(num_train=8).load("train").rename_column("prompt", "problem")

    def with_transform(**columns):
        rows = stored.add_column("index", range(len(stored)))
        rows.set_transform(
            lambda batch: {
                "prompt": batch["problem"],
                "answer": batch["answer"],
                **{name: [values[i] for i in batch["index"]] for name, values in columns.items()},
            }
        )
        return {"train_dataset": rows}

    lists = [["1 2"]] * 8
    trainer = make_arithmetic_trainer(
        with_transform(first_attempts=lists), offline_first_attempts=0.5, max_steps=1, stage1_steps=0
    )
    trainer.train()
    match = r"too short: .*\(row 3 of `train_dataset`\)"
    long = ["please check again"] * 3 + ["please check again " * 20] + ["please check again"] * 4
    refused(ValueError, match, make_arithmetic_trainer, with_transform(correction_instruction=long))
    empty = with_transform(correction_instruction=["ok"] * 7 + [""])
    refused(ValueError, "empty `correction_instruction` in row 7", make_arithmetic_trainer, empty)


def test_plain_text_needs_no_chat_template(make_arithmetic_trainer):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    tokenizer.chat_template = None
    rows = Dataset.from_dict({"prompt": ["1 2 3"] * 8, "answer": ["6"] * 8})
    make_arithmetic_trainer({"processing_class": tokenizer, "train_dataset": rows, "eval_dataset": None})
