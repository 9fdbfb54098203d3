"""Resizing pixels to a bucket, with the middle cut out."""

from itertools import pairwise
from math import ceil

import numpy as np
from PIL import Image


def resize_and_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, channels] scaled to cover `size` (width, height), the middle of it cut out.

    Lanczos (Pillow) upwards; downwards the mean of the covered area, weighted by coverage as OpenCV's INTER_AREA.
    """
    width, height = size
    old_height, old_width = pixels.shape[:2]
    if (old_width, old_height) == size:
        return np.ascontiguousarray(pixels)
    scale = max(width / old_width, height / old_height)
    new_width, new_height = int(old_width * scale + 0.5), int(old_height * scale + 0.5)
    if scale > 1:
        resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.LANCZOS))
    else:
        resized = _area_mean(pixels, new_width, new_height)
    left, top = (new_width - width) // 2, (new_height - height) // 2
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def _area_mean(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    rows = _mean_of_rows(pixels, height)
    columns = _mean_of_rows(rows.swapaxes(0, 1), width)
    return np.rint(columns.swapaxes(0, 1)).clip(0, 255).astype(np.uint8)


def _mean_of_rows(pixels: np.ndarray, length: int) -> np.ndarray:
    """[length, ...] in float32: each new row is the mean of the old ones, weighted by how much of them it covers."""
    old_length, *rest = pixels.shape
    lines = np.ascontiguousarray(pixels).reshape(old_length, -1)
    means = np.empty((length, lines.shape[1]), np.float32)
    edges = np.arange(length + 1) * old_length / length
    # Row by row, because the few old rows that one new row covers fit in the processor's cache.
    for number, (low, high) in enumerate(pairwise(edges)):
        first, end = int(low), min(ceil(high), old_length)
        cells = np.arange(first, end)
        covered = np.minimum(cells + 1, high) - np.maximum(cells, low)
        means[number] = (covered / (high - low)).astype(np.float32) @ lines[first:end].astype(np.float32)
    return means.reshape(length, *rest)
