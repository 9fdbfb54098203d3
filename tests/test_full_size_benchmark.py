"""The parts of the full-size run that need no 28 GB: its checkpoint, and its check of the trained slice."""

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


@pytest.mark.parametrize(("start", "step", "fine"), [(0.0, 1e-4, True), (1e-3, 1e-4, False), (0.0, 1e-2, False)])
def test_a_slice_with_other_start_values_or_steps_is_found(base, start, step, fine, monkeypatch):
    linears = {name: weight for name, weight in load_dit(base).named_parameters() if weight.dim() == 2}
    linears = {name: weight for name, weight in linears.items() if name.startswith("blocks.")}
    monkeypatch.setattr(full_size_cpu, "FF", "0.1")
    monkeypatch.setattr(full_size_cpu, "MATRICES", len(linears))
    values = {}
    for name, weight in linears.items():
        values[f"start.{name}"] = weight.flatten()[slice_indices(name, weight.shape, "0.1", 1)] + start
        values[f"difference.{name}"] = torch.full((len(values[f"start.{name}"]),), step)
    monkeypatch.setattr(full_size_cpu, "VALUES", sum(len(v) for k, v in values.items() if k.startswith("start.")))
    save_file(values, base.parent / "slice.safetensors")
    if fine:
        full_size_cpu.check_slice(base.parent, base, steps=1)
    else:
        with pytest.raises(AssertionError):
            full_size_cpu.check_slice(base.parent, base, steps=1)
