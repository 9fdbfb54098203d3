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
    DTYPES,
    Patch,
    base_identity,
    change_rows,
    is_block_matrix,
    read_slice,
    slice_digest,
    value_digest,
)
from utils.slices.ledger import (
    CONTRACT,
    KEY,
    Entry,
    at_strength,
    description,
    list_of,
    read_ledger,
)
from utils.slices.overlaps import meetings, refuse_overlap
from wan.errors import InputError
from wan.loading import CheckpointHeader
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import read_tensor


@dataclass(frozen=True)
class SliceFile:
    """A slice on disk: its entry, where each matrix's values lie, how the run that made it describes itself."""

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


@dataclass(frozen=True)
class SlicesOnBase:
    """Slices that fit a base and each other, ready to be put into its matrices.

    By a matrix's contract name, `patches` change it as stored and `units` are where the slices lie. A pass over all of
    `patches` ends in an InputError where the base does not hold the values that a slice was trained on.
    """

    header: CheckpointHeader
    files: tuple[SliceFile, ...]  # oldest first
    entries: list[Entry]  # the ledger of the result, oldest first
    metadata: dict[str, str]  # descriptions by the slices' runs, except where a newer run in the base has its own
    units: dict[str, list[SliceUnits]]
    patches: dict[str, Patch]

    @property
    def notes(self) -> list[str]:
        """Lines on slices that may be another base's."""
        base, unknown = self.header.files[0], [f for f in self.files if not f.entry.base and not f.entry.start]
        return [
            f"note: {f.path} does not record its base, so it cannot be checked that this is {base}" for f in unknown
        ]


def read_slice_file(path: Path) -> SliceFile:
    """The slice file at `path`; InputError if it is not one, or cannot be right."""
    tensors, metadata = read_file_header(path)
    entries = read_ledger(metadata, path)
    if len(entries) != 1 or not all(len(tensor.shape) == 1 for tensor in tensors.values()) or not tensors:
        raise InputError(f"{path} is not a slice file; make one with --save_as slice, or with extract")
    if entries[0].contract != CONTRACT:
        raise InputError(
            f"{path} follows slice contract {entries[0].contract}, this program knows {CONTRACT}: update it"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not tensor.numel or name != contract_name(name):
            raise InputError(f"{path}: {name[:80]} {tensor.dtype[:20]} is not a tensor of a slice")
    return SliceFile(path, entries[0], tensors, description(metadata))


def slices_on_base(header: CheckpointHeader, files: Sequence[SliceFile], strengths: Sequence[float]) -> SlicesOnBase:
    """The slices on top of a base, each with its strength; InputError if two overlap or one is another base's."""
    # One order, by date, however they are given or were applied: so there is one file that comes out, too.
    pairs = sorted(zip(files, strengths, strict=True), key=lambda pair: pair[0].entry.age)
    entries = below = read_ledger(header.metadata, header.files[0])
    identity = base_identity(header.files) if pairs else ""
    metadata: dict[str, str] = {}
    parts: dict[str, list[_SlicePatch]] = {}
    for number, (file, strength) in enumerate(pairs):
        units = units_of(header, file.entry)
        _check_fits(file, header, identity, {name: own.count for name, own in units.items()})
        _refuse_overlap(file, header, below, [other for other, _ in pairs[:number]], units)
        others = [entry for entry in entries if not entry.is_slice_of(file.entry)]
        entries = sorted([*others, at_strength(file.entry, strength)], key=lambda entry: entry.age)
        kept = header.metadata if any(file.entry.age < entry.age for entry in below) else {}
        metadata |= {key: text for key, text in file.metadata.items() if key not in kept}
        origin = _Origin(file, header.files[0], units.keys())
        for name, own in units.items():
            parts.setdefault(name, []).append(_SlicePatch(file, name, own, strength, origin))
    return SlicesOnBase(
        header=header,
        files=tuple(file for file, _ in pairs),
        entries=entries,
        metadata=metadata,
        units={name: [part.units for part in own] for name, own in parts.items()},
        patches={name: partial(in_turn, own) for name, own in parts.items()},
    )


def in_turn(patches: Sequence[Patch], rows: Tensor, first: int = 0) -> None:
    """Changes the rows by one patch after the other: with partial, a patch that is several."""
    for patch in patches:
        patch(rows, first)


def read_below(
    dit: Path,
    header: CheckpointHeader,
    paths: Sequence[Path],
    own: Entry,
    compute_dtype: torch.dtype,
    continue_slice: bool = False,
    allow_overlap: bool = False,
    is_expert: bool = False,
) -> SlicesOnBase:
    """The slices of --slices on --dit, below slice `own`, which is to be trained in `compute_dtype`.

    InputError if one does not fit, or if `own` lies over another one that it may not touch.
    """
    below = slices_on_base(header, [read_slice_file(path) for path in paths], [1.0] * len(paths))
    source = " with ".join(map(str, [dit, *paths]))
    same = [entry for entry in below.entries if entry.is_slice_of(own)]
    if continue_slice and not same:
        advice = "leave it out to begin"
        if is_expert:  # the other one may hold it, and would be refused without --continue_slice
            advice = "leave it out if neither expert does, else give the checkpoints or slice files of both"
        raise InputError(
            f"--continue_slice: {source} does not hold ff {own.ff} ffid {own.ffid} "
            f"(it holds {list_of([entry.label for entry in below.entries]) or 'no slice'}); {advice}"
        )
    if not allow_overlap:
        others = [entry for entry in below.entries if not (continue_slice and entry.is_slice_of(own))]
        advice = "To train the same slice further add --continue_slice; " if same else ""
        refuse_overlap(others, own, source, f"{advice}--allow_overlap trains over what is there")
    is_cast = {DTYPES.get(header.tensors[name].dtype) for name in units_of(header, own)} != {compute_dtype}
    if is_cast and any(file.entry.overlaps(own) for file in below.files):
        raise InputError(
            f"{dit} is cast for training, so a slice of --slices cannot be trained further on it: first make one file "
            "of them (python -m utils.slices apply)"
        )
    return below


def lines_below(dit: Path, below: SlicesOnBase, own: Entry, continue_slice: bool) -> list[str]:
    """What is known of the slices that slice `own` is trained beside or over."""
    lines = [f"on top of {dit}: {file.entry.label} from {file.path}" for file in below.files]
    lines += below.notes
    if KEY not in below.header.metadata:
        lines.append(
            f"note: {dit} has no ledger of slices (an original model, or a file of another tool): if something was "
            "trained into it before, it is not known where"
        )
    over = [entry for entry in below.entries if entry.overlaps(own) and not (continue_slice and entry.is_slice_of(own))]
    if over:
        held = list_of([entry.label for entry in over])
        lines.append(f"WARNING: the run trains over values of this checkpoint that belong to {held}")
    return lines


def units_of(header: CheckpointHeader, entry: Entry) -> dict[str, SliceUnits]:
    """Where a slice lies in every block matrix of a checkpoint in which it is not empty.

    InputError if it follows another contract, by which it lies elsewhere.
    """
    check_contract(entry)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if is_block_matrix(name, tensor.shape)}
    units = {name: slice_units(name, shape, entry.ff, entry.ffid) for name, shape in shapes.items()}
    return {name: own for name, own in units.items() if own.count}


