"""
Real language models. `TRL_SCORE_MODELS` names folders of causal language models with a chat template and tokenizer, separated by
`os.pathsep`; without it nothing is run. Weights are not part of the project.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_score import SCoReConfig, SCoReTrainer, evaluate_self_correction


EXAMPLES = Path(__file__).parent.parent / "examples" / "experiments"
MODELS = [folder for folder in os.environ.get("TRL_SCORE_MODELS", "").split(os.pathsep) if folder]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="TRL_SCORE_MODELS names no folder of a language model"),
]


@pytest.fixture(scope="module", params=MODELS or [None], ids=lambda folder: Path(folder or "none").name)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def task():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from language_tasks import Facts
    finally:
        sys.path.pop(0)
    return Facts()


def settings(folder, **changed) -> SCoReConfig:
    """Two steps of each stage, on a CPU."""
    return SCoReConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "stage1_steps": 2,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "temperature": 0.8,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "bf16": True,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "bfloat16"},
            "report_to": "none",
            "disable_tqdm": True,
        }
        | changed
    )


def make_trainer(model, task, folder, trainer_class=SCoReTrainer, **changed):
    quantized = changed.pop("quantization_config", None)
    return trainer_class(
        model,
        task.reward,
        settings(folder, correction_instruction=task.correction_instruction, **changed),
        train_dataset=task.load("train"),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        quantization_config=quantized,
    )


def test_evaluates_20_problems_and_reuses_them(model, task, tmp_path):
    options = {"max_completion_length": 12, "limit": 20, "dtype": "bfloat16", "output_dir": tmp_path}
    first = evaluate_self_correction(model, task, **options)
    assert len(first.rollouts) == 20
    assert first.summary["metrics"]["accuracy_t1"]["value"] > 0.1  # a model of language knows a few of the facts
    written = (tmp_path / "rollouts.jsonl").read_bytes()
    assert evaluate_self_correction(model, task, **options).summary == first.summary
    assert (tmp_path / "rollouts.jsonl").read_bytes() == written


@pytest.mark.parametrize("bits", [16, 4])
def test_two_steps_of_each_stage(model, task, tmp_path, bits):
    quantization = {}
    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        quantization = {"quantization_config": config}
    trainer = make_trainer(model, task, tmp_path, **quantization)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "stage" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2]
    assert logs[0]["kl"] == pytest.approx(0, abs=5e-3)
    norms = torch.tensor([log["grad_norm"] for log in logs])  # 0 where a step's rewards are all equal
    assert norms.isfinite().all() and norms.max() > 0
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in trained) and all(p.isfinite().all() for p in trained)
    trainer.save_model()
    trainer.create_model_card(model_name="tested")
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "SCoRe" in card
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_run_that_was_killed_ends_like_an_uninterrupted_one(model, task, tmp_path):
    whole = make_trainer(model, task, tmp_path / "whole")
    whole.train()
    process = subprocess.run(
        [sys.executable, __file__, model, str(tmp_path / "killed")], capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    resumed = make_trainer(model, task, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (resumed, whole))
    for name, parameter in ours.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6)


def _run_until_killed(model, folder):
    """SIGKILL in the third step."""

    class Killed(SCoReTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(*args, **kwargs)

    sys.path.insert(0, str(EXAMPLES))
    from language_tasks import Facts

    make_trainer(model, Facts(), folder, Killed).train()


if __name__ == "__main__":
    _run_until_killed(*sys.argv[1:])
