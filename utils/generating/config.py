"""What a generation is asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from utils.sampling.prompts import SamplePrompt
from utils.swap.plan import SwapConfig
from wan.errors import InputError

OUTPUT_TYPES = ("video", "images", "latent", "both", "latent_images")


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate (prompts, typed prompts or saved latents), from which files, into which folder."""

    task: str
    save_path: Path
    output_type: str
    fps: int | None  # None: that of the models with this VAE
    write_metadata: bool
    prompts: tuple[SamplePrompt, ...]
    typed_defaults: SamplePrompt | None  # set: prompts are typed, one a line
    latent_paths: tuple[Path, ...]
    dit: Path | None
    dit_high_noise: Path | None
    slices: tuple[Path, ...]  # each goes on top of the DiT that it was trained on
    slice_strengths: tuple[float, ...]
    loras: tuple[Path, ...]  # beside dit
    lora_multipliers: tuple[float, ...]
    loras_high_noise: tuple[Path, ...]  # beside dit_high_noise
    lora_multipliers_high_noise: tuple[float, ...]
    vae: Path | None
    t5: Path | None
    fp8_t5: bool
    clip: Path | None  # the image encoder, for tasks that read pictures through it
    tokenizer: Path | None
    solver: str
    boundary: float | None  # share of the timesteps above which dit_high_noise works
    guidance_scale_high: float | None  # None: what dit_high_noise suggests, else the task's
    swap: SwapConfig
    batch: int | None  # latents in a pass through the model; None: by their size
    device: torch.device
    dit_dtype: torch.dtype | None  # None: the file's
    vae_dtype: torch.dtype
    compile: bool  # the pointwise functions


def check_vae(prompt: SamplePrompt, vae: object | None) -> None:
    """InputError if the prompt starts from a picture and there is no VAE to encode it."""
    if prompt.image_path is not None and vae is None:
        raise InputError(f"--vae is missing: it encodes the picture {prompt.image_path}")
