"""
The worker of the sandbox: an interpreter that has loaded the standard library, left the host, and forks two processes for
each program. Started by [`trl_score.sandbox.Sandbox`]; it can import nothing of ours but its neighbours.

    pool ──job──► worker ──fork──► checker    reads the job (tests, expected values), runs the tests, writes the verdict
                    │                 │ channel.Peer
                    └─────fork──► candidate   holds the program, and never anything else

The worker itself never reads a job: what it does not know, the next program cannot find in its memory. It watches the
clock and ends both processes.
"""

import asyncio
import contextlib
import dataclasses
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import platform
import random
import re
import select
import signal
import site
import socket
import struct
import sys
import time
import types
import unittest
import warnings

import channel
import isolation
import names
import remote
import worker_pool


LIMITS = struct.Struct("<ddQ")  # before the job's text: CPU seconds, wall-clock seconds, bytes
MAX_STRETCH = 10  # times the wall-clock limit, on a machine so busy that a program has to wait for a core
MAX_REASON = 2000  # characters
OWN_PROCESS = re.compile(
    r"\b(patch|monkeypatch|seed|stdin|environ|catch_warnings|assertWarns|assertLogs|freeze_time)\b"
)
OUR_FRAMES = 12  # of the stack, below a function of the program's that is called
NOT_LOADED = {  # of the standard library: they act when imported, or are large and of no use here
    "antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "ensurepip", "venv", "nt",
    "msilib", "winreg", "winsound", "msvcrt", "pydoc_data", "distutils", "curses", "dbm", "readline", "rlcompleter",
}  # fmt: skip


def load_with_children(name: str) -> None:
    module = importlib.import_module(name)
    for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if child.name not in ("__main__", "mbcs", "oem", "test", "tests"):
            with contextlib.suppress(Exception):
                load_with_children(f"{name}.{child.name}")


def load_modules(packages: list[str]) -> None:
    """Load the standard library, with what it would load later, and the packages: no program can open a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names - NOT_LOADED):
            if not name.startswith("_"):
                with contextlib.suppress(Exception):  # not on this system
                    load_with_children(name)
        for name in ("_strptime", "_pydecimal"):
            importlib.import_module(name)
        for name in packages:
            importlib.import_module(name)


def nameless(folder: str) -> str:
    """A path to a folder that says nothing about this machine: modules and code objects keep the path they came from."""
    try:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}" if sys.platform == "linux" else folder
    except OSError:
        return folder


def leave_paths_behind() -> list[str]:
    """Before the modules are loaded, as they copy these. Returns the paths."""
    left = [path for path in {sys.prefix, sys.base_prefix, os.path.expanduser("~")} if len(path) > len("/usr")]
    for name in ("prefix", "base_prefix", "exec_prefix", "base_exec_prefix", "_stdlib_dir"):
        setattr(sys, name, "/usr")
    sys.executable = sys._base_executable = ""
    sys.orig_argv[:] = [""]
    return left


def plain_interpreter(paths: list[str]) -> None:
    """Take away what tells this interpreter from a fresh one, and what a program could come to depend on."""
    for name in ("isolation", "channel", "names", "remote", "worker", "worker_pool"):
        del sys.modules[name]
    for module in [*sys.modules.values()]:
        without_paths(module, paths)
    sys.path[:] = []
    sys.path_importer_cache.clear()
    sys.argv[:] = [""]
    os.environ.clear()
    platform._uname_cache = None  # it has the host's name
    site.setquit()  # `exit` and `quit`, which `-S` leaves out
    sys.setrecursionlimit(sys.getrecursionlimit() + OUR_FRAMES)
    random.seed(0)  # the same verdict every time
    gc.collect()
    gc.freeze()


def without_paths(module: types.ModuleType, paths: list[str]) -> None:
    """Take the paths of the host out of a module: out of its text, and where it was loaded before our first line."""

    def tells(value) -> bool:
        return isinstance(value, str) and any(path in value for path in paths)

    def code_without(code: types.CodeType) -> types.CodeType:
        constants = (code_without(each) if isinstance(each, types.CodeType) else each for each in code.co_consts)
        return code.replace(co_filename="", co_consts=tuple(constants))

    spec = getattr(module, "__spec__", None)
    for holder in (module, spec, getattr(spec, "loader", None), getattr(spec, "loader_state", None)):
        for name, value in [*getattr(holder, "__dict__", {}).items()] if not isinstance(holder, type) else []:
            if tells(value):
                setattr(holder, name, "")
            elif type(value) is dict and holder is module:
                value.update({key: "" for key, item in value.items() if tells(item)})
            elif type(value) is list:
                value[:] = [item for item in value if not tells(item)]
    for thing in [*vars(module).values()]:
        for function in [thing, *(vars(thing).values() if isinstance(thing, type) else ())]:
            if isinstance(function, types.FunctionType) and tells(function.__code__.co_filename):
                function.__code__ = code_without(function.__code__)


# --- the process with the program -----------------------------------------------------------------------------------


def candidate(file: int) -> None:
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module

    def load(source: str) -> None:
        exec(compile(source, "<program>", "exec", dont_inherit=True), vars(module))

    def bound(wanted: list[str]) -> dict:
        """Those of the names that the program has bound."""
        return {name: vars(module)[name] for name in wanted if name in vars(module)}

    peer = channel.Peer(file, channel.everything, False, {"load": load, "names": bound})
    peer.printed = channel.Printed()
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(peer.printed, "utf-8", "backslashreplace", "", write_through=True)
    with contextlib.suppress(EOFError):
        while True:
            peer.serve(peer.receive())


# --- the process with the tests -------------------------------------------------------------------------------------


def dataclass_functions(peer: channel.Peer) -> None:
    """Functions that look inside a dataclass work on the program's, on its side."""

    def there(name: str, here):
        def function(thing, *arguments, **named):
            if remote.is_remote(thing):
                return peer.ask("dataclass", thing, name, *arguments, **named)
            return here(thing, *arguments, **named)

        return function

    for name in ("asdict", "astuple", "fields", "is_dataclass", "replace"):
        setattr(dataclasses, name, there(name, getattr(dataclasses, name)))


