"""Matrices rounded to float8, and back: plainly, or with a scale for each row.

Plain: a value is its nearest float8. Scaled: each row is first divided by its own scale, so that its largest value
becomes the largest float8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.errors import InputError

FLOAT8 = torch.float8_e4m3fn
SCALE = torch.float32
_LARGEST = torch.finfo(FLOAT8).max
_TOGETHER = 2**22  # values that are rounded, or scaled, in one go: in float32 they take 16 MB


def round_matrix(values: Tensor, rounded: Tensor, scaled: bool) -> Tensor | None:
    """Writes the nearest float8 of `values` to `rounded`; the rows' scales [rows, 1], if they are `scaled`."""
    scales = torch.empty(len(values), 1, dtype=SCALE, device=values.device) if scaled else None
    for rows in _runs(values):
        if scaled:
            low, high = values[rows].aminmax(dim=1, keepdim=True)
            # Not 0, which a row of zeros would have.
            scales[rows] = (torch.maximum(high, -low).to(SCALE) / _LARGEST).clamp(min=torch.finfo(SCALE).tiny)
            rounded[rows] = values[rows].to(SCALE).div_(scales[rows]).to(FLOAT8)
        else:
            # Without the clamp, what is larger becomes NaN in some versions of PyTorch.
            rounded[rows] = values[rows].clamp(-_LARGEST, _LARGEST).to(FLOAT8)
    return scales


def turn_back(rounded: Tensor, scales: Tensor | None, values: Tensor) -> Tensor:
    """Writes what `rounded` stands for to `values`, of any wider dtype, and returns these."""
    values.copy_(rounded)  # exact: every float8 is a value of wider dtypes
    if scales is not None:
        for rows in _runs(values):
            values[rows] = values[rows].to(SCALE).mul_(scales[rows])
    return values


def scale_bytes(matrix: Tensor) -> int:
    """What the scales of a matrix take."""
    return len(matrix) * SCALE.itemsize


def check_float8(device: torch.device) -> None:
    """InputError if PyTorch cannot keep float8 on the device and turn it into other dtypes there."""
    try:
        torch.zeros(1, dtype=FLOAT8).to(device).to(torch.bfloat16)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"fp8 does not work on {device} ({str(error).splitlines()[0]}): leave it out") from None


class RoundedLinear(nn.Module):
    """A frozen linear layer without bias, whose weight is turned back into `dtype` at each use."""

    weight = None  # for code that looks at a layer's weight before it converts its input

    def __init__(self, rounded: Tensor, scales: Tensor, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("rounded", rounded, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, turn_back(self.rounded, self.scales, torch.empty_like(self.rounded, dtype=self.dtype)))


def rounded_tensors(model: nn.Module) -> list[Tensor]:
    """What the model's layers of this kind hold, which is not in its state_dict."""
    layers = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    return [tensor for layer in layers for tensor in layer.buffers()]


def _runs(matrix: Tensor) -> list[slice]:
    """The rows in runs of at most _TOGETHER values."""
    count = max(1, _TOGETHER // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]
