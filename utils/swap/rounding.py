"""Block matrices in float8 while they are frozen: rounded once, on the host, and turned back at each use.

Plain: a value is its nearest float8. Scaled: each row is first divided by its own scale, so that its largest value is
the largest of float8. Scales are few and stay on the device; so do norms, biases and whatever is no block matrix.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from wan.errors import InputError

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_TOGETHER = 2**22  # values that are rounded, or scaled, in one go: in float32 they take 16 MB
_SCALE = torch.float32


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
        self.device = torch.device(device)
        self._scales: dict[nn.Parameter, Tensor] = {}  # [rows, 1], on the device
        most = max((matrix.numel() for matrix in matrices), default=0)
        self._memory = torch.empty(most, dtype=dtype, device=self.device)

    def stored_bytes(self, weight: Tensor) -> int:
        """What a weight takes where it waits."""
        return weight.numel() if weight in self.matrices else weight.nbytes

    @property
    def device_bytes(self) -> int:
        """What the device keeps beside the rounded matrices."""
        return beside_rounded(self.matrices, self.scaled, self._memory.dtype)

    def move(self, weight: nn.Parameter, memory: Tensor) -> None:
        """Puts a weight into the beginning of `memory` (uint8), rounded if it is one of the matrices."""
        stored = memory[: self.stored_bytes(weight)]
        if weight not in self.matrices:
            weight.data = stored.view(weight.dtype).view(weight.shape).copy_(weight.data)
            return
        rounded = stored.view(FLOAT8).view(weight.shape)
        scales = torch.empty(len(weight), 1, dtype=_SCALE, device=weight.device) if self.scaled else None
        for rows in _rows(weight):
            _round(weight.data[rows], rounded[rows], None if scales is None else scales[rows])
        weight.data = rounded
        if scales is not None:
            self._scales[weight] = scales.to(self.device)

    def turned_back(self, weight: nn.Parameter, rounded: Tensor) -> Tensor:
        """The values that `rounded`, a copy of the weight on the device, stands for; valid until the next call."""
        values = self._memory[: rounded.numel()].view(rounded.shape)
        values.copy_(rounded)  # exact: every float8 is a value of wider dtypes
        if self.scaled:
            for rows in _rows(rounded):
                values[rows] = values[rows].to(_SCALE).mul_(self._scales[weight][rows])
        return values


AS_THEY_ARE = Rounding()


def beside_rounded(matrices: Collection[Tensor], scaled: bool, dtype: torch.dtype) -> int:
    """What a device keeps beside rounded matrices, in bytes: their scales, and one of them in `dtype`."""
    scales = sum(len(matrix) for matrix in matrices) * _SCALE.itemsize if scaled else 0
    return scales + max((matrix.numel() for matrix in matrices), default=0) * dtype.itemsize


def check_float8(device: torch.device) -> None:
    """InputError if PyTorch cannot keep float8 on the device and turn it into other dtypes there."""
    try:
        torch.zeros(1, dtype=FLOAT8).to(device).to(torch.bfloat16)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"fp8 does not work on {device} ({str(error).splitlines()[0]}): leave it out") from None


def _rows(matrix: Tensor) -> list[slice]:
    """The rows in runs of at most _TOGETHER values."""
    count = max(1, _TOGETHER // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]


def _round(values: Tensor, rounded: Tensor, scales: Tensor | None) -> None:
    """Writes the nearest float8 of `values`; divided by the rows' scales, which it writes too, if there are any."""
    wide = values.to(_SCALE)  # float8 has a rounding of its own for each dtype in some versions of PyTorch
    if scales is not None:
        scales.copy_((wide.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(_SCALE).tiny))
        wide = wide / scales
    # What is larger than the largest float8 would become NaN.
    rounded.copy_(wide.clamp(-_LARGEST, _LARGEST))
