"""The DiTs of a generation: which files they are, what goes on top of each, and the steps that each takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.generating.config import GenerateConfig
from utils.sampling.batches import advance
from utils.sampling.defaults import SampleDefaults, read_sample_defaults
from utils.sampling.denoising import TIMESTEPS, Denoising
from utils.slice_saving import base_identity
from utils.slices.lora_files import LoraFile, read_loras
from utils.slices.loras_beside import lora_bytes_beside, lora_lines, loras_beside
from utils.slices.on_base import SliceFile, SlicesOnBase, read_slice_file, slices_on_base
from utils.slices.overlay import load_with_slices
from utils.swap.memory_checks import check_memory
from utils.swap.placement import FP8_TEXTS, LoadedWeights, check_swap, memory_line, place_model
from utils.swap.plan import SwapConfig
from wan.compiling import compiled_pointwise
from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.loading import check_fits_task, config_from_header, file_dtype, is_fp8, read_checkpoint_header
from wan.model import use_pointwise
from wan.pointwise import PLAIN, Pointwise


@dataclass(frozen=True)
class Expert:
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


def read_experts(config: GenerateConfig, say: Callable[[str], None]) -> list[Expert]:
    """The DiTs in the order in which they take steps; InputError if the files do not fit together."""
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
) -> Expert:
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
    return Expert(path, own, beside, swap, dtype, mapped, widths, defaults, PLAIN, guidance_scale=None, t_end=0.0)


def _without(swap: SwapConfig, taken: int) -> SwapConfig:
    """What is left for the weights of a model when something else has taken `taken` bytes of the device."""
    return swap if swap.weights_vram is None else replace(swap, weights_vram=swap.weights_vram - taken)


def compiled_expert(expert: Expert, device: torch.device) -> Expert:
    """The expert with its pointwise functions compiled for the device."""
    return replace(expert, pointwise=compiled_pointwise(expert.widths, expert.dtype, device))


def run_expert(
    config: GenerateConfig,
    expert: Expert,
    denoisings: Sequence[Denoising],
    texts: Mapping[str, Tensor],
    on_step: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    """Loads and places the expert, and takes its steps of every sample."""
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
