"""The two caching jobs: a dataset's pictures and clips to latents, its captions to encoded tokens.

B batch, C channels, T frames, H W height and width in pixels, F h w latent frames, height, width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from utils.data.cache_files import (
    is_cache,
    latents_files,
    read_clip,
    read_condition,
    read_latents,
    remove_unfinished,
    text_files,
    text_path,
    write_latents,
    write_text,
)
from utils.data.cache_problems import CLIP, CONDITION, LATENTS, cache_parts, text_problem
from utils.data.cache_summary import Caching, after_latents, after_text, rate_lines, summary_lines
from utils.data.clips import Clip, batched_units, batches, how_to_read, read_ahead
from utils.data.origins import weights_identity
from utils.data.sizes import SizedSource, sized_sources
from utils.data.sources import (
    AnyDataset,
    DatasetConfig,
    ImageDataset,
    Source,
    Sources,
    VideoDataset,
    list_sources,
    texts_to_encode,
)
from utils.devices import cpu_line
from utils.files import writable_folder
from utils.learning.conditions import picture_condition
from utils.locks import sole_writer
from utils.pixels.rates import own_rate
from utils.pixels.remarks import count_and_names, remark_lines
from wan.configs import Conditions
from wan.errors import InputError
from wan.float8 import rounded_tensors
from wan.image_encoder import ImageEncoder, load_image_encoder
from wan.text_encoder import TextEncoder, load_text_encoder
from wan.vae import WanVAE, load_vae

_SPECIMEN = 'Ein Kätzchen, 一只猫 and a cat\'s "3" kittens'  # tokenizers that differ are likely to differ here


@dataclass(frozen=True)
class CacheLatentsConfig:
    """`batch_size` None takes each dataset's own; `workers` are the threads that read pictures and videos ahead.

    The datasets say which VAE they are for, and what is cached beside latents; `clip` is needed if CLIP tokens are.
    """

    dataset: DatasetConfig
    vae: Path
    device: torch.device
    clip: Path | None = None
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
    fp8_t5: bool = False
    batch_size: int | None = None
    workers: int = 1
    recache: bool = False
    keep_cache: bool = False


@dataclass(frozen=True)
class _Encoders:
    """What makes latent caches; `conditions` are what is made beside the latents."""

    vae: WanVAE
    clip: ImageEncoder | None
    conditions: Conditions
    dtype: torch.dtype  # of the latents in the cache


def cache_latents(config: CacheLatentsConfig, say: Callable[[str], None]) -> None:
    """Encodes every picture and clip of the datasets and writes their cache files.

    For image-to-video models with what they are given: the first frames, or the first and last ones. InputError if a
    dataset, a file, the VAE or CLIP cannot be read, another process caches latents into one of the folders, or a latent
    is not finite.
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
        encoders = _load_encoders(config)
        done = Caching(left_out=sum(len(sources.left_out) for _, sources in listed))
        for number, (dataset, sized) in enumerate(plans, 1):
            remove_unfinished(dataset.cache_directory, "_wan", dataset.recursive)
            wanted, cached = _cache_dataset_latents(dataset, sized, encoders, config, number, say)
            done += cached
            if not config.keep_cache:
                done += _delete_others(latents_files(dataset.cache_directory, dataset.recursive), wanted, say)
    for line in [*summary_lines("latents", done), after_latents(config.dataset, listed, done)]:
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
        encoder = load_text_encoder(config.t5, config.tokenizer, device=config.device, fp8=config.fp8_t5)
        done = Caching(left_out=sum(len(sources.left_out) for _, sources in listed))
        for number, (dataset, sources) in enumerate(listed, 1):
            remove_unfinished(dataset.cache_directory, "_wan_te", dataset.recursive)
            done += _cache_dataset_text(dataset, sources.found, encoder, config, number)
            if not config.keep_cache:
                wanted = {text_path(dataset.cache_directory, source.stem) for source in sources.found}
                done += _delete_others(text_files(dataset.cache_directory, dataset.recursive), wanted, say)
    for line in [*summary_lines("captions", done, encoder.text_len), after_text(config.dataset)]:
        say(line)


