"""Text files as editors and shells leave them: encodings, byte order marks, line ends, backslashes in paths."""

import json
import re

import pytest

from utils.data.config import read_dataset_config
from utils.data.sources import ImageDataset, list_sources
from utils.sampling.prompts import read_prompt_file
from utils.text_files import read_json, read_text, read_toml, text_lines
from wan.errors import InputError

# str.splitlines would split at each of them.
IN_LINES = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("character", IN_LINES, ids=ascii)
def test_only_line_feeds_end_lines(tmp_path, character):
    text = f"an owl{character}on a branch"
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text(f"{text}\r\nb\n", encoding="utf-8", newline="")
    dataset = ImageDataset(tmp_path, image_directory=tmp_path, caption_extension=".txt", caption_mode="lines")
    assert list_sources(dataset).found[0].captions == (text, "b")
    (tmp_path / "p.txt").write_text(f"{text} --w 64 --s 2\n", encoding="utf-8")
    assert [(one.prompt, one.width) for one in read_prompt_file(tmp_path / "p.txt")] == [(text, 64)]


@pytest.mark.parametrize("character", "\u2028\u2029\x85", ids=ascii)
def test_json_and_toml_may_hold_them_too(tmp_path, character):
    (tmp_path / "a.json").write_text(json.dumps([f"a{character}b"], ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.toml").write_text(f'[prompt]\nprompt = "a{character}b"\n', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "file") == [f"a{character}b"]
    assert read_prompt_file(tmp_path / "a.toml")[0].prompt == f"a{character}b"


def test_a_byte_order_mark_is_no_part_of_a_file_or_of_a_line_in_it(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1\n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text("[1]", encoding="utf-8-sig")
    (tmp_path / "p.txt").write_text("\ufeffan owl\n\ufeffa cat\n", encoding="utf-8-sig")
    assert (read_toml(tmp_path / "a.toml"), read_json(tmp_path / "a.json", "file")) == ({"seed": 1}, [1])
    assert text_lines("\ufeffa\nb\ufeff") == ["a", "b\ufeff"]
    with pytest.raises(InputError, match="no prompt"):
        read_prompt_file(_written(tmp_path / "e.txt", "\ufeff\n\ufeff# only a comment"))


def _written(path, text, encoding="utf-8-sig"):
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "it is UTF-16: save it as UTF-8 in your editor, or run: iconv -f UTF-16 -t UTF-8 a.txt > new"),
        ("utf-16-le", "it is UTF-16"),
        ("utf-16-be", "it is UTF-16"),
        ("utf-32", "it is UTF-32"),
        ("cp1252", r"\(line 2\); it is probably WINDOWS-1252: save it as UTF-8"),
        ("shift-jis", "it is probably"),
    ],
)
def test_another_encoding_is_refused_with_how_to_convert_it(tmp_path, encoding, named):
    text = "ascii\nねこ" if encoding == "shift-jis" else "ascii\nmünchen"
    with pytest.raises(InputError, match=rf"a\.txt is not UTF-8 text.*{named}"):
        read_text(_written(tmp_path / "a.txt", text, encoding), "caption file")


def test_text_in_ascii_alone_is_still_told_from_utf16(tmp_path):
    with pytest.raises(InputError, match="it holds zero bytes; it is UTF-16"):
        read_text(_written(tmp_path / "a.txt", "a cat", "utf-16-le"), "caption file")


@pytest.mark.parametrize("path", [r"C:\train\new", r"C:\users\me\owl", r"D:\data\owl", r"C:\my owl\0", "C:\\a\\"])
def test_backslashes_in_double_quotes_are_answered_with_the_two_right_ways(tmp_path, path):
    table = f'[[datasets]]\ncaption_extension = ".txt"\nimage_directory = "{path}"\ncache_directory = "c"\n'
    with pytest.raises(InputError) as error:
        read_dataset_config(_written(tmp_path / "d.toml", table))
    forward = path.replace("\\", "/")
    assert str(error.value).endswith(f"""so write '{path}' in single quotes, or "{forward}\"""")
    for right in (f"'{path}'", f'"{forward}"'):
        read_dataset_config(_written(tmp_path / "d.toml", table.replace(f'"{path}"', right)))


@pytest.mark.parametrize("path", [r"C:\train\new.png", r"C:\users\me.png", r"D:\data\owl.png"])
def test_backslashes_in_json_are_answered_too(tmp_path, path):
    hint = 'in JSON a backslash begins an escape, so write / in paths, as in "C:/train", or two backslashes'
    list_of_one = _written(tmp_path / "l.jsonl", f'{{"image_path": "{path}", "caption": "a"}}')
    with pytest.raises(InputError, match=f"l.jsonl line 1.*{hint}"):
        list_sources(ImageDataset(tmp_path, image_jsonl_file=list_of_one))
    table = f'{{"image_directory": "{path}", "caption_extension": ".txt"}}'
    with pytest.raises(InputError, match=f"d.json.*{hint}"):
        read_dataset_config(_written(tmp_path / "d.json", f'{{"datasets": [{table}]}}'))


def test_empty_texts_in_a_dataset_file_are_as_if_left_out(tmp_path):
    text = '[general]\ncaption_prefix = ""\n[[datasets]]\nimage_directory = "p"\nimage_jsonl_file = ""\n'
    text += 'cache_directory = ""\ncaption_extension = ".txt"\n'
    [dataset] = read_dataset_config(_written(tmp_path / "d.toml", text)).datasets
    assert (dataset.cache_directory, dataset.caption_prefix) == (dataset.image_directory, "")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("a = \u201cx\u201d", 'U+201C LEFT DOUBLE QUOTATION MARK stands there: write plain quotes (")'),
        ("a = \u2018x\u2019", "U+2018 LEFT SINGLE QUOTATION MARK stands there: write plain quotes"),
        ("a\u2014b = 1", "U+2014 EM DASH stands there: write a plain hyphen or ="),
        ("a\u00a0= 1", "U+00A0 NO-BREAK SPACE stands there: delete it"),
        ("a\u200b = 1", "U+200B ZERO WIDTH SPACE stands there: delete it"),
        ("\x1a", "U+001A CONTROL stands there: delete it"),
        ("a = True", "write true or false in small letters"),
        ("a = /train/owl", "text must be in quotes"),
        ("a = character1", "text must be in quotes"),
    ],
)
def test_what_makes_toml_invalid_is_named_if_it_shows(tmp_path, line, hint):
    (tmp_path / "a.toml").write_text(f"# first\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"; {hint}")):
        read_toml(tmp_path / "a.toml")


def test_a_table_of_datasets_in_single_brackets_is_noticed(tmp_path):
    (tmp_path / "a.toml").write_text('[datasets]\nimage_directory = "p"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"\[datasets\] needs double brackets"):
        read_dataset_config(tmp_path / "a.toml")


def test_a_zero_byte_alone_does_not_make_a_file_utf16(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"a = 1\n\0")
    with pytest.raises(InputError, match="it holds zero bytes; it is probably damaged"):
        read_toml(tmp_path / "a.toml")


def test_a_key_that_is_twice_in_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"b": 1, "c": 2, "b": 3}}', encoding="utf-8")
    with pytest.raises(InputError, match="the key 'b' is there twice"):
        read_json(tmp_path / "a.json", "file")
