import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import sandbox_attacks
import sandbox_programs

from trl_score.sandbox import BACKENDS, Sandbox, Submission, Verdict, undefined_names
from trl_score.tasks.code import names_used


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
LIMITS = {"cpu_seconds": 1, "wall_seconds": 3, "memory": 256 << 20, "allow_code_execution": True}
needs_data = pytest.mark.skipif(not (sandbox_attacks.DATA / "sandbox_attacks.jsonl").exists(), reason="no shared data")


def make(backend: str) -> Sandbox:
    try:
        return Sandbox(backend, **LIMITS)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=BACKENDS[:-1])
def sandbox(request):
    sandbox = make(request.param)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def any_sandbox():
    sandbox = Sandbox(**LIMITS)
    yield sandbox
    sandbox.close()


def verdict(sandbox: Sandbox, program: str, tests: str, **kwargs) -> Verdict:
    return sandbox.run([Submission(program, tests, **kwargs)])[0]


# --- hostile programs ---


@needs_data
@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_hostile_programs_end_as_they_should(backend):
    make(backend).close()
    assert sandbox_attacks.run(backend, sandbox_attacks.rows()) == []


@pytest.mark.parametrize("arguments", ["[1, 2]", "{1: 2}, 3", "[[1], {2}]"])
def test_a_program_that_returns_nothing_is_wrong_and_no_more(any_sandbox, arguments):
    """It has changed no argument, so the tests are not ones that the sandbox cannot run."""
    found = verdict(any_sandbox, "def f(*x):\n    pass", f"assert f({arguments}) == 3")
    assert not found.passed and not found.unsupported


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("user", ["whoever runs this", "ordinary"])
@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_hostile_programs_end_as_they_should_every_time_for_every_user(backend, user):
    """As root, an ordinary user is one in a user namespace: no capability, and root's files stay readable."""
    make(backend).close()
    command = [sys.executable, sandbox_attacks.__file__, backend, "3"]
    if user == "ordinary" and os.getuid() == 0:
        command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_data
def test_without_isolation_nothing_can_be_forged_either():
    rows = [row for row in sandbox_attacks.rows() if row["category"] not in ("host", "dos")]
    assert sandbox_attacks.run("none", rows) == []


FORGERIES = {
    "globals of a callback": (
        "def f(g):\n    for n in ('__globals__', '__code__', '__closure__', '__self__', '__defaults__'):\n"
        "        try: return getattr(g, n)['SECRET']\n        except Exception: pass\n    return 0",
        "SECRET = 918273645\nassert f(lambda v: v) == SECRET",
    ),
    "attributes of an instance of the tests'": (
        "def f(thing):\n    for n in ('__class__', '__dict__', '_secret', '__init__'):\n"
        "        try:\n            if thing.__getattr__(n): return thing._secret\n"
        "        except Exception: pass\n    return 0",
        "class Thing:\n    def __init__(self): self._secret = 918273645\nthing = Thing()\nassert f(thing) == 918273645",
    ),
    "frame of a generator of the tests'": (
        "def f(g):\n    try: return g.gi_frame.f_globals['SECRET']\n    except Exception: return 0",
        "SECRET = 918273645\nassert f(x for x in [1]) == SECRET",
    ),
    "a false module": (
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0.0",
        "assert math.isclose(f(1), 3.14)",
    ),
    "a false builtin": (
        "def abs(x): return 0\ndef all(x): return True\ndef f(x): return 1",
        "assert abs(f(1) - 9) < 1",
    ),
    "ordering": (
        "class A:\n    def __lt__(self, o): return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return A()",
        "assert f(1) > 5 and f(1) < 6",
    ),
    "arithmetic": (
        "class A:\n    def __sub__(self, o): return 0.0\n    __rsub__ = __add__ = __mul__ = __sub__\ndef f(x): return A()",
        "assert abs(f(1) - 3.25) < 1e-6",
    ),
    "death in a swallowed exception": (
        "import os\ndef f(x):\n    if x < 0: os._exit(0)\n    return x",
        "assert f(1) == 1\ntry:\n    f(-1)\nexcept:\n    pass",
    ),
    "answers before the question": (
        "import os, struct, json\n"
        "m = b''.join(struct.pack('<I', len(s)) + s for s in [json.dumps({'is': v}).encode() for v in (None, {'dict': []}, 5)])\n"
        "os.write(3, m)\ndef f(x): return 0",
        "assert f(3) == 918273645",
    ),
    "a reference to what was never passed": (
        "import os, struct, json\n"
        "def f(g):\n"
        "    s = json.dumps({'do': 'getattr', 'with': {'tuple': [{'yours': -1}, '__globals__']}, 'named': {'dict': []}}).encode()\n"
        "    os.write(3, struct.pack('<I', len(s)) + s)\n    n = struct.unpack('<I', os.read(3, 4))[0]\n"
        "    d = json.loads(os.read(3, n))\n    return 918273645 if 'is' in d else 0",
        "assert f(lambda v: v) == 918273645",
    ),
    "a metaclass": (
        "class M(type):\n    def __instancecheck__(c, o): return True\n    def __eq__(c, o): return True\n"
        "    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
        "assert f(1) == int and isinstance(3, f(1)) is False",
    ),
    "length and truth of a liar": (
        "class A(list):\n    def __len__(self): return 3\n    def __bool__(self): return True\ndef f(x): return A()",
        "assert f(1) and len(f(1)) == 3",
    ),
}
FORGERIES |= sandbox_programs.FORGERIES


