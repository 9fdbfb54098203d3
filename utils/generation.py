"""Pictures, videos and latents from prompts: the job behind wan_generate_video.py.

One model is in memory at a time: what encodes pictures, the text encoder, each DiT, then the VAE decodes. The VAE,
which is small, waits on the CPU.
"""

import glob
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.devices import cpu_line
from utils.files import file_name
from utils.sampling import writers
from utils.sampling.batches import advance, decode_latents
from utils.sampling.defaults import SampleDefaults, read_sample_defaults
from utils.sampling.denoising import (
    TIMESTEPS,
    Denoising,
    Sample,
    cut_lines,
    encode_samples,
    resolve_sample,
    size_line,
)
from utils.sampling.picture_rules import pictures_taken
from utils.sampling.prompts import SamplePrompt, parse_prompt_line
from utils.sampling.sample_metadata import picture_names, sample_settings, settings_of_latent
from utils.sampling.starts import encode_starts
from utils.slice_saving import base_identity
from utils.slices.lora_files import LoraFile, read_loras
from utils.slices.loras_beside import lora_bytes_beside, lora_lines, loras_beside
from utils.slices.on_base import SliceFile, SlicesOnBase, read_slice_file, slices_on_base
from utils.slices.overlay import load_with_slices
from utils.swap.memory_checks import check_memory
from utils.swap.placement import FP8_TEXTS, LoadedWeights, check_swap, memory_line, place_model
from utils.swap.plan import SwapConfig
from wan.compiling import COMPILING, check_compiler, compiled_pointwise
from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.loading import check_fits_task, config_from_header, file_dtype, is_fp8, read_checkpoint_header
from wan.model import use_pointwise
from wan.pointwise import PLAIN, Pointwise
from wan.text_encoder import load_text_encoder
from wan.vae import WanVAE, load_vae

