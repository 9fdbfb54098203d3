"""Slices on disk: python -m utils.slices list|show|extract|apply|remove|scale|to-lora|verify ...

Each command imports what it needs: torch takes seconds to import, and `list` only reads headers.
"""

import glob
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from utils.cli.command import Parser, number, one_strength_each
from utils.files import readable
from utils.slices.listing import as_json, list_files, table
from wan.errors import InputError
from wan.values import STRENGTH


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; InputError or SliceError, in one line, if it cannot be done."""
    flags = _parser().parse_args(argv)
    flags.command(flags)


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.slices", description="Lists, extracts, applies, removes and checks slices.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="show which slices files contain, which overlap, which ids are free")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="checkpoints and slice files")
    command.add_argument("--json", action="store_true", help="print JSON, for programs (default: a table)")
    command.set_defaults(command=_list)

    command = commands.add_parser("show", help="write a page about a chain: concepts, pictures, used ids, what moved")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="checkpoints and slice files")
    command.add_argument(
        "--base",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="checkpoints without these slices, one for each base, to show where values moved (default: not shown)",
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="page, .html (required)")
    _add_overwrite(command)
    command.set_defaults(command=_show)

    command = commands.add_parser("extract", help="save the slices of a checkpoint as slice files")
    command.add_argument("checkpoint", type=Path, help="checkpoint that contains slices")
    _add_base(command)
    command.add_argument(
        "--name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of slices, or FF:FFID (default: every slice that --base does not have)",
    )
    command.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="folder (default: the current one)"
    )
    _add_overwrite(command)
    command.set_defaults(command=_extract)

    command = commands.add_parser("apply", help="save a checkpoint with slice files applied to it, in any order")
    command.add_argument("base", type=Path, help="checkpoint that the slices were trained on")
    command.add_argument("slices", type=Path, nargs="+", metavar="SLICE", help="slice files")
    command.add_argument(
        "--strength", type=number(STRENGTH), nargs="+", help="one strength for all slices, or one for each (default: 1)"
    )
    _add_output(command)
    command.set_defaults(command=_apply)

    command = commands.add_parser("remove", help="save a checkpoint without one of its slices")
    command.add_argument("checkpoint", type=Path, help="checkpoint that contains the slice")
    command.add_argument("name", metavar="SLICE-NAME", help="as shown by `list`, or FF:FFID")
    _add_base(command)
    _add_output(command)
    command.set_defaults(command=_remove)

    command = commands.add_parser("scale", help="save a slice file at another strength")
    command.add_argument("slice", type=Path, help="slice file")
    command.add_argument("strength", type=number(STRENGTH), help="0 has no effect, 1 is as trained, 1.5 is stronger")
    _add_base(command)
    _add_output(command)
    command.set_defaults(command=_scale)

    command = commands.add_parser("to-lora", help="save a slice file as an ordinary LoRA")
    command.add_argument("slice", type=Path, help="slice file")
    _add_base(command)
    _add_output(command)
    command.add_argument(
        "--names",
        choices=("comfyui", "diffusers"),
        default="comfyui",
        help="whose names the tensors get; comfyui also suits musubi-tuner (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 is exact, bf16 half the size (default: %(default)s)",
    )
    command.set_defaults(command=_to_lora)

    command = commands.add_parser("verify", help="check that a checkpoint differs from its base only in its slices")
    command.add_argument("checkpoint", type=Path, help="checkpoint to check")
    _add_base(command)
    command.set_defaults(command=_verify)
    return parser


def _add_base(command: Parser) -> None:
    command.add_argument(
        "--base", type=Path, required=True, metavar="FILE", help="the checkpoint without these slices (required)"
    )


def _add_output(command: Parser) -> None:
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="file to write, .safetensors (required)"
    )
    _add_overwrite(command)


def _add_overwrite(command: Parser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace an existing file (default: off)")


def _list(flags: Namespace) -> None:
    files = list_files([path for given in flags.files for path in _matching(given)])
    print(json.dumps(as_json(files), indent=1) if flags.json else "\n".join(table(files)))


def _matching(given: Path) -> list[Path]:
    """The files that a pattern such as saves/*.safetensors names: the shells of Windows leave that to the program."""
    if not any(mark in str(given) for mark in "*?") or given.exists():
        return [given]
    if not (found := sorted(map(Path, glob.glob(str(given))))):
        raise InputError(f"no file is called {given}")
    return found


def _show(flags: Namespace) -> None:
    from utils.slices.page import check_name, page, write_page
    from utils.slices.report import read_chains

    check_name(flags.output, flags.overwrite)
    files, chains = read_chains([path for given in flags.files for path in _matching(given)])
    changes = None
    if flags.base:
        from utils.slices.moved import changes_of

        changes = changes_of(chains, flags.base)
    write_page(flags.output, page(files, chains, changes))
    print(f"saved {flags.output} ({readable(flags.output.stat().st_size)})")


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

    to_lora(flags.slice, flags.base, flags.output, flags.names, flags.dtype, flags.overwrite, print)


def _verify(flags: Namespace) -> None:
    from utils.slices.commands import verify

    entries, findings = verify(flags.checkpoint, flags.base)
    for finding in findings:
        print(f"{finding.name} {finding.problem}")
    slices = ", ".join(entry.label for entry in entries) or "no slice"
    if findings:
        raise InputError(f"{flags.checkpoint} is not {flags.base} outside of {slices}: {len(findings)} differences")
    print(f"{flags.checkpoint} is {flags.base} with {slices}, byte for byte")
