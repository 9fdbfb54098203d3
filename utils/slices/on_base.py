"""Slice files: read, checked against a base, put into its matrices.

A slice file holds one tensor for each matrix, under the matrix's contract name: the slice's final values in line order,
in the base's dtype. Its ledger has one entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.selective_finetune import SliceUnits, contract_name, slice_units
from utils.slice_saving import (
    Patch,
    base_identity,
    change_rows,
    is_block_matrix,
    read_slice,
    slice_digest,
    value_digest,
)
from utils.slices.ledger import CONTRACT, KEY, Entry, at_strength, meetings, read_ledger
from wan.errors import InputError
from wan.loading import CheckpointHeader
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import read_tensor

SLICED_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class SliceFile:
    """A slice on disk: its entry, where each matrix's values lie, the metadata of the run that made it."""

    path: Path
    entry: Entry
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the final values."""
        return values_digest({name: self.values(name) for name in self.tensors})

    def values(self, name: str) -> Tensor:
        """The final values in the matrix `name`, in line order."""
        return read_tensor(self.tensors[name])


def read_slice_file(path: Path) -> SliceFile:
    """The slice file at `path`; InputError if it is none, or one that cannot be."""
    tensors, metadata = read_file_header(path)
    entries = read_ledger(metadata, path)
    if len(entries) != 1 or not all(len(tensor.shape) == 1 for tensor in tensors.values()) or not tensors:
        raise InputError(f"{path} is no slice file; make one with --save_as slice, or with extract from a checkpoint")
    if entries[0].contract != CONTRACT:
        raise InputError(
            f"{path} follows slice contract {entries[0].contract}, this program knows {CONTRACT}: update it"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in SLICED_DTYPES or not tensor.numel or name != contract_name(name):
            raise InputError(f"{path}: {name[:80]} {tensor.dtype[:20]} is no tensor of a slice")
    return SliceFile(path, entries[0], tensors, {key: text for key, text in metadata.items() if key != KEY})


def units_of(header: CheckpointHeader, entry: Entry) -> dict[str, SliceUnits]:
    """Where a slice lies in every block matrix of a checkpoint in which it is not empty.

    InputError if it follows another contract, by which it lies elsewhere.
    """
    if entry.contract != CONTRACT:
        raise InputError(
            f"{entry.label} follows slice contract {entry.contract}, this program knows {CONTRACT}: update it"
        )
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if is_block_matrix(name, tensor.shape)}
    units = {name: slice_units(name, shape, entry.ff, entry.ffid) for name, shape in shapes.items()}
    return {name: own for name, own in units.items() if own.count}


def scaled(start: Tensor, final: Tensor, strength: float) -> Tensor:
    """round(start + strength * (final - start)): the start's own bits at 0, the final ones at 1.

    InputError if a value becomes infinite.
    """
    if strength in (0, 1):
        return final if strength else start
    moved = (start.float() + strength * (final.float() - start.float())).to(start.dtype)
    moved = torch.where(same_bits(start, final), start, moved)
    if not (moved.isfinite() | ~start.isfinite() | ~final.isfinite()).all():
        raise InputError(f"strength {strength:g} makes values that {start.dtype} cannot hold: choose a smaller one")
    return moved


def values_digest(values: Mapping[str, Tensor]) -> str:
    """SHA-256 over a slice's values by matrix, as the ledger has it."""
    return slice_digest({name: value_digest(own) for name, own in values.items()})


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits."""
    bits = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.view(bits) == b.view(bits)


class SlicesOnBase:
    """Slices that fit a base and each other, ready to be put into its matrices.

    `files` are the slices, oldest first; by a matrix's contract name `patches` change it as stored, and `units` are
    where the slices lie; `entries` are the ledger that the result has, oldest first; `metadata` is what the slices'
    runs said, except what a newer run in the base said.
    """

    def __init__(self, header: CheckpointHeader, slices: Sequence[SliceFile], strengths: Sequence[float]):
        # One order, by date, whatever order they are given or were applied in: so the file that comes out is one, too.
        pairs = sorted(zip(slices, strengths, strict=True), key=lambda pair: pair[0].entry.age)
        self.header = header
        self.patches: dict[str, Patch] = {}
        self.units: dict[str, list[SliceUnits]] = {}
        self.entries = below = read_ledger(header.metadata, header.files[0])
        self.metadata: dict[str, str] = {}
        self._starts: dict[Path, dict[str, bytes]] = {file.path: {} for file, _ in pairs}
        self.files = [file for file, _ in pairs]
        # Of matrices of which not all rows have passed: the values that the base had, those that come there.
        self._passing: dict[tuple[Path, str], tuple[Tensor, Tensor]] = {}
        identity = base_identity(header.files) if pairs else None
        for number, (file, strength) in enumerate(pairs):
            units_of_name = units_of(header, file.entry)
            _check_fits(file, header, identity, {name: units.count for name, units in units_of_name.items()})
            _refuse_overlap_with_base(file, header, below, units_of_name)
            _refuse_overlap_with_slices(file, self.files[:number])
            others = [entry for entry in self.entries if not entry.is_slice_of(file.entry)]
            self.entries = sorted([*others, at_strength(file.entry, strength)], key=lambda entry: entry.age)
            told = header.metadata if any(file.entry.age < entry.age for entry in below) else {}
            self.metadata |= {key: text for key, text in file.metadata.items() if key not in told}
            for name, units in units_of_name.items():
                self.units.setdefault(name, []).append(units)
                self.patches[name] = partial(self._patch, self.patches.get(name), file, strength, name, units)

    @property
    def notes(self) -> list[str]:
        """Lines on slices that may be another base's."""
        base, untold = self.header.files[0], [f for f in self.files if not f.entry.base and not f.entry.start]
        return [f"note: {f.path} does not tell its base, so it cannot be checked that this is {base}" for f in untold]

    def check_starts(self) -> None:
        """To be called once every matrix was patched; InputError if the base held other values than a slice knew."""
        for file in self.files:
            if file.entry.start and slice_digest(self._starts[file.path]) != file.entry.start:
                raise InputError(
                    f"{self.header.files[0]} is not the base of {file.path}: it holds other values where the slice "
                    "lies (merged, or otherwise finetuned?); give the base that the slice was trained on"
                )

    def _patch(
        self,
        before: Patch | None,
        file: SliceFile,
        strength: float,
        name: str,
        units: SliceUnits,
        rows: Tensor,
        first: int = 0,
    ) -> None:
        if before:
            before(rows, first)
        if first == 0:
            self._passing[file.path, name] = torch.empty(units.count, dtype=rows.dtype), file.values(name)
        start, final = self._passing[file.path, name]

        def applied(values: Tensor, k: Tensor) -> Tensor:
            start.index_copy_(0, k, values)
            return scaled(values, final.index_select(0, k), strength)

        change_rows(units, rows, first, applied)
        if first + len(rows) == units.shape[0]:
            del self._passing[file.path, name]
            self._starts[file.path][name] = value_digest(start)


