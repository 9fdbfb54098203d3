"""The flags of wan_generate_video.py, checked into a GenerateConfig."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from utils.cli.command import one_strength_each
from utils.cli.generate_flags import generation_parser
from utils.cli.sampling_flags import GENERATION_LORAS, read_loras
from utils.cli.swap_flags import read_swap
from utils.devices import default_device
from utils.files import existing_file
from utils.generating.config import OUTPUT_TYPES, GenerateConfig, check_vae
from utils.sampling.picture_rules import pictures_taken
from utils.sampling.prompts import SamplePrompt, check_prompt, read_prompt_file
from utils.sampling.starts import check_clip
from wan.configs import TASKS, WanTask
from wan.errors import InputError

_LATENT_OUTPUTS = tuple(kind for kind in OUTPUT_TYPES if kind not in ("video", "images"))
_PICTURES = ("--image_path", "--end_image_path")


def parse_generate(argv: Sequence[str] | None) -> GenerateConfig:
    """The job that the flags describe; InputError if it cannot be done. Nothing is written."""
    flags = generation_parser().parse_args(argv)
    task = TASKS[flags.task]
    _check_latents(flags)
    defaults = _prompt_defaults(flags, task)
    _check_combinations(flags, task)
    prompts = _prompts(flags, defaults, task)
    (loras, multipliers), (loras_high, multipliers_high) = (read_loras(flags, own) for own in GENERATION_LORAS)
    for prompt in prompts:
        check_vae(prompt, flags.vae)
    return GenerateConfig(
        task=flags.task,
        save_path=_output_folder(flags.save_path),
        output_type=flags.output_type,
        fps=flags.fps,
        write_metadata=not flags.no_metadata,
        prompts=prompts,
        typed_defaults=defaults if flags.interactive else None,
        latent_paths=tuple(existing_file(path, "--latent_path") for path in flags.latent_path or ()),
        dit=flags.dit,
        dit_high_noise=flags.dit_high_noise,
        slices=tuple(existing_file(path, "--slices") for path in flags.slices),
        slice_strengths=_slice_strengths(flags),
        loras=loras,
        lora_multipliers=multipliers,
        loras_high_noise=loras_high,
        lora_multipliers_high_noise=multipliers_high,
        vae=_file(flags.vae, "--vae"),
        t5=_file(flags.t5, "--t5"),
        fp8_t5=flags.fp8_t5,
        clip=_file(flags.clip, "--clip"),
        tokenizer=flags.tokenizer,
        solver=flags.sample_solver,
        boundary=_boundary(flags, task),
        guidance_scale_high=flags.guidance_scale_high_noise,
        swap=read_swap(flags, "--fp8"),
        batch=flags.sample_batch,
        device=flags.device or default_device(),
        dit_dtype=flags.dit_dtype,
        vae_dtype=flags.vae_dtype,
        compile=flags.compile,
    )


def _prompt_defaults(flags: argparse.Namespace, task: WanTask) -> SamplePrompt:
    """The values for what a prompt's own options leave out."""
    height, width = flags.video_size
    frames = task.video_length if flags.video_length is None else flags.video_length
    nearest = task.latents.whole_frames(max(frames, 1))
    if frames != nearest:
        above = nearest + task.latents.frame_stride
        raise InputError(f"--video_length {frames} must be 4k+1, such as {nearest} or {above}")
    defaults = SamplePrompt(
        prompt=flags.prompt or "",
        negative_prompt=flags.negative_prompt,
        width=width,
        height=height,
        frames=frames,
        seed=flags.seed,
        steps=flags.infer_steps,
        guidance_scale=flags.guidance_scale,
        flow_shift=flags.flow_shift,
        image_path=flags.image_path,
        end_image_path=flags.end_image_path,
    )
    return check_prompt(defaults, "flags", task, _PICTURES, complete=flags.prompt is not None)


def _check_latents(flags: argparse.Namespace) -> None:
    """Nothing is asked for that cannot happen where saved latents are decoded."""
    if flags.latent_path and flags.output_type in _LATENT_OUTPUTS:
        raise InputError(f"--output_type {flags.output_type} would only copy --latent_path; use video or images")
    for flag in (*_PICTURES, "--clip", "--compile", "--lora_weight", "--lora_weight_high_noise"):
        if flags.latent_path and getattr(flags, flag[2:]):
            raise InputError(f"{flag} has no effect on --latent_path, whose files are decoded; leave it out")


def _check_combinations(flags: argparse.Namespace, task: WanTask) -> None:
    for name, value in (
        ("--guidance_scale_high_noise", flags.guidance_scale_high_noise),
        ("--timestep_boundary", flags.timestep_boundary),
    ):
        if value is not None and flags.dit_high_noise is None:
            raise InputError(f"{name} is for two experts: give --dit_high_noise too, or leave it out")
    if flags.lora_weight_high_noise and flags.dit_high_noise is None:
        raise InputError("--lora_weight_high_noise is for two experts: give --dit_high_noise too, or use --lora_weight")
    if flags.dit_high_noise is not None and task.boundary is None and flags.timestep_boundary is None:
        two = " or ".join(name for name, other in TASKS.items() if other.boundary is not None)
        raise InputError(f"--dit_high_noise with --task {task.name} needs --timestep_boundary (or --task {two})")
    _check_models(flags, task)


def _check_models(flags: argparse.Namespace, task: WanTask) -> None:
    """Every file that the job needs is given."""
    if flags.fp8_t5 and flags.t5 is None:
        raise InputError("--fp8_t5 has no effect without --t5: leave it out")
    needed = ["--dit", "--t5"] if flags.latent_path is None else []
    needed += ["--vae"] if flags.output_type != "latent" or pictures_taken(task)[0] else []
    if flags.latent_path is None:
        check_clip(task, flags.clip)
    for flag in needed:
        if getattr(flags, flag[2:]) is None:
            what = f"--task {task.name} with --output_type {flags.output_type}"
            raise InputError(f"{flag} is missing; {what} needs {', '.join(needed)}")


def _boundary(flags: argparse.Namespace, task: WanTask) -> float | None:
    given = flags.timestep_boundary
    return task.boundary if given is None else given / 1000 if given > 1 else given


def _prompts(flags: argparse.Namespace, defaults: SamplePrompt, task: WanTask) -> tuple[SamplePrompt, ...]:
    if flags.from_file is not None:
        return tuple(read_prompt_file(flags.from_file, defaults, task))
    return () if flags.prompt is None else (defaults,)


def _slice_strengths(flags: argparse.Namespace) -> tuple[float, ...]:
    if flags.slice_strength and not flags.slices:
        raise InputError("--slice_strength has no effect without --slices")
    return tuple(one_strength_each(flags.slice_strength, len(flags.slices), "--slice_strength"))


def _file(path: Path | None, flag: str) -> Path | None:
    return None if path is None else existing_file(path, flag)


def _output_folder(path: Path) -> Path:
    """`path`, if it is a folder that can be written to or created; the first file creates it."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--save_path {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--save_path {path}: {parent} is not writable")
    return path
