"""Options: errors of one line that name the nearest one, help in groups, configurations by name."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from trl_score import arguments
from trl_score.arguments import BaselineArguments, EvaluateArguments, TrainArguments
from trl_score.evaluation import evaluate_self_correction
from trl_score.parsing import MOST_USED, TRAINING, Parser, configs, find_config
from trl_score.training import train_parser


def parse(*given, kind=EvaluateArguments, required=("model", ("task", "dataset_name"))):
    (parsed,) = Parser((kind,), "evaluate", required=required).parse_args_and_config(list(given))
    return parsed


WHOLE = ["--model", "m", "--task", "arithmetic"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperatur", "1"], "unknown option --temperatur. Did you mean --temperature?"),
        (["--model_name_or_path", "m"], "unknown option --model_name_or_path. Did you mean --model?"),
        (["--zzz", "1"], "unknown option --zzz. `--help all` shows all options."),
        (["stray"], "unexpected argument 'stray'."),
        (["--limit", "ten"], "argument --limit: invalid int value: 'ten'"),
        (["--limit"], "argument --limit: expected one argument"),
        (["--backend", "tgi"], "argument --backend: invalid choice: 'tgi' (choose from"),
        (["--config"], "--config needs the file of a configuration or its name"),
        (["--config", "arithmtic"], "there is no such file or configuration. Did you mean arithmetic?"),
        (["--config", "{tmp}/broken.yaml"], "broken.yaml is no YAML: while parsing"),
        (["--config", "{tmp}/list.yaml"], "list.yaml holds no mapping of options to values"),
        (["--config={tmp}/unknown.yaml"], "unknown option --temperatur in the configuration. Did you mean --temperature?"),
        (["--help", "everything"], "--help takes nothing or `all`, not 'everything'."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_said_in_one_line_with_what_to_do(tmp_path, capsys, given, message):
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "unknown.yaml").write_text("temperatur: 1")
    with pytest.raises(SystemExit) as stop:
        parse(*WHOLE, *[each.format(tmp=tmp_path) for each in given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("trl-score evaluate: error: ") and message in error.replace("/--limit", "")


def test_a_missing_option_is_said_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        parse("--task", "arithmetic")
    assert (
        capsys.readouterr().err
        == "trl-score evaluate: error: --model is missing: Hub id or folder of a model or an adapter.\n"
    )
    with pytest.raises(SystemExit):
        parse("--model", "m")
    assert "--task or --dataset_name is missing: Name of a task" in capsys.readouterr().err
    assert parse("--model", "m", "--dataset_name", "d").task is None


def test_the_command_line_wins_over_the_configuration(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: m\ntask: arithmetic\nlimit: 5\ntemperature: 0.5")
    parsed = parse("--config", str(file), "--limit", "7")
    assert (parsed.model, parsed.limit, parsed.temperature) == ("m", 7, 0.5)


def test_configurations_come_with_the_package():
    assert "arithmetic" in configs() and len(configs()) >= 9
    for name in configs():
        assert find_config(name) == find_config(f"{name}.yaml") and yaml.safe_load(find_config(name).read_text())
    assert find_config("no-such-one") is None
    root = Path(__file__).parents[1]
    if (root / "examples").exists():  # the scripts' folder shows the same files
        assert {file.stem for file in (root / "examples" / "configs").glob("*.yaml")} == set(configs())


def test_help_shows_ours_first_and_in_groups(capsys):
    parser = train_parser([], description="train a model", more="Any other is accelerate's.")
    shown, everything = parser.format_help(), parser.format_help(everything=True)
    order = [shown.index(f"\n{title}:\n") for title in ("Problems", "The method", MOST_USED, "Watching the run")]
    assert order == sorted(order)
    for name in ("task", "alpha", "stage1_steps", "collapse_window", *TRAINING):
        assert f"  --{name}" in shown, name
    assert "--adam_beta1" not in shown and "--adam_beta1" in everything and "Any other is accelerate's." in shown
    assert len(shown.splitlines()) < len(everything.splitlines()) / 2
    with pytest.raises(SystemExit) as stop:
        parser.parse_args_and_config(["--help"])
    assert stop.value.code == 0 and capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        parser.parse_args_and_config(["--help", "all"])
    assert capsys.readouterr().out == everything


def test_help_names_choices_defaults_and_what_is_required():
    text = " ".join(Parser((EvaluateArguments,), "evaluate").format_help().split())
    assert "--backend {transformers,vllm,endpoint}" in text and "Required. Hub id" in text
    assert "--top_p FLOAT" in text and "(default: 1.0)" in text and "default: None" not in text
    assert "decoding. (default: 0.0)" in text and "default: False" not in text
    assert "--top-p" not in text  # the same option with dashes is understood, and not shown twice


def test_every_option_has_a_help_that_stands_alone():
    kinds = [
        each for each in vars(arguments).values() if isinstance(each, type) and each.__name__.endswith("Arguments")
    ]
    for kind in kinds:
        for field in fields(kind):
            text = field.metadata["help"]
            assert text[0].isupper() and text.endswith("."), (kind.__name__, field.name)


def test_trackers_are_a_list(tmp_path):
    given = [
        "--output_dir",
        str(tmp_path),
        "--task",
        "arithmetic",
        "--report_to",
        "tensorboard",
        "trackio",
        "--max_steps",
        "3",
    ]
    _, args, _ = train_parser(given).parse_args_and_config(given)
    assert args.report_to == ["tensorboard", "trackio"] and args.max_steps == 3
    given[5:7] = ["none"]
    _, args, _ = train_parser(given).parse_args_and_config(given)
    assert args.report_to == []


def test_json_is_understood_on_the_command_line_and_in_yaml(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: m\ntask: arithmetic\nchat_template_kwargs: {enable_thinking: false}")
    given = [*WHOLE, "--chat_template_kwargs", '{"enable_thinking": false}']
    assert (
        parse("--config", str(file)).chat_template_kwargs
        == parse(*given).chat_template_kwargs
        == {"enable_thinking": False}
    )
    assert parse(*given[4:], kind=BaselineArguments, required=()).chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "arithmetic", "dataset_name": "d"}, "both say which problems"),
        ({"task": "arithmetic", "reward_funcs": ["accuracy_reward"]}, "--reward_funcs is for --dataset_name"),
        ({"dataset_name": "d", "data_dir": "x"}, "--data_dir is for the tasks"),
        ({}, "Which problems\\? Give --task, or --dataset_name"),
        ({"task": "arithmetic", "num_train_problems": 0}, "--num_train_problems 0 leaves no problem"),
        ({"task": "arithmetic", "num_eval_problems": -1}, "is no number of problems"),
    ],
)
def test_problems_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(**settings).open_tasks()


def test_the_function_documents_the_options_of_its_command():
    documented = {}
    for names, text in re.findall(r"^    ([\w, ]+) \((.*)\):$", inspect.getdoc(evaluate_self_correction), re.M):
        defaults = re.findall(r"`\"?([\w.]+)\"?`", text.partition("default")[2]) or [None] * 9
        documented |= dict(zip(names.split(", "), defaults, strict=False))
    for_the_shell = {"dataset_name", "dataset_config", "reward_funcs", *arguments.BACKENDS_OF}
    for field in fields(EvaluateArguments):
        if field.name not in for_the_shell:
            default = documented[field.name]
            assert str(field.default) == (default or "None"), field.name
