"""What is there is documented, and what is documented is there."""

import ast
import doctest
import importlib
import inspect
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from trl import GRPOConfig, ModelConfig, SFTConfig

import trl_score
from trl_score import SCoReConfig
from trl_score.baselines import BaselineArguments
from trl_score.tasks import sources
from trl_score.training import TrainArguments


ROOT = Path(__file__).parents[1]


def test_every_field_has_help_and_a_docstring():
    inherited = {field.name: field.default for field in fields(GRPOConfig)}
    ours = [field for field in fields(SCoReConfig) if inherited.get(field.name, object) != field.default]
    assert len(ours) >= 12
    for field in ours:
        assert field.metadata["help"]
        documented = re.search(
            rf"^        {field.name} \(.*defaults to `(.*)`\):|^        {field.name} \(", SCoReConfig.__doc__, re.M
        )
        assert documented, field.name
        if documented[1] is not None:
            assert documented[1].strip('"') == str(field.default) or float(documented[1]) == field.default, field.name


def test_every_logged_key_is_documented_and_the_other_way_round(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(max_steps=1, stage1_steps=1, num_attempts=3, adaptive_stage1_beta=True)
    trainer.train()
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.M))
    logged = trainer.state.log_history[0].keys()
    stock = r"(loss|grad_norm|learning_rate|epoch|step|num_tokens|step_time|entropy|kl|reward|reward_std|frac_reward_zero_std|rewards/.*|clip_ratio/.*|completions/(mean|min|max)_(terminated_)?length|completions/clipped_ratio)"
    ours = {re.sub(r"t\d_t\d$", "t{k}_t{k+1}", key) for key in logged if not re.fullmatch(stock, key)}
    ours = {re.sub(r"_t\d$", "_t{k}", key) for key in ours}
    assert ours == documented


@pytest.mark.parametrize("module", ["objective", "metrics", "scaling", "tasks.arithmetic"])
def test_examples_in_docstrings_are_true(module):
    module = importlib.import_module(f"trl_score.{module}")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name, item in [("module", module), *inspect.getmembers(module, inspect.isfunction)]:
        if item is module or item.__module__ == module.__name__:
            text = (
                (item.__doc__ or "").replace("```python", "").replace("```", "")
            )  # TRL's docstrings fence their examples
            runner.run(parser.get_doctest(text, vars(module), name, None, None))
    assert runner.summarize().attempted and not runner.summarize().failed


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace("max_steps=90", "max_steps=1").replace(
        "per_device_train_batch_size=512", "per_device_train_batch_size=16"
    )
    exec(compile(code, "README.md", "exec"), {})


def test_code_of_the_pages_on_tasks_and_the_sandbox_runs(monkeypatch):
    monkeypatch.setattr(sources, "from_hub", lambda name: Dataset.from_list([{"question": "?", "answer": "#### 72"}]))
    for page in ("tasks.md", "sandbox.md"):
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
            namespace = {}
            exec(compile(code, page, "exec"), namespace)
            for name in ("MyProblems", "Backwards"):
                if name in namespace:
                    assert len(namespace[name]().load("train")) >= 1
            for name in ("task", "sandbox"):
                if name in namespace:
                    namespace[name].close()


def test_custom_task_of_the_docs_is_the_example():
    example = (ROOT / "examples" / "custom_task.py").read_text()
    shown = re.search(r"class Backwards.*?(?=```)", (ROOT / "docs" / "tasks.md").read_text(), re.S)[0]
    assert shown.strip() in example


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_file_tree_of_the_readme_is_the_tree():
    tree = re.search(r"## Files\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names = set(re.findall(r"^ *(\w+\.py)\b", tree, re.M))
    files = {path.name for path in (ROOT / "trl_score").rglob("*.py")} - {"__init__.py", "_version.py"}
    assert names == files


def test_configurations_are_valid(tmp_path):
    for file in (ROOT / "examples" / "configs").glob("*.yaml"):
        settings = yaml.safe_load(file.read_text())
        classes = (SCoReConfig, TrainArguments, ModelConfig)
        if "baselines" in file.name:
            classes = (BaselineArguments, SFTConfig, ModelConfig)
        known = {field.name for each in classes for field in fields(each)} | {"dataset_name"}
        assert settings.keys() <= known, file.name


def test_configurations_of_accelerate_are_valid():
    """accelerate's own reader refuses keys that it does not know."""
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    files = {path.stem: path for path in (ROOT / "examples" / "accelerate_configs").glob("*.yaml")}
    assert files.keys() == kinds.keys()
    for name, path in files.items():
        config = load_config_from_file(str(path))
        assert (config.distributed_type, config.mixed_precision, config.use_cpu) == (kinds[name], "bf16", False)
        assert f"`{path.name}`" in (ROOT / "docs" / "distributed.md").read_text()


def test_version_is_public():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", trl_score.__version__)
    assert set(trl_score.__all__) == {
        "SCoReConfig",
        "SCoReTrainer",
        "__version__",
        "evaluate_self_correction",
        "inference_scaling",
    }


def test_public_names_are_one_list_for_python_and_for_type_checkers():
    assert dir(trl_score) == sorted(trl_score.__all__)
    tree = ast.parse(Path(trl_score.__file__).read_text())
    (checked,) = [each for each in tree.body if isinstance(each, ast.If)]
    shown = {name.name: each.module for each in checked.body for name in each.names}
    assert shown == trl_score._MODULES and {*shown, "__version__"} == set(trl_score.__all__)
    for name, module in shown.items():
        assert getattr(trl_score, name).__module__ == f"trl_score.{module}"
    with pytest.raises(AttributeError, match="has no attribute 'SCoRe'"):
        trl_score.SCoRe  # noqa: B018


def test_an_editable_install_shows_the_package_to_type_checkers():
    """Only if the folder itself is put on the path, which setuptools does where it maps packages to folders this way."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."} and settings["packages"]["find"] == {"include": ["trl_score*"]}
