"""Sampling: the solvers' steps against closed forms, the whole loop against diffusers' WanPipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from one_sample import sample_prompt

from utils.sampling.batches import advance
from utils.sampling.denoising import (
    Denoising,
    encode_samples,
    initial_noise,
    make_scheduler,
    resolve_sample,
)
from utils.sampling.prompts import SamplePrompt
from wan.configs import DEFAULT_NEGATIVE_PROMPT, TASKS, WanConfig
from wan.model import WanModel

CONFIG = WanConfig("t2v", dim=48, ffn_dim=64, num_heads=4, num_layers=2, in_dim=16, out_dim=16, text_dim=24, text_len=8)
PROMPT = SamplePrompt("a fox", "dark", width=64, height=48, frames=5, seed=3, steps=6, flow_shift=3.0)
TEXTS = {
    "a fox": torch.randn(5, 24, generator=torch.Generator().manual_seed(1)),
    "dark": torch.randn(3, 24, generator=torch.Generator().manual_seed(2)),
}


def make_model(seed: int) -> WanModel:
    torch.manual_seed(seed)
    return WanModel(CONFIG).eval().requires_grad_(False)


def sample_of(**changes):
    return resolve_sample(replace(PROMPT, **changes), TASKS["t2v-A14B"], seed=0)


def shifted(sigmas, shift):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def diffusers_model(model: WanModel) -> WanTransformer3DModel:
    widths = {"in_channels": 16, "out_channels": 16, "text_dim": 24, "ffn_dim": 64, "num_layers": 2}
    other = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=12, **widths)
    other.load_state_dict(convert_wan_transformer_to_diffusers(dict(model.state_dict())))
    return other


class WansOwnSigmas(UniPCMultistepScheduler):
    """WanPipeline gives no sigmas to its scheduler; Wan's own code does."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)


def pipeline_latents(sample, high, low, guidance_high, boundary) -> torch.Tensor:
    scheduler = WansOwnSigmas(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sample.flow_shift)
    pipeline = WanPipeline(
        None, None, None, scheduler, diffusers_model(high), diffusers_model(low), boundary_ratio=boundary
    )
    pipeline.set_progress_bar_config(disable=True)
    padded = {text: torch.nn.functional.pad(rows, (0, 0, 0, 8 - len(rows)))[None] for text, rows in TEXTS.items()}
    return pipeline(
        height=sample.height, width=sample.width, num_frames=sample.frames, num_inference_steps=sample.steps,
        guidance_scale=guidance_high, guidance_scale_2=sample.guidance_scale if boundary else None,
        output_type="latent", latents=initial_noise(sample)[None],
        prompt_embeds=padded["a fox"], negative_prompt_embeds=padded["dark"],
    ).frames[0]  # fmt: skip


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (40, 12.0), (30, 3.0), (4, 1.0)])
def test_unipc_takes_the_steps_of_wans_own_code(steps, shift):
    scheduler = make_scheduler("unipc", steps, shift)
    sigmas = shifted(np.linspace(0.999, 0, steps + 1), shift)
    np.testing.assert_allclose(scheduler.sigmas, sigmas, atol=1e-7)
    assert scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in sigmas[:-1]]
    settings = ("solver_order", "solver_type", "predict_x0", "lower_order_final", "final_sigmas_type")
    assert [scheduler.config[name] for name in settings] == [2, "bh2", True, True, "zero"]


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (40, 12.0), (4, 1.0)])
def test_euler_takes_evenly_spaced_shifted_steps(steps, shift):
    scheduler = make_scheduler("vanilla", steps, shift)
    sigmas = shifted(np.linspace(1, 0, steps + 1), shift)
    np.testing.assert_allclose(scheduler.sigmas, sigmas, atol=1e-7)
    np.testing.assert_allclose(scheduler.timesteps, 1000 * sigmas[:-1], rtol=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (40, 12.0)])
def test_dpm_steps_are_within_a_timestep_of_wans_own(steps, shift):
    scheduler = make_scheduler("dpm++", steps, shift)
    sigmas = shifted(np.linspace(1, 0, steps + 1), shift)
    np.testing.assert_allclose(scheduler.sigmas, sigmas, atol=1e-3)
    np.testing.assert_allclose(scheduler.timesteps, 1000 * sigmas[:-1], atol=1.5)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "vanilla"])
