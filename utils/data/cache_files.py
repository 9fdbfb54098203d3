"""Latent and text caches on disk, in the format of musubi-tuner.

The names, keys and metadata are those that musubi-tuner writes for Wan, so that either program reads the other's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.slice_saving import UNFINISHED, whole_file
from wan.errors import InputError
from wan.safetensors_header import read_file_header

_FORMAT = {"architecture": "wan", "format_version": "1.0.1"}
_LATENTS_NAME = re.compile(r"(.+)_(\d{4,})x(\d{4,})_wan\.safetensors")
_CLIP_STEM = re.compile(r"(.+)_(\d{5,})-(\d{3,})")
_LATENTS_KEY = re.compile(r"latents_(\d+)x(\d+)x(\d+)_\w+")
_TEXT_KEY = re.compile(r"varlen_t5_\w+")


@dataclass(frozen=True)
class CachedClip:
    """What the name of a video's latent cache tells: the first frame, the number of frames, the size in pixels."""

    path: Path
    start: int
    frames: int
    size: tuple[int, int]


def image_latents_path(folder: Path, stem: str, size: tuple[int, int]) -> Path:
    """Where a picture's latents lie; `size` is the picture's own (width, height)."""
    return folder / f"{stem}_{size[0]:04d}x{size[1]:04d}_wan.safetensors"


def clip_latents_path(folder: Path, stem: str, start: int, frames: int, size: tuple[int, int]) -> Path:
    """Where a clip's latents lie; `size` is the (width, height) that it was brought to."""
    return image_latents_path(folder, f"{stem}_{start:05d}-{frames:03d}", size)


def text_path(folder: Path, stem: str) -> Path:
    """Where the encoded caption of a picture or video lies."""
    return folder / f"{stem}_wan_te.safetensors"


def latents_files(folder: Path) -> list[Path]:
    """All latent caches of a folder, sorted."""
    return sorted(path for path in folder.glob("*_wan.safetensors") if _LATENTS_NAME.fullmatch(path.name))


def text_files(folder: Path) -> list[Path]:
    """All text caches of a folder, sorted."""
    return sorted(folder.glob("*_wan_te.safetensors"))


def remove_unfinished(folder: Path, ending: str) -> None:
    """Deletes caches that a job left half written when it was killed: `ending` is _wan or _wan_te."""
    for path in folder.glob(f"*{ending}.safetensors{UNFINISHED}"):
        path.unlink()


def parse_image_name(path: Path) -> tuple[str, tuple[int, int]]:
    """The stem and the (width, height) in the name of one of latents_files."""
    stem, width, height = _LATENTS_NAME.fullmatch(path.name).groups()
    return stem, (int(width), int(height))


def parse_clip_name(path: Path) -> tuple[str, CachedClip] | None:
    """The video's stem and the clip in the name of one of latents_files; None if it is a picture's."""
    stem, size = parse_image_name(path)
    clip = _CLIP_STEM.fullmatch(stem)
    return (clip[1], CachedClip(path, int(clip[2]), int(clip[3]), size)) if clip else None


def write_latents(
    path: Path, latents_CFHW: torch.Tensor, size: tuple[int, int], frame_count: int | None = None
) -> None:
    """Writes one item's latents in their dtype; `size` is the one in the name, `frame_count` is for videos."""
    frames, height, width = latents_CFHW.shape[1:]
    key = f"latents_{frames}x{height}x{width}_{_dtype_name(latents_CFHW)}"
    metadata = {**_FORMAT, "width": str(size[0]), "height": str(size[1])}
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    _write(path, {key: latents_CFHW}, metadata)


def write_text(path: Path, text_SD: torch.Tensor, caption: str) -> None:
    """Writes the encoded tokens of a caption; what else an existing file holds is kept."""
    kept, metadata = _other_tensors(path) if path.exists() else ({}, {})
    kept[f"varlen_t5_{_dtype_name(text_SD)}"] = text_SD
    _write(path, kept, {**metadata, **_FORMAT, "caption1": caption})


def read_latents(path: Path) -> torch.Tensor:
    """[C, F, H, W] in the file's dtype."""
    return _read(path, _LATENTS_KEY, "latents")


def read_text(path: Path) -> torch.Tensor:
    """[S, D] in the file's dtype."""
    return _read(path, _TEXT_KEY, "text")


def latents_shape(path: Path) -> tuple[int, ...]:
    """(C, F, H, W) as the file's header tells."""
    return _header(path, _LATENTS_KEY, "latents")[0]


def text_header(path: Path) -> tuple[tuple[int, ...], str | None]:
    """The shape (S, D) and the caption that was encoded, None if the file does not tell it."""
    shape, metadata = _header(path, _TEXT_KEY, "text")
    return shape, metadata.get("caption1")


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _other_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with _opened(path) as file:
        keys = [key for key in file.keys() if not _TEXT_KEY.fullmatch(key)]  # noqa: SIM118
        # Copies, because Windows cannot replace a file that is still mapped.
        return {key: file.get_tensor(key).clone() for key in keys}, file.metadata() or {}


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with whole_file(path) as file:
        file.write(save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata))


def _read(path: Path, pattern: re.Pattern, what: str) -> torch.Tensor:
    with _opened(path) as file:
        return file.get_tensor(_only_key(file, pattern, what, path))


def _header(path: Path, pattern: re.Pattern, what: str) -> tuple[tuple[int, ...], dict[str, str]]:
    with _opened(path) as file:
        key = _only_key(file, pattern, what, path)
        return tuple(file.get_slice(key).get_shape()), file.metadata() or {}


def _opened(path: Path):
    try:
        read_file_header(path)
        return safe_open(path, framework="pt")
    except (InputError, SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable cache file: {error}; delete it, then make it again") from None


def _only_key(file, pattern: re.Pattern, what: str, path: Path) -> str:
    keys = [key for key in file.keys() if pattern.fullmatch(key)]  # noqa: SIM118
    if len(keys) != 1:
        raise InputError(f"{path} holds {len(keys)} tensors of {what} for Wan, one is needed; delete it, make it again")
    return keys[0]


LATENT_CHANNELS = 16
FRAME_STRIDE = 4
PIXEL_STRIDE = 8


def latents_problem(cache: Path, source: Path, frames: int, bucket: tuple[int, int]) -> str | None:
    """What is wrong with the latents of `frames` frames brought to `bucket` (width, height); None if nothing is."""
    if not cache.is_file():
        return "has no latent cache"
    width, height = bucket
    wanted = (LATENT_CHANNELS, (frames - 1) // FRAME_STRIDE + 1, height // PIXEL_STRIDE, width // PIXEL_STRIDE)
    found = latents_shape(cache)
    if found != wanted:
        return f"was cached as latents {_times(found)}, the dataset file now asks for {_times(wanted)}"
    if _changed_at(source) > cache.stat().st_mtime_ns:
        return "is newer than its latent cache"
    return None


def text_problem(cache: Path, caption: str) -> str | None:
    """What is wrong with the encoded tokens of a caption; None if nothing is."""
    if not cache.is_file():
        return "has no text cache"
    cached_caption = text_header(cache)[1]
    # A file that does not tell its caption cannot be compared.
    return None if cached_caption in (None, caption) else "has another caption than its text cache"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _changed_at(source: Path) -> int:
    files = source.iterdir() if source.is_dir() else [source]
    return max(file.stat().st_mtime_ns for file in files)
