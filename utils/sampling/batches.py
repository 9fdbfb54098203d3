"""Samples of one size go through the model together, with and without their prompts, and through the VAE.

With swapped blocks every pass copies the whole model, whatever the batch is. How many rows a batch has follows from
sizes alone, never from free memory, so that a seed gives the same bits in every run.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width, T frames.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from utils.learning.conditions import Conditioning, predict
from utils.sampling.denoising import Denoising, check_finite
from wan.configs import WanConfig
from wan.model import WanModel
from wan.vae import WanVAE

# Latent and text tokens in a batch: of 512x512 four rows, which take no more memory than a training step of one.
_TOKENS_TOGETHER = 6144
_PIXELS_TOGETHER = 512 * 512  # that the VAE decodes at a time


def rows_together(latent_shape: Sequence[int], model: WanConfig, batch: int | None = None) -> int:
    """How many latents [C, F, H, W] go through the model in one batch: `batch`, or by default what their size allows.

    A sample with guidance is two of them.
    """
    if batch is not None:
        return batch
    tokens = math.prod(n // p for n, p in zip(latent_shape[-3:], model.patch_size, strict=True))
    return max(1, _TOKENS_TOGETHER // (tokens + model.text_len))


@torch.no_grad()
def advance(
    denoisings: Sequence[Denoising],
    model: WanModel,
    guidance_scale: float | None,
    texts: Mapping[str, Tensor],
    device: torch.device | str,
    batch: int | None = None,
    t_end: float = 0.0,
    on_step: Callable[[], object] | None = None,
    source: str = "the model",
) -> None:
    """Takes the steps at timesteps >= t_end with `model`, which runs on `device`; latents stay on the CPU in float32.

    A high-noise expert has t_end = 1000 * boundary; the low-noise one then takes the rest. Without a `guidance_scale`
    each sample has its own. `texts` comes from encode_samples; on_step is called after each step of each sample.
    InputError, with `source` and the step, if the model's output is not finite.
    """
    by_shape: dict[tuple, list[Denoising]] = {}
    for own in denoisings:
        # One that starts from a clean first frame has timesteps per token, which the others would only pay for.
        by_shape.setdefault((own.sample.latent_shape, own.start.clean_BCFHW is None), []).append(own)
    for (shape, _), same in by_shape.items():
        rows = rows_together(shape, model.config, batch)
        while active := [own for own in same if len(own.steps_down_to(t_end))]:
            velocities_BCFHW = _velocities(model, active, guidance_scale, texts, device, rows).cpu()
            for denoising, velocity_CFHW in zip(active, velocities_BCFHW, strict=True):
                denoising.step(velocity_CFHW)
                _check_step(denoising, source)
                if on_step:
                    on_step()


def _velocities(
    model: WanModel,
    samples: Sequence[Denoising],
    guidance_scale: float | None,
    texts: Mapping[str, Tensor],
    device: torch.device | str,
    rows: int,
) -> Tensor:
    """[B, C, F, H, W], at each sample's own timestep, by classifier-free guidance (Ho and Salimans 2022).

    That is u + g (c - u), which is c alone at g = 1. Both rows of a sample are given the same pictures.
    """
    scales = [own.sample.guidance_scale if guidance_scale is None else guidance_scale for own in samples]
    guided = [number for number, scale in enumerate(scales) if scale != 1]
    asked = [(own, texts[own.sample.prompt]) for own in samples]
    asked += [(samples[number], texts[samples[number].sample.negative_prompt]) for number in guided]
    parts = [asked[start : start + rows] for start in range(0, len(asked), rows)]
    found = torch.cat([_predicted(model, part, device) for part in parts])
    velocities_BCFHW, without_BCFHW = found[: len(samples)], found[len(samples) :]
    for number, without_CFHW in zip(guided, without_BCFHW, strict=True):
        velocities_BCFHW[number] = without_CFHW + scales[number] * (velocities_BCFHW[number] - without_CFHW)
    return velocities_BCFHW


def _predicted(model: WanModel, asked: Sequence[tuple[Denoising, Tensor]], device: torch.device | str) -> Tensor:
    """The model's outputs for the samples with these texts, in one pass."""
    samples = [own for own, _ in asked]
    latents_BCFHW = torch.stack([own.latent_CFHW for own in samples]).to(device)
    t_B = torch.stack([own.scheduler.timesteps[own.done].float() for own in samples]).to(device)
    context = [text_SD.to(device) for _, text_SD in asked]
    return predict(model, latents_BCFHW, t_B, context, _joined(samples).to(device))


def _joined(samples: Sequence[Denoising]) -> Conditioning:
    """What all samples start from, as one batch."""
    given = [(own.start.given.y_BCFHW, own.start.given.clip_BPI, own.start.given.starts_clean_B) for own in samples]
    columns = zip(*given, strict=True)
    return Conditioning(*(None if column[0] is None else torch.cat(column) for column in columns))


def _check_step(denoising: Denoising, source: str) -> None:
    where = f"the output of {source} in step {denoising.done} of {denoising.sample.steps}"
    advice = "its weights may be damaged, or trained at too high a learning rate"
    check_finite(denoising.latent_CFHW, f"{where} for {denoising.sample.prompt!r}", advice)


def decode_latents(vae: WanVAE, latents: Sequence[Tensor]) -> Iterator[Tensor]:
    """The video [3, T, H, W] of each latent [C, F, H, W]: float32 in [-1, 1], on the CPU; InputError if not finite.

    Those of one shape that follow each other are decoded together, as far as the memory for one of 512x512 goes.
    """
    for shape, same in groupby(latents, key=lambda latent_CFHW: latent_CFHW.shape):
        shaped, (frame_stride, *strides) = list(same), vae.stride
        pixels = math.prod(shape[-2:]) * math.prod(strides) * (frame_stride * (shape[1] - 1) + 1)
        room = max(1, _PIXELS_TOGETHER // pixels)
        for start in range(0, len(shaped), room):
            videos_B3THW = vae.decode(torch.stack(shaped[start : start + room])).float().cpu()
            for video_3THW in videos_B3THW:
                check_finite(video_3THW, "the output of the VAE", "try --vae_dtype float32")
                yield video_3THW
