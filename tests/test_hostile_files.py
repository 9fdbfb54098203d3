"""Damaged and hostile files: a clear error or a correct read, never a crash, a hang, or memory beyond the file."""

import json
import os
import pickle
import struct
import tracemalloc
from time import process_time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_chain import METADATA, write_chain

from utils.cli.slices import main
from utils.run.state import read_state
from utils.selective_finetune import SliceError
from utils.slice_saving import read_header
from utils.slices.ledger import read_ledger
from utils.slices.listing import as_json, list_files, table
from utils.slices.on_base import read_slice_file, slices_on_base
from wan.errors import InputError
from wan.loading import read_checkpoint_header
from wan.safetensors_header import read_file_header
from wan.state_dict_files import read_state_dict


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain"))


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="BF16", shape=(2,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "half a character for a dtype": {"a": entry("\ud800")},
    "a dtype that fills the screen": {"a": entry("X" * 100_000)},
    "a name with a separator": {"../a": entry()},
    "a name with a backslash": {"a\\b": entry()},
    "a name with a line break": {"a\nb": entry()},
    "half a character": {"a\ud800": entry()},
    "half a character in the metadata": {"__metadata__": {"a": "\udfff"}, "a": entry()},
    "truth for a length": {"a": entry(shape=(True, 2))},
    "a fraction for an offset": {"a": entry(offsets=(0, 4.0))},
    "a negative length": {"a": entry(shape=(-2,))},
    "a length beyond 64 bits": {"a": entry("X", (2**64,), (0, 4))},
    "offsets of four thousand digits": {"a": entry("X", offsets=(-(10**4000), 10**4000))},
    "a shape whose product never ends": {"a": entry(shape=[2**62] * 10_000)},
    "a hole": {"a": entry(), "b": entry(offsets=(5, 9))},
    "an overlap": {"a": entry(), "b": entry(offsets=(2, 6))},
    "a table in a table": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "another encoding": json.dumps({"a": entry()}).encode("utf-16-le"),
    "numbers as metadata": {"__metadata__": {"a": 1}, "a": entry()},
    "not a table": b'["a"]',
    "not a number": b'{"a":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_told_in_one_line(tmp_path, case):
    path = write_raw(tmp_path / "a.safetensors", HOSTILE[case], bytes(4))
    for read in (read_file_header, read_slice_file, read_checkpoint_header, lambda path: read_state_dict(path, "VAE")):
        with pytest.raises(InputError) as error:
            read(path)
        told = str(error.value)
        assert "\n" not in told and len(told) < 600 and told.encode()


def test_metadata_that_are_null_are_none_for_every_reader(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", {"__metadata__": None, "a": entry()}, bytes(4))
    assert read_file_header(path)[1] == read_header(path)[1] == {}


def test_many_names_of_which_the_last_stands_twice_are_read_in_linear_time(tmp_path):
    names = [f'"{number}":{{}}' for number in range(200_000)]
    path = write_raw(tmp_path / "a.safetensors", ("{" + ",".join([*names, names[-1]]) + "}").encode())
    began = process_time()
    with pytest.raises(InputError, match="appears twice"):
        read_file_header(path)
    assert process_time() - began < 5


SLICE = {"contract": 1, "ff": "0.05", "ffid": 2, "name": "one", "steps": 1}
LEDGERS = [
    json.dumps([{**SLICE, "strength": 10**400}]), json.dumps([{**SLICE, "date": "a\x1b[2J"}]),
    "{", "{}", "[1]", '[{"ff": "0.1"}]', "[" * 100_000,
    *(json.dumps([{"contract": 1, "ff": "0.05", "ffid": 2, "name": "one", "steps": 1, "date": "", **wrong}])
      for wrong in ({"ff": 0.05}, {"ff": "1e-999999999"}, {"ff": "nan"}, {"ff": "0"}, {"ff": "1/0"}, {"ffid": 21},
                    {"ffid": 0}, {"ffid": True}, {"name": "a\nb"}, {"name": "x" * 999}, {"name": "\x9b2J"},
                    {"steps": -1}, {"base": "zz"}, {"start": 3}, {"strength": "1"}, {"date": []}, {"captions": "a"},
                    {"strength": 1e999}, {"rescaled": 1})),
]  # fmt: skip


@pytest.mark.parametrize("text", LEDGERS, ids=lambda text: text[-40:])
def test_a_ledger_that_cannot_be_is_refused(text):
    with pytest.raises(InputError, match="damaged"):
        read_ledger({"wan_slices": text}, "a.safetensors")


def changed_slice(files, path, change):
    """The slice `one` with its tensors or entry changed, written as the format wants it."""
    header = read_slice_file(files / "one.slice.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(header.path).items()}
    told = {"contract": 1, "ff": "0.05", "ffid": 2, "name": "one", "steps": 20, "date": ""}
    told |= {"base": header.entry.base, "start": header.entry.start}
    change(tensors, told)
    save_file(tensors, path, {"wan_slices": json.dumps([told])})
    return path


NAME = "blocks.1.ffn.2.weight"
WRONG_SLICES = {
    "NaN": (lambda tensors, _: tensors[NAME].__setitem__(3, float("nan")), "NaN or infinite values"),
    "infinity": (lambda tensors, _: tensors[NAME].__setitem__(0, float("inf")), "NaN or infinite values"),
    "one value too few": (lambda tensors, _: tensors.update({NAME: tensors[NAME][1:].clone()}), "has 229 values, and"),
    "a matrix is missing": (lambda tensors, _: tensors.pop(NAME), "has 0 values, and"),
    "a matrix that is not there": (lambda tensors, _: tensors.update({"blocks.7.a.weight": torch.ones(2).bfloat16()}),
                                   "blocks.7.a.weight has 2 values"),
    "a tensor that no slice has": (lambda tensors, _: tensors.update({"head.head.bias": torch.ones(2).bfloat16()}),
                                   "head.head.bias has 2 values"),
    "another dtype": (lambda tensors, _: tensors.update({NAME: tensors[NAME].half()}), "is F16, in .* BF16"),
    "integers": (lambda tensors, _: tensors.update({NAME: tensors[NAME].int()}), "not a tensor of a slice"),
    "another contract": (lambda _, told: told.update(contract=2), "slice contract 2, this program knows 1"),
    "another slice": (lambda _, told: told.update(ffid=3), "has 230 values, and slice ff 0.05 ffid 3 has 231"),
    "another share": (lambda _, told: told.update(ff="0.04"), "values, and slice ff 0.04"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SLICES)
def test_a_slice_file_that_does_not_follow_from_its_contract_is_refused(files, tmp_path, case):
    change, told = WRONG_SLICES[case]
    path = changed_slice(files, tmp_path / "wrong.safetensors", change)
    with pytest.raises(InputError, match=told):
        main(["apply", str(files / "base.safetensors"), str(path), "-o", str(tmp_path / "out.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_a_name_in_the_ledger_that_leads_elsewhere_becomes_no_file(files, tmp_path):
    header = read_checkpoint_header(files / "one.safetensors")
    text = header.metadata["wan_slices"].replace('"one"', '"../elsewhere"')
    save_file(load_file(files / "one.safetensors"), tmp_path / "a.safetensors", {**METADATA, "wan_slices": text})
    with pytest.raises(InputError, match="cannot be a file's name"):
        main(["extract", f"{tmp_path}/a.safetensors", "--base", f"{files}/base.safetensors", "-o", str(tmp_path)])


class Harmful:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_state_or_a_pth_file_is_not_run(tmp_path, capsys):
    (tmp_path / "a-state").mkdir()
    torch.save({"format": 2, "settings": {}, "state": Harmful()}, tmp_path / "a-state" / "state.pt")
    torch.save({"a": Harmful()}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match="cannot be used"):
        read_state(tmp_path / "a-state")
    with pytest.raises(InputError, match="contains code"):
        read_state_dict(tmp_path / "vae.pth", "VAE")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InputError, match="not in torch"):
        read_state_dict(tmp_path / "raw.pth", "VAE")
    assert capsys.readouterr().out == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "F8_E4M3", "F64", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 40)).map(list) | json_values,
    }
)
near_ledgers = st.lists(
    st.fixed_dictionaries(
        {
            "contract": st.integers(0, 2),
            "ff": st.sampled_from(["0.1", "1", "1/3", "1e-3", "9e99", "-1"]) | st.text(max_size=6),
            "ffid": st.integers(-1, 12),
            "name": st.text(max_size=6),
            "steps": st.integers(-1, 9),
        },
        optional={"date": json_values, "base": json_values, "start": json_values, "strength": json_values},
    )
    | json_values,
    max_size=3,
).map(json.dumps)
near_headers = st.dictionaries(
    st.sampled_from(["blocks.0.ffn.0.weight", "head.modulation", "a"]) | st.text(max_size=8),
    near_entries | json_values,
    max_size=3,
).flatmap(
    lambda tensors: st.one_of(
        st.just(tensors),
        near_ledgers.map(lambda text: {**tensors, "__metadata__": {"wan_slices": text}}),
        json_values.map(lambda value: {**tensors, "__metadata__": value}),
    )
)


@st.composite
def hostile_bytes(draw, whole: bytes):
    """Headers of our own making, or a real slice file with bytes changed, cut or added."""
    if draw(st.booleans()):
        text = json.dumps(draw(near_headers)).encode()
        length = len(text) if draw(st.integers(0, 9)) else draw(st.integers(0, 2**64 - 1))
        return struct.pack("<Q", length) + text + draw(st.binary(max_size=40))
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, min(len(content), 4000) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def read_all(path, base):
    """Everything that reads such a file; each result or a one-line error."""
    for read in (read_slice_file, read_checkpoint_header, lambda path: read_state_dict(path, "VAE")):
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000 and str(error).encode()
    try:
        files = list_files([path])
        "\n".join(table(files)).encode()
        json.dumps(as_json(files))
    except InputError as error:
        assert str(error).encode()
    try:
        below = slices_on_base(base, [read_slice_file(path)], [1.0])
        assert all(torch.isfinite(below.files[0].values(name)).all() for name in below.files[0].tensors)
    except (InputError, SliceError) as error:
        assert str(error).encode()


def fuzz(files, path, examples):
    base = read_checkpoint_header(files / "base.safetensors")
    whole = (files / "one.slice.safetensors").read_bytes()
    inputs = 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_bytes(whole))
    def attempt(content):
        path.write_bytes(content)
        nonlocal inputs
        inputs += 1
        began = process_time()
        read_all(path, base)
        assert process_time() - began < 10

    attempt()
    return inputs


def test_no_damaged_file_does_more_than_to_be_refused(files, tmp_path):
    assert fuzz(files, tmp_path / "a.safetensors", 150) >= 150


@pytest.mark.slow
def test_twenty_thousand_damaged_files_do_no_more_than_to_be_refused(files, tmp_path):
    assert fuzz(files, tmp_path / "a.safetensors", 20_000) >= 20_000


def test_reading_takes_no_more_memory_than_the_file_has_reason_for(tmp_path):
    """Sizes that only the header claims are never allocated."""
    claims = {"a": entry("F32", (2**40,), (0, 2**42))}
    path = write_raw(tmp_path / "a.safetensors", claims, bytes(16))
    tracemalloc.start()
    for read in (read_file_header, read_slice_file, read_checkpoint_header):
        with pytest.raises(InputError):
            read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_what_is_there_and_yet_not_a_file_is_not_called_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (read_checkpoint_header, read_file_header, lambda path: read_state_dict(path, "VAE")):
        with pytest.raises(InputError, match=r"pipe\.safetensors is not a regular file"):
            read(tmp_path / "pipe.safetensors")
