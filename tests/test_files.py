"""Users' files: names from foreign text, damaged toml and JSON, folders, and one writer at a time."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from utils import files, locks
from utils.files import file_name, file_problem, quoted, writable_folder
from utils.locks import sole_writer
from utils.text_files import parse_json, read_json, read_toml
from wan.errors import InputError

FOREIGN = {
    "/../../x": "_.._.._x",
    "..": "_",
    "": "_",
    "a\\b:c*?": "a_b_c__",
    "a\0b\x1b[2J\u202e\u2028": "a_b_[2J__",
    "half \udfff": "half _",
    " a. ": "a",
    "CON": "_CON",
    "nul.txt": "_nul.txt",
    "com¹ .x": "_com¹ .x",
}
UNCHANGED = ["7", "1, 2, 3", "ünï code", "a.b", "console", "👩\u200d🚀", "名前"]


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_becomes_a_name_in_its_own_folder(text):
    assert file_name(text) == FOREIGN[text]


@pytest.mark.parametrize("text", UNCHANGED)
def test_a_name_that_every_system_takes_stays(text):
    assert file_name(text) == text


def test_a_long_name_is_cut_between_characters_and_leaves_room_for_endings(tmp_path):
    name = file_name("é" * 400)
    assert name == "é" * 85
    (tmp_path / f"{name}_00000-081_0960x0544_wan.safetensors.0123abcd-1234567-1234567890.wan.tmp").touch()


TOO_DEEP = "[" * 100_000
DAMAGED = {
    "a.toml": ["a = " + "9" * 5000, "a = " + TOO_DEEP, "a = [1", 'a = "\\ud800"', "a = 1\na = 2"],
    "a.json": [
        "9" * 5000,
        TOO_DEEP,
        '{"a":' * 100_000,
        "[1",
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        "",
        "\ufeff\ufeff1",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_toml_or_json_is_told_in_one_short_line(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name} is not valid") as error:
        read_toml(tmp_path / name) if name == "a.toml" else read_json(tmp_path / name, "file")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and str(error.value).encode()


def test_a_pair_of_escapes_that_is_one_character_is_read():
    assert parse_json('"\\ud83d\\ude00"', "here") == "😀"


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "'a\x1b[2J' * 99", "[[[[[[[[[1]]]]]]]]] * 99", "{'\\udfff': 1}"])
def test_any_value_is_shown_short_and_harmless(text):
    value = eval(text)
    assert len(quoted(value)) < 200 and quoted(value).isprintable()


def test_what_is_not_a_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    problems = [file_problem(path) for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path, tmp_path / "none")]
    assert problems == ["is not a regular file"] * 2 + ["is a folder", "does not exist"]
    assert file_problem(Path("a\0b")) == "is not a possible path" and file_problem(tmp_path, or_folder=True) is None
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        assert file_problem(path).startswith("cannot be read: ")


def test_a_folder_that_cannot_take_files_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--x .* cannot be created: a file is in the way"):
            writable_folder(path, "--x")
    with pytest.raises(InputError, match=r"--x 'a.*b' cannot be created"):
        writable_folder(Path("a\0b"), "--x")
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: (dir / "no" / "such").open("wb"))
    with pytest.raises(InputError, match="is not writable: No such file"):
        writable_folder(tmp_path, "--x")


def lock(folder, name="one"):
    return sole_writer(folder, name, "--output_name one", "wait until it ends")


def owner(folder, **changed):
    """Writes a lock as this process would, with other values."""
    with lock(folder):
        text = (folder / "one.lock").read_text()
    (folder / "one.lock").write_text(json.dumps({**json.loads(text), **changed}))


def test_a_second_writer_is_refused_and_the_lock_goes_with_the_first(tmp_path):
    with (
        lock(tmp_path),
        lock(tmp_path, "two"),
        pytest.raises(InputError, match=rf"--output_name one is in use by process {os.getpid()} \(lock file .*wait"),
    ):
        lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_goes_when_its_run_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"started": "before"}, {"pid": 2**22 + 1}, {"pid": -1}, {"pid": 10**30}])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, changed):
    owner(tmp_path, **changed)
    with lock(tmp_path):
        assert json.loads((tmp_path / "one.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"host": "other\x1b[2J"}, {"numbers": "pid:[1]"}])
def test_a_lock_from_another_computer_is_refused_and_named(tmp_path, changed):
    owner(tmp_path, pid=77, **changed)
    with pytest.raises(
        InputError, match=r"process 77 of another computer or container, '.*delete .*one\.lock"
    ) as error:
        lock(tmp_path).__enter__()
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', "\udfff"])
def test_a_lock_without_an_owner_is_waited_for_at_first(tmp_path, text):
    path = tmp_path / "one.lock"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError, match="another process seems to be starting"):
        lock(tmp_path).__enter__()
    os.utime(path, (time.time() - 120,) * 2)
    with lock(tmp_path):
        pass


def test_of_many_processes_that_take_over_one_lock_one_gets_it(tmp_path):
    for _ in range(2):
        owner(tmp_path, started="before")
        told, tell = os.pipe()
        children = [os.fork() or _hold(tmp_path, tell) for _ in range(4)]
        results = b"".join(os.read(told, 1) for _ in children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert sorted(results) == sorted(b"y" + b"n" * 3)


def _hold(folder, tell):
    """In a process of its own: tells whether it got the lock, and waits to be killed."""
    held = lock(folder)
    try:
        held.__enter__()
        os.write(tell, b"y")
    except InputError:
        os.write(tell, b"n")
    signal.pause()


def test_a_forked_process_leaves_the_lock_of_its_parent(tmp_path):
    held = lock(tmp_path)
    held.__enter__()
    if (child := os.fork()) == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and (tmp_path / "one.lock").exists()
    held.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk")
def test_a_lock_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    create = os.open

    def on_a_full_disk(path, *rest):
        os.close(create(path, *rest))
        return create("/dev/full", os.O_WRONLY)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"one\.lock cannot be written: No space left"):
        patch.setattr(locks.os, "open", on_a_full_disk)
        lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
