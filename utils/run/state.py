"""The state folder that --resume continues from: one file, complete on disk or not there.

A state that was damaged or made by hand is refused before anything of it reaches a run.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.run.save_schedule import SaveConfig, files_of, is_state_of
from utils.slice_saving import whole_file
from wan.errors import InputError

LATEST = Path("latest")  # what --resume says for the newest state of its --output_name
_FORMAT = 5
_FILE = "state.pt"
# Settings that are left out where they are this, as all earlier versions did.
_TOLD_IF_USED = {"fp8_base": "no", "guard": "0", "preserve_random": "0", "sample_batch": "by size"}
_COUNTS = ("epoch", "batch", "step", "planned_steps")
_TABLES = ("trained", "optimizer", "scheduler", "scaler")
_KEYS = (*_COUNTS, *_TABLES, "losses")
_OPTIONAL = ("validation", "guard")


class UnusableState(InputError):
    """A state that is damaged or not of this program: `--resume latest` takes an older one."""


@dataclass(frozen=True)
class State:
    """Where a run was after an optimizer step, and what it needs to continue from there bit for bit.

    `settings` are those that decide the run's numbers; `saved_at` is when the step was finished, in ns since 1970.
    """

    name: str
    settings: Mapping[str, str]
    saved_at: int
    epoch: int
    batch: int
    step: int
    losses: list[float]
    planned_steps: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping
    scheduler: Mapping
    scaler: Mapping
    validation: Mapping | None = None
    guard: Mapping | None = None


def is_state(folder: Path) -> bool:
    """Whether a folder holds a state, as far as its file's name tells."""
    return (folder / _FILE).is_file()


def save_state(folder: Path, state: State) -> None:
    """Writes the state to `folder`.

    SliceError if it cannot be written; a state that stood there before is then unchanged.
    """
    content = {"format": _FORMAT, "name": state.name, "saved_at": state.saved_at, "settings": dict(state.settings)}
    content["state"] = {key: vars(state)[key] for key in (*_KEYS, *_OPTIONAL)}
    # In memory, because torch reports a file that accepts no more bytes as an error of its own.
    buffer = io.BytesIO()
    torch.save(_on_cpu(content), buffer)
    with whole_file(folder / _FILE, buffer.tell()) as file:
        file.write(buffer.getbuffer())


def read_state(folder: Path) -> State:
    """The state in `folder`, whole, on the CPU; UnusableState, which says why, if it is not."""
    path = _state_file(folder)
    with _refused_if_unreadable(folder), zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    return _read(folder, mmap=False)


def choose_state(
    resume: Path, save: SaveConfig, check: Callable[[Path, State], None], say: Callable[[str], None]
) -> tuple[Path, str]:
    """The folder that --resume names and the name of its run; for `latest` the newest one that `check` accepts.

    Newest is the state with the most steps, whatever the clock said. InputError if there is none; `check` raises
    UnusableState for a state that an older one may replace.
    """
    if resume != LATEST:
        state = read_state(resume)
        check(resume, state)
        return resume, state.name
    if (folder := latest_state(save, check, say)) is None:
        raise no_state(save)
    return folder, save.name


def latest_state(save: SaveConfig, check: Callable[[Path, State], None], say: Callable[[str], None]) -> Path | None:
    """The newest state of the run that `check` accepts; None if there is none."""
    for folder in _newest_first(save, say):
        try:
            check(folder, read_state(folder))
        except UnusableState as error:
            say(f"note: {error}")
        else:
            return folder
    return None


def seed_of_state(resume: Path, save: SaveConfig) -> int | None:
    """The seed of the run that --resume names, for a run that is given none; None if no state can be read."""
    folders = _newest_first(save, lambda line: None) if resume == LATEST else [resume]
    seed = _read(folders[0], mmap=True).settings.get("seed", "") if folders else ""
    return int(seed) if seed.isdecimal() else None


def no_state(save: SaveConfig, names: Sequence[str] = ()) -> InputError:
    """What --resume latest ends with where there is nothing to resume from; `names` are those of two experts."""
    advice = "leave it out to train from the first step"
    if any(
        files_of(replace(save, name=name)) for name in names or [save.name]
    ):  # which stop a run that does not continue them
        advice = (
            "choose another --output_name, or give --overwrite instead to delete its states, numbered saves and "
            "best slice and train again"
        )
    return InputError(f"--resume latest: {save.folder} has no usable state of {save.name}; {advice}")


