"""Arguments of the chat template (Qwen3's `enable_thinking`) are those of training, wherever attempts come from."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig

from trl_score import baselines, cli, evaluate_self_correction, inference_scaling
from trl_score.collection import collect
from trl_score.rollout import Bridge, load_rollout_settings, save_rollout_settings, tokenize_prompt
from trl_score.sampling import TransformersSampler, VLLMSampler
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


THINKING = {"enable_thinking": False}
SMALL = {"max_completion_length": 4, "batch_size": 4, "limit": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with Qwen3's template."""
    folder = shutil.copytree(BASE_MODEL_PATH, tmp_path_factory.mktemp("qwen") / "model")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text())
    return folder


@pytest.fixture
def contexts(monkeypatch):
    """The contexts of each attempt of each batch."""
    found, roll_out = [], TransformersSampler.roll_out

    def recorded(self, prompt_ids, bridge, num_attempts, *rest):
        rollouts = roll_out(self, prompt_ids, bridge, num_attempts, *rest)
        found.extend(rollouts.context_ids(k + 1) for k in range(num_attempts))
        return rollouts

    monkeypatch.setattr(TransformersSampler, "roll_out", recorded)
    return found


def expected(model, split, kwargs):
    """What the prompts are in tokens, in the order of their length, and what is between the attempts."""
    tokenizer, task = AutoTokenizer.from_pretrained(model), Arithmetic()
    prompts = task.load(split)["prompt"][:2]
    bridge = Bridge(tokenizer, kwargs)(prompts[:1], [task.correction_instruction], 1, [[]])[0]
    return [tokenize_prompt(tokenizer, prompt, kwargs) for prompt in prompts], bridge


def test_only_variables_of_the_template_are_taken(model):
    match = "`chat_template_kwargs` has add_generation_prompt, which training and evaluation set themselves"
    with pytest.raises(ValueError, match=match):
        evaluate_self_correction(
            str(model), "arithmetic", **SMALL, chat_template_kwargs={"add_generation_prompt": True}
        )


RUNS = {
    "evaluate": ("test", lambda model, folder, **more: evaluate_self_correction(model, "arithmetic", **SMALL, **more)),
    "collect": ("train", lambda model, folder, **more: collect(model, "arithmetic", num_samples=1, **SMALL, **more)),
    "scale": (
        "test",
        lambda model, folder, **more: inference_scaling(
            model, "arithmetic", max_budget=2, output_dir=folder, **SMALL, **more
        ),
    ),
}


@pytest.mark.parametrize(("split", "run"), RUNS.values(), ids=RUNS.keys())
def test_they_reach_prompts_and_bridges(model, contexts, tmp_path, split, run):
    with_them, without = expected(model, split, THINKING), expected(model, split, None)
    assert with_them[0] != without[0] and with_them[1] != without[1]
    run(str(model), tmp_path, chat_template_kwargs=THINKING)
    first, second = contexts[:2]
    assert first == with_them[0] and all(row[-len(with_them[1]) :] == with_them[1] for row in second)


def trained(model, folder, adapter=False):
    """A folder as the trainer leaves it."""
    if adapter:
        base = AutoModelForCausalLM.from_pretrained(model)
        get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    else:
        shutil.copytree(model, folder)
    save_rollout_settings(folder, chat_template_kwargs=THINKING, correction_instruction="again")
    return str(folder)


@pytest.mark.parametrize("adapter", [False, True])
def test_those_of_training_are_read_back(model, contexts, tmp_path, adapter):
    name = trained(model, tmp_path / "trained", adapter)
    evaluation = evaluate_self_correction(name, "arithmetic", **SMALL, output_dir=tmp_path / "out")
    assert contexts[0] == expected(model, "test", THINKING)[0]
    assert evaluation.settings["chat_template_kwargs"] == THINKING
    contexts.clear()
    evaluate_self_correction(name, "arithmetic", **SMALL, chat_template_kwargs={})
    assert contexts[0] == expected(model, "test", None)[0]
    with pytest.raises(ValueError, match=r"chat_template_kwargs {'enable_thinking': False} instead of {}"):
        evaluate_self_correction(name, "arithmetic", **SMALL, chat_template_kwargs={}, output_dir=tmp_path / "out")


