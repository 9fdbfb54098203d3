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
    made_by_of,
    parse_clip_name,
)
from utils.data.cache_problems import (
    CLIP,
    CONDITION,
    LATENTS,
    Wanted,
    cache_parts,
    clip_problem,
    condition_problem,
    latents_problem,
    wanted_cache,
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

    If the file at `source` was read, `remarks` are what there is to say about it, and `origin` is for the cache. `kept`
    are the parts of the cache that are current, so that only the others are made.
    """

    source: Path
    path: Path
    pixels_THWC: np.ndarray | None
    named_size: tuple[int, int]
    frame_count: int | None = None
    remarks: frozenset[str] = frozenset()
    origin: Origin | None = None
    mask_HW: torch.Tensor | None = None  # of latent pixels
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reading:
    """How a dataset is read: `settings` decide the values of its caches, `cached` are its videos' clips by stem.

    `given` is what caches say beside these of the pictures that a model is given.
    """

    dataset: AnyDataset
    settings: Mapping[str, str]
    recache: bool
    cached: Mapping[str, Sequence[CachedClip]]
    given: Mapping[str, str]

    @property
    def parts(self) -> frozenset[str]:
        """What each of its caches is to hold."""
        return cache_parts(self.dataset.conditions)


def how_to_read(dataset: AnyDataset, encoder: Mapping[str, str], image_encoder: str | None, recache: bool) -> Reading:
    """How to read a dataset for an encoder, which is described by names of `made_by`, and the identity of a CLIP."""
    clips = defaultdict(list)
    if isinstance(dataset, VideoDataset):
        paths = latents_files(dataset.cache_directory, dataset.recursive)
        for stem, clip in filter(None, (parse_clip_name(path, dataset.cache_directory) for path in paths)):
            clips[stem].append(clip)
    given = {"pictures": str(dataset.conditions.pictures)} if dataset.conditions.pictures else {}
    given |= {} if image_encoder is None else {"image_encoder": image_encoder}
    return Reading(dataset, {**dataset_settings(dataset), **encoder}, recache, clips, given)


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
    return [_read_picture(reading, entry) for entry in unit]


def _read_picture(reading: Reading, entry: SizedSource) -> Clip:
    source = entry.source.path
    path = image_latents_path(reading.dataset.cache_directory, entry.source.stem, entry.size)
    made_by = {**_settings(reading, entry), **clip_settings(entry.bucket)}
    wanted = _wanted(reading, 1, entry.bucket, made_by)
    kept = _current_parts(reading, path, source, wanted)
    if kept >= wanted.parts:
        return Clip(source, path, None, entry.size, origin=latents_origin(path), kept=kept)
    origin = read_origin(source, {**made_by, **reading.given})
    picture = read_image(source, entry.bucket, reading.dataset.background)
    origin = _without_unused(origin, picture.remarks)
    mask_HW = read_mask(reading.dataset, entry)
    return Clip(source, path, picture.values[None], entry.size, None, picture.remarks, origin, mask_HW, kept)


def _settings(reading: Reading, entry: SizedSource) -> dict[str, str]:
    return {**reading.settings, **mask_settings(reading.dataset, entry.source)}


def _read_video_unit(reading: Reading, unit: Sequence[SizedSource]) -> list[Clip]:
    [entry] = unit
    dataset, source, bucket, limit = reading.dataset, entry.source.path, entry.bucket, frames_needed(reading.dataset)
    length = _known_length(reading, entry.source.stem, str(limit))
    if length is not None:  # so that nothing is decoded where all is current
        clips = [_looked_up_clip(reading, entry, *window) for window in clip_windows(dataset, length)]
        if clips and all(clip.kept >= reading.parts for clip in clips):
            return clips
    origin = read_origin(source, {**_settings(reading, entry), **reading.given, "most_frames": str(limit)})
    mask_HW = read_mask(dataset, entry)
    video = read_video(source, bucket, dataset.source_fps, limit, dataset.background, dataset.latents.fps)
    origin = _without_unused(origin, video.remarks, frames_read=str(len(video.values)))
    clips = []
    for start, frames in clip_windows(dataset, len(video.values)):
        clip = _looked_up_clip(reading, entry, start, frames)
        if not clip.kept >= reading.parts:
            own = replace(origin, made_by={**origin.made_by, **clip_settings(bucket, start, frames)})
            pixels = video.values[start : start + frames]
            clip = replace(clip, pixels_THWC=pixels, remarks=video.remarks, origin=own, mask_HW=mask_HW)
        clips.append(clip)
    return clips


def _looked_up_clip(reading: Reading, entry: SizedSource, start: int, frames: int) -> Clip:
    """A clip of a video without pixels, which are needed unless all parts of its cache are current."""
    source, bucket = entry.source, entry.bucket
    path = clip_latents_path(reading.dataset.cache_directory, source.stem, start, frames, bucket)
    made_by = {**_settings(reading, entry), **clip_settings(bucket, start, frames)}
    kept = _current_parts(reading, path, source.path, _wanted(reading, frames, bucket, made_by))
    return Clip(source.path, path, None, bucket, frames, origin=latents_origin(path) if kept else None, kept=kept)


def _wanted(reading: Reading, frames: int, bucket: tuple[int, int], made_by: Mapping[str, str]) -> Wanted:
    return wanted_cache(reading.dataset, frames, bucket, made_by, reading.given.get("image_encoder"))


def _current_parts(reading: Reading, cache: Path, source: Path, wanted: Wanted) -> frozenset[str]:
    """The parts of a cache that need not be made again; without the latents, it is made again as a whole."""
    if reading.recache or latents_problem(cache, source, wanted) is not None:
        return frozenset()
    problems = {CONDITION: condition_problem(cache, wanted), CLIP: clip_problem(cache, wanted)}
    kept = frozenset([LATENTS, *(part for part, problem in problems.items() if problem is None)]) & wanted.parts
    if latents_origin(cache) is not None:
        return kept
    # What does not say by which rules it was made may be one that we made by older ones. Nothing is added to it,
    # because all of it would then be said to be made as we make it.
    return kept if kept == wanted.parts and is_plain(reading.dataset, source) else frozenset()


def _known_length(reading: Reading, stem: str, limit: str) -> int | None:
    """The frames of a video, from a cache that was made when as many were asked for, at the same rate."""
    for clip in reading.cached[stem]:
        made_by = made_by_of(clip.path)
        is_alike = all(made_by.get(name) == reading.settings.get(name) for name in ("source_fps", "vae"))
        if is_alike and made_by.get("most_frames") == limit and made_by.get("frames_read", "").isdecimal():
            return int(made_by["frames_read"])
    return None


def _without_unused(origin: Origin, remarks: frozenset[str], **more: str) -> Origin:
    """The background does not matter for what is not transparent: another one makes no cache stale."""
    made_by = {**origin.made_by, **more}
    if TRANSPARENT not in remarks:
        del made_by["background"]
    return replace(origin, made_by=made_by)
