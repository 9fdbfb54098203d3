"""How stored pixels are turned to stand upright, as EXIF and a video's display matrix say it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Turn:
    """First rows and columns are exchanged (`swaps`), then the columns reversed, then the rows."""

    swaps: bool = False
    reverses_columns: bool = False
    reverses_rows: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of what is stored as `width` x `height`."""
        return (height, width) if self.swaps else (width, height)

    def apply(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """A view of the pixels, upright."""
        upright = pixels_HWC.swapaxes(0, 1) if self.swaps else pixels_HWC
        upright = upright[:, ::-1] if self.reverses_columns else upright
        return upright[::-1] if self.reverses_rows else upright


UPRIGHT = Turn()
# EXIF 2.32, tag 274: where the stored first row and first column are to be shown.
_EXIF = {
    1: UPRIGHT,
    2: Turn(reverses_columns=True),
    3: Turn(reverses_columns=True, reverses_rows=True),
    4: Turn(reverses_rows=True),
    5: Turn(swaps=True),
    6: Turn(swaps=True, reverses_columns=True),
    7: Turn(swaps=True, reverses_columns=True, reverses_rows=True),
    8: Turn(swaps=True, reverses_rows=True),
}


def exif_turn(orientation: object) -> Turn:
    """The turn that an EXIF orientation asks for; as viewers do, none for a value that does not exist."""
    return _EXIF.get(orientation, UPRIGHT) if isinstance(orientation, int) else UPRIGHT


def matrix_turn(matrix: tuple[int, ...]) -> Turn:
    """The turn of a display matrix (a b u, c d v, x y w): a stored (x, y) is shown at (a x + c y, b x + d y).

    Other angles are taken as the nearest quarter turn.
    """
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(False, a < 0, d < 0)
    return Turn(True, c < 0, b < 0)
