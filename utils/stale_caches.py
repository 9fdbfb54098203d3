"""Whether a cache file still belongs to its source and its dataset."""

from pathlib import Path

from utils.cache_files import latents_shape, text_header

LATENT_CHANNELS = 16
FRAME_STRIDE = 4
PIXEL_STRIDE = 8


def latents_problem(cache: Path, source: Path, frames: int, bucket: tuple[int, int]) -> str | None:
    """What is wrong with the latents of `frames` frames brought to `bucket` (width, height); None if nothing is."""
    if not cache.is_file():
        return "has no latent cache"
    width, height = bucket
    wanted = (LATENT_CHANNELS, (frames - 1) // FRAME_STRIDE + 1, height // PIXEL_STRIDE, width // PIXEL_STRIDE)
    found = latents_shape(cache)
    if found != wanted:
        return f"was cached as latents {_times(found)}, the dataset file now asks for {_times(wanted)}"
    if _changed_at(source) > cache.stat().st_mtime_ns:
        return "is newer than its latent cache"
    return None


def text_problem(cache: Path, caption: str) -> str | None:
    """What is wrong with the encoded tokens of a caption; None if nothing is."""
    if not cache.is_file():
        return "has no text cache"
    cached_caption = text_header(cache)[1]
    # A file that does not tell its caption cannot be compared.
    return None if cached_caption in (None, caption) else "has another caption than its text cache"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _changed_at(source: Path) -> int:
    files = source.iterdir() if source.is_dir() else [source]
    return max(file.stat().st_mtime_ns for file in files)
