"""PNG files with what Pillow does not write: samples of any depth, and chunks in any order."""

import struct
import zlib

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of channels


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, samples_HWC, depth=8, before=b"", after=b""):
    """uint samples [height, width, channels] of `depth` bits; chunks `before` and `after` the pixels."""
    height, width, channels = samples_HWC.shape
    if depth < 8:
        per_byte = 8 // depth
        rows = [
            bytes(
                sum(int(v) << depth * (per_byte - 1 - i) for i, v in enumerate(row[start : start + per_byte]))
                for start in range(0, width, per_byte)
            )
            for row in samples_HWC[..., 0]
        ]
    else:
        rows = [row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples_HWC]
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[channels], 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b""))
