"""A run that was stopped and resumed ends with the weights of the uninterrupted run, bit for bit."""

from pathlib import Path

import pytest
import torch


SETTINGS = {
    "one update for each generation": {},
    "accumulated gradients": {"gradient_accumulation_steps": 2},
    "several updates for each generation": {"steps_per_generation": 3},
    "rollouts used twice": {"steps_per_generation": 2, "num_iterations": 2},
    "accumulation inside a generation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "three attempts": {"num_attempts": 3, "stage1_steps": 4},
    "adaptive beta2": {
        "adaptive_stage1_beta": True,
        "steps_per_generation": 2,
        "num_iterations": 1,
        "stage1_steps": 6,
    },
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_resumed_run_is_bit_identical_from_every_checkpoint(make_arithmetic_trainer, setting):
    """Six steps, three of them Stage I: the checkpoints lie in Stage I, on the boundary and in Stage II."""
    settings = {"max_steps": 6, "stage1_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_generations": 4}
    settings |= setting
    first = make_arithmetic_trainer(**settings)
    first.train()
    expected = {name: value.clone() for name, value in first.model.state_dict().items()}
    keys = ("stage", "stage1_beta", "num_generated_tokens")
    logged = [[log.get(key) for key in keys] for log in first.state.log_history if "stage" in log]
    for step in range(1, 6):
        resumed = make_arithmetic_trainer(**settings)
        start = {name: value.clone() for name, value in resumed.model.state_dict().items()}
        assert any(not torch.equal(value, expected[name]) for name, value in start.items())
        resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, f"checkpoint-{step}")))
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), f"resumed after step {step}: {name} differs"
        assert [[log.get(key) for key in keys] for log in resumed.state.log_history if "stage" in log] == logged
