"""The size that a picture or video is brought to."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.sizes import bucket_sizes, choose_bucket
from utils.data.sources import ImageDataset, Source
from wan.errors import InputError

SOURCE = Source(Path("a.png"), "")


def _choose(size, **settings):
    return choose_bucket(ImageDataset(Path("cache"), **settings), SOURCE, size)


def test_without_buckets_every_picture_has_the_resolution():
    assert _choose((123, 77), resolution=(96, 64)) == (96, 64)


def test_buckets_of_a_small_area_are_the_written_out_ones():
    # Area 4096: widths 32, 48, 64 with heights 128, 80 (4096 // 48 = 85) and 64, each also turned.
    assert bucket_sizes((64, 64), 16) == ((32, 128), (48, 80), (64, 64), (80, 48), (128, 32))


def test_nearest_aspect_ratio_is_chosen():
    # 80/48 is 1.67: nearer to 1.6 than 1 is, and 128/32 is 4.
    assert _choose((160, 100), resolution=(64, 64), enable_bucket=True) == (80, 48)
    assert _choose((1000, 999), resolution=(64, 64), enable_bucket=True) == (64, 64)
    assert _choose((10, 90), resolution=(64, 64), enable_bucket=True) == (32, 128)


@given(st.tuples(st.integers(16, 1300), st.integers(16, 1300)))
def test_buckets_are_multiples_of_16_of_at_most_the_area(resolution):
    for width, height in bucket_sizes(resolution, 16):
        assert width % 16 == height % 16 == 0
        assert 0 < width * height <= resolution[0] * resolution[1]
    assert bucket_sizes(resolution, 16)


def test_no_upscale_keeps_small_pictures_at_their_own_size_floored_to_16():
    settings = {"resolution": (64, 64), "enable_bucket": True, "bucket_no_upscale": True}
    assert _choose((50, 40), **settings) == (48, 32)
    assert _choose((256, 16), **settings) == (256, 16)
    assert _choose((128, 128), **settings) == (64, 64)


def test_no_upscale_means_nothing_without_buckets():
    assert _choose((50, 40), resolution=(64, 64), bucket_no_upscale=True) == (64, 64)


@pytest.mark.parametrize("settings", [{}, {"enable_bucket": True}])
def test_a_strip_of_which_nothing_would_be_left_is_named(settings):
    with pytest.raises(InputError, match=r"a\.png is 1x65000: less than 1 % of it would be left at"):
        _choose((1, 65000), resolution=(64, 64), **settings)
    assert _choose((10, 900), resolution=(64, 64), **settings)


def test_a_picture_below_16_pixels_is_named():
    with pytest.raises(InputError, match=r"a\.png is 40x12, smaller than 16x16"):
        _choose((40, 12), resolution=(64, 64), enable_bucket=True, bucket_no_upscale=True)
