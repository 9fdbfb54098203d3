"""How much memory a process may still take, and the refusal to start what needs more.

The limits that count are the process's own: in a container the machine's RAM says little.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from wan.errors import InputError

UNLIMITED = 1 << 60
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# The names of a limit, of what is in use, and in memory.stat of the file pages in it that can be dropped.
_CGROUP_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_CGROUP_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available_bytes() -> int:
    """Bytes of RAM that this process may still take; processes that share the machine get equal parts."""
    free = min(psutil.virtual_memory().available, _cgroup_room(_CGROUPS, _OWN_CGROUPS))
    return min(free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _address_space())


def free_device_bytes(device: torch.device | str) -> int | None:
    """Bytes that this process may still take on a CUDA device; None for a device that does not say."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    # What PyTorch holds and does not use counts as taken for the driver, but is free for us.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_room(needs: Mapping[str, int], available: int | None, where: str, advice: str) -> None:
    """InputError if more bytes are needed than are available; where that is None, nobody knows, and nothing is checked.

    `needs` says what takes how much, `where` the kind of memory, `advice` which flags need less of it.
    """
    needed = sum(needs.values())
    if available is None or needed <= available:
        return
    listed = " and ".join(f"{_gigabytes(size)} for {what}" for what, size in needs.items() if size)
    raise InputError(f"not enough {where}: it takes {listed}, and {_gigabytes(max(available, 0))} are free; {advice}")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _address_space() -> int:
    """What `ulimit -v` leaves, which some clusters set."""
    if sys.platform == "win32":
        return UNLIMITED
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms


def _cgroup_room(root: Path, own: Path) -> int:
    """The least that a cgroup of this process or one above it leaves; file pages that it can drop count as free.

    `root` is where they are mounted (version 2 or 1), `own` the file that names the process's.
    """
    rooms = [UNLIMITED]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # In a container the path may be the machine's, of which only the root is visible here.
        group = Path(path.lstrip("/"))
        top, files = (root / "memory", _CGROUP_1) if controllers else (root, _CGROUP_2)
        rooms += [_room_in(top / folder, *files) for folder in (group, *group.parents)]
    return min(rooms)


def _room_in(folder: Path, limit: str, usage: str, droppable: tuple[str, ...]) -> int:
    if not (folder / limit).is_file() or (text := (folder / limit).read_text().strip()) == "max":
        return UNLIMITED
    stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage).read_text()) - sum(int(stats.get(name, 0)) for name in droppable)
    return int(text) - max(used, 0)
