"""The training dataset: batches, loaders, and caches that are missing or stale."""

import json
import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from utils.data.cache_files import clip_latents_path, image_latents_path, text_path, write_latents, write_text
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset, make_loader
from wan.errors import InputError

LATENTS = {"a": (40, 32), "b": (32, 32), "c": (64, 64), "d": (16, 64), "e": (16, 64)}


@pytest.fixture
def pictures(tmp_path):
    """Five captioned pictures with caches at 32x32, or 16x64 in buckets, and the file of their dataset."""
    (tmp_path / "pics").mkdir()
    for number, (stem, size) in enumerate(LATENTS.items()):
        Image.new("RGB", size).save(tmp_path / "pics" / f"{stem}.png")
        (tmp_path / "pics" / f"{stem}.txt").write_text(f"picture {stem}", encoding="utf-8")
        shape = (16, 1, 8, 2) if size == (16, 64) else (16, 1, 4, 4)
        _write_item(tmp_path, stem, image_latents_path(tmp_path / "cache", stem, size), shape, size, number)
    return _write_config(tmp_path)


def _write_item(folder, stem, path, shape, size, value, frames=None):
    (folder / "cache").mkdir(exist_ok=True)
    write_latents(path, torch.full(shape, float(value)).bfloat16(), size, frames)
    caption = f"picture {stem}"
    write_text(text_path(folder / "cache", stem), torch.full((value + 1, 8), float(value)).bfloat16(), caption)


def _write_config(folder, **settings):
    table = {
        "image_directory": str(folder / "pics"),
        "cache_directory": str(folder / "cache"),
        "caption_extension": ".txt",
        "resolution": [32, 32],
        "enable_bucket": True,
        **settings,
    }
    (folder / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return folder / "data.json"


def _build(config):
    return build_training_dataset(read_dataset_config(config))


def _refused(config):
    with pytest.raises(InputError) as error:
        _build(config)
    return str(error.value)


def test_a_batch_holds_latents_tokens_and_names(pictures):
    dataset = _build(pictures)
    batch = dataset[(0, 2)]
    assert batch["latents"].shape == (2, 16, 1, 4, 4)
    assert batch["latents"].dtype == torch.float32
    assert batch["latents"][:, 0, 0, 0, 0].tolist() == [0.0, 2.0]
    assert [tuple(tokens.shape) for tokens in batch["t5"]] == [(1, 8), (3, 8)]
    assert batch["names"] == ["a.png", "c.png"]
    assert (dataset.text_width, dataset.longest_text) == (8, 5)


def test_an_epoch_has_each_item_num_repeats_times_in_batches_of_one_size(pictures, tmp_path):
    dataset = _build(_write_config(tmp_path, num_repeats=3, batch_size=2))
    assert dataset.shown_captions == [item.caption for item in dataset.items for _ in range(3)]
    batches = dataset.epoch_batches(7, 1)
    # Each of the 5 items has an entry for each of 3 times.
    assert sorted(entry for batch in batches for entry in batch) == list(range(15))
    # 9 squares make 4 pairs and a single one, 6 tall pictures 3 pairs.
    assert sorted(map(len, batches)) == [1, 2, 2, 2, 2, 2, 2, 2]
    for batch in batches:
        assert len({dataset.items[entry % 5].bucket for entry in batch}) == 1


def test_order_depends_on_seed_and_epoch_alone(pictures, tmp_path):
    dataset = _build(_write_config(tmp_path, num_repeats=4))
    expected = dataset.epoch_batches(7, 1)
    torch.manual_seed(99)
    assert _build(pictures).epoch_batches(7, 1) == expected
    assert dataset.epoch_batches(7, 2) != expected
    assert dataset.epoch_batches(8, 1) != expected


def test_batches_of_different_sizes_are_mixed(pictures, tmp_path):
    dataset = _build(_write_config(tmp_path, num_repeats=8))
    sizes = [dataset.items[batch[0] % 5].bucket for batch in dataset.epoch_batches(7, 1)]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))


def test_building_and_loading_leave_the_global_random_numbers_alone(pictures):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(make_loader(_build(pictures), 7, 1))
    assert torch.equal(torch.rand(3), expected)


def test_a_loader_that_skips_goes_on_as_the_whole_epoch_does(pictures):
    dataset = _build(pictures)
    whole = [batch["names"] for batch in make_loader(dataset, 7, 3)]
    assert [batch["names"] for batch in make_loader(dataset, 7, 3, skip=2)] == whole[2:]
    assert len(whole) == len(make_loader(dataset, 7, 3)) == 5


def test_processes_share_an_epoch_evenly(pictures):
    dataset = _build(pictures)
    every = [name for batch in make_loader(dataset, 7, 1) for name in batch["names"]]
    ranks = [[b["names"][0] for b in make_loader(dataset, 7, 1, rank=rank, world=3)] for rank in range(3)]
    assert ranks == [[every[0], every[3]], [every[1], every[4]], [every[2], every[0]]]
    assert [len(make_loader(dataset, 7, 1, rank=rank, world=12)) for rank in range(12)] == [1] * 12


