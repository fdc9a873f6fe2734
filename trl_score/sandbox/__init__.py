"""Runs Python programs that nobody has read, and decides whether they pass their tests."""

import json
import logging
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..worker_pool import CAN_SEND_DESCRIPTORS, NO_DESCRIPTORS, Outcome, WorkerPool
from .isolation import BACKENDS
from .names import undefined_names


logger = logging.getLogger(__name__)

WORKER = Path(__file__).parent / "worker.py"
START = """
import os, sys
here = os.path.dirname(sys.argv[1])
sys.path[:0] = [here, os.path.dirname(here)]
if sys.platform == "linux":  # by descriptors: no program is to find where on this machine its interpreter lives
    sys.path[:] = [f"/proc/self/fd/{os.open(path, 0)}" for path in sys.path if os.path.isdir(path)]
del here
import channel, isolation, worker, worker_pool
del sys.path[:2]
worker.main()
"""
LIMITS = struct.Struct("<ddQ")  # as in worker.py
MAX_STRETCH = 10  # as in worker.py
MISSING = {
    "landlock": "no namespaces: the program shares process numbers with the host, and is kept from them by seccomp alone",
    "seccomp": "no namespaces and no Landlock: one layer, the filter of system calls, keeps the program from the host",
    "none": "NO ISOLATION: the program can read and write what you can, and reach the network",
}


@dataclass(frozen=True)
class Submission:
    """
    A program and the tests it is to pass.

    Args:
        program (`str`):
            Python source. It is not run as `__main__`.
        tests (`str`):
            Python source that raises if the program is wrong, and passes if it runs to its end. Test cases of `unittest`
            and functions `test_..` that it defines and does not run are run after it.
        entry_points (`tuple[str, ...]`, *optional*):
            The only names that the tests get from the program. By default, these are the names that the tests use and do not
            define, except names of builtins, modules and libraries. Give them if a program may try to cheat.
        mutable_arguments (`bool`, *optional*, defaults to `False`):
            Whether changes that the program makes to a list, dict, set or bytearray passed to it reach the tests.
    """

    program: str
    tests: str
    entry_points: tuple[str, ...] = field(default=())
    mutable_arguments: bool = False


@dataclass(frozen=True)
class Verdict:
    """
    Whether the program passed all of its tests.

    Args:
        passed (`bool`):
            Whether all tests passed.
        reason (`str`):
            `"passed"`, or why not, in one line.
        unsupported (`str`, *optional*, defaults to `""`):
            The thing in the tests that the sandbox does not do as a plain run would. If it is not empty, the program may be
            right although it did not pass (docs/sandbox.md).
    """

    passed: bool
    reason: str
    unsupported: str = ""


