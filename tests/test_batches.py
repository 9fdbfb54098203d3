"""Samples that are drawn together: each as if alone, in as few passes as the batch allows, in any mix."""

from dataclasses import replace

import pytest
import torch
from fake_device import FakeDevice
from one_sample import sample_prompt
from tiny_pictures import CONFIGS, tiny_model
from tiny_run import write_sample_models
from torch import nn

from utils.learning.conditions import Conditioning
from utils.sampling.batches import advance, decode_latents, rows_together
from utils.sampling.denoising import NOISE_ALONE, Denoising, Start, resolve_sample
from utils.sampling.prompts import SamplePrompt
from utils.swap.placement import place_model
from utils.swap.plan import SwapConfig
from wan.configs import TASKS
from wan.model import WanModel
from wan.vae import load_vae

draw = torch.Generator().manual_seed(0)
TEXTS = {text: torch.randn(3 + len(text) % 4, 48, generator=draw) for text in ("a", "bb", "ccc", "dark", "")}
MIXED = (  # of two sizes, with and without guidance, of other steps, shifts and seeds
    SamplePrompt("a", "dark", steps=3, guidance_scale=3.0, seed=1),
    SamplePrompt("bb", "", steps=5, guidance_scale=1.0, seed=2, flow_shift=7.0),
    SamplePrompt("ccc", "dark", width=64, height=32, steps=4, guidance_scale=2.0, seed=1),
    SamplePrompt("a", "", steps=4, guidance_scale=5.0, seed=4),
    SamplePrompt("bb", "dark", steps=3, guidance_scale=3.0, seed=1, flow_shift=1.0),
)


def samples_of(task, prompts, solver="unipc"):
    sized = [replace(own, width=own.width or 32, height=own.height or 32, frames=5) for own in prompts]
    if task == "ti2v-5B":
        sized = [replace(own, width=2 * own.width, height=2 * own.height) for own in sized]
    return [resolve_sample(own, TASKS[task], seed=0, solver=solver) for own in sized]


def start_of(task, sample, number):
    """What the sample starts from: of ti2v-5B, every other one a clean first frame."""
    draw, (_, *size) = torch.Generator().manual_seed(number), sample.latent_shape
    if task == "ti2v-5B" and number % 2:
        return Start(
            Conditioning(starts_clean_B=torch.tensor([True])), torch.randn(1, 48, 1, *size[1:], generator=draw)
        )
    if task == "i2v-14B":
        y, clip = torch.randn(1, 20, *size, generator=draw), torch.randn(1, 257, 24, generator=draw)
        return Start(Conditioning(y, clip))
    return NOISE_ALONE


def passes(model):
    """The sizes of the batches that go through the model from now on."""
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize(
    ("task", "solver"),
    [("t2v-14B", "unipc"), ("t2v-14B", "dpm++"), ("t2v-14B", "vanilla"), ("i2v-14B", "unipc"), ("ti2v-5B", "unipc")],
)
@pytest.mark.parametrize("batch", [None, 3])
def test_samples_drawn_together_are_those_drawn_alone(task, solver, batch):
    model, samples = tiny_model(task), samples_of(task, MIXED, solver)
    denoisings = [Denoising(own, start_of(task, own, number)) for number, own in enumerate(samples)]
    advance(denoisings, model, None, TEXTS, "cpu", batch)
    for number, (own, denoising) in enumerate(zip(samples, denoisings, strict=True)):
        alone = sample_prompt(model, own, TEXTS, start=start_of(task, own, number))
        torch.testing.assert_close(denoising.latent_CFHW, alone, atol=1e-5, rtol=1e-5)


def test_no_pass_has_more_rows_than_the_batch_and_one_at_a_time_is_as_alone_bit_for_bit():
    model, samples = tiny_model("t2v-14B"), samples_of("t2v-14B", MIXED)
    sizes = passes(model)
    for batch in (3, 2, 1):
        advance(denoisings := [Denoising(own) for own in samples], model, None, TEXTS, "cpu", batch)
        assert max(sizes) == batch
        sizes.clear()
    assert all(
        torch.equal(own.latent_CFHW, sample_prompt(model, own.sample, TEXTS)) for own in denoisings
    )  # the last were drawn one row at a time


