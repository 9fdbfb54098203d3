"""Pictures as their viewers show them: orientation, transparency, depths and colours, against plain arithmetic."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms
from png_files import chunk, write_png

from utils.pixels.pictures import image_size, read_image, stored_size
from utils.pixels.remarks import BROKEN_PROFILE, HDR, NO_FIXED_RANGE, SEVERAL_FRAMES, TRANSPARENT
from utils.pixels.tone_mapping import compressed_nits
from wan.errors import InputError

UPRIGHT = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
# How an upright picture is stored, so that the orientation brings it back.
STORED = {
    1: UPRIGHT,
    2: np.fliplr(UPRIGHT),
    3: np.rot90(UPRIGHT, 2),
    4: np.flipud(UPRIGHT),
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT),
    7: np.rot90(UPRIGHT, 2).swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}
LOSSLESS = {".png": {}, ".tif": {}, ".tiff": {"compression": "tiff_lzw"}, ".webp": {"lossless": True}}
GREEN = (0, 200, 0)


def _exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def _read(path, background=(255, 255, 255)):
    return read_image(path, image_size(path), background)


def _pixel(path, background=(255, 255, 255)):
    return _read(path, background).values[0, 0].tolist()


def _disc(size):
    """A green disc on transparent red, as cut-out tools leave it."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    is_disc = x**2 + y**2 < (size * 0.3) ** 2
    return Image.fromarray(np.where(is_disc[..., None], (*GREEN, 255), (255, 0, 0, 0)).astype(np.uint8))


def _srgb(light):
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(STORED[orientation]).save(path, exif=_exif(orientation), **LOSSLESS[suffix])
    assert (image_size(path), stored_size(path)) == ((32, 24), STORED[orientation].shape[1::-1])
    assert np.array_equal(_read(path).values, UPRIGHT)


