"""Which blocks stay on the device, and how large the buffers are through which the others stream.

Of N blocks of which S are swapped, the device holds max(N - S, ring) block-sized buffers of weights in all: the ring,
and the blocks that stay. One training step then copies 2 (N - buffers) blocks, whichever blocks stay.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from utils.swap.host_store import aligned
from wan.errors import InputError


@dataclass(frozen=True)
class SwapConfig:
    """How a model's weights are kept: how many blocks are swapped, and how.

    So many of them, or as many as leave `weights_vram` bytes of weights on the device.
    """

    blocks_to_swap: int = 0
    ring_blocks: int = 2
    weights_vram: int | None = None
    host_weights: str = "auto"  # one of host_store.MODES
    fp8: str = ""  # "plain" or "scaled": the block matrices are kept in float8, swapped or not


@dataclass(frozen=True)
class WeightSizes:
    """A model's weights in bytes: the matrices of a block, those outside the blocks, and what is too small to move."""

    blocks: int  # how many
    matrices: Sequence[int]  # of one block
    outside: int
    small: int

    @property
    def block(self) -> int:
        """One block's matrices, as slots hold them."""
        return sum(map(aligned, self.matrices))

    @property
    def all(self) -> int:
        return self.small + self.outside + self.blocks * sum(self.matrices)


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


def plan_swap(sizes: WeightSizes, swap: SwapConfig) -> SwapPlan:
    """The plan for weights of these sizes; InputError if weights_vram is too small or there are not so many blocks."""
    if swap.weights_vram is not None:
        return _within_bytes(sizes, swap.weights_vram)
    if swap.blocks_to_swap > sizes.blocks:
        raise InputError(f"--blocks_to_swap {swap.blocks_to_swap}: this model has {sizes.blocks} blocks")
    if not swap.blocks_to_swap:
        return SwapPlan()
    ring = min(swap.ring_blocks, sizes.blocks)
    staying = max(sizes.blocks - swap.blocks_to_swap - ring, 0)
    slots = {size: ring * count for size, count in Counter(map(aligned, sizes.matrices)).items()}
    return SwapPlan(_evenly(sizes.blocks, staying), slots, swap.blocks_to_swap == sizes.blocks)


def streamed_bytes(sizes: WeightSizes, plan: SwapPlan) -> int:
    """What the host keeps of the weights."""
    return len(plan.streamed) * sum(sizes.matrices) + (sizes.outside if plan.streams_outside else 0)


def device_bytes(sizes: WeightSizes, plan: SwapPlan) -> int:
    """What the weights take on the device: those that stay, and the slots."""
    return sizes.all - streamed_bytes(sizes, plan) + plan.slot_bytes


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
            f"--weights_vram {budget:,} bytes is too little: this model needs at least {sizes.small + least:,}, and "
            f"{sizes.small + sizes.block:,} (one block) to be fast"
        )
    return SwapPlan(tuple(range(sizes.blocks)), _slots(sizes, room), True)


def _slots(sizes: WeightSizes, room: int) -> dict[int, int]:
    """Slots in the proportions of a block, in at most `room` bytes; first two of each size, so that copies overlap."""
    wanted = Counter(map(aligned, sizes.matrices))
    slots = dict.fromkeys(wanted, 1)
    room -= sum(slots)
    while fitting := [size for size in slots if size <= room]:
        scarcest = min(fitting, key=lambda size: (slots[size] >= 2, slots[size] / wanted[size], -size))
        slots[scarcest] += 1
        room -= scarcest
    return slots


def _evenly(blocks: int, staying: int) -> tuple[int, ...]:
    """The blocks that stream, with those that stay spread between them: computing one gives the copies time."""
    streamed = blocks - staying
    return tuple((2 * i + 1) * blocks // (2 * streamed) for i in range(streamed))
