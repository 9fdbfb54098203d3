"""The two caching jobs: a dataset's pictures and clips to latents, its captions to encoded tokens.

B batch, C channels, T frames, H W height and width in pixels, F h w latent frames, height, width.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from utils.data.cache_files import (
    clip_latents_path,
    image_latents_path,
    latents_files,
    latents_problem,
    remove_unfinished,
    text_files,
    text_path,
    text_problem,
    write_latents,
    write_text,
)
from utils.data.pictures import read_image
from utils.data.rates import own_rate, rate_lines
from utils.data.remarks import count_and_names, remark_lines
from utils.data.sizes import SizedSource, clip_windows, frames_needed, sized_sources
from utils.data.sources import AnyDataset, DatasetConfig, ImageDataset, Source, VideoDataset, list_sources
from utils.data.videos import read_video
from utils.devices import cpu_line
from utils.files import sole_writer, writable_folder
from wan.configs import WAN_2_1_VAE
from wan.errors import InputError
from wan.text_encoder import TextEncoder, load_text_encoder
from wan.vae import WanVAE, load_vae


@dataclass(frozen=True)
class CacheLatentsConfig:
    """`batch_size` None takes each dataset's own; `workers` are the threads that read pictures and videos ahead."""

    dataset: DatasetConfig
    vae: Path
    device: torch.device
    vae_dtype: torch.dtype = torch.bfloat16
    batch_size: int | None = None
    workers: int = 1
    skip_existing: bool = False
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
    skip_existing: bool = False
    keep_cache: bool = False


@dataclass(frozen=True)
class _Clip:
    """One picture or clip; no pixels: its cache is current. `named_size` is the one in its cache's name.

    `remarks` are what there is to say about the file at `source`, if it was read.
    """

    source: Path
    path: Path
    pixels_THWC: np.ndarray | None
    named_size: tuple[int, int]
    frame_count: int | None = None
    remarks: frozenset[str] = frozenset()


def cache_latents(config: CacheLatentsConfig, say: Callable[[str], None]) -> None:
    """Encodes every picture and clip of the datasets and writes their cache files.

    InputError if a dataset, a file or the VAE cannot be read, another process caches latents into one of the folders,
    or a latent is not finite.
    """
    # Sizes before the VAE, so that files that cannot be opened are found before anything is loaded or written.
    plans = [
        (dataset, sized_sources(dataset, _captioned(dataset, config.workers, say), config.workers))
        for dataset in config.dataset.datasets
    ]
    for dataset, sized in plans:
        _say_rates(dataset, sized, config.workers, say)
    if config.disable_cudnn:
        torch.backends.cudnn.enabled = False
    if line := cpu_line(config.device):
        say(line)
    with _locked_folders(config.dataset, "latents"):
        vae = load_vae(config.vae, config.vae_dtype, config.device, WAN_2_1_VAE.channels)
        for number, (dataset, sized) in enumerate(plans, 1):
            remove_unfinished(dataset.cache_directory, "_wan", dataset.recursive)
            wanted = _cache_dataset_latents(dataset, sized, vae, config, number, say)
            if not config.keep_cache:
                _delete_others(latents_files(dataset.cache_directory, dataset.recursive), wanted, say)


def cache_text(config: CacheTextConfig, say: Callable[[str], None]) -> None:
    """Encodes every caption of the datasets and writes their cache files.

    InputError if a dataset or the text encoder cannot be read, another process caches captions into one of the
    folders, or a token is not finite.
    """
    plans = [(dataset, _captioned(dataset, config.workers, say)) for dataset in config.dataset.datasets]
    if line := cpu_line(config.device):
        say(line)
    with _locked_folders(config.dataset, "text"):
        encoder = load_text_encoder(config.t5, tokenizer=config.tokenizer, dtype=torch.bfloat16, device=config.device)
        for number, (dataset, sources) in enumerate(plans, 1):
            remove_unfinished(dataset.cache_directory, "_wan_te", dataset.recursive)
            _cache_dataset_text(dataset, sources, encoder, config, number)
            if not config.keep_cache:
                wanted = {text_path(dataset.cache_directory, source.stem) for source in sources}
                _delete_others(text_files(dataset.cache_directory, dataset.recursive), wanted, say)


@contextmanager
def _locked_folders(config: DatasetConfig, kind: str) -> Iterator[None]:
    """Keeps other processes from writing caches of this kind ("latents" or "text") into the datasets' folders."""
    with ExitStack() as locks:
        for dataset in config.datasets:
            folder = writable_folder(dataset.cache_directory, "cache_directory")
            locks.enter_context(sole_writer(folder, f"wan_{kind}", f"the {kind} cache {folder}", "wait until it ends"))
        yield


