"""
The worker of the sandbox: an interpreter that has loaded the standard library, left the host, and forks two processes for
each program. Run by path, by [`trl_score.sandbox.Sandbox`]; it can import nothing of ours but its neighbours.

    pool ──job──► worker ──fork──► checker    reads the job (tests, expected values), runs the tests, writes the verdict
                    │                 │ channel.Peer
                    └─────fork──► candidate   holds the program, and never anything else

The worker itself never reads a job: what it does not know, the next program cannot find in its memory. It watches the
clock and ends both processes.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import socket
import struct
import symtable
import sys
import time
import types
import warnings


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(1, os.path.dirname(sys.path[0]))
import channel
import isolation
import worker_pool


del sys.path[:2]
LIMITS = struct.Struct("<ddQ")  # before the job's text: CPU seconds, wall-clock seconds, bytes
MAX_REASON = 2000  # characters
OUR_FRAMES = 12  # of the stack, below a function of the program's that is called
NOT_LOADED = {  # of the standard library: they act when imported, or are large and of no use here
    "antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "ensurepip", "venv", "nt",
    "msilib", "winreg", "winsound", "msvcrt", "pydoc_data", "distutils", "curses", "dbm", "readline", "rlcompleter",
}  # fmt: skip


def load_modules(packages: list[str]) -> None:
    """Load the standard library, with what it would load later, and the packages: no program can open a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names - NOT_LOADED):
            if not name.startswith("_"):
                with contextlib.suppress(Exception):  # not on this system
                    module = importlib.import_module(name)
                    if name in ("collections", "concurrent", "email", "encodings", "html", "importlib", "json",
                                "logging", "urllib", "xml", "unittest", "asyncio", "zoneinfo", "os"):  # fmt: skip
                        for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
                            if child.name not in ("mbcs", "oem", "__main__"):
                                with contextlib.suppress(Exception):
                                    importlib.import_module(f"{name}.{child.name}")
        for name in ("_strptime", "_pydecimal", "concurrent.futures.thread", "xml.etree.ElementTree"):
            importlib.import_module(name)
        for name in packages:
            importlib.import_module(name)


def plain_interpreter() -> None:
    """Take away what tells this interpreter from a fresh one, and what a program could come to depend on."""
    for name in ("isolation", "channel", "worker_pool"):
        del sys.modules[name]
    sys.path[:] = []
    sys.argv[:] = sys.orig_argv[:] = [""]
    sys.setrecursionlimit(sys.getrecursionlimit() + OUR_FRAMES)
    random.seed(0)  # the same verdict every time
    gc.collect()
    gc.freeze()


# --- the process with the program -----------------------------------------------------------------------------------


class Candidate:
    def __init__(self):
        self.module = types.ModuleType("program")
        sys.modules["program"] = self.module

    def load(self, source: str) -> None:
        exec(compile(source, "<program>", "exec", dont_inherit=True), vars(self.module))

    def names(self, names: list[str]) -> dict:
        """Those of the names that the program has bound."""
        return {name: vars(self.module)[name] for name in names if name in vars(self.module)}

    def call(self, function, arguments: tuple, named: dict) -> tuple:
        """Its result, and the arguments as the call left them."""
        return function(*arguments, **named), arguments, named


def candidate(file: int) -> None:
    holder = Candidate()
    peer = channel.Peer(
        file, channel.everything, {"load": holder.load, "names": holder.names, "call_and_show": holder.call}
    )
    with contextlib.suppress(EOFError):
        while True:
            peer.serve(peer.receive())


# --- the process with the tests -------------------------------------------------------------------------------------


def free_names(source: str) -> set[str]:
    """Names that a source takes from its globals without ever binding them there."""
    top = symtable.symtable(source, "<tests>", "exec")
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    return used - bound


def put_back(original, changed) -> None:
    """Make a mutable argument what the call left."""
    if type(original) is not type(changed):
        return
    if isinstance(original, list | bytearray):
        original[:] = changed
    elif isinstance(original, dict | set):
        original.clear()
        original.update(changed)


class MutableCall:
    """A function of the program's that may change its arguments, and does so here too."""

    def __init__(self, function: channel.Remote):
        self.function = function

    def __call__(self, *arguments, **named):
        peer = self.function._trl_peer
        result, changed, changed_named = peer.ask("call_and_show", self.function, arguments, named)
        for original, after in zip(arguments, changed, strict=True):
            put_back(original, after)
        for name, original in named.items():
            put_back(original, changed_named[name])
        return result


