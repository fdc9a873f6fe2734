"""What is there is documented, and what is documented is there."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

import trl_score
from trl_score import CollapseAlarm, SCoReConfig, SCoReTrainer, cli, collection, sandbox
from trl_score.baselines import BaselineArguments
from trl_score.tasks import GSM8K, Arithmetic, sources
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.training import TrainArguments


ROOT = Path(__file__).parents[1]


def test_every_field_has_help_and_a_docstring():
    inherited = {field.name: field.default for field in fields(GRPOConfig)}
    ours = [field for field in fields(SCoReConfig) if inherited.get(field.name, object) != field.default]
    assert len(ours) >= 12
    for field in ours:
        assert field.metadata["help"]
        documented = re.search(
            rf"^    {field.name} \(.*defaults to `(.*)`\):|^    {field.name} \(", inspect.getdoc(SCoReConfig), re.M
        )
        assert documented, field.name
        if documented[1] is not None:
            assert documented[1].strip('"') == str(field.default) or float(documented[1]) == field.default, field.name


def test_every_logged_key_is_documented_and_the_other_way_round(make_arithmetic_trainer):
    settings = {"max_steps": 1, "stage1_steps": 1, "num_attempts": 3, "adaptive_stage1_beta": True}
    trainer = make_arithmetic_trainer({"callbacks": [CollapseAlarm()]}, **settings)
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
    code = code.replace("max_steps=80", "max_steps=1").replace(
        "per_device_train_batch_size=256", "per_device_train_batch_size=16"
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


PAGES = {  # pages whose blocks run as one program, with the names that a page takes for given
    "index.md": (),
    "tutorial.md": (),
    "reading_a_run.md": (),
    "customizing.md": (),
    "coming_from.md": (),
    "serving.md": (),
    "evaluation.md": (),
    "baselines.md": (),
    "cli.md": ("trainer",),
    "resuming.md": ("trainer",),
    "metrics.md": ("given",),
    "report.md": ("trainer",),
}
ELSEWHERE = {"tasks.md", "sandbox.md", "algorithm.md"}  # pages with tests of their own


@pytest.fixture
def small(tmp_path, monkeypatch, chat_model):
    """
    A folder in which the code of the docs runs in seconds: the names of models lead to a tiny random one, GSM8K has four problems,
    every attempt at them is right, runs have two steps, evaluations four problems and attempts eight tokens. Nothing is uploaded.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-1.5B-Instruct", "outputs/gsm8k"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(chat_model)
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    monkeypatch.setattr(sources, "from_hub", lambda name: Dataset.from_list(rows))
    monkeypatch.setattr(GSM8K, "reward", lambda self, completions, **kwargs: [1.0] * len(completions))
    run = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "gradient_accumulation_steps": 1}
    run |= {"max_completion_length": 8, "logging_steps": 1, "eval_strategy": "no", "report_to": "none"}
    run |= {"gradient_checkpointing": False}
    sample = {"max_completion_length": 8, "limit": 4}

    def limited(function, **limits):
        return lambda *args, **kwargs: function(*args, **kwargs | limits)

    def config(*args, **kwargs):
        if kwargs.get("stage1_steps"):
            kwargs["stage1_steps"] = 1
        without_gpu = {} if "bf16" in kwargs else {"use_cpu": True, "bf16": False}
        return SCoReConfig(*args, **kwargs | run | without_gpu)

    monkeypatch.setattr(trl_score, "SCoReConfig", config, raising=False)
    evaluate, scale = trl_score.evaluate_self_correction, trl_score.inference_scaling
    monkeypatch.setattr(trl_score, "evaluate_self_correction", limited(evaluate, **sample), raising=False)
    monkeypatch.setattr(trl_score, "inference_scaling", limited(scale, **sample, max_budget=4), raising=False)
    monkeypatch.setattr(collection, "collect", limited(collection.collect, **sample | {"num_samples": 2}))
    uploaded = []
    monkeypatch.setattr(SCoReTrainer, "push_to_hub", lambda self: uploaded.append(self.args.hub_model_id))
    return uploaded


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs_from_top_to_bottom(page, small, make_arithmetic_trainer):
    namespace = {}
    if "trainer" in PAGES[page]:  # of a run that the page is not about: only the calls are checked
        namespace["trainer"] = create_autospec(SCoReTrainer, instance=True)
    text = (ROOT / "docs" / page).read_text()
    assert "BASE_MODEL_PATH" not in text or "bf16=False" in text  # the embedded model trains on any CPU
    if "given" in PAGES[page]:
        task = Arithmetic(num_train=8)
        config = trl_score.SCoReConfig("outputs/given", correction_instruction=task.correction_instruction)
        namespace["given"] = (str(BASE_MODEL_PATH), task.reward, config, task.load("train"))
        text = text.replace("SCoReTrainer(..., ", "SCoReTrainer(*given, ")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        exec(compile(code, page, "exec"), namespace)
    if page in ("tutorial.md", "serving.md"):
        assert len(small) == 1 and small[0].startswith("your-name/")
    if hasattr(namespace.get("task"), "close"):
        namespace["task"].close()


