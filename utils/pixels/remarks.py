"""What readers of pictures and videos remark about a file, counted and put into lines for the user."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

TRANSPARENT = "transparent"
SEVERAL_FRAMES = "several frames"
BROKEN_PROFILE = "broken profile"
NO_FIXED_RANGE = "no fixed range"
HDR = "hdr"
VARIABLE_RATE = "variable rate"

_NAMED = 3


def remark_lines(files: Mapping[str, Sequence[Path]], what: str, background: tuple[int, int, int]) -> list[str]:
    """One line for each remark, with the number of files that it is about and the names of some.

    `what` is "pictures" or "videos".
    """
    texts = {
        TRANSPARENT: f"transparent {what}, drawn on {colour_name(background)} (background in the dataset file)",
        SEVERAL_FRAMES: f"{what} with several frames or pages, of which the first is used",
        BROKEN_PROFILE: f"{what} whose colour profile cannot be used, read as sRGB",
        NO_FIXED_RANGE: f"{what} with numbers of no fixed range: white is the next of 1, 255 and 65535, or the largest",
        HDR: f"HDR {what}, tone-mapped to sRGB",
        VARIABLE_RATE: f"{what} with a variable frame rate: their frames are chosen by their times",
    }
    return [f"{texts[remark]}: {count_and_names(files[remark])}" for remark in texts if files.get(remark)]


def count_and_names(paths: Iterable[Path]) -> str:
    """How many files, with the names of the first few: "5, such as a.png, b.png, c.png"."""
    names = [path.name for path in paths]
    such_as = ", such as " if len(names) > _NAMED else ", "
    return f"{len(names)}{such_as}{', '.join(names[:_NAMED])}"


def colour_name(colour: tuple[int, int, int]) -> str:
    """A colour as the dataset file may spell it."""
    return {(255, 255, 255): "white", (0, 0, 0): "black"}.get(colour) or "#{:02x}{:02x}{:02x}".format(*colour)
