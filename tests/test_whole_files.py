"""Files are written whole or not at all: killed at every step of the writer, on a full disk, by hostile names."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chain import LEFT, METADATA, names_of, train_concept, write_base, write_chain
from tiny_run import some_state

from utils.cli.slices import main
from utils.locks import remove_unfinished as remove_temporary
from utils.preserve.answers_file import ENDING
from utils.run.save_schedule import KINDS, SaveConfig, remove_unfinished
from utils.run.state import LATEST, choose_state, read_state, save_state
from utils.selective_finetune import SliceError
from utils.slice_saving import UNFINISHED, this_process, whole_file
from wan.errors import InputError

ROOT = Path(__file__).parents[1]
OLD, NEW = b"old" * 1000, b"new" * 2000

posix = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


@posix
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path, seen = tmp_path / "a.safetensors", set()
    for point in range(1, 100):
        path.write_bytes(OLD)
        pid = os.fork()
        if pid == 0:
            _write_and_die(path, point)
        _, status = os.waitpid(pid, 0)
        content = path.read_bytes()
        assert content in (OLD, NEW)
        seen.add(content)
        remove_unfinished(SaveConfig(tmp_path, "a"))
        assert names_of(tmp_path) == {"a.safetensors"}
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and content == NEW
            break
    assert seen == {OLD, NEW} and point > 10


def _write_and_die(path, point):
    """In a child: SIGKILL before or after step `point` of the steps by which a file comes to be."""
    _die_at(point)
    with whole_file(path, len(NEW)) as file:
        for start in range(0, len(NEW), 2000):
            file.write(NEW[start : start + 2000])
    os._exit(0)


def _die_at(point):
    steps = [0]

    def step():
        steps[0] += 1
        if steps[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*args, **options):
            step()
            result = function(*args, **options)
            step()
            return result

        return call

    opened = Path.open
    Path.open = lambda path, *args, **options: (
        _Counted(counted(opened)(path, *args), counted) if args == ("xb",) else opened(path, *args, **options)
    )
    Path.replace, Path.unlink, os.fsync, os.open = map(counted, (Path.replace, Path.unlink, os.fsync, os.open))


class _Counted:
    def __init__(self, file, counted):
        self.file = file
        self.write, self.flush, self.fileno = counted(file.write), counted(file.flush), file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@posix
def test_a_killed_state_leaves_the_old_state_or_the_new_one(tmp_path):
    folder, seen = tmp_path / "a-state", set()
    for point in range(1, 200):
        save_state(folder, some_state(step=1, trained={"a": torch.zeros(1000)}))
        pid = os.fork()
        if pid == 0:
            _die_at(point)
            save_state(folder, some_state(step=2, trained={"a": torch.ones(1000)}))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        state = read_state(folder)
        assert torch.equal(state.trained["a"], torch.full((1000,), state.step - 1.0))
        seen.add(state.step)
        remove_unfinished(SaveConfig(tmp_path, "a"))
        assert names_of(folder) == {"state.pt"}
        if os.WIFEXITED(status):
            break
    assert seen == {1, 2} and point > 10


def test_the_next_start_removes_what_this_run_left_and_nothing_else(tmp_path):
    stems = ("", "-000001", "-step00000007")
    own = [f"a{stem}{end}{LEFT}" for stem in stems for end in (*KINDS.values(), ENDING)]
    others = [f"{stem}.safetensors{LEFT}" for stem in ("ab", "b-000001", "a-1")]
    others += ["a.safetensors", "a.tmp", "a.safetensors.tmp", "a.safetensors.crdownload"]
    for name in [*own, *others]:
        (tmp_path / name).touch()
    for folder in ("a-000001-state", "a-state", "b-state"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"state.pt{LEFT}").touch()
    (tmp_path / "a-state" / "state.pt").touch()
    remove_unfinished(SaveConfig(tmp_path, "a"))
    assert names_of(tmp_path) == {*others, "a-state", "b-state"}
    assert names_of(tmp_path / "a-state") == {"state.pt"}
    assert names_of(tmp_path / "b-state") == {f"state.pt{LEFT}"}


@posix
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "a") as file:
            file.write(b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    with pytest.raises(KeyError), whole_file(tmp_path / "a") as file:
        file.write(NEW)
        raise KeyError
    assert (tmp_path / "a").read_bytes() == OLD and names_of(tmp_path) == {"a"}


def test_room_is_looked_for_before_the_first_byte(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    with (
        pytest.raises(SliceError, match=r"a could not be written \(it needs 1,000,000,000,000\.0 MB"),
        whole_file(tmp_path / "a", 10**18),
    ):
        raise AssertionError
    assert names_of(tmp_path) == {"a"}


def test_samples_of_a_run_whose_name_begins_alike_stay(tmp_path):
    left = [f"a_e000001_00_20260102030405_000.png{LEFT}", f"a_000012_01_20260102030405_7.mp4{LEFT}"]
    others = [f"a_b_e000001_00_20260102030405_000.png{LEFT}", "a_000012_01_20260102030405_7.mp4"]
    others += ["a_e000001_00_20260102030405_000.png.tmp"]
    (tmp_path / "sample").mkdir()
    for name in [*left, *others]:
        (tmp_path / "sample" / name).touch()
    remove_unfinished(SaveConfig(tmp_path, "a"))
    assert names_of(tmp_path / "sample") == set(others)


def test_what_a_run_left_that_was_killed_an_hour_ago_is_room_for_the_next_save(tmp_path, monkeypatch):
    left = tmp_path / f"a{LEFT}"
    left.write_bytes(OLD)
    os.utime(left, (0, 0))
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=len(NEW) - left.exists()))
    with whole_file(tmp_path / "a", len(NEW)) as file:
        file.write(NEW)
    assert (tmp_path / "a").read_bytes() == NEW and names_of(tmp_path) == {"a"}


@posix
def test_two_writers_of_one_file_each_write_their_own_and_the_last_one_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    with whole_file(path) as file:
        file.write(OLD[:100])
        if (pid := os.fork()) == 0:  # the second one begins, and ends, while the first one writes
            with whole_file(path) as other:
                other.write(NEW)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0 and path.read_bytes() == NEW
        file.write(OLD[100:])
    assert path.read_bytes() == OLD and names_of(tmp_path) == {"a.safetensors"}


@pytest.fixture
def writer(tmp_path):
    """A process that has begun a file in the test's folder, and waits; gone at the end."""
    if (pid := os.fork()) == 0:
        with whole_file(tmp_path / "a.safetensors") as file:
            file.write(NEW)
            file.flush()
            signal.pause()
    while not names_of(tmp_path):
        time.sleep(0.002)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@posix
