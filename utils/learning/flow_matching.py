"""Flow matching (Lipman et al. 2023, Liu et al. 2023): noise levels, noisy latents, targets, loss weights.

x_sigma = (1 - sigma) x0 + sigma noise, the model predicts noise - x0 and is given t = 1000 sigma.
A noise level is a function of one uniform number u, its quantile: so a range, or a stratified u, needs no redrawing.
Shapes: B batch, C latent channels, F H W latent frames, height, width.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import InputError
from wan.values import Number

TIMESTEPS = 1000
# A line through two (token count, ln of the shift) points, for the modes that shift larger pictures to more noise.
_FLUX = ((256, 0.5), (4096, 1.15))
_QWEN = ((256, 0.5), (8192, 0.9))
_KREA2 = ((256, 0.5), (6400, 1.15))
_LINES = {"flux_shift": _FLUX, "flux2_shift": _FLUX, "qwen_shift": _QWEN, "krea2_shift": _KREA2}
_MIXTURES = {
    "qinglong_flux": ((0.79, "flux_shift"), (0.11, "logsnr"), (0.10, "clean")),
    "qinglong_qwen": ((0.95, "qwen_shift"), (0.05, "clean")),
}
# Esser et al. 2024, 3.1: beyond these bounds the density of the weighting `mode` is no longer one.
MODE_SCALES = Number(-1, 2 / (math.pi - 2))
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", *_LINES, "logsnr", *_MIXTURES)
WEIGHTINGS = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
_LEAST_SHARE = 1e-6  # of a distribution that a range of timesteps must hold
_SMALLEST_SIGMA = 1e-3  # one of the model's 1000 steps: keeps 1 / sigma^2 finite


@dataclass(frozen=True)
class TimestepConfig:
    """How noise levels are drawn, and how their losses are weighted."""

    sampling: str = "sigma"
    shift: float = 1.0  # of `shift` and `sigma`
    sigmoid_scale: float = 1.0
    weighting: str = "none"
    logit_mean: float = 0.0  # of the weighting logit_normal, and of the log-SNR in `logsnr`, `qinglong_flux`
    logit_std: float = 1.0
    mode_scale: float = 1.29
    min_timestep: float = 0.0
    max_timestep: float = 1000.0
    preserve_shape: bool = False  # cut the distribution to the range, where otherwise it is squeezed into it
    # Cut, the range ends below max_timestep, unless that is 1000: where two experts meet, the upper one has the bound.
    buckets: int | None = None  # strata that successive samples visit in turn


@dataclass(frozen=True)
class _LogitNormal:
    """sigma = logistic(mean + std z), z a standard normal. Shifting sigma by k adds ln k to the mean."""

    mean: float
    std: float

    def quantile(self, u_B: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u_B))

    def share_below(self, sigma: float) -> float:
        if sigma in (0, 1):
            return float(sigma)
        return 0.5 * math.erfc((self.mean - math.log(sigma / (1 - sigma))) / self.std / math.sqrt(2))


@dataclass(frozen=True)
class _Uniform:
    def quantile(self, u_B: Tensor) -> Tensor:
        return u_B

    def share_below(self, sigma: float) -> float:
        return sigma


def check_timesteps(config: TimestepConfig, latent_sizes: Sequence[tuple[int, int]], expert: str = "") -> None:
    """InputError if the range of timesteps holds almost none of the distribution at one of the latent sizes.

    Of one of two experts, named `expert`, the range is its side of --timestep_boundary.
    """
    if not config.preserve_shape:
        return
    for size in latent_sizes:
        share = _share_in_range(config, size)
        if share >= _LEAST_SHARE:
            continue
        part = f"{share:.1g} of the distribution {config.sampling} for latents of {size[0]}x{size[1]}"
        if expert:
            raise InputError(
                f"--timestep_boundary {config.min_timestep or config.max_timestep:g} leaves the {expert} expert only "
                f"{part}: give another boundary, or another --timestep_sampling"
            )
        raise InputError(
            f"--min_timestep {config.min_timestep:g} --max_timestep {config.max_timestep:g} holds only {part}: widen "
            "the range, or leave out --preserve_distribution_shape, so that the distribution is squeezed into the range"
        )


def _share_in_range(config: TimestepConfig, latent_size: tuple[int, int]) -> float:
    if config.sampling == "sigma":
        return _on_grid(config)[1]
    low, high = config.min_timestep / TIMESTEPS, config.max_timestep / TIMESTEPS
    return sum(w * (d.share_below(high) - d.share_below(low)) for w, d in _components(config, latent_size))


def draw_generator(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one `place` of a run (epoch, entry, purpose), so that its numbers can be drawn again."""
    words = hashlib.sha256(":".join(map(str, (seed, *place))).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(words[:8], "little") >> 1)


