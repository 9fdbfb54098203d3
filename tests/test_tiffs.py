"""TIFF files that Pillow would read otherwise than they are stored, and lines about what cannot be read."""

import struct

import numpy as np
import pytest
from PIL import Image

from utils.pixels.media import IMAGE_SUFFIXES
from utils.pixels.pictures import image_size, is_plain_picture, read_alpha, read_image
from utils.pixels.remarks import NO_FIXED_RANGE
from wan.errors import InputError

GREY = np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8)
ALPHA = GREY[::-1].copy()
# How an upright picture is stored, so that the orientation brings it back.
STORED = {5: GREY.swapaxes(0, 1), 6: np.rot90(GREY), 7: np.rot90(GREY, 2).swapaxes(0, 1), 8: np.rot90(GREY, -1)}


def write_tiff(path, samples_HWC, planes=False, kind=1, extra=None, more=None):
    """An uncompressed little-endian TIFF of any samples, in one strip, or a strip for each plane."""
    height, width, count = samples_HWC.shape
    bits = samples_HWC.itemsize * 8
    strips = list(np.moveaxis(samples_HWC, -1, 0)) if planes else [samples_HWC]
    tags = {256: [width], 257: [height], 258: [bits] * count, 259: [1], 262: [{1: 1, 2: 1, 3: 2, 4: 5}[count]]}
    tags |= {273: [0] * len(strips), 277: [count], 278: [height], 279: [strip.nbytes for strip in strips]}
    tags |= {284: [2 if planes else 1], 339: [kind] * count} | ({} if extra is None else {338: [extra]}) | (more or {})
    start = 8 + 2 + 12 * len(tags) + 4
    data = start + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [data + sum(strip.nbytes for strip in strips[:number]) for number in range(len(strips))]
    entries, lists = b"", b""
    for tag, values in sorted(tags.items()):
        field = struct.pack("<I", values[0] if len(values) == 1 else start + len(lists))
        lists += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
        entries += struct.pack("<HHI", tag, 4, len(values)) + field
    pixels = b"".join(strip.tobytes() for strip in strips)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + lists + pixels)


def read(path):
    return read_image(path, image_size(path)).values


def rounded(values):
    return np.rint(values)[..., None].repeat(3, -1)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_that_lies_on_its_side_stands_upright_in_every_mode(tmp_path, mode, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    deep = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = orientation
    (deep if mode == "I;16" else stored.convert(mode, dither=0)).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(GREY).convert("L" if mode == "I;16" else mode, dither=0).save(tmp_path / "upright.tif")
    assert image_size(tmp_path / "a.tif") == (32, 24)
    assert np.array_equal(read(tmp_path / "a.tif"), read(tmp_path / "upright.tif"))


def test_premultiplied_grey_is_not_darkened_twice(tmp_path):
    premultiplied = np.rint(GREY / 255 * ALPHA).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", np.stack([premultiplied, ALPHA], -1), extra=1)
    expected = rounded(premultiplied.astype(float) + 255 - ALPHA)
    assert np.abs(read(tmp_path / "a.tif") - expected).max() <= 1


FLOATS = np.stack([GREY, ALPHA, np.full_like(GREY, 51)], -1) / np.float32(255)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("brightest", [1, 255, 4])
def test_floating_point_colours_are_never_clipped(tmp_path, planes, brightest):
    samples = FLOATS / FLOATS.max() * np.float32(brightest)
    write_tiff(tmp_path / "a.tif", samples, planes, kind=3)
    picture = read_image(tmp_path / "a.tif", image_size(tmp_path / "a.tif"))
    assert np.abs(picture.values - 255.0 * samples / brightest).max() <= 0.51
    assert picture.remarks == (set() if brightest == 1 else {NO_FIXED_RANGE})
    assert not is_plain_picture(tmp_path / "a.tif")


def test_floating_point_colours_stand_upright(tmp_path):
    write_tiff(tmp_path / "a.tif", np.rot90(FLOATS), kind=3, more={274: [6]})
    assert np.array_equal(read(tmp_path / "a.tif"), np.rint(FLOATS * 255))


def test_grey_of_16_bits_with_alpha_is_mixed_with_the_background(tmp_path):
    write_tiff(tmp_path / "a.tif", np.stack([GREY, ALPHA], -1).astype(np.uint16) * 257, extra=2)
    expected = rounded(GREY / 255 * ALPHA + 255.0 - ALPHA)
    assert np.abs(read(tmp_path / "a.tif") - expected).max() <= 1
    mask = read_alpha(tmp_path / "a.tif", image_size(tmp_path / "a.tif"))
    assert np.array_equal(mask, ALPHA)


UNREADABLE = {
    "the planes of LA": lambda path: write_tiff(path, np.stack([GREY, ALPHA], -1), planes=True, extra=2),
    "the planes of premultiplied LA": lambda path: write_tiff(path, np.stack([GREY, ALPHA], -1), True, extra=1),
    "the planes of CMYK": lambda path: write_tiff(path, np.stack([GREY.astype(np.uint16)] * 4, -1), planes=True),
    "signed samples of 8 bits": lambda path: write_tiff(path, GREY.view(np.int8)[..., None], kind=2),
    "a TIFF with 3 floating-point samples of 64 bits": lambda path: write_tiff(path, np.ones((9, 9, 3)), kind=3),
    "a TIFF with 3 floating-point samples of 32 bits": lambda path: write_tiff(path, FLOATS, kind=3, more={317: [3]}),
    "a TIFF with 3 floating-point samples of 32 bits a pixel": lambda path: write_tiff(
        path, FLOATS, kind=3, more={322: [32], 323: [24]}
    ),
    "a TIFF with 2 whole samples of 16 bits": lambda path: write_tiff(path, np.ones((9, 9, 2), np.uint16), extra=1),
    "a TIFF with 2 whole samples of 32 bits": lambda path: write_tiff(path, np.ones((9, 9, 2), np.uint32), extra=2),
}


@pytest.mark.parametrize("said", UNREADABLE)
def test_what_would_be_read_wrongly_is_refused_with_what_to_do(tmp_path, said):
    UNREADABLE[said](tmp_path / "a.tif")
    for attempt in (image_size, read):
        with pytest.raises(InputError, match=rf"a\.tif cannot be read: it .*{said}.*: save it as a PNG") as refused:
            attempt(tmp_path / "a.tif")
    assert str(refused.value).count("a.tif") == 1


OTHER_CONTENT = {
    b"": "it is empty",
    b"\0\0\0\x18ftypheic": "whatever its name says, it is HEIC, and pip install pillow-heif reads them",
    b"\xff\x0a0123456789": "whatever its name says, it is JXL, and pip install pillow-jxl-plugin",
    b"\0\0\0\x18ftypisom": "whatever its name says, it is MP4, and give videos a dataset of their own",
    b"<html>not found</html>": "what it holds is not a picture of a kind that is known: save it as a PNG",
}


@pytest.mark.parametrize("content", OTHER_CONTENT)
def test_a_file_that_is_something_else_is_told_by_what_it_holds(tmp_path, content):
    if {".heic", ".jxl"} & set(IMAGE_SUFFIXES):
        pytest.skip("libraries that read these kinds are installed")
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError) as refused:
        image_size(tmp_path / "a.jpg")
    assert str(refused.value).startswith(f"{tmp_path / 'a.jpg'} cannot be read: {OTHER_CONTENT[content]}")
