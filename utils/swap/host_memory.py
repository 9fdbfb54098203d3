"""How much memory this machine still has for weights: RAM, container limits, page locks.

The limits that count are the process's own: in a container the machine's RAM says little.
"""

import ctypes
import functools
import mmap
import os
import platform
import sys
from pathlib import Path

import psutil
from torch import Tensor

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# The names of a limit, of what is in use, and in memory.stat of the file pages in it that can be dropped.
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_UNLIMITED = 1 << 60
_WILL_NEED, _DONT_FORK, _DO_FORK = 3, 10, 11  # madvise(2)


def available_bytes() -> int:
    """Bytes that this process may still take: free RAM or what its cgroup leaves, shared by the local processes."""
    free = min(psutil.virtual_memory().available, _cgroup_room(_CGROUPS, _OWN_CGROUPS))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def page_locks_are_cheap() -> bool:
    """Linux itself: on Windows and WSL page-locked memory counts as shared GPU memory, of which there is little."""
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def memlock_limit() -> int:
    """Bytes of RLIMIT_MEMLOCK, which some drivers apply to page locks; a very large number where there is none."""
    if sys.platform == "win32":
        return _UNLIMITED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def read_ahead(tensor: Tensor) -> None:
    """Has the system read the file pages under `tensor` (CPU, contiguous) in large pieces; where it cannot, no harm."""
    _advise(tensor, _WILL_NEED)


def share_with_forks(pages: Tensor, share: bool) -> None:
    """Whether forked processes get `pages`, whole ones; of those that are page-locked Linux makes real copies."""
    _advise(pages, _DO_FORK if share else _DONT_FORK)


def _advise(tensor: Tensor, advice: int) -> None:
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _cgroup_room(root: Path, own: Path) -> int:
    """The least that a cgroup of this process or one above it leaves; file pages that it can drop count as free.

    `root` is where they are mounted (version 2 or 1), `own` the file that tells the process's.
    """
    rooms = [_UNLIMITED]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # In a container the path may be the machine's, of which only the root is to be seen here.
        group = Path(path.lstrip("/"))
        top, files = (root / "memory", _CGROUP_1) if controllers else (root, _CGROUP_2)
        rooms += [_room_in(top / folder, *files) for folder in (group, *group.parents)]
    return min(rooms)


def _room_in(folder: Path, limit: str, usage: str, inactive: str) -> int:
    if not (folder / limit).is_file() or (text := (folder / limit).read_text().strip()) == "max":
        return _UNLIMITED
    stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(text) - (int((folder / usage).read_text()) - int(stats.get(inactive, 0)))
