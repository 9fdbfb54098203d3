"""The flags of wan_generate_video.py, checked into a GenerateConfig."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.cli.command import (
    DTYPES,
    USAGE,
    Parser,
    add_fp8_t5,
    device,
    dtype,
    number,
    one_strength_each,
    refuse_flags,
    task,
)
from utils.cli.sampling_flags import GENERATION_LORAS, add_batch_flag, add_lora_flags, read_loras
from utils.cli.swap_flags import add_compile_flag, add_swap_flags, read_swap
from utils.cli.unsupported import GENERATION
from utils.devices import default_device
from utils.files import existing_file
from utils.generation import OUTPUT_TYPES, GenerateConfig, check_vae
from utils.sampling.denoising import SOLVERS
from utils.sampling.picture_rules import pictures_taken
from utils.sampling.prompts import FRAMES, SAMPLE_STEPS, SamplePrompt, check_prompt, read_prompt_file
from utils.sampling.starts import check_clip
from wan.configs import TASKS, WanTask
from wan.errors import InputError
from wan.values import GUIDANCE, SEED, SHIFT, STRENGTH, Number, nearest, shown

_LATENT_OUTPUTS = tuple(kind for kind in OUTPUT_TYPES if kind not in ("video", "images"))
_ATTENTION = ("torch", "sdpa")
_PIXELS = Number(1, 10**6, whole=True)  # multiples of 16 or 32 up to a limit: see check_prompt
_PICTURES = ("--image_path", "--end_image_path")
_FPS = Number(1, 240, whole=True)
_TIMESTEP = Number(0, 1000)


def parse_generate(argv: Sequence[str] | None) -> GenerateConfig:
    """The job that the flags describe; InputError if it cannot be done. Nothing is written."""
    flags = _parser().parse_args(argv)
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


def _parser() -> Parser:
    parser = Parser(
        usage=USAGE, description="Generates pictures, videos and latents from prompts with a Wan checkpoint."
    )
    _add_prompts(parser)
    _add_pictures(parser)
    _add_files(parser)
    _add_sampling(parser)
    _add_output(parser)
    _add_computing(parser)
    add_swap_flags(parser, "--fp8", "the matrices of the blocks, except for --slices,")
    refuse_flags(parser, GENERATION)
    return parser


def _add_prompts(parser: Parser) -> None:
    source = parser.add_argument_group("what to generate (one of these is required)")
    add = source.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="one prompt (default: none)")
    add(
        "--from_file",
        type=Path,
        metavar="FILE",
        help="prompt file: .txt (one prompt per line), .toml or .json (default: none)",
    )
    add("--interactive", action="store_true", help="type prompts, one per line (default: off)")
    add("--latent_path", type=Path, nargs="+", metavar="FILE", help="saved latents to decode (default: none)")


def _add_pictures(parser: Parser) -> None:
    add = parser.add_argument_group("pictures to start from (in a prompt, --i and --ei)").add_argument
    add(
        "--image_path",
        type=Path,
        metavar="FILE",
        help="picture that is the first frame, for i2v-A14B, i2v-14B, flf2v-14B and, where wanted, ti2v-5B; it is "
        "scaled to cover the size, and cropped (default: none)",
    )
    add("--end_image_path", type=Path, metavar="FILE", help="picture that is flf2v-14B's last frame (default: none)")


def _add_files(parser: Parser) -> None:
    add = parser.add_argument_group("input files").add_argument
    add(
        "--task",
        type=task,
        default="t2v-14B",
        metavar="TASK",
        help=f"the kind of model, which sets the sampling defaults: {', '.join(TASKS)} (default: %(default)s)",
    )
    add("--dit", type=Path, metavar="FILE", help="Wan checkpoint; of two experts the low-noise one (default: none)")
    add(
        "--dit_high_noise",
        type=Path,
        metavar="FILE",
        help="checkpoint of the high-noise expert (default: --dit takes every step)",
    )
    add(
        "--slices",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="slice files to apply to --dit or --dit_high_noise (default: none)",
    )
    add(
        "--slice_strength",
        type=number(STRENGTH),
        nargs="+",
        metavar="STRENGTH",
        help="one strength for all slices, or one for each; 1 is as trained (default: 1)",
    )
    add_lora_flags(add, GENERATION_LORAS)
    add(
        "--vae",
        type=Path,
        metavar="FILE",
        help="Wan 2.1 VAE, for ti2v-5B the Wan 2.2 VAE; needed to encode pictures, and unless only latents are saved "
        "(default: none)",
    )
    add("--t5", type=Path, metavar="FILE", help="UMT5 text encoder, needed for prompts (default: none)")
    add_fp8_t5(add)
    add(
        "--clip",
        type=Path,
        metavar="FILE",
        help="CLIP image encoder, needed for i2v-14B and flf2v-14B (default: none)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="its tokenizer, a file or folder (default: the one beside --t5, in it, or downloaded)",
    )


def _add_sampling(parser: Parser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--negative_prompt",
        metavar="TEXT",
        help="what to steer away from (default: the checkpoint's or Wan's own, in Chinese)",
    )
    add(
        "--video_size",
        type=number(_PIXELS),
        nargs=2,
        default=(None, None),
        metavar=("HEIGHT", "WIDTH"),
        help="size in pixels, height first (default: Wan's for the shape of the picture, without one 256 256)",
    )
    add(
        "--video_length",
        type=number(FRAMES),
        metavar="N",
        help="frames: 1 for a picture, else 4k+1 (default: the task's, 81, 121 or 1)",
    )
    add(
        "--infer_steps",
        type=number(SAMPLE_STEPS),
        metavar="N",
        help="sampling steps (default: the checkpoint's or task's, 40 or 50)",
    )
    add(
        "--flow_shift",
        type=number(SHIFT),
        metavar="SHIFT",
        help="above 1 spends more steps on noisy latents (default: the checkpoint's or task's, 3 to 16)",
    )
    add(
        "--guidance_scale",
        type=number(GUIDANCE),
        metavar="SCALE",
        help="strength of the prompt; 1 is without guidance and takes half the time (default: the checkpoint's or "
        "task's, 3 to 5)",
    )
    add(
        "--guidance_scale_high_noise",
        type=number(GUIDANCE),
        metavar="SCALE",
        help="the same for --dit_high_noise (default: the checkpoint's or task's, 4 or 3.5)",
    )
    add(
        "--timestep_boundary",
        type=number(_TIMESTEP),
        metavar="T",
        help="timestep where the experts change over, from 0 to 1 or from 0 to 1000 (default: the task's, 0.875 or "
        "0.9)",
    )
    add(
        "--sample_solver",
        choices=SOLVERS,
        default="unipc",
        help="the sampler; vanilla is Euler's method (default: %(default)s)",
    )
    add_batch_flag(add)
    add("--seed", type=number(SEED), metavar="N", help="seed of the noise (default: random, and printed)")
    add("--cpu_noise", action="store_true", help="accepted for compatibility: noise is always drawn on the CPU")


def _add_output(parser: Parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--save_path", type=Path, required=True, metavar="FOLDER", help="folder to save to (required)")
    add(
        "--output_type",
        choices=OUTPUT_TYPES,
        default="video",
        help="what to save; both is latent and video (default: %(default)s)",
    )
    add("--fps", type=number(_FPS), metavar="N", help="frames per second of a video (default: the task's, 16 or 24)")
    add(
        "--no_metadata",
        action="store_true",
        help="leave prompt and settings out of pictures, videos and latent files (default: off)",
    )


def _add_computing(parser: Parser) -> None:
    add = parser.add_argument_group("computing").add_argument
    add(
        "--device",
        type=device,
        metavar="DEVICE",
        help="cuda, cuda:1 or cpu (default: cuda if there is a GPU, else cpu)",
    )
    add(
        "--dit_dtype",
        type=dtype,
        metavar="DTYPE",
        help=f"precision of the model: {', '.join(DTYPES)} (default: that of the file, bfloat16 for fp8)",
    )
    add(
        "--vae_dtype",
        type=dtype,
        default=torch.bfloat16,
        metavar="DTYPE",
        help="precision of the VAE, one of the same names (default: bfloat16)",
    )
    add(
        "--attn_mode", type=_attention, default="torch", metavar="NAME", help="torch or sdpa, the same (default: torch)"
    )
    add_compile_flag(add)
    for flag, what in (
        ("--offload_inactive_dit", "only one expert is in memory at a time"),
        ("--lazy_loading", "each expert is loaded when its steps begin"),
        ("--force_v2_1_time_embedding", "the time embedding always has one timestep per sample"),
    ):
        add(flag, action="store_true", help=f"accepted for compatibility: {what}")


def _attention(text: str) -> str:
    if text not in _ATTENTION:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not supported: the only attention is PyTorch's, which picks the fastest kernel; use "
            f"{' or '.join(_ATTENTION)}{nearest(text, _ATTENTION)}"
        )
    return text


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
