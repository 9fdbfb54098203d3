"""Slices around the one that trains, and in generation: on top of a base without a full file in between."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import run, write_dataset, write_dit

from utils.cli.slices import main as slices
from utils.run import preparing
from utils.slices.on_base import read_slice_file, slices_on_base
from utils.slices.overlay import load_with_slices
from utils.swap.placement import LoadedWeights, place_model
from wan.errors import InputError
from wan.loading import load_dit, read_checkpoint_header

BF16 = ("--mixed_precision", "bf16", "--max_train_epochs", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a run's inputs, and concept `one` (ff 0.1 ffid 2) trained: checkpoint, slice, LoRA."""
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    write_dataset(folder)
    run(folder, *BF16, "--save_as", "slice", "lora", "checkpoint", "--save_every_n_steps", "2")
    (folder / "out").rename(folder / "first")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def dit(folder, name="first/one.safetensors"):
    return ("--dit", str(folder / name), "--output_name", "two")


def same_tensors(a, b):
    one, other = load_file(a), load_file(b)
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def ledger(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["wan_slices"])


def test_save_as_writes_each_kind_at_each_turn(files):
    stems = ["one-step00000002", "one-step00000004", "one"]
    ends = [".lora.safetensors", ".safetensors", ".slice.safetensors"]
    found = sorted(path.name for path in (files / "first").iterdir())
    assert found == sorted(stem + end for stem in stems for end in ends)


def test_the_saved_slice_on_its_base_is_the_saved_checkpoint_byte_for_byte(files, tmp_path):
    for stem in ("one", "one-step00000002"):
        out = tmp_path / f"{stem}.safetensors"
        slices(["apply", f"{files}/base.safetensors", f"{files}/first/{stem}.slice.safetensors", "-o", str(out)])
        assert out.read_bytes() == (files / "first" / f"{stem}.safetensors").read_bytes()


def test_the_saved_lora_is_that_of_the_slice(files, tmp_path):
    slices(["to-lora", f"{files}/first/one.slice.safetensors", "--base", f"{files}/base.safetensors", "-o",
            f"{tmp_path}/lora.safetensors"])  # fmt: skip
    assert same_tensors(tmp_path / "lora.safetensors", files / "first" / "one.lora.safetensors")


def test_training_on_a_slice_over_the_base_is_training_on_the_chained_checkpoint(folder):
    on_slice = ("--slices", str(folder / "first" / "one.slice.safetensors"), *dit(folder, "base.safetensors"))
    told = run(folder, *BF16, *on_slice, "--ffid", "3", "--save_as", "checkpoint", "slice")
    assert any("base.safetensors: one (ff 0.1 ffid 2) from" in line for line in told)
    (folder / "out").rename(folder / "sliced")
    try:
        told = run(folder, *BF16, *dit(folder), "--ffid", "3", "--save_as", "checkpoint", "slice")
        assert any("8 of 10 ids at ff 0.1 are free, the next is --ffid 1" in line for line in told)
        for name in ("two.safetensors", "two.slice.safetensors"):
            assert same_tensors(folder / "sliced" / name, folder / "out" / name)
            without_date = [{**e, "date": ""} for e in ledger(folder / "sliced" / name)]
            assert without_date == [{**e, "date": ""} for e in ledger(folder / "out" / name)]
        assert [entry["name"] for entry in ledger(folder / "out" / "two.safetensors")] == ["one", "two"]
    finally:
        shutil.rmtree(folder / "sliced")


def test_an_overlap_is_refused_before_the_model_loads_and_says_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(preparing, "load_with_slices", None)
    with pytest.raises(InputError, match=r"already holds one \(ff 0\.1 ffid 2\), which has 33\.3 % .* --ffid 2"):
        run(folder, *BF16, *dit(folder), "--ff", "0.3", "--ffid", "1")
    with pytest.raises(InputError, match=r"100 % .* the next is --ffid 1. To train the same slice further add --cont"):
        run(folder, *BF16, *dit(folder))
    with pytest.raises(InputError, match=r"--continue_slice: .* does not hold ff 0.1 ffid 3"):
        run(folder, *BF16, *dit(folder), "--ffid", "3", "--continue_slice")
    assert not (folder / "out").exists()


