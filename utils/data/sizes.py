"""What a source is cut to: its size in pixels, and for a video the frames that become clips."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from utils.data.sources import AnyDataset, ImageDataset, Source, VideoDataset
from utils.pixels.pictures import image_size
from utils.pixels.videos import video_size
from wan.errors import InputError

_MOST_CROPPED = 100  # times the area that is kept; scaling a strip of 1 pixel to a full size would fill the memory


@dataclass(frozen=True)
class SizedSource:
    """A source with its own size and the bucket that it is resized to, both (width, height) in pixels."""

    source: Source
    size: tuple[int, int]
    bucket: tuple[int, int]


def sized_sources(dataset: AnyDataset, sources: Sequence[Source], workers: int) -> list[SizedSource]:
    """The sources with their sizes, read by `workers` threads; InputError names one that cannot be used."""
    size_of = image_size if isinstance(dataset, ImageDataset) else video_size
    with ThreadPoolExecutor(workers) as pool:
        sizes = list(pool.map(size_of, [source.path for source in sources]))
    return [
        SizedSource(source, size, choose_bucket(dataset, source, size))
        for source, size in zip(sources, sizes, strict=True)
    ]


def choose_bucket(dataset: AnyDataset, source: Source, size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) in pixels that a source of `size` is trained at, multiples of 16, or of 32 for ti2v-5B.

    Without buckets it is the dataset's resolution. InputError if hardly anything of the source would be left, or if a
    picture that is not enlarged has a shorter side than that.
    """
    width, height = size
    multiple = dataset.latents.pixel_multiple
    if not dataset.enable_bucket:
        bucket = dataset.resolution
    elif dataset.bucket_no_upscale and width * height <= dataset.resolution[0] * dataset.resolution[1]:
        bucket = _own_size(source, width, height, multiple)
    else:
        aspect = width / height
        sizes = bucket_sizes(dataset.resolution, multiple)
        bucket = min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))
    covered = width * bucket[1], height * bucket[0]
    if max(covered) > _MOST_CROPPED * min(covered):
        raise InputError(
            f"{source.path} is {width}x{height}: less than 1 % of it would be left at {bucket[0]}x{bucket[1]}, crop it "
            "or remove it"
        )
    return bucket


@lru_cache
def bucket_sizes(resolution: tuple[int, int], multiple: int) -> tuple[tuple[int, int], ...]:
    """Every bucket (width, height) of the area of `resolution`, sorted: aspect ratios from about 1:4 to 4:1.

    All sides are multiples of `multiple`.
    """
    area = resolution[0] * resolution[1]
    root = isqrt(area)
    sizes = set()
    for width in range(max(multiple, _floor(root // 2, multiple)), root + multiple, multiple):
        height = _floor(area // width, multiple)
        if height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_multiples(value: int, multiple: int) -> str:
    """The allowed sides around `value`, as words for an error message."""
    below = _floor(value, multiple)
    return f"{below} or {below + multiple}" if below else f"{multiple}"


def clip_windows(dataset: VideoDataset, available: int) -> list[tuple[int, int]]:
    """The clips (first frame, number of frames) of a video of `available` frames; empty if it is too short."""
    if dataset.frame_extraction == "full":
        frames = longest_full_clip(dataset, available)
        return [(0, frames)] if frames > 0 else []
    return [(start, frames) for frames in dataset.target_frames for start in _starts(dataset, available, frames)]


def longest_full_clip(dataset: VideoDataset, available: int) -> int:
    """The frames of the one clip that "full" makes: 4n+1, because the VAE silently drops the others."""
    return dataset.latents.whole_frames(min(available, dataset.max_frames))


def frames_needed(dataset: VideoDataset) -> int | None:
    """The most frames that the extraction looks at, None if it is all of them."""
    return {"head": max(dataset.target_frames), "full": dataset.max_frames}.get(dataset.frame_extraction)


def _floor(value: int, multiple: int) -> int:
    return value - value % multiple


def _own_size(source: Source, width: int, height: int, multiple: int) -> tuple[int, int]:
    bucket = _floor(width, multiple), _floor(height, multiple)
    if 0 in bucket:
        raise InputError(
            f"{source.path} is {width}x{height}, smaller than {multiple}x{multiple} (bucket_no_upscale is set)"
        )
    return bucket


def _starts(dataset: VideoDataset, available: int, frames: int) -> list[int]:
    last = available - frames
    if last < 0:
        return []
    if dataset.frame_extraction == "head":
        return [0]
    if dataset.frame_extraction == "uniform":
        return np.unique(np.linspace(0, last, dataset.frame_sample, dtype=int)).tolist()
    return list(range(0, last + 1, frames if dataset.frame_extraction == "chunk" else dataset.frame_stride))
