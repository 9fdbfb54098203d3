"""Videos as players show them: display matrices, pixel aspect, colours and times, against plain arithmetic."""

import numpy as np
import pytest
from PIL import Image
from video_files import set_matrix, write_video

from utils.data.cache_summary import rate_lines
from utils.data.sources import VideoDataset
from utils.pixels.rates import own_rate
from utils.pixels.remarks import HDR, TRANSPARENT, VARIABLE_RATE
from utils.pixels.tone_mapping import compressed_nits
from utils.pixels.videos import count_frames, read_video, stored_video_size, video_size
from wan.errors import InputError

UPRIGHT = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
# The matrix that turns what is stored, and how an upright picture is stored for it.
MATRICES = {
    "upright": ((1, 0, 0, 1), UPRIGHT),
    "quarter right": ((0, 1, -1, 0), np.rot90(UPRIGHT)),
    "half": ((-1, 0, 0, -1), np.rot90(UPRIGHT, 2)),
    "quarter left": ((0, -1, 1, 0), np.rot90(UPRIGHT, -1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr(UPRIGHT)),
    "upside down": ((1, 0, 0, -1), np.flipud(UPRIGHT)),
    "transposed": ((0, 1, 1, 0), UPRIGHT.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), np.rot90(UPRIGHT, 2).swapaxes(0, 1)),
}
MATRIX_WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 2: (0.299, 0.114), 9: (0.2627, 0.0593)}


def _rgb(yuv, weights, full, depth=8):
    """BT.601's and its successors' equations."""
    red, blue = weights
    offset, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    y, u, v = np.array(yuv) / 2 ** (depth - 8)
    y, u, v = (y - offset) / luma, (u - 128) / chroma, (v - 128) / chroma
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return 255 * np.clip([r, (y - red * r - blue * b) / (1 - red - blue), b], 0, 1)


def _planes(yuv, size=(16, 16), kind=np.uint8):
    return np.stack([np.full(size, value, kind) for value in yuv])


def _greys(count):
    return [np.full((16, 16, 3), number, np.uint8) for number in range(count)]


