"""From a prompt's encoded text to a latent: the solvers, guidance, two experts.

Training samples come from here too, so a seed gives one picture everywhere.
Shapes: B batch (always 1), C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import quoted
from utils.learning.conditions import NOTHING_GIVEN, Conditioning, predict, with_clean_start
from utils.sampling.defaults import NO_DEFAULTS, SampleDefaults
from utils.sampling.picture_rules import sample_size, shift_of
from utils.sampling.prompts import SamplePrompt
from wan.configs import WanTask
from wan.errors import InputError
from wan.model import WanModel
from wan.text_encoder import TextEncoder
from wan.vae import WanVAE

SOLVERS = ("unipc", "dpm++", "vanilla")
TIMESTEPS = 1000  # the model's time runs from 1000 (noise) to 0


@dataclass(frozen=True)
class Sample:
    """Everything that determines a sample, given the weights: a SamplePrompt with the task's values filled in."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    seed: int
    steps: int
    guidance_scale: float
    flow_shift: float
    solver: str
    latent_shape: tuple[int, int, int, int]  # C, F, H, W
    image_path: str | None = None  # the picture that is its first frame
    end_image_path: str | None = None

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(path for path in (self.image_path, self.end_image_path) if path is not None)


@dataclass(frozen=True, eq=False)
class Start:
    """What a sample starts from beside noise (B = 1, CPU): what its model is given of pictures.

    `clean_BCFHW` (F = 1) is what the first latent frame of a ti2v-5B sample stays at.
    """

    given: Conditioning = NOTHING_GIVEN
    clean_BCFHW: Tensor | None = None

    def pinned(self, latent_CFHW: Tensor) -> Tensor:
        """The latent, its first frame clean if the sample starts from that."""
        if self.clean_BCFHW is None:
            return latent_CFHW
        return with_clean_start(latent_CFHW[None], self.clean_BCFHW, self.given.starts_clean_B)[0]


NOISE_ALONE = Start()


def resolve_sample(
    prompt: SamplePrompt,
    task: WanTask,
    seed: int,
    solver: str = "unipc",
    defaults: SampleDefaults = NO_DEFAULTS,
) -> Sample:
    """`prompt` with the values of `defaults`, else the task's, and with `seed` where it has none of its own."""
    prompt = defaults.fill(prompt)
    width, height = sample_size(task, prompt.width, prompt.height, prompt.image_path)
    default_shift = shift_of(task, prompt.width, prompt.height, (width, height))
    return Sample(
        prompt=prompt.prompt,
        negative_prompt=_given(prompt.negative_prompt, task.negative_prompt),
        width=width,
        height=height,
        frames=prompt.frames,
        seed=_given(prompt.seed, seed),
        steps=_given(prompt.steps, task.infer_steps),
        guidance_scale=_given(prompt.guidance_scale, task.guidance_scale),
        flow_shift=_given(prompt.flow_shift, default_shift),
        solver=solver,
        latent_shape=task.latents.shape(prompt.frames, height, width),
        image_path=_text(prompt.image_path),
        end_image_path=_text(prompt.end_image_path),
    )


def _given(value, otherwise):
    return otherwise if value is None else value


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def size_line(prompt: SamplePrompt, sample: Sample) -> str | None:
    """Says that the sample's size follows from its picture, if it does."""
    if prompt.image_path is None or (prompt.width is not None and prompt.height is not None):
        return None
    return (
        f"{sample.width}x{sample.height} follows from the shape of {prompt.image_path}; give a width and a height for "
        "another size"
    )


