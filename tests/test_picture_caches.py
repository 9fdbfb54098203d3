"""Caches for the models that are given pictures, in musubi-tuner's format, and for the VAE of ti2v-5B."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from caching_jobs import ORACLE, FakeEncoder, cache_latents, cache_text, names, videos, write_pictures, write_vae
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pictures import write_picture

import wan_cache_latents
from utils import caching
from utils.cli.train import parse_train
from utils.data.cache_files import clip_latents_path, read_clip, read_condition, read_latents
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset, make_loader
from utils.learning.conditions import picture_condition
from utils.pixels.pictures import read_image
from utils.sampling.denoising import resolve_sample
from utils.sampling.prompts import SamplePrompt
from utils.sampling.starts import encode_starts
from wan.configs import TASKS
from wan.errors import InputError
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
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the slowest part of such small jobs
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())


@pytest.fixture
def clips(tmp_path):
    """One video of 6 frames, of which 5 are a clip, and the file of its dataset."""
    return videos(tmp_path, {"v": 6}, target_frames=[5])


def cached(folder):
    return load_file(folder / "cache" / "v_00000-005_0032x0032_wan.safetensors")


def pictures_of(folder, *numbers):
    pixels = [read_image(folder / "v" / f"{number:03d}.png", (32, 32)).values for number in numbers]
    return [torch.tensor(values).permute(2, 0, 1)[None] / 127.5 - 1 for values in pixels]


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


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "ti2v-5B"])
def test_sampling_gives_a_picture_as_training_does_to_the_last_bit(tmp_path, vae_file, vae_2_2, clip_file, task):
    config = videos(tmp_path, {"v": 5}, target_frames=[5], resolution=[32, 96])
    frames = [write_picture(path, (50, 41), seed) for seed, path in enumerate(sorted((tmp_path / "v").iterdir()))]
    vae, pictures = vae_2_2 if task == "ti2v-5B" else vae_file, TASKS[task].conditions.pictures
    clip = clip_file if TASKS[task].conditions.clip else None
    cache_latents(config, vae, *(["--clip", str(clip)] if clip else []), *(["--flf2v"] if pictures == 2 else []))
    [cache] = (tmp_path / "cache").glob("*_wan.safetensors")
    prompt = SamplePrompt("a cat", width=32, height=96, frames=5, image_path=frames[0])
    prompt = replace(prompt, end_image_path=frames[-1] if pictures == 2 else None)
    sample = resolve_sample(prompt, TASKS[task], seed=0)
    [start] = encode_starts([sample], TASKS[task], load_vae(vae, torch.bfloat16), clip, 24, "cpu", print)
    if task == "ti2v-5B":
        assert torch.equal(read_latents(cache)[:, :1], start.clean_BCFHW[0].bfloat16())
    else:
        assert torch.equal(read_condition(cache), start.given.y_BCFHW[0].bfloat16())
        assert torch.equal(read_clip(cache), start.given.clip_BPI[0].half())


def test_the_file_is_musubi_tuners(clips, tmp_path, vae_file, clip_file):
    cache_latents(clips, vae_file, "--clip", str(clip_file))  # implies --i2v
    dtypes = {key: (tuple(value.shape), value.dtype) for key, value in cached(tmp_path).items()}
    assert dtypes == {
        "latents_2x4x4_bfloat16": ((16, 2, 4, 4), torch.bfloat16),
        "latents_image_2x4x4_bfloat16": ((20, 2, 4, 4), torch.bfloat16),
        "clip_bfloat16": ((257, 24), torch.float16),
    }
    mask = cached(tmp_path)["latents_image_2x4x4_bfloat16"][:4]
    assert mask[:, 0].eq(1).all() and mask[:, 1].eq(0).all()


def _musubis(folder, frames=5, mask_frames=(0,), channels=16, **tensors):
    """A cache as musubi-tuner writes it, which does not say by what it was made."""
    shape = (frames + 3) // 4, 4, 4
    condition = torch.zeros(4 + channels, *shape)
    condition[:4, list(mask_frames)] = 1
    name = "x".join(map(str, shape))
    path = clip_latents_path(folder / "cache", "v", 0, frames, (32, 32))
    found = {f"latents_{name}_bfloat16": torch.full((channels, *shape), 2.0).bfloat16()}
    found[f"latents_image_{name}_bfloat16"] = condition.bfloat16()
    path.parent.mkdir(exist_ok=True)
    metadata = {"architecture": "wan", "width": "32", "height": "32", "format_version": "1.0.1", "frame_count": "5"}
    save_file({**found, **tensors}, path, metadata)


def _model(task):
    return TASKS[task].latents, TASKS[task].conditions


def _build(config, task):
    return build_training_dataset(read_dataset_config(config, *_model(task)))


def _refused(config, task):
    with pytest.raises(InputError) as error:
        _build(config, task)
    return str(error.value)


CLIP_TOKENS = {"clip_bfloat16": torch.full((257, 24), 3.0).half()}


@pytest.mark.parametrize(("task", "tensors"), [("i2v-A14B", {}), ("i2v-14B", CLIP_TOKENS), ("i2v-A14B", CLIP_TOKENS)])
def test_musubi_tuners_caches_are_trained_on_and_not_made_again(clips, tmp_path, vae_file, clip_file, task, tensors):
    _musubis(tmp_path, **tensors)
    cache_text(clips, vae_file)
    flags = ("--i2v",) if task == "i2v-A14B" else ("--clip", str(clip_file))
    assert "latents: 0 cached, 1 current" in cache_latents(clips, vae_file, *flags)[0]
    batch = _build(clips, task)[(0,)]
    assert batch["latents"].eq(2).all() and batch["y"].dtype == torch.float32
    assert batch["y"][0, :, :, 0, 0].tolist() == [[1.0, 0.0]] * 4 + [[0.0, 0.0]] * 16
    assert batch["clip"] is None if task == "i2v-A14B" else batch["clip"].unique().tolist() == [3.0]


def _musubis_batch(path):
    """What musubi-tuner's loader makes of a latent cache: the dtype and a size are cut off the names."""
    batch = {}
    for key, value in load_file(path).items():
        name = key.rpartition("_")[0]
        batch[name.rpartition("_")[0] if name.startswith("latents_") else name] = value
    return batch


