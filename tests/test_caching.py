"""The caching jobs, with the oracle's tiny VAE and a stand-in for the text encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_jobs import FakeEncoder, cache_latents, cache_text, names, videos, write_config, write_pictures, write_vae
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import LEFT

import utils.caching as caching
import wan_cache_latents
import wan_cache_text_encoder_outputs
from utils.data import clips
from utils.data.cache_files import write_latents, write_text
from utils.pixels.pictures import read_image
from wan.errors import InputError
from wan.vae import load_vae

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "vae_wan21")


@pytest.fixture(autouse=True)
def without_advice_on_gpus(monkeypatch):
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)


@pytest.fixture
def fake_encoder(monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())
    (tmp_path / "t5.pth").touch()
    return tmp_path / "t5.pth"


@pytest.fixture
def pictures(tmp_path):
    """Three captioned pictures and the file of their dataset."""
    return write_pictures(tmp_path)


def test_latents_are_the_vaes_of_the_resized_picture(pictures, tmp_path, vae_file):
    cache_latents(pictures, vae_file, "--vae_dtype", "float32", "--batch_size", "2")
    vae = load_vae(vae_file)
    sizes = {"a": "0032x0032", "b": "0040x0032", "c": "0070x0020"}
    assert names(tmp_path) == [f"{name}_{size}_wan.safetensors" for name, size in sizes.items()]
    for name, size in sizes.items():
        pixels = torch.from_numpy(read_image(tmp_path / "pics" / f"{name}.png", (32, 32)).values).permute(2, 0, 1)
        expected = vae.encode((pixels / 127.5 - 1)[None, :, None])[0]
        found = load_file(tmp_path / "cache" / f"{name}_{size}_wan.safetensors")["latents_1x4x4_float32"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_latents_are_bfloat16_by_default_and_buckets_shape_them(pictures, tmp_path, vae_file):
    write_config(tmp_path, **json.loads(pictures.read_text())["datasets"][0], enable_bucket=True)
    cache_latents(pictures, vae_file)
    wide = load_file(tmp_path / "cache" / "c_0070x0020_wan.safetensors")
    assert {key: value.dtype for key, value in wide.items()} == {"latents_1x2x8_bfloat16": torch.bfloat16}


def test_clips_of_a_video_have_their_frames_latents(tmp_path, vae_file):
    config = videos(tmp_path, {"v": 7}, target_frames=[1, 5], frame_extraction="slide", frame_stride=2)
    cache_latents(config, vae_file, "--vae_dtype", "fp32")
    windows = [(0, 1), (2, 1), (4, 1), (6, 1), (0, 5), (2, 5)]
    assert names(tmp_path) == sorted(f"v_{s:05d}-{n:03d}_0032x0032_wan.safetensors" for s, n in windows)
    frames = np.stack([read_image(tmp_path / "v" / f"{number:03d}.png", (32, 32)).values for number in range(2, 7)])
    expected = load_vae(vae_file).encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0]
    path = tmp_path / "cache" / "v_00002-005_0032x0032_wan.safetensors"
    torch.testing.assert_close(load_file(path)["latents_2x4x4_float32"], expected, rtol=1e-5, atol=1e-5)
    with safe_open(path, "pt") as file:
        assert (file.metadata()["frame_count"], file.metadata()["width"]) == ("5", "32")


def test_a_video_that_is_too_short_is_told_and_left_out(tmp_path, vae_file):
    said = cache_latents(videos(tmp_path, {"long": 5, "short": 4}, target_frames=[5]), vae_file)
    assert said[0] == "videos shorter than the smallest of their target_frames, left out: 1, short"
    assert said[1] == "latents: 1 cached, 1 left out"
    assert names(tmp_path) == ["long_00000-005_0032x0032_wan.safetensors"]


def test_what_is_current_is_skipped_unless_recache_is_given(pictures, tmp_path, vae_file, monkeypatch):
    cache_latents(pictures, vae_file)
    encoded = []
    monkeypatch.setattr(clips, "read_image", lambda path, *how: encoded.append(path.name) or read_image(path, *how))
    assert "latents: 0 cached, 3 current and skipped (--recache makes them again)" in cache_latents(pictures, vae_file)
    assert encoded == []
    Image.new("RGB", (32, 32)).save(tmp_path / "pics" / "a.png")
    (tmp_path / "cache" / "c_0070x0020_wan.safetensors").unlink()
    cache_latents(pictures, vae_file, "--skip_existing")  # musubi-tuner's flag for it
    assert sorted(encoded) == ["a.png", "c.png"]  # read by several threads, in any order
    assert "latents: 3 cached" in cache_latents(pictures, vae_file, "--recache")
    assert sorted(encoded[2:]) == ["a.png", "b.png", "c.png"]


def test_other_latents_are_deleted_unless_kept(pictures, tmp_path, vae_file):
    (tmp_path / "cache").mkdir()
    others = ["gone_0032x0032_wan.safetensors", "gone_wan_te.safetensors", "my_wan.safetensors", "a_wan_te.safetensors"]
    for name in others:
        write_latents(tmp_path / "cache" / name, torch.zeros(16, 1, 4, 4), (32, 32))
    cache_latents(pictures, vae_file, "--keep_cache")
    assert set(others) <= set(names(tmp_path))
    said = cache_latents(pictures, vae_file)
    assert set(others) - set(names(tmp_path)) == {others[0]}
    assert "1 deleted, because this dataset does not use them (--keep_cache keeps them)" in said[0]


def test_values_that_are_not_finite_are_named_and_not_written(pictures, tmp_path, vae_file):
    weights = load_file(vae_file)
    weights["conv1.bias"] = torch.full_like(weights["conv1.bias"], float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(
        InputError, match=r"the latents for a_0032x0032_wan\.safetensors contain NaN or infinity and were not written"
    ):
        cache_latents(pictures, tmp_path / "nan.safetensors")
    assert names(tmp_path) == []


def test_captions_are_stripped_encoded_and_told(pictures, tmp_path, fake_encoder):
    cache_text(pictures, fake_encoder)
    assert names(tmp_path) == [f"{name}_wan_te.safetensors" for name in "abc"]
    path = tmp_path / "cache" / "b_wan_te.safetensors"
    tokens = load_file(path)["varlen_t5_bfloat16"]
    assert torch.equal(tokens, torch.full((10, 8), 9.0).bfloat16())
    with safe_open(path, "pt") as file:
        assert file.metadata()["caption1"] == "picture b"


def test_only_changed_captions_are_encoded_unless_recache_is_given(pictures, tmp_path, fake_encoder, monkeypatch):
    cache_text(pictures, fake_encoder)
    written = []
    write = caching.write_text
    monkeypatch.setattr(caching, "write_text", lambda path, *rest: written.append(path.name) or write(path, *rest))
    (tmp_path / "pics" / "a.txt").write_text("other", encoding="utf-8")
    cache_text(pictures, fake_encoder)
    assert written == ["a_wan_te.safetensors"]
    cache_text(pictures, fake_encoder, "--recache")
    assert len(written) == 4


def test_text_of_other_sources_is_deleted_unless_kept(pictures, tmp_path, fake_encoder):
    write_text(tmp_path / "cache" / "gone_wan_te.safetensors", torch.zeros(3, 8), "gone")
    cache_text(pictures, fake_encoder, "--keep_cache")
    assert "gone_wan_te.safetensors" in names(tmp_path)
    cache_text(pictures, fake_encoder)
    assert "gone_wan_te.safetensors" not in names(tmp_path)


def test_pictures_without_a_caption_are_told_and_left_out(pictures, tmp_path, vae_file):
    (tmp_path / "pics" / "b.txt").unlink()
    said = cache_latents(pictures, vae_file)
    assert said[:2] == ["pictures without a caption, left out: 1, b.png", "latents: 2 cached, 1 left out"]
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--one_frame"], "--one_frame is not supported"),
        (["--debug_mode", "image"], "--debug_mode is not supported"),
        (["--vae_cache_cpu"], "--vae_cache_cpu is not supported"),
        (["--vae_dtype", "int8"], "--vae_dtype: int8 is not one of bfloat16"),
        (["--batch_size", "0"], "--batch_size must be a whole number from 1 to 10,000, not 0"),
        (["--device", "cuda:99"], "--device: cuda:99 does not exist"),
        (["--vae", "nowhere.pth"], "--vae nowhere.pth does not exist"),
        (["--unknown"], "unknown flag --unknown"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_written(pictures, tmp_path, vae_file, flags, named):
    with pytest.raises(InputError) as error:
        wan_cache_latents.main(["--dataset_config", str(pictures), "--vae", str(vae_file), *flags])
    assert named in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_text_script_refuses_a_missing_encoder(pictures, fake_encoder):
    argv = ["--dataset_config", str(pictures), "--t5", str(fake_encoder)]
    with pytest.raises(InputError, match=r"--t5 nowhere\.pth does not exist"):
        wan_cache_text_encoder_outputs.main([*argv, "--t5", "nowhere.pth"])


def test_only_a_job_that_begins_removes_what_a_killed_one_left(pictures, tmp_path, vae_file):
    left, foreign = (tmp_path / "cache" / f"a_0032x0032_wan.safetensors{end}" for end in (LEFT, ".tmp"))
    left.parent.mkdir()
    left.touch()
    foreign.touch()
    with pytest.raises(InputError):
        cache_latents(pictures, pictures)
    assert left.exists()
    cache_latents(pictures, vae_file)
    assert not left.exists() and foreign.exists()


def test_two_runs_of_one_kind_on_a_folder_are_refused_but_latents_and_text_go_together(
    pictures, tmp_path, vae_file, fake_encoder, monkeypatch
):
    refused = []

    def cache_both(*args, **settings):
        if not refused:
            with pytest.raises(InputError, match=r"the latents cache .*cache is in use by process \d+") as error:
                cache_latents(pictures, vae_file)
            refused.append(error)
            cache_text(pictures, fake_encoder)
        return load_vae(*args, **settings)

    monkeypatch.setattr(caching, "load_vae", cache_both)
    cache_latents(pictures, vae_file)
    assert refused and len(names(tmp_path)) == 6  # the lock is gone with the run


def test_a_cache_folder_that_is_a_file_is_named(pictures, tmp_path, vae_file):
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match=r"cache_directory .*cache cannot be created: a file is in the way"):
        cache_latents(pictures, vae_file)


def test_a_damaged_cache_is_made_again(pictures, tmp_path, vae_file, fake_encoder):
    cache_latents(pictures, vae_file)
    cache_text(pictures, fake_encoder)
    whole = {path: load_file(path) for path in (tmp_path / "cache").glob("a_*")}
    for path in whole:
        path.unlink()  # what load_file mapped stays
        path.write_bytes(b"damaged")
    cache_latents(pictures, vae_file)
    cache_text(pictures, fake_encoder)
    assert len(whole) == 2
    for path, tensors in whole.items():
        assert [torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items()] == [True]


def _damage(pictures, how):
    folder = pictures.parent / "pics"
    if how == "broken":
        (folder / "a.png").write_bytes(b"nothing")
    elif how == "collision":
        Image.new("RGB", (32, 32)).save(folder / "a.jpg")
        (folder / "a.txt").write_text("a", encoding="utf-8")
    elif how == "uncaptioned":
        for path in folder.glob("*.txt"):
            path.unlink()
    else:
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("broken", "a.png cannot be read"),
        ("collision", "would share one cache file"),
        ("uncaptioned", "have no caption: a.png needs a.txt"),
        ("empty", "holds no files to train on"),
    ],
)
def test_wrong_sources_are_named_before_anything_is_written(pictures, tmp_path, vae_file, how, named):
    _damage(pictures, how)
    with pytest.raises(InputError) as error:
        cache_latents(pictures, vae_file)
    assert named in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_pictures_of_subfolders_are_cached_in_the_same_subfolders(pictures, tmp_path, vae_file):
    (tmp_path / "pics" / "x").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pics" / "x" / "a.png")
    (tmp_path / "pics" / "x" / "a.txt").write_text("picture x/a", encoding="utf-8")
    config = write_config(tmp_path, **json.loads(pictures.read_text())["datasets"][0], recursive=True)
    cache_latents(config, vae_file)
    assert (tmp_path / "cache" / "x" / "a_0032x0032_wan.safetensors").is_file()
    (tmp_path / "pics" / "x" / "a.png").unlink()
    assert "3 current and skipped (--recache makes them again), 1 deleted" in cache_latents(config, vae_file)[0]
    assert not (tmp_path / "cache" / "x" / "a_0032x0032_wan.safetensors").exists()


def test_what_there_is_to_remark_is_said_once_with_a_count(pictures, tmp_path, vae_file):
    for name in "ab":
        Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "pics" / f"{name}.png")
    config = write_config(tmp_path, **json.loads(pictures.read_text())["datasets"][0], background=[0, 0, 255])
    assert cache_latents(config, vae_file, "--vae_dtype", "fp32")[:1] == [
        "transparent pictures, drawn on #0000ff (background in the dataset file): 2, a.png, b.png"
    ]
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 32)
    found = load_file(tmp_path / "cache" / "a_0032x0032_wan.safetensors")["latents_1x4x4_float32"]
    torch.testing.assert_close(found, load_vae(vae_file).encode(blue)[0], rtol=1e-4, atol=1e-4)
