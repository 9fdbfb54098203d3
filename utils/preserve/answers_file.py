"""Reference predictions in a file: recorded once, so that later concepts are held to them, however long the chain.

For prompt i the file holds its `i.text` [S, D] in bf16, as text caches do, and for prediction j of it `i.j.noisy` and
`i.j.velocity` [C, F, H, W] in fp16; all else is in its metadata. Where models are given pictures, it is of version 2:
what was given of a clip is stored once, as `pictures.k.y` [C, F, H, W] and `pictures.k.clip` [P, I] in fp16, and each
prediction has its k; for each there is also whether its first latent frame is clean, at timestep 0.

With random contexts it is of version 3. Prediction j at context j is `random.j.noisy` and `random.j.velocity`. The
contexts are kept as `random.j.text`, or, where that is smaller, as their seed, the tokens that they are drawn like,
`random.tokens` [T, D], and the lengths of these captions; then `random.0.text` tells whether they are drawn alike.
Shapes: C channels, F H W latent frames, height, width, S text tokens, D text width, P CLIP tokens, I their width, T
tokens of all captions.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.preserve.answers import (
    MOST_CONTEXTS,
    Answer,
    OldPrompt,
    Pictures,
    PictureSource,
    Question,
    RandomContexts,
    answer_bytes,
    picture_shapes,
    shared_pictures,
)
from utils.preserve.random_contexts import DrawnContexts, TokenStatistics
from utils.slice_saving import StoredTensor, write_safetensors
from utils.slices.base_identity import BaseModel
from utils.slices.ledger import ANSWERS_KEY, KEY, Entry, ledger_text, read_ledger
from wan.configs import WanConfig
from wan.errors import InputError
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import mapped_bytes, mapped_tensor

ENDING = ".answers.safetensors"
_VERSION = 1
_WITH_PICTURES = 2  # the version of files that say what the model was given beside noise and text
_WITH_CONTEXTS = 3  # and of those with random contexts
_RANDOM = "random"
_DRAWN_ALIKE = 0.01  # relative distance that a context drawn again may have
_MOST_SEED = 2**64


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a file of reference predictions holds, mapped from it: prompts, and random contexts if there are any."""

    prompts: list[OldPrompt]
    random: RandomContexts | None


def read_answers(path: Path, base: BaseModel, model: WanConfig) -> Recorded:
    """What a file of reference predictions holds.

    InputError if it is not one, belongs to another base or kind of model, or holds values that are not finite.
    """
    entries, table = _read(path)
    contents = mapped_bytes(path)
    ours = {key: entry for key, entry in entries.items() if entry.numel and entry.dtype in ("F16", "BF16")}
    tensors = {key: mapped_tensor(contents, entry) for key, entry in ours.items()}
    with _refused_if_damaged(path):
        concepts = read_ledger({KEY: table["concepts"]}, path)
        rest = (tensors, _all_pictures(table, tensors), table["version"])
        prompts = [_prompt(number, fields, concepts, *rest) for number, fields in enumerate(table["prompts"])]
        random = _random_contexts(table[_RANDOM], *rest) if table["version"] == _WITH_CONTEXTS else None
    if len({old.text for old in prompts}) < len(prompts):
        raise InputError(f"{path} is damaged: it lists a prompt twice")
    fits = all(_fits([old.text_SD], old.kept, model) for old in prompts)
    if not (table["base"].is_same(base) and fits and (random is None or _fits(_texts_of(random), random.kept, model))):
        raise InputError(
            f"{path} holds reference predictions of another base model than --dit's (merged, or otherwise finetuned?): "
            "leave it out"
        )
    for key, values in tensors.items():
        _check_finite(values, key, path)
    if random and isinstance(random.texts, DrawnContexts):
        _check_drawn_alike(random.texts, tensors[_context_key(0)], path)
    return Recorded(prompts, random)


@contextmanager
def _refused_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path} is damaged: its list of predictions ({ANSWERS_KEY}) cannot be read") from None


