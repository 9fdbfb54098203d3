"""The figures of the report on slices, as inline SVG: which ids are used, and where in the model values moved.

Colours come from the page's style sheet, so that they suit a dark page as well as a light one.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING

from utils.slices.ledger import Entry, fraction_of

if TYPE_CHECKING:
    from utils.slices.moved import MatrixChange

_MOST_CELLS = 1000  # of the line of ids: with more ids each cell stands for several
_PER_ROW = 50
_CELL, _GAP = 12, 2  # in the SVG's own units
_LABEL = 110  # beside the rows of a heat map


def hue(number: int) -> int:
    """The hue of concept `number`, from 0 on: neighbours are far apart on the wheel."""
    return round(number * 137.5 + 210) % 360


def ids_figure(entries: Sequence[Entry], ff: str) -> str:
    """The ids of `ff` as cells, coloured by the concept that has values there."""
    last = int(1 / fraction_of(ff))
    cells = min(last, _MOST_CELLS)
    owners: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        for cell in _cells_of(entry, fraction_of(ff) * last, cells):
            owners.setdefault(cell, []).append(number)
    columns, step = min(cells, _PER_ROW), _CELL + _GAP
    body = [
        _cell(cell, columns, step, _ids_text(cell, cells, last), owners.get(cell, []), entries) for cell in range(cells)
    ]
    size = (columns * step, -(-cells // columns) * step)
    return _svg(size, f"Ids of ff {ff}, from 1 to {last:,}", body, limit=columns * 18)


def _cells_of(entry: Entry, end: Fraction, cells: int) -> range:
    """The cells, which divide the line from 0 to `end`, that an entry lies in."""
    low, high = entry.interval
    return range(min(math.floor(low / end * cells), cells), min(math.ceil(high / end * cells), cells))


def _ids_text(cell: int, cells: int, last: int) -> str:
    first, final = cell * last // cells + 1, (cell + 1) * last // cells
    return f"ffid {first:,}" if first == final else f"ffid {first:,} to {final:,}"


def _cell(cell: int, columns: int, step: int, ids: str, owners: Sequence[int], entries: Sequence[Entry]) -> str:
    row, column = divmod(cell, columns)
    x, y = column * step, row * step
    names = escape(", ".join(entries[number].label for number in owners)) or "free"
    width = round(_CELL / max(len(owners), 1), 2)  # ids of another ff may lie in two of this one
    parts = [
        f'<rect x="{x + place * width:g}" y="{y}" width="{width:g}" height="{_CELL}" class="used" '
        f'style="--hue:{hue(number)}"/>'
        for place, number in enumerate(owners)
    ]
    field = f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" class="free"/>'
    return f"<g><title>{ids}: {names}</title>{''.join(parts) or field}</g>"


def heat_map(changes: Sequence["MatrixChange"], largest: float, number: int) -> str:
    """A column for each block, a row for each kind of matrix; the stronger the colour, the larger the change."""
    kinds = list(dict.fromkeys(change.kind for change in changes))
    blocks = max(change.block for change in changes) + 1
    body = list(_heat_labels(kinds, blocks))
    for change in changes:
        x, y = _LABEL + change.block * _CELL, kinds.index(change.kind) * _CELL
        strength = math.sqrt(change.ratio / largest) if largest else 0  # small changes stay visible
        told = f"block {change.block} {escape(change.kind)}: {_share(change.ratio)} of the start values' norm"
        moved = f"{change.moved:,} of {change.values:,} values moved"
        body.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" class="heat" '
            f'style="--hue:{hue(number)};fill-opacity:{strength:.3f}"><title>{told}; {moved}</title></rect>'
        )
    size = (_LABEL + blocks * _CELL, len(kinds) * _CELL + 14)
    return _svg(size, "Change by block and kind of matrix", body, limit=size[0] * 3 // 2, least=min(size[0], 420))


def _heat_labels(kinds: Sequence[str], blocks: int) -> Iterator[str]:
    width, height = blocks * _CELL - 1, len(kinds) * _CELL - 1
    yield f'<rect x="{_LABEL}" y="0" width="{width}" height="{height}" class="field"/>'
    for row, kind in enumerate(kinds):
        yield f'<text x="{_LABEL - 4}" y="{row * _CELL + 9}" text-anchor="end">{escape(kind)}</text>'
    for block in range(0, blocks, 5 if blocks > 10 else 1):
        x = _LABEL + block * _CELL + _CELL / 2
        yield f'<text x="{x}" y="{height + 12}" text-anchor="middle">{block}</text>'


def _share(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def _svg(size: tuple[int, int], title: str, body: Sequence[str], limit: int, least: int = 0) -> str:
    """`limit` and `least`: pixels between which its width follows the window's."""
    shape = f'viewBox="0 0 {size[0]} {size[1]}" style="max-width:{limit}px;min-width:{least}px"'
    start = f'<svg {shape} role="img" aria-label="{escape(title)}">'
    return "\n".join([start, *body, "</svg>"])
