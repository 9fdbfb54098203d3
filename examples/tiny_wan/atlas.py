"""All named pictures in one small file, so that the example needs no download to recognise what was drawn."""

from pathlib import Path

import numpy as np
import torch
from emoji_pictures import SIZE, Emoji, on_white
from PIL import Image

COLUMNS = 38


def write_atlas(known: Emoji, held_out: Emoji, folder: Path) -> None:
    """Writes atlas.webp (lossy) with names.txt in its order, and held_out/NAME.png (exact)."""
    pictures = torch.cat([on_white(known.rgba_NCHW), on_white(held_out.rgba_NCHW)])
    rows = -(-len(pictures) // COLUMNS)
    tiles = torch.ones(rows * COLUMNS, 3, SIZE, SIZE)
    tiles[: len(pictures)] = pictures
    sheet = tiles.unflatten(0, (rows, COLUMNS)).permute(2, 0, 3, 1, 4).reshape(3, rows * SIZE, COLUMNS * SIZE)
    _image(sheet).save(folder / "atlas.webp", quality=80, method=6)
    (folder / "names.txt").write_text("\n".join([*known.names, *held_out.names]) + "\n", encoding="utf-8")
    (folder / "held_out").mkdir(exist_ok=True)
    for name, picture in zip(held_out.names, on_white(held_out.rgba_NCHW), strict=True):
        _image(picture).save(folder / "held_out" / f"{name.replace(' ', '_')}.png", optimize=True)


def read_atlas(folder: Path) -> tuple[list[str], torch.Tensor]:
    """The names of all 1,392 pictures, and the pictures [1392, 3, 64, 64] in [-1, 1]; the last 48 are held out."""
    names = (folder / "names.txt").read_text(encoding="utf-8").splitlines()
    sheet = read_picture(folder / "atlas.webp")
    rows = sheet.shape[1] // SIZE
    tiles = sheet.reshape(3, rows, SIZE, COLUMNS, SIZE).permute(1, 3, 0, 2, 4).reshape(-1, 3, SIZE, SIZE)
    return names, tiles[: len(names)]


def read_picture(path: Path) -> torch.Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def _image(picture_3HW: torch.Tensor) -> Image.Image:
    levels = ((picture_3HW + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
