"""The flags of block swapping, and whole runs with them: the same checkpoint, the base untouched, little memory."""

import argparse
import ctypes
import dataclasses
import hashlib
import sys
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import save_file
from tiny_run import CONFIG, flags, run, write_dit, write_inputs, write_sample_models

from utils.cli.swap_flags import add_swap_flags, read_swap, size
from utils.cli.train import parse_train
from utils.run import inputs as run_inputs
from utils.run import preparing
from utils.selective_finetune import attach_slice
from utils.slice_saving import save_slice
from utils.slices.on_base import read_slice_file, slices_on_base
from utils.slices.overlay import load_with_slices
from utils.swap.placement import LoadedWeights, checkpoint_blocks, place_model, weight_sizes
from utils.swap.plan import SwapConfig
from wan.errors import InputError
from wan.loading import load_dit, read_checkpoint_header
from wan.model import WanModel

BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


def swap(*given):
    parser = argparse.ArgumentParser()
    add_swap_flags(parser, "--fp8_base", "the blocks")
    return read_swap(parser.parse_args(given), "--fp8_base")


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2e9), ("1.8G", 1.8e9), ("1500 MB", 1.5e9), ("900m", 9e8), ("1GiB", 2**30), ("700000000", 7e8)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["two", "2TBB", "", "-1G", "1.5.2G", "iB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a size: write 2GB"):
        size(text)


def test_flags_of_musubi_tuner_mean_what_they_meant():
    musubi = ["--use_pinned_memory_for_block_swap", "--block_swap_h2d_only", "--block_swap_ring_size", "3"]
    assert swap("--blocks_to_swap", "24", *musubi) == SwapConfig(24, ring_blocks=3, host_weights="pinned")
    assert swap("--blocks_to_swap", "24") == SwapConfig(24) and swap() == SwapConfig()
    assert swap("--weights_vram", "2G", "--host_weights", "mapped") == SwapConfig(0, 2, 2 * 10**9, "mapped")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--blocks_to_swap 2 --weights_vram 2G", "give only one"),
        ("--weights_vram 2G --block_swap_ring_size 1", "leave it out"),
        ("--blocks_to_swap 2 --use_pinned_memory_for_block_swap --host_weights mapped", "contradicts"),
        ("--use_pinned_memory_for_block_swap", "no effect without --blocks_to_swap"),
        ("--block_swap_h2d_only", "no effect without --blocks_to_swap"),
        ("--block_swap_ring_size 2", "no effect without --blocks_to_swap"),
        ("--host_weights staged", "no effect without --blocks_to_swap"),
        ("--fp8_scaled", "no effect without --fp8_base"),
    ],
)
def test_flags_that_contradict_or_do_nothing_are_refused(given, told):
    with pytest.raises(InputError, match=told):
        swap(*given.split())


def test_block_inputs_go_to_the_host_of_checkpointed_runs_only(folder):
    offload = "--gradient_checkpointing_cpu_offload"
    assert parse_train(flags(folder, *BF16, offload)).offload_block_inputs
    with pytest.raises(InputError, match="needs --gradient_checkpointing"):
        parse_train(flags(folder, offload))


def test_the_weights_leave_the_memory_that_block_inputs_will_take(folder, monkeypatch):
    reserved, inputs = [], []
    read_dit, place, make_inputs = run_inputs.read_dit, preparing.place_model, preparing.BlockInputs

    def read_as_on_a_gpu(config, device):
        return read_dit(dataclasses.replace(config, offload_block_inputs=False), device)

    def record_place(*args, **kwargs):
        reserved.append(args[-1].reserved)
        return place(*args, **kwargs)

    def record_inputs(*args):
        inputs.append(make_inputs(*args))
        return inputs[-1]

    monkeypatch.setattr(run_inputs, "read_dit", read_as_on_a_gpu)
    monkeypatch.setattr(preparing, "place_model", record_place)
    monkeypatch.setattr(preparing, "BlockInputs", record_inputs)
    run(folder, *BF16, "--gradient_checkpointing_cpu_offload")
    assert reserved == [sum(memory.nbytes for memory in inputs[0].host)] and reserved[0] > 0


