"""Streams weights from the host to a device just ahead of their use, through slots that are allocated once.

A weight is asked for each time it is used, in forward and again in backward, and never kept: so autograd holds nothing
that a later copy could overwrite. Copies go one way, on one stream; each slot has an event for "the copy has arrived"
and one for "its last user has been computed", and the host waits for neither.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.host_store import HostStore, StagedCopies, aligned, as_weight
from utils.selective_finetune import SlicedMatrix
from utils.swap_backend import CudaBackend, HostBackend
from utils.weight_order import WeightOrder


@dataclass(frozen=True, eq=False)
class StreamedWeight:
    """A weight whose master is on the host, and the slice in it that trains, if any."""

    host: Tensor
    matrix: SlicedMatrix | None = None


@dataclass(eq=False)
class _Slot:
    memory: Tensor  # uint8, on the device
    free: object  # event: whoever used it last has been computed
    holds: int | None = None
    arrived: object = None  # event: the copy is complete
    arriving: bool = False  # computing has not waited for `arrived` yet
    version: int | None = None  # of the slice's values in it
    last_used: int = 0


@dataclass
class Traffic:
    """What was copied to the device so far; `misses` are copies that were not made ahead."""

    bytes: int = 0
    copies: int = 0
    misses: int = 0


class WeightStreamer:
    """Slots on the device (bytes -> count) for weights that use() brings there, in the order that passes repeat."""

    def __init__(
        self,
        weights: Sequence[StreamedWeight],
        slots: Mapping[int, int],
        backend: HostBackend | CudaBackend,
        link: HostBackend | CudaBackend | StagedCopies,
        version: Callable[[], int],
        store: HostStore | None = None,
    ):
        self.weights = weights
        self.backend = backend
        self.link = link
        self.version = version  # of the slice's values in use
        self.store = store  # its page locks last as long as the streamer
        self.order = WeightOrder()
        self.traffic = Traffic()
        self._slots = _allocate(slots, backend)
        self._size_of = [min(size for size in slots if size >= aligned(w.host.nbytes)) for w in weights]
        self._slot_of: dict[int, _Slot] = {}
        self._in_use: _Slot | None = None
        self._uses = 0
        self._positions: dict[int, list[int]] = {}  # in the order's future, of the weights of each slot size
        self._ahead: dict[int, int] = {}  # how many of them are known to be on the device

    def begin_pass(self, kind: Hashable) -> None:
        """A forward pass begins; those of one kind use the weights in one order."""
        self.order.begin(kind)
        self._positions = {size: [] for size in self._slots}
        for position, weight in enumerate(self.order.future):
            self._positions[self._size_of[weight]].append(position)
        self._ahead = dict.fromkeys(self._slots, 0)

    def use(self, weight: int) -> Tensor:
        """The weight on the device, with the slice's values in use, until the next call."""
        self._leave_slot()
        self.order.used(weight)
        if weight not in self._slot_of:
            self.traffic.misses += 1
            self._load(weight, self._farthest(self._size_of[weight]))
            self._ahead = {size: bisect_left(self._positions[size], self.order.done) for size in self._slots}
        self._in_use = slot = self._slot_of[weight]
        self._uses += 1
        slot.last_used = self._uses
        self._prefetch()
        if slot.arriving:
            self.link.wait(slot.arrived)
            slot.arriving = False
        return self._with_slice(slot)

    def _leave_slot(self) -> None:
        # The one user of the last weight has been enqueued by now, since each asks for its weight when it starts.
        if self._in_use is not None:
            self._in_use.free = self.backend.mark()
            self._in_use = None

    def _with_slice(self, slot: _Slot) -> Tensor:
        entry = self.weights[slot.holds]
        weight = as_weight(slot.memory, entry.host)
        # Also where the weight stayed here since before an optimizer step, or a pass at another strength.
        if entry.matrix is not None and slot.version != self.version():
            entry.matrix.write(weight)
            slot.version = self.version()
        return weight

    def _prefetch(self) -> None:
        """Copies ahead, in the order of use, as far as slots hold nothing that is needed sooner."""
        sizes = set() if self.order.learning else set(self._slots)
        while missing := {size: at for size in sizes if (at := self._next_missing(size)) is not None}:
            size = min(missing, key=missing.get)
            slot = self._farthest(size)
            if slot is None or self._needed_at(slot) < missing[size]:
                sizes.remove(size)
            else:
                self._load(self.order.future[missing[size]], slot)

    def _next_missing(self, size: int) -> int | None:
        """The position of the next use of a weight of this slot size that is not on the device."""
        positions, at = self._positions[size], self._ahead[size]
        while at < len(positions) and (
            positions[at] < self.order.done or self.order.future[positions[at]] in self._slot_of
        ):
            at += 1
        self._ahead[size] = at
        return positions[at] if at < len(positions) else None

    def _farthest(self, size: int) -> _Slot | None:
        """The slot, not in use, whose weight is needed last (Belady 1966); what was used longest ago, when learning."""
        slots = [slot for slot in self._slots[size] if slot is not self._in_use]
        if self.order.learning:
            return min(slots, key=lambda slot: slot.last_used, default=None)
        return max(slots, key=self._needed_at, default=None)

    def _needed_at(self, slot: _Slot) -> float:
        return float("inf") if slot.holds is None else self.order.next_use(slot.holds)

    def _load(self, weight: int, slot: _Slot) -> None:
        self._slot_of.pop(slot.holds, None)
        self._slot_of[weight] = slot
        slot.holds, slot.version, slot.arriving = weight, None, True
        host = self.weights[weight].host
        slot.arrived = self.link.copy(as_weight(slot.memory, host), host, slot.free)
        self.traffic.copies += 1
        self.traffic.bytes += host.nbytes


def _allocate(slots: Mapping[int, int], backend: HostBackend | CudaBackend) -> dict[int, list[_Slot]]:
    """All slots in one allocation, which is never freed or grown: nothing can fragment it."""
    arena = torch.empty(sum(size * n for size, n in slots.items()), dtype=torch.uint8, device=backend.device)
    free = backend.mark()
    allocated, start = {}, 0
    for size, count in slots.items():
        allocated[size] = [_Slot(arena[start + i * size : start + (i + 1) * size], free) for i in range(count)]
        start += count * size
    return allocated
