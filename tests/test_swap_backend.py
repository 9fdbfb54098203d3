"""What CUDA is asked for, and in which order, told by stand-ins for its streams, events and page locks."""

import contextlib

import pytest
import torch

from utils.swap.backend import CudaBackend, HostBackend, make_backend

DEVICE = torch.device("cuda")


class Cuda:
    """torch.cuda's part in swapping; keeps the calls."""

    def __init__(self, code=0):
        self.calls = []
        self.code = code
        self.computing = _Stream(self, "compute")
        self.copying = _Stream(self, "copy")

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("lock", size, flags))
        return self.code

    def cudaHostUnregister(self, address):
        self.calls.append(("unlock",))
        return self.code


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_event(self, event):
        assert event.recorded, "CUDA does not wait for an event that was never recorded"
        self.cuda.calls.append((self.name, "waits for", event.recorded))

    def synchronize(self):
        self.cuda.calls.append((self.name, "drained"))


class _Event:
    recorded = None

    def record(self, stream):
        self.recorded = stream.name
        stream.cuda.calls.append((stream.name, "records"))


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.copying)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: cuda.calls.append(("current device", device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.computing)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)

    @contextlib.contextmanager
    def on_stream(stream):
        cuda.calls.append((stream.name, "begins"))
        yield
        cuda.calls.append((stream.name, "ends"))

    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    return cuda


def test_a_copy_waits_for_the_last_user_and_computing_waits_for_the_copy(cuda):
    backend, target = CudaBackend(DEVICE), torch.zeros(3)
    copied = backend.copy(target, torch.ones(3), backend.mark())
    backend.wait(copied)
    assert cuda.calls == [
        ("compute", "records"),
        ("copy", "waits for", "compute"),
        ("copy", "begins"),
        ("copy", "ends"),
        ("copy", "records"),
        ("compute", "waits for", "copy"),
    ]
    assert torch.equal(target, torch.ones(3))
    backend.drain()
    assert cuda.calls[-1] == ("copy", "drained")


def test_a_refused_page_lock_is_told_and_its_error_taken_off_the_device(cuda, monkeypatch):
    launched = []

    def launch(*_, device):
        launched.append(device)
        raise torch.AcceleratorError("out of memory")  # the pending error of the page lock

    backend, region = CudaBackend(torch.device("cuda:1")), torch.empty(8192, dtype=torch.uint8)
    monkeypatch.setattr(torch, "ones", launch)
    assert backend.page_lock(region) and launched == []
    cuda.code = 2
    assert not backend.page_lock(region) and launched == [backend.device]
    backend.page_unlock(region)
    assert launched == 2 * [backend.device]
    assert cuda.calls == [("lock", 8192, 1), ("lock", 8192, 1), ("unlock",)]


def test_a_thread_copies_on_the_device_that_was_current_when_it_was_chosen(cuda):
    backend = CudaBackend(DEVICE)
    backend.begin_thread()
    assert cuda.calls == [("current device", torch.device("cuda:3"))] and backend.device.index == 3


def test_small_buffers_are_ordinary_memory_where_page_locked_memory_is_refused(cuda, monkeypatch):
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)
    assert CudaBackend(DEVICE).host_buffer(1024).nbytes == 1024


def test_the_cpu_copies_at_once_and_has_nothing_to_wait_for():
    backend, target = make_backend(torch.device("cpu")), torch.zeros(3)
    assert isinstance(backend, HostBackend) and not backend.page_locks
    backend.wait(backend.copy(target, torch.ones(3), backend.mark()))
    assert torch.equal(target, torch.ones(3))
