"""What the scripts print: any character on any console, and no traceback where nobody reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = "from utils.cli.command import run, say\nimport sys\n"


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"], autouse=True)
def buffering(request, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)
    return request.param


def python(*arguments, **settings):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    return subprocess.Popen([sys.executable, *arguments], env=env, stderr=subprocess.PIPE, **settings)


def test_a_name_that_the_console_has_no_characters_for_ends_nothing():
    script = RUN + "run(lambda _: [print('saved \\u7d75.safetensors', file=f) for f in (sys.stdout, sys.stderr)])"
    out, err = python("-c", script, stdout=subprocess.PIPE).communicate()
    assert out.split() == err.split() == [b"saved", b"\\u7d75.safetensors"]


def without_reader(*arguments):
    """The exit code and stderr of a script whose stdout nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    process = python(*arguments, stdout=writing)
    os.close(writing)
    return process.wait(), process.stderr.read()


def test_a_list_that_nobody_reads_ends_quietly():
    assert without_reader("-c", RUN + "run(lambda _: print('a' * 9000))") == (1, b"")


def test_a_run_that_nobody_reads_continues(tmp_path):
    script = RUN + f"run(lambda _: (say('a'), say('b'), open({str(tmp_path / 'saved')!r}, 'w'), None)[-1], False)"
    assert without_reader("-c", script) == (0, b"") and (tmp_path / "saved").exists()


def test_another_pipe_that_breaks_is_reported():
    script = RUN + "def main(_):\n    raise BrokenPipeError('of a worker')\nrun(main)"
    _, err = python("-c", script, stdout=subprocess.DEVNULL).communicate()
    assert b"of a worker" in err


EVERYTHING = """
import contextlib, logging, os, warnings
from tqdm import tqdm
from wan.errors import InputError
logging.basicConfig()  # keeps the stderr of now
def main(_):
    for _ in tqdm(range(3)):
        say("a" * 9000)
        print("b" * 9000)
        tqdm.write("c" * 9000)
        logging.warning("d")
        warnings.warn("e")
        print("f", file=sys.stderr, flush=True)
    with open({path!r}, "w") as file:
        file.write("saved")
        with contextlib.suppress(OSError):
            os.write(2, b"as C code does")
    {end}
run(main, needs_console=False)
"""
ENDS = {"return": 0, "sys.exit(130)": 130, "raise InputError('a mistake')": 2, "1 / 0": 1}
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full and a shell")


@full
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("console", [">/dev/full 2>&1", ">&- 2>&- <&-"], ids=["full disk", "closed"])
def test_a_run_without_a_console_ends_as_it_would_with_one(tmp_path, end, console, buffering):
    if end != "return" and buffering:
        pytest.skip("one way to buffer is enough")
    script = RUN + EVERYTHING.format(path=str(tmp_path / "saved"), end=end)
    command = ["sh", "-c", f'exec "$0" -c "$1" {console}', sys.executable, script]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == ENDS[end]
    assert (tmp_path / "saved").read_text() == "saved"


@full
def test_a_list_that_a_full_disk_cuts_off_says_so():
    with open("/dev/full", "w") as disk:
        process = python("-c", RUN + "run(lambda _: print('a' * 9000))", stdout=disk)
    assert (process.wait(), process.stderr.read()) == (1, b"error: [Errno 28] No space left on device\n")
