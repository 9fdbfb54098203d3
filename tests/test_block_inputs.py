"""Block inputs on the host between forward and backward: the same bits, in fixed memory, and gone from the device."""

import weakref

import pytest
import torch
from fake_device import TIMINGS, FakeDevice
from test_block_swap import BLOCKS, loss_of, tiny_model

from utils.selective_finetune import attach_slice
from utils.swap.block_inputs import BlockInputs
from utils.swap.placement import checkpoint_blocks, place_model
from utils.swap.plan import SwapConfig

U = 2 * 4 * 48 * 2  # bytes of one block's input: two samples of four tokens


class Run:
    """The tiny model of test_block_swap, with its blocks' inputs on a fake host."""

    def __init__(self, inputs, swapped=0, backend=None):
        self.model = tiny_model()
        self.trained = attach_slice(self.model, "0.02", 3)
        checkpoint_blocks(self.model, inputs)
        place_model(self.model, "cpu", SwapConfig(swapped), self.trained, backend=backend)

    def gradients(self, seed=0):
        loss = loss_of(self.model, seed)
        loss.backward()
        gradients = [parameter.grad for parameter in self.trained.parameters()]
        self.trained.zero_grad()
        return [loss.detach(), *gradients]


@pytest.mark.parametrize("swapped", [0, BLOCKS])
@pytest.mark.parametrize("timing", TIMINGS)
def test_gradients_are_the_same_bits_for_every_timing(timing, swapped):
    resident = Run(None)
    device = FakeDevice(timing)
    run = Run(BlockInputs(BLOCKS, "cpu", device), swapped, FakeDevice(timing))
    for seed in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run.gradients(seed), resident.gradients(seed), strict=True))
    assert len(device.locked) == BLOCKS - 1


def test_each_input_but_the_last_goes_once_each_way():
    device = FakeDevice()
    run = Run(BlockInputs(BLOCKS, "cpu", device))
    run.gradients()
    assert [size for _, size in device.copied] == 2 * (BLOCKS - 1) * [U]
    addresses = [address for address, _ in device.copied]
    assert len(set(addresses[: BLOCKS - 1])) == BLOCKS - 1 and len(set(addresses[BLOCKS - 1 :])) == 2
    run.gradients()
    assert [address for address, _ in device.copied[2 * (BLOCKS - 1) :]] == addresses


def test_inputs_leave_the_device_in_forward():
    run = Run(BlockInputs(BLOCKS, "cpu", FakeDevice("lazy")))
    memory = []
    for block in run.model.blocks:
        block.register_forward_pre_hook(lambda _, args: memory.append(weakref.ref(args[0].untyped_storage())))
    loss = loss_of(run.model, 0)
    # The last one stays; the one before it may be on its way.
    assert [storage() is None for storage in memory[:-2]] == [True] * (BLOCKS - 2)
    assert memory[-1]() is not None
    loss.backward()


def test_larger_inputs_get_new_memory_and_smaller_ones_use_it():
    device = FakeDevice(page_locks=True)
    inputs = BlockInputs(2, "cpu", device)
    for size in (100, 1000, 10):
        x = torch.full((1, size, 4), float(size), requires_grad=True)
        y = inputs.around(0, lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False), x)
        y = inputs.around(1, lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False), y)
        y.sum().backward()
        assert torch.equal(x.grad, torch.cos(torch.sin(x)) * torch.cos(x))
    assert len(device.locked) == 1 and sum(device.locked.values()) >= 16_000


def test_without_gradients_nothing_moves():
    device = FakeDevice()
    run = Run(BlockInputs(BLOCKS, "cpu", device))
    with torch.no_grad():
        loss_of(run.model, 0)
    assert device.copied == []


def test_a_forward_without_its_backward_does_no_harm():
    run, resident = Run(BlockInputs(BLOCKS, "cpu", FakeDevice("random"))), Run(None)
    loss_of(run.model, 5)
    assert all(torch.equal(a, b) for a, b in zip(run.gradients(1), resident.gradients(1), strict=True))


def test_a_backward_after_the_next_forward_is_refused():
    run, resident = Run(BlockInputs(BLOCKS, "cpu", FakeDevice())), Run(None)
    older, newer = loss_of(run.model, 0), loss_of(run.model, 1)
    newer.backward()
    loss_of(resident.model, 1).backward()
    pairs = zip(run.trained.parameters(), resident.trained.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    with pytest.raises(RuntimeError, match="forward pass 1 after forward pass 2 has begun"):
        older.backward()
    older, newer = loss_of(run.model, 0), loss_of(run.model, 1)
    with pytest.raises(RuntimeError, match="call backward before the next one"):
        (older + newer).backward()
