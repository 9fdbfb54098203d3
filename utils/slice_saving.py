"""What a trained slice leaves on disk: a checkpoint, which is its base with the slice in it, or the slice alone.

    save_checkpoint(trained, "base.safetensors", "character1.safetensors", concept="character1", steps=step)
    save_slice(trained, "base.safetensors", "character1.slice.safetensors", concept="character1", steps=step)

A checkpoint is written by streaming the base once, patched on the way; every file is whole or not there.
This file needs torch and selective_finetune.py, beside which it can be copied into another trainer.
Shapes: M units of a slice in one row group, R rows of a matrix.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if __package__:
    from .selective_finetune import (
        CONTRACT,
        NameOf,
        SliceError,
        SliceUnits,
        TrainedSlice,
        contract_name,
        exact_fraction,
        moved_values,
    )
else:  # copied beside another trainer's scripts
    from selective_finetune import (
        CONTRACT,
        NameOf,
        SliceError,
        SliceUnits,
        TrainedSlice,
        contract_name,
        exact_fraction,
        moved_values,
    )

LEDGER_KEY = "wan_slices"
UNFINISHED = ".wan.tmp"  # what the names of half-written files end in: ours alone, since they are deleted
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_NAME = 255  # characters
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_BLOCK_MATRIX = re.compile(r"(?:.*blocks\.\d+|.+\.\d+\..+)\.weight")
_PIECE = 1 << 22  # bytes that are read, patched and written in turn: few enough that the disk reads on meanwhile
_CHUNK = 1 << 18  # bytes; larger writes took five times as long (Linux 6.18, ext4)
Files = str | Path | Sequence[str | Path]  # one safetensors file, or its shards
Patch = Callable[[Tensor, int], None]  # changes rows of a matrix on their way from a file; int: the first of them


class StoredTensor(NamedTuple):
    """A tensor in a file, or to be written: its contract name, its bytes, its dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: list[int]
    size: int  # in bytes
    file: str | Path | None = None
    begin: int = 0  # of its bytes in the file


def save_checkpoint(
    trained: TrainedSlice,
    base: Files,
    path: str | Path,
    metadata: Mapping | None = None,
    concept: str = "",
    steps: int = 0,
) -> None:
    """Writes the base (a safetensors file, or its shards) with the slice in use to `path`, streaming it once.

    Names, dtypes, order and metadata are the base's; `metadata` and this slice's line in the ledger are added.
    A save that is interrupted leaves whatever stood at `path`. SliceError if `concept` cannot be in a ledger.
    """
    check_concept(concept)
    refuse_base(path, base)
    tensors, known = read_header(base, trained.name_of)
    start, final = stored_values(trained, base)
    ledger = _extended(read_ledger(known), ledger_entry(trained, base, start, concept, steps))
    told = {**known, **(metadata or {}), LEDGER_KEY: json.dumps(ledger)}
    write_safetensors(path, tensors, told, stream(tensors.values(), slice_patches(trained, start, final)))


def save_slice(
    trained: TrainedSlice,
    base: Files,
    path: str | Path,
    metadata: Mapping | None = None,
    concept: str = "",
    steps: int = 0,
) -> None:
    """Writes the slice alone: its final values in the base's dtype, in line order, and its line in the ledger."""
    check_concept(concept)
    refuse_base(path, base)
    start, final = stored_values(trained, base)
    known = read_ledger(read_header(base)[1])
    ledger = _extended(known, ledger_entry(trained, base, start, concept, steps))[-1:]
    write_slice(path, final, {**(metadata or {}), LEDGER_KEY: json.dumps(ledger)})


def stored_values(trained: TrainedSlice, base: Files) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the base's files hold of the slice, and what a checkpoint will: by name, on the CPU."""
    dtypes = stored_dtypes(trained, base)
    start = {name: matrix.start.cpu() for name, matrix in trained.matrices.items()}
    cast = [name for name, values in start.items() if dtypes[name] != values.dtype]  # to be trained
    start |= read_slice(base, {name: trained.matrices[name].units.to("cpu") for name in cast}, trained.name_of)
    return start, {n: moved_values(start[n], m.difference.detach().cpu()) for n, m in trained.matrices.items()}


def stored_dtypes(trained: TrainedSlice, base: Files) -> dict[str, torch.dtype]:
    """The dtype of each matrix in the base's files; SliceError where one is missing, or cannot take a slice."""
    stored = {tensor.name: tensor.dtype for tensor in read_header(base, trained.name_of)[0].values()}
    for name in trained.matrices:
        if stored.get(name) not in DTYPES:
            found = stored.get(name, "missing")
            raise SliceError(f"{name} is {found} in the base file: slices are saved into bf16, fp16 or fp32")
    return {name: DTYPES[stored[name]] for name in trained.matrices}