def test_every_solver_follows_a_straight_path_to_its_end(solver):
    scheduler = make_scheduler(solver, 7, 5.0)
    noise, clean = torch.randn(2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    latent = noise
    for t in scheduler.timesteps:
        latent = scheduler.step(noise - clean, t, latent).prev_sample
    torch.testing.assert_close(latent, clean, atol=5e-3, rtol=0)  # the paths begin at 0.9998 of the noise


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_one_model_gives_the_latents_of_wan_pipeline(guidance):
    model, sample = make_model(0), sample_of(guidance_scale=guidance)
    wanted = pipeline_latents(sample, model, model, guidance, boundary=None)
    torch.testing.assert_close(sample_prompt(model, sample, TEXTS, "cpu"), wanted, atol=1e-5, rtol=1e-5)


def test_two_experts_change_at_the_boundary_with_their_own_guidance():
    high, low, sample = make_model(0), make_model(1), sample_of(guidance_scale=3.0)
    wanted = pipeline_latents(sample, high, low, guidance_high=4.0, boundary=0.7)
    denoising = Denoising(sample)
    advance([denoising], high, 4.0, TEXTS, "cpu", t_end=700)
    assert 0 < denoising.done < sample.steps
    advance([denoising], low, 3.0, TEXTS, "cpu")
    torch.testing.assert_close(denoising.latent_CFHW, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(denoising.latent_CFHW, sample_prompt(low, sample, TEXTS, "cpu"), atol=1e-3)


def test_an_expert_takes_the_step_at_the_boundary_itself():
    denoising = Denoising(sample_of())
    boundary = denoising.scheduler.timesteps[2].item()
    assert len(denoising.steps_down_to(boundary)) == 3
    assert [len(Denoising(sample_of(steps=40, flow_shift=12.0)).steps_down_to(875))] == [26]


def test_guidance_1_runs_the_model_once_a_step():
    calls = []
    model = make_model(0)
    model.register_forward_hook(lambda *_: calls.append(1))
    sample_prompt(model, sample_of(guidance_scale=1.0), TEXTS, "cpu")
    sample_prompt(model, sample_of(guidance_scale=2.0), TEXTS, "cpu")
    assert len(calls) == PROMPT.steps * 3


def test_the_noise_is_the_seeds_alone():
    noise_CFHW = initial_noise(sample_of())
    assert torch.equal(noise_CFHW, torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(noise_CFHW, initial_noise(sample_of(seed=4)))


def test_what_a_prompt_leaves_out_comes_from_the_task():
    sample = resolve_sample(SamplePrompt("a fox"), TASKS["t2v-A14B"], seed=11)
    assert (sample.flow_shift, sample.guidance_scale, sample.seed) == (12.0, 3.0, 11)
    assert sample.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    given = replace(PROMPT, guidance_scale=0.0, seed=0, negative_prompt="")
    sample = resolve_sample(given, TASKS["t2v-A14B"], seed=11)
    assert (sample.flow_shift, sample.guidance_scale, sample.seed, sample.negative_prompt) == (3.0, 0.0, 0, "")


def test_tasks_that_get_pictures_have_their_own_shift_prompt_and_latents():
    large, small = SamplePrompt("a fox", width=1280, height=720), SamplePrompt("a fox", width=480, height=832)
    shifts = {name: [resolve_sample(p, TASKS[name], seed=1).flow_shift for p in (large, small)] for name in TASKS}
    assert (shifts["i2v-14B"], shifts["i2v-A14B"], shifts["flf2v-14B"]) == ([5, 3], [5, 5], [16, 16])
    prompts = {name: resolve_sample(large, TASKS[name], seed=1).negative_prompt for name in TASKS}
    assert (
        prompts["i2v-14B"] == "镜头晃动，" + DEFAULT_NEGATIVE_PROMPT == prompts["flf2v-14B"].removeprefix("镜头切换，")
    )
    assert prompts["i2v-A14B"] == prompts["ti2v-5B"] == DEFAULT_NEGATIVE_PROMPT
    full = SamplePrompt("a fox", width=1280, height=704, frames=TASKS["ti2v-5B"].video_length)
    assert resolve_sample(full, TASKS["ti2v-5B"], seed=1).latent_shape == (48, 31, 44, 80)


def test_each_text_is_encoded_once():
    seen = []

    def encoder(prompts):
        seen.extend(prompts)
        return [torch.zeros(2, 24) for _ in prompts]

    texts = encode_samples(encoder, [sample_of(), sample_of(seed=5), sample_of(negative_prompt="a fox")])
    assert seen == ["a fox", "dark"] == list(texts)
