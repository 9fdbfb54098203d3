"""Small copies of pictures, and of clips' first frames, as they stand in a page."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from utils.pixels.pictures import image_size, read_image
from utils.pixels.videos import read_video, video_size
from wan.errors import InputError

CLIPS = {".mp4"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
_LONGEST = 320  # pixels of the longer side


def thumbnail(path: Path) -> str:
    """The small copy as an element of the page that holds its bytes; the name of a file that cannot be read."""
    name = escape(path.name, quote=True)
    is_clip = path.suffix.lower() in CLIPS
    try:
        small = _first_frame(path) if is_clip else _picture(path)
    except InputError:  # a page about forty concepts does not fail because of one damaged sample
        return f'<p class="soft">{name} cannot be read</p>'
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=88)
    data = base64.b64encode(stored.getvalue()).decode()
    size = f'width="{small.width}" height="{small.height}"'
    title = f"{name}, first frame of the clip" if is_clip else name
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{name}" title="{title}">'


def _picture(path: Path) -> Image.Image:
    return Image.fromarray(read_image(path, _small(image_size(path))).values)


def _first_frame(path: Path) -> Image.Image:
    return Image.fromarray(read_video(path, _small(video_size(path)), limit=1).values[0])


def _small(size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) of the copy: never enlarged, at least a pixel."""
    scale = min(1.0, _LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
