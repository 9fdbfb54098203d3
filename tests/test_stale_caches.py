"""A cache is made again exactly when its source, or what decides its values, is not what it was."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from caching_jobs import FakeEncoder, cache_latents, cache_text, names, videos, write_config, write_pictures, write_vae
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils import caching
from utils.data import clips, origins
from utils.data.cache_files import is_cache, latents_origin, write_latents
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset
from wan.errors import InputError

LONG_AGO = (1_000_000_000, 1_000_000_000)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "vae_wan21")


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the slowest part of such small jobs
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())


@pytest.fixture
def cached(tmp_path, vae_file):
    """A dataset of three pictures, older than their caches, and its file."""
    config = write_pictures(tmp_path)
    for path in (tmp_path / "pics").iterdir():
        os.utime(path, LONG_AGO)
    cache_latents(config, vae_file)
    cache_text(config, vae_file)
    return config


def _said(lines):
    return next(line for line in lines if line.startswith(("latents:", "captions:")))


def _stale(config, vae_file, *flags):
    """What the next caching job makes again."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "write_latents", lambda path, *rest: written.append(path.name[0]))
        cache_latents(config, vae_file, "--keep_cache", *flags)
    return "".join(sorted(written))


def _untold(path):
    """Turns a cache into one that does not say what it was made of, such as musubi-tuner's."""
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("source_file", "made_by")}
    save_file({key: value.clone() for key, value in load_file(path).items()}, path, metadata)


def _replace(path, shift=1):
    """Other pixels in a file of the same size and the same old times."""
    size = path.stat().st_size
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels + np.uint8(shift)).save(path)
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    os.utime(path, LONG_AGO)


def test_a_replaced_picture_is_noticed_though_its_times_are_older(cached, tmp_path, vae_file):
    _replace(tmp_path / "pics" / "b.png")
    with pytest.raises(InputError, match=r"b\.png has changed since it was cached\. Run: python wan_cache_latents\.py"):
        build_training_dataset(read_dataset_config(cached))
    assert _stale(cached, vae_file) == "b"


def test_renumbered_pictures_are_noticed(tmp_path, vae_file):
    config = write_pictures(tmp_path)
    pics = tmp_path / "pics"
    for name in "bc":
        Image.new("RGB", (32, 32), (name == "b" and "red") or "blue").save(pics / f"{name}.png")
    cache_latents(config, vae_file)
    (pics / "b.png").rename(pics / "x.png")
    (pics / "c.png").rename(pics / "b.png")
    (pics / "x.png").rename(pics / "c.png")
    assert _stale(config, vae_file) == "bc"


def test_copied_and_touched_pictures_are_current(cached, tmp_path, vae_file):
    for path in (tmp_path / "pics").glob("*.png"):
        shutil.copy(path, tmp_path / "copy.png")
        (tmp_path / "copy.png").replace(path)
    os.utime(tmp_path / "pics" / "a.png")
    assert _stale(cached, vae_file) == ""
    assert len(build_training_dataset(read_dataset_config(cached)).items) == 3


def test_a_picture_is_read_only_if_its_size_or_times_differ(cached, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(origins, "content_hash", lambda path: read.append(path.name))
    build_training_dataset(read_dataset_config(cached))
    assert read == []
    os.utime(tmp_path / "pics" / "a.png")
    with pytest.raises(InputError):
        build_training_dataset(read_dataset_config(cached))
    assert read == ["a.png"]


@pytest.mark.parametrize("change", ["vae", "vae_dtype", "pixel_rules", "bucket", "recache"])
def test_what_decides_the_values_makes_caches_stale(cached, tmp_path, vae_file, monkeypatch, change):
    flags = ["--vae_dtype", "float32"] if change == "vae_dtype" else ["--recache"] if change == "recache" else []
    if change == "vae":
        weights = load_file(vae_file)
        vae_file = tmp_path / "other.safetensors"
        save_file({name: value * 1.5 for name, value in weights.items()}, vae_file)
    if change == "pixel_rules":
        monkeypatch.setattr(origins, "PIXEL_RULES", "other")
    if change == "bucket":
        write_config(tmp_path, **json.loads(cached.read_text())["datasets"][0] | {"resolution": [48, 32]})
    assert _stale(cached, vae_file, *flags) == "abc"


def test_another_decoder_or_name_of_the_vae_leaves_caches_current(cached, tmp_path, vae_file):
    weights = {n: v * 2 if n.startswith("decoder.") else v for n, v in load_file(vae_file).items()}
    save_file(weights, tmp_path / "renamed.safetensors")
    assert _stale(cached, tmp_path / "renamed.safetensors") == ""


def test_another_background_matters_to_transparent_pictures_only(cached, tmp_path, vae_file):
    Image.new("RGBA", (32, 32), (9, 9, 9, 9)).save(tmp_path / "pics" / "a.png")
    cache_latents(cached, vae_file)
    write_config(tmp_path, **json.loads(cached.read_text())["datasets"][0], background="black")
    with pytest.raises(InputError, match=r"a\.png was cached on the background white, the dataset file now says black"):
        build_training_dataset(read_dataset_config(cached))
    assert _stale(cached, vae_file) == "a"


def test_another_text_encoder_makes_text_caches_stale(cached, vae_file, monkeypatch):
    assert _said(cache_text(cached, vae_file)).startswith("captions: 0 cached, 3 current")
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder(seed=1))
    assert _said(cache_text(cached, vae_file)) == "captions: 3 cached"


