"""Several processes give the same update as one: DDP, FSDP2 and DeepSpeed ZeRO, connected by gloo."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils import prepare_multi_gpu_env
from processes import ranks
from safetensors.torch import load_file

from trl_score.reference import check_shards
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


STEPS = 4
TESTS = Path(__file__).parent
WORKER, AS_GPUS = TESTS / "distributed_worker.py", TESTS / "as_gpus.py"
CONFIGS = TESTS.parent / "examples" / "accelerate_configs"
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
SHARDED = ["fsdp2", *(pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero2", "zero3"))]


ON_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def accelerate_arguments(num_processes, backend):
    """Those of `accelerate launch` for a configuration of the examples, on CPUs."""
    config = ["--config_file", str(CONFIGS / f"{backend}.yaml"), f"--num_processes={num_processes}"]
    return [*config, "--mixed_precision=no", "--main_process_port=0"]


def launched(num_processes, backend, *arguments):
    """Start a script in so many processes as a user does: by `torchrun` or `accelerate launch`."""
    if backend == "ddp":
        environment = ON_CPU
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    else:
        environment = {"OMP_NUM_THREADS": "1"}
        command = ["-m", "accelerate.commands.launch", *accelerate_arguments(num_processes, backend), str(AS_GPUS)]
    command = [sys.executable, *command, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | environment)


def forked(num_processes, backend, *arguments):
    """The same processes without the launcher and the imports."""
    if backend == "ddp":
        return ranks(num_processes, *arguments, **ON_CPU)
    environment = {}
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda args: environment.update(prepare_multi_gpu_env(args))  # noqa: E731
        patch.setattr(launch, "multi_gpu_launcher", keep)
        command = [*accelerate_arguments(num_processes, backend), str(AS_GPUS)]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
    added = {name: value for name, value in environment.items() if name not in os.environ}
    return ranks(num_processes, AS_GPUS, *arguments, **added)


def run(folder, num_processes, backend="ddp", fresh=False, **settings):
    """Train; what the worker reports and the saved weights. DeepSpeed's launcher is never left out."""
    folder.mkdir()
    start = launched if fresh or backend.startswith("zero") else forked
    done = start(num_processes, backend, WORKER, folder, json.dumps({"max_steps": STEPS} | settings))
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "result.json").read_text())
    return result, load_file(next((folder / "model").glob("*.safetensors")))


@pytest.fixture(scope="module")
def run_one(tmp_path_factory):
    """The run of one process on four rollouts at a time, which several tests compare with."""

    @cache
    def run_cached(settings):
        folder = tmp_path_factory.mktemp("one") / "run"
        return run(folder, 1, per_device_train_batch_size=4, **json.loads(settings))

    return lambda **settings: run_cached(json.dumps(settings, sort_keys=True))


def assert_same(several, one):
    (result_of_several, weights_of_several), (result_of_one, weights_of_one) = several, one
    assert weights_of_several.keys() == weights_of_one.keys()
    for name, value in weights_of_one.items():
        torch.testing.assert_close(weights_of_several[name].float(), value, atol=2e-6, rtol=1e-5, msg=name)
    logs_of_several, logs_of_one = result_of_several["logs"], result_of_one["logs"]
    assert len(logs_of_one) == STEPS
    for got, expected in zip(logs_of_several, logs_of_one, strict=True):
        compared = {key for key in expected if "time" not in key and not key.startswith(("clip_ratio", "num_tokens"))}
        assert {"loss", "accuracy_t1", "reward_t2", "kl_t1", "kl_t2", "edit_distance_ratio", "stage"} <= compared
        for key in compared:
            # A rounding of the weights by 1e-7 moves the log-probability of an unlikely token by 1e-4.
            tolerance = 1e-3 if key.startswith(("kl", "grad_norm", "loss")) else 1e-5
            assert got[key] == pytest.approx(expected[key], abs=2e-5, rel=tolerance), key
    assert {log["stage"] for log in logs_of_one} == {1, 2}
    assert any(log["completions/clipped_ratio_t2"] > 0 for log in logs_of_one)
    assert 0 < logs_of_one[0]["num_generated_tokens"] < logs_of_one[-1]["num_generated_tokens"]