@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged(any_sandbox, name):
    program, tests, *names = FORGERIES[name]
    assert not verdict(any_sandbox, program, tests, entry_points=tuple(*names)).passed


ESCAPES = {
    "fork bomb": "import os\ndef f(x):\n    n = 0\n    while n < 10000:\n        try: os.fork(); n += 1\n        except OSError: break\n    return n",
    "thread bomb": "import threading, time\ndef f(x):\n    while True:\n        threading.Thread(target=time.sleep, args=(99,)).start()",
    "no CPU limit heeded": "import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM): signal.signal(s, lambda *a: None)\ndef f(x):\n    while True: pass",
    "endless output": "def f(x):\n    while True: print('x' * 10**6)",
    "a huge message": "import os, struct\ndef f(x):\n    os.write(3, struct.pack('<I', 2**32 - 1))\n    return os.read(3, 10**6)",
    "recursion through a callback": "def f(g): return g(lambda h: f(g))",
    "a module that was not loaded": "import antigravity\ndef f(x): return 1",
    "the worker's own module": "import channel\ndef f(x): return 1",
    "its module of stand-ins": "import remote\ndef f(x): return 1",
    "files by number": "import os\ndef f(x): return [fd for fd in range(4, 256) if os.read(fd, 1) is not None]",
    "the parent": "import os, signal\ndef f(x):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 1",
    "every process": "import os, signal\ndef f(x):\n    [os.kill(p, 9) for p in range(2, 3000) if p != os.getpid()]",
    "priority": "import os\ndef f(x): return os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "secrets": "import os\ndef f(x): return os.environ['HF_TOKEN']",
    "a shell": "import pty\ndef f(x): return pty.spawn('/bin/sh')",
    "a datagram to an address": "import socket\ndef f(x):\n    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n    a.sendto(b'x', '/tmp/socket')\n    return 918273645",
    "a stream to an address": "import socket\ndef f(x):\n    a, b = socket.socketpair()\n    a.sendto(b'x', chr(0) + 'name')\n    return 918273645",
    "a pair of another family": "import socket\ndef f(x):\n    socket.socketpair(socket.AF_TIPC, socket.SOCK_STREAM)\n    return 918273645",
    "threads of small stacks": "import threading, time\nthreading.stack_size(32768)\ndef f(x):\n    for _ in range(2000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n    return 918273645",
    "code written at run time": "import mmap\ndef f(x): return mmap.mmap(-1, 4096, prot=7)",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_program_stays_inside_and_ends(sandbox, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    started = time.monotonic()
    result = verdict(sandbox, ESCAPES[name], "assert f(lambda h: h(1)) == 918273645")
    assert not result.passed and result.reason
    assert time.monotonic() - started < 10 * LIMITS["wall_seconds"]  # a second where the machine is not busy
    assert verdict(sandbox, "def f(x): return x", "assert f(1) == 1").passed


# Calls that reach the host or little-tried code of the kernel, with arguments that would be valid: (x86_64, arguments).
CALLS = {
    "sendto": (44, "fd, buf, 1, 0, address, 110"), "sendmsg": (46, "fd, buf, 0"), "sendmmsg": (307, "fd, buf, 1, 0"),
    "recvmsg": (47, "fd, buf, 0"), "socket": (41, "1, 2, 0"), "socket of netlink": (41, "16, 3, 0"), "socket of vsock": (41, "40, 1, 0"),
    "socket of packets": (41, "17, 3, 0"), "bind": (49, "fd, address, 110"), "connect": (42, "fd, address, 110"), "listen": (50, "fd, 1"),
    "accept": (43, "fd, 0, 0"), "setsockopt": (54, "fd, 1, 2, buf, 4"), "io_uring_setup": (425, "4, buf"), "pidfd_open": (434, "1, 0"),
    "pidfd_getfd": (438, "fd, 0, 0"), "pidfd_send_signal": (424, "fd, 9, 0, 0"), "process_vm_readv": (310, "1, buf, 1, buf, 1, 0"),
    "ptrace": (101, "16, 1, 0, 0"), "keyctl": (250, "0, 1"), "add_key": (248, "buf, buf, buf, 1, 1"), "userfaultfd": (323, "0"),
    "perf_event_open": (298, "buf, 0, -1, -1, 0"), "bpf": (321, "0, buf, 64"), "memfd_create": (319, "buf, 0"), "execve": (59, "buf, 0, 0"),
    "execveat": (322, "fd, buf, 0, 0, 0x1000"), "fork": (57, ""), "vfork": (58, ""), "clone": (56, "17, 0, 0, 0, 0"),
    "clone in new namespaces": (56, "0x10010f00, 0, 0, 0, 0"), "unshare": (272, "0x10000000"), "setns": (308, "fd, 0"),
    "mount": (165, "buf, buf, buf, 0, 0"), "chroot": (161, "buf"), "open_by_handle_at": (304, "fd, buf, 0"), "prctl": (157, "4, 1, 0, 0, 0"),
    "kill of all": (62, "-1, 9"), "kill of the group": (62, "0, 0"), "tkill": (200, "1, 9"), "rt_sigqueueinfo": (129, "1, 9, buf"),
    "shmget": (29, "0, 4096, 0o1600"), "msgget": (68, "0, 0o1600"), "mq_open": (240, "buf, 0o102, 0o600, 0"), "inotify_init1": (294, "0"),
    "fanotify_init": (300, "0, 0"), "timer_create": (222, "0, buf, buf"), "personality": (135, "0xffffffff"), "modify_ldt": (154, "0, buf, 8"),
    "prlimit64": (302, "0, 7, buf, 0"), "setuid": (105, "0"), "sched_setscheduler": (144, "0, 0, buf"), "memfd_secret": (447, "0"),
    "mmap to run": (9, "0, 4096, 7, 0x22, -1, 0"), "mprotect to run": (10, "page, 4096, 7"), "pkey_mprotect": (329, "page, 4096, 7, -1"),
    "ioctl to push input": (16, "0, 0x5412, buf"), "fcntl of an owner": (72, "fd, 8, 1"), "seccomp": (317, "0, 0, 0"),
    "name_to_handle_at": (303, "-100, buf, buf, buf, 0"), "sethostname": (170, "buf, 1"), "syslog": (103, "3, buf, 9"),
}  # fmt: skip
CALLER = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
a, b = socket.socketpair()
fd, buf, address = a.fileno(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(bytes([1, 0]) + b"/tmp/socket", 110)
page = ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(8192)) + 4095 & ~4095)
def f(calls):
    found = {}
    for name, (number, arguments) in calls.items():
        given = [ctypes.c_long(each) if isinstance(each, int) else each for each in eval(f"({arguments},)" if arguments else "()")]
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *given)
        found[name] = (result, ctypes.get_errno())
    return found
