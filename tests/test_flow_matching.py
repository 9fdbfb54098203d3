"""Noise levels against the closed forms of their distributions; noisy latents, targets, weights."""

import math
from dataclasses import replace

import pytest
import torch

from utils.learning.flow_matching import (
    SAMPLINGS,
    TimestepConfig,
    add_noise,
    check_timesteps,
    draw_generator,
    draw_uniforms,
    flow_loss,
    loss_weights,
    sigmas_of,
)
from wan.errors import InputError

SIZE = (60, 104)  # latents of 832x480: 30 * 52 tokens a frame
TOKENS = 30 * 52
PARTS = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def normal(u):
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def shifted(k, sigma):
    return k * sigma / (1 + (k - 1) * sigma)


def line(first, last, tokens):
    return math.exp(first[1] + (last[1] - first[1]) * (tokens - first[0]) / (last[0] - first[0]))


FLUX, QWEN, KREA = ((256, 0.5), (4096, 1.15)), ((256, 0.5), (8192, 0.9)), ((256, 0.5), (6400, 1.15))
QUANTILES = {
    "uniform": lambda u: u,
    "sigmoid": lambda u: torch.sigmoid(1.5 * normal(u)),
    "shift": lambda u: shifted(3, torch.sigmoid(1.5 * normal(u))),
    "flux_shift": lambda u: shifted(line(*FLUX, TOKENS), torch.sigmoid(1.5 * normal(u))),
    "flux2_shift": lambda u: shifted(line(*FLUX, 60 * 104), torch.sigmoid(1.5 * normal(u))),
    "qwen_shift": lambda u: shifted(line(*QWEN, TOKENS), torch.sigmoid(1.5 * normal(u))),
    "krea2_shift": lambda u: shifted(line(*KREA, TOKENS), torch.sigmoid(1.5 * normal(u))),
    # The log-SNR falls as noise grows.
    "logsnr": lambda u: torch.sigmoid(-(0.7 + 2 * normal(1 - u)) / 2),
    "sigma": lambda u: shifted(3, ((1000 * u).floor() + 1) / 1000),
}
MIXTURES = {
    "qinglong_flux": [(0.79, QUANTILES["flux_shift"]), (0.11, QUANTILES["logsnr"])],
    "qinglong_qwen": [(0.95, QUANTILES["qwen_shift"])],
}


def config(sampling, **settings):
    return TimestepConfig(sampling, shift=3.0, sigmoid_scale=1.5, logit_mean=0.7, logit_std=2.0, **settings)


def clean(u):
    return torch.sigmoid(-(5.36 + normal(1 - u)) / 2)


def random_sigmas(timesteps, count=20_000):
    u = draw_uniforms(timesteps, [draw_generator(0, "test")] * count, 0, 0)
    return sigmas_of(timesteps, u, SIZE)


