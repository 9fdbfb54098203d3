"""Videos from disk as players show them: upright, with square pixels, in sRGB, without transparency."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.pixels.media import opened_video, pictures_in
from utils.pixels.pictures import WHITE, Pixels, image_size, is_plain_picture, on_background, read_image, stored_size
from utils.pixels.rates import at_rate, own_rate
from utils.pixels.remarks import HDR, TRANSPARENT, VARIABLE_RATE
from utils.pixels.resizing import resize_and_crop
from utils.pixels.tone_mapping import Light, coded_light, to_srgb_pixels
from utils.pixels.turning import UPRIGHT, Turn, matrix_turn
from wan.configs import WAN_2_1_VAE
from wan.errors import InputError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

_UNSPECIFIED, _BT709, _BT2020 = 2, 1, 9  # matrices, as H.273 numbers them
_LARGEST_SD = (1024, 576)  # players take a larger video as BT.709 where it does not say


def video_size(path: Path) -> tuple[int, int]:
    """(width, height) of a video as it is shown, or of the first picture of a folder of them."""
    if path.is_dir():
        return image_size(pictures_in(path)[0])
    with opened_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise InputError(f"{path} cannot be read: it has no frames")
        return _turn(frame).size(*_square_size(frame.width, frame.height, _pixel_aspect(stream)))


def stored_video_size(path: Path) -> tuple[int, int]:
    """(width, height) of a video as the file stores it, neither turned nor stretched."""
    if path.is_dir():
        return stored_size(pictures_in(path)[0])
    with opened_video(path) as (_, stream):
        return stream.codec_context.width, stream.codec_context.height


def is_plain_video(path: Path, source_fps: float | str | None = None) -> bool:
    """Whether programs that look at nothing but the samples read it alike, as far as its first frame shows."""
    if path.is_dir():
        return all(map(is_plain_picture, pictures_in(path)))
    own = None if source_fps is None else own_rate(path)
    with opened_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or _pixel_aspect(stream) != 1 or _turn(frame) != UPRIGHT or (own is not None and own.varies):
            return False
        light = _light(stream)
        return light is None and _matrix(frame, light) is None and not _may_be_transparent(frame)


def read_video(
    path: Path,
    size: tuple[int, int],
    source_fps: float | str | None = None,
    limit: int | None = None,
    background: tuple[int, int, int] = WHITE,
    wanted_fps: float = WAN_2_1_VAE.fps,
) -> Pixels:
    """The frames of a video, or of a folder of pictures, as [frames, height, width, 3] at `size` (width, height).

    With `source_fps`, only the frames that remain at `wanted_fps` a second; at most `limit` frames.
    """
    own = None if source_fps is None else own_rate(path)
    if path.is_dir():
        pictures = islice(at_rate(pictures_in(path), source_fps, own, wanted_fps), limit)
        frames = [read_image(picture, size, background) for picture in pictures]
    else:
        with _decoded(path) as (stream, decoded):
            kept = islice(at_rate(decoded, source_fps, own, wanted_fps), limit)
            frames = [_upright(frame, stream, size, background) for frame in kept]
    remarks = frozenset().union(*(frame.remarks for frame in frames))
    if own is not None and own.varies:
        remarks |= {VARIABLE_RATE}
    width, height = size
    values = [frame.values for frame in frames]
    return Pixels(np.stack(values) if values else np.zeros((0, height, width, 3), np.uint8), remarks)


def count_frames(
    path: Path,
    source_fps: float | str | None = None,
    limit: int | None = None,
    wanted_fps: float = WAN_2_1_VAE.fps,
) -> int:
    """How many frames read_video would return."""
    own = None if source_fps is None else own_rate(path)
    if path.is_dir():
        return sum(1 for _ in islice(at_rate(pictures_in(path), source_fps, own, wanted_fps), limit))
    with _decoded(path) as (_, decoded):
        return sum(1 for _ in islice(at_rate(decoded, source_fps, own, wanted_fps), limit))


@contextmanager
def _decoded(path: Path) -> Iterator[tuple["VideoStream", Iterator["VideoFrame"]]]:
    with opened_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        yield stream, container.decode(stream)


def _turn(frame: "VideoFrame") -> Turn:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else matrix_turn(struct.unpack("=9i", bytes(matrix)))


def _pixel_aspect(stream: "VideoStream") -> Fraction:
    """The width of a stored pixel over its height."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, 10) <= aspect <= 10 else Fraction(1)  # others are damage


def _square_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """The size with square pixels; the shorter direction is stretched, so that nothing is lost."""
    return (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))


def _upright(
    frame: "VideoFrame", stream: "VideoStream", size: tuple[int, int], background: tuple[int, int, int]
) -> Pixels:
    """A frame [height, width, 3] at `size`."""
    pixels, remarks = _rgb(frame, _light(stream), size, background)
    height, width = pixels.shape[:2]
    square = _square_size(width, height, _pixel_aspect(stream))
    if square != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(square, Image.Resampling.LANCZOS))
    return Pixels(resize_and_crop(pixels, size, _turn(frame)), frozenset(remarks))


def _rgb(
    frame: "VideoFrame", light: Light | None, size: tuple[int, int], background: tuple[int, int, int]
) -> tuple[np.ndarray, set[str]]:
    matrix = _matrix(frame, light)
    if light is not None:
        # Tone mapping is slow, so that what is far too large is halved before, or more.
        factor = max(1, min(frame.width, frame.height) // max(size))
        sizes = {"width": frame.width // factor, "height": frame.height // factor, "interpolation": "AREA"}
        deep = frame.to_ndarray(format="rgb48le", src_colorspace=matrix, **(sizes if factor > 1 else {}))
        return to_srgb_pixels(deep, light), {HDR} if light.is_hdr else set()
    if _may_be_transparent(frame):
        rgba = frame.to_ndarray(format="rgba", src_colorspace=matrix)
        if rgba[..., 3].min() < 255:
            image = Image.fromarray(rgba)
            return np.asarray(on_background(image.convert("RGB"), image.getchannel("A"), background)), {TRANSPARENT}
        return rgba[..., :3], set()
    return frame.to_ndarray(format="rgb24", src_colorspace=matrix), set()


def _light(stream: "VideoStream") -> Light | None:
    codec = stream.codec_context  # a frame of older versions of PyAV does not have these
    return coded_light(codec.color_trc, codec.color_primaries)


def _may_be_transparent(frame: "VideoFrame") -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _matrix(frame: "VideoFrame", light: Light | None) -> int | None:
    """The matrix from YUV to RGB where the file does not say it; None takes the file's, or BT.601."""
    if frame.colorspace != _UNSPECIFIED or frame.format.is_rgb:
        return None
    if light is not None and light.primaries != _BT709:
        return _BT2020
    is_hd = frame.width > _LARGEST_SD[0] or frame.height > _LARGEST_SD[1]
    return _BT709 if is_hd else None
