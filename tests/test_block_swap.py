"""Streamed blocks against resident ones: the same bits for every budget and timing, and no byte copied twice."""

import pytest
import torch
from fake_device import TIMINGS, FakeDevice
from torch import nn

from utils.block_swap import checkpoint_blocks, place_model, weight_sizes
from utils.selective_finetune import attach_slice
from utils.swap_plan import SwapConfig
from utils.weight_streamer import WeightStreamer
from wan.configs import WanConfig
from wan.model import WanModel

BLOCKS = 5
TINY = WanConfig("t2v", 48, 96, 4, BLOCKS, 4, 4, text_dim=24, freq_dim=32, text_len=7)


def tiny_model():
    torch.manual_seed(0)
    model = WanModel(TINY).to(torch.bfloat16).requires_grad_(False)
    nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def loss_of(model, seed):
    draw = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, 2, 4, 1, 4, 4, generator=draw)
    context = [torch.randn(n, 24, generator=draw) for n in (3, 7)]
    return (model(x, torch.tensor([300.0, 800.0]), context) - target).square().mean()


class Run:
    """A tiny training run, its blocks on a fake device."""

    def __init__(self, backend=None, swapped=0, checkpointed=True, ff="0.02", **swap):
        self.backend = backend or FakeDevice()
        self.model = tiny_model()
        self.trained = attach_slice(self.model, ff, 3)
        if checkpointed:
            checkpoint_blocks(self.model)
        config = SwapConfig(**swap)
        self.placement = place_model(self.model, "cpu", swapped, self.trained, config, backend=self.backend)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-2)

    def step(self, seed, accumulate=1):
        losses = []
        for part in range(accumulate):
            loss = loss_of(self.model, 10 * seed + part)
            loss.backward()
            losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trained.write_back()
        return losses

    def train(self, steps=4):
        losses = [self.step(seed) for seed in range(steps)]
        return losses, [parameter.detach().clone() for parameter in self.trained.parameters()]

    def traffic(self, action):
        """Bytes copied and misses during `action`."""
        before = self.placement.streamer.traffic
        copied, misses = before.bytes, before.misses
        action()
        return before.bytes - copied, before.misses - misses


def same(run, other):
    return run[0] == other[0] and all(torch.equal(a, b) for a, b in zip(run[1], other[1], strict=True))


@pytest.fixture(scope="module")
def resident():
    return {checkpointed: Run(checkpointed=checkpointed).train() for checkpointed in (False, True)}


SIZES = weight_sizes(tiny_model())
BUDGETS = {
    "0.3 blocks": {"weights_vram": SIZES.small + int(0.3 * SIZES.block)},
    "0.7 blocks": {"weights_vram": SIZES.small + int(0.7 * SIZES.block)},
    "1 block": {"swapped": BLOCKS, "ring_blocks": 1},
    "1.5 blocks": {"weights_vram": SIZES.small + int(1.5 * SIZES.block)},
    "2 blocks": {"swapped": BLOCKS},
    "N-1 blocks": {"swapped": 1},
    "N blocks": {"swapped": BLOCKS, "ring_blocks": BLOCKS},
    "all in bytes": {"weights_vram": SIZES.small + SIZES.outside + BLOCKS * SIZES.block},
}


@pytest.fixture(autouse=True)
def uses_are_told(monkeypatch):
    """The fake device learns what computing reads, so that it notices a copy into it."""
    use = WeightStreamer.use

    def told(streamer, weight):
        used = use(streamer, weight)
        streamer.backend.used(used)
        return used

    monkeypatch.setattr(WeightStreamer, "use", told)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "not checkpointed"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_and_timing_trains_bit_for_bit_like_a_resident_model(budget, timing, checkpointed, resident):
    run = Run(FakeDevice(timing), checkpointed=checkpointed, **BUDGETS[budget])
    assert same(run.train(), resident[checkpointed])


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("locks", [0, 10**6], ids=["no page locks", "page locks"])
def test_pinned_and_staged_stores_train_like_a_resident_model(timing, locks, resident):
    run = Run(FakeDevice(timing, page_locks=True, locks=locks), BLOCKS, host_weights="pinned")
    assert same(run.train(), resident[True])
    assert run.placement.host_mode == ("pinned" if locks else "staged")


@pytest.mark.parametrize(("swapped", "ring"), [(1, 2), (2, 2), (3, 1), (4, 1), (4, 2), (3, 3)])
def test_a_step_copies_twice_what_does_not_fit_and_nothing_back(swapped, ring):
    run = Run(FakeDevice("random"), swapped, ring_blocks=ring)
    buffers = max(BLOCKS - swapped, ring)
    first, _ = run.traffic(lambda: run.step(0))
    assert first == (2 * (BLOCKS - buffers) + min(buffers, ring)) * SIZES.block
    for seed in (1, 2, 3):
        assert run.traffic(lambda seed=seed: run.step(seed)) == (2 * (BLOCKS - buffers) * SIZES.block, 0)
    assert sum(size for _, size in run.backend.copied) == run.placement.streamer.traffic.bytes


def test_with_all_blocks_what_lies_outside_streams_too_at_the_price_of_two_matrices():
    run = Run(FakeDevice("random"), BLOCKS)
    run.train(3)
    copied, misses = run.traffic(lambda: run.step(4))
    # Used once a step, it passes through two slots, whose matrices have to come again.
    passing = SIZES.outside + 2 * 48 * 48 * 2
    assert (copied, misses) == (2 * (BLOCKS - 2) * SIZES.block + passing, 0)
