"""Users' files and folders, checked before they are used: names, one writer at a time, left-overs."""

import json
import os
import platform
import re
import reprlib
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import psutil

from wan.errors import InputError

_LONGEST_NAME = 170  # bytes: file systems take 255, and what follows in the name of an unfinished file is up to 80
_FORBIDDEN = '/\\:*?"<>|'
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"
}
UNFINISHED = ".wan.tmp"  # as in slice_saving.py, which imports torch
_TEMPORARY = re.compile(rf"(?P<name>.+)\.(?P<process>[0-9a-f]{{8}}-[0-9]+-[0-9]*){re.escape(UNFINISHED)}", re.DOTALL)
_QUIET = 3600  # seconds without a byte, after which a writer that cannot be asked is taken to be gone
_STARTING = 60  # seconds after which a lock without an owner in it is one that a crash left


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


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Deletes those of the files that are temporary and whose writer is gone; others, folders as well, stay."""
    for path in paths:
        with suppress(OSError):  # gone meanwhile, or open in another program: nothing that a writer needs
            if is_left_over(path):
                path.unlink()


def finished_name(path: Path) -> str:
    """The name that a temporary file was to take; of older versions' as well, which was NAME.wan.tmp."""
    found = _TEMPORARY.fullmatch(path.name)
    return found["name"] if found else path.name.removesuffix(UNFINISHED)


def is_left_over(path: Path) -> bool:
    """Whether a file is a temporary one whose writer ended without taking it away; OSError if it is gone.

    A writer on another machine, or of an older version, cannot be asked: it counts as gone after an hour without a
    byte.
    """
    if not path.name.endswith(UNFINISHED) or path.is_dir():
        return False
    found = _TEMPORARY.fullmatch(path.name)
    runs = is_running(found["process"]) if found else None
    return time.time() - path.stat().st_mtime > _QUIET if runs is None else not runs


def is_running(process: str) -> bool | None:
    """Whether a process, by the name that slice_saving.this_process() gave it, still runs; None for other machines.

    A later process of the same number is another one, where the name has its start (on Linux).
    """
    from utils.slice_saving import this_process  # torch takes seconds; only what writes needs it

    machine, pid, start = process.split("-")
    if machine != this_process().split("-")[0]:
        return None
    try:
        started = started_at(int(pid))
    except psutil.AccessDenied:  # another user's
        return True
    return started is not None and (not start or started.split()[-1] == start)


@contextmanager
def sole_writer(folder: Path, name: str, what: str, advice: str) -> Iterator[None]:
    """Holds the lock file `name`.lock in `folder`, so that no second process writes `what` meanwhile.

    InputError, with `advice`, while a living process holds it; one that a crash left behind is replaced. Only the main
    process of a run takes it. `what` begins the message: "--output_name character1 in saves".
    """
    path, own = folder / f"{name}.lock", _owner_text()
    try:
        _take_lock(path, own, what, advice)
    except OSError as error:
        raise InputError(f"{what}: the lock file {path} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        if _lock_text(path) == own and json.loads(own)["pid"] == os.getpid():  # a forked process leaves it alone
            path.unlink(missing_ok=True)


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that started_at gave `started` for still runs on this computer."""
    try:
        return started_at(pid) == started
    except psutil.AccessDenied:  # another user's
        return True


def started_at(pid: int) -> str | None:
    """When the process with this number started, as a text that no other process has; None if there is none.

    Clocks may be set, so on Linux it is the boot and the time since then.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform != "linux":
            return str(process.create_time())
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {fields[19]}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, ValueError, OverflowError):
        return None


def _take_lock(path: Path, own: str, what: str, advice: str) -> None:
    for _ in range(100):
        if _create(path, own):
            return
        found = _lock_text(path)
        if found is None:
            continue  # released since
        _refuse_living(path, found, what, advice)
        _remove_stale(path, found)
    raise InputError(f"{what}: other processes keep taking the lock file {path}; {advice}")


def _create(path: Path, text: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "wb") as file:
            file.write(text.encode())
    except OSError:  # a full disk: a lock without an owner would be in the way of the next run
        path.unlink()
        raise
    return True


def _refuse_living(path: Path, found: str, what: str, advice: str) -> None:
    owner = _owner(found)
    if owner is None:
        if time.time() - path.stat().st_mtime < _STARTING:
            raise InputError(f"{what}: another process seems to be starting (lock file {path}); {advice}")
    elif (owner["host"], owner["numbers"]) != _this_machine():
        raise InputError(
            f"{what} is locked by process {owner['pid']} of another computer or container, {quoted(owner['host'])}; "
            f"{advice}; if that process has ended, delete {path}"
        )
    elif is_alive(owner["pid"], owner["started"]):
        raise InputError(f"{what} is in use by process {owner['pid']} (lock file {path}); {advice}")


def _remove_stale(path: Path, found: str) -> None:
    """Removes the lock whose text was `found`, and no other: another process may have replaced it meanwhile."""
    moved = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(moved)
    except FileNotFoundError:
        return
    if _lock_text(moved) == found:
        moved.unlink()
    else:
        moved.rename(path)


def _owner_text() -> str:
    pid, (host, numbers) = os.getpid(), _this_machine()
    return json.dumps({"host": host, "numbers": numbers, "pid": pid, "started": started_at(pid)})


def _this_machine() -> tuple[str, str]:
    """Its name, and for Linux whose process numbers count here: containers have their own."""
    numbers = "/proc/self/ns/pid"
    return platform.node(), os.readlink(numbers) if os.path.exists(numbers) else ""


def _owner(text: str) -> dict | None:
    """The owner that a lock names; None where a crash left no whole text."""
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"host": str, "numbers": str, "pid": int, "started": str}
    is_whole = isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in kinds.items())
    return owner if is_whole else None


def _lock_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


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
