"""A picture of a table of numbers over time, for the trackers."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

_WIDTH, _ROW, _LEFT, _TOP = 512, 12, 32, 16  # pixels
_SCALE = torch.tensor([[48, 18, 90], [57, 85, 145], [32, 145, 140], [120, 205, 85], [253, 231, 37]]).float()
_ZERO, _INFINITE, _NOTHING = (torch.tensor([level] * 3).float() for level in (0, 255, 128))


def heat_map(values_RC: Tensor, title: str, rows: Sequence[str], first: str, last: str) -> np.ndarray:
    """uint8 [height, width, 3] of values [rows, columns], none below 0, from dark to bright by their logarithm.

    0 is black, infinity white, NaN grey. `first` and `last` name the outer columns; more columns than fit are averaged.
    """
    if values_RC.shape[1] > _WIDTH:
        values_RC = F.adaptive_avg_pool1d(values_RC[None], _WIDTH)[0]
    shown = values_RC[values_RC.isfinite() & (values_RC > 0)]
    low, high = (shown.min().item(), shown.max().item()) if len(shown) else (1.0, 1.0)
    cells_RC3 = _colours(values_RC, low, high)
    cells = cells_RC3.repeat_interleave(_ROW, 0).repeat_interleave(max(1, _WIDTH // cells_RC3.shape[1]), 1)
    picture = Image.new("RGB", (_LEFT + max(cells.shape[1], _WIDTH), 2 * _TOP + cells.shape[0]))
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