def _captioned(dataset: AnyDataset, workers: int, say: Callable[[str], None]) -> Sequence[Source]:
    sources = list_sources(dataset, workers)
    if sources.left_out:
        say(f"pictures without a caption, left out: {count_and_names(sources.left_out)}")
    for note in sources.notes:
        say(note)
    return sources.found


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
) -> set[Path]:
    """Writes one dataset's latents; returns the paths of all that belong to it, including those that were skipped."""
    batch_size = config.batch_size or dataset.batch_size
    units = _units(dataset, sized, batch_size)
    wanted: set[Path] = set()
    remarked: dict[str, list[Path]] = defaultdict(list)
    with tqdm(total=len(sized), desc=f"latents of dataset {number}", unit="file") as bar:
        for unit, clips in zip(units, _read_ahead(dataset, units, config), strict=True):
            if not clips:
                say(f"{unit[0].source.path} is shorter than the smallest of its target_frames and is left out")
            wanted |= {clip.path for clip in clips}
            for source, remark in sorted({(clip.source, remark) for clip in clips for remark in clip.remarks}):
                remarked[remark].append(source)
            _encode_clips([clip for clip in clips if clip.pixels_THWC is not None], vae, batch_size, config.vae_dtype)
            bar.update(len(unit))
    what = "pictures" if isinstance(dataset, ImageDataset) else "videos"
    for line in remark_lines(remarked, what, dataset.background):
        say(line)
    return wanted


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


def _read_ahead(
    dataset: AnyDataset, units: Iterable[Sequence[SizedSource]], config: CacheLatentsConfig
) -> Iterator[list[_Clip]]:
    """Each unit's clips in order, read by threads that stay only a few units ahead."""
    is_video = isinstance(dataset, VideoDataset)
    read = _read_video_unit if is_video else _read_image_unit
    # Whole videos are large, and their decoder uses several threads itself.
    ahead = 1 if is_video else config.workers
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque()
        for unit in units:
            waiting.append(pool.submit(read, dataset, unit, config.skip_existing))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_image_unit(dataset: ImageDataset, unit: Sequence[SizedSource], skip_existing: bool) -> list[_Clip]:
    clips = []
    for entry in unit:
        source = entry.source.path
        path = image_latents_path(dataset.cache_directory, entry.source.stem, entry.size)
        if skip_existing and latents_problem(path, source, 1, entry.bucket) is None:
            clips.append(_Clip(source, path, None, entry.size))
        else:
            picture = read_image(source, entry.bucket, dataset.background)
            clips.append(_Clip(source, path, picture.values[None], entry.size, remarks=picture.remarks))
    return clips


def _read_video_unit(dataset: VideoDataset, unit: Sequence[SizedSource], skip_existing: bool) -> list[_Clip]:
    [entry] = unit
    source, bucket = entry.source, entry.bucket
    video = read_video(source.path, bucket, dataset.source_fps, frames_needed(dataset), dataset.background)
    clips = []
    for start, frames in clip_windows(dataset, len(video.values)):
        path = clip_latents_path(dataset.cache_directory, source.stem, start, frames, bucket)
        skipped = skip_existing and latents_problem(path, source.path, frames, bucket) is None
        pixels = None if skipped else video.values[start : start + frames]
        clips.append(_Clip(source.path, path, pixels, bucket, frames, video.remarks))
    return clips


def _encode_clips(clips: Sequence[_Clip], vae: WanVAE, batch_size: int, dtype: torch.dtype) -> None:
    """Encodes a unit in batches of equal shape; writes once all are encoded, so that no video is cached in part."""
    by_shape = defaultdict(list)
    for clip in clips:
        by_shape[clip.pixels_THWC.shape].append(clip)
    batches = [batch for members in by_shape.values() for batch in _batches(members, batch_size)]
    encoded = [_encode_batch(batch, vae).to("cpu", dtype) for batch in batches]
    for batch, latents_BCFHW in zip(batches, encoded, strict=True):
        for clip, latents_CFHW in zip(batch, latents_BCFHW, strict=True):
            write_latents(clip.path, latents_CFHW, clip.named_size, clip.frame_count)


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


def _delete_others(existing: Iterable[Path], wanted: set[Path], say: Callable[[str], None]) -> None:
    deleted = 0
    for path in (path for path in existing if path not in wanted):
        try:
            path.unlink()
            deleted += 1
        except OSError as error:  # on Windows, a file that another program has open
            say(f"could not delete {path} ({error.strerror}): delete it by hand")
    if deleted:
        say(f"deleted {deleted} cache files of sources that are not in this dataset (--keep_cache keeps them)")


def _cache_dataset_text(
    dataset: AnyDataset, sources: Sequence[Source], encoder: TextEncoder, config: CacheTextConfig, number: int
) -> None:
    entries = [(text_path(dataset.cache_directory, source.stem), source.caption) for source in sources]
    if config.skip_existing:
        entries = [entry for entry in entries if text_problem(*entry) is not None]
    with tqdm(total=len(entries), desc=f"captions of dataset {number}", unit="caption") as bar:
        for batch in _batches(entries, config.batch_size or dataset.batch_size):
            encoded = encoder([caption for _, caption in batch])
            for (path, caption), text_SD in zip(batch, encoded, strict=True):
                _refuse_not_finite(text_SD, f"the tokens for {path.name}", "the text encoder's file may be damaged")
                write_text(path, text_SD.to("cpu", torch.bfloat16), caption)
            bar.update(len(batch))
