"""What a trained slice leaves on disk: a checkpoint, which is its base with the slice in it, or the slice alone.

    save_checkpoint(trained, "base.safetensors", "character1.safetensors", concept="character1", steps=step)
    save_slice(trained, "base.safetensors", "character1.slice.safetensors", concept="character1", steps=step)

A checkpoint is written by streaming the base once, patched on the way; a file is complete or not there at all.
This file needs torch, numpy and selective_finetune.py, beside which it can be copied into another trainer.
Shapes: L rows of a unit, M units of a slice in one row group.
"""

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

if __package__:
    from .selective_finetune import SliceError, SliceUnits, TrainedSlice, contract_name, exact_fraction, moved_values
else:  # copied beside another trainer's scripts
    from selective_finetune import SliceError, SliceUnits, TrainedSlice, contract_name, exact_fraction, moved_values

LEDGER_KEY = "wan_slices"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that slices lie in
UNFINISHED = ".wan.tmp"  # ends the names of temporary files: ours alone, since they are deleted
_PIECE = 1 << 22  # bytes that are read, patched and written in turn: few enough that the disk reads on meanwhile
_CHUNK = 1 << 18  # bytes; larger writes took five times as long (Linux 6.18, ext4)
Files = str | Path | Sequence[str | Path]  # one safetensors file, or its shards
Patch = Callable[[Tensor, int], None]  # changes rows of a matrix on their way from a file; int: the first of them


def save_checkpoint(trained: TrainedSlice, base: Files, path: str | Path, metadata=None, **concept) -> None:
    """Writes the base with the slice in use, and `metadata` beside its own; `concept` is what snapshot() takes."""
    now, known = snapshot(trained, base, **concept), read_header(base)[1]
    ledger = extended(read_ledger(known), now.entry)
    known |= {**(metadata or {}), LEDGER_KEY: json.dumps(ledger)}
    write_patched(path, base, now.patches, known, trained.name_of)


def save_slice(trained: TrainedSlice, base: Files, path: str | Path, metadata=None, **concept) -> None:
    """Writes the slice alone: its final values in the base's dtype, in line order, and its ledger entry."""
    refuse_base(path, base)
    now, known = snapshot(trained, base, **concept), read_header(base)[1]
    ledger = extended(read_ledger(known), now.entry)
    write_slice(path, now.final, {**(metadata or {}), LEDGER_KEY: json.dumps(ledger[-1:])})


class Snapshot(NamedTuple):
    """A slice at one moment, which all files of one save have in common."""

    start: dict[str, Tensor]  # what the base's files hold of it, by contract name
    final: dict[str, Tensor]  # what is saved in its place
    patches: dict[str, Patch]  # put the one in the place of the other
    entry: dict  # for the ledger


def snapshot(trained: TrainedSlice, base: Files, concept="", steps=0, captions: Sequence[str] = ()) -> Snapshot:
    """The slice of this name as it is now; SliceError if the base's files or a ledger cannot hold it."""
    steering = {c for c in concept if unicodedata.category(c) in ("Cc", "Cf", "Cs")}  # joiners are part of real names
    if len(concept) > 255 or not steering <= {"\u200c", "\u200d"}:
        raise SliceError(f"a concept cannot be named {concept[:40]!a}: use up to 255 characters, no control characters")
    stored = {tensor.name: tensor.dtype for tensor in read_header(base, trained.name_of)[0].values()}
    for name in trained.matrices:
        if (found := stored.get(name, "missing")) not in DTYPES:
            raise SliceError(f"{name} is {found} in the base file: slices are saved into bf16, fp16 or fp32")
    units = {name: matrix.units.to("cpu") for name, matrix in trained.matrices.items()}
    start = {name: matrix.start.cpu() for name, matrix in trained.matrices.items()}
    cast = {name: units[name] for name in start if start[name].dtype != DTYPES[stored[name]]}  # for training
    start |= read_slice(base, cast, trained.name_of)
    final = {n: moved_values(start[n], m.difference.detach().cpu()) for n, m in trained.matrices.items()}
    patches = {n: partial(change_rows, own, partial(_replaced, n, start[n], final[n])) for n, own in units.items()}
    entry = {"contract": trained.contract, "ff": trained.ff, "ffid": trained.ffid, "name": concept, "steps": steps}
    entry["date"] = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    entry["base"] = base_identity(base, trained.name_of)
    entry["start"] = slice_digest({name: value_digest(values) for name, values in start.items()})
    return Snapshot(start, final, patches, entry | ({"captions": list(captions)} if captions else {}))


