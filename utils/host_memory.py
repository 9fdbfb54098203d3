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

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
_WILL_NEED = 3  # madvise(2)


def available_bytes() -> int:
    """Bytes that this process may still take: free RAM or what its cgroup leaves, shared by the local processes."""
    free = min(psutil.virtual_memory().available, _cgroup_room(_CGROUP))
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
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), _WILL_NEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _cgroup_room(root: Path) -> int:
    """What the cgroup (version 2 or 1) mounted at `root` leaves; file pages that it can drop count as free."""
    for limit, usage, stat, inactive in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        if (root / limit).is_file() and (text := (root / limit).read_text().strip()) != "max":
            stats = dict(line.split() for line in (root / stat).read_text().splitlines())
            used = int((root / usage).read_text()) - int(stats.get(inactive, 0))
            return int(text) - used
    return _UNLIMITED
