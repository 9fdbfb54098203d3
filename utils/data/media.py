"""Pictures and videos from disk, resized and cropped."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import file_problem, folder_entries
from wan.errors import InputError

try:
    import pillow_jxl  # noqa: F401  (importing it registers the format with Pillow)

    _JXL = (".jxl",)
except ImportError:
    _JXL = ()

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", *_JXL)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".gif")


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from a picture's header; InputError names a file that is not a picture."""
    _check_file(path)
    with _readable(path), Image.open(path) as image:
        return image.size


def video_size(path: Path) -> tuple[int, int]:
    """(width, height) of a video, or of the first picture of a folder of them."""
    if path.is_dir():
        return image_size(_pictures(path)[0])
    import av  # here, because workers that load caches open no video

    _check_file(path)
    with _readable(path), av.open(path) as container:
        codec = _video_stream(container, path).codec_context
        if not codec.width or not codec.height:
            raise InputError(f"{path} cannot be read: it has no size")
        return codec.width, codec.height


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture as uint8 [height, width, 3], resized and cropped to `size` (width, height); alpha is dropped."""
    _check_file(path)
    with _readable(path), Image.open(path) as image:
        pixels = np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
    return resize_and_crop(pixels, size)[..., :3]


def read_video(
    path: Path,
    size: tuple[int, int],
    source_fps: float | None = None,
    target_fps: float = 16.0,
    limit: int | None = None,
) -> np.ndarray:
    """The frames of a video, or of a folder of pictures, as uint8 [frames, height, width, 3] at `size`.

    With `source_fps`, only the frames that remain at `target_fps`; at most `limit` frames.
    """
    with _readable(path):
        frames = [resize_and_crop(pixels, size) for pixels in _frames(path, size, source_fps, target_fps, limit)]
    width, height = size
    return np.stack(frames) if frames else np.zeros((0, height, width, 3), np.uint8)


def count_frames(
    path: Path, source_fps: float | None = None, target_fps: float = 16.0, limit: int | None = None
) -> int:
    """How many frames read_video would return."""
    with _readable(path):
        kept = _keep(_undecoded(path), source_fps, target_fps)
        return sum(1 for _ in islice(kept, limit))


def resize_and_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, channels] scaled to cover `size` (width, height), the middle of it cut out.

    Lanczos (Pillow) upwards; downwards the mean of the covered area, weighted by coverage as OpenCV's INTER_AREA.
    """
    width, height = size
    old_height, old_width = pixels.shape[:2]
    if (old_width, old_height) == size:
        return pixels
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


def _frames(path: Path, size: tuple[int, int], source_fps, target_fps, limit) -> Iterator[np.ndarray]:
    kept = islice(_keep(_undecoded(path), source_fps, target_fps), limit)
    if path.is_dir():
        return (read_image(picture, size) for picture in kept)
    return (frame.to_ndarray(format="rgb24") for frame in kept)


def _undecoded(path: Path) -> Iterator:
    """A folder's pictures as paths, a video's frames before their conversion to RGB."""
    if path.is_dir():
        yield from _pictures(path)
        return
    import av  # here, because workers that load caches open no video

    _check_file(path)
    with av.open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _keep(frames: Iterator, source_fps: float | None, target_fps: float) -> Iterator:
    """Drops frames of a faster source: one stays where floor(i * target / source) moves on."""
    ratio = 1.0 if source_fps is None else target_fps / source_fps
    last = -1
    for index, frame in enumerate(frames):
        if source_fps is None or int(index * ratio) != last:
            last = int(index * ratio)
            yield frame


def _pictures(folder: Path) -> list[Path]:
    named = [path for path in folder_entries(folder, "folder") if path.suffix.lower() in IMAGE_SUFFIXES]
    pictures = [path for path in named if file_problem(path) is None]
    if not pictures:
        raise InputError(f"{folder} holds no pictures; looked for {' '.join(IMAGE_SUFFIXES)}")
    return pictures


def _video_stream(container, path: Path):
    if not container.streams.video:
        raise InputError(f"{path} has no video in it")
    return container.streams.video[0]


def _check_file(path: Path) -> None:
    """InputError for what opening would wait for, such as a named pipe."""
    if problem := file_problem(path):
        raise InputError(f"{path} {problem}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow's and FFmpeg's readers raise whatever a damaged file leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason[:200]}") from None
