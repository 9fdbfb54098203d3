"""The ledger in a file's metadata: which slices it holds, where they overlap, which ids are free.

Imports no torch, so that a command can list a folder of files at once.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from wan.errors import InputError

KEY = "wan_slices"
ANSWERS_KEY = "wan_answers"  # of files that hold kept answers, and no slice
CONTRACT = 1
_STRONGEST = 1e6
_HASH = re.compile(r"[0-9a-f]{64}")
# What a share, a name may be stands in selective_finetune.py too, which a foreign trainer has alone.
_SHARE = re.compile(r"\+?([0-9]+/[0-9]+|([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)")
_LONGEST_SHARE = 40  # characters
_LONGEST_NAME = 255  # characters
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_MOST_CAPTIONS = 100
_LONGEST_CAPTION = 10_000  # characters


@dataclass(frozen=True)
class Entry:
    """One slice in a file: contract version, share, number; how it came there; what it was trained on.

    `base` is the base's identity, `start` the digest of the base's values at the slice's positions: None in files of
    the first version. `strength` is the factor on what was learned that the values in the file have; `rescaled` says
    that they were rounded at another one before, so are near it only. `captions` are a few of those that it was trained
    on.
    """

    contract: int
    ff: str
    ffid: int
    name: str
    steps: int
    date: str
    base: str | None = None
    start: str | None = None
    strength: float = 1.0
    rescaled: bool = False
    captions: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[Fraction, Fraction]:
        """Where the slice lies on every matrix's line, from 0 to 1."""
        ff = _fraction(self.ff)
        return (self.ffid - 1) * ff, self.ffid * ff

    @property
    def age(self) -> tuple:
        """What entries are sorted by, oldest first."""
        return self.date, self.interval, self.name

    @property
    def label(self) -> str:
        """The slice in words."""
        told = "" if self.strength == 1 and not self.rescaled else f", strength {self.strength_text}"
        return f"{self.name or 'unnamed'} (ff {self.ff} ffid {self.ffid}{told})"

    @property
    def strength_text(self) -> str:
        """The strength, marked where the values are near it only."""
        return f"{self.strength:g}{' rescaled' if self.rescaled else ''}"

    def overlaps(self, other: "Entry") -> bool:
        """Whether the two may share a value; of another contract's slice nothing is known, so it may."""
        if self.contract != other.contract:
            return True
        (a, b), (c, d) = self.interval, other.interval
        return max(a, c) < min(b, d)

    def is_slice_of(self, other: "Entry") -> bool:
        """Whether the two are the same slice, whatever was trained in it."""
        return (self.contract, self.interval) == (other.contract, other.interval)


def own_entry(ff: str, ffid: int, name: str) -> Entry:
    """The slice that a run trains, before its first step."""
    return Entry(CONTRACT, ff, ffid, name, 0, "")


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


def at_strength(entry: Entry, strength: float) -> Entry:
    """The entry with `strength` times what it has; InputError beyond a million."""
    product = strength * entry.strength
    if not abs(product) <= _STRONGEST:
        raise InputError(f"{entry.label} at {strength:g} times that: allowed is a strength up to {_STRONGEST:,.0f}")
    return replace(entry, strength=product, rescaled=entry.rescaled or (entry.strength != 1 and strength not in (0, 1)))


def extended(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The ledger with `entry` as its newest; a slice that was trained further keeps its first start, adds up steps."""
    earlier = [other for other in entries if other.is_slice_of(entry)]
    if earlier:
        entry = replace(entry, steps=entry.steps + sum(e.steps for e in earlier), start=earlier[0].start)
    return [*(other for other in entries if other not in earlier), entry]


def is_concept_name(text: str) -> bool:
    """Whether a ledger may name a concept so: 255 characters at the most, none that steers a terminal."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs"))
    return len(text) <= _LONGEST_NAME and all(character in _JOINERS for character in refused)