@pytest.mark.parametrize("sampling", QUANTILES)
def test_quantiles_are_the_closed_forms(sampling):
    torch.testing.assert_close(
        sigmas_of(config(sampling), PARTS, SIZE).double(), QUANTILES[sampling](PARTS), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("sampling", MIXTURES)
def test_mixtures_hold_their_parts_in_their_shares(sampling):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    parts = [*MIXTURES[sampling], (1 - sum(share for share, _ in MIXTURES[sampling]), clean)]
    reference = torch.cat(
        [part((torch.arange(n := round(100_000 * share)) + 0.5).double() / n) for share, part in parts]
    )
    torch.testing.assert_close(
        sigmas_of(config(sampling), u, SIZE).double().sort()[0], reference.sort()[0], rtol=1e-4, atol=1e-6
    )


def test_every_sampling_has_a_closed_form_here():
    assert set(SAMPLINGS) == {*QUANTILES, *MIXTURES}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_range_is_squeezed_into(sampling):
    whole, part = config(sampling), config(sampling, min_timestep=100, max_timestep=300)
    expected = 0.1 + 0.2 * sigmas_of(whole, PARTS, SIZE)
    torch.testing.assert_close(sigmas_of(part, PARTS, SIZE), expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_preserved_shape_is_what_rejection_leaves(sampling):
    cut = random_sigmas(config(sampling, min_timestep=400, max_timestep=875, preserve_shape=True))
    drawn = random_sigmas(config(sampling), 100_000)
    kept = drawn[(drawn >= 0.4) & (drawn <= 0.875)]
    parts = torch.linspace(0.02, 0.98, 25)
    assert cut.min() >= 0.4 and cut.max() < 0.875
    assert (cut.quantile(parts) - kept.quantile(parts)).abs().max() < 0.02


GRIDS = ({}, {"weighting": "logit_normal"}, {"weighting": "mode"}, {"weighting": "mode", "mode_scale": -0.9})


@pytest.mark.parametrize("weighting", GRIDS)
def test_a_cut_grid_has_the_values_and_counts_that_rejection_leaves(weighting):
    """Every value of the grid, as often: each is the quantile of as many of 300,000 evenly spaced u."""
    u = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 300_000
    cut = config("sigma", **weighting, min_timestep=650, max_timestep=900, preserve_shape=True)
    drawn = sigmas_of(config("sigma", **weighting), u, SIZE)
    values, counts = drawn[(1000 * drawn >= 650) & (1000 * drawn < 900)].unique(return_counts=True)
    found, found_counts = sigmas_of(cut, u, SIZE).unique(return_counts=True)
    assert torch.equal(found, values) and len(values) > 50
    assert (found_counts / 300_000 - counts / counts.sum()).abs().max() < 2e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("boundary", [875.0, 900.0, 875.4])
@pytest.mark.parametrize("sampling", ["sigma", "shift"])
def test_two_sides_share_no_timestep_and_the_boundary_is_the_upper_ones(sampling, boundary, shift):
    settings = TimestepConfig(sampling, shift=shift, preserve_shape=True)
    edges = torch.tensor([2.0**-53, 0.25, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    low = 1000 * sigmas_of(replace(settings, max_timestep=boundary), edges, SIZE)
    high = 1000 * sigmas_of(replace(settings, min_timestep=boundary), edges, SIZE)
    assert low.max().double() < boundary <= high.min().double()
    whole = (1000 * sigmas_of(settings, PARTS, SIZE)).double()
    if sampling == "sigma":
        on_grid = 1000 * sigmas_of(settings, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, SIZE)
        assert low.max() == on_grid[on_grid.double() < boundary].max()
        assert high.min() == on_grid[on_grid.double() >= boundary].min()
    assert whole.min() < boundary < whole.max()


def test_a_level_of_the_grid_at_the_boundary_is_drawn_by_the_upper_side_alone():
    """0.75 of the grid is 0.9 at shift 3; 0.9 is not a float32."""
    u = torch.tensor([0.7495], dtype=torch.float64)
    settings = TimestepConfig("sigma", shift=3.0, preserve_shape=True)
    assert 1000 * sigmas_of(settings, u, SIZE) == 900
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    assert 900 in 1000 * sigmas_of(replace(settings, min_timestep=900), u, SIZE)
    assert 900 not in 1000 * sigmas_of(replace(settings, max_timestep=900), u, SIZE)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_preserving_the_whole_range_changes_nothing(sampling):
    assert torch.equal(random_sigmas(config(sampling)), random_sigmas(config(sampling, preserve_shape=True)))


def test_a_range_that_holds_nothing_is_refused():
    with pytest.raises(InputError, match="widen the range"):
        check_timesteps(TimestepConfig("sigmoid", max_timestep=1, preserve_shape=True), [SIZE])
    check_timesteps(TimestepConfig("sigmoid", max_timestep=1), [SIZE])
    check_timesteps(TimestepConfig("uniform", max_timestep=1, preserve_shape=True), [SIZE])
    with pytest.raises(InputError, match="holds only 0 of the distribution sigma"):
        check_timesteps(TimestepConfig("sigma", min_timestep=3.2, max_timestep=3.8, preserve_shape=True), [SIZE])
    check_timesteps(TimestepConfig("sigma", min_timestep=3.2, max_timestep=4.8, preserve_shape=True), [SIZE])


def test_small_timesteps_are_little_noise_in_sigma_sampling():
    sigmas = random_sigmas(TimestepConfig("sigma", max_timestep=500))
    assert sigmas.min() > 0 and sigmas.max() == 0.5


def test_logit_normal_and_mode_have_the_densities_of_the_paper():
    logit_normal = TimestepConfig("sigma", weighting="logit_normal", logit_mean=1.0, logit_std=0.5)
    assert sigmas_of(logit_normal, torch.tensor([0.5]).double(), SIZE) == pytest.approx(0.732, abs=1e-3)
    mode = sigmas_of(TimestepConfig("sigma", weighting="mode"), PARTS, SIZE)
    u = PARTS
    expected = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert (mode - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("first", [0, 5, 13])
def test_buckets_are_visited_once_in_every_cycle(first):
    timesteps = TimestepConfig("uniform", buckets=8)
    start = first // 8 * 8
    u = [draw_uniforms(timesteps, [draw_generator(3, i)], 3, start + i) for i in range(8)]
    assert sorted((torch.cat(u) * 8).long().tolist()) == list(range(8))


def test_samples_of_a_batch_take_successive_buckets():
    timesteps = TimestepConfig("uniform", buckets=8)
    together = draw_uniforms(timesteps, [draw_generator(i) for i in range(4)], 3, 6)
    alone = torch.cat([draw_uniforms(timesteps, [draw_generator(i)], 3, 6 + i) for i in range(4)])
    assert torch.equal(together, alone)


def test_generators_depend_on_every_part_of_their_place():
    places = [(0,), (1,), (0, 1), (1, 0), (0, "1a"), (11,)]
    drawn = {torch.rand((), generator=draw_generator(5, *place)).item() for place in places}
    assert len(drawn) == len(places)
    assert torch.equal(torch.rand(3, generator=draw_generator(5, 1)), torch.rand(3, generator=draw_generator(5, 1)))


def test_noise_goes_from_the_latents_to_itself():
    latents, noise = torch.randn(3, 4, 1, 2, 2), torch.randn(3, 4, 1, 2, 2)
    noisy, t, target = add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1] - 0.25 * target[1], latents[1])
    assert t.tolist() == [0, 250, 1000]


def test_the_loss_is_the_weighed_mean_of_the_samples_errors():
    target = torch.zeros(2, 1, 1, 1, 2)
    predicted = torch.tensor([[1.0, 1.0], [2.0, 2.0]]).view(2, 1, 1, 1, 2)
    assert flow_loss(predicted, target, torch.tensor([0.5, 0.5]), "none") == 2.5
    assert flow_loss(predicted.bfloat16(), target, torch.tensor([0.5, 0.1]), "sigma_sqrt") == pytest.approx(
        (4 + 400) / 2
    )


def test_weights_are_those_of_the_paper():
    sigma = torch.tensor([0.0, 0.25, 1.0])
    assert loss_weights(sigma, "cosmap").tolist() == pytest.approx([2 / math.pi, 3.2 / math.pi, 2 / math.pi])
    assert (
        loss_weights(sigma, "sigma_sqrt")[1:].tolist() == [16, 1] and loss_weights(sigma, "sigma_sqrt").isfinite().all()
    )
    assert loss_weights(sigma, "logit_normal").tolist() == [1, 1, 1]
