"""Which files are pictures and videos, and opening them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import file_problem, folder_entries
from utils.pixels.tiffs import SAVE_AS_PNG, kind_of
from wan.errors import InputError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

try:
    import pillow_jxl  # noqa: F401  (importing it registers the format with Pillow)

    _JXL = (".jxl",)
except ImportError:
    _JXL = ()
try:
    import pillow_heif

    pillow_heif.register_heif_opener()
    _HEIF = (".heic", ".heif", ".hif")
except ImportError:
    _HEIF = ()

# musubi-tuner lists the first ones. Where only they were meant, the others are often originals of the same name.
COMMON_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", *_JXL)
IMAGE_SUFFIXES = (
    *COMMON_IMAGE_SUFFIXES,
    *(".tif", ".tiff", ".jfif", ".jpe", ".gif", ".apng", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pnm"),
    *_HEIF,
)
COMMON_VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".gif")
VIDEO_SUFFIXES = (
    *COMMON_VIDEO_SUFFIXES,
    *(".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".ogv", ".vob", ".mxf", ".qt", ".divx", ".apng"),
)
# What stands beside pictures on purpose: captions, caches, lists, and what file managers and other tools leave.
SIDECAR_SUFFIXES = (
    *(".txt", ".caption", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".csv", ".xml", ".xmp", ".aae", ".md", ".log"),
    *(".safetensors", ".npz", ".npy", ".pt", ".lock", ".ini", ".db", ".part", ".tmp", ".py", ".sh", ".bat", ".zip"),
)
CONVERT = "convert them to .png or .mp4 if they should be"
_PLUGINS = {
    ".jxl": "pip install pillow-jxl-plugin",
    ".heic": "pip install pillow-heif",
    ".heif": "pip install pillow-heif",
    ".hif": "pip install pillow-heif",
}
_EMPTY = "it is empty (0 bytes)"
# Where and how files of these kinds begin. Phones and web pages give them other names.
_HEADS = {
    **{(4, b"ftyp" + brand): ".heic" for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")},
    (0, b"\xff\x0a"): ".jxl",
    (0, b"\0\0\0\x0cJXL "): ".jxl",
    **{(4, b"ftyp" + brand): ".mp4" for brand in (b"isom", b"mp42", b"iso2", b"mp41", b"avc1", b"qt  ")},
    (0, b"\x1a\x45\xdf\xa3"): ".mkv",
}


def how_to_read(suffix: str) -> str:
    """What a user can do about files of a kind that is not read, as the end of a sentence."""
    if suffix in _PLUGINS:
        return f"{_PLUGINS[suffix]} reads them"
    if suffix in IMAGE_SUFFIXES:
        return "give pictures a dataset of their own, with image_directory"
    if suffix in VIDEO_SUFFIXES:
        return "give videos a dataset of their own, with video_directory"
    return CONVERT


def is_hidden(path: Path) -> bool:
    """Whether file managers hide it, as they do macOS's ._name companions, .DS_Store and .thumbnails."""
    return path.name.startswith(".")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder that stands for a video, sorted; InputError if there are none."""
    named = [path for path in folder_entries(folder, "folder") if path.suffix.lower() in IMAGE_SUFFIXES]
    pictures = [path for path in named if not is_hidden(path) and file_problem(path) is None]
    if not pictures:
        raise InputError(f"{folder} holds no pictures; looked for {' '.join(IMAGE_SUFFIXES)}")
    return pictures


@contextmanager
def readable_media(path: Path) -> Iterator[None]:
    """InputError for a file that cannot be opened or decoded, in place of whatever the libraries raise."""
    if problem := file_problem(path):  # opening a named pipe, for example, would wait forever
        raise InputError(f"{path} {problem}")
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # Pillow's and FFmpeg's readers raise whatever a damaged file leads them to
        raise InputError(f"{path} cannot be read: {_reason(path, error)}") from None


@contextmanager
def opened_video(path: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A video's file with the first video in it, ready to be decoded; InputError if there is none."""
    import av  # here, because workers that load caches open no video

    with readable_media(path), av.open(path) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no video in it")
        yield container, container.streams.video[0]


def _reason(path: Path, error: Exception) -> str:
    if "cannot identify" in str(error):
        return _what_it_is(path)
    if "Invalid data found" in str(error):  # FFmpeg's words, with a number of nine digits
        return "it is damaged, or what it holds is not a video" if path.stat().st_size else _EMPTY
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _what_it_is(path: Path) -> str:
    """What a file holds that Pillow does not know, whatever its name is, and what to do."""
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        return _EMPTY
    suffix = next((suffix for start, suffix in _HEADS.items() if head[start[0] :].startswith(start[1])), None)
    if suffix and suffix != path.suffix.lower():
        return f"whatever its name says, it is {suffix[1:].upper()}, and {how_to_read(suffix)}"
    hint = _PLUGINS.get(path.suffix.lower())
    if hint:
        return f"it needs a library, {hint}"
    if kind := kind_of(path):
        return f"it is a TIFF with {kind}, which is not supported: {SAVE_AS_PNG}"
    return f"what it holds is not a picture of a kind that is known: {SAVE_AS_PNG}"
