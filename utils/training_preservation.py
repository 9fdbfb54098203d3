"""What a run preserves, and what it leaves to those after it: answers to its own captions, and to old prompts.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from utils.cache_files import latents_shape, read_latents, read_text
from utils.cached_items import Item
from utils.dataset import TrainingDataset
from utils.flow_matching import TIMESTEPS, TimestepConfig, add_noise, draw_generator, sigmas_of
from utils.kept_answers import ENDING, Answer, OldPrompt, write_answers
from utils.preservation import (
    Ask,
    Preservation,
    PreserveConfig,
    ask_model,
    ask_teacher,
    encode_prompts,
    most_frequent,
    old_prompts,
)
from utils.selective_finetune import TrainedSlice
from utils.slice_files import SlicesOnBase
from utils.training_config import TrainConfig
from utils.training_slices import own_entry
from wan.errors import InputError
from wan.model import WanModel


def read_old_prompts(
    config: TrainConfig, base: str, below: SlicesOnBase, dataset: TrainingDataset
) -> tuple[tuple[OldPrompt, ...], ...]:
    """What the run preserves, by source."""
    if config.preserve is None:
        return ()
    if config.save_answers and config.preserve.answers and _same(config.preserve.answers, answers_path(config)):
        raise InputError(
            f"--preserve_answers {config.preserve.answers} is what this run writes at its end: choose another "
            "--output_name, or --save_answers 0"
        )
    captions = {item.caption for item in dataset.items}
    return old_prompts(config.preserve, below.entries, own_entry(config), base, config.dit, captions)


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def answers_path(config: TrainConfig) -> Path:
    """Where the run leaves answers."""
    return config.save.folder / f"{config.save.name}{ENDING}"


def prepare_preservation(
    config: PreserveConfig | None, prompts: Sequence[Sequence[OldPrompt]], text_len: int, accelerator: Accelerator
) -> Preservation | None:
    """One process encodes for all: the text encoder of 14B models takes 11 GB."""
    if config is None:
        return None
    encoded = [None]
    if accelerator.is_main_process:
        encoded = [encode_prompts(config, prompts, text_len, accelerator.device)]
    broadcast_object_list(encoded)
    return Preservation(encoded[0], config.every, config.weight)


@dataclass(frozen=True)
class Question:
    """An answer that is still to be had: to which text [S, D], at which item's latents, under which noise."""

    text_SD: Tensor
    item: Item
    sigma: Tensor  # [1]
    place: tuple[int | str, ...]  # of the noise's generator

    @property
    def t(self) -> float:
        return float(TIMESTEPS * self.sigma)

    @property
    def shape(self) -> tuple[int, ...]:
        return latents_shape(self.item.latents)

    def noisy(self) -> Tensor:
        """[C, F, H, W] as a file of answers keeps it, in fp16."""
        noise = torch.randn(self.shape, generator=draw_generator(*self.place))
        noisy_BCFHW, _, _ = add_noise(read_latents(self.item.latents).float()[None], noise[None], self.sigma)
        return noisy_BCFHW[0].half()


def save_answers(
    config: TrainConfig,
    base: str,
    steps: int,
    dataset: TrainingDataset,
    seed: int,
    preserved: Preservation | None,
    model: WanModel,
    trained: TrainedSlice,
    device: torch.device,
) -> str:
    """Writes the answers that later runs preserve; a line on what they are comes back.

    Those of the model as it is now to the concept's captions; those that were kept of old prompts; those of the
    teacher to the other old prompts. They are had while the file is written, so that memory holds one batch.
    """
    plan = partial(_questions, config.save_answers, config.timesteps, seed)
    path, concept = answers_path(config), replace(own_entry(config), steps=steps)
    old = [prompt for source in preserved.sources for prompt in source] if preserved else []
    asked = [[] if p.old.kept else plan(p.old.text, p.text_SD, dataset.items) for p in old]
    captions = most_frequent([item.caption for item in dataset.items])
    own_items = [[item for item in dataset.items if item.caption == caption] for caption in captions]
    own = [plan(caption, read_text(items[0].text), items) for caption, items in zip(captions, own_items, strict=True)]
    answered = [(prompt.old, questions) for prompt, questions in zip(old, asked, strict=True)]
    answered += [(OldPrompt(caption, concept), questions) for caption, questions in zip(captions, own, strict=True)]

    def new() -> Iterator[Answer]:
        yield from _answers(asked, partial(ask_teacher, model, trained), dataset, device)
        yield from _answers(own, partial(ask_model, model), dataset, device)

    with tqdm(new(), total=sum(map(len, [*asked, *own])), desc="answers", leave=False) as bar:
        size = write_answers(path, base, answered, iter(bar))
    kept = sum(len(prompt.old.kept) for prompt in old)
    return (
        f"saved {path} ({size / 1e6:,.1f} MB): {sum(map(len, own))} answers to {len(own)} captions of {concept.name}, "
        f"{sum(map(len, asked))} to old prompts, {kept} that were kept before; the next run's --preserve_answers"
    )


def _questions(
    count: int, timesteps: TimestepConfig, seed: int, text: str, text_SD: Tensor, items: Sequence[Item]
) -> list[Question]:
    """`count` noise levels, evenly spread over those that are trained, each at one of the items."""
    questions = []
    for number in range(count):
        generator = draw_generator(seed, "answer", text, number)
        item = items[int(torch.randint(len(items), (), generator=generator))]
        u_B = (number + torch.rand(1, generator=generator, dtype=torch.float64)) / count
        sigma = sigmas_of(timesteps, u_B.clamp(2.0**-53, 1 - 2.0**-53), latents_shape(item.latents)[-2:])
        questions.append(Question(text_SD, item, sigma, (seed, "answer noise", text, number)))
    return questions


@torch.no_grad()
def _answers(
    questions: Iterable[Sequence[Question]], ask: Ask, dataset: TrainingDataset, device: torch.device
) -> Iterator[Answer]:
    """The answers, prompt after prompt, in batches as large as the run trains."""
    for of_prompt in questions:
        for _, same in groupby(of_prompt, key=lambda question: question.shape):
            same = list(same)
            size = dataset.batch_size(same[0].item)
            for batch in (same[start : start + size] for start in range(0, len(same), size)):
                noisy = torch.stack([question.noisy() for question in batch])
                t_B = torch.tensor([question.t for question in batch])
                context = [question.text_SD.to(device) for question in batch]
                velocity = ask(noisy.float().to(device), t_B.to(device), context).cpu()
                yield from map(Answer, noisy, t_B.tolist(), velocity)
