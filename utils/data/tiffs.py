"""TIFF files: what Pillow would read otherwise than it is stored, and what kind a file is that it cannot open."""

from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from utils.data.turning import Turn, exif_turn
from wan.errors import InputError

_WIDTH, _HEIGHT, _BITS, _ORIENTATION = 256, 257, 258, 274  # tags
_SAMPLES, _PLANES, _SAMPLE_FORMAT = 277, 284, 339
_SEPARATE = 2  # planes: all reds, then all greens and so on
_HEAD = 16  # bytes, before the first list of tags
_SIGNED = 2
_FORMATS = {1: "whole", _SIGNED: "signed", 3: "floating-point"}
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


def kind_of(path: Path) -> str | None:
    """What a TIFF that Pillow cannot open holds, such as "3 floating-point samples of 32 bits a pixel"."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            tags = ImageFileDirectory_v2(head if head[2:3] == b"+" or head[3:4] == b"+" else head[:8])
            file.seek(tags.next)
            tags.load(file)
            bits, kind = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))[0]
    except Exception:  # whatever a damaged file leads Pillow to
        return None
    samples = tags.get(_SAMPLES, len(bits))
    return f"{samples} {_FORMATS.get(kind, 'unusual')} sample{'s' * (samples > 1)} of {bits[0]} bits a pixel"
