"""How long computing waits for weights, on a clock: Wan 14B's matrices in their order, at given speeds.

A stand-in for the measurement on a GPU (benchmarks/gpu.py). Time is counted in copies of one block.
"""

import pytest
import torch

from utils.swap.plan import SwapConfig, WeightSizes, plan_swap
from utils.swap.streamer import StreamedWeight, WeightStreamer

BLOCKS = 40
SQUARE, TALL = 2 * 5120 * 5120, 2 * 5120 * 13824
SIZES = WeightSizes(BLOCKS, [SQUARE] * 8 + [TALL] * 2, outside=464_912_384, small=11_000_000)


class Clock:
    """A backend whose events are moments; one block is copied in one unit of time."""

    def __init__(self):
        self.device = torch.device("meta")
        self.now = self.copies_end = self.stalled = 0.0

    def mark(self):
        return self.now

    def copy(self, target, source, after):
        self.copies_end = max(self.copies_end, after) + source.nbytes / SIZES.block
        return self.copies_end

    def wait(self, event):
        self.stalled += max(event - self.now, 0)
        self.now = max(event, self.now)

    def drain(self):
        pass


def third_step(swapped, ring, forward):
    """Its length, and how much of it was waited; computing a block forward takes `forward`, in backward twice that."""
    plan, clock = plan_swap(SIZES, SwapConfig(swapped, ring)), Clock()
    streamed = [size for _ in plan.streamed for size in SIZES.matrices]
    weights = [StreamedWeight(torch.empty(size, dtype=torch.uint8, device="meta")) for size in streamed]
    streamer = WeightStreamer(weights, plan.slots, clock, clock, version=lambda: 0)
    first = {block: 10 * place for place, block in enumerate(plan.streamed)}

    def compute(block, matrices):
        for matrix in matrices:
            if block in first:
                streamer.use(first[block] + matrix)
            clock.now += forward * SIZES.matrices[matrix] / SIZES.block

    for _ in range(3):
        began, stalled = clock.now, clock.stalled
        streamer.begin_pass("training")
        for block in range(BLOCKS):
            compute(block, range(10))
        for block in reversed(range(BLOCKS)):
            compute(block, [*range(10), 9, 8, 7, 4, 3, 2, 1, 0])  # the text's keys and values need no gradient
    return clock.now - began, clock.stalled - stalled


CASES = [(24, 1), (24, 2), (38, 2), (39, 1), (40, 2)]


@pytest.mark.parametrize(("swapped", "ring"), CASES)
def test_computing_does_not_wait_where_it_takes_longer_than_copying(swapped, ring):
    length, stalled = third_step(swapped, ring, forward=1.05)
    assert stalled < 0.001 * length


@pytest.mark.parametrize(("swapped", "ring"), CASES)
def test_where_copying_takes_longer_a_step_takes_little_more(swapped, ring):
    length, _ = third_step(swapped, ring, forward=0.2)
    copied = 2 * (BLOCKS - max(BLOCKS - swapped, ring))
    assert copied <= length < 1.06 * copied
