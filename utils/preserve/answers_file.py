"""Reference predictions in a file: recorded once, so that later concepts are held to them, however long the chain.

For prompt i the file holds its `i.text` [S, D] in bf16, as text caches do, and for prediction j of it `i.j.noisy` and
`i.j.velocity` [C, F, H, W] in fp16; all else is in its metadata. Where models are given pictures, it is of version 2:
what was given of a clip is stored once, as `pictures.k.y` [C, F, H, W] and `pictures.k.clip` [P, I] in fp16, and each
prediction has its k; for each there is also whether its first latent frame is clean, at timestep 0.
Shapes: C channels, F H W latent frames, height, width, S text tokens, D text width, P CLIP tokens, I their width.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.slice_saving import StoredTensor, write_safetensors
from utils.slices.base_identity import BaseModel
from utils.slices.ledger import ANSWERS_KEY, KEY, Entry, ledger_text, read_ledger
from wan.configs import WanConfig
from wan.errors import InputError
from wan.model import PICTURE_TOKENS
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import mapped_bytes, mapped_tensor

ENDING = ".answers.safetensors"
_VERSION = 1
_WITH_PICTURES = 2  # the version of files that say what the model was given beside noise and text


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a model was given of a clip's pictures: y, and CLIP tokens if it reads them, on the CPU."""

    y_CFHW: Tensor
    clip_PI: Tensor | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return tuple(self.y_CFHW.shape), None if self.clip_PI is None else tuple(self.clip_PI.shape)

    def read(self) -> "Pictures":
        return self


class PictureSource(Protocol):
    """Pictures, in memory or still in a cache; those that are equal are written once."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]: ...
    def read(self) -> Pictures: ...


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model predicted for a prompt: noisy latents, velocity [C, F, H, W] on the CPU, timestep `t` (0-1000).

    `starts_clean`: the first latent frame was clean, at timestep 0, so that nothing was predicted for it.
    """

    noisy_CFHW: Tensor
    t: float
    velocity_CFHW: Tensor
    pictures: Pictures | None = None
    starts_clean: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.noisy_CFHW.shape)