def test_an_overlap_that_is_meant_trains_over_and_says_so(folder):
    told = run(folder, *BF16, *dit(folder), "--ff", "0.3", "--ffid", "1", "--allow_overlap")
    assert any(
        "WARNING: the run trains over values of this checkpoint that belong to one (ff 0.1 ffid 2)" in line
        for line in told
    )
    with pytest.raises(InputError, match=r"shares values with two .*cannot be told apart"):
        slices(["remove", f"{folder}/out/two.safetensors", "one", "--base", f"{folder}/base.safetensors", "-o",
                f"{folder}/out/less.safetensors"])  # fmt: skip


def test_a_slice_that_was_trained_over_another_is_used_on_the_checkpoint_that_holds_it(folder, tmp_path):
    over = ("--ff", "0.3", "--ffid", "1", "--allow_overlap", "--save_as", "checkpoint", "slice")
    run(folder, *BF16, *dit(folder), *over)
    on_slice = (*dit(folder), "--slices", str(folder / "out" / "two.slice.safetensors"))
    for way, on in (("sliced", on_slice), ("chained", dit(folder, "out/two.safetensors"))):
        run(folder, *BF16, *on, "--ffid", "5", "--output_dir", f"{tmp_path}/{way}")
    assert same_tensors(tmp_path / "sliced" / "two.safetensors", tmp_path / "chained" / "two.safetensors")


@pytest.mark.parametrize("on", ["checkpoint", "slice"])
def test_a_slice_that_is_trained_further_keeps_one_entry_and_fits_its_first_base(folder, tmp_path, on):
    on_slice = ("--slices", str(folder / "first" / "one.slice.safetensors"), *dit(folder, "base.safetensors"))
    run(folder, *BF16, *(dit(folder) if on == "checkpoint" else on_slice), "--continue_slice",
        "--save_as", "checkpoint", "slice")  # fmt: skip
    (entry,) = ledger(folder / "out" / "two.safetensors")
    (first,) = ledger(folder / "first" / "one.safetensors")
    assert (entry["steps"], entry["name"]) == (10, "two") and entry["start"] == first["start"]
    slices(["apply", f"{folder}/base.safetensors", f"{folder}/out/two.slice.safetensors", "-o",
            f"{tmp_path}/a.safetensors"])  # fmt: skip
    assert same_tensors(tmp_path / "a.safetensors", folder / "out" / "two.safetensors")
    assert not same_tensors(tmp_path / "a.safetensors", folder / "first" / "one.safetensors")


@pytest.mark.parametrize(
    "cast",
    [".", "blocks.0.self_attn.q.weight", ("blocks.0", "blocks.1.ffn", "blocks.1.cross")],
    ids=["all of it", "one matrix", "most of it"],
)
def test_a_slice_of_slices_is_not_trained_further_on_a_base_that_is_cast(folder, tmp_path, cast):
    """Its values in the files' dtype are the base's, not those of the slice below."""
    weights = {
        name: value.float() if any(part in name for part in ([cast] if isinstance(cast, str) else cast)) else value
        for name, value in load_file(folder / "base.safetensors").items()
    }
    save_file(weights, tmp_path / "mixed.safetensors", {"num_heads": "4", "text_len": "8"})
    on_mixed = (*BF16, "--dit", f"{tmp_path}/mixed.safetensors", "--output_dir", f"{tmp_path}/out")
    run(folder, *on_mixed, "--save_as", "slice", "checkpoint")
    on_slice = (*on_mixed, "--slices", f"{tmp_path}/out/one.slice.safetensors", "--output_name", "two")
    with pytest.raises(InputError, match=r"mixed.safetensors is cast for training, so a slice of --slices cannot be"):
        run(folder, *on_slice, "--continue_slice")
    run(folder, *on_slice, "--ffid", "3", "--save_as", "checkpoint", "--blocks_to_swap", "1")
    chained = ("--dit", f"{tmp_path}/out/one.safetensors", "--output_name", "chained")
    run(folder, *on_mixed, *chained, "--ffid", "3", "--save_as", "checkpoint")
    assert same_tensors(tmp_path / "out" / "two.safetensors", tmp_path / "out" / "chained.safetensors")


def test_a_checkpoint_without_a_ledger_says_what_cannot_be_known(folder):
    assert any("has no ledger of slices" in line for line in run(folder, *BF16))
    assert not any("has no ledger" in line for line in run(folder, *BF16, *dit(folder), "--ffid", "3"))


