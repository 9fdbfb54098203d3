"""Streams weights from the host to a device just ahead of their use, through slots that are allocated once.

A layer asks for its weight with use(), in forward and again in backward, and keeps nothing: so autograd holds nothing
that a later copy could overwrite. A weight is valid until the next use(). The invariants:

1. Copies go one way, host to device, on one stream; computing has a stream of its own. The host waits for neither.
2. A slot has two events. `arrived`: its copy is complete; computing waits for it before the weight is read for the
   first time. `free`: whoever used the slot last has been computed; a copy waits for it before it overwrites the slot.
3. A slot gets its `free` event when the next weight is asked for, since only then has its user been enqueued.
4. Which weights give up their slots, and after which use, is decided by evictions() when a pass begins.
5. Vacant slots are filled at once, with the weights that are needed next. So copies run ahead of computing.

An example: three weights A, B, C and two slots; forward uses A B C and backward C B A, as an earlier pass has shown.

    begin_pass          future: A B C C B A, then A B C ... of the next pass. The slots hold A and B from the pass
                        before. evictions(): A goes after its first use, C after its second, B not at all.
    use(A)              Already there. Both slots are taken, so nothing is fetched.
    use(B)              Whatever used A has been enqueued: slot 1 is marked free, and A goes. C is fetched into slot
                        1: the copy waits on the device for `free`, and runs while B computes.
    use(C)              Slot 2 is marked free, and B stays. Computing waits for `arrived` of slot 1.
    use(C), backward    Still there: no copy.
    use(B), backward    C goes, and A is fetched into slot 1 while B computes.
    use(A), backward    Computing waits for `arrived`. A and B stay for the next pass.

So six uses take two copies: twice the one weight that has no slot. While an order is learned (in the first pass, or
where a pass differs from the last one of its kind), a weight that is missing takes the slot that was used longest ago,
and computing waits for its copy: a miss. Such a copy too waits for the slot's `free` event.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.selective_finetune import SlicedMatrix
from utils.slices.overlay import Overlay
from utils.swap.backend import CudaBackend, HostBackend
from utils.swap.host_store import BackgroundCopies, HostStore, aligned, as_weight
from utils.swap.order import WeightOrder, evictions


@dataclass(frozen=True, eq=False)
class StreamedWeight:
    """A weight on the host; the slice of it that trains and the overlay that goes into each copy, if there are any.

    `in_use` makes other values of the copy, at each use, and puts slice and overlay into these itself.
    """

    host: Tensor
    matrix: SlicedMatrix | None = None
    overlay: Overlay | None = None
    in_use: Callable[[Tensor], Tensor] | None = None


@dataclass(eq=False)
class _Slot:
    memory: Tensor  # uint8, on the device
    free: object  # event: whoever used it last has been computed
    holds: int | None = None
    arrived: object = None  # event: the copy is complete
    arriving: bool = False  # computing has not waited for `arrived` yet
    version: int | None = None  # of the slice's values in it
    last_used: int = 0


@dataclass(eq=False)
class _Lane:
    """The slots of one size, and what this pass has planned for them."""

    slots: list[_Slot]
    positions: Sequence[int] = ()  # of the weights of this size, in the order's future
    ahead: int = 0  # how many of these are on the device or behind us
    gives_up: frozenset[int] = frozenset()  # positions after which a slot goes to the next weight

    def vacant(self) -> _Slot | None:
        return next((slot for slot in self.slots if slot.holds is None), None)


@dataclass
class Traffic:
    """What was copied to the device so far; `misses` are copies that were not made ahead."""

    bytes: int = 0
    copies: int = 0
    misses: int = 0


class WaitingTime:
    """For how long computing has waited for weights, by the device's own clock; the host waits for nothing here."""

    def __init__(self, backend: HostBackend | CudaBackend):
        self._backend = backend
        self._waits: list[tuple[object, object]] = []  # where each began and ended

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, computing is told to wait for a copy."""
        began = self._backend.moment()
        yield
        self._waits.append((began, self._backend.moment()))

    def take(self) -> float:
        """Seconds since the last call; a wait that the device has not come to is left to a later one."""
        measured = [(wait, self._backend.seconds(*wait)) for wait in self._waits]
        self._waits = [wait for wait, seconds in measured if seconds is None]
        return sum(seconds for _, seconds in measured if seconds is not None)


class WeightStreamer:
    """Slots on the device (bytes -> count), and the weights that use() brings there in the order that passes repeat."""

    def __init__(
        self,
        weights: Sequence[StreamedWeight],
        slots: Mapping[int, int],
        backend: HostBackend | CudaBackend,
        link: HostBackend | CudaBackend | BackgroundCopies,
        version: Callable[[], int],
        store: HostStore | None = None,
    ):
        self.weights = weights
        self.backend = backend
        self.link = link
        self.version = version  # of the slice's values in use
        self.store = store  # which the copies read: it is closed after the last of them
        self.order = WeightOrder()
        self.traffic = Traffic()
        self._waiting: WaitingTime | None = None
        self._lanes = {size: _Lane(of_size) for size, of_size in _allocate(slots, backend).items()}
        self._lane_of = [
            self._lanes[min(size for size in slots if size >= aligned(weight.host.nbytes))] for weight in weights
        ]
        self._slot_of: dict[int, _Slot] = {}
        self._in_use: _Slot | None = None
        self._uses = 0
        # Copies for a pass that never comes would otherwise land in memory that is someone else's by then.
        self._drain = weakref.finalize(self, link.drain)  # the fallback for a streamer that nobody closes
        self._drain.atexit = False

    def close(self) -> None:
        """Waits for the copies that were started, then unlocks the host's memory; no use() may follow."""
        self._drain()
        if self.store is not None:
            self.store.close()
        # Whoever still holds the streamer does not hold the memory.
        self.weights, self._in_use = (), None
        self._lanes.clear()
        self._lane_of.clear()
        self._slot_of.clear()

    def time_waits(self) -> WaitingTime:
        """Measures from now on for how long computing waits; somebody has to take() it again and again."""
        self._waiting = WaitingTime(self.backend)
        return self._waiting

    def begin_pass(self, kind: Hashable) -> None:
        """A forward pass begins; passes of one kind use the weights in the same order."""
        self._leave_slot()
        self.order.begin(kind)
        for lane in self._lanes.values():
            lane.positions = [at for at, weight in enumerate(self.order.future) if self._lane_of[weight] is lane]
            lane.ahead = 0
            uses = [self.order.future[at] for at in lane.positions]
            held = {slot.holds for slot in lane.slots if slot.holds is not None}
            unused, given_up = evictions(uses, held, len(lane.slots))
            lane.gives_up = frozenset(lane.positions[number] for number in given_up)
            for weight in unused:
                self._vacate(self._slot_of[weight])

    def use(self, weight: int) -> Tensor:
        """The weight on the device, with the slice's values in use; valid until the next call."""
        self._leave_slot()
        self.order.used(weight)
        if weight not in self._slot_of:
            self._load_late(weight)
        self._in_use = slot = self._slot_of[weight]
        self._uses += 1
        slot.last_used = self._uses
        self._prefetch()
        if slot.arriving:
            with self._waiting.measured() if self._waiting else nullcontext():
                self.link.wait(slot.arrived)
            slot.arriving = False
            if overlay := self.weights[weight].overlay:
                overlay.write(as_weight(slot.memory, self.weights[weight].host))
        return self._with_slice(slot)

    def _leave_slot(self) -> None:
        # The one user of the last weight has been enqueued by now, since each asks for its weight when it starts.
        if self._in_use is None:
            return
        self._in_use.free = self.backend.mark()
        if not self.order.learning and self.order.done - 1 in self._lane_of[self._in_use.holds].gives_up:
            self._vacate(self._in_use)
        self._in_use = None

    def _with_slice(self, slot: _Slot) -> Tensor:
        entry = self.weights[slot.holds]
        weight = as_weight(slot.memory, entry.host)
        # Also where the weight stayed here since before an optimizer step, or a pass at another strength.
        if entry.matrix is not None and slot.version != self.version():
            entry.matrix.write(weight)
            slot.version = self.version()
        return weight if entry.in_use is None else entry.in_use(weight)

    def _load_late(self, weight: int) -> None:
        """Brings a weight that was not foreseen, into the slot that was used longest ago."""
        self.traffic.misses += 1
        lane = self._lane_of[weight]
        slot = lane.vacant()
        if slot is None:
            slot = min(lane.slots, key=lambda slot: slot.last_used)
            self._vacate(slot)
            lane.ahead = bisect_left(lane.positions, self.order.done)
        self._load(weight, slot)

    def _prefetch(self) -> None:
        """Fills vacant slots with the weights that are needed next."""
        while not self.order.learning:
            missing = [
                (at, slot)
                for lane in self._lanes.values()
                if (slot := lane.vacant()) and (at := self._next_missing(lane)) is not None
            ]
            if not missing:
                break
            at, slot = min(missing, key=lambda pair: pair[0])
            self._load(self.order.future[at], slot)

    def _next_missing(self, lane: _Lane) -> int | None:
        """The position of the lane's next use of a weight that is not on the device."""
        while lane.ahead < len(lane.positions):
            at = lane.positions[lane.ahead]
            if at >= self.order.done and self.order.future[at] not in self._slot_of:
                return at
            lane.ahead += 1
        return None

    def _vacate(self, slot: _Slot) -> None:
        del self._slot_of[slot.holds]
        slot.holds = None

    def _load(self, weight: int, slot: _Slot) -> None:
        self._slot_of[weight] = slot
        slot.holds, slot.version, slot.arriving = weight, None, True
        host = self.weights[weight].host
        slot.arrived = self.link.copy(as_weight(slot.memory, host), host, slot.free)
        self.traffic.copies += 1
        self.traffic.bytes += host.nbytes


def _allocate(slots: Mapping[int, int], backend: HostBackend | CudaBackend) -> dict[int, list[_Slot]]:
    """All slots in one allocation, which neither grows nor shrinks, so that it cannot be fragmented."""
    arena = torch.empty(sum(size * n for size, n in slots.items()), dtype=torch.uint8, device=backend.device)
    free = backend.mark()
    allocated, start = {}, 0
    for size, count in slots.items():
        allocated[size] = [_Slot(arena[start + i * size : start + (i + 1) * size], free) for i in range(count)]
        start += count * size
    return allocated
