"""Writing samples: PNG, mp4 and latent files, each of them complete or absent.

Shapes: T frames, H W height and width in pixels, C latent channels, F h w latent frames, height, width.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save
from torch import Tensor

from utils import locks
from utils.locks import UNFINISHED, finished_name
from utils.sampling.denoising import check_finite
from utils.sampling.sample_metadata import PARAMETERS, SETTINGS, text_chunks
from utils.slice_saving import whole_file
from wan.configs import WAN_2_1_VAE, WAN_2_2_VAE
from wan.errors import InputError
from wan.state_dict_files import read_state_dict

LATENT_KEY = "latent"
NO_SETTINGS: Mapping[str, object] = MappingProxyType({})
_CHANNELS = (WAN_2_1_VAE.channels, WAN_2_2_VAE.channels)
_BEFORE_FRAMES = [[*batch, channels] for batch in ([], [1]) for channels in _CHANNELS]  # older files have a batch axis
_LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What makes x264 give the same bytes for the same frames: with more threads it did not on a busy CPU, and with the
# CPU's own algorithms 54 of 3,000 encodings in a used heap had other bytes (none of 2,700 without).
_THREADS = 1
_X264 = {"x264-params": "cpu-independent=1"}
_NAME = re.compile(r"\d{8}-\d{6}-\d{3}_.*\.(png|mp4|safetensors)")  # the names of generation


def to_frames(video_3THW: Tensor) -> np.ndarray:
    """uint8 [T, H, W, 3] of a video [3, T, H, W] in [-1, 1]; values outside are clamped."""
    levels = ((video_3THW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def save_sample(
    folder: Path, stem: str, video_3THW: Tensor, fps: int, settings: Mapping[str, object] = NO_SETTINGS
) -> Path:
    """Saves {stem}_000.png for one frame, else {stem}.mp4; returns the path."""
    if video_3THW.shape[1] == 1:
        return save_image(folder / f"{stem}_000.png", video_3THW[:, 0], settings)
    return save_video(folder / f"{stem}.mp4", video_3THW, fps, settings)


def save_frames(folder: Path, stem: str, video_3THW: Tensor, settings: Mapping[str, object] = NO_SETTINGS) -> Path:
    """Saves every frame: {stem}_000.png if there is one, else {stem}/{stem}_000.png, {stem}/{stem}_001.png, ..."""
    if video_3THW.shape[1] == 1:
        return save_image(folder / f"{stem}_000.png", video_3THW[:, 0], settings)
    for number, frame_3HW in enumerate(video_3THW.unbind(1)):
        save_image(folder / stem / f"{stem}_{number:03d}.png", frame_3HW, settings)
    return folder / stem


def save_image(path: Path, frame_3HW: Tensor, settings: Mapping[str, object] = NO_SETTINGS) -> Path:
    """Saves one frame [3, H, W] in [-1, 1] as PNG, with its sample's settings in text chunks."""
    picture = Image.fromarray(to_frames(frame_3HW[:, None])[0])
    chunks = PngImagePlugin.PngInfo()
    for name, text in text_chunks(settings).items():
        chunks.add_text(name, text)
    with _completed(path) as file:
        picture.save(file, format="PNG", pnginfo=chunks)
    return path


def save_video(path: Path, video_3THW: Tensor, fps: int, settings: Mapping[str, object] = NO_SETTINGS) -> Path:
    """Saves a video [3, T, H, W] in [-1, 1] as H.264 mp4, the same bytes for the same frames; H and W are even."""
    import av  # here, because only videos need it

    frames = to_frames(video_3THW)
    with _completed(path) as file, av.open(file, "w", format="mp4") as container:
        chunks = text_chunks(settings)
        # Two of the few names that an mp4 has room for.
        container.metadata.update({"comment": chunks[PARAMETERS], "description": chunks[SETTINGS]} if chunks else {})
        # crf 10 is what Wan's own `quality=8` becomes for libx264.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", **_X264})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = _THREADS
        for frame in frames:
            # Converted here: the encoder's own conversion (PyAV 18) now and then changed a frame's bits under load.
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def save_latent(path: Path, latent_CFhw: Tensor, metadata: Mapping[str, str]) -> Path:
    """Saves a normalised latent as float32 under the key `latent`, as musubi-tuner's generation does."""
    with _completed(path) as file:
        file.write(save({LATENT_KEY: latent_CFhw.float().cpu().contiguous()}, dict(metadata)))
    return path


def load_latent(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The latent [C, F, h, w] (float32) and the metadata of a latent file; InputError if it cannot be decoded."""
    tensors, metadata = read_state_dict(path, "latent file")
    latent = tensors.get(LATENT_KEY)
    shape = None if latent is None else list(latent.shape)
    if shape is None or shape[:-3] not in _BEFORE_FRAMES or 0 in shape:
        found = "none" if shape is None else f"the shape {shape}"
        raise InputError(
            f"latent file {path}: `{LATENT_KEY}` of [{_CHANNELS[0]}, frames, height, width] expected "
            f"({_CHANNELS[1]} channels for ti2v-5B), found {found}"
        )
    if latent.dtype not in _LATENT_DTYPES:
        raise InputError(f"latent file {path}: `{LATENT_KEY}` is {latent.dtype}, not float32, float16 or bfloat16")
    check_finite(latent, f"latent file {path}", "generate it again")
    return latent.float().reshape(shape[-4:]), metadata


def remove_unfinished(folder: Path) -> None:
    """Deletes the unfinished outputs in `folder` of writers that are gone: others may be at work in it."""
    paths = [*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"*/*{UNFINISHED}")]
    locks.remove_unfinished(path for path in paths if _NAME.fullmatch(finished_name(path)))


@contextmanager
def _completed(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` once written, its folder created if missing; a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        yield file
