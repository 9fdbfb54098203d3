"""Which files a run writes: their names, their turns, how many are kept, whether they can be written."""

import glob
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from utils import locks
from utils.files import readable, writable_folder
from utils.locks import UNFINISHED, finished_name
from utils.preserve.answers_file import ENDING
from utils.slices.ledger import VALUES_KEY
from wan.errors import InputError
from wan.loading import is_shard
from wan.safetensors_header import read_file_header

# What --save_as accepts, and how the names of its files end.
KINDS = {"checkpoint": ".safetensors", "slice": ".slice.safetensors", "lora": ".lora.safetensors"}
STATE = "-state"
_TURN = r"(-\d{6,}|-step\d{8,})"  # in the names of an epoch's and a step's files
_BEST = f"-best{KINDS['slice']}"


@dataclass(frozen=True)
class SaveConfig:
    """Where files and states go, of which kinds, how often they are written, how many stay."""

    folder: Path
    name: str
    kinds: tuple[str, ...] = ("checkpoint",)  # of KINDS
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    last_n_epochs: int | None = None
    last_n_epochs_state: int | None = None  # None: as last_n_epochs
    last_n_steps: int | None = None
    last_n_steps_state: int | None = None  # None: as last_n_steps
    save_state: bool = False  # with every checkpoint
    save_state_at_end: bool = False
    overwrite: bool = False  # the files of an earlier run of this name


@dataclass(frozen=True)
class Save:
    """One turn to save: a file of each kind, a state's folder if one is written, and the older ones that expire."""

    files: Mapping[str, Path]  # kind -> path
    state: Path | None
    expired: tuple[Path, ...] = ()

    def missing(self, digest: str) -> dict[str, Path]:
        """The files that do not hold the values of that digest yet: they were not written, or by another run.

        By what the files say themselves: their times change when they are copied or the clock is set.
        """
        return {kind: path for kind, path in self.files.items() if not _holds(path, digest)}


@dataclass(frozen=True)
class DiskUse:
    """The sizes of all saves of a run together."""

    saves: int
    states: int
    written: int  # bytes, in all
    kept: int  # bytes, what is left at the end


def save_after_step(config: SaveConfig, step: int, steps: int) -> Save | None:
    """The save that is due after optimizer step number `step`, if any; the last step's is the run's final one."""
    return _step_save(config, step) if step < steps else None


def save_after_epoch(config: SaveConfig, epoch: int, epochs: int) -> Save | None:
    """The save that is due after `epoch` (1 .. epochs), if any; the last epoch's is the run's final one."""
    every = config.every_n_epochs
    if not every or epoch % every or epoch >= epochs:
        return None
    expired = _expired_epoch(epoch, every, config.last_n_epochs)
    expired_state = _expired_epoch(epoch, every, config.last_n_epochs_state or config.last_n_epochs)
    return _save(config, _epoch_stem, epoch, (expired, expired_state))


def save_at_end(config: SaveConfig, steps: int) -> Save:
    """The run's final save, which also ends the older ones that a save after its last step would end."""
    state = config.folder / f"{config.name}{STATE}" if config.save_state or config.save_state_at_end else None
    numbered = _step_save(config, steps)
    return Save(_files(config, config.name), state, numbered.expired if numbered else ())


def best_file(config: SaveConfig) -> Path:
    """Where --save_best keeps the slice with the lowest validation loss."""
    return config.folder / f"{config.name}{_BEST}"


def stop_state(config: SaveConfig, step: int) -> Path:
    """The folder for the state of a run that is stopped after `step`."""
    return config.folder / f"{_step_stem(config, step)}{STATE}"


def planned_saves(config: SaveConfig, steps: int, steps_per_epoch: int, epochs: int) -> Iterator[Save]:
    """Every save of a run, in order."""
    marks = {min(epoch * steps_per_epoch, steps): epoch for epoch in range(1, epochs + 1)}
    for step in range(1, steps + 1):
        if save := save_after_step(config, step, steps):
            yield save
        if (epoch := marks.get(step)) and (save := save_after_epoch(config, epoch, epochs)):
            yield save
    yield save_at_end(config, steps)


def disk_use(saves: Sequence[Save], sizes: Mapping[str, int], state_bytes: int) -> DiskUse:
    """How many bytes the saves write, and how many of them stay; `sizes` are those of each kind of file."""
    written, kept = {}, {}
    for save in saves:
        own = {path: sizes[kind] for kind, path in save.files.items()}
        if save.state:
            own[save.state] = state_bytes
        written |= own
        kept |= own
        for path in save.expired:
            kept.pop(path, None)
    states = sum(save.state is not None for save in saves)
    return DiskUse(len(saves), states, sum(written.values()), sum(kept.values()))


def check_saves(
    saves: Sequence[Save],
    config: SaveConfig,
    inputs: Sequence[Path],
    sizes: Mapping[str, int],
    others: Mapping[Path, int] = MappingProxyType({}),
) -> None:
    """InputError if a save cannot be written, would replace one of the `inputs`, or if the disk has no room for one.

    `others` are the run's other files, and their bytes.
    """
    writable_folder(config.folder, "--output_dir")
    for output in (*others, *planned_files(saves)):
        _check_name(output)
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise InputError(
                    f"the run would write {output} over {path}, which it reads: choose another --output_name"
                )
    for state in (save.state for save in saves if save.state):
        if state.exists() and not state.is_dir():
            raise InputError(
                f"{state} has the name of a state's folder and is not one: move it, or choose another --output_name"
            )
    free, needed = shutil.disk_usage(config.folder).free, sum([*sizes.values(), *others.values()])
    if free < needed:
        files = ", ".join([*sizes, *(path.name for path in others)])
        raise InputError(
            f"--output_dir {config.folder} has {readable(free)} free, and one save ({files}) needs {readable(needed)}"
        )


