"""Reference predictions of models that start from pictures: the second version of their file."""

import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CLIP_WIDTH, MODELS
from tiny_run import CONFIG

from utils.preserve.answers_file import Answer, OldPrompt, Pictures, read_answers, write_answers
from utils.preserve.old_prompts import OldPrompts
from utils.slices.base_identity import BaseModel
from wan.errors import InputError

BASE = BaseModel("ab" * 32, ("00", "01", None, "03"))
SHAPES = {task: (model.out_dim, 3, 2, 4) for task, model in MODELS.items()}
CLIPS = {"i2v-14B": (257, CLIP_WIDTH), "flf2v-14B": (514, CLIP_WIDTH)}


def draw(*shape):
    return torch.randn(shape).half()


def pictures_of(task):
    if task == "ti2v-5B":
        return None
    return Pictures(draw(20, 3, 2, 4), draw(*CLIPS[task]) if task in CLIPS else None)


def written(path, task, starts=(False, True)):
    """Two prompts with three predictions, the first two at the same clip, the last of an earlier run."""
    torch.manual_seed(0)
    shared, own = pictures_of(task), pictures_of(task)
    starts = starts if task == "ti2v-5B" else (False, False)
    answers = [
        Answer(draw(*SHAPES[task]), float(n), draw(*SHAPES[task]), shared, clean) for n, clean in enumerate(starts)
    ]
    kept = Answer(draw(*SHAPES[task]), 7.0, draw(*SHAPES[task]), own)
    asked = [
        SimpleNamespace(t=one.t, shape=one.shape, pictures=shared, starts_clean=one.starts_clean) for one in answers
    ]
    text_SD = torch.zeros(3, CONFIG.text_dim)
    rows = [(OldPrompt("a cat", text_SD=text_SD), asked), (OldPrompt("a dog", kept=(kept,), text_SD=text_SD), ())]
    write_answers(path, BASE, "run", rows, iter(answers))
    return [*answers, kept]


