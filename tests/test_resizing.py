"""Pictures and videos from disk, brought to a size."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from utils.pixels.pictures import image_size, read_image
from utils.pixels.resizing import resize_and_crop
from utils.pixels.turning import exif_turn
from utils.pixels.videos import count_frames, read_video, video_size
from wan.errors import InputError

RNG = np.random.default_rng(0)


def _noise(width, height, channels=3):
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def _write_video(path, frames_THWC):
    """Lossless, so that the frames can be compared bit by bit."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(30))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "bgr0"
        for pixels in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))


def _area_by_hand(pixels, width, height):
    """Every old pixel counts with the part of it that the new one covers."""

    def shares(old, new):
        edges = np.arange(new + 1) * old / new
        cells = np.arange(old)
        return (
            np.clip(np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells), 0, None) * new / old
        )

    rows, columns = shares(pixels.shape[0], height), shares(pixels.shape[1], width)
    return np.einsum("hi,wj,ijc->hwc", rows, columns, pixels.astype(float))


def test_a_picture_of_the_exact_size_is_untouched(tmp_path):
    pixels = _noise(32, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (32, 16)
    assert np.array_equal(read_image(tmp_path / "a.png", (32, 16)).values, pixels)


@pytest.mark.parametrize("size", [(48, 30), (20, 20), (33, 19)])
def test_shrinking_averages_the_covered_area(size):
    pixels = _noise(99, 57)
    scale = max(size[0] / 99, size[1] / 57)
    width, height = int(99 * scale + 0.5), int(57 * scale + 0.5)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    expected = _area_by_hand(pixels, width, height)[top : top + size[1], left : left + size[0]]
    assert np.abs(resize_and_crop(pixels, size) - expected).max() <= 0.5 + 1e-6


def test_shrinking_by_whole_numbers_is_pillows_box():
    pixels = _noise(96, 63)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 21), Image.Resampling.BOX)).astype(int)
    # Pillow rounds after each axis.
    assert np.abs(resize_and_crop(pixels, (32, 21)) - expected).max() <= 1


def test_enlarging_is_pillows_lanczos_with_the_middle_cut_out():
    pixels = _noise(20, 16)
    expected = np.asarray(Image.fromarray(pixels).resize((40, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_and_crop(pixels, (32, 32)), expected[:, 4:36])
    assert np.array_equal(resize_and_crop(pixels, (40, 21)), expected[5:26])


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "1"):
        Image.fromarray(_noise(32, 16)).convert(mode).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png", (16, 16)).values.shape == (16, 16, 3)


def test_a_video_is_read_frame_by_frame(tmp_path):
    frames = np.stack([_noise(32, 16) for _ in range(6)])
    _write_video(tmp_path / "a.mkv", frames)
    assert video_size(tmp_path / "a.mkv") == (32, 16)
    assert np.array_equal(read_video(tmp_path / "a.mkv", (32, 16)).values, frames)
    assert np.array_equal(read_video(tmp_path / "a.mkv", (32, 16), limit=2).values, frames[:2])
    assert count_frames(tmp_path / "a.mkv") == 6


def test_frames_of_a_faster_source_are_dropped_to_16_a_second(tmp_path):
    frames = np.stack([np.full((16, 16, 3), 8 * number, np.uint8) for number in range(11)])
    _write_video(tmp_path / "a.mkv", frames)
    # floor(i * 16 / 30) moves on at these frames.
    expected = frames[[0, 2, 4, 6, 8, 10]]
    assert np.array_equal(read_video(tmp_path / "a.mkv", (16, 16), source_fps=30.0).values, expected)
    assert count_frames(tmp_path / "a.mkv", 30.0) == 6
    assert count_frames(tmp_path / "a.mkv", 12.0) == 11


def test_a_folder_of_pictures_is_a_video(tmp_path):
    frames = np.stack([_noise(32, 16) for _ in range(3)])
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / f"{number:03d}.png")
    assert video_size(tmp_path) == (32, 16)
    assert np.array_equal(read_video(tmp_path, (32, 16)).values, frames)


@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), MemoryError(), struct.error("x"), KeyError(7)])
def test_whatever_a_decoder_raises_is_one_line_with_the_file(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    Image.fromarray(_noise(8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=r"a\.png cannot be read: [^\n]+$"):
        read_image(tmp_path / "a.png", (8, 8))


def test_pipes_are_not_waited_for(tmp_path):
    Image.fromarray(_noise(16, 16)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "0.png")
    assert read_video(tmp_path, (16, 16)).values.shape == (1, 16, 16, 3)
    for read in (image_size, video_size, lambda path: read_image(path, (8, 8)), count_frames):
        with pytest.raises(InputError, match=r"0\.png is not a regular file"):
            read(tmp_path / "0.png")


@pytest.mark.parametrize("read", [image_size, video_size, lambda path: read_image(path, (16, 16)), count_frames])
def test_a_damaged_file_is_named(tmp_path, read):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing else")
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        read(tmp_path / "broken.png")


@pytest.mark.parametrize("size", [(31, 20), (45, 64), (128, 127)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_while_resizing_is_turning_before(size, orientation):
    pixels, turn = _noise(63, 45), exif_turn(orientation)
    before = resize_and_crop(np.ascontiguousarray(turn.apply(pixels)), size)
    assert np.abs(resize_and_crop(pixels, size, turn) - before.astype(int)).max() <= 1  # means may be rounded apart
