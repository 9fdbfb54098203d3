"""The command lines of the two caching scripts."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.caching import CacheLatentsConfig, CacheTextConfig
from utils.cli.command import Parser, refuse_flags
from utils.data.config import read_dataset_config
from utils.files import existing_file
from wan.errors import InputError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}
_IMAGE_TO_VIDEO = "this trains text-to-video, which needs the latents alone; leave it out"
_DEBUG = "cached latents are not shown; open the pictures themselves"
_REFUSED_LATENTS = {
    "--i2v": _IMAGE_TO_VIDEO,
    "--clip": _IMAGE_TO_VIDEO,
    "--one_frame": "one-frame training is for image-to-video models; use a picture dataset",
    "--vae_cache_cpu": "diffusers' VAE keeps its frame cache on its device; use a smaller --batch_size or --device cpu",
    "--vae_tiling": "tiled latents differ from whole ones; use a smaller --batch_size or --device cpu",
    "--vae_chunk_size": "it is for HunyuanVideo's VAE; Wan's works in chunks of 4 frames always",
    "--vae_spatial_tile_sample_min_size": "it is for HunyuanVideo's VAE; use a smaller --batch_size or --device cpu",
    "--debug_mode": _DEBUG,
    "--console_width": _DEBUG,
    "--console_back": _DEBUG,
    "--console_num_images": _DEBUG,
}
_REFUSED_TEXT = {
    "--fp8_t5": "the encoder runs in bfloat16; to save memory use --device cpu, or an fp8 file as --t5",
}


def parse_cache_latents(argv: Sequence[str] | None = None) -> CacheLatentsConfig:
    """The latent caching job that the flags ask for; InputError names the flag that is wrong."""
    parser = _parser("Encodes a dataset's pictures and videos with the Wan VAE.", "pictures read ahead")
    parser.add_argument("--vae", type=Path, required=True, help="Wan 2.1 VAE, .safetensors or .pth")
    parser.add_argument("--vae_dtype", default="bfloat16", help="what the VAE computes and the cache is stored in")
    parser.add_argument("--disable_cudnn_backend", action="store_true", help="run the VAE without cuDNN")
    refuse_flags(parser, _REFUSED_LATENTS)
    args = parser.parse_args(argv)
    if args.vae_dtype not in _DTYPES:
        raise InputError(f"--vae_dtype {args.vae_dtype} is not known; allowed: {', '.join(_DTYPES)}")
    return CacheLatentsConfig(
        vae=existing_file(args.vae, "--vae"),
        vae_dtype=_DTYPES[args.vae_dtype],
        disable_cudnn=args.disable_cudnn_backend,
        **_shared(args),
    )


def parse_cache_text(argv: Sequence[str] | None = None) -> CacheTextConfig:
    """The text caching job that the flags ask for; InputError names the flag that is wrong."""
    parser = _parser("Encodes a dataset's captions with Wan's text encoder.", "captions read at a time")
    parser.add_argument("--t5", type=Path, required=True, help="UMT5-XXL encoder, .pth or .safetensors")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer, a file or a folder, where --t5 has none with it")
    refuse_flags(parser, _REFUSED_TEXT)
    args = parser.parse_args(argv)
    if args.tokenizer is not None and not args.tokenizer.exists():
        raise InputError(f"--tokenizer {args.tokenizer} does not exist")
    return CacheTextConfig(t5=existing_file(args.t5, "--t5"), tokenizer=args.tokenizer, **_shared(args))


def _parser(description: str, workers_help: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument("--dataset_config", type=Path, required=True, help="dataset file, .toml or .json")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    parser.add_argument("--batch_size", type=int, help="encoded at once (default: each dataset's batch_size)")
    parser.add_argument("--num_workers", type=int, help=f"threads, {workers_help} (default: cores - 1)")
    parser.add_argument("--skip_existing", action="store_true", help="keep cache files that are current")
    parser.add_argument("--keep_cache", action="store_true", help="do not delete cache files of other sources")
    return parser


def _shared(args: argparse.Namespace) -> dict:
    for flag, value in (("--batch_size", args.batch_size), ("--num_workers", args.num_workers)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be 1 or more, not {value}")
    return {
        "dataset": read_dataset_config(args.dataset_config),
        "device": _device(args.device),
        "batch_size": args.batch_size,
        "workers": args.num_workers or max(1, (os.cpu_count() or 1) - 1),
        "skip_existing": args.skip_existing,
        "keep_cache": args.keep_cache,
    }


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    known = kind == "cpu" or (
        kind == "cuda" and (number or "0").isdigit() and int(number or 0) < torch.cuda.device_count()
    )
    if not known:
        raise InputError(f"--device {name} is not here; allowed: cpu and {torch.cuda.device_count()} cuda devices")
    return name
