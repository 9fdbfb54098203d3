"""What a caching command says: rates that differ; at its end what it did, which captions were cut, what to run next."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from utils.data.cache_files import clip_shape, condition_shape, latents_files, latents_shape, text_path
from utils.data.cache_problems import number_given
from utils.data.commands import caching_command, training_command
from utils.data.sources import AnyDataset, DatasetConfig, Sources, VideoDataset
from utils.pixels.rates import FILE_RATE, Rate, is_close
from utils.pixels.remarks import count_and_names
from wan.configs import NO_CONDITIONS, TASKS, WAN_2_1_VAE, WAN_2_2_VAE, Conditions, LatentLayout
from wan.errors import InputError

_NO_VIDEOS = "next: add a dataset of videos with target_frames of 5 or more to {config}, there is none yet"


@dataclass(frozen=True)
class Caching:
    """What happened to the caches of a dataset, or of several, added up.

    `added_to` of those made were current but for what image-to-video models are given; `one_frame` counts those that
    such models are not trained on. `untold` are current ones that do not say what they were made of; `others` are files
    that are only named like caches; `cut` are the tokens of each source whose caption is longer than the text encoder
    reads.
    """

    made: int = 0
    current: int = 0
    left_out: int = 0
    added_to: int = 0
    one_frame: int = 0
    deleted: int = 0
    untold: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    cut: Mapping[Path, int] = field(default_factory=dict)

    def __add__(self, other: "Caching") -> "Caching":
        cut = {**self.cut, **other.cut}
        names = [name.name for name in fields(self) if name.name != "cut"]
        return Caching(**{name: getattr(self, name) + getattr(other, name) for name in names}, cut=cut)


def summary_lines(what: str, done: Caching, text_len: int | None = None) -> list[str]:
    """What a command did with caches of a kind ("latents" or "captions"); `text_len` is what the encoder reads."""
    parts = [f"{done.made} cached" + (f" (of {done.added_to} only what was missing)" if done.added_to else "")]
    parts += [f"{done.current} current and skipped (--recache makes them again)"] if done.current else []
    parts += [f"{done.left_out} left out"] if done.left_out else []
    gone = "deleted, because this dataset does not use them (--keep_cache keeps them)"
    parts += [f"{done.deleted} {gone}"] if done.deleted else []
    lines = [f"{what}: {', '.join(parts)}"]
    if done.one_frame:
        lines.append(
            f"cached, but not trained on by image-to-video models: {done.one_frame} pictures and clips of one frame, "
            "because the model is given the first frame"
        )
    if done.untold:
        lines.append(
            "skipped caches that do not say what they were made of, so that only times were compared: "
            f"{count_and_names(done.untold)}"
        )
    if done.others:
        lines.append(f"left alone, because only their names are those of caches: {count_and_names(done.others)}")
    if done.cut:
        names = count_and_names(sorted(done.cut, key=done.cut.get, reverse=True))
        lines.append(
            f"captions cut at the {text_len} tokens that the text encoder reads: {names}; the longest has "
            f"{max(done.cut.values())} tokens"
        )
    return lines


def after_latents(config: DatasetConfig, listed: Iterable[tuple[AnyDataset, Sources]], done: Caching) -> str:
    """The next command for the user once latents are cached, or what is missing that could be trained on."""
    if 0 < done.one_frame == done.made + done.current:
        return _NO_VIDEOS.format(config=config.path)
    texts = [text_path(dataset.cache_directory, own.stem) for dataset, sources in listed for own in sources.found]
    has_texts = all(path.is_file() for path in texts)
    train = training_command(config.path, config.latents, config.conditions)
    return f"next: {train if has_texts else caching_command('text', config.path)}"


def after_text(config: DatasetConfig) -> str:
    """The next command for the user once captions are cached."""
    found = [latents_files(dataset.cache_directory, dataset.recursive) for dataset in config.datasets]
    caches = [path for paths in found for path in paths]
    latents, conditions = _model_of(caches)
    if not all(found):
        return f"next: {caching_command('latents', config.path, latents, conditions)}"
    if all(map(partial(_is_given_whole, conditions=conditions), caches)):
        return _NO_VIDEOS.format(config=config.path)
    return f"next: {training_command(config.path, latents, conditions)}"


def _is_given_whole(cache: Path, conditions: Conditions) -> bool:
    """Whether a cache holds nothing that a model is not given."""
    try:
        return conditions.are_all_of(latents_shape(cache)[1])
    except InputError:  # caching names and replaces it
        return False


def _model_of(caches: Iterable[Path]) -> tuple[LatentLayout, Conditions]:
    """What the models need for which latents were cached, by the first cache that can be read."""
    for path in caches:
        try:
            channels, condition, clip = latents_shape(path)[0], condition_shape(path), clip_shape(path)
        except InputError:  # caching names and replaces it
            continue
        pictures = 0 if condition is None else number_given(path)
        found = WAN_2_2_VAE if channels == WAN_2_2_VAE.channels else WAN_2_1_VAE, Conditions(pictures, clip is not None)
        if found in ((task.latents, task.conditions) for task in TASKS.values()):
            return found
    return WAN_2_1_VAE, NO_CONDITIONS


def rate_lines(dataset: VideoDataset, rates: Mapping[Path, Rate]) -> list[str]:
    """A line if files have other rates than the dataset file says, or if it says none."""
    if dataset.source_fps == FILE_RATE:
        return []
    wanted = dataset.source_fps or dataset.latents.fps
    differing = {path: rate for path, rate in rates.items() if not is_close(rate.fps, wanted)}
    if not differing:
        return []
    first = next(iter(differing.values()))
    fps = f"{first.fps:.4g}"
    files = f"{count_and_names(differing)} (the first has {fps} frames a second{', varying' if first.varies else ''})"
    each = f'source_fps = {fps}, or "{FILE_RATE}" for each file\'s own rate'
    if dataset.source_fps is None:
        return [
            f"videos of another rate than Wan's {wanted} frames a second: {files}; source_fps is not set, so every "
            f"frame is used and their motion changes its speed; to keep it, set {each}"
        ]
    return [f"videos of another rate than source_fps = {dataset.source_fps:g}: {files}; if they are right, set {each}"]
