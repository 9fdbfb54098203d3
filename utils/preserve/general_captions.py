"""Captions of general subjects that are shipped with the program: for what a user does not have to list."""

from collections.abc import Collection
from pathlib import Path

_PROBED = Path(__file__).with_suffix(".txt")
_SAMPLES = Path(__file__).with_name("caption_samples.txt")


def general_captions(without: Collection[str] = ()) -> list[str]:
    """Those that the forgetting probe asks, but for those among `without` (what is trained or preserved already)."""
    taken = {text.strip() for text in without}
    return [line for line in _lines(_PROBED) if line not in taken]


def caption_samples() -> list[str]:
    """Those that random contexts are drawn like; the forgetting probe asks none of them."""
    return _lines(_SAMPLES)


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#")]
