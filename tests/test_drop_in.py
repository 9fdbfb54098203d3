"""The patch in foreign trainers: one copied file, five lines in any loop, any model with a list of blocks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from test_selective_finetune import TINY, tiny_model
from transformers import BertConfig, BertModel

from utils.selective_finetune import SliceError, attach_slice, contract_name, slice_indices
from utils.slice_saving import base_identity, read_header, save_checkpoint, save_slice
from utils.slices.ledger import read_ledger

UTILS = Path(__file__).parents[1] / "utils"


@pytest.fixture(scope="module")
def renames():
    """Original name of every diffusers parameter: numbers that the converter only moves tell which came from where."""
    state = tiny_model().state_dict()
    marked = {name: torch.tensor(float(i)) for i, name in enumerate(state)}
    names = list(state)
    return {new: names[int(mark)] for new, mark in convert_wan_transformer_to_diffusers(marked).items()}


def diffusers_wan():
    return WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=3,
    )  # fmt: skip


def test_a_diffusers_wan_trains_the_same_values_as_ours(renames):
    theirs, ours = diffusers_wan(), tiny_model()
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(ours.state_dict())))
    ours_trained = attach_slice(ours, "0.05", 3)
    trained = attach_slice(theirs, "0.05", 3, name_of=renames.__getitem__)
    x, t, text = torch.randn(1, 4, 2, 6, 8), torch.tensor([500.0]), torch.randn(1, TINY.text_len, 24)
    theirs(x, t, text, return_dict=False)[0].square().mean().backward()
    ours(x, t, [text[0]]).square().mean().backward()
    assert trained.matrices.keys() == ours_trained.matrices.keys()
    for name, matrix in trained.matrices.items():
        torch.testing.assert_close(
            matrix.difference.grad, ours_trained.matrices[name].difference.grad, rtol=1e-4, atol=1e-7
        )


def test_a_slice_of_a_diffusers_wan_is_saved_into_its_own_file_and_is_that_of_the_original(renames, tmp_path):
    original, states = tiny_model().state_dict(), {}
    save_file(original, tmp_path / "original.safetensors")
    save_file(convert_wan_transformer_to_diffusers(dict(original)), tmp_path / "diffusers.safetensors")
    for kind in ("original", "diffusers"):
        model, name_of = (tiny_model(), contract_name) if kind == "original" else (diffusers_wan(), renames.__getitem__)
        model.load_state_dict(load_file(tmp_path / f"{kind}.safetensors"))
        trained = attach_slice(model, "0.05", 3, name_of=name_of)
        for parameter in trained.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        optimizer.step()
        trained.write_back()
        save_checkpoint(trained, tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}_trained.safetensors")
        states[kind] = model.state_dict(), load_file(tmp_path / f"{kind}_trained.safetensors")
        assert all(torch.equal(states[kind][1][name], tensor) for name, tensor in states[kind][0].items())
    converted = convert_wan_transformer_to_diffusers(dict(states["original"][1]))
    assert all(torch.equal(converted[name], tensor) for name, tensor in states["diffusers"][1].items())
    identities = {
        base_identity(tmp_path / f"{kind}.safetensors", name_of)
        for kind, name_of in (("original", contract_name), ("diffusers", renames.__getitem__))
    }
    assert len(identities) == 1


def test_a_transformers_model_trains_its_slice_alone(tmp_path):
    torch.manual_seed(0)
    target = torch.randn(1, 9, 32)  # the output is normalised, so a constant would be as far from any
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    trained = attach_slice(model, "0.1", 4)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(torch.arange(9)[None]).last_hidden_state - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.write_back()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(trained.matrices) == 12
    save_checkpoint(trained, tmp_path / "base.safetensors", tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in model.state_dict().items():
        changed = (tensor != before[name]).flatten()
        if name in trained.matrices:
            changed[slice_indices(name, tensor.shape, "0.1", 4)] = False
        assert not changed.any(), name


@pytest.mark.parametrize("save", [save_checkpoint, save_slice])
def test_what_the_patch_saves_has_a_ledger_that_can_be_read(tmp_path, save):
    save_file(tiny_model().state_dict(), tmp_path / "base.safetensors")
    trained = attach_slice(tiny_model(), " 0.05", 3)
    out = tmp_path / "out.safetensors"
    for name in ("a\ud800", "a\n", "x" * 256):
        with pytest.raises(SliceError, match=r"a concept cannot be named .*: use up to 255 characters"):
            save(trained, tmp_path / "base.safetensors", out, concept=name)
    assert not out.exists()
    save(trained, tmp_path / "base.safetensors", out, concept="x" * 255)
    assert read_ledger(read_header(out)[1], out)[0].ff == "0.05"


def test_the_copied_files_work_alone(tmp_path):
    for name in ("selective_finetune.py", "slice_saving.py"):
        shutil.copy(UTILS / name, tmp_path)
    save_file(tiny_model().state_dict(), tmp_path / "base.safetensors")
    script = """
import torch
from safetensors.torch import load_file
from selective_finetune import attach_slice
from slice_saving import save_checkpoint
state = load_file("base.safetensors")
block = torch.nn.Linear(48, 96)
block.load_state_dict({k: state[f"blocks.0.ffn.0.{k}"] for k in ("weight", "bias")})
layer = torch.nn.ModuleDict({"ffn": torch.nn.ModuleList([block])})
model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer])})
trained = attach_slice(model, "0.1", 2)
optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
block(torch.randn(3, 48)).square().mean().backward()
optimizer.step()
trained.write_back()
save_checkpoint(trained, "base.safetensors", "character1.safetensors", concept="character1", steps=1)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    base, saved = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "character1.safetensors")
    changed = {name: (base[name] != saved[name]).sum().item() for name in base}
    assert changed.pop("blocks.0.ffn.0.weight") == len(slice_indices("blocks.0.ffn.0.weight", (96, 48), "0.1", 2))
    assert not any(changed.values())