def test_no_page_with_code_is_left_out():
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text()}
    assert pages == PAGES.keys() | ELSEWHERE


def commands() -> list[tuple[str, list[str]]]:
    """The commands in the docs: the page and the words, without variables of the environment."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines():
                line = line.partition(" > ")[0]  # the shell writes the file
                words = shlex.split(re.sub(r"\$[A-Z]+", "1", line), comments=True)
                while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                    del words[0]
                found += [(page.name, words)] if words else []
    return found


def test_commands_in_the_docs_are_valid(monkeypatch, tmp_path):
    """`trl-score` parses its own, up to the call that does the work; of the others, scripts and options are there."""
    done, launched = [], []

    def do(*args, **kwargs):
        done.append(kwargs)
        return Mock(exit_code=0)

    for module, name in {
        "evaluation": "evaluate_self_correction",
        "scaling": "inference_scaling",
        "collection": "collect",
        "report": "write_report",
        "preflight": "check",
    }.items():
        if importlib.util.find_spec(f"trl_score.{module}"):
            monkeypatch.setattr(importlib.import_module(f"trl_score.{module}"), name, do)
    monkeypatch.setattr("trl_score.report.inspect_logs.write_inspect_logs", lambda *args: done.append(args) or [])
    monkeypatch.setattr("trl_score.scaling.table", str)
    monkeypatch.setattr("trl_score.collection.describe", str)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    rows = [{"question": "What is 1 + 1?", "answer": "#### 2"}]
    monkeypatch.setattr(sources, "from_hub", lambda name: Dataset.from_list(rows))
    for each in ROOT.iterdir():  # the repository, and a file of the reader
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "my_task.py").write_text("from trl_score.tasks import Arithmetic as MyTask\n")
    monkeypatch.chdir(tmp_path)
    kinds = {"math.py": (TrainArguments, ScriptArguments, SCoReConfig, ModelConfig)}
    kinds["code.py"] = (TrainArguments, SCoReConfig, ModelConfig)
    kinds["baselines.py"] = (BaselineArguments, SFTConfig, ModelConfig)
    other = {"pip", "ruff", "pytest", "vllm", "for", "mkdocs", "hf", "inspect"}
    for page, words in commands():
        said = f"{page}: {' '.join(words)}"
        before = len(done) + len(launched)
        if words[0] == "trl-score":
            try:
                cpu = ["--use_cpu", "--bf16", "false"] if words[1] in ("train", "baselines") else []
                assert cli.main([*words[1:], *cpu]) == 0, said
            except SystemExit as stop:
                pytest.fail(f"{said}\n{stop}")
            assert len(done) + len(launched) == before + (words[1] not in ("env", "tasks", "configs")), said
        elif words[:2] == ["accelerate", "launch"]:
            args = launch_command_parser().parse_args(words[2:])
            if args.module:
                assert importlib.util.find_spec(args.training_script), said
                continue
            assert Path(args.training_script).exists(), said
            known = {each.name for kind in kinds[Path(args.training_script).name] for each in fields(kind)} | {
                "config"
            }
            named = {word[2:].partition("=")[0] for word in args.training_script_args if word.startswith("--")}
            assert named <= known, said
        elif words[0] == "python":
            script = words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py"
            text = Path(script).read_text()
            assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), said
        else:
            assert words[0] in other, said
    assert len(done) >= 8 and len(launched) >= 5


def cells(notebook: str, kind: str = "code") -> list[str]:
    content = json.loads((ROOT / "examples" / notebook).read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {}
    for number, code in enumerate(cells("score_quickstart.ipynb")):
        exec(compile(code, f"cell {number}", "exec"), namespace)
    gain = namespace["after"].summary["metrics"]["delta_t1_t2"]
    assert gain["low"] > 0.05 and namespace["before"].summary["metrics"]["delta_t1_t2"]["high"] < 0


def test_the_notebook_is_plain_python_and_runs_for_two_steps(tmp_path, monkeypatch, small):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {}
    for number, code in enumerate(cells("score_quickstart.ipynb")):
        exec(compile(code, f"cell {number}", "exec"), namespace)
    assert namespace["history"][-1]["stage"] == 2


def test_the_notebook_marks_the_end_of_stage_one():
    code, text = ("\n".join(cells("score_quickstart.ipynb", kind)) for kind in ("code", "markdown"))
    steps = re.search(r"stage1_steps=(\d+),", code)[1]
    assert f"axvline({steps}, " in code and f"the first {steps} steps" in text


def test_custom_task_of_the_docs_is_the_example():
    example = (ROOT / "examples" / "custom_task.py").read_text()
    shown = re.search(r"class Backwards.*?(?=```)", (ROOT / "docs" / "tasks.md").read_text(), re.S)[0]
    assert shown.strip() in example


GENERATED = {"docs/api.md"}  # by the site's build


def in_repository(link: str) -> str | None:
    """The file of the repository that an absolute link of ours leads to; `None` for links to other places."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    repository, site = urls["Repository"], urls["Documentation"]
    raw = repository.replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
    for start in (f"{repository}/blob/main/", raw):
        if link.startswith(start):
            return link.removeprefix(start)
    if link.startswith(site):
        return f"docs/{link.removeprefix(site).strip('/') or 'index'}.md"
    return None


