"""TIFF files: what Pillow would read otherwise than it is stored, and what kind a file is that it cannot open."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from utils.pixels.colours import eight_bits
from utils.pixels.turning import Turn, exif_turn
from wan.errors import InputError

_WIDTH, _HEIGHT, _BITS, _ORIENTATION = 256, 257, 258, 274  # tags
_SAMPLES, _PLANES, _SAMPLE_FORMAT = 277, 284, 339
_PHOTOMETRIC, _PREDICTOR, _TILE_WIDTH, _EXTRA, _PROFILE = 262, 317, 322, 338, 34675
_SEPARATE = 2  # planes: all reds, then all greens and so on
_HEAD = 16  # bytes, before the first list of tags
_SIGNED = 2
_FORMATS = {1: "whole", _SIGNED: "signed", 3: "floating-point"}
# How FFmpeg's formats store a sample.
_FFMPEG = {
    **{"rgbf32le": "<f4", "rgbf32be": ">f4", "gbrpf32le": "<f4", "gbrpf32be": ">f4"},
    **{"ya16le": "<u2", "ya16be": ">u2"},
}
SAVE_AS_PNG = "save it as a PNG of 8 or 16 bits"


def prepare(image: Image.Image) -> None:
    """Lets Pillow read a TIFF that is opened, but not loaded, as it is stored; InputError if it cannot.

    Sixteen-bit planes are declared as such, because Pillow takes them for 8-bit ones. And the file is not mapped into
    memory: Pillow would map what lies on its side with width and height exchanged.
    """
    image.filename = ""
    if image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED and 8 in image.tag_v2.get(_BITS, ()):
        raise InputError(f"it holds signed samples of 8 bits, which is not supported: {SAVE_AS_PNG}")
    if image.tag_v2.get(_PLANES) != _SEPARATE:
        return
    is_deep = set(image.tag_v2.get(_BITS, ())) == {16}
    planes = [tile.args[0] for tile in image.tile if tile.codec_name == "raw"]
    if image.mode in ("LA", "La") or "a" in planes or (is_deep and "K" in planes):
        kind = f"{'premultiplied ' if 'a' in planes else ''}{image.mode.upper()}"
        raise InputError(f"it stores the planes of {kind} one after another, which is not supported: {SAVE_AS_PNG}")
    if is_deep:
        kind = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
        image.tile = [
            tile._replace(args=(tile.args[0] + kind, *tile.args[1:])) if tile.codec_name == "raw" else tile
            for tile in image.tile
        ]


def turn_of(image: Image.Image) -> Turn:
    """How an opened TIFF is to be turned; once it is loaded, Pillow has turned it."""
    return exif_turn(image.tag_v2.get(_ORIENTATION))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened TIFF; Pillow's own is turned or not, depending on its version."""
    return turn_of(image).size(image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT])


def read_deep(path: Path) -> Image.Image | None:
    """A TIFF of kinds that Pillow cannot open and FFmpeg can, upright, in 8 bits; None if it is of another kind.

    These are colours of 32-bit floating point, and grey of 16 bits with an alpha that is not premultiplied. The
    picture has no format, and `info["has_range"]` says whether the value of its white is certain.
    """
    tags = _tags(path)
    kind = (tags.get(_SAMPLE_FORMAT, (1,))[0], tuple(tags.get(_BITS, ()))) if tags else None
    is_colour = kind == (3, (32,) * 3) and tags.get(_PREDICTOR, 1) == 1
    is_grey = kind == (1, (16, 16)) and tags.get(_EXTRA, ()) == (2,) and tags.get(_PHOTOMETRIC) == 1
    is_tiled = tags is not None and _TILE_WIDTH in tags  # which FFmpeg takes for strips
    samples_HWC = _decoded(path) if (is_colour or is_grey) and not is_tiled else None
    if samples_HWC is None:
        return None
    values, white = eight_bits(samples_HWC, None if is_colour else 65535)
    image = Image.fromarray(np.ascontiguousarray(exif_turn(tags.get(_ORIENTATION)).apply(values)))
    image.info = {"has_range": is_grey or white == 1, "icc_profile": tags.get(_PROFILE)}
    return image


def _decoded(path: Path) -> np.ndarray | None:
    """The samples [height, width, channels] of a picture as FFmpeg decodes it; None if it cannot."""
    import av  # here, because hardly any picture needs it

    try:
        with av.open(path) as container:
            frame = next(container.decode(video=0))
    except av.error.FFmpegError:
        return None
    stored = _FFMPEG.get(frame.format.name)
    if stored is None:
        return None
    planes = [np.frombuffer(plane, stored).reshape(frame.height, -1) for plane in frame.planes]
    if len(planes) == 3:
        green, blue, red = (plane[:, : frame.width] for plane in planes)
        return np.stack([red, green, blue], -1)
    channels = len(frame.format.components)
    return planes[0][:, : channels * frame.width].reshape(frame.height, frame.width, channels)


def kind_of(path: Path) -> str | None:
    """What a TIFF that cannot be read holds, such as "3 floating-point samples of 32 bits a pixel"."""
    if (tags := _tags(path)) is None:
        return None
    bits, kind = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))[0]
    samples = tags.get(_SAMPLES, len(bits))
    return f"{samples} {_FORMATS.get(kind, 'unusual')} sample{'s' * (samples > 1)} of {bits[0]} bits a pixel"


def _tags(path: Path) -> ImageFileDirectory_v2 | None:
    """The tags of a TIFF's first picture; None if it is not a TIFF, or damaged."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            if head[:2] not in (b"II", b"MM"):
                return None
            tags = ImageFileDirectory_v2(head if b"+" in head[2:4] else head[:8])
            file.seek(tags.next)
            tags.load(file)
            dict(tags)  # which decodes them
            return tags
    except Exception:  # whatever a damaged file leads Pillow to
        return None
