"""The card of a trained model says what happened, runs as it says, and gives nothing away."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, TrlParser, get_peft_config

from trl_score import SCoReConfig, evaluate_self_correction
from trl_score.model_card import RUN, card_of_base, datasets_of, evaluations_of, measured, tables
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH
from trl_score.training import TrainArguments


@pytest.fixture
def trained(make_arithmetic_trainer):
    trainer = make_arithmetic_trainer(
        max_steps=3, stage1_steps=2, logging_steps=1, eval_on_start=True, per_device_train_batch_size=16
    )
    trainer.eval_dataset = Arithmetic(num_test=50).load("test")
    trainer.task = trainer.eval_task = "arithmetic"
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def test_intervals_are_those_of_the_evaluation():
    """From the shares of verdicts alone, the bootstrap is that over the rollouts themselves."""
    evaluation = evaluate_self_correction(str(BASE_MODEL_PATH), "arithmetic", max_completion_length=8, batch_size=500)
    metrics = evaluation.summary["metrics"]
    log = {f"eval_{name}": metric["value"] for name, metric in metrics.items()}
    for name, found in measured(log, "eval", 2, 1000).items():
        assert found["value"] == pytest.approx(metrics[name]["value"])
        for limit in ("low", "high"):
            assert found[limit] == pytest.approx(metrics[name][limit], abs=0.0035)
    assert measured(log, "eval", 2, None)["accuracy_t1"] == {"value": log["eval_accuracy_t1"]}


def evaluation(step=0, **more):
    """The log of an evaluation by the trainer."""
    metrics = {"accuracy_t1": 0.5, "accuracy_t2": 0.75, "delta_t1_t2": 0.25, "delta_i_to_c": 0.25, "delta_c_to_i": 0.0}
    return {"step": step} | {f"eval_{name}": value for name, value in (metrics | more).items()}


def table_of(*history):
    """The rows of the card's table, without its head."""
    config = SimpleNamespace(num_attempts_eval=2)
    trainer = SimpleNamespace(args=config, eval_dataset=None, state=SimpleNamespace(log_history=history))
    return tables(evaluations_of(trainer)).splitlines()[2:]


def test_each_evaluation_has_the_interval_of_its_own_problems():
    """Except one of an older version, which does not say how many. One with another number of attempts is not shown."""
    numbers = [dict.fromkeys(("num_problems", "num_rollouts", "num_graded"), number) for number in (8, 800)]
    logs = evaluation(), evaluation(1, **numbers[0]), evaluation(2, **numbers[1]), evaluation(3, accuracy_t3=1.0)
    unknown, few, many = table_of(*logs)
    assert unknown == "| 0 |  | 50.0 | 75.0 | 25.0 | 25.0 | 0.0 |"
    assert few.startswith("| 1 | 8 | 50.0 [12.5, 87.5] | ") and many.startswith("| 2 | 800 | 50.0 [46.5, 53.5] | ")


def test_what_was_not_graded_is_said_and_is_in_no_interval():
    """Half of eight graded ones are right, with 32 that were not graded: the interval is of eight."""
    graded, some, several = table_of(
        evaluation(1, num_problems=8, num_rollouts=8, num_graded=8),
        evaluation(2, num_problems=40, num_rollouts=40, num_graded=8),
        evaluation(3, num_problems=40, num_rollouts=80, num_graded=72),
    )
    assert some == graded.replace("| 1 | 8 |", "| 2 | 40 (32 not graded) |")
    assert several == "| 3 | 40 (8 not graded) | 50.0 | 75.0 | 25.0 | 25.0 | 0.0 |"


def test_card_has_the_table_the_settings_and_the_figure(trained):
    folder = Path(trained.args.output_dir)
    text = (folder / "README.md").read_text()
    assert re.search(r"^\| 0 \| 50 \| \d+\.\d \[\d+\.\d, \d+\.\d\] \|", text, re.M)
    assert re.search(r"^\| 3 \| 50 \| ", text, re.M)
    assert "problems of the task `arithmetic`" in text and "greedy decoding" in text
    assert "| optimizer steps, of them Stage I | 3, 2 |" in text and "| task (training split) | arithmetic" in text
    assert "](images/training.png)" in text and (folder / "images" / "training.png").stat().st_size > 5000
    assert "## Limits" in text and "2409.12917" in text and "TRL: " in text


