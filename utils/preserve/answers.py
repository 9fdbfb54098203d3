"""Reference predictions: what a model predicted for a prompt or at a random context, and what it was given there.

Shapes: C channels, F H W latent frames, height, width, S text tokens, D text width, P CLIP tokens, I their width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from utils.slices.ledger import Entry
from wan.configs import WanConfig
from wan.model import PICTURE_TOKENS

MOST_CONTEXTS = 10_000  # in a file


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a model was given of a clip's pictures: y, and CLIP tokens if it reads them, on the CPU."""

    y_CFHW: Tensor
    clip_PI: Tensor | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return tuple(self.y_CFHW.shape), None if self.clip_PI is None else tuple(self.clip_PI.shape)

    def read(self) -> "Pictures":
        return self


class PictureSource(Protocol):
    """Pictures, in memory or still in a cache; those that are equal are written once."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]: ...
    def read(self) -> Pictures: ...


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model predicted for a prompt: noisy latents, velocity [C, F, H, W] on the CPU, timestep `t` (0-1000).

    `starts_clean`: the first latent frame was clean, at timestep 0, so that nothing was predicted for it.
    """

    noisy_CFHW: Tensor
    t: float
    velocity_CFHW: Tensor
    pictures: Pictures | None = None
    starts_clean: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.noisy_CFHW.shape)


class Question(Protocol):
    """A prediction that is still to be recorded."""

    @property
    def t(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def pictures(self) -> PictureSource | None: ...
    @property
    def starts_clean(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class OldPrompt:
    """A prompt to preserve, the concept it belongs to, if any, and the reference predictions recorded for it.

    `text_SD` is the encoded prompt on the CPU; None if it was not encoded yet.
    """

    text: str
    concept: Entry | None = None
    kept: tuple[Answer, ...] = ()
    text_SD: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RandomContexts:
    """Contexts [S, D] that stand for all that nobody lists, and the reference prediction recorded at each of them."""

    texts: Sequence[Tensor]
    kept: tuple[Answer, ...]


def picture_shapes(model: WanConfig, latents: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...] | None] | None:
    """Those of the y and the CLIP tokens that the model reads beside latents of this shape; None if it reads none."""
    conditions = model.conditions
    if not conditions.pictures:
        return None
    clip = (PICTURE_TOKENS * conditions.pictures, model.image_dim) if conditions.clip else None
    return (model.in_dim - model.out_dim, *latents[1:]), clip


def shared_pictures(answers: Iterable[Answer | Question]) -> dict[PictureSource, None]:
    """The pictures that predictions were given, each once, in the order of the file."""
    return dict.fromkeys(answer.pictures for answer in answers if answer.pictures is not None)


def answer_bytes(shape: Sequence[int]) -> int:
    """Bytes in the file of a prediction at latents of this shape."""
    return 2 * 2 * math.prod(shape)


def pictures_bytes(source: PictureSource) -> int:
    """Bytes in the file of what a model was given of pictures."""
    return sum(2 * math.prod(shape) for shape in source.shapes if shape is not None)
