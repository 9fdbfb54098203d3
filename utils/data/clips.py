"""The pictures and clips of a dataset as pixels to encode, except where their caches are current.

T frames, H W height and width in pixels, C channels.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.data.cache_files import (
    CachedClip,
    clip_latents_path,
    image_latents_path,
    latents_files,
    latents_origin,
    latents_problem,
    made_by_of,
    parse_clip_name,
)
from utils.data.items import is_plain
from utils.data.masks import mask_settings, read_mask
from utils.data.origins import Origin, clip_settings, dataset_settings, read_origin
from utils.data.sizes import SizedSource, clip_windows, frames_needed
from utils.data.sources import AnyDataset, VideoDataset
from utils.pixels.pictures import read_image
from utils.pixels.remarks import TRANSPARENT
from utils.pixels.videos import read_video


@dataclass(frozen=True)
class Clip:
    """One picture or clip; no pixels: its cache is current. `named_size` is the one in its cache's name.

    If the file at `source` was read, `remarks` are what there is to say about it, and `origin` is for the cache.
    """

    source: Path
    path: Path
    pixels_THWC: np.ndarray | None
    named_size: tuple[int, int]
    frame_count: int | None = None
    remarks: frozenset[str] = frozenset()
    origin: Origin | None = None
    mask_HW: torch.Tensor | None = None  # of latent pixels


@dataclass(frozen=True)
class Reading:
    """How a dataset is read: `settings` decide the values of its caches, `cached` are its videos' clips by stem."""

    dataset: AnyDataset
    settings: Mapping[str, str]
    recache: bool
    cached: Mapping[str, Sequence[CachedClip]]


def how_to_read(dataset: AnyDataset, encoder: Mapping[str, str], recache: bool) -> Reading:
    """How to read a dataset for an encoder, which is described by names of `made_by`."""
    clips = defaultdict(list)
    if isinstance(dataset, VideoDataset):
        paths = latents_files(dataset.cache_directory, dataset.recursive)
        for stem, clip in filter(None, (parse_clip_name(path, dataset.cache_directory) for path in paths)):
            clips[stem].append(clip)
    return Reading(dataset, {**dataset_settings(dataset), **encoder}, recache, clips)


def batched_units(dataset: AnyDataset, sized: Sequence[SizedSource], batch_size: int) -> list[Sequence[SizedSource]]:
    """What is read, encoded and written together: batches of pictures of one bucket, or one video."""
    if isinstance(dataset, VideoDataset):
        return [[entry] for entry in sized]
    buckets = defaultdict(list)
    for entry in sized:
        buckets[entry.bucket].append(entry)
    return [batch for _, members in sorted(buckets.items()) for batch in batches(members, batch_size)]


def batches(entries: Sequence, size: int) -> Iterator[Sequence]:
    """The entries in their order, `size` at a time."""
    return (entries[start : start + size] for start in range(0, len(entries), size))


def read_ahead(reading: Reading, units: Iterable[Sequence[SizedSource]], workers: int) -> Iterator[list[Clip]]:
    """Each unit's clips in order, read by threads that stay only a few units ahead."""
    is_video = isinstance(reading.dataset, VideoDataset)
    read = _read_video_unit if is_video else _read_image_unit
    # Whole videos are large, and their decoder uses several threads itself.
    ahead = 1 if is_video else workers
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque()
        for unit in units:
            waiting.append(pool.submit(read, reading, unit))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_image_unit(reading: Reading, unit: Sequence[SizedSource]) -> list[Clip]:
    return [_current_picture(reading, entry) or _read_picture(reading, entry) for entry in unit]


def _current_picture(reading: Reading, entry: SizedSource) -> Clip | None:
    path = image_latents_path(reading.dataset.cache_directory, entry.source.stem, entry.size)
    wanted = {**_settings(reading, entry), **clip_settings(entry.bucket)}
    clip = Clip(entry.source.path, path, None, entry.size)
    return _if_current(reading, clip, 1, entry.bucket, wanted)


def _read_picture(reading: Reading, entry: SizedSource) -> Clip:
    source = entry.source.path
    path = image_latents_path(reading.dataset.cache_directory, entry.source.stem, entry.size)
    origin = read_origin(source, {**_settings(reading, entry), **clip_settings(entry.bucket)})
    picture = read_image(source, entry.bucket, reading.dataset.background)
    origin = _without_unused(origin, picture.remarks)
    mask_HW = read_mask(reading.dataset, entry)
    return Clip(source, path, picture.values[None], entry.size, None, picture.remarks, origin, mask_HW)


def _settings(reading: Reading, entry: SizedSource) -> dict[str, str]:
    return {**reading.settings, **mask_settings(reading.dataset, entry.source)}


def _read_video_unit(reading: Reading, unit: Sequence[SizedSource]) -> list[Clip]:
    [entry] = unit
    dataset, source, bucket, limit = reading.dataset, entry.source.path, entry.bucket, frames_needed(reading.dataset)
    length = _known_length(reading.cached[entry.source.stem], str(limit))
    if length is not None:  # so that nothing is decoded where all is current
        clips = [_current_clip(reading, entry, *window) for window in clip_windows(dataset, length)]
        if clips and all(clips):
            return clips
    origin = read_origin(source, {**_settings(reading, entry), "most_frames": str(limit)})
    mask_HW = read_mask(dataset, entry)
    video = read_video(source, bucket, dataset.source_fps, limit, dataset.background)
    origin = _without_unused(origin, video.remarks, frames_read=str(len(video.values)))
    clips = []
    for start, frames in clip_windows(dataset, len(video.values)):
        path = clip_latents_path(dataset.cache_directory, entry.source.stem, start, frames, bucket)
        own = replace(origin, made_by={**origin.made_by, **clip_settings(bucket, start, frames)})
        pixels = video.values[start : start + frames]
        fresh = Clip(source, path, pixels, bucket, frames, video.remarks, own, mask_HW)
        clips.append(_current_clip(reading, entry, start, frames) or fresh)
    return clips


def _current_clip(reading: Reading, entry: SizedSource, start: int, frames: int) -> Clip | None:
    source, bucket = entry.source, entry.bucket
    path = clip_latents_path(reading.dataset.cache_directory, source.stem, start, frames, bucket)
    wanted = {**_settings(reading, entry), **clip_settings(bucket, start, frames)}
    return _if_current(reading, Clip(source.path, path, None, bucket, frames), frames, bucket, wanted)


def _if_current(
    reading: Reading, clip: Clip, frames: int, bucket: tuple[int, int], wanted: Mapping[str, str]
) -> Clip | None:
    """The clip without pixels, if its cache need not be made again; None if it must."""
    if reading.recache or latents_problem(clip.path, clip.source, frames, bucket, wanted) is not None:
        return None
    origin = latents_origin(clip.path)
    # What does not say by which rules it was made may be one that we made by older ones.
    is_told = origin is not None or is_plain(reading.dataset, clip.source)
    return replace(clip, origin=origin) if is_told else None


def _known_length(clips: Sequence[CachedClip], limit: str) -> int | None:
    """The frames of a video, from a cache that was made when as many were asked for."""
    for clip in clips:
        made_by = made_by_of(clip.path)
        if made_by.get("most_frames") == limit and made_by.get("frames_read", "").isdecimal():
            return int(made_by["frames_read"])
    return None


def _without_unused(origin: Origin, remarks: frozenset[str], **more: str) -> Origin:
    """The background does not matter for what is not transparent: another one makes no cache stale."""
    made_by = {**origin.made_by, **more}
    if TRANSPARENT not in remarks:
        del made_by["background"]
    return replace(origin, made_by=made_by)