def test_musubi_tuners_loader_finds_what_it_reads(clips, tmp_path, vae_file, clip_file):
    cache_latents(clips, vae_file, "--i2v", "--clip", str(clip_file))
    [name] = names(tmp_path)
    batch = _musubis_batch(tmp_path / "cache" / name)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "latents": (16, 2, 4, 4),
        "latents_image": (20, 2, 4, 4),
        "clip": (257, 24),
    }
    with safe_open(tmp_path / "cache" / name, "pt") as file:
        told = {key: value for key, value in file.metadata().items() if key not in ("source_file", "made_by")}
    expected = {"architecture": "wan", "width": "32", "height": "32", "format_version": "1.0.1", "frame_count": "5"}
    assert told == expected


def _mark(folder, *parts):
    """Fills parts of a cache with ones and leaves what it says: those that are still so later were not made again."""
    path = folder / "cache" / "v_00000-005_0032x0032_wan.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    marked = {key: torch.ones_like(value) if key in parts else value for key, value in tensors.items()}
    save_file(marked, path, metadata)


def _kept(folder):
    short = {"latents_2x4x4_bfloat16": "latents", "latents_image_2x4x4_bfloat16": "y", "clip_bfloat16": "clip"}
    return {short[key] for key, value in cached(folder).items() if value.eq(1).all()}


def _other_clip(clip_file, folder):
    weights = {name: value * 1.5 for name, value in load_file(clip_file).items()}
    save_file(weights, folder / "other_clip.safetensors", {"num_heads": "2"})
    return str(folder / "other_clip.safetensors")


