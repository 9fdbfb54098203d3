"""A model that leaves its device and comes back trains on as if it had stayed; meanwhile another one is there."""

from dataclasses import replace

import pytest
import torch
from fake_device import FakeDevice
from test_block_swap import BLOCKS, SIZES, loss_of, tiny_model

from utils.selective_finetune import attach_slice, slice_units
from utils.slices.overlay import Overlay
from utils.swap.order import WeightOrder
from utils.swap.placement import LoadedWeights, checkpoint_blocks, place_model
from utils.swap.plan import SwapConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SWAPS = {
    "all resident": SwapConfig(),
    "half": SwapConfig(BLOCKS // 2),
    "all": SwapConfig(BLOCKS, ring_blocks=1),
    "bytes": SwapConfig(weights_vram=SIZES.small + int(0.7 * SIZES.block)),
}


class Expert:
    """A tiny model with a slice, which can be on a device or not."""

    def __init__(self, seed, swap, backend, mapped=True, host_weights="pinned", overlaid=False):
        torch.manual_seed(seed)
        self.model = tiny_model()
        for parameter in self.model.parameters():
            parameter.data = parameter.data + 0.01 * seed
        linear = self.model.blocks[0].ffn[0]
        units = slice_units("blocks.0.ffn.0.weight", linear.weight.shape, "0.02", 7)
        overlays = {linear: Overlay(((units, torch.ones(units.count).bfloat16()),))} if overlaid else {}
        self.trained = attach_slice(self.model, "0.02", 1)
        checkpoint_blocks(self.model)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-2)
        self.host = {name: parameter.data for name, parameter in self.model.named_parameters()}
        self.bytes = {name: value.clone() for name, value in self.host.items()}
        self.loaded = LoadedWeights(mapped, overlays, returns=True, order=WeightOrder())
        self.where = (torch.device("cpu"), replace(swap, host_weights=host_weights), self.trained)
        self.backend, self.seed = backend, seed

    def placed(self):
        return place_model(self.model, *self.where, self.loaded, self.backend)

    def steps(self, numbers):
        losses = []
        for number in numbers:
            loss = loss_of(self.model, 10 * number + self.seed)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.trained.write_back()
            losses.append(loss.item())
        return losses


def alone(seed, swap, **more):
    expert = Expert(seed, swap, FakeDevice(), **more)
    with expert.placed():
        losses = expert.steps(range(4))
    return losses, values(expert)


def values(expert):
    return {name: value.detach().clone() for name, value in expert.trained.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("swap", "way"),
    [
        ("all resident", {}),
        pytest.param("all resident", {"mapped": False, "overlaid": True}, marks=pytest.mark.slow),
        ("half", {"overlaid": True}),
        pytest.param("half", {"host_weights": "mapped", "overlaid": True}, marks=pytest.mark.slow),
        pytest.param("half", {"mapped": False}, marks=pytest.mark.slow),
        ("all", {"host_weights": "staged"}),
        pytest.param("bytes", {}, marks=pytest.mark.slow),
    ],
)
def test_two_that_take_turns_train_bit_for_bit_like_each_alone(swap, way):
    backend = FakeDevice("random")
    experts = [Expert(seed, SWAPS[swap], backend, **way) for seed in (1, 2)]
    losses = {1: [], 2: []}
    for turn in (range(1), range(1, 3), range(3, 4)):
        for expert in experts:
            before = values(next(other for other in experts if other is not expert))
            with expert.placed():
                losses[expert.seed] += expert.steps(turn)
            assert same(before, values(next(other for other in experts if other is not expert)))
    for expert in experts:
        reference = alone(expert.seed, SWAPS[swap], **way)
        assert losses[expert.seed] == reference[0] and same(values(expert), reference[1])


@pytest.mark.parametrize(("swap", "timing"), [("all resident", "eager"), ("half", "lazy"), ("all", "random")])
def test_off_the_device_weights_are_the_files_own_again_and_nothing_is_locked(swap, timing):
    backend = FakeDevice(timing)
    expert = Expert(1, SWAPS[swap], backend)
    for _ in range(2):
        with expert.placed():
            expert.steps(range(1))
            assert bool(backend.locked) == (swap != "all resident")
        assert not backend.locked and not backend.queue
        for name, parameter in expert.model.named_parameters():
            assert parameter.data_ptr() == expert.host[name].data_ptr()
            assert torch.equal(parameter.data, expert.bytes[name])  # the slice was written into copies alone


def test_the_order_of_streamed_weights_is_learned_once():
    expert = Expert(1, SWAPS["half"], FakeDevice())
    misses = []
    for _ in range(3):
        with expert.placed() as placement:
            expert.steps(range(1))
            misses.append(placement.streamer.traffic.misses)
    assert misses[0] > 10 and misses[1:] == [1, 1]  # the first weight of all, before which nothing runs