def test_links_in_the_docs_lead_somewhere():
    """On the site MkDocs looks at them again. README and the files beside it are read elsewhere, so their links are absolute."""
    outer = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    inner = [*(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    for page in outer + inner:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            target = in_repository(link) if link.startswith("http") else os.path.relpath(page.parent / link, ROOT)
            assert target is None or target in GENERATED or (ROOT / target).exists(), f"{page.name}: {link}"
            assert link.startswith("http") or page not in outer, f"{page.name}: {link} leads nowhere on a package page"


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


def test_page_of_options_is_what_the_configuration_says():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    make_options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_options)
    listed = [name for found in make_options.documented().values() for name, _ in found]
    assert sorted(listed) == sorted(make_options.own_fields())
    assert set(listed) >= make_options.PAPER.keys() | make_options.MEASURED.keys()
    assert (ROOT / "docs" / "options.md").read_text() == make_options.page(), "run python docs/make_options.py"


def test_recipes_of_schedules_run(make_arithmetic_trainer):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "algorithm.md").read_text(), re.S)[1]
    namespace = {}
    exec(compile(code, "algorithm.md", "exec"), namespace)
    cycles = [namespace["two_cycles"](step, 90).number for step in range(90)]
    assert cycles == ([1] * 10 + [2] * 35) * 2
    trainer = make_arithmetic_trainer({"schedule": namespace["joint"]}, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["stage"] == 2


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="no MkDocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").stat().st_size > 50_000


def test_every_public_name_has_an_entry_on_the_page_on_python():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    listed = {name: module for found in hooks.PUBLIC.values() for module, names in found.items() for name in names}
    assert {*trl_score.__all__} - {"__version__"} <= listed.keys()
    public = {*sandbox.__all__, *trl_score.tasks.__all__} - {"BACKENDS", "TASKS"}
    tasks = {name for name in public if isinstance(getattr(trl_score.tasks, name, None), type)}
    assert public - {task for task in tasks if hasattr(getattr(trl_score.tasks, task), "name")} <= listed.keys()
    text = hooks.page()
    for name, module in listed.items():
        item = getattr(importlib.import_module(f"trl_score.{module}"), name)
        assert item.__doc__ and f"### `{name}`" in text
        for line in (inspect.getdoc(item).partition("\n\n")[0]).splitlines()[:1]:
            assert line.split("[")[0].strip() in text, name


def test_version_is_public():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", trl_score.__version__)
    assert set(trl_score.__all__) == {
        "CollapseAlarm",
        "KeepBestCheckpoint",
        "SCoReConfig",
        "SCoReTrainer",
        "__version__",
        "evaluate_self_correction",
        "inference_scaling",
    }


def test_the_release_is_described_alike_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == trl_score.__version__ and citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    site = re.findall(r"^(site_url|repo_url): (.*)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert dict(site) == {"site_url": project["urls"]["Documentation"], "repo_url": project["urls"]["Repository"]}


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
