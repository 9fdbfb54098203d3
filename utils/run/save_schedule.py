"""Which files a run writes: their names, their turns, how many are kept, whether they can be written."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from utils.files import readable, writable_folder
from utils.preserve.answers_file import ENDING
from utils.slice_saving import UNFINISHED
from wan.errors import InputError
from wan.loading import is_shard

# What --save_as can ask for, and how the names of its files end.
KINDS = {"checkpoint": ".safetensors", "slice": ".slice.safetensors", "lora": ".lora.safetensors"}
STATE = "-state"


@dataclass(frozen=True)
class SaveConfig:
    """Where files and states go, as what, how often they are written, how many stay."""

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


@dataclass(frozen=True)
class Save:
    """One turn to save: a file of each kind, its state's folder if one is written, and the older ones that it ends."""

    files: Mapping[str, Path]  # kind -> path
    state: Path | None
    expired: tuple[Path, ...] = ()

    def missing(self, since: int) -> dict[str, Path]:
        """Those of the files that were not written since that time (ns): an older one is another run's."""
        return {kind: path for kind, path in self.files.items() if not is_written(path, since)}


@dataclass(frozen=True)
class DiskUse:
    """What a run's saves add up to."""

    saves: int
    states: int
    written: int  # bytes, in all
    kept: int  # bytes, what is left at the end


def is_written(path: Path, since: int) -> bool:
    """Whether the file is there, and not older than that time (ns)."""
    return path.exists() and path.stat().st_mtime_ns >= since


def save_after_step(config: SaveConfig, step: int) -> Save | None:
    """The save that follows optimizer step number `step`, if it is its turn."""
    every = config.every_n_steps
    if not every or step % every:
        return None
    expired = _expired_step(step, every, config.last_n_steps)
    expired_state = _expired_step(step, every, config.last_n_steps_state or config.last_n_steps)
    return _save(config, _step_stem, step, (expired, expired_state))


def save_after_epoch(config: SaveConfig, epoch: int, epochs: int) -> Save | None:
    """The save that follows `epoch` (1 .. epochs), if it is its turn; the last epoch has the run's own."""
    every = config.every_n_epochs
    if not every or epoch % every or epoch >= epochs:
        return None
    expired = _expired_epoch(epoch, every, config.last_n_epochs)
    expired_state = _expired_epoch(epoch, every, config.last_n_epochs_state or config.last_n_epochs)
    return _save(config, _epoch_stem, epoch, (expired, expired_state))


def save_at_end(config: SaveConfig) -> Save:
    """The save that ends the run."""
    state = config.folder / f"{config.name}{STATE}" if config.save_state or config.save_state_at_end else None
    return Save(_files(config, config.name), state)


def stop_state(config: SaveConfig, step: int) -> Path:
    """The state of a run that is stopped after `step`."""
    return config.folder / f"{_step_stem(config, step)}{STATE}"


def planned_saves(config: SaveConfig, steps: int, steps_per_epoch: int, epochs: int) -> Iterator[Save]:
    """Every save of a run, in order."""
    marks = {min(epoch * steps_per_epoch, steps): epoch for epoch in range(1, epochs + 1)}
    for step in range(1, steps + 1):
        if save := save_after_step(config, step):
            yield save
        if (epoch := marks.get(step)) and (save := save_after_epoch(config, epoch, epochs)):
            yield save
    yield save_at_end(config)


def disk_use(saves: Sequence[Save], sizes: Mapping[str, int], state_bytes: int) -> DiskUse:
    """How much the saves write, and how much of it stays; `sizes` are bytes of each kind of file."""
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
    """InputError if a save cannot be, would overwrite one of the `inputs`, or if not even one fits.

    `others` are what else the run writes, and their bytes.
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
            raise InputError(f"{state} is in the way of a state's folder: move it, or choose another --output_name")
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
            f"{output.name} would be taken for one part of a checkpoint of several: choose another --output_name"
        )
    for path in (output, output.with_name(f"{output.name}{UNFINISHED}")):
        if path.is_dir():
            raise InputError(
                f"{path} is a folder, in the way of a file that the run writes: move it, or choose another "
                "--output_name"
            )


def remove_unfinished(config: SaveConfig) -> None:
    """Deletes what a run of this name left half written when it was killed."""
    stem = re.escape(config.name) + r"(-\d{6}|-step\d{8})?"
    half_written = re.compile(f"{stem}({'|'.join(map(re.escape, [*KINDS.values(), ENDING]))})")
    # As training_samples names them; another run's name may begin with this one's and an underscore.
    sample = re.compile(re.escape(config.name) + r"_e?\d{6,}_\d{2,}_\d{14}(_-?\d+)?(_000\.png|\.mp4)")
    for path in config.folder.glob(f"sample/*{UNFINISHED}"):
        if sample.fullmatch(path.name.removesuffix(UNFINISHED)) and not path.is_dir():
            path.unlink()
    for path in [*config.folder.glob(f"*{UNFINISHED}"), *config.folder.glob(f"*{STATE}/*{UNFINISHED}")]:
        in_state = re.fullmatch(stem + STATE, path.parent.name) and path.parent != config.folder
        own = in_state or half_written.fullmatch(path.name.removesuffix(UNFINISHED))
        if own and not path.is_dir():
            path.unlink()
            if in_state and not any(path.parent.iterdir()):
                path.parent.rmdir()


def remove_expired(save: Save) -> list[str]:
    """Deletes the files and states that `save` ends; lines on those that cannot be deleted come back."""
    lines = []
    for path in save.expired:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:  # on Windows, what another program has open
            lines.append(f"could not delete {path} ({error.strerror}): delete it by hand")
    return lines


def _save(config: SaveConfig, stem, number: int, expired: tuple[int | None, int | None]) -> Save:
    """The save of a turn; `expired` are the numbers of an older file and state, those below 1 never had one."""
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