def test_the_instruction_of_training_is_read_back(model, tmp_path, caplog):
    name = trained(model, tmp_path / "trained")
    caplog.set_level("INFO", "trl_score")
    asked = lambda model, **more: evaluate_self_correction(model, "arithmetic", **SMALL, **more).settings[  # noqa: E731
        "correction_instruction"
    ]
    assert asked(name) == "again"
    assert "trained with: 'again'" in caplog.text
    assert asked(name, correction_instruction="once more") == "once more"
    assert asked(str(model)) == Arithmetic.correction_instruction


def test_they_are_read_back_by_each_sampler(model, tmp_path, monkeypatch):
    name = trained(model, tmp_path / "trained")
    module = types.SimpleNamespace(LLM=lambda model, **kwargs: None, SamplingParams=None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    in_memory = AutoModelForCausalLM.from_pretrained(name)
    for sampler in (TransformersSampler(name), TransformersSampler(in_memory), VLLMSampler(name)):
        assert sampler.chat_template_kwargs == THINKING
    assert TransformersSampler(in_memory, chat_template_kwargs={}).chat_template_kwargs == {}


def test_they_are_read_from_a_revision_on_the_hub(model, tmp_path):
    repository = tmp_path / "models--me--tiny"
    for commit, branch in (("1" * 40, "main"), ("2" * 40, "trained")):
        shutil.copytree(model, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    save_rollout_settings(repository / "snapshots" / ("2" * 40), chat_template_kwargs=THINKING)
    cache = {"cache_dir": str(tmp_path)}
    assert load_rollout_settings("me/tiny", **cache) == {}
    assert load_rollout_settings("me/tiny", **cache, revision="trained")["chat_template_kwargs"] == THINKING
    assert TransformersSampler("me/tiny", **cache, revision="trained").chat_template_kwargs == THINKING


def test_a_model_whose_name_leads_nowhere_has_none(model):
    in_memory, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for name in ("", "/gone/model", "outputs/gone", "a/b/c"):
        in_memory.config._name_or_path = name
        assert TransformersSampler(in_memory, tokenizer).chat_template_kwargs == {}


def test_the_command_line_takes_them(model, contexts, tmp_path, capsys):
    arguments = ["--model", str(model), "--task", "arithmetic", "--max_completion_length", "4", "--limit", "2"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    assert cli.main(["evaluate", *arguments, "--chat_template_kwargs", json.dumps(THINKING)]) == 0
    assert contexts[0] == expected(model, "test", THINKING)[0]
    file = tmp_path / "config.yaml"
    file.write_text("chat_template_kwargs: {enable_thinking: false}\n")
    assert cli.main(["evaluate", *arguments, "--config", str(file)]) == 0  # the same, so all is reused
    for wrong in ("{enable_thinking: false}", "[1]"):
        assert cli.main(["evaluate", *arguments, "--chat_template_kwargs", wrong]) == 1
        assert "`chat_template_kwargs=" in capsys.readouterr().err


def test_a_baseline_samples_and_learns_with_them_and_saves_them(model, contexts, tmp_path, monkeypatch):
    learnt = []
    monkeypatch.setattr(baselines, "fine_tune", lambda model, dataset, *args: learnt.extend(dataset["input_ids"]) or 0)
    monkeypatch.setattr(Arithmetic, "reward", lambda self, completions, **kwargs: [1.0] * len(completions))
    arguments = baselines.BaselineArguments(
        task="arithmetic", num_samples=2, num_iterations=1, max_completion_length=4, num_train_problems=2, plus=True,
        chat_template_kwargs=json.dumps(THINKING),
    )  # fmt: skip
    sft = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    baselines.run_baseline(ModelConfig(str(model)), Arithmetic(), arguments, sft)
    prompts, bridge = expected(model, "train", THINKING)
    assert contexts[0] == prompts and contexts[1][0][-len(bridge) :] == bridge
    assert learnt[0][: len(contexts[1][0])] == contexts[1][0]
    assert load_rollout_settings(str(tmp_path))["chat_template_kwargs"] == THINKING


def test_chat_messages_without_a_template_are_refused_with_a_remedy():
    base = AutoTokenizer.from_pretrained(BASE_MODEL_PATH)
    base.chat_template = None
    with pytest.raises(ValueError, match="base model, which does not answer in turns"):
        tokenize_prompt(base, [{"role": "user", "content": "a"}])
    assert tokenize_prompt(base, "a") == base("a")["input_ids"]
