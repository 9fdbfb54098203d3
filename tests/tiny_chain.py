"""Two concepts on a tiny Wan, one after the other: their checkpoints and slice files, for the tests."""

from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from safetensors.torch import save_file

from utils.selective_finetune import attach_slice
from utils.slice_saving import UNFINISHED, save_checkpoint, save_slice, this_process
from wan.configs import WanConfig
from wan.loading import load_dit
from wan.model import WanModel

CONFIG = WanConfig("t2v", 48, 96, 4, 3, 16, 16, text_dim=24, freq_dim=32, text_len=7)
METADATA = {"num_heads": "4", "text_len": "7"}
LEFT = f".{this_process().split('-')[0]}-4194399-1{UNFINISHED}"  # by a process of this machine that is gone


def write_base(
    path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, prefix: str = "", config: WanConfig = CONFIG
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = {prefix + name: tensor.to(dtype) for name, tensor in WanModel(config).state_dict().items()}
    save_file(weights, path, METADATA)
    return path


def train_concept(base: Path, folder: Path, name: str, ff: str, ffid: int, compute: torch.dtype | None = None):
    """Moves a slice of `base` at random; writes name.safetensors and name.slice.safetensors with the same metadata."""
    trained = attach_slice(load_dit(base, compute), ff, ffid)
    draw = torch.Generator().manual_seed(ffid)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    told = {"ss_output_name": name, "ss_seed": "3"}
    now = datetime.now(timezone.utc)
    with patch("utils.slice_saving.datetime", Mock(now=lambda zone: now)):  # one moment in both files
        save_checkpoint(trained, base, folder / f"{name}.safetensors", told, concept=name, steps=10 * ffid)
        save_slice(trained, base, folder / f"{name}.slice.safetensors", told, concept=name, steps=10 * ffid)
    return trained


def write_chain(folder: Path, config: WanConfig = CONFIG) -> Path:
    """base, one (ff 0.05, ffid 2), two on top of it (ff 0.03, ffid 1) as checkpoints and slices; the folder."""
    write_base(folder / "base.safetensors", config=config)
    train_concept(folder / "base.safetensors", folder, "one", "0.05", 2)
    train_concept(folder / "one.safetensors", folder, "two", "0.03", 1)
    return folder


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
