import os
import sys
import threading
import time
from pathlib import Path

import pytest

from trl_score.worker_pool import WorkerPool


WORKER = """
import os, sys, socket, time
sys.path.insert(0, {path!r})
from worker_pool import serve
def handle(job):
    if job == b"die": os._exit(1)
    if job == b"hang": time.sleep(99)
    if job.startswith(b"at "):
        time.sleep(max(0, float(job[3:]) - time.time()))
        os._exit(1)
    if job.startswith(b"once "):
        try:
            os.close(os.open(job[5:], os.O_CREAT | os.O_EXCL))
            os._exit(1)
        except FileExistsError: pass
    return job.upper()
serve(socket.socket(fileno=int(sys.argv[1])), handle)
"""
PATH = str(Path(sys.modules[WorkerPool.__module__].__file__).parent)


@pytest.fixture
def pool():
    pool = WorkerPool([sys.executable, "-c", WORKER.format(path=PATH)], {}, num_workers=2)
    yield pool
    pool.close()


def test_no_job_can_stop_the_others(pool):
    outcomes = pool.map([b"a", b"die", b"b", b"hang", b"c", b"d" * 200_000], time_limit=1)
    assert [outcome.result for outcome in outcomes] == [b"A", None, b"B", None, b"C", b"D" * 200_000]
    assert (outcomes[1].lost, outcomes[3].lost) == ("its worker died", "no result after 1 s")


def test_a_job_whose_worker_died_is_tried_again(pool, tmp_path):
    """It may not have been the job's doing: the system kills what it likes when memory is short."""
    job = b"once " + os.fsencode(tmp_path / "tried")
    assert pool.map([job], time_limit=5)[0].result == job.upper()


@pytest.mark.parametrize("apart", [0, 0.0005, 0.001])
def test_workers_that_die_at_about_the_same_time_are_replaced(pool, apart):
    """Also one that is found dead while the place of another is filled."""
    for _ in range(5):
        start = time.time() + 0.1
        jobs = [f"at {start + i * apart}".encode() for i in range(2)]
        outcomes = pool.map([*jobs, b"a", b"b"], time_limit=5)
        assert [outcome.lost for outcome in outcomes] == ["its worker died"] * 2 + [""] * 2
        assert [outcome.result for outcome in outcomes[2:]] == [b"A", b"B"]


def test_several_threads_share_it(pool):
    found = {}
    jobs = {k: [f"{k} {i}".encode() for i in range(20)] for k in range(4)}
    threads = [threading.Thread(target=lambda k=k: found.update({k: pool.map(jobs[k], time_limit=5)})) for k in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k: [outcome.result for outcome in outcomes] for k, outcomes in found.items()} == jobs


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(OSError, match="before it was ready"):
        WorkerPool([sys.executable, "-c", "1"], {}).map([b"a"], time_limit=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        WorkerPool([sys.executable], {}, num_workers=0)


def test_no_jobs_need_no_worker(pool):
    assert pool.map([], time_limit=1) == [] and pool._workers == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_workers_of_its_own(pool):
    """A data loader forks the trainer. Two processes on one channel would take each other's results."""
    pool.map([b"a"] * 2, time_limit=5)
    process = os.fork()
    if not process:
        right = [outcome.result for outcome in pool.map([b"b"] * 50, time_limit=5)] == [b"B"] * 50
        pool.close()
        os._exit(0 if right else 1)
    assert [outcome.result for outcome in pool.map([b"c"] * 50, time_limit=5)] == [b"C"] * 50
    assert os.waitpid(process, 0)[1] == 0
