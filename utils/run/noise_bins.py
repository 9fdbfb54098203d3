"""Means over predictions at fixed noise levels, whole and by bins of them."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from utils.learning.flow_matching import TIMESTEPS, TimestepConfig, sigmas_of

SEED = 0  # of the noise; not the run's own, so that runs can be compared
_EDGES = (0, 250, 500, 750, 1000)  # of the bins, as timesteps


def no_sums() -> Tensor:
    """[2, 1 + bins] float64: sums and counts, of all predictions, then of those in each bin."""
    return torch.zeros(2, len(_EDGES), dtype=torch.float64)


def add_to(sums: Tensor, t_B: Tensor, values_B: Tensor) -> None:
    for t, value in zip(t_B.tolist(), values_B.tolist(), strict=True):
        place = next(place for place, high in enumerate(_EDGES[1:], 1) if t <= high or high == TIMESTEPS)
        sums[:, 0] += torch.tensor([value, 1.0], dtype=torch.float64)
        sums[:, place] += torch.tensor([value, 1.0], dtype=torch.float64)


def curves(name: str, sums: Tensor) -> dict[str, float]:
    """The means of such sums by their names in TensorBoard; bins without a prediction are left out."""
    totals, counts = sums.tolist()
    bins = ["", *(f" t {low}-{high}" for low, high in pairwise(_EDGES))]
    means = zip(bins, totals, counts, strict=True)
    return {f"validation/{name}{place}": total / count for place, total, count in means if count}


def levels(timesteps: TimestepConfig, count: int, latent_size: tuple[int, int]) -> Tensor:
    """`count` noise levels spread evenly over those that the run trains."""
    u_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sigmas_of(timesteps, u_B, latent_size)


def parts(numbers: range, size: int) -> Iterator[range]:
    size = max(size, 1)
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
