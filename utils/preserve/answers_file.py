"""Reference predictions in a file: recorded once, so that later concepts are held to them, however long the chain.

For prompt i the file holds its `i.text` [S, D] in bf16, as text caches do, and for prediction j of it `i.j.noisy` and
`i.j.velocity` [C, F, H, W] in fp16; all else is in its metadata.
Shapes: C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from utils.slice_saving import StoredTensor, write_safetensors
from utils.slices.base_identity import BaseModel
from utils.slices.ledger import ANSWERS_KEY, KEY, Entry, ledger_text, read_ledger
from wan.configs import WanConfig
from wan.errors import InputError
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import mapped_bytes, mapped_tensor

ENDING = ".answers.safetensors"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model predicted for a prompt: noisy latents, velocity [C, F, H, W] on the CPU, timestep `t` (0-1000)."""

    noisy_CFHW: Tensor
    t: float
    velocity_CFHW: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.noisy_CFHW.shape)


class Question(Protocol):
    """A prediction that is still to be recorded."""

    @property
    def t(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


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
        prompts = [_prompt(number, fields, concepts, tensors) for number, fields in enumerate(table["prompts"])]
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
    if type(version) is not int or version != _VERSION:
        found = version if isinstance(version, int) else f"of type {type(version).__name__}"
        raise InputError(f"{path} has version {str(found)[:20]}, this program reads {_VERSION}: update it")
    return tensors, table


def _fits(old: OldPrompt, model: WanConfig) -> bool:
    tokens, width = old.text_SD.shape
    for channels, *sides in {answer.shape for answer in old.kept}:
        if channels != model.in_dim or any(side % patch for side, patch in zip(sides, model.patch_size, strict=True)):
            return False
    return tokens <= model.text_len and width == model.text_dim


def write_answers(
    path: Path, base: BaseModel, run: str, asked: Sequence[tuple[OldPrompt, Sequence[Question]]], new: Iterator[Answer]
) -> None:
    """Writes the encoded prompts, each with its recorded predictions, then those of its questions, in order from `new`.

    SliceError if the file cannot be written, InputError if a value is not finite; what was at `path` then stays.
    """
    concepts = list(dict.fromkeys(old.concept for old, _ in asked if old.concept))
    rows = [[*old.kept, *questions] for old, questions in asked]
    prompts = [
        {
            "text": old.text,
            "concept": concepts.index(old.concept) if old.concept else None,
            "timesteps": [answer.t for answer in row],
        }
        for (old, _), row in zip(asked, rows, strict=True)
    ]
    table = {"version": _VERSION, "base": base.identity, "base_values": base.values, "run": run}
    table |= {"concepts": ledger_text(concepts), "prompts": prompts}
    texts = [old.text_SD.bfloat16() for old, _ in asked]
    tensors = {}
    for number, (text_SD, row) in enumerate(zip(texts, rows, strict=True)):
        key = f"{number}.text"
        tensors[key] = StoredTensor(key, "BF16", list(text_SD.shape), text_SD.nbytes)
        for place, answer in enumerate(row):
            for key in (f"{number}.{place}.noisy", f"{number}.{place}.velocity"):
                tensors[key] = StoredTensor(key, "F16", list(answer.shape), answer_bytes(answer.shape) // 2)
    write_safetensors(path, tensors, {ANSWERS_KEY: json.dumps(table)}, _chunks(path, texts, rows, new))


def answer_bytes(shape: Sequence[int]) -> int:
    """Bytes in the file of a prediction at latents of this shape."""
    return 2 * 2 * math.prod(shape)


def _chunks(
    path: Path, texts: Sequence[Tensor], rows: Sequence[Sequence[Answer | Question]], new: Iterator[Answer]
) -> Iterator[bytes]:
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


def _prompt(number: int, fields: Mapping, concepts: Sequence[Entry], tensors: Mapping[str, Tensor]) -> OldPrompt:
    """One prompt of the list; ValueError, TypeError or LookupError where it is not as write_answers writes it."""
    text, place, times = fields["text"], fields["concept"], fields["timesteps"]
    if not (isinstance(text, str) and isinstance(times, list) and times):
        raise ValueError
    text.encode()  # ValueError where it has halves of characters
    text_SD = tensors[f"{number}.text"]
    if text_SD.dim() != 2 or text_SD.dtype != torch.bfloat16:
        raise ValueError
    kept = tuple(_answer(f"{number}.{i}", t, tensors) for i, t in enumerate(times))
    return OldPrompt(text, None if place is None else _at(concepts, place), kept, text_SD)


def _at(concepts: Sequence[Entry], place: int) -> Entry:
    if type(place) is not int or place < 0:
        raise ValueError
    return concepts[place]


def _answer(key: str, t: float, tensors: Mapping[str, Tensor]) -> Answer:
    noisy_CFHW, velocity_CFHW = tensors[f"{key}.noisy"], tensors[f"{key}.velocity"]
    if type(t) is not float or not 0 <= t <= 1000:
        raise ValueError
    if noisy_CFHW.dim() != 4 or noisy_CFHW.shape != velocity_CFHW.shape:
        raise ValueError
    if {noisy_CFHW.dtype, velocity_CFHW.dtype} != {torch.float16}:
        raise ValueError
    return Answer(noisy_CFHW, t, velocity_CFHW)
