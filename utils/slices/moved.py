"""How far each matrix's slice has moved from the base: from slice files, or from checkpoints that hold the slices."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.slice_saving import base_identity, read_slice
from utils.slices.ledger import Entry
from utils.slices.on_base import read_slice_file, same_bits, slices_on_base, units_of, values_digest
from utils.slices.report import Chain, Concept
from wan.errors import InputError
from wan.loading import CheckpointHeader, read_checkpoint_header

_PLACE = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<block>\d+)(?:\.(?P<kind>.+))?\.weight")


@dataclass(frozen=True)
class MatrixChange:
    """What a slice did in one matrix: `ratio` is the norm of the change by that of the start values."""

    kind: str  # which of a block's matrices
    block: int
    values: int
    moved: int
    ratio: float


def changes_of(chains: Sequence[Chain], bases: Sequence[Path]) -> dict[Entry, list[MatrixChange]]:
    """For each concept on one of the bases that a slice file or a checkpoint holds, its change in every matrix.

    InputError if no concept was trained on one of the bases, or if two of them are one.
    """
    concepts = [concept for chain in chains for concept in chain.concepts]
    headers: dict[str, CheckpointHeader] = {}
    for base in bases:
        header = read_checkpoint_header(base)
        identity = base_identity(header.files)
        if identity in headers:
            raise InputError(
                f"{base} and {headers[identity].files[0]} are one base at different stages: name the first"
            )
        if concepts and not any(concept.entry.base in (None, identity) for concept in concepts):
            first = f"{concepts[0].entry.label} in {concepts[0].files[0].path}"
            others = ", nor of any of the other concepts" if len(concepts) > 1 else ""
            raise InputError(f"{base} is not the base of {first}{others}")
        headers[identity] = header
    only = next(iter(headers.values())) if len(headers) == 1 else None  # also for files that record no base
    found = {}
    for concept in concepts:
        header = headers.get(concept.entry.base, only if concept.entry.base is None else None)
        if header and (changes := _changes(concept, header)) is not None:
            found[concept.entry] = changes
    return found


def _changes(concept: Concept, base: CheckpointHeader) -> list[MatrixChange] | None:
    sources = {file.kind: file.path for file in concept.files}
    if "slice" in sources:
        start, final = _of_slice_file(sources["slice"], base)
    elif "checkpoint" in sources:
        header = read_checkpoint_header(sources["checkpoint"])
        units = units_of(base, concept.entry)
        start, final = read_slice(base.files, units), read_slice(header.files, units)
        if any(final.get(name) is None or final[name].dtype != own.dtype for name, own in start.items()):
            raise InputError(f"{sources['checkpoint']} has other matrices than {base.files[0]}, or other dtypes")
    else:
        return None
    return [_change(name, start[name], final[name]) for name in start]


def _of_slice_file(path: Path, base: CheckpointHeader) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    file = read_slice_file(path)
    slices_on_base(replace(base, metadata={}), [file], [1.0])  # refuses what does not fit
    start = read_slice(base.files, units_of(base, file.entry))
    if file.entry.start and values_digest(start) != file.entry.start:
        raise InputError(f"{base.files[0]} is not the base of {path}: it holds other values where the slice lies")
    return start, {name: file.values(name) for name in start}


def _change(name: str, start: Tensor, final: Tensor) -> MatrixChange:
    place = _PLACE.fullmatch(name)
    stack = "" if place["stack"] in (None, "blocks") else f"{place['stack']}: "
    change = torch.linalg.vector_norm(final.double() - start.double())
    norm = torch.linalg.vector_norm(start.double())
    ratio = (change / norm).item() if norm else 0.0
    moved = int((~same_bits(start, final)).sum())
    return MatrixChange(f"{stack}{place['kind'] or 'matrix'}", int(place["block"]), start.numel(), moved, ratio)
