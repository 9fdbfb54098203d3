"""The state folder that --resume continues from: one file, complete on disk or not there."""

import io
import pickle
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from utils.slice_saving import whole_file
from wan.errors import InputError

_FORMAT = 4
_FILE = "state.pt"
# What zipfile and torch.load raise for files that are not what they wrote.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


def save_state(folder: Path, name: str, settings: Mapping[str, str], state: Mapping) -> None:
    """Writes the `state` (tensors, numbers, containers) of a run called `name` and its deciding `settings` to `folder`.

    SliceError if it cannot be written; a state that was there before is then as it was.
    """
    told = {"format": _FORMAT, "name": name, "saved_at": time.time_ns()}
    content = told | _on_cpu({"settings": dict(settings), "state": dict(state)})
    # In memory, because torch tells of a file that takes no more as of an error of its own.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole_file(folder / _FILE, buffer.tell()) as file:
        file.write(buffer.getbuffer())


def check_state(folder: Path, settings: Mapping[str, str]) -> None:
    """InputError if `folder` holds no state, or one of a run with other settings; it says which."""
    theirs = _load(folder, mmap=True)["settings"]
    different = [key for key in settings if theirs.get(key) != settings[key]]
    if different:
        shown = ", ".join(f"{key} {theirs.get(key)} (now {settings[key]})" for key in different[:4])
        raise InputError(
            f"--resume {folder} is the state of another run: {shown}; give the same settings, or leave out --resume"
        )


def load_state(folder: Path) -> tuple[dict, int]:
    """What save_state was given, on the CPU, and when (ns since 1970); InputError if the file cannot be read."""
    content = _load(folder, mmap=False)
    return content["state"], content["saved_at"]


def latest_state(folder: Path, name: str, say: Callable[[str], None]) -> Path:
    """The state of runs called `name` that was saved last; InputError if `folder` holds none.

    By what the states themselves tell: copied files have other times, and the names of two runs may meet. Those that
    cannot be read are said and left out.
    """
    names = re.compile(re.escape(name) + r"(-\d{6}|-step\d{8})?-state")
    folders = [file.parent for file in folder.glob(f"*/{_FILE}") if names.fullmatch(file.parent.name)]
    told = {}
    for path in folders:
        try:
            told[path] = _read(path, mmap=True)
        except InputError as error:
            say(f"note: {error}")
    found = [path for path, content in told.items() if content["name"] == name]
    if not found:
        raise InputError(f"--resume latest: {folder} holds no state of {name}; leave it out to begin")
    return max(found, key=lambda path: told[path]["saved_at"])


def _load(folder: Path, mmap: bool) -> dict:
    """The file's content, once its checksums say that all its bytes are what was written."""
    with _readable(folder) as path, zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
    return _read(folder, mmap)


def _read(folder: Path, mmap: bool) -> dict:
    with _readable(folder) as path:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"--resume {folder} was written by another version of this program; train without it")
    return content


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The state's file; InputError where it is missing, or what is done with it fails."""
    path = folder / _FILE
    if not path.is_file():
        raise InputError(f"--resume {folder} is no state folder: it has no {_FILE} (they are named ...-state)")
    try:
        yield path
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"--resume {folder}: {_FILE} cannot be read ({reason}); use an older state") from None


def _on_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value
