"""Streamed blocks against resident ones: the same bits for every budget and timing, and no byte copied twice."""

import gc
import weakref

import pytest
import torch
from fake_device import FEW_TIMINGS, TIMINGS, FakeDevice
from torch import nn

from utils.files import readable
from utils.selective_finetune import attach_slice, block_linears, slice_units
from utils.slices.overlay import Overlay
from utils.swap.placement import LoadedWeights, checkpoint_blocks, memory_line, place_model, weight_sizes
from utils.swap.plan import SwapConfig
from utils.swap.streamer import WeightStreamer
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

    def __init__(
        self, backend=None, swapped=0, checkpointed=True, ff="0.02", host_weights="pinned", lay_over=None, **swap
    ):
        self.backend = backend or FakeDevice()
        self.model = tiny_model()
        overlays = lay_over(self.model) if lay_over else {}
        self.trained = attach_slice(self.model, ff, 1)
        if checkpointed:
            checkpoint_blocks(self.model)
        config = SwapConfig(swapped, host_weights=host_weights, **swap)
        loaded = LoadedWeights(mapped=True, overlays=overlays)
        self.placement = place_model(self.model, "cpu", config, self.trained, loaded, self.backend)
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


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_and_timing_trains_bit_for_bit_like_a_resident_model(budget, timing, resident):
    assert same(Run(FakeDevice(timing), **BUDGETS[budget]).train(), resident[True])


@pytest.mark.parametrize("timing", ["lazy", "random"])
@pytest.mark.parametrize("budget", ["0.7 blocks", "1 block", "2 blocks"])
def test_without_checkpointing_it_is_bit_for_bit_the_same_too(budget, timing, resident):
    run = Run(FakeDevice(timing), checkpointed=False, **BUDGETS[budget])
    assert same(run.train(), resident[False])


@pytest.mark.parametrize("timing", FEW_TIMINGS)
@pytest.mark.parametrize("gpu", [True, False], ids=["through buffers", "directly"])
@pytest.mark.parametrize("mode", ["mapped", "staged"])
def test_copies_in_the_background_train_like_a_resident_model(mode, gpu, timing, resident):
    run = Run(FakeDevice(timing, page_locks=gpu), BLOCKS, host_weights=mode)
    assert same(run.train(), resident[True])


def test_a_step_never_makes_the_host_wait(resident, monkeypatch):
    monkeypatch.setattr(FakeDevice, "finish", None)
    monkeypatch.setattr(FakeDevice, "drain", lambda device: None)
    assert same(Run(FakeDevice("lazy"), BLOCKS).train(), resident[True])


def test_where_page_locks_fail_the_run_goes_on_staged(resident):
    run = Run(FakeDevice(locks=0), BLOCKS)
    assert run.placement.host_mode == "staged" and same(run.train(), resident[True])


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


def pass_without_gradient(run):
    with torch.no_grad():
        return loss_of(run.model, 99).item()


def fail_in_the_middle(run):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = run.model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(run.model, 98)
    hook.remove()


def skip_a_block(run):
    skipped, run.model.blocks[1].forward = run.model.blocks[1].forward, lambda x, *_: x
    loss_of(run.model, 97).backward()
    run.optimizer.zero_grad()
    run.model.blocks[1].forward = skipped


INTERRUPTIONS = {
    "a sample": pass_without_gradient,
    "no backward": lambda run: loss_of(run.model, 96).item(),
    "an exception": fail_in_the_middle,
    "a skipped block": skip_a_block,
    "accumulation": lambda run: run.step(5, accumulate=3),
}


@pytest.mark.parametrize("timing", FEW_TIMINGS)
@pytest.mark.parametrize("interrupt", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_after_an_interruption_training_goes_on_bit_for_bit_and_finds_its_order_again(interrupt, timing):
    results = []
    for swapped in (0, 3):
        run = Run(FakeDevice(timing), swapped)
        run.train(2)
        seen = interrupt(run)
        results.append((seen, run.train(3)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])
    assert run.traffic(lambda: run.step(9)) == (2 * 3 * SIZES.block, 0)


def test_steps_with_a_pass_without_gradient_before_each_copy_nothing_late():
    run = Run(FakeDevice("random"), 3)
    for seed in range(3):
        pass_without_gradient(run)
        run.step(seed)
    # Forward only: every block that streams, but for those that are still there from the pass before.
    assert run.traffic(lambda: pass_without_gradient(run)) == (3 * SIZES.block, 0)
    assert run.traffic(lambda: run.step(8)) == (2 * 3 * SIZES.block, 0)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "not checkpointed"])
