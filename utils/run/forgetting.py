"""How far a run has moved the model's predictions at general captions, which are neither trained nor preserved.

Shapes: N predictions, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from utils.data.cache_files import read_latents
from utils.data.given_pictures import given_to_item, repeated, starts_clean
from utils.data.items import Item
from utils.learning.conditions import loss_mask, predict, with_clean_start
from utils.learning.flow_matching import TIMESTEPS, TimestepConfig, add_noise, draw_generator, sample_losses
from utils.run.noise_bins import SEED, add_to, levels, no_sums, parts
from wan.configs import WanConfig
from wan.model import WanModel
from wan.text_encoder import load_text_encoder

CAPTIONS = 16  # at most
LEVELS = 4  # noise levels at which each caption is asked


@dataclass(frozen=True)
class ProbedOn:
    """What a probe is made of: encoded captions, pictures to add noise to, and the noise levels of the run."""

    texts: Sequence[Tensor]
    items: Sequence[Item]
    timesteps: TimestepConfig
    i2v_share: float = 0.0


@dataclass(frozen=True, eq=False)
class ProbeInputs:
    """Noisy latents with their timesteps and texts [S, D], of one clip, whose pictures go with all of them."""

    noisy_NCFHW: Tensor
    t_N: Tensor
    texts: tuple[Tensor, ...]
    y_CFHW: Tensor | None
    clip_PI: Tensor | None
    starts_clean: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed inputs with general captions, and what the model that the run began with predicted at them."""

    inputs: ProbeInputs
    start_NCFHW: Tensor

    def state(self) -> dict:
        """What a state keeps, so that a resumed run measures from the same start."""
        own = self.inputs
        state = {"noisy": own.noisy_NCFHW, "t": own.t_N, "texts": list(own.texts), "start": self.start_NCFHW}
        if own.y_CFHW is None and not any(own.starts_clean):
            return state  # as earlier versions save it
        return {**state, "y": own.y_CFHW, "clip": own.clip_PI, "starts_clean": list(own.starts_clean)}

    def share(self, rank: int, world: int) -> "Probe":
        """The part of it that one of `world` processes measures."""
        own = self.inputs
        part = (own.noisy_NCFHW[rank::world], own.t_N[rank::world], own.texts[rank::world])
        inputs = ProbeInputs(*part, own.y_CFHW, own.clip_PI, own.starts_clean[rank::world])
        return Probe(inputs, self.start_NCFHW[rank::world])

    @classmethod
    def from_state(cls, state: Mapping) -> "Probe":
        starts = tuple(state.get("starts_clean") or [False] * len(state["t"]))
        given = (state.get("y"), state.get("clip"), starts)
        return cls(ProbeInputs(state["noisy"], state["t"], tuple(state["texts"]), *given), state["start"])


def encode_probe(
    t5: Path, tokenizer: Path | None, fp8: bool, captions: Sequence[str], model: WanConfig, accelerator: Accelerator
) -> list[Tensor]:
    """The captions, [S, D] each."""
    texts = [[]]
    if accelerator.is_main_process:  # the text encoder of 14B models takes 11 GB
        where = {"device": accelerator.device, "text_len": model.text_len, "text_dim": model.text_dim}
        encoder = load_text_encoder(t5, tokenizer, fp8=fp8, **where)
        texts = [[encoder([caption])[0].bfloat16().cpu() for caption in captions]]
    broadcast_object_list(texts)
    return texts[0]


def start_probe(asked: ProbedOn, model: WanModel, most_values: int, device: torch.device) -> Probe:
    """A probe that starts from the model as it is now."""
    inputs = probe_inputs(asked)
    return Probe(inputs, predictions(model, inputs, most_values, device))


def probe_inputs(asked: ProbedOn) -> ProbeInputs:
    """Every caption at each noise level of a smallest picture or clip, of which the first latent frame is taken.

    Where it starts from pictures, the first and the last one are taken: at a frame that is given whole there would be
    nothing to predict.
    """
    item = min(asked.items, key=lambda item: (math.prod(item.latent_shape), item.name))
    latents_CFHW = read_latents(item.latents).float()
    places = [(number, level) for number in range(len(asked.texts)) for level in range(LEVELS)]
    draw = (asked.i2v_share, latents_CFHW.shape[1], SEED, "forgetting probe's first frame")
    starts = [starts_clean(*draw, *own) for own in places]
    y_CFHW, clip_PI = given_to_item(item)
    frames = [0] if y_CFHW is None and not any(starts) else [0, -1]
    latents_CFHW = latents_CFHW[:, frames]
    y_CFHW = None if y_CFHW is None else y_CFHW[:, frames]
    sigmas = levels(asked.timesteps, LEVELS, tuple(latents_CFHW.shape[-2:]))
    generators = [draw_generator(SEED, "forgetting probe", *own) for own in places]
    noise_NCFHW = torch.stack([torch.randn(latents_CFHW.shape, generator=own) for own in generators])
    sigma_N, clean_NCFHW = sigmas[[level for _, level in places]], latents_CFHW.expand_as(noise_NCFHW)
    noisy_NCFHW, t_N, _ = add_noise(clean_NCFHW, noise_NCFHW, sigma_N)
    noisy_NCFHW = with_clean_start(noisy_NCFHW, clean_NCFHW, torch.tensor(starts))
    texts = tuple(asked.texts[number] for number, _ in places)
    return ProbeInputs(noisy_NCFHW, t_N, texts, y_CFHW, clip_PI, tuple(starts))


@torch.no_grad()
def predictions(model: WanModel, inputs: ProbeInputs, most_values: int, device: torch.device) -> Tensor:
    """[N, C, F, H, W] float32 on the CPU, in batches of at most `most_values` values, or of one."""
    found, noisy_NCFHW = [], inputs.noisy_NCFHW
    for numbers in parts(range(len(inputs.t_N)), most_values // noisy_NCFHW[0].numel()):
        chosen = list(numbers)
        context = [inputs.texts[number].to(device) for number in chosen]
        given = repeated(inputs.y_CFHW, inputs.clip_PI, [inputs.starts_clean[number] for number in chosen]).to(device)
        noisy_BCFHW, t_B = noisy_NCFHW[chosen].to(device), inputs.t_N[chosen].to(device)
        found.append(predict(model, noisy_BCFHW, t_B, context, given).float().cpu())
    return torch.cat(found)


def forgetting_sums(model: WanModel, probe: Probe, most_values: int, device: torch.device) -> Tensor:
    """[2, 1 + bins] float64: squared distances from the run's start and their number, all of them, then by bin."""
    inputs = probe.inputs
    now_NCFHW = predictions(model, inputs, most_values, device)
    given = repeated(None, None, inputs.starts_clean)
    counted = loss_mask(given, now_NCFHW.shape[2])
    sums = no_sums()
    add_to(sums, inputs.t_N, sample_losses(now_NCFHW, probe.start_NCFHW, inputs.t_N / TIMESTEPS, "none", counted))
    return sums
