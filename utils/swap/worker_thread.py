"""A thread that does jobs one after the other, and that the garbage collector may end at any moment.

A ThreadPoolExecutor does not allow that: ending it takes locks of Python's threading module, and the collector may run
in code that holds them, which then deadlocks.
"""

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class WorkerThread:
    """The thread; `begin` is its first job, and if that fails, all others do. It ends when this object is freed."""

    def __init__(self, name: str, begin: Callable[[], object] | None = None):
        self._jobs = _Jobs()
        # Not a method, which would keep this object alive. A daemon, since at exit Python waits for all other threads.
        threading.Thread(target=_work, args=(self._jobs, begin), name=name, daemon=True).start()
        weakref.finalize(self, _end, self._jobs, drop=True)

    def submit(self, action: Callable, *given: Any) -> Future:
        """The future result of `action(*given)`; RuntimeError once the thread has been ended."""
        if self._jobs.ended:
            raise RuntimeError(f"no {action.__name__} after the end of its thread")
        future = Future()
        self._jobs.queue.put((future, action, given))
        return future

    def end(self, drop: bool = False) -> None:
        """Waits for the jobs, or with `drop` only for the one in progress; none can be submitted afterwards.

        Called in the thread itself, which cannot wait for its own end, it waits for nothing and drops all other jobs.
        """
        _end(self._jobs, drop)


class _Jobs:
    """What the thread and its owner share. A SimpleQueue, since its put() may interrupt another put()."""

    def __init__(self):
        self.queue = SimpleQueue()
        self.process = os.getpid()  # in a fork of it there is no thread
        self.thread: int | None = None
        self.ended = False
        self.dropped = False


def _work(jobs: _Jobs, begin: Callable[[], object] | None) -> None:
    jobs.thread = threading.get_ident()
    begun = Future()
    _do(begun, begin or (lambda: None))
    while isinstance(job := jobs.queue.get(), tuple):
        future, action, given = job
        if jobs.dropped:
            future.cancel()
        elif error := begun.exception():
            future.set_exception(error)
        else:
            _do(future, action, *given)
        del job, future, action, given  # their memory should not wait for the next job
    job.release()


def _do(future: Future, action: Callable, *given: Any) -> None:
    try:
        future.set_result(action(*given))
    except Exception as error:  # raised again where the result is asked for
        future.set_exception(error)


def _end(jobs: _Jobs, drop: bool) -> None:
    if jobs.ended or jobs.process != os.getpid():
        return
    inside = threading.get_ident() == jobs.thread
    jobs.ended, jobs.dropped = True, drop or inside
    last = threading.Lock()
    last.acquire()
    jobs.queue.put(last)
    if not inside:
        last.acquire()
