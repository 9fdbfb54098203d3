"""What files hold, by their headers alone: their ledgers, sizes, overlaps, free ids."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from utils.files import readable
from utils.slices.ledger import ANSWERS_KEY, Entry, read_ledger
from utils.slices.overlaps import free_ids, ids_line, overlapping
from wan.safetensors_header import TensorEntry, read_file_header

_MOST_OVERLAPS = 1000  # that are listed: of n slices there may be n * n
_MOST_SHARES = 20


@dataclass(frozen=True)
class ListedFile:
    """One file of the list; `kind` is checkpoint, slice, lora or answers."""

    path: Path
    kind: str
    size: int  # bytes
    values: int
    entries: tuple[Entry, ...]


def list_files(paths: Sequence[Path]) -> list[ListedFile]:
    """The files by their headers; InputError if one is not a safetensors file."""
    return [_listed(path) for path in paths]


def slices_by_base(files: Sequence[ListedFile]) -> dict[str | None, list[Entry]]:
    """The slices of all files, once each, by their base's identity; one that records none may be any base's."""
    entries = [entry for file in files for entry in file.entries]
    bases = list(dict.fromkeys(entry.base for entry in entries if entry.base)) or [None]
    return {base: _distinct([entry for entry in entries if entry.base in (base, None)]) for base in bases}


def table(files: Sequence[ListedFile]) -> list[str]:
    """Lines for a person: a row for each slice of each file, then overlaps and free ids on each base."""
    rows = [("file", "kind", "size", "slice", "ff", "ffid", "steps", "date", "base", "strength")]
    names = Counter(file.path.name for file in files)
    for file in files:
        path = file.path.name if names[file.path.name] == 1 else str(file.path)
        start = (path, file.kind, readable(file.size))
        rows += [(*start, *_cells(entry)) for entry in file.entries]
        if not file.entries:
            name, base = ("-", "-") if file.kind == "answers" else ("no ledger", "unknown")
            rows.append((*start, name, "", "", "", "", base, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    by_base = slices_by_base(files)
    for base, entries in by_base.items():
        if len(by_base) > 1:
            lines.append(f"on base {base[:12]}:")
        met = [f"overlap: {a.label} and {b.label}" for a, b in islice(overlapping(entries), _MOST_OVERLAPS + 1)]
        lines += met[:_MOST_OVERLAPS] or ["no two of these slices overlap"]
        lines += ["there are more overlaps"] if len(met) > _MOST_OVERLAPS else []
        lines += [ids_line(entries, ff) for ff in _shares(entries)]
    return lines


def as_json(files: Sequence[ListedFile]) -> dict:
    """The same as plain values."""
    listed = [{**asdict(file), "path": str(file.path), "entries": [asdict(e) for e in file.entries]} for file in files]
    return {"files": listed, "bases": [_on_base(*group) for group in slices_by_base(files).items()]}


def _on_base(base: str | None, entries: Sequence[Entry]) -> dict:
    ids = {ff: dict(zip(("free", "of", "next"), free_ids(entries, ff), strict=True)) for ff in _shares(entries)}
    met = [[a.label, b.label] for a, b in islice(overlapping(entries), _MOST_OVERLAPS)]
    return {"base": base, "overlaps": met, "ids": ids}


def _cells(entry: Entry) -> tuple[str, ...]:
    cells = (entry.name or "-", entry.ff, str(entry.ffid), str(entry.steps), entry.date[:10] or "-")
    return (*cells, (entry.base or "unknown")[:12], entry.strength_text)


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


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Once each: every save of a run holds its slice, and a chained checkpoint those of the files before it."""
    return list({(entry.contract, entry.interval, entry.name or entry): entry for entry in entries}.values())


def _shares(entries: Sequence[Entry]) -> list[str]:
    return list(islice(dict.fromkeys(entry.ff for entry in entries), _MOST_SHARES))
