"""LoRAs and batches of a run's samples: previews change, and nothing that the run trains or records."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_two_experts import run_both
from tiny_chain import train_concept
from tiny_run import flags, run, write_dataset, write_dit, write_inputs, write_sample_models

from utils.cli.slices import main
from utils.cli.train import parse_train
from utils.run.state import read_state
from wan.errors import InputError
from wan.model import WanModel

LINES = "a red cat --w 16 --h 16 --s 4 --d 7 --l 1\na cat --w 16 --h 16 --s 4 --d 8 --l 1\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What runs read; of both experts a slice as a checkpoint and as a LoRA, whose start is the base in float32."""
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    write_sample_models(folder)
    (folder / "prompts.txt").write_text(LINES, encoding="utf-8")
    (folder / "old.txt").write_text("a dog\na red dog\nthe cat\n", encoding="utf-8")
    for ffid, (name, seed) in enumerate((("base", 0), ("high", 5)), 1):
        write_dit(folder / f"{name}.safetensors", torch.float32, seed)
        train_concept(folder / f"{name}.safetensors", folder, f"{name}_taught", "0.3", ffid)
        slice_file, base = folder / f"{name}_taught.slice.safetensors", folder / f"{name}.safetensors"
        main(["to-lora", str(slice_file), "--base", str(base), "-o", str(folder / f"{name}.lora.safetensors")])
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def sampling(folder, *more):
    named = {"vae": "vae.safetensors", "t5": "t5.safetensors", "tokenizer": "spiece.model"}
    named |= {"sample_prompts": "prompts.txt"}
    return [*(f"--{flag}={folder / name}" for flag, name in named.items()), "--vae_dtype", "fp32", *more]


def lora(folder, name="base", flag="sample_lora"):
    return f"--{flag}={folder / name}.lora.safetensors"


def pictures(folder, when):
    """The pixels and settings of a turn's samples."""
    opened = [Image.open(path) for path in sorted((folder / "out" / "sample").glob(f"one_{when}_*.png"))]
    assert len(opened) == 2
    return np.stack([np.asarray(own).astype(int) for own in opened]), json.loads(opened[0].text["wan_sample"])


def written(folder):
    """The run's checkpoint and recorded predictions, byte for byte, and the state's tensors."""
    files = ["one.safetensors", "one.answers.safetensors", "one-best.slice.safetensors"]
    tensors = {name: load_file(folder / "out" / name) for name in files}
    tensors["state"] = read_state(folder / "out" / "one-state").trained
    return {(name, key): own for name, table in tensors.items() for key, own in table.items() if key != "_extra_state"}


def test_samples_show_the_lora_and_training_predictions_validation_and_files_are_those_without(folder):
    old = ["--preserve_prompts", str(folder / "old.txt"), "--preserve_levels", "2", "--preserve_every", "2"]
    kept = [
        *old,
        "--preserve_random",
        "4",
        "--save_state",
        "--save_best",
        "--max_train_epochs",
        "1",
        "--validation_dataset_config",
        str(held_out(folder)),
    ]
    often = sampling(folder, "--sample_at_first", "--sample_every_n_steps", "3", *kept)
    said = [line for line in run(folder, *often) if line.startswith("step ")]
    wanted, before = written(folder), pictures(folder, "e000000")[0]
    shutil.rmtree(folder / "out")
    lines = run(folder, *often, lora(folder))
    assert [line for line in lines if line.startswith("step ")] == said and len(said) == 2
    assert all(torch.equal(own, wanted[key]) for key, own in written(folder).items())
    shown, settings = pictures(folder, "e000000")
    assert settings["loras"] == ["base.lora 1"] and np.abs(shown - before).max() > 8
    assert any("beside 20 matrices while samples are drawn" in line for line in lines)


def held_out(folder):
    """A dataset of one picture that is not trained on."""
    if not (folder / "held" / "data.toml").exists():
        write_dataset(folder / "held", "held")
    return folder / "held" / "data.toml"


def test_samples_with_a_lora_are_those_of_the_model_that_it_was_made_of(folder):
    run(folder, *sampling(folder, "--sample_at_first", "--max_train_steps", "1"), lora(folder), "--ffid", "9")
    found, _ = pictures(folder, "e000000")
    shutil.rmtree(folder / "out")
    taught = ["--dit", str(folder / "base_taught.safetensors"), "--ffid", "9"]
    run(folder, *sampling(folder, "--sample_at_first", "--max_train_steps", "1"), *taught)
    assert np.abs(found - pictures(folder, "e000000")[0]).max() <= 1


