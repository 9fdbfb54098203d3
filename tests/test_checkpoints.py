"""Checkpoints of a run: names, turns, retention, metadata, state folders, the plan of a run's steps."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import some_state

from utils.files import readable
from utils.run.fingerprint import MetadataConfig, checkpoint_metadata
from utils.run.plan import first_items, plan_training
from utils.run.save_schedule import (
    KINDS,
    Save,
    SaveConfig,
    check_saves,
    disk_use,
    planned_saves,
    remove_expired,
    save_after_epoch,
    save_after_step,
    save_at_end,
)
from utils.run.state import check_settings, read_state, save_state
from wan.errors import InputError

SIZES = {"checkpoint": 1}
EVERY = SaveConfig(Path("out"), "c1", every_n_epochs=2, every_n_steps=10, save_state=True)


def names(paths):
    return [path.name for path in paths]


def test_names_are_those_of_musubi_tuner():
    saves = [save_after_epoch(EVERY, 4, 8), save_after_step(EVERY, 30, 99), save_at_end(EVERY, 99)]
    assert names(save.files["checkpoint"] for save in saves) == [
        "c1-000004.safetensors", "c1-step00000030.safetensors", "c1.safetensors",
    ]  # fmt: skip
    assert names(save.state for save in saves) == ["c1-000004-state", "c1-step00000030-state", "c1-state"]


def test_a_dot_in_the_name_is_no_suffix():
    save = save_at_end(replace(EVERY, name="v1.5"), 99)
    assert (save.files["checkpoint"].name, save.state.name) == ("v1.5.safetensors", "v1.5-state")


def test_the_last_epoch_the_last_step_and_other_turns_save_nothing():
    assert save_after_epoch(EVERY, 3, 8) is save_after_step(EVERY, 15, 99) is None
    assert save_after_epoch(EVERY, 8, 8) is save_after_step(EVERY, 30, 30) is None
    assert save_after_epoch(SaveConfig(Path(), "x"), 2, 8) is save_after_step(SaveConfig(Path(), "x"), 10, 99) is None


def test_states_are_saved_when_asked_for():
    quiet = replace(EVERY, save_state=False)
    assert save_after_epoch(quiet, 4, 8).state is save_after_step(quiet, 10, 99).state is None
    assert save_at_end(quiet, 99).state is None
    assert save_at_end(replace(quiet, save_state_at_end=True), 99).state is not None


def test_epochs_keep_the_last_n():
    assert names(save_after_epoch(replace(EVERY, last_n_epochs=2), 6, 8).expired) == [
        "c1-000002.safetensors", "c1-000002-state",
    ]  # fmt: skip
    apart = replace(EVERY, last_n_epochs=2, last_n_epochs_state=1)
    assert names(save_after_epoch(apart, 6, 8).expired) == ["c1-000002.safetensors", "c1-000004-state"]
    assert save_after_epoch(replace(EVERY, last_n_epochs=3), 6, 8).expired == ()


@pytest.mark.parametrize(("last", "expired"), [(9, 50), (10, 40), (15, 40), (25, 30), (100, None)])
def test_steps_keep_checkpoints_of_the_last_n_steps(last, expired):
    found = names(save_after_step(replace(EVERY, last_n_steps=last, save_state=False), 60, 99).expired)
    assert "c1-step00000060.safetensors" not in found
    assert found[:1] == ([f"c1-step{expired:08d}.safetensors"] if expired else [])


def test_the_final_save_ends_what_a_save_after_the_last_step_would():
    config = replace(EVERY, last_n_steps=15, last_n_steps_state=5)
    assert save_at_end(config, 60).expired == save_after_step(config, 60, 99).expired != ()
    assert save_at_end(config, 65).expired == ()


def test_a_run_without_states_deletes_none():
    quiet = replace(EVERY, save_state=False, last_n_epochs=1, last_n_steps=1)
    assert names(save_after_epoch(quiet, 4, 8).expired) == ["c1-000002.safetensors"]
    assert names(save_after_step(quiet, 20, 99).expired) == ["c1-step00000010.safetensors"]


def test_an_old_file_that_is_open_elsewhere_stays_and_is_told(tmp_path, monkeypatch):
    def is_open(*_, **__):
        raise PermissionError(13, "Permission denied")

    paths = (tmp_path / "a.safetensors", tmp_path / "a-state", tmp_path / "b.safetensors")
    paths[1].mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", is_open)
        patch.setattr(shutil, "rmtree", is_open)
        told = remove_expired(Save({}, None, paths))
    assert told == [f"could not delete {path} (Permission denied): delete it by hand" for path in paths]
    assert remove_expired(Save({}, None, paths)) == [] and not paths[1].exists()


def test_a_plan_lists_every_save_in_order():
    plan = names(save.files["checkpoint"] for save in planned_saves(EVERY, 25, 5, 5))
    assert plan == [
        "c1-step00000010.safetensors", "c1-000002.safetensors", "c1-step00000020.safetensors", "c1-000004.safetensors",
        "c1.safetensors",
    ]  # fmt: skip
    steps = SaveConfig(Path("out"), "c1", every_n_steps=10)
    plan = names(save.files["checkpoint"] for save in planned_saves(steps, 20, 5, 4))
    assert plan == ["c1-step00000010.safetensors", "c1.safetensors"]


def test_a_thousand_epochs_of_the_14b_model_are_told_in_terabytes():
    config = SaveConfig(Path("out"), "c1", every_n_epochs=10)
    use = disk_use(list(planned_saves(config, 20_000, 20, 1000)), {"checkpoint": 28_577_000_000}, 0)
    assert (use.saves, readable(use.written), use.kept) == (100, "2.9 TB", use.written)
    few = replace(config, last_n_epochs=3)
    kept = disk_use(list(planned_saves(few, 20_000, 20, 1000)), {"checkpoint": 28_577_000_000}, 0).kept
    assert kept == 4 * 28_577_000_000


def test_what_is_said_to_be_kept_is_what_the_folder_holds(tmp_path):
    config = replace(EVERY, folder=tmp_path, kinds=tuple(KINDS), last_n_epochs=1, last_n_steps=15, last_n_steps_state=5)
    saves = list(planned_saves(config, 100, 10, 10))
    for save in saves:
        for path in save.files.values():
            path.write_bytes(b"1234567")
        save.state.mkdir()
        remove_expired(save)
    assert disk_use(saves, dict.fromkeys(KINDS, 1000), 1).kept == sum(
        1 if path.is_dir() else 1000 for path in tmp_path.iterdir()
    )


def test_an_output_over_an_input_is_refused_by_any_name(tmp_path):
    base = tmp_path / "c1-000010.safetensors"
    base.touch()
    config = SaveConfig(tmp_path, "c1")
    (tmp_path / "link.safetensors").hardlink_to(base)
    for name in ("c1-000010.safetensors", "link.safetensors"):
        with pytest.raises(InputError, match="choose another --output_name"):
            check_saves([Save({"checkpoint": tmp_path / name}, None)], config, [base], SIZES)
    check_saves([Save({"checkpoint": tmp_path / "c1.safetensors"}, None)], config, [base], SIZES)


def test_a_folder_that_cannot_be_or_has_no_room_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output_dir"):
        check_saves([], SaveConfig(tmp_path / "file" / "out", "c1"), [], SIZES)
    with pytest.raises(InputError, match=r"one save \(checkpoint\) needs 1000000\.0 TB"):
        check_saves([], SaveConfig(tmp_path, "c1"), [], {"checkpoint": 10**18})


def test_metadata_is_text_and_tells_the_run():
    config = MetadataConfig(author="me", comment="hello")
    metadata = checkpoint_metadata(config, "c1", {"seed": 3, "steps": 20}, "0,875")
    expected = {"ss_seed": "3", "ss_steps": "20", "ss_output_name": "c1", "ss_training_comment": "hello"}
    expected |= {"modelspec.title": "c1", "modelspec.author": "me", "modelspec.timestep_range": "0,875"}
    assert expected.items() <= metadata.items()
    assert all(isinstance(value, str) for value in metadata.values())


def test_no_metadata_leaves_the_settings_out():
    metadata = checkpoint_metadata(MetadataConfig(settings=False, comment="hello"), "c1", {"seed": 3}, "0,1000")
    assert [key for key in metadata if key.startswith("ss_")] == ["ss_base_model_version"]
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"


def test_a_state_comes_back_as_it_was(tmp_path):
    state = some_state(settings={"seed": "1"}, optimizer={"groups": ({"lr": 0.5},), "state": {0: torch.ones(2)}})
    save_state(tmp_path / "a-state", state)
    loaded = read_state(tmp_path / "a-state")
    assert torch.equal(loaded.trained["a"], state.trained["a"])
    assert torch.equal(loaded.optimizer["state"][0], torch.ones(2)) and loaded.optimizer["groups"] == ({"lr": 0.5},)
    assert replace(loaded, trained={}, optimizer={}) == replace(state, trained={}, optimizer={})


def test_a_state_replaces_an_older_one_whole(tmp_path):
    for step in (1, 2):
        save_state(tmp_path / "a-state", some_state(step=step))
    assert read_state(tmp_path / "a-state").step == 2
    assert names(tmp_path.iterdir()) == ["a-state"]


def test_a_state_that_cannot_be_written_leaves_the_older_one(tmp_path):
    save_state(tmp_path / "a-state", some_state())
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path / "a-state", some_state(step=4, optimizer={"step": lambda: 0}))
    assert read_state(tmp_path / "a-state").step == 3


def test_a_state_of_other_settings_is_refused_with_what_differs(tmp_path):
    state = some_state(settings={"seed": "1", "ffid": "2"})
    with pytest.raises(InputError, match=r"another run: ffid 2 \(now 3\)"):
        check_settings(tmp_path, state, {"seed": "1", "ffid": "3"})


def test_a_folder_without_a_whole_state_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a state folder"):
        read_state(tmp_path)
    save_state(tmp_path / "s", some_state())
    content = (tmp_path / "s" / "state.pt").read_bytes()
    (tmp_path / "s" / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be used"):
        read_state(tmp_path / "s")


def test_a_state_with_a_wrong_bit_anywhere_is_refused_or_read_as_it_was(tmp_path):
    save_state(tmp_path / "s", some_state(trained={"values": torch.arange(999.0)}))
    path, draw = tmp_path / "s" / "state.pt", random.Random(0)
    content, refused = path.read_bytes(), 0
    for _ in range(150):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            state = read_state(tmp_path / "s")
        except InputError as error:
            refused += "cannot be used" in str(error) and "\n" not in str(error)
        else:
            assert torch.equal(state.trained["values"], torch.arange(999.0)) and state.step == 3
    assert refused > 100


@pytest.mark.parametrize(("processes", "accumulation", "per_epoch"), [(1, 1, 7), (1, 3, 3), (2, 1, 4), (2, 3, 2)])
def test_a_plan_counts_steps_per_epoch(processes, accumulation, per_epoch):
    batches = [(i,) for i in range(7)]
    plan = plan_training(batches, processes, accumulation, 1600, 10)
    assert (plan.steps_per_epoch, plan.steps, plan.epochs) == (per_epoch, 10 * per_epoch, 10)
    by_steps = plan_training(batches, processes, accumulation, per_epoch + 1, None)
    assert (by_steps.steps, by_steps.epochs) == (per_epoch + 1, 2)


def test_windows_share_the_epoch_and_the_last_is_as_long_as_is_left():
    plan = plan_training([(i,) for i in range(7)], 1, 3, 1600, 1)
    assert [plan.window(batch) for batch in range(7)] == [3, 3, 3, 3, 3, 3, 1]
    assert [batch for batch in range(7) if plan.ends_step(batch)] == [2, 5, 6]


def test_items_are_numbered_over_all_processes():
    batches = [(0, 1), (2,), (3, 4, 5)]
    assert first_items(batches, 0, 1) == [0, 2, 3]
    assert (first_items(batches, 0, 2), first_items(batches, 1, 2)) == ([0, 3], [2, 0])
