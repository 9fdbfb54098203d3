"""The flags of wan_generate_video.py."""

import argparse
from pathlib import Path

import torch

from utils.cli.command import DTYPES, USAGE, Parser, add_fp8_t5, device, dtype, number, refuse_flags, task
from utils.cli.sampling_flags import GENERATION_LORAS, add_batch_flag, add_lora_flags
from utils.cli.swap_flags import add_compile_flag, add_swap_flags
from utils.cli.unsupported import GENERATION
from utils.generating.config import OUTPUT_TYPES
from utils.sampling.denoising import SOLVERS
from utils.sampling.prompts import FRAMES, SAMPLE_STEPS
from wan.configs import TASKS
from wan.values import GUIDANCE, SEED, SHIFT, STRENGTH, Number, nearest, shown

_ATTENTION = ("torch", "sdpa")
_PIXELS = Number(1, 10**6, whole=True)  # multiples of 16 or 32 up to a limit: see check_prompt
_FPS = Number(1, 240, whole=True)
_TIMESTEP = Number(0, 1000)


def generation_parser() -> Parser:
    """All flags of the script."""
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
