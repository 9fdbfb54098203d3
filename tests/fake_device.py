"""A device for tests: the CPU, with a copy stream whose copies happen at once, as late as allowed, or at any time.

Computing is in step with the host here, so a mistake shows as a wrong byte: what a copy will overwrite is all NaN from
the moment it is asked for. Waiting for an event that was never recorded fails, as does copying over what is in use.
It keeps its own time: a copy takes `copy_seconds`, after the one before it, and computing what used() says.
"""

import random
import threading
from dataclasses import dataclass

import pytest
import torch

TIMINGS = ("eager", "lazy", "random")
FEW_TIMINGS = (pytest.param("eager", marks=pytest.mark.slow), "lazy", pytest.param("random", marks=pytest.mark.slow))


@dataclass(eq=False)
class FakeEvent:
    tick: int
    passed: bool
    at: float  # seconds


class FakeDevice:
    """A backend; `locks` is how many page locks succeed."""

    def __init__(self, timing="eager", seed=0, page_locks=True, locks=10**6):
        self.device = torch.device("cpu")
        self.page_locks = page_locks
        self.timing = timing
        self.random = random.Random(seed)
        self.locks_left = locks
        self.locked = {}  # address -> bytes
        self.lock_calls = []
        self.last_use = {}  # address -> tick
        self.tick = 0
        self.lock = threading.RLock()  # a staging thread copies too
        self.queue = []
        self.threads = []
        self.copied = []  # (target address, bytes)
        self.copy_seconds = 0.0
        self.now = 0.0  # of computing
        self.copies_end = 0.0
        self.behind = False  # the host runs ahead of the device

    def mark(self):
        self.tick += 1
        return FakeEvent(self.tick, passed=True, at=self.now)

    def used(self, weight, seconds=0.0):
        """Told by tests: computing reads `weight` from now until the next mark."""
        self.tick += 1
        self.now += seconds
        self.last_use[weight.data_ptr()] = self.tick

    def copy(self, target, source, after):
        assert after.tick > self.last_use.get(target.data_ptr(), 0), "a copy into memory that is still in use"
        with self.lock:
            self.copies_end = max(self.copies_end, after.at) + self.copy_seconds
            event = FakeEvent(self.tick, passed=False, at=self.copies_end)
            target.view(-1).view(torch.uint8).fill_(255)
            self.queue.append((target, source, event))
            self.copied.append((target.data_ptr(), target.nbytes))
            done = {"eager": 1, "lazy": 0}.get(self.timing, self.random.random())
            self._run(round(done * len(self.queue)))
        return event

    def wait(self, event):
        assert isinstance(event, FakeEvent), "an event that nobody has recorded"
        with self.lock:
            while not event.passed:
                self._run(1)
            self.now = max(self.now, event.at)

    finish = wait

    def moment(self):
        return self.now

    def seconds(self, begin, end):
        return None if self.behind else end - begin

    def drain(self):
        with self.lock:
            self._run(len(self.queue))

    def begin_thread(self):
        self.threads.append(threading.current_thread().name)

    def host_buffer(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, region):
        self.lock_calls.append(region.nbytes)
        self.locks_left -= 1
        if self.locks_left >= 0:
            self.locked[region.data_ptr()] = region.nbytes
        return self.locks_left >= 0

    def page_unlock(self, region):
        start, end = region.data_ptr(), region.data_ptr() + region.nbytes
        pending = [tensor.data_ptr() for target, source, _ in self.queue for tensor in (target, source)]
        assert not any(start <= address < end for address in pending), "unlocked under a copy"
        del self.locked[start]

    @torch.no_grad()
    def _run(self, count):
        for target, source, event in self.queue[:count]:
            target.copy_(source)
            event.passed = True
        del self.queue[:count]