def slice_patches(trained: TrainedSlice, start: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> dict[str, Patch]:
    """What puts `final` in the place of `start` into the base's matrices; SliceError where they hold otherwise."""
    units = {name: matrix.units.to("cpu") for name, matrix in trained.matrices.items()}
    return {n: functools.partial(_replace, n, own, start[n], final[n]) for n, own in units.items()}


def ledger_entry(trained: TrainedSlice, base: Files, start: Mapping[str, Tensor], concept: str, steps: int) -> dict:
    """This slice's line in the ledger of a file; `start` is what the base's files hold of it."""
    own = {"contract": CONTRACT, "ff": trained.ff, "ffid": trained.ffid, "name": concept, "steps": steps}
    date = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    hashed = slice_digest({name: value_digest(values) for name, values in start.items()})
    return {**own, "date": date, "base": base_identity(base, trained.name_of), "start": hashed}


def _listed(base: Files) -> Sequence[str | Path]:
    return [base] if isinstance(base, str | Path) else base


def read_ledger(metadata: Mapping[str, str]) -> list[dict]:
    """The slices that a checkpoint's safetensors metadata says it holds, oldest first."""
    return json.loads(metadata.get(LEDGER_KEY, "[]"))


def is_concept_name(text: str) -> bool:
    """Whether a ledger may name a concept so: 255 characters at the most, none that steers a terminal."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs"))
    return len(text) <= _LONGEST_NAME and all(character in _JOINERS for character in refused)


def check_concept(name: str) -> None:
    """SliceError if no ledger may name a concept so."""
    if not is_concept_name(name):
        raise SliceError(
            f"the name {name[:40]!a} cannot be a concept's: {_LONGEST_NAME} characters are allowed, those that steer a "
            "terminal are not"
        )


def _extended(ledger: Sequence[dict], entry: dict) -> list[dict]:
    """The ledger with `entry` as its newest; a slice that was trained further keeps its first start, adds up steps."""
    slices = [(one["contract"], exact_fraction(one["ff"]), one["ffid"]) for one in (*ledger, entry)]
    earlier = [one for one, which in zip(ledger, slices, strict=False) if which == slices[-1]]
    if earlier:
        steps = entry["steps"] + sum(one["steps"] for one in earlier)
        entry = {**entry, "steps": steps, "start": earlier[0].get("start")}
    return [*(one for one in ledger if one not in earlier), entry]


def read_header(base: Files, name_of: NameOf = contract_name) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of the files by its stored name, in the order of their bytes; their metadata."""
    tensors, metadata = {}, {}
    for path in _listed(base):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path) - 8:
                raise SliceError(f"{path} is not a whole safetensors file")
            header = json.loads(file.read(length))
        metadata |= header.pop("__metadata__", {})
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            stored = (name_of(key), entry["dtype"], entry["shape"], end - begin)
            tensors[key] = StoredTensor(*stored, path, 8 + length + begin)
    return tensors, metadata


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether slices are cut from a file's tensor of this contract name, as far as name and shape tell."""
    return len(shape) == 2 and _BLOCK_MATRIX.fullmatch(name) is not None


def base_identity(base: Files, name_of: NameOf = contract_name) -> str:
    """SHA-256 over every tensor that no slice can touch: the same all along a chain of concepts on one base."""
    digest = hashlib.sha256()
    for tensor in sorted(read_header(base, name_of)[0].values()):
        if not is_block_matrix(tensor.name, tensor.shape):
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for piece in stream([tensor]):
                digest.update(piece)
    return digest.hexdigest()


def slice_digest(digests: Mapping[str, bytes]) -> str:
    """SHA-256 over the digests of a slice's values by matrix: its start tells a merged base from the slice's own."""
    return hashlib.sha256(b"".join(name.encode() + digests[name] for name in sorted(digests))).hexdigest()


def value_digest(values: Tensor) -> bytes:
    """SHA-256 of the bytes of a matrix's values."""
    return hashlib.sha256(values.view(torch.uint8).numpy()).digest()


