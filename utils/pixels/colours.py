"""Colours and depths that pictures are stored in, as 8-bit sRGB."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageChops, ImageCms

from utils.pixels.remarks import BROKEN_PROFILE, HDR, NO_FIXED_RANGE
from utils.pixels.tone_mapping import Light, to_srgb_pixels

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_SRGB = ImageCms.createProfile("sRGB")


@dataclass(frozen=True)
class Encoding:
    """How a file stores its colours, as far as Pillow's mode leaves it open.

    `rawmode` is Pillow's name of the stored format. `white` is the value of white where the format says it, `inverted`
    whether 0 is white, `unsigned` whether 32-bit values are. `gamma` is PNG's gAMA, `light` a coded transfer function.
    """

    rawmode: str = ""
    white: int | None = None
    inverted: bool = False
    unsigned: bool = False
    profile: bytes | None = None
    gamma: float | None = None
    light: Light | None = None


def read_encoding(image: Image.Image, light: Light | None) -> Encoding:
    """The encoding of a picture that is opened and not loaded yet."""
    tiles = getattr(image, "tile", ())
    args = tiles[0].args if tiles else ""
    rawmode = args if isinstance(args, str) else str((args or [""])[0])
    tags = getattr(image, "tag_v2", {})
    info = image.info
    is_grey = image.mode in ("I", "F") or image.mode.startswith("I;16")
    is_uninverted_cmyk = image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in info
    return Encoding(
        rawmode=rawmode,
        white=_white(image, rawmode, tags),
        # Pillow inverts every JPEG in CMYK, as those with an Adobe marker are to be.
        inverted=is_uninverted_cmyk or (is_grey and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO),
        unsigned=tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED,
        profile=info.get("icc_profile") or None,
        gamma=info.get("gamma") if image.format == "PNG" and "srgb" not in info else None,
        light=light,
    )


def _white(image: Image.Image, rawmode: str, tags) -> int | None:
    if image.mode.startswith("I;16"):
        return 4095 if rawmode.startswith("I;12") else 65535
    if image.mode == "I" and image.format == "PPM":
        return 65535
    return 32767 if image.mode == "I" and tags.get(_BITS) == (16,) else None  # signed


def to_srgb(image: Image.Image, encoding: Encoding) -> tuple[Image.Image, set[str]]:
    """A picture without transparency, of any mode, in mode RGB and sRGB, and what there is to remark about it."""
    remarks = set()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, has_range = _eight_bits(image, encoding)
        remarks |= set() if has_range else {NO_FIXED_RANGE}
    elif encoding.inverted:
        image = ImageChops.invert(image)
    if encoding.light is not None:
        pixels = np.asarray(image.convert("RGB")).astype(np.uint16) * 257
        remarks |= {HDR} if encoding.light.is_hdr else set()
        return Image.fromarray(to_srgb_pixels(pixels, encoding.light)), remarks
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab()), remarks
    if encoding.profile is not None:
        try:
            return _by_profile(image, encoding.profile), remarks
        except (ImageCms.PyCMSError, OSError, ValueError):  # read as if there were none, as viewers do
            remarks.add(BROKEN_PROFILE)
    return _by_gamma(image if image.mode == "RGB" else image.convert("RGB"), encoding.gamma), remarks


def is_plain(mode: str, encoding: Encoding) -> bool:
    """Whether a picture of `mode` has 8 bits and is sRGB as it is stored, so that every program reads it alike."""
    if (
        mode not in ("1", "L", "P", "RGB")
        or "16" in encoding.rawmode
        or encoding.inverted
        or encoding.light is not None
    ):
        return False
    if encoding.profile is None:
        return _is_usual_gamma(encoding.gamma)
    try:
        return _profile_space(encoding.profile) == "RGB" and _from_profile(encoding.profile, "RGB") is None
    except (ImageCms.PyCMSError, OSError, ValueError):  # read as if there were none
        return True


def _eight_bits(image: Image.Image, encoding: Encoding) -> tuple[Image.Image, bool]:
    """Grey of 16 or 32 bits in mode L, and whether the value of its white is certain."""
    stored = np.asarray(image)
    if stored.dtype == np.int32 and encoding.unsigned:
        stored = stored.view(np.uint32)
    grey, white = eight_bits(stored, encoding.white, encoding.inverted)
    return Image.fromarray(grey), encoding.white is not None or (image.mode == "F" and white == 1)


def eight_bits(stored: np.ndarray, white: int | None, inverted: bool = False) -> tuple[np.ndarray, float]:
    """Samples of any kind as uint8, and the value of their white, which is guessed where it is None."""
    values = np.nan_to_num(stored.astype(np.float64), posinf=0.0, neginf=0.0)
    white = white or _guessed_white(values.max(initial=0.0), stored.dtype.kind == "f")
    if inverted:
        values = white - values
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8), white


def _guessed_white(largest: float, is_float: bool) -> float:
    if is_float:
        # Just above 1 are highlights of a picture whose white is 1: darkened rather than clipped.
        return 1.0 if largest <= 1 else next((white for white in (255.0, 65535.0) if 16 < largest <= white), largest)
    return next(white for white in (255, 65535, 2**31 - 1, 2**32 - 1) if largest <= white)


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    space = _profile_space(profile)
    is_right = {"GRAY": image.mode in ("1", "L"), "CMYK": image.mode == "CMYK", "RGB": image.mode != "CMYK"}
    if not is_right.get(space):
        raise ValueError(f"a profile for {space} in a picture of mode {image.mode}")
    mode = {"GRAY": "L", "CMYK": "CMYK", "RGB": "RGB"}[space]
    colours = image if image.mode == mode else image.convert(mode)
    transform = _from_profile(profile, mode)
    return colours if transform is None else ImageCms.applyTransform(colours, transform)


@lru_cache(maxsize=64)
def _profile_space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()


@lru_cache(maxsize=64)
def _from_profile(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None for the many profiles that are sRGB themselves."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(BytesIO(profile)),
        _SRGB,
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 15, np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)).astype(int) - colours
    return None if np.abs(moved).max() <= 1 else transform


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")


def _is_usual_gamma(gamma: float | None) -> bool:
    return not gamma or abs(gamma - 1 / 2.2) < 0.02


def _by_gamma(image: Image.Image, gamma: float | None) -> Image.Image:
    """PNG's gAMA where it differs from sRGB's 1/2.2: a sample is the light to the power of gamma."""
    if _is_usual_gamma(gamma):
        return image
    light = (np.arange(256) / 255) ** (1 / gamma)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(np.rint(255 * levels).astype(int).tolist() * 3)
