"""Pictures from disk as their viewers show them: upright, in sRGB, without transparency."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.pixels import tiffs
from utils.pixels.colours import Encoding, is_plain, read_encoding, to_srgb
from utils.pixels.media import readable_media
from utils.pixels.remarks import NO_FIXED_RANGE, SEVERAL_FRAMES, TRANSPARENT
from utils.pixels.resizing import resize_and_crop
from utils.pixels.tone_mapping import Light, coded_light
from utils.pixels.turning import UPRIGHT, Turn, exif_turn

WHITE = (255, 255, 255)
_ORIENTATION = 274  # EXIF tag
_HEAD = 65536  # bytes, in which a file's colours are coded


@dataclass(frozen=True)
class Pixels:
    """uint8 pixels, [height, width, 3] or [frames, height, width, 3], and what there is to remark about their file."""

    values: np.ndarray
    remarks: frozenset[str] = frozenset()


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an upright picture, from its header; InputError names a file that is not a picture."""
    with readable_media(path), _opened(path) as image:
        if image.format == "TIFF":
            return tiffs.upright_size(image)
        return _turn(image, path).size(*image.size)


def stored_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture's pixels as the file stores them, not turned upright."""
    with readable_media(path), Image.open(path) as image:
        return _turn(image, path).size(*image_size(path))


def is_plain_picture(path: Path) -> bool:
    """Whether programs that look at nothing but the samples read it alike: upright, opaque, 8-bit sRGB."""
    with readable_media(path), _opened(path) as image:
        turn = tiffs.turn_of(image) if image.format == "TIFF" else _turn(image, path)
        encoding = read_encoding(image, _coded_light(path, image.format))
        is_deep = image.format is None  # see tiffs.read_deep
        return not is_deep and turn == UPRIGHT and not image.has_transparency_data and is_plain(image.mode, encoding)


def read_image(path: Path, size: tuple[int, int], background: tuple[int, int, int] = WHITE) -> Pixels:
    """A picture [height, width, 3] over `background`, resized and cropped to `size` (width, height)."""
    with readable_media(path), _opened(path) as image:
        encoding = read_encoding(image, _coded_light(path, image.format))
        remarks = {SEVERAL_FRAMES} if _has_frames(image) else set()
        remarks |= set() if image.info.get("has_range", True) else {NO_FIXED_RANGE}
        image.load()  # which turns a TIFF upright, and its orientation to 1
        turn = _turn(image, path)
        colours, alpha = _without_alpha(image, encoding)
        rgb, found = to_srgb(colours, encoding)
        if alpha is not None:
            rgb = on_background(rgb, alpha, background)
            found.add(TRANSPARENT)
        pixels = resize_and_crop(np.asarray(rgb), size, turn)
    return Pixels(pixels, frozenset(remarks | found))


def read_alpha(path: Path, size: tuple[int, int]) -> np.ndarray:
    """How opaque a picture is, uint8 [height, width], resized and cropped as read_image does."""
    with readable_media(path), _opened(path) as image:
        encoding = read_encoding(image, _coded_light(path, image.format))
        image.load()
        turn = _turn(image, path)
        _, alpha = _without_alpha(image, encoding)
        if alpha is None:
            return np.full(size[::-1], 255, np.uint8)
        return resize_and_crop(np.asarray(alpha.convert("RGB")), size, turn)[..., 0]


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        if (deep := tiffs.read_deep(path)) is None:
            raise
        return deep
    if image.format == "TIFF":
        tiffs.prepare(image)
    return image


def _turn(image: Image.Image, path: Path) -> Turn:
    """How an opened picture is to be turned."""
    if image.format == "PNG" and "exif" not in image.info and _has_late_exif(path):
        image.load()
    try:
        # Not PngImageFile's, which decodes every picture without EXIF in search of it.
        return exif_turn(Image.Image.getexif(image).get(_ORIENTATION))
    except Exception:  # whatever damaged EXIF leads Pillow to; viewers show such a picture as it is stored
        return UPRIGHT


def _has_late_exif(path: Path) -> bool:
    """Whether a PNG has chunks after its pixels that may say how to turn it."""
    late = False
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if late and kind in (b"eXIf", b"iTXt", b"zTXt"):
                return True
            late = late or kind == b"IDAT"
            file.seek(length + 4, 1)
    return False


def _has_frames(image: Image.Image) -> bool:
    # The second picture in a phone's or camera's JPEG (MPO) is a preview or a depth map.
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def _coded_light(path: Path, kind: str | None) -> Light | None:
    """What PNG's cICP chunk, or the colour box of AVIF and HEIF, says that Pillow does not."""
    if kind not in ("PNG", "AVIF", "HEIF"):
        return None
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if kind == "PNG":
        found, layout = head.partition(b"IDAT")[0].partition(b"\0\0\0\4cICP")[2], "BB"
    else:
        found, layout = head.partition(b"colrnclx")[2], ">HH"
    if len(found) < struct.calcsize(layout):
        return None
    primaries, transfer = struct.unpack_from(layout, found)
    return coded_light(transfer, primaries)


def _without_alpha(image: Image.Image, encoding: Encoding) -> tuple[Image.Image, Image.Image | None]:
    """The colours, and the alpha in mode L if anything is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode == "P" else image, None
    if image.mode in ("1", "L", "RGB") or image.mode.startswith("I;16"):
        colours, alpha = image, _alpha_of_one_colour(image, encoding)
    else:
        is_grey = image.mode in ("LA", "La")
        whole = image.convert("LA") if image.mode == "La" else image
        whole = whole if whole.mode == "RGBA" else whole.convert("RGBA")
        colours, alpha = whole.getchannel("R") if is_grey else whole.convert("RGB"), whole.getchannel("A")
    return colours, alpha if alpha.getextrema()[0] < 255 else None


def _alpha_of_one_colour(image: Image.Image, encoding: Encoding) -> Image.Image:
    """Where PNG's tRNS names one transparent colour, in the samples that the file stores."""
    stored = np.asarray(image)
    colour = np.array(image.info["transparency"])
    if encoding.rawmode.startswith("RGB;16"):
        colour >>= 8  # as Pillow reads the samples
    if image.mode == "1":
        stored, colour = stored.astype(np.uint8), colour.clip(0, 1)
    levels = {"L;2": 3, "L;4": 15}.get(encoding.rawmode)
    same = stored == (colour * 255 // levels if levels else colour)
    return Image.fromarray(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8))


def on_background(rgb: Image.Image, alpha: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The colours over a background, mixed as they are stored (not as light), which is what viewers do."""
    page = Image.new("RGB", rgb.size, background)
    page.paste(rgb, mask=alpha)
    return page