OPTIONS = {
    "loss by the token count": {"loss_type": "dapo"},
    "the defaults": {},
    "what is measured over the batch": {
        **{"kl_level": "sequence", "adaptive_stage1_beta": True, "num_attempts": 3, "gamma": 0.5},
    },
    "data streamed in two shards": {"streamed": True},
}
FOUR_ROLLOUTS = {"num_generations": 4, "stage1_steps": 2}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_two_processes_give_the_update_of_one(tmp_path, run_one, options):
    """
    Groups of four rollouts, two on each rank: the leave-one-out baseline needs the other rank's rewards. Two steps of Stage I
    and two of Stage II on the same rollouts, of different lengths, some cut off.
    """
    settings = FOUR_ROLLOUTS | options
    one = run_one(**settings)
    two = run(tmp_path / "two", 2, fresh=not options, per_device_train_batch_size=2, **settings)
    base = load_file(BASE_MODEL_PATH / "model.safetensors")
    assert max((one[1][name] - value).abs().max() for name, value in base.items() if name in one[1]) > 1e-3
    assert_same(two, one)
    assert ("stage1_beta" in one[0]["logs"][0]) == ("adaptive_stage1_beta" in options)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_four_processes_give_the_update_of_one(tmp_path, run_one, lora):
    """One rollout on each rank, so that a baseline is all from other ranks."""
    settings = FOUR_ROLLOUTS | {"lora": lora}
    one = run_one(**settings)
    assert_same(run(tmp_path / "four", 4, per_device_train_batch_size=1, **settings), one)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("backend", SHARDED)
def test_shards_give_the_update_of_one_process(tmp_path, run_one, backend, lora):
    """The same rollouts, with weights, gradients or optimizer states in pieces on two processes. The saved model is whole."""
    settings = FOUR_ROLLOUTS | {"lora": lora}
    one = run_one(**settings)
    two = run(tmp_path / "two", 2, backend, per_device_train_batch_size=2, **settings)
    assert two[0]["kind"] == ("FSDP" if backend == "fsdp2" else "DEEPSPEED")
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED)
def test_four_shards_give_the_update_of_one_process(tmp_path, run_one, backend):
    one = run_one(**FOUR_ROLLOUTS, lora=False)
    assert_same(run(tmp_path / "four", 4, backend, per_device_train_batch_size=1, **FOUR_ROLLOUTS), one)


@pytest.mark.parametrize("backend", SHARDED)
def test_attempts_are_generated_from_shards(tmp_path, backend, make_arithmetic_trainer):
    """
    Greedy attempts are those of one process, before training and of the trained model, which one process loads. In training
    attempts end at different lengths on the two processes.
    """
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, "stage1_steps": 1, "max_steps": 2}
    result, _ = run(tmp_path / "two", 2, backend, generated=True, **settings)
    assert [log["stage"] for log in result["logs"]] == [1, 2]
    assert len(result["evaluations"]) == 2
    for got, model in zip(result["evaluations"], (BASE_MODEL_PATH, tmp_path / "two" / "model"), strict=True):
        trainer = make_arithmetic_trainer(trainer={"model": str(model)}, beta=0.0, stage1_steps=0, num_test=8)
        expected = trainer.evaluate()
        for key in ("accuracy_t1", "accuracy_t2", "edit_distance_ratio", "completions/mean_length_t2"):
            assert got[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"]), key


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_the_first_process_decides_on_the_best_checkpoint(tmp_path, backend):
    """With DDP the processes are like nodes that see only their own files."""
    nodes = backend == "ddp"
    settings = {"best": True, "nodes": nodes, "save_strategy": "steps", "save_steps": 1, "stage1_steps": 0}
    _, saved = run(tmp_path / "two", 2, backend, per_device_train_batch_size=2, num_generations=4, **settings)
    kept = tmp_path / "two" / ("out0" if nodes else "out") / "_best-stage2"
    assert json.loads((kept / "best.json").read_text())["step"] < STEPS  # not what the model is in the end anyway
    best = load_file(kept / "model.safetensors")
    ranks = [load_file(tmp_path / "two" / f"rank{rank}.safetensors") for rank in range(2)] if nodes else []
    assert not nodes or not (tmp_path / "two" / "out1" / "_best-stage2").exists()
    for weights in [saved, *ranks]:
        for name, value in best.items():
            assert torch.equal(weights[name], value), name


SHORT_RUN = """
    --task arithmetic --max_steps 2 --stage1_steps 0.5 --per_device_train_batch_size 8 --max_completion_length 8
    --num_train_problems 16 --num_eval_problems 8 --per_device_eval_batch_size 4
    --bf16 false --gradient_checkpointing false --report_to none
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED])
def test_example_runs_with_each_configuration(tmp_path, backend):
    """`accelerate launch --config_file ..`, two steps: trained, evaluated before and after, saved with its card."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *accelerate_arguments(2, backend)]
    command += ["--cpu"] if backend == "ddp" else [str(AS_GPUS)]
    command += [str(TESTS.parent / "examples" / "math.py"), *SHORT_RUN, "--output_dir", str(tmp_path)]
    command += ["--use_cpu"] if backend == "ddp" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Accuracy@t2" in done.stdout
    assert {"model.safetensors", "README.md", "self_correction.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_named_reference_is_refused_with_shards():
    check_shards("base", is_sharded=False)
    check_shards(None, is_sharded=True)
    with pytest.raises(ValueError, match="`reference_model_name_or_path` loads whole weights"):
        check_shards("base", is_sharded=True)
