"""
Python processes that start in milliseconds. A fresh interpreter takes seconds to import torch, transformers and TRL. Here one
server imports them, starts no thread, and forks itself for each process that a test asks for.

The tests of launchers, of imports and of the installed command start fresh interpreters instead.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn


# What the server starts with, before a test changes anything. With one thread, numpy starts none when it is imported.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@cache
def server() -> socket.socket:
    """The connection to the server, which ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        fds = [theirs.fileno()]
        subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, pass_fds=fds, process_group=0)
    return ours


def python(*arguments, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """
    Run `python SCRIPT ..`, `python -m MODULE ..` or `python -c CODE ..`.

    Args:
        arguments: What follows `python` on the command line.
        timeout (`float`): Seconds after which the process is killed.
        environment (`str`): Variables that differ from those of this process.

    Returns:
        `subprocess.CompletedProcess`, with its output as text.

    Raises:
        `subprocess.TimeoutExpired`
    """
    return _run(arguments, [environment], timeout)


def ranks(number: int, *arguments, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """
    Run it in so many processes, as `torchrun` does. They write to the same two files. If one fails, the others are killed, and
    the exit code is the one of the process that failed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    of_each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return _run(arguments, [common | rank | environment for rank in of_each], timeout)


def _run(arguments, environments, timeout):
    arguments, deadline, code = [str(each) for each in arguments], time.monotonic() + timeout, 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        running = {}  # process ids, by the pipe on which the server says how a process ended
        try:
            for environment in environments:
                job = [arguments, os.environ | environment, os.getcwd()]
                reader, writer = os.pipe()
                socket.send_fds(server(), [json.dumps(job).encode()], [output.fileno(), errors.fileno(), writer])
                os.close(writer)
                status = open(reader, "rb", buffering=0)
                running[status] = int(status.readline())
            while running and code == 0:
                ended, _, _ = select.select([*running], [], [], max(0, deadline - time.monotonic()))
                if not ended:
                    raise subprocess.TimeoutExpired(arguments, timeout)
                for status in ended:
                    code = code or int(status.readline())
                    status.close()
                    del running[status]
        finally:
            for status, pid in running.items():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                status.close()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())


# --- in the server and its forks ---

IMPORTED = ("baselines", "evaluation", "report", "scaling", "training")


def serve(connection: socket.socket) -> list:
    """
    Fork as often as asked. Returns in each new process, with its arguments, its environment and its folder. Its parent is a
    second fork, which waits for it.
    """
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 3)
        with suppress(ChildProcessError):  # without a message, all that still run
            while os.waitpid(-1, os.WNOHANG if message else 0)[0]:
                pass
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    connection.close()
    *outputs, status = fds
    pid = os.fork()
    if pid != 0:
        os.write(status, b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(BrokenPipeError):  # the test has given up
            os.write(status, b"%d\n" % code)
        os._exit(0)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    for fd in fds:
        os.close(fd)
    return json.loads(message)


def become(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Do what an interpreter does at its start: take the environment, then run the script, module or code."""
    import numpy
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    numpy.random.seed()
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, folder
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def end(code: int) -> NoReturn:
    """End as an interpreter does, but without taking thousands of modules apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(f"trl_score.{name}")
    threads = {Path("/proc/self/task", each, "comm").read_text().strip() for each in os.listdir("/proc/self/task")[1:]}
    assert threads <= {"jemalloc_bg_thd"}, f"a fork has none of the threads {threads}"  # jemalloc starts its own again
    gc.freeze()  # what a process does not touch is not copied for it
    code = 0
    try:
        become(*serve(connection))
    except SystemExit as stop:
        code = 1 if isinstance(stop.code, str) else stop.code or 0
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    end(code)


if __name__ == "__main__":
    main()