def test_what_a_living_process_writes_stays_until_it_is_killed(tmp_path, writer):
    (written,) = tmp_path.iterdir()
    os.utime(written, (0, 0))
    remove_unfinished(SaveConfig(tmp_path, "a"))
    assert written.exists()
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    remove_unfinished(SaveConfig(tmp_path, "a"))
    assert names_of(tmp_path) == set()


def test_a_writer_that_cannot_be_asked_is_gone_after_an_hour_without_a_byte(tmp_path):
    machine, pid, start = this_process().split("-")
    elsewhere = {f"a.safetensors.00000000-{pid}-{start}{UNFINISHED}", f"b.safetensors{UNFINISHED}"}
    reused = f"c.safetensors.{machine}-{pid}-{int(start or 9) - 1}{UNFINISHED}"
    for age, left in ((3500, elsewhere), (3700, set())):
        for name in (*elsewhere, reused):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() - age,) * 2)
        remove_temporary(tmp_path.iterdir())
        assert names_of(tmp_path) == left


def test_a_folder_that_is_missing_is_made_or_told(tmp_path):
    with whole_file(tmp_path / "b" / "c" / "a") as file:
        file.write(NEW)
    assert (tmp_path / "b" / "c" / "a").read_bytes() == NEW
    (tmp_path / "one-state").touch()
    with pytest.raises(SliceError, match=r"state\.pt could not be written"):
        save_state(tmp_path / "one-state", some_state())


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from utils.cli.command import run
"""
APPLY = FULL + "from utils.cli.slices import main; run(main)"
SAVE_STATE = (
    FULL
    + """
