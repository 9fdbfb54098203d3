"""The flags of block swapping and of compiling, which training and generation share."""

import re
from argparse import ArgumentTypeError, Namespace

from utils.cli.command import number
from utils.swap.host_store import MODES
from utils.swap.plan import SwapConfig
from wan.errors import InputError
from wan.values import Number, shown

_BLOCKS = Number(0, 1000, whole=True)
_RING = Number(1, 1000, whole=True)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_LARGEST = 10**15  # bytes


def add_swap_flags(parser, base_flag: str, kept: str) -> None:
    """Adds the flags, as a group of their own; `base_flag` keeps in float8 what `kept` says."""
    group = parser.add_argument_group("GPU memory")
    group.add_argument(
        "--blocks_to_swap",
        type=number(_BLOCKS),
        default=0,
        metavar="N",
        help="keep N transformer blocks in RAM and copy each to the GPU when it is needed, up to all (default: 0)",
    )
    group.add_argument(
        "--weights_vram",
        type=size,
        metavar="SIZE",
        help="instead of --blocks_to_swap: how much GPU memory the weights may take, such as 8GB (default: no limit)",
    )
    group.add_argument(
        "--block_swap_ring_size",
        type=number(_RING),
        metavar="N",
        help="GPU buffers, of one block each, that swapped blocks pass through (default: 2)",
    )
    group.add_argument(
        "--host_weights",
        choices=MODES,
        default="auto",
        help="how swapped blocks are held in RAM; auto picks what fits (default: %(default)s)",
    )
    group.add_argument(
        "--use_pinned_memory_for_block_swap",
        action="store_true",
        help="the same as --host_weights pinned (default: off)",
    )
    group.add_argument(
        "--block_swap_h2d_only",
        action="store_true",
        help="accepted for compatibility: swapped blocks are only ever copied to the GPU",
    )
    group.add_argument(
        base_flag,
        action="store_true",
        help=f"keep {kept} in float8: half the memory and half the copying, with rounding errors (default: off)",
    )
    group.add_argument(
        "--fp8_scaled",
        action="store_true",
        help=f"with {base_flag}: a scale for each row, so that small weights are rounded less (default: off)",
    )


def add_compile_flag(add) -> None:
    add(
        "--compile",
        action="store_true",
        help="compile the norms, gates and rotary embedding of the blocks first; needs Triton, or on the CPU "
        "a C++ compiler (default: off)",
    )


def size(text: str) -> int:
    """Bytes from a number with or without a unit: 2GB, 1.8G, 1500 MB, 1GiB."""
    match = re.fullmatch(r"\s*([0-9]{1,16}\.?[0-9]{0,9}|\.[0-9]{1,9})\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or (count := float(match[1]) * _UNITS[match[2]]) > _LARGEST:
        raise ArgumentTypeError(f"{shown(text)} is not a size: write 2GB, 1.8G or 1500MB")
    return int(count)


def read_swap(flags: Namespace, base_flag: str) -> SwapConfig:
    """How weights are kept; InputError where flags contradict each other or would have no effect.

    `base_flag` as in add_swap_flags.
    """
    if flags.blocks_to_swap and flags.weights_vram is not None:
        raise InputError("--blocks_to_swap and --weights_vram are two ways to set the same thing: give only one")
    if flags.block_swap_ring_size and flags.weights_vram is not None:
        raise InputError("--block_swap_ring_size has no effect with --weights_vram, which chooses it: leave it out")
    _refuse_without_effect(flags)
    if flags.use_pinned_memory_for_block_swap and flags.host_weights not in ("auto", "pinned"):
        raise InputError(f"--use_pinned_memory_for_block_swap contradicts --host_weights {flags.host_weights}")
    in_fp8 = vars(flags)[base_flag.removeprefix("--")]
    if flags.fp8_scaled and not in_fp8:
        raise InputError(f"--fp8_scaled has no effect without {base_flag}: give it as well, or leave --fp8_scaled out")
    pinned = flags.use_pinned_memory_for_block_swap
    return SwapConfig(
        blocks_to_swap=flags.blocks_to_swap,
        ring_blocks=flags.block_swap_ring_size or 2,
        weights_vram=flags.weights_vram,
        host_weights="pinned" if pinned else flags.host_weights,
        fp8="" if not in_fp8 else "scaled" if flags.fp8_scaled else "plain",
    )


def _refuse_without_effect(flags: Namespace) -> None:
    if flags.blocks_to_swap or flags.weights_vram is not None:
        return
    for flag, given in {
        "--block_swap_ring_size": flags.block_swap_ring_size,
        "--use_pinned_memory_for_block_swap": flags.use_pinned_memory_for_block_swap,
        "--block_swap_h2d_only": flags.block_swap_h2d_only,
        "--host_weights": flags.host_weights != "auto",
    }.items():
        if given:
            # --weights_vram chooses the ring's size itself.
            needed = "--blocks_to_swap" if "ring" in flag else "--blocks_to_swap or --weights_vram"
            raise InputError(f"{flag} has no effect without {needed}: give it as well, or leave {flag} out")
