"""A sample on its way from noise to latent: its settings, its noise, its solver.

Training samples come from here too, so a seed gives one picture everywhere.
Shapes: B batch (always 1), C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import quoted
from utils.learning.conditions import NOTHING_GIVEN, Conditioning, with_clean_start
from utils.sampling.defaults import NO_DEFAULTS, SampleDefaults
from utils.sampling.picture_rules import sample_size, shift_of
from utils.sampling.prompts import SamplePrompt
from wan.configs import WanTask
from wan.errors import InputError
from wan.text_encoder import TextEncoder

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

    def step(self, velocity_CFHW: Tensor) -> None:
        """Takes the next step, with the velocity (float32, CPU) at its timestep."""
        t = self.scheduler.timesteps[self.done]
        latent_CFHW = self.scheduler.step(velocity_CFHW, t, self.latent_CFHW).prev_sample
        self.latent_CFHW = self.start.pinned(latent_CFHW)
        self.done += 1


def initial_noise(sample: Sample) -> Tensor:
    """float32 [C, F, H, W], drawn on the CPU, so that a seed gives the same noise on every device."""
    generator = torch.Generator("cpu").manual_seed(sample.seed)
    return torch.randn(sample.latent_shape, generator=generator, dtype=torch.float32)


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


def check_finite(values: Tensor, what: str, advice: str) -> None:
    """InputError if `values` are not all finite: they would become a black picture."""
    if not torch.isfinite(values).all():
        raise InputError(f"{what} contains NaN or infinity, so nothing is saved from it: {advice}")
