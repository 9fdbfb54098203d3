"""Latent and text caches on disk, in the format of musubi-tuner.

The names, keys and metadata are those that musubi-tuner writes for Wan, so that either program reads the other's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils import locks
from utils.data.origins import Origin, made_by_in, made_by_metadata, origin_in, without_origin
from utils.files import file_problem, quoted
from utils.locks import UNFINISHED
from utils.slice_saving import whole_file
from wan.errors import InputError
from wan.safetensors_header import TensorEntry, read_file_header

_FORMAT = {"architecture": "wan", "format_version": "1.0.1"}
# Digits are bounded: a stray file with a huge position would have as many windows looked for.
_LATENTS_NAME = re.compile(r"(.+)_([0-9]{4,6})x([0-9]{4,6})_wan\.safetensors", re.DOTALL)
_CLIP_STEM = re.compile(r"(.+)_([0-9]{5,6})-([0-9]{3,5})", re.DOTALL)
_LATENTS_KEY = re.compile(r"latents_(\d+)x(\d+)x(\d+)_\w+")
# What image-to-video models read besides: the given pictures as latents, and their CLIP tokens.
_CONDITION_KEY = re.compile(r"latents_image_(\d+)x(\d+)x(\d+)_\w+")
_CLIP_KEY = re.compile(r"clip_\w+")
_TEXT_KEY = re.compile(r"varlen_t5_\w+")
# Captions after the first. musubi-tuner reads them into its batches too, where nothing looks at them; "varlen" keeps it
# from stacking them.
_FURTHER_KEY = re.compile(r"varlen_caption([1-9]\d{0,5})_\w+")
# musubi-tuner reads it as it does further captions.
_MASK_KEY = re.compile(r"varlen_loss_mask_\w+")
_CAPTION = re.compile(r"caption\d+")
_DTYPES = ("F32", "F16", "BF16")
_LATENTS_AXES, _TEXT_AXES = "[channels, frames, height, width]", "[tokens, width]"


@dataclass(frozen=True)
class CachedClip:
    """What the name of a video's latent cache says: the first frame, the number of frames, the size in pixels."""

    path: Path
    start: int
    frames: int
    size: tuple[int, int]


def image_latents_path(folder: Path, stem: str, size: tuple[int, int]) -> Path:
    """The cache file of a picture's latents; `size` is the picture's own (width, height)."""
    return folder / f"{stem}_{size[0]:04d}x{size[1]:04d}_wan.safetensors"


def clip_latents_path(folder: Path, stem: str, start: int, frames: int, size: tuple[int, int]) -> Path:
    """The cache file of a clip's latents; `size` is the (width, height) that it was resized to."""
    return image_latents_path(folder, f"{stem}_{start:05d}-{frames:03d}", size)


def text_path(folder: Path, stem: str) -> Path:
    """The cache file of the encoded caption of a picture or video."""
    return folder / f"{stem}_wan_te.safetensors"


def latents_files(folder: Path, recursive: bool = False) -> list[Path]:
    """All latent caches of a folder, and of its subfolders if asked for, sorted."""
    return [path for path in _files(folder, "*_wan.safetensors", recursive) if _LATENTS_NAME.fullmatch(path.name)]


def text_files(folder: Path, recursive: bool = False) -> list[Path]:
    """All text caches of a folder, and of its subfolders if asked for, sorted."""
    return _files(folder, "*_wan_te.safetensors", recursive)


def remove_unfinished(folder: Path, ending: str, recursive: bool = False) -> None:
    """Deletes the unfinished caches of jobs that were killed; `ending` is _wan or _wan_te."""
    locks.remove_unfinished(_found(folder, f"*{ending}.safetensors*{UNFINISHED}", recursive))


def parse_image_name(path: Path, folder: Path) -> tuple[str, tuple[int, int]]:
    """The source's stem, from `folder` on, and the (width, height) in the name of one of latents_files."""
    stem, width, height = _LATENTS_NAME.fullmatch(path.name).groups()
    return (path.parent.relative_to(folder) / stem).as_posix(), (int(width), int(height))


def parse_clip_name(path: Path, folder: Path) -> tuple[str, CachedClip] | None:
    """The video's stem, from `folder` on, and the clip in the name of one of latents_files; None if a picture's."""
    stem, size = parse_image_name(path, folder)
    clip = _CLIP_STEM.fullmatch(stem)
    return (clip[1], CachedClip(path, int(clip[2]), int(clip[3]), size)) if clip else None


def is_cache(path: Path) -> bool:
    """Whether what a file holds, not only its name, is a cache for Wan: ours, or musubi-tuner's."""
    try:
        entries, metadata = read_file_header(path)
    except InputError:
        return False
    is_named = any(_LATENTS_KEY.fullmatch(key) or _TEXT_KEY.fullmatch(key) for key in entries)
    return is_named and metadata.get("architecture") == _FORMAT["architecture"]


