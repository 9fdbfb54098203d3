"""Users' files and folders, checked before they are used; sizes as text."""

import os
import sys
from pathlib import Path

from wan.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict:
    """The tables of a toml file; InputError names the file and the line that cannot be read."""
    existing_file(path, "toml file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and deep nesting
        raise InputError(f"{path} is not valid toml: {error}") from None


def existing_file(path: Path, what: str) -> Path:
    """`path`, if it is a file; InputError names it and says `what` it should have been."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{what} {path} {found}")
    return path


def writable_folder(path: Path, flag: str) -> Path:
    """`path` as a folder that files can be written to, made if missing; InputError names the flag that gave it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{flag} {path} is not writable")
    return path


def readable(count: int) -> str:
    """Bytes for a person to read, in decimal units: 28.6 GB."""
    unit, size = next(((u, s) for u, s in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)) if count >= s), ("kB", 1000))
    return f"{count / size:.1f} {unit}"