def test_samples_of_other_step_counts_fill_each_others_batches():
    model = tiny_model("t2v-14B")
    prompts = [SamplePrompt("a", "", steps=steps, guidance_scale=1.0, seed=1) for steps in (2, 6, 2, 6)]
    sizes = passes(model)
    advance([Denoising(own) for own in samples_of("t2v-14B", prompts)], model, None, TEXTS, "cpu", 2)
    assert sizes == [2] * 8


def test_two_experts_share_the_samples_down_to_the_boundary_with_the_scale_that_is_theirs():
    high, low, samples = tiny_model("t2v-14B", 0), tiny_model("t2v-14B", 1), samples_of("t2v-14B", MIXED)
    latents = {}
    for together, batch in ((True, None), (False, 1)):
        denoisings = [Denoising(own) for own in samples]
        for group in [denoisings] if together else [[own] for own in denoisings]:
            advance(group, high, 4.0, TEXTS, "cpu", batch, t_end=800)
            assert all(0 < own.done < own.sample.steps for own in group)
            advance(group, low, None, TEXTS, "cpu", batch)
        latents[together] = torch.cat([own.latent_CFHW.flatten() for own in denoisings])
    torch.testing.assert_close(latents[True], latents[False], atol=1e-5, rtol=1e-5)


def copied(count, steps, batch):
    """Bytes that `count` samples with guidance copy, drawn by a streamer that has seen such passes."""
    model, draws = WanModel(replace(CONFIGS["t2v-14B"], num_layers=4)).requires_grad_(False), []
    prompts = [SamplePrompt(text, "dark", steps=steps, guidance_scale=3.0) for text in ("a", "bb", "ccc")[:count]]
    with place_model(model, "cpu", SwapConfig(blocks_to_swap=4, ring_blocks=1), backend=FakeDevice()) as placement:
        for _ in range(2):
            advance([Denoising(own) for own in samples_of("t2v-14B", prompts)], model, None, TEXTS, "cpu", batch)
            draws.append(placement.streamer.traffic.bytes)
    return draws[1] - draws[0]


@pytest.mark.parametrize("count", [1, 3])
def test_k_samples_with_guidance_copy_a_2k_th_of_what_one_pass_after_the_other_does(count):
    """In two steps more, so that what is fetched ahead of the first and after the last does not count."""
    one, together = (copied(count, 4, batch) - copied(count, 2, batch) for batch in (1, None))
    # A pass sometimes copies one small weight more than the one before it.
    assert together > 8e5 and one == pytest.approx(2 * count * together, rel=0.02)


@pytest.mark.parametrize(
    ("size", "rows"), [((1, 64, 64), 4), ((1, 32, 32), 8), ((21, 60, 104), 1), ((1, 8, 8), 11), ((31, 44, 80), 1)]
)
def test_the_default_follows_from_the_size_of_the_latents(size, rows):
    config = TASKS["t2v-14B"].config
    assert rows_together((16, *size), config) == rows
    assert rows_together((16, *size), config, batch=7) == 7


class CountingVAE:
    """A VAE whose pixels are the first channel of the latents, 8 times as wide and high."""

    stride = (4, 8, 8)

    def __init__(self):
        self.batches = []

    def decode(self, latents_BCFHW):
        self.batches.append(len(latents_BCFHW))
        return nn.functional.interpolate(latents_BCFHW[:, :3], scale_factor=(1, 8, 8))


def test_latents_that_follow_each_other_are_decoded_together_as_far_as_the_memory_for_one_goes():
    vae, draw = CountingVAE(), torch.Generator().manual_seed(1)
    sizes = [(1, 32, 32)] * 5 + [(1, 64, 64)] * 2 + [(1, 96, 96)] * 2 + [(2, 16, 16)] * 4
    latents = [torch.randn(16, *size, generator=draw) for size in sizes]
    videos = list(decode_latents(vae, latents))
    assert vae.batches == [4, 1, 1, 1, 1, 1, 3, 1]
    assert all(
        torch.equal(video, CountingVAE().decode(own[None])[0]) for video, own in zip(videos, latents, strict=True)
    )


def test_the_vae_gives_each_latent_of_a_batch_what_it_gives_it_alone(tmp_path):
    write_sample_models(tmp_path)
    vae = load_vae(tmp_path / "vae.safetensors")
    latents = [torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for video, latent in zip(decode_latents(vae, latents), latents, strict=True):
        torch.testing.assert_close(video, next(decode_latents(vae, [latent])), atol=1e-5, rtol=1e-5)
