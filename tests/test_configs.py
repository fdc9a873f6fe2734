"""The configurations in examples/configs: what they say, and two steps of each with a tiny model in place of the named one."""

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from benchmarks import memory
from test_score_trainer import gradients, move, rollouts
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from trl import ModelConfig, TrlParser

from trl_score import SCoReConfig, training
from trl_score.tasks import TASKS
from trl_score.training import TrainArguments


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
ONE_GPU = [file for file in FILES if not file.stem.startswith("arithmetic") and file.stem != "mbpp"]
REAL = [*ONE_GPU, ROOT / "examples" / "configs" / "mbpp.yaml"]
PAPER = {  # Appendix B
    "math": {"alpha": 10, "beta": 0.01, "stage1_beta": 0.1, "temperature": 1.0},
    "mbpp": {"alpha": 10, "beta": 0.01, "stage1_beta": 0.25, "temperature": 1.0, "max_steps": 1500},
}
PAPER["gsm8k"] = PAPER["math"]


def script(settings: dict) -> str:
    return "code.py" if settings["task"] == "mbpp" else "math.py"


def by_name(files):
    return pytest.mark.parametrize("file", files, ids=[file.stem for file in files])


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A folder of made-up problems for every task that a configuration names."""
    folder = tmp_path_factory.mktemp("problems")
    sums = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    sums = [row | {"solution": row["answer"], "level": "1", "subject": "sums"} for row in sums]
    words = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(4)]
    programs = [
        {
            "task_id": number,
            "split": split,
            "text": f"Write a function that adds {number}.",
            "code": f"def add(x):\n    return x + {number}",
            "test_setup_code": "",
            "test_list": [f"assert add(1) == {number + 1}"],
        }
        for number, split in [
            (2, "prompt"),
            (3, "prompt"),
            (4, "prompt"),
            (11, "test"),
            (601, "train"),
            (602, "train"),
        ]
    ]
    check = "def check(candidate):\n    assert candidate(1) == 2\n"
    functions = [{"task_id": "0", "prompt": "def add(x):\n", "entry_point": "add", "test": check}] * 2
    for name, rows in {
        "math/train": sums,
        "math/math500": sums,
        "gsm8k/train": words,
        "gsm8k/test": words,
        "mbpp/mbpp": programs,
        "humaneval/humaneval": functions,
    }.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny_model(chat_model, problems, tmp_path_factory):
    """
    As `chat_model`, wide enough for 4-bit weights and for an adapter with 8-bit states of the optimizer. It reads the prompts in a
    tenth of the tokens: bfloat16 is slow on some CPUs.
    """
    path = tmp_path_factory.mktemp("tiny")
    tasks = [TASKS["math"](data_dir=str(problems)), TASKS["mbpp"](data_dir=str(problems), runner=list)]
    prompts = [row["prompt"] for task in tasks for row in task.load("test")]
    texts = [message["content"] for prompt in prompts for message in prompt] + [
        task.correction_instruction for task in tasks
    ]
    tokenizer = AutoTokenizer.from_pretrained(chat_model).train_new_from_iterator(texts, 1000)
    tokenizer.save_pretrained(path)
    config = AutoConfig.from_pretrained(chat_model, vocab_size=len(tokenizer))
    config.pad_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 256, 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def run(monkeypatch):
    """Runs an example script in this process, as the command line would, and returns its trainer."""

    def run(name, *arguments):
        trainers, train = [], training.train
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(training, "train", lambda *args: trainers.append(train(*args)))
        monkeypatch.syspath_prepend("the script's folder, which it takes off the path")
        spec = importlib.util.spec_from_file_location(f"example_{name[:-3]}", ROOT / "examples" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        return trainers[0]

    return run


@by_name(REAL)
def test_two_steps_with_a_tiny_model(file, run, problems, tiny_model, tmp_path):
    """One of each stage. All that is not a size is as in the file: adapter, 4 bits, optimizer, precision, checkpointing."""
    settings = yaml.safe_load(file.read_text())
    arguments = [
        "--config",
        file,
        "--model_name_or_path",
        tiny_model,
        "--data_dir",
        problems,
        "--output_dir",
        tmp_path,
    ]
    arguments += ["--max_steps", 2, "--logging_steps", 1, "--max_completion_length", 8, "--num_eval_problems", 2]
    arguments += ["--num_generations", 2, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2]
    arguments += ["--gradient_accumulation_steps", 2, "--steps_per_generation", 2, "--use_cpu", "true"]
    trainer = run(script(settings), *arguments)
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1, 2]
    assert trainer.args.bf16 and trainer.model.is_gradient_checkpointing
    assert trainer.args.alpha == settings["alpha"] and trainer.args.learning_rate == settings["learning_rate"]
    assert (trainer.task, trainer.eval_task) == (settings["task"], settings.get("eval_task", settings["task"]))
    if settings.get("use_peft"):
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        kinds = {name.split(".lora_")[0].split(".")[-1] for name in trained}
        assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        quantized = settings.get("load_in_4bit", False)
        assert {p.dtype for p in trained.values()} == {torch.bfloat16 if quantized else torch.float32}
        assert getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False) == quantized
        assert (tmp_path / "adapter_model.safetensors").exists()
    if "8bit" in settings.get("optim", ""):
        states = [state["state1"] for state in trainer.optimizer.optimizer.state.values()]
        assert {state.dtype for state in states} >= {torch.uint8}


@by_name(REAL)
def test_coefficients_are_those_of_the_paper(file):
    settings = yaml.safe_load(file.read_text())
    expected = PAPER[settings["task"]] | ({"alpha": 1} if "alpha1" in file.stem else {})
    assert {name: settings[name] for name in expected} == expected


@by_name(ONE_GPU)
def test_the_file_is_the_table_s_row_for_the_smallest_gpu(file):
    settings = yaml.safe_load(file.read_text())
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    values = tuple(settings[name] for name in (*names, "per_device_eval_batch_size"))
    assert values == memory.SIZES[file.stem][24]
    total = memory.estimate(settings, values)["total"] / memory.GB
    assert f"One GPU with 24 GB, of which about {total:.0f} are used: estimated" in file.read_text().replace(
        "\n# ", " "
    )
    train, accumulate, generate, _ = values
    comment = (
        f"# Memory. {train * accumulate} rollouts for each optimizer step, {train * generate} at a time in generation."
    )
    assert comment in file.read_text()


@by_name(ONE_GPU)
def test_every_gpu_has_the_same_rollouts_in_a_step(file, tmp_path):
    """128, in whole groups in each generation, whole generations in each step, with a fifth of the GPU's memory to spare."""
    settings = yaml.safe_load(file.read_text())
    for gpu, (train, accumulate, generate, evaluation) in memory.SIZES[file.stem].items():
        assert train * accumulate == 128 and accumulate % generate == 0
        arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--bf16", "false"]
        arguments += ["--per_device_train_batch_size", str(train), "--gradient_accumulation_steps", str(accumulate)]
        arguments += ["--steps_per_generation", str(generate), "--per_device_eval_batch_size", str(evaluation)]
        parser = TrlParser((TrainArguments, SCoReConfig, ModelConfig))
        task_args, args, model_args = parser.parse_args_and_config(arguments)
        assert (
            args.generation_batch_size == train * generate and args.generation_batch_size % args.num_generations == 0
        )
        assert task_args.task in TASKS and model_args.model_name_or_path in memory.MODELS
        assert memory.estimate(settings, (train, accumulate, generate, evaluation))["total"] < 0.8 * gpu * memory.GB