def check_settings(folder: Path, state: State, settings: Mapping[str, str]) -> None:
    """InputError if the state in `folder` was made with other settings; it names them."""
    saved, settings = _TOLD_IF_USED | dict(state.settings), _TOLD_IF_USED | dict(settings)
    if missing := settings.keys() - saved.keys():
        raise damaged_state(folder, f"it does not say with which {min(missing)} it was made")
    different = [key for key in settings if saved[key] != settings[key]]
    if different == ["dataset_sha256"]:
        raise InputError(
            f"--resume {folder} is the state of another run: dataset_sha256 is different, so the pictures, captions or "
            "settings of the dataset have changed since; restore them, or leave out --resume"
        )
    if different:
        shown = ", ".join(f"{key} {_short(saved[key])} (now {settings[key]})" for key in different[:4])
        raise InputError(
            f"--resume {folder} is the state of another run: {shown}; give the same settings, or leave out --resume"
        )


def state_folders(save: SaveConfig) -> list[Path]:
    """The folders whose names are those of this run's states, by name; not all need hold one."""
    return sorted(file.parent for file in save.folder.glob(f"*/{_FILE}") if is_state_of(save, file.parent.name))


def _newest_first(save: SaveConfig, say: Callable[[str], None]) -> list[Path]:
    """The states that call themselves this run's; those that cannot be read are named and left out."""
    ages = {}
    for folder in state_folders(save):
        try:
            state = _read(folder, mmap=True)
        except UnusableState as error:
            say(f"note: {error}")
        else:
            if state.name == save.name:  # the names of two runs may meet: a-000003 at its end, a after epoch 3
                ages[folder] = (state.step, state.saved_at)
    return sorted(ages, key=ages.__getitem__, reverse=True)


def damaged_state(folder: Path, problem: str) -> UnusableState:
    """What is said of a state that no run can continue from."""
    return UnusableState(f"--resume {folder}: {_FILE} cannot be used ({_short(problem)}); use an older state")


def _state_file(folder: Path) -> Path:
    path = folder / _FILE
    if not path.is_file():
        raise UnusableState(f"--resume {folder} is not a state folder: it has no {_FILE} (they are named ...-state)")
    return path


def _read(folder: Path, mmap: bool) -> State:
    """The state as far as its structure tells; the values of its tensors may be damaged."""
    path = _state_file(folder)
    with _refused_if_unreadable(folder):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(content, dict) or not _is_count(content.get("format")) or content["format"] != _FORMAT:
        raise UnusableState(f"--resume {folder} was written by another version of this program; train without it")
    if problem := _problem(content):
        raise damaged_state(folder, problem)
    state = {key: content["state"].get(key) for key in (*_KEYS, *_OPTIONAL)}
    return State(content["name"], content["settings"], content["saved_at"], **state)


@contextmanager
def _refused_if_unreadable(folder: Path) -> Iterator[None]:
    """UnusableState for whatever zipfile and torch raise on bytes that they did not write.

    Their unpickler obeys what it reads, so a wrong bit ends in errors of nearly every class.
    """
    try:
        yield
    except Exception as error:
        raise damaged_state(folder, str(error) or type(error).__name__) from None


def _problem(content: Mapping) -> str | None:
    """What in a file's content is not as save_state writes it; the values of tensors are not looked at."""
    settings, state = content.get("settings"), content.get("state")
    if not isinstance(content.get("name"), str) or not _is_count(content.get("saved_at"), 2**63):
        return "its name or time is missing"
    if not isinstance(settings, dict) or not all(isinstance(text, str) for pair in settings.items() for text in pair):
        return "its settings are not text"
    if not isinstance(state, dict) or not state.keys() >= {*_KEYS}:
        return "part of it is missing"
    if wrong := [key for key in _COUNTS if not _is_count(state[key])]:
        return f"its {wrong[0]} is not a count"
    if wrong := [key for key in _TABLES if not isinstance(state[key], dict)]:
        return f"its {wrong[0]} is not a table"
    losses = state["losses"]
    if not isinstance(losses, list) or not all(type(loss) is float and math.isfinite(loss) for loss in losses):
        return "its losses are not finite numbers"
    return None


def _is_count(value: object, most: int = 2**53) -> bool:
    return type(value) is int and 0 <= value < most


def _short(text: object) -> str:
    return str(text).partition("\n")[0][:200]


def _on_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value
