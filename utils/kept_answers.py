"""Answers that a model once gave, kept in a file: what later concepts are held to, however long the chain.

The file holds `i.j.noisy` and `i.j.velocity` [C, F, H, W] in fp16 for answer j to prompt i, all else in its metadata.
Shapes: C latent channels, F H W latent frames, height, width.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from utils.ledger import ANSWERS_KEY, KEY, Entry, ledger_text, read_ledger
from utils.selective_finetune import StoredTensor, write_safetensors
from wan.configs import WanConfig
from wan.errors import InputError
from wan.safetensors_header import TensorEntry, read_bytes, read_file_header
from wan.stored_tensors import read_tensor

ENDING = ".answers.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt at noisy latents, both [C, F, H, W] on the CPU, and timestep `t` (0 to 1000)."""

    noisy_CFHW: Tensor
    t: float
    velocity_CFHW: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.noisy_CFHW.shape)

    def read(self) -> "Answer":
        """Itself: it is in memory."""
        return self


@dataclass(frozen=True)
class KeptAnswer:
    """An answer on disk; `shape` is that of its latents."""

    t: float
    noisy: TensorEntry
    velocity: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.noisy.shape

    def read(self) -> Answer:
        """The answer, in float32; InputError if it is not finite."""
        noisy, velocity = (_finite(read_tensor(entry), entry.key, entry.file) for entry in (self.noisy, self.velocity))
        return Answer(noisy.float(), self.t, velocity.float())


class Question(Protocol):
    """An answer that is still to be had."""

    @property
    def t(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class OldPrompt:
    """A prompt whose answers are preserved, those that are kept of it, and the concept that it belongs to, if any."""

    text: str
    concept: Entry | None = None
    kept: tuple[KeptAnswer | Answer, ...] = ()


def read_answers(path: Path, base: str, model: WanConfig) -> list[OldPrompt]:
    """The prompts of an answers file; InputError if it is none, or of another base (its identity) or kind of model."""
    tensors, told = _read(path)
    try:
        concepts = read_ledger({KEY: told["concepts"]}, path)
        prompts = [_prompt(number, fields, concepts, tensors) for number, fields in enumerate(told["prompts"])]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of answers ({ANSWERS_KEY}) cannot be read") from None
    if len({old.text for old in prompts}) < len(prompts):
        raise InputError(f"{path} is damaged: it lists a prompt twice")
    shapes = {kept.shape for old in prompts for kept in old.kept}
    if told["base"] != base or not all(_fits(shape, model) for shape in shapes):
        raise InputError(f"{path} holds the answers of another base model than --dit's: leave it out")
    return prompts


def is_of_run(path: Path, run: str) -> bool:
    """Whether the file is there, whole, and holds what a run of these settings, as one hash, kept when it began."""
    with suppress(InputError):
        return _read(path)[1].get("run") == run
    return False


def _read(path: Path) -> tuple[dict[str, TensorEntry], dict]:
    tensors, metadata = read_file_header(path)
    if ANSWERS_KEY not in metadata:
        raise InputError(f"{path} holds no kept answers: give a file that a run wrote as NAME{ENDING}")
    try:
        told = json.loads(metadata[ANSWERS_KEY])
        version, told["base"] = told["version"], str(told["base"])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of answers ({ANSWERS_KEY}) cannot be read") from None
    if type(version) is not int or version != _VERSION:
        raise InputError(f"{path} is of version {str(version)[:20]}, this program reads {_VERSION}: update it")
    return tensors, told


def _fits(shape: Sequence[int], model: WanConfig) -> bool:
    patches = zip(shape[1:], model.patch_size, strict=True)
    return shape[0] == model.in_dim and all(side % patch == 0 for side, patch in patches)


def write_answers(
    path: Path, base: str, run: str, asked: Sequence[tuple[OldPrompt, Sequence[Question]]], new: Iterator[Answer]
) -> None:
    """Writes the prompts, each with what is kept of it, then its questions' answers, which `new` gives in order.

    SliceError if the file cannot be written, InputError if an answer is not finite; what stood at `path` then stays.
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
    told = {"version": _VERSION, "base": base, "run": run, "concepts": ledger_text(concepts), "prompts": prompts}
    tensors = {}
    for number, row in enumerate(rows):
        for place, answer in enumerate(row):
            for key in (f"{number}.{place}.noisy", f"{number}.{place}.velocity"):
                tensors[key] = StoredTensor(key, "F16", list(answer.shape), answer_bytes(answer.shape) // 2)
    write_safetensors(path, tensors, {ANSWERS_KEY: json.dumps(told)}, _chunks(path, rows, new))


def answer_bytes(shape: Sequence[int]) -> int:
    """What an answer at latents of this shape takes in the file."""
    return 2 * 2 * math.prod(shape)


def _chunks(path: Path, rows: Sequence[Sequence[KeptAnswer | Question]], new: Iterator[Answer]) -> Iterator[bytes]:
    for answer in (answer for row in rows for answer in row):
        if isinstance(answer, KeptAnswer):
            yield read_bytes(answer.noisy)
            yield read_bytes(answer.velocity)
        else:
            had = next(new)
            for values in (had.noisy_CFHW, had.velocity_CFHW):
                yield _finite(values.half(), f"answer at timestep {had.t:g}", path).numpy().tobytes()


def _finite(values: Tensor, what: str, path: Path) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"{path}: NaN or infinite values in {what}: leave the file out, or look at --dit")
    return values


def _prompt(number: int, fields: Mapping, concepts: Sequence[Entry], tensors: Mapping[str, TensorEntry]) -> OldPrompt:
    """One prompt of the list; ValueError, TypeError or LookupError where it is not as write_answers makes it."""
    match fields["text"], fields["concept"], fields["timesteps"]:
        case str(text), None | int() as place, [_, *_] as times if type(place) is not bool and (place or 0) >= 0:
            text.encode()  # ValueError where halves of characters stand in it
            kept = tuple(_answer(f"{number}.{i}", t, tensors) for i, t in enumerate(times))
            return OldPrompt(text, None if place is None else concepts[place], kept)
    raise ValueError


def _answer(key: str, t: float, tensors: Mapping[str, TensorEntry]) -> KeptAnswer:
    kept = KeptAnswer(t, tensors[f"{key}.noisy"], tensors[f"{key}.velocity"])
    shapes, dtypes = {kept.noisy.shape, kept.velocity.shape}, {kept.noisy.dtype, kept.velocity.dtype}
    is_answer = len(shapes) == 1 and len(kept.shape) == 4 and kept.noisy.numel > 0 and dtypes == {"F16"}
    if not (is_answer and type(t) is float and 0 <= t <= 1000):
        raise ValueError
    return kept
