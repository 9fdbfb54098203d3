"""The pictures and clips that a dataset names, with their captions."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from utils.data.sources import ImageDataset, Source, VideoDataset, list_sources
from wan.errors import InputError


def _folder(path, **texts):
    path.mkdir()
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def _images(folder):
    return ImageDataset(folder, image_directory=folder, caption_extension=".txt")


def _jsonl(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return ImageDataset(path.parent, image_jsonl_file=path)


def test_files_come_in_order_with_stripped_captions_whatever_their_case(tmp_path):
    folder = _folder(tmp_path / "p", b__PNG="", b__txt=" b \n", a__jpeg="", a__txt="ünï", c__md="", c__txt="c")
    assert list_sources(_images(folder)).found == (Source(folder / "a.jpeg", "ünï"), Source(folder / "b.PNG", "b"))


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    folder = _folder(tmp_path / "p", a__png="", a__txt="\ufeffcat")
    assert list_sources(_images(folder)).found[0].caption == "cat"


def test_pictures_without_captions_are_left_out_but_videos_are_refused(tmp_path):
    folder = _folder(tmp_path / "p", a__png="", b__png="", b__txt="b", a__mp4="", b__mp4="")
    sources = list_sources(_images(folder))
    assert ([source.stem for source in sources.found], sources.left_out) == (["b"], (folder / "a.png",))
    with pytest.raises(InputError, match=r"1 of 2 files in .* have no caption: a\.mp4 needs a\.txt"):
        list_sources(VideoDataset(folder, video_directory=folder, caption_extension=".txt"))


def test_lines_of_a_list_come_in_order_of_their_paths(tmp_path):
    paths = [tmp_path / "b.png", tmp_path / "a.png"]
    for path in paths:
        path.touch()
    lines = [json.dumps({"image_path": str(path), "caption": f" {path.stem} "}) for path in paths]
    found = list_sources(_jsonl(tmp_path / "l.jsonl", lines[0], "", lines[1])).found
    assert found == (Source(paths[1], "a"), Source(paths[0], "b"))


@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("a.png", "A.webp")])
def test_files_that_would_share_a_cache_are_refused(tmp_path, names):
    folder = _folder(tmp_path / "p", a__txt="a", A__txt="a", **dict.fromkeys(names, ""))
    with pytest.raises(InputError, match="would share one cache file"):
        list_sources(_images(folder))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "is empty"),
        ("{", "line 1 is not valid JSON"),
        ('{"image_path": "a.png"}', 'must be {"image_path": ..., "caption": ...}; it has image_path'),
        ('{"image_path": "a.png", "tags": "a"}', "it has image_path, tags"),
        ('{"image_path": "a.png", "caption": 3}', "caption must be text or a list of texts, not 3"),
        ('{"image_path": "a.png", "caption": null}', "caption must be text or a list of texts, not None"),
        ('{"image_path": "", "caption": "a"}', "image_path must be a path, not ''"),
        ('["a.png", "a"]', "is one JSON list: write each {"),
        ('"a"', 'must be {"image_path": ..., "caption": ...}, not \'a\''),
        ("image_path,caption", 'Expecting value: line 1 column 1 (char 0); write each {"image_path"'),
        ('{"image_path": "a.png", "caption": "a"},', "line 1 ends with a comma"),
        ('{"image_path": "a", "caption": "a", "caption": "b"}', "the key 'caption' is there twice"),
        ('{"image_path": "a.png", "caption": []}', "caption must be text or a list of texts, not ["),
        ('{"image_path": "a.png", "caption": ["a", 3]}', "caption must be text or a list of texts, not ["),
        ('{"image_path": "nowhere.png", "caption": "a"}', "nowhere.png does not exist"),
        ('{"image_path": "nowhere.png", "caption": ' + "9" * 5000 + "}", "line 1 is not valid JSON: a number has too"),
        ("[" * 100_000, "line 1 is not valid JSON: it is nested too deeply"),
        ('{"image_path": "a\\ud800.png", "caption": "a"}', "it holds half a character (\\ud800)"),
        ('{"image_path": "a\\u0000.png", "caption": "a"}', "line 1: 'a\\x00.png' is not a possible path"),
        ('{"image_path": "' + "x" * 5000 + '", "caption": "a"}', "cannot be read: File name too long"),
        ('{"image_path": "/dev/zero", "caption": "a"}', "/dev/zero is not a regular file"),
        ('{"image_path": "/", "caption": "a"}', "/ is a folder"),
        ('{"a\\n\\u001b[2J": 1}', "it has 'a\\n\\x1b[2J'"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path, line, named):
    with pytest.raises(InputError) as error:
        list_sources(_jsonl(tmp_path / "l.jsonl", line))
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("as_list", "what"), [(True, "one JSON list"), (False, "one JSON object over several lines")])
def test_a_file_that_is_json_as_a_whole_is_told_as_that(tmp_path, as_list, what, indent):
    entry = {"image_path": "a.png", "caption": "a"}
    if not as_list and indent is None:
        pytest.skip("that is a list of one line")
    (tmp_path / "l.jsonl").write_text(json.dumps([entry] * 2 if as_list else entry, indent=indent), encoding="utf-8")
    with pytest.raises(InputError, match=rf"l\.jsonl is {what}: write each .* in a line of its own, without brackets"):
        list_sources(ImageDataset(Path("cache"), image_jsonl_file=tmp_path / "l.jsonl"))


def test_empty_captions_are_counted(tmp_path):
    sources = list_sources(_images(_folder(tmp_path / "p", a__png="", a__txt=" \n", b__png="", b__txt="b")))
    assert sources.notes == ("with an empty caption, trained on without words: 1, a.png",)


def test_an_ending_of_captions_without_a_dot_is_noticed(tmp_path):
    folder = _folder(tmp_path / "p", a__png="", a__txt="a")
    with pytest.raises(InputError, match=r'a\.png needs atxt, because caption_extension is "txt", without a dot'):
        list_sources(replace(_images(folder), caption_extension="txt"))


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "a.png").touch()
    line = json.dumps({"image_path": str(tmp_path / "a.png"), "caption": "a\u2028b\x85c"}, ensure_ascii=False)
    assert list_sources(_jsonl(tmp_path / "l.jsonl", line + "\r")).found[0].caption == "a\u2028b\x85c"


def test_pipes_among_pictures_and_captions_are_not_waited_for(tmp_path):
    folder = _folder(tmp_path / "p", a__png="", a__txt="a", b__png="")
    for name in ("b.txt", "c.png"):
        os.mkfifo(folder / name)
    sources = list_sources(_images(folder))
    assert ([source.stem for source in sources.found], sources.left_out) == (["a"], (folder / "b.png",))


def test_a_name_that_is_too_long_for_a_cache_file_is_named(tmp_path):
    folder = _folder(tmp_path / "p", **{"x" * 171 + "__png": "", "x" * 171 + "__txt": ""})
    with pytest.raises(InputError, match="the name of its cache file would be too long, rename it"):
        list_sources(_images(folder))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"folder .* cannot be read: Permission denied \(paths start at"):
        list_sources(_images(tmp_path))


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    folder = _folder(tmp_path / "p", a__png="")
    (folder / "a.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        list_sources(_images(folder))


def test_a_missing_folder_and_a_missing_list_are_named():
    with pytest.raises(InputError, match="nowhere does not exist"):
        list_sources(_images(Path("nowhere")))
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        list_sources(ImageDataset(Path(), image_jsonl_file=Path("nowhere.jsonl")))
