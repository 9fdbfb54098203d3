"""What the scripts print: any character on any console, and no traceback where nobody reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chain import write_base

ROOT = Path(__file__).parents[1]
RUN = "from utils.cli.command import run, say\nimport sys\n"


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"], autouse=True)
def buffering(request, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


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


def test_a_list_that_nobody_reads_ends_quietly(tmp_path):
    base = str(write_base(tmp_path / "base.safetensors"))
    assert without_reader("-m", "utils.slices", "list", base) == (1, b"")


def test_a_run_that_nobody_reads_goes_on(tmp_path):
    script = RUN + f"run(lambda _: (say('a'), say('b'), open({str(tmp_path / 'saved')!r}, 'w')))"
    assert without_reader("-c", script) == (0, b"") and (tmp_path / "saved").exists()


def test_another_pipe_that_breaks_is_told():
    script = RUN + "def main(_):\n    raise BrokenPipeError('of a worker')\nrun(main)"
    _, err = python("-c", script, stdout=subprocess.DEVNULL).communicate()
    assert b"of a worker" in err