def draw_uniforms(config: TimestepConfig, generators: Sequence[torch.Generator], seed: int, first_item: int) -> Tensor:
    """[B] float64 in (0, 1), one from each generator, for samples number first_item, first_item + 1, ... of the run.

    With buckets, every run of `buckets` samples visits each of them once, in an order of its own (from `seed`).
    """
    u_B = torch.cat([torch.rand(1, generator=own, dtype=torch.float64) for own in generators])
    if config.buckets:
        bucket_B = torch.tensor([_bucket(config.buckets, seed, first_item + i) for i in range(len(generators))])
        u_B = (bucket_B + u_B) / config.buckets
    return u_B.clamp(2.0**-53, 1 - 2.0**-53)  # the quantiles of 0 and 1 would be infinite


def _bucket(buckets: int, seed: int, item: int) -> int:
    cycle, place = divmod(item, buckets)
    order = torch.randperm(buckets, generator=draw_generator(seed, "timestep buckets", cycle))
    return int(order[place])


def sigmas_of(config: TimestepConfig, u_B: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """The noise levels [B] (float32) that uniform numbers u_B (float64) stand for, at latents of (height, width)."""
    low, high = config.min_timestep / TIMESTEPS, config.max_timestep / TIMESTEPS
    if config.sampling == "sigma" and config.preserve_shape:
        sigma_B = _cut_sigma_grid(config, u_B)
    elif config.sampling == "sigma":
        sigma_B = low + (high - low) * _sigma_grid(config, u_B)
    elif config.preserve_shape:
        sigma_B = _mixture_quantile(_components(config, latent_size), u_B, low, high).float().clamp(*_ends(config))
    else:
        sigma_B = low + (high - low) * _mixture_quantile(_components(config, latent_size), u_B, 0, 1)
    return sigma_B.float()


def _ends(config: TimestepConfig) -> tuple[float, float]:
    """The smallest and the largest float32 noise level whose timestep, rounded as the model reads it, is in a cut."""
    low, high = (torch.tensor(end / TIMESTEPS) for end in (config.min_timestep, config.max_timestep))
    while not _is_in_cut(config, low) and low < 1:
        low = torch.nextafter(low, torch.ones(()))
    while not _is_in_cut(config, high) and high > 0:
        high = torch.nextafter(high, torch.zeros(()))
    return float(low), float(high)


def _is_in_cut(config: TimestepConfig, sigma: Tensor) -> Tensor:
    t = (sigma.float() * TIMESTEPS).double()
    below = t <= TIMESTEPS if config.max_timestep == TIMESTEPS else t < config.max_timestep
    return (t >= config.min_timestep) & below


def _sigma_grid(config: TimestepConfig, u_B: Tensor) -> Tensor:
    """One of the 1000 noise levels of the model's schedule, shifted."""
    return _grid_level(config, (_grid_share(config, u_B) * TIMESTEPS).floor() + 1)


def _cut_sigma_grid(config: TimestepConfig, u_B: Tensor) -> Tensor:
    """The same, of those alone that lie in the range: what drawing again until one does would give."""
    numbers, share, first_u = _on_grid(config)
    u_B = (first_u + share * u_B).clamp(2.0**-53, 1 - 2.0**-53)
    number_B = (_grid_share(config, u_B) * TIMESTEPS).floor() + 1
    return _grid_level(config, number_B.clamp(int(numbers[0]), int(numbers[-1])))  # rounded over an edge


def _on_grid(config: TimestepConfig) -> tuple[Tensor, float, float]:
    """The noise levels that lie in the range, by number; their share of all draws; the u at which they begin."""
    numbers = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64)
    numbers = numbers[_is_in_cut(config, _grid_level(config, numbers))]
    if not len(numbers):
        return numbers, 0.0, 0.0
    edges = sorted(_u_below(config, edge / TIMESTEPS) for edge in (float(numbers[0]) - 1, float(numbers[-1])))
    return numbers, edges[1] - edges[0], edges[0]


def _grid_level(config: TimestepConfig, number_B: Tensor) -> Tensor:
    grid_B = number_B.clamp(1, TIMESTEPS) / TIMESTEPS
    return config.shift * grid_B / (1 + (config.shift - 1) * grid_B)


def _grid_share(config: TimestepConfig, u_B: Tensor) -> Tensor:
    """Where on the grid u lies, from 0 to 1, by the densities of Esser et al. 2024, 3.1. `mode` falls, others rise."""
    if config.weighting == "logit_normal":
        return _LogitNormal(config.logit_mean, config.logit_std).quantile(u_B)
    if config.weighting == "mode":
        return 1 - u_B - config.mode_scale * (torch.cos(math.pi / 2 * u_B) ** 2 - 1 + u_B)
    return u_B


