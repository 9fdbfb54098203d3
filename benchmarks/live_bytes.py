"""Counts the bytes of live tensors: what a step holds, without what the allocator or the system add."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside this context: the bytes of all storages that operators return or `add` is given, until each is freed.

    A storage counts once, however many views it has. Scratch memory inside one operator is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, *tensors: Tensor) -> None:
        """Counts storages of tensors that were made before this context."""
        for tensor in tensors:
            if tensor.layout == torch.sparse_coo:
                self.add(tensor._indices(), tensor._values())
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._sizes:
                weakref.finalize(storage, self._freed, key).atexit = False
            self.live += size - self._sizes.get(key, 0)
            self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def restart_peak(self) -> None:
        self.peak = self.live

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator(*args, **(kwargs or {}))
        self.add(*(leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)))
        return returned
