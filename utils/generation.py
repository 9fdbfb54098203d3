"""Pictures, videos and latents from prompts: the job behind wan_generate_video.py.

One model is in memory at a time: what encodes pictures, the text encoder, each DiT, then the VAE decodes. The VAE,
which is small, waits on the CPU.
"""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.devices import cpu_line
from utils.generating.config import GenerateConfig, check_vae
from utils.generating.experts import Expert, compiled_expert, read_experts, run_expert
from utils.generating.saving import decode_latent_files, save_all
from utils.sampling.defaults import SampleDefaults
from utils.sampling.denoising import Denoising, Sample, cut_lines, encode_samples, resolve_sample, size_line
from utils.sampling.picture_rules import pictures_taken
from utils.sampling.prompts import SamplePrompt, parse_prompt_line
from utils.sampling.starts import encode_starts
from utils.sampling.writers import remove_unfinished
from wan.compiling import COMPILING, check_compiler
from wan.configs import TASKS
from wan.errors import InputError
from wan.text_encoder import load_text_encoder
from wan.vae import WanVAE, load_vae


def generate(config: GenerateConfig, say: Callable[[str], None]) -> list[Path]:
    """Generates and saves what `config` asks for; returns the paths of the files and folders.

    InputError, before anything is encoded or written, if the files do not fit together.
    """
    if config.device.type == "cuda" and config.device.index is not None:
        torch.cuda.set_device(config.device)  # for code that takes no device: libraries' kernels, new events
    if line := cpu_line(config.device):
        say(line)
    if config.latent_paths:
        return decode_latent_files(config, say)
    if config.compile:
        check_compiler(config.device)
    experts = read_experts(config, say)
    vae = _load_vae(config)
    if config.compile:
        say(COMPILING)
        experts = [compiled_expert(expert, config.device) for expert in experts]
    if config.typed_defaults is None:
        return _sample_all(config, config.prompts, experts, vae, say)
    return _sample_typed(config, experts, vae, say)


def _load_vae(config: GenerateConfig) -> WanVAE | None:
    """The VAE on the CPU: loaded first, because it is small and a wrong file should not cost a sampling run.

    None if only latents are saved and no picture is encoded.
    """
    task = TASKS[config.task]
    encodes = config.vae is not None and pictures_taken(task)[1] > 0
    if config.output_type == "latent" and not encodes:
        return None
    return load_vae(config.vae, config.vae_dtype, "cpu", task.latents.channels)


def _sample_typed(
    config: GenerateConfig, experts: Sequence[Expert], vae: WanVAE | None, say: Callable[[str], None]
) -> list[Path]:
    paths = []
    say("type a prompt, with options as in a prompt file; an empty line exits")
    for number, line in enumerate(iter(sys.stdin.readline, ""), 1):
        if not line.strip():
            break
        try:
            prompt = parse_prompt_line(line, config.typed_defaults, f"line {number}", TASKS[config.task])
            check_vae(prompt, vae)
        except InputError as error:
            say(f"error: {error}")  # the user can correct it on the next line
            continue
        paths += _sample_all(config, [prompt], experts, vae, say)
    return paths


def _sample_all(
    config: GenerateConfig,
    prompts: Sequence[SamplePrompt],
    experts: Sequence[Expert],
    vae: WanVAE | None,
    say: Callable[[str], None],
) -> list[Path]:
    samples = [_resolve(prompt, config, experts[-1].defaults) for prompt in prompts]
    for prompt, sample in zip(prompts, samples, strict=True):
        for line in filter(None, [size_line(prompt, sample), _describe(sample)]):
            say(line)
    image_dim = experts[0].widths.image_dim
    starts = encode_starts(samples, TASKS[config.task], vae, config.clip, image_dim, config.device, say)
    texts = _encode(config, experts, samples, say)
    remove_unfinished(config.save_path)
    denoisings = [Denoising(sample, start) for sample, start in zip(samples, starts, strict=True)]
    with tqdm(total=sum(sample.steps for sample in samples), desc="steps", unit="step") as bar:
        for expert in experts:
            run_expert(config, expert, denoisings, texts, bar.update, say)
    return save_all(config, denoisings, experts, vae, say)


def _resolve(prompt: SamplePrompt, config: GenerateConfig, defaults: SampleDefaults) -> Sample:
    seed = random.SystemRandom().randrange(2**32)
    return resolve_sample(prompt, TASKS[config.task], seed, config.solver, defaults)


def _describe(sample: Sample) -> str:
    pictures = f" from {' to '.join(sample.pictures)}" if sample.pictures else ""
    return (
        f"{sample.prompt!r}{pictures}: {sample.width}x{sample.height}, {sample.frames} frames, seed {sample.seed}, "
        f"{sample.steps} steps of {sample.solver}, flow shift {sample.flow_shift:g}, guidance {sample.guidance_scale:g}"
    )


def _encode(
    config: GenerateConfig, experts: Sequence[Expert], samples: Sequence[Sample], say: Callable[[str], None]
) -> dict[str, Tensor]:
    text_len = min(expert.widths.text_len for expert in experts)
    text_dim = experts[0].widths.text_dim
    widths = {"text_len": text_len, "text_dim": text_dim}
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=config.device, fp8=config.fp8_t5, **widths)
    for line in cut_lines(text_encoder, samples):
        say(line)
    return encode_samples(text_encoder, samples)
