"""Which frames of a video become clips."""

import numpy as np

from utils.sources import VideoDataset


def clip_windows(dataset: VideoDataset, available: int) -> list[tuple[int, int]]:
    """The clips (first frame, number of frames) of a video of `available` frames; empty if it is too short."""
    if dataset.frame_extraction == "full":
        frames = longest_full_clip(dataset, available)
        return [(0, frames)] if frames > 0 else []
    return [(start, frames) for frames in dataset.target_frames for start in _starts(dataset, available, frames)]


def longest_full_clip(dataset: VideoDataset, available: int) -> int:
    """The frames of the one clip that "full" makes: 4n+1, because the VAE drops what is over in silence."""
    return (min(available, dataset.max_frames) - 1) // 4 * 4 + 1


def frames_needed(dataset: VideoDataset) -> int | None:
    """The most frames that the extraction looks at, None if it is all of them."""
    return {"head": max(dataset.target_frames), "full": dataset.max_frames}.get(dataset.frame_extraction)


def _starts(dataset: VideoDataset, available: int, frames: int) -> list[int]:
    last = available - frames
    if last < 0:
        return []
    if dataset.frame_extraction == "head":
        return [0]
    if dataset.frame_extraction == "uniform":
        return np.unique(np.linspace(0, last, dataset.frame_sample, dtype=int)).tolist()
    return list(range(0, last + 1, frames if dataset.frame_extraction == "chunk" else dataset.frame_stride))