@pytest.mark.slow
def test_two_experts_sample_with_a_lora_each(folder):
    high = f"--sample_lora_high_noise={folder / 'high.lora.safetensors'}"
    often = ["--sample_at_first", "--max_train_steps", "2"]
    run_both(folder, *sampling(folder, *often), lora(folder), high, "--mixed_precision", "no")
    found, settings = pictures(folder, "e000000")
    assert (settings["loras"], settings["loras_high_noise"]) == (["base.lora 1"], ["high.lora 1"])
    shutil.rmtree(folder / "out")
    taught = ["--dit", str(folder / "base_taught.safetensors"), "--ffid", "9", "--mixed_precision", "no"]
    taught += ["--dit_high_noise", str(folder / "high_taught.safetensors")]
    run_both(folder, *sampling(folder, *often), *taught)
    assert np.abs(found - pictures(folder, "e000000")[0]).max() <= 1


def passes(monkeypatch):
    """The sizes of the batches that go through models without gradient from now on."""
    sizes, forward = [], WanModel.forward

    def counted(model, x, *rest):
        if not torch.is_grad_enabled():
            sizes.append(len(x))
        return forward(model, x, *rest)

    monkeypatch.setattr(WanModel, "forward", counted)
    return sizes


def test_a_preview_of_four_steps_without_guidance_is_four_passes_for_all_prompts(folder, monkeypatch):
    sizes = passes(monkeypatch)
    run(folder, *sampling(folder, "--sample_at_first", "--max_train_steps", "1"), lora(folder))
    assert sizes == [2] * 4


def test_recorded_predictions_share_passes_across_prompts_and_are_those_made_alone(folder, monkeypatch):
    sizes = passes(monkeypatch)
    t5 = [f"--t5={folder / 't5.safetensors'}", f"--tokenizer={folder / 'spiece.model'}"]
    old = [*t5, "--preserve_prompts", str(folder / "old.txt"), "--preserve_levels", "4", "--max_train_steps", "4"]
    old += ["--preserve_random", "0"]
    run(folder, *old)
    together, found = list(sizes), load_file(folder / "out" / "one.answers.safetensors")
    shutil.rmtree(folder / "out")
    sizes.clear()
    run(folder, *old, "--sample_batch", "1")
    assert len(together) == 2 and sum(together) == 12  # of two sizes
    assert sizes == [1] * 12
    for key, own in load_file(folder / "out" / "one.answers.safetensors").items():
        torch.testing.assert_close(found[key], own, atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_another_batch_is_another_run_and_the_default_one_is_not_recorded(folder):
    often = sampling(folder, "--sample_every_n_epochs", "1", "--save_state")
    run(folder, *often, "--max_train_epochs", "1")
    assert "sample_batch" not in read_state(folder / "out" / "one-state").settings
    resume = ["--resume", "latest", "--max_train_epochs", "2"]
    with pytest.raises(InputError, match=r"sample_batch by size \(now 2\)"):
        run(folder, *often, "--resume", str(folder / "out" / "one-state"), "--sample_batch", "2")
    run(folder, *often, *resume)
    shutil.rmtree(folder / "out")
    run(folder, *often, "--max_train_epochs", "1", "--sample_batch", "2")
    with pytest.raises(InputError, match=r"sample_batch 2 \(now by size\)"):
        run(folder, *often, "--resume", str(folder / "out" / "one-state"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--sample_lora", "base.lora.safetensors"], "--sample_lora needs --sample_prompts"),
        (["--sample_lora_multiplier", "0.5"], "--sample_lora_multiplier has no effect without --sample_lora"),
        (["--sample_lora_high_noise", "base.lora.safetensors"], "is for two experts: give --dit_high_noise too"),
        (["--sample_lora", "nowhere.safetensors"], "--sample_lora nowhere.safetensors does not exist"),
        (["--sample_batch", "4"], "--sample_batch 4 has no effect without --sample_prompts or --preserve_prompts"),
        (
            ["--sample_lora", *["base.lora.safetensors"] * 3, "--sample_lora_multiplier", "1", "2"],
            "each of the 3 LoRAs",
        ),
    ],
)
def test_flags_that_do_nothing_or_name_no_file_are_refused(folder, monkeypatch, more, told):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=told):
        parse_train(flags(folder, *more))


def test_a_lora_of_another_model_is_refused_before_the_model_loads(folder, tmp_path, monkeypatch):
    save_file({"lora_unet_down_blocks_0_proj.lora_down.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    monkeypatch.setattr("utils.run.preparing.load_with_slices", None)
    with pytest.raises(InputError, match="it is one of Stable Diffusion"):
        run(folder, *sampling(folder, "--sample_at_first", "--sample_lora", str(tmp_path / "a.safetensors")))
