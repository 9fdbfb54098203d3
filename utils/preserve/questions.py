"""Questions to a model: predictions that are still to be made, at a run's latents and noise levels.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.cache_files import read_latents
from utils.data.given_pictures import given_to_item, starts_clean
from utils.data.items import Item
from utils.learning.conditions import Conditioning, predict, with_clean_start
from utils.learning.flow_matching import TIMESTEPS, TimestepConfig, add_noise, draw_generator, sigmas_of
from utils.preserve.answers import Pictures, picture_shapes
from utils.preserve.old_prompts import given_for
from wan.configs import WanConfig
from wan.model import WanModel


@dataclass(frozen=True)
class TrainedOn:
    """What a run trains on: predictions are recorded on its latents, noise levels and sizes of batches."""

    items: Sequence[Item]
    batches: Sequence[Sequence[int]]  # of an epoch, as entries
    timesteps: TimestepConfig
    seed: int
    i2v_share: float = 0.0


@dataclass(frozen=True)
class CachedPictures:
    """What the caches of an item hold of its pictures, in fp16 as the file keeps it."""

    item: Item
    shapes: tuple[tuple[int, ...], tuple[int, ...] | None]

    def read(self) -> Pictures:
        return Pictures(*(None if own is None else own.half() for own in given_to_item(self.item)))


@dataclass(frozen=True)
class Question:
    """One prediction to record: at an item's latents of `shape`, with noise of level `sigma` [1]; `place` seeds it."""

    item: Item
    shape: tuple[int, ...]
    sigma: Tensor
    place: tuple[int | str, ...]
    pictures: CachedPictures | None
    starts_clean: bool

    @property
    def t(self) -> float:
        return float(TIMESTEPS * self.sigma)

    def noisy(self) -> Tensor:
        """[C, F, H, W] as the file keeps it, in fp16."""
        noise = torch.randn(self.shape, generator=draw_generator(*self.place))
        latents_BCFHW = read_latents(self.item.latents).float()[None]
        noisy_BCFHW, _, _ = add_noise(latents_BCFHW, noise[None], self.sigma)
        return with_clean_start(noisy_BCFHW, latents_BCFHW, torch.tensor([self.starts_clean]))[0].half()


def questions_at(
    of: tuple[str, ...],
    items: Sequence[tuple[Item, tuple[int, ...]]],
    levels: int,
    trained_on: TrainedOn,
    model: WanConfig,
) -> tuple[Question, ...]:
    """At noise levels spread evenly over those that are trained, each with one of the items and its pictures.

    `of` says what they are for; with the number of each, it seeds them.
    """
    seed, questions = trained_on.seed, []
    for number in range(levels):
        generator = draw_generator(seed, "question", *of, number)
        item, shape = items[int(torch.randint(len(items), (), generator=generator))]
        u_B = (number + torch.rand(1, generator=generator, dtype=torch.float64)) / levels
        sigma = sigmas_of(trained_on.timesteps, u_B.clamp(2.0**-53, 1 - 2.0**-53), shape[-2:])
        shapes = picture_shapes(model, shape)
        pictures = None if shapes is None else CachedPictures(item, shapes)
        starts = starts_clean(trained_on.i2v_share, shape[1], seed, "question's first frame", *of, number)
        questions.append(Question(item, shape, sigma, (seed, "question's noise", *of, number), pictures, starts))
    return tuple(sorted(questions, key=lambda question: question.shape))


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts, on its device, and what it was given: noisy latents and levels on the CPU, pictures."""

    noisy_BCFHW: Tensor
    t_B: Tensor
    pictures: Sequence[Pictures | None]
    given: Conditioning
    velocity_BCFHW: Tensor


def predictions(together: Sequence[tuple[Tensor, Question]], model: WanModel, device: torch.device) -> Predictions:
    """What the model predicts for texts at questions of one shape, in one pass."""
    questions = [question for _, question in together]
    noisy = torch.stack([question.noisy() for question in questions])
    t_B = torch.tensor([question.t for question in questions])
    context = [text_SD.to(device) for text_SD, _ in together]
    pictures = [question.pictures and question.pictures.read() for question in questions]
    starts = [question.starts_clean for question in questions]
    given = given_for(pictures, starts).to(device)
    velocity = predict(model, noisy.float().to(device), t_B.to(device), context, given)
    return Predictions(noisy, t_B, pictures, given, velocity)