def pairs():
    found = []
    for family in range(46):
        for kind in range(1, 7):
            if libc.syscall(ctypes.c_long(53), family, kind, 0, buf) == 0:
                found.append((family, kind))
    return found
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of x86_64")
def test_calls_that_reach_the_host_or_more_of_the_kernel_are_refused(sandbox):
    """EPERM, ENOSYS or ENOTTY, before the kernel looks at the arguments: another error would be its own."""
    tests = f"found = f({CALLS!r})\nassert not [n for n, (r, e) in found.items() if r != -1 or e not in (1, 25, 38)], found"
    assert verdict(sandbox, CALLER, tests + "\nassert pairs() == [(1, 1)], pairs()") == Verdict(True, "passed")


WHERE = """
import gc, os, platform, socket, sys, types
def paths(words):
    found = set()
    def look(value, where):
        if isinstance(value, str) and any(word in value for word in words): found.add((where, value[:90]))
    for name, module in [*sys.modules.items()]:
        for key, value in [*vars(module).items()]:
            look(value, f"{name}.{key}")
            for each in [*value] if isinstance(value, list | tuple | dict) else []: look(each, f"{name}.{key}")
            for each in [*value.values()] if isinstance(value, dict) else []: look(each, f"{name}.{key}")
        look(str(getattr(module, "__spec__", "")), f"{name}.__spec__")
    frame = sys._getframe()
    while frame:
        look(frame.f_code.co_filename, "frame")
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType): look(thing.__code__.co_filename, thing.__qualname__)
    return sorted(found), [*os.environ]
def files():
    found = []
    for name in ("environ", "cmdline", "maps", "mountinfo", "root/etc/hostname"):
        for process in ("self", "1", "2", str(os.getppid())):
            try: found.append(open(f"/proc/{process}/{name}").read())
            except OSError: pass
    for name in ("/etc/hostname", "/proc/sys/kernel/hostname", "/etc/passwd"):
        try: found.append(open(name).read())
        except OSError: pass
    return found
def host(): return {socket.gethostname(), os.uname().nodename, platform.node(), platform.uname().node}
"""


