"""Datasets of a few pictures or clips, and the caching jobs on them, with the oracle's VAE and a stand-in encoder."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import utils.caching as caching
from utils.cli.cache import parse_cache_latents, parse_cache_text

ORACLE = Path(__file__).parent / "oracle"


class FakeEncoder:
    """Tokens that tell their caption: as many as it has letters, filled with that number; the end is not cut."""

    text_len = 30

    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = torch.nn.Linear(2, 2)

    def __call__(self, prompts):
        return [torch.full((len(prompt) + 1, 8), float(len(prompt))) for prompt in prompts]

    def tokenize(self, prompt):
        return list(range(len(prompt) + 1))

    def count_tokens(self, prompt):
        return len(prompt) + 1


def write_vae(folder, name):
    oracle = load_file(ORACLE / f"{name}.safetensors")
    weights = {key.removeprefix("weight."): oracle[key] for key in oracle if key.startswith("weight.")}
    save_file(weights, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def write_pictures(folder):
    """Three captioned pictures and the file of their dataset."""
    rng = np.random.default_rng(1)
    (folder / "pics").mkdir()
    for name, (width, height) in {"b": (40, 32), "a": (32, 32), "c": (70, 20)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "pics" / f"{name}.png")
        (folder / "pics" / f"{name}.txt").write_text(f" picture {name}\n", encoding="utf-8")
    return write_config(folder, image_directory=str(folder / "pics"), caption_extension=".txt")


def write_config(folder, **dataset):
    table = {"cache_directory": str(folder / "cache"), "resolution": [32, 32], **dataset}
    (folder / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return folder / "data.json"


def make_clip(folder, frames):
    folder.mkdir()
    rng = np.random.default_rng(2)
    for number in range(frames):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number:03d}.png")


def videos(folder, lengths, **settings):
    for name, frames in lengths.items():
        make_clip(folder / name, frames)
    lines = [json.dumps({"video_path": str(folder / name), "caption": f"clip {name}"}) for name in lengths]
    (folder / "clips.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return write_config(folder, video_jsonl_file=str(folder / "clips.jsonl"), **settings)


def cache_latents(config, vae_file, *flags):
    """What the job says."""
    said = []
    argv = ["--dataset_config", str(config), "--vae", str(vae_file), "--device", "cpu", "--num_workers", "2", *flags]
    caching.cache_latents(parse_cache_latents(argv), said.append)
    return said


def names(folder):
    return sorted(path.name for path in (folder / "cache").iterdir())


def cache_text(config, t5, *flags):
    argv = ["--dataset_config", str(config), "--t5", str(t5), "--device", "cpu", "--batch_size", "2", *flags]
    said = []
    caching.cache_text(parse_cache_text(argv), said.append)
    return said