class Sandbox:
    """
    Runs programs against their tests, each in processes of its own.

    The program runs in one process and the tests in another, so that the program can neither see the expected values nor
    decide what equality means. Plain data is rebuilt as builtin types, and objects of the program are asked over a channel
    that no expected value crosses. Only the process with the tests can report a pass: it writes the verdict to a file that
    the program's process cannot access. docs/sandbox.md has a table of what tests may do with a program's objects.

    Each backend prevents the following on Linux (x86_64; aarch64 was not tested):

    | | `"namespaces"` | `"landlock"` | `"seccomp"` | `"none"` |
    |---|---|---|---|---|
    | forging a pass; reading the tests | yes | yes | yes | yes |
    | outliving its limits of CPU time, wall-clock time and memory; more than 64 threads | yes | yes | yes | mostly (1) |
    | files, network, other programs and processes, the environment | yes, three layers | yes, two | yes, one | **no** |
    | the kernel's own faults (a local privilege escalation) | fewer system calls | fewer | fewer | **no** |

    (1) A process that leaves the program's session may live on.

    No backend covers these: load on the machine (a program may use a whole core until its limit), covert timing channels
    between programs that run at the same time, and faults of the processor. For programs of a patient adversary, use a virtual
    machine as well.

    A program can import the standard library. It cannot start a process or open a file, and its output is discarded.

    Args:
        backend (`str`, *optional*, defaults to `"auto"`):
            One of `"namespaces"`, `"landlock"`, `"seccomp"`, `"none"`, or `"auto"`: the first of the first three that
            this machine allows. `"none"` must be requested by name.
        cpu_seconds (`float`, *optional*, defaults to `10.0`):
            CPU time of a program. The slowest reference program of MBPP and HumanEval (MBPP's problem 123) needs 4 to 5.4.
        wall_seconds (`float`, *optional*, defaults to `30.0`):
            Wall-clock time of a program. Time that it spends waiting for a core of a busy machine does not count, up to ten
            times this limit.
        memory (`int`, *optional*, defaults to `512 * 2**20`):
            Bytes that a program may map.
        packages (`Sequence[str]`, *optional*):
            Packages of this environment that programs may import, such as `"numpy"`.
        num_workers (`int`, *optional*):
            Number of programs to run at a time. Defaults to the usable CPU cores, divided among the processes of `accelerate`.
        allow_code_execution (`bool`, *optional*):
            Consent to run the programs. By default, it is given by the environment variable `HF_ALLOW_CODE_EVAL=1`, as in
            `evaluate`.

    Raises:
        `PermissionError`: Without consent.
        `RuntimeError`: If this machine or system does not allow the backend.

    Example:
    ```python
    >>> sandbox = Sandbox(allow_code_execution=True)
    >>> sandbox.run([Submission("def inc(x): return x + 2", "assert inc(1) == 2", entry_points=("inc",))])
    [Verdict(passed=False, reason='AssertionError [assert inc(1) == 2]', unsupported='')]
    ```
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        cpu_seconds: float = 10.0,
        wall_seconds: float = 30.0,
        memory: int = 512 * 2**20,
        packages: Sequence[str] = (),
        num_workers: int | None = None,
        allow_code_execution: bool | None = None,
    ):
        if allow_code_execution is None:
            allow_code_execution = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
        if not allow_code_execution:
            raise PermissionError(
                "Grading code runs programs that a language model wrote, on this machine, and a sandbox is not a "
                "guarantee: such a program may be destructive, by accident or by what it was trained on. Read what is "
                "covered in the docstring of `trl_score.sandbox.Sandbox`; if you accept the risk, set the environment "
                "variable HF_ALLOW_CODE_EVAL=1 or pass `allow_code_execution=True`."
            )
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"Unknown backend {backend!r}. Expected one of: {['auto', *BACKENDS]}.")
        for name, value in (("cpu_seconds", cpu_seconds), ("wall_seconds", wall_seconds), ("memory", memory)):
            if not value > 0:
                raise ValueError(f"`{name}={value}` leaves a program nothing to run with. Set it above 0.")
        if not CAN_SEND_DESCRIPTORS:
            raise RuntimeError(NO_DESCRIPTORS)
        if sys.platform != "linux" and backend != "none":
            raise RuntimeError(
                f"The sandbox isolates programs with features of Linux, and this is {sys.platform}. Use Linux, a container or a runner of "
                "your own (docs/sandbox.md), or `backend='none'` on a machine where programs can do no harm."
            )
        self.cpu_seconds, self.wall_seconds, self.memory = cpu_seconds, wall_seconds, memory
        refusals = {}
        for self.backend in BACKENDS[:-1] if backend == "auto" else [backend]:
            self._pool = WorkerPool(self._command(packages), {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}, num_workers)
            try:
                (verdict,) = self.run([Submission("def check(x): return x", "assert check(1) == 1")])
            except OSError as error:
                verdict = Verdict(False, str(error))
            if verdict.passed:
                break
            refusals[self.backend] = verdict.reason
            self.close()
        else:
            raise RuntimeError(
                f"This machine allows no sandbox: {refusals}. `backend='none'` isolates programs only by processes and their limits. Use "
                "it only on a machine where programs can do no harm."
            )
        logger.log(
            logging.WARNING if self.backend in ("seccomp", "none") else logging.INFO,
            f"Sandbox for programs: {self.backend}. {MISSING.get(self.backend, '')} {refusals or ''}".strip(),
        )

    def _command(self, packages: Sequence[str]) -> list[str]:
        paths = [path for path in sys.path if path] if packages else []
        options = ["-P", "-s", "-S", "-B", "-c", START]
        return [sys.executable, *options, str(WORKER), self.backend, " ".join(packages), json.dumps(paths)]

    def close(self) -> None:
        """End the worker processes. The next run starts new ones."""
        self._pool.close()

    def run(self, submissions: Sequence[Submission]) -> list[Verdict]:
        """
        Run programs against their tests, as many at a time as there are workers. May be called from any thread.

        Args:
            submissions (`Sequence[Submission]`):
                Programs with their tests.

        Returns:
            One [`Verdict`] per submission, in their order. Whatever a program does is a verdict, never an exception.

        Raises:
            `ValueError`: If tests are no Python: that is a fault of the data, not of the program.
        """
        limits = LIMITS.pack(self.cpu_seconds, self.wall_seconds, self.memory)
        jobs = [
            limits
            + json.dumps(
                {
                    "program": submission.program,
                    "tests": submission.tests,
                    "entry": submission.entry_points,
                    "mutable_arguments": submission.mutable_arguments,
                }
            ).encode()
            for submission in submissions
        ]
        outcomes = self._pool.map(jobs, time_limit=MAX_STRETCH * self.wall_seconds + 10)
        return [self._verdict(*pair) for pair in zip(submissions, outcomes, strict=True)]

    def _verdict(self, submission: Submission, outcome: Outcome) -> Verdict:
        if outcome.lost:
            return Verdict(False, outcome.lost)
        end = json.loads(outcome.message)
        if end["ended"]:
            return Verdict(False, end["ended"])
        if outcome.result is None:
            return Verdict(False, "the tests ended without a verdict")
        found = json.loads(outcome.result)
        if "broken" in found:
            raise ValueError(f"These tests are no Python ({found['broken']}):\n{submission.tests[:1000]}")
        reason = found["reason"]
        if end["signal"] and not found["passed"]:
            reason += f" (signal {end['signal']})"
        return Verdict(found["passed"] is True, reason, found["unsupported"])


__all__ = ["BACKENDS", "Sandbox", "Submission", "Verdict", "undefined_names"]