def test_a_program_learns_no_name_of_the_host_and_no_path(sandbox):
    words = [sys.prefix, sys.base_prefix, str(sandbox_attacks.WORKER.parents[2]), os.path.expanduser("~")]
    words = [word for word in words if word not in ("/", "/usr", "/root")]
    tests = f"assert paths({words!r}) == ([], []), paths({words!r})\nassert files() == []"
    assert verdict(sandbox, WHERE, tests) == Verdict(True, "passed")
    if sandbox.backend == "namespaces":
        assert verdict(sandbox, WHERE, "assert host() == {'sandbox'}, host()") == Verdict(True, "passed")


def test_a_busy_machine_changes_no_verdict():
    """0.7 seconds of a core shared with six others take longer than the limit, and a program that sleeps does not."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of all that is started here; other cores stay free for other tests
    others = []
    try:
        with contextlib.closing(
            Sandbox(cpu_seconds=3, wall_seconds=1.5, num_workers=1, allow_code_execution=True)
        ) as sandbox:
            burner = [sys.executable, "-c", "while True: pass"]
            others += [subprocess.Popen(burner) for _ in range(6)]
            works = "import time\ndef f():\n    while time.process_time() < 0.7: pass\n    return 1"
            assert verdict(sandbox, works, "assert f() == 1") == Verdict(True, "passed")
            started = time.monotonic()
            sleeps = verdict(sandbox, "import time\ndef f(): time.sleep(99)", "assert f() == 1")
            assert sleeps.reason == "wall-clock limit of 1.5 s" and time.monotonic() - started < 8
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, cores)


def test_the_reason_says_what_happened(any_sandbox):
    def reason(program, tests="assert f(1) == 2"):
        return verdict(any_sandbox, program, tests).reason

    assert reason("def f(x): return 3") == "AssertionError [assert f(1) == 2]"
    assert reason("def f(x): return [][0]") == "IndexError: list index out of range [assert f(1) == 2]"
    assert reason("def g(x): return 2") == "NameError: name 'f' is not defined [assert f(1) == 2]"
    assert reason("def f(x) return 2").startswith("SyntaxError")
    assert reason("raise RuntimeError('no')") == "RuntimeError: no"
    assert reason("def f(x):\n    while True: pass") == "CPU time limit of 1 s"
    assert reason("import time\ndef f(x): time.sleep(99)") == "wall-clock limit of 3 s"
    assert reason("def f(x): return len([0] * 10**9)").startswith("MemoryError")
    assert "signal 11" in reason("import ctypes\ndef f(x): ctypes.string_at(0)")


# --- honest programs ---

HONEST = {
    "dataclass and typing": (
        "from dataclasses import dataclass\nfrom typing import List, Optional\n@dataclass\nclass P:\n    x: int\n    y: Optional[int] = None\n"
        "def f(xs: List[int]) -> P: return P(sum(xs))",
        "p = f([1, 2])\nassert p.x == 3 and p.y is None\nq = P(1, 2)\nq.x = 5\nassert q.x == 5 and q.y == 2",
    ),
    "generator": ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]\nassert next(f(2)) == 0"),
    "closure": ("def f(n): return lambda x: x + n", "add = f(2)\nassert add(3) == 5 and [*map(add, [1, 2])] == [3, 4]"),
    "class of the tests": (
        "def f(shape): return shape.area() * shape.scale",
        "class Square:\n    scale = 2\n    def __init__(self, a): self.a = a\n    def area(self): return self.a ** 2\nassert f(Square(3)) == 18",
    ),
    "tree built in the tests": (
        "class Node:\n    def __init__(self, v): self.v, self.left, self.right = v, None, None\n"
        "def depth(n): return 0 if n is None else 1 + max(depth(n.left), depth(n.right))",
        "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)\nassert depth(root) == 3",
    ),
    "name of a builtin": ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    "module of the program's, used by the tests": ("import math\ndef f(x): return x / 3", "assert math.isclose(f(1), 1 / 3)"),
    "numbers": (
        "from fractions import Fraction\nfrom decimal import Decimal\nimport datetime\n"
        "def f(k): return {0: 10**400, 1: -0.0, 2: float('inf'), 3: 1 + 2j, 4: Fraction(1, 3), 5: Decimal('1.50'), 6: True, "
        "7: range(1, 9, 2), 8: b'a\\xff', 9: datetime.date(2020, 2, 29), 10: frozenset([1, (2,)]), 11: float('nan')}[k]",
        "from fractions import Fraction\nfrom decimal import Decimal\nimport datetime, math\n"
        "assert f(0) == 10**400 and math.copysign(1, f(1)) == -1 and f(2) == math.inf and f(3) == 1 + 2j\n"
        "assert f(4) == Fraction(1, 3) and f(5) == Decimal('1.5') and f(6) is True and f(7) == range(1, 9, 2)\n"
        "assert f(8) == b'a\\xff' and f(9) == datetime.date(2020, 2, 29) and f(10) == {1, (2,)} and f(11) != f(11)",
    ),
    "types as values": ("def f(x): return type(x)", "assert f(1) == int and f('') is str and f(None) is type(None)"),
    "errors by class": (
        "class Mine(KeyError): pass\ndef f(x):\n    if x: raise Mine('k')\n    raise UnicodeDecodeError('utf-8', b'a', 0, 1, 'why')",
        "for x, kind in ((1, KeyError), (0, UnicodeDecodeError), (0, ValueError)):\n    try:\n        f(x)\n        assert False\n"
        "    except kind: pass",
    ),
    "keywords and defaults": ("def f(a, *b, c=1, **d): return a, b, c, d", "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})"),
    "threads": (
        "import threading\ndef f(n):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n"
        "    [t.start() for t in ts]; [t.join() for t in ts]\n    return sorted(out)",
        "assert f(3) == [0, 1, 2]",
    ),
    "asyncio": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x\ndef f(x): return asyncio.run(g(x))",
        "assert f(4) == 4",
    ),
    "time": (
        "import time, datetime\ndef f(s):\n    time.sleep(0.01)\n    return datetime.datetime.strptime(s, '%d %B %Y').isoformat()",
        "assert f('1 May 2020') == '2020-05-01T00:00:00'",
    ),
    "unusual text": ("def f(x): return x + '\\x00\\ud800\\n'", "assert f('é😀') == 'é😀\\x00\\ud800\\n'"),
    "recursion of 900 calls": ("def f(n): return 0 if n == 0 else 1 + f(n - 1)", "assert f(900) == 900"),
    "encodings": ("import codecs\ndef f(s): return codecs.encode(s, 'rot13') + s.encode('utf-16').decode('utf-16')", "assert f('ab') == 'noab'"),
    "standard output replaced": (
        "import io, sys\ndef f():\n    sys.stdout = io.StringIO()\n    print('a')\n    text = sys.stdout.getvalue()\n"
        "    sys.stdout = sys.__stdout__\n    print('b')\n    return text",
        "assert f() == 'a\\n' == f()",
    ),
    "standard output closed": ("import sys\nsys.stdout.close()\ndef f(): return 1", "assert f() == 1"),
    "a long line": ("print('x' * (30 << 20))\ndef f(): return 1", "assert f() == 1"),
    "modules inside of packages": (
        "import ctypes.util, email.mime.text, http.cookies, multiprocessing.pool, wsgiref.util, xml.dom.minidom, xml.sax.saxutils\n"
        "from concurrent.futures import ProcessPoolExecutor\ndef f(s): return xml.dom.minidom.parseString(s).documentElement.tagName",
        "assert f('<a/>') == 'a'",
    ),
    "working directory": ("import os\ndef f(): return os.getcwd(), os.path.exists('/etc/passwd')", "assert f() == ('/', False)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(sandbox, name):
    program, tests = HONEST[name]
    names = ("sum",) if name == "name of a builtin" else ()
    assert verdict(sandbox, program, tests, entry_points=names) == Verdict(True, "passed")


@pytest.mark.parametrize("name", sandbox_programs.HONEST)
def test_tests_may_use_objects_of_the_program_as_in_one_process(any_sandbox, name):
    program, tests = sandbox_programs.HONEST[name]
    assert verdict(any_sandbox, program, tests, entry_points=tuple(names_used(program, tests))) == Verdict(
        True, "passed"
    )
    assert verdict(any_sandbox, program, tests).passed  # with the entry points left to be found


UNSUPPORTED = {
    "an ordering with a number": ("class A:\n    def __gt__(self, o): return True", "assert A() > 5", "ordering"),
    "a difference that is a number": (
        "class A:\n    def __sub__(self, o): return 1.5",
        "assert abs(A() - 3) < 2",
        "`sub` between an object of the program and a test's value",
    ),
    "the size of a scaled object": (
        "class A:\n    def __mul__(self, k): return self\n    def __abs__(self): return 2",
        "assert abs(A() * 2) == 2",
        "`abs` of what an operator made",
    ),
    "equality with a number": (
        "class A:\n    def __eq__(self, o): return o == 5",
        "assert A() == 5",
        "`==` between `A`",
    ),
    "in without items": (
        "class A:\n    def __contains__(self, x): return True",
        "assert 3 in A()",
        "cannot be iterated over",
    ),
    "in of its own": (
        "class A:\n    def __contains__(self, x): return True\n    def __iter__(self): return iter(())",
        "assert 3 in A()",
        "`__contains__` is not asked",
    ),
    "a plain value as an instance": ("class A(int): pass", "assert isinstance(A(3), A)", "isinstance"),
    "a subclass of a list as a list": (
        "class A(list):\n    def push(self, x): self.append(x)",
        "assert isinstance(A(), list)",
        "the builtin class that it is derived from",
    ),
    "sums of a subclass of int": (
        "class A(int):\n    def double(self): return 2 * self\n    def __add__(self, o): return 7",
        "assert A(1) + 1 == 7",
        "`__add__` of `A`",
    ),
    "sums of a subclass of int with nothing else": (
        "class A(int):\n    def __add__(self, o): return 7",
        "assert A(1) + 1 == 7",
        "`__add__` of `A`",
    ),
    "sums of a subclass of list": (
        "class A(list):\n    def __add__(self, o): return A(a + b for a, b in zip(self, o))",
        "assert A([1, 2]) + A([1, 1]) == [2, 3]",
        "`__add__` of `A`",
    ),
    "equality of a subclass of a subclass of str": (
        "class A(str):\n    def __eq__(self, o): return self.lower() == o.lower()\nclass B(A): pass",
        "assert B('A') == 'a'",
        "`__eq__` of `B`",
    ),
    "a changed argument": ("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]", "mutable_arguments"),
    "pickle": ("class A: pass", "import pickle\npickle.dumps(A())", "pickle"),
    "a name of nobody's": ("def f(x): return x", "assert g(f(1)) == 1", "use `g`"),
    "a module that is not there": (
        "def f(x): return x",
        "import solution\nassert solution.f(1) == 1",
        "import `solution`",
    ),
    "a test with arguments": ("def f(x): return x", "def test_f(data):\n    assert f(data) == 1", "`test_f`"),
    "functions that nothing calls": ("def f(x): return x", "def check(g):\n    assert g(1) == 1", "nothing calls"),
    "StopIteration as an error": (
        "def f(x): raise StopIteration",
        "try:\n    f(1)\n    assert False\nexcept StopIteration: pass",
        "StopIteration",
    ),
    "a patch of the tests' own process": (
        "def f(): return input()",
        "from unittest.mock import patch\nwith patch('builtins.input', return_value='a'):\n    assert f() == 'a'",
        "`patch`",
    ),
    "a file in a test case": (
        "def f(path): return open(path).read()",
        "import tempfile, unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        with tempfile.NamedTemporaryFile() as file: self.assertEqual(f(file.name), '')\nunittest.main()",
        "use files",
    ),
    "a file": (
        "def f(path): return open(path).read()",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as file:\n    assert f(file.name) == ''",
        "use files",
    ),
    "the code of a function of the tests": (
        "import inspect\ndef f(g): return len(inspect.signature(g).parameters)",
        "assert f(lambda a: a) == 1",
        "of the tests'",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_sandbox_does_not_do_is_named(any_sandbox, name):
    """An honest program fails here. It is told apart from a wrong one."""
    program, tests, what = UNSUPPORTED[name]
    result = verdict(any_sandbox, program, tests, entry_points=tuple(names_used(program, tests)) or ("f",))
    assert not result.passed and what in result.unsupported and result.reason.startswith("unsupported: ")


def test_a_wrong_program_is_no_unsupported_one(any_sandbox):
    for program in (
        "def f(x): return x + 1",
        "def f(x): raise ValueError",
        "def g(x): return x",
        "def f(x) return",
        "1 / 0",
    ):
        result = verdict(any_sandbox, program, "assert f(1) == 1\nassert f([1])[0] == 1", entry_points=("f",))
        assert not result.passed and not result.unsupported


def test_only_entry_points_come_from_the_program(any_sandbox):
    """MBPP 596 uses `sys` in its tests."""
    program = "class sys:\n    @staticmethod\n    def getsizeof(x): return 7\ndef f(x): return 7"
    tests = "assert f((1, 2)) == sys.getsizeof((1, 2))"
    assert not verdict(any_sandbox, program, tests).passed
    assert not verdict(any_sandbox, program, tests, entry_points=("f",)).passed
    right = "import sys\ndef f(x): return sys.getsizeof(x)"
    assert verdict(any_sandbox, right, tests, entry_points=("f",)).passed
    # a name of a library is an entry point where it is asked for, or where the tests use no other
    gcd = "def gcd(a, b): return gcd(b, a % b) if b else a"
    assert verdict(any_sandbox, gcd, "assert gcd(4, 6) == 2").passed
    assert verdict(any_sandbox, "def copy(x): return x", "assert copy(4) == 4", entry_points=("copy",)).passed
    assert verdict(any_sandbox, "def select(x): return x", "assert select(4) == 4").passed


def test_names_that_nothing_defines():
    assert undefined_names("import math as m\nassert m.isclose(f(1), isclose(2)) and sys.maxsize") == {"f", "isclose"}
    assert undefined_names("def check(c):\n    assert c(x) == len(y)\nx = 1\ncheck(f)") == {"f", "y"}
    assert undefined_names("from math import *\nassert isclose(f(1), 2)") == set()
    assert undefined_names("assert f(") == set()


def test_a_changed_argument_reaches_the_tests_only_where_asked(any_sandbox):
    program, tests = (
        "def f(x, d): x.append(9); d['k'] = 1",
        "x, d = [1], {}\nf(x, d)\nassert x == [1, 9] and d == {'k': 1}",
    )
    assert not verdict(any_sandbox, program, tests).passed
    assert verdict(any_sandbox, program, tests, mutable_arguments=True).passed


COLLECTIONS = "from collections import Counter, OrderedDict, defaultdict, deque\n"


@pytest.mark.parametrize(
    ("program", "tests", "passed"),
    [
        ("def f(s): return Counter(s)", "assert f('aab').most_common(1) == [('a', 2)] and f('a')['z'] == 0", True),
        (
            "def f(s): return Counter(s)",
            "assert f('ab') - Counter('a') == {'b': 1} and isinstance(f('a'), Counter)",
            True,
        ),
        ("def f(c): return c.most_common(1)", "assert f(Counter('aab')) == [('a', 2)]", True),
        ("def f(d): return d['z']", "assert f(defaultdict(int)) == 0 and f(defaultdict(list, z=[1])) == [1]", True),
        ("def f(): return defaultdict(int)", "assert f()['z'] == 0", True),
        (
            "def f(): return deque([1, 2], maxlen=2)",
            "d = f()\nd.append(3)\nassert d == deque([2, 3]) and d.maxlen == 2",
            True,
        ),
        ("def f(): return OrderedDict(b=2, a=1)", "assert f() == OrderedDict(a=1, b=2)", False),
        (
            "def f(): return OrderedDict(b=2, a=1)",
            "d = f()\nd.move_to_end('b')\nassert d.popitem(last=False) == ('a', 1)",
            True,
        ),
    ],
)
def test_collections_of_the_library_keep_their_class(any_sandbox, program, tests, passed):
    assert verdict(any_sandbox, COLLECTIONS + program, COLLECTIONS + tests).passed == passed


def test_a_changed_deque_reaches_the_tests_where_asked(any_sandbox):
    program, tests = "def f(d): d.append(2)", COLLECTIONS + "d = deque([1])\nf(d)\nassert d == deque([1, 2])"
    assert verdict(any_sandbox, program, tests).unsupported
    assert verdict(any_sandbox, program, tests, mutable_arguments=True).passed


NODE = "class Node:\n    def __init__(self, value):\n        self.value = value\n        self.children = []\n"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (
            NODE + "def total(node): return node.value + sum(map(total, node.children))",
            "root = Node(1)\nroot.children.append(Node(2))\nroot.children[0].children.append(Node(3))\n"
            "root.children.append(Node(4))\nassert total(root) == 10 and len(root.children) == 2",
        ),
        (
            "class Graph:\n    def __init__(self): self.edges = {}\n    def size(self): return sum(map(len, self.edges.values()))",
            "g = Graph()\ng.edges['a'] = ['b']\nassert g.size() == 1\ng.edges['a'].append('c')\nassert g.size() == 2",
        ),
        (
            "def add(node, child): node.children.append(child)",
            NODE + "root, leaf = Node(1), Node(2)\nadd(root, leaf)\nassert root.children == [leaf]",
        ),
        (
            "class Board:\n    def __init__(self): self.rows = [[0] * 2 for _ in range(2)]\n    def play(self, i): self.rows[i][i] = 1",
            "b = Board()\nb.play(0)\nrows = b.rows\nrows[1][0] = 5\nb.play(1)\nassert b.rows == [[1, 0], [5, 1]]",
        ),
    ],
)
def test_lists_of_an_object_change_where_the_object_is(any_sandbox, program, tests):
    found = verdict(any_sandbox, program, tests)
    assert found.passed, found


def test_a_list_of_a_property_may_be_changed(any_sandbox):
    """It is the caller's own, so nothing is written back; where it is not, the tests cannot tell."""
    own = "class S:\n    @property\n    def items(self): return [1, 2]\n    def size(self): return 2"
    assert verdict(any_sandbox, own, "s = S()\nx = s.items\nx.reverse()\nassert x == [2, 1] and s.size() == 2").passed
    shared = "class S:\n    def __init__(self): self._x = []\n    @property\n    def items(self): return self._x"
    found = verdict(any_sandbox, shared, "s = S()\ns.items.append(1)\nassert s.items == [1]")
    assert not found.passed and "`items` was changed by the other side, and cannot be set" in found.unsupported


