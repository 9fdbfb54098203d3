"""The two caching jobs: a dataset's pictures and clips to latents, its captions to encoded tokens.

B batch, C channels, T frames, H W height and width in pixels, F h w latent frames, height, width.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from utils.data.cache_files import (
    CachedClip,
    clip_latents_path,
    image_latents_path,
    is_cache,
    latents_files,
    latents_origin,
    latents_problem,
    made_by_of,
    parse_clip_name,
    remove_unfinished,
    text_files,
    text_path,
    text_problem,
    write_latents,
    write_text,
)
from utils.data.cache_summary import Caching, after_latents, after_text, summary_lines
from utils.data.items import is_plain
from utils.data.origins import Origin, clip_settings, dataset_settings, read_origin, weights_identity
from utils.data.pictures import read_image
from utils.data.rates import own_rate, rate_lines
from utils.data.remarks import TRANSPARENT, count_and_names, remark_lines
from utils.data.sizes import SizedSource, clip_windows, frames_needed, sized_sources
from utils.data.sources import AnyDataset, DatasetConfig, ImageDataset, Source, Sources, VideoDataset, list_sources
from utils.data.videos import read_video
from utils.devices import cpu_line
from utils.files import sole_writer, writable_folder
from wan.configs import WAN_2_1_VAE
from wan.errors import InputError
from wan.text_encoder import TextEncoder, load_text_encoder
from wan.vae import WanVAE, load_vae

_SPECIMEN = 'Ein Kätzchen, 一只猫 and a cat\'s "3" kittens'  # tokenizers that differ are likely to differ here


@dataclass(frozen=True)
class CacheLatentsConfig:
    """`batch_size` None takes each dataset's own; `workers` are the threads that read pictures and videos ahead."""

    dataset: DatasetConfig
    vae: Path
    device: torch.device
    vae_dtype: torch.dtype = torch.bfloat16
    batch_size: int | None = None
    workers: int = 1
    recache: bool = False
    keep_cache: bool = False
    disable_cudnn: bool = False


@dataclass(frozen=True)
class CacheTextConfig:
    """`batch_size` None takes each dataset's own; `workers` are the threads that read the captions."""

    dataset: DatasetConfig
    t5: Path
    tokenizer: Path | None
    device: torch.device
    batch_size: int | None = None
    workers: int = 1
    recache: bool = False
    keep_cache: bool = False


@dataclass(frozen=True)
class _Clip:
    """One picture or clip; no pixels: its cache is current. `named_size` is the one in its cache's name.

    If the file at `source` was read, `remarks` are what there is to say about it, and `origin` is for the cache.
    """

    source: Path
    path: Path
    pixels_THWC: np.ndarray | None
    named_size: tuple[int, int]
    frame_count: int | None = None
    remarks: frozenset[str] = frozenset()
    origin: Origin | None = None


@dataclass(frozen=True)
class _Reading:
    """How a dataset is read: `settings` decide the values of its caches, `cached` are its videos' clips by stem."""

    dataset: AnyDataset
    settings: Mapping[str, str]
    recache: bool
    cached: Mapping[str, Sequence[CachedClip]]


def cache_latents(config: CacheLatentsConfig, say: Callable[[str], None]) -> None:
    """Encodes every picture and clip of the datasets and writes their cache files.

    InputError if a dataset, a file or the VAE cannot be read, another process caches latents into one of the folders,
    or a latent is not finite.
    """
    listed = [(dataset, _listed(dataset, config.workers, say)) for dataset in config.dataset.datasets]
    # Sizes before the VAE, so that files that cannot be opened are found before anything is loaded or written.
    plans = [(dataset, sized_sources(dataset, sources.found, config.workers)) for dataset, sources in listed]
    for dataset, sized in plans:
        _say_rates(dataset, sized, config.workers, say)
    if config.disable_cudnn:
        torch.backends.cudnn.enabled = False
    if line := cpu_line(config.device):
        say(line)
    with _locked_folders(config.dataset, "latents"):
        vae = load_vae(config.vae, config.vae_dtype, config.device, WAN_2_1_VAE.channels)
        done = Caching(left_out=sum(len(sources.left_out) for _, sources in listed))
        for number, (dataset, sized) in enumerate(plans, 1):
            remove_unfinished(dataset.cache_directory, "_wan", dataset.recursive)
            wanted, cached = _cache_dataset_latents(dataset, sized, vae, config, number, say)
            done += cached
            if not config.keep_cache:
                done += _delete_others(latents_files(dataset.cache_directory, dataset.recursive), wanted, say)
    for line in [*summary_lines("latents", done), after_latents(config.dataset, listed)]:
        say(line)


