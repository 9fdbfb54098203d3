"""The thread behind background copies: its jobs in order, its end in the middle of anything."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest

from utils.swap.worker_thread import WorkerThread

SOON = 20  # seconds, far more than anything takes here


def alive(name):
    return [thread for thread in threading.enumerate() if thread.name == name and thread.is_alive()]


def test_jobs_are_done_in_order_by_one_thread_that_begins_once():
    done = []
    worker = WorkerThread("a", lambda: done.append("begin"))
    futures = [worker.submit(lambda number: done.append(number) or threading.get_ident(), n) for n in range(100)]
    assert len({future.result(SOON) for future in futures}) == 1
    assert done == ["begin", *range(100)]


def test_a_failure_is_told_to_whoever_asks_and_the_next_job_is_done():
    worker = WorkerThread("a")
    failed, fine = worker.submit(lambda: 1 / 0), worker.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        failed.result(SOON)
    assert fine.result(SOON) == 7


def test_where_its_beginning_fails_so_does_every_job():
    worker = WorkerThread("a", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            worker.submit(print).result(SOON)
    worker.end()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_of_its_process_does_not_wait_for_a_thread_that_it_has_not():
    program = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
from utils.swap.worker_thread import WorkerThread
worker = WorkerThread("a")
worker.submit(lambda: None).result()
child = os.fork()
del worker
gc.collect()
if child:
    os.waitpid(child, 0)
    print("ended")
os._exit(0) if not child else None
"""
    command = [sys.executable, "-c", program, str(__file__).rpartition("tests")[0]]
    assert subprocess.run(command, capture_output=True, text=True, timeout=SOON).stdout == "ended\n"


@pytest.mark.parametrize("drop", [False, True])
def test_its_end_waits_for_what_is_being_done_and_drops_the_rest_only_if_asked(drop):
    worker, begun, go, done = WorkerThread("a"), threading.Event(), threading.Event(), []
    worker.submit(lambda: (begun.set(), go.wait(SOON), done.append(1)))
    rest = worker.submit(lambda: done.append(2))
    begun.wait(SOON)
    threading.Timer(0.1, go.set).start()
    worker.end(drop)
    assert done == [1] if drop else [1, 2]
    assert rest.cancelled() == drop
    with pytest.raises(RuntimeError, match="after the end of its thread"):
        worker.submit(print)


def test_the_thread_itself_may_end_it():
    worker = WorkerThread("ended inside")
    inside, after = worker.submit(worker.end), worker.submit(print)
    inside.result(SOON)
    [thread.join(SOON) for thread in alive("ended inside")]
    assert not alive("ended inside") and after.cancelled()


def test_what_a_job_was_given_is_freed_before_the_next_one():
    class Thing:
        pass

    worker, thing = WorkerThread("a"), Thing()
    gone = weakref.ref(thing)
    worker.submit(lambda _: None, thing).result(SOON)
    del thing
    worker.submit(lambda: None).result(SOON)
    assert gone() is None


def test_it_ends_with_its_object():
    worker = WorkerThread("forgotten")
    worker.submit(lambda: None).result(SOON)
    del worker
    gc.collect()
    [thread.join(SOON) for thread in alive("forgotten")]
    assert not alive("forgotten")


def test_the_collector_may_end_it_in_code_that_holds_any_lock_of_pythons_threads():
    program = """
import concurrent.futures.thread as pools, threading, sys
sys.path.insert(0, sys.argv[1])
from utils.swap.worker_thread import WorkerThread
worker = WorkerThread("a")
worker.submit(lambda: None).result()
kind = type(threading.Lock())
locks = [value for module in (threading, pools) for value in vars(module).values() if isinstance(value, kind)]
assert locks
for lock in locks:
    lock.acquire()
worker.end()
for lock in locks:
    lock.release()
print("ended")
"""
    command = [sys.executable, "-c", program, str(__file__).rpartition("tests")[0]]
    assert subprocess.run(command, capture_output=True, text=True, timeout=SOON).stdout == "ended\n"


def test_a_program_that_ends_waits_for_the_job_that_is_done_and_no_other():
    program = """
import sys, time
sys.path.insert(0, sys.argv[1])
from utils.swap.worker_thread import WorkerThread
worker = WorkerThread("a")
worker.submit(lambda: (time.sleep(0.3), print("done", flush=True)))
worker.submit(lambda: print("not done", flush=True))
time.sleep(0.1)
"""
    command = [sys.executable, "-c", program, str(__file__).rpartition("tests")[0]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SOON)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
