"""What a run gives the model of its items' pictures: y and CLIP tokens from their caches, or a clean first frame."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from utils.data.cache_files import read_clip, read_condition
from utils.data.items import Item
from utils.learning.conditions import Conditioning
from utils.learning.flow_matching import draw_generator


def starts_clean(i2v_share: float, frames: int, seed: int, *place: int | str) -> bool:
    """Whether what has `frames` latent frames starts from a clean one, drawn for a `place` of the run.

    `i2v_share` is the share of clips that do, 0 but for ti2v-5B. A picture never does: nothing would be left of it.
    """
    if not i2v_share or frames == 1:
        return False
    return torch.rand((), generator=draw_generator(seed, *place), dtype=torch.float64).item() < i2v_share


def given_to_batch(batch: Mapping, i2v_share: float, seed: int, epoch: int) -> Conditioning:
    """What the samples of a training batch start from; each entry draws for itself in every epoch."""
    frames, entries = batch["latents"].shape[2], batch["entries"]
    starts = [starts_clean(i2v_share, frames, seed, "first frame", epoch, entry) for entry in entries]
    return Conditioning(batch["y"], batch["clip"], clean_starts(starts))


def given_to_item(item: Item) -> tuple[Tensor | None, Tensor | None]:
    """y [C, F, H, W] and CLIP tokens [P, I] of an item, in float32, where the model reads them."""
    y_CFHW = read_condition(item.latents).float() if item.conditions.pictures else None
    return y_CFHW, read_clip(item.latents).float() if item.conditions.clip else None


def clean_starts(starts: Sequence[bool]) -> Tensor | None:
    """[B], or None where no sample starts from a clean frame, so that one timestep for each sample will do."""
    return torch.tensor(starts) if any(starts) else None


def repeated(y_CFHW: Tensor | None, clip_PI: Tensor | None, starts: Sequence[bool]) -> Conditioning:
    """What several samples of one clip start from: the same pictures, each with a clean first frame or without."""
    y_BCFHW, clip_BPI = (None if own is None else own.expand(len(starts), *own.shape) for own in (y_CFHW, clip_PI))
    return Conditioning(y_BCFHW, clip_BPI, clean_starts(starts))