def _load_encoders(config: CacheLatentsConfig) -> _Encoders:
    conditions = config.dataset.conditions
    assert conditions.clip == (config.clip is not None)
    vae = load_vae(config.vae, config.vae_dtype, config.device, config.dataset.latents.channels)
    clip = None if config.clip is None else load_image_encoder(config.clip, device=config.device)
    return _Encoders(vae, clip, conditions, config.vae_dtype)


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
    encoders: _Encoders,
    config: CacheLatentsConfig,
    number: int,
    say: Callable[[str], None],
) -> tuple[set[Path], Caching]:
    """Writes one dataset's latents; returns the paths of all that belong to it, and what was done."""
    batch_size = config.batch_size or dataset.batch_size
    wanted: set[Path] = set()
    done = Caching()
    made_by = {"vae": _vae_identity(encoders.vae), "vae_dtype": str(encoders.dtype).removeprefix("torch.")}
    how = how_to_read(dataset, made_by, encoders.clip and _clip_identity(encoders.clip), config.recache)
    units = batched_units(dataset, sized, batch_size)
    short: list[Path] = []
    remarked: dict[str, list[Path]] = defaultdict(list)
    with tqdm(total=len(sized), desc=f"latents of dataset {number}", unit="file") as bar:
        for unit, clips in zip(units, read_ahead(how, units, config.workers), strict=True):
            if not clips:
                short.append(unit[0].source.path)
            wanted |= {clip.path for clip in clips}
            for source, remark in sorted({(clip.source, remark) for clip in clips for remark in clip.remarks}):
                remarked[remark].append(source)
            fresh = [clip for clip in clips if clip.pixels_THWC is not None]
            _encode_clips(fresh, encoders, batch_size)
            done += _done(clips, encoders.conditions)
            bar.update(len(unit))
    if short:
        say(f"videos shorter than the smallest of their target_frames, left out: {count_and_names(short)}")
    what = "pictures" if isinstance(dataset, ImageDataset) else "videos"
    for line in remark_lines(remarked, what, dataset.background):
        say(line)
    return wanted, done + Caching(left_out=len(short))


def _done(clips: Sequence[Clip], conditions: Conditions) -> Caching:
    fresh = [clip for clip in clips if clip.pixels_THWC is not None]
    return Caching(
        made=len(fresh),
        current=len(clips) - len(fresh),
        added_to=sum(bool(clip.kept) for clip in fresh),
        one_frame=sum(conditions.are_all_of(clip.frame_count or 1) for clip in clips),
        untold=tuple(clip.path for clip in clips if clip.origin is None),
    )


def _vae_identity(vae: WanVAE) -> str:
    """What stays the same if only the decoder, which draws samples, is another one."""
    weights = vae.model.state_dict()
    return weights_identity(weights[name] for name in weights if not name.startswith(("decoder.", "post_quant_conv.")))


def _clip_identity(clip: ImageEncoder) -> str:
    """The same in every precision that it is loaded in."""
    return weights_identity(tensor.half() for tensor in clip.model.state_dict().values())


def _encode_clips(clips: Sequence[Clip], encoders: _Encoders, batch_size: int) -> None:
    """Encodes a unit in batches of equal shape; writes once all are encoded, so that no video is cached in part."""
    alike = defaultdict(list)
    for clip in clips:
        alike[clip.pixels_THWC.shape, clip.kept].append(clip)
    together = [batch for members in alike.values() for batch in batches(members, batch_size)]
    encoded = [_encode_batch(batch, encoders) for batch in together]
    for batch, parts in zip(together, encoded, strict=True):
        for clip, own in zip(batch, parts, strict=True):
            _write_clip(clip, own)