def test_autograd_keeps_no_weight(checkpointed):
    run = Run(swapped=BLOCKS, checkpointed=checkpointed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss_of(run.model, 0).backward()
    matrices = {linear.weight.shape for linear in block_linears(run.model).values()}
    assert matrices.isdisjoint(saved) and matrices.isdisjoint(shape[::-1] for shape in saved)


def test_weights_without_a_slice_stream_too():
    losses = []
    for swapped in (0, BLOCKS):
        run = Run(FakeDevice("lazy"), swapped, ff="0.0003")  # less than a value of the smaller matrices
        assert len(run.trained.matrices) == 2 * BLOCKS
        losses.append(run.train(3))
    assert same(*losses)


def other_slice(model):
    """Random values for the slice that begins in the unit in which the trained one ends."""
    draw = torch.Generator().manual_seed(3)
    overlays = {}
    for name, linear in block_linears(model).items():
        units = slice_units(f"{name}.weight", linear.weight.shape, "0.02", 2)
        overlays[linear] = Overlay(((units, torch.randn(units.count, generator=draw).bfloat16()),))
    return overlays


def put_into_the_weights(model):
    for linear, overlay in other_slice(model).items():
        overlay.write(linear.weight.data)
    return {}


@pytest.fixture(scope="module")
def with_the_other_slice():
    return Run(lay_over=put_into_the_weights).train()


@pytest.mark.parametrize("timing", ["lazy", "random"])
@pytest.mark.parametrize(
    ("swapped", "mode"), [(0, "mapped"), (2, "pinned"), (BLOCKS, "staged"), (2, "mapped"), (BLOCKS, "mapped")]
)
def test_slices_beside_the_weights_are_in_every_copy(swapped, mode, timing, with_the_other_slice):
    run = Run(FakeDevice(timing), swapped, host_weights=mode, lay_over=other_slice)
    assert same(run.train(), with_the_other_slice)


def test_slices_beside_mapped_weights_are_not_written_into_these_and_count_on_the_device():
    plain, run = (Run(swapped=BLOCKS, host_weights="mapped", lay_over=lay_over) for lay_over in (None, other_slice))
    run.train(2)
    linears = block_linears(run.model), block_linears(tiny_model())
    assert all(torch.equal(linears[0][name].weight, linear.weight) for name, linear in linears[1].items())
    values = 2 * sum(matrix.units.count for matrix in run.trained.matrices.values())
    assert run.placement.device_bytes - plain.placement.device_bytes == pytest.approx(values, rel=0.01)


def test_slices_beside_the_weights_count_in_their_budget():
    budget = {"weights_vram": SIZES.small + 2 * SIZES.block, "host_weights": "mapped"}
    plain, run = (Run(lay_over=lay_over, **budget).placement for lay_over in (None, other_slice))
    assert run.device_bytes <= budget["weights_vram"] and run.buffer_bytes < plain.buffer_bytes


def test_nothing_is_written_into_the_masters():
    run = Run(FakeDevice("lazy"), BLOCKS)
    before = {name: parameter.clone() for name, parameter in tiny_model().named_parameters()}
    run.train(2)
    after = dict(run.model.named_parameters())
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_the_line_tells_what_is_where():
    placement = Run(swapped=BLOCKS).placement
    line = memory_line(placement, torch.device("cpu"))
    buffers = readable(2 * SIZES.block)
    assert f"{readable(SIZES.small + 2 * SIZES.block)} of weights on cpu, {buffers} of it buffers" in line
    assert f"5 blocks ({readable(BLOCKS * SIZES.block + SIZES.outside)}) stream from page-locked RAM (" in line


@pytest.mark.parametrize("mode", ["pinned", "staged"])
def test_a_model_that_goes_waits_for_its_copies_and_leaves_nothing_locked(mode):
    device = FakeDevice("lazy")
    run = Run(device, BLOCKS, host_weights=mode)
    run.train(3)
    assert device.queue or mode == "staged"  # what the next pass would need first
    del run
    gc.collect()
    assert device.queue == [] and device.locked == {}


@pytest.mark.parametrize("mode", ["pinned", "staged"])
def test_at_the_end_of_a_placement_copies_have_ended_and_layers_use_their_own_weights(mode):
    device = FakeDevice("lazy")
    run = Run(device, BLOCKS, host_weights=mode)
    with run.placement:
        run.train(3)
    assert device.queue == [] and device.locked == {}
    assert all(matrix.fetch is None for matrix in run.trained.matrices.values())
    copied = len(device.copied)
    pass_without_gradient(run)
    assert len(device.copied) == copied


def test_a_layer_is_freed_at_the_end_of_its_placement_without_the_garbage_collector():
    model = tiny_model()
    gone = weakref.ref(model.blocks[0].self_attn.q)
    gc.disable()
    with place_model(model, "cpu", SwapConfig(BLOCKS), backend=FakeDevice()), torch.no_grad():
        loss_of(model, 0)
    del model
    gc.enable()
    assert gone() is None
