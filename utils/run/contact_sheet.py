"""One picture of all samples of a run: a row for each prompt, a column for each turn.

The file holds all that the next turn needs: its cells as pixels, its labels as JSON. So a resumed run continues it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from utils.run.samples import SavedSample
from utils.run.sheet_labels import SIZE, label
from utils.sampling.denoising import Sample
from utils.sampling.sample_metadata import picture_names
from utils.sampling.writers import to_frames
from utils.slice_saving import whole_file

CONTACT_SHEET = "_contact_sheet.png"  # the end of its file's name
COLUMNS, ROWS = 64, 64  # at most
_NEWEST = 16  # columns that are never thinned
_KEY = "wan_contact_sheet"  # of the PNG's text chunk
_FORMAT = 1
_GAP, _LABEL, _TOP = 4, 128, 18  # pixels: between cells, beside each row, above each column
_READABLE_ROWS = 16  # with more of them, cells are half as large


@dataclass(frozen=True)
class Column:
    """The samples of one turn; cells by their row's key."""

    step: int
    cells: Mapping[str, Image.Image]


@dataclass(frozen=True)
class ContactSheet:
    """The turns of the run that `run` identifies, oldest first; rows are {key: label}."""

    run: str
    rows: Mapping[str, str]
    columns: Sequence[Column] = field(default=())

    @property
    def side(self) -> int:
        """Pixels of a cell, which is square."""
        return 128 if len(self.rows) <= _READABLE_ROWS else 64

    def with_turn(self, step: int, samples: Sequence[SavedSample]) -> "ContactSheet":
        """The sheet with a column for this turn in place of all later ones, which a resumed run draws again."""
        cells = {_row_key(saved.sample): _cell(saved, self.side) for saved in samples}
        kept = [column for column in self.columns if column.step < step]
        return ContactSheet(self.run, self.rows, thinned([*kept, Column(step, cells)]))

    def draw(self) -> Image.Image:
        """The whole picture."""
        side = self.side
        size = (_left(side, len(self.columns)), _top(side, len(self.rows)))
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        for number, prompt in enumerate(self.rows.values()):
            lines, font = label(prompt, _LABEL - _GAP, side)
            pen.multiline_text((_GAP, _top(side, number)), lines, "black", font)
        for number, column in enumerate(self.columns):
            pen.text((_left(side, number), _GAP), f"{column.step:,}", "black", ImageFont.load_default(SIZE))
            for row, key in enumerate(self.rows):
                if key in column.cells:
                    picture.paste(column.cells[key], (_left(side, number), _top(side, row)))
        return picture

    def save(self, path: Path) -> Image.Image:
        """Writes the sheet as PNG; returns the picture."""
        picture, chunks = self.draw(), PngImagePlugin.PngInfo()
        columns = [{"step": column.step, "cells": sorted(column.cells)} for column in self.columns]
        content = {"format": _FORMAT, "run": self.run, "rows": dict(self.rows), "columns": columns}
        chunks.add_text(_KEY, json.dumps(content, ensure_ascii=False))
        with whole_file(path) as file:
            picture.save(file, "PNG", pnginfo=chunks)
        return picture


def open_sheet(path: Path, settings: Mapping[str, str], samples: Sequence[Sample]) -> ContactSheet:
    """The sheet at `path` with a row for each sample; an empty one if there is none of a run of these settings."""
    run = _digest(dict(settings))
    new = ContactSheet(run, {_row_key(sample): _label(sample) for sample in samples[:ROWS]})
    if not path.is_file():
        return new
    try:
        with Image.open(path) as picture:
            pixels, text = picture.convert("RGB"), picture.text.get(_KEY, "{}")
    except (OSError, SyntaxError, AttributeError):  # damaged, or no PNG: the sheet begins again
        return new
    content = json.loads(text)
    if content.get("format") != _FORMAT or content["run"] != run:
        return new
    return ContactSheet(run, new.rows, _read_columns(pixels, content, new))


def thinned(columns: Sequence[Column]) -> tuple[Column, ...]:
    """At most COLUMNS of them: the first, the newest ones, and of those between the most evenly spaced."""
    kept = list(columns)
    while len(kept) > COLUMNS:
        gaps = [kept[at + 1].step - kept[at - 1].step for at in range(1, len(kept) - _NEWEST)]
        del kept[1 + gaps.index(min(gaps))]
    return tuple(kept)


def _read_columns(picture: Image.Image, content: Mapping, new: ContactSheet) -> tuple[Column, ...]:
    old = ContactSheet(content["run"], content["rows"])
    places = {key: _top(old.side, row) for row, key in enumerate(old.rows)}
    columns = []
    for number, column in enumerate(content["columns"]):
        left = _left(old.side, number)
        boxes = {key: (left, places[key], left + old.side, places[key] + old.side) for key in column["cells"]}
        cells = {key: picture.crop(box).resize((new.side, new.side)) for key, box in boxes.items() if key in new.rows}
        columns.append(Column(column["step"], cells))
    return tuple(columns)


def _row_key(sample: Sample) -> str:
    """Tells rows apart: samples that differ in nothing but the weights share one."""
    return _digest({name: value for name, value in vars(sample).items() if value is not None})


def _label(sample: Sample) -> str:
    return " ".join([sample.prompt, *(f"({name})" for name in picture_names(sample).values())])


def _digest(values: Mapping) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _cell(saved: SavedSample, side: int) -> Image.Image:
    """The sample, of a clip the middle frame, in the middle of a square."""
    video_3THW = saved.video_3THW
    middle = video_3THW.shape[1] // 2
    frame = Image.fromarray(np.ascontiguousarray(to_frames(video_3THW[:, middle : middle + 1])[0]))
    frame = ImageOps.contain(frame, (side, side))
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(frame, ((side - frame.width) // 2, (side - frame.height) // 2))
    return cell


def _left(side: int, column: int) -> int:
    return _LABEL + _GAP + column * (side + _GAP)


def _top(side: int, row: int) -> int:
    return _TOP + _GAP + row * (side + _GAP)
