"""The card of a trained model says what happened, runs as it says, and gives nothing away."""

import os
import re
from pathlib import Path

import pytest
import trl
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoTokenizer

from trl_score import evaluate_self_correction
from trl_score.model_card import measured
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


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


def test_card_has_the_table_the_settings_and_the_figure(trained):
    folder = Path(trained.args.output_dir)
    text = (folder / "README.md").read_text()
    assert re.search(r"^\| 0 \| \d+\.\d \[\d+\.\d, \d+\.\d\] \|", text, re.M) and re.search(r"^\| 3 \| ", text, re.M)
    assert "50 problems of the task `arithmetic`" in text and "greedy decoding" in text
    assert "| optimizer steps, of them Stage I | 3, 2 |" in text and "| task (training split) | arithmetic" in text
    assert "](images/training.png)" in text and (folder / "images" / "training.png").stat().st_size > 5000
    assert "## Limits" in text and "2409.12917" in text and "TRL: " in text


def test_snippet_of_the_card_runs_the_attempts_as_trained(trained, capsys):
    text = (Path(trained.args.output_dir) / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    problem = trained.eval_dataset[0]["prompt"]
    code = code.replace("path or Hub id of this model", trained.args.output_dir).replace(
        '"..."', repr(problem[0]["content"])
    )
    exec(compile(code, "README.md", "exec"), {})
    expected = trained.generate_attempts([problem])[0]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"attempt {k}: {text}" for k, text in enumerate(expected, start=1)
    ]


def test_snippet_has_the_arguments_of_the_chat_template(make_arithmetic_trainer, capsys):
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
    trainer.save_model()
    trainer.create_model_card()
    test_snippet_of_the_card_runs_the_attempts_as_trained(trainer, capsys)
    assert (
        "chat_template_kwargs={'enable_thinking': False}" in (Path(trainer.args.output_dir) / "README.md").read_text()
    )


def test_metadata_is_valid_for_the_hub(trained):
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert isinstance(card.data, ModelCardData) and {"trl", "score"} <= {tag.lower() for tag in card.data.tags}
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
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