def test_persistent_workers_go_over_the_epochs(pictures):
    dataset = _build(pictures)
    loader = make_loader(dataset, 7, 1, workers=2, persistent=True)
    for epoch, skip in ((1, 0), (2, 0), (3, 2)):
        loader.sampler.set_epoch(epoch, skip)
        expected = [batch["names"] for batch in make_loader(dataset, 7, epoch, skip)]
        assert [batch["names"] for batch in loader] == expected


def test_dataset_and_sampler_pickle_as_spawned_workers_need(pictures):
    dataset, sampler = pickle.loads(pickle.dumps((_build(pictures), make_loader(_build(pictures), 7, 1).sampler)))
    assert [dataset[batch]["names"] for batch in sampler] == [b["names"] for b in make_loader(_build(pictures), 7, 1)]


def test_description_tells_sizes_and_what_is_left_out(pictures, tmp_path):
    (tmp_path / "pics" / "b.txt").unlink()
    lines = _build(_write_config(tmp_path, batch_size=2, num_repeats=3)).describe()[:2]
    assert lines == [
        "dataset 1: 4 pictures (16x64x1: 2, 32x32x1: 2), batch size 2, 3 times an epoch",
        "dataset 1: 1 files without a caption are left out: b.png",
    ]


def test_missing_caches_are_named_with_both_commands(pictures, tmp_path):
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    message = _refused(pictures)
    assert message.startswith(
        "a.png has no latent cache (also b.png, c.png, d.png and 1 more); a.png has no text cache (also b.png, c.png"
    )
    assert f"python wan_cache_latents.py --dataset_config {pictures} --vae VAE" in message
    assert f"python wan_cache_text_encoder_outputs.py --dataset_config {pictures} --t5 T5" in message


def test_only_the_command_that_is_needed_is_named(pictures, tmp_path):
    text_path(tmp_path / "cache", "b").unlink()
    assert "wan_cache_latents" not in _refused(pictures)
    assert "b.png has no text cache. Run: python wan_cache_text" in _refused(pictures)


def test_a_changed_resolution_is_noticed(pictures, tmp_path):
    message = _refused(_write_config(tmp_path, resolution=[64, 64]))
    assert "a.png was cached as latents 16x1x4x4, the dataset file now asks for 16x1x8x8" in message


def test_a_changed_caption_is_noticed(pictures, tmp_path):
    (tmp_path / "pics" / "c.txt").write_text("another", encoding="utf-8")
    assert "c.png has another caption than its text cache" in _refused(pictures)


def test_a_picture_of_another_size_is_noticed(pictures, tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "pics" / "a.png")
    assert "a.png is 48x32, but was 40x32 when it was cached" in _refused(pictures)


def test_a_picture_changed_after_caching_is_noticed(pictures, tmp_path):
    cache = image_latents_path(tmp_path / "cache", "a", (40, 32))
    later = cache.stat().st_mtime_ns + 1
    os.utime(tmp_path / "pics" / "a.png", ns=(later, later))
    assert "a.png is newer than its latent cache" in _refused(pictures)


def test_caches_that_tell_nothing_but_their_tensors_are_trusted(pictures, tmp_path):
    cache = tmp_path / "cache"
    save_file({"latents_1x4x4_float16": torch.ones(16, 1, 4, 4).half()}, image_latents_path(cache, "a", (40, 32)))
    save_file({"varlen_t5_float32": torch.ones(2, 8)}, text_path(cache, "a"))
    assert _build(pictures)[(0,)]["latents"].unique().tolist() == [1.0]


