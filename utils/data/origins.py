"""What a cache was made of and by, as its metadata says it, and whether that is still so.

A cache without this metadata is another program's or an older version's: only times can be compared.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from pathlib import Path

import torch

from utils.data.sources import AnyDataset, VideoDataset
from utils.pixels.media import IMAGE_SUFFIXES, pictures_in
from utils.pixels.remarks import colour_name

PIXEL_RULES = "2"  # to be raised when a file that was readable before gives other pixels
_KEYS = _SOURCE, _MADE_BY = "source_file", "made_by"  # musubi-tuner ignores metadata that it does not know
# What may differ, in the order in which it is told, and how: what was, then what is wanted.
_DIFFERENCES = {
    "pixel_rules": "by older rules for reading pixels",
    "vae_dtype": "with --vae_dtype {}, not {}",
    "vae": "with another VAE",
    "fp8_t5": "with --fp8_t5 {}, not {}",
    "text_encoder": "with another text encoder or tokenizer",
    "bucket": "at {}, not {}",
    "frames": "from the frames {}, not {}",
    "mask": "with another mask",
    "background": "on the background {}, the dataset file now says {}",
    "source_fps": "with source_fps = {}, the dataset file now says {}",
}
_WHOLE = 64 << 20  # bytes of a video up to which all of it is hashed
_PIECES, _PIECE = 16, 1 << 20
_BLOCK = 1 << 20
_VALUES_SAMPLED = 4096  # of each tensor of a model; training it moves them all


@dataclass(frozen=True)
class Origin:
    """What a cache was made of and by.

    `state` is the size and the times of the source, `content` is a hash of it. `made_by` are the settings that decide
    the values, by the names in _DIFFERENCES, and what else was seen when the source was read.
    """

    state: str
    content: str
    made_by: Mapping[str, str]

    def metadata(self) -> dict[str, str]:
        """The entries that say it in a cache's metadata."""
        return {_SOURCE: json.dumps({"state": self.state, "content": self.content}), **made_by_metadata(self.made_by)}


def made_by_metadata(made_by: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a cache whose source is in it, as a caption is."""
    return {_MADE_BY: json.dumps(dict(made_by))} if made_by else {}


def origin_in(metadata: Mapping[str, str]) -> Origin | None:
    """The origin that a latent cache's metadata says; None if it says none."""
    source, made_by = (_table(metadata.get(key)) for key in _KEYS)
    if made_by is None or source is None or not {"state", "content"} <= source.keys():
        return None
    return Origin(source["state"], source["content"], made_by)


def made_by_in(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """By what a cache was made, as far as its metadata says it."""
    return _table(metadata.get(_MADE_BY)) or {}


def without_origin(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a cache's metadata that are about something else."""
    return {key: value for key, value in metadata.items() if key not in _KEYS}


def read_origin(source: Path, made_by: Mapping[str, str]) -> Origin:
    """The origin of what is about to be read from `source`, a file or a folder of pictures."""
    state = file_state(source)  # first: a file that is replaced meanwhile will differ from it
    return Origin(state, content_hash(source), made_by)


def source_changed(origin: Origin, source: Path) -> bool:
    """Whether `source` holds something else than the cache was made of; it is read only if its size or times differ."""
    state = file_state(source)
    return state != origin.state and _content_at(source, state) != origin.content


def difference(made_by: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """How a cache was made otherwise than `wanted`, after "was cached"; None if not, or if it does not say."""
    for name, text in _DIFFERENCES.items():
        if name in made_by and name in wanted and made_by[name] != wanted[name]:
            return text.format(made_by[name], wanted[name])
    return None


def dataset_settings(dataset: AnyDataset) -> dict[str, str]:
    """The settings of a dataset that decide the pixels of its sources, by the names of `made_by`."""
    settings = {"pixel_rules": PIXEL_RULES, "background": colour_name(dataset.background)}
    if isinstance(dataset, VideoDataset):
        fps = dataset.source_fps
        settings["source_fps"] = "none" if fps is None else f"{fps:g}" if isinstance(fps, float) else fps
    return settings


def clip_settings(bucket: tuple[int, int], start: int | None = None, frames: int = 1) -> dict[str, str]:
    """What is special to one picture or clip among the settings by the names of `made_by`."""
    window = {} if start is None else {"frames": f"{start} to {start + frames - 1}"}
    return {"bucket": size_text(bucket), **window}


def size_text(size: tuple[int, int]) -> str:
    """A (width, height) as messages show it."""
    return f"{size[0]}x{size[1]}"


def file_state(source: Path) -> str:
    """The size and the times of a file, or of all pictures of a folder, in a text that is compared only.

    With the time of the last change of its name (Windows: of its creation), because renamed files keep the others.
    """
    if not source.is_dir():
        found = source.stat()
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    states = [f"{path.name} {file_state(path)}" for path in pictures_in(source)]
    return _digest(state.encode() for state in states)


def content_hash(source: Path) -> str:
    """A hash of a picture's bytes, of a folder of pictures, or of a video; of a long video, of pieces all over it."""
    if source.is_dir():
        return _digest(content_hash(path).encode() for path in pictures_in(source))
    size = source.stat().st_size
    is_sampled = size > _WHOLE and source.suffix.lower() not in IMAGE_SUFFIXES
    return _digest(_pieces(source, size) if is_sampled else _blocks(source))


def weights_identity(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of some values of each tensor of a model, the same whatever its file is called and whatever they are."""
    parts = []
    for tensor in tensors:
        sample = tensor.detach().reshape(-1)[:_VALUES_SAMPLED].float().cpu().numpy()
        parts.append(_digest([str((tensor.dtype, tuple(tensor.shape))).encode(), sample.tobytes()]))
    return _digest(part.encode() for part in sorted(parts))


@lru_cache(maxsize=1024)
def _content_at(source: Path, state: str) -> str:
    """content_hash, computed once for the many clips of one video."""
    return content_hash(source)


def _table(text: str | None) -> dict[str, str] | None:
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):  # none, or another program's entry of this name
        return None
    is_table = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if is_table else None


def _blocks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _pieces(path: Path, size: int) -> Iterable[bytes]:
    yield str(size).encode()
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            yield file.read(_PIECE)


def _digest(parts: Iterable[bytes]) -> str:
    # The fastest that every Python has; nobody has a reason to forge a picture of their own.
    digest = sha1(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