class UnitTests:
    """The test cases in tests, which count also where the tests do not look at their result, or start none."""

    def __init__(self):
        self.started: set[type] = set()
        self.failures: list[BaseException] = []
        for name in ("startTest", "addError", "addFailure", "addSubTest", "addUnexpectedSuccess"):
            setattr(unittest.TestResult, name, self.watched(getattr(unittest.TestResult, name)))

    def watched(self, method):
        def watched(result, case, *arguments):
            if method.__name__ == "startTest":
                self.started.add(type(case))
            elif method.__name__ == "addUnexpectedSuccess":
                self.failures.append(AssertionError(f"an unexpected success: {case}"))
            elif arguments[-1] is not None:
                self.failures.append(arguments[-1][1])
            return method(result, case, *arguments)

        return watched

    def run_the_rest(self, tests: types.ModuleType) -> None:
        for case in [*vars(tests).values()]:
            if isinstance(case, type) and issubclass(case, unittest.TestCase) and case.__module__ == "__main__":
                if case not in self.started:
                    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())


def call_tests(tests: types.ModuleType, uncalled: list[str], peer: channel.Peer) -> None:
    """Run tests as pytest does: functions `test..`, and methods `test..` of classes `Test..`, each on a new instance."""
    for name in uncalled:
        test = vars(tests).get(name)
        for member in (
            [name] if not isinstance(test, type) else [each for each in dir(test) if each.startswith("test")]
        ):
            if not isinstance(test, type):
                function = test
            elif issubclass(test, unittest.TestCase):
                continue
            else:
                instance = test()
                getattr(instance, "setup_method", lambda: None)()
                function = getattr(instance, member)
            if function is None or not callable(function):
                continue
            if inspect.signature(function).parameters:
                peer.refuse(f"a test with arguments that nothing calls (`{member}`)")
            if inspect.iscoroutine(result := function()):
                asyncio.run(result)