OUTPUT_TYPES = ("video", "images", "latent", "both", "latent_images")
_LATENT_OUTPUTS = ("latent", "both", "latent_images")
_FRAME_OUTPUTS = ("images", "latent_images")


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate (prompts, typed prompts or saved latents), from which files, into which folder."""

    task: str
    save_path: Path
    output_type: str
    fps: int | None  # None: that of the models with this VAE
    write_metadata: bool
    prompts: tuple[SamplePrompt, ...]
    typed_defaults: SamplePrompt | None  # set: prompts are typed, one a line
    latent_paths: tuple[Path, ...]
    dit: Path | None
    dit_high_noise: Path | None
    slices: tuple[Path, ...]  # each goes on top of the DiT that it was trained on
    slice_strengths: tuple[float, ...]
    loras: tuple[Path, ...]  # beside dit
    lora_multipliers: tuple[float, ...]
    loras_high_noise: tuple[Path, ...]  # beside dit_high_noise
    lora_multipliers_high_noise: tuple[float, ...]
    vae: Path | None
    t5: Path | None
    fp8_t5: bool
    clip: Path | None  # the image encoder, for tasks that read pictures through it
    tokenizer: Path | None
    solver: str
    boundary: float | None  # share of the timesteps above which dit_high_noise works
    guidance_scale_high: float | None  # None: what dit_high_noise suggests, else the task's
    swap: SwapConfig
    batch: int | None  # latents in a pass through the model; None: by their size
    device: torch.device
    dit_dtype: torch.dtype | None  # None: the file's
    vae_dtype: torch.dtype
    compile: bool  # the pointwise functions


@dataclass(frozen=True)
class _Expert:
    """A DiT and the timesteps that it samples: those >= t_end that are left by the expert before it."""

    path: Path
    slices: SlicesOnBase
    loras: tuple[LoraFile, ...]
    swap: SwapConfig
    dtype: torch.dtype
    mapped: bool  # its weights on the CPU are the file's own bytes
    widths: WanConfig
    defaults: SampleDefaults  # in its metadata
    pointwise: Pointwise
    guidance_scale: float | None  # None: the sample's
    t_end: float


def generate(config: GenerateConfig, say: Callable[[str], None]) -> list[Path]:
    """Generates and saves what `config` asks for; returns the paths of the files and folders.

    InputError, before anything is encoded or written, if the files do not fit together.
    """
    if config.device.type == "cuda" and config.device.index is not None:
        torch.cuda.set_device(config.device)  # for code that takes no device: libraries' kernels, new events
    if line := cpu_line(config.device):
        say(line)
    if config.latent_paths:
        return _decode_latent_files(config, say)
    if config.compile:
        check_compiler(config.device)
    experts = _read_experts(config, say)
    vae = _load_vae(config)
    if config.compile:
        say(COMPILING)
        experts = [_compile(expert, config.device) for expert in experts]
    if config.typed_defaults is None:
        return _sample_all(config, config.prompts, experts, vae, say)
    return _sample_typed(config, experts, vae, say)


def _read_experts(config: GenerateConfig, say: Callable[[str], None]) -> list[_Expert]:
    slices = _slices_by_dit(config)
    loras = config.loras, config.lora_multipliers
    experts = [_read_expert(config, config.dit, slices, loras, say)]
    if config.dit_high_noise is not None:
        loras = config.loras_high_noise, config.lora_multipliers_high_noise
        high = _read_expert(config, config.dit_high_noise, slices, loras, say)
        scales = (config.guidance_scale_high, high.defaults.guidance_scale, TASKS[config.task].guidance_scale_high)
        guidance_scale = next((scale for scale in scales if scale is not None), None)
        experts.insert(0, replace(high, guidance_scale=guidance_scale, t_end=config.boundary * TIMESTEPS))
    elif TASKS[config.task].boundary is not None:
        say(f"{config.task} has two experts; without --dit_high_noise, {config.dit.name} takes every step")
    return experts


def _slices_by_dit(config: GenerateConfig) -> dict[Path, list[tuple[SliceFile, float]]]:
    """The slices, with their strengths, to apply to each DiT; of two, the one that a slice was trained on."""
    files = [read_slice_file(path) for path in config.slices]
    dits = [path for path in (config.dit, config.dit_high_noise) if path is not None]
    by_dit = {path: [] for path in dits}
    identities = {path: base_identity(read_checkpoint_header(path).files) for path in dits} if files else {}
    for file, strength in zip(files, config.slice_strengths, strict=True):
        fitting = [path for path in dits if identities[path] == file.entry.base]
        # One that fits neither goes to the first, where the check that follows refuses it with the reason.
        for path in fitting or dits[:1]:
            by_dit[path].append((file, strength))
    return by_dit


def _read_expert(
    config: GenerateConfig,
    path: Path,
    slices: Mapping[Path, Sequence[tuple[SliceFile, float]]],
    loras: tuple[Sequence[Path], Sequence[float]],
    say: Callable[[str], None],
) -> _Expert:
    header = read_checkpoint_header(path)
    check_fits_task(header, config.task)
    widths = config_from_header(header)
    dtype = config.dit_dtype or (torch.bfloat16 if is_fp8(header) else file_dtype(header))
    fp8 = config.swap.fp8
    if fp8 and is_fp8(header):
        raise InputError(f"{path} is stored in fp8, and --fp8 rounds bf16, fp16 and fp32 files: leave out --fp8")
    mapped = bool(fp8) or file_dtype(header) == dtype
    beside = read_loras(*loras, widths)
    swap = _without(config.swap, lora_bytes_beside(beside, dtype))
    check_swap(widths, dtype, config.device, swap, mapped)
    lighter = "use a bf16 file" if is_fp8(header) else "leave out --dit_dtype"
    lighter = "use --host_weights mapped instead of --fp8" if fp8 else lighter
    check_memory(header, widths, dtype, config.device, swap, f"{lighter}, so that the weights are read in place")
    own = slices_on_base(header, [file for file, _ in slices[path]], [strength for _, strength in slices[path]])
    with_slices = "".join(f", with {entry.label}" for entry in own.entries)
    rounded = f", block matrices rounded to {FP8_TEXTS[fp8]}" if fp8 else ""
    say(f"{path}: computes in {str(dtype).removeprefix('torch.')}{rounded}{with_slices}")
    defaults = read_sample_defaults(header.metadata, path)
    for line in [*own.notes, *lora_lines(beside), *defaults.lines(path)]:
        say(line)
    return _Expert(path, own, beside, swap, dtype, mapped, widths, defaults, PLAIN, guidance_scale=None, t_end=0.0)


def _without(swap: SwapConfig, taken: int) -> SwapConfig:
    """What is left for the weights of a model when something else has taken `taken` bytes of the device."""
    return swap if swap.weights_vram is None else replace(swap, weights_vram=swap.weights_vram - taken)


def _compile(expert: _Expert, device: torch.device) -> _Expert:
    return replace(expert, pointwise=compiled_pointwise(expert.widths, expert.dtype, device))


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
    config: GenerateConfig, experts: Sequence[_Expert], vae: WanVAE | None, say: Callable[[str], None]
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


def check_vae(prompt: SamplePrompt, vae: object | None) -> None:
    """InputError if the prompt starts from a picture and there is no VAE to encode it."""
    if prompt.image_path is not None and vae is None:
        raise InputError(f"--vae is missing: it encodes the picture {prompt.image_path}")


def _sample_all(
    config: GenerateConfig,
    prompts: Sequence[SamplePrompt],
    experts: Sequence[_Expert],
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
    writers.remove_unfinished(config.save_path)
    denoisings = [Denoising(sample, start) for sample, start in zip(samples, starts, strict=True)]
    with tqdm(total=sum(sample.steps for sample in samples), desc="steps", unit="step") as bar:
        for expert in experts:
            _run_expert(config, expert, denoisings, texts, bar.update, say)
    return _save_all(config, denoisings, experts, vae, say)


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
    config: GenerateConfig, experts: Sequence[_Expert], samples: Sequence[Sample], say: Callable[[str], None]
) -> dict[str, Tensor]:
    text_len = min(expert.widths.text_len for expert in experts)
    text_dim = experts[0].widths.text_dim
    widths = {"text_len": text_len, "text_dim": text_dim}
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=config.device, fp8=config.fp8_t5, **widths)
    for line in cut_lines(text_encoder, samples):
        say(line)
    return encode_samples(text_encoder, samples)


def _run_expert(
    config: GenerateConfig,
    expert: _Expert,
    denoisings: Sequence[Denoising],
    texts: Mapping[str, Tensor],
    on_step: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    if not any(len(denoising.steps_down_to(expert.t_end)) for denoising in denoisings):
        return
    model, overlays = load_with_slices(expert.path, expert.dtype, expert.slices, bool(config.swap.fp8))
    use_pointwise(model, expert.pointwise)
    loaded = LoadedWeights(expert.mapped, overlays)
    with (
        place_model(model, config.device, expert.swap, loaded=loaded) as placement,
        loras_beside(model, expert.loras, config.device),
    ):
        with tqdm.external_write_mode():
            say(memory_line(placement, config.device))
        scale, source = expert.guidance_scale, str(expert.path)
        advance(denoisings, model, scale, texts, config.device, config.batch, expert.t_end, on_step, source)


def _save_all(
    config: GenerateConfig,
    denoisings: Sequence[Denoising],
    experts: Sequence[_Expert],
    vae: WanVAE | None,
    say: Callable[[str], None],
) -> list[Path]:
    stems = _free_stems(config.save_path, [denoising.sample.seed for denoising in denoisings])
    paths = []
    if config.output_type in _LATENT_OUTPUTS:
        # All before the first is decoded: hours of sampling are safe if the decoder runs out of memory.
        for stem, denoising in zip(stems, denoisings, strict=True):
            metadata = _latent_metadata(denoising.sample) if config.write_metadata else {}
            path = config.save_path / f"{stem}_latent.safetensors"
            paths.append(writers.save_latent(path, denoising.latent_CFHW, metadata))
    if config.output_type != "latent":
        vae.to(config.device)
        videos = decode_latents(vae, [denoising.latent_CFHW for denoising in denoisings])
        paths += [
            _save_video(config, vae, video_3THW, stem, _settings(denoising.sample, experts))
            for stem, denoising, video_3THW in zip(stems, denoisings, videos, strict=True)
        ]
        vae.to("cpu")
    for path in paths:
        say(f"saved {path}")
    return paths


def _free_stems(folder: Path, seeds: Sequence[int | str]) -> list[str]:
    """One file name stem (time, seed) per seed, in order of time; none is in use in `folder` or given twice."""
    stems = []
    moment = datetime.now()
    for seed in seeds:
        while any(folder.glob(f"{_time_flag(moment)}_{glob.escape(str(seed))}*")):
            moment += timedelta(milliseconds=1)
        stems.append(f"{_time_flag(moment)}_{seed}")
        moment += timedelta(milliseconds=1)
    return stems


def _time_flag(moment: datetime) -> str:
    return f"{moment:%Y%m%d-%H%M%S}-{moment.microsecond // 1000:03d}"


def _latent_metadata(sample: Sample) -> dict[str, str]:
    values = {
        "seeds": sample.seed,
        "prompt": sample.prompt,
        "height": sample.height,
        "width": sample.width,
        "video_length": sample.frames,
        "infer_steps": sample.steps,
        "guidance_scale": sample.guidance_scale,
        "negative_prompt": sample.negative_prompt,
        **picture_names(sample),
    }
    return {key: str(value) for key, value in values.items()}


def _settings(sample: Sample, experts: Sequence[_Expert]) -> dict[str, object]:
    *high, low = experts
    return sample_settings(
        sample,
        guidance_scale_high_noise=high[0].guidance_scale if high else None,
        model=low.path.stem,
        model_high_noise=high[0].path.stem if high else None,
        slices=[entry.label for expert in experts for entry in expert.slices.entries],
        loras=[file.label for file in low.loras],
        loras_high_noise=[file.label for expert in high for file in expert.loras],
    )


def _save_video(
    config: GenerateConfig, vae: WanVAE, video_3THW: Tensor, stem: str, settings: Mapping[str, object]
) -> Path:
    if not config.write_metadata:
        settings = writers.NO_SETTINGS
    if config.output_type in _FRAME_OUTPUTS:
        return writers.save_frames(config.save_path, stem, video_3THW, settings)
    fps = vae.kind.layout.fps if config.fps is None else config.fps
    return writers.save_sample(config.save_path, stem, video_3THW, fps, settings)


def _decode_latent_files(config: GenerateConfig, say: Callable[[str], None]) -> list[Path]:
    loaded = [writers.load_latent(path) for path in config.latent_paths]
    vae = _vae_of_latents(config, {len(latent_CFHW) for latent_CFHW, _ in loaded})
    writers.remove_unfinished(config.save_path)
    stems = _free_stems(config.save_path, [file_name(metadata.get("seeds", "0")) for _, metadata in loaded])
    paths, videos = [], decode_latents(vae, [latent_CFHW for latent_CFHW, _ in loaded])
    for source, stem, (_, metadata), video_3THW in zip(config.latent_paths, stems, loaded, videos, strict=True):
        settings = settings_of_latent(metadata)
        paths.append(_save_video(config, vae, video_3THW, file_name(f"{stem}_{source.stem}"), settings))
        say(f"saved {paths[-1]}")
    return paths


def _vae_of_latents(config: GenerateConfig, channels: set[int]) -> WanVAE:
    """The VAE of latents with these channels, whatever the task is: it is the one that they were made for."""
    if len(channels) > 1:
        raise InputError(
            f"--latent_path: the files have latents of {' and '.join(map(str, sorted(channels)))} channels, which are "
            "of different VAEs: decode them one kind after the other"
        )
    return load_vae(config.vae, config.vae_dtype, config.device, channels.pop())
