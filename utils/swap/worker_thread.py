"""A thread that does jobs one after the other, and that the garbage collector may end in the middle of anything.

A ThreadPoolExecutor is no such thing: to end it takes locks of Python's own threads, and the collector may run in code
that holds them, which then waits for itself.
"""

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class WorkerThread:
    """The thread; `begin` is its first job, and where that fails, all others do. It ends with this object, too."""

    def __init__(self, name: str, begin: Callable[[], object] | None = None):
        self._jobs = _Jobs()
        # Not a method: the thread would hold on to this object. A daemon: Python waits for no other kind at its end.
        threading.Thread(target=_work, args=(self._jobs, begin), name=name, daemon=True).start()
        weakref.finalize(self, _end, self._jobs, drop=True)

    def submit(self, action: Callable, *given: Any) -> Future:
        """What `action` of what is given will return; RuntimeError once the thread was ended."""
        if self._jobs.ended:
            raise RuntimeError(f"no {action.__name__} after the end of its thread")
        future = Future()
        self._jobs.queue.put((future, action, given))
        return future

    def end(self, drop: bool = False) -> None:
        """Waits for the jobs, or (`drop`) only for the one that is being done; there can be none after.

        In the thread itself, which cannot wait for its own end, nothing is waited for and all others are dropped.
        """
        _end(self._jobs, drop)


class _Jobs:
    """What the thread and its owner share. A SimpleQueue, since its put() may come in the middle of another one."""

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
        del job, future, action, given  # their memory is not to wait for the next job
    job.release()


def _do(future: Future, action: Callable, *given: Any) -> None:
    try:
        future.set_result(action(*given))
    except Exception as error:  # whoever asks for the result is to hear of it
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
