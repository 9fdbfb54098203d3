"""A frozen base in float8 under a full-precision slice: against autograd on the values that it stands for."""

import gc
import weakref

import pytest
import torch
from fake_device import FEW_TIMINGS, FakeDevice
from live_bytes import LiveBytes
from test_block_swap import (
    BLOCKS,
    INTERRUPTIONS,
    Run,
    loss_of,
    other_slice,
    pass_without_gradient,
    same,
    tiny_model,
)
from torch import nn

from utils.files import readable
from utils.selective_finetune import block_linears
from utils.swap.placement import LoadedWeights, memory_line, place_model, sizes_of, weight_sizes
from utils.swap.plan import SwapConfig, device_bytes, plan_swap
from utils.swap.rounding import Rounding, beside_rounded
from utils.swap.streamer import WeightStreamer
from wan.configs import TASKS
from wan.errors import InputError
from wan.float8 import FLOAT8, check_float8

KINDS = ("plain", "scaled")
SIZES = {fp8: weight_sizes(tiny_model(), fp8) for fp8 in ("", *KINDS)}
MATRICES = sum(linear.weight.numel() for linear in block_linears(tiny_model()).values())


def rounded(weight, fp8):
    """What float8 makes of a matrix, in plain arithmetic."""
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / 448 if fp8 == "scaled" else 1.0
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


class RunOnRounded(Run):
    """Plain linears whose weights are rounded values, but for the slice and the overlays."""

    def __init__(self, fp8, checkpointed=True, lay_over=None, **settings):
        super().__init__(checkpointed=checkpointed, **settings)
        overlays = lay_over(self.model) if lay_over else {}
        with torch.no_grad():
            for linear in block_linears(self.model).values():
                linear.weight.copy_(rounded(linear.weight, fp8))
            for linear, overlay in overlays.items():
                overlay.write(linear.weight)
        self.trained.write_back()


@pytest.fixture(scope="module")
def references():
    return {fp8: RunOnRounded(fp8).train() for fp8 in KINDS}


@pytest.fixture(autouse=True)
def reads_of_slots_are_told(monkeypatch):
    """The fake device learns which slot a weight was read from, so that it notices a copy into it."""
    use = WeightStreamer.use

    def told(streamer, weight):
        used = use(streamer, weight)
        streamer.backend.used(streamer._in_use.memory)
        return used

    monkeypatch.setattr(WeightStreamer, "use", told)


# ---- training


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "not checkpointed"])
@pytest.mark.parametrize("fp8", KINDS)
def test_a_run_is_bit_for_bit_autograd_on_the_rounded_weights(fp8, checkpointed):
    assert same(Run(fp8=fp8, checkpointed=checkpointed).train(), RunOnRounded(fp8, checkpointed).train())


BUDGETS = {
    "0.3 blocks": {"weights_vram": SIZES["scaled"].small + int(0.3 * SIZES["scaled"].block)},
    "1 block": {"swapped": BLOCKS, "ring_blocks": 1},
    "1.5 blocks": {"weights_vram": SIZES["scaled"].small + int(1.5 * SIZES["scaled"].block)},
    "N-1 blocks": {"swapped": 1},
    "N blocks": {"swapped": BLOCKS, "ring_blocks": BLOCKS},
}