def test_what_the_device_cannot_do_is_refused_before_the_model_loads(folder):
    write_dit(folder / "wide.safetensors", torch.float32)
    for more, told in {
        ("--blocks_to_swap", "2", "--use_pinned_memory_for_block_swap"): "the device is cpu",
        (
            "--blocks_to_swap",
            "2",
            "--host_weights",
            "mapped",
            "--dit",
            f"{folder}/wide.safetensors",
        ): "cast when",
        ("--weights_vram", "20kB"): "needs at least",
        ("--gradient_checkpointing_cpu_offload",): "no effect where the CPU trains",
    }.items():
        with pytest.raises(InputError, match=told):
            run(folder, *BF16, *more)


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_models(folder):
    return [*write_sample_models(folder), "--vae_dtype", "fp32", "--sample_every_n_steps", "2"]


@pytest.mark.slow
def test_swapped_runs_with_samples_write_the_checkpoint_of_a_resident_one(folder):
    """Every way to keep weights; samples are drawn between steps, with the teacher of none."""
    more = [*BF16, *with_models(folder), "--max_train_epochs", "1", "--gradient_accumulation_steps", "2"]
    base = hash_of(folder / "base.safetensors")
    run(folder, *more, "--output_name", "plain")
    with torch.device("meta"):
        sizes = weight_sizes(WanModel(CONFIG).bfloat16())
    vram = str(sizes.small + sizes.block * 7 // 10)
    ways = {
        "mapped": ("--blocks_to_swap", "2"),
        "ring": ("--blocks_to_swap", "2", "--block_swap_ring_size", "1", "--host_weights", "staged"),
        "single": ("--blocks_to_swap", "1"),
        "bytes": ("--weights_vram", vram),
    }
    for name, way in ways.items():
        lines = run(folder, *more, *way, "--output_name", name)
        assert any("stream from" in line for line in lines)
        plain, swapped = (read_tensors(folder / "out" / f"{stem}.safetensors") for stem in ("plain", name))
        assert plain == swapped, name
        pictures = [sorted((folder / "out" / "sample").glob(f"{stem}_*")) for stem in ("plain", name)]
        assert list(map(pixels, pictures[0])) == list(map(pixels, pictures[1])) != []
    assert hash_of(folder / "base.safetensors") == base


def pixels(path):
    """The frames of a picture or clip, whose file also names the checkpoint."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def read_tensors(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return content[start:]


def private_bytes():
    """Memory of this process alone, with nothing in it that was freed already."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])


def write_wide_base(path):
    """75 MB of weights in 12 blocks."""
    config = dataclasses.replace(CONFIG, dim=512, ffn_dim=1024, num_layers=12, text_dim=64)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in WanModel(config).state_dict().items()}
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_model_with_a_slice_of_a_file_takes_no_memory_of_its_own(tmp_path):
    """Two of the blocks are in buffers, and a step needs some; the rest stays in the file."""
    base, concept = tmp_path / "base.safetensors", tmp_path / "concept.slice.safetensors"
    write_wide_base(base)
    save_slice(attach_slice(load_dit(base), "0.001", 2), base, concept)
    before = private_bytes()
    below = slices_on_base(read_checkpoint_header(base), [read_slice_file(concept)], [1.0])
    model, overlays = load_with_slices(base, torch.bfloat16, below)
    trained = attach_slice(model, "0.001", 1)
    checkpoint_blocks(model)
    place_model(model, "cpu", SwapConfig(12), trained, LoadedWeights(mapped=True, overlays=overlays))
    x, context = torch.randn(1, 16, 1, 4, 4), [torch.randn(4, 64)]
    for _ in range(2):
        model(x, torch.tensor([500.0]), context).square().mean().backward()
        torch.optim.SGD(trained.parameters(), lr=1e-3).step()
        trained.write_back()
    assert private_bytes() - before < base.stat().st_size / 2
