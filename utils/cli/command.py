"""What the command lines share: a parser whose errors are one line, unsupported flags, one way to exit."""

import argparse
import errno
import io
import logging
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from wan.configs import TASKS
from wan.errors import InputError
from wan.values import Number, hidden, hidden_problem, nearest, outer_space_problem, quotes_problem, shown

DTYPES = {  # of --vae_dtype and --dit_dtype, by torch's names
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16"), "float16"),
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
}


_LONG_DASH = re.compile(r"-?([\u2010-\u2015\u2212])[-\u2010-\u2015\u2212]?([A-Za-z]\w*)(=.*)?", re.DOTALL)
# What continues a line in a shell: elsewhere it arrives as an argument.
_CONTINUES = {"\\": "shells of Linux and macOS", "^": "cmd", "`": "PowerShell"}

FREE_TEXT = "TEXT"  # the metavar of flags that take any characters
USAGE = "%(prog)s [options]"  # of a script whose flags follow in groups


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError with one line, where argparse prints its usage and exits.

    The line names the nearest flag or choice that exists. `usage` is one line too: the flags follow in groups.
    """

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **settings})
        self._optionals.title = "help"
        self._given: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self._given = list(sys.argv[1:] if args is None else args)
        for text in self._given:
            self._refuse_long_dash(text)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """The flags; InputError for any that does not exist."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown_flag(unknown))
        return flags

    def unknown_flag(self, unknown: Sequence[str]) -> str:
        """The message for arguments that no flag takes: about the first flag among them, else about the first."""
        flag = next((text for text in unknown if text.startswith("-")), None)
        if flag is None:
            if not unknown[0].strip(" "):
                return f"{unknown[0]!r} was not expected; a backslash that continues a line must be its last character"
            if unknown[0] in _CONTINUES:
                others = ", ".join(f"{sign} in {shell}" for sign, shell in _CONTINUES.items())
                return f"{unknown[0]} does not continue a line here ({others}): write the command in one line"
            return f"{shown(unknown[0])} was not expected: no flag takes it"
        flag = flag.partition("=")[0]
        if others := self._commands_with(flag):
            return f"{flag} is a flag of {' and '.join(others)}, not of this command"
        return f"unknown flag {shown(flag)}{nearest(flag, self.known_flags())}"

    def known_flags(self, with_unsupported: bool = False) -> list[str]:
        """Every flag, those of subcommands included."""
        flags = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser.known_flags(with_unsupported)]
            elif with_unsupported or action.help is not argparse.SUPPRESS:
                flags += action.option_strings
        return flags

    def _commands_with(self, flag: str) -> list[str]:
        """The subcommands that have this flag."""
        subcommands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        named = [pair for action in subcommands for pair in action.choices.items()]
        return [name for name, parser in named if flag in parser.known_flags()]

    def takes_path(self, flag: str) -> bool:
        """Whether the values of a flag are paths."""
        return any(flag in action.option_strings and _is_path(action) for action in self._actions)

    def _refuse_long_dash(self, text: str) -> None:
        """What editors and chats make of two hyphens would be taken for the value of the flag before it."""
        found = _LONG_DASH.fullmatch(text)
        name = f"--{found[2]}" if found else ""
        if name in self.known_flags(with_unsupported=True) or (name and nearest(name, self.known_flags())):
            raise InputError(f"{text} begins with {unicodedata.name(found[1])}, where two hyphens belong: {name}")

    def _get_value(self, action: argparse.Action, text: str):
        problem = _path_problem(text) if _is_path(action) else hidden_problem(text)
        if problem and action.metavar != FREE_TEXT:
            raise argparse.ArgumentError(action, problem)
        return super()._get_value(action, text)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, unknown_choice(str(value), allowed))

    def error(self, message: str):
        lines = [hidden(text) for text in self._given if _is_in(text, message)]
        found = "".join(f"; {line}" for line in lines if line and line.partition(" holds ")[2] not in message)
        if not message.startswith("argument "):
            raise InputError(f"{message}{found} (--help lists the flags)")
        raise InputError(message.removeprefix("argument ").replace(": must be", " must be", 1) + found)


def _is_in(text: str, message: str) -> bool:
    """Whether a message is about an argument, or about the flag or the value in it."""
    return any(part and shown(part) in message for part in (text, *text.split("=", 1)))


def _is_path(action: argparse.Action) -> bool:
    return action.type is Path or "FILE" in (action.metavar or "")


def _path_problem(text: str) -> str | None:
    """What is wrong with a path as it was typed; None if nothing is, or if there is a file of that very name."""
    if not text.strip():
        return "is empty: give a path, or leave the flag out"
    if os.path.lexists(text):
        return None
    return hidden_problem(text) or outer_space_problem(text) or quotes_problem(text)


