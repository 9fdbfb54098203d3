"""One writer at a time: locks on the names of outputs, and temporary files whose writer is gone."""

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from utils.files import quoted
from wan.errors import InputError

UNFINISHED = ".wan.tmp"  # as in slice_saving.py, which imports torch
_TEMPORARY = re.compile(rf"(?P<name>.+)\.(?P<process>[0-9a-f]{{8}}-[0-9]+-[0-9]*){re.escape(UNFINISHED)}", re.DOTALL)
_QUIET = 3600  # seconds without a byte, after which a writer that cannot be asked is taken to be gone
_STARTING = 60  # seconds after which a lock without an owner in it is one that a crash left


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
