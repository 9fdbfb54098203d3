"""Where streamed weights wait on the host: in page-locked memory, in ordinary memory, or in the checkpoint file.

`pinned`: the device reads page-locked memory at full speed, without the host. `staged`: ordinary memory. `mapped`: the
file itself, of which the system caches what fits. From the latter two a thread copies through small page-locked
buffers.
"""

import mmap
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.swap.backend import CudaBackend, HostBackend
from utils.swap.host_memory import memlock_limit, page_locks_are_cheap, read_ahead, share_with_forks
from utils.swap.rounding import AS_THEY_ARE, Rounding
from utils.swap.worker_thread import WorkerThread
from wan.memory import available_bytes, check_room

MODES = ("auto", "pinned", "staged", "mapped")
# Some drivers refuse page locks above 2 GiB. A piece holds whole weights, since no copy may span two locks.
PIECE_BYTES = (1 << 30) - 1
STAGING_BYTES = 64 << 20
# For the system, Python, CUDA's libraries, data loaders.
_RESERVE_BYTES = 6 << 30
_PAGE = mmap.PAGESIZE
_ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class HostStore:
    """How the streamed weights are kept; its page locks last until close()."""

    mode: str
    bytes: int  # of RAM, not counting a file's own pages
    note: str = ""  # why the mode is not the one that was asked for
    locks: "LockedMemory | None" = None

    def close(self) -> None:
        """Unlocks the memory. The weights stay in it."""
        if self.locks is not None:
            self.locks.release()


def make_host_store(
    weights: Sequence[nn.Parameter],
    mode: str,
    backend: HostBackend | CudaBackend,
    mapped: bool,
    reserved: int = 0,
    rounding: Rounding = AS_THEY_ARE,
) -> HostStore:
    """Moves the weights to where `mode` keeps them; `mapped` says whether they are a file's own bytes so far.

    "auto" leaves `reserved` bytes of RAM for other uses. Where page-locking fails, what was locked is unlocked and the
    weights are staged. What `rounding` rounds cannot stay mapped. InputError if `mode` needs more memory than there is.
    """
    total = sum(map(rounding.stored_bytes, weights))
    # Weights that are in memory already are freed piece by piece as they are moved.
    available = available_bytes() + (0 if mapped else total)
    can_stay = mapped and not rounding.matrices
    if mode == "auto":
        mode = choose_mode(total, backend.page_locks, can_stay, available - reserved, page_locks_are_cheap())
    assert mode != "mapped" or can_stay, "checked against the file's dtype before the model was loaded"
    if mode != "mapped":
        advice = "use --host_weights mapped" if can_stay else "swap fewer blocks"
        check_room({f"--host_weights {mode}": total}, available, "RAM", advice)
    if mode == "pinned":
        return _page_locked(weights, total, backend, rounding)
    if mode == "staged":
        for weight in weights if mapped else rounding.matrices.intersection(weights):
            rounding.move(weight, host_memory(rounding.stored_bytes(weight), weight))
    return HostStore(mode, 0 if mode == "mapped" else total)


