"""Frame rates of videos: what a file says, and which frames remain at the rate that a model was trained at."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from utils.pixels.media import opened_video

FILE_RATE = "file"  # the source_fps that takes each file's own rate
_TOLERANCE = 0.03  # 29.97 is 30, and a phone's 29.5 as well; 24 is not 25
_MOST_PACKETS = 2_000  # a minute, so that long files are not read whole


@dataclass(frozen=True)
class Rate:
    """A video's own frames per second; `varies` if its frames are not evenly spaced in time."""

    fps: float
    varies: bool


def own_rate(path: Path) -> Rate | None:
    """What a file says about its rate, without decoding it; None if nothing, as a folder of pictures."""
    if path.is_dir():
        return None
    with opened_video(path) as (container, stream):
        packets = islice(container.demux(stream), _MOST_PACKETS)
        times = sorted(
            float(packet.pts * packet.time_base)
            for packet in packets
            if packet.pts is not None and not packet.is_discard
        )
        said = float(stream.average_rate) if stream.average_rate else None
    if len(times) < 2 or times[0] == times[-1]:
        return Rate(said, False) if said else None
    step = (times[-1] - times[0]) / (len(times) - 1)
    # By half a frame: times that are rounded, as Matroska's, do not matter.
    varies = any(abs(time - times[0] - number * step) > step / 2 for number, time in enumerate(times))
    return Rate(said if said and not varies and is_close(said, 1 / step) else 1 / step, varies)


def is_close(fps: float, other: float) -> bool:
    """Whether two rates are one for a viewer."""
    return abs(fps / other - 1) <= _TOLERANCE


def at_rate(frames: Iterable, source_fps: float | str | None, own: Rate | None, wanted_fps: float) -> Iterator:
    """The frames that are left of `frames` at `wanted_fps` a second, if `source_fps` says how many they are.

    Evenly spaced ones are counted: one stays where floor(i * wanted / source) moves on. Else, what is on the screen
    each 1 / wanted seconds; a `source_fps` that differs from the file's average makes it that much faster or slower.
    """
    if source_fps is None or (source_fps == FILE_RATE and own is None):
        return iter(frames)
    fps = own.fps if source_fps == FILE_RATE else source_fps
    if own is not None and own.varies:
        speed = 1.0 if is_close(own.fps, fps) else fps / own.fps
        return _by_time(frames, wanted_fps / speed, 1 / own.fps)
    return _by_number(frames, wanted_fps / fps)


def _by_number(frames: Iterable, ratio: float) -> Iterator:
    last = -1
    for index, frame in enumerate(frames):
        if int(index * ratio) != last:
            last = int(index * ratio)
            yield frame


def _by_time(frames: Iterable, fps: float, usual_step: float) -> Iterator:
    shown, start, tick = None, None, 0
    for frame in frames:
        if start is None:
            start = frame.time or 0.0
        # Rounded times may be a little late.
        begins = (frame.time or 0.0) - start - 0.001
        while shown is not None and tick / fps < begins:
            yield shown
            tick += 1
        shown = frame
    if shown is not None:
        duration = float(shown.duration * shown.time_base) if shown.duration else usual_step
        ends = (shown.time or 0.0) - start + duration - 0.001
        while tick / fps < ends:
            yield shown
            tick += 1
