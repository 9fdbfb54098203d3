"""The example in the streamer's docstring: three weights, two slots."""

import pytest
import torch
from fake_device import TIMINGS, FakeDevice

from utils.swap.streamer import StreamedWeight, WeightStreamer

A, B, C = range(3)


@pytest.mark.parametrize("timing", TIMINGS)
def test_three_weights_pass_through_two_slots_as_in_the_example(timing):
    device = FakeDevice(timing)
    weights = [StreamedWeight(torch.full((64,), float(number))) for number in range(3)]
    streamer = WeightStreamer(weights, {256: 2}, device, device, version=lambda: 0)
    for _ in range(3):
        streamer.begin_pass("training")
        copies = []
        for weight in (A, B, C, C, B, A):
            before = streamer.traffic.copies
            used = streamer.use(weight)
            assert torch.all(used == weight)
            device.used(used)
            copies.append(streamer.traffic.copies - before)
    assert copies == [0, 1, 0, 0, 1, 0]
    assert streamer.traffic.misses == 4  # all in the first pass


def test_a_closed_streamer_has_made_its_copies():
    device = FakeDevice("lazy")
    weights = [StreamedWeight(torch.ones(64)), StreamedWeight(torch.ones(64))]
    streamer = WeightStreamer(weights, {256: 1}, device, device, version=lambda: 0)
    for _ in range(2):
        streamer.begin_pass("no grad")
        for weight in (0, 1):
            streamer.use(weight)
    streamer.begin_pass("no grad")
    streamer.close()
    assert device.queue == []
