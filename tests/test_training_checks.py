"""What a run would write, checked before its model loads: over inputs, over other concepts, in the way of folders."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_run import run, write_inputs, write_sample_models

from utils.run import preparing
from utils.slice_saving import read_header, read_ledger
from wan.errors import InputError

KINDS = {"checkpoint": "one.safetensors", "slice": "one.slice.safetensors", "lora": "one.lora.safetensors"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    write_sample_models(folder)
    run(folder, "--max_train_epochs", "1", "--save_as", *KINDS)
    (folder / "out").rename(folder / "trained")
    return folder


@pytest.fixture
def folder(files):
    (files / "out").mkdir()
    yield files
    shutil.rmtree(files / "out")


def refusal(folder, monkeypatch, *more):
    def too_late(*_):
        raise AssertionError("the model is loaded")

    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(preparing, "load_with_slices", too_late)
        run(folder, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "where"), [("out/sample", "the folder of samples"), ("logs", "--logging_dir")])
def test_a_file_in_the_place_of_a_folder_is_named(folder, monkeypatch, name, where):
    (folder / name).touch()
    samples = ["--sample_prompts", str(folder / "prompts.txt"), "--sample_at_first", "--logging_dir", f"{folder}/logs"]
    files = ["--vae", str(folder / "vae.safetensors"), "--t5", str(folder / "t5.safetensors")]
    told = refusal(folder, monkeypatch, *samples, *files, "--ffid", "3")
    (folder / name).unlink()
    assert told == f"{where} {folder / name} cannot be created: a file is in the way"


INPUTS = {
    "--vae": "vae.safetensors", "--t5": "t5.safetensors", "--tokenizer": "spiece.model", "--slices": "a.safetensors",
    "--sample_prompts": "prompts.txt", "--preserve_prompts": "prompts.txt", "--dataset_config": "data.toml",
}  # fmt: skip


@pytest.mark.parametrize("flag", INPUTS)
def test_no_file_that_a_flag_names_is_overwritten(folder, monkeypatch, flag):
    shutil.copy(folder / "trained" / "one.slice.safetensors", folder / "a.safetensors")
    (folder / "out" / "one.safetensors").hardlink_to(folder / INPUTS[flag])
    more = ["--ffid", "3", flag, str(folder / INPUTS[flag])]
    if flag == "--sample_prompts":
        more += ["--sample_at_first"]
    if flag in ("--sample_prompts", "--preserve_prompts"):
        more += ["--vae", str(folder / "vae.safetensors"), "--t5", str(folder / "t5.safetensors")]
    told = refusal(folder, monkeypatch, *more)
    assert f"one.safetensors over {folder / INPUTS[flag]}, which it reads" in told


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_another_slice_is_not_overwritten(folder, monkeypatch, kind):
    shutil.copy(folder / "trained" / KINDS[kind], folder / "out")
    told = refusal(folder, monkeypatch, "--save_as", kind, "--ffid", "3")
    assert f"{KINDS[kind]} holds one (ff 0.1 ffid 2), and the run would replace it with ff 0.1 ffid 3" in told
    assert "choose another --output_name, or move the file" in told


def test_a_file_that_is_written_on_the_way_is_looked_at_too(folder, monkeypatch):
    shutil.copy(folder / "trained" / "one.safetensors", folder / "out" / "one-000001.safetensors")
    more = ("--ffid", "3", "--max_train_epochs", "2")
    assert "one-000001.safetensors holds" in refusal(folder, monkeypatch, *more, "--save_every_n_epochs", "1")
    assert "one-000001.safetensors" in refusal(folder, monkeypatch, "--ffid", "3", "--max_train_epochs", "1")


def test_the_same_slice_is_trained_again_under_its_name_with_overwrite(folder):
    for name in KINDS.values():
        shutil.copy(folder / "trained" / name, folder / "out")
    told = run(folder, "--ff", "0.10", "--max_train_epochs", "1", "--save_as", *KINDS, "--overwrite")
    assert not any("will be replaced" in line or "are left" in line for line in told)


@pytest.mark.parametrize("content", ["other", "damaged"])
def test_a_file_without_a_ledger_is_replaced_with_a_note(folder, content):
    path = folder / "out" / "one.safetensors"
    path.write_bytes(b"x")
    if content == "other":
        save_file(load_file(folder / "base.safetensors"), path)
    told = run(folder, "--max_train_epochs", "1", "--overwrite")
    assert any(line.startswith(f"note: {path} will be replaced") for line in told)
    assert [entry["ffid"] for entry in read_ledger(read_header(path)[1])] == [2]


def test_a_name_that_the_loader_takes_for_a_shard_is_refused(folder, monkeypatch):
    name = ("--output_name", "x-00001-of-00002")
    assert "one part of a checkpoint in several files" in refusal(folder, monkeypatch, *name)
    run(folder, *name, "--save_as", "slice", "--max_train_epochs", "1")


@pytest.mark.parametrize("name", ["one.safetensors", "one-000001.safetensors"])
def test_a_folder_in_the_way_of_a_file_is_told_before_training(folder, monkeypatch, name):
    (folder / "out" / name).mkdir()
    told = refusal(folder, monkeypatch, "--save_every_n_epochs", "1")
    assert f"{name} is a folder, and the run writes a file of that name" in told


def test_a_file_in_the_way_of_a_state_is_told_before_training(folder, monkeypatch):
    (folder / "out" / "one-state").touch()
    assert "one-state has the name of a state's folder and is not one" in refusal(folder, monkeypatch, "--save_state")
