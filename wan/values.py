"""What users and files give, checked in one place: numbers in their range, names beside the nearest that exists."""

import ast
import difflib
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN = 40  # characters of a value in a message
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_IN_NAMES = ("U+00A0 NO-BREAK SPACE", "U+202F NARROW NO-BREAK SPACE", "U+3000 IDEOGRAPHIC SPACE")  # macOS writes them
_QUOTES = "\"'\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
_CONTROLS = {"\t": "TAB", "\n": "LINE FEED", "\r": "CARRIAGE RETURN (of Windows line ends)", "\0": "NUL"}


@dataclass(frozen=True)
class Number:
    """A range of numbers, a and b included; called with text or a number it returns the int or float, else ValueError.

    The message says what is allowed and what came. nan and inf are in no range.
    """

    a: float
    b: float
    whole: bool = False
    without_a: bool = False  # a itself is not allowed
    words: str = ""  # for the message, in place of the range

    def __call__(self, value: object) -> int | float:
        number = self._convert(value)
        if number is None or not self.a <= number <= self.b or (self.without_a and number == self.a):
            raise ValueError(f"must be {self.allowed}, not {shown(value)}{_strangers(value)}")
        return number

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.words:
            return self.words
        kind = "a whole number" if self.whole else "a number"
        low = f"above {_digits(self.a)} and up" if self.without_a else f"from {_digits(self.a)}"
        return f"{kind} {low} to {_digits(self.b)}"

    def _convert(self, value: object) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        if self.whole and isinstance(value, float):
            return None
        try:
            number = (int if self.whole else float)(value)
        except (ValueError, OverflowError):  # no number, or one with thousands of digits
            return None
        return number if isinstance(number, int) or math.isfinite(number) else None


def _strangers(value: object) -> str:
    """The names of the characters that no number has, though they may look like those that one has."""
    names = character_names(one for one in str(value) if ord(one) > 127) if isinstance(value, str) else ()
    return f", which holds {', '.join(names)}" if names else ""


def _digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


SEED = Number(0, 2**64 - 1, whole=True, words="a whole number from 0 to 18446744073709551615")  # a torch.Generator's
COUNT = Number(1, 10**9, whole=True)
STEPS = Number(1, 10**7, whole=True)  # a run's steps or epochs
COUNT_OR_NONE = Number(0, 10**9, whole=True)
SHARE = Number(0, 1)
SHIFT = Number(0, 10**4, without_a=True)  # of noise levels
GUIDANCE = Number(-1000, 1000)
STRENGTH = Number(-1000, 1000)  # of a slice


def shown(value: object) -> str:
    """A value in a message: short and harmless, whatever a user gave."""
    try:
        text = str(value)
    except ValueError:  # an int of thousands of digits
        return "a number of thousands of digits"
    if not text:
        return "an empty text"
    if not text.isprintable():  # it may steer a terminal, or hold half a character
        text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def invisible(text: str) -> list[str]:
    """The names of the characters in `text` that no editor or console shows: "U+200B ZERO WIDTH SPACE"."""
    hidden = [one for one in text if one != " " and unicodedata.category(one) in _INVISIBLE and one not in _JOINERS]
    return character_names(hidden)


def character_names(characters: Iterable[str]) -> list[str]:
    """Each character once, with its number and name: "U+201C LEFT DOUBLE QUOTATION MARK"."""
    names = {one: unicodedata.name(one, _CONTROLS.get(one, "CONTROL")) for one in characters}
    return [f"U+{ord(one):04X} {name}" for one, name in names.items()]


def hidden(text: str) -> str:
    """Which characters of a name or number cannot be seen; empty if all can, or if real names have them."""
    names = [name for name in invisible(text) if name not in _IN_NAMES or text != text.strip()]
    return f"{shown(text)} holds {', '.join(names)}" if names else ""


def hidden_problem(text: str) -> str | None:
    """What to do about characters that cannot be seen; None if there are none."""
    return f"{found}: delete what cannot be seen" if (found := hidden(text)) else None


def outer_space_problem(text: str) -> str | None:
    """What to do about a path that begins or ends with a space; None if it does not."""
    if text == text.strip(" "):
        return None
    where = "begins" if text.startswith(" ") else "ends"
    return f'"{shown(text)}" {where} with a space: delete it'


def quotes_problem(text: str) -> str | None:
    """What to do about a name in quotes that the shell did not take away; None if it is in none."""
    if len(text) < 2 or text[0] not in _QUOTES or text[-1] not in _QUOTES:
        return None
    return f"{shown(text)} has quotes that are part of the name: use plain double quotes"


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the known name that is most like `name`; empty where none is."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[found[0]]}?)" if found else ""


def literal(text: str) -> object:
    """The Python literal that `text` is, every number in it finite; ValueError says what is wrong with it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError(
            "write key=value, where value is a number, True, False, None, 'text' or several in parentheses, such as "
            "betas=(0.9,0.99); separate pairs with a space, without commas, and leave no space within one"
        ) from None
    if not _is_finite(value):
        raise ValueError("its numbers must be finite")
    return value


def _is_finite(value: object) -> bool:
    if isinstance(value, list | tuple | set):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, [*value, *value.values()]))
    if isinstance(value, complex):
        return False
    return not isinstance(value, int | float) or abs(value) <= 1e300