def test_a_slice_that_does_not_tell_its_base_is_trained_on_with_a_note(folder, tmp_path):
    with safe_open(folder / "first" / "one.slice.safetensors", "pt") as file:
        told = file.metadata()
    untold = [{**entry, "base": None, "start": None} for entry in json.loads(told["wan_slices"])]
    save_file(load_file(folder / "first" / "one.slice.safetensors"), tmp_path / "old.safetensors",
              {**told, "wan_slices": json.dumps(untold)})  # fmt: skip
    lines = run(folder, *BF16, "--slices", f"{tmp_path}/old.safetensors", "--ffid", "3")
    assert any(line.startswith(f"note: {tmp_path}/old.safetensors does not record its base") for line in lines)


def test_a_slice_of_another_base_is_refused_before_the_model_loads(folder, monkeypatch):
    write_dit(folder / "other.safetensors", seed=1)
    monkeypatch.setattr(preparing, "load_with_slices", None)
    with pytest.raises(InputError, match=r"is not the base of .*one.slice.safetensors"):
        run(folder, *BF16, *dit(folder, "other.safetensors"), "--slices", f"{folder}/first/one.slice.safetensors")


def test_an_output_that_is_one_of_the_slices_is_refused(folder):
    on_slice = ("--slices", f"{folder}/first/one.slice.safetensors", "--output_dir", f"{folder}/first")
    with pytest.raises(InputError, match=r"over .*one.slice.safetensors"):
        run(folder, *BF16, *on_slice, "--ffid", "3", "--save_as", "slice")


def test_a_state_on_other_slices_is_refused(folder):
    on_slice = ("--slices", f"{folder}/first/one.slice.safetensors", "--ffid", "3", "--save_state")
    run(folder, *BF16, *on_slice)
    resume = ("--resume", f"{folder}/out/one-state", "--ffid", "3")
    with pytest.raises(InputError, match=r"another run: slices one \(ff 0.1 ffid 2\) [0-9a-f]{12} \(now \)"):
        run(folder, *BF16, *resume)


def test_a_model_with_slices_is_loaded_without_a_file_in_between_and_leaves_the_base_file(folder):
    base = folder / "base.safetensors"
    before = base.read_bytes()
    slice_file = read_slice_file(folder / "first" / "one.slice.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        model, overlays = load_with_slices(base, dtype, slices_on_base(read_checkpoint_header(base), [slice_file], [1]))
        assert bool(overlays) == (dtype == torch.bfloat16)  # what is cast is a copy, which the slice is put into
        place_model(model, "cpu", loaded=LoadedWeights(overlays=overlays))
        theirs = load_dit(folder / "first" / "one.safetensors", dtype).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert base.read_bytes() == before


@pytest.mark.parametrize("way", ["mapped", "staged", "resident"])
@pytest.mark.parametrize("slice_of_run", [("--ffid", "3"), ("--continue_slice",)])
def test_swapped_training_on_a_slice_is_training_on_the_chained_checkpoint(folder, tmp_path, way, slice_of_run):
    swap = () if way == "resident" else ("--blocks_to_swap", "2", "--host_weights", way)
    for on in ("chained", "sliced"):
        on_slice = ("--slices", f"{folder}/first/one.slice.safetensors", *dit(folder, "base.safetensors"))
        told = run(folder, *BF16, *swap, *slice_of_run, *(on_slice if on == "sliced" else dit(folder)),
                   "--output_dir", f"{tmp_path}/{on}", "--save_as", "checkpoint")  # fmt: skip
        assert way != "mapped" or any("stream from the checkpoint file" in line for line in told)
    assert same_tensors(tmp_path / "chained" / "two.safetensors", tmp_path / "sliced" / "two.safetensors")


@pytest.mark.parametrize(("save_as", "compared"), [("checkpoint", True), ("slice", False)])
def test_debugging_tells_what_moved_beside_slices_of_other_files(folder, save_as, compared):
    below = ("--slices", str(folder / "first" / "one.slice.safetensors"), "--ffid", "3", "--save_as", save_as)
    lines = run(folder, *BF16, *below, "--training_debug")
    told = [line for line in lines if "none outside it" in line]
    assert any("moved in use" in line for line in lines) and bool(told) == compared
    assert not told or "of 4,924 values in the slice changed" in told[0]
