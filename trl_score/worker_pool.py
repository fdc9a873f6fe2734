"""
Helper processes for work that may hang, crash or eat memory: grading.

A worker is an ordinary program that is started once and gets one job at a time. It is not a fork of the trainer, which holds
threads and a GPU. Unlike a worker of `multiprocessing`, it does not import the user's script. A worker that dies or takes too
long is replaced, and its job is lost, so no job can stop the others.

In the protocol, the pool sends one byte together with the descriptor of a file in memory that holds the job. The worker puts its
result in the same file and sends a line, which may be empty. [`serve`] does the worker's part.
"""

import contextlib
import os
import selectors
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass


HEADER = struct.Struct("<QQ")  # bytes of the result, 0 until there is one; bytes of the job
START_LIMIT = 60.0  # seconds a worker has to say that it is ready
MAX_RESULT = 1 << 20  # bytes
DIED = "its worker died"
CAN_SEND_DESCRIPTORS = hasattr(socket, "send_fds")
NO_DESCRIPTORS = (
    "Helper processes get their jobs as file descriptors, which this system (Windows) cannot send: grade on Linux or macOS, "
    "in WSL, or, for programs, with a runner of your own (docs/sandbox.md)."
)


@dataclass(frozen=True)
class Outcome:
    """
    The end of a job: its `result` (`None` if the worker left none) and the `message` that the worker sent. If the worker had to
    be replaced, `lost` says why; otherwise it is empty.
    """

    result: bytes | None = None
    message: bytes = b""
    lost: str = ""


def job_file(job: bytes) -> int:
    """Write a job to a nameless file in memory. The caller closes the descriptor."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("job", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    contents = memoryview(HEADER.pack(0, len(job)) + job)
    offset = 0
    while offset < len(contents):
        offset += os.pwrite(file, contents[offset:], offset)
    return file


def read_job(file: int) -> bytes:
    """Read a job from its file. Called in the worker."""
    size = HEADER.unpack(os.pread(file, HEADER.size, 0))[1]
    job = bytearray()
    while len(job) < size:
        job += os.pread(file, size - len(job), HEADER.size + len(job))
    return bytes(job)


def write_result(file: int, result: bytes) -> None:
    """Write the result (at most `MAX_RESULT` bytes) to the job's file, its length last. Called in the worker."""
    os.pwrite(file, result, HEADER.size)
    os.pwrite(file, HEADER.pack(len(result), 0), 0)


def read_result(file: int) -> bytes | None:
    size = HEADER.unpack(os.pread(file, HEADER.size, 0))[0]
    return os.pread(file, size, HEADER.size) if 0 < size <= MAX_RESULT else None


def serve(channel: socket.socket, handle: Callable[[bytes], bytes]) -> None:
    """Report that the worker is ready, then do one job after the other until the pool closes the channel. Called in the worker."""
    channel.sendall(b"ready\n")
    while True:
        _, files, _, _ = socket.recv_fds(channel, 1, 1)
        if not files:
            return
        write_result(files[0], handle(read_job(files[0])))
        os.close(files[0])
        channel.sendall(b"\n")


class Worker:
    """One helper process and the pool's end of its channel."""

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        if not CAN_SEND_DESCRIPTORS:
            raise OSError(NO_DESCRIPTORS)
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is the pool's to handle
            )
        self.owner = os.getpid()
        self.file: int | None = None  # the job it has
        self.index = self.tries = 0
        self.deadline = 0.0
        self.message = b""

    def wait_until_ready(self) -> None:
        """
        Raises:
            `OSError`: With the worker's own words, if it could not start.
        """
        self.channel.settimeout(START_LIMIT)
        line = b""
        while not line.endswith(b"\n"):
            try:
                received = self.channel.recv(4096)
            except TimeoutError:
                received = b""
            if not received:
                raise OSError(f"it ended or hung before it was ready: {line!r}")
            line += received
        if not line.startswith(b"ready"):
            raise OSError(line.decode(errors="replace").strip())

    def start(self, index: int, job: bytes, tries: int, time_limit: float) -> None:
        self.file, self.index, self.tries = job_file(job), index, tries
        self.deadline, self.message = time.monotonic() + time_limit, b""
        with contextlib.suppress(OSError):  # a dead worker is noticed by its silence
            socket.send_fds(self.channel, [b"j"], [self.file])

    def finish(self) -> Outcome:
        outcome = Outcome(read_result(self.file), self.message.strip())
        os.close(self.file)
        self.file = None
        return outcome

    def end(self) -> None:
        """Close the channel, which ends an idle worker. A worker with a job is killed."""
        busy = self.file is not None
        if busy:
            self.finish()
        self.channel.close()
        if os.getpid() != self.owner:  # in a fork of the process that started it: it is not ours to end
            return
        if not busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
        self.process.kill()
        self.process.wait()