def check(job: dict, peer: channel.Peer) -> dict:
    """
    Load the program, run the tests on it: `{"passed": bool, "reason": str, "unsupported": str}`, or `{"broken": str}`
    for tests that are no Python.
    """
    source = job["tests"]
    try:
        code = compile(source, "<tests>", "exec", dont_inherit=True)
        wanted, imported = names.entry_points(source, job["entry"])
        uncalled = names.uncalled_tests(source)
    except (SyntaxError, ValueError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    try:
        peer.ask("load", job["program"])
    except BaseException as error:
        return verdict(peer, describe(error, source), "")
    tests = types.ModuleType("__main__")
    sys.modules["__main__"] = tests
    peer.shows_arguments = job["mutable_arguments"]
    cases = UnitTests()
    dataclass_functions(peer)
    try:
        vars(tests).update({name: sys.modules[name] for name in imported if name in sys.modules})
        vars(tests).update(peer.ask("names", wanted))
        peer.asked = 0
        try:
            exec(code, vars(tests))
        except SystemExit as error:  # of `unittest.main()`; one of the program's is a failure
            if not cases.failures and (
                error.code not in (None, 0, False) or any(error is each for each in peer.exits)
            ):
                raise
        cases.run_the_rest(tests)
        call_tests(tests, uncalled, peer)
        if cases.failures:
            raise cases.failures[0]
    except (channel.Lost, channel.Unsupported):
        pass
    except BaseException as error:
        return verdict(peer, describe(error, source), fault_of_tests(error, source, wanted) or peer.doubts)
    if not peer.lost and not peer.asked and ("def " in source or "class " in source):
        unused = "the tests ended without using the program"
        return verdict(peer, unused, "nothing calls the functions that the tests define")
    return verdict(peer, "", "")


def verdict(peer: channel.Peer, failure: str, doubts: str) -> dict:
    unsupported = peer.unsupported or ("" if peer.lost else doubts)
    reason = peer.lost or failure or "passed"
    if unsupported:
        reason = f"unsupported: {unsupported}" + (f" ({failure})" if failure else "")
    return {
        "passed": not (failure or peer.lost),
        "reason": reason[:MAX_REASON],
        "unsupported": unsupported[:MAX_REASON],
    }


def fault_of_tests(error: BaseException, source: str, wanted: list[str]) -> str:
    """The names that the tests use, nothing defines, and the program does not have to define."""
    step = error.__traceback__
    while step.tb_next is not None:
        step = step.tb_next
    where = step.tb_frame.f_code.co_filename
    if isinstance(error, NameError) and where == "<tests>" and error.name not in (None, *wanted):
        return f"the tests use `{error.name}`, which they do not define and which is no entry point"
    if isinstance(error, ModuleNotFoundError) and where == "<tests>":
        return f"the tests import `{error.name}`, which is not there"
    if isinstance(error, OSError) and where != channel.__file__:
        return "the tests use files, sockets or processes, which they cannot reach either"
    if own := OWN_PROCESS.search(source):
        return f"the tests change their own process (`{own.group(1)}`), and the program runs in another one"
    return ""


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
    verdict = json.dumps(check(job, channel.Peer(file, channel.tests_allow, True))).encode()
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


def judge(job_file: int, pool: socket.socket, backend: str, around_fork, base: int, watch: isolation.Watch) -> dict:
    """Have one program checked. Returns how that ended; the verdict is in the job's file."""
    cpu_limit, wall_limit, memory = LIMITS.unpack(os.pread(job_file, LIMITS.size, worker_pool.HEADER.size))
    limits = {"backend": backend, "cpu_seconds": cpu_limit, "address_space": base + memory}
    started = time.monotonic()
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
        patience = 0.02  # seconds; most programs end before anybody looks
        while not ended:
            cpu_left = cpu_limit - max(map(cpu_time, processes))
            passed = time.monotonic() - started
            # On a busy machine a program waits for its turn: that is no time of its own, up to a point.
            wall_left = wall_limit - max(passed - sum(map(watch.waiting, processes)), passed / MAX_STRETCH)
            if cpu_left <= 0:
                ended = f"CPU time limit of {cpu_limit:g} s"
            elif wall_left <= 0:
                ended = f"wall-clock limit of {wall_limit:g} s"
            elif watch.threads(processes[0]) > isolation.MAX_THREADS:
                ended = f"limit of {isolation.MAX_THREADS} threads"
            elif ready := poll.poll(max(1.0, 1000 * min(cpu_left, wall_left, patience))):
                if any(file == done for file, _ in ready):
                    break
                ended = "the pool is gone"
            patience = min(2 * patience, 0.2)
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
    _, backend, packages, paths, file = sys.argv[1:]
    pool = socket.socket(fileno=int(file))
    os.set_inheritable(int(file), False)
    try:
        left = leave_paths_behind()
        sys.path += map(nameless, json.loads(paths))
        load_modules(packages.split())
        plain_interpreter(left)
        base = isolation.memory_in_use()
        around_fork = isolation.enter(backend)
        watch = isolation.Watch(backend)
    except Exception as error:
        pool.sendall(f"{type(error).__name__}: {error}\n".encode())
        return
    pool.sendall(b"ready\n")
    while True:
        _, files, _, _ = socket.recv_fds(pool, 1, 1)
        if not files:
            return
        ended = judge(files[0], pool, backend, around_fork, base, watch)
        os.close(files[0])
        pool.sendall(json.dumps(ended).encode() + b"\n")