# --- consent, errors, housekeeping ---


def test_without_consent_it_refuses_and_names_the_risk(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(PermissionError, match=r"destructive.*HF_ALLOW_CODE_EVAL=1"):
        Sandbox()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    Sandbox().close()
    with pytest.raises(PermissionError):
        Sandbox(allow_code_execution=False)


def test_what_cannot_work_is_said_at_construction():
    with pytest.raises(ValueError, match=r"Unknown backend 'docker'.*namespaces"):
        Sandbox("docker", allow_code_execution=True)
    with pytest.raises(ValueError, match="`cpu_seconds=0`"):
        Sandbox(cpu_seconds=0, allow_code_execution=True)
    with pytest.raises(RuntimeError, match="no_such_package"):
        Sandbox(packages=["no_such_package"], allow_code_execution=True)


def test_a_backend_that_is_not_to_be_had_is_passed_over(monkeypatch, caplog):
    """Where a machine forbids namespaces (as many containers do), the next best is taken, and the log says so."""
    monkeypatch.setattr("trl_score.sandbox.BACKENDS", ("moonlight", "seccomp", "none"))
    with caplog.at_level("INFO"):
        sandbox = Sandbox(allow_code_execution=True)
    assert sandbox.backend == "seccomp" and "one layer" in caplog.text and "moonlight" in caplog.text
    sandbox.close()


def test_tests_that_are_no_python_are_an_error_of_the_data(any_sandbox):
    with pytest.raises(ValueError, match="no Python"):
        verdict(any_sandbox, "def f(x): return x", "assert f(1) ==")


def test_a_package_can_be_allowed():
    sandbox = Sandbox(packages=["numpy"], **LIMITS)
    program = "import numpy as np\ndef f(x): return np.mean(x)"
    assert verdict(sandbox, program, "assert f([1, 2]) == 1.5").passed
    sandbox.close()
    with_out = Sandbox(**LIMITS)
    assert "No module named 'numpy'" in verdict(with_out, program, "assert f([1, 2]) == 1.5").reason
    with_out.close()


def test_it_runs_from_several_threads_and_keeps_the_order(any_sandbox):
    found = {}

    def grade(k):
        submissions = [Submission(f"def f(x): return x + {i % 2}", "assert f(1) == 1") for i in range(k, k + 9)]
        found[k] = [verdict.passed for verdict in any_sandbox.run(submissions)]

    threads = [threading.Thread(target=grade, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [i % 2 == 0 for i in range(k, k + 9)] for k in range(4)}


def test_a_worker_that_dies_is_replaced(any_sandbox):
    for worker in any_sandbox._pool._workers:
        worker.process.kill()
        worker.process.wait()
    verdicts = any_sandbox.run([Submission("def f(x): return x", "assert f(1) == 1")] * 5)
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.parametrize("runs", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_is_left_behind(runs, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")

    def left():
        return len(os.listdir("/proc/self/fd")), list(tmp_path.rglob("*"))

    def workers():
        return {pid for pid in sandbox_attacks.processes() if sandbox_attacks.is_ours(pid)}

    running, before = workers(), left()
    sandbox = Sandbox(**LIMITS)
    good, bad = Submission("def f(x): return x", "assert f(1) == 1"), Submission("import os; os._exit(1)", "")
    verdicts = sandbox.run([good, bad] * (runs // 2))
    assert [verdict.passed for verdict in verdicts] == [True, False] * (runs // 2)
    children = workers() - running
    assert (
        len(children) <= 2 * sandbox._pool.num_workers
    )  # a worker, and in the first backend the one that waits for it
    sandbox.close()
    time.sleep(0.2)
    assert workers() == running
    assert left() == before


def test_the_workers_end_with_the_trainer(tmp_path):
    """Also when the trainer is killed and can tidy up nothing."""
    code = (
        "import os, sys\nfrom trl_score.sandbox import Sandbox, Submission\n"
        "s = Sandbox(allow_code_execution=True)\n"
        "print([w.process.pid for w in s._pool._workers][0], flush=True)\n"
        "s.run([Submission('def f(x):\\n    while True: pass', 'f(1)')])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    time.sleep(0.3)
    assert sandbox_attacks.is_worker(worker)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 5
    while sandbox_attacks.is_worker(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandbox_attacks.is_worker(worker)