def is_caption(text: str) -> bool:
    """Whether a ledger may tell a caption so: 10,000 characters at the most, none but whitespace is a control."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cs"))
    return len(text) <= _LONGEST_CAPTION and all(character in "\t\n\r" for character in refused)


def free_ids(entries: Sequence[Entry], ff: str) -> tuple[int, int, int | None]:
    """How many ids of `ff` no entry touches, of how many, and the first of them.

    Counted over intervals, since there may be more ids than memory has room for.
    """
    share = _fraction(ff)
    last = int(1 / share)
    used = sorted(
        (math.floor(low / share) + 1, min(math.ceil(high / share), last)) for low, high in (e.interval for e in entries)
    )
    taken, end, first_free = 0, 0, 1
    for first, final in used:
        taken += max(final - max(first, end + 1) + 1, 0)
        end = max(end, final)
        if first <= first_free <= final:
            first_free = final + 1
    return last - taken, last, first_free if first_free <= last else None


def ids_line(entries: Sequence[Entry], ff: str) -> str:
    """How many ids are free at this ff, and which one to take."""
    free, last, first = free_ids(entries, ff)
    following = f", the next is --ffid {first}" if first else ""
    return f"{free:,} of {last:,} ids at ff {ff} are free{following}"


def refuse_overlap(entries: Sequence[Entry], entry: Entry, source: object, advice: str) -> None:
    """InputError with what overlaps, by how much, and the next free id, if `entry` lies over one of `entries`."""
    if met := meetings(entries, entry):
        raise InputError(f"{source} already holds {met}. {ids_line(entries, entry.ff)}. {advice}")


def meetings(entries: Sequence[Entry], entry: Entry) -> str:
    """What of `entries` overlaps `entry`, by how much, in words; empty if nothing does."""
    return "; ".join(_meeting(other, entry) for other in entries if other.overlaps(entry))


def _meeting(other: Entry, entry: Entry) -> str:
    if other.contract != entry.contract:
        return f"{other.label}, of contract {other.contract}, whose values are not known"
    (a, b), (c, d) = other.interval, entry.interval
    share = float((min(b, d) - max(a, c)) / (d - c))
    return f"{other.label}, which has {100 * share:.3g} % of the values of ff {entry.ff} ffid {entry.ffid}"


def _fraction(ff: str) -> Fraction:
    return Fraction(ff) if "/" in ff else Fraction(Decimal(ff))


def _entry(fields: object, source: object) -> Entry:
    match fields:
        case {"contract": int(contract), "ff": str(ff), "ffid": int(ffid), "name": str(name), "steps": int(steps)}:
            date, base, start, strength = (fields.get(key) for key in ("date", "base", "start", "strength"))
            rescaled, captions = fields.get("rescaled", False), fields.get("captions", [])
        case _:
            raise InputError(f"{source}: its ledger has an entry that is no slice; the file is damaged")
    possible = {
        "ff or ffid": _is_slice(ff, ffid),
        "name": is_concept_name(name),
        "steps": 0 <= steps < 10**12,
        "date": isinstance(date, str | None) and len(date or "") <= 40 and (date or "").isprintable(),
        "base": _is_hash(base),
        "start": _is_hash(start),
        "strength": type(strength) in (int, float, type(None)) and abs(strength or 0) <= _STRONGEST,
        "rescaled": isinstance(rescaled, bool),
        "captions": isinstance(captions, list)
        and len(captions) <= _MOST_CAPTIONS
        and all(isinstance(caption, str) and is_caption(caption) for caption in captions),
    }
    if wrong := [what for what, is_possible in possible.items() if not is_possible]:
        raise InputError(
            f"{source}: its ledger names a slice that cannot be (ff {ff[:40]!a} ffid {str(ffid)[:20]}) by its "
            f"{', '.join(wrong)}; the file is damaged"
        )
    strength = 1.0 if strength is None else strength
    return Entry(contract, ff, ffid, name, steps, date or "", base, start, strength, rescaled, tuple(captions))


def _is_hash(value: object) -> bool:
    return value is None or (isinstance(value, str) and _HASH.fullmatch(value) is not None)


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
    captions = [caption for caption in entry.captions if is_caption(caption)][:_MOST_CAPTIONS]
    fields = asdict(entry) | {"captions": captions}
    if entry.strength == 1:
        del fields["strength"]
    if not entry.rescaled:
        del fields["rescaled"]
    if not captions:
        del fields["captions"]
    return {key: value for key, value in fields.items() if value is not None}
