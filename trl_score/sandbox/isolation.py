"""
What a process gives up before it runs an untrusted program: the Linux side of the sandbox, by direct system calls.

Two moments: a worker calls [`enter`] once, and each process that it forks for a program calls [`confine`]. Imports the
standard library only, as it runs in an interpreter that has nothing else.
"""

import contextlib
import ctypes
import os
import platform
import re
import struct
import sys


try:
    import resource
except ImportError:  # Windows
    resource = None


BACKENDS = ("namespaces", "landlock", "seccomp", "none")
"""From the strongest to none. Each of the first three contains what stands to its right, where the kernel has it."""

LINUX = sys.platform == "linux"
MACHINE = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
libc = ctypes.CDLL(None, use_errno=True) if LINUX else None

NOBODY = 65534

# prctl(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 21, 22, 38
# clone(2), unshare(2)
CLONE_THREAD = 0x10000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
NEW_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)
# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 2,
)  # fmt: skip
PROT_EXEC = 4
AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC = 1, 1, 0o4000, 0o2000000
MAX_THREADS = 64  # of a program, and processes where it may start any


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- system calls: name -> (x86_64, aarch64); None where that machine has no such call -------------------------------

ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "poll": (7, None), "lseek": (8, 62),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "exit": (60, 93), "uname": (63, 160),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getcwd": (79, 17), "getppid": (110, 173), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "set_robust_list": (273, 99), "pselect6": (270, 72), "ppoll": (271, 73), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168),
    "getrandom": (318, 278), "membarrier": (324, 283), "rseq": (334, 293), "close_range": (436, 436),
}  # fmt: skip

# As in an empty file system: there is nothing to open, and a program that looks for a file finds none.
NO_SUCH_FILE = {
    "open": (2, None), "stat": (4, None), "lstat": (6, None), "access": (21, None), "readlink": (89, None),
    "openat": (257, 56), "readlinkat": (267, 78), "faccessat": (269, 48), "statx": (332, 291), "openat2": (437, 437),
    "faccessat2": (439, 439),
}  # fmt: skip

CONDITIONAL = {
    "mmap": (9, 222), "mprotect": (10, 226), "ioctl": (16, 29), "clone": (56, 220), "kill": (62, 129), "fcntl": (72, 25),
    "sendto": (44, 206), "socketpair": (53, 199), "tgkill": (234, 131), "newfstatat": (262, 79), "prlimit64": (302, 261), "clone3": (435, 435),
}  # fmt: skip

ARCHITECTURES = (0xC000003E, 0xC00000B7)
EPERM, ENOENT, ENOTTY, ENOSYS = 1, 2, 25, 38
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF0000, 0x50000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def _low(argument: int) -> int:
    return 16 + 8 * argument


def _high(argument: int) -> int:
    return 20 + 8 * argument


