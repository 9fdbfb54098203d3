"""The same numbers on a CUDA device: slices, swapped blocks, 8-bit optimizers. Skipped where there is none."""

import pytest
import torch
from test_selective_finetune import TINY, tiny_model

from utils.block_swap import checkpoint_blocks, place_model
from utils.optimizers import OptimizerConfig, build_optimizer
from utils.selective_finetune import attach_slice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(device, blocks_to_swap=0, dtype=torch.bfloat16, optimizer="adamw", steps=3):
    """Losses and differences (on the CPU) of a few steps on `device`."""
    model = tiny_model(dtype)
    trained = attach_slice(model, "0.05", 3, device=device)
    checkpoint_blocks(model)
    place_model(model, device, blocks_to_swap, trained)
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
    losses, differences = train("cuda", blocks_to_swap, optimizer=optimizer)
    expected_losses, expected = train("cuda", optimizer=optimizer)
    assert losses == expected_losses
    assert all(torch.equal(a, b) for a, b in zip(differences, expected, strict=True))


def test_swapped_weights_stay_on_the_host():
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.05", 3, device="cuda")
    place_model(model, "cuda", 2, trained)
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert devices["blocks.2.ffn.0.weight"] == "cpu" and devices["blocks.0.ffn.0.weight"] == "cuda"
    assert all(parameter.device.type == "cuda" for parameter in trained.parameters())
