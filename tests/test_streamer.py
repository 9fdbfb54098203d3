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


def timed_pass(streamer, device):
    """One training pass in which each use computes for a second."""
    streamer.begin_pass("training")
    for weight in (A, B, C, C, B, A):
        device.used(streamer.use(weight), seconds=1.0)


@pytest.mark.parametrize("timing", TIMINGS)
def test_computing_waits_for_what_a_copy_takes_longer_than_the_use_beside_it(timing):
    device = FakeDevice(timing)
    weights = [StreamedWeight(torch.ones(64)) for _ in range(3)]
    streamer = WeightStreamer(weights, {256: 2}, device, device, version=lambda: 0)
    for _ in range(2):
        timed_pass(streamer, device)
    waiting, began, device.copy_seconds = streamer.time_waits(), device.now, 3.0
    timed_pass(streamer, device)
    # C is copied from 1 s to 4 s and needed at 2 s, A from 6 s to 9 s and needed at 7 s.
    assert (waiting.take(), device.now - began) == (2 + 2, 10)
    assert waiting.take() == 0


def test_waits_that_the_device_has_not_come_to_are_told_later():
    device = FakeDevice()
    streamer = WeightStreamer([StreamedWeight(torch.ones(64))] * 3, {256: 2}, device, device, version=lambda: 0)
    waiting, device.copy_seconds, device.behind = streamer.time_waits(), 3.0, True
    timed_pass(streamer, device)
    assert waiting.take() == 0
    device.behind = False
    # The first pass foresees nothing: A, B, C and A again are copied when the host asks for them, which is while the
    # device still computes with the weight before, if there is one.
    assert waiting.take() == 3 + 2 + 2 + 2