def planned_files(saves: Sequence[Save]) -> list[Path]:
    """Every file of the saves, without states."""
    return [path for save in saves for path in save.files.values()]


def _check_name(output: Path) -> None:
    if is_shard(output):
        raise InputError(
            f"{output.name} would look like one part of a checkpoint in several files: choose another --output_name"
        )
    if output.is_dir():
        raise InputError(
            f"{output} is a folder, and the run writes a file of that name: move it, or choose another --output_name"
        )


def remove_unfinished(config: SaveConfig) -> None:
    """Deletes the unfinished files that a run of this name left when it was killed; a living writer's stay."""
    saved = _names(config, [*KINDS.values(), ENDING])
    # As run/samples names them; another run's name may begin with this one's and an underscore.
    named = r"_(contact_sheet\.png|e?\d{6,}_\d{2,}_\d{14}(_-?\d+)?(_000\.png|\.mp4))"
    sample = re.compile(re.escape(config.name) + named)
    for own, folder in ((saved, config.folder), (sample, config.folder / "sample")):
        locks.remove_unfinished(path for path in folder.glob(f"*{UNFINISHED}") if own.fullmatch(finished_name(path)))
    for folder in config.folder.glob(f"*{STATE}"):
        if is_state_of(config, folder.name) and (left := list(folder.glob(f"*{UNFINISHED}"))):
            locks.remove_unfinished(left)
            if not any(folder.iterdir()):
                folder.rmdir()


def remove_expired(save: Save) -> list[str]:
    """Deletes the files and states that expire with `save`; lines on those that cannot be deleted come back."""
    return _remove(save.expired)


def is_state_of(config: SaveConfig, folder: str) -> bool:
    """Whether a state's folder has one of the names that this run gives them."""
    return re.fullmatch(f"{re.escape(config.name)}{_TURN}?{STATE}", folder) is not None


def files_of(config: SaveConfig) -> list[Path]:
    """The files of every kind, and states, that have one of the names this run gives its own; sorted."""
    names = _names(config, [*KINDS.values()])
    paths = config.folder.glob(f"{glob.escape(config.name)}*") if config.folder.is_dir() else ()
    return sorted(path for path in paths if names.fullmatch(path.name) or is_state_of(config, path.name))


def _names(config: SaveConfig, endings: Sequence[str]) -> re.Pattern:
    """What a run calls its files of these endings, and its best slice."""
    turns = f"{_TURN}?({'|'.join(map(re.escape, endings))})"
    return re.compile(f"{re.escape(config.name)}({turns}|{re.escape(_BEST)})")


def is_final(config: SaveConfig, path: Path) -> bool:
    """Whether a file of files_of() is one that a run writes at its end."""
    return path.name in {f"{config.name}{ending}" for ending in KINDS.values()}


def remove_overwritten(paths: Sequence[Path]) -> list[str]:
    """Deletes what --overwrite replaces: states, numbered saves, the best slice; lines on what could not be."""
    return _remove(paths)


def _remove(paths: Sequence[Path]) -> list[str]:
    lines = []
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:  # on Windows, what another program has open
            lines.append(f"could not delete {path} ({error.strerror}): delete it by hand")
    return lines


def _holds(path: Path, digest: str) -> bool:
    """Whether the file is there and says that it holds these values."""
    with suppress(InputError):  # of a file that is damaged, or of another program
        return path.is_file() and read_file_header(path)[1].get(VALUES_KEY) == digest
    return False


def _step_save(config: SaveConfig, step: int) -> Save | None:
    every = config.every_n_steps
    if not every or step % every:
        return None
    expired = _expired_step(step, every, config.last_n_steps)
    expired_state = _expired_step(step, every, config.last_n_steps_state or config.last_n_steps)
    return _save(config, _step_stem, step, (expired, expired_state))


def _save(config: SaveConfig, stem, number: int, expired: tuple[int | None, int | None]) -> Save:
    """The save of a turn; `expired` are the numbers of the older file and state that it ends, if above 0."""
    paths: list[Path] = []
    if expired[0] and expired[0] > 0:
        paths += _files(config, stem(config, expired[0])).values()
    if config.save_state and expired[1] and expired[1] > 0:
        paths.append(config.folder / f"{stem(config, expired[1])}{STATE}")
    state = config.folder / f"{stem(config, number)}{STATE}" if config.save_state else None
    return Save(_files(config, stem(config, number)), state, tuple(paths))


def _files(config: SaveConfig, stem: str) -> dict[str, Path]:
    return {kind: config.folder / f"{stem}{KINDS[kind]}" for kind in config.kinds}


def _epoch_stem(config: SaveConfig, epoch: int) -> str:
    return f"{config.name}-{epoch:06d}"


def _step_stem(config: SaveConfig, step: int) -> str:
    return f"{config.name}-step{step:08d}"


def _expired_epoch(epoch: int, every: int, last_n: int | None) -> int | None:
    return epoch - every * last_n if last_n else None


def _expired_step(step: int, every: int, last_n: int | None) -> int | None:
    return (step - last_n - 1) // every * every if last_n else None