def _check_drawn_alike(texts: DrawnContexts, stored_SD: Tensor, path: Path) -> None:
    """InputError where random numbers come out otherwise than where the predictions were recorded."""
    again_SD = texts[0]
    is_alike = again_SD.shape == stored_SD.shape and (
        (again_SD.float() - stored_SD.float()).norm() <= _DRAWN_ALIKE * stored_SD.float().norm()
    )
    if not is_alike:  # also where the distance is NaN
        raise InputError(
            f"{path}: its random contexts cannot be drawn again: it is damaged, or this version of PyTorch draws other "
            "random numbers than the one that recorded it; leave the file out, or use that version"
        )


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
    with _refused_if_damaged(path):
        table = json.loads(metadata[ANSWERS_KEY])
        version, table["base"] = table["version"], BaseModel(str(table["base"]), tuple(table.get("base_values", ())))
    if type(version) is not int or version not in (_VERSION, _WITH_PICTURES, _WITH_CONTEXTS):
        found = version if isinstance(version, int) else f"of type {type(version).__name__}"
        raise InputError(
            f"{path} has version {str(found)[:20]}, this program reads {_VERSION} to {_WITH_CONTEXTS}: update it"
        )
    return tensors, table


def _texts_of(random: RandomContexts) -> Sequence[Tensor]:
    """Encoded texts of the file: those of all contexts, or the captions that they are drawn like."""
    if isinstance(random.texts, DrawnContexts):
        statistics = random.texts.statistics
        return statistics.tokens_TD.split(list(statistics.lengths))
    return random.texts


def _fits(texts: Iterable[Tensor], kept: Iterable[Answer], model: WanConfig) -> bool:
    if any(len(text_SD) > model.text_len or text_SD.shape[1] != model.text_dim for text_SD in texts):
        return False
    for channels, *sides in {answer.shape for answer in kept}:
        if channels != model.out_dim or any(side % patch for side, patch in zip(sides, model.patch_size, strict=True)):
            return False
    if any(answer.starts_clean for answer in kept) and not model.starts_from_latents:
        return False
    return all((answer.pictures and answer.pictures.shapes) == picture_shapes(model, answer.shape) for answer in kept)


def write_answers(
    path: Path,
    base: BaseModel,
    run: str,
    asked: Sequence[tuple[OldPrompt, Sequence[Question]]],
    new: Iterator[Answer],
    random: tuple[RandomContexts, Sequence[Question]] | None = None,
) -> None:
    """Writes the encoded prompts, each with its recorded predictions, then those of its questions, in order from `new`.

    After them the `random` contexts with theirs. SliceError if the file cannot be written, InputError if a value is not
    finite; what was at `path` then stays.
    """
    concepts = list(dict.fromkeys(old.concept for old, _ in asked if old.concept))
    rows = {str(number): [*old.kept, *questions] for number, (old, questions) in enumerate(asked)}
    of_random = [] if random is None else [*random[0].kept, *random[1]]
    rows |= {_RANDOM: of_random} if of_random else {}
    given = list(shared_pictures(answer for row in rows.values() for answer in row))
    tells = bool(given) or any(answer.starts_clean for row in rows.values() for answer in row)
    version = _WITH_CONTEXTS if of_random else _WITH_PICTURES if tells else _VERSION
    told = {key: _told(row, None if version == _VERSION else given) for key, row in rows.items()}
    prompts = [
        {"text": old.text, "concept": concepts.index(old.concept) if old.concept else None, **told[str(number)]}
        for number, (old, _) in enumerate(asked)
    ]
    table = {"version": version, "base": base.identity, "base_values": base.values, "run": run}
    table |= {"concepts": ledger_text(concepts), "prompts": prompts}
    texts = {str(number): {f"{number}.text": old.text_SD.bfloat16()} for number, (old, _) in enumerate(asked)}
    if of_random:
        texts[_RANDOM], drawn = _stored_contexts(random[0].texts)
        table[_RANDOM] = {**told[_RANDOM], **drawn}
    tensors = _stored_tensors(given, texts, rows)
    write_safetensors(path, tensors, {ANSWERS_KEY: json.dumps(table)}, _chunks(path, given, texts, rows, new))


def _told(row: Sequence[Answer | Question], given: Sequence[PictureSource] | None) -> dict[str, list]:
    """What the list says of each prediction; of what the model was given beside noise and text where that is listed."""
    told = {"timesteps": [answer.t for answer in row]}
    if given is None:
        return told
    numbers = {own: number for number, own in enumerate(given)}
    pictures = [answer.pictures and numbers[answer.pictures] for answer in row]
    return told | {"pictures": pictures, "starts_clean": [answer.starts_clean for answer in row]}