def write_latents(
    path: Path,
    latents_CFHW: torch.Tensor,
    size: tuple[int, int],
    frame_count: int | None = None,
    origin: Origin | None = None,
    mask_HW: torch.Tensor | None = None,
    condition_CFHW: torch.Tensor | None = None,
    clip_PI: torch.Tensor | None = None,
) -> None:
    """Writes one item's latents in their dtype; `size` is the one in the name, `frame_count` is for videos.

    `mask_HW` weights the loss of each latent pixel; `condition_CFHW` and `clip_PI` are the given pictures, as latents
    after their mask and as CLIP tokens. InputError if a file that is not a cache is in the way.
    """
    _refuse_others_file(path, _LATENTS_KEY)
    frames, height, width = latents_CFHW.shape[1:]
    size_and_dtype = f"{frames}x{height}x{width}_{_dtype_name(latents_CFHW)}"
    tensors = {f"latents_{size_and_dtype}": latents_CFHW}
    if condition_CFHW is not None:
        tensors[f"latents_image_{size_and_dtype}"] = condition_CFHW
    if clip_PI is not None:
        tensors[f"clip_{_dtype_name(latents_CFHW)}"] = clip_PI  # the latents' dtype there too, whatever its own is
    if mask_HW is not None:
        tensors[f"varlen_loss_mask_{_dtype_name(mask_HW)}"] = mask_HW
    metadata = {**_FORMAT, "width": str(size[0]), "height": str(size[1])}
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    if origin is not None:
        metadata |= origin.metadata()
    _write(path, tensors, metadata)


def write_text(
    path: Path,
    text_SD: torch.Tensor,
    caption: str,
    made_by: Mapping[str, str] | None = None,
    further: Sequence[tuple[str, torch.Tensor]] = (),
) -> None:
    """Writes the encoded tokens of a caption, and of further ones under names of their own.

    Other tensors in an existing cache are kept, if it can be read. InputError if a file that is not a cache is in the
    way.
    """
    _refuse_others_file(path, _TEXT_KEY)
    tensors, metadata = _other_tensors(path)
    tensors[f"varlen_t5_{_dtype_name(text_SD)}"] = text_SD
    captions = {"caption1": caption}
    for number, (text, encoded_SD) in enumerate(further, 2):
        tensors[f"varlen_caption{number}_{_dtype_name(encoded_SD)}"] = encoded_SD
        captions[f"caption{number}"] = text
    _write(path, tensors, {**metadata, **_FORMAT, **captions, **made_by_metadata(made_by or {})})


def read_latents(path: Path) -> torch.Tensor:
    """[C, F, H, W] in the file's dtype; InputError names a file that is damaged or holds NaN or infinity."""
    return _read(path, latents_header(path)[0])


def read_condition(path: Path) -> torch.Tensor:
    """[4 + C, F, H, W] in the file's dtype: a mask, then the latents of the given pictures. Errors as read_latents."""
    entry = _only_entry(path, _header(path)[0], _CONDITION_KEY, "latents_image", _LATENTS_AXES)
    return _read(path, entry)


def read_clip(path: Path) -> torch.Tensor:
    """[P, I] in the file's dtype: the CLIP tokens of the given pictures. Errors as read_latents."""
    return _read(path, _only_entry(path, _header(path)[0], _CLIP_KEY, "clip", _TEXT_AXES))


def read_mask(path: Path) -> torch.Tensor:
    """[H, W] float32: how much each latent pixel of a cache is trained on, from 0 to 1. Errors as read_latents."""
    entries, _ = _header(path)
    mask_HW = _read(path, _only_entry(path, entries, _MASK_KEY, "mask", "[height, width]")).float()
    if not (mask_HW.min() >= 0 and 0 < mask_HW.max() <= 1):
        raise InputError(f"{path} holds a mask whose values are not from 0 to 1: delete it and cache again")
    return mask_HW


def has_mask(path: Path) -> bool:
    """Whether a latent cache holds a mask; InputError if it cannot be read."""
    return any(map(_MASK_KEY.fullmatch, _header(path)[0]))


def read_text(path: Path, caption: str | None = None) -> torch.Tensor:
    """[S, D] in the file's dtype: the tokens of `caption`, or of the file's first one.

    InputError names a file that is damaged, holds NaN or infinity, or lacks the caption.
    """
    (first, *further), _ = text_header(path)
    if caption is None or first.caption in (None, caption):
        return _read(path, first.entry)
    found = next((text for text in further if text.caption == caption), None)
    if found is None:
        raise InputError(f"{path} lacks the caption {quoted(caption)}: cache the captions again")
    return _read(path, found.entry)


def latents_header(path: Path) -> tuple[TensorEntry, dict[str, str]]:
    """The entry of a cache's latents, and the file's metadata; InputError if they cannot be trained on."""
    entries, metadata = _header(path)
    return _only_entry(path, entries, _LATENTS_KEY, "latents", _LATENTS_AXES), metadata


def latents_shape(path: Path) -> tuple[int, ...]:
    """(C, F, H, W) from the file's header; InputError if that is not a latent to train on."""
    return latents_header(path)[0].shape


