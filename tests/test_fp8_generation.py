"""Generation with a model that is kept in fp8: against a file that holds what float8 makes of its matrices."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8_base import rounded
from test_generation import files, flags, made  # noqa: F401

from utils.selective_finetune import attach_slice
from utils.slice_saving import save_slice
from wan.errors import InputError
from wan.loading import load_dit
from wan_generate_video import main

METADATA = {"num_heads": "4", "text_len": "16"}


@pytest.fixture
def rounded_file(files, tmp_path):  # noqa: F811
    def write(fp8, patch=lambda weights: None):
        stored = load_file(files / "dit.safetensors")
        for name, tensor in stored.items():
            if name.startswith("blocks.") and tensor.dim() == 2:
                stored[name] = rounded(tensor, fp8)
        patch(stored)
        save_file(stored, tmp_path / f"{fp8}.safetensors", METADATA)
        return ("--dit", str(tmp_path / f"{fp8}.safetensors"))

    return write


@pytest.mark.parametrize("more", [(), ("--blocks_to_swap", "1")], ids=" ".join)
@pytest.mark.parametrize("fp8", ["plain", "scaled"])
def test_a_picture_is_that_of_the_rounded_model(files, rounded_file, tmp_path, fp8, more):  # noqa: F811
    flags_of = {"plain": ("--fp8",), "scaled": ("--fp8", "--fp8_scaled")}
    expected = made(files, tmp_path / "a", *rounded_file(fp8))
    assert np.array_equal(made(files, tmp_path / "b", *flags_of[fp8], *more), expected)
    assert not np.array_equal(made(files, tmp_path / "c"), expected)


def test_slices_are_put_on_top_in_full_precision(files, rounded_file, tmp_path, capsys):  # noqa: F811
    trained = attach_slice(load_dit(files / "dit.safetensors"), "0.1", 2)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_slice(trained, files / "dit.safetensors", tmp_path / "one.slice.safetensors")

    def patch(weights):
        for name, matrix in trained.matrices.items():
            matrix.write(weights[name])

    own = ("--slices", str(tmp_path / "one.slice.safetensors"), "--fp8", "--fp8_scaled", "--blocks_to_swap", "2")
    expected = made(files, tmp_path / "a", *rounded_file("scaled", patch))
    assert np.array_equal(made(files, tmp_path / "b", *own), expected)
    assert "block matrices rounded to fp8 with a scale for each row, with " in capsys.readouterr().out


def test_a_file_that_is_in_fp8_is_not_rounded_again(files, tmp_path):  # noqa: F811
    stored = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(files / "dit.safetensors").items()}
    save_file(stored, tmp_path / "fp8.safetensors", METADATA)
    with pytest.raises(InputError, match="is stored in fp8, and --fp8 rounds bf16, fp16 and fp32 files"):
        main(flags(files, tmp_path, "--prompt", "a fox", "--fp8", "--dit", str(tmp_path / "fp8.safetensors")))
