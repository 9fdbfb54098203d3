"""The items that a dataset trains on: every source with its caches; missing, stale or damaged ones are named."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.data.cache_files import (
    CachedClip,
    image_latents_path,
    latents_files,
    latents_problem,
    parse_clip_name,
    parse_image_name,
    text_header,
    text_path,
    text_problem,
)
from utils.data.media import count_frames
from utils.data.sizes import SizedSource, clip_windows, frames_needed, longest_full_clip, sized_sources
from utils.data.sources import AnyDataset, ImageDataset, Source, VideoDataset, list_sources
from utils.files import folder_entries
from wan.configs import WAN_2_1_VAE

# Opening files waits for the disk, so threads help on one core too.
_READERS = 8


@dataclass(frozen=True)
class Item:
    """One picture or clip to train on.

    `bucket` is its (width, height) in pixels, `latent_shape` is (C, F, H, W), `text_shape` is (tokens, width).
    """

    name: str
    latents: Path
    text: Path
    bucket: tuple[int, int]
    frames: int
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    caption: str


@dataclass(frozen=True)
class Problem:
    """Why a source cannot be trained on, and which of its caches ("latents" or "text") has to be created."""

    source: Path
    cache: str
    text: str


@dataclass(frozen=True)
class CachedItems:
    """What a dataset trains on, in order of the names; those in `left_out` have no caption or are too short."""

    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    left_out: tuple[Path, ...]


def cached_items(dataset: AnyDataset) -> CachedItems:
    """Looks up the caches of every source; InputError if a source or the cache folder cannot be read."""
    if os.path.exists(dataset.cache_directory):  # Path.exists raises where a folder above it cannot be read
        folder_entries(dataset.cache_directory, "cache_directory")
    sources = list_sources(dataset, _READERS)
    sized = sized_sources(dataset, sources.found, _READERS)
    if isinstance(dataset, ImageDataset):
        return _image_items(dataset, sized, sources.left_out)
    return _video_items(dataset, sized)


def _image_items(dataset: ImageDataset, sized: Sequence[SizedSource], left_out: tuple[Path, ...]) -> CachedItems:
    other_sizes = dict(map(parse_image_name, latents_files(dataset.cache_directory)))
    items, problems = [], []
    for entry in sized:
        stem = entry.source.stem
        cache = image_latents_path(dataset.cache_directory, stem, entry.size)
        problem = latents_problem(cache, entry.source.path, 1, entry.bucket)
        if not cache.is_file() and stem in other_sizes:
            problem = f"is {_size(entry.size)}, but was {_size(other_sizes[stem])} when it was cached"
        _sort_out(dataset, entry, [(cache, 1, problem)], items, problems)
    return CachedItems(tuple(items), tuple(problems), left_out)


def _video_items(dataset: VideoDataset, sized: Sequence[SizedSource]) -> CachedItems:
    clips_of = defaultdict(list)
    for stem, clip in filter(None, map(parse_clip_name, latents_files(dataset.cache_directory))):
        clips_of[stem].append(clip)
    items, problems, left_out = [], [], []
    for entry in sized:
        clips, problem = _wanted_clips(dataset, entry, clips_of[entry.source.stem])
        if problem:
            problems.append(Problem(entry.source.path, "latents", problem))
        elif not clips:
            left_out.append(entry.source.path)
        else:
            found = [(clip.path, clip.frames, _clip_problem(clip, entry.source)) for clip in clips]
            _sort_out(dataset, entry, found, items, problems)
    return CachedItems(tuple(items), tuple(problems), tuple(left_out))


def _clip_problem(clip: CachedClip, source: Source) -> str | None:
    return latents_problem(clip.path, source.path, clip.frames, clip.size)


def _wanted_clips(
    dataset: VideoDataset, entry: SizedSource, cached: Sequence[CachedClip]
) -> tuple[list[CachedClip], str | None]:
    """The cached clips that the dataset asks for, or why they are not all there.

    Videos are decoded only where the names alone cannot tell: a number of frames that has no clip at all.
    """
    fitting = {(clip.start, clip.frames): clip for clip in cached if clip.size == entry.bucket}
    windows = list(_expected_windows(dataset, entry.source, sorted(fitting)))
    if all(window in fitting for window in windows):
        return [fitting[window] for window in windows], None
    if not cached:
        return [], "has no latent cache"
    if not fitting:
        return [], f"was cached at {_size(cached[0].size)}, the dataset file now asks for {_size(entry.bucket)}"
    return [], "was cached with other target_frames or another frame_extraction than the dataset file asks for"


def _expected_windows(
    dataset: VideoDataset, source: Source, cached: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """The windows that caching would make, the video's length taken from the last cached clip where there is one."""
    if dataset.frame_extraction == "full":
        longest = longest_full_clip(dataset, dataset.max_frames)
        known = (0, longest) in cached
        yield from [(0, longest)] if known else clip_windows(dataset, _length(dataset, source))
        return
    length = None
    for frames in dataset.target_frames:
        ends = [start + count for start, count in cached if count == frames]
        if not ends and length is None:
            length = _length(dataset, source)
        available = max(ends) if ends else length
        yield from (window for window in clip_windows(dataset, available) if window[1] == frames)


def _length(dataset: VideoDataset, source: Source) -> int:
    limit = frames_needed(dataset) or max(dataset.target_frames)
    return count_frames(source.path, dataset.source_fps, limit=limit)


def _sort_out(dataset: AnyDataset, entry: SizedSource, found, items: list[Item], problems: list[Problem]) -> None:
    """Adds a source's (cache, frames, problem) to `items`, or to `problems` if there is one."""
    source, (width, height) = entry.source, entry.bucket
    text = text_path(dataset.cache_directory, source.stem)
    broken = [Problem(source.path, "latents", problem) for *_, problem in found if problem][:1]
    problem = text_problem(text, source.caption)
    broken += [Problem(source.path, "text", problem)] if problem else []
    problems += broken
    if not broken:
        text_shape = text_header(text)[0]
        for cache, frames, _ in found:
            latent_shape = WAN_2_1_VAE.shape(frames, height, width)
            name, caption = source.path.name, source.caption
            items.append(Item(name, cache, text, entry.bucket, frames, latent_shape, text_shape, caption))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
