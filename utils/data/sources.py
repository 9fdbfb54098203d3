"""The pictures and clips that a dataset names, with their captions, in one fixed order."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from utils.files import file_problem, folder_entries, names_text, parse_json, path_text, read_text
from wan.errors import InputError

_LONGEST_STEM = 170  # bytes: file systems take 255, and the name of an unfinished cache file is up to 80 longer
_FROM_HERE = "(paths start at the current folder)"
FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


@dataclass(frozen=True)
class ImageDataset:
    """One [[datasets]] table of pictures; the defaults are the toml's."""

    cache_directory: Path
    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str | None = None
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False


@dataclass(frozen=True)
class VideoDataset:
    """One [[datasets]] table of videos; the defaults are the toml's."""

    cache_directory: Path
    video_directory: Path | None = None
    video_jsonl_file: Path | None = None
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str | None = None
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None


AnyDataset = ImageDataset | VideoDataset


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of the file at `path`."""

    path: Path
    datasets: tuple[AnyDataset, ...]
    validation_split: float = 0.0  # share of each dataset's pictures that is held out for validation


@dataclass(frozen=True)
class Source:
    """One captioned picture, or video; the names of its cache files start with `stem`."""

    path: Path
    caption: str

    @property
    def stem(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Sources:
    """A dataset's sources in order of their names, and the pictures left out because they have no caption."""

    found: tuple[Source, ...]
    left_out: tuple[Path, ...] = ()


def list_sources(dataset: AnyDataset, workers: int = 1) -> Sources:
    """A dataset's captioned files, read by `workers` threads.

    InputError if there are none, one cannot be read, or their cache files could not be told apart.
    """
    if isinstance(dataset, ImageDataset):
        folder, lines, field, suffixes = dataset.image_directory, dataset.image_jsonl_file, "image_path", IMAGE_SUFFIXES
    else:
        folder, lines, field, suffixes = dataset.video_directory, dataset.video_jsonl_file, "video_path", VIDEO_SUFFIXES
    if lines is not None:
        sources = Sources(tuple(sorted(_read_jsonl(lines, field), key=lambda source: str(source.path))))
    else:
        sources = _read_folder(folder, suffixes, dataset, workers)
    _check_stems(sources.found)
    return sources


def _read_folder(folder: Path, suffixes: Sequence[str], dataset: AnyDataset, workers: int) -> Sources:
    named = [path for path in folder_entries(folder, "folder", _FROM_HERE) if path.suffix.lower() in suffixes]
    paths = [path for path in named if file_problem(path) is None]
    if not paths:
        raise InputError(f"{folder} holds no files to train on; looked for {' '.join(suffixes)}")
    with ThreadPoolExecutor(workers) as pool:
        captions = list(pool.map(partial(_read_caption, extension=dataset.caption_extension), paths))
    missing = tuple(path for path, caption in zip(paths, captions, strict=True) if caption is None)
    _check_captions(folder, paths, missing, dataset)
    found = (Source(path, caption) for path, caption in zip(paths, captions, strict=True) if caption is not None)
    return Sources(tuple(found), missing)


def _read_caption(path: Path, extension: str) -> str | None:
    caption = path.with_name(path.stem + extension)
    return read_text(caption, "caption file").strip() if file_problem(caption) is None else None


def _check_captions(folder: Path, paths: list[Path], missing: Sequence[Path], dataset: AnyDataset) -> None:
    if not missing or (len(missing) < len(paths) and isinstance(dataset, ImageDataset)):
        return
    wanted = missing[0].stem + dataset.caption_extension
    raise InputError(
        f"{len(missing)} of {len(paths)} files in {folder} have no caption: {missing[0].name} needs {wanted}"
    )


def _read_jsonl(file: Path, field: str) -> list[Source]:
    if problem := file_problem(file):
        raise InputError(f"{file} {problem} {_FROM_HERE}")
    # Not splitlines, which also splits at characters that captions may hold, such as U+2028.
    lines = [(number, line) for number, line in enumerate(read_text(file, "file").split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{file} is empty: each line needs a {field} and a caption")
    return [_read_line(line, field, f"{file} line {number}") for number, line in lines]


def _read_line(line: str, field: str, where: str) -> Source:
    entry = parse_json(line, where)
    if not isinstance(entry, dict) or sorted(entry) != sorted([field, "caption"]):
        raise InputError(f'{where} must be {{"{field}": ..., "caption": ...}}; it has {_keys(entry)}')
    if not all(isinstance(value, str) for value in entry.values()):
        raise InputError(f"{where}: {field} and caption must be text")
    path = Path(entry[field])
    if problem := file_problem(path, or_folder=field == "video_path"):
        raise InputError(f"{where}: {path_text(path)} {problem} {_FROM_HERE}")
    return Source(path, entry["caption"].strip())


def _keys(entry: object) -> str:
    return names_text(entry) if isinstance(entry, dict) and entry else "no keys"


def _check_stems(sources: Sequence[Source]) -> None:
    seen: dict[str, Path] = {}
    for source in sources:
        # Folded, because the cache files of A.png and a.png are one file on Windows.
        other = seen.setdefault(source.stem.casefold(), source.path)
        if other != source.path:
            raise InputError(f"{other} and {source.path} would share one cache file: rename one of them")
        if len(os.fsencode(source.stem)) > _LONGEST_STEM:
            raise InputError(f"{source.path}: the name of its cache file would be too long, rename it")