class _Help(argparse.HelpFormatter):
    """Flags in a column of their own, each text beside or below, as wide as the console up to 120."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=min(shutil.get_terminal_size().columns, 120))


def unknown_choice(name: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not among those allowed; begins with the name."""
    allowed = list(allowed)
    return f"{shown(name)} is not one of {', '.join(allowed)}{nearest(name, allowed)}"


def number(allowed: Number) -> Callable[[str], int | float]:
    """An argparse type that takes numbers of the range."""

    def convert(text: str) -> int | float:
        try:
            return allowed(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def dtype(text: str):
    """An argparse type: a torch.dtype by one of the names in DTYPES."""
    import torch  # here, because `python -m utils.slices list` needs none of it

    if text.lower() not in DTYPES:
        raise argparse.ArgumentTypeError(unknown_choice(text, DTYPES))
    return getattr(torch, DTYPES[text.lower()])


def device(text: str):
    """An argparse type: the torch.device of that name, if it exists."""
    from utils.devices import named_device  # here, because it imports torch, and `python -m utils.slices list` does not

    try:
        return named_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def task(text: str) -> str:
    """An argparse type: the name of a task."""
    if text not in TASKS:
        raise argparse.ArgumentTypeError(unknown_choice(text, list(TASKS)))
    return text


class _Refuse(argparse.Action):
    def __init__(self, option_strings, dest, reason: str, **settings):
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} is not supported: {self.reason}")


def refuse_flags(parser: argparse.ArgumentParser, reasons: Mapping[str, str]) -> None:
    """Adds flags that users know from musubi-tuner but that are not supported: each stops the run and says why."""
    for flag, reason in reasons.items():
        parser.add_argument(flag, action=_Refuse, reason=reason)


def add_fp8_t5(add: Callable) -> None:
    """Adds --fp8_t5, of every script that encodes prompts, to a group of flags."""
    add(
        "--fp8_t5",
        action="store_true",
        help="keep the text encoder in float8: 7 GB of memory rather than 11, with rounding errors (default: off)",
    )


def one_strength_each(strengths: Sequence[float] | None, count: int, flag: str, what: str = "slices") -> list[float]:
    """One strength for each slice, from none (all 1), one for all, or as many; InputError names the flag."""
    given = list(strengths or [1.0])
    if len(given) != 1 and len(given) != count:
        raise InputError(f"{flag} {' '.join(map(str, given))}: give one number, or one for each of the {count} {what}")
    return given * count if len(given) == 1 else given


INTERRUPTED = 130  # exit code of a run that Ctrl-C or another signal stopped


def run(main: Callable[[Sequence[str] | None], None], needs_console: bool = True) -> None:
    """Runs a script's main(); a user's mistake becomes one line on stderr, exit code 2.

    A script that `needs_console` ends quietly once nobody reads what it prints; another one continues without it.
    No script ends for the characters that it prints.
    """
    _prepare_console(needs_console)
    # diffusers imports bitsandbytes, which complains about a 4-bit kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        main(None)
        print(end="", flush=True)  # here, where a reader that is gone can be told from a mistake
    except _users_errors() as error:
        sys.exit(_one_line(error))
    except OSError as error:
        if not _stdout_fails():
            raise
        if error.errno not in _NO_READER:
            _one_line(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def say(line: str) -> None:
    """Prints a line at once, or not at all: a job of hours does not end because nobody can read it any more."""
    with suppress(OSError, ValueError):  # ValueError: stdout was closed
        print(line, flush=True)


def _prepare_console(needs_console: bool) -> None:
    """Lets print write any character, to consoles that lack most of those in names, or that are gone."""
    for number in range(3):  # a file that is opened later must not take the number of a closed console
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _never_failing(sys.stderr)
    if not needs_console:
        sys.stdout = _never_failing(sys.stdout)


class _NeverFails(io.TextIOWrapper):
    """A stream to a console, which a run outlives: the console may close, or the disk of a redirect fill up."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            super().flush()


def _never_failing(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    through = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return _NeverFails(stream.buffer, stream.encoding, stream.errors, **through)


_NO_READER = (errno.EPIPE, errno.EINVAL)  # what writing to a pipe raises after `| head`; the second on Windows


def _stdout_fails() -> bool:
    """Whether nothing can be printed, as after `| head` or on a full disk; what is left to print then goes nowhere."""
    try:
        print(flush=True)  # a line, since an unbuffered stream has nothing left to flush
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _users_errors() -> tuple[type[Exception], ...]:
    # Only if it is loaded: its module imports torch, and an error of `list` should not wait for that.
    patch = sys.modules.get("utils.selective_finetune")
    return (InputError, patch.SliceError) if patch else (InputError,)


def _one_line(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