@pytest.mark.parametrize("timing", FEW_TIMINGS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_and_timing_trains_bit_for_bit_like_a_resident_model(budget, timing, references):
    assert same(Run(FakeDevice(timing), fp8="scaled", **BUDGETS[budget]).train(), references["scaled"])


@pytest.mark.parametrize("mode", ["pinned", "staged", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fp8", KINDS)
def test_so_does_every_way_to_wait_on_the_host(fp8, mode, references):
    run = Run(FakeDevice("random"), BLOCKS, fp8=fp8, host_weights=mode, checkpointed=mode != "staged")
    reference = references[fp8] if mode != "staged" else RunOnRounded(fp8, checkpointed=False).train()
    assert same(run.train(), reference)
    failed = Run(FakeDevice(locks=0), BLOCKS, fp8=fp8)
    assert failed.placement.host_mode == "staged" and same(failed.train(), references[fp8])


@pytest.mark.parametrize("swapped", [0, 2, BLOCKS])
def test_slices_on_top_of_the_base_stay_in_full_precision(swapped):
    run = Run(FakeDevice("lazy"), swapped, fp8="scaled", lay_over=other_slice)
    assert same(run.train(), RunOnRounded("scaled", lay_over=other_slice).train())


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(own, id=name, marks=[] if name in ("no backward", "an exception") else pytest.mark.slow)
        for name, own in INTERRUPTIONS.items()
    ],
)
def test_after_an_interruption_it_goes_on_bit_for_bit(interrupt):
    results = []
    for run in (RunOnRounded("scaled"), Run(FakeDevice("random"), 3, fp8="scaled")):
        run.train(2)
        seen = interrupt(run)
        results.append((seen, run.train(3)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_the_slice_starts_at_the_values_of_the_file_and_is_used_in_full_precision():
    run, base = Run(FakeDevice(), BLOCKS, fp8="plain"), tiny_model()
    run.train(2)
    for name, matrix in run.trained.matrices.items():
        stored = base.get_parameter(name)
        assert torch.equal(matrix.start, matrix.units.cut(matrix.units.read(stored)))
        expected = rounded(stored, "plain")
        matrix.write(expected)
        assert torch.equal(matrix.fetch(), expected)


def test_blocks_without_a_slice_are_rounded_too():
    few = "0.0003"  # less than a value of the smaller matrices
    trained = [Run(FakeDevice("lazy"), swapped, ff=few, fp8="scaled").train(2) for swapped in (0, BLOCKS)]
    assert same(trained[0], RunOnRounded("scaled", ff=few).train(2)) and same(*trained)


@pytest.mark.parametrize("swapped", [0, 2])
def test_a_model_that_left_its_device_is_rounded_anew_and_goes_on_bit_for_bit(swapped, references):
    run = Run(FakeDevice("lazy"), swapped, fp8="scaled")
    losses = [run.step(seed) for seed in range(2)]
    run.placement.undo.close()
    swap, loaded = SwapConfig(swapped, fp8="scaled", host_weights="pinned"), LoadedWeights(mapped=True, returns=True)
    run.placement = place_model(run.model, "cpu", swap, run.trained, loaded, FakeDevice("lazy"))
    losses += [run.step(seed) for seed in range(2, 4)]
    assert same((losses, list(run.trained.parameters())), references["scaled"])


# ---- bytes


@pytest.mark.parametrize("fp8", KINDS)
def test_a_step_copies_half_the_bytes(fp8):
    plain, run = Run(FakeDevice("random"), 3), Run(FakeDevice("random"), 3, fp8=fp8)
    for seed in range(3):
        copied = [own.traffic(lambda own=own, seed=seed: own.step(seed)) for own in (plain, run)]
    assert copied[0] == (2 * 3 * 2 * MATRICES // BLOCKS, 0)
    assert copied[1] == (copied[0][0] // 2, 0)


def test_what_lies_outside_the_blocks_stays_as_it_is():
    run = Run(FakeDevice("random"), BLOCKS, fp8="scaled")
    hosts = [weight.host for weight in run.placement.streamer.weights]
    assert sum(host.nbytes for host in hosts if host.dtype == FLOAT8) == MATRICES
    assert sum(host.nbytes for host in hosts if host.dtype != FLOAT8) == SIZES[""].outside
    assert run.placement.host_bytes == run.placement.streamed_bytes == MATRICES + SIZES[""].outside
    others = [p.dtype for name, p in run.model.named_parameters() if not name.endswith(".weight") or p.dim() == 1]
    assert set(others) == {torch.bfloat16}


@pytest.mark.parametrize("swapped", [0, 2, BLOCKS])
@pytest.mark.parametrize("fp8", KINDS)
def test_the_device_holds_what_the_plan_says(fp8, swapped):
    """Rounded matrices, scales of their rows, one matrix in bf16, and what is not rounded."""
    told = device_bytes(SIZES[fp8], plan_swap(SIZES[fp8], SwapConfig(swapped)))
    assert Run(swapped=swapped, fp8=fp8).placement.device_bytes == told
    scales = 4 * BLOCKS * (8 * 48 + 96 + 48) if fp8 == "scaled" else 0
    assert SIZES[fp8].small - SIZES[""].small == scales + 2 * 48 * 96
    assert SIZES[fp8].all - SIZES[fp8].small == MATRICES + SIZES[""].outside


def test_the_line_tells_that_block_matrices_are_in_fp8():
    line = memory_line(Run(swapped=BLOCKS, fp8="scaled").placement, torch.device("cpu"))
    assert "of weights on cpu (block matrices in fp8 with a scale for each row)" in line
    assert f"5 blocks ({readable(MATRICES + SIZES[''].outside)}) stream from page-locked RAM (" in line


def test_14b_in_fp8_takes_at_most_14_6_gb_of_host_memory():
    sizes = sizes_of(TASKS["t2v-14B"].config, torch.bfloat16, "scaled")
    assert sizes.blocks * sum(sizes.matrices) == 14_050_918_400
    assert sizes.blocks * sum(sizes.matrices) + sizes.outside + (1 << 26) < 14.6e9  # and what is rounded at a time


@pytest.mark.parametrize("mode", ["pinned", "staged"])
def test_rounding_never_holds_the_model_twice(mode, monkeypatch):
    """What is made beside the base, at any moment: the rounded weights, buffers, and a few rows of one matrix."""
    monkeypatch.setattr("utils.swap.host_store.STAGING_BYTES", 1000)
    monkeypatch.setattr("wan.float8._TOGETHER", 480)
    model, swap = tiny_model(), SwapConfig(BLOCKS, ring_blocks=1, fp8="scaled", host_weights=mode)
    with LiveBytes() as count:
        file = [parameter.data for parameter in model.parameters()]
        count.add(*file)
        base = count.live
        placement = place_model(model, "cpu", swap, None, LoadedWeights(mapped=True), FakeDevice())
        made = (
            placement.host_bytes
            + placement.buffer_bytes
            + beside_rounded([linear.weight for linear in block_linears(model).values()], True, torch.bfloat16)
        )
        pages = 3 * 4096 if mode == "pinned" else 2 * 1000
        assert made <= count.peak - base <= made + pages + 4 * 4 * 480 + 64


def test_nothing_is_written_into_the_file_and_its_weights_come_back():
    run, before = Run(FakeDevice("lazy"), BLOCKS, fp8="plain"), dict(tiny_model().named_parameters())
    with run.placement:
        run.train(2)
        assert run.model.blocks[0].ffn[0].weight.dtype == FLOAT8
    after = dict(run.model.named_parameters())
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    assert pass_without_gradient(run) == pass_without_gradient(Run())


def test_autograd_keeps_no_weight():
    for swapped in (0, BLOCKS):
        run, saved = Run(FakeDevice(), swapped, fp8="scaled", checkpointed=False), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            loss_of(run.model, 0).backward()
        matrices = {linear.weight.shape for linear in block_linears(run.model).values()}
        assert matrices.isdisjoint(saved) and matrices.isdisjoint(shape[::-1] for shape in saved)


def test_a_layer_is_freed_at_the_end_of_its_placement_without_the_garbage_collector():
    model = tiny_model()
    gone = weakref.ref(model.blocks[0].self_attn.q)
    gc.disable()
    with place_model(model, "cpu", SwapConfig(2, fp8="scaled"), backend=FakeDevice()), torch.no_grad():
        loss_of(model, 0)
    del model
    gc.enable()
    assert gone() is None


# ---- rounding


def round_trip(weight, fp8, dtype=torch.bfloat16):
    file = weight.clone()
    parameter = nn.Parameter(file, requires_grad=False)
    rounding = Rounding([parameter], fp8 == "scaled", dtype)
    rounding.move(parameter, torch.empty(weight.numel(), dtype=torch.uint8))
    assert torch.equal(file, weight)  # mapped read-only in a run
    return rounding.turned_back(parameter, parameter.data).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", KINDS)
def test_matrices_of_every_dtype_are_rounded_once(fp8, dtype, monkeypatch):
    monkeypatch.setattr("wan.float8._TOGETHER", 60)  # three rows
    weight = (torch.randn(64, 20, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 1, 64)[:, None]).to(
        dtype
    )
    assert torch.equal(round_trip(weight, fp8, dtype), rounded(weight, fp8))


def test_scales_keep_small_rows_exact_to_a_sixteenth():
    weight = torch.randn(8, 400, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 2, 8)[:, None]
    error = (round_trip(weight, "scaled", torch.float32) - weight).square().mean(1).sqrt()
    assert (error / weight.square().mean(1).sqrt() < 1 / 32).all()
    plain = (round_trip(weight, "plain", torch.float32) - weight).square().mean(1).sqrt()
    assert plain[0] / weight[0].square().mean().sqrt() == 1  # all of it is lost


def test_rows_of_zeros_and_values_beyond_float8_stay_finite():
    weight = torch.tensor([[0.0, 0.0], [1e30, -1e-30], [1e4, -500.0]])
    assert round_trip(weight, "scaled", torch.float32).tolist()[0] == [0, 0]
    assert round_trip(weight, "scaled", torch.float32).isfinite().all()
    assert round_trip(weight, "plain", torch.float32).tolist() == [[0, 0], [448, 0], [448, -448]]


def test_a_device_without_float8_is_told():
    class Device(str):
        pass

    with pytest.raises(InputError, match="fp8 does not work on nowhere"):
        check_float8(Device("nowhere"))
