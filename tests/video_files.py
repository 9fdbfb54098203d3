"""Small videos with what a test is about: tags, pixel formats, display matrices, times of frames."""

import struct
from fractions import Fraction

import av
import numpy as np


def write_video(path, frames, pix_fmt="bgr0", codec="ffv1", rate=16, times=None, aspect=None, **tags):
    """Frames, lossless: uint8 [height, width, 3 or 4], or planes of YUV as [3, height, width] of pix_fmt.

    `times` are in milliseconds. `tags` are colorspace, color_range, color_trc and color_primaries by their numbers.
    """
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames[0].shape[-2:] if frames[0].shape[0] == 3 else frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(frames):
            frame = _frame(pixels, pix_fmt)
            for name, value in tags.items():
                setattr(frame, name, value)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _frame(pixels, pix_fmt):
    if pixels.shape[0] == 3:
        frame = av.VideoFrame(pixels.shape[2], pixels.shape[1], pix_fmt)
        for plane, values in zip(frame.planes, pixels, strict=True):
            row = plane.line_size // values.itemsize
            padded = np.zeros((plane.height, row), values.dtype)
            padded[:, : values.shape[1]] = values
            plane.update(padded.tobytes())
        return frame
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
    return frame.reformat(format=pix_fmt)


def set_matrix(path, a, b, c, d):
    """Writes a display matrix into the header of an mp4 or mov file's only track."""
    content = bytearray(path.read_bytes())
    header = content.find(b"tkhd")
    at = header + 8 + (32 if content[header + 4] == 1 else 20) + 16
    content[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
