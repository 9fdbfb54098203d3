"""Users' files and folders, checked before they are used, and their names and sizes as text."""

import reprlib
import tempfile
import unicodedata
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from wan.errors import InputError

_LONGEST_NAME = 170  # bytes: file systems take 255, and what follows in the name of an unfinished file is up to 80
_FORBIDDEN = '/\\:*?"<>|'
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"
}


def existing_file(path: Path, what: str) -> Path:
    """`path`, if it is a file; InputError names it and says `what` it should have been."""
    if problem := file_problem(path):
        raise InputError(f"{what} {path_text(path)} {problem}")
    return path


def file_problem(path: Path, or_folder: bool = False) -> str | None:
    """Why `path` is not a file (or a folder) that can be read, as the end of a sentence; None if it is."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except ValueError:
        return "is not a possible path"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if S_ISDIR(mode):
        return None if or_folder else "is a folder"
    # A named pipe or a device would be waited for, or read, forever.
    return None if S_ISREG(mode) else "is not a regular file"


def folder_entries(path: Path, what: str, hint: str = "") -> list[Path]:
    """What a folder holds, sorted; InputError, ending in `hint`, if it is not a folder that can be listed."""
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        problem = "does not exist"
    except NotADirectoryError:
        problem = "is not a folder"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {_reason(error)}"
    raise InputError(f"{what} {path_text(path)} {problem} {hint}".rstrip())


def writable_folder(path: Path, flag: str) -> Path:
    """`path` as a folder that files can be written to, created if missing; InputError names the flag that gave it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{flag} {path_text(path)} cannot be created: a file is in the way") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path_text(path)} cannot be created: {_reason(error)}") from None
    try:
        with tempfile.TemporaryFile(dir=path):  # asking for permissions tells nothing on Windows and network shares
            return path
    except OSError as error:
        raise InputError(f"{flag} {path} is not writable: {error.strerror}") from None


def file_name(text: str) -> str:
    """`text`, which came from a file, as part of a file's name; unchanged if every system takes it as it is.

    Path separators, control characters and what Windows forbids become "_"; long names are cut.
    """
    name = "".join(character if _is_allowed(character) else "_" for character in text)
    name = name.encode()[:_LONGEST_NAME].decode(errors="ignore").strip(" .")
    # Windows takes nul, NUL.txt and "nul .png" for the device.
    is_device = name.split(".")[0].rstrip().casefold() in _DEVICES
    return f"_{name}" if is_device or not name else name


def quoted(value: object) -> str:
    """A value from a file as a message shows it: short, on one line, without characters that steer a terminal."""
    return _SHORT.repr(value)


def path_text(path: Path) -> str:
    """A path that came from a file, as a message shows it."""
    return str(path) if str(path).isprintable() and len(str(path)) < 300 else quoted(str(path))


def names_text(names: Iterable[str]) -> str:
    """Keys from a file, as a message lists them."""
    listed = [name if name.isidentifier() and len(name) < 80 else quoted(name) for name in islice(names, 30)]
    return ", ".join([*listed, *(["..."] if len(listed) == 30 else [])])


def readable(count: int) -> str:
    """Bytes for a person to read, in decimal units: 28.6 GB."""
    unit, size = next(((u, s) for u, s in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)) if count >= s), ("kB", 1000))
    return f"{count / size:.1f} {unit}"


def _is_allowed(character: str) -> bool:
    return character in _JOINERS or not (
        character in _FORBIDDEN or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) else str(error)


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to spell out very long ones, which hexadecimal numbers in toml can be.
        return repr(value) if abs(value) < 10**30 else "a number of more than 30 digits"


_SHORT = _Short()
