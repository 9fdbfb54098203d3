"""The header of a safetensors file, checked against the file itself before anything maps it.

Imports no torch, so that a command can list a folder of files at once.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from wan.errors import InputError

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
_LONGEST_HEADER = 100_000_000  # the format's own limit
_MOST_AXES = 16
_MOST_BYTES = 1 << 63
_LONGEST_REASON = 200
_DTYPE = re.compile(r"[A-Za-z0-9_]{1,20}")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


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

    InputError, in one line with the path, if the file is missing, truncated, damaged or not a safetensors file.
    """
    try:
        text, size = _header_text(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        # Decoded here: the parser alone would take UTF-16 and UTF-32 as well.
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise InputError(f"{path} is damaged or not a safetensors file: its header cannot be read ({reason})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a safetensors file: its header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise InputError(f"{path} is damaged: its metadata is not text")
    data_start = 8 + len(text)
    entries = [_entry(path, key, fields, data_start) for key, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_extent(path, entries, data_start, size)
    return {entry.key: entry for entry in entries}, metadata


def read_bytes(entry: TensorEntry) -> bytes:
    """The bytes that the file stores for a tensor."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.stop - entry.start)


def why_not_a_file(path: Path) -> str:
    """Why `path`, for which is_file() is False, is not one, as the end of a sentence."""
    if path.is_dir():
        return "is a folder, not a file"
    return "is not a regular file" if path.exists() else "does not exist"  # a named pipe, a device


def _header_text(path: Path) -> tuple[bytes, int]:
    if not path.is_file():
        raise InputError(f"{path} {why_not_a_file(path)}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER or file.read(1) != b"{":
            raise InputError(
                f"{path} is not a safetensors file ({size} bytes): download it again, or give another file"
            )
        if 8 + length > size:
            raise InputError(
                f"{path} is truncated: its header has {length} bytes, the whole file {size}; download it again"
            )
        file.seek(8)
        return file.read(length), size


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name[:80]!a} appears twice")
        table[name] = value
    return table


def _is_text(value: object) -> bool:
    """Whether it is a text that can be written again: JSON's escapes also make halves of characters."""
    return isinstance(value, str) and not _HALF_CHARACTER.search(value)


def _entry(path: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    if not key.isprintable() or set(key) & set("/\\"):
        raise InputError(f"{path} is damaged: {key[:80]!a} is not a tensor's name")
    if not _is_entry(fields):
        raise InputError(f"{path} is damaged: the header's entry of {key[:80]} cannot be read")
    dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
    entry = TensorEntry(path, key, dtype, tuple(shape), data_start + start, data_start + stop)
    if dtype in ITEM_BYTES and stop - start != entry.numel * ITEM_BYTES[dtype]:
        raise InputError(f"{path} is damaged: {key[:80]} is {dtype} {shape} but has {stop - start} bytes")
    return entry


def _is_entry(fields: object) -> bool:
    if not isinstance(fields, dict):
        return False
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        return False
    if not (isinstance(shape, list) and len(shape) <= _MOST_AXES and isinstance(offsets, list) and len(offsets) == 2):
        return False
    return all(type(number) is int and 0 <= number < _MOST_BYTES for number in [*shape, *offsets])


def _check_extent(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position or entry.stop < entry.start:
            name = entry.key[:80]
            raise InputError(f"{path} is damaged: the bytes of {name} do not follow those of the tensor before it")
        position = entry.stop
    if size < position:
        raise InputError(f"{path} is truncated: it has {size} of {position} bytes; download it again")
    if size > position:
        raise InputError(f"{path} is damaged: {size - position} bytes follow its last tensor")
