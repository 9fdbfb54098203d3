"""Captions of general subjects that are shipped with the program: for what a user does not have to list."""

from collections.abc import Collection
from pathlib import Path

_FILE = Path(__file__).with_suffix(".txt")


def general_captions(without: Collection[str] = ()) -> list[str]:
    """The shipped captions, in their order, but for those among `without` (what is trained or preserved already)."""
    lines = _FILE.read_text(encoding="utf-8").split("\n")
    taken = {text.strip() for text in without}
    return [line for line in lines if line and not line.startswith("#") and line not in taken]
