"""Why a cache cannot be trained on: missing, damaged, stale, or made for another kind of model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.cache_files import (
    clip_shape,
    condition_shape,
    has_mask,
    latents_header,
    made_by_of,
    read_mask,
    text_header,
)
from utils.data.origins import difference, made_by_in, origin_in, source_changed
from utils.data.sources import AnyDataset
from wan.configs import NO_CONDITIONS, WAN_2_1_VAE, Conditions, LatentLayout
from wan.errors import InputError
from wan.model import PICTURE_TOKENS
from wan.vae import WAN_2_1, WAN_2_2

LATENTS, CONDITION, CLIP = PARTS = ("latents", "latents_image", "clip")  # of a latent cache, by musubi-tuner's names
_VAES = {kind.layout.channels: f" of the {kind.name}" for kind in (WAN_2_1, WAN_2_2)}
_GIVEN = {1: "its first frame alone", 2: "its first and last frame"}


@dataclass(frozen=True)
class Wanted:
    """What a latent cache is to hold: a clip of `frames` frames at `bucket` (width, height), for one kind of model.

    `made_by` are the settings that it should have been made by, `image_encoder` the identity of a CLIP, as far as they
    are known.
    """

    frames: int
    bucket: tuple[int, int]
    latents: LatentLayout = WAN_2_1_VAE
    conditions: Conditions = NO_CONDITIONS
    made_by: Mapping[str, str] = field(default_factory=dict)
    image_encoder: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents."""
        return self.latents.shape(self.frames, self.bucket[1], self.bucket[0])

    @property
    def parts(self) -> frozenset[str]:
        """Those of PARTS that the cache is to hold."""
        return cache_parts(self.conditions)


def cache_parts(conditions: Conditions) -> frozenset[str]:
    """Those of PARTS that a cache is to hold."""
    asked = {CONDITION: conditions.pictures, CLIP: conditions.clip}
    return frozenset([LATENTS, *(part for part, is_asked in asked.items() if is_asked)])


def wanted_cache(
    dataset: AnyDataset,
    frames: int,
    bucket: tuple[int, int],
    made_by: Mapping[str, str] | None = None,
    image_encoder: str | None = None,
) -> Wanted:
    """What the cache of one of a dataset's pictures or clips is to hold."""
    return Wanted(frames, bucket, dataset.latents, dataset.conditions, made_by or {}, image_encoder)


def cache_problem(cache: Path, source: Path | None, wanted: Wanted) -> str | None:
    """Why an item with this latent cache cannot be trained on; None if it can. `source` as for latents_problem."""
    return latents_problem(cache, source, wanted) or condition_problem(cache, wanted) or clip_problem(cache, wanted)


def latents_problem(cache: Path, source: Path | None, wanted: Wanted) -> str | None:
    """Why the latents in a cache are not the wanted ones; None if they are.

    `source` is None where only the cache is left.
    """
    if not cache.is_file():
        return "has no latent cache"
    shape = wanted.shape
    try:
        entry, metadata = latents_header(cache)
    except InputError as error:  # to be cached again like one that is missing
        return f"has a damaged latent cache ({error})"
    if problem := _channels_problem(entry.shape[0], wanted.latents):
        return problem
    if entry.shape != shape:
        return f"was cached as latents {_times(entry.shape)}, the dataset file now asks for {_times(shape)}"
    if "mask" in wanted.made_by and (problem := _mask_problem(cache, shape)):
        return problem
    origin = origin_in(metadata)
    if origin is not None and (otherwise := difference(origin.made_by, wanted.made_by)):
        return f"was cached {otherwise}"
    if source is None:
        return None
    if origin is None:
        return "is newer than its latent cache" if _changed_at(source) > cache.stat().st_mtime_ns else None
    return "has changed since it was cached" if source_changed(origin, source) else None


def other_vae_problem(cache: Path, latents: LatentLayout) -> str | None:
    """Why the latents in a cache were made with the VAE of another model; None if they were not."""
    try:
        return _channels_problem(latents_header(cache)[0].shape[0], latents)
    except InputError:  # damaged, which says nothing about the VAE
        return None