class Question(Protocol):
    """A prediction that is still to be recorded."""

    @property
    def t(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def pictures(self) -> PictureSource | None: ...
    @property
    def starts_clean(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class OldPrompt:
    """A prompt to preserve, the concept it belongs to, if any, and the reference predictions recorded for it.

    `text_SD` is the encoded prompt on the CPU; None if it was not encoded yet.
    """

    text: str
    concept: Entry | None = None
    kept: tuple[Answer, ...] = ()
    text_SD: Tensor | None = None


def read_answers(path: Path, base: BaseModel, model: WanConfig) -> list[OldPrompt]:
    """The prompts of a file of reference predictions, mapped from it.

    InputError if it is not one, belongs to another base or kind of model, or holds values that are not finite.
    """
    entries, table = _read(path)
    contents = mapped_bytes(path)
    ours = {key: entry for key, entry in entries.items() if entry.numel and entry.dtype in ("F16", "BF16")}
    tensors = {key: mapped_tensor(contents, entry) for key, entry in ours.items()}
    try:
        concepts = read_ledger({KEY: table["concepts"]}, path)
        rest = (concepts, tensors, _all_pictures(table, tensors), table["version"])
        prompts = [_prompt(number, fields, *rest) for number, fields in enumerate(table["prompts"])]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of predictions ({ANSWERS_KEY}) cannot be read") from None
    if len({old.text for old in prompts}) < len(prompts):
        raise InputError(f"{path} is damaged: it lists a prompt twice")
    if not (table["base"].is_same(base) and all(_fits(old, model) for old in prompts)):
        raise InputError(
            f"{path} holds reference predictions of another base model than --dit's (merged, or otherwise finetuned?): "
            "leave it out"
        )
    for key, values in tensors.items():
        _check_finite(values, key, path)
    return prompts


def base_identity_of(path: Path) -> str:
    """The identity of the base whose predictions a file holds; InputError if it is not such a file."""
    return _read(path)[1]["base"].identity


def is_of_run(path: Path, run: str) -> bool:
    """Whether the file exists, is complete, and was recorded at the start of a run with these settings (their hash)."""
    with suppress(InputError):
        return _read(path)[1].get("run") == run
    return False


def _read(path: Path) -> tuple[dict[str, TensorEntry], dict]:
    tensors, metadata = read_file_header(path)
    if ANSWERS_KEY not in metadata:
        raise InputError(f"{path} holds no reference predictions: give a file that a run wrote as NAME{ENDING}")
    try:
        table = json.loads(metadata[ANSWERS_KEY])
        version, table["base"] = table["version"], BaseModel(str(table["base"]), tuple(table.get("base_values", ())))
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of predictions ({ANSWERS_KEY}) cannot be read") from None
    if type(version) is not int or version not in (_VERSION, _WITH_PICTURES):
        found = version if isinstance(version, int) else f"of type {type(version).__name__}"
        raise InputError(
            f"{path} has version {str(found)[:20]}, this program reads {_VERSION} and {_WITH_PICTURES}: update it"
        )
    return tensors, table


def _fits(old: OldPrompt, model: WanConfig) -> bool:
    tokens, width = old.text_SD.shape
    for channels, *sides in {answer.shape for answer in old.kept}:
        if channels != model.out_dim or any(side % patch for side, patch in zip(sides, model.patch_size, strict=True)):
            return False
    if any(answer.starts_clean for answer in old.kept) and not model.starts_from_latents:
        return False
    given = all(
        (answer.pictures and answer.pictures.shapes) == picture_shapes(model, answer.shape) for answer in old.kept
    )
    return given and tokens <= model.text_len and width == model.text_dim


def picture_shapes(model: WanConfig, latents: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...] | None] | None:
    """Those of the y and the CLIP tokens that the model reads beside latents of this shape; None if it reads none."""
    if model.in_dim == model.out_dim:
        return None
    tokens = PICTURE_TOKENS * (2 if model.model_type == "flf2v" else 1)
    clip = None if model.image_dim is None else (tokens, model.image_dim)
    return (model.in_dim - model.out_dim, *latents[1:]), clip


def write_answers(
    path: Path, base: BaseModel, run: str, asked: Sequence[tuple[OldPrompt, Sequence[Question]]], new: Iterator[Answer]
) -> None:
    """Writes the encoded prompts, each with its recorded predictions, then those of its questions, in order from `new`.

    SliceError if the file cannot be written, InputError if a value is not finite; what was at `path` then stays.
    """
    concepts = list(dict.fromkeys(old.concept for old, _ in asked if old.concept))
    rows = [[*old.kept, *questions] for old, questions in asked]
    given = list(shared_pictures(answer for row in rows for answer in row))
    tells = bool(given) or any(answer.starts_clean for row in rows for answer in row)
    prompts = [
        {
            "text": old.text,
            "concept": concepts.index(old.concept) if old.concept else None,
            "timesteps": [answer.t for answer in row],
            **(_what_was_given(row, given) if tells else {}),
        }
        for (old, _), row in zip(asked, rows, strict=True)
    ]
    version = _WITH_PICTURES if tells else _VERSION
    table = {"version": version, "base": base.identity, "base_values": base.values, "run": run}
    table |= {"concepts": ledger_text(concepts), "prompts": prompts}
    texts = [old.text_SD.bfloat16() for old, _ in asked]
    tensors = {}
    for number, own in enumerate(given):
        for key, shape in zip(_picture_keys(number), own.shapes, strict=True):
            if shape is not None:
                tensors[key] = StoredTensor(key, "F16", list(shape), 2 * math.prod(shape))
    for number, (text_SD, row) in enumerate(zip(texts, rows, strict=True)):
        key = f"{number}.text"
        tensors[key] = StoredTensor(key, "BF16", list(text_SD.shape), text_SD.nbytes)
        for place, answer in enumerate(row):
            for key in (f"{number}.{place}.noisy", f"{number}.{place}.velocity"):
                tensors[key] = StoredTensor(key, "F16", list(answer.shape), answer_bytes(answer.shape) // 2)
    write_safetensors(path, tensors, {ANSWERS_KEY: json.dumps(table)}, _chunks(path, given, texts, rows, new))


def shared_pictures(answers: Iterable[Answer | Question]) -> dict[PictureSource, None]:
    """The pictures that predictions were given, each once, in the order of the file."""
    return dict.fromkeys(answer.pictures for answer in answers if answer.pictures is not None)


def _what_was_given(row: Sequence[Answer | Question], given: Sequence[PictureSource]) -> dict[str, list]:
    numbers = {own: number for number, own in enumerate(given)}
    pictures = [answer.pictures and numbers[answer.pictures] for answer in row]
    return {"pictures": pictures, "starts_clean": [answer.starts_clean for answer in row]}


def _picture_keys(number: int) -> tuple[str, str]:
    return f"pictures.{number}.y", f"pictures.{number}.clip"


def answer_bytes(shape: Sequence[int]) -> int:
    """Bytes in the file of a prediction at latents of this shape."""
    return 2 * 2 * math.prod(shape)


def pictures_bytes(source: PictureSource) -> int:
    """Bytes in the file of what a model was given of pictures."""
    return sum(2 * math.prod(shape) for shape in source.shapes if shape is not None)


def _chunks(
    path: Path,
    given: Sequence[PictureSource],
    texts: Sequence[Tensor],
    rows: Sequence[Sequence[Answer | Question]],
    new: Iterator[Answer],
) -> Iterator[bytes]:
    for source in given:
        own = source.read()
        for values in (own.y_CFHW, own.clip_PI):
            if values is not None:
                _check_finite(values.half(), "what the model is given of pictures", path)
                yield _bytes(values.half())
    for text_SD, row in zip(texts, rows, strict=True):
        _check_finite(text_SD, "the encoded text", path)
        yield _bytes(text_SD)
        for answer in row:
            had = answer if isinstance(answer, Answer) else next(new)
            for values in (had.noisy_CFHW.half(), had.velocity_CFHW.half()):
                _check_finite(values, f"the prediction at timestep {had.t:g}", path)
                yield _bytes(values)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _check_finite(values: Tensor, what: str, path: Path) -> None:
    if not values.isfinite().all():
        raise InputError(f"{path}: NaN or infinite values in {what}: leave the file out, or look at --dit")


def _all_pictures(table: Mapping, tensors: Mapping[str, Tensor]) -> list[Pictures]:
    """All that predictions were given of pictures; ValueError where it is not as write_answers writes it."""
    given, number = [], 0
    if table["version"] == _VERSION:
        return given
    while (keys := _picture_keys(number))[0] in tensors:
        y_CFHW, clip_PI = map(tensors.get, keys)
        if y_CFHW.dim() != 4 or (clip_PI is not None and clip_PI.dim() != 2):
            raise ValueError
        if {y_CFHW.dtype, *([] if clip_PI is None else [clip_PI.dtype])} != {torch.float16}:
            raise ValueError
        given.append(Pictures(y_CFHW, clip_PI))
        number += 1
    return given


def _prompt(
    number: int,
    fields: Mapping,
    concepts: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    given: Sequence[Pictures],
    version: int,
) -> OldPrompt:
    """One prompt of the list; ValueError, TypeError or LookupError where it is not as write_answers writes it."""
    text, place, times = fields["text"], fields["concept"], fields["timesteps"]
    if not (isinstance(text, str) and isinstance(times, list) and times):
        raise ValueError
    text.encode()  # ValueError where it has halves of characters
    text_SD = tensors[f"{number}.text"]
    if text_SD.dim() != 2 or text_SD.dtype != torch.bfloat16:
        raise ValueError
    told = version == _WITH_PICTURES
    pictures = fields["pictures"] if told else [None] * len(times)
    clean = fields["starts_clean"] if told else [False] * len(times)
    rows = zip(times, pictures, clean, strict=True)  # ValueError where one is longer
    kept = tuple(_answer(f"{number}.{i}", *row, tensors, given) for i, row in enumerate(rows))
    return OldPrompt(text, None if place is None else _at(concepts, place), kept, text_SD)


def _at(values: Sequence, place: int) -> Any:
    if type(place) is not int or place < 0:
        raise ValueError
    return values[place]


def _answer(
    key: str,
    t: float,
    pictures: int | None,
    starts_clean: bool,
    tensors: Mapping[str, Tensor],
    given: Sequence[Pictures],
) -> Answer:
    noisy_CFHW, velocity_CFHW = tensors[f"{key}.noisy"], tensors[f"{key}.velocity"]
    if type(t) is not float or not 0 <= t <= 1000 or type(starts_clean) is not bool:
        raise ValueError
    if noisy_CFHW.dim() != 4 or noisy_CFHW.shape != velocity_CFHW.shape:
        raise ValueError
    if {noisy_CFHW.dtype, velocity_CFHW.dtype} != {torch.float16} or (starts_clean and noisy_CFHW.shape[1] == 1):
        raise ValueError
    own = None if pictures is None else _at(given, pictures)
    return Answer(noisy_CFHW, t, velocity_CFHW, own, starts_clean)
