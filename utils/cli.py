"""What the command lines share: a parser whose mistakes are one line, refused flags, paths and toml files."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils.selective_finetune import SliceError
from wan.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError with one line, where argparse prints its usage and exits."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


class _Refuse(argparse.Action):
    def __init__(self, option_strings, dest, reason: str, **settings):
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} is not supported: {self.reason}")


def refuse_flags(parser: argparse.ArgumentParser, reasons: Mapping[str, str]) -> None:
    """Adds flags that users know from musubi-tuner, each of which ends the run with its reason and what to use."""
    for flag, reason in reasons.items():
        parser.add_argument(flag, action=_Refuse, reason=reason)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a script's main(); a user's mistake becomes one line on stderr, exit code 2."""
    try:
        main(None)
    except (InputError, SliceError) as error:
        sys.exit(_one_line(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _one_line(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def read_toml(path: Path) -> dict:
    """The tables of a toml file; InputError names the file and the line that cannot be read."""
    existing_file(path, "toml file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid toml: {error}") from None


def existing_file(path: Path, what: str) -> Path:
    """`path`, if it is a file; InputError names it and says `what` it should have been."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{what} {path} {found}")
    return path


def writable_folder(path: Path, flag: str) -> Path:
    """`path` as a folder that files can be written to, made if missing; InputError names the flag that gave it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{flag} {path} is not writable")
    return path
