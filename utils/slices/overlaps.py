"""Where slices lie on every matrix's line, from 0 to 1: which of them overlap, which ids are free.

Imports no torch. Ledgers may have thousands of entries, so nothing here compares each with every other.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import takewhile

from utils.slices.ledger import Entry, fraction_of, list_of
from wan.errors import InputError


def free_ids(entries: Sequence[Entry], ff: str) -> tuple[int, int, int | None]:
    """How many ids of `ff` no entry touches, of how many, and the first of them.

    Counted over intervals, since there may be more ids than memory has room for.
    """
    share = fraction_of(ff)
    last = int(1 / share)
    taken, end, first_free = 0, 0, 1
    for low, high in covered(entries):
        first, final = math.floor(low / share) + 1, min(math.ceil(high / share), last)
        taken += max(final - max(first, end + 1) + 1, 0)
        end = max(end, final)
        if first <= first_free <= final:
            first_free = final + 1
    return last - taken, last, first_free if first_free <= last else None


def covered(entries: Iterable[Entry]) -> list[tuple[Fraction, Fraction]]:
    """Where the entries lie together, as intervals that neither overlap nor touch, in order."""
    joined: list[tuple[Fraction, Fraction]] = []
    for low, high in sorted(entry.interval for entry in entries):
        if joined and low <= joined[-1][1]:
            low, high = joined[-1][0], max(high, joined.pop()[1])
        joined.append((low, high))
    return joined


def holds(joined: Sequence[tuple[Fraction, Fraction]], place: int, numel: int) -> bool:
    """Whether the value at `place` on a line of `numel` lies in one of these intervals, as covered() gives them."""
    # A slice from `low` to `high` holds the places from floor(low * numel) up to floor(high * numel).
    mark = Fraction(place + 1, numel)
    number = bisect_left(joined, mark, key=lambda interval: interval[1])
    return number < len(joined) and joined[number][0] < mark


def overlapping(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Every two entries that may share values: as few comparisons as there are such pairs, and entries."""
    contracts = dict.fromkeys(entry.contract for entry in entries)
    for number, contract in enumerate(contracts):
        own = sorted((e for e in entries if e.contract == contract), key=lambda entry: entry.interval)
        for place, entry in enumerate(own):
            following = (own[later] for later in range(place + 1, len(own)))
            yield from ((entry, other) for other in takewhile(entry.overlaps, following))
        for later in list(contracts)[number + 1 :]:
            yield from ((entry, other) for entry in own for other in entries if other.contract == later)


def over_earlier(entries: Iterable[Entry]) -> list[bool]:
    """For each entry of one contract, whether it shares values with one before it."""
    joined: list[tuple[Fraction, Fraction]] = []
    found = []
    for low, high in (entry.interval for entry in entries):
        begin = bisect_right(joined, low, key=lambda interval: interval[1])
        end = bisect_left(joined, high, key=lambda interval: interval[0])
        found.append(begin < end)
        if begin < end:
            low, high = min(low, joined[begin][0]), max(high, joined[end - 1][1])
        joined[begin:end] = [(low, high)]
    return found


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
    return list_of([_meeting(other, entry) for other in entries if other.overlaps(entry)], "; ")


def _meeting(other: Entry, entry: Entry) -> str:
    if other.contract != entry.contract:
        return f"{other.label}, of contract {other.contract}, whose values are not known"
    (a, b), (c, d) = other.interval, entry.interval
    share = float((min(b, d) - max(a, c)) / (d - c))
    return f"{other.label}, which has {100 * share:.3g} % of the values of ff {entry.ff} ffid {entry.ffid}"
