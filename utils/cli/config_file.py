"""A --config_file: flags of a script in a toml file, as musubi-tuner takes it."""

from argparse import Namespace
from pathlib import Path

from utils.cli.command import Parser
from utils.text_files import escaped_path, read_toml
from wan.errors import InputError
from wan.values import nearest, shown

_OFF = {"guard": "0", "preserve_random": "0"}  # what false means for flags that work by default and take a number


def flags_of_file(parser: Parser, path: Path) -> Namespace:
    """The flags of a --config_file; InputError names the file and the key that is wrong."""
    # Without the suffix too, as musubi-tuner takes it.
    path = path if path.suffix else path.with_suffix(".toml")
    settings = _flat(read_toml(path))
    for key in settings:
        if f"--{key}" not in parser.known_flags(with_unsupported=True) or key == "config_file":
            known = [flag[2:] for flag in parser.known_flags()]
            raise InputError(f"{path}: unknown key {shown(key)}{nearest(key, known)} (--help lists them)")
        _check_backslashes(parser, key, settings[key], path)
    try:
        return parser.parse_args(_as_arguments(settings))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _check_backslashes(parser: Parser, key: str, value: object, path: Path) -> None:
    if parser.takes_path(f"--{key}"):
        for text in value if isinstance(value, list) else [value]:
            if hint := escaped_path(str(text)):
                raise InputError(f"{path}: {key} is {shown(text)}: {hint}")


def _flat(tables: dict) -> dict:
    """The file's keys with their values, whatever table they are in.

    Empty texts are left out: graphical programs write them for what is not set.
    """
    settings = {}
    for key, value in tables.items():
        value = [one for one in value if not _is_blank(one)] if isinstance(value, list) else value
        settings |= _flat(value) if isinstance(value, dict) else {} if _is_blank(value) else {key: value}
    return settings


def _is_blank(value: object) -> bool:
    return value == [] or (isinstance(value, str) and not value.strip())


def _as_arguments(settings: dict) -> list[str]:
    arguments = []
    for key, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(_text, value)]
        elif value is True:
            arguments.append(f"--{key}")
        elif value is False and key in _OFF:
            arguments.append(f"--{key}={_OFF[key]}")
        elif value is not False:
            arguments.append(f"--{key}={_text(value)}")
    return arguments


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # an int of thousands of digits; what replaces it is refused wherever a number is needed
        return shown(value)