@pytest.mark.parametrize(
    ("before", "then", "kept"),
    [
        ([], ["--i2v"], {"latents"}),
        ([], ["--clip", "CLIP"], {"latents"}),
        (["--i2v"], ["--clip", "CLIP"], {"latents", "y"}),
        (["--clip", "CLIP"], ["--flf2v", "--clip", "CLIP"], {"latents"}),
        (["--flf2v", "--clip", "CLIP"], ["--i2v"], {"latents"}),
        (["--clip", "CLIP"], ["--clip", "OTHER"], {"latents", "y"}),
        (["--clip", "CLIP"], ["--clip", "CLIP"], {"latents", "y", "clip"}),
        (["--clip", "CLIP"], ["--i2v"], {"latents", "y", "clip"}),
        (["--clip", "CLIP"], [], {"latents", "y", "clip"}),
        (["--clip", "CLIP"], ["--clip", "CLIP", "--recache"], set()),
        (["--clip", "CLIP"], ["--clip", "CLIP", "--vae_dtype", "fp16"], set()),
    ],
)
def test_only_what_is_missing_or_stale_is_made(clips, tmp_path, vae_file, clip_file, before, then, kept):
    files = {"CLIP": str(clip_file), "OTHER": _other_clip(clip_file, tmp_path)}
    cache_latents(clips, vae_file, *(files.get(flag, flag) for flag in before))
    _mark(tmp_path, *cached(tmp_path))
    said = cache_latents(clips, vae_file, *(files.get(flag, flag) for flag in then))
    assert "fp16" in then or _kept(tmp_path) == kept
    added = "latents: 1 cached (of 1 only what was missing)" if kept else "latents: 1 cached"
    assert said[0] == (
        "latents: 0 cached, 1 current and skipped (--recache makes them again)" if len(kept) == 3 else added
    )


def test_nothing_is_added_to_a_cache_that_does_not_say_what_made_it(clips, tmp_path, vae_file, clip_file):
    _musubis(tmp_path)
    assert cache_latents(clips, vae_file, "--clip", str(clip_file))[0].startswith("latents: 1 cached")
    assert not cached(tmp_path)["latents_2x4x4_bfloat16"].eq(2).any()


@pytest.mark.parametrize(
    ("made", "task", "problem", "flags"),
    [
        ([], "i2v-A14B", "v was cached without latents_image", "VAE --i2v"),
        ([], "i2v-14B", "v was cached without latents_image", "VAE --i2v --clip CLIP"),
        (["--i2v"], "i2v-14B", "v was cached without CLIP tokens", "VAE --i2v --clip CLIP"),
        (["--clip"], "flf2v-14B", "v was cached with its first frame alone", "VAE --flf2v --clip CLIP"),
        (["--flf2v", "--clip"], "i2v-14B", "v was cached with its first and last frame, the", "VAE --i2v --clip CLIP"),
        (["--flf2v", "--clip"], "i2v-A14B", "v was cached with its first and last frame, the", "VAE --i2v"),
        ([], "ti2v-5B", "v was cached as latents with 16 channels of the Wan 2.1 VAE, the", "WAN_2.2_VAE"),
    ],
)
def test_caches_for_another_model_are_named_with_the_command(
    clips, tmp_path, vae_file, clip_file, made, task, problem, flags
):
    cache_text(clips, vae_file)
    cache_latents(clips, vae_file, *made, *([str(clip_file)] if "--clip" in made else []))
    message = _refused(clips, task)
    assert message.startswith(problem)
    assert message.endswith(f"Run: python wan_cache_latents.py --dataset_config {clips} --vae {flags}")


def test_another_vae_is_named_before_the_size_that_follows_from_it(tmp_path, vae_file):
    config = videos(tmp_path, {"v": 6}, target_frames=[5], resolution=[48, 48], enable_bucket=True)
    cache_text(config, vae_file)
    cache_latents(config, vae_file)
    assert "v was cached as latents with 16 channels of the Wan 2.1 VAE" in _refused(config, "ti2v-5B")
    assert "_0048x0048_" in names(tmp_path)[0]


