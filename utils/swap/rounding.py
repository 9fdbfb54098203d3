"""Block matrices in float8 while they are frozen: rounded once, where they wait, and turned back for each use.

Their scales are few and stay on the device; so do norms, biases and whatever is not a block matrix.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from wan.float8 import FLOAT8, round_matrix, scale_bytes, turn_back


class Rounding:
    """Rounds `matrices`, each once, and turns them into `dtype` on `device`, in memory that all of them share."""

    def __init__(
        self,
        matrices: Collection[nn.Parameter] = (),
        scaled: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        self.matrices = frozenset(matrices)
        self.scaled = scaled
        self._scales: dict[nn.Parameter, Tensor] = {}  # on the device
        most = max((matrix.numel() for matrix in matrices), default=0)
        self._memory = torch.empty(most, dtype=dtype, device=device)

    @property
    def device_bytes(self) -> int:
        """What the device keeps beside the rounded matrices."""
        return beside_rounded(self.matrices, self.scaled, self._memory.dtype)

    def stored_bytes(self, weight: Tensor) -> int:
        """What a weight takes where it waits."""
        return weight.numel() if weight in self.matrices else weight.nbytes

    def move(self, weight: nn.Parameter, memory: Tensor) -> None:
        """Puts a weight into the beginning of `memory` (uint8), rounded if it is one of the matrices."""
        stored = memory[: self.stored_bytes(weight)]
        if weight not in self.matrices:
            weight.data = stored.view(weight.dtype).view(weight.shape).copy_(weight.data)
            return
        rounded = stored.view(FLOAT8).view(weight.shape)
        scales = round_matrix(weight.data, rounded, self.scaled)
        weight.data = rounded
        if scales is not None:
            self._scales[weight] = scales.to(self._memory.device)

    def turned_back(self, weight: nn.Parameter, rounded: Tensor) -> Tensor:
        """The values that `rounded`, a copy of the weight on the device, stands for; valid until the next call."""
        values = self._memory[: rounded.numel()].view(rounded.shape)
        return turn_back(rounded, self._scales.get(weight), values)


AS_THEY_ARE = Rounding()


def beside_rounded(matrices: Collection[Tensor], scaled: bool, dtype: torch.dtype) -> int:
    """What a device keeps beside rounded matrices, in bytes: their scales, and one of them in `dtype`."""
    scales = sum(map(scale_bytes, matrices)) if scaled else 0
    return scales + max((matrix.numel() for matrix in matrices), default=0) * dtype.itemsize
