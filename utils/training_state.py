"""The state folder that --resume continues from: one file, complete on disk or not there."""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.selective_finetune import whole_file
from wan.errors import InputError

_FORMAT = 3
_FILE = "state.pt"


def save_state(folder: Path, settings: Mapping[str, str], state: Mapping) -> None:
    """Writes `state` (tensors, numbers, containers) and the `settings` that it is valid for into `folder`.

    SliceError if it cannot be written; a state that was there before is then as it was.
    """
    content = _on_cpu({"format": _FORMAT, "settings": dict(settings), "state": dict(state)})
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


def load_state(folder: Path) -> dict:
    """The tensors, numbers and containers of save_state, on the CPU; InputError if the file cannot be read."""
    return _load(folder, mmap=False)["state"]


def latest_state(folder: Path, name: str) -> Path:
    """The state of runs called `name` that was saved last; InputError if `folder` holds none."""
    names = re.compile(re.escape(name) + r"(-\d{6}|-step\d{8})?-state")
    found = [file for file in folder.glob(f"*/{_FILE}") if names.fullmatch(file.parent.name)]
    if not found:
        raise InputError(f"--resume latest: {folder} holds no state of {name}; leave it out to begin")
    return max(found, key=lambda file: (file.stat().st_mtime_ns, file.parent.name)).parent


def _load(folder: Path, mmap: bool) -> dict:
    path = folder / _FILE
    if not path.is_file():
        raise InputError(f"--resume {folder} is no state folder: it has no {_FILE} (they are named ...-state)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"--resume {folder}: {_FILE} cannot be read ({reason}); use an older state") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"--resume {folder} was written by another version of this program; train without it")
    return content


def _on_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value