def _stored_contexts(texts: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Tensors of random contexts, and what the list says of them: the smaller of what they are drawn from and they."""
    if isinstance(texts, DrawnContexts):
        tokens_TD, first_SD = texts.statistics.tokens_TD, texts[0]
        if len(tokens_TD) + len(first_SD) < sum(map(len, texts)):
            drawn = {"seed": texts.seed, "lengths": list(texts.statistics.lengths)}
            return {f"{_RANDOM}.tokens": tokens_TD, _context_key(0): first_SD}, drawn
    return {_context_key(number): text_SD.bfloat16() for number, text_SD in enumerate(texts)}, {}


def _context_key(number: int) -> str:
    return f"{_RANDOM}.{number}.text"


def _stored_tensors(
    given: Sequence[PictureSource],
    texts: Mapping[str, Mapping[str, Tensor]],
    rows: Mapping[str, Sequence[Answer | Question]],
) -> dict[str, StoredTensor]:
    """All tensors of the file, in the order of _chunks."""
    tensors = {}
    for number, own in enumerate(given):
        for key, shape in zip(_picture_keys(number), own.shapes, strict=True):
            if shape is not None:
                tensors[key] = StoredTensor(key, "F16", list(shape), 2 * math.prod(shape))
    for row_key, row in rows.items():
        for key, text_SD in texts[row_key].items():
            tensors[key] = StoredTensor(key, "BF16", list(text_SD.shape), text_SD.nbytes)
        for place, answer in enumerate(row):
            for key in (f"{row_key}.{place}.noisy", f"{row_key}.{place}.velocity"):
                tensors[key] = StoredTensor(key, "F16", list(answer.shape), answer_bytes(answer.shape) // 2)
    return tensors


def _picture_keys(number: int) -> tuple[str, str]:
    return f"pictures.{number}.y", f"pictures.{number}.clip"


def _chunks(
    path: Path,
    given: Sequence[PictureSource],
    texts: Mapping[str, Mapping[str, Tensor]],
    rows: Mapping[str, Sequence[Answer | Question]],
    new: Iterator[Answer],
) -> Iterator[bytes]:
    for source in given:
        own = source.read()
        for values in (own.y_CFHW, own.clip_PI):
            if values is not None:
                _check_finite(values.half(), "what the model is given of pictures", path)
                yield _bytes(values.half())
    for row_key, row in rows.items():
        for text_SD in texts[row_key].values():
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
    text, place = fields["text"], fields["concept"]
    if not isinstance(text, str):
        raise ValueError
    text.encode()  # ValueError where it has halves of characters
    text_SD = _text(f"{number}.text", tensors)
    kept = _answers(str(number), fields, tensors, given, version)
    return OldPrompt(text, None if place is None else _at(concepts, place), kept, text_SD)


def _random_contexts(
    fields: Mapping, tensors: Mapping[str, Tensor], given: Sequence[Pictures], version: int
) -> RandomContexts:
    """The random contexts of the list; errors as _prompt."""
    kept = _answers(_RANDOM, fields, tensors, given, version)
    if len(kept) > MOST_CONTEXTS:
        raise ValueError
    if "seed" not in fields:
        return RandomContexts(tuple(_text(_context_key(number), tensors) for number in range(len(kept))), kept)
    seed, lengths, tokens_TD = fields["seed"], fields["lengths"], _text(f"{_RANDOM}.tokens", tensors)
    if type(seed) is not int or not 0 <= seed < _MOST_SEED or not isinstance(lengths, list):
        raise ValueError
    if not all(type(length) is int and length > 0 for length in lengths) or sum(lengths) != len(tokens_TD):
        raise ValueError
    _text(_context_key(0), tensors)
    return RandomContexts(DrawnContexts(seed, TokenStatistics(tokens_TD, tuple(lengths)), len(kept)), kept)


def _text(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    text_SD = tensors[key]
    if text_SD.dim() != 2 or text_SD.dtype != torch.bfloat16:
        raise ValueError
    return text_SD


def _answers(
    key: str, fields: Mapping, tensors: Mapping[str, Tensor], given: Sequence[Pictures], version: int
) -> tuple[Answer, ...]:
    """The predictions recorded for a prompt, or at random contexts; there is one at least."""
    times = fields["timesteps"]
    if not (isinstance(times, list) and times):
        raise ValueError
    told = version != _VERSION
    pictures = fields["pictures"] if told else [None] * len(times)
    clean = fields["starts_clean"] if told else [False] * len(times)
    rows = zip(times, pictures, clean, strict=True)  # ValueError where one is longer
    return tuple(_answer(f"{key}.{i}", *row, tensors, given) for i, row in enumerate(rows))


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
