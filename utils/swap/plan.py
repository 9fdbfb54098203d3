"""Which blocks stay on the device and how large the buffers are through which the others stream.

Of N blocks, max(N - S, ring) block-sized buffers of weights are on the device in all: the ring, and blocks that stay.
The copies of one training step are then 2 (N - buffers) blocks, whichever blocks stay.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from utils.swap.host_store import aligned
from wan.errors import InputError


@dataclass(frozen=True)
class SwapConfig:
    """How blocks are swapped. `weights_vram`, in bytes, says how many in place of --blocks_to_swap."""

    ring_blocks: int = 2
    weights_vram: int | None = None
    host_weights: str = "auto"  # one of host_store.MODES


@dataclass(frozen=True)
class WeightSizes:
    """A model's weights in bytes: the matrices of a block, what lies outside the blocks, what is too small to move."""

    blocks: int  # how many
    matrices: Sequence[int]  # of one block
    outside: int
    small: int

    @property
    def block(self) -> int:
        """One block's matrices."""
        return sum(map(aligned, self.matrices))


@dataclass(frozen=True)
class SwapPlan:
    """The numbers of the blocks that stream, and the buffers for their matrices: bytes of a slot -> how many."""

    streamed: tuple[int, ...] = ()
    slots: Mapping[int, int] = field(default_factory=dict)
    streams_outside: bool = False

    @property
    def slot_bytes(self) -> int:
        """The device memory of all slots."""
        return sum(size * count for size, count in self.slots.items())


def plan_swap(sizes: WeightSizes, blocks_to_swap: int, config: SwapConfig) -> SwapPlan:
    """The plan for `blocks_to_swap` of the blocks, or for weights_vram where it is given.

    InputError if that is too few bytes.
    """
    if config.weights_vram is not None:
        return _within_bytes(sizes, config.weights_vram)
    if not blocks_to_swap:
        return SwapPlan()
    ring = min(config.ring_blocks, sizes.blocks)
    staying = max(sizes.blocks - blocks_to_swap - ring, 0)
    slots = {size: ring * count for size, count in Counter(map(aligned, sizes.matrices)).items()}
    return SwapPlan(_evenly(sizes.blocks, staying), slots, blocks_to_swap == sizes.blocks)


def _within_bytes(sizes: WeightSizes, budget: int) -> SwapPlan:
    room = budget - sizes.small
    if room >= sizes.blocks * sizes.block + sizes.outside:
        return SwapPlan()
    ring = 2 * sizes.block
    staying = (room - sizes.outside - ring) // sizes.block
    if staying >= 0:
        left = room - sizes.outside - staying * sizes.block
        return SwapPlan(_evenly(sizes.blocks, staying), _slots(sizes, left), False)
    least = sum(Counter(map(aligned, sizes.matrices)))
    if room < least:
        raise InputError(
            f"--weights_vram {budget:,} bytes is too little: this model's weights need {sizes.small + least:,} at the "
            f"least, and {sizes.small + sizes.block:,} (one block) to be fast"
        )
    return SwapPlan(tuple(range(sizes.blocks)), _slots(sizes, room), True)


def _slots(sizes: WeightSizes, room: int) -> dict[int, int]:
    """Slots in the proportions of a block, in at most `room` bytes; two of a size first, so that copies overlap."""
    wanted = Counter(map(aligned, sizes.matrices))
    slots = dict.fromkeys(wanted, 1)
    room -= sum(slots)
    while fitting := [size for size in slots if size <= room]:
        scarcest = min(fitting, key=lambda size: (slots[size] >= 2, slots[size] / wanted[size], -size))
        slots[scarcest] += 1
        room -= scarcest
    return slots


def _evenly(blocks: int, staying: int) -> tuple[int, ...]:
    """The blocks that stream, with those that stay spread between them: computing one gives copies time."""
    streamed = blocks - staying
    return tuple((2 * i + 1) * blocks // (2 * streamed) for i in range(streamed))
