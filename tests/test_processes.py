"""The processes that other tests start end as fresh interpreters do."""

import os
import signal
import subprocess
import time

import pytest
from processes import python, ranks


@pytest.mark.parametrize(
    ("code", "returned", "output", "errors"),
    [
        ("print(__name__, *sys.argv)", 0, "__main__ -c 1\n", ""),
        ("sys.exit(3)", 3, "", ""),
        ("sys.exit('no')", 1, "", "no\n"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "", ""),
        ("atexit.register(print, 'end'); threading.Timer(0.1, print, ['late']).start()", 0, "late\nend\n", ""),
        ("print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], os.getcwd())", 0, "3 3 {folder}\n", ""),
    ],
)
def test_a_process_ends_as_python_does(monkeypatch, tmp_path, code, returned, output, errors):
    monkeypatch.chdir(tmp_path)
    done = python("-c", f"import atexit, os, sys, threading, torch\n{code}", 1, OMP_NUM_THREADS="3")
    assert (done.returncode, done.stdout) == (returned, output.format(folder=tmp_path))
    assert done.stderr.endswith(errors) and bool(done.stderr) == bool(errors)


def test_a_process_that_takes_too_long_is_killed(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        python("-c", code, timeout=2)
    deadline, pid = time.monotonic() + 10, int((tmp_path / "pid").read_text())
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_rank_that_fails_ends_the_others():
    code = "import os, sys, time\nprint(os.environ['RANK'], flush=True)\ntime.sleep(60 * int(os.environ['RANK']))\nsys.exit(4)"
    started = time.monotonic()
    assert ranks(2, "-c", code).returncode == 4 and time.monotonic() - started < 50
