"""Comparing a save with its base: every change in the slice is counted, none outside it escapes."""

import tracemalloc

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from tiny_run import write_dit
from torch import nn

from utils.selective_finetune import attach_slice, slice_indices
from utils.slice_saving import save_checkpoint
from utils.slices import compare
from utils.slices.compare import SavedChanges, compare_save
from utils.slices.ledger import Entry
from wan.loading import load_dit


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    write_dit(folder / "base.safetensors")
    return folder


def changed_file(folder, changes):
    """A copy of a trained checkpoint with the bits of some values flipped: {tensor's name: flat positions}."""
    tensors = load_file(folder / "trained.safetensors")
    for name, positions in changes.items():
        tensors[name].view(torch.int16).view(-1)[positions] ^= 1
    save_file(tensors, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.fixture(scope="module")
def trained(files):
    """The slice of a model in which every value moved; its checkpoint is trained.safetensors."""
    trained = attach_slice(load_dit(files / "base.safetensors", torch.bfloat16), "0.1", 2)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(0.5)
    trained.write_back()
    save_checkpoint(trained, files / "base.safetensors", files / "trained.safetensors")
    return trained


def test_only_where_slices_of_other_files_lie_may_anything_differ(files, trained):
    name = "blocks.1.ffn.0.weight"
    theirs = slice_indices(name, (64, 48), "0.05", 9).tolist()
    changed = changed_file(files, {name: theirs})
    other = Entry(1, "0.05", 9, "other", 1, "")
    bases = [files / "base.safetensors"]
    assert compare_save(bases, changed, trained, [other]) == SavedChanges(inside=trained.count)
    overlapping = Entry(1, "0.3", 1, "other", 1, "")  # the run's own slice lies in it
    assert compare_save(bases, changed, trained, [other, overlapping]) == SavedChanges(inside=trained.count)
    assert compare_save(bases, changed, trained).outside == len(theirs)


@pytest.mark.parametrize("chunk", [7, 100, 1 << 20])
def test_a_save_that_differs_in_its_slice_alone_has_every_change_counted(files, trained, monkeypatch, chunk):
    monkeypatch.setattr(compare, "_CHUNK", chunk)
    base, saved = load_file(files / "base.safetensors"), load_file(files / "trained.safetensors")
    changed = sum((base[name] != saved[name]).sum() for name in base)
    assert changed == trained.count
    found = compare_save([files / "base.safetensors"], files / "trained.safetensors", trained)
    assert found == SavedChanges(inside=trained.count)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", "blocks.1.self_attn.k.weight"])
def test_values_beside_the_slice_are_counted_and_the_first_is_named(files, trained, monkeypatch, name, chunk):
    monkeypatch.setattr(compare, "_CHUNK", chunk)
    shape = load_file(files / "base.safetensors")[name].shape
    # The neighbours of slice 2 on its line, and every matrix's last value.
    beside = [slice_indices(name, shape, "0.1", 1)[-1].item(), slice_indices(name, shape, "0.1", 3)[0].item()]
    outside = sorted({*beside, shape.numel() - 1} - set(slice_indices(name, shape, "0.1", 2).tolist()))
    inside = slice_indices(name, shape, "0.1", 2)[:1].tolist()
    found = compare_save([files / "base.safetensors"], changed_file(files, {name: [*outside, *inside]}), trained)
    first = [int(index) for index in np.unravel_index(outside[0], shape)]
    assert (found.inside, found.outside) == (trained.count, len(outside))
    assert found.fault == f"{len(outside)} values, the first is {name} {first}"


@pytest.mark.parametrize("name", ["head.head.weight", "blocks.1.modulation", "blocks.0.self_attn.q.bias"])
def test_one_changed_bit_of_a_tensor_that_no_slice_touches_is_found(files, trained, name):
    found = compare_save([files / "base.safetensors"], changed_file(files, {name: [-1]}), trained)
    last = [size - 1 for size in load_file(files / "base.safetensors")[name].shape]
    assert (found.outside, found.fault) == (1, f"1 values, the first is {name} {last}")


def test_a_tensor_that_is_gone_new_or_of_another_form_is_found(files, trained):
    base = load_file(files / "base.safetensors")
    forms = {"head.head.bias": None, "new": torch.zeros(3), "blocks.0.modulation": base["blocks.0.modulation"].float()}
    for name, tensor in forms.items():
        others = {key: value for key, value in base.items() if key != name}
        save_file(others if tensor is None else {**others, name: tensor}, files / "other.safetensors")
        assert name in compare_save([files / "base.safetensors"], files / "other.safetensors", trained).fault


def test_shards_of_a_base_with_prefixed_names_are_compared(files, trained):
    base, saved = load_file(files / "base.safetensors"), load_file(files / "trained.safetensors")
    names = sorted(base)
    for number, part in enumerate((names[:9], names[9:])):
        save_file({f"model.diffusion_model.{n}": base[n] for n in part}, files / f"shard{number}.safetensors")
    save_file({f"model.diffusion_model.{n}": saved[n] for n in names}, files / "prefixed.safetensors")
    shards = [files / f"shard{number}.safetensors" for number in (0, 1)]
    assert compare_save(shards, files / "prefixed.safetensors", trained) == SavedChanges(inside=trained.count)


def test_comparing_holds_less_than_one_tensor_however_many_slices_are_applied(tmp_path):
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2048, 8192, bias=False)])}).to(torch.bfloat16)
    trained = attach_slice(model, "0.01", 1)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    next(trained.parameters()).data.fill_(1)
    save_checkpoint(trained, tmp_path / "base.safetensors", tmp_path / "saved.safetensors")
    applied = [Entry(1, "0.01", ffid, "other", 1, "") for ffid in (2, 3)]
    tracemalloc.start()  # does not see PyTorch's memory
    with LiveBytes() as counter:
        found = compare_save([tmp_path / "base.safetensors"], tmp_path / "saved.safetensors", trained, applied)
    peak = tracemalloc.get_traced_memory()[1] + counter.peak
    tracemalloc.stop()
    assert found.inside == trained.count and peak < model["blocks"][0].weight.nbytes
