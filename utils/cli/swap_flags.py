"""The flags of block swapping, which training and generation share."""

import re
from argparse import ArgumentTypeError, Namespace

from utils.swap.host_store import MODES
from utils.swap.plan import SwapConfig
from wan.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def add_swap_flags(group) -> None:
    """Adds the flags to an argument group."""
    group.add_argument("--blocks_to_swap", type=int, default=0, help="blocks that stream from host memory, up to all")
    group.add_argument("--weights_vram", type=size, help="or: bytes that weights may take on the device (2GB, 1.8G)")
    group.add_argument("--block_swap_ring_size", type=int, help="blocks on the device that others pass through (2)")
    group.add_argument("--host_weights", choices=MODES, default="auto", help="how streamed weights wait on the host")
    group.add_argument(
        "--use_pinned_memory_for_block_swap", action="store_true", help="the same as --host_weights pinned"
    )
    group.add_argument("--block_swap_h2d_only", action="store_true", help="copy to the device only: always so")


def size(text: str) -> int:
    """Bytes from a number with or without a unit: 2GB, 1.8G, 1500 MB, 1GiB."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ArgumentTypeError(f"{text} is no size: write 2GB, 1.8G or 1500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def read_swap(flags: Namespace) -> SwapConfig:
    """How blocks are swapped; InputError where flags contradict each other or would have no effect."""
    if flags.blocks_to_swap < 0:
        raise InputError(f"--blocks_to_swap {flags.blocks_to_swap} must be 0 or more")
    if flags.blocks_to_swap and flags.weights_vram is not None:
        raise InputError("--blocks_to_swap and --weights_vram say the same in two ways: give one of them")
    if flags.block_swap_ring_size is not None and flags.block_swap_ring_size < 1:
        raise InputError(f"--block_swap_ring_size {flags.block_swap_ring_size} must be 1 or more")
    if flags.block_swap_ring_size and flags.weights_vram is not None:
        raise InputError("--block_swap_ring_size has no effect with --weights_vram, which decides it: leave it out")
    _refuse_without_effect(flags)
    if flags.use_pinned_memory_for_block_swap and flags.host_weights not in ("auto", "pinned"):
        raise InputError(f"--use_pinned_memory_for_block_swap contradicts --host_weights {flags.host_weights}")
    pinned = flags.use_pinned_memory_for_block_swap
    return SwapConfig(
        blocks_to_swap=flags.blocks_to_swap,
        ring_blocks=flags.block_swap_ring_size or 2,
        weights_vram=flags.weights_vram,
        host_weights="pinned" if pinned else flags.host_weights,
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
            raise InputError(
                f"{flag} has no effect without --blocks_to_swap or --weights_vram: give one, or leave it out"
            )