def _write_clip(clip: Clip, made: Mapping[str, torch.Tensor]) -> None:
    """Writes a clip's cache anew, with the parts of it that are kept."""
    read = {LATENTS: read_latents, CONDITION: read_condition, CLIP: read_clip}
    parts = {**made, **{part: read[part](clip.path) for part in clip.kept}}
    rest = (clip.named_size, clip.frame_count, clip.origin, clip.mask_HW, parts.get(CONDITION), parts.get(CLIP))
    write_latents(clip.path, parts[LATENTS], *rest)


def _encode_batch(batch: Sequence[Clip], encoders: _Encoders) -> list[dict[str, torch.Tensor]]:
    """For each of some clips of one shape, the parts that are not kept, on the CPU, in the dtypes of the cache."""
    vae, conditions = encoders.vae, encoders.conditions
    parts = cache_parts(conditions) - batch[0].kept
    pixels_BTHWC = torch.from_numpy(np.stack([clip.pixels_THWC for clip in batch])).to(vae.device)
    video_BCTHW = rearrange(pixels_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w")
    pictures_BCHW = [video_BCTHW[:, :, frame] for frame in (0, -1)[: conditions.pictures]]
    made = {}
    if LATENTS in parts:
        made[LATENTS] = vae.encode(video_BCTHW).to("cpu", encoders.dtype)
    if CONDITION in parts:
        made[CONDITION] = picture_condition(vae, pictures_BCHW, video_BCTHW.shape[2]).to("cpu", encoders.dtype)
    if CLIP in parts:
        tokens_BPI = torch.cat([encoders.clip.encode(picture) for picture in pictures_BCHW], dim=1)
        made[CLIP] = tokens_BPI.to("cpu", torch.float16)
    for part, values in made.items():
        _refuse_not_finite(part, values, batch)
    return [{part: values[number] for part, values in made.items()} for number in range(len(batch))]


def _refuse_not_finite(part: str, values: torch.Tensor, batch: Sequence[Clip]) -> None:
    for clip, own in zip(batch, values, strict=True):
        if part == CLIP:
            _check_finite(own, f"the CLIP tokens for {clip.path.name}", "the file of --clip may be damaged")
        else:
            _check_finite(own, f"the latents for {clip.path.name}", "try --vae_dtype float32")


def _check_finite(values: torch.Tensor, what: str, advice: str) -> None:
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
    made_by = {"text_encoder": _encoder_identity(encoder), "fp8_t5": "on" if config.fp8_t5 else "off"}
    entries = [(text_path(dataset.cache_directory, own.stem), texts_to_encode(dataset, own)) for own in sources]
    stale = [entry for entry in entries if config.recache or text_problem(*entry, made_by) is not None]
    with tqdm(total=len(stale), desc=f"captions of dataset {number}", unit="file") as bar:
        for batch in batches(stale, config.batch_size or dataset.batch_size):
            encoded = _encode_texts({text: path for path, texts in batch for text in texts}, encoder, len(batch))
            for path, texts in batch:
                first, *further = [(text, encoded[text]) for text in texts]
                write_text(path, first[1], first[0], made_by, further)
            bar.update(len(batch))
    lengths = {source.path: max(map(encoder.count_tokens, source.captions)) for source in sources}
    cut = {path: tokens for path, tokens in lengths.items() if tokens > encoder.text_len}
    return Caching(made=len(stale), current=len(entries) - len(stale), cut=cut)


def _encode_texts(texts: Mapping[str, Path], encoder: TextEncoder, batch_size: int) -> dict[str, torch.Tensor]:
    """Each text's tokens [S, D] in bf16 on the CPU; `texts` says for which cache file each is."""
    encoded = {}
    for batch in batches(list(texts), batch_size):
        for text, text_SD in zip(batch, encoder(list(batch)), strict=True):
            name = texts[text].name
            _check_finite(text_SD, f"the tokens for {name}", "the text encoder's file may be damaged")
            encoded[text] = text_SD.to("cpu", torch.bfloat16)
    return encoded


def _encoder_identity(encoder: TextEncoder) -> str:
    tokens = torch.tensor([*encoder.tokenize(_SPECIMEN), encoder.text_len])
    return weights_identity([*encoder.model.state_dict().values(), *rounded_tensors(encoder.model), tokens])
