"""The dataset file: what it accepts, what it falls back to, and which mistakes it names."""

import json
from pathlib import Path

import pytest

from utils.data.config import read_dataset_config
from utils.data.sources import ImageDataset, VideoDataset
from wan.errors import InputError

IMAGES = '[[datasets]]\nimage_directory = "pics"\ncaption_extension = ".txt"\n'
VIDEOS = '[[datasets]]\nvideo_directory = "clips"\ncaption_extension = ".txt"\n'
EXAMPLE = Path(__file__).parents[1] / "hunyuan_dataset.toml"


def _read(folder: Path, text: str, name: str = "data.toml"):
    (folder / name).write_text(text, encoding="utf-8")
    return read_dataset_config(folder / name)


def test_defaults_are_those_of_musubi_tuner(tmp_path):
    images, videos = _read(tmp_path, IMAGES + VIDEOS).datasets
    assert images == ImageDataset(Path("pics"), image_directory=Path("pics"), caption_extension=".txt")
    assert (images.resolution, images.batch_size, images.num_repeats) == ((960, 544), 1, 1)
    assert not images.enable_bucket
    assert videos == VideoDataset(Path("clips"), video_directory=Path("clips"), caption_extension=".txt")
    assert (videos.target_frames, videos.frame_extraction, videos.max_frames) == ((1,), "head", 129)


def test_dataset_overrides_general_overrides_default(tmp_path):
    general = '[general]\nresolution = 256\nbatch_size = 3\ncaption_extension = ".cap"\n'
    [dataset] = _read(tmp_path, general + IMAGES + "batch_size = 2\n").datasets
    assert (dataset.resolution, dataset.batch_size, dataset.caption_extension) == ((256, 256), 2, ".txt")
    assert dataset.num_repeats == 1


def test_json_reads_like_toml(tmp_path):
    tables = {"datasets": [{"image_directory": "pics", "caption_extension": ".txt", "resolution": [64, 32]}]}
    from_json = _read(tmp_path, json.dumps(tables), "data.json").datasets
    assert from_json == _read(tmp_path, IMAGES + "resolution = [64, 32]\n").datasets


def test_whole_and_fractional_source_fps_are_equal(tmp_path):
    assert (
        _read(tmp_path, VIDEOS + "source_fps = 30").datasets == _read(tmp_path, VIDEOS + "source_fps = 30.0").datasets
    )


def test_target_frames_are_sorted_without_doubles(tmp_path):
    [dataset] = _read(tmp_path, VIDEOS + "target_frames = [25, 1, 25]").datasets
    assert dataset.target_frames == (1, 25)


def test_windows_paths_are_kept(tmp_path):
    text = '[[datasets]]\nimage_jsonl_file = "C:/train/a.jsonl"\ncache_directory = "C:/train/cache"\n'
    assert _read(tmp_path, text).datasets[0].cache_directory == Path("C:/train/cache")


