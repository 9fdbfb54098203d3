"""The pictures and clips that a dataset names, with their captions, in one fixed order."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils.data.folders import FROM_HERE, media_files
from utils.data.mask_files import find_masks
from utils.files import file_problem, names_text, path_text, quoted
from utils.pixels.media import COMMON_IMAGE_SUFFIXES, COMMON_VIDEO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from utils.pixels.remarks import count_and_names
from utils.text_files import escaped_path, parse_json, read_text, text_lines
from wan.configs import NO_CONDITIONS, WAN_2_1_VAE, Conditions, LatentLayout
from wan.errors import InputError

_LONGEST_STEM = 170  # bytes: file systems take 255, and the name of an unfinished cache file is up to 80 longer
FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
CAPTION_MODES = ("whole", "lines")  # what of a caption file is a caption


@dataclass(frozen=True)
class ImageDataset:
    """One [[datasets]] table of pictures; the defaults are the toml's.

    `latents` and `conditions` are not keys of it: they are what the model needs that is trained.
    """

    cache_directory: Path
    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str | None = None
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    recursive: bool = False
    caption_mode: str = "whole"
    caption_prefix: str = ""
    caption_dropout_rate: float = 0.0  # the share of an epoch's entries that train with the empty caption
    mask_directory: Path | None = None
    alpha_mask: bool = False
    latents: LatentLayout = WAN_2_1_VAE
    conditions: Conditions = NO_CONDITIONS


@dataclass(frozen=True)
class VideoDataset:
    """One [[datasets]] table of videos; the defaults are the toml's, the rest is as for pictures."""

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
    source_fps: float | str | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    recursive: bool = False
    caption_mode: str = "whole"
    caption_prefix: str = ""
    caption_dropout_rate: float = 0.0
    mask_directory: Path | None = None
    latents: LatentLayout = WAN_2_1_VAE
    conditions: Conditions = NO_CONDITIONS