def check(job: dict, peer: channel.Peer) -> dict:
    """Load the program, run the tests on it: `{"passed": bool, "reason": str}`, or `{"broken": str}` for bad tests."""
    try:
        code = compile(job["tests"], "<tests>", "exec", dont_inherit=True)
        wanted = free_names(job["tests"])
    except (SyntaxError, ValueError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    builtins = vars(sys.modules["builtins"])
    tests = types.ModuleType("tests")
    sys.modules["tests"] = tests
    try:
        peer.ask("load", job["program"])
        wanted = [name for name in sorted(wanted) if name not in builtins or name in job["entry"]]
        found = peer.ask("names", wanted)
        for name in wanted:
            if name in found:
                value = found[name]
                if name in channel.MODULES and name not in job["entry"]:
                    value = importlib.import_module(
                        name
                    )  # the program may have imported it; what it is, it cannot say
                if job["mutable_arguments"] and type(value) is channel.Remote:
                    value = MutableCall(value)
                setattr(tests, name, value)
        exec(code, vars(tests))
    except channel.Lost as error:
        return {"passed": False, "reason": str(error)}
    except BaseException as error:
        reason = describe(error, job["tests"])
        return {"passed": False, "reason": peer.lost or reason}
    return {"passed": not peer.lost, "reason": peer.lost or "passed"}


def describe(error: BaseException, tests: str) -> str:
    """The error, with the line of the tests it came from."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<tests>":
            line = step.tb_lineno
        step = step.tb_next
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # an argument of it may be a thing of the program's
        text = type(error).__name__
    lines = tests.splitlines()
    if line is not None and line <= len(lines):
        text = f"{text} [{lines[line - 1].strip()}]"
    return text[:MAX_REASON]


def checker(job_file: int, file: int, alive: int) -> None:  # `alive` is held open, no more
    job = json.loads(worker_pool.read_job(job_file)[LIMITS.size :])
    verdict = json.dumps(check(job, channel.Peer(file, channel.tests_allow))).encode()
    worker_pool.write_result(job_file, verdict)


# --- the worker -----------------------------------------------------------------------------------------------------


def fork(run, keep: list[int], backend: str, **limits) -> int:
    """A child that gives up all but the descriptors to keep, which become 3, 4, .., and runs. Returns its id."""
    if process := os.fork():
        return process
    try:
        keep = [os.dup2(file, 100 + i) for i, file in enumerate(keep)]
        for i, file in enumerate(keep):
            os.dup2(file, 3 + i)
        os.closerange(3 + len(keep), 1 << 16)
        gc.enable()
        isolation.confine(backend, **limits)
        run(*range(3, 3 + len(keep)))
    finally:
        os._exit(0)


def cpu_time(process: int) -> float:
    """Seconds of CPU time a process has used, by its own clock (clock_getcpuclockid(3)); 0 where there is none."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0


def judge(job_file: int, pool: socket.socket, backend: str, around_fork, base: int) -> dict:
    """Have one program checked. Returns how that ended; the verdict is in the job's file."""
    cpu_limit, wall_limit, memory = LIMITS.unpack(os.pread(job_file, LIMITS.size, worker_pool.HEADER.size))
    limits = {"backend": backend, "cpu_seconds": cpu_limit, "address_space": base + memory}
    deadline = time.monotonic() + wall_limit
    files = [*(end.detach() for end in socket.socketpair()), *os.pipe()]
    ours, theirs, done, alive = files  # `alive` closes when the checker ends
    processes, ended = [], ""
    try:
        with around_fork:
            processes.append(fork(candidate, [theirs], **limits))
        room = os.fstat(job_file).st_size + (1 << 16)
        processes.append(fork(checker, [job_file, ours, alive], file_size=room, **limits))
        for file in (ours, theirs, alive):
            os.close(file)
            files.remove(file)
        poll = select.poll()
        poll.register(done, select.POLLIN)
        poll.register(pool, select.POLLIN)
        while not ended:
            cpu_left = cpu_limit - max(map(cpu_time, processes))
            wall_left = deadline - time.monotonic()
            if wall_left <= 0:
                ended = f"wall-clock limit of {wall_limit:g} s"
            elif cpu_left <= 0:
                ended = f"CPU time limit of {cpu_limit:g} s"
            elif ready := poll.poll(max(1.0, 1000 * min(cpu_left, wall_left))):
                if any(file == done for file, _ in ready):
                    break
                ended = "the pool is gone"
    finally:
        status = 0
        for process in processes:
            finished, early = os.waitpid(process, os.WNOHANG)
            if not finished:
                os.kill(process, signal.SIGKILL)
                early = os.waitpid(process, 0)[1]
                if early == signal.SIGKILL:  # ours; another one means that it was ending already
                    continue
            if process == processes[0]:
                status = early
        for file in files:
            os.close(file)
    return {"ended": ended, "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}


def main() -> None:
    backend, packages, paths, file = sys.argv[1], sys.argv[2].split(), json.loads(sys.argv[3]), int(sys.argv[4])
    pool = socket.socket(fileno=file)
    os.set_inheritable(file, False)
    try:
        sys.path += paths
        load_modules(packages)
        plain_interpreter()
        base = isolation.memory_in_use()
        around_fork = isolation.enter(backend)
    except Exception as error:
        pool.sendall(f"{type(error).__name__}: {error}\n".encode())
        return
    pool.sendall(b"ready\n")
    while True:
        _, files, _, _ = socket.recv_fds(pool, 1, 1)
        if not files:
            return
        ended = judge(files[0], pool, backend, around_fork, base)
        os.close(files[0])
        pool.sendall(json.dumps(ended).encode() + b"\n")


if __name__ == "__main__":
    main()
