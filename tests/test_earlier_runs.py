"""An earlier run of the same name is continued or replaced only when the user says so."""

import os
import shutil

import pytest
from tiny_run import flags, run, write_inputs

from utils.cli.train import parse_train
from utils.locks import UNFINISHED
from utils.run.earlier_run import check_earlier_run
from utils.run.save_schedule import SaveConfig, remove_unfinished
from utils.slices.ledger import own_entry
from wan.errors import InputError

SAVES = ("--save_every_n_epochs", "1", "--save_as", "checkpoint", "slice", "--save_state")
OWN = own_entry("0.1", 2, "one")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    run(folder, *SAVES)
    (folder / "out").rename(folder / "trained")
    return folder


@pytest.fixture
def folder(files):
    shutil.copytree(files / "trained", files / "out")
    yield files
    shutil.rmtree(files / "out")


def keep(folder, *names):
    """Removes all but these of what the earlier run left."""
    for path in (folder / "out").iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check(folder, overwrite=False, inputs=(), continues=False):
    return check_earlier_run(SaveConfig(folder / "out", "one", overwrite=overwrite), [], OWN, inputs, continues)


@pytest.mark.parametrize(
    "name",
    ["one.safetensors", "one.slice.safetensors", "one-000001.slice.safetensors", "one-state", "one-000001-state"],
)
def test_the_same_command_again_stops_at_anything_that_the_run_before_left(folder, name):
    keep(folder, name)
    before = (folder / "out" / name).stat()
    with pytest.raises(InputError, match=rf"\({name}\): .*--resume latest.*another --output_name.*--overwrite"):
        run(folder)
    assert [path.name for path in (folder / "out").iterdir()] == [name]
    assert (folder / "out" / name).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["one.safetensors", "one-state"])
def test_without_a_usable_state_resuming_does_not_advise_what_the_files_of_the_run_before_would_stop(folder, name):
    keep(folder, name)
    for state in (folder / "out").glob("*/state.pt"):
        state.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"has no usable state of one; choose another --output_name, .*--overwrite"):
        run(folder, "--resume", "latest")


def trained_to_validate(folder):
    """A run whose best slice is on disk, and what else it takes to validate."""
    data = folder / "validated.toml"
    table = (folder / "data.toml").read_text(encoding="utf-8")
    data.write_text(f"{table}\n[general]\nvalidation_split = 0.3\n", encoding="utf-8")
    more = ("--dataset_config", str(data), "--max_train_epochs", "1")
    run(folder, *more, "--save_best", "--overwrite")
    return folder / "out" / "one-best.slice.safetensors", more


def test_the_best_slice_of_the_run_before_counts_as_its_file(folder):
    best, more = trained_to_validate(folder)
    keep(folder, best.name)
    with pytest.raises(
        InputError, match=rf"\({best.name}\): .*--overwrite to delete its states, numbered saves and best"
    ):
        run(folder, *more)
    run(folder, *more, "--overwrite")
    assert not best.exists()


def test_a_best_slice_that_the_run_reads_or_another_wrote_is_not_replaced(folder):
    best, more = trained_to_validate(folder)
    keep(folder, best.name)
    reads = ("--slices", str(best), "--continue_slice", "--overwrite", "--mixed_precision", "bf16")
    with pytest.raises(InputError, match=rf"would write .*{best.name} over .*{best.name}, which it reads"):
        run(folder, *more, *reads, "--save_best")
    with pytest.raises(InputError, match=rf"{best.name} holds .* and the run would replace it with ff 0.1 ffid 3"):
        run(folder, *more, "--ffid", "3", "--save_best", "--overwrite")


def test_an_unfinished_best_slice_of_a_killed_run_is_removed(tmp_path):
    left = tmp_path / f"one-best.slice.safetensors{UNFINISHED}"
    left.touch()
    os.utime(left, (0, 0))
    remove_unfinished(SaveConfig(tmp_path, "one"))
    assert list(tmp_path.iterdir()) == []


def test_names_that_only_begin_alike_stop_nothing_and_stay(folder):
    out = folder / "out"
    for path in list(out.iterdir()):
        path.rename(out / path.name.replace("one", "one-two"))
    for name in ("one_b.safetensors", "one-00001.safetensors", "one-step1.safetensors", "one.txt", "xone.safetensors"):
        (out / name).touch()
    assert (check(folder).lines, check(folder, overwrite=True).removed) == ([], ())


def test_overwrite_removes_states_and_numbered_saves_and_leaves_what_others_wrote(folder):
    out = folder / "out"
    (out / "one-000007.safetensors").write_bytes(b"of another program")
    (out / "sample").mkdir()
    shutil.copy(out / "one.safetensors", out / "one-step00000008.safetensors")
    lines = run(folder, "--overwrite")
    left = {path.name for path in out.iterdir()}
    assert left == {"one.safetensors", "one.slice.safetensors", "one-000007.safetensors", "sample"}
    assert any("are left: one-000007.safetensors, one.slice.safetensors" in line for line in lines)


def test_overwrite_removes_nothing_that_the_run_reads(folder):
    out = folder / "out"
    inputs = [out / "one-000001.safetensors", out / "one-state"]
    removed = {path.name for path in check(folder, True, inputs).removed}
    assert removed == {"one-000001.slice.safetensors", "one-000001-state"}


def test_overwrite_leaves_the_files_of_a_concept_whose_own_name_ends_in_a_number(folder):
    keep(folder)
    run(folder, "--output_name", "one-000004", "--max_train_epochs", "1")
    assert check(folder, overwrite=True).removed == []


def test_overwrite_and_resume_exclude_each_other(folder):
    for state in ("latest", str(folder / "out" / "one-000001-state")):
        with pytest.raises(InputError, match="--overwrite trains again from the first step"):
            run(folder, "--resume", state, "--overwrite")


def test_a_run_that_fails_before_its_first_step_has_removed_nothing(folder, monkeypatch):
    before = sorted(path.name for path in (folder / "out").rglob("*"))
    monkeypatch.setattr("utils.run.preparing.load_with_slices", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, "--overwrite")
    assert sorted(path.name for path in (folder / "out").rglob("*")) == before


def test_a_state_of_another_name_does_not_continue_the_run_of_this_one(folder):
    state = folder / "one-000001-state"
    (folder / "out" / state.name).rename(state)
    (folder / "out" / "two.safetensors").write_bytes((folder / "out" / "one.safetensors").read_bytes())
    with pytest.raises(InputError, match="an earlier run called two"):
        run(folder, "--output_name", "two", "--resume", str(state))
    shutil.rmtree(state)


def test_overwrite_is_a_flag_of_the_config_file_too(folder):
    (folder / "flags.toml").write_text("overwrite = true\n")
    assert parse_train(flags(folder, "--config_file", str(folder / "flags.toml"))).save.overwrite
