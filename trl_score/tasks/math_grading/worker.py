"""A worker of [`trl_score.tasks.math.MathTask`]: `python worker.py MEMORY CHANNEL`. It imports nothing of ours but the grader."""

import importlib.util
import json
import logging
import resource
import socket
import sys
from pathlib import Path
from types import ModuleType


HERE = Path(__file__).parent


def _load(name: str, file: Path) -> ModuleType:
    """A module or package by its file: to import it by name would import all of `trl_score`, with torch."""
    specification = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def handle(job: bytes) -> bytes:
    """One job: a verdict, the reason why there is none, the unreadable golds, or whether two answers are the same."""
    job = json.loads(job)
    if "golds" in job:
        return json.dumps([gold for gold in job["golds"] if not grading.is_readable(gold)]).encode()
    if "same" in job:
        first, second = job["same"]
        return json.dumps(grading.is_readable(second) and grading.is_correct(rf"\boxed{{{first}}}", second)).encode()
    try:
        return json.dumps(grading.is_correct(job["text"], job["gold"], job["problem"])).encode()
    except ValueError as error:
        return json.dumps(str(error)).encode()


if __name__ == "__main__":
    logging.disable()
    grading = _load("math_grading", HERE / "__init__.py")
    grading.is_correct(
        r"The final answer is $\frac{1}{2}$. I hope it is correct.", "2"
    )  # load and compile what is needed
    memory, channel = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _load("worker_pool", HERE.parents[1] / "worker_pool.py").serve(socket.socket(fileno=channel), handle)
