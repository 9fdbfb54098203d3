"""Samples in TensorBoard and wandb: pictures and clips beside their prompts.

TensorBoard's own add_video needs moviepy; a clip is an animated GIF there, which PIL can write.
"""

import io
import re

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from utils.run.samples import SavedSample
from utils.sampling.writers import to_frames

_LARGEST = 320  # pixels of a clip's longer side in TensorBoard: its log files keep every turn
_TITLE = 60  # characters


def show_sample(tracker: GeneralTracker, tag: str, saved: SavedSample, fps: int, step: int) -> None:
    """Shows a sample with its prompt."""
    if tracker.name == "wandb":
        return _show_in_wandb(tracker, tag, saved, step)
    prompt = saved.sample.prompt
    frames = to_frames(saved.video_3THW)
    encoded = encoded_picture(Image.fromarray(frames[0]), "PNG") if len(frames) == 1 else animated_gif(frames, fps)
    add_picture(tracker, tag, encoded, step, title=shortened(prompt, _TITLE), description=prompt)
    tracker.writer.add_text(f"{tag}/prompt", _markdown(prompt), step)


def show_sheet(tracker: GeneralTracker, tag: str, sheet: Image.Image, step: int) -> None:
    """Shows the contact sheet of a run."""
    if tracker.name == "wandb":
        return tracker.log_images({tag: [sheet]}, step=step)
    title, description = "contact sheet", "one row per prompt, one column per turn of samples"
    add_picture(tracker, tag, encoded_picture(sheet, "JPEG"), step, title, description)


def add_picture(tracker: GeneralTracker, tag: str, encoded: bytes, step: int, title: str, description: str) -> None:
    """Adds an encoded picture to TensorBoard, under `title` and with `description` beside it."""
    # Not SummaryWriter.add_image, whose pictures have neither a title nor animation.
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    with Image.open(io.BytesIO(encoded)) as picture:
        size = [str(pixels).encode() for pixels in picture.size]
    metadata = create_summary_metadata(display_name=title, description=_markdown(description))
    value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([*size, encoded]))
    tracker.writer.file_writer.add_summary(Summary(value=[value]), step)


def encoded_picture(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format)
    return buffer.getvalue()


def animated_gif(frames_THWC: np.ndarray, fps: int) -> bytes:
    """The frames, made smaller where they are large, as a GIF that repeats; equal ones in a row become one."""
    pictures = [Image.fromarray(frame) for frame in frames_THWC]
    for picture in pictures:
        picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
    return buffer.getvalue()


def shortened(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"


def _show_in_wandb(tracker: GeneralTracker, tag: str, saved: SavedSample, step: int) -> None:
    import wandb

    # As the file, since a video as an array needs moviepy.
    if saved.path.suffix == ".mp4":
        media = wandb.Video(str(saved.path), caption=saved.sample.prompt, format="mp4")
    else:
        media = wandb.Image(to_frames(saved.video_3THW)[0], caption=saved.sample.prompt)
    tracker.log({tag: media}, step=step)


def _markdown(text: str) -> str:
    """`text` as it is, where Markdown is read."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~&])", r"\\\1", text)