def test_text_of_two_encoders_is_refused(pictures, tmp_path):
    write_text(text_path(tmp_path / "cache", "a"), torch.ones(2, 16), "picture a")
    assert "their widths are [8, 16]" in _refused(pictures)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.write_bytes(b"damaged"), "is not a readable cache file"),
        (lambda path: save_file({"varlen_t5_uint16": torch.ones(2, 8).to(torch.uint16)}, path), "holds text as U16"),
        (lambda path: save_file({"varlen_t5_float32": torch.ones(0, 8)}, path), "shape [0, 8]"),
    ],
)
def test_a_damaged_cache_is_named_with_the_command_that_replaces_it(pictures, tmp_path, spoil, named):
    spoil(text_path(tmp_path / "cache", "b"))
    message = _refused(pictures)
    assert message.startswith(f"b.png has a damaged text cache ({tmp_path}") and named in message
    assert "Run: python wan_cache_text_encoder_outputs.py" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_breaks_during_a_run_is_one_line_with_its_name(pictures, tmp_path, workers):
    loader = make_loader(_build(pictures), 7, 1, workers=workers)
    write_text(text_path(tmp_path / "cache", "b"), torch.full((2, 8), torch.nan), "picture b")
    with pytest.raises(InputError, match=r"b_wan_te\.safetensors holds NaN or infinity") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_workers_send_the_same_batches_and_none_through_shared_memory(pictures):
    dataset = _build(pictures)
    for batch, own in zip(make_loader(dataset, 7, 1, workers=1), make_loader(dataset, 7, 1), strict=True):
        assert torch.equal(batch["latents"], own["latents"]) and not batch["latents"].is_shared()
        assert [text.dtype for text in batch["t5"]] == [torch.bfloat16] and not batch["t5"][0].is_shared()
        assert torch.equal(batch["t5"][0], own["t5"][0]) and batch["entries"] == own["entries"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_without_shared_memory_batches_are_read_without_workers_and_a_line_says_so(pictures, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", fail)
    lines = []
    loader = make_loader(_build(pictures), 7, 1, workers=2, persistent=True, say=lines.append)
    assert len(list(loader)) == 5
    assert lines == [f"note: shared memory cannot be used ({error}), so batches are read without data-loader workers"]


def test_an_epoch_of_absurdly_many_items_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.dataset._MOST_ENTRIES", 4_999_999)
    message = _refused(_write_config(tmp_path, num_repeats=1_000_000))
    assert "an epoch would show 5,000,000 items, more than 4,999,999: lower num_repeats" in message


def test_a_cache_folder_that_is_a_file_is_named(pictures, tmp_path):
    (tmp_path / "file").touch()
    message = _refused(_write_config(tmp_path, cache_directory=str(tmp_path / "file")))
    assert message == f"cache_directory {tmp_path / 'file'} is not a folder"


@pytest.fixture
def clips(tmp_path):
    """One video of 12 frames, a folder of pictures, without caches; returns what writes its dataset's file."""
    (tmp_path / "v").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32)).save(tmp_path / "v" / f"{number:03d}.png")
    line = json.dumps({"video_path": str(tmp_path / "v"), "caption": "picture v"})
    (tmp_path / "clips.jsonl").write_text(line, encoding="utf-8")

    def write(**settings):
        table = {"video_jsonl_file": str(tmp_path / "clips.jsonl"), "cache_directory": str(tmp_path / "cache")}
        table |= {"resolution": [32, 32], "frame_extraction": "slide", "target_frames": [5], "frame_stride": 4}
        (tmp_path / "data.json").write_text(json.dumps({"datasets": [table | settings]}), encoding="utf-8")
        return tmp_path / "data.json"

    return write


def _cache_clips(folder, windows, size=(32, 32)):
    for start, frames in windows:
        path = clip_latents_path(folder / "cache", "v", start, frames, size)
        shape = (16, (frames - 1) // 4 + 1, size[1] // 8, size[0] // 8)
        _write_item(folder, "v", path, shape, size, start, frames)


def test_every_clip_of_a_video_is_an_item(clips, tmp_path):
    _cache_clips(tmp_path, [(0, 5), (4, 5)])
    dataset = _build(clips())
    assert [(item.name, item.frames) for item in dataset.items] == [("v", 5), ("v", 5)]
    assert dataset[(0, 1)]["latents"].shape == (2, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"resolution": [48, 32]}, "v was cached at 32x32, the dataset file now asks for 48x32"),
        ({"frame_stride": 2}, "v was cached with other target_frames or another frame_extraction"),
        ({"target_frames": [5, 9]}, "v was cached with other target_frames"),
        ({"frame_extraction": "full"}, "v was cached with other target_frames"),
        ({"frame_extraction": "uniform", "frame_sample": 3}, "v was cached with other target_frames"),
    ],
)
def test_changed_settings_of_a_video_are_noticed(clips, tmp_path, settings, named):
    _cache_clips(tmp_path, [(0, 5), (4, 5)])
    message = _refused(clips(**settings))
    assert named in message
    assert "Run: python wan_cache_latents.py" in message


def test_a_target_longer_than_the_video_is_no_missing_cache(clips, tmp_path):
    _cache_clips(tmp_path, [(0, 5), (4, 5)])
    assert len(_build(clips(target_frames=[5, 13])).items) == 2


def test_clips_kept_from_other_settings_are_not_trained_on(clips, tmp_path):
    _cache_clips(tmp_path, [(0, 5), (4, 5), (0, 1), (0, 9)])
    _cache_clips(tmp_path, [(0, 5)], size=(64, 64))
    assert [item.frames for item in _build(clips()).items] == [5, 5]


def test_a_video_without_caches_is_named_but_one_too_short_is_left_out(clips, tmp_path):
    assert "v has no latent cache" in _refused(clips())
    assert "no video is as long as" in _refused(clips(target_frames=[13]))