def cache_text(config: CacheTextConfig, say: Callable[[str], None]) -> None:
    """Encodes every caption of the datasets and writes their cache files.

    InputError if a dataset or the text encoder cannot be read, another process caches captions into one of the
    folders, or a token is not finite.
    """
    listed = [(dataset, _listed(dataset, config.workers, say)) for dataset in config.dataset.datasets]
    if line := cpu_line(config.device):
        say(line)
    with _locked_folders(config.dataset, "text"):
        encoder = load_text_encoder(config.t5, tokenizer=config.tokenizer, dtype=torch.bfloat16, device=config.device)
        done = Caching(left_out=sum(len(sources.left_out) for _, sources in listed))
        for number, (dataset, sources) in enumerate(listed, 1):
            remove_unfinished(dataset.cache_directory, "_wan_te", dataset.recursive)
            done += _cache_dataset_text(dataset, sources.found, encoder, config, number)
            if not config.keep_cache:
                wanted = {text_path(dataset.cache_directory, source.stem) for source in sources.found}
                done += _delete_others(text_files(dataset.cache_directory, dataset.recursive), wanted, say)
    for line in [*summary_lines("captions", done, encoder.text_len), after_text(config.dataset)]:
        say(line)


@contextmanager
def _locked_folders(config: DatasetConfig, kind: str) -> Iterator[None]:
    """Keeps other processes from writing caches of this kind ("latents" or "text") into the datasets' folders."""
    with ExitStack() as locks:
        for dataset in config.datasets:
            folder = writable_folder(dataset.cache_directory, "cache_directory")
            locks.enter_context(sole_writer(folder, f"wan_{kind}", f"the {kind} cache {folder}", "wait until it ends"))
        yield


def _listed(dataset: AnyDataset, workers: int, say: Callable[[str], None]) -> Sources:
    sources = list_sources(dataset, workers)
    if sources.left_out:
        say(f"pictures without a caption, left out: {count_and_names(sources.left_out)}")
    for note in sources.notes:
        say(note)
    return sources


def _say_rates(dataset: AnyDataset, sized: Sequence[SizedSource], workers: int, say: Callable[[str], None]) -> None:
    if isinstance(dataset, VideoDataset):
        paths = [entry.source.path for entry in sized]
        with ThreadPoolExecutor(workers) as pool:
            rates = zip(paths, pool.map(own_rate, paths), strict=True)
            lines = rate_lines(dataset, {path: rate for path, rate in rates if rate is not None})
        for line in lines:
            say(line)


def _cache_dataset_latents(
    dataset: AnyDataset,
    sized: Sequence[SizedSource],
    vae: WanVAE,
    config: CacheLatentsConfig,
    number: int,
    say: Callable[[str], None],
) -> tuple[set[Path], Caching]:
    """Writes one dataset's latents; returns the paths of all that belong to it, and what was done."""
    batch_size = config.batch_size or dataset.batch_size
    units = _units(dataset, sized, batch_size)
    wanted: set[Path] = set()
    done = Caching()
    made_by = {"vae": _vae_identity(vae), "vae_dtype": str(config.vae_dtype).removeprefix("torch.")}
    reading = _Reading(dataset, {**dataset_settings(dataset), **made_by}, config.recache, _cached_clips(dataset))
    remarked: dict[str, list[Path]] = defaultdict(list)
    with tqdm(total=len(sized), desc=f"latents of dataset {number}", unit="file") as bar:
        for unit, clips in zip(units, _read_ahead(reading, units, config.workers), strict=True):
            if not clips:
                done += Caching(left_out=1)
                say(f"{unit[0].source.path} is shorter than the smallest of its target_frames and is left out")
            wanted |= {clip.path for clip in clips}
            for source, remark in sorted({(clip.source, remark) for clip in clips for remark in clip.remarks}):
                remarked[remark].append(source)
            fresh = [clip for clip in clips if clip.pixels_THWC is not None]
            _encode_clips(fresh, vae, batch_size, config.vae_dtype)
            untold = tuple(clip.path for clip in clips if clip.origin is None)
            done += Caching(made=len(fresh), current=len(clips) - len(fresh), untold=untold)
            bar.update(len(unit))
    what = "pictures" if isinstance(dataset, ImageDataset) else "videos"
    for line in remark_lines(remarked, what, dataset.background):
        say(line)
    return wanted, done


