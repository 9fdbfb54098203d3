"""The header of a safetensors file, checked against the file itself before anything maps it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes `start` up to `stop` of `file`, named `key` there; `dtype` as the format spells it."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_file_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries of one file by stored name, in the order of their bytes, and the file's metadata.

    InputError, in one line with the path, if the file is missing, truncated, damaged or no safetensors file.
    """
    text, size = _header_text(path)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is no safetensors file: its header is no table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path} is damaged: its metadata are not texts")
    data_start = 8 + len(text)
    entries = [_entry(path, key, fields, data_start) for key, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_extent(path, entries, data_start, size)
    return {entry.key: entry for entry in entries}, metadata


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor that is not empty, copied into memory; for the small ones that say how others are to be read."""
    return torch.frombuffer(bytearray(read_bytes(entry)), dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def read_bytes(entry: TensorEntry) -> bytes:
    """The bytes that the file stores for a tensor."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.stop - entry.start)


def _header_text(path: Path) -> tuple[bytes, int]:
    if not path.is_file():
        raise InputError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER or file.read(1) != b"{":
            raise InputError(f"{path} is no safetensors file ({size} bytes): get it again, or give another file")
        if 8 + length > size:
            raise InputError(f"{path} is truncated: its header has {length} bytes, the whole file {size}; get it again")
        file.seek(8)
        return file.read(length), size


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return table


def _entry(path: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            entry = TensorEntry(path, key, dtype, tuple(shape), data_start + start, data_start + stop)
        case _:
            raise InputError(f"{path} is damaged: the header's entry of {key} cannot be read")
    if dtype in DTYPES and stop - start != entry.numel * DTYPES[dtype].itemsize:
        raise InputError(f"{path} is damaged: {key} is {dtype} {shape} but has {stop - start} bytes")
    return entry


def _check_extent(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position or entry.stop < entry.start:
            raise InputError(f"{path} is damaged: the bytes of {entry.key} do not follow those of the tensor before it")
        position = entry.stop
    if size < position:
        raise InputError(f"{path} is truncated: it has {size} of {position} bytes; get it again")
    if size > position:
        raise InputError(f"{path} is damaged: {size - position} bytes follow its last tensor")
