"""The counted device memory of the full-size model: the figures that the README promises."""

from contextlib import nullcontext
from dataclasses import replace

import peak_memory
import pytest
import torch
from on_meta import gpu_kernels
from peak_memory import (
    CASES,
    CLIP,
    CLIP_5B,
    IMAGE,
    Case,
    decoding_bytes,
    measure,
    print_slices,
    rows_of,
    slice_values,
    state_bytes,
)

from utils.learning.optimizers import OptimizerConfig, build_optimizer
from utils.preserve.guard import guard_bytes
from utils.selective_finetune import block_linears, slice_interval, slice_units
from utils.swap.placement import sizes_of
from utils.swap.plan import SwapConfig, device_bytes, plan_swap
from wan.configs import TASKS
from wan.model import WanModel

BLOCK = 2 * (8 * 5120 * 5120 + 2 * 5120 * 13824)
SQUARE = 2 * 5120 * 5120
OUTSIDE = 2 * (5120 * 256 + 7 * 5120 * 5120 + 5120 * 4096 + 5120 * 5120)
U = 2 * 1024 * 5120  # one activation of a 512x512 picture
FEW = 3


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.limit], ids=lambda case: f"{case.task}, {case.name}")
def test_wan_14b_stays_within_the_promised_memory(case):
    assert measure(case).highest <= case.limit * 1e9


def test_weights_on_the_device_are_the_buffers_and_what_is_small():
    """And what is copied to it is twice what they do not hold, with what lies outside once."""
    for swapped, ring, blocks, outside in ((0, 2, FEW, OUTSIDE), (2, 1, 1, OUTSIDE), (3, 2, 2, 0)):
        peaks = measure(Case("", IMAGE, swapped, ring), blocks=FEW, steps=3 if swapped else 1)
        slice_bytes = (4 + 2) * FEW * BLOCK // 2 // 1000  # difference and start
        assert 0 < peaks.placed - blocks * BLOCK - outside - slice_bytes < 8e6
        passing = 0 if outside else OUTSIDE + 2 * SQUARE
        assert peaks.copied == 2 * (FEW - blocks) * BLOCK + passing
        # One block's backward, the inputs of all; gradients, and 0.2 GB that is in use before them at the most.
        assert peaks.highest - peaks.placed < (FEW + 25) * U + 0.05e9


@pytest.mark.parametrize("swapped", [0, 2])
def test_an_idle_expert_leaves_its_slice_and_its_optimizers_state_on_the_device_and_nothing_else(swapped):
    one, two = (measure(Case("", IMAGE, swapped, experts=experts), blocks=FEW, steps=1) for experts in (1, 2))
    values = FEW * BLOCK // 2 // 1000
    idle = values * (2 + 4 + 8)  # its start and difference, and AdamW's state
    assert idle <= two.placed - one.placed <= idle + 1e6
    assert idle <= two.highest - one.highest <= idle + 1e6


