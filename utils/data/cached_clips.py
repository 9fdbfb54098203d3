"""Which clips of a video a dataset trains on, looked up by the names of their caches, before any video is opened."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from utils.data.cache_files import CachedClip
from utils.data.cache_problems import other_vae_problem
from utils.data.origins import size_text
from utils.data.sizes import SizedSource, choose_bucket, clip_windows, frames_needed, longest_full_clip
from utils.data.sources import Source, VideoDataset
from utils.pixels.videos import count_frames, stored_video_size


def wanted_clips(
    dataset: VideoDataset, entry: SizedSource, cached: Sequence[CachedClip]
) -> tuple[list[CachedClip], str | None]:
    """The cached clips that the dataset asks for and the model is trained on, or why they are not all there.

    Videos are decoded only where the names alone cannot tell: a number of frames that has no clip at all.
    """
    fitting = clips_of_size(cached, entry.bucket)
    if cached and not fitting:
        others = _other_buckets(dataset, entry)
        fitting = next((found for bucket in others if (found := clips_of_size(cached, bucket))), {})
    windows = list(_expected_windows(dataset, entry.source, sorted(fitting)))
    if all(window in fitting for window in windows):
        return [fitting[window] for window in windows], None
    if not cached:
        return [], "has no latent cache"
    nearest = next(iter(fitting.values()), cached[0])
    if problem := other_vae_problem(nearest.path, dataset.latents):
        return [], problem
    if not fitting:
        return [], f"was cached at {size_text(cached[0].size)}, the dataset file now asks for {size_text(entry.bucket)}"
    return [], "was cached with other target_frames or another frame_extraction than the dataset file asks for"


def clips_of_size(clips: Sequence[CachedClip], size: tuple[int, int]) -> dict[tuple[int, int], CachedClip]:
    """Those of a size, by their window."""
    return {(clip.start, clip.frames): clip for clip in clips if clip.size == size}


def _expected_windows(
    dataset: VideoDataset, source: Source, cached: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """The windows that caching would make and the model is trained on.

    The video's length is taken from the last cached clip where there is one.
    """
    whole = dataset.conditions.are_all_of
    if dataset.frame_extraction == "full":
        longest = longest_full_clip(dataset, dataset.max_frames)
        known = (0, longest) in cached
        windows = [(0, longest)] if known else clip_windows(dataset, _length(dataset, source))
        yield from (window for window in windows if not whole(window[1]))
        return
    length = None
    for frames in (count for count in dataset.target_frames if not whole(count)):
        ends = [start + count for start, count in cached if count == frames]
        if not ends and length is None:
            length = _length(dataset, source)
        available = max(ends) if ends else length
        yield from (window for window in clip_windows(dataset, available) if window[1] == frames)


def _other_buckets(dataset: VideoDataset, entry: SizedSource) -> list[tuple[int, int]]:
    """The sizes that musubi-tuner brings the video to: not turned upright, and up to 2026-09 always bucketed."""
    stored = stored_video_size(entry.source.path)
    always_bucketed = replace(dataset, enable_bucket=True, bucket_no_upscale=False)
    return [choose_bucket(dataset, entry.source, stored), choose_bucket(always_bucketed, entry.source, stored)]


def _length(dataset: VideoDataset, source: Source) -> int:
    limit = frames_needed(dataset) or max(dataset.target_frames)
    return count_frames(source.path, dataset.source_fps, limit, dataset.latents.fps)