def _u_below(config: TimestepConfig, share: float) -> float:
    """The u at which _grid_share is `share`."""
    if share in (0, 1):
        return 1 - share if config.weighting == "mode" else share
    if config.weighting == "logit_normal":
        return _LogitNormal(config.logit_mean, config.logit_std).share_below(share)
    if config.weighting != "mode":
        return share
    low, high = 0.0, 1.0
    for _ in range(60):  # by bisection: it has no closed inverse
        middle = (low + high) / 2
        above = float(_grid_share(config, torch.tensor(middle, dtype=torch.float64))) > share
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def _components(config: TimestepConfig, latent_size: tuple[int, int]) -> list[tuple[float, _LogitNormal | _Uniform]]:
    parts = _MIXTURES.get(config.sampling, ((1.0, config.sampling),))
    return [(weight, _distribution(name, config, latent_size)) for weight, name in parts]


def _distribution(name: str, config: TimestepConfig, latent_size: tuple[int, int]) -> _LogitNormal | _Uniform:
    scale = config.sigmoid_scale
    if name == "uniform":
        return _Uniform()
    if name == "sigmoid":
        return _LogitNormal(0.0, scale)
    if name == "shift":
        return _LogitNormal(math.log(config.shift), scale)
    if name == "logsnr":
        return _of_log_snr(config.logit_mean, config.logit_std)
    if name == "clean":
        return _of_log_snr(5.36, 1.0)
    height, width = latent_size
    count = height * width if name == "flux2_shift" else (height // 2) * (width // 2)
    return _LogitNormal(_on_line(*_LINES[name], count), scale)


def _of_log_snr(mean: float, std: float) -> _LogitNormal:
    """log-SNR = ln((1 - sigma)^2 / sigma^2) ~ N(mean, std), so logit(sigma) ~ N(-mean / 2, std / 2)."""
    return _LogitNormal(-mean / 2, std / 2)


def _on_line(a: tuple[float, float], b: tuple[float, float], x: float) -> float:
    return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])


def _mixture_quantile(components: Sequence, u_B: Tensor, low: float, high: float) -> Tensor:
    """Values of the mixture cut to [low, high]: u first picks the component, then the place within it."""
    bounds = [(d.share_below(low), d.share_below(high)) for _, d in components]
    shares = [weight * (end - begin) for (weight, _), (begin, end) in zip(components, bounds, strict=True)]
    total, used = sum(shares), 0.0
    value_B = torch.empty_like(u_B)
    for (_, distribution), (begin, end), share in zip(components, bounds, shares, strict=True):
        mine_B = u_B >= used / total
        within_B = ((u_B[mine_B] * total - used) / share).clamp(0, 1)
        inside_B = (begin + (end - begin) * within_B).clamp(2.0**-53, 1 - 2.0**-53)
        value_B[mine_B] = distribution.quantile(inside_B)
        used += share
    return value_B


def add_noise(latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The noisy latents, the timesteps t_B on the model's scale, the target noise - x0."""
    sigma_B1111 = sigma_B.view(-1, 1, 1, 1, 1)
    noisy_BCFHW = (1 - sigma_B1111) * latents_BCFHW + sigma_B1111 * noise_BCFHW
    return noisy_BCFHW, sigma_B * TIMESTEPS, noise_BCFHW - latents_BCFHW


def flow_loss(
    predicted_BCFHW: Tensor,
    target_BCFHW: Tensor,
    sigma_B: Tensor,
    weighting: str,
    mask_B11HW: Tensor | None = None,
) -> Tensor:
    """The mean squared error, each sample weighted by its noise level."""
    return sample_losses(predicted_BCFHW, target_BCFHW, sigma_B, weighting, mask_B11HW).mean()


def sample_losses(
    predicted_BCFHW: Tensor,
    target_BCFHW: Tensor,
    sigma_B: Tensor,
    weighting: str,
    mask_B11HW: Tensor | None = None,
) -> Tensor:
    """[B]: each sample's own mean squared error, weighted by its noise level.

    With a mask m it is sum(m error) / sum(m) over the sample's values: where m is 1 or 0, the mean of where it is 1.
    So each sample counts as much as any other, however much of it is masked, and a white mask changes nothing.
    """
    error_BCFHW = (predicted_BCFHW.float() - target_BCFHW.float()).square()
    if mask_B11HW is None:
        error_B = error_BCFHW.flatten(1).mean(1)
    else:
        error_B = (mask_B11HW * error_BCFHW).flatten(1).mean(1) / mask_B11HW.flatten(1).mean(1)
    return error_B * loss_weights(sigma_B, weighting)


def loss_weights(sigma_B: Tensor, weighting: str) -> Tensor:
    """[B], Esser et al. 2024: sigma^-2 for sigma_sqrt, 2 / (pi (1 - 2 sigma + 2 sigma^2)) for cosmap, else 1."""
    if weighting == "sigma_sqrt":
        return sigma_B.clamp(min=_SMALLEST_SIGMA) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)
