"""What the report on slices tells: concepts by base and age, the files that hold them, the samples beside the files.

Imports no torch, so that a report without --base is there at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.slices.ledger import Entry
from utils.slices.listing import ListedFile, list_files, slices_by_base
from utils.slices.thumbnails import CLIPS, PICTURES

_MOST_PICTURES = 6  # of a concept, the newest ones
_EXPERTS = ("", "-high_noise", "-low_noise")  # that names of files end with where a run trains both
_SHEET = "_contact_sheet"  # of all samples of a run: too wide to stand among them


@dataclass(frozen=True)
class Concept:
    """A slice, the files that hold it, and pictures and clips that were drawn with it, oldest first."""

    entry: Entry
    files: tuple[ListedFile, ...]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Chain:
    """The concepts on one base, oldest first; `base` is its identity, None if no file records it."""

    base: str | None
    concepts: tuple[Concept, ...]


def read_chains(paths: Sequence[Path]) -> tuple[list[ListedFile], list[Chain]]:
    """The files by their headers, and their slices by base; InputError if one is not a safetensors file."""
    files = list_files(paths)
    by_base = slices_by_base(files)
    stems = {entry: _stems(entry, files) for entries in by_base.values() for entry in entries}
    chains = [
        Chain(base, tuple(_concept(entry, files, stems) for entry in sorted(entries, key=lambda entry: entry.age)))
        for base, entries in by_base.items()
    ]
    return files, chains


def _concept(entry: Entry, files: Sequence[ListedFile], stems: Mapping[Entry, set[str]]) -> Concept:
    held, others = _files_of(entry, files), set().union(*stems.values()) - stems[entry]
    return Concept(entry, held, tuple(_pictures(held, stems[entry], others)))


def _files_of(entry: Entry, files: Sequence[ListedFile]) -> tuple[ListedFile, ...]:
    return tuple(file for file in files if any(_is_same(entry, other) for other in file.entries))


def _is_same(entry: Entry, other: Entry) -> bool:
    return entry.is_slice_of(other) and entry.name == other.name


def _stems(entry: Entry, files: Sequence[ListedFile]) -> set[str]:
    """What names of its samples begin with: the concept's or a slice file's name, without the expert, as both draw."""
    own = {file.path.name.partition(".")[0] for file in _files_of(entry, files) if len(file.entries) == 1}
    return own | {name.removesuffix(end) for name in own | {entry.name} for end in _EXPERTS} - {""}


def _pictures(files: Sequence[ListedFile], stems: set[str], others: set[str]) -> list[Path]:
    """Samples beside the files, or in `sample` there, that begin with a stem, and with no longer one of the others."""
    folders = dict.fromkeys(folder for file in files for folder in (file.path.parent, file.path.parent / "sample"))
    pictures = [path for folder in folders for path in _pictures_in(folder)]
    found = [path for path in pictures if _longest(path.stem, stems) > _longest(path.stem, others)]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))[-_MOST_PICTURES:]


def _pictures_in(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        pictures = (path for path in folder.iterdir() if path.suffix.lower() in PICTURES | CLIPS and path.is_file())
        yield from (path for path in pictures if not path.stem.endswith(_SHEET))


def _longest(name: str, stems: set[str]) -> int:
    """The length of the longest stem that a name begins with as a whole: character10_00 is not of character1."""
    return max((len(stem) for stem in stems if _begins(name, stem)), default=0)


def _begins(name: str, stem: str) -> bool:
    return name.startswith(stem) and not name[len(stem) : len(stem) + 1].isalnum()
