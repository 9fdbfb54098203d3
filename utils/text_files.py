"""Text, toml and JSON files as editors and shells leave them: encodings, byte order marks, backslashes in paths."""

import json
import re
import sys
import unicodedata
from pathlib import Path

from utils.files import existing_file, quoted
from wan.errors import InputError
from wan.values import character_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_IN_JSON = 'in JSON a backslash begins an escape, so write / in paths, as in "C:/train", or two backslashes'
_ESCAPES = {"\t": r"\t", "\n": r"\n", "\b": r"\b", "\f": r"\f", "\r": r"\r", "\x1b": r"\e"}


def read_toml(path: Path) -> dict:
    """The tables of a toml file; InputError names the file and the line that cannot be read."""
    text = read_text(path, "toml file")
    try:
        return _parsed(tomllib.loads, text, f"{path} is not valid toml")
    except InputError as error:
        at = re.search(r"at line (\d+), column (\d+)", str(error))
        hint = _toml_hint(text.split("\n")[int(at[1]) - 1], int(at[2]) - 1) if at else ""
        raise InputError(f"{error}{hint}") from None


def escaped_path(text: str, in_json: bool = False) -> str | None:
    """How to write a path whose backslashes were read as escapes, in toml or JSON; None if it shows no sign of that."""
    if not set(text) & set(_ESCAPES):
        return None
    return _IN_JSON if in_json else _two_ways("".join(_ESCAPES.get(character, character) for character in text))


def read_json(path: Path, what: str) -> object:
    """The content of a JSON file; InputError names the file and what is wrong."""
    return parse_json(read_text(path, what), str(path))


def parse_json(text: str, where: str) -> object:
    """The value that a JSON text holds; InputError begins with `where`."""
    try:
        return _parsed(_json_value, text, f"{where} is not valid JSON")
    except InputError as error:
        hint = f"; {_IN_JSON}" if "escape" in str(error) else ""
        raise InputError(f"{error}{hint}") from None


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of a file, without a byte order mark; InputError names the file."""
    try:
        data = existing_file(path, what).read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = _other_encoding(data)
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 text (line {line}); {_how_to_convert(path, encoding)}") from None
    if "\0" in text:
        # Every second byte, where it is UTF-16 without a mark.
        is_wide = text.count("\0") > len(text) / 3
        remedy = _how_to_convert(path, "UTF-16") if is_wide else "it is probably damaged: save it again in your editor"
        raise InputError(f"{path} is not UTF-8 text: it holds zero bytes; {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_lines(text: str) -> list[str]:
    """The lines of a file's text, which end with \\n only: captions and prompts may hold U+2028, U+0085 and others.

    A byte order mark before a line, which joining files leaves there, is no part of it.
    """
    return [line.removeprefix("\ufeff") for line in text.split("\n")]


def _toml_hint(line: str, column: int) -> str:
    """What to do about a line that cannot be read from `column` on, as far as it shows."""
    if typed := re.search(r'"([^"]*\\[^"]*)"', line):
        return f"; {_two_ways(typed[1])}"
    rest = line[column:]
    stranger = rest[:1] if rest[:1] > "~" or (rest and rest[0] < " " and rest[0] != "\t") else ""
    if stranger:
        [name] = character_names(stranger)
        is_quote, is_dash = unicodedata.category(stranger) in ("Pi", "Pf"), unicodedata.category(stranger) == "Pd"
        instead = 'write plain quotes (")' if is_quote else "write a plain hyphen or =" if is_dash else "delete it"
        return f"; {name} stands there: {instead}"
    if re.match(r"(true|false)\b", rest, re.I):
        return "; write true or false in small letters"
    if re.match(r"[A-Za-z_/~.]", rest) and "=" in line[:column]:
        return "; text must be in quotes"
    return ""


def _two_ways(typed: str) -> str:
    path = re.sub(r"\\+", r"\\", typed)
    forward = path.replace("\\", "/")
    return f"a backslash in double quotes begins an escape, so write '{path}' in single quotes, or \"{forward}\""


def _other_encoding(data: bytes) -> str:
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data
    return "UTF-16" if is_wide else "WINDOWS-1252"


def _how_to_convert(path: Path, encoding: str) -> str:
    probably = "it is probably" if encoding == "WINDOWS-1252" else "it is"
    command = f"iconv -f {encoding} -t UTF-8 {path.name} > new"
    return f"{probably} {encoding}: save it as UTF-8 in your editor, or run: {command}"


def _json_value(text: str) -> object:
    value = json.loads(text, object_pairs_hook=_without_repeats)
    # Escapes can spell half a character, which can be neither printed nor part of a path: encoding tells.
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; of a key that is there twice, readers take either value."""
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return table


def _parsed(parse, text: str, problem: str):
    try:
        return parse(text)
    except RecursionError:
        raise InputError(f"{problem}: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(f"{problem}: it holds half a character ({half}), which cannot be part of a text") from None
    except ValueError as error:
        # Python's own words on long numbers advise to change Python.
        reason = "a number has too many digits" if "integer string conversion" in str(error) else error
        raise InputError(f"{problem}: {reason}") from None