import torch
from pathlib import Path
from utils.run.state import State, save_state
state = State("a", {}, 1, 0, 1, 1, [], 1, {"a": torch.zeros(100_000)}, {}, {}, {})
run(lambda _: save_state(Path("a-state"), state))
"""
)


@posix
def test_a_disk_that_fills_up_ends_with_one_line_and_leaves_the_old_file(tmp_path):
    write_chain(tmp_path)
    (tmp_path / "out.safetensors").write_bytes(OLD)
    before = names_of(tmp_path)
    command = ["apply", "base.safetensors", "one.slice.safetensors", "-o", "out.safetensors", "--overwrite"]
    ended = subprocess.run(
        [sys.executable, "-c", APPLY, *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: out.safetensors could not be written ([Errno 27] File too large); older")
    assert ended.stderr.count("\n") == 1
    assert (tmp_path / "out.safetensors").read_bytes() == OLD and names_of(tmp_path) == before


@posix
def test_a_disk_that_fills_up_under_a_state_ends_with_one_line_and_leaves_the_old_one(tmp_path):
    save_state(tmp_path / "a-state", some_state(step=1))
    ended = subprocess.run(
        [sys.executable, "-c", SAVE_STATE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("error: a-state/state.pt could not be written ([Errno 27] File too large); older")
    assert read_state(tmp_path / "a-state").step == 1 and names_of(tmp_path / "a-state") == {"state.pt"}


def test_a_full_disk_while_a_state_is_saved_leaves_the_older_state(tmp_path, monkeypatch):
    save_state(tmp_path / "a-state", some_state(step=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SliceError, match="No space left on device"):
        save_state(tmp_path / "a-state", some_state(step=2))
    assert read_state(tmp_path / "a-state").step == 1


def latest(folder, lines=None):
    """The name of the folder that --resume latest takes."""
    say = (lines if lines is not None else []).append
    return choose_state(LATEST, SaveConfig(folder, "a"), lambda *_: None, say)[0].name


def test_the_latest_state_is_the_one_of_the_last_step_whatever_the_clock_said(tmp_path):
    with pytest.raises(InputError, match=r"--resume latest: .* has no usable state of a"):
        latest(tmp_path)
    for folder, step, saved_at in (("a-000002-state", 8, 9), ("a-state", 10, 7), ("a-step00000009-state", 9, 8)):
        save_state(tmp_path / folder, some_state(step=step, saved_at=saved_at))
    save_state(tmp_path / "b-state", some_state("b", step=20))
    save_state(tmp_path / "a-000003-state", some_state("a-000003", step=20))  # at the end of another run
    (tmp_path / "a-step00000011-state").mkdir()
    (tmp_path / "a-step00000011-state" / f"state.pt{UNFINISHED}").touch()
    assert latest(tmp_path) == "a-state"
    save_state(tmp_path / "a-000002-state", some_state(step=10, saved_at=8))
    assert latest(tmp_path) == "a-000002-state"


def test_a_state_that_cannot_be_read_is_named_and_an_older_one_taken(tmp_path):
    for folder in ("a-000001-state", "a-000002-state"):
        save_state(tmp_path / folder, some_state())
    (tmp_path / "a-000001-state" / "state.pt").write_bytes(b"cut")
    torch.save({"format": 3}, tmp_path / "a-000002-state" / "state.pt")
    lines = []
    with pytest.raises(InputError, match="has no usable state of a"):
        latest(tmp_path, lines)
    save_state(tmp_path / "a-state", some_state())
    assert latest(tmp_path) == "a-state"
    assert "a-000001-state: state.pt cannot be used" in lines[0] and "another version" in lines[1]


def test_a_shard_of_the_base_is_no_output(tmp_path):
    weights = load_file(write_base(tmp_path / "base.safetensors"))
    names = sorted(weights)
    for number, own in enumerate((names[:20], names[20:]), 1):
        save_file({name: weights[name] for name in own}, tmp_path / f"a-0000{number}-of-00002.safetensors", METADATA)
    shards = [tmp_path / f"a-0000{number}-of-00002.safetensors" for number in (1, 2)]
    train_concept(tmp_path / "base.safetensors", tmp_path, "one", "0.05", 2)
    before = shards[1].read_bytes()
    for words in (["apply", shards[0], tmp_path / "one.slice.safetensors"],
                  ["scale", tmp_path / "one.slice.safetensors", "2", "--base", shards[0]],
                  ["remove", tmp_path / "one.safetensors", "one", "--base", shards[0]]):  # fmt: skip
        with pytest.raises(InputError, match="an input: choose"):
            main([*map(str, words), "-o", str(shards[1])])
    assert shards[1].read_bytes() == before


def test_what_a_killed_command_left_is_removed_by_the_next_one_and_no_other_programs_files(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    train_concept(base, tmp_path, "one", "0.05", 2)
    written = f"written.safetensors.{this_process()}{UNFINISHED}"
    foreign = {f"foreign{LEFT}", "download.safetensors.tmp", "download.tmp"}
    for name in (f"left.safetensors{LEFT}", written, *foreign):
        (tmp_path / name).write_bytes(b"half")
    main(["apply", str(base), f"{tmp_path}/one.slice.safetensors", "-o", f"{tmp_path}/a.safetensors"])
    assert {name for name in names_of(tmp_path) if name.endswith(".tmp")} == {written, *foreign}


REFUSED = [
    "apply {other}/base.safetensors {one}.slice.safetensors -o {out}/a.safetensors",
    "remove {one}.safetensors one --base {other}/base.safetensors -o {out}/a.safetensors",
    "extract {one}.safetensors --base {other}/base.safetensors -o {out}",
    "scale {one}.slice.safetensors 2 --base {other}/base.safetensors -o {out}/a.safetensors",
    "to-lora {one}.slice.safetensors --base {other}/base.safetensors -o {out}/a.safetensors",
]


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command.split()[0])
def test_a_command_that_is_refused_deletes_nothing(tmp_path, command):
    for folder, seed in (("chain", 0), ("other", 1), ("out", 2)):
        (tmp_path / folder).mkdir()
        write_base(tmp_path / folder / "base.safetensors", seed=seed)
    train_concept(tmp_path / "chain" / "base.safetensors", tmp_path / "chain", "one", "0.05", 2)
    left = tmp_path / "out" / f"left.safetensors{LEFT}"
    left.write_bytes(b"half")
    with pytest.raises(InputError, match="is not the base of"):
        main(command.format(out=left.parent, other=tmp_path / "other", one=tmp_path / "chain" / "one").split())
    assert left.exists()


def test_an_output_through_a_link_to_an_input_is_refused(tmp_path):
    write_base(tmp_path / "base.safetensors")
    (tmp_path / "link.safetensors").hardlink_to(tmp_path / "base.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    with pytest.raises(InputError, match="an input: choose"):
        main(["apply", f"{tmp_path}/base.safetensors", f"{tmp_path}/none.safetensors", "-o",
              f"{tmp_path}/link.safetensors"])  # fmt: skip
    assert (tmp_path / "base.safetensors").read_bytes() == before