def _channels_problem(channels: int, latents: LatentLayout) -> str | None:
    if channels == latents.channels:
        return None
    made, needed = (f"{count} channels{_VAES.get(count, '')}" for count in (channels, latents.channels))
    return f"was cached as latents with {made}, the model needs {needed}"


def condition_problem(cache: Path, wanted: Wanted) -> str | None:
    """Why the latents of the given pictures are not the wanted ones, in a cache whose latents are; None if they are."""
    pictures = wanted.conditions.pictures
    if not pictures:
        return None
    try:
        found, given = condition_shape(cache), number_given(cache)
    except InputError as error:
        return f"has a damaged latent cache ({error})"
    if found is None:
        return f"was cached without {CONDITION}, which image-to-video models read"
    channels, *rest = wanted.shape
    shape = (wanted.latents.frame_stride + channels, *rest)  # its mask has a channel for each frame of a latent frame
    if found != shape:
        return f"was cached with {CONDITION} {_times(found)}, the model needs {_times(shape)}"
    return f"was cached with {_GIVEN[given]}, the model is given {_GIVEN[pictures]}" if given != pictures else None


def number_given(cache: Path) -> int:
    """How many frames latents_image gives, 1 or 2; musubi-tuner, which does not say it, gives the first one alone."""
    told, clip = made_by_of(cache).get("pictures"), clip_shape(cache)
    has_both = told == "2" or (told is None and clip is not None and clip[0] == 2 * PICTURE_TOKENS)
    return 2 if has_both else 1


def clip_problem(cache: Path, wanted: Wanted) -> str | None:
    """Why the CLIP tokens in a cache are not the wanted ones; None if they are."""
    if not wanted.conditions.clip:
        return None
    try:
        found = clip_shape(cache)
    except InputError as error:
        return f"has a damaged latent cache ({error})"
    if found is None:
        return "was cached without CLIP tokens, which image-to-video models of Wan 2.1 read"
    tokens = PICTURE_TOKENS * wanted.conditions.pictures
    if found[0] != tokens:
        return f"was cached with {found[0]} CLIP tokens, the model reads {tokens}"
    told = made_by_of(cache).get("image_encoder")
    is_another = None not in (told, wanted.image_encoder) and told != wanted.image_encoder
    return "was cached with another CLIP" if is_another else None


def text_problem(cache: Path, texts: Sequence[str], made_by: Mapping[str, str] | None = None) -> str | None:
    """Why the encoded tokens of the captions `texts` cannot be trained on; None if they can.

    `made_by` are the settings that the cache should have been made by.
    """
    if not cache.is_file():
        return "has no text cache"
    try:
        found, metadata = text_header(cache)
    except InputError as error:  # to be cached again like one that is missing
        return f"has a damaged text cache ({error})"
    # A first caption that the file does not tell cannot be compared.
    cached = {text.caption for text in found[1:]} | {texts[0] if found[0].caption is None else found[0].caption}
    if cached >= set(texts):
        otherwise = difference(made_by_in(metadata), made_by or {})
        return f"was cached {otherwise}" if otherwise else None
    if texts[-1] == "" and cached >= set(texts[:-1]):
        return "has a text cache without the empty caption, which caption_dropout_rate needs"
    return "has another caption than its text cache" if len(texts) == 1 else "has captions that its text cache lacks"


def _mask_problem(cache: Path, shape: tuple[int, ...]) -> str | None:
    if not has_mask(cache):
        return "was cached without its mask"
    try:
        found = tuple(read_mask(cache).shape)
    except InputError as error:
        return f"has a damaged mask in its latent cache ({error})"
    return None if found == shape[-2:] else f"was cached with a mask of {_times(found)} latent pixels"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _changed_at(source: Path) -> int:
    files = source.iterdir() if source.is_dir() else [source]
    return max(file.stat().st_mtime_ns for file in files)