def _end_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().end()


class WorkerPool:
    """
    Up to `num_workers` workers, started when there is a job for them.

    Args:
        command (`list[str]`):
            The worker's command line; the descriptor of its channel is appended.
        env (`dict[str, str]`):
            The whole environment of a worker. Nothing is inherited.
        num_workers (`int`, *optional*):
            Defaults to the usable CPU cores, divided among the processes that `accelerate` runs on this machine.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], num_workers: int | None = None):
        if num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        elif num_workers < 1:
            raise ValueError(f"`num_workers={num_workers}` leaves no worker to grade. Set it to 1 or more.")
        self.command, self.env, self.num_workers = list(command), env, num_workers
        self._workers: list[Worker] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __getstate__(self):
        return {"command": self.command, "env": self.env, "num_workers": self.num_workers}

    def __setstate__(self, state):
        self.__init__(**state)

    def close(self) -> None:
        """End the workers. The next job starts new ones."""
        with self._lock:
            _end_all(self._workers)

    def _staff(self, num_workers: int) -> None:
        """Start workers until there are `num_workers`. Of those that have ended, one with a job is still to be read (`map`)."""
        for worker in [each for each in self._workers if each.file is None and each.process.poll() is not None]:
            self._workers.remove(worker)
            worker.end()
        new = [Worker(self.command, self.env) for _ in range(num_workers - len(self._workers))]
        self._workers += new
        try:
            for worker in new:
                worker.wait_until_ready()
        except BaseException:
            _end_all(self._workers)
            raise

    def map(self, jobs: Sequence[bytes], time_limit: float) -> list[Outcome]:
        """
        Do all jobs, as many at a time as there are workers. May be called from any thread.

        Args:
            jobs (`Sequence[bytes]`):
                One job each.
            time_limit (`float`):
                Seconds a job may take. A worker that needs longer is killed.

        Returns:
            One [`Outcome`] per job, in their order.

        Raises:
            `OSError`: If a worker cannot be started.
        """
        if os.getpid() != self._process:  # a fork of the process that made the pool: those workers are not ours
            self._finalizer.detach()
            self.__init__(**self.__getstate__())
        outcomes: list[Outcome | None] = [None] * len(jobs)
        waiting = deque((index, 0) for index in range(len(jobs)))  # job, times it was tried
        with self._lock:
            try:
                self._staff(min(self.num_workers, len(jobs)))
                idle = list(self._workers)
                with selectors.DefaultSelector() as selector:
                    while waiting or selector.get_map():
                        while waiting and idle:
                            worker, (index, tries) = idle.pop(), waiting.popleft()
                            worker.start(index, jobs[index], tries, time_limit)
                            selector.register(worker.channel, selectors.EVENT_READ, worker)
                        busy = [key.data for key in selector.get_map().values()]
                        first_deadline = min(worker.deadline for worker in busy)
                        spoke = selector.select(max(0.0, first_deadline - time.monotonic()))
                        lost = {}
                        for worker in [key.data for key, _ in spoke]:
                            try:
                                received = worker.channel.recv(4096)
                            except OSError:
                                received = b""
                            worker.message += received
                            if not received:
                                lost[worker] = DIED
                            elif received.endswith(b"\n"):
                                selector.unregister(worker.channel)
                                outcomes[worker.index] = worker.finish()
                                idle.append(worker)
                        for worker in busy:
                            if worker.file is not None and worker.deadline <= time.monotonic():
                                lost.setdefault(worker, f"no result after {time_limit:g} s")
                        for worker, why in lost.items():
                            selector.unregister(worker.channel)
                            if why == DIED and worker.tries == 0:  # perhaps not this job's doing
                                waiting.append((worker.index, 1))
                            self._workers.remove(worker)
                            outcomes[worker.index] = Outcome(lost=why)
                            worker.end()
                        if lost:
                            self._staff(min(self.num_workers, len(self._workers) + len(waiting)))
                            busy = [key.data for key in selector.get_map().values()]
                            idle = [worker for worker in self._workers if worker not in busy]
            except BaseException:  # also Ctrl-C: what is under way has nobody to report to
                _end_all(self._workers)
                raise
        return outcomes
