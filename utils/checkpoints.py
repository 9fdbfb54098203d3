"""Which checkpoints a run writes: their names, their turns, how many are kept, whether they can be written."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.files import writable_folder
from wan.errors import InputError


@dataclass(frozen=True)
class SaveConfig:
    """Where checkpoints and states go, how often they are written, how many stay."""

    folder: Path
    name: str
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
    """One turn to save: the checkpoint, its state's folder if one is written, and the older ones that it ends."""

    checkpoint: Path
    state: Path | None
    expired: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DiskUse:
    """What a run's saves add up to."""

    checkpoints: int
    states: int
    written: int  # bytes, in all
    kept: int  # bytes, what is left at the end


def save_after_step(config: SaveConfig, step: int) -> Save | None:
    """The save that follows optimizer step number `step`, if it is its turn."""
    every = config.every_n_steps
    if not every or step % every:
        return None
    checkpoint = _step_checkpoint(config, step)
    expired = _expired_step(step, every, config.last_n_steps)
    expired_state = _expired_step(step, every, config.last_n_steps_state or config.last_n_steps)
    return Save(
        checkpoint,
        _state_folder(checkpoint) if config.save_state else None,
        _existing(config, _step_checkpoint, expired, expired_state),
    )


def save_after_epoch(config: SaveConfig, epoch: int, epochs: int) -> Save | None:
    """The save that follows `epoch` (1 .. epochs), if it is its turn; the last epoch has the run's own."""
    every = config.every_n_epochs
    if not every or epoch % every or epoch >= epochs:
        return None
    checkpoint = _epoch_checkpoint(config, epoch)
    expired = _expired_epoch(epoch, every, config.last_n_epochs)
    expired_state = _expired_epoch(epoch, every, config.last_n_epochs_state or config.last_n_epochs)
    return Save(
        checkpoint,
        _state_folder(checkpoint) if config.save_state else None,
        _existing(config, _epoch_checkpoint, expired, expired_state),
    )


def save_at_end(config: SaveConfig) -> Save:
    """The save that ends the run."""
    checkpoint = config.folder / f"{config.name}.safetensors"
    return Save(checkpoint, _state_folder(checkpoint) if config.save_state or config.save_state_at_end else None)


def planned_saves(config: SaveConfig, steps: int, steps_per_epoch: int, epochs: int) -> Iterator[Save]:
    """Every save of a run, in order."""
    marks = {min(epoch * steps_per_epoch, steps): epoch for epoch in range(1, epochs + 1)}
    for step in range(1, steps + 1):
        if save := save_after_step(config, step):
            yield save
        if (epoch := marks.get(step)) and (save := save_after_epoch(config, epoch, epochs)):
            yield save
    yield save_at_end(config)


def disk_use(saves: Sequence[Save], checkpoint_bytes: int, state_bytes: int) -> DiskUse:
    """How much the saves write, and how much of it stays."""
    sizes = {}
    kept = {}
    for save in saves:
        sizes[save.checkpoint] = kept[save.checkpoint] = checkpoint_bytes
        if save.state:
            sizes[save.state] = kept[save.state] = state_bytes
        for path in save.expired:
            kept.pop(path, None)
    states = sum(save.state is not None for save in saves)
    return DiskUse(len(saves), states, sum(sizes.values()), sum(kept.values()))


def check_saves(saves: Sequence[Save], config: SaveConfig, inputs: Sequence[Path], checkpoint_bytes: int) -> None:
    """InputError if a save would overwrite one of the `inputs`, the folder takes no files, or not even one fits."""
    writable_folder(config.folder, "--output_dir")
    for save in saves:
        for path in inputs:
            if save.checkpoint.exists() and path.exists() and save.checkpoint.samefile(path):
                raise InputError(
                    f"the run would write {save.checkpoint} over {path}, which it reads: choose another --output_name"
                )
    free = shutil.disk_usage(config.folder).free
    if free < checkpoint_bytes:
        raise InputError(
            f"--output_dir {config.folder} has {readable(free)} free, and one checkpoint needs "
            f"{readable(checkpoint_bytes)}"
        )


def remove_expired(save: Save) -> None:
    """Deletes the checkpoints and states that `save` ends."""
    for path in save.expired:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def readable(count: int) -> str:
    """Bytes for a person to read, in decimal units: 28.6 GB."""
    unit, size = next(((u, s) for u, s in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)) if count >= s), ("kB", 1000))
    return f"{count / size:.1f} {unit}"


def _epoch_checkpoint(config: SaveConfig, epoch: int) -> Path:
    return config.folder / f"{config.name}-{epoch:06d}.safetensors"


def _step_checkpoint(config: SaveConfig, step: int) -> Path:
    return config.folder / f"{config.name}-step{step:08d}.safetensors"


def _state_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-state")


def _expired_epoch(epoch: int, every: int, last_n: int | None) -> int | None:
    return epoch - every * last_n if last_n else None


def _expired_step(step: int, every: int, last_n: int | None) -> int | None:
    return (step - last_n - 1) // every * every if last_n else None


def _existing(config: SaveConfig, checkpoint, expired: int | None, expired_state: int | None) -> tuple[Path, ...]:
    """The paths of an expired checkpoint and an expired state; numbers below 1 never had one."""
    paths = [checkpoint(config, expired)] if expired and expired > 0 else []
    if expired_state and expired_state > 0:
        paths.append(_state_folder(checkpoint(config, expired_state)))
    return tuple(paths)
