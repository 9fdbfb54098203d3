"""What a run does to pictures that it does not train on, and to the rest of the model.

Validation loss: the training loss at fixed noise and fixed noise levels of held-out pictures. Forgetting: how far the
predictions at general captions have moved from those of the model that the run began with (mean squared distance).
Shapes: N predictions, B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.data.cache_files import latents_shape, read_latents, read_text
from utils.data.items import Item
from utils.data.sources import DatasetConfig
from utils.learning.flow_matching import TIMESTEPS, TimestepConfig, add_noise, draw_generator, sample_losses, sigmas_of
from wan.model import WanModel

LEVELS = 8  # noise levels at which each held-out picture is validated
PROBE_LEVELS = 4  # and each general caption
PROBE_CAPTIONS = 16
_EDGES = (0, 250, 500, 750, 1000)  # of the bins, as timesteps


@dataclass(frozen=True)
class ValidationConfig:
    """On what and when a run is validated, and what is kept of it; `t5` encodes the captions of the probe."""

    dataset: DatasetConfig | None = None  # None: what validation_split holds out of the training dataset, if anything
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    save_best: bool = False
    t5: Path | None = None  # None: no probe
    tokenizer: Path | None = None

    def is_due_after_step(self, step: int) -> bool:
        return bool(self.every_n_steps) and step % self.every_n_steps == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        return bool(self.every_n_epochs) and epoch % self.every_n_epochs == 0


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


@dataclass(eq=False)
class Validation:
    """What a run is validated on; `best` is the lowest validation loss so far."""

    config: ValidationConfig
    items: Sequence[Item]
    timesteps: TimestepConfig
    seed: int
    most_values: int  # of latents, in a batch
    probe: Probe | None
    best: float = math.inf

    def measure(self, model: WanModel, accelerator: Accelerator) -> dict[str, float]:
        """The curves' next values by their names; every process measures its share."""
        device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
        sums = {}
        if self.items:
            own = self.items[rank::world]
            sums["loss"] = validation_sums(model, own, self.timesteps, self.seed, self.most_values, device)
        if self.probe:
            sums["forgetting"] = forgetting_sums(model, self.probe.share(rank, world), self.most_values, device)
        values = {}
        for name, own in sums.items():
            values |= curves(name, accelerator.reduce(own.to(device, torch.float32), "sum"))
        return values

    def state(self) -> dict:
        return {"best": self.best, "probe": self.probe.state() if self.probe else None}

    def load_state(self, state: Mapping) -> None:
        """Continues from what the state's run had found; the probe measures from that run's start."""
        self.best = state["best"]
        self.probe = Probe.from_state(state["probe"]) if state["probe"] else None


@torch.no_grad()
def validation_sums(
    model: WanModel,
    items: Sequence[Item],
    timesteps: TimestepConfig,
    seed: int,
    most_values: int,
    device: torch.device,
) -> Tensor:
    """[2, 1 + bins] float64: summed losses and their number, over all noise levels, then by bin of them.

    A batch has at most `most_values` values of latents, unless a single picture has more.
    """
    sums = torch.zeros(2, len(_EDGES), dtype=torch.float64)
    for item in items:
        latents_CFHW, text_SD = read_latents(item.latents).float(), read_text(item.text)
        sigmas = _levels(timesteps, LEVELS, tuple(latents_CFHW.shape[-2:]))
        for numbers in _parts(range(LEVELS), most_values // latents_CFHW.numel()):
            generators = [draw_generator(seed, "validation", item.name, number) for number in numbers]
            noise_BCFHW = torch.stack([torch.randn(latents_CFHW.shape, generator=own) for own in generators])
            sigma_B = sigmas[list(numbers)]
            noisy_BCFHW, t_B, target_BCFHW = add_noise(latents_CFHW.expand_as(noise_BCFHW), noise_BCFHW, sigma_B)
            context = [text_SD.to(device)] * len(numbers)
            predicted_BCFHW = model(noisy_BCFHW.to(device), t_B.to(device), context).float().cpu()
            _add(sums, t_B, sample_losses(predicted_BCFHW, target_BCFHW, sigma_B, timesteps.weighting))
    return sums


def probe_inputs(
    texts: Sequence[Tensor], items: Sequence[Item], timesteps: TimestepConfig, seed: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Noisy latents [N, C, 1, H, W], timesteps [N] and texts: every caption at each noise level of a smallest picture.

    Of a clip the first latent frame is taken.
    """
    item = min(items, key=lambda item: (math.prod(latents_shape(item.latents)), item.name))
    latents_CFHW = read_latents(item.latents)[:, :1].float()
    sigmas = _levels(timesteps, PROBE_LEVELS, tuple(latents_CFHW.shape[-2:]))
    places = [(number, level) for number in range(len(texts)) for level in range(PROBE_LEVELS)]
    generators = [draw_generator(seed, "forgetting probe", *place) for place in places]
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
    for numbers in _parts(range(len(t_N)), most_values // noisy_NCFHW[0].numel()):
        chosen = list(numbers)
        context = [texts[number].to(device) for number in chosen]
        found.append(model(noisy_NCFHW[chosen].to(device), t_N[chosen].to(device), context).float().cpu())
    return torch.cat(found)


def forgetting_sums(model: WanModel, probe: Probe, most_values: int, device: torch.device) -> Tensor:
    """[2, 1 + bins] float64: squared distances from the run's start and their number, all of them, then by bin."""
    now_NCFHW = predictions(model, probe.noisy_NCFHW, probe.t_N, probe.texts, most_values, device)
    sums = torch.zeros(2, len(_EDGES), dtype=torch.float64)
    _add(sums, probe.t_N, (now_NCFHW - probe.start_NCFHW).square().flatten(1).mean(1))
    return sums


def curves(name: str, sums: Tensor) -> dict[str, float]:
    """The means of such sums by their names in TensorBoard; bins without a prediction are left out."""
    totals, counts = sums.tolist()
    bins = ["", *(f" t {low}-{high}" for low, high in pairwise(_EDGES))]
    means = zip(bins, totals, counts, strict=True)
    return {f"validation/{name}{place}": total / count for place, total, count in means if count}


def _levels(timesteps: TimestepConfig, count: int, latent_size: tuple[int, int]) -> Tensor:
    """`count` noise levels spread evenly over those that the run trains."""
    u_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sigmas_of(timesteps, u_B, latent_size)


def _parts(numbers: range, size: int) -> Iterator[range]:
    size = max(size, 1)
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _add(sums: Tensor, t_B: Tensor, values_B: Tensor) -> None:
    for t, value in zip(t_B.tolist(), values_B.tolist(), strict=True):
        place = next(place for place, high in enumerate(_EDGES[1:], 1) if t <= high or high == TIMESTEPS)
        sums[:, 0] += torch.tensor([value, 1.0], dtype=torch.float64)
        sums[:, place] += torch.tensor([value, 1.0], dtype=torch.float64)