def stream(tensors: Iterable[StoredTensor], patches: Mapping[str, Patch] | None = None) -> Iterator[memoryview]:
    """The bytes of the tensors in order, patched by contract name; each piece lasts until the next one."""
    tensors, patches = list(tensors), patches or {}
    if missing := patches.keys() - {tensor.name for tensor in tensors}:
        raise SliceError(f"the base has no {min(missing)}: it is not the base of this slice")
    for tensor in tensors:
        patch = patches.get(tensor.name)
        row = tensor.size // tensor.shape[0] if patch else 1  # bytes that stay together
        step = max(_PIECE // row, 1) * row
        buffer = memoryview(bytearray(min(step, tensor.size)))
        with open(tensor.file, "rb") as source:
            source.seek(tensor.begin)
            for begin in range(0, tensor.size, step):
                piece = buffer[: tensor.size - begin]
                if source.readinto(piece) < len(piece):
                    raise SliceError(f"{tensor.file} is truncated")
                if patch:
                    rows = torch.frombuffer(piece, dtype=DTYPES[tensor.dtype]).view(-1, *tensor.shape[1:])
                    patch(rows, begin // row)
                yield piece


def change_rows(units: SliceUnits, rows: Tensor, first: int, new: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Puts new(values, k) in the place of the slice's values in `rows` [R, in] of the matrix, from row `first` on.

    k are the values' numbers in line order; they come group by group and not in that order.
    """
    flat, stop = rows.view(-1), first + len(rows)
    for top in range(first - first % units.rows, stop, units.rows):
        unit_M1 = (units.groups_U == top // units.rows).nonzero()
        row_R = torch.arange(max(first, top), min(stop, top + units.rows))
        at_MR = (row_R - first) * units.shape[1] + units.columns_U[unit_M1]
        k_MR = unit_M1 * units.rows + row_R - top - units.offset
        own_MR = (k_MR >= 0) & (k_MR < units.count)
        at, k = at_MR.masked_select(own_MR), k_MR.masked_select(own_MR)
        # flat[at] would wait for torch's other threads, which takes milliseconds where a core is busy.
        flat.index_copy_(0, at, new(flat.index_select(0, at), k))


def read_slice(base: Files, units: Mapping[str, SliceUnits], name_of: NameOf = contract_name) -> dict[str, Tensor]:
    """What the files hold of a slice, by contract name in line order."""
    tensors = [tensor for tensor in read_header(base, name_of)[0].values() if tensor.name in units]
    values = {t.name: torch.empty(units[t.name].count, dtype=DTYPES[t.dtype]) for t in tensors}

    def record(name: str, rows: Tensor, first: int) -> None:
        change_rows(
            units[name], rows, first, lambda stored, k: values[name].index_copy_(0, k, stored).index_select(0, k)
        )

    for _ in stream(tensors, {name: functools.partial(record, name) for name in units}):
        pass
    return values


def _replace(name: str, units: SliceUnits, start: Tensor, final: Tensor, rows: Tensor, first: int) -> None:
    def checked(values: Tensor, k: Tensor) -> Tensor:
        if not torch.equal(values.view(torch.uint8), start.index_select(0, k).view(torch.uint8)):
            raise SliceError(f"{name} in the base file is not what this slice was trained on")
        return final.index_select(0, k)

    change_rows(units, rows, first, checked)


def write_slice(path: str | Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a slice file: the final values of each matrix, in line order, by contract name."""
    names, ordered = {dtype: name for name, dtype in DTYPES.items()}, [(name, values[name]) for name in sorted(values)]
    tensors = {name: StoredTensor(name, names[own.dtype], list(own.shape), own.nbytes) for name, own in ordered}
    write_safetensors(path, tensors, metadata, (own.view(torch.uint8).numpy() for _, own in ordered))


def refuse_base(path: str | Path, base: Files) -> None:
    """SliceError if `path` is one of the base's files, which are read while it is written."""
    if any(os.path.exists(path) and os.path.samefile(path, file) for file in _listed(base)):
        raise SliceError(f"{path} is the base itself: write to another file")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], chunks: Iterable
) -> None:
    """Writes tensors, whose bytes `chunks` gives in their order, to `path`."""
    # Sorted, so that slices give one file in whatever order they came.
    table, size = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
    for key, tensor in tensors.items():
        offsets = [size, size := size + tensor.size]
        table[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(Path(path), 8 + len(text) + size) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            for at in range(0, len(chunk), _CHUNK):
                file.write(chunk[at : at + _CHUNK])


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator:
    """A binary file that takes the name `path` once it is complete and on disk, its folder made if missing.

    SliceError if it cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)  # what a killed run left there takes room
        try:
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise OSError(f"it needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            if os.name == "posix":  # a rename is durable once its folder is; Windows opens no folder
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise SliceError(f"{path} could not be written ({error}); older files are as they were") from None
