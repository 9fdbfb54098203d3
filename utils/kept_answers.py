"""Answers that a model once gave, kept in a file: what later concepts are held to, however long the chain.

A teacher that is each run's own start moves along the chain, and its small errors add up; a kept answer does not move.
The file holds `i.j.noisy` and `i.j.velocity` [C, F, H, W] in fp16 for answer j to prompt i, all else in its metadata.
Shapes: C latent channels, F H W latent frames, height, width.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from utils.ledger import ANSWERS_KEY, KEY, Entry, ledger_text, read_ledger
from utils.selective_finetune import StoredTensor, write_safetensors
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
        noisy, velocity = read_tensor(self.noisy), read_tensor(self.velocity)
        if not (noisy.isfinite().all() and velocity.isfinite().all()):
            raise InputError(f"{self.noisy.file} holds NaN or infinite values in {self.noisy.key}: leave it out")
        return Answer(noisy.float(), self.t, velocity.float())


class Planned(Protocol):
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


def read_answers(path: Path, base: str) -> list[OldPrompt]:
    """The prompts of an answers file; InputError if it is none, or of a model with another base identity."""
    tensors, metadata = read_file_header(path)
    if ANSWERS_KEY not in metadata:
        raise InputError(f"{path} holds no kept answers: give a file that a run wrote as NAME{ENDING}")
    try:
        told = json.loads(metadata[ANSWERS_KEY])
        version, theirs = told["version"], told["base"]
        concepts = read_ledger({KEY: told["concepts"]}, path)
        prompts = [_prompt(number, fields, concepts, tensors) for number, fields in enumerate(told["prompts"])]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of answers ({ANSWERS_KEY}) cannot be read") from None
    if version != _VERSION:
        raise InputError(f"{path} is of version {version}, this program reads {_VERSION}: update it")
    if theirs != base:
        raise InputError(f"{path} holds the answers of another base model than --dit's: leave it out")
    return prompts


def write_answers(
    path: Path, base: str, answered: Sequence[tuple[OldPrompt, Sequence[Planned]]], new: Iterator[Answer]
) -> int:
    """Writes the prompts with what is kept of each and what is planned, which `new` gives in order; the file's size."""
    concepts = list(dict.fromkeys(prompt.concept for prompt, _ in answered if prompt.concept))
    rows = [[*prompt.kept, *planned] for prompt, planned in answered]
    prompts = [
        {
            "text": prompt.text,
            "concept": concepts.index(prompt.concept) if prompt.concept else None,
            "timesteps": [answer.t for answer in row],
        }
        for (prompt, _), row in zip(answered, rows, strict=True)
    ]
    told = {"version": _VERSION, "base": base, "concepts": ledger_text(concepts), "prompts": prompts}
    tensors = {}
    for number, row in enumerate(rows):
        for place, answer in enumerate(row):
            for key in (f"{number}.{place}.noisy", f"{number}.{place}.velocity"):
                tensors[key] = StoredTensor(key, "F16", list(answer.shape), 2 * math.prod(answer.shape))
    write_safetensors(path, tensors, {ANSWERS_KEY: json.dumps(told)}, _chunks(rows, new))
    return path.stat().st_size


def _chunks(rows: Sequence[Sequence[KeptAnswer | Planned]], new: Iterator[Answer]) -> Iterator[bytes]:
    for answer in (answer for row in rows for answer in row):
        if isinstance(answer, KeptAnswer):
            yield read_bytes(answer.noisy)
            yield read_bytes(answer.velocity)
        else:
            had = next(new)
            yield had.noisy_CFHW.half().numpy().tobytes()
            yield had.velocity_CFHW.half().numpy().tobytes()


def _prompt(number: int, fields: Mapping, concepts: Sequence[Entry], tensors: Mapping[str, TensorEntry]) -> OldPrompt:
    """One prompt of the list; ValueError, TypeError or LookupError where it is not as write_answers makes it."""
    match fields["text"], fields["concept"], fields["timesteps"]:
        case str(text), int() | None as place, list(times):
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
