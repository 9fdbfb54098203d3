"""The flags of the two caching scripts."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.caching import CacheLatentsConfig, CacheTextConfig
from utils.cli.command import DTYPES, USAGE, Parser, add_fp8_t5, device, dtype, number, refuse_flags
from utils.cli.unsupported import CACHING_LATENTS
from utils.data.config import read_dataset_config
from utils.devices import default_device
from utils.files import existing_file
from wan.configs import NO_CONDITIONS, WAN_2_1_VAE, Conditions, LatentLayout
from wan.errors import InputError
from wan.vae import WAN_2_1, VAEKind, read_vae_kind
from wan.values import Number

_BATCH = Number(1, 10_000, whole=True)
_THREADS = Number(1, 1000, whole=True)


def parse_cache_latents(argv: Sequence[str] | None = None) -> CacheLatentsConfig:
    """The latent caching job that the flags ask for; InputError names the flag that is wrong."""
    parser = Parser(
        usage=USAGE, description="Encodes the pictures and videos of a dataset with the Wan VAE and caches the latents."
    )
    group = parser.add_argument_group("input files")
    _add_dataset(group)
    group.add_argument(
        "--vae",
        type=Path,
        required=True,
        metavar="FILE",
        help="Wan 2.1 VAE, or for ti2v-5B the Wan 2.2 VAE, .safetensors or .pth (required)",
    )
    _add_pictures(parser)
    group = _add_computing(parser, "pictures and videos")
    group.add_argument(
        "--vae_dtype",
        type=dtype,
        default=torch.bfloat16,
        metavar="DTYPE",
        help=f"precision of the VAE and of the cached latents: {', '.join(DTYPES)} (default: bfloat16)",
    )
    group.add_argument("--disable_cudnn_backend", action="store_true", help="run the VAE without cuDNN (default: off)")
    _add_cache(parser)
    refuse_flags(parser, CACHING_LATENTS)
    args = parser.parse_args(argv)
    kind = read_vae_kind(existing_file(args.vae, "--vae"))
    conditions = _conditions(args, kind)
    return CacheLatentsConfig(
        vae=args.vae,
        clip=args.clip,
        vae_dtype=args.vae_dtype,
        disable_cudnn=args.disable_cudnn_backend,
        **_shared(args, kind.layout, conditions),
    )


def parse_cache_text(argv: Sequence[str] | None = None) -> CacheTextConfig:
    """The text caching job that the flags ask for; InputError names the flag that is wrong."""
    parser = Parser(
        usage=USAGE, description="Encodes the captions of a dataset with Wan's text encoder and caches the embeddings."
    )
    group = parser.add_argument_group("input files")
    _add_dataset(group)
    group.add_argument(
        "--t5", type=Path, required=True, metavar="FILE", help="UMT5-XXL text encoder, .pth or .safetensors (required)"
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="its tokenizer, a file or folder (default: the one beside --t5, in it, or downloaded)",
    )
    computing = _add_computing(parser, "captions")
    add_fp8_t5(computing.add_argument)
    _add_cache(parser)
    args = parser.parse_args(argv)
    if args.tokenizer is not None and not args.tokenizer.exists():
        raise InputError(f"--tokenizer {args.tokenizer} does not exist")
    t5 = existing_file(args.t5, "--t5")
    return CacheTextConfig(t5=t5, tokenizer=args.tokenizer, fp8_t5=args.fp8_t5, **_shared(args))


def _add_pictures(parser: Parser) -> None:
    group = parser.add_argument_group("image-to-video models")
    group.add_argument(
        "--i2v", action="store_true", help="cache each clip's first frame too, for i2v-14B and i2v-A14B (default: off)"
    )
    group.add_argument(
        "--clip",
        type=Path,
        metavar="FILE",
        help="CLIP image encoder of Wan 2.1, which i2v-14B and flf2v-14B need, .pth or .safetensors; implies --i2v",
    )
    group.add_argument(
        "--flf2v",
        action="store_true",
        help="cache each clip's first and last frame, for flf2v-14B; needs --clip (default: off)",
    )


def _conditions(args: argparse.Namespace, kind: VAEKind) -> Conditions:
    """What is cached beside latents; InputError if the flags and the VAE are not those of one model."""
    given = [flag for flag in ("--i2v", "--clip", "--flf2v") if getattr(args, flag.removeprefix("--"))]
    if given and kind is not WAN_2_1:
        raise InputError(
            f"{given[0]} is for models with the {WAN_2_1.name}, and --vae {args.vae} is the {kind.name} ({kind.tasks})"
            ", whose latents hold the first frame: leave it out"
        )
    if args.flf2v and args.clip is None:
        raise InputError("--flf2v needs --clip FILE, because flf2v-14B reads CLIP tokens of both frames")
    if args.clip is not None:
        existing_file(args.clip, "--clip")
    return Conditions(2 if args.flf2v else 1 if given else 0, args.clip is not None)


def _add_dataset(group) -> None:
    group.add_argument(
        "--dataset_config", type=Path, required=True, metavar="FILE", help="dataset file, .toml or .json (required)"
    )


def _add_computing(parser: Parser, what: str):
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help="cuda, cuda:1 or cpu (default: cuda if there is a GPU, else cpu)",
    )
    group.add_argument(
        "--batch_size",
        type=number(_BATCH),
        metavar="N",
        help=f"{what} encoded at once (default: the dataset's batch_size)",
    )
    group.add_argument(
        "--num_workers", type=number(_THREADS), metavar="N", help=f"threads that read {what} (default: cores - 1)"
    )
    return group


def _add_cache(parser: Parser) -> None:
    group = parser.add_argument_group("cache files")
    group.add_argument(
        "--recache",
        action="store_true",
        help="make every cache file again (default: only those whose picture, video, caption, encoder or settings "
        "have changed)",
    )
    group.add_argument("--skip_existing", action="store_true", help="the default; taken from musubi-tuner's commands")
    group.add_argument(
        "--keep_cache",
        action="store_true",
        help="do not delete cache files whose picture, video or caption is no longer in the dataset (default: off)",
    )


def _shared(
    args: argparse.Namespace, latents: LatentLayout = WAN_2_1_VAE, conditions: Conditions = NO_CONDITIONS
) -> dict:
    if args.recache and args.skip_existing:
        raise InputError("--recache makes every cache again and --skip_existing none that is current: give one of them")
    return {
        "dataset": read_dataset_config(args.dataset_config, latents, conditions),
        "device": args.device or default_device(),
        "batch_size": args.batch_size,
        "workers": args.num_workers or max(1, (os.cpu_count() or 1) - 1),
        "recache": args.recache,
        "keep_cache": args.keep_cache,
    }