def check_contract(entry: Entry) -> None:
    """InputError if the slice lies where only a later version of this program knows."""
    if entry.contract != CONTRACT:
        raise InputError(
            f"{entry.label} follows slice contract {entry.contract}, this program knows {CONTRACT}: update it"
        )


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


class _Origin:
    """Compares the base's values under a slice with those it was trained on, once all of its matrices have passed."""

    def __init__(self, file: SliceFile, base: Path, names):
        self.file, self.base, self.names = file, base, set(names)
        self.digests: dict[str, bytes] = {}

    def add(self, name: str, digest: bytes) -> None:
        self.digests[name] = digest
        if self.digests.keys() < self.names:
            return
        found, self.digests = slice_digest(self.digests), {}
        if self.file.entry.start not in (None, found):
            raise InputError(
                f"{self.base} is not the base of {self.file.path}: it holds other values where the slice lies (merged, "
                "or otherwise finetuned?); give the base that the slice was trained on"
            )


class _SlicePatch:
    """Puts a slice into the rows of one matrix as they pass, from the first to the last."""

    def __init__(self, file: SliceFile, name: str, units: SliceUnits, strength: float, origin: _Origin):
        self.file, self.name, self.units, self.strength, self.origin = file, name, units, strength, origin

    def __call__(self, rows: Tensor, first: int) -> None:
        if first == 0:
            self.start, self.final = torch.empty(self.units.count, dtype=rows.dtype), self.file.values(self.name)
        change_rows(self.units, self._new, rows, first)
        if first + len(rows) == self.units.shape[0]:
            self.origin.add(self.name, value_digest(self.start))
            del self.start, self.final

    def _new(self, values: Tensor, k: Tensor) -> Tensor:
        self.start.index_copy_(0, k, values)
        return scaled(values, self.final.index_select(0, k), self.strength)


def _refuse_overlap(
    file: SliceFile,
    header: CheckpointHeader,
    below: Sequence[Entry],
    others: Sequence[SliceFile],
    units: Mapping[str, SliceUnits],
) -> None:
    met = meetings(below, file.entry)
    # A slice that was trained over what the base holds (--allow_overlap) began with the values that it has there.
    if met and (not file.entry.start or values_digest(read_slice(header.files, units)) != file.entry.start):
        raise InputError(f"{header.files[0]} already holds {met}. Leave out {file.path}")
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
    found = {name: tensor.numel for name, tensor in file.tensors.items()}
    if counts != found:
        wrong = min(name for name in counts.keys() | found.keys() if counts.get(name) != found.get(name))
        raise InputError(
            f"{file.path}: {wrong[:80]} has {found.get(wrong, 0)} values, and slice ff {file.entry.ff} ffid "
            f"{file.entry.ffid} has {counts.get(wrong, 0)} there in {base}; the file is damaged, or another model's"
        )
    for name, tensor in file.tensors.items():
        if tensor.dtype != header.tensors[name].dtype:
            raise InputError(f"{file.path}: {name} is {tensor.dtype}, in {base} {header.tensors[name].dtype}")
        if not torch.isfinite(file.values(name)).all():
            raise InputError(f"{file.path}: {name} holds NaN or infinite values; do not use it")
