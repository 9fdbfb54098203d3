"""The parts of the full-size run that need no 28 GB: its checkpoint, and its check of the trained slice."""

import contextlib
from dataclasses import replace

import full_size_cpu
import pytest
import torch
from safetensors.torch import save_file

from utils.selective_finetune import slice_indices
from wan.configs import TASKS
from wan.loading import load_dit

CONFIG = replace(TASKS["t2v-14B"].config, dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=48)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size_cpu, "SHIFT", 1000)
    full_size_cpu.write_random_checkpoint(tmp_path / "base.safetensors", CONFIG)
    return tmp_path / "base.safetensors"


def test_the_random_checkpoint_loads_and_computes(base):
    model = load_dit(base)
    noise = model(torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), [torch.randn(3, 48)])
    assert model.dtype == torch.bfloat16 and noise.isfinite().all() and noise.std() > 0.01


@pytest.mark.parametrize(("step", "fine"), [(1e-4, True), (0.0, False), (1e-2, False)])
def test_a_slice_that_did_not_move_or_moved_too_far_is_found(base, step, fine, monkeypatch):
    weights = {name: weight for name, weight in load_dit(base).named_parameters() if weight.dim() == 2}
    starts = {
        name: weight.flatten()[slice_indices(name, weight.shape, "0.1", 1)]
        for name, weight in weights.items()
        if name.startswith("blocks.")
    }
    monkeypatch.setattr(full_size_cpu, "FF", "0.1")
    monkeypatch.setattr(full_size_cpu, "MATRICES", len(starts))
    monkeypatch.setattr(full_size_cpu, "VALUES", {1: sum(map(len, starts.values()))})
    trained = {name: (start.float() + step).bfloat16() for name, start in starts.items()}
    save_file(trained, full_size_cpu.slice_path(base.parent, 1))
    with contextlib.nullcontext() if fine else pytest.raises(AssertionError):
        full_size_cpu.check_slice(base.parent, base, steps=1, ffid=1)