def _numbers(path, *how):
    return read_video(path, (16, 16), *how).values[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("name", MATRICES)
def test_videos_stand_upright(tmp_path, name):
    matrix, stored = MATRICES[name]
    write_video(tmp_path / "a.mov", [np.ascontiguousarray(stored)], "rgb24", "png")
    set_matrix(tmp_path / "a.mov", *matrix)
    assert (video_size(tmp_path / "a.mov"), stored_video_size(tmp_path / "a.mov")) == ((32, 24), stored.shape[1::-1])
    assert np.array_equal(read_video(tmp_path / "a.mov", (32, 24)).values[0], UPRIGHT)


@pytest.mark.parametrize(("aspect", "size"), [("4/3", (64, 36)), ("1/2", (48, 72)), ("1", (48, 36)), ("20", (48, 36))])
def test_pixels_become_square(tmp_path, aspect, size):
    pixels = np.zeros((36, 48, 3), np.uint8)
    pixels[:18, 24:] = 200
    write_video(tmp_path / "a.mov", [pixels], "rgb24", "png", aspect=aspect)
    width, height = size
    assert video_size(tmp_path / "a.mov") == size
    read = read_video(tmp_path / "a.mov", size).values[0]
    assert np.abs(read[: height // 2 - 4, width // 2 + 4 :] - 200.0).max() <= 2  # Lanczos swings a little
    assert read[height // 2 + 4 :].max() <= 2 and read[:, : width // 2 - 4].max() <= 2


def test_a_turned_video_of_wide_pixels_is_high(tmp_path):
    write_video(tmp_path / "a.mov", [UPRIGHT], "rgb24", "png", aspect="2")
    set_matrix(tmp_path / "a.mov", 0, 1, -1, 0)
    assert video_size(tmp_path / "a.mov") == (24, 64)
    assert read_video(tmp_path / "a.mov", (24, 64)).values.shape == (1, 64, 24, 3)


def test_odd_sizes_keep_every_pixel(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (17, 33, 3), np.uint8)
    write_video(tmp_path / "a.mkv", [pixels])
    assert np.array_equal(read_video(tmp_path / "a.mkv", (33, 17)).values[0], pixels)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRIX_WEIGHTS)
def test_matrices_and_ranges_are_the_files(tmp_path, matrix, full):
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    write_video(tmp_path / "a.mkv", [_planes((120, 100, 170))], "yuv444p", **tags)
    expected = _rgb((120, 100, 170), MATRIX_WEIGHTS[matrix], full)
    assert np.abs(read_video(tmp_path / "a.mkv", (16, 16)).values[0, 3, 3] - expected).max() <= 1


def test_a_large_video_without_a_matrix_is_bt709(tmp_path):
    write_video(tmp_path / "a.mkv", [_planes((120, 100, 170), (16, 1280))], "yuv444p", color_range=1)
    expected = _rgb((120, 100, 170), MATRIX_WEIGHTS[1], False)
    assert np.abs(read_video(tmp_path / "a.mkv", (1280, 16)).values[0, 3, 3] - expected).max() <= 1


def test_10_bits_keep_their_values(tmp_path):
    planes = _planes((480, 400, 680), kind=np.uint16)
    write_video(
        tmp_path / "a.mkv", [planes], "yuv444p10le", colorspace=1, color_range=1, color_trc=1, color_primaries=1
    )
    expected = _rgb((480, 400, 680), MATRIX_WEIGHTS[1], False, 10)
    assert np.abs(read_video(tmp_path / "a.mkv", (16, 16)).values[0, 3, 3] - expected).max() <= 1


def _pq(signal):
    power = signal ** (1 / 78.84375)
    return 10000 * (max(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _hlg(signal):
    light = signal**2 / 3 if signal <= 0.5 else (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return 1000 * light**1.2


@pytest.mark.parametrize(("transfer", "nits"), [(16, _pq), (18, _hlg)])
@pytest.mark.parametrize("code", [64, 300, 500, 660, 722, 900])
def test_hdr_grey_is_tone_mapped(tmp_path, transfer, nits, code):
    planes = _planes((code, 512, 512), kind=np.uint16)
    tags = {"colorspace": 9, "color_range": 1, "color_trc": transfer, "color_primaries": 9}
    write_video(tmp_path / "a.mkv", [planes], "yuv444p10le", **tags)
    light = float(compressed_nits(np.array(nits((code - 64) / 876))) / 203)
    expected = 255 * min(12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055, 1)
    read = read_video(tmp_path / "a.mkv", (16, 16))
    assert np.abs(read.values[0, 3, 3] - expected).max() <= 2
    assert read.remarks == {HDR}


def test_tone_mapping_keeps_dark_tones_and_fits_highlights_in():
    nits = np.array([0.01, 1, 50, 100, 203, 500, 1000, 4000])
    compressed = compressed_nits(nits)
    assert np.abs(compressed[:3] / nits[:3] - 1).max() < 1e-6
    assert (np.diff(compressed[:7]) > 0).all() and 120 < compressed[4] < 203
    assert np.abs(compressed[6:] - 203).max() < 1e-6


def test_wide_gamut_colours_become_srgbs(tmp_path):
    # A red of BT.2020 that is sRGB's own: its three lights are the first column of the matrix from sRGB (BT.2087).
    light = np.array([0.627404, 0.069097, 0.016391])
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    pixels = np.rint(255 * signal).astype(np.uint8) * np.ones((16, 16, 3), np.uint8)
    write_video(tmp_path / "a.mkv", [pixels], "bgr0", color_primaries=9, color_trc=13)
    read = read_video(tmp_path / "a.mkv", (16, 16))
    assert np.abs(read.values[0, 3, 3] - np.array([255, 0, 0])).max() <= 8
    assert read.remarks == frozenset()


def test_transparent_videos_are_drawn_on_the_background(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[:, 8:] = 255, (0, 200, 0, 255)
    write_video(tmp_path / "a.mov", [pixels], "rgba", "png")
    Image.fromarray(pixels).save(tmp_path / "a.gif")
    for name in ("a.mov", "a.gif"):
        read = read_video(tmp_path / name, (16, 16), background=(0, 0, 255))
        assert (read.values[0, 0, 0].tolist(), read.values[0, 0, 15].tolist()) == ([0, 0, 255], [0, 200, 0])
        assert read.remarks == {TRANSPARENT}


def test_frames_of_a_variable_rate_are_chosen_by_their_times(tmp_path):
    # 60 a second for half a second, then one frame for half a second, then 60 a second again.
    times = [round(1000 * number / 60) for number in range(30)] + [1000 + round(1000 * n / 60) for n in range(15)]
    write_video(tmp_path / "a.mkv", _greys(45), rate=60, times=times)
    shown = [max(number for number, time in enumerate(times) if time <= 1000 * tick / 16 + 1) for tick in range(20)]
    assert shown[8:16] == [29] * 8
    for source_fps in (own_rate(tmp_path / "a.mkv").fps, "file"):
        assert _numbers(tmp_path / "a.mkv", source_fps) == shown
        assert count_frames(tmp_path / "a.mkv", source_fps) == 20
    assert read_video(tmp_path / "a.mkv", (16, 16), "file").remarks == {VARIABLE_RATE}
    assert _numbers(tmp_path / "a.mkv") == list(range(45))


def test_the_files_own_rate_is_taken_if_asked_for(tmp_path):
    for rate in (60, 24):
        write_video(tmp_path / "a.mkv", _greys(30), rate=rate)
        kept = [n for n in range(30) if n == 0 or n * 16 // rate != (n - 1) * 16 // rate]
        assert _numbers(tmp_path / "a.mkv", "file") == kept


@pytest.mark.parametrize(
    ("source_fps", "rate", "said"),
    [
        (None, 60, ["60 frames a second", "source_fps is not set", "set source_fps = 60"]),
        (30.0, 60, ["60 frames a second", "source_fps = 30:", "set source_fps = 60"]),
        (None, 16, None),
        (30.0, 30, None),
        ("file", 60, None),
    ],
)
def test_a_rate_that_is_not_the_dataset_files_is_said_with_both(tmp_path, source_fps, rate, said):
    write_video(tmp_path / "a.mkv", _greys(9), rate=rate)
    path = tmp_path / "a.mkv"
    lines = rate_lines(VideoDataset(tmp_path, source_fps=source_fps), {path: own_rate(path)})
    assert len(lines) == (said is not None)
    assert all(words in lines[0] for words in said or [])


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty (0 bytes)"), (b"<html>not found</html>", "it is damaged, or what it holds is not a video")],
)
def test_a_file_that_is_not_a_video_is_told_in_plain_words(tmp_path, content, said):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InputError) as refused:
        video_size(tmp_path / "a.mp4")
    assert str(refused.value) == f"{tmp_path / 'a.mp4'} cannot be read: {said}"
