"""The state folder that --resume continues from: complete on disk, or not there."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan.errors import InputError

_FORMAT = 1
_SETTINGS, _TENSORS = "settings.json", "state.pt"


def save_state(folder: Path, settings: Mapping[str, str], state: Mapping) -> None:
    """Writes `state` (tensors, numbers, containers) and the `settings` that it is valid for, then names it `folder`."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    text = json.dumps({"format": _FORMAT, **settings}, indent=1, ensure_ascii=False)
    (unfinished / _SETTINGS).write_text(text, encoding="utf-8")
    with (unfinished / _TENSORS).open("wb") as file:
        torch.save(_on_cpu(dict(state)), file)
        file.flush()
        os.fsync(file.fileno())
    # A folder cannot be replaced in one move: the old one steps aside, and is deleted once the new one has its name.
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def check_state(folder: Path, settings: Mapping[str, str]) -> None:
    """InputError if `folder` holds no state, or one of a run with other settings; it says which."""
    theirs = _read_settings(folder)
    different = [key for key in settings if theirs.get(key) != settings[key]]
    if different:
        shown = ", ".join(f"{key} {theirs.get(key)} (now {settings[key]})" for key in different[:4])
        raise InputError(
            f"--resume {folder} is the state of another run: {shown}; give the same settings, or leave out --resume"
        )


def load_state(folder: Path) -> dict:
    """The tensors, numbers and containers of save_state, on the CPU; InputError if the file cannot be read."""
    path = folder / _TENSORS
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"--resume {folder}: {_TENSORS} cannot be read ({error}); use an older state") from None


def _on_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value


def _read_settings(folder: Path) -> dict:
    path = folder / _SETTINGS
    if not path.is_file():
        raise InputError(f"--resume {folder} is no state folder: it has no {_SETTINGS} (they are named ...-state)")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"--resume {folder}: {_SETTINGS} cannot be read ({error}); use an older state") from None
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise InputError(f"--resume {folder} was written by another version of this program; train without it")
    return settings
