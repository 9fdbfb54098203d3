"""The items that a dataset trains on: every source with its caches; missing, stale or damaged ones are named."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.data.cache_files import (
    CachedClip,
    clip_shape,
    has_mask,
    image_latents_path,
    latents_files,
    latents_origin,
    made_by_of,
    parse_clip_name,
    parse_image_name,
    text_path,
    text_shapes,
)
from utils.data.cache_problems import cache_problem, text_problem, wanted_cache
from utils.data.cached_clips import clips_of_size, wanted_clips
from utils.data.masks import is_masked, mask_settings, wants_masks
from utils.data.origins import clip_settings, dataset_settings, size_text
from utils.data.sizes import SizedSource, choose_bucket, sized_sources
from utils.data.sources import (
    AnyDataset,
    ImageDataset,
    Source,
    SourcesGone,
    VideoDataset,
    list_sources,
    texts_to_encode,
)
from utils.files import folder_entries
from utils.pixels.pictures import is_plain_picture, stored_size
from utils.pixels.remarks import count_and_names
from utils.pixels.videos import is_plain_video
from wan.configs import NO_CONDITIONS, Conditions
from wan.errors import InputError

# Opening files waits for the disk, so threads help on one core too.
_READERS = 8
_UNTURNED = (
    "pictures that were cached as they are stored, lying on their sides (cache them again to turn them): {files}"
)
_OTHER_SIZE = (
    "videos that were cached at another size than this dataset file asks for, as musubi-tuner does it: {files}"
)
_UNTOLD = "latent caches that do not say what they were made of, so that only times were compared: {files}"
_NOT_PLAIN = (
    "some of these files are turned, transparent, or not 8-bit sRGB, which other programs and older versions read "
    "differently (cache them again to be sure): {files}"
)
_ENCODERS = (("latent", "VAE", "vae"), ("latent", "CLIP", "image_encoder"), ("text", "text encoder", "text_encoder"))
_OTHER_ENCODER = "{kind} caches made with another {encoder} than {usual} (cache them again to make them alike): {files}"


@dataclass(frozen=True)
class Item:
    """One picture or clip to train on.

    `bucket` is its (width, height) in pixels, `latent_shape` is (C, F, H, W), `text_shape` is (tokens, width) of its
    longest caption. `dropout` is the share of its entries that train with the empty caption. `conditions` are what its
    latent cache holds for the model beside the latents; `clip_shape` is (tokens, width) of its CLIP tokens.
    """

    name: str
    latents: Path
    text: Path
    bucket: tuple[int, int]
    frames: int
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    captions: tuple[str, ...]
    dropout: float = 0.0
    masked: bool = False  # its latent cache holds a mask for the loss
    source: Path | None = None  # None where only its caches are left
    conditions: Conditions = NO_CONDITIONS
    clip_shape: tuple[int, int] | None = None

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


@dataclass(frozen=True)
class Problem:
    """Why a source cannot be trained on, and which of its caches ("latents" or "text") has to be created."""

    source: Path
    cache: str
    text: str


@dataclass(frozen=True)
class CachedItems:
    """What a dataset trains on, in order of the names; those in `left_out` have no caption or are too short.

    `one_frame` counts the pictures and clips of one frame that image-to-video models are not trained on: they are
    given the first frame, so there would be nothing to learn. `notes` are lines about caches that are taken although
    they are not as caching would make them now.
    """

    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    left_out: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    one_frame: int = 0


def cached_items(dataset: AnyDataset) -> CachedItems:
    """Looks up the caches of every source; InputError if a source or the cache folder cannot be read."""
    if os.path.exists(dataset.cache_directory):  # Path.exists raises where a folder above it cannot be read
        folder_entries(dataset.cache_directory, "cache_directory")
    caches = latents_files(dataset.cache_directory, dataset.recursive)
    try:
        sources = list_sources(dataset, _READERS)
    except SourcesGone as error:
        alone = items_of_caches(dataset, caches, str(error))
        if alone.items or alone.one_frame:
            return alone
        if alone.problems:
            first = alone.problems[0]
            raise InputError(f"{error}; and of its caches, {first.source} {first.text}") from None
        raise
    if _is_of_one_frame(dataset):
        return CachedItems((), (), sources.left_out, sources.notes, len(sources.found))
    sized = sized_sources(dataset, sources.found, _READERS)
    find = _image_items if isinstance(dataset, ImageDataset) else _video_items
    found = find(dataset, sized, caches)
    notes = (*sources.notes, *found.notes, *_origin_notes(dataset, found.items, sources.found))
    return replace(found, left_out=(*sources.left_out, *found.left_out), notes=notes)


def items_of_caches(dataset: AnyDataset, caches: Sequence[Path], reason: str) -> CachedItems:
    """What can be trained on where only the caches are left; `reason` begins the note that says so."""
    items, problems, captionless, one_frame = [], [], [], 0
    for path in caches:
        stem, bucket, frames = _from_name(dataset, path)
        text = text_path(dataset.cache_directory, stem)
        if bucket is None:
            continue
        if dataset.conditions.are_all_of(frames):
            one_frame += 1
            continue
        if not text.is_file():
            captionless.append(path)
            continue
        first, *further = _cached_captions(text)
        source = Source(Path(stem), first, further=tuple(further))
        entry = SizedSource(replace(source, path=Path(source.path.name), subfolder=source.path.parent), bucket, bucket)
        problem = cache_problem(path, None, wanted_cache(dataset, frames, bucket))
        _sort_out(dataset, entry, [(path, frames, problem)], items, problems)
    masks = wants_masks(dataset)  # their files are gone or not, but the caches hold them
    items = [replace(item, masked=masks and has_mask(item.latents), source=None) for item in items]
    notes = [f"{reason}; trained on what its cache folder holds"]
    notes += [f"latent caches without a text cache, left out: {count_and_names(captionless)}"] if captionless else []
    return CachedItems(tuple(items), tuple(problems), (), tuple(notes), one_frame)


def _is_of_one_frame(dataset: AnyDataset) -> bool:
    """Whether the model is given the only frame of all that the dataset has."""
    return isinstance(dataset, ImageDataset) and dataset.conditions.are_all_of(1)


def _cached_captions(text: Path) -> list[str]:
    """The captions of a text cache; the empty one is there for caption_dropout_rate, unless it is the only one."""
    captions = [caption or "" for caption, _ in text_shapes(text)]
    return [caption for caption in captions if caption] or captions


def _from_name(dataset: AnyDataset, cache: Path) -> tuple[str, tuple[int, int] | None, int]:
    """The stem, the bucket and the frames of a latent cache; no bucket if the dataset asks for no such clip."""
    if isinstance(dataset, ImageDataset):
        stem, size = parse_image_name(cache, dataset.cache_directory)
        return stem, choose_bucket(dataset, Source(cache, ""), size), 1
    named = parse_clip_name(cache, dataset.cache_directory)
    if named is None:
        return cache.stem, None, 0
    stem, clip = named
    is_wanted = dataset.frame_extraction == "full" or clip.frames in dataset.target_frames
    return stem, clip.size if is_wanted else None, clip.frames


def _image_items(dataset: ImageDataset, sized: Sequence[SizedSource], caches: Sequence[Path]) -> CachedItems:
    other_sizes = dict(parse_image_name(path, dataset.cache_directory) for path in caches)
    settings = dataset_settings(dataset)
    items, problems, unturned = [], [], []
    for entry in sized:
        stem = entry.source.stem
        cache = image_latents_path(dataset.cache_directory, stem, entry.size)
        if not cache.is_file() and _was_not_turned(entry, other_sizes.get(stem)):
            unturned.append(entry.source.path)
            size = other_sizes[stem]
            entry = replace(entry, size=size, bucket=choose_bucket(dataset, entry.source, size))
            cache = image_latents_path(dataset.cache_directory, stem, size)
        made_by = {**settings, **mask_settings(dataset, entry.source)}
        problem = cache_problem(cache, entry.source.path, wanted_cache(dataset, 1, entry.bucket, made_by))
        if not cache.is_file() and stem in other_sizes:
            problem = f"is {size_text(entry.size)}, but was {size_text(other_sizes[stem])} when it was cached"
        _sort_out(dataset, entry, [(cache, 1, problem)], items, problems)
    notes = [_UNTURNED.format(files=count_and_names(unturned))] if unturned else []
    return CachedItems(tuple(items), tuple(problems), (), tuple(notes))


def _origin_notes(dataset: AnyDataset, items: Sequence[Item], sources: Sequence[Source]) -> list[str]:
    """Lines about caches that do not say what they were made of."""
    origins = {item.latents: latents_origin(item.latents) for item in items}
    untold = [path for path, origin in origins.items() if origin is None]
    notes = [_UNTOLD.format(files=count_and_names(untold))] if untold else []
    if untold:
        texts = {item.text for item in items if origins[item.latents] is None}
        doubtful = [source.path for source in sources if text_path(dataset.cache_directory, source.stem) in texts]
        odd = [path for path in doubtful if not is_plain(dataset, path)]
        notes += [_NOT_PLAIN.format(files=count_and_names(odd))] if odd else []
    return notes


def made_otherwise(items: Sequence[Item], others: Sequence[Item] | None = None) -> list[str]:
    """Lines about caches made with another encoder than most of `others`, or of the items themselves."""
    usual, notes = "the others" if others is None else "those that are trained on", []
    for kind, encoder, key in _ENCODERS:
        own, compared = _encoders(items, key), _encoders(items if others is None else others, key)
        most = Counter(compared.values()).most_common(1)
        odd = [path for path, identity in own.items() if most and identity != most[0][0]]
        line = _OTHER_ENCODER.format(kind=kind, encoder=encoder, usual=usual, files=count_and_names(odd))
        notes += [line] if odd else []
    return notes


def _encoders(items: Sequence[Item], key: str) -> dict[Path, str]:
    """The encoder of each cache that says it, by its `key` in made_by."""
    held = [item for item in items if key != "image_encoder" or item.conditions.clip]
    paths = sorted({item.text if key == "text_encoder" else item.latents for item in held})
    return {path: found[key] for path in paths if key in (found := made_by_of(path))}


def is_plain(dataset: AnyDataset, source: Path) -> bool:
    """Whether a cache that does not say by which rules it was made has the same pixels whatever they were."""
    if isinstance(dataset, ImageDataset):
        return is_plain_picture(source)
    return is_plain_video(source, dataset.source_fps)


def _was_not_turned(entry: SizedSource, cached: tuple[int, int] | None) -> bool:
    """Whether a cache of that size is of the picture as it is stored, lying on its side, as musubi-tuner reads it."""
    return cached == entry.size[::-1] and stored_size(entry.source.path) == cached


def _video_items(dataset: VideoDataset, sized: Sequence[SizedSource], caches: Sequence[Path]) -> CachedItems:
    clips_of = defaultdict(list)
    for stem, clip in filter(None, (parse_clip_name(path, dataset.cache_directory) for path in caches)):
        clips_of[stem].append(clip)
    items, problems, left_out, other_sizes, one_frame = [], [], [], [], 0
    for entry in sized:
        cached = clips_of[entry.source.stem]
        clips, problem = wanted_clips(dataset, entry, cached)
        given = 0 if problem else _count_of_one_frame(dataset, clips_of_size(cached, entry.bucket).values(), clips)
        one_frame += given
        if problem:
            problems.append(Problem(entry.source.path, "latents", problem))
        elif not clips and not given:
            left_out.append(entry.source.path)
        elif clips:
            other_sizes += [entry.source.path] if clips[0].size != entry.bucket else []
            found = [(clip.path, clip.frames, _clip_problem(dataset, clip, entry.source)) for clip in clips]
            _sort_out(dataset, replace(entry, bucket=clips[0].size), found, items, problems)
    notes = [_OTHER_SIZE.format(files=count_and_names(other_sizes))] if other_sizes else []
    return CachedItems(tuple(items), tuple(problems), tuple(left_out), tuple(notes), one_frame)


def _count_of_one_frame(dataset: VideoDataset, cached: Iterable[CachedClip], clips: Sequence[CachedClip]) -> int:
    """How many clips of a video the model is given as a whole; at least one, cached or not, where one is asked for."""
    is_full = dataset.frame_extraction == "full"
    is_asked = not clips if is_full else 1 in dataset.target_frames
    if not dataset.conditions.are_all_of(1) or not is_asked:
        return 0
    return max(1, sum(clip.frames == 1 for clip in cached))


def _clip_problem(dataset: VideoDataset, clip: CachedClip, source: Source) -> str | None:
    settings = {**dataset_settings(dataset), **clip_settings(clip.size, clip.start, clip.frames)}
    made_by = {**settings, **mask_settings(dataset, source)}
    return cache_problem(clip.path, source.path, wanted_cache(dataset, clip.frames, clip.size, made_by))


def _sort_out(dataset: AnyDataset, entry: SizedSource, found, items: list[Item], problems: list[Problem]) -> None:
    """Adds a source's (cache, frames, problem) to `items`, or to `problems` if there is one."""
    source, (width, height) = entry.source, entry.bucket
    text = text_path(dataset.cache_directory, source.stem)
    broken = [Problem(source.path, "latents", problem) for *_, problem in found if problem][:1]
    texts = texts_to_encode(dataset, source)
    problem = text_problem(text, texts)
    broken += [Problem(source.path, "text", problem)] if problem else []
    problems += broken
    if not broken:
        text_shape = max(shape for caption, shape in text_shapes(text) if caption is None or caption in texts)
        for cache, frames, _ in found:
            latent_shape = dataset.latents.shape(frames, height, width)
            captions = (text_shape, source.captions, dataset.caption_dropout_rate)
            tokens = clip_shape(cache) if dataset.conditions.clip else None
            rest = (*captions, is_masked(dataset, source), source.path, dataset.conditions, tokens)
            items.append(Item(source.path.name, cache, text, entry.bucket, frames, latent_shape, *rest))
