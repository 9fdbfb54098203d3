"""The flags that generation shares with the samples of a run: LoRAs beside the model, samples drawn together."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.cli.command import number, one_strength_each
from utils.files import existing_file
from wan.errors import InputError
from wan.values import COUNT, STRENGTH

_NAMES = "musubi-tuner, ComfyUI, diffusers, PEFT or Kohya"
GENERATION_LORAS = {
    "lora_weight": ("lora_multiplier", "to compute beside --dit"),
    "lora_weight_high_noise": ("lora_multiplier_high_noise", "to compute beside --dit_high_noise"),
}
SAMPLE_LORAS = {
    "sample_lora": ("sample_lora_multiplier", "that the model computes with while samples are drawn, and only then"),
    "sample_lora_high_noise": ("sample_lora_multiplier_high_noise", "of the same use for --dit_high_noise"),
}


def add_lora_flags(add: Callable[..., object], flags: dict[str, tuple[str, str]]) -> None:
    """Adds the flags of LoRA files and of their multipliers."""
    for files, (multipliers, what) in flags.items():
        add(
            f"--{files}",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help=f"LoRA files {what}; with the names of {_NAMES} (default: none)",
        )
        add(
            f"--{multipliers}",
            type=number(STRENGTH),
            nargs="+",
            metavar="NUMBER",
            help=f"one multiplier for all LoRAs of --{files}, or one for each (default: 1)",
        )


def read_loras(flags: Namespace, files: str) -> tuple[tuple[Path, ...], tuple[float, ...]]:
    """The LoRA files of the flag `files` and a multiplier for each; InputError if they do not go together."""
    (multipliers, _), given = (GENERATION_LORAS | SAMPLE_LORAS)[files], getattr(flags, files)
    numbers: Sequence[float] | None = getattr(flags, multipliers)
    if numbers and not given:
        raise InputError(f"--{multipliers} has no effect without --{files}")
    paths = tuple(existing_file(path, f"--{files}") for path in given)
    return paths, tuple(one_strength_each(numbers, len(paths), f"--{multipliers}", "LoRAs"))


def add_batch_flag(add: Callable[..., object], more: str = "") -> None:
    """Adds the flag for how many samples are drawn together."""
    add(
        "--sample_batch",
        type=number(COUNT),
        metavar="N",
        help="most latents of one size in a pass through the model, where a sample with guidance counts as two"
        f"{more}; with swapped blocks, larger batches copy less and take more memory (default: by size, 4 of 512x512)",
    )
