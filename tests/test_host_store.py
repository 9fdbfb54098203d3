"""Where streamed weights wait: the choice, page locks and their failures, staging through small buffers."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from fake_device import TIMINGS, FakeDevice
from torch import nn

from utils.swap import host_store
from utils.swap.host_store import BackgroundCopies, LockedMemory, choose_mode, make_host_store
from wan import memory
from wan.errors import InputError

GB = 10**9


@pytest.mark.parametrize(
    ("mode", "total", "gpu", "mapped", "available", "cheap"),
    [
        ("pinned", 17, True, True, 30, True),
        ("mapped", 28, True, True, 30, True),  # would not leave the system its share
        ("staged", 28, True, False, 30, True),  # cast weights are in RAM already
        ("staged", 17, True, True, 60, False),  # Windows: page locks count as GPU memory
        ("mapped", 28, True, True, 30, False),
        ("mapped", 17, False, True, 60, True),  # on a CPU
        ("staged", 17, False, False, 60, True),
    ],
)
def test_the_mode_follows_memory_platform_and_device(mode, total, gpu, mapped, available, cheap):
    assert choose_mode(total * GB, gpu, mapped, available * GB, cheap) == mode


def weights(count=6, size=5000):
    draws = [torch.Generator().manual_seed(i) for i in range(count)]
    values = [torch.randn(size // 2 + i, generator=draw).bfloat16() for i, draw in enumerate(draws)]
    return [nn.Parameter(value, requires_grad=False) for value in values]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_store, "PIECE_BYTES", 3 * 5376)


def test_page_locks_are_pieces_of_whole_weights_and_go_with_the_store(small_pieces):
    device, moved = FakeDevice(), weights()
    store = make_host_store(moved, "pinned", device, mapped=True)
    assert store.mode == "pinned" and store.note == "" and len(device.locked) == 2
    for stored, weight in zip(moved, weights(), strict=True):
        assert torch.equal(stored, weight)
        inside = [a for a, size in device.locked.items() if a <= stored.data_ptr() <= a + size - stored.nbytes]
        assert len(inside) == 1 and stored.data_ptr() % 256 == 0
    assert all(address % 4096 == 0 and size % 4096 == 0 for address, size in device.locked.items())
    del store
    gc.collect()
    assert device.locked == {}


def test_no_piece_is_as_large_as_a_gibibyte():
    sizes = [702_545_920] * 3 + [141_557_760] * 20
    pieces = host_store._pieces([torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes])
    assert max(sum(weight.nbytes for weight in piece) for piece in pieces) < 2**30
    assert [weight.nbytes for piece in pieces for weight in piece] == sizes


@pytest.mark.parametrize("locks", [0, 1])
@pytest.mark.parametrize(
    ("limit", "note"),
    [
        (29_999, "page-locking failed (the limit of `ulimit -l` is 29,999 bytes)"),
        (memory.UNLIMITED, "page-locking failed"),
    ],
)
def test_a_page_lock_that_fails_ends_in_staging_with_nothing_locked(limit, note, locks, small_pieces, monkeypatch):
    monkeypatch.setattr(host_store, "memlock_limit", lambda: limit)
    device, moved = FakeDevice(locks=locks), weights()
    store = make_host_store(moved, "pinned", device, mapped=True)
    assert store.mode == "staged" and store.note == note and device.locked == {}
    assert len(device.lock_calls) == locks + 1  # none is tried after the failure
    assert all(torch.equal(a, b) for a, b in zip(moved, weights(), strict=True))


def test_mapped_weights_stay_in_place_and_staged_ones_are_copied():
    for mode, in_place in {"mapped": True, "staged": False}.items():
        given = weights()
        before = [weight.data for weight in given]
        store = make_host_store(given, mode, FakeDevice(), mapped=True)
        assert all((a.data_ptr() == b.data_ptr()) == in_place for a, b in zip(given, before, strict=True))
        assert store.bytes == (0 if in_place else sum(weight.nbytes for weight in given))


@pytest.mark.parametrize("mode", ["pinned", "staged"])
def test_weights_that_do_not_fit_into_the_memory_are_refused(mode, monkeypatch):
    monkeypatch.setattr(host_store, "available_bytes", lambda: 10_000)
    with pytest.raises(InputError, match=r"^not enough RAM: .* for --host_weights .*; use --host_weights mapped"):
        make_host_store(weights(), mode, FakeDevice(), mapped=True)
    assert make_host_store(weights(), "auto", FakeDevice(), mapped=True).mode == "mapped"


def test_auto_leaves_what_is_reserved(monkeypatch):
    monkeypatch.setattr(host_store, "available_bytes", lambda: host_store._RESERVE_BYTES + 40_000)
    for reserved, mode in {0: "pinned", 9_000: "pinned", 11_000: "mapped"}.items():
        assert make_host_store(weights(), "auto", FakeDevice(), mapped=True, reserved=reserved).mode == mode


def test_weights_in_memory_are_moved_piece_by_piece(small_pieces):
    given, alive = weights(), []

    class Device(FakeDevice):
        def page_lock(self, region):
            alive.append(sum(storage() is not None for storage in storages))
            return super().page_lock(region)

    storages = [weakref.ref(weight.data.untyped_storage()) for weight in given]
    make_host_store(given, "pinned", Device(), mapped=False)
    assert alive == [6, 3]


def test_locked_memory_is_locked_once_and_freed_after_its_lock():
    device = FakeDevice()
    memory = LockedMemory(device)
    region = memory.region(10_000)
    assert region.nbytes >= 10_000 and device.locked == {region.data_ptr(): region.nbytes}
    memory.release()
    assert device.locked == {}


def goes_to_forks(region):
    """As the kernel tells it, in proc(5): "dc" is for "do not copy area on fork"."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            inside = start <= region.data_ptr() < end
        elif inside and name == "VmFlags:":
            return "dc" not in values
    raise AssertionError("no such memory")


