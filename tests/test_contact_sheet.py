"""The contact sheet of a run: a row per prompt, a column per turn."""

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image, ImageFont
from tiny_run import run, write_inputs, write_sample_models

from utils.run import sheet_labels
from utils.run.contact_sheet import COLUMNS, Column, open_sheet, thinned
from utils.run.samples import SavedSample
from utils.run.sheet_labels import label, readable_in
from utils.sampling.denoising import resolve_sample
from utils.sampling.prompts import SamplePrompt
from wan.configs import TASKS

SAMPLES = [resolve_sample(SamplePrompt(text, seed=1), TASKS["t2v-14B"], 0) for text in ("a cat", "a dog" * 90, "狐狸")]
SETTINGS = {"seed": "3"}


def turn(step: int, samples=SAMPLES):
    """Samples of one colour, by which their cells are found again."""
    colours = [step / 100 + number / 10 - 1 for number in range(len(samples))]
    return [
        SavedSample(sample, None, torch.full((3, 5, 48, 64), at)) for sample, at in zip(samples, colours, strict=True)
    ]


def grow(path, steps, samples=SAMPLES, settings=SETTINGS):
    """The sheet after these turns, each of which opens it anew."""
    for step in steps:
        sheet = open_sheet(path, settings, samples).with_turn(step, turn(step, samples))
        sheet.save(path)
    return sheet


def steps_of(sheet):
    return [column.step for column in sheet.columns]


def test_a_sheet_grows_turn_by_turn_and_keeps_its_pixels(tmp_path):
    sheet = grow(tmp_path / "a.png", [0, 5, 10])
    read = open_sheet(tmp_path / "a.png", SETTINGS, SAMPLES)
    assert steps_of(read) == [0, 5, 10]
    for old, new, step in zip(sheet.columns, read.columns, (0, 5, 10), strict=True):
        for number, key in enumerate(read.rows):
            assert old.cells[key].tobytes() == new.cells[key].tobytes()
            assert new.cells[key].getpixel((64, 64))[0] == pytest.approx(127.5 * (step / 100 + number / 10), abs=1)


def test_a_turn_replaces_what_a_run_drew_beyond_the_state_it_resumes_from(tmp_path):
    assert steps_of(grow(tmp_path / "a.png", [0, 5, 10, 15, 7])) == [0, 5, 7]
    assert steps_of(grow(tmp_path / "a.png", [7])) == [0, 5, 7]


def test_a_sheet_of_another_run_or_a_damaged_one_begins_again(tmp_path):
    path = tmp_path / "a.png"
    grow(path, [0, 5])
    assert steps_of(grow(path, [10], settings={"seed": "4"})) == [10]
    path.write_bytes(path.read_bytes()[:-200])
    assert steps_of(grow(path, [15], settings={"seed": "4"})) == [15]


def test_a_prompt_that_is_new_has_no_cell_in_older_turns(tmp_path):
    grow(tmp_path / "a.png", [0], SAMPLES[:2])
    sheet = grow(tmp_path / "a.png", [5], SAMPLES[1:])
    assert list(sheet.rows.values()) == [sample.prompt for sample in SAMPLES[1:]]
    assert [len(column.cells) for column in sheet.columns] == [1, 2]


def test_a_sheet_is_bounded_and_older_turns_stand_further_apart(tmp_path):
    columns = []
    for step in range(0, 3000, 10):
        columns = thinned([*columns, Column(step, {})])
        assert len(columns) <= COLUMNS and columns[-1].step == step and columns[0].step == 0
    gaps = [after.step - before.step for before, after in pairwise(columns)]
    assert gaps[-15:] == [10] * 15 and max(gaps) <= 2 * 3000 / 47


@pytest.mark.parametrize(("count", "rows", "side"), [(3, 3, 128), (40, 40, 64), (200, 64, 64)])
def test_many_prompts_have_smaller_cells_and_rows_are_bounded(tmp_path, count, rows, side):
    samples = [replace(SAMPLES[0], seed=seed) for seed in range(count)]
    sheet = grow(tmp_path / "a.png", [5], samples)
    assert (len(sheet.rows), sheet.side) == (rows, side)
    assert Image.open(tmp_path / "a.png").height == 18 + 4 + rows * (side + 4)


def test_a_label_has_no_character_that_its_font_lacks():
    for text in (
        "a cat",
        "Café à Zürich",
        "лиса в снегу",
        "狐狸在雪地里",
        "🦊 fox\ufe0f",
        "ثعلب",
        "लोमड़ी",
        "n\u0303andu",
    ):
        font, shown = readable_in(text)
        box = font.getmask("\U000effff")
        drawn = [font.getmask(character) for character in shown if not character.isspace()]
        assert all((mask.size, bytes(mask)) != (box.size, bytes(box)) for mask in drawn), text


def test_what_no_font_has_is_written_plainly_or_as_its_code(monkeypatch):
    monkeypatch.setattr(sheet_labels, "_system_font", lambda name: None)
    assert readable_in("Café ñandú 狐 🦊\ufe0f ж")[1] == r"Cafe nandu \u72d0 \U0001f98a \u0436"


def test_a_font_of_the_system_is_taken_where_it_has_more_characters(monkeypatch):
    own, other = ImageFont.load_default(11), ImageFont.load_default(12)
    monkeypatch.setattr(sheet_labels, "_fonts", lambda: [own, other])
    monkeypatch.setattr(sheet_labels, "_has", lambda font, character: character.isascii() or font is other)
    assert readable_in("a cat")[0] is own and readable_in("une fée")[0] is other


@pytest.mark.parametrize("text", ["狐" * 40, "w" * 150, "a red fox in the snow at dusk " * 9])
def test_labels_stay_beside_their_row(text):
    lines, font = label(text, 120, 128)
    assert all(font.getlength(line) <= 120 for line in lines.split("\n"))
    assert len(lines.split("\n")) == 8 and lines.endswith("…")


def test_a_resumed_run_continues_its_sheet(tmp_path):
    models = [*write_sample_models(write_inputs(tmp_path)), "--vae_dtype", "fp32"]
    samples = [*models, "--sample_at_first", "--sample_every_n_epochs", "1", "--save_state", "--save_every_n_epochs=1"]
    run(tmp_path, *samples, "--max_train_epochs", "2")
    sheet = tmp_path / "out" / "sample" / "one_contact_sheet.png"
    whole = sheet.read_bytes()
    shutil.rmtree(tmp_path / "out" / "one-state")
    run(tmp_path, *samples, "--max_train_epochs", "2", "--resume", "latest")
    assert sheet.read_bytes() == whole
    assert Image.open(sheet).width == 128 + 4 + 3 * 132


def test_rows_of_one_prompt_are_told_apart_by_their_pictures(tmp_path):
    samples = [replace(SAMPLES[0], image_path=f"{folder}/a.png") for folder in ("one", "other")]
    rows = open_sheet(tmp_path / "sheet.png", SETTINGS, [*samples, SAMPLES[0]]).rows
    assert list(rows.values()) == ["a cat (a.png)", "a cat (a.png)", "a cat"]