@pytest.mark.parametrize("suffix", [".jpg", ".avif"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_of_lossy_formats_stand_upright(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    smooth = np.asarray(Image.fromarray(STORED[orientation]).convert("L").resize((4, 4)))
    upright = np.asarray(Image.fromarray(UPRIGHT).convert("L").resize((4, 4)))
    stored = np.asarray(Image.fromarray(smooth).resize(STORED[orientation].shape[1::-1], Image.Resampling.BOX))
    Image.fromarray(stored).convert("RGB").save(path, exif=_exif(orientation), quality=100)
    expected = np.asarray(Image.fromarray(upright).resize((32, 24), Image.Resampling.BOX)).astype(int)
    assert image_size(path) == (32, 24)
    assert np.abs(_read(path).values[..., 0] - expected).max() <= 8


def test_a_png_with_its_orientation_after_the_pixels_stands_upright(tmp_path):
    write_png(tmp_path / "a.png", STORED[6], after=chunk(b"eXIf", _exif(6).tobytes()[6:]))
    assert image_size(tmp_path / "a.png") == (32, 24)
    assert np.array_equal(_read(tmp_path / "a.png").values, UPRIGHT)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage", _exif(9).tobytes(), _exif(0).tobytes()]
)
def test_damaged_or_impossible_orientations_leave_a_picture_as_it_is_stored(tmp_path, exif):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.webp", exif=exif, lossless=True)
    assert np.array_equal(_read(tmp_path / "a.webp").values, UPRIGHT)


TRANSPARENT_FILES = {
    "rgba.png": lambda image, path: image.save(path),
    "palette.png": lambda image, path: image.quantize(4).save(path),
    "index.gif": lambda image, path: image.save(path),
    "rgba.webp": lambda image, path: image.save(path, lossless=True, exact=True),
    "rgba.tif": lambda image, path: image.save(path),
    "rgba.tiff": lambda image, path: image.save(path, compression="tiff_lzw"),
    "rgba.avif": lambda image, path: image.save(path, quality=100, subsampling="4:4:4"),
    "colour.png": lambda image, path: image.convert("RGB").save(path, transparency=(255, 0, 0)),
    "deep.png": lambda image, path: write_png(path, np.asarray(image).astype(np.uint16) * 257, 16),
}


@pytest.mark.parametrize("size", [64, 32, 128])
@pytest.mark.parametrize("name", TRANSPARENT_FILES)
def test_hidden_colours_never_show_whatever_the_size(tmp_path, name, size):
    TRANSPARENT_FILES[name](_disc(size), tmp_path / name)
    read = read_image(tmp_path / name, (64, 64))
    red, green, blue = read.values.astype(int).transpose(2, 0, 1)
    assert read.remarks == {TRANSPARENT}
    assert (np.abs(red[:8]) >= 253).all() and (blue[:8] >= 253).all() and (green[:8] >= 253).all()
    assert np.abs(read.values[32, 32] - np.array(GREEN)).max() <= 4
    # Between white and green red equals blue; enlarged edges swing a little beyond green.
    assert np.abs(red - blue).max() <= 6 and green.min() >= 185


def test_half_transparent_colours_are_mixed_with_the_background(tmp_path):
    colour, alpha, background = np.array([10, 200, 30]), 100, np.array([0, 40, 255])
    Image.new("RGBA", (16, 16), (*colour.tolist(), alpha)).save(tmp_path / "a.png")
    expected = np.rint((colour * alpha + background * (255 - alpha)) / 255)
    assert _pixel(tmp_path / "a.png", tuple(background.tolist())) == expected.tolist()


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_other_modes_with_alpha_are_mixed_too(tmp_path, mode, suffix):
    if (mode, suffix) == ("PA", ".png"):
        pytest.skip("PNG has no such mode")
    Image.new("LA", (16, 16), (40, 100)).convert("RGBA").convert(mode).save(tmp_path / f"a{suffix}")
    assert Image.open(tmp_path / f"a{suffix}").mode == mode
    expected = round((40 * 100 + 255 * 155) / 255)
    assert np.abs(np.array(_pixel(tmp_path / f"a{suffix}")) - expected).max() <= 1


def test_premultiplied_colours_are_not_darkened_twice(tmp_path):
    premultiplied = Image.new("RGBA", (16, 16), (60, 20, 0, 100))
    premultiplied.save(tmp_path / "a.tif")
    extra_samples = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    content = (tmp_path / "a.tif").read_bytes()
    assert extra_samples in content
    (tmp_path / "a.tif").write_bytes(content.replace(extra_samples, struct.pack("<HHIHH", 338, 3, 1, 1, 0)))
    expected = [part + 255 - 100 for part in (60, 20, 0)]
    assert np.abs(np.array(_pixel(tmp_path / "a.tif")) - expected).max() <= 1


@pytest.mark.parametrize(("depth", "white"), [(1, 1), (2, 3), (4, 15), (8, 255), (16, 65535)])
def test_one_transparent_grey_is_found_at_every_depth(tmp_path, depth, white):
    samples = np.full((16, 16, 1), white, np.uint16)
    samples[:, 8:] = white // 3
    write_png(tmp_path / "a.png", samples, depth, before=chunk(b"tRNS", struct.pack(">H", white // 3)))
    read = _read(tmp_path / "a.png", (0, 0, 255))
    assert read.values[0, 0].tolist() == [255, 255, 255]
    assert read.values[0, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize("depth", [8, 16])
def test_one_transparent_colour_is_found_at_every_depth(tmp_path, depth):
    samples = np.full((16, 16, 3), 2**depth - 1, np.uint16)
    samples[:, 8:] = np.array([200, 40, 90]) * (257 if depth == 16 else 1)
    write_png(tmp_path / "a.png", samples, depth, before=chunk(b"tRNS", samples[0, 15].astype(">u2").tobytes()))
    read = _read(tmp_path / "a.png", (0, 0, 255)).values
    assert (read[0, 0].tolist(), read[0, 15].tolist()) == ([255, 255, 255], [0, 0, 255])


def test_an_opaque_alpha_is_no_transparency(tmp_path):
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(tmp_path / "a.png")
    assert (_read(tmp_path / "a.png").remarks, _pixel(tmp_path / "a.png")) == (frozenset(), [1, 2, 3])


GREYS = np.repeat(np.array([0, 8000, 32768, 65535]), 8)[None].repeat(16, 0)


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_keeps_its_values(tmp_path, name, kind):
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 32 16 65535\n" + GREYS.astype(">u2").tobytes())
    else:
        Image.fromarray(GREYS.astype(kind)).save(tmp_path / name)
    assert np.array_equal(_read(tmp_path / name).values[..., 1], np.rint(GREYS / 257))


def test_16_bit_colours_keep_their_values(tmp_path):
    samples = np.stack([GREYS, GREYS[:, ::-1], GREYS], -1)
    write_png(tmp_path / "a.png", samples, 16)
    assert np.abs(_read(tmp_path / "a.png").values - samples / 257).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colours_that_a_tiff_stores_plane_by_plane_keep_their_values(tmp_path, order):
    planes = np.stack([GREYS, GREYS[:, ::-1], GREYS // 2]).astype(f"{order}u2")
    count, size = planes.shape[0], planes[0].nbytes
    ends = 8 + planes.nbytes
    tables = struct.pack(f"{order}3H6I", 16, 16, 16, *(8 + size * i for i in range(count)), *[size] * count)
    tags = [(256, 4, 1, 32), (257, 4, 1, 16), (258, 3, 3, ends), (259, 4, 1, 1), (262, 4, 1, 2)]
    tags += [(273, 4, 3, ends + 6), (277, 4, 1, 3), (278, 4, 1, 16), (279, 4, 3, ends + 18), (284, 4, 1, 2)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", ends + len(tables))
    directory = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    data = [head, planes.tobytes(), tables, struct.pack(f"{order}H", len(tags)), directory, bytes(4)]
    (tmp_path / "a.tif").write_bytes(b"".join(data))
    assert np.abs(_read(tmp_path / "a.tif").values - planes.astype(int).transpose(1, 2, 0) / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 32, dtype=np.float32), 1),
        (np.linspace(-1, 4, 32, dtype=np.float32), 4),
        (np.linspace(0, 200, 32, dtype=np.float32), 255),
        (np.linspace(0, 60000, 32).astype(np.int32), 65535),
        (np.linspace(0, 2**31 - 1, 32).astype(np.int32), 2**31 - 1),
    ],
)
def test_32_bit_grey_is_never_clipped_to_white(tmp_path, values, white):
    Image.fromarray(values[None].repeat(16, 0)).save(tmp_path / "a.tif")
    read = _read(tmp_path / "a.tif")
    assert np.abs(read.values[0, :, 0] - 255 * values.clip(0).astype(float) / white).max() <= 0.51
    assert read.remarks == (frozenset() if white == 1 else {NO_FIXED_RANGE})


def test_grey_in_which_0_is_white_is_inverted(tmp_path):
    Image.fromarray(GREYS.astype(np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert Image.open(tmp_path / "a.tif").tag_v2[262] == 0
    assert np.array_equal(_read(tmp_path / "a.tif").values[..., 0], np.rint((65535 - GREYS) / 257))


def test_black_and_white_and_palettes_keep_their_colours(tmp_path):
    Image.new("1", (16, 16), 1).save(tmp_path / "white.png")
    Image.new("RGB", (16, 16), (10, 200, 30)).quantize(2).save(tmp_path / "palette.png")
    assert (_pixel(tmp_path / "white.png"), _pixel(tmp_path / "palette.png")) == ([255] * 3, [10, 200, 30])


def test_cmyk_is_read_with_and_without_adobes_inversion(tmp_path):
    ink = (200, 20, 100, 30)
    paper = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "adobe.jpg", quality=100)
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "a.tif")
    plain = BytesIO()
    Image.new("CMYK", (16, 16), tuple(255 - part for part in ink)).save(plain, "JPEG", quality=100)
    marker = plain.getvalue().index(b"\xff\xee")
    (tmp_path / "plain.jpg").write_bytes(plain.getvalue()[:marker] + plain.getvalue()[marker + 16 :])
    for name in ("adobe.jpg", "a.tif", "plain.jpg"):
        assert np.abs(np.array(_pixel(tmp_path / name)) - paper).max() <= 4, name


def test_lab_becomes_srgb(tmp_path):
    # In the file 138, 81, 70: L 54.3, a 81, b 70, which is the red of sRGB in the light of print (D50).
    Image.new("LAB", (16, 16), (138, 128 + 81, 128 + 70)).save(tmp_path / "red.tif")
    assert b"\x8a\x51\x46" * 256 in (tmp_path / "red.tif").read_bytes()
    assert np.abs(np.array(_pixel(tmp_path / "red.tif")) - [255, 0, 0]).max() <= 6


def _exchanged_profile():
    """sRGB's own profile with the primaries of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    for number in range(count):
        at = 132 + 12 * number
        profile[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(
            bytes(profile[at : at + 4]), profile[at : at + 4]
        )
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colour_profiles_are_converted_to_srgb(tmp_path, mode):
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=_exchanged_profile())
    assert np.abs(np.array(_pixel(tmp_path / "a.png")) - [40, 200, 90]).max() <= 1


def test_srgbs_own_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(_read(tmp_path / "a.png").values, UPRIGHT)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_broken_profile_is_remarked_and_read_as_srgb(tmp_path, mode):
    Image.new("RGB", (16, 16), (90, 90, 90)).convert(mode).save(tmp_path / "a.tif", icc_profile=b"no profile" * 30)
    read = _read(tmp_path / "a.tif")
    assert (read.remarks, read.values[0, 0].tolist()) == ({BROKEN_PROFILE}, [90, 90, 90])


def test_a_profile_for_other_colours_is_remarked_and_read_as_srgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.tif", icc_profile=_exchanged_profile())
    assert (_read(tmp_path / "a.tif").remarks, _pixel(tmp_path / "a.tif")) == ({BROKEN_PROFILE}, [255, 255, 255])


def test_a_pngs_gamma_is_applied(tmp_path):
    write_png(tmp_path / "a.png", np.full((16, 16, 3), 64), before=chunk(b"gAMA", struct.pack(">I", 100000)))
    assert _pixel(tmp_path / "a.png") == [round(float(_srgb(64 / 255)))] * 3
    write_png(tmp_path / "b.png", np.full((16, 16, 3), 64), before=chunk(b"gAMA", struct.pack(">I", 45455)))
    assert _pixel(tmp_path / "b.png") == [64] * 3


@pytest.mark.parametrize("signal", [64, 100, 148, 180])
def test_hdr_pictures_are_tone_mapped(tmp_path, signal):
    power = (signal / 255) ** (1 / 78.84375)
    nits = 10000 * (max(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    write_png(tmp_path / "a.png", np.full((16, 16, 3), signal), before=chunk(b"cICP", bytes([9, 16, 0, 1])))
    expected = float(_srgb(compressed_nits(np.array(nits)) / 203))
    assert np.abs(np.array(_pixel(tmp_path / "a.png")) - expected).max() <= 1
    assert _read(tmp_path / "a.png").remarks == {HDR}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".avif", ".tif"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    red.save(tmp_path / f"a{suffix}", save_all=True, append_images=[blue])
    read = _read(tmp_path / f"a{suffix}")
    assert np.abs(read.values[0, 0] - np.array([255, 0, 0])).max() <= 3
    assert read.remarks == {SEVERAL_FRAMES}


def test_a_picture_that_needs_a_library_says_which(tmp_path):
    (tmp_path / "a.hif").write_bytes(bytes(50))
    with pytest.raises(InputError, match=r"a\.hif cannot be read: it needs a library, pip install pillow-heif"):
        image_size(tmp_path / "a.hif")