def test_snippet_of_the_card_runs_the_attempts_as_trained(trained, capsys, monkeypatch):
    """Unchanged, in the folder of the card."""
    text = (Path(trained.args.output_dir) / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(trained.args.output_dir)
    exec(compile(code, "README.md", "exec"), namespace := {})
    problem = namespace["problem"]
    assert problem[0]["content"] not in {row["prompt"][0]["content"] for row in trained.train_dataset}
    expected = trained.generate_attempts([problem])[0]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"attempt {k}: {text}" for k, text in enumerate(expected, start=1)
    ]


def test_snippet_has_the_arguments_of_the_chat_template(make_arithmetic_trainer, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    trainer = make_arithmetic_trainer(
        {"processing_class": tokenizer},
        **{
            "max_steps": 1,
            "max_completion_length": 4,
            "num_test": 2,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    trainer.train()
    trainer.task = "arithmetic"
    trainer.save_model()
    trainer.create_model_card()
    test_snippet_of_the_card_runs_the_attempts_as_trained(trainer, capsys, monkeypatch)
    assert (
        "chat_template_kwargs={'enable_thinking': False}" in (Path(trainer.args.output_dir) / "README.md").read_text()
    )


def test_metadata_is_valid_for_the_hub(trained):
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert isinstance(card.data, ModelCardData) and {"trl", "score"} <= {tag.lower() for tag in card.data.tags}
    assert card.data.pipeline_tag == "text-generation" and "licence" not in card.data.to_dict()
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {result.dataset_split for result in results} == {"test"}
    last = [log for log in trained.state.log_history if "eval_accuracy_t2" in log][-1]
    assert {result.metric_name: result.metric_value for result in results} == {
        "Accuracy@t1": pytest.approx(last["eval_accuracy_t1"], abs=1e-4),
        "Accuracy@t2": pytest.approx(last["eval_accuracy_t2"], abs=1e-4),
    }


def test_nothing_is_invented_and_nothing_leaks(make_arithmetic_trainer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    trainer = make_arithmetic_trainer(max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    trainer.create_model_card()
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "## Results" not in text and "model-index" not in text and "| task" not in text and "images/" not in text
    for secret in (
        os.path.expanduser("~"),
        trainer.args.output_dir,
        str(BASE_MODEL_PATH),
        "hf_xxx",
        os.environ.get("USER") or "/root",
    ):
        assert secret not in text
    assert "None" not in text


@pytest.fixture
def base_model(tmp_path):
    """The embedded model in a folder with a card, as a model from the Hub has one."""
    folder = shutil.copytree(BASE_MODEL_PATH, tmp_path / "base-model")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: a-licence\nlanguage:\n- fr\n---\n# A base\n")
    return str(folder)


@pytest.fixture
def make_adapter_trainer(make_arithmetic_trainer, base_model):
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def make(**settings):
        trainer = make_arithmetic_trainer(
            {"model": base_model, "peft_config": lora},
            **{"max_steps": 3, "stage1_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.3},
            **settings,
        )
        trainer.task = trainer.eval_task = "arithmetic"
        return trainer

    return make


@pytest.fixture
def adapter_trainer(make_adapter_trainer):
    return make_adapter_trainer()


def test_card_of_an_adapter_names_what_it_is(adapter_trainer):
    adapter_trainer.train()
    adapter_trainer.save_model()
    adapter_trainer.create_model_card()
    card = ModelCard.load(Path(adapter_trainer.args.output_dir) / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter" and "lora" in card.data.tags
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "a-licence", ["fr"])
    assert "| adapter | LORA, rank 4, alpha 12, dropout 0.0, modules q_proj, v_proj |" in card.text
    assert (
        "| gradient clipping (norm) | 0.3 |" in card.text and "| trained weights, computation | float32" in card.text
    )
    assert re.search(r"\| hardware \| 1 x CPU, \d+ s \|", card.text) and re.search(
        r"\| versions \|.* peft \d", card.text
    )


def test_card_of_an_adapter_on_4_bits_says_so_and_repeats_them(make_arithmetic_trainer):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_arithmetic_trainer({"quantization_config": quantization, "peft_config": lora}, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert "| base model's weights | 4 bits (nf4) |" in text and "bitsandbytes" in text and "q_proj" in text
    assert (options["load_in_4bit"], options["bnb_4bit_quant_type"], options["use_bnb_nested_quant"]) == (
        True,
        "nf4",
        True,
    )


def test_checkpoints_and_saved_models_carry_the_card_of_the_run(adapter_trainer, tmp_path):
    """With the steps that were done by then; a path of the base model, which PEFT writes into its card, is in none."""
    adapter_trainer.train()
    folder = Path(adapter_trainer.args.output_dir)
    for step in (1, 2, 3):
        text = (folder / f"checkpoint-{step}" / "README.md").read_text()
        planned = "" if step == 3 else " of 3 planned"
        assert f"| optimizer steps, of them Stage I | {step}{planned}, {min(step, 2)} |" in text
        settings = json.loads((folder / f"checkpoint-{step}" / RUN).read_text())["settings"]
        assert settings["optimizer steps, of them Stage I"] == f"{step}{planned}, {min(step, 2)}"
    assert (folder / "checkpoint-3" / "images" / "training.png").exists()
    adapter_trainer.save_model()
    adapter_trainer.save_model(str(tmp_path / "elsewhere"))
    for saved in (folder, folder / "checkpoint-1", tmp_path / "elsewhere"):
        text = (saved / "README.md").read_text()
        assert "## Two attempts" in text and str(tmp_path) not in text, saved


def test_options_of_the_card_repeat_the_run(make_adapter_trainer, tmp_path):
    rare = {
        "delta": 5.0,
        "entropy_coef": 0.01,
        "eval_temperature": 0.7,
        "num_generations_eval": 2,
        "reward_weights": [0.5],
    }
    rare |= {"steps_per_generation": 2, "use_bias_correction_kl": True, "generation_kwargs": {"max_time": 60.0}}
    decay = {"num_stable_steps": 1, "num_decay_steps": 1, "min_lr_ratio": 0.2}
    rare |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    adapter_trainer = make_adapter_trainer(**rare)
    adapter_trainer.eval_task = "gsm8k"
    adapter_trainer.train()
    adapter_trainer.create_model_card()
    text = (Path(adapter_trainer.args.output_dir) / "README.md").read_text()
    assert "warmup_stable_decay (num_stable_steps=1, num_decay_steps=1, min_lr_ratio=0.2), 0 steps of warm-up" in text
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    parser = TrlParser((TrainArguments, SCoReConfig, ModelConfig))
    command = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "again")]
    arguments, config, model = parser.parse_args_and_config([*command, "--use_cpu", "--report_to", "none"])
    assert (arguments.task, arguments.eval_task, arguments.num_train_problems) == ("arithmetic", "gsm8k", 32)
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 4, 12)
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    before, after = adapter_trainer.args.to_dict(), config.to_dict()
    different = {name for name in before if before[name] != after[name]}
    assert different <= {
        *("output_dir", "logging_dir", "run_name", "model_init_kwargs"),  # places
        *("logging_steps", "save_strategy", "save_steps", "per_device_eval_batch_size"),  # what is watched
    }


def test_options_of_the_card_are_whole_with_code_in_the_instruction(make_arithmetic_trainer, tmp_path, monkeypatch):
    """A line of three backticks ends a block that three began. The folder of the run is the current one, which has no name."""
    monkeypatch.chdir(tmp_path)
    instruction = "Check it. Reply with one block:\n```python\n...\n```\nNothing else."
    trainer = make_arithmetic_trainer(max_steps=1, output_dir=".", correction_instruction=instruction)
    trainer.task = trainer.eval_task = "arithmetic"
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    text = Path("README.md").read_text()
    options = re.search(r"^(`+)yaml\n(.*?)^ {0,3}\1`*$", text, re.S | re.M)[2]
    assert yaml.safe_load(options)["correction_instruction"] == instruction and yaml.safe_load(options)["seed"] == 42
    assert ModelCard.load("README.md").data.model_name == tmp_path.name


@pytest.mark.parametrize(
    "modules", [r".*\.(q_proj|v_proj)", ["q_proj"], ["q_proj", "v_proj"]], ids=["expression", "one", "two"]
)
def test_options_of_the_card_repeat_the_adapter(make_arithmetic_trainer, tmp_path, modules):
    lora = LoraConfig(r=4, target_modules=modules, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = make_arithmetic_trainer({"peft_config": lora}, max_steps=1)
    trainer.task = "arithmetic"
    trainer.create_model_card()
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    parser = TrlParser((TrainArguments, SCoReConfig, ModelConfig))
    command = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "again"), "--use_cpu"]
    repeated = get_peft_config(parser.parse_args_and_config(command)[2])
    again = make_arithmetic_trainer({"peft_config": repeated}, max_steps=1)
    names = [{name for name, each in one.model.named_parameters() if each.requires_grad} for one in (trainer, again)]
    assert names[0] == names[1] and any("lm_head" in name for name in names[0])
    if isinstance(modules, str):
        assert r"modules .\*\\.(q_proj\|v_proj) |" in text


def test_card_says_that_first_attempts_are_to_be_collected(make_arithmetic_trainer):
    rows = Arithmetic(num_train=16).load("train").map(lambda row: {"first_attempts": ["1", "2"]})
    trainer = make_arithmetic_trainer({"train_dataset": rows}, offline_first_attempts=0.5)
    trainer.task = "arithmetic"
    trainer.create_model_card()
    assert (
        "Collect first attempts of the base model with `trl-score collect`, and add"
        in (Path(trainer.args.output_dir) / "README.md").read_text()
    )


def test_without_a_card_the_licence_is_left_out():
    card_of_base.cache_clear()
    assert card_of_base("nobody/no-such-model") is None and card_of_base(str(BASE_MODEL_PATH)) is None
    assert datasets_of("gsm8k") == ["openai/gsm8k"] and datasets_of("arithmetic") == []
    assert datasets_of("math", "test") == ["HuggingFaceH4/MATH-500"] and len(datasets_of("math")) == 2


class Hub:
    """Stands in for the Hub: a repository is a folder of the cache, laid out as downloads are."""

    def __init__(self, cache):
        self.cache, self.uploads = cache, []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=name if "/" in name else f"someone/{name}")

    def upload_folder(self, repo_id, folder_path, ignore_patterns, **kwargs):
        ignored = shutil.ignore_patterns(*ignore_patterns, ".cache")
        repository, commit = self.cache / f"models--{repo_id.replace('/', '--')}", "0" * 40
        shutil.copytree(folder_path, repository / "snapshots" / commit, ignore=ignored, dirs_exist_ok=True)
        for name in {"config.json"} - {
            path.name for path in Path(folder_path).iterdir()
        }:  # the Hub says: no such file
            (repository / ".no_exist" / commit).mkdir(parents=True)
            (repository / ".no_exist" / commit / name).touch()
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        self.uploads.append(repository / "snapshots" / commit)


def test_snippet_runs_unchanged_after_a_push(make_arithmetic_trainer, base_model, tmp_path, monkeypatch):
    """A model and an adapter go to a stand-in for the Hub; another process runs the snippets of the cards that it has there."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    lora = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])}
    snippets, expected = [], []
    for name, more in (("whole", {}), ("adapter", lora)):
        trainer = make_arithmetic_trainer(
            {"model": base_model, **more},
            max_steps=2,
            push_to_hub=True,
            output_dir=str(tmp_path / name),
            save_strategy="no",
        )
        trainer.task = trainer.eval_task = "arithmetic"
        trainer.train()
        trainer.push_to_hub()
        pushed = hub.uploads[-1]
        text = (pushed / "README.md").read_text()
        assert f'model = "someone/{name}"' in text and (pushed / "images" / "training.png").exists()
        assert not list(pushed.glob("checkpoint-*")) and str(tmp_path) not in text
        (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
        snippets.append(code)
        expected += trainer.generate_attempts([[{"role": "user", "content": "3 0 5 0 9 1"}]])
    assert len(hub.uploads) == 2
    code = f"for snippet in {snippets!r}: exec(snippet, {{}})"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [f"attempt {k}: {attempt}" for attempts in expected for k, attempt in enumerate(attempts, start=1)]
    assert run.stdout.splitlines() == lines