AnyDataset = ImageDataset | VideoDataset


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of the file at `path`."""

    path: Path
    datasets: tuple[AnyDataset, ...]
    validation_split: float = 0.0  # share of each dataset's pictures that is held out for validation

    @property
    def latents(self) -> LatentLayout:
        """How the latents of all datasets are laid out."""
        return self.datasets[0].latents

    @property
    def conditions(self) -> Conditions:
        """What is cached of all datasets beside latents and text."""
        return self.datasets[0].conditions


@dataclass(frozen=True)
class Source:
    """One captioned picture, or video, in a subfolder of the dataset's folder or in that itself.

    Of several captions, `further` are those after the first; an entry of an epoch shows one of them. `mask` is a
    picture that is white where this one is trained on.
    """

    path: Path
    caption: str
    subfolder: Path = Path()
    further: tuple[str, ...] = ()
    mask: Path | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.further)

    @property
    def stem(self) -> str:
        """What the paths of its cache files start with, below the cache folder."""
        return (self.subfolder / self.path.stem).as_posix()


@dataclass(frozen=True)
class Sources:
    """A dataset's sources in order of their names, and the pictures left out because they have no caption.

    `notes` are lines about what else is not read.
    """

    found: tuple[Source, ...]
    left_out: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


class SourcesGone(InputError):
    """A dataset has no pictures or videos at all (any more)."""


def list_sources(dataset: AnyDataset, workers: int = 1) -> Sources:
    """A dataset's captioned files, read by `workers` threads.

    InputError if there are none, one cannot be read, or their cache files could not be told apart.
    """
    if isinstance(dataset, ImageDataset):
        folder, lines, field = dataset.image_directory, dataset.image_jsonl_file, "image_path"
    else:
        folder, lines, field = dataset.video_directory, dataset.video_jsonl_file, "video_path"
    sources = _read_folder(folder, dataset, workers) if lines is None else _read_jsonl(lines, field)
    _check_stems(sources.found)
    found = [_with_captions(source, _final(source.captions, dataset.caption_prefix)) for source in sources.found]
    silent = [source.path for source in found if source.captions == ("",)]
    notes = [f"with an empty caption, trained on without words: {count_and_names(silent)}"] if silent else []
    sources = replace(sources, found=tuple(found), notes=(*sources.notes, *notes))
    return sources if dataset.mask_directory is None else _with_masks(sources, dataset.mask_directory)


def texts_to_encode(dataset: AnyDataset, source: Source) -> tuple[str, ...]:
    """What the text cache of a source holds: its captions, and the empty one where captions are dropped."""
    return tuple(dict.fromkeys([*source.captions, *([""] if dataset.caption_dropout_rate else [])]))


def _with_masks(sources: Sources, folder: Path) -> Sources:
    masks, others = find_masks(folder, [source.stem for source in sources.found])
    found = tuple(replace(source, mask=mask) for source, mask in zip(sources.found, masks, strict=True))
    whole = [source.path for source in found if source.mask is None]
    notes = [f"without a mask in {folder}, trained on as a whole: {count_and_names(whole)}"] if whole else []
    notes += [f"masks of no file that is trained on: {count_and_names(others)}"] if others else []
    return replace(sources, found=found, notes=(*sources.notes, *notes))


def _with_captions(source: Source, captions: Sequence[str]) -> Source:
    return replace(source, caption=captions[0], further=tuple(captions[1:]))


def _final(captions: Iterable[str], prefix: str) -> list[str]:
    """The captions as they are encoded, each once: after the prefix and a space."""
    return list(dict.fromkeys(f"{prefix.strip()} {caption}".strip() for caption in captions))


def _read_folder(folder: Path, dataset: AnyDataset, workers: int) -> Sources:
    is_image = isinstance(dataset, ImageDataset)
    suffixes = IMAGE_SUFFIXES if is_image else VIDEO_SUFFIXES
    common = COMMON_IMAGE_SUFFIXES if is_image else COMMON_VIDEO_SUFFIXES
    if file_problem(folder, or_folder=True) == "does not exist":
        raise SourcesGone(f"folder {path_text(folder)} does not exist {FROM_HERE}")
    files = media_files(folder, suffixes, common, dataset.caption_extension, dataset.recursive)
    paths = files.paths
    if not paths:
        looked = f"{folder} holds no files to train on; looked for {' '.join(suffixes)}"
        raise SourcesGone("; ".join([looked, *files.notes]))
    with ThreadPoolExecutor(workers) as pool:
        captions = list(pool.map(partial(_read_captions, dataset=dataset), paths))
    missing = tuple(path for path, own in zip(paths, captions, strict=True) if own is None)
    _check_captions(folder, paths, missing, dataset)
    found = [
        _with_captions(Source(path, "", path.parent.relative_to(folder)), own)
        for path, own in zip(paths, captions, strict=True)
        if own is not None
    ]
    return Sources(tuple(found), missing, files.notes)


def _read_captions(path: Path, dataset: AnyDataset) -> list[str] | None:
    """The captions in the file beside a picture or video; None if there is no such file."""
    file = path.with_name(path.stem + dataset.caption_extension)
    if file_problem(file) is not None:
        return None
    text = read_text(file, "caption file").strip()
    if dataset.caption_mode == "whole":
        return [text]
    return [line.strip() for line in text_lines(text) if line.strip()] or [""]


def _check_captions(folder: Path, paths: Sequence[Path], missing: Sequence[Path], dataset: AnyDataset) -> None:
    if not missing or (len(missing) < len(paths) and isinstance(dataset, ImageDataset)):
        return
    wanted = missing[0].stem + dataset.caption_extension
    ending = dataset.caption_extension
    hint = "" if ending[0] in "._-" else f', because caption_extension is "{ending}", without a dot'
    raise InputError(
        f"{len(missing)} of {len(paths)} files in {folder} have no caption: {missing[0].name} needs {wanted}{hint}"
    )


def _read_jsonl(file: Path, field: str) -> Sources:
    if problem := file_problem(file):
        kind = SourcesGone if problem == "does not exist" else InputError
        raise kind(f"{path_text(file)} {problem} {FROM_HERE}")
    text = read_text(file, "file")
    lines = [(number, line) for number, line in enumerate(text_lines(text), 1) if line.strip()]
    if not lines:
        raise InputError(f"{file} is empty: each line needs {field} and caption")
    _refuse_one_value(text, len(lines), field, file)
    entries = [(f"{file} line {number}", _read_line(line, field, f"{file} line {number}")) for number, line in lines]
    _check_listed([(where, Path(entry[field])) for where, entry in entries], or_folder=field == "video_path")
    found = _merged([_listed_source(Path(entry[field]), entry["caption"]) for _, entry in entries])
    unused = sorted({key for _, entry in entries for key in entry} - {field, "caption"})
    notes = [f"{file}: keys that are not used: {names_text(unused)}"] if unused else []
    if again := len(entries) - len(found):
        notes.append(f"{file}: lines that list a file again: {again}; their captions are further captions of it")
    return Sources(tuple(sorted(found, key=lambda source: str(source.path))), notes=tuple(notes))


def _listed_source(path: Path, caption: str | list[str]) -> Source:
    captions = caption if isinstance(caption, list) else [caption]
    return _with_captions(Source(path, ""), [own.strip() for own in captions])


def _merged(sources: Sequence[Source]) -> list[Source]:
    """One source for each file, with the captions of all lines that list it."""
    by_file: dict[str, Source] = {}
    for source in sources:
        file = os.path.normcase(os.path.abspath(source.path))
        known = by_file.get(file)
        by_file[file] = replace(known, further=known.further + source.captions) if known else source
    return list(by_file.values())


def _refuse_one_value(text: str, lines: int, field: str, file: Path) -> None:
    """InputError for a file that is JSON as a whole, as programs that know no lists of lines write it."""
    try:
        value = parse_json(text, str(file))
    except InputError:
        return
    if isinstance(value, list) or lines > 1:
        what = "one JSON list" if isinstance(value, list) else "one JSON object over several lines"
        raise InputError(f"{file} is {what}: {_each_line(field)}, without brackets around or commas between them")


def _each_line(field: str) -> str:
    return f'write each {{"{field}": ..., "caption": ...}} in a line of its own'


def _read_line(line: str, field: str, where: str) -> dict:
    try:
        entry = parse_json(line.strip().removesuffix(","), where)
    except InputError as error:
        raise InputError(f"{error}; {_each_line(field)}") from None
    if line.rstrip().endswith(","):
        raise InputError(f"{where} ends with a comma: {_each_line(field)}, without commas between them")
    if not isinstance(entry, dict):
        raise InputError(f'{where} must be {{"{field}": ..., "caption": ...}}, not {quoted(entry)}')
    if not {field, "caption"} <= entry.keys():
        found = names_text(entry) or "no keys"
        raise InputError(f'{where} must be {{"{field}": ..., "caption": ...}}; it has {found}')
    if not isinstance(entry[field], str) or not entry[field].strip():
        raise InputError(f"{where}: {field} must be a path, not {quoted(entry[field])}")
    caption = entry["caption"]
    if not (isinstance(caption, str) or (isinstance(caption, list) and caption and _are_texts(caption))):
        raise InputError(f"{where}: caption must be text or a list of texts, not {quoted(caption)}")
    return entry


def _are_texts(values: Sequence) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_listed(listed: Sequence[tuple[str, Path]], or_folder: bool) -> None:
    problems = [(where, path, file_problem(path, or_folder)) for where, path in listed]
    broken = [(where, path, problem) for where, path, problem in problems if problem]
    if broken:
        where, path, problem = broken[0]
        are_gone = len(broken) == len(listed) and all(problem == "does not exist" for *_, problem in broken)
        hint = f"; {escaped}" if (escaped := escaped_path(str(path), in_json=True)) else ""
        kind = SourcesGone if are_gone and not hint else InputError
        raise kind(f"{where}: {path_text(path)} {problem} {FROM_HERE}{hint}")


def _check_stems(sources: Sequence[Source]) -> None:
    seen: dict[str, Path] = {}
    for source in sources:
        # Folded, because the cache files of A.png and a.png are one file on Windows.
        other = seen.setdefault(source.stem.casefold(), source.path)
        if other != source.path:
            raise InputError(f"{other} and {source.path} would share one cache file: rename one of them")
        if len(os.fsencode(source.path.stem)) > _LONGEST_STEM:
            raise InputError(f"{source.path}: the name of its cache file would be too long, rename it")
