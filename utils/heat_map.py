"""A picture of a table of numbers over time, for the trackers.

Shapes: S steps, C columns, Q quantities, R rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

WIDTH = 512  # pixels, so columns at most
_ROW, _LEFT, _TOP = 12, 32, 16  # pixels
_SCALE = torch.tensor([[48, 18, 90], [57, 85, 145], [32, 145, 140], [120, 205, 85], [253, 231, 37]]).float()
_ZERO, _INFINITE, _NOTHING = (torch.tensor([level] * 3).float() for level in (0, 255, 128))


class History:
    """Means of all steps so far in at most WIDTH columns: when they are full, each two neighbours become one."""

    def __init__(self, quantities: int, rows: int):
        self.sums_CQR = torch.zeros(WIDTH, quantities, rows, dtype=torch.float64)
        self.span = 1  # steps of a column; the last one may hold fewer
        self.steps = 0

    def add(self, numbers_SQR: Tensor) -> None:
        """Takes in the numbers of the next steps, [steps, quantities, rows]."""
        steps = self.steps + len(numbers_SQR)
        while steps > WIDTH * self.span:
            folded_CQR = self.sums_CQR.unflatten(0, (-1, 2)).sum(1)
            self.sums_CQR = torch.cat([folded_CQR, torch.zeros_like(folded_CQR)])
            self.span *= 2
        self.sums_CQR.index_add_(0, torch.arange(self.steps, steps) // self.span, numbers_SQR)
        self.steps = steps

    def means(self) -> Tensor:
        """[columns, quantities, rows]."""
        held_C = (self.steps - torch.arange(0, self.steps, self.span)).clamp(max=self.span)
        return self.sums_CQR[: len(held_C)] / held_C[:, None, None]

    def outer_columns(self, last: int) -> tuple[str, str]:
        """The steps of the first and the last column in words, where the last step has the number `last`."""
        first = last + 1 - self.steps
        starts = range(first, last + 1, self.span)
        return _steps(first, first + self.span - 1), _steps(starts[-1], last)


def _steps(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first}-{last}"


def heat_map(values_RC: Tensor, title: str, rows: Sequence[str], first: str, last: str) -> np.ndarray:
    """uint8 [height, width, 3] of values [rows, columns], none below 0, from dark to bright by their logarithm.

    0 is black, infinity white, NaN grey. `first` and `last` name the outer columns, of which there are at most WIDTH.
    """
    assert values_RC.shape[1] <= WIDTH
    shown = values_RC[values_RC.isfinite() & (values_RC > 0)]
    low, high = (shown.min().item(), shown.max().item()) if len(shown) else (1.0, 1.0)
    cells_RC3 = _colours(values_RC, low, high)
    cells = cells_RC3.repeat_interleave(_ROW, 0).repeat_interleave(max(1, WIDTH // cells_RC3.shape[1]), 1)
    picture = Image.new("RGB", (_LEFT + max(cells.shape[1], WIDTH), 2 * _TOP + cells.shape[0]))
    picture.paste(Image.fromarray(cells.byte().numpy()), (_LEFT, _TOP))
    draw = ImageDraw.Draw(picture)
    draw.text((2, 2), f"{title}: dark {low:.1e}, bright {high:.1e}, black 0")
    for number, name in enumerate(rows):
        draw.text((2, _TOP + _ROW * number), name)
    draw.text((_LEFT, _TOP + cells.shape[0] + 2), first)
    draw.text((_LEFT + cells.shape[1], _TOP + cells.shape[0] + 2), last, anchor="ra")
    return np.array(picture)


def _colours(values_RC: Tensor, low: float, high: float) -> Tensor:
    """[rows, columns, 3], 0 to 255."""
    span = max(np.log(high) - np.log(low), 1e-6)
    place_RC = ((values_RC.double().log() - np.log(low)) / span).nan_to_num(0.0).clamp(0, 1) * (len(_SCALE) - 1)
    below_RC = place_RC.long().clamp(max=len(_SCALE) - 2)
    colours_RC3 = torch.lerp(_SCALE[below_RC], _SCALE[below_RC + 1], (place_RC - below_RC).float()[..., None])
    colours_RC3[values_RC == 0] = _ZERO
    colours_RC3[values_RC.isinf()] = _INFINITE
    colours_RC3[values_RC.isnan()] = _NOTHING
    return colours_RC3