def _cached_clips(dataset: AnyDataset) -> Mapping[str, Sequence[CachedClip]]:
    clips = defaultdict(list)
    if isinstance(dataset, VideoDataset):
        paths = latents_files(dataset.cache_directory, dataset.recursive)
        for stem, clip in filter(None, (parse_clip_name(path, dataset.cache_directory) for path in paths)):
            clips[stem].append(clip)
    return clips


def _vae_identity(vae: WanVAE) -> str:
    """What stays the same if only the decoder, which draws samples, is another one."""
    weights = vae.model.state_dict()
    return weights_identity(weights[name] for name in weights if not name.startswith(("decoder.", "post_quant_conv.")))


def _units(dataset: AnyDataset, sized: Sequence[SizedSource], batch_size: int) -> list[Sequence[SizedSource]]:
    """What is read, encoded and written together: batches of pictures of one bucket, or one video."""
    if isinstance(dataset, VideoDataset):
        return [[entry] for entry in sized]
    buckets = defaultdict(list)
    for entry in sized:
        buckets[entry.bucket].append(entry)
    return [batch for _, members in sorted(buckets.items()) for batch in _batches(members, batch_size)]


def _batches(entries: Sequence, size: int) -> Iterator[Sequence]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _read_ahead(reading: _Reading, units: Iterable[Sequence[SizedSource]], workers: int) -> Iterator[list[_Clip]]:
    """Each unit's clips in order, read by threads that stay only a few units ahead."""
    is_video = isinstance(reading.dataset, VideoDataset)
    read = _read_video_unit if is_video else _read_image_unit
    # Whole videos are large, and their decoder uses several threads itself.
    ahead = 1 if is_video else workers
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque()
        for unit in units:
            waiting.append(pool.submit(read, reading, unit))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_image_unit(reading: _Reading, unit: Sequence[SizedSource]) -> list[_Clip]:
    return [_current_picture(reading, entry) or _read_picture(reading, entry) for entry in unit]


def _current_picture(reading: _Reading, entry: SizedSource) -> _Clip | None:
    path = image_latents_path(reading.dataset.cache_directory, entry.source.stem, entry.size)
    wanted = {**reading.settings, **clip_settings(entry.bucket)}
    clip = _Clip(entry.source.path, path, None, entry.size)
    return _if_current(reading, clip, 1, entry.bucket, wanted)


def _read_picture(reading: _Reading, entry: SizedSource) -> _Clip:
    source = entry.source.path
    path = image_latents_path(reading.dataset.cache_directory, entry.source.stem, entry.size)
    origin = read_origin(source, {**reading.settings, **clip_settings(entry.bucket)})
    picture = read_image(source, entry.bucket, reading.dataset.background)
    origin = _without_unused(origin, picture.remarks)
    return _Clip(source, path, picture.values[None], entry.size, None, picture.remarks, origin)


def _read_video_unit(reading: _Reading, unit: Sequence[SizedSource]) -> list[_Clip]:
    [entry] = unit
    dataset, source, bucket, limit = reading.dataset, entry.source.path, entry.bucket, frames_needed(reading.dataset)
    length = _known_length(reading.cached[entry.source.stem], str(limit))
    if length is not None:  # so that nothing is decoded where all is current
        clips = [_current_clip(reading, entry, *window) for window in clip_windows(dataset, length)]
        if all(clips):
            return clips
    origin = read_origin(source, {**reading.settings, "most_frames": str(limit)})
    video = read_video(source, bucket, dataset.source_fps, limit, dataset.background)
    origin = _without_unused(origin, video.remarks, frames_read=str(len(video.values)))
    clips = []
    for start, frames in clip_windows(dataset, len(video.values)):
        path = clip_latents_path(dataset.cache_directory, entry.source.stem, start, frames, bucket)
        own = replace(origin, made_by={**origin.made_by, **clip_settings(bucket, start, frames)})
        pixels = video.values[start : start + frames]
        fresh = _Clip(source, path, pixels, bucket, frames, video.remarks, own)
        clips.append(_current_clip(reading, entry, start, frames) or fresh)
    return clips


def _current_clip(reading: _Reading, entry: SizedSource, start: int, frames: int) -> _Clip | None:
    source, bucket = entry.source, entry.bucket
    path = clip_latents_path(reading.dataset.cache_directory, source.stem, start, frames, bucket)
    wanted = {**reading.settings, **clip_settings(bucket, start, frames)}
    return _if_current(reading, _Clip(source.path, path, None, bucket, frames), frames, bucket, wanted)


