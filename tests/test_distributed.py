"""Two processes give the same update as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


STEPS = 4
WORKER = Path(__file__).parent / "distributed_worker.py"


def run(folder, num_processes, **settings):
    """Train in `num_processes` gloo processes; the logs and the weights."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(WORKER), str(folder), json.dumps(settings | {"max_steps": STEPS})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "logs.json").read_text()), torch.load(folder / "weights.pt")


OPTIONS = {
    "loss by the token count": {"loss_type": "dapo"},
    "the defaults": {},
    "what is measured over the batch": {
        **{"kl_level": "sequence", "adaptive_stage1_beta": True, "whiten_advantages": True},
        **{"num_attempts": 3, "stage1_reference": "previous"},
    },
    "several second attempts at each first one": {"second_attempts_per_first": 2, "gamma": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_two_processes_give_the_update_of_one(tmp_path, options):
    """
    Groups of four rollouts, two on each rank: the leave-one-out baseline needs the other rank's rewards. Two steps of Stage I
    and two of Stage II on the same rollouts, of different lengths, some cut off.
    """
    settings = {"num_generations": 4, "stage1_steps": 2} | options
    logs_of_one, one = run(tmp_path / "one", 1, per_device_train_batch_size=4, **settings)
    logs_of_two, two = run(tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    assert max((one[name] - two["start." + name]).abs().max() for name in one if not name.startswith("start.")) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-6, rtol=1e-5, msg=name)
    assert len(logs_of_one) == STEPS
    for got, expected in zip(logs_of_two, logs_of_one, strict=True):
        compared = {key for key in expected if "time" not in key and not key.startswith(("clip_ratio", "num_tokens"))}
        compared -= {"loss", "total_flos", "train_loss"}
        assert {"accuracy_t1", "reward_t2", "kl_t1", "kl_t2", "edit_distance_ratio", "stage"} <= compared
        for key in compared:
            # A rounding of the weights by 1e-7 moves the log-probability of an unlikely token by 1e-4.
            tolerance = 1e-3 if key.startswith(("kl", "grad_norm")) else 1e-5
            assert got[key] == pytest.approx(expected[key], abs=2e-5, rel=tolerance), key
    assert ("stage1_beta" in logs_of_one[0]) == ("adaptive_stage1_beta" in options)
    assert {log["stage"] for log in logs_of_one} == {1, 2}
    assert any(log["completions/clipped_ratio_t2"] > 0 for log in logs_of_one)
    assert 0 < logs_of_one[0]["num_generated_tokens"] < logs_of_one[-1]["num_generated_tokens"]
