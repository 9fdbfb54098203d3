"""Samples during training: the pictures and clips that show how far a concept has come.

Shapes: T frames, H W height and width in pixels, S text tokens, D text width.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from utils.sampling.batches import advance, decode_latents
from utils.sampling.defaults import SampleDefaults
from utils.sampling.denoising import (
    Denoising,
    Sample,
    Start,
    cut_lines,
    encode_samples,
    resolve_sample,
    size_line,
)
from utils.sampling.prompts import SamplePrompt
from utils.sampling.sample_metadata import sample_settings
from utils.sampling.starts import check_clip, encode_starts
from utils.sampling.writers import NO_SETTINGS, save_sample
from utils.slices.lora_files import LoraFile, read_loras
from utils.slices.loras_beside import lora_lines, loras_beside
from wan.configs import WanConfig, WanTask
from wan.model import WanModel
from wan.text_encoder import load_text_encoder
from wan.vae import WanVAE, load_vae

_STEPS = 20  # enough to judge by, and fewer than a task's own


@dataclass(frozen=True)
class SampleConfig:
    """What to sample, when, and with which files."""

    prompts: tuple[SamplePrompt, ...]
    vae: Path
    t5: Path
    tokenizer: Path | None
    vae_dtype: torch.dtype
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    at_first: bool = False
    clip: Path | None = None  # the image encoder, for tasks that read pictures through it
    batch: int | None = None  # latents that go through the model in one pass; None: by their size
    loras: tuple[Path, ...] = ()  # beside the model, while samples are drawn
    lora_multipliers: tuple[float, ...] = ()
    loras_high_noise: tuple[Path, ...] = ()  # beside the high-noise expert, where two are trained
    lora_multipliers_high_noise: tuple[float, ...] = ()
    fp8_t5: bool = False


@dataclass(frozen=True)
class PreparedSamples:
    """Prompts with their encoded text and pictures (CPU), and the VAE (on the CPU between samples)."""

    samples: tuple[Sample, ...]
    starts: tuple[Start, ...]
    seed_given: tuple[bool, ...]
    texts: Mapping[str, Tensor]
    vae: WanVAE
    fps: int
    batch: int | None  # latents in a pass; None: by their size
    loras: tuple[LoraFile, ...]
    loras_high_noise: tuple[LoraFile, ...] = ()  # beside the high-noise expert, where two are trained

    @property
    def settings(self) -> dict[str, str]:
        """What decides them beside the run's own settings and their prompts."""
        loras = [file.label for file in (*self.loras, *self.loras_high_noise)]
        return {"sample_loras": ", ".join(loras)} if loras else {}

    def denoisings(self) -> list[Denoising]:
        """The samples at their starts."""
        return [Denoising(sample, start) for sample, start in zip(self.samples, self.starts, strict=True)]


@dataclass(frozen=True)
class SavedSample:
    """A sample, its file, and its video [3, T, H, W] in [-1, 1]."""

    sample: Sample
    path: Path
    video_3THW: Tensor


def prepare_samples(
    config: SampleConfig,
    task: WanTask,
    model: WanConfig,
    seed: int,
    device: torch.device,
    defaults: SampleDefaults,
    say: Callable[[str], None],
) -> PreparedSamples:
    """Encodes the prompts and their pictures for the model on `device` and frees what encoded them.

    What a prompt leaves open comes from `defaults`, else from the task; its seed is the run's.
    """
    defaults = replace(defaults, steps=_STEPS if defaults.steps is None else defaults.steps)
    check_clip(task, config.clip)
    loras = read_loras(config.loras, config.lora_multipliers, model)
    loras_high = read_loras(config.loras_high_noise, config.lora_multipliers_high_noise, model)
    for line in lora_lines([*loras, *loras_high], " while samples are drawn"):
        say(line)
    samples = tuple(resolve_sample(prompt, task, seed, defaults=defaults) for prompt in config.prompts)
    for line in filter(None, map(size_line, config.prompts, samples)):
        say(line)
    vae = load_vae(config.vae, config.vae_dtype, "cpu", task.latents.channels)
    starts = encode_starts(samples, task, vae, config.clip, model.image_dim, device, say)
    widths = {"text_len": model.text_len, "text_dim": model.text_dim}
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=device, fp8=config.fp8_t5, **widths)
    for line in cut_lines(text_encoder, samples):
        say(line)
    texts = encode_samples(text_encoder, samples)
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    seed_given = tuple(prompt.seed is not None for prompt in config.prompts)
    return PreparedSamples(samples, tuple(starts), seed_given, texts, vae, task.fps, config.batch, loras, loras_high)


def due_after_step(config: SampleConfig | None, step: int) -> bool:
    """Whether samples follow optimizer step number `step`."""
    return config is not None and bool(config.every_n_steps) and step % config.every_n_steps == 0


def due_after_epoch(config: SampleConfig | None, epoch: int) -> bool:
    """Whether samples follow epoch number `epoch` (from 1)."""
    return config is not None and bool(config.every_n_epochs) and epoch % config.every_n_epochs == 0


def draw_samples(
    prepared: PreparedSamples,
    model: WanModel,
    device: torch.device,
    folder: Path,
    stem: str,
    weights: Mapping[str, object] | None,
    on_step: Callable[[], object] | None = None,
) -> list[SavedSample]:
    """Saves every sample as {stem}_{number}_{time}[_{seed, if the prompt gave it}]_000.png or .mp4.

    `weights` tells what it was sampled with, for the files' metadata; None leaves all metadata out.
    """
    denoisings = prepared.denoisings()
    source = "the model in training"
    with loras_beside(model, prepared.loras, device):
        advance(denoisings, model, None, prepared.texts, device, prepared.batch, on_step=on_step, source=source)
    return save_drawn(prepared, [own.latent_CFHW for own in denoisings], device, folder, stem, weights)


def save_drawn(
    prepared: PreparedSamples,
    latents: Sequence[Tensor],
    device: torch.device,
    folder: Path,
    stem: str,
    weights: Mapping[str, object] | None,
) -> list[SavedSample]:
    """Decodes the latents of all samples on `device`, and saves them as draw_samples does."""
    prepared.vae.to(device)
    time = datetime.now().strftime("%Y%m%d%H%M%S")
    saved = []
    videos = decode_latents(prepared.vae, latents)
    for number, (sample, video_3THW) in enumerate(zip(prepared.samples, videos, strict=True)):
        suffix = f"_{sample.seed}" if prepared.seed_given[number] else ""
        settings = NO_SETTINGS if weights is None else sample_settings(sample, **weights)
        path = save_sample(folder, f"{stem}_{number:02d}_{time}{suffix}", video_3THW, prepared.fps, settings)
        saved.append(SavedSample(sample, path, video_3THW))
    prepared.vae.to("cpu")
    return saved
