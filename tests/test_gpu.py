"""The same numbers on a CUDA device: slices, swapped blocks, 8-bit optimizers. Skipped where there is none."""

import pytest
import torch
from test_selective_finetune import TINY, tiny_model

from utils.block_inputs import BlockInputs
from utils.block_swap import checkpoint_blocks, place_model
from utils.host_store import LockedMemory
from utils.optimizers import OptimizerConfig, build_optimizer
from utils.selective_finetune import attach_slice
from utils.swap_backend import CudaBackend
from utils.swap_plan import SwapConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(device, blocks_to_swap=0, dtype=torch.bfloat16, optimizer="adamw", steps=3, offload=False, swap=None):
    """Losses and differences (on the CPU) of a few steps on `device`."""
    model = tiny_model(dtype)
    trained = attach_slice(model, "0.05", 3, device=device)
    checkpoint_blocks(model, BlockInputs(len(model.blocks), torch.device(device)) if offload else None)
    place_model(model, device, blocks_to_swap, trained, swap)
    steps_taken = build_optimizer(OptimizerConfig(optimizer, 1e-3), trained.parameters())
    losses = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        x, target = (torch.randn(2, 4, 2, 6, 8, generator=draw).to(device) for _ in range(2))
        context = [torch.randn(n, TINY.text_dim, generator=draw).to(device) for n in (3, 7)]
        loss = (model(x, torch.tensor([300.0, 800.0], device=device), context) - target).square().mean()
        loss.backward()
        steps_taken.step()
        steps_taken.zero_grad()
        trained.write_back()
        losses.append(loss.item())
    return losses, [parameter.detach().cpu() for parameter in trained.parameters()]


def same(run, other):
    return run[0] == other[0] and all(torch.equal(a, b) for a, b in zip(run[1], other[1], strict=True))


def test_a_slice_trains_on_the_gpu_as_on_the_cpu():
    losses, differences = train("cuda", dtype=torch.float32)
    expected_losses, expected = train("cpu", dtype=torch.float32)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    # Adam's first steps are signs of gradients: only near-zero gradients may differ.
    moved = torch.cat(differences) - torch.cat(expected)
    assert (moved.abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("blocks_to_swap", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_swapped_blocks_train_bit_for_bit_like_resident_ones(blocks_to_swap, optimizer):
    assert same(train("cuda", blocks_to_swap, optimizer=optimizer), train("cuda", optimizer=optimizer))


@pytest.mark.parametrize("host_weights", ["pinned", "staged"])
@pytest.mark.parametrize("ring_blocks", [1, 2])
def test_every_store_and_ring_trains_bit_for_bit_over_many_steps(host_weights, ring_blocks):
    swap = SwapConfig(ring_blocks, host_weights=host_weights)
    assert same(train("cuda", 3, swap=swap, steps=30), train("cuda", steps=30))


def test_block_inputs_on_the_host_change_no_bit():
    assert same(train("cuda", 3, offload=True, steps=10), train("cuda", steps=10))


def test_swapped_weights_stay_on_the_host():
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.05", 3, device="cuda")
    placement = place_model(model, "cuda", 2, trained, SwapConfig(ring_blocks=1))
    kinds = {linear.weight.device.type for linear in (model.blocks[0].ffn[0], model.blocks[2].ffn[0])}
    assert kinds == {"cpu"} and placement.streamed_blocks == 3
    assert model.blocks[2].ffn[0].bias.device.type == "cuda" and model.head.head.weight.device.type == "cuda"
    assert all(parameter.device.type == "cuda" for parameter in trained.parameters())


def test_page_locked_memory_is_seen_as_such_and_a_failure_leaves_no_error():
    backend = CudaBackend(torch.device("cuda"))
    memory = LockedMemory(backend)
    region = memory.region(1 << 20)
    assert not memory.failed and region.is_pinned()
    assert not backend.page_lock(region)  # it is locked already
    assert torch.ones(4, device="cuda").sum().item() == 4
    memory.release()
    assert not region.is_pinned()
