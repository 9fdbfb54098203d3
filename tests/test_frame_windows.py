"""Which frames of a video become clips."""

from pathlib import Path

import pytest

from utils.data.sizes import clip_windows, frames_needed
from utils.data.sources import VideoDataset


def _windows(available, extraction, frames=(5,), **settings):
    return clip_windows(VideoDataset(Path(), frame_extraction=extraction, target_frames=frames, **settings), available)


@pytest.mark.parametrize(
    ("extraction", "settings", "expected"),
    [
        ("head", {}, [(0, 5)]),
        ("head", {"frames": (1, 5, 17)}, [(0, 1), (0, 5)]),
        ("chunk", {}, [(0, 5), (5, 5)]),
        ("slide", {"frame_stride": 3}, [(0, 5), (3, 5), (6, 5)]),
        ("slide", {"frame_stride": 7}, [(0, 5), (7, 5)]),
        ("uniform", {"frame_sample": 3}, [(0, 5), (3, 5), (7, 5)]),
        ("uniform", {"frame_sample": 1}, [(0, 5)]),
        ("full", {}, [(0, 9)]),
        ("full", {"max_frames": 7}, [(0, 5)]),
    ],
)
def test_windows_of_twelve_frames(extraction, settings, expected):
    assert _windows(12, extraction, **settings) == expected


def test_uniform_makes_no_clip_twice():
    assert _windows(6, "uniform", frame_sample=5) == [(0, 5), (1, 5)]


@pytest.mark.parametrize("extraction", ["head", "chunk", "slide", "uniform"])
def test_a_video_shorter_than_the_clip_has_none_but_one_just_as_long_has_one(extraction):
    assert _windows(4, extraction) == []
    assert _windows(5, extraction) == [(0, 5)]


def test_full_needs_one_frame():
    assert _windows(0, "full") == []
    assert _windows(3, "full") == [(0, 1)]


def test_frames_needed_is_enough_for_the_same_windows():
    for extraction in ("head", "full"):
        dataset = VideoDataset(Path(), frame_extraction=extraction, target_frames=(1, 5), max_frames=11)
        assert clip_windows(dataset, frames_needed(dataset)) == clip_windows(dataset, 100)
