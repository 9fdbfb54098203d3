"""The pictures that a sample may start from: how many its task takes, and the size that follows from one."""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from utils.files import existing_file
from utils.pixels.pictures import image_size
from wan.configs import TASKS, WanTask
from wan.errors import InputError

LARGEST_SIDE = 16_384
_SIDE = 256  # of a sample that neither a size nor a picture is given for
_WANS_SIZE = (832, 480)  # a size that follows from a picture has the area of this one
_FRAMES = ("first", "last")


def pictures_taken(task: WanTask) -> tuple[int, int]:
    """The fewest and the most pictures that a sample of the task starts from."""
    fewest = task.conditions.pictures
    return fewest, max(fewest, int(task.config.starts_from_latents))


def check_pictures(
    task: WanTask, given: Mapping[str, Path | None], frames: int, where: str, complete: bool = True
) -> None:
    """InputError unless these pictures are files of pictures, and what the task takes.

    `given` has the first and the last frame by the name of the option. `complete`: nothing will be added or changed.
    """
    fewest, most = pictures_taken(task)
    for number, (option, path) in enumerate(given.items()):
        frame = _FRAMES[number]
        if path is None:
            if complete and number < fewest:
                raise InputError(
                    f"{where}: --task {task.name} needs a picture as the {frame} frame: give its file with {option}"
                )
        elif number >= most:
            takers = ", ".join(name for name, other in TASKS.items() if pictures_taken(other)[1] > number)
            raise InputError(
                f"{where}: --task {task.name} takes no picture as the {frame} frame: leave {option} out; it is for "
                f"{takers}"
            )
        else:
            image_size(existing_file(path, f"{where}: {option}"))
            if complete and frames == 1:
                raise InputError(
                    f"{where}: a single frame would be the picture of {option} itself: ask for 5 frames or more"
                )


def sample_size(task: WanTask, width: int | None, height: int | None, picture: Path | None) -> tuple[int, int]:
    """(width, height) of a sample; what is None follows from the picture that it starts from, else it is 256.

    InputError if nothing that can be made follows from the picture.
    """
    if picture is None or (width is not None and height is not None):
        return _SIDE if width is None else width, _SIDE if height is None else height
    own, step = image_size(picture), task.latents.pixel_multiple
    if width is None and height is None:
        size = size_like(task, own)
    elif height is None:
        size = width, round(width * own[1] / own[0] / step) * step
    else:
        size = round(height * own[0] / own[1] / step) * step, height
    if not all(step <= side <= LARGEST_SIDE for side in size):
        raise InputError(
            f"{picture} is {own[0]}x{own[1]}, too long for a video of its shape: give a width and a height"
        )
    return size


def size_like(task: WanTask, picture: tuple[int, int]) -> tuple[int, int]:
    """Wan's own size for a video that starts from a picture of this (width, height)."""
    width, height = picture
    step, longest = task.latents.pixel_multiple, LARGEST_SIDE + 1
    is_ti2v = task.config.starts_from_latents
    most = math.prod(task.sizes[0] if is_ti2v else _WANS_SIZE)
    wide, high = (math.isqrt(most * a // b) // step * step for a, b in ((width, height), (height, width)))
    if not is_ti2v or not wide or not high:
        return min(wide, longest), min(high, longest)
    # Both are rounded down, so the other one may have room to grow: whichever is nearer to the picture's shape.
    sizes = ((most // high // step * step, high), (wide, most // wide // step * step))
    return min(sizes, key=lambda size: _difference(Fraction(*size), Fraction(width, height)))


def _difference(a: Fraction, b: Fraction) -> Fraction:
    return max(a / b, b / a)


def shift_of(task: WanTask, width: int | None, height: int | None, size: tuple[int, int]) -> float:
    """The default flow shift of a sample of this `size`, of which width and height may have been left out."""
    follows = width is None and height is None and task.conditions.pictures > 0
    return task.shift_at(*(_WANS_SIZE if follows else size))
