"""
Runs the hostile programs of the shared data against a backend, as whoever calls it, and prints what went wrong:

    python tests/sandbox_attacks.py BACKEND REPEATS

Also imported by test_sandbox.py. With the backend "none" do not: it is what the programs hope for.
"""

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from trl_score.sandbox import WORKER, Sandbox, Submission


DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILES_IN_REACH = [
    "pwned.txt",
    "~/pwned.txt",
    "/pwned.txt",
    "/tmp/pwned.txt",
    "/var/tmp/pwned.txt",
    "/dev/shm/pwned.txt",
]


def rows() -> list[dict]:
    return [json.loads(line) for line in (DATA / "sandbox_attacks.jsonl").read_text(encoding="utf-8").splitlines()]


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def run(backend: str, rows: list[dict]) -> list[str]:
    """The faults found: a wrong verdict, a trace on the host, a process or connection that should not be."""
    faults = []
    before = processes()
    limits = {"cpu_seconds": 0.5, "wall_seconds": 3, "memory": 256 << 20}
    sandbox = Sandbox(backend, **limits, num_workers=8, allow_code_execution=True)  # most of them only wait
    with tempfile.TemporaryDirectory() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(canary, 0o777)
        Path(canary, "keep.txt").write_text("keep")
        server.settimeout(0.01)
        replacements = {"@@CANARY@@": canary, "@@HOME@@": canary, "@@PORT@@": str(server.getsockname()[1])}
        submissions = []
        for row in rows:
            for old, new in replacements.items():
                row = {**row, "program": row["program"].replace(old, new)}
            submission = Submission(
                row["program"],
                row["setup"] + "\n" + row["tests"],
                (row["entry"],),
                mutable_arguments=row["options"].get("mutable_args", False),
            )
            submissions += [(row, submission)] * row["repeat"]
        started = time.monotonic()
        verdicts = sandbox.run([submission for _, submission in submissions])
        seconds = time.monotonic() - started
        time.sleep(1)  # for what would come late
        for (row, _), verdict in zip(submissions, verdicts, strict=True):
            if verdict.passed != (row["expect"] == "pass"):
                faults.append(f"{row['name']}: {verdict}, expected {row['expect']}")
        if sorted(os.listdir(canary)) != ["keep.txt"]:
            faults.append(f"the folder of the canary holds {os.listdir(canary)}")
        try:
            server.accept()
            faults.append("a program connected to the host")
        except TimeoutError:
            pass
        if seconds > 5 * len(submissions):
            faults.append(f"took {seconds:.0f} s")
    faults += [f"{path} was written" for path in FILES_IN_REACH if Path(path).expanduser().exists()]
    honest = sandbox.run([Submission("def f(x): return x", "assert f(1) == 1")])
    if not honest[0].passed:
        faults.append(f"afterwards, an honest program: {honest[0]}")
    sandbox.close()
    time.sleep(0.1)
    alive = [pid for pid in processes() - before if is_ours(pid)]
    return faults + ([f"processes left: {alive}"] if alive else [])


def is_worker(pid: int) -> bool:
    return str(WORKER).encode() in command_line(pid)


def is_ours(pid: int) -> bool:
    """A worker that this process started, or one that lost its parent: not one of a test that runs beside this one."""
    if not is_worker(pid):
        return False
    while is_worker(pid):
        pid = parent(pid)
    return pid in (os.getpid(), 1)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # gone meanwhile
        return 0


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    backend, repeats = sys.argv[1], int(sys.argv[2])
    found = [fault for _ in range(repeats) for fault in run(backend, rows())]
    print(f"uid {os.getuid()}, {backend}, {repeats} x {len(rows())} programs: {len(found)} faults", *found, sep="\n")
    sys.exit(bool(found))
