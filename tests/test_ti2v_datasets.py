"""Datasets for ti2v-5B, whose VAE covers 16x16 pixels and whose videos have 24 frames a second."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_jobs import FakeEncoder, cache_latents, cache_text, names, videos, write_config, write_pictures, write_vae
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from video_files import write_video

from utils import caching
from utils.data import clips as reading
from utils.data.cache_summary import rate_lines
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset
from utils.data.sizes import bucket_sizes, choose_bucket
from utils.data.sources import ImageDataset, Source, VideoDataset
from utils.pixels.pictures import read_image
from utils.pixels.rates import Rate
from utils.pixels.videos import count_frames, read_video
from wan.configs import WAN_2_2_VAE
from wan.errors import InputError
from wan.vae import load_vae, read_vae_kind


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "vae_wan22")


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the slowest part of such small jobs
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())


def _build(config):
    return build_training_dataset(read_dataset_config(config, WAN_2_2_VAE))


def _changed(config, **settings):
    table = json.loads(config.read_text())["datasets"][0] | settings
    config.write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return config


def test_pictures_are_cached_and_trained_on_as_the_2_2_vae_lays_them_out(tmp_path, vae_file):
    config = write_pictures(tmp_path)
    table = json.loads(config.read_text())["datasets"][0] | {"resolution": [64, 64], "enable_bucket": True}
    config = write_config(tmp_path, **table)
    cache_text(config, vae_file)
    cache_latents(config, vae_file, "--vae_dtype", "float32")
    assert names(tmp_path)[4] == "c_0070x0020_wan.safetensors"
    # 70x20 is nearest to 128x32, of the buckets of 64x64 pixels in steps of 32.
    found = load_file(tmp_path / "cache" / names(tmp_path)[4])["latents_1x2x8_float32"]
    pixels = torch.tensor(read_image(tmp_path / "pics" / "c.png", (128, 32)).values).permute(2, 0, 1)
    expected = load_vae(vae_file).encode((pixels / 127.5 - 1)[None, :, None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    dataset = _build(config)
    assert [item.latent_shape for item in dataset.items] == [(48, 1, 4, 4), (48, 1, 4, 4), (48, 1, 2, 8)]
    assert dataset[(0, 1)]["latents"].shape == (2, 48, 1, 4, 4) and dataset[(0,)]["y"] is None


@given(st.tuples(st.integers(32, 1300), st.integers(32, 1300)))
def test_buckets_are_multiples_of_32_of_at_most_the_area(resolution):
    for width, height in bucket_sizes(resolution, 32):
        assert width % 32 == height % 32 == 0
        assert 0 < width * height <= resolution[0] * resolution[1]
    assert bucket_sizes(resolution, 32)


def test_small_pictures_that_are_not_enlarged_are_cut_to_multiples_of_32():
    settings = {"resolution": (96, 96), "enable_bucket": True, "bucket_no_upscale": True, "latents": WAN_2_2_VAE}
    dataset = ImageDataset(Path(), **settings)
    assert choose_bucket(dataset, Source(Path("a.png"), ""), (79, 50)) == (64, 32)
    with pytest.raises(InputError, match=r"a\.png is 79x31, smaller than 32x32"):
        choose_bucket(dataset, Source(Path("a.png"), ""), (79, 31))


@pytest.mark.parametrize(
    ("resolution", "named"),
    [
        ([1280, 720], "must be multiples of 32: instead of 720 use 704 or 736, or set enable_bucket = true"),
        ([16, 64], "resolution [16, 64]: each side must be from 32 to 1000000 pixels"),
    ],
)
def test_a_resolution_that_the_model_cannot_have_is_named(tmp_path, resolution, named):
    config = write_config(tmp_path, image_directory="pics", caption_extension=".txt", resolution=resolution)
    with pytest.raises(InputError) as error:
        read_dataset_config(config, WAN_2_2_VAE)
    assert named in str(error.value)
    assert read_dataset_config(config).datasets[0].resolution == tuple(resolution)


def test_a_mask_has_a_value_for_each_latent_pixel(tmp_path, vae_file):
    config = write_pictures(tmp_path)
    (tmp_path / "masks").mkdir()
    halves = np.zeros((32, 32), np.uint8)
    halves[:, :24] = 255
    Image.fromarray(halves).save(tmp_path / "masks" / "a.png")
    table = json.loads(config.read_text())["datasets"][0] | {"mask_directory": str(tmp_path / "masks")}
    config = write_config(tmp_path, **table)
    cache_text(config, vae_file)
    cache_latents(config, vae_file)
    assert _build(config)[(0,)]["mask"][0, 0, 0].tolist() == [[1.0, 0.5]] * 2


def test_videos_are_brought_to_24_frames_a_second(tmp_path):
    frames = [np.full((16, 16, 3), number, np.uint8) for number in range(60)]
    write_video(tmp_path / "a.mkv", frames, "bgr0", "ffv1")
    values = read_video(tmp_path / "a.mkv", (16, 16), 60.0, wanted_fps=24).values[:, 0, 0, 0].tolist()
    assert values == [number for number in range(60) if number == 0 or number * 24 // 60 != (number - 1) * 24 // 60]
    assert count_frames(tmp_path / "a.mkv", 60.0, wanted_fps=24) == len(values) == 24
    assert count_frames(tmp_path / "a.mkv", 60.0) == 16


def test_clips_are_cut_and_counted_at_24_frames_a_second(tmp_path, vae_file):
    config = videos(tmp_path, {"v": 12}, target_frames=[5], frame_extraction="chunk", source_fps=48.0)
    cache_text(config, vae_file)
    with pytest.raises(InputError, match="v has no latent cache"):  # 6 frames are long enough, 4 were not
        _build(config)
    cache_latents(config, vae_file, "--vae_dtype", "float32")
    assert names(tmp_path)[0] == "v_00000-005_0032x0032_wan.safetensors" and len(names(tmp_path)) == 2
    pixels = np.stack([read_image(tmp_path / "v" / f"{number:03d}.png", (32, 32)).values for number in range(0, 10, 2)])
    expected = load_vae(vae_file).encode(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0]
    found = load_file(tmp_path / "cache" / names(tmp_path)[0])["latents_2x2x2_float32"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [item.frames for item in _build(config).items] == [5]


def test_a_length_that_was_counted_at_another_rate_is_not_taken(tmp_path, vae_file, monkeypatch):
    table = {"target_frames": [5], "frame_extraction": "chunk", "source_fps": 24.0}
    config = videos(tmp_path, {"v": 12}, **table, resolution=[32, 32])
    (tmp_path / "vae21").mkdir()
    cache_latents(config, write_vae(tmp_path / "vae21", "vae_wan21"))
    assert len(names(tmp_path)) == 1  # 8 frames at 16 a second
    cache_latents(_changed(config, resolution=[64, 32]), vae_file, "--keep_cache")
    assert len(names(tmp_path)) == 3  # and 12 at 24 a second
    (tmp_path / "cache" / "v_00005-005_0064x0032_wan.safetensors").unlink()
    cache_latents(config, vae_file, "--keep_cache")
    assert len(names(tmp_path)) == 3
    monkeypatch.setattr(reading, "read_video", None)
    assert "2 current" in cache_latents(config, vae_file, "--keep_cache")[0]


def test_a_rate_of_24_is_the_models_own_and_another_one_is_said(tmp_path):
    rates = {tmp_path / "a.mp4": Rate(24.0, False)}
    assert rate_lines(VideoDataset(tmp_path, latents=WAN_2_2_VAE), rates) == []
    [line] = rate_lines(VideoDataset(tmp_path, latents=WAN_2_2_VAE), {tmp_path / "a.mp4": Rate(16.0, False)})
    assert line.startswith("videos of another rate than Wan's 24 frames a second: 1, a.mp4")
    assert "Wan's 16 frames" in rate_lines(VideoDataset(tmp_path), rates)[0]


def test_a_pth_file_tells_its_kind_too(tmp_path, vae_file):
    torch.save(load_file(vae_file), tmp_path / "vae.pth")
    assert read_vae_kind(tmp_path / "vae.pth").layout == WAN_2_2_VAE
    config = write_pictures(tmp_path)
    cache_latents(config, tmp_path / "vae.pth")
    assert list(load_file(tmp_path / "cache" / names(tmp_path)[0])) == ["latents_1x2x2_bfloat16"]
