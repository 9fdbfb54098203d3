"""The ledger in a file's metadata: which slices it holds.

Imports no torch, so that a command can list a folder of files at once.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cached_property

from wan.errors import InputError

KEY = "wan_slices"
ANSWERS_KEY = "wan_answers"  # of files that hold reference predictions, and no slice
VALUES_KEY = "wan_difference_sha256"  # the digest of what a run trained into the file
_DESCRIPTIONS = ("ss_", "modelspec.", VALUES_KEY)  # how names of metadata begin that say how a file was made
CONTRACT = 1
_STRONGEST = 1e6
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_NAMED = 5  # slices in one message
# What a share and a name may be is also in the patch, which other trainers have without this file.
_SHARE = re.compile(r"\+?([0-9]+/[0-9]+|([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)")
_LONGEST_SHARE = 40  # characters
_LONGEST_NAME = 255  # characters
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_MOST_CAPTIONS = 100
_LONGEST_CAPTION = 10_000  # characters


@dataclass(frozen=True)
class Entry:
    """One slice in a file: contract version, share, number; how it got there; what it was trained on.

    `base` is the base's identity, `start` the digest of the base's values at the slice's positions: None in files of
    the first version. `strength` is the factor on what was learned that the values in the file have; `rescaled` means
    that they were rounded at another one before, so they are only near it. `captions` are a few of those that it was
    trained on.
    """

    contract: int
    ff: str
    ffid: int
    name: str
    steps: int
    date: str = ""
    base: str | None = None
    start: str | None = None
    strength: float = 1.0
    rescaled: bool = False
    captions: tuple[str, ...] = ()

    @cached_property
    def interval(self) -> tuple[Fraction, Fraction]:
        """Where the slice lies on every matrix's line, from 0 to 1."""
        ff = fraction_of(self.ff)
        return (self.ffid - 1) * ff, self.ffid * ff

    @property
    def age(self) -> tuple:
        """The key that sorts entries, oldest first."""
        return self.date, self.interval, self.name

    @property
    def label(self) -> str:
        """The slice in words."""
        strength = "" if self.strength == 1 and not self.rescaled else f", strength {self.strength_text}"
        return f"{self.name or 'unnamed'} (ff {self.ff} ffid {self.ffid}{strength})"

    @property
    def strength_text(self) -> str:
        """The strength, marked where the values are only near it."""
        return f"{self.strength:g}{' rescaled' if self.rescaled else ''}"

    def overlaps(self, other: "Entry") -> bool:
        """Whether the two may share a value; they may if one follows another contract, which is not known here."""
        if self.contract != other.contract:
            return True
        (a, b), (c, d) = self.interval, other.interval
        return max(a, c) < min(b, d)

    def is_slice_of(self, other: "Entry") -> bool:
        """Whether the two are the same slice, whatever was trained in it."""
        return (self.contract, self.interval) == (other.contract, other.interval)


def own_entry(ff: str, ffid: int, name: str) -> Entry:
    """The slice that a run trains, before its first step."""
    return Entry(CONTRACT, ff, ffid, name, 0)


def read_ledger(metadata: Mapping[str, str], source: object) -> list[Entry]:
    """The entries of a file's metadata, oldest first, none where there is no ledger; InputError names the `source`."""
    try:
        listed = json.loads(metadata.get(KEY, "[]"))
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        raise InputError(f"{source}: its ledger ({KEY} in the metadata) cannot be read; the file is damaged")
    return [_entry(fields, source) for fields in listed]


def ledger_text(entries: Sequence[Entry]) -> str:
    """The metadata's text for these entries, without the captions that read_ledger would refuse."""
    return json.dumps([_fields(entry) for entry in entries])


def description(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a file's metadata only says how it was made, and so may go with a slice to other files.

    The rest says what the model is (num_heads, text_len), which a slice does not change.
    """
    return {key: text for key, text in metadata.items() if key.startswith(_DESCRIPTIONS)}


def at_strength(entry: Entry, strength: float) -> Entry:
    """The entry with `strength` times what it has; InputError beyond a million."""
    product = strength * entry.strength
    if not abs(product) <= _STRONGEST:
        raise InputError(f"{entry.label} at {strength:g} times that: the largest strength is {_STRONGEST:,.0f}")
    return replace(entry, strength=product, rescaled=entry.rescaled or (entry.strength != 1 and strength not in (0, 1)))


def is_concept_name(text: str) -> bool:
    """Whether a concept may have this name: at most 255 characters, none of them a control character."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs"))
    return len(text) <= _LONGEST_NAME and all(character in _JOINERS for character in refused)


