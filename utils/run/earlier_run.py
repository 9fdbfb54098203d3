"""What an earlier run of the same --output_name left: --resume continues it, only --overwrite replaces it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.run.save_schedule import SaveConfig, files_of, is_final
from utils.run.state import state_folders
from utils.slices.ledger import Entry, read_ledger
from wan.errors import InputError
from wan.safetensors_header import read_file_header

_NAMED = 3  # files


@dataclass(frozen=True)
class Replaced:
    """Lines on files that the run will replace or leave beside its own; what --overwrite removes before the start."""

    lines: Sequence[str]
    removed: Sequence[Path] = ()


def check_earlier_run(
    config: SaveConfig, planned: Sequence[Path], own: Entry, inputs: Sequence[Path], continues: bool
) -> Replaced:
    """InputError if files of this name exist and the run neither `continues` them nor has --overwrite.

    InputError, too, if the run would replace a file whose newest slice is another one than its `own`. What the run
    reads (`inputs`) is never removed.
    """
    lines = _replaced_lines([path for path in planned if path.is_file()], own)
    existing = files_of(config)
    if continues or not existing:
        return Replaced(lines)
    if not config.overwrite:
        raise InputError(_exists(config, existing))
    old = [path for path in existing if not _is_among(path, inputs)]
    states = state_folders(config)
    removed = [path for path in old if path in states or _is_numbered_save_of(path, config, own)]
    left = [path.name for path in existing if path not in removed and path not in planned]
    if left:
        lines.append(f"note: files of an earlier run that this one does not write are left: {_listed(left)}")
    return Replaced(lines, removed)


def _exists(config: SaveConfig, existing: Sequence[Path]) -> str:
    resume = "continue it with --resume latest"
    if not state_folders(config):
        resume = "it saved no state that --resume latest could continue"
    return (
        f"{config.folder} holds an earlier run called {config.name} ({_listed([path.name for path in existing])}): "
        f"{resume}; choose another --output_name, or give --overwrite to delete its states, numbered saves and best "
        "slice and train again"
    )


def _is_numbered_save_of(path: Path, config: SaveConfig, own: Entry) -> bool:
    """Whether it is an epoch's or a step's file of this name and slice; one called name-000010 has such a name too."""
    newest = None if is_final(config, path) else _newest_slice(path)
    return newest is not None and newest.name == config.name and newest.is_slice_of(own)


def _is_among(path: Path, inputs: Sequence[Path]) -> bool:
    """Whether one of the inputs is this file or folder, or lies in it."""
    there = [other.resolve() for other in inputs if other.exists()]
    return any(path.resolve() in (other, *other.parents) or path.samefile(other) for other in there)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _replaced_lines(paths: Sequence[Path], own: Entry) -> list[str]:
    """Notes on files of other tools; InputError for one whose newest slice is another."""
    lines = []
    for path in paths:
        newest = _newest_slice(path)
        if newest is None:
            lines.append(f"note: {path} will be replaced (it has no ledger of slices, so what it holds is unknown)")
        elif not newest.is_slice_of(own):
            raise InputError(
                f"{path} holds {newest.label}, and the run would replace it with ff {own.ff} ffid {own.ffid}: choose "
                "another --output_name, or move the file"
            )
    return lines


def _newest_slice(path: Path) -> Entry | None:
    with suppress(InputError):  # of a file that is damaged, or of another program
        if entries := read_ledger(read_file_header(path)[1], path):
            return entries[-1]
    return None
