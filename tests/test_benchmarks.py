"""The benchmarks run and print what they promise, at the smallest sizes. No times are checked."""

import re
import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent / "benchmarks"
SMALL = ["--batch", "2", "--prompt", "32", "--bridge", "32", "--repeats", "1"]
STEP = ["--model", "tiny", "--length", "4", *SMALL]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark in this process; returns what it prints."""

    def run(script, *arguments):
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_update_beside_stock_and_beside_a_forward_for_each_attempt(run):
    out = run("update.py", "--models", "tiny", "--lengths", "8", "--ragged", "--micro_batches", "2", *SMALL)
    assert re.search(r"8 tokens, \d+% of the padded rows: time, ours / stock", out)
    assert re.search(r"8 tokens, .*: time, ours / a forward for each attempt", out)
    assert re.search(r"8 tokens, .*: time, ours / that with the head of a GPU", out)
    assert re.search(r"8 tokens, .*: time of the reference, ours / stock", out)
    memory = float(re.search(r"most memory, ours / stock +([\d.]+)", out)[1])
    assert memory < 1.05  # not a time: the same at every run


def test_rollouts_in_one_call_and_in_two(run):
    out = run("rollout.py", "--models", "tiny", "--lengths", "4", *SMALL)
    assert re.search(r"4 tokens: one call / a call for each attempt +[\d.]+", out)


def test_step_beside_a_plain_loop(run):
    """It checks that both get attempts of the same lengths."""
    out = run("peer.py", "--models", "tiny", "--lengths", "4", "--micro_batch", "2", *SMALL)
    assert re.search(r"4 tokens: a step, ours / the plain loop +[\d.]+", out)
    assert re.search(r"4 tokens: its most memory, likewise +[\d.]+", out)


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--lora", "--attempts", "3"], marks=pytest.mark.slow),
        pytest.param(["--qlora", "--dtype", "bfloat16", "--no_stock"], marks=pytest.mark.slow),
    ],
)
def test_step_by_purpose_and_by_place(run, options):
    out = run("step.py", *STEP, *options)
    names = ["rollout", "reference", "rewards", "update", "the rest", "generate", "forward", "backward", "optimizer"]
    assert all(f"\n  {name}" in out for name in names)
    assert 0 < float(re.search(r"overhead outside of the model, % of a step +([\d.]+)", out)[1]) < 100
    assert "rollout.py:" in out  # among the largest functions
    assert ("a step, ours / stock" in out) == ("--no_stock" not in options)


@pytest.mark.slow
def test_figure_of_the_cost_over_generated_tokens(run, tmp_path):
    out = run("step.py", *STEP, "--figure", tmp_path / "linear.png", "--points", 2)
    assert out.count("R² = ") == 3
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")