def _replaced(name: str, start: Tensor, final: Tensor, values: Tensor, k: Tensor) -> Tensor:
    if not torch.equal(values.view(torch.uint8), start.index_select(0, k).view(torch.uint8)):
        raise SliceError(f"{name} in the base file is not what this slice was trained on")
    return final.index_select(0, k)


def read_ledger(metadata: Mapping[str, str]) -> list[dict]:
    """The slices that a checkpoint's safetensors metadata says it holds, oldest first."""
    return json.loads(metadata.get(LEDGER_KEY, "[]"))


def extended(ledger: Sequence[dict], entry: dict) -> list[dict]:
    """The ledger with `entry` as its newest; a slice that was trained further keeps its first start, adds up steps."""
    slices = [(one["contract"], exact_fraction(one["ff"]), one["ffid"]) for one in (*ledger, entry)]
    earlier = [one for one, which in zip(ledger, slices, strict=False) if which == slices[-1]]
    if earlier:
        entry = {**entry, "start": earlier[0].get("start"), "steps": sum(one["steps"] for one in (entry, *earlier))}
    return [*(one for one in ledger if one not in earlier), entry]


def base_identity(base: Files, name_of: Callable[[str], str] = contract_name) -> str:
    """SHA-256 over every tensor that no slice can touch: the same all along a chain of concepts on one base."""
    digest = hashlib.sha256()
    for tensor in sorted(read_header(base, name_of)[0].values()):
        if not is_block_matrix(tensor.name, tensor.shape):
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for piece in stream([tensor]):
                digest.update(piece)
    return digest.hexdigest()


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether slices are cut from a file's tensor of this contract name, as far as name and shape tell."""
    return len(shape) == 2 and re.fullmatch(r"(.*blocks\.\d+|.+\.\d+\..+)\.weight", name) is not None


def slice_digest(digests: Mapping[str, bytes]) -> str:
    """SHA-256 over the digests of a slice's values by matrix: its start tells a merged base from the slice's own."""
    return hashlib.sha256(b"".join(name.encode() + digests[name] for name in sorted(digests))).hexdigest()


def value_digest(values: Tensor) -> bytes:
    """SHA-256 of the bytes of a matrix's values."""
    return hashlib.sha256(values.view(torch.uint8).numpy()).digest()