def test_the_script_caches_what_its_flags_ask_for(clips, tmp_path, vae_file, clip_file):
    argv = ["--dataset_config", str(clips), "--vae", str(vae_file), "--device", "cpu"]
    wan_cache_latents.main([*argv, "--flf2v", "--clip", str(clip_file)])
    cache_text(clips, vae_file)
    batch = _build(clips, "flf2v-14B")[(0,)]
    assert batch["y"].shape == (1, 20, 2, 4, 4) and batch["y"][0, :4, 1, 0, 0].tolist() == [0, 0, 0, 1]
    assert batch["clip"].shape == (1, 514, 24)


def test_a_cache_of_ti2v_5b_is_refused_for_other_models(clips, vae_file, vae_2_2):
    cache_text(clips, vae_file)
    cache_latents(clips, vae_2_2)
    message = _refused(clips, "t2v-14B")
    assert "v was cached as latents with 48 channels of the Wan 2.2 VAE, the model needs 16 channels" in message


def test_257_tokens_and_a_condition_of_another_shape_are_named(clips, tmp_path, vae_file):
    cache_text(clips, vae_file)
    _musubis(tmp_path, clip_bfloat16=torch.zeros(257, 24).half())
    assert "v was cached with its first frame alone, the model is given its first and last" in _refused(
        clips, "flf2v-14B"
    )
    _musubis(tmp_path, clip_bfloat16=torch.zeros(50, 24).half())
    assert "v was cached with 50 CLIP tokens, the model reads 257" in _refused(clips, "i2v-14B")
    _musubis(tmp_path, latents_image_2x4x4_float16=torch.zeros(20, 2, 4, 4).half())
    assert "v has a damaged latent cache" in _refused(clips, "i2v-A14B")
    path = clip_latents_path(tmp_path / "cache", "v", 0, 5, (32, 32))
    tensors = {
        "latents_2x4x4_float32": torch.zeros(16, 2, 4, 4),
        "latents_image_1x4x4_float32": torch.zeros(20, 1, 4, 4),
    }
    save_file(tensors, path)
    assert "v was cached with latents_image 20x1x4x4, the model needs 20x2x4x4" in _refused(clips, "i2v-A14B")


def test_text_to_video_ignores_what_it_is_not_given(clips, vae_file, clip_file):
    cache_text(clips, vae_file)
    cache_latents(clips, vae_file, "--clip", str(clip_file))
    batch = _build(clips, "t2v-14B")[(0,)]
    assert batch["y"] is None and batch["clip"] is None


@pytest.mark.parametrize(("task", "tokens"), [("i2v-14B", 257), ("flf2v-14B", 514)])
def test_workers_send_what_is_given(clips, tmp_path, vae_file, clip_file, task, tokens):
    cache_text(clips, vae_file)
    cache_latents(clips, vae_file, *(["--flf2v"] if tokens == 514 else []), "--clip", str(clip_file))
    dataset = _build(clips, task)
    [own], [sent] = (list(make_loader(dataset, 7, 1, workers=workers)) for workers in (0, 1))
    [path] = (tmp_path / "cache").glob("*_wan.safetensors")
    assert torch.equal(own["y"][0], read_condition(path).float()) and torch.equal(
        own["clip"][0], read_clip(path).float()
    )
    assert own["clip"].shape == (1, tokens, 24) and dataset.clip_width == 24
    assert torch.equal(sent["y"], own["y"]) and torch.equal(sent["clip"], own["clip"])


def _two_datasets(folder, **settings):
    """Three pictures and a video of 6 frames."""
    pictures = json.loads(write_pictures(folder).read_text())["datasets"][0] | {"cache_directory": str(folder / "c2")}
    clips = json.loads(videos(folder, {"v": 6}, **{"target_frames": [1, 5], **settings}).read_text())["datasets"][0]
    (folder / "data.json").write_text(json.dumps({"datasets": [pictures, clips]}), encoding="utf-8")
    return folder / "data.json"


