"""Resizing pixels to a bucket: upright, with the middle cut out.

H W height and width, C colours.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from utils.pixels.turning import UPRIGHT, Turn

# New rows, and new columns, that are computed at once: what they are made of fits in the processor's cache.
_ROWS, _COLUMNS = 32, 8


def resize_and_crop(pixels_HWC: np.ndarray, size: tuple[int, int], turn: Turn = UPRIGHT) -> np.ndarray:
    """uint8 pixels, turned upright and scaled to cover `size` (width, height), the middle of them cut out.

    Lanczos (Pillow) upwards; downwards the mean of the covered area, weighted by coverage as OpenCV's INTER_AREA.
    """
    width, height = size
    old_width, old_height = turn.size(pixels_HWC.shape[1], pixels_HWC.shape[0])
    if (old_width, old_height) == size:
        return np.ascontiguousarray(turn.apply(pixels_HWC))
    scale = max(width / old_width, height / old_height)
    new_size = int(old_width * scale + 0.5), int(old_height * scale + 0.5)
    if scale > 1:
        upright = Image.fromarray(np.ascontiguousarray(turn.apply(pixels_HWC)))
        scaled = np.asarray(upright.resize(new_size, Image.Resampling.LANCZOS))
    else:  # turned last, because there are fewer pixels then
        scaled = turn.apply(_area_mean(pixels_HWC, *turn.size(*new_size)))
    left, top = (new_size[0] - width) // 2, (new_size[1] - height) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


def _area_mean(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    old_height, old_width, channels = pixels_HWC.shape
    lines = np.ascontiguousarray(pixels_HWC).reshape(old_height, -1)
    columns = [_for_each_channel(band, channels) for band in _bands(old_width, width, _COLUMNS)]
    means = np.empty((height, width * channels), np.uint8)
    for rows in _bands(old_height, height, _ROWS):
        wide = rows.weights @ lines[rows.old].astype(np.float32)
        narrow = np.empty((len(wide), width * channels), np.float32)
        for band in columns:
            np.matmul(wide[:, band.old], band.weights.T, out=narrow[:, band.new])
        means[rows.new] = np.rint(narrow, out=narrow)
    return means.reshape(height, width, channels)


@dataclass(frozen=True)
class _Band:
    """Some neighbouring new cells, the old ones that they cover, and how much of each: [new, old], sums of 1."""

    new: slice
    old: slice
    weights: np.ndarray


def _bands(old: int, new: int, cells: int) -> list[_Band]:
    edges = np.arange(new + 1) * old / new
    return [_band(edges[first : first + cells + 1], first, old) for first in range(0, new, cells)]


def _band(edges: np.ndarray, first: int, old: int) -> _Band:
    low, high = edges[:-1, None], edges[1:, None]
    covered = np.arange(int(edges[0]), min(ceil(edges[-1]), old))
    shares = (np.minimum(covered + 1, high) - np.maximum(covered, low)).clip(0) / (high - low)
    old_cells = slice(int(edges[0]), int(edges[0]) + len(covered))
    return _Band(slice(first, first + len(low)), old_cells, shares.astype(np.float32))


def _for_each_channel(band: _Band, channels: int) -> _Band:
    """The band for lines in which the channels of a cell lie side by side."""
    weights = np.kron(band.weights, np.eye(channels, dtype=np.float32))
    new = slice(band.new.start * channels, band.new.stop * channels)
    return _Band(new, slice(band.old.start * channels, band.old.stop * channels), weights)