def test_caches_of_other_programs_fall_back_to_times_and_one_line_counts_them(cached, tmp_path, vae_file):
    for path in (tmp_path / "cache").glob("[ab]_0*"):
        _untold(path)
    _replace(tmp_path / "pics" / "a.png")
    line = "that do not say what they were made of, so that only times were compared: 2, a_0032x0032_wan.safetensors"
    assert [line in said for said in cache_latents(cached, vae_file)] == [False, True, False]
    assert [line in said for said in build_training_dataset(read_dataset_config(cached)).describe()] == [False, True]
    assert _stale(cached, vae_file) == ""
    os.utime(tmp_path / "pics" / "a.png", (4_000_000_000, 4_000_000_000))
    assert _stale(cached, vae_file) == "a"


def _save_odd(path, kind):
    exif = Image.Exif()
    exif[274] = 3
    if kind == "grey16":
        Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)
    else:
        mode = {"transparent": "RGBA", "turned": "RGB"}[kind]
        Image.new(mode, (32, 32)).save(path, **({"exif": exif} if kind == "turned" else {}))
    os.utime(path, LONG_AGO)


@pytest.mark.parametrize("kind", ["turned", "transparent", "grey16"])
def test_older_caches_of_what_was_read_differently_are_made_again(cached, tmp_path, vae_file, kind):
    _save_odd(tmp_path / "pics" / "a.png", kind)
    for path in (tmp_path / "cache").glob("*x*"):
        _untold(path)
    lines = build_training_dataset(read_dataset_config(cached)).describe()
    assert lines[2].endswith("(cache them again to be sure): 1, a.png")
    assert _stale(cached, vae_file) == "a"


def test_a_file_that_only_has_the_name_of_a_cache_stays(cached, tmp_path, vae_file):
    lora, notes = (tmp_path / "cache" / f"{name}_0032x0032_wan.safetensors" for name in ("lora", "notes"))
    save_file({"lora_up.weight": torch.ones(2, 2)}, lora, {"architecture": "wan"})
    notes.write_text("mine", encoding="utf-8")
    write_latents(tmp_path / "cache" / "gone_0032x0032_wan.safetensors", torch.zeros(16, 1, 4, 4), (32, 32))
    said = cache_latents(cached, vae_file)
    assert not (tmp_path / "cache" / "gone_0032x0032_wan.safetensors").exists() and lora.exists() and notes.exists()
    assert said[1] == f"left alone, because only their names are those of caches: 2, {lora.name}, {notes.name}"


def test_a_file_that_is_not_a_cache_is_not_overwritten(cached, tmp_path, vae_file):
    lora = tmp_path / "cache" / "a_0032x0032_wan.safetensors"
    save_file({"lora_up.weight": torch.ones(2, 2)}, lora)
    with pytest.raises(InputError, match=r"a_0032x0032_wan\.safetensors has the name of a cache file but is not one"):
        cache_latents(cached, vae_file)
    assert not is_cache(lora) and "lora_up.weight" in load_file(lora)


def test_a_video_whose_clips_are_current_is_not_decoded(tmp_path, vae_file, monkeypatch):
    config = videos(tmp_path, {"v": 11}, target_frames=[5], frame_extraction="chunk")
    cache_latents(config, vae_file)
    with monkeypatch.context() as patch:
        patch.setattr(clips, "read_video", None)
        assert cache_latents(config, vae_file)[0].startswith("latents: 0 cached, 2 current and skipped")
    shutil.copy(tmp_path / "v" / "003.png", tmp_path / "v" / "010.png")
    assert _stale(config, vae_file) == "vv"


def test_a_clip_says_its_window_and_rate(tmp_path, vae_file):
    config = videos(tmp_path, {"v": 9}, target_frames=[5], frame_extraction="chunk", source_fps=16.0)
    cache_latents(config, vae_file)
    made_by = latents_origin(tmp_path / "cache" / names(tmp_path)[0]).made_by
    assert (made_by["frames"], made_by["source_fps"], made_by["bucket"]) == ("0 to 4", "16", "32x32")
    videos_table = json.loads(config.read_text())["datasets"][0] | {"source_fps": 15.0}
    write_config(tmp_path, **videos_table)
    assert _stale(config, vae_file) == "v"


def test_the_hash_of_a_long_video_sees_its_size_head_and_tail(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "_WHOLE", 100)
    monkeypatch.setattr(origins, "_PIECE", 4)
    data = bytes(range(200))
    found = set()
    for content in (data, b"x" + data[1:], data[:-1] + b"x", data + b"x"):
        (tmp_path / "a.mp4").write_bytes(content)
        found.add(origins.content_hash(tmp_path / "a.mp4"))
    assert len(found) == 4


def test_a_summary_counts_cut_captions_and_names_the_next_command(cached, tmp_path, vae_file):
    (tmp_path / "pics" / "a.txt").write_text("long " * 20, encoding="utf-8")
    said = cache_text(cached, vae_file)
    assert said[:2] == [
        "captions: 1 cached, 2 current and skipped (--recache makes them again)",
        "captions cut at the 30 tokens that the text encoder reads: 1, a.png; the longest has 100 tokens",
    ]
    assert said[2].startswith("next: accelerate launch ") and said[2].endswith(f" --dataset_config {cached}")
    for path in (tmp_path / "cache").glob("*_te.*"):
        path.unlink()
    said = cache_latents(cached, vae_file)
    assert said[-1] == f"next: python wan_cache_text_encoder_outputs.py --dataset_config {cached} --t5 T5"


def test_recache_and_skip_existing_contradict_each_other(cached, vae_file):
    with pytest.raises(InputError, match="--recache makes every cache again and --skip_existing none"):
        cache_latents(cached, vae_file, "--recache", "--skip_existing")