@by_name(ONE_GPU)
def test_prompt_and_attempts_fit_the_context(file):
    settings = yaml.safe_load(file.read_text())
    context = memory.MODELS[settings["model_name_or_path"]].max_position_embeddings
    needed = memory.PROMPT[settings["task"]] + 2 * settings["max_completion_length"] + memory.BRIDGE
    assert needed <= context


def test_an_unknown_setting_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("lora_rank: 32\noutput_dir: x\nuse_cpu: true\n")
    with pytest.raises(ValueError, match="lora_rank"):
        TrlParser((TrainArguments, SCoReConfig, ModelConfig)).parse_args_and_config(["--config", str(file)])


def test_the_table_of_the_docs_is_what_the_script_prints():
    text = (ROOT / "docs" / "one_gpu.md").read_text()
    assert memory.table() in text
    assert {file.stem for file in ONE_GPU} == set(memory.SIZES)
    for file in FILES:
        assert file.name in text, f"docs/one_gpu.md does not name {file.name}"


def test_options_of_the_levers_are_fields():
    """Every option that the page names exists."""
    known = {field.name for each in (TrainArguments, SCoReConfig, ModelConfig) for field in fields(each)}
    named = set(re.findall(r"--(\w+)", (ROOT / "docs" / "one_gpu.md").read_text()))
    assert named - {"config", "check"} <= known


# What the levers do to the update


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_arithmetic_trainer, adapter):
    lora = {"peft_config": training.get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0))}
    trainers = [
        make_arithmetic_trainer(lora if adapter else {}, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    for trainer in trainers:
        move(trainer)
    trainers[1].model.gradient_checkpointing_enable()  # as `train` does
    inputs = rollouts(trainers[0])
    results = []
    for trainer in trainers:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, inputs)
        results.append((loss.detach(), gradients(trainer, loss)))
    assert not trainers[0].model.is_gradient_checkpointing and trainers[1].model.is_gradient_checkpointing
    torch.testing.assert_close(results[0], results[1])
    assert any(gradient.abs().max() > 0 for gradient in results[1][1])


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_train_both_stages(make_arithmetic_trainer, optim):
    trainer = make_arithmetic_trainer(optim=optim, max_steps=2, stage1_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1, 2]
    states = [state["state1"] for state in trainer.optimizer.optimizer.state.values()]
    assert any(state.dtype == torch.uint8 for state in states)
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())


def test_attention_and_other_settings_of_the_model_reach_it(run, problems, chat_model, tmp_path):
    arguments = ["--task", "gsm8k", "--data_dir", problems, "--model_name_or_path", chat_model, "--bf16", "false"]
    arguments += [
        "--attn_implementation",
        "eager",
        "--model_init_kwargs",
        '{"experts_implementation": null, "use_cache": false}',
    ]
    arguments += ["--max_steps", 1, "--max_completion_length", 4, "--num_generations", 2, "--num_eval_problems", 0]
    arguments += ["--per_device_train_batch_size", 2, "--report_to", "none", "--output_dir", tmp_path]
    trainer = run("math.py", *arguments)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.ref_model.config._attn_implementation == "eager"


def test_liger_may_not_replace_the_head(make_arithmetic_trainer):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        make_arithmetic_trainer(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