class StoredTensor(NamedTuple):
    """A tensor in a file, or to be written: its contract name, its bytes, its dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: list[int]
    size: int  # in bytes
    file: str | Path | None = None
    begin: int = 0  # of its bytes in the file


def read_header(base: Files, name_of=contract_name) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of the files by its stored name, in the order of their bytes; their metadata."""
    tensors, metadata = {}, {}
    for path in [base] if isinstance(base, str | Path) else base:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path) - 8:
                raise SliceError(f"{path} is not a complete safetensors file")
            header = json.loads(file.read(length))
        metadata |= header.pop("__metadata__", None) or {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            stored = (name_of(key), entry["dtype"], entry["shape"], end - begin)
            tensors[key] = StoredTensor(*stored, path, 8 + length + begin)
    return tensors, metadata


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


def change_rows(units: SliceUnits, new: Callable[[Tensor, Tensor], Tensor], rows: Tensor, first: int = 0) -> None:
    """Puts new(values, k) in the place of the slice's values in `rows`, from row `first` on; k: numbers in the line."""
    flat, stop = rows.view(-1), first + len(rows)
    for top in range(first - first % units.rows, stop, units.rows):
        unit_M1 = (units.groups_U == top // units.rows).nonzero()
        row_L = torch.arange(max(first, top), min(stop, top + units.rows))
        at_ML = (row_L - first) * units.shape[1] + units.columns_U[unit_M1]
        k_ML = unit_M1 * units.rows + row_L - top - units.offset
        own_ML = (k_ML >= 0) & (k_ML < units.count)
        at, k = at_ML.masked_select(own_ML), k_ML.masked_select(own_ML)
        # flat[at] would wait for torch's other threads, which takes milliseconds where a core is busy.
        flat.index_copy_(0, at, new(flat.index_select(0, at), k))


def read_slice(base: Files, units: Mapping[str, SliceUnits], name_of=contract_name) -> dict[str, Tensor]:
    """What the files hold of a slice, by contract name in line order."""
    values = {}
    for tensor in [tensor for tensor in read_header(base, name_of)[0].values() if tensor.name in units]:
        stored = np.fromfile(tensor.file, np.uint8, tensor.size, offset=tensor.begin)
        weight, own = torch.from_numpy(stored).view(DTYPES[tensor.dtype]).view(tensor.shape), units[tensor.name]
        values[tensor.name] = own.cut(own.read(weight)).clone()
    return values


def write_patched(path, base: Files, patches: Mapping[str, Patch], metadata: Mapping, name_of=contract_name) -> None:
    """Streams the base to `path`, patched, with this metadata alone."""
    refuse_base(path, base)
    tensors = read_header(base, name_of)[0]
    write_safetensors(path, tensors, metadata, stream(tensors.values(), patches))


def write_slice(path: str | Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a slice file: the final values of each matrix, in line order, by contract name."""
    names, ordered = {dtype: name for name, dtype in DTYPES.items()}, [(name, values[name]) for name in sorted(values)]
    tensors = {name: StoredTensor(name, names[own.dtype], list(own.shape), own.nbytes) for name, own in ordered}
    write_safetensors(path, tensors, metadata, (own.view(torch.uint8).numpy() for _, own in ordered))


def refuse_base(path: str | Path, base: Files) -> None:
    """SliceError if `path` is one of the base's files, which are read while it is written."""
    if os.path.exists(path) and any(os.path.samefile(path, t.file) for t in read_header(base)[0].values()):
        raise SliceError(f"{path} is the base itself: write to another file")


def write_safetensors(path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], chunks: Iterable) -> None:
    """Writes tensors, whose bytes `chunks` gives in their order; metadata sorted, so that any order gives one file."""
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
    """A binary file that becomes `path` once it is complete and on disk; SliceError if it cannot be written."""
    unfinished = path.with_name(f"{path.name}.{this_process()}{UNFINISHED}")  # no other writer's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(path.name)}.*wan.tmp"):  # by a killed process
            with suppress(OSError):  # gone meanwhile, or open (Windows)
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        if (free := shutil.disk_usage(path.parent).free) < size:
            raise OSError(f"it needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        if os.name == "posix":  # a rename is durable once its folder is; Windows opens no folder
            os.fsync(folder := os.open(path.parent, os.O_RDONLY))
            os.close(folder)
    except OSError as error:
        raise SliceError(f"{path} could not be written ({error}); older files are as they were") from None
    finally:
        with suppress(OSError):  # it has its new name
            unfinished.unlink()


def this_process() -> str:
    """MACHINE-PID-START, which no other process has; START (Linux) counts from the boot. Containers are machines."""
    numbers, stat = "/proc/self/ns/pid", Path("/proc/self/stat")
    machine = f"{platform.node()} {os.readlink(numbers) if os.path.exists(numbers) else ''}"
    start = stat.read_text(errors="replace").rpartition(")")[2].split()[19] if stat.exists() else ""
    return f"{hashlib.sha256(machine.encode()).hexdigest()[:8]}-{os.getpid()}-{start}"
