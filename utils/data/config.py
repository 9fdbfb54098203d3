"""The dataset file (toml or json) as frozen dataclasses; every mistake in it is named."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from utils.data.sizes import nearest_multiples
from utils.data.sources import (
    CAPTION_MODES,
    FRAME_EXTRACTIONS,
    AnyDataset,
    DatasetConfig,
    ImageDataset,
    VideoDataset,
)
from utils.files import file_name, names_text, quoted, readable
from utils.pixels.rates import FILE_RATE
from utils.text_files import escaped_path, read_json, read_toml
from wan.configs import NO_CONDITIONS, WAN_2_1_VAE, Conditions, LatentLayout
from wan.errors import InputError
from wan.values import hidden_problem, nearest, outer_space_problem

_MOST = 1_000_000  # of anything that is counted; batches, repeats and frames stay far below
_BYTES_OF_A_PIXEL = 12  # as the VAE reads it: three fp32 values


def read_dataset_config(
    path: Path, latents: LatentLayout = WAN_2_1_VAE, conditions: Conditions = NO_CONDITIONS
) -> DatasetConfig:
    """All datasets of the file; a key that a dataset lacks comes from [general], else from the defaults.

    `latents` and `conditions` are those of the model that is trained: sizes and frame rates follow from them, and what
    is cached. InputError names the table and the key, and says what is allowed there.
    """
    is_json = path.suffix.lower() == ".json"
    tables = _table(read_json(path, "dataset file"), str(path)) if is_json else read_toml(path)
    unknown = sorted(set(tables) - {"general", "datasets"})
    if unknown:
        hint = nearest(unknown[0], ("general", "datasets"))
        raise InputError(
            f"{path}: unknown {names_text(unknown)}{hint}; a dataset file has [general] and [[datasets]] only"
        )
    shared = _without_empty(_table(tables.get("general", {}), f"{path} [general]"))
    general = _values(shared, _GENERAL, f"{path} [general]")
    held_out = general.pop("validation_split", 0.0)
    entries = tables.get("datasets", [])
    if isinstance(entries, dict) and not is_json:
        raise InputError(f"{path}: [datasets] needs double brackets, [[datasets]], because there may be several")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no [[datasets]] table; at least one is needed")
    model = {"latents": latents, "conditions": conditions}
    datasets = [
        _dataset(_table(entry, where), {**general, **model}, where)
        for number, entry in enumerate(entries, 1)
        for where in [f"{path} [[datasets]] number {number}"]
    ]
    _refuse_shared_caches(datasets, path)
    return DatasetConfig(path, tuple(datasets), held_out)


def _table(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a table of keys, not {quoted(value)}")
    return value


def _dataset(table: dict, general: dict, where: str) -> AnyDataset:
    table = _without_empty(table)
    is_video = bool({"video_directory", "video_jsonl_file"} & set(table))
    kind = "video" if is_video else "image"
    values = {**general, **_values(table, _VIDEO if is_video else _IMAGE, where)}
    folder, lines = values.get(f"{kind}_directory"), values.get(f"{kind}_jsonl_file")
    if (folder is None) == (lines is None):
        keys = "image_directory, image_jsonl_file, video_directory, video_jsonl_file"
        raise InputError(f"{where} needs one of {keys}; it has {'none' if folder is None else 'two'}")
    if folder is not None and values.get("caption_extension") is None:
        raise InputError(f'{where}: {kind}_directory needs caption_extension, for example ".txt"')
    if lines is not None and values.get("cache_directory") is None:
        raise InputError(f"{where}: {kind}_jsonl_file needs cache_directory, the folder for its cache files")
    for key in ("recursive", "caption_mode"):
        if lines is not None and key in table:
            raise InputError(f"{where}: {key} is for {kind}_directory; leave it out")
    _check_masks(values, folder, where)
    values["cache_directory"] = values.get("cache_directory", folder)
    dataset = (VideoDataset if is_video else ImageDataset)(**values)
    _check_resolution(dataset, where)
    if isinstance(dataset, VideoDataset):
        _check_target_frames(dataset, where)
    return dataset


def _check_masks(values: Mapping, folder: Path | None, where: str) -> None:
    masks = values.get("mask_directory")
    if masks and values.get("alpha_mask"):
        raise InputError(f"{where}: mask_directory and alpha_mask contradict each other: give one of them")
    if masks and folder and os.path.realpath(masks) == os.path.realpath(folder):
        raise InputError(f"{where}: mask_directory must be another folder than that of the pictures or videos")


def _values(table: Mapping, schema: Mapping[str, Callable], where: str) -> dict:
    for key in table:
        if key not in schema:
            _refuse_key(key, schema, where)
    return {key: schema[key](value, f"{where}: {key}") for key, value in table.items()}


def _without_empty(table: Mapping) -> dict:
    """The table without known keys that hold an empty text: graphical programs write so those that are not used."""
    known = {*_GENERAL, *_IMAGE, *_VIDEO, *_UNSUPPORTED}
    return {key: value for key, value in table.items() if value != "" or key not in known}


def _refuse_key(key: str, schema: Mapping[str, Callable], where: str) -> None:
    if key in _UNSUPPORTED:
        raise InputError(f"{where}: {key} is not supported: {_UNSUPPORTED[key]}; leave it out")
    if key in _VIDEO or key in _IMAGE:
        place = "[[datasets]] tables" if schema is _GENERAL else "video datasets" if key in _VIDEO else "image datasets"
        raise InputError(f"{where}: {key} belongs in {place}; allowed here: {names_text(sorted(schema))}")
    raise InputError(
        f"{where}: unknown key {names_text([key])}{nearest(key, schema)}; allowed here: {names_text(sorted(schema))}"
    )


def _check_resolution(dataset: AnyDataset, where: str) -> None:
    multiple = dataset.latents.pixel_multiple
    if min(dataset.resolution) < multiple:
        raise InputError(
            f"{where}: resolution {list(dataset.resolution)}: each side must be from {multiple} to {_MOST} pixels"
        )
    # With buckets the resolution is only an area; without them it is the size itself.
    wrong = [side for side in dataset.resolution if side % multiple]
    if wrong and not dataset.enable_bucket:
        raise InputError(
            f"{where}: resolution {list(dataset.resolution)} must be multiples of {multiple}: instead of {wrong[0]} "
            f"use {nearest_multiples(wrong[0], multiple)}, or set enable_bucket = true"
        )
    width, height = dataset.resolution
    # A "full" clip is as long as its video, which may be far below max_frames.
    has_targets = isinstance(dataset, VideoDataset) and dataset.frame_extraction != "full"
    frames, memory = max(dataset.target_frames) if has_targets else 1, psutil.virtual_memory().total
    if (needed := width * height * frames * _BYTES_OF_A_PIXEL) > memory:
        raise InputError(
            f"{where}: {frames} frames at {width}x{height} take {readable(needed)} before they are encoded, and this "
            f"computer has {readable(memory)}: choose a smaller resolution or fewer frames"
        )


def _check_target_frames(dataset: VideoDataset, where: str) -> None:
    for frames in dataset.target_frames:
        below, stride = dataset.latents.whole_frames(frames), dataset.latents.frame_stride
        if frames != below:
            raise InputError(
                f"{where}: target_frames must be of the form {stride}n+1: instead of {frames} use {below} or "
                f"{below + stride}"
            )


def _refuse_shared_caches(datasets: list[AnyDataset], path: Path) -> None:
    numbers: dict[str, int] = {}
    for number, dataset in enumerate(datasets, 1):
        folder = os.path.realpath(dataset.cache_directory)
        first = numbers.setdefault(os.path.normcase(folder), number)
        if first < number:
            raise InputError(
                f"{path}: datasets {first} and {number} share the cache folder {folder}; each needs its own: set "
                "cache_directory"
            )
    for number, dataset in enumerate(datasets, 1):
        _refuse_caches_within(number, dataset, numbers, path)


def _refuse_caches_within(number: int, dataset: AnyDataset, numbers: Mapping[str, int], path: Path) -> None:
    """Caches of a recursive dataset lie in subfolders too, where those of another one would be taken for its own."""
    own = Path(os.path.normcase(os.path.realpath(dataset.cache_directory)))
    for folder, other in numbers.items():
        if dataset.recursive and other != number and own in Path(folder).parents:
            raise InputError(
                f"{path}: the cache folder of dataset {other} is in that of dataset {number}, which is recursive: set "
                "another cache_directory"
            )


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST


def _count(value, where: str) -> int:
    if not _is_count(value):
        raise InputError(f"{where} must be a whole number from 1 to {_MOST}, not {quoted(value)}")
    return value


def _flag(value, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where} must be true or false, not {quoted(value)}")
    return value


def _text(value, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} must be text in quotes, not {quoted(value)}")
    return value


def _path(value, where: str) -> Path:
    if "\0" in _text(value, where):
        raise InputError(f"{where} cannot be a path: {quoted(value)}")
    if hint := escaped_path(value, in_json=where.partition(" [[datasets]]")[0].lower().endswith(".json")):
        raise InputError(f"{where} is {quoted(value)}: {hint}")
    if not os.path.lexists(value) and (problem := hidden_problem(value) or outer_space_problem(value)):
        raise InputError(f"{where}: {problem}")
    return Path(value)


def _extension(value, where: str) -> str:
    if file_name(f"a{_text(value, where)}") != f"a{value}":
        raise InputError(f'{where} must be the end of a file name, for example ".txt", not {quoted(value)}')
    return value


def _resolution(value, where: str) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(map(_is_count, sides)):
        raise InputError(f"{where} must be one whole number or [width, height], in pixels, not {quoted(value)}")
    return sides[0], sides[1]


def _target_frames(value, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} must be a list of whole numbers, for example [1, 25, 45], not {quoted(value)}")
    return tuple(sorted({_count(frames, where) for frames in value}))


def _one_of(allowed: Sequence[str]) -> Callable[[object, str], str]:
    def read(value, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise InputError(f"{where} must be one of {', '.join(allowed)}, not {quoted(value)}")
        return value

    return read


def _fps(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise InputError(
            f'{where} must be a number above 0 (up to {_MOST}), for example 30, or "{FILE_RATE}", not {quoted(value)}'
        )
    return float(value)


def _rate(value, where: str) -> float | str:
    return FILE_RATE if value == FILE_RATE else _fps(value, where)


def _colour(value, where: str) -> tuple[int, int, int]:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[1:]))
    if value in ("white", "black"):
        return (255, 255, 255) if value == "white" else (0, 0, 0)
    is_triple = isinstance(value, list) and len(value) == 3
    if is_triple and all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in value):
        return tuple(value)
    raise InputError(
        f'{where} must be "white", "black", "#rrggbb" or [red, green, blue] with numbers from 0 to 255, '
        f"not {quoted(value)}"
    )


def _dropout(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{where} must be a number from 0 to 1, not {quoted(value)}")
    return float(value)


def _share(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{where} must be a number from 0 up to, but not including, 1, not {quoted(value)}")
    return float(value)


_SHARED = {
    "resolution": _resolution,
    "caption_extension": _extension,
    "batch_size": _count,
    "num_repeats": _count,
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
    "background": _colour,
    "recursive": _flag,
    "caption_mode": _one_of(CAPTION_MODES),
    "caption_prefix": _text,
    "caption_dropout_rate": _dropout,
}
_GENERAL = {**_SHARED, "validation_split": _share}
_IMAGE = {
    **_SHARED,
    "image_directory": _path,
    "image_jsonl_file": _path,
    "cache_directory": _path,
    "mask_directory": _path,
    "alpha_mask": _flag,
}
_VIDEO = {
    **_SHARED,
    "video_directory": _path,
    "video_jsonl_file": _path,
    "cache_directory": _path,
    "mask_directory": _path,
    "target_frames": _target_frames,
    "frame_extraction": _one_of(FRAME_EXTRACTIONS),
    "frame_stride": _count,
    "frame_sample": _count,
    "max_frames": _count,
    "source_fps": _rate,
}
_CONTROL = "it is for control models, which cannot be trained; image-to-video models start from each clip's first frame"
_FRAME_PACK = "it is for FramePack's one-frame training; this trains Wan"
_EDIT_MODEL = "it is for picture-editing models; this trains Wan"
_UNSUPPORTED = {
    "control_directory": _CONTROL,
    "multiple_target": _EDIT_MODEL,
    "no_resize_control": _CONTROL,
    "control_resolution": _CONTROL,
    "fp_latent_window_size": _FRAME_PACK,
    "fp_1f_clean_indices": _FRAME_PACK,
    "fp_1f_target_index": _FRAME_PACK,
    "fp_1f_no_post": _FRAME_PACK,
    "flux_kontext_no_resize_control": _EDIT_MODEL,
    "qwen_image_edit_no_resize_control": _EDIT_MODEL,
    "qwen_image_edit_control_resolution": _EDIT_MODEL,
}
