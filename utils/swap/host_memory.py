"""What the system can be asked about host memory: page locks, reading ahead, what forks get."""

import ctypes
import functools
import mmap
import platform
import sys

from torch import Tensor

from wan.memory import UNLIMITED

_WILL_NEED, _DONT_FORK, _DO_FORK = 3, 10, 11  # madvise(2)


def page_locks_are_cheap() -> bool:
    """Linux itself: on Windows and WSL page-locked memory counts as shared GPU memory, of which there is little."""
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def memlock_limit() -> int:
    """Bytes of RLIMIT_MEMLOCK, which some drivers apply to page locks; a very large number where there is none."""
    if sys.platform == "win32":
        return UNLIMITED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def read_ahead(tensor: Tensor) -> None:
    """Asks the system to read the file pages under `tensor` (CPU, contiguous) in large pieces; a no-op elsewhere."""
    _advise(tensor, _WILL_NEED)


def share_with_forks(pages: Tensor, share: bool) -> None:
    """Whether forked processes get `pages`, whole ones; Linux makes real copies of those that are page-locked."""
    _advise(pages, _DO_FORK if share else _DONT_FORK)


def _advise(tensor: Tensor, advice: int) -> None:
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
