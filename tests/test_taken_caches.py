"""Caches that are trained on as they are: musubi-tuner's of unturned and upscaled files, and those without a source."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import set_matrix, write_video

from utils.data.cache_files import clip_latents_path, image_latents_path, text_path, write_latents, write_text
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset
from wan.errors import InputError


def _cache(folder, stem, path, bucket, frames=None):
    (folder / "cache").mkdir(exist_ok=True)
    shape = (16, ((frames or 1) - 1) // 4 + 1, bucket[1] // 8, bucket[0] // 8)
    write_latents(path, torch.zeros(shape), bucket, frames)
    write_text(text_path(folder / "cache", stem), torch.zeros(3, 8), stem)


def _image_cache(folder, stem, size, bucket):
    _cache(folder, stem, image_latents_path(folder / "cache", stem, size), bucket)


def _clip_cache(folder, stem, bucket, frames=5):
    _cache(folder, stem, clip_latents_path(folder / "cache", stem, 0, frames, bucket), bucket, frames)


def _picture(folder, stem, orientation=1):
    (folder / "p").mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (96, 32)).save(folder / "p" / f"{stem}.jpg", exif=exif)
    (folder / "p" / f"{stem}.txt").write_text(stem, encoding="utf-8")


def _video(folder, size=(96, 32)):
    (folder / "p").mkdir(exist_ok=True)
    path = folder / "p" / "a.mov"
    write_video(path, [np.zeros((size[1], size[0], 3), np.uint8)] * 5, "rgb24", "png")
    (folder / "p" / "a.txt").write_text("a", encoding="utf-8")
    return path


def _build(folder, kind="image", **settings):
    table = {
        f"{kind}_directory": str(folder / "p"),
        "cache_directory": str(folder / "cache"),
        "caption_extension": ".txt",
        "resolution": [64, 64],
        "enable_bucket": True,
        **({"target_frames": [5]} if kind == "video" else {}),
        **settings,
    }
    (folder / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return build_training_dataset(read_dataset_config(folder / "data.json"))


def test_buckets_follow_the_turned_size(tmp_path):
    _picture(tmp_path, "a", 6)
    _image_cache(tmp_path, "a", (32, 96), (32, 128))
    assert [item.bucket for item in _build(tmp_path).items] == [(32, 128)]


def test_caches_of_unturned_pictures_are_taken_and_said(tmp_path):
    _picture(tmp_path, "a", 6)
    _picture(tmp_path, "b", 1)
    _image_cache(tmp_path, "a", (96, 32), (128, 32))
    _image_cache(tmp_path, "b", (96, 32), (128, 32))
    dataset = _build(tmp_path)
    assert [item.bucket for item in dataset.items] == [(128, 32), (128, 32)]
    assert "lying on their sides (cache them again to turn them): 1, a.jpg" in dataset.describe()[1]


def test_caches_of_a_picture_of_the_other_shape_are_not_taken(tmp_path):
    _picture(tmp_path, "a", 1)
    _image_cache(tmp_path, "a", (32, 96), (32, 128))
    with pytest.raises(InputError, match=r"a\.jpg is 96x32, but was 32x96 when it was cached"):
        _build(tmp_path)


@pytest.mark.parametrize("settings", [{"enable_bucket": False}, {"bucket_no_upscale": True}])
def test_musubis_buckets_of_videos_are_taken_and_said(tmp_path, settings):
    _video(tmp_path)
    _clip_cache(tmp_path, "a", (128, 32))
    dataset = _build(tmp_path, "video", **settings)
    assert [item.bucket for item in dataset.items] == [(128, 32)]
    assert "another size than this dataset file asks for, as musubi-tuner does it: 1, a.mov" in dataset.describe()[1]


def test_musubis_clips_of_a_turned_video_are_taken(tmp_path):
    set_matrix(_video(tmp_path), 0, 1, -1, 0)
    _clip_cache(tmp_path, "a", (128, 32))
    assert [item.bucket for item in _build(tmp_path, "video").items] == [(128, 32)]


def test_clips_of_any_other_size_are_refused(tmp_path):
    _video(tmp_path)
    _clip_cache(tmp_path, "a", (96, 32))
    with pytest.raises(InputError, match=r"a\.mov was cached at 96x32, the dataset file now asks for 128x32"):
        _build(tmp_path, "video")


def test_pictures_that_are_gone_are_trained_on_by_their_caches(tmp_path):
    _image_cache(tmp_path, "a", (96, 32), (128, 32))
    _image_cache(tmp_path, "b", (64, 64), (64, 64))
    _image_cache(tmp_path, "c", (64, 64), (64, 64))
    text_path(tmp_path / "cache", "c").unlink()
    dataset = _build(tmp_path)
    assert [(item.name, item.bucket, item.caption) for item in dataset.items] == [
        ("a", (128, 32), "a"),
        ("b", (64, 64), "b"),
    ]
    assert "does not exist" in dataset.describe()[1] and "its cache folder holds" in dataset.describe()[1]
    assert dataset.describe()[2].endswith("without a text cache, left out: 1, c_0064x0064_wan.safetensors")


def test_videos_that_are_gone_are_trained_on_by_the_clips_asked_for(tmp_path):
    (tmp_path / "p").mkdir()
    _clip_cache(tmp_path, "a", (64, 64), 5)
    _clip_cache(tmp_path, "a", (64, 64), 9)
    assert [item.frames for item in _build(tmp_path, "video").items] == [5]


def test_a_list_whose_files_are_all_gone_is_trained_on_by_its_caches(tmp_path):
    line = json.dumps({"image_path": str(tmp_path / "gone.png"), "caption": "a"})
    (tmp_path / "l.jsonl").write_text(line, encoding="utf-8")
    _image_cache(tmp_path, "gone", (64, 64), (64, 64))
    table = {
        "image_directory": None,
        "image_jsonl_file": str(tmp_path / "l.jsonl"),
        "cache_directory": str(tmp_path / "cache"),
    }
    table = {key: value for key, value in table.items() if value} | {"resolution": [64, 64]}
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    assert len(build_training_dataset(read_dataset_config(tmp_path / "data.json")).items) == 1


def test_without_pictures_and_caches_there_is_nothing_to_train_on(tmp_path):
    with pytest.raises(InputError, match="p does not exist"):
        _build(tmp_path)


def test_caches_of_a_recursive_dataset_lie_in_its_subfolders(tmp_path):
    for folder in ("", "x"):
        _picture(tmp_path, "a")
        (tmp_path / "p" / folder).mkdir(exist_ok=True)
        shutil.copy(tmp_path / "p" / "a.jpg", tmp_path / "p" / folder / "b.jpg")
        (tmp_path / "p" / folder / "b.txt").write_text(f"{folder}/b" if folder else "b", encoding="utf-8")
    for stem in ("a", "b", "x/b"):
        _image_cache(tmp_path, stem, (96, 32), (128, 32))
    dataset = _build(tmp_path, recursive=True)
    assert [item.caption for item in dataset.items] == ["a", "b", "x/b"]
    assert (tmp_path / "cache" / "x" / "b_wan_te.safetensors").is_file()