def seccomp_filter(process: int) -> bytes:
    """
    The filter of a process (seccomp(2), classic BPF): what the interpreter needs and nothing else. No file, no program,
    no socket but a pair to itself, no other process, no signal to others, no new code in memory, no new namespace.
    Everything that is not named answers EPERM before the kernel looks at its arguments.

    Args:
        process (`int`):
            The process's own id, in its own namespace.
    """
    code: list[tuple[int, int, int, int]] = []  # operation, jump if true, jump if false, operand

    def answer(error: int) -> tuple[int, int, int, int]:
        return (RETURN, 0, 0, RET_ERRNO | error if error else RET_ALLOW)

    def rule(numbers: tuple[int | None, int | None], *block: tuple[int, int, int, int]) -> None:
        if (number := numbers[MACHINE]) is not None:
            code.append((EQUAL, 0, len(block), number))
            code.extend(block)

    def only_if(argument: int, values: tuple[int, ...], error: int = EPERM) -> list[tuple[int, int, int, int]]:
        """Allow the call if the low half of this argument is one of the values."""
        tests = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [(LOAD, 0, 0, _low(argument)), *tests, answer(error), answer(0)]

    def unless_bits(argument: int, bits: int, error: int = EPERM) -> list[tuple[int, int, int, int]]:
        return [(LOAD, 0, 0, _low(argument)), (ANY_BIT, 0, 1, bits), answer(error), answer(0)]

    # A 32-bit call (int 0x80) shows another architecture, an x32 one a high bit: their tables are not this one.
    code += [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[MACHINE]), (RETURN, 0, 0, RET_KILL)]
    code += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), answer(ENOSYS)]
    for numbers in ALLOWED.values():
        rule(numbers, answer(0))
    for numbers in NO_SUCH_FILE.values():
        rule(numbers, answer(ENOENT))
    for name in ("mmap", "mprotect"):
        rule(CONDITIONAL[name], *unless_bits(2, PROT_EXEC))
    rule(CONDITIONAL["ioctl"], *only_if(1, (0x5421, 0x5451), ENOTTY))  # FIONBIO, FIOCLEX: for asyncio
    # An address reaches sockets of the host. `sendmsg` has it behind a pointer, and is not allowed at all.
    rule(
        CONDITIONAL["sendto"],
        *[(LOAD, 0, 0, _low(4)), (EQUAL, 0, 2, 0), (LOAD, 0, 0, _high(4)), (EQUAL, 1, 0, 0)],
        *[answer(EPERM), answer(0)],
    )
    rule(  # a pair of streams, for asyncio: other families reach other code of the kernel
        CONDITIONAL["socketpair"],
        *[(LOAD, 0, 0, _low(0)), (EQUAL, 0, 3, AF_UNIX), (LOAD, 0, 0, _low(1))],
        *[(ANY_BIT, 1, 0, 0xFFFFFFFF ^ (SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)), answer(0), answer(EPERM)],
    )
    rule(CONDITIONAL["fcntl"], *only_if(1, (0, 1, 2, 3, 4, 1030)))  # duplicate, flags
    rule(CONDITIONAL["newfstatat"], (LOAD, 0, 0, _low(3)), (ANY_BIT, 1, 0, 0x1000), answer(ENOENT), answer(0))  # fstat
    rule(CONDITIONAL["clone3"], answer(ENOSYS))  # its flags lie in memory: glibc falls back to clone
    rule(
        CONDITIONAL["clone"],  # threads only
        (LOAD, 0, 0, _low(0)),
        (ANY_BIT, 0, 2, CLONE_THREAD),
        (ANY_BIT, 1, 0, NEW_NAMESPACES | CLONE_NEWTIME),
        answer(0),
        answer(EPERM),
    )
    for name in ("kill", "tgkill"):
        rule(CONDITIONAL[name], *only_if(0, (process,)))
    rule(
        CONDITIONAL["prlimit64"],  # its own limits, to read
        *[(LOAD, 0, 0, _low(0)), (EQUAL, 0, 4, 0)],
        *[(LOAD, 0, 0, _low(2)), (EQUAL, 0, 2, 0), (LOAD, 0, 0, _high(2)), (EQUAL, 1, 0, 0)],
        *[answer(EPERM), answer(0)],
    )
    code.append(answer(EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _install_seccomp(filter: bytes) -> None:
    program = _Program(len(filter) // 8, filter)
    _check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def _landlock_version() -> int:
    return _check(libc.syscall(444, None, ctypes.c_size_t(0), 1), "Landlock")


def _landlock() -> None:
    """Landlock(7) with no rule: no file can be opened by name, made or removed; no TCP; no signal out of the domain."""
    create, restrict = 444, 446
    version = _landlock_version()
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = [files, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    ruleset = struct.pack(f"={len(attributes)}Q", *attributes)
    fd = _check(libc.syscall(create, ruleset, ctypes.c_size_t(len(ruleset)), 0), "Landlock")
    _check(libc.syscall(restrict, fd, 0), "Landlock")
    os.close(fd)


class _NewProcessNamespace:
    """Around a fork: the child is the first process of a namespace of its own, and ends all in it when it ends."""

    def __init__(self):
        self.own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self):
        _check(libc.unshare(CLONE_NEWPID), "a new process namespace")

    def __exit__(self, *exception):
        _check(libc.setns(self.own, CLONE_NEWPID), "the way back from a process namespace")


_own_proc: int | None = None  # a descriptor of the file system of the processes of this namespace


def _open_own_proc() -> None:
    """It has no name that a program could use, and every kernel asks for it to be mounted beside the host's."""
    global _own_proc
    with contextlib.suppress(OSError):  # forbidden in many containers
        os.mkdir("proc")
        try:
            _check(libc.mount(b"proc", b"proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mount of /proc")
            _own_proc = os.open("proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _check(libc.umount2(b"proc", MNT_DETACH), "umount of /proc")
        finally:
            os.rmdir("proc")


def _namespaces() -> contextlib.AbstractContextManager:
    """
    New user, process, network, mount, IPC, host name and cgroup namespaces; then an empty, read-only file system.
    Goes on in a child, the first process of its namespace: when it ends, for whatever reason, so does all in it.
    """
    user, group = os.geteuid(), os.getegid()
    _check(libc.unshare(NEW_NAMESPACES), "new namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    child = os.fork()
    if child:
        os.closerange(3, 1 << 16)
        os.waitpid(child, 0)
        os._exit(0)
    _check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "the parent-death signal")
    _check(libc.sethostname(b"sandbox", 7), "the host's name")
    _check(libc.setdomainname(b"", 0), "the domain's name")
    around_fork = _NewProcessNamespace()
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    where = next(path for path in ("/tmp", "/var", "/usr", "/etc") if os.path.isdir(path)).encode()
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _check(libc.mount(b"none", where, b"tmpfs", flags, b"size=4k,mode=555"), "mount of an empty file system")
    os.chdir(where)
    _open_own_proc()
    _check(libc.syscall((155, 41)[MACHINE], b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _check(libc.mount(None, b"/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, None), "read-only mount")
    return around_fork


def enter(backend: str) -> contextlib.AbstractContextManager:
    """
    Once, in a worker that has loaded what it needs: leave the host.

    Args:
        backend (`str`):
            One of `BACKENDS`.

    Returns:
        A context manager, which can be used again, for the fork of a process that is to run a program.

    Raises:
        `OSError`: If this machine does not allow it, with the step that failed.
    """
    if backend not in BACKENDS:
        raise OSError(f"no backend {backend!r}")
    if (
        hasattr(os, "setresuid") and os.geteuid() == 0
    ):  # from here on a user who owns nothing and is exempt from nothing
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if backend == "none":
        return contextlib.nullcontext()
    if not LINUX or MACHINE is None:
        raise OSError(f"needs Linux on x86_64 or aarch64, this is {sys.platform} on {platform.machine()}")
    _check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # so that its own /proc can be written
    _check(libc.prctl(PR_GET_SECCOMP, 0, 0, 0, 0), "seccomp")
    around_fork = _namespaces() if backend == "namespaces" else contextlib.nullcontext()
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if backend == "landlock":
        _landlock_version()
    _check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # no other process of this user looks inside
    return around_fork


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


class Watch:
    """
    Looks at the processes of a program from outside, by a file system of processes that only the worker holds. Where that
    is not there, it sees nothing.
    """

    def __init__(self, backend: str):
        """Call it in a worker that has entered the backend, before it is ready."""
        self.proc = None
        with contextlib.suppress(OSError):
            if backend == "namespaces":  # the host's is gone, and had other process numbers
                self.proc = _own_proc
            elif LINUX:
                self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _read(self, path: str) -> str:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.read(file, 4096).decode()
        finally:
            os.close(file)

    def waiting(self, process: int) -> float:
        """Seconds that a process (its first thread) was ready to run and waited for a core."""
        if self.proc is None:
            return 0.0
        try:
            return int(self._read(f"{process}/schedstat").split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def threads(self, process: int) -> int:
        if self.proc is None:
            return 0
        try:
            return int(self._read(f"{process}/stat").rpartition(")")[2].split()[17])
        except (OSError, ValueError, IndexError):
            return 0


def memory_in_use() -> int:
    """Bytes of address space of this process; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def confine(backend: str, *, cpu_seconds: float, address_space: int, file_size: int = 0) -> None:
    """
    In a process forked from a worker, before the first line of a program: its limits, then the filter of its system
    calls. Nothing of it can be taken back.

    Args:
        backend (`str`):
            The one the worker entered.
        cpu_seconds (`float`):
            CPU time; rounded up, as the worker watches the exact limit from outside.
        address_space (`int`):
            Bytes of memory that it may map in all.
        file_size (`int`, *optional*, defaults to `0`):
            Bytes that any file it writes may have.
    """
    os.setsid()
    limits = {
        "AS": address_space,
        "CPU": int(cpu_seconds) + 2,
        "FSIZE": file_size,
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if backend == "none":
        limits["NPROC"] = 0
    elif backend == "namespaces" and _kernel() >= (5, 14):  # before, it counted all that this user runs on the host
        limits["NPROC"] = MAX_THREADS
    for name, limit in limits.items():
        if (number := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            with contextlib.suppress(
                ValueError, OSError
            ):  # a lower limit is in force, or the system has no such limit
                resource.setrlimit(number, (limit, limit))
    if not LINUX:
        return
    _check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "the parent-death signal")
    if backend != "none":
        if backend == "landlock":
            _landlock()
        elif backend == "namespaces":
            with contextlib.suppress(OSError):  # one lock more, where the kernel has it
                _landlock()
        header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # capabilities, version 3
        _check(libc.capset(header, nothing), "capset")
        _install_seccomp(seccomp_filter(os.getpid()))
