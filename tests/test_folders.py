"""What a dataset's folder holds: read, or named with a count; subfolders; files that only other programs know."""

import json

import pytest

from utils.data.config import read_dataset_config
from utils.data.sources import ImageDataset, SourcesGone, VideoDataset, list_sources
from wan.errors import InputError


def _files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if not path.with_suffix(".txt").exists():
            path.with_suffix(".txt").write_text(path.stem, encoding="utf-8")
    return folder


def _list(folder, kind=ImageDataset, **settings):
    place = {"image_directory" if kind is ImageDataset else "video_directory": folder}
    return list_sources(kind(folder / "cache", **place, caption_extension=".txt", **settings))


def _stems(sources):
    return [source.stem for source in sources.found]


def test_every_kind_that_pillow_reads_is_found(tmp_path):
    names = ["a.tif", "b.TIFF", "c.jfif", "d.jpe", "e.gif", "f.avif", "g.apng"]
    assert _stems(_list(_files(tmp_path, *names))) == list("abcdefg")


def test_every_kind_that_ffmpeg_reads_is_found(tmp_path):
    assert _stems(_list(_files(tmp_path, "a.3gp", "b.ts", "c.MTS", "d.mp4"), VideoDataset)) == list("abcd")


@pytest.mark.parametrize("kind", [ImageDataset, VideoDataset])
def test_companions_of_macos_are_passed_over(tmp_path, kind):
    suffix = "png" if kind is ImageDataset else "mp4"
    sources = _list(_files(tmp_path, f"a.{suffix}", f"._a.{suffix}", ".DS_Store"), kind)
    assert (_stems(sources), sources.notes) == (["a"], ())


def test_what_is_not_read_is_named_with_a_count_and_what_to_do(tmp_path):
    names = ["a.png", "b.heic2", "c.psd", "d.psd", "e.mp4", ".f.png", "sub/g.png", "sub/deeper/h.png", "notes.json"]
    first, hidden, subfolders = _list(_files(tmp_path, *names)).notes
    assert first == (
        "files of kinds that are not read here: 1 .mp4 (give videos a dataset of their own, with video_directory), "
        "2 .psd, 1 .heic2 (convert them to .png or .mp4 if they should be)"
    )
    assert hidden == "left out, because their names begin with a dot: 1, .f.png"
    assert subfolders == "not read in subfolders: 2 in sub/; to read them, set recursive = true"


def test_many_unknown_kinds_do_not_hide_what_can_be_done_about_another(tmp_path):
    junk = [f"{number}.{ending}" for ending in "abcdefgh" for number in range(2)]
    [note] = _list(_files(tmp_path, "a.png", "b.mp4", *junk)).notes
    assert note.startswith("files of kinds that are not read here: 1 .mp4 (give videos a dataset of their own")
    assert "2 more kinds (convert them" in note


def test_a_folder_with_nothing_but_subfolders_says_so(tmp_path):
    with pytest.raises(SourcesGone, match=r"holds no files .*; not read in subfolders: 1 in 10_owl/"):
        _list(_files(tmp_path, "10_owl/a.png"))


def test_originals_beside_pictures_of_a_usual_kind_are_left_out(tmp_path):
    sources = _list(_files(tmp_path, "a.png", "a.tif", "b.tif"))
    assert [source.path.name for source in sources.found] == ["a.png", "b.tif"]
    assert sources.notes == ("left out, because their namesakes of a more usual kind are read: 1, a.tif",)


def test_subfolders_are_read_if_asked_for_and_stems_may_repeat(tmp_path):
    sources = _list(_files(tmp_path, "a.png", "x/a.png", "x/y/a.png", ".hidden/a.png"), recursive=True)
    assert (_stems(sources), sources.notes) == (["a", "x/a", "x/y/a"], ())
    assert [source.path for source in sources.found] == [tmp_path / f"{stem}.png" for stem in _stems(sources)]


def test_links_in_a_circle_end(tmp_path):
    _files(tmp_path, "x/a.png")
    (tmp_path / "x" / "back").symlink_to(tmp_path, target_is_directory=True)
    assert _stems(_list(tmp_path, recursive=True)) == ["x/a"]


def test_further_keys_in_a_list_are_taken_and_named(tmp_path):
    _files(tmp_path, "a.png")
    line = {"image_path": str(tmp_path / "a.png"), "caption": "a", "control_path": "b.png", "score": 3}
    (tmp_path / "l.jsonl").write_text(json.dumps(line), encoding="utf-8")
    sources = list_sources(ImageDataset(tmp_path, image_jsonl_file=tmp_path / "l.jsonl"))
    assert _stems(sources) == ["a"]
    assert sources.notes == (f"{tmp_path / 'l.jsonl'}: keys that are not used: control_path, score",)


def _config(folder, *tables):
    (folder / "data.json").write_text(json.dumps({"datasets": tables}), encoding="utf-8")
    return read_dataset_config(folder / "data.json").datasets


@pytest.mark.parametrize(
    ("value", "colour"), [("white", (255,) * 3), ("black", (0,) * 3), ("#0a0B0c", (10, 11, 12)), ([1, 2, 3], (1, 2, 3))]
)
def test_a_background_is_a_name_or_a_colour(tmp_path, value, colour):
    table = {"image_directory": "p", "caption_extension": ".txt", "resolution": 64, "background": value}
    assert _config(tmp_path, table)[0].background == colour


@pytest.mark.parametrize("value", ["red", "#12345", [1, 2], [1, 2, 256], [1, 2, True], 7])
def test_other_backgrounds_are_refused(tmp_path, value):
    table = {"image_directory": "p", "caption_extension": ".txt", "resolution": 64, "background": value}
    with pytest.raises(InputError, match=r'background must be "white", "black", "#rrggbb" or'):
        _config(tmp_path, table)


def test_caches_within_those_of_a_recursive_dataset_are_refused(tmp_path):
    first = {"image_directory": "p", "cache_directory": "c", "caption_extension": ".txt", "resolution": 64}
    second = {**first, "image_directory": "q", "cache_directory": "c/q"}
    assert len(_config(tmp_path, first, second)) == 2
    with pytest.raises(InputError, match="the cache folder of dataset 2 is in that of dataset 1, which is recursive"):
        _config(tmp_path, {**first, "recursive": True}, second)


def test_recursive_lists_and_wrong_rates_are_refused(tmp_path):
    table = {"video_jsonl_file": "l", "cache_directory": "c", "resolution": 64}
    assert _config(tmp_path, {**table, "source_fps": "file"})[0].source_fps == "file"
    with pytest.raises(InputError, match="recursive is for video_directory"):
        _config(tmp_path, {**table, "recursive": True})
    with pytest.raises(InputError, match=r'source_fps must be a number above 0 .* or "file"'):
        _config(tmp_path, {**table, "source_fps": "auto"})
