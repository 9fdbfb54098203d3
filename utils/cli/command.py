"""What the command lines share: a parser whose mistakes are one line, refused flags, one way to end."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from wan.errors import InputError


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


def one_strength_each(strengths: Sequence[float] | None, slices: int, flag: str) -> list[float]:
    """One strength a slice, from none (all 1), one, or as many; InputError names the flag."""
    given = list(strengths or [1.0])
    if len(given) != 1 and len(given) != slices:
        raise InputError(f"{flag} {' '.join(map(str, given))}: give one number, or one for each of the {slices} slices")
    return given * slices if len(given) == 1 else given


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a script's main(); a user's mistake becomes one line on stderr, exit code 2.

    What is printed ends no run for its characters; where nobody reads it any more, the script ends quietly.
    """
    _print_any_character()
    try:
        main(None)
        print(end="", flush=True)  # here, where a reader that is gone can be told from a mistake
    except _users_errors() as error:
        sys.exit(_one_line(error))
    except OSError as error:
        if not (_is_unread(error) and _reader_is_gone()):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def say(line: str) -> None:
    """Prints a line at once; a job of hours goes on without a reader (Ctrl-C, which stops it, ends `| tee` at once)."""
    try:
        print(line, flush=True)
    except OSError as error:
        if not (_is_unread(error) and _reader_is_gone()):
            raise


def _print_any_character() -> None:
    """Consoles of other encodings than UTF-8 lack most characters that names have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Unread(sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)


class _Unread(io.TextIOWrapper):
    """A stream that progress bars write to: that nobody reads it any more is no reason to end."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _is_unread(error: OSError) -> bool:
    """Whether it is what writing to a pipe without a reader raises (EINVAL on Windows)."""
    return error.errno in (errno.EPIPE, errno.EINVAL)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads, as after `| head`; what is left for it then goes nowhere."""
    try:
        print(flush=True)  # a line, since an unbuffered stream has nothing left to flush
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _users_errors() -> tuple[type[Exception], ...]:
    # Looked up when something went wrong: torch takes seconds to import, and not every command needs it.
    from utils.selective_finetune import SliceError

    return InputError, SliceError


def _one_line(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
