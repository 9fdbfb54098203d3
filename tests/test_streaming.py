"""A base is patched a few rows at a time, and comes out as if each matrix had been changed as a whole."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chain import names_of, train_concept, write_base, write_chain

from utils import slice_saving
from utils.cli.slices import main
from utils.selective_finetune import SliceError, attach_slice, ids_available, slice_indices, slice_units
from utils.slice_saving import change_rows, read_header, read_slice, save_checkpoint, snapshot, stream
from wan.errors import InputError
from wan.loading import load_dit

PIECES = (1, 200, 700, 5000)  # bytes: one row, and numbers of rows that do not divide a matrix or its row groups


@pytest.fixture(params=PIECES)
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(slice_saving, "_PIECE", request.param)
    return request.param


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.mark.parametrize(("shape", "ff"), [((24, 10), "0.013"), ((40, 7), "0.3"), ((7, 5), "0.19"), ((16, 3), "1")])
@pytest.mark.parametrize("step", [1, 3, 5, 100])
def test_a_slice_changed_by_rows_is_the_slice_changed_at_once(shape, ff, step):
    for ffid in range(1, ids_available(ff) + 1):
        units, matrix = slice_units("a", shape, ff, ffid), torch.randn(shape)
        whole, old, final = matrix.clone(), torch.zeros(units.count), torch.randn(units.count)
        units.write(whole, final)

        def new(values, k, old=old, final=final):
            old[k] = values
            return final[k]

        start = units.cut(units.read(matrix)).clone()
        for first in range(0, shape[0], step):
            change_rows(units, new, matrix[first : first + step], first)
        assert torch.equal(matrix, whole) and torch.equal(old, start)


def test_slices_applied_and_removed_in_pieces_are_those_of_whole_matrices(small_pieces, chain, tmp_path):
    base, one, two = (str(chain / f"{name}.safetensors") for name in ("base", "one.slice", "two.slice"))
    both, left = str(tmp_path / "both.safetensors"), str(tmp_path / "left.safetensors")
    main(["apply", base, two, one, "-o", both])
    assert (tmp_path / "both.safetensors").read_bytes() == (chain / "two.safetensors").read_bytes()
    main(["remove", both, "two", "--base", base, "-o", left])
    assert load_all_bytes(left) == load_all_bytes(chain / "one.safetensors")
    main(["extract", both, "--base", base, "-o", str(tmp_path / "slices")])
    for name in names_of(tmp_path / "slices"):
        assert load_all_bytes(tmp_path / "slices" / name) == load_all_bytes(chain / name)


def load_all_bytes(path):
    return {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in load_file(path).items()}


def test_a_run_s_checkpoint_in_pieces_is_that_of_whole_matrices(small_pieces, chain, tmp_path):
    trained = train_concept(chain / "base.safetensors", tmp_path, "one", "0.05", 2)
    assert load_all_bytes(tmp_path / "one.safetensors") == load_all_bytes(chain / "one.safetensors")
    stored = snapshot(trained, chain / "base.safetensors").start
    units = {name: matrix.units for name, matrix in trained.matrices.items()}
    read = read_slice(chain / "base.safetensors", units)
    assert read.keys() == stored.keys() and all(torch.equal(read[name], stored[name]) for name in read)


@pytest.mark.parametrize("place", [0, -1])
def test_one_other_value_in_the_base_is_found_in_whatever_piece_it_lies(small_pieces, chain, tmp_path, place):
    name = "blocks.2.ffn.0.weight"
    trained = attach_slice(load_dit(chain / "base.safetensors"), "0.05", 2)
    weights = load_file(chain / "base.safetensors")
    indices = slice_indices(name, weights[name].shape, "0.05", 2).sort().values
    weights[name].view(-1)[indices[place]] += 1
    save_file(weights, tmp_path / "other.safetensors", {"num_heads": "4", "text_len": "7"})
    with pytest.raises(SliceError, match=f"{name} in the base file is not what this slice was trained on"):
        save_checkpoint(trained, tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    applied = ["apply", str(tmp_path / "other.safetensors"), str(chain / "one.slice.safetensors"), "-o"]
    with pytest.raises(InputError, match="it holds other values where the slice lies"):
        main([*applied, str(tmp_path / "out.safetensors")])
    assert names_of(tmp_path) == {"other.safetensors"}


def test_a_base_that_ends_early_is_an_error(small_pieces, tmp_path):
    tensors = read_header(write_base(tmp_path / "base.safetensors"))[0].values()
    with (tmp_path / "base.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "base.safetensors").stat().st_size - 1)
    with pytest.raises(SliceError, match="truncated"):
        list(stream(tensors))


def test_no_more_of_a_matrix_is_in_memory_than_a_piece_of_whole_rows(small_pieces, chain):
    tensors, seen = read_header(chain / "base.safetensors")[0], []
    name = "blocks.0.ffn.0.weight"
    pieces = list(map(len, stream([tensors[name]], {name: lambda rows, first: seen.append((first, len(rows)))})))
    row = 2 * tensors[name].shape[1]
    assert max(pieces) <= max(small_pieces, row) and sum(pieces) == tensors[name].size
    assert seen == [(sum(pieces[:i]) // row, pieces[i] // row) for i in range(len(pieces))]
