"""Slices on disk: python -m utils.cli.slices list|extract|apply|remove|scale|to-lora|verify ...

Each command imports what it needs: torch takes seconds to import, and `list` reads headers alone.
"""

import json
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from utils.cli.command import Parser, one_strength_each
from utils.slices.listing import as_json, list_files, table
from wan.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; InputError or SliceError, in one line, if it cannot be done."""
    flags = _parser().parse_args(argv)
    flags.command(flags)


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.cli.slices", description="Lists, extracts, applies, removes slices of files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="what files hold: their ledger, overlaps, free ids")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(command=_list)

    command = commands.add_parser("extract", help="slice files from a checkpoint")
    command.add_argument("checkpoint", type=Path)
    _add_base(command)
    command.add_argument("--name", nargs="+", default=[], help="only these slices (names, or FF:FFID)")
    command.add_argument("-o", "--output", type=Path, default=Path(), help="folder (default: this one)")
    _add_overwrite(command)
    command.set_defaults(command=_extract)

    command = commands.add_parser("apply", help="a checkpoint from a base and slice files, in any order")
    command.add_argument("base", type=Path)
    command.add_argument("slices", type=Path, nargs="+", metavar="SLICE")
    command.add_argument(
        "--strength", type=_strength, nargs="+", help="one for all slices, or one for each (default 1)"
    )
    _add_output(command)
    command.set_defaults(command=_apply)

    command = commands.add_parser("remove", help="a checkpoint without one of its slices")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("name", metavar="SLICE-NAME", help="as `list` shows it, or FF:FFID")
    _add_base(command)
    _add_output(command)
    command.set_defaults(command=_remove)

    command = commands.add_parser("scale", help="a slice file of another strength")
    command.add_argument("slice", type=Path)
    command.add_argument("strength", type=_strength, help="0 is nothing, 1 as trained, beyond that more")
    _add_base(command)
    _add_output(command)
    command.set_defaults(command=_scale)

    command = commands.add_parser("to-lora", help="a slice file as an ordinary LoRA")
    command.add_argument("slice", type=Path)
    _add_base(command)
    _add_output(command)
    command.add_argument(
        "--names", choices=("comfyui", "diffusers"), default="comfyui", help="default: comfyui, musubi"
    )
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="fp32 is exact, bf16 half the size")
    command.set_defaults(command=_to_lora)

    command = commands.add_parser("verify", help="that a checkpoint is its base outside of its slices")
    command.add_argument("checkpoint", type=Path)
    _add_base(command)
    command.set_defaults(command=_verify)
    return parser


def _add_base(command: Parser) -> None:
    command.add_argument("--base", type=Path, required=True, help="the checkpoint without slices")


def _add_output(command: Parser) -> None:
    command.add_argument("-o", "--output", type=Path, required=True, help="new .safetensors file")
    _add_overwrite(command)


def _add_overwrite(command: Parser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} was given, a finite number is needed")
    return value


def _list(flags: Namespace) -> None:
    files = list_files(flags.files)
    print(json.dumps(as_json(files), indent=1) if flags.json else "\n".join(table(files)))


def _extract(flags: Namespace) -> None:
    from utils.slices.commands import extract

    for path in extract(flags.checkpoint, flags.base, flags.name, flags.output, flags.overwrite):
        print(f"saved {path}")


def _apply(flags: Namespace) -> None:
    from utils.slices.commands import apply

    strengths = one_strength_each(flags.strength, len(flags.slices), "--strength")
    entries = apply(flags.base, flags.slices, strengths, flags.output, flags.overwrite, print)
    print(f"saved {flags.output} with {', '.join(entry.label for entry in entries)}")


def _remove(flags: Namespace) -> None:
    from utils.slices.commands import remove

    entry = remove(flags.checkpoint, flags.name, flags.base, flags.output, flags.overwrite)
    print(f"saved {flags.output} without {entry.label}")


def _scale(flags: Namespace) -> None:
    from utils.slices.commands import scale

    entry = scale(flags.slice, flags.base, flags.strength, flags.output, flags.overwrite, print)
    print(f"saved {flags.output}: {entry.label}")


def _to_lora(flags: Namespace) -> None:
    from utils.slices.commands import to_lora

    to_lora(flags.slice, flags.base, flags.output, flags.names, flags.dtype, print, flags.overwrite)


def _verify(flags: Namespace) -> None:
    from utils.slices.commands import verify

    entries, findings = verify(flags.checkpoint, flags.base)
    for finding in findings:
        print(f"{finding.name} {finding.problem}")
    slices = ", ".join(entry.label for entry in entries) or "no slice"
    if findings:
        raise InputError(f"{flags.checkpoint} is not {flags.base} outside of {slices}: {len(findings)} differences")
    print(f"{flags.checkpoint} is {flags.base} with {slices}, byte for byte")