def test_example_file_is_valid_also_with_its_commented_lines(tmp_path):
    assert len(read_dataset_config(EXAMPLE).datasets) == 1
    keys = ("[[", "image_", "video_", "cache_", "resolution", "source_", "target_", "frame_", "max_", "num_")
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(line for line in lines if line.startswith((*keys, "[general]", "caption_", "batch", "enable")))
    assert [type(dataset) for dataset in _read(tmp_path, text).datasets] == [ImageDataset, ImageDataset, VideoDataset]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no [[datasets]]"),
        ("[other]\n" + IMAGES, "unknown other"),
        (IMAGES + "batchsize = 2", "unknown key batchsize (did you mean batch_size?); allowed here: alpha_mask"),
        (IMAGES + "target_frames = [1]", "target_frames belongs in video datasets"),
        ('[general]\ncache_directory = "x"\n' + IMAGES, "cache_directory belongs in [[datasets]] tables"),
        (IMAGES + 'control_directory = "x"', "control_directory is not supported"),
        (IMAGES + "fp_latent_window_size = 9", "fp_latent_window_size is not supported: it is for FramePack"),
        (IMAGES + "multiple_target = true", "multiple_target is not supported"),
        (IMAGES + "batch_size = 0", "batch_size must be a whole number from 1 to 1000000, not 0"),
        (IMAGES + "batch_size = true", "batch_size must be a whole number"),
        (IMAGES + 'enable_bucket = "yes"', "enable_bucket must be true or false, not 'yes'"),
        (IMAGES + "resolution = [500, 512]", "instead of 500 use 496 or 512"),
        (IMAGES + "resolution = [512.0, 512]", "resolution must be one whole number or [width, height]"),
        (VIDEOS + "target_frames = [24]", "instead of 24 use 21 or 25"),
        (VIDEOS + 'frame_extraction = "tail"', "must be one of head, chunk, slide, uniform, full, not 'tail'"),
        (VIDEOS + "source_fps = 0", "source_fps must be a number above 0"),
        ('[[datasets]]\ncaption_extension = ".txt"', "it has none"),
        (IMAGES + 'image_jsonl_file = "a.jsonl"', "it has two"),
        ('[[datasets]]\nimage_directory = "pics"', "image_directory needs caption_extension"),
        ('[[datasets]]\nimage_jsonl_file = "a.jsonl"', "image_jsonl_file needs cache_directory"),
        (IMAGES + IMAGES, "datasets 1 and 2 share the cache folder"),
        (IMAGES + "resolution = [1000000, 1000000]\nenable_bucket = true", "1 frames at 1000000x1000000 take 12.0 TB"),
        (VIDEOS + "resolution = 16384\ntarget_frames = [100001]", "take 322.1 TB before they are encoded, and this"),
        (IMAGES + "num_repeats = 1000001", "num_repeats must be a whole number from 1 to 1000000, not 1000001"),
        (IMAGES + f"batch_size = 0x{'f' * 5000}", "batch_size must be a whole number"),
        (IMAGES + "resolution = 9" + "0" * 4000, "resolution must be one whole number"),
        (IMAGES + f"resolution = {'[' * 90}{']' * 90}", "resolution must be one whole number"),
        (VIDEOS + "source_fps = inf", "source_fps must be a number above 0"),
        (VIDEOS + "source_fps = nan", "source_fps must be a number above 0"),
        (VIDEOS + "frame_extraction = []", "frame_extraction must be one of"),
        (IMAGES.replace("pics", "a\\u0000b"), "image_directory cannot be a path: 'a\\x00b'"),
        (IMAGES.replace(".txt", "/../x"), "caption_extension must be the end of a file name"),
        (IMAGES + 'caption_mode = "line"', "caption_mode must be one of whole, lines, not 'line'"),
        (IMAGES + "caption_dropout_rate = 1.1", "caption_dropout_rate must be a number from 0 to 1, not 1.1"),
        (IMAGES + "caption_dropout_rate = nan", "caption_dropout_rate must be a number from 0 to 1"),
        (IMAGES + "caption_prefix = 3", "caption_prefix must be text in quotes"),
        (VIDEOS + "alpha_mask = true", "alpha_mask belongs in image datasets"),
        (
            '[[datasets]]\nimage_jsonl_file = "a"\ncache_directory = "c"\ncaption_mode = "lines"',
            "caption_mode is for image_directory",
        ),
        (IMAGES + '"a\\u001b[2J" = 1', "unknown key 'a\\x1b[2J'"),
        ("datasets = 3", "no [[datasets]]"),
        ("[general", "not valid toml"),
    ],
)
def test_mistakes_are_named(tmp_path, text, named):
    with pytest.raises(InputError) as error:
        _read(tmp_path, text)
    assert named in str(error.value) and len(str(error.value)) < 500


def test_bucketed_resolution_may_be_any_size(tmp_path):
    assert _read(tmp_path, IMAGES + "resolution = 500\nenable_bucket = true").datasets[0].resolution == (500, 500)


@pytest.mark.parametrize("other", ["video_directory", "image_jsonl_file", "source_fps", "control_directory"])
def test_keys_of_every_kind_may_be_left_empty(tmp_path, other):
    assert _read(tmp_path, f'{IMAGES}{other} = ""\n').datasets == _read(tmp_path, IMAGES).datasets


@pytest.mark.parametrize(
    ("typed", "named"),
    [("c\\u200b", "U[+]200B ZERO WIDTH SPACE: delete"), ("c\\u00a0", "U[+]00A0"), ("c ", "ends with a space")],
)
def test_what_cannot_be_seen_in_a_path_is_named(tmp_path, typed, named):
    with pytest.raises(InputError, match=f"number 1: cache_directory: .*{named}"):
        _read(tmp_path, f'{IMAGES}cache_directory = "{typed}"\n')


def test_a_path_may_hold_such_characters_if_it_exists(tmp_path):
    (tmp_path / "c\u200b").mkdir()
    [dataset] = _read(tmp_path, f'{IMAGES}cache_directory = "{tmp_path.as_posix()}/c\u200b"\n').datasets
    assert dataset.cache_directory == tmp_path / "c\u200b"