def host_memory(size: int, like: Tensor) -> Tensor:
    """uint8 [size], not page-locked, where `like` is: on the CPU, or on meta."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def choose_mode(total: int, page_locks: bool, mapped: bool, available: int, cheap: bool) -> str:
    """The mode for `total` bytes of weights, which depends on the device, the file, the free memory and the system."""
    fits = total + _RESERVE_BYTES <= available
    if page_locks and cheap and fits:
        return "pinned"
    # A CPU reads the file as fast as a copy of it.
    return "mapped" if mapped and not (page_locks and fits) else "staged"


class LockedMemory:
    """Regions of host memory that are page-locked in place, and unlocked before they are freed."""

    def __init__(self, backend: CudaBackend):
        self.backend = backend
        self.failed = False
        self._locked: list[Tensor] = []
        # The fallback where nobody calls release(). It holds the regions, so that none is freed while it is locked.
        self.release = weakref.finalize(self, _unlock_all, backend, self._locked)
        self.release.atexit = False

    def region(self, size: int) -> Tensor:
        """uint8 [>= size] on whole pages; after the first failure nothing more is locked."""
        room = torch.empty(size + 2 * _PAGE, dtype=torch.uint8)
        start = -room.data_ptr() % _PAGE
        region = room[start : start + -(-size // _PAGE) * _PAGE]
        if not self.failed and self.backend.page_lock(region):
            self._locked.append(region)
            share_with_forks(region, False)  # data loader workers have no use for it
        else:
            self.failed = True
        return region


def _unlock_all(backend: CudaBackend, regions: list[Tensor]) -> None:
    backend.drain()
    while regions:
        region = regions.pop()
        backend.page_unlock(region)
        share_with_forks(region, True)


def _page_locked(weights: Sequence[nn.Parameter], total: int, backend: CudaBackend, rounding: Rounding) -> HostStore:
    locks = LockedMemory(backend)
    for piece in _pieces(weights, rounding):
        for weight in piece:
            read_ahead(weight.data)
        _move(piece, locks.region(sum(aligned(rounding.stored_bytes(weight)) for weight in piece)), rounding)
    if not locks.failed:
        return HostStore("pinned", total, locks=locks)
    locks.release()
    limit = memlock_limit()
    reason = f" (the limit of `ulimit -l` is {limit:,} bytes)" if limit < total else ""
    return HostStore("staged", total, f"page-locking failed{reason}")


def _pieces(weights: Sequence[nn.Parameter], rounding: Rounding = AS_THEY_ARE) -> list[list[nn.Parameter]]:
    """Successive weights in groups of at most PIECE_BYTES."""
    groups, room = [], 0
    for weight in weights:
        size = aligned(rounding.stored_bytes(weight))
        if size > room:
            groups.append([])
            room = PIECE_BYTES
        groups[-1].append(weight)
        room -= size
    return groups


def aligned(size: int) -> int:
    """`size` rounded up to where the next weight may begin."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _move(weights: Sequence[nn.Parameter], region: Tensor, rounding: Rounding) -> None:
    """Puts the weights into `region`, one after the other."""
    start = 0
    for weight in weights:
        rounding.move(weight, region[start:])
        start += aligned(weight.nbytes)


def as_weight(memory: Tensor, weight: Tensor) -> Tensor:
    """The beginning of `memory` (uint8) as a tensor of the dtype and shape of `weight`."""
    return memory[: weight.nbytes].view(weight.dtype).view(weight.shape)


class BackgroundCopies:
    """A link from ordinary memory, or a mapped file, to a device: a thread does what would make the host wait.

    It fills two small page-locked buffers in turn, from which a GPU reads; for the CPU it copies directly. The methods
    are those of a backend; an event is the thread's promise of one.
    """

    def __init__(self, backend: HostBackend | CudaBackend):
        self.backend = backend
        self._buffers = [backend.host_buffer(STAGING_BYTES) for _ in range(2)] if backend.page_locks else []
        self._read = [backend.mark() for _ in self._buffers]  # when the device has read each
        self._turn = 0
        self._thread = WorkerThread("copies", backend.begin_thread)
        self._ahead = WorkerThread("read-ahead")

    def copy(self, target: Tensor, source: Tensor, after) -> Future:
        """Copies in the background, once event `after` has passed on the device."""
        # Page faults of the copy itself would read a file in small pieces, one after the other.
        self._ahead.submit(read_ahead, source)
        return self._thread.submit(self._copy if self._buffers else self.backend.copy, target, source, after)

    def wait(self, copied: Future) -> None:
        """Computing waits for a copy; the host waits only until it is on its way."""
        self.backend.wait(copied.result())

    def drain(self) -> None:
        """The host waits for all copies; none can follow. The garbage collector may call this anywhere."""
        self._ahead.end(drop=True)
        self._thread.end()
        self.backend.drain()

    def _copy(self, target: Tensor, source: Tensor, after):
        target, source = (tensor.view(-1).view(torch.uint8) for tensor in (target, source))
        done = after
        for start in range(0, source.nbytes, STAGING_BYTES):
            piece = source[start : start + STAGING_BYTES]
            buffer = self._buffers[self._turn][: piece.nbytes]
            self.backend.finish(self._read[self._turn])
            buffer.copy_(piece)
            done = self.backend.copy(target[start : start + piece.nbytes], buffer, done)
            self._read[self._turn] = done
            self._turn = 1 - self._turn
        return done