def test_items_of_one_frame_are_cached_but_left_out_with_a_count(tmp_path, vae_file):
    config = _two_datasets(tmp_path)
    cache_text(config, vae_file)
    said = cache_latents(config, vae_file, "--i2v")
    assert said[0] == "latents: 5 cached"
    assert "not trained on by image-to-video models: 4 pictures and clips of one frame" in said[1]
    [a, *_] = sorted((tmp_path / "c2").glob("a_0*"))
    assert load_file(a)["latents_image_1x4x4_bfloat16"][:4].eq(1).all()
    dataset = _build(config, "i2v-A14B")
    assert [item.frames for item in dataset.items] == [5]
    assert dataset.describe()[:2] == [
        "dataset 1: 3 pictures are left out, because the model is given that frame itself",
        "dataset 2: 1 clips (32x32x5: 1), batch size 1",
    ]
    assert dataset.describe()[2].startswith("dataset 2: 1 clips of one frame are left out")
    assert len(_build(config, "t2v-14B").items) == 5


@pytest.mark.parametrize("kind", ["pictures", "clips", "full", "gone"])
def test_items_of_one_frame_alone_are_refused(tmp_path, vae_file, kind):
    if kind in ("pictures", "gone"):
        config = write_pictures(tmp_path)
    else:
        settings = {"frame_extraction": "full"} if kind == "full" else {"target_frames": [1]}
        config = videos(tmp_path, {"v": 3}, **settings)
    cache_text(config, vae_file)
    assert cache_latents(config, vae_file, "--i2v")[-1].startswith("next: add a dataset of videos with target_frames")
    if kind == "gone":
        (tmp_path / "pics").rename(tmp_path / "elsewhere")
    assert "there are only pictures and clips of one frame, and the model is given the first frame" in _refused(
        config, "i2v-A14B"
    )


def test_pictures_without_caches_do_not_stop_image_to_video(tmp_path, vae_file):
    config = _two_datasets(tmp_path, target_frames=[5])
    cache_text(config, vae_file)
    cache_latents(config, vae_file, "--i2v")
    for path in (tmp_path / "c2").iterdir():
        path.unlink()
    assert len(_build(config, "i2v-A14B").items) == 1


def test_caches_alone_are_trained_on_and_those_for_another_model_named(clips, tmp_path, vae_file):
    cache_text(clips, vae_file)
    cache_latents(clips, vae_file, "--i2v")
    (tmp_path / "v").rename(tmp_path / "elsewhere")
    assert _build(clips, "i2v-A14B")[(0,)]["y"].shape == (1, 20, 2, 4, 4)
    message = _refused(clips, "i2v-14B")
    assert "does not exist" in message and "of its caches, v was cached without CLIP tokens" in message


def test_a_share_is_held_out_of_clips_alone(tmp_path, vae_file):
    config = videos(tmp_path, {"v": 6, "w": 7}, target_frames=[1, 5])
    table = json.loads(config.read_text()) | {"general": {"validation_split": 0.5}}
    config.write_text(json.dumps(table), encoding="utf-8")
    cache_text(config, vae_file)
    cache_latents(config, vae_file, "--i2v")
    dataset = _build(config, "i2v-A14B")
    assert [item.frames for item in (*dataset.items, *dataset.held_out)] == [5, 5]
    assert dataset.held_out[0].conditions.pictures == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--flf2v"], "--flf2v needs --clip FILE"),
        (["--clip", "nowhere.pth"], "--clip nowhere.pth does not exist"),
    ],
)
def test_flags_that_do_not_go_together_are_named(clips, tmp_path, vae_file, flags, named):
    with pytest.raises(InputError, match=named):
        cache_latents(clips, vae_file, *flags)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flag", ["--i2v", "--clip"])