@pytest.mark.skipif(sys.platform != "linux", reason="the flags of memory are Linux's")
def test_page_locked_memory_is_kept_from_forks():
    memory = LockedMemory(FakeDevice(locks=1))
    locked, refused = memory.region(10_000), memory.region(10_000)
    assert not goes_to_forks(locked) and goes_to_forks(refused)
    memory.release()
    assert goes_to_forks(locked)


def test_memory_is_unlocked_after_the_copies_that_read_it():
    device, target = FakeDevice("lazy"), torch.zeros(100, dtype=torch.uint8)
    memory = LockedMemory(device)
    device.copy(target, memory.region(100)[:100].fill_(7), device.mark())
    memory.release()  # the fake device refuses to unlock under a copy
    assert device.locked == {} and torch.all(target == 7)


@pytest.mark.parametrize("timing", TIMINGS)
def test_staging_brings_weights_larger_than_its_buffers(timing, monkeypatch):
    monkeypatch.setattr(host_store, "STAGING_BYTES", 1024)
    device = FakeDevice(timing)
    link, targets = BackgroundCopies(device), [torch.zeros_like(weight) for weight in weights()]
    pairs = zip(targets, weights(), strict=True)
    copies = [link.copy(target, weight, device.mark()) for target, weight in pairs]
    for copied in reversed(copies):
        link.wait(copied)
    assert all(torch.equal(a, b) for a, b in zip(targets, weights(), strict=True))


def test_the_staging_thread_is_told_its_device_once():
    device = FakeDevice()
    link, target = BackgroundCopies(device), torch.zeros(4)
    for _ in range(2):
        link.wait(link.copy(target, torch.ones(4), device.mark()))
    assert device.threads == ["copies"]


def test_the_staging_thread_itself_may_end_it():
    device = FakeDevice("lazy")
    link, target = BackgroundCopies(device), torch.zeros(4)
    link.copy(target, torch.ones(4), device.mark())
    link._thread.submit(link.drain).result(timeout=10)
    assert torch.equal(target, torch.ones(4))
    with pytest.raises(RuntimeError, match="no read_ahead after the end of its thread"):
        link.copy(target, torch.ones(4), device.mark())


def test_a_failure_in_the_staging_thread_is_not_lost():
    link = BackgroundCopies(FakeDevice())
    copied = link.copy(torch.zeros(4), torch.zeros(5), FakeDevice().mark())
    with pytest.raises(RuntimeError):
        link.wait(copied)