def opened(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def table_of(path):
    return json.loads(opened(path)[1]["wan_answers"])


def same(one, other):
    return one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("task", list(MODELS))
def test_what_is_written_is_read_again_with_its_pictures(tmp_path, task):
    expected = written(tmp_path / "a.safetensors", task)
    cat, dog = read_answers(tmp_path / "a.safetensors", BASE, MODELS[task]).prompts
    for own, one in zip((*cat.kept, *dog.kept), expected, strict=True):
        assert torch.equal(own.noisy_CFHW, one.noisy_CFHW) and torch.equal(own.velocity_CFHW, one.velocity_CFHW)
        assert (own.t, own.starts_clean) == (one.t, one.starts_clean)
        assert (own.pictures is None) == (one.pictures is None)
        if own.pictures:
            assert same(own.pictures.y_CFHW, one.pictures.y_CFHW) and same(own.pictures.clip_PI, one.pictures.clip_PI)
    assert table_of(tmp_path / "a.safetensors")["version"] == 2


@pytest.mark.parametrize("task", list(CLIPS))
def test_predictions_at_one_clip_share_its_pictures_also_in_the_next_file(tmp_path, task):
    written(tmp_path / "a.safetensors", task)
    again = [(old, ()) for old in read_answers(tmp_path / "a.safetensors", BASE, MODELS[task]).prompts]
    write_answers(tmp_path / "b.safetensors", BASE, "run", again, iter(()))
    for name in ("a", "b"):
        tensors, _ = opened(tmp_path / f"{name}.safetensors")
        given = {f"pictures.{number}.{part}" for number in range(2) for part in ("y", "clip")}
        assert {key for key in tensors if key.startswith("pictures")} == given
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_files_without_pictures_keep_the_first_version(tmp_path):
    written(tmp_path / "a.safetensors", "ti2v-5B", starts=(False, False))
    table = table_of(tmp_path / "a.safetensors")
    assert table["version"] == 1 and set(table["prompts"][0]) == {"text", "concept", "timesteps"}
    assert len(read_answers(tmp_path / "a.safetensors", BASE, MODELS["ti2v-5B"]).prompts) == 2


def test_another_picture_is_another_digest(tmp_path):
    digests = set()
    for change in (lambda key, value: value, lambda key, value: value * (2 if key == "pictures.0.y" else 1),
                   lambda key, value: value * (2 if key == "pictures.1.clip" else 1)):  # fmt: skip
        written(tmp_path / "a.safetensors", "i2v-14B")
        tensors, metadata = opened(tmp_path / "a.safetensors")
        save_file({key: change(key, value) for key, value in tensors.items()}, tmp_path / "b.safetensors", metadata)
        kept = read_answers(tmp_path / "b.safetensors", BASE, MODELS["i2v-14B"])
        digests.add(OldPrompts(tuple(kept.prompts)).digest)
    assert len(digests) == 3


def tensors(**changes):
    """Other tensors in the file: None takes one out."""

    def change(path):
        held, metadata = opened(path)
        held |= {key.replace("_", "."): value for key, value in changes.items()}
        save_file({key: value for key, value in held.items() if value is not None}, path, metadata)

    return change


def told(**changes):
    """Another list of what was given to the first prompt's predictions."""

    def change(path):
        held, metadata = opened(path)
        table = json.loads(metadata["wan_answers"])
        table["prompts"][0].update(changes)
        save_file(held, path, {"wan_answers": json.dumps(table)})

    return change


DAMAGED, OTHER = "is damaged: its list of predictions", "another base model"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("i2v-14B", tensors(pictures_0_y=None), DAMAGED),
        ("i2v-14B", tensors(pictures_1_y=None), DAMAGED),
        ("i2v-14B", tensors(pictures_0_clip=None), OTHER),
        ("i2v-14B", tensors(pictures_0_y=draw(20, 3, 2)), DAMAGED),
        ("i2v-14B", tensors(pictures_0_y=draw(20, 3, 2, 4).float()), DAMAGED),
        ("i2v-14B", tensors(pictures_0_y=draw(20, 3, 2, 4).bfloat16()), DAMAGED),
        ("i2v-14B", tensors(pictures_0_y=draw(20, 2, 2, 4)), OTHER),
        ("i2v-14B", tensors(pictures_0_y=draw(16, 3, 2, 4)), OTHER),
        ("i2v-14B", tensors(pictures_0_y=draw(20, 3, 2, 4) / 0), "NaN or infinite values in pictures.0.y"),
        ("i2v-14B", tensors(pictures_1_clip=draw(257)), DAMAGED),
        ("i2v-14B", tensors(pictures_1_clip=draw(514, CLIP_WIDTH)), OTHER),
        ("i2v-14B", tensors(pictures_1_clip=draw(257, 8)), OTHER),
        ("flf2v-14B", tensors(pictures_1_clip=draw(257, CLIP_WIDTH)), OTHER),
        ("i2v-A14B", tensors(pictures_1_clip=draw(257, CLIP_WIDTH)), OTHER),
        ("i2v-14B", told(pictures=[0, None]), OTHER),
        ("i2v-14B", told(pictures=[0]), DAMAGED),
        ("i2v-14B", told(pictures=[0, 2]), DAMAGED),
        ("i2v-14B", told(pictures=[0, -1]), DAMAGED),
        ("i2v-14B", told(pictures=[0, True]), DAMAGED),
        ("i2v-14B", told(pictures=[0, [0]]), DAMAGED),
        ("i2v-14B", told(pictures=None), DAMAGED),
        ("i2v-14B", told(pictures="00"), DAMAGED),
        ("i2v-14B", told(starts_clean=[True, False]), OTHER),
        ("ti2v-5B", told(starts_clean=[True, 1]), DAMAGED),
        ("ti2v-5B", told(starts_clean=7), DAMAGED),
        ("ti2v-5B", told(starts_clean=[True, True, True]), DAMAGED),
        ("ti2v-5B", tensors(**{f"0_1_{part}": draw(48, 1, 2, 4) for part in ("noisy", "velocity")}), DAMAGED),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused(tmp_path, task, change, message):
    path = tmp_path / "a.safetensors"
    written(path, task)
    change(path)
    with pytest.raises(InputError, match=message):
        read_answers(path, BASE, MODELS[task])


def test_predictions_of_another_kind_of_model_are_refused(tmp_path):
    written(tmp_path / "a.safetensors", "i2v-14B")
    for other in (MODELS["flf2v-14B"], MODELS["i2v-A14B"], CONFIG, replace(MODELS["i2v-14B"], image_dim=8)):
        with pytest.raises(InputError, match=OTHER):
            read_answers(tmp_path / "a.safetensors", BASE, other)


values = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=3)
told_values = values | st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2)


@st.composite
def hostile_bytes(draw, whole):
    """A real file with bytes changed, cut or added, in its header for the most part, or with another list."""
    size = struct.unpack("<Q", whole[:8])[0]
    if draw(st.booleans()):
        header = json.loads(whole[8 : 8 + size])
        table = json.loads(header["__metadata__"]["wan_answers"])
        where = draw(st.sampled_from([table, *table["prompts"], table.get("random", table)]))
        where[draw(st.sampled_from([*where, "pictures", "starts_clean"]))] = draw(told_values)
        header["__metadata__"]["wan_answers"] = json.dumps(table)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, min(size + 100, len(content) - 1)))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@pytest.mark.parametrize("examples", [30, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_as_it_is_or_refused_in_one_line(tmp_path, examples):
    path, refused = tmp_path / "a.safetensors", []
    written(path, "i2v-14B")

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_bytes(path.read_bytes()))
    def attempt(content):
        (tmp_path / "b.safetensors").write_bytes(content)
        try:
            prompts = read_answers(tmp_path / "b.safetensors", BASE, MODELS["i2v-14B"]).prompts
            assert all(own.pictures and not own.starts_clean for old in prompts for own in old.kept)
        except InputError as error:
            refused.append(str(error))

    attempt()
    assert refused and not any("\n" in message or len(message) > 2000 for message in refused)