def is_caption(text: str) -> bool:
    """Whether a ledger may hold this caption: at most 10,000 characters, no control characters but whitespace."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cs"))
    return len(text) <= _LONGEST_CAPTION and all(character in "\t\n\r" for character in refused)


def recorded_captions(captions: Sequence[str]) -> list[str]:
    """Those of the captions that a ledger records: the first hundred, of those that read_ledger would not refuse."""
    return [caption for caption in captions if is_caption(caption)][:_MOST_CAPTIONS]


def list_of(texts: Sequence[str], separator: str = ", ") -> str:
    """The texts as one, of which a message names the first few."""
    more = [f"{len(texts) - _MOST_NAMED:,} more"] if len(texts) > _MOST_NAMED else []
    return separator.join([*texts[:_MOST_NAMED], *more])


def fraction_of(ff: str) -> Fraction:
    """The exact share of a ledger's entry."""
    return Fraction(ff) if "/" in ff else Fraction(Decimal(ff))


def _entry(fields: object, source: object) -> Entry:
    if not isinstance(fields, dict):
        raise InputError(f"{source}: its ledger has an entry that is not a slice; the file is damaged")
    found = {key: fields.get(key) for key in _IS_VALID}
    wrong = [key for key, is_valid in _IS_VALID.items() if not is_valid(found[key])]
    if not wrong and not _is_slice(found["ff"], found["ffid"]):
        wrong = ["ff", "ffid"]
    if wrong:
        text = ", ".join(f"{key} {_shown(found[key])}" for key in wrong)
        raise InputError(f"{source}: its ledger has an entry that cannot be right ({text}); the file is damaged")
    captions = tuple(found.pop("captions") or ())
    return Entry(**{key: value for key, value in found.items() if value is not None}, captions=captions)


def _shown(value: object) -> str:
    return ascii(value)[:40] if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _is_name(value: object) -> bool:
    return isinstance(value, str) and is_concept_name(value)


def _is_date(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 40 and value.isprintable())


def _is_hash(value: object) -> bool:
    return value is None or (isinstance(value, str) and _HASH.fullmatch(value) is not None)


def _is_strength(value: object) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= _STRONGEST)


def _are_captions(value: object) -> bool:
    if value is None:
        return True
    few = isinstance(value, list) and len(value) <= _MOST_CAPTIONS
    return few and all(isinstance(caption, str) and is_caption(caption) for caption in value)


_IS_VALID = {
    "contract": _is_count,
    "ff": lambda value: isinstance(value, str),
    "ffid": lambda value: type(value) is int,
    "name": _is_name,
    "steps": _is_count,
    "date": _is_date,
    "base": _is_hash,
    "start": _is_hash,
    "strength": _is_strength,
    "rescaled": lambda value: value is None or isinstance(value, bool),
    "captions": _are_captions,
}


def _is_slice(ff: str, ffid: int) -> bool:
    if len(ff) > _LONGEST_SHARE or not _SHARE.fullmatch(ff):
        return False
    try:
        exact = Fraction(ff) if "/" in ff else Decimal(ff)
        if not 0 < exact <= 1 or (isinstance(exact, Decimal) and exact.adjusted() < -30):
            return False
    except (InvalidOperation, ValueError, ZeroDivisionError):
        return False
    return type(ffid) is int and 1 <= ffid <= int(1 / Fraction(exact))


def _fields(entry: Entry) -> dict:
    captions = recorded_captions(entry.captions)
    fields = asdict(entry) | {"captions": captions}
    if entry.strength == 1:
        del fields["strength"]
    if not entry.rescaled:
        del fields["rescaled"]
    if not captions:
        del fields["captions"]
    return {key: value for key, value in fields.items() if value is not None}
