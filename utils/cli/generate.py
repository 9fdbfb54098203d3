"""The flags of wan_generate_video.py, checked into a GenerateConfig."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.cli.command import Parser, one_strength_each, refuse_flags
from utils.cli.swap_flags import add_swap_flags, read_swap
from utils.files import existing_file
from utils.generation import OUTPUT_TYPES, GenerateConfig
from utils.sampling.denoising import SOLVERS
from utils.sampling.prompts import SamplePrompt, check_prompt, read_prompt_file
from wan.configs import TASKS, WanTask
from wan.errors import InputError

_ATTENTION = ("torch", "sdpa")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_LATENT_OUTPUTS = tuple(kind for kind in OUTPUT_TYPES if kind not in ("video", "images"))

_NO_LORA = "LoRA files are not read; give slice files to --slices, or a whole checkpoint to --dit"
_NO_FP8 = "models compute in 16 or 32 bit; an fp8 --dit file is read as bf16, and --blocks_to_swap saves device memory"
_NO_COMPILE = "the model runs uncompiled; leave it out"
_NO_PICTURES = "only text-to-video is supported; leave it out"
_NO_GUIDANCE_TRICKS = "guidance works alike on every step and layer; set its strength with --guidance_scale"
_ALREADY_SO = "accepted, and always so"

_REFUSED = {
    "--ckpt_dir": "give the files to --dit, --dit_high_noise, --vae and --t5",
    "--clip": _NO_PICTURES,
    "--vae_cache_cpu": "leave it out; a smaller --video_size or --video_length needs less memory to decode",
    "--fp8": _NO_FP8,
    "--fp8_scaled": _NO_FP8,
    "--fp8_fast": _NO_FP8,
    "--fp8_t5": "the text encoder computes in bf16; leave it out",
    "--lora_weight": _NO_LORA,
    "--lora_multiplier": _NO_LORA,
    "--lora_weight_high_noise": _NO_LORA,
    "--lora_multiplier_high_noise": _NO_LORA,
    "--include_patterns": _NO_LORA,
    "--exclude_patterns": _NO_LORA,
    "--lycoris": _NO_LORA,
    "--save_merged_model": _NO_LORA,
    "--disable_numpy_memmap": "checkpoints are always memory-mapped; leave it out",
    "--image_path": _NO_PICTURES,
    "--end_image_path": _NO_PICTURES,
    "--video_path": _NO_PICTURES,
    "--control_path": _NO_PICTURES,
    "--control_image_path": _NO_PICTURES,
    "--control_image_mask_path": _NO_PICTURES,
    "--one_frame_inference": "it makes a picture from pictures; for a picture from text give --video_length 1",
    "--trim_tail_frames": "videos are saved whole; --video_length gives the number of frames",
    "--cfg_skip_mode": _NO_GUIDANCE_TRICKS,
    "--cfg_apply_ratio": _NO_GUIDANCE_TRICKS,
    "--slg_layers": _NO_GUIDANCE_TRICKS,
    "--slg_scale": _NO_GUIDANCE_TRICKS,
    "--slg_start": _NO_GUIDANCE_TRICKS,
    "--slg_end": _NO_GUIDANCE_TRICKS,
    "--slg_mode": _NO_GUIDANCE_TRICKS,
    "--compile": _NO_COMPILE,
    "--compile_backend": _NO_COMPILE,
    "--compile_mode": _NO_COMPILE,
    "--compile_dynamic": _NO_COMPILE,
    "--compile_fullgraph": _NO_COMPILE,
    "--compile_cache_size_limit": _NO_COMPILE,
    "--compile_args": _NO_COMPILE,
}


def parse_generate(argv: Sequence[str] | None) -> GenerateConfig:
    """The job that the flags describe; InputError, in one line, if it cannot be done. Nothing is written."""
    flags = _parser().parse_args(argv)
    task = _text_to_video_task(flags.task)
    defaults = _prompt_defaults(flags, task)
    _check_combinations(flags, task)
    return GenerateConfig(
        task=flags.task,
        save_path=_output_folder(flags.save_path),
        output_type=flags.output_type,
        fps=task.fps if flags.fps is None else flags.fps,
        write_metadata=not flags.no_metadata,
        prompts=_prompts(flags, defaults),
        typed_defaults=defaults if flags.interactive else None,
        latent_paths=tuple(existing_file(path, "--latent_path") for path in flags.latent_path or ()),
        dit=flags.dit,
        dit_high_noise=flags.dit_high_noise,
        slices=tuple(existing_file(path, "--slices") for path in flags.slices),
        slice_strengths=_slice_strengths(flags),
        vae=_file(flags.vae, "--vae"),
        t5=_file(flags.t5, "--t5"),
        tokenizer=flags.tokenizer,
        solver=flags.sample_solver,
        boundary=_boundary(flags, task),
        guidance_scale_high=_guidance_scale_high(flags, task),
        swap=read_swap(flags),
        device=flags.device or _default_device(),
        dit_dtype=flags.dit_dtype,
        vae_dtype=flags.vae_dtype,
    )


def _parser() -> Parser:
    parser = Parser(description="Makes pictures, videos and latents from prompts with a Wan checkpoint.")
    _add_files(parser)
    _add_prompts(parser)
    _add_sampling(parser)
    _add_computing(parser)
    _add_output(parser)
    refuse_flags(parser, _REFUSED)
    return parser


def _add_files(parser: Parser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--task", default="t2v-14B", help="gives the sampling defaults (default t2v-14B)")
    group.add_argument("--dit", type=Path, help="checkpoint; the low-noise one where there are two")
    group.add_argument("--dit_high_noise", type=Path, help="checkpoint for the timesteps above the boundary")
    group.add_argument("--slices", type=Path, nargs="+", default=[], metavar="FILE", help="slice files on top of --dit")
    group.add_argument(
        "--slice_strength", type=float, nargs="+", help="one for all slices, or one for each (default 1)"
    )
    group.add_argument("--vae", type=Path, help="Wan 2.1 VAE")
    group.add_argument("--t5", type=Path, help="UMT5 text encoder")
    group.add_argument("--tokenizer", type=Path, help="file or folder (default: beside --t5, in it, or the hub)")


def _add_prompts(parser: Parser) -> None:
    source = parser.add_argument_group("what to make (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--from_file", type=Path, help="prompt file: .txt (one a line), .toml or .json")
    source.add_argument("--interactive", action="store_true", help="prompts are typed, one a line")
    source.add_argument("--latent_path", type=Path, nargs="+", help="saved latents to decode")


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("sampling (defaults are the task's)")
    group.add_argument("--negative_prompt", help="what to stay away from (default: Wan's own, in Chinese)")
    group.add_argument("--video_size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="height first")
    group.add_argument("--video_length", type=int, help="frames, 4k+1")
    group.add_argument("--infer_steps", type=int)
    group.add_argument("--flow_shift", type=float)
    group.add_argument("--guidance_scale", type=float, help="1 is without guidance, in half the time")
    group.add_argument("--guidance_scale_high_noise", type=float, help="the same for --dit_high_noise")
    group.add_argument("--timestep_boundary", type=float, help="where the experts change, from 0 to 1 or to 1000")
    group.add_argument("--sample_solver", choices=SOLVERS, default="unipc", help="vanilla is Euler")
    group.add_argument("--seed", type=int, help="default: random, printed")
    group.add_argument("--cpu_noise", action="store_true", help=_ALREADY_SO)


def _add_computing(parser: Parser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument("--device", type=_device, help="default: cuda if there is one, else cpu")
    group.add_argument("--dit_dtype", type=_dtype, help="default: the file's, bfloat16 for fp8 files")
    group.add_argument("--vae_dtype", type=_dtype, default=torch.bfloat16, help="default bfloat16")
    group.add_argument("--attn_mode", type=_attention, default="torch", help=" or ".join(_ATTENTION))
    add_swap_flags(group)
    for flag in ("--offload_inactive_dit", "--lazy_loading", "--force_v2_1_time_embedding"):
        group.add_argument(flag, action="store_true", help=_ALREADY_SO)


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=Path, required=True, help="folder")
    group.add_argument("--output_type", choices=OUTPUT_TYPES, default="video", help="both is latent and video")
    group.add_argument("--fps", type=int, help="default: the task's")
    group.add_argument("--no_metadata", action="store_true", help="latent files without prompt and settings")


def _dtype(text: str) -> torch.dtype:
    if text.lower() not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[text.lower()]


def _attention(text: str) -> str:
    if text not in _ATTENTION:
        reason = "PyTorch's attention, which takes the fastest kernel that the device has, is the only one"
        raise argparse.ArgumentTypeError(f"{text} is not supported: {reason}; use {' or '.join(_ATTENTION)}")
    return text


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} is not a device; use cuda, cuda:1 or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _text_to_video_task(name: str) -> WanTask:
    allowed = [task.name for task in TASKS.values() if task.config.model_type == "t2v"]
    if name not in allowed:
        raise InputError(f"--task {name}: videos are made from text alone, by {', '.join(allowed)}")
    return TASKS[name]


def _prompt_defaults(flags: argparse.Namespace, task: WanTask) -> SamplePrompt:
    """What a prompt's own options do not say."""
    height, width = flags.video_size
    frames = task.video_length if flags.video_length is None else flags.video_length
    if frames % 4 != 1:
        nearest = max(frames // 4, 0) * 4 + 1
        raise InputError(f"--video_length {frames} must be 4k+1, such as {nearest} or {nearest + 4}")
    defaults = SamplePrompt(
        prompt=flags.prompt or "",
        negative_prompt=flags.negative_prompt,
        width=width,
        height=height,
        frames=frames,
        seed=flags.seed,
        steps=task.infer_steps if flags.infer_steps is None else flags.infer_steps,
        guidance_scale=flags.guidance_scale,
        flow_shift=flags.flow_shift,
    )
    return check_prompt(defaults, "flags")


def _check_combinations(flags: argparse.Namespace, task: WanTask) -> None:
    if flags.latent_path and flags.output_type in _LATENT_OUTPUTS:
        raise InputError(f"--output_type {flags.output_type} would only copy --latent_path; use video or images")
    for name, value in (
        ("--guidance_scale_high_noise", flags.guidance_scale_high_noise),
        ("--timestep_boundary", flags.timestep_boundary),
    ):
        if value is not None and flags.dit_high_noise is None:
            raise InputError(f"{name} is for two experts; give --dit_high_noise too, or leave it out")
    if flags.dit_high_noise is not None and task.boundary is None and flags.timestep_boundary is None:
        raise InputError(f"--dit_high_noise with --task {task.name} needs --timestep_boundary (or --task t2v-A14B)")
    if flags.fps is not None and flags.fps < 1:
        raise InputError(f"--fps {flags.fps} must be 1 or more")
    _check_models(flags)


def _check_models(flags: argparse.Namespace) -> None:
    """Every file that the job needs is given."""
    needed = ["--dit", "--t5"] if flags.latent_path is None else []
    needed += ["--vae"] if flags.output_type != "latent" else []
    for flag in needed:
        if getattr(flags, flag[2:]) is None:
            raise InputError(f"{flag} is missing; --output_type {flags.output_type} needs {', '.join(needed)}")


def _boundary(flags: argparse.Namespace, task: WanTask) -> float | None:
    given = flags.timestep_boundary
    boundary = task.boundary if given is None else given / 1000 if given > 1 else given
    if boundary is not None and not 0 <= boundary <= 1:
        raise InputError(f"--timestep_boundary {given} must be from 0 to 1, or to 1000")
    return boundary


def _guidance_scale_high(flags: argparse.Namespace, task: WanTask) -> float | None:
    given = flags.guidance_scale_high_noise
    if given is not None and not math.isfinite(given):
        raise InputError(f"--guidance_scale_high_noise {given} must be a finite number")
    return task.guidance_scale_high if given is None else given


def _prompts(flags: argparse.Namespace, defaults: SamplePrompt) -> tuple[SamplePrompt, ...]:
    if flags.from_file is not None:
        return tuple(read_prompt_file(flags.from_file, defaults))
    return () if flags.prompt is None else (defaults,)


def _slice_strengths(flags: argparse.Namespace) -> tuple[float, ...]:
    if flags.slice_strength and not flags.slices:
        raise InputError("--slice_strength has no effect without --slices")
    if not all(map(math.isfinite, flags.slice_strength or ())):
        raise InputError(f"--slice_strength {' '.join(map(str, flags.slice_strength))}: finite numbers are needed")
    return tuple(one_strength_each(flags.slice_strength, len(flags.slices), "--slice_strength"))


def _file(path: Path | None, flag: str) -> Path | None:
    return None if path is None else existing_file(path, flag)


def _output_folder(path: Path) -> Path:
    """`path`, if it is or can be made a folder to write to; it is made with the first file."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--save_path {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--save_path {path}: {parent} is not writable")
    return path
