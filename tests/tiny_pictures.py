"""Tiny models that start from pictures, in the real file formats: random transformers, the oracles' VAEs and CLIP."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import ORACLE, write_sample_models
from torch import nn

from wan.configs import WanConfig
from wan.model import WanModel

_I2V = WanConfig("i2v", 48, 64, 4, 2, 36, 16, text_dim=48, freq_dim=16, text_len=8)
CONFIGS = {
    "t2v-14B": replace(_I2V, model_type="t2v", in_dim=16),
    "i2v-A14B": _I2V,
    "i2v-14B": replace(_I2V, image_dim=24),
    "flf2v-14B": replace(_I2V, model_type="flf2v", image_dim=24),
    "ti2v-5B": replace(_I2V, model_type="ti2v", in_dim=48, out_dim=48),
}
PICTURE_TASKS = [task for task in CONFIGS if task != "t2v-14B"]
SIZE = (64, 32)  # width and height that all of them can make


def tiny_model(task: str, seed: int = 0) -> WanModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WanModel(CONFIGS[task]).eval().requires_grad_(False)
        nn.init.normal_(model.head.head.weight, std=0.1)
        if CONFIGS[task].model_type == "flf2v":
            nn.init.normal_(model.img_emb.emb_pos)
    return model


def write_picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    levels = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(levels.byte().numpy()).save(path)
    return path


def write_models(folder: Path) -> Path:
    """A folder with TASK.safetensors of every task, vae and vae22, clip, t5 with its tokenizer, and pictures a, b."""
    write_sample_models(folder)
    for task in CONFIGS:
        save_file(tiny_model(task).state_dict(), folder / f"{task}.safetensors", {"num_heads": "4", "text_len": "8"})
    for name, file in (("vae_wan22", "vae22"), ("clip_vision", "clip")):
        stored = load_file(ORACLE / f"{name}.safetensors")
        weights = {key.removeprefix("weight."): value for key, value in stored.items() if key.startswith("weight.")}
        save_file(weights, folder / f"{file}.safetensors", {"num_heads": "2"})
    for seed, name in enumerate(("a", "b")):
        write_picture(folder / f"{name}.png", seed=seed)
    return folder


def vae_of(folder: Path, task: str) -> Path:
    return folder / ("vae22.safetensors" if task == "ti2v-5B" else "vae.safetensors")


def clip_of(folder: Path, task: str) -> Path | None:
    return folder / "clip.safetensors" if CONFIGS[task].image_dim else None
