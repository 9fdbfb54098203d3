"""Validates a run: its loss on pictures that it does not train on, and what it makes the rest of the model forget.

The loss is that of training, at fixed noise and fixed noise levels, so that its values can be compared.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.data.cache_files import read_latents, read_mask, read_text
from utils.data.given_pictures import given_to_item, repeated, starts_clean
from utils.data.items import Item
from utils.data.sources import DatasetConfig
from utils.learning.conditions import loss_mask, predict, started
from utils.learning.flow_matching import TimestepConfig, add_noise, draw_generator, sample_losses
from utils.run.forgetting import Probe, forgetting_sums
from utils.run.noise_bins import SEED, add_to, curves, levels, no_sums, parts
from wan.model import WanModel

LEVELS = 8  # noise levels at which each held-out picture is validated
WITHOUT_GRADIENT = 4  # times as many values as a batch that trains, since no activations are kept


@dataclass(frozen=True)
class ValidationConfig:
    """On what and when a run is validated, and what is kept of it; `t5` encodes the captions of the probe."""

    dataset: DatasetConfig | None = None  # None: what validation_split holds out of the training dataset, if anything
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    save_best: bool = False
    t5: Path | None = None  # None: no probe
    tokenizer: Path | None = None
    fp8_t5: bool = False

    def is_due_after_step(self, step: int) -> bool:
        return bool(self.every_n_steps) and step % self.every_n_steps == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        return bool(self.every_n_epochs) and epoch % self.every_n_epochs == 0


@dataclass(eq=False)
class Validation:
    """What a run is validated on; `best` is the lowest validation loss so far."""

    config: ValidationConfig
    items: Sequence[Item]
    timesteps: TimestepConfig
    most_values: int  # of latents, in a batch
    probe: Probe | None
    i2v_share: float = 0.0
    best: float = math.inf
    measured_at: int = -1  # step

    def measure(self, model: WanModel, accelerator: Accelerator) -> dict[str, float]:
        """The curves' next values by their names; every process measures its share."""
        device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
        sums = {}
        if self.items:
            own = self.items[rank::world]
            sums["loss"] = validation_sums(model, own, self.timesteps, self.most_values, device, self.i2v_share)
        if self.probe:
            sums["forgetting"] = forgetting_sums(model, self.probe.share(rank, world), self.most_values, device)
        values = {}
        for name, own in sums.items():
            values |= curves(name, accelerator.reduce(own.to(device, torch.float32), "sum"))
        return values

    def state(self) -> dict:
        probe = self.probe.state() if self.probe else None
        return {"best": self.best, "measured_at": self.measured_at, "probe": probe}

    def load_state(self, state: Mapping) -> None:
        """Continues from what the state's run had found."""
        self.best, self.measured_at = state["best"], state["measured_at"]


@torch.no_grad()
def validation_sums(
    model: WanModel,
    items: Sequence[Item],
    timesteps: TimestepConfig,
    most_values: int,
    device: torch.device,
    i2v_share: float = 0.0,
) -> Tensor:
    """[2, 1 + bins] float64: summed losses and their number, over all noise levels, then by bin of them.

    A batch has at most `most_values` values of latents, unless a single picture has more.
    """
    sums = no_sums()
    for item in items:
        latents_CFHW, text_SD = read_latents(item.latents).float(), read_text(item.text, item.caption)
        mask = read_mask(item.latents)[None, None, None] if item.masked else None
        y_CFHW, clip_PI = given_to_item(item)
        sigmas = levels(timesteps, LEVELS, tuple(latents_CFHW.shape[-2:]))
        for numbers in parts(range(LEVELS), most_values // latents_CFHW.numel()):
            generators = [draw_generator(SEED, "validation", item.name, number) for number in numbers]
            noise_BCFHW = torch.stack([torch.randn(latents_CFHW.shape, generator=own) for own in generators])
            sigma_B = sigmas[list(numbers)]
            clean_BCFHW = latents_CFHW.expand_as(noise_BCFHW)
            noisy_BCFHW, t_B, target_BCFHW = add_noise(clean_BCFHW, noise_BCFHW, sigma_B)
            place = ("validation's first frame", item.name)
            starts = [starts_clean(i2v_share, latents_CFHW.shape[1], SEED, *place, number) for number in numbers]
            given = repeated(y_CFHW, clip_PI, starts)
            noisy_BCFHW = started(noisy_BCFHW, clean_BCFHW, given).to(device)
            context = [text_SD.to(device)] * len(numbers)
            predicted_BCFHW = predict(model, noisy_BCFHW, t_B.to(device), context, given.to(device)).float().cpu()
            counted = loss_mask(given, latents_CFHW.shape[1], mask)
            add_to(sums, t_B, sample_losses(predicted_BCFHW, target_BCFHW, sigma_B, timesteps.weighting, counted))
    return sums


def validation_line(step: int, values: Mapping[str, float]) -> str:
    """What was measured, for the console."""
    names = {"validation/loss": "validation loss", "validation/forgetting": "forgetting"}
    said = []
    for key, words in names.items():
        if key in values:
            bins = [f"{own[len(key) + 1 :]}: {value:.4g}" for own, value in values.items() if own.startswith(f"{key} ")]
            said.append(f"{words} {values[key]:.4g} ({', '.join(bins)})")
    return f"step {step}: {'; '.join(said)}"


def state_problem(state: object) -> str | None:
    """What is wrong with what a state keeps of a run's validation; None if nothing is."""
    if state is None:
        return None
    match state:
        case {"best": float(), "measured_at": int(), "probe": None}:
            return None
        case {"best": float(), "measured_at": int(), "probe": {"noisy": Tensor() as noisy, "t": Tensor() as t, **rest}}:
            match rest:
                case {"texts": [*texts], "start": Tensor() as start, **given} if not given or _is_given(given, noisy):
                    shapes = noisy.dim() == 5 and start.shape == noisy.shape and t.shape == noisy.shape[:1]
                    whole = len(texts) == len(t) and all(isinstance(own, Tensor) and own.dim() == 2 for own in texts)
                    if shapes and whole and {noisy.dtype, start.dtype, t.dtype} == {torch.float32}:
                        return None
    return "its validation is not as it was saved"


def _is_given(given: Mapping, noisy_NCFHW: Tensor) -> bool:
    """Whether these are the pictures of a probe, as it saves them."""
    match given:
        case {"y": None | Tensor() as y_CFHW, "clip": None | Tensor() as clip_PI, "starts_clean": [*starts], **rest}:
            tensors = [(own, dims) for own, dims in ((y_CFHW, 4), (clip_PI, 2)) if own is not None]
            whole = all(own.dim() == dims and own.dtype == torch.float32 for own, dims in tensors)
            shaped = y_CFHW is None or y_CFHW.shape[1:] == noisy_NCFHW.shape[2:]
            told = len(starts) == len(noisy_NCFHW) and all(type(start) is bool for start in starts)
            told = told and (noisy_NCFHW.shape[2] > 1 or not any(starts))
            return not rest and whole and shaped and told
    return False
