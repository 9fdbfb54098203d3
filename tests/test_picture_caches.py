"""Caches for the models that are given pictures, in musubi-tuner's format, and for the VAE of ti2v-5B."""

import pytest
import torch
from caching_jobs import ORACLE, FakeEncoder, cache_latents, videos, write_vae
from safetensors.torch import load_file, save_file

from utils import caching
from utils.learning.conditions import picture_condition
from utils.pixels.pictures import read_image
from wan.image_encoder import load_image_encoder
from wan.vae import load_vae

FP32 = ("--vae_dtype", "float32")


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "vae_wan21")


@pytest.fixture(scope="module")
def vae_2_2(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae22"), "vae_wan22")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    oracle = load_file(ORACLE / "clip_vision.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in oracle.items() if key.startswith("weight.")}
    save_file(weights, path, {"num_heads": "2"})
    return path


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())


@pytest.fixture
def clips(tmp_path):
    """One video of 6 frames, of which 5 are a clip, and the file of its dataset."""
    return videos(tmp_path, {"v": 6}, target_frames=[5])


def cached(folder):
    return load_file(folder / "cache" / "v_00000-005_0032x0032_wan.safetensors")


def pictures_of(folder, *numbers):
    pixels = [read_image(folder / "v" / f"{number:03d}.png", (32, 32)).values for number in numbers]
    return [torch.from_numpy(values).permute(2, 0, 1)[None] / 127.5 - 1 for values in pixels]


@pytest.mark.parametrize(("flag", "frames"), [("--i2v", (0,)), ("--flf2v", (0, 4))])
def test_what_is_given_of_a_clip_is_made_of_its_own_frames(clips, tmp_path, vae_file, clip_file, flag, frames):
    cache_latents(clips, vae_file, *FP32, flag, "--clip", str(clip_file))
    given = pictures_of(tmp_path, *frames)
    condition = picture_condition(load_vae(vae_file), given, 5)[0]
    torch.testing.assert_close(cached(tmp_path)["latents_image_2x4x4_float32"], condition, rtol=1e-5, atol=1e-5)
    encoder = load_image_encoder(clip_file, torch.float32)
    tokens = torch.cat([encoder.encode(picture)[0] for picture in given])
    found = cached(tmp_path)["clip_float32"]
    assert found.dtype == torch.float16 and found.shape == (257 * len(frames), 24)
    torch.testing.assert_close(found.float(), tokens, rtol=2e-3, atol=2e-3)