@torch.no_grad()
def encode_samples(text_encoder: Callable[[list[str]], list[Tensor]], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The encoded text [S, D] (CPU) of every prompt and negative prompt, each encoded once and alone.

    InputError if one is not finite.
    """
    texts = dict.fromkeys(text for sample in samples for text in (sample.prompt, sample.negative_prompt))
    encoded = {text: text_encoder([text])[0].cpu() for text in texts}
    for text, text_SD in encoded.items():
        check_finite(text_SD, f"the text encoder's output for {text!r}", "the --t5 file may be damaged")
    return encoded


def cut_lines(text_encoder: TextEncoder, samples: Sequence[Sample]) -> list[str]:
    """A line for each prompt whose end is not read, because it is longer than the text encoder takes."""
    kinds = {sample.prompt: "prompt" for sample in samples}
    kinds = {sample.negative_prompt: "negative prompt" for sample in samples} | kinds
    lengths = {text: text_encoder.count_tokens(text) for text in kinds}
    return [
        f"the {kinds[text]} {quoted(text)} has {tokens} tokens; the text encoder reads the first "
        f"{text_encoder.text_len}"
        for text, tokens in lengths.items()
        if tokens > text_encoder.text_len
    ]


def sample_prompt(
    model: WanModel,
    sample: Sample,
    texts: Mapping[str, Tensor],
    device: torch.device | str,
    on_step: Callable[[], object] | None = None,
    source: str = "the model",
    start: Start = NOISE_ALONE,
) -> Tensor:
    """The latent [C, F, H, W] (float32, CPU, normalised) of `sample` by one model, which runs on `device`.

    `texts` comes from encode_samples, `start` from encode_starts; on_step is called after each step; `source` names
    the model in an InputError.
    """
    denoising = Denoising(sample, start)
    advance(denoising, model, sample.guidance_scale, texts, device, on_step=on_step, source=source)
    return denoising.latent_CFHW


class Denoising:
    """A sample on its way from noise to latent: the latent so far, the solver's memory, the steps left."""

    def __init__(self, sample: Sample, start: Start = NOISE_ALONE):
        self.sample = sample
        self.start = start
        self.scheduler = make_scheduler(sample.solver, sample.steps, sample.flow_shift)
        self.latent_CFHW = start.pinned(initial_noise(sample))
        self.done = 0

    def steps_down_to(self, t_end: float) -> Tensor:
        """The timesteps still to do that are t_end or more."""
        left = self.scheduler.timesteps[self.done :]
        return left[left >= t_end]


def initial_noise(sample: Sample) -> Tensor:
    """float32 [C, F, H, W], drawn on the CPU, so that a seed gives the same noise on every device."""
    generator = torch.Generator("cpu").manual_seed(sample.seed)
    return torch.randn(sample.latent_shape, generator=generator, dtype=torch.float32)


@torch.no_grad()
def advance(
    denoising: Denoising,
    model: WanModel,
    guidance_scale: float,
    texts: Mapping[str, Tensor],
    device: torch.device | str,
    t_end: float = 0.0,
    on_step: Callable[[], object] | None = None,
    source: str = "the model",
) -> None:
    """Takes the steps at timesteps >= t_end with `model`; the latent and the solver stay on the CPU in float32.

    A high-noise expert has t_end = 1000 * boundary; the low-noise one then takes the rest. InputError, with `source`
    and the step, if the model's output is not finite.
    """
    sample = denoising.sample
    context_SD, negative_SD = (texts[text].to(device) for text in (sample.prompt, sample.negative_prompt))
    given = denoising.start.given.to(device)
    for t in denoising.steps_down_to(t_end):
        latents_BCFHW = denoising.latent_CFHW[None].to(device)
        velocity_CFHW = _velocity(model, latents_BCFHW, t, guidance_scale, context_SD, negative_SD, given)[0].cpu()
        latent_CFHW = denoising.scheduler.step(velocity_CFHW, t, denoising.latent_CFHW).prev_sample
        denoising.latent_CFHW = denoising.start.pinned(latent_CFHW)
        denoising.done += 1
        where = f"the output of {source} in step {denoising.done} of {sample.steps} for {sample.prompt!r}"
        check_finite(denoising.latent_CFHW, where, "its weights may be damaged, or trained at too high a learning rate")
        if on_step:
            on_step()


def _velocity(
    model: WanModel,
    latents_BCFHW: Tensor,
    t: Tensor,
    guidance_scale: float,
    context_SD: Tensor,
    negative_SD: Tensor,
    given: Conditioning,
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): u + g (c - u), which is c alone at g = 1.

    Both passes are given the same pictures.
    """
    t_B = t.to(latents_BCFHW.device, torch.float32)[None]
    with_prompt_BCFHW = predict(model, latents_BCFHW, t_B, [context_SD], given)
    if guidance_scale == 1:
        return with_prompt_BCFHW
    without_BCFHW = predict(model, latents_BCFHW, t_B, [negative_SD], given)
    return without_BCFHW + guidance_scale * (with_prompt_BCFHW - without_BCFHW)


def make_scheduler(solver: str, steps: int, shift: float):
    """A diffusers scheduler with its timesteps set. `unipc` has the sigmas of Wan's own; `vanilla` is Euler."""
    # Here, because diffusers takes seconds to import.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": TIMESTEPS}
    match solver:
        case "unipc":
            scheduler = UniPCMultistepScheduler(flow_shift=shift, **flow)
            # Wan's list starts one training step below pure noise. diffusers' own (0.001 at its end) differs by up to
            # 0.007, so it is given here, unshifted: the scheduler shifts it.
            scheduler.set_timesteps(sigmas=np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1)[:-1])
        case "dpm++":
            scheduler = DPMSolverMultistepScheduler(
                flow_shift=shift, algorithm_type="dpmsolver++", solver_order=2, **flow
            )
            scheduler.set_timesteps(steps)
        case "vanilla":
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)
            # Without sigmas diffusers shifts the end point twice (huggingface/diffusers issue 13243).
            scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
        case _:
            raise AssertionError(f"no solver {solver}")
    # Truncated timesteps may repeat; counting from here, a step is never looked up by its timestep.
    scheduler.set_begin_index(0)
    return scheduler


def decode_latent(vae: WanVAE, latent_CFHW: Tensor) -> Tensor:
    """The video [3, T, H, W] of one latent: float32 in [-1, 1], on the CPU; InputError if it is not finite."""
    video_3THW = vae.decode(latent_CFHW[None])[0].float().cpu()
    check_finite(video_3THW, "the output of the VAE", "try --vae_dtype float32")
    return video_3THW


def check_finite(values: Tensor, what: str, advice: str) -> None:
    """InputError if `values` are not all finite: they would become a black picture."""
    if not torch.isfinite(values).all():
        raise InputError(f"{what} contains NaN or infinity, so nothing is saved from it: {advice}")
