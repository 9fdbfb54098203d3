"""Whole runs on a base that is kept in fp8: what they write, what they tell, what they continue from."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_preservation import preserving
from tiny_run import CONFIG, run, write_dataset, write_dit, write_sample_models

from utils.cli.slices import main as slices
from utils.selective_finetune import slice_indices
from utils.slices.on_base import read_slice_file
from utils.swap.placement import weight_sizes
from wan.errors import InputError
from wan.model import WanModel

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_epochs", "1")
SCALED = ("--fp8_base", "--fp8_scaled")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    write_dit(folder / "wide.safetensors", torch.float32)
    write_dataset(folder)
    write_sample_models(folder)
    (folder / "old.txt").write_text("a red cat\nred sits", encoding="utf-8")
    run(folder, *BF16, *SCALED, "--ffid", "1", "--output_name", "below", "--save_as", "slice")
    (folder / "out" / "below.slice.safetensors").rename(folder / "below.slice.safetensors")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def moved(base, checkpoint):
    """How far each value of the slice is from its base; nothing else may differ in a single bit."""
    one, other, moves = load_file(base), load_file(checkpoint), []
    assert list(one) == list(other)
    for name, tensor in one.items():
        inside = torch.zeros(tensor.numel(), dtype=torch.bool)
        if name.startswith("blocks.") and tensor.dim() == 2:
            inside[slice_indices(name, tensor.shape, "0.1", 2)] = True
        bits, other_bits = (own.flatten().view(torch.int16) for own in (tensor.bfloat16(), other[name].bfloat16()))
        assert tensor.dtype == other[name].dtype and torch.equal(bits[~inside], other_bits[~inside])
        moves.append((other[name].flatten()[inside] - tensor.flatten()[inside]).float())
    return torch.cat(moves)


@pytest.mark.parametrize("base", ["base", "wide"])
@pytest.mark.parametrize("more", [("--fp8_base",), SCALED], ids=["plain", "scaled"])
def test_the_checkpoint_is_the_file_with_the_slice_trained(folder, more, base):
    file = folder / f"{base}.safetensors"
    told = run(folder, *BF16, *more, "--dit", str(file))
    text = "rounded to fp8 with a scale for each row" if more == SCALED else "rounded to fp8, but not the slice"
    assert any(line.startswith(f"{file}: ") and text in line for line in told)
    found = moved(file, folder / "out" / "one.safetensors")
    run(folder, *BF16, "--dit", str(file), "--output_name", "exact")
    exact = moved(file, folder / "out" / "exact.safetensors")
    assert 0.9 < torch.cosine_similarity(found, exact, 0) < 1 and not torch.equal(found, exact)


def ways_to_keep_weights():
    with torch.device("meta"):
        sizes = weight_sizes(WanModel(CONFIG).bfloat16(), "scaled")
    return {
        "ring": ("--blocks_to_swap", "2", "--block_swap_ring_size", "1", "--host_weights", "staged"),
        "bytes": ("--weights_vram", str(sizes.small + sizes.block * 7 // 10)),
    }


@pytest.mark.slow
def test_swapped_runs_on_slices_that_preserve_write_the_checkpoint_of_a_resident_one(folder):
    shared = [*BF16, *SCALED, *preserving(folder), "--slices", f"{folder}/below.slice.safetensors"]
    shared += ["--gradient_accumulation_steps", "2"]
    run(folder, *shared, "--output_name", "plain")
    plain = load_file(folder / "out" / "plain.safetensors")
    for name, way in ways_to_keep_weights().items():
        told = run(folder, *shared, *way, "--output_name", name)
        assert any("(block matrices in fp8 with a scale for each row)" in line and "stream" in line for line in told)
        swapped = load_file(folder / "out" / f"{name}.safetensors")
        assert all(torch.equal(plain[key], swapped[key]) for key in plain), name


def test_the_slice_file_of_an_fp8_run_is_a_slice_of_the_base(folder, tmp_path):
    run(folder, *BF16, *SCALED, "--save_as", "checkpoint", "slice")
    out = folder / "out"
    slices(["apply", f"{folder}/base.safetensors", f"{out}/one.slice.safetensors", "-o", f"{tmp_path}/x.safetensors"])
    assert (tmp_path / "x.safetensors").read_bytes() == (out / "one.safetensors").read_bytes()
    assert slices(["verify", f"{tmp_path}/x.safetensors", "--base", f"{folder}/base.safetensors"]) in (0, None)


def test_metadata_tells_what_the_slice_was_trained_over(folder):
    for more, kind in {("--fp8_base",): "plain", SCALED: "scaled", (): None}.items():
        run(folder, *BF16, *more, "--save_as", "checkpoint", "slice", "--overwrite")
        with safe_open(folder / "out" / "one.safetensors", "pt") as file:
            assert file.metadata().get("ss_fp8_base") == kind
        assert read_slice_file(folder / "out" / "one.slice.safetensors").metadata.get("ss_fp8_base") == kind


def test_a_resumed_run_is_the_run_that_never_stopped(folder):
    shared = (*BF16, *SCALED, "--blocks_to_swap", "1")
    run(folder, *shared, "--max_train_epochs", "2", "--output_name", "whole")
    run(folder, *shared, "--max_train_epochs", "1", "--save_state")
    run(folder, *shared, "--max_train_epochs", "2", "--resume", "latest")
    whole, resumed = (load_file(folder / "out" / f"{name}.safetensors") for name in ("whole", "one"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (("--fp8_base",), SCALED, r"fp8_base plain \(now scaled\)"),
        ((), ("--fp8_base",), r"fp8_base no \(now plain\)"),
        (SCALED, (), r"fp8_base scaled \(now no\)"),
    ],
)
def test_a_state_of_another_rounding_is_refused(folder, before, now, told):
    run(folder, *BF16, *before, "--save_state")
    with pytest.raises(InputError, match=told):
        run(folder, *BF16, *now, "--max_train_epochs", "2", "--resume", "latest")


def test_what_makes_no_sense_is_refused_before_the_model_loads(folder):
    stored = load_file(folder / "base.safetensors")
    cast = {name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for name, t in stored.items()}
    save_file(cast, folder / "fp8.safetensors", {"num_heads": "4", "text_len": "8"})
    for more, told in {
        ("--fp8_base", "--dit", f"{folder}/fp8.safetensors"): "use the bf16, fp16 or fp32 file, with --fp8_base",
        ("--fp8_scaled",): "no effect without --fp8_base",
        (*SCALED, "--blocks_to_swap", "2", "--host_weights", "mapped"): "leave one of the two out",
    }.items():
        with pytest.raises(InputError, match=told):
            run(folder, *BF16, *more)
