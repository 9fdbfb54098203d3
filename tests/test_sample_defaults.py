"""Sampling settings that a checkpoint suggests, and what a sample's file says of its making."""

import json

import av
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import run, write_inputs, write_sample_models

from examples.tiny_wan.suggest_settings import TINY_WAN, suggest
from utils.sampling.defaults import SampleDefaults, read_sample_defaults
from utils.sampling.denoising import resolve_sample
from utils.sampling.prompts import SamplePrompt
from utils.sampling.sample_metadata import parameters_text, sample_settings, settings_of_latent
from utils.sampling.writers import save_sample
from wan.configs import TASKS
from wan.errors import InputError

SUGGESTED = {"sample_steps": "2", "sample_guidance_scale": "1.5", "sample_negative_prompt": ""}
TASK = TASKS["t2v-14B"]


def resolved(prompt: SamplePrompt, metadata=SUGGESTED):
    return resolve_sample(prompt, TASK, 0, defaults=read_sample_defaults(metadata, "base"))


def test_a_prompts_own_setting_comes_before_the_checkpoints_and_that_before_the_tasks():
    sample = resolved(SamplePrompt("a cat", guidance_scale=4.0))
    assert (sample.guidance_scale, sample.steps, sample.flow_shift) == (4.0, 2, TASK.flow_shift)
    assert sample.negative_prompt == ""
    assert resolved(SamplePrompt("a cat"), {}).steps == TASK.infer_steps


@pytest.mark.parametrize(
    ("key", "text", "allowed"),
    [
        ("sample_steps", "2.5", "a whole number from 1 to 1,000"),
        ("sample_steps", "0", "a whole number from 1 to 1,000"),
        ("sample_guidance_scale", "high", "a number from -1,000 to 1,000"),
        ("sample_guidance_scale", "nan", "a number from -1,000 to 1,000"),
        ("sample_flow_shift", "-1", "a number above 0 and up to 10,000"),
        ("sample_flow_shift", "inf", "a number above 0 and up to 10,000"),
    ],
)
def test_a_suggestion_that_cannot_be_used_is_refused(key, text, allowed):
    with pytest.raises(InputError, match=f"base.safetensors: {key} in its metadata must be {allowed}, not {text}"):
        read_sample_defaults({key: text}, "base.safetensors")


def test_suggestions_are_said_in_one_line():
    (line,) = read_sample_defaults(SUGGESTED, "base").lines("base")
    assert line == "base: its metadata suggests for samples steps 2, guidance scale 1.5, negative prompt ''"
    assert SampleDefaults().lines("base") == []


def test_writing_suggestions_keeps_every_tensor_and_key(tmp_path):
    save_file({"b": torch.arange(5.0), "a": torch.ones(2).bfloat16()}, path := tmp_path / "a.safetensors", {"x": "1"})
    before = load_file(path)
    suggest(path, TINY_WAN)
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"x": "1", **TINY_WAN}
    with pytest.raises(InputError, match="unknown key steps; allowed: sample_steps"):
        suggest(path, {"steps": "3"})


@pytest.fixture
def trained(tmp_path):
    """A run with samples on a base that suggests settings; its folder and lines."""
    suggest(write_inputs(tmp_path) / "base.safetensors", SUGGESTED)
    models = [*write_sample_models(tmp_path), "--vae_dtype", "fp32"]
    (tmp_path / "prompts.txt").write_text("a red, cat --w 16 --h 16 --d 7\na cat --w 16 --h 16 --f 5\n")
    return tmp_path, run(tmp_path, *models, "--sample_every_n_epochs", "2", "--max_train_epochs", "2")


def test_a_runs_samples_follow_and_tell_their_settings_and_the_checkpoint_keeps_the_suggestions(trained):
    folder, lines = trained
    assert sum("suggests for samples" in line for line in lines) == 1
    (picture,) = (folder / "out" / "sample").glob("one_e*.png")
    chunks = Image.open(picture).text
    told = json.loads(chunks["wan_sample"])
    expected = {"prompt": "a red, cat", "negative_prompt": "", "seed": 7, "steps": 2, "guidance_scale": 1.5}
    expected |= {"model": "one", "base_model": "base", "trained_steps": 10, "solver": "unipc"}
    assert expected.items() <= told.items()
    assert chunks["parameters"] == (
        "a red, cat\nSteps: 2, Sampler: UniPC, CFG scale: 1.5, Seed: 7, Size: 16x16, Frames: 1, Flow shift: 12, "
        "Model: one, Base model: base, Trained steps: 10"
    )
    with av.open(str(next((folder / "out" / "sample").glob("*.mp4")))) as clip:
        assert clip.metadata["comment"].startswith("a cat\nSteps: 2, ")
        assert json.loads(clip.metadata["description"])["frames"] == 5
    with safe_open(folder / "out" / "one.safetensors", "pt") as file:
        assert SUGGESTED.items() <= file.metadata().items()


def test_text_for_other_programs_quotes_what_would_be_cut():
    sample = resolve_sample(SamplePrompt("a cat\nwith: a hat", "dark, blurry"), TASK, 3)
    text = parameters_text(sample_settings(sample, model="a: b", slices=["one (ff 0.1)", "two"]))
    assert text.startswith("a cat\nwith: a hat\nNegative prompt: dark, blurry\nSteps: 50, ")
    assert 'Model: "a: b", Slices: "one (ff 0.1), two"' in text


def test_a_decoded_latent_tells_what_its_file_does():
    metadata = {"seeds": "3", "prompt": "狐狸", "height": "32", "width": "48", "video_length": "1", "infer_steps": "2"}
    text = parameters_text(settings_of_latent(metadata))
    assert text == "狐狸\nSteps: 2, Seed: 3, Size: 48x32, Frames: 1"
    assert settings_of_latent({}) == {}


def test_a_picture_without_settings_has_no_text(tmp_path):
    assert Image.open(save_sample(tmp_path, "a", torch.zeros(3, 1, 16, 16), 16)).text == {}
    path = save_sample(tmp_path, "b", torch.zeros(3, 1, 16, 16), 16, {"prompt": "狐狸"})
    assert Image.open(path).text["parameters"] == "狐狸"
