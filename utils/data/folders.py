"""The pictures or videos in a folder, and what in it is not read."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from utils.files import file_problem, folder_entries
from utils.pixels.media import CONVERT, SIDECAR_SUFFIXES, how_to_read, is_hidden
from utils.pixels.remarks import count_and_names

_MOST_COUNTED = 100_000
_KINDS_NAMED = 6
FROM_HERE = "(paths start at the current folder)"


@dataclass(frozen=True)
class MediaFiles:
    """A folder's files of the wanted kinds, sorted, and a line for each kind of file that is not read."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def media_files(
    folder: Path, suffixes: Sequence[str], common: Sequence[str], sidecar: str, recursive: bool
) -> MediaFiles:
    """The files in `folder` with one of `suffixes`, with `recursive` also those in its subfolders.

    Of a file with one of the `common` suffixes and others of the same name, the first is read. `sidecar` is what names
    of captions end in. InputError if the folder cannot be listed.
    """
    entries = list(_entries(folder, recursive))
    files = [path for path in entries if not path.is_dir()]
    wanted = [path for path in files if path.suffix.lower() in suffixes]
    hidden = [path for path in wanted if is_hidden(path)]
    shown = [path for path in wanted if not is_hidden(path)]
    twins = _rare_twins(shown, common)
    unreadable = {path for path in shown if file_problem(path) is not None}
    others = [path for path in files if path.suffix.lower() not in suffixes and not _is_sidecar(path, sidecar)]
    notes = [
        _line("files of kinds that are not read here", others, _by_kind(others)),
        _line("left out, because their namesakes of a more usual kind are read", twins),
        _line("left out, because their names begin with a dot", [p for p in hidden if not p.name.startswith("._")]),
        _line("left out, because they cannot be opened", sorted(unreadable)),
        "" if recursive else _subfolder_line(entries, suffixes),
    ]
    read = sorted(set(shown) - set(twins) - unreadable)
    return MediaFiles(tuple(read), tuple(filter(None, notes)))


def _entries(folder: Path, recursive: bool) -> Iterator[Path]:
    above = {folder.resolve()} if recursive else set()
    todo = [folder]
    while todo:
        for path in folder_entries(todo.pop(), "folder", FROM_HERE):
            yield path
            if recursive and path.is_dir() and not is_hidden(path) and path.resolve() not in above:
                above.add(path.resolve())  # links may lead in a circle
                todo.append(path)


def _rare_twins(paths: Sequence[Path], common: Sequence[str]) -> list[Path]:
    by_name = defaultdict(list)
    for path in paths:
        by_name[path.parent, path.stem.casefold()].append(path)
    twins = []
    for namesakes in by_name.values():
        rare = [path for path in namesakes if path.suffix.lower() not in common]
        twins += rare if len(rare) < len(namesakes) else []
    return twins


def _is_sidecar(path: Path, ending: str) -> bool:
    return is_hidden(path) or path.name.endswith(ending) or path.suffix.lower() in SIDECAR_SUFFIXES


def _line(what: str, paths: Sequence[Path], detail: str | None = None) -> str:
    return f"{what}: {detail or count_and_names(paths)}" if paths else ""


def _by_kind(paths: Sequence[Path]) -> str:
    """The kinds by what can be done about them; what may be mere junk comes last."""
    kinds = defaultdict(list)
    for suffix, count in Counter(path.suffix.lower() for path in paths).most_common():
        kinds[how_to_read(suffix)].append(f"{count} {suffix or 'without an ending'}")
    named = [f"{_first(counts)} ({advice})" for advice, counts in sorted(kinds.items(), key=_is_unknown)]
    return ", ".join(named)


def _is_unknown(kind: tuple[str, list[str]]) -> bool:
    return kind[0] == CONVERT


def _first(counts: Sequence[str]) -> str:
    more = len(counts) - _KINDS_NAMED
    return ", ".join([*counts[:_KINDS_NAMED], *([f"{more} more kinds"] if more > 0 else [])])


def _subfolder_line(entries: Sequence[Path], suffixes: Sequence[str]) -> str:
    folders = [path for path in entries if path.is_dir() and not is_hidden(path)]
    with_files = {path: count for path in folders if (count := _count_below(path, suffixes))}
    if not with_files:
        return ""
    total, names = sum(with_files.values()), [f"{path.name}/" for path in with_files]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"not read in subfolders: {total} in {', '.join(names[:3])}{more}; to read them, set recursive = true"


def _count_below(folder: Path, suffixes: Sequence[str]) -> int:
    names = (name for _, _, names in os.walk(folder) for name in names)
    return sum(
        1
        for name in islice(names, _MOST_COUNTED)
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
    )