@pytest.mark.slow
def test_with_an_fp8_base_a_step_copies_half_the_bytes():
    """With all blocks swapped, the layers outside pass in bf16, and displace three matrices."""
    tall = 5120 * 13824
    for swapped, passing in ((FEW - 1, 0), (FEW, OUTSIDE + 2 * tall + SQUARE // 2)):
        copied = measure(Case("", IMAGE, swapped, 1, fp8="scaled"), blocks=FEW).copied
        assert copied == (FEW - 1) * BLOCK + passing


@pytest.mark.parametrize("latents", [IMAGE, pytest.param(CLIP, marks=pytest.mark.slow)])
def test_the_guard_takes_little_memory_beside_a_step_and_each_block_passes_twice_to_gather_it(latents):
    blocks = 2
    peaks = measure(Case("", latents, 1, 1, guard=True), blocks=blocks, steps=2)
    with torch.device("meta"):
        linears = block_linears(WanModel(replace(TASKS["t2v-14B"].config, num_layers=blocks)))
    held = guard_bytes(slice_units(f"{name}.weight", own.weight.shape, "0.001", 1) for name, own in linears.items())
    beside = peaks.gathering - max(peaks.forward, peaks.backward)
    assert held <= beside and beside - held + 40 / blocks * held < 80e6
    assert peaks.copied_gathering == peaks.copied == 2 * (blocks - 1) * BLOCK


def test_the_state_of_adamw8bit_is_counted_as_it_is_on_a_device_with_memory():
    sizes = (4095, 4096, 70_001)
    counts = []
    for device, kernels in (("cpu", nullcontext()), ("meta", gpu_kernels("AdamW8bit"))):
        parameters = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        optimizer = build_optimizer(OptimizerConfig("AdamW8bit"), parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with kernels:
            optimizer.step()
        counts.append(state_bytes(optimizer))
    # Two moments: fp32 below 4096 values, else a byte each, with a scale for 256 of them, and two shared maps.
    small, *large = sizes
    maps = 2 * 256 * 4
    assert counts == 2 * [12 * small + sum(6 * size + 8 * -(-size // 256) for size in large) + maps]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "most"), [("AdamW", 18.5), ("AdamW8bit", 12.5)])
@pytest.mark.parametrize("ff", ["0.01", "1"])
def test_a_trained_value_takes_what_its_optimizer_needs_and_little_more(optimizer, most, ff):
    case = next(case for case in CASES if case.ring_blocks == 1)
    without, peak = (measure(case, own, optimizer=optimizer).highest for own in ("0.00001", ff))
    each = (peak - without) / (slice_values(ff) - slice_values("0.00001"))
    assert 0.7 * most < each <= most  # less where the peak of the smallest slice is in backward


def test_sampling_and_decoding_of_a_picture_are_counted():
    case = Case("", IMAGE, 1, 1)
    peaks, four = measure(case, blocks=1, steps=1), rows_of(case)
    assert four == 4 and peaks.sampling - peaks.between > four * 6 * U
    # What upsampling leaves: 192 channels of 512x512, in bf16, a few times.
    image = 192 * 512 * 512 * 2
    assert 4 * image < decoding_bytes(TASKS["t2v-14B"].latents, IMAGE) < 12 * image


def test_the_time_path_and_the_text_do_not_set_the_peak():
    alone = measure(Case("", IMAGE, 1, 1), blocks=1, steps=1)
    assert alone.forward - alone.placed < (1 + 25) * U


@pytest.mark.slow
def test_block_inputs_on_the_host_leave_a_few_of_them_on_the_device():
    blocks = 5
    on_device, on_host = (
        measure(Case("", CLIP, blocks, offload_inputs=offload), blocks=blocks, steps=1) for offload in (False, True)
    )
    u = 2 * 32_760 * 5120
    assert (blocks - 3) * u <= on_device.backward - on_host.backward <= (blocks - 2) * u
    assert on_device.update <= on_host.update <= on_device.update + 2 * u


@pytest.mark.parametrize("swapped", [0, FEW])
@pytest.mark.parametrize(
    ("task", "fp8"), [("flf2v-14B", ""), ("i2v-A14B", ""), ("ti2v-5B", ""), ("ti2v-5B", "scaled"), ("t2v-14B", "plain")]
)
def test_what_a_run_says_of_its_weights_is_what_is_counted(task, fp8, swapped):
    """The sums that check_memory and the opening lines tell, with the slice beside them."""
    config, swap = replace(TASKS[task].config, num_layers=FEW), SwapConfig(swapped, ring_blocks=1)
    sizes = sizes_of(config, torch.bfloat16, fp8)
    told = device_bytes(sizes, plan_swap(sizes, swap))
    with torch.device("meta"):
        shapes = [p.numel() for p in WanModel(config).blocks.parameters() if p.dim() == 2]
    count = sum(stop - start for start, stop in (slice_interval(numel, "0.001", 1) for numel in shapes))
    placed = measure(Case("", IMAGE, swapped, 1, task=task, fp8=fp8), blocks=FEW, steps=1).placed
    assert 0 <= placed - told - (4 + 2) * count < 3e6  # and the numbers of its units


def test_timesteps_per_token_take_a_few_activations_not_six_for_each_token():
    one = measure(Case("", CLIP_5B, 1, 1, task="ti2v-5B"), blocks=1, steps=1)
    u = 2 * 31 * 22 * 40 * 3072  # one activation
    assert one.forward - one.placed < 20 * u


def test_compiled_functions_take_less_beside_a_clip():
    """Their forward has no float32 copies of an activation any more; the peak in backward is elsewhere."""
    plain, compiled = (measure(Case("", CLIP, 1, 1), blocks=1, steps=1, compiled=own) for own in (False, True))
    u = 2 * 32_760 * 5120
    assert plain.forward - compiled.forward >= 1.9 * u and compiled.highest <= plain.highest
    assert compiled.placed == plain.placed and plain.sampling - compiled.sampling >= 1.9 * u


@pytest.mark.slow
def test_the_table_of_slice_sizes_counts_what_each_takes(monkeypatch, capsys):
    monkeypatch.setattr(peak_memory, "FFS", ("0.001", "0.3"))
    print_slices(1, compiled=False)
    small, large = (row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:])
    exact = [8 * 26_214 + 2 * 70_778, 8 * 7_864_320 + 2 * 21_233_664]  # of 5120 x 5120 and 5120 x 13824
    assert [slice_values(ff, 1) for ff in ("0.001", "0.3")] == exact
    assert small[:4] == ["0.001", f"{exact[0]:,}", "1,000", "702.5 kB"] and large[2] == "3"
    assert (small[7], small[10]) == ("4.2 MB", "2.1 MB")
    for column, least, most in ((4, 15, 23), (5, 15, 23), (8, 9, 17)):  # of which an update takes 5 for a while
        apart = float(large[column][:-3]) - float(small[column][:-3])
        assert least < 1e9 * apart / (exact[1] - exact[0]) < most
