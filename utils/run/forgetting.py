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
from utils.data.items import Item
from utils.learning.flow_matching import TimestepConfig, add_noise, draw_generator
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


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed inputs with general captions, and what the model that the run began with predicted at them."""

    noisy_NCFHW: Tensor
    t_N: Tensor
    texts: tuple[Tensor, ...]  # [S, D] each
    start_NCFHW: Tensor

    def state(self) -> dict:
        """What a state keeps, so that a resumed run measures from the same start."""
        return {"noisy": self.noisy_NCFHW, "t": self.t_N, "texts": list(self.texts), "start": self.start_NCFHW}

    def share(self, rank: int, world: int) -> "Probe":
        """The part of it that one of `world` processes measures."""
        return Probe(
            self.noisy_NCFHW[rank::world], self.t_N[rank::world], self.texts[rank::world], self.start_NCFHW[rank::world]
        )

    @classmethod
    def from_state(cls, state: Mapping) -> "Probe":
        return cls(state["noisy"], state["t"], tuple(state["texts"]), state["start"])


def encode_probe(
    t5: Path, tokenizer: Path | None, captions: Sequence[str], model: WanConfig, accelerator: Accelerator
) -> list[Tensor]:
    """The captions, [S, D] each."""
    texts = [[]]
    if accelerator.is_main_process:  # the text encoder of 14B models takes 11 GB
        where = {"device": accelerator.device, "text_len": model.text_len, "text_dim": model.text_dim}
        encoder = load_text_encoder(t5, tokenizer, **where)
        texts = [[encoder([caption])[0].bfloat16().cpu() for caption in captions]]
    broadcast_object_list(texts)
    return texts[0]


def start_probe(asked: ProbedOn, model: WanModel, most_values: int, device: torch.device) -> Probe:
    """A probe that starts from the model as it is now."""
    noisy, t, texts = probe_inputs(asked.texts, asked.items, asked.timesteps)
    return Probe(noisy, t, texts, predictions(model, noisy, t, texts, most_values, device))


def probe_inputs(
    texts: Sequence[Tensor], items: Sequence[Item], timesteps: TimestepConfig
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Noisy latents [N, C, 1, H, W], timesteps [N] and texts: every caption at each noise level of a smallest picture.

    Of a clip the first latent frame is taken.
    """
    item = min(items, key=lambda item: (math.prod(item.latent_shape), item.name))
    latents_CFHW = read_latents(item.latents)[:, :1].float()
    sigmas = levels(timesteps, LEVELS, tuple(latents_CFHW.shape[-2:]))
    places = [(number, level) for number in range(len(texts)) for level in range(LEVELS)]
    generators = [draw_generator(SEED, "forgetting probe", *place) for place in places]
    noise_NCFHW = torch.stack([torch.randn(latents_CFHW.shape, generator=own) for own in generators])
    sigma_N = sigmas[[level for _, level in places]]
    noisy_NCFHW, t_N, _ = add_noise(latents_CFHW.expand_as(noise_NCFHW), noise_NCFHW, sigma_N)
    return noisy_NCFHW, t_N, tuple(texts[number] for number, _ in places)


@torch.no_grad()
def predictions(
    model: WanModel,
    noisy_NCFHW: Tensor,
    t_N: Tensor,
    texts: Sequence[Tensor],
    most_values: int,
    device: torch.device,
) -> Tensor:
    """[N, C, F, H, W] float32 on the CPU, in batches of at most `most_values` values, or of one."""
    found = []
    for numbers in parts(range(len(t_N)), most_values // noisy_NCFHW[0].numel()):
        chosen = list(numbers)
        context = [texts[number].to(device) for number in chosen]
        found.append(model(noisy_NCFHW[chosen].to(device), t_N[chosen].to(device), context).float().cpu())
    return torch.cat(found)


def forgetting_sums(model: WanModel, probe: Probe, most_values: int, device: torch.device) -> Tensor:
    """[2, 1 + bins] float64: squared distances from the run's start and their number, all of them, then by bin."""
    now_NCFHW = predictions(model, probe.noisy_NCFHW, probe.t_N, probe.texts, most_values, device)
    sums = no_sums()
    add_to(sums, probe.t_N, (now_NCFHW - probe.start_NCFHW).square().flatten(1).mean(1))
    return sums