def _if_current(
    reading: _Reading, clip: _Clip, frames: int, bucket: tuple[int, int], wanted: Mapping[str, str]
) -> _Clip | None:
    """The clip without pixels, if its cache need not be made again; None if it must."""
    if reading.recache or latents_problem(clip.path, clip.source, frames, bucket, wanted) is not None:
        return None
    origin = latents_origin(clip.path)
    # What does not say by which rules it was made may be one that we made by older ones.
    is_told = origin is not None or is_plain(reading.dataset, clip.source)
    return replace(clip, origin=origin) if is_told else None


def _known_length(clips: Sequence[CachedClip], limit: str) -> int | None:
    """The frames of a video, from a cache that was made when as many were asked for."""
    for clip in clips:
        made_by = made_by_of(clip.path)
        if made_by.get("most_frames") == limit and made_by.get("frames_read", "").isdecimal():
            return int(made_by["frames_read"])
    return None


def _without_unused(origin: Origin, remarks: frozenset[str], **more: str) -> Origin:
    """The background does not matter for what is not transparent: another one makes no cache stale."""
    made_by = {**origin.made_by, **more}
    if TRANSPARENT not in remarks:
        del made_by["background"]
    return replace(origin, made_by=made_by)


def _encode_clips(clips: Sequence[_Clip], vae: WanVAE, batch_size: int, dtype: torch.dtype) -> None:
    """Encodes a unit in batches of equal shape; writes once all are encoded, so that no video is cached in part."""
    by_shape = defaultdict(list)
    for clip in clips:
        by_shape[clip.pixels_THWC.shape].append(clip)
    batches = [batch for members in by_shape.values() for batch in _batches(members, batch_size)]
    encoded = [_encode_batch(batch, vae).to("cpu", dtype) for batch in batches]
    for batch, latents_BCFHW in zip(batches, encoded, strict=True):
        for clip, latents_CFHW in zip(batch, latents_BCFHW, strict=True):
            write_latents(clip.path, latents_CFHW, clip.named_size, clip.frame_count, clip.origin)


def _encode_batch(batch: Sequence[_Clip], vae: WanVAE) -> torch.Tensor:
    pixels_BTHWC = torch.from_numpy(np.stack([clip.pixels_THWC for clip in batch])).to(vae.device)
    video_BCTHW = rearrange(pixels_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w")
    latents_BCFHW = vae.encode(video_BCTHW.to(vae.dtype))
    for clip, latents_CFHW in zip(batch, latents_BCFHW, strict=True):
        _refuse_not_finite(latents_CFHW, f"the latents for {clip.path.name}", "try --vae_dtype float32")
    return latents_BCFHW


def _refuse_not_finite(values: torch.Tensor, what: str, advice: str) -> None:
    if not torch.isfinite(values).all():
        raise InputError(f"{what} contain NaN or infinity and were not written: {advice}")


def _delete_others(existing: Iterable[Path], wanted: set[Path], say: Callable[[str], None]) -> Caching:
    deleted, others = 0, []
    for path in (path for path in existing if path not in wanted):
        if not is_cache(path):
            others.append(path)
            continue
        try:
            path.unlink()
            deleted += 1
        except OSError as error:  # on Windows, a file that another program has open
            say(f"could not delete {path} ({error.strerror}): delete it by hand")
    return Caching(deleted=deleted, others=tuple(others))


def _cache_dataset_text(
    dataset: AnyDataset, sources: Sequence[Source], encoder: TextEncoder, config: CacheTextConfig, number: int
) -> Caching:
    made_by = {"text_encoder": _encoder_identity(encoder)}
    entries = [(text_path(dataset.cache_directory, source.stem), source.caption) for source in sources]
    stale = [entry for entry in entries if config.recache or text_problem(*entry, made_by) is not None]
    with tqdm(total=len(stale), desc=f"captions of dataset {number}", unit="caption") as bar:
        for batch in _batches(stale, config.batch_size or dataset.batch_size):
            encoded = encoder([caption for _, caption in batch])
            for (path, caption), text_SD in zip(batch, encoded, strict=True):
                _refuse_not_finite(text_SD, f"the tokens for {path.name}", "the text encoder's file may be damaged")
                write_text(path, text_SD.to("cpu", torch.bfloat16), caption, made_by)
            bar.update(len(batch))
    lengths = {source.path: encoder.count_tokens(source.caption) for source in sources}
    cut = {path: tokens for path, tokens in lengths.items() if tokens > encoder.text_len}
    return Caching(made=len(stale), current=len(entries) - len(stale), cut=cut)


def _encoder_identity(encoder: TextEncoder) -> str:
    tokens = torch.tensor([*encoder.tokenize(_SPECIMEN), encoder.text_len])
    return weights_identity([*encoder.model.state_dict().values(), tokens])
