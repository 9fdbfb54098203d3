"""What files hold, by their headers alone: their ledgers, sizes, overlaps, free ids."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from utils.ledger import ANSWERS_KEY, Entry, free_ids, ids_line, read_ledger
from wan.safetensors_header import TensorEntry, read_file_header


@dataclass(frozen=True)
class ListedFile:
    """One file of the list; `kind` is checkpoint, slice, lora or answers."""

    path: Path
    kind: str
    size: int  # bytes
    values: int
    entries: tuple[Entry, ...]


def list_files(paths: Sequence[Path]) -> list[ListedFile]:
    """The files by their headers; InputError if one is no safetensors file."""
    return [_listed(path) for path in paths]


def overlaps(files: Sequence[ListedFile]) -> list[tuple[Entry, Entry]]:
    """Every two slices of the list that share values."""
    return [(a, b) for a, b in combinations(_distinct(files), 2) if a.overlaps(b)]


def table(files: Sequence[ListedFile]) -> list[str]:
    """Lines for a person: a row for each slice of each file, then overlaps and free ids."""
    rows = [("file", "kind", "size", "slice", "ff", "ffid", "steps", "date", "base", "strength")]
    for file in files:
        start = (file.path.name, file.kind, _size(file.size))
        rows += [(*start, *_cells(entry)) for entry in file.entries]
        if not file.entries:
            told = ("-", "-") if file.kind == "answers" else ("no ledger", "unknown")
            rows.append((*start, told[0], "", "", "", "", told[1], ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    met = overlaps(files)
    lines += [f"overlap: {a.label} and {b.label}" for a, b in met] or ["no two of these slices overlap"]
    return lines + [ids_line(_distinct(files), ff) for ff in _shares(files)]


def as_json(files: Sequence[ListedFile]) -> dict:
    """The same as plain values."""
    listed = [{**asdict(file), "path": str(file.path), "entries": [asdict(e) for e in file.entries]} for file in files]
    free = {ff: dict(zip(("free", "of", "next"), free_ids(_distinct(files), ff), strict=True)) for ff in _shares(files)}
    return {"files": listed, "overlaps": [[a.label, b.label] for a, b in overlaps(files)], "ids": free}


def _cells(entry: Entry) -> tuple[str, ...]:
    told = (entry.name or "-", entry.ff, str(entry.ffid), str(entry.steps), entry.date[:10] or "-")
    return (*told, (entry.base or "unknown")[:12], entry.strength_text)


def _listed(path: Path) -> ListedFile:
    tensors, metadata = read_file_header(path)
    entries = tuple(read_ledger(metadata, path))
    kind = "answers" if ANSWERS_KEY in metadata else _kind(tensors, entries)
    values = sum(tensor.numel for tensor in tensors.values())
    return ListedFile(path, kind, path.stat().st_size, values, entries)


def _kind(tensors: dict[str, TensorEntry], entries: tuple[Entry, ...]) -> str:
    if any(".lora_" in name for name in tensors):
        return "lora"
    if len(entries) == 1 and tensors and all(len(tensor.shape) == 1 for tensor in tensors.values()):
        return "slice"
    return "checkpoint"


def _distinct(files: Sequence[ListedFile]) -> list[Entry]:
    """The slices of all files, once each: a chained checkpoint holds those of the files before it."""
    return list(dict.fromkeys(entry for file in files for entry in file.entries))


def _shares(files: Sequence[ListedFile]) -> list[str]:
    return list(dict.fromkeys(entry.ff for entry in _distinct(files)))


def _size(count: int) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 10**9), ("MB", 10**6)) if count >= s), ("kB", 1000))
    return f"{count / size:.1f} {unit}"
