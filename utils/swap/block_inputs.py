"""Keeps the inputs of checkpointed blocks on the host between forward and backward (activation offloading).

For long clips they are most of the device memory that a step takes. Each block has its own place on the host,
page-locked and allocated once for the largest input so far; two buffers on the device take turns in bringing the inputs
back, one block ahead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from utils.swap.backend import CudaBackend, HostBackend, make_backend
from utils.swap.host_store import LockedMemory


@dataclass(frozen=True)
class _Away:
    """Takes the place of the input of block `number` in the graph of forward pass number `forward`."""

    number: int
    forward: int
    shape: torch.Size
    dtype: torch.dtype


class BlockInputs:
    """The inputs of `blocks` blocks on a device; that of the last block stays there, since backward starts with it."""

    def __init__(self, blocks: int, device: torch.device, backend: HostBackend | CudaBackend | None = None):
        self.blocks = blocks
        self.backend = backend or make_backend(device)
        self.host: list[Tensor] = []  # uint8, one for each block but the last
        self._buffers: list[Tensor] = []  # uint8, two on the device
        self._locks: LockedMemory | None = None
        self._leaving: list[tuple[Tensor, object]] = []  # inputs on their way to the host, with the event of their end
        self._coming: dict[int, object] = {}  # block -> the event of its input's arrival on the device
        self._forward = 0  # how many forward passes have begun; the host has the inputs of the last one only

    def around(self, number: int, forward: Callable[..., Tensor], x: Tensor, *shared) -> Tensor:
        """`forward(x, *shared)` of checkpointed block `number`; what autograd saves of x goes to the host."""
        if not torch.is_grad_enabled():
            return forward(x, *shared)
        if number == 0:
            self._begin(x)

        # Not x itself: autograd holds on to `pack`, which would hold on to x.
        address, shape = x.data_ptr(), x.shape

        def pack(saved: Tensor) -> object:
            # All blocks share the other arguments, so moving those would save nothing.
            if (saved.data_ptr(), saved.shape) != (address, shape):
                return saved
            return (number, self._forward, saved) if number == self.blocks - 1 else self._send(number, saved)

        with saved_tensors_hooks(pack, self._unpack):
            return forward(x, *shared)

    def _begin(self, x: Tensor) -> None:
        self._forward += 1
        self._leaving, self._coming = [], {}
        if self.host and x.nbytes <= self.host[0].nbytes:
            return
        # Larger than before: copies from and to the old memory have to end before it is freed.
        self.backend.drain()
        self._make_host_memory(x.nbytes)
        self._buffers = []

    def _make_host_memory(self, size: int) -> None:
        self.host = []
        if self._locks is not None:
            self._locks.release()
        if self.backend.page_locks:
            self._locks = LockedMemory(self.backend)
            self.host = [self._locks.region(size) for _ in range(self.blocks - 1)]
        else:
            self.host = [self.backend.host_buffer(size) for _ in range(self.blocks - 1)]

    def _send(self, number: int, x: Tensor) -> _Away:
        away = _Away(number, self._forward, x.shape, x.dtype)
        self._leaving.append((x, self.backend.copy(_view(self.host[number], away), x, self.backend.mark())))
        self._release(keep=1)
        return away

    def _unpack(self, packed: object) -> Tensor:
        match packed:
            case Tensor():
                return packed
            case (number, forward, x):
                self._check_latest(forward)
                self._release(keep=0)
                self._fetch(_Away(number - 1, forward, x.shape, x.dtype))
                return x
            case _Away(number, forward, shape, dtype):
                self._check_latest(forward)
                if number not in self._coming:
                    self._fetch(packed)
                self.backend.wait(self._coming.pop(number))
                # The block above has been enqueued entirely, so its buffer is free for the block below.
                self._fetch(_Away(number - 1, forward, shape, dtype))
                return _view(self._buffers[number % 2], packed)

    def _check_latest(self, forward: int) -> None:
        if forward != self._forward:
            raise RuntimeError(
                f"backward of forward pass {forward} after forward pass {self._forward} has begun: block inputs on the "
                "host are kept for one forward pass at a time, so call backward before the next one"
            )

    def _release(self, keep: int) -> None:
        """Frees sent inputs except the last `keep`; computing first waits until they have been copied."""
        while len(self._leaving) > keep:
            _, sent = self._leaving.pop(0)
            self.backend.wait(sent)

    def _fetch(self, away: _Away) -> None:
        """Starts bringing the input of a block back, into the buffer whose turn it is."""
        if away.number < 0:
            return
        if not self._buffers:
            size = self.host[0].nbytes
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.backend.device) for _ in range(2)]
        x, x_host = _view(self._buffers[away.number % 2], away), _view(self.host[away.number], away)
        self._coming[away.number] = self.backend.copy(x, x_host, self.backend.mark())


def _view(memory: Tensor, away: _Away) -> Tensor:
    return memory[: away.shape.numel() * away.dtype.itemsize].view(away.dtype).view(away.shape)