def _refuse_overlap_with_base(
    file: SliceFile, header: CheckpointHeader, below: Sequence[Entry], units: Mapping[str, SliceUnits]
) -> None:
    met = meetings(below, file.entry)
    # A slice that was trained over what the base holds (--allow_overlap) began with the values that it has there.
    if met and (not file.entry.start or values_digest(read_slice(header.files, units)) != file.entry.start):
        raise InputError(f"{header.files[0]} already holds {met}. Leave out {file.path}")


def _refuse_overlap_with_slices(file: SliceFile, others: Sequence[SliceFile]) -> None:
    for other in others:
        if met := meetings([other.entry], file.entry):
            raise InputError(f"{other.path} already holds {met}. Leave out {file.path}, or {other.path}")


def _check_fits(file: SliceFile, header: CheckpointHeader, identity: str, counts: Mapping[str, int]) -> None:
    base = header.files[0]
    if file.entry.base and file.entry.base != identity:
        raise InputError(
            f"{base} is not the base of {file.path}: its identity is {identity[:12]}, the slice was trained on "
            f"{file.entry.base[:12]}; give the base that the slice was trained on"
        )
    if counts != {name: tensor.numel for name, tensor in file.tensors.items()}:
        wrong = min(n for n in counts.keys() | file.tensors.keys() if counts.get(n) != _count(file, n))
        raise InputError(
            f"{file.path}: {wrong[:80]} has {_count(file, wrong)} values, and slice ff {file.entry.ff} ffid "
            f"{file.entry.ffid} has {counts.get(wrong, 0)} there in {base}; the file is damaged, or another model's"
        )
    for name, tensor in file.tensors.items():
        if tensor.dtype != header.tensors[name].dtype:
            raise InputError(f"{file.path}: {name} is {tensor.dtype}, in {base} {header.tensors[name].dtype}")
        if not torch.isfinite(file.values(name)).all():
            raise InputError(f"{file.path}: {name} holds values that are no numbers (NaN or infinite); do not use it")


def _count(file: SliceFile, name: str) -> int:
    return file.tensors[name].numel if name in file.tensors else 0