def condition_shape(path: Path) -> tuple[int, ...] | None:
    """The shape of read_condition from the file's header, None if it holds none; errors as latents_shape."""
    return _shape(path, _CONDITION_KEY, "latents_image", _LATENTS_AXES)


def clip_shape(path: Path) -> tuple[int, ...] | None:
    """The shape of read_clip from the file's header, None if it holds none; errors as latents_shape."""
    return _shape(path, _CLIP_KEY, "clip", _TEXT_AXES)


@dataclass(frozen=True)
class CachedText:
    """The tensor of one caption's tokens; the caption is None where the file does not tell it."""

    entry: TensorEntry
    caption: str | None


def text_header(path: Path) -> tuple[list[CachedText], dict[str, str]]:
    """The captions of a text cache and its metadata; InputError if one cannot be trained on."""
    entries, metadata = _header(path)
    first = _only_entry(path, entries, _TEXT_KEY, "text", _TEXT_AXES)
    numbered = {int(found[1]): name for name in entries if (found := _FURTHER_KEY.fullmatch(name))}
    further = [CachedText(entries[name], metadata.get(f"caption{number}")) for number, name in sorted(numbered.items())]
    for text in further:
        _check_entry(path, text.entry, "text", _TEXT_AXES)
        if text.entry.shape[1] != first.shape[1]:
            raise InputError(f"{path} holds captions of two widths, {first.shape[1]} and {text.entry.shape[1]}")
    return [CachedText(first, metadata.get("caption1")), *further], metadata


def text_shapes(path: Path) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each caption, None where the file does not tell it, with the shape (S, D) of its tokens; errors as latents_shape.

    The first one is where musubi-tuner looks.
    """
    return [(text.caption, text.entry.shape) for text in text_header(path)[0]]


def latents_origin(path: Path) -> Origin | None:
    """What a latent cache was made of and by; None if it does not say so. InputError as latents_shape."""
    return origin_in(latents_header(path)[1])


def made_by_of(path: Path) -> Mapping[str, str]:
    """By what a cache was made, as far as it can be read and says so."""
    try:
        return made_by_in(read_file_header(path)[1])
    except InputError:
        return {}


def _refuse_others_file(path: Path, key: re.Pattern) -> None:
    """InputError for a file that can be read and is something else; a damaged one may have been a cache."""
    try:
        entries, _ = read_file_header(path)
    except InputError:
        return
    if not any(map(key.fullmatch, entries)):
        raise InputError(f"{path} has the name of a cache file but is not one: move it, or set another cache_directory")


def _files(folder: Path, pattern: str, recursive: bool) -> list[Path]:
    return sorted(path for path in _found(folder, pattern, recursive) if file_problem(path) is None)


def _found(folder: Path, pattern: str, recursive: bool) -> Iterable[Path]:
    return folder.rglob(pattern) if recursive else folder.glob(pattern)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _other_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        entries, metadata = read_file_header(path)
        keys = [key for key in entries if not (_TEXT_KEY.fullmatch(key) or _FURTHER_KEY.fullmatch(key))]
        kept = {key: value for key, value in without_origin(metadata).items() if not _CAPTION.fullmatch(key)}
        return {key: _tensor(path, key) for key in keys}, kept
    except InputError:  # missing, or damaged and therefore cached again
        return {}, {}


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # the cache folder of a recursive dataset has its subfolders
    with whole_file(path) as file:
        file.write(save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata))


def _read(path: Path, entry: TensorEntry) -> torch.Tensor:
    tensor = _tensor(path, entry.key)
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path} holds NaN or infinity: delete it and cache again")
    return tensor


def _tensor(path: Path, key: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            # A copy, because Windows cannot replace a file that is still mapped.
            return file.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and cache again") from None


def _header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        return read_file_header(path)
    except InputError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise InputError(f"{path} is not a readable cache file: {reason}") from None


def _shape(path: Path, key: re.Pattern, what: str, axes: str) -> tuple[int, ...] | None:
    entries = _header(path)[0]
    return _only_entry(path, entries, key, what, axes).shape if any(map(key.fullmatch, entries)) else None


def _only_entry(path: Path, entries: Mapping[str, TensorEntry], key: re.Pattern, what: str, axes: str) -> TensorEntry:
    """The one tensor whose name matches `key`."""
    found = [entry for name, entry in entries.items() if key.fullmatch(name)]
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} {what} tensors for Wan, not one")
    _check_entry(path, found[0], what, axes)
    return found[0]


def _check_entry(path: Path, entry: TensorEntry, what: str, axes: str) -> None:
    if entry.dtype not in _DTYPES:
        raise InputError(f"{path} holds {what} as {entry.dtype}; allowed: {', '.join(_DTYPES)}")
    if len(entry.shape) != axes.count(",") + 1 or not all(entry.shape):
        raise InputError(f"{path} holds {what} of shape {list(entry.shape)}; {axes} is expected, none of them 0")