def test_the_vae_of_ti2v_5b_needs_no_pictures(clips, vae_2_2, clip_file, flag):
    with pytest.raises(InputError, match=rf"{flag} is for models with the Wan 2\.1 VAE, .*Wan 2\.2 VAE \(of ti2v-5B\)"):
        cache_latents(clips, vae_2_2, flag, *([str(clip_file)] if flag == "--clip" else []))


def test_a_vae_in_place_of_clip_is_named(clips, vae_file):
    with pytest.raises(InputError, match="is not a CLIP image encoder"):
        cache_latents(clips, vae_file, "--clip", str(vae_file))


def test_caches_of_two_clips_are_said(tmp_path, vae_file, clip_file):
    config = videos(tmp_path, {"v": 6, "w": 6, "x": 6}, target_frames=[5])
    cache_text(config, vae_file)
    cache_latents(config, vae_file, "--clip", str(clip_file))
    assert not any("another CLIP" in line for line in _build(config, "i2v-14B").describe())
    (tmp_path / "cache" / "w_00000-005_0032x0032_wan.safetensors").rename(tmp_path / "kept")
    cache_latents(config, vae_file, "--clip", _other_clip(clip_file, tmp_path), "--recache")
    (tmp_path / "kept").rename(tmp_path / "cache" / "w_00000-005_0032x0032_wan.safetensors")
    line = (
        "another CLIP than the others (cache them again to make them alike): 1, w_00000-005_0032x0032_wan.safetensors"
    )
    assert any(line in said for said in _build(config, "i2v-14B").describe())
    assert not any("another CLIP" in said for said in _build(config, "i2v-A14B").describe())


def test_one_clip_is_known_in_every_precision(clip_file):
    full, half = (load_image_encoder(clip_file, dtype) for dtype in (torch.float32, torch.float16))
    assert caching._clip_identity(full) == caching._clip_identity(half)


def test_clip_tokens_that_are_not_finite_are_not_written(clips, tmp_path, vae_file, clip_file):
    weights = load_file(clip_file)
    weights["visual.cls_embedding"] = torch.full_like(weights["visual.cls_embedding"], float("nan"))
    save_file(weights, tmp_path / "nan.safetensors", {"num_heads": "2"})
    with pytest.raises(InputError, match=r"the CLIP tokens for v_.*safetensors contain NaN .* --clip may be damaged"):
        cache_latents(clips, vae_file, "--clip", str(tmp_path / "nan.safetensors"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        ([], "t2v-A14B"),
        (["--i2v"], "i2v-A14B"),
        (["--clip"], "i2v-14B"),
        (["--flf2v", "--clip"], "flf2v-14B"),
        (["2.2"], "ti2v-5B"),
    ],
)
def test_the_next_command_is_one_that_training_takes(clips, vae_file, vae_2_2, clip_file, monkeypatch, flags, task):
    vae = vae_2_2 if flags == ["2.2"] else vae_file
    flags = [flag for flag in flags if flag != "2.2"] + ([str(clip_file)] if "--clip" in flags else [])
    said = cache_latents(clips, vae, *flags)
    assert "wan_cache_text_encoder_outputs.py" in said[-1]
    after_text, after_latents = cache_text(clips, vae)[-1], cache_latents(clips, vae, *flags)[-1]
    assert after_text == after_latents
    monkeypatch.chdir(Path(__file__).parents[1])  # where users run it, beside the example's files
    argv = shlex.split(after_text.partition("wan_train_network.py ")[2])
    files = [f"--{name}={vae}" for name in ("vae", "t5")] if task == "t2v-A14B" else []  # the example's do not exist
    config = parse_train([*argv, *files])
    assert (config.task, config.dataset.path, config.samples is None) == (task, clips, task != "t2v-A14B")


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_after_the_captions_too_what_is_missing_to_train_on_is_said(tmp_path, vae_file, kind):
    config = write_pictures(tmp_path) if kind == "pictures" else videos(tmp_path, {"v": 3}, target_frames=[1])
    cache_latents(config, vae_file, "--i2v")
    assert cache_text(config, vae_file)[-1].startswith("next: add a dataset of videos with target_frames of 5 or more")
