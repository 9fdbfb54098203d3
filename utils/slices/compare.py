"""How a saved checkpoint differs from its base: streamed, with a mask of one tensor in memory, a byte a value."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.selective_finetune import SliceUnits, TrainedSlice, contract_name, slice_units
from utils.slice_saving import is_block_matrix
from utils.slices.ledger import Entry
from wan.safetensors_header import TensorEntry, read_file_header

_CHUNK = 1 << 20  # values
_OUTSIDE, _APPLIED, _OWN = range(3)  # where a value lies


@dataclass(frozen=True)
class SavedChanges:
    """How many values differ in the slice and beside it, and what is wrong, in words, if something is."""

    inside: int
    outside: int = 0
    fault: str | None = None


def compare_save(
    bases: Sequence[Path], saved: Path, trained: TrainedSlice, applied: Sequence[Entry] = ()
) -> SavedChanges:
    """Compares every tensor of `saved` with that of its base (one file, or its shards), bit for bit.

    Where `applied` slices lie, which `saved` has from other files, anything may differ.
    """
    before = {key: entry for base in bases for key, entry in read_file_header(base)[0].items()}
    after, _ = read_file_header(saved)
    for key in [*before, *after]:
        if _form(before, key) != _form(after, key):
            return SavedChanges(0, 0, f"{key} is {_form(after, key)}, in the base {_form(before, key)}")
    inside = outside = 0
    first = None
    for key, entry in before.items():
        name = contract_name(key)
        # Chosen anew, so that a slice that was attached wrongly shows.
        slices = []
        if is_block_matrix(name, entry.shape):
            slices = [(slice_units(name, entry.shape, other.ff, other.ffid), _APPLIED) for other in applied]
            if name in trained.matrices:
                slices.append((slice_units(name, entry.shape, trained.ff, trained.ffid), _OWN))
        places = _places(slices, entry)
        for position, differs in _differences(entry, after[key]):
            place = places[position : position + len(differs)]
            beyond = differs & (place == _OUTSIDE)
            if first is None and beyond.any():
                index = np.unravel_index(position + int(beyond.argmax()), entry.shape)
                first = f"{key} {[int(number) for number in index]}"
            inside += int(np.count_nonzero(differs & (place == _OWN)))
            outside += int(np.count_nonzero(beyond))
    return SavedChanges(inside, outside, f"{outside:,} values, the first is {first}" if outside else None)


def _form(entries: dict[str, TensorEntry], key: str) -> str:
    return f"{entries[key].dtype} {list(entries[key].shape)}" if key in entries else "missing"


def _places(slices: Sequence[tuple[SliceUnits, int]], entry: TensorEntry) -> np.ndarray:
    """Where each of a tensor's values lies, uint8 [numel]: in the last one of the slices that holds it."""
    if not slices:
        return np.broadcast_to(np.uint8(_OUTSIDE), entry.numel)
    places = torch.full(entry.shape, _OUTSIDE, dtype=torch.uint8)
    for units, place in slices:
        units.write(places, torch.full((units.count,), place, dtype=torch.uint8))
    return places.view(-1).numpy()


def _differences(before: TensorEntry, after: TensorEntry) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of a tensor where bits differ: a part's first position, and for each of its values whether it does."""
    size = (before.stop - before.start) // max(before.numel, 1)
    with before.file.open("rb") as one, after.file.open("rb") as other:
        one.seek(before.start)
        other.seek(after.start)
        for position in range(0, before.numel, _CHUNK):
            count = min(_CHUNK, before.numel - position) * size
            a, b = one.read(count), other.read(count)
            if a != b:
                yield position, np.frombuffer(a, f"u{size}") != np.frombuffer(b, f"u{size}")
