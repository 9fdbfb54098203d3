"""Records the model's predictions for old prompts before the first step: which are missing, their file, the recording.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from utils.data.cache_files import latents_shape, read_latents
from utils.data.given_pictures import given_to_item, starts_clean
from utils.data.items import Item
from utils.files import readable
from utils.learning.conditions import predict, with_clean_start
from utils.learning.flow_matching import TIMESTEPS, TimestepConfig, add_noise, draw_generator, sigmas_of
from utils.preserve.answers_file import (
    Answer,
    OldPrompt,
    Pictures,
    answer_bytes,
    is_of_run,
    picture_shapes,
    pictures_bytes,
    read_answers,
    shared_pictures,
    write_answers,
)
from utils.preserve.old_prompts import OldPrompts, Preservation, PreserveConfig, encoded, given_for, old_prompts
from utils.sampling.batches import rows_together
from utils.slices.base_identity import BaseModel
from utils.slices.ledger import Entry
from wan.configs import WanConfig
from wan.errors import InputError
from wan.model import WanModel


@dataclass(frozen=True)
class AskedModel:
    """The model whose predictions are recorded, before it is loaded."""

    base: BaseModel
    config: WanConfig


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


@dataclass(frozen=True)
class AskingPlan:
    """The file for the run's reference predictions, and for each old prompt those that are still to be recorded."""

    path: Path
    asked: tuple[tuple[OldPrompt, tuple[Question, ...]], ...]
    most_values: int  # of latents, in the run's largest batch
    notes: tuple[str, ...]
    model: AskedModel

    @property
    def size(self) -> int:
        """The bytes of the file, at most."""
        rows = [answer for old, asked in self.asked for answer in (*old.kept, *asked)]
        answers = sum(answer_bytes(answer.shape) for answer in rows) + sum(map(pictures_bytes, shared_pictures(rows)))
        # A token is a byte of the text or more; plus </s> and a space in front.
        tokens = (min(len(old.text.encode()) + 2, self.model.config.text_len) for old, _ in self.asked)
        return answers + 2 * self.model.config.text_dim * sum(tokens)

    @property
    def questions(self) -> int:
        return sum(len(questions) for _, questions in self.asked)

    @property
    def largest_kept(self) -> tuple[int, ...]:
        """The shape of the largest latents among earlier predictions; new ones are no larger than a batch."""
        return max((kept.shape for old, _ in self.asked for kept in old.kept), key=math.prod, default=(0,) * 4)

    def lines(self) -> list[str]:
        """What is not preserved, what will be written, and what needs more memory than training alone."""
        size = readable(self.size)
        lines = [
            *self.notes,
            f"will write reference predictions to {self.path} (up to {size}), the --preserve_answers of the next run",
        ]
        if math.prod(self.largest_kept) > self.most_values:
            shape = "x".join(map(str, self.largest_kept))
            lines.append(
                f"note: earlier reference predictions have latents of {shape}, larger than any batch of this run, and "
                "so need more memory"
            )
        return lines


def read_old_prompts(
    config: PreserveConfig | None,
    model: AskedModel | None,
    ledger: Sequence[Entry],
    own: Entry,
    items: Sequence[Item],
) -> OldPrompts:
    """What a run that trains the slice `own` on `items` preserves of the concepts in the `ledger`.

    InputError if there is nothing to preserve, or if --preserve_answers cannot be used.
    """
    if config is None:
        return OldPrompts()
    kept = read_answers(config.answers, model.base, model.config) if config.answers else []
    return old_prompts(config, ledger, own, kept, {caption for item in items for caption in item.captions})


def plan_asking(
    config: PreserveConfig | None, path: Path, model: AskedModel | None, prompts: OldPrompts, trained_on: TrainedOn
) -> AskingPlan | None:
    """Which predictions have to be recorded, to be kept in `path`; None if nothing is preserved."""
    if config is None:
        return None
    shaped = [(item, latents_shape(item.latents)) for item in trained_on.items]
    asked = tuple(
        (old, () if old.kept else _questions(old.text, shaped, config.levels, trained_on, model.config))
        for old in prompts.all
    )
    sizes = [sum(math.prod(shaped[entry % len(shaped)][1]) for entry in batch) for batch in trained_on.batches]
    return AskingPlan(path, asked, max(sizes), prompts.notes, model)


def _questions(
    text: str, items: Sequence[tuple[Item, tuple[int, ...]]], levels: int, trained_on: TrainedOn, model: WanConfig
) -> tuple[Question, ...]:
    """At noise levels spread evenly over those that are trained, each with one of the items and its pictures."""
    seed, questions = trained_on.seed, []
    for number in range(levels):
        generator = draw_generator(seed, "question", text, number)
        item, shape = items[int(torch.randint(len(items), (), generator=generator))]
        u_B = (number + torch.rand(1, generator=generator, dtype=torch.float64)) / levels
        sigma = sigmas_of(trained_on.timesteps, u_B.clamp(2.0**-53, 1 - 2.0**-53), shape[-2:])
        shapes = picture_shapes(model, shape)
        pictures = None if shapes is None else CachedPictures(item, shapes)
        starts = starts_clean(trained_on.i2v_share, shape[1], seed, "question's first frame", text, number)
        questions.append(Question(item, shape, sigma, (seed, "question's noise", text, number), pictures, starts))
    return tuple(sorted(questions, key=lambda question: question.shape))


def encode_old_prompts(
    config: PreserveConfig, plan: AskingPlan, accelerator: Accelerator, say: Callable[[str], None]
) -> AskingPlan:
    """The plan with its prompts encoded. One process does it for all: the text encoder of 14B models takes 11 GB."""
    prompts = [old for old, _ in plan.asked]
    texts = [[]]
    if accelerator.is_main_process:
        texts = [[old.text_SD for old in encoded(prompts, config, plan.model.config, accelerator.device, say)]]
    broadcast_object_list(texts)
    asked = zip(plan.asked, texts[0], strict=True)
    return replace(plan, asked=tuple((replace(old, text_SD=text_SD), own) for (old, own), text_SD in asked))


def keep_answers(
    config: PreserveConfig,
    plan: AskingPlan,
    model: WanModel,
    accelerator: Accelerator,
    settings: Mapping[str, str],
    replaces: bool,
    say: Callable[[str], None],
) -> Preservation:
    """Records the predictions of the model, which nothing has trained yet, in the plan's file, and reads them all.

    A run that was started before with the same settings has already recorded them. InputError if the file is another
    run's and nothing says that it `replaces` that one.
    """
    run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if is_of_run(plan.path, run):
        say(f"{plan.path} already has the reference predictions of a run with the same settings")
    elif plan.path.exists() and not replaces:
        raise InputError(
            f"{plan.path} holds the reference predictions of a run with other settings: choose another --output_name, "
            "move the file, or give --overwrite to replace it"
        )
    else:
        _record(plan, model, accelerator, config.batch, run, say)
    accelerator.wait_for_everyone()
    kept = read_answers(plan.path, plan.model.base, model.config)
    general = tuple(old for old in kept if old.concept is None)
    of_concepts = tuple(old for old in kept if old.concept)
    return Preservation(general, of_concepts, config.every, config.weight, plan.most_values)


def _record(
    plan: AskingPlan,
    model: WanModel,
    accelerator: Accelerator,
    batch: int | None,
    run: str,
    say: Callable[[str], None],
) -> None:
    new = sum(not old.kept for old, _ in plan.asked)
    say(
        f"before the first step the run records {plan.questions} predictions of the model, for the {new} of "
        f"{len(plan.asked)} listed prompts that have none yet"
    )
    answers = _answers(plan, model, accelerator.device, batch)
    if accelerator.is_main_process:
        with tqdm(answers, total=plan.questions, desc="recording", leave=False) as bar:
            write_answers(plan.path, plan.model.base, run, plan.asked, iter(bar))
    else:
        for _ in answers:  # as long as the main one, for which others could not wait: collectives time out
            pass


def _answers(plan: AskingPlan, model: WanModel, device: torch.device, batch: int | None) -> Iterator[Answer]:
    """The predictions, prompt after prompt; those of one size share a pass of the model, also across prompts."""
    asked = [(old, question) for old, questions in plan.asked for question in questions]
    waiting: dict[tuple[int, ...], deque[int]] = {}
    for number, (_, question) in enumerate(asked):
        waiting.setdefault(question.shape, deque()).append(number)
    found: dict[int, Answer] = {}  # ahead of their turn: no more than a batch of each size
    for number, (_, question) in enumerate(asked):
        if number not in found:
            same = waiting[question.shape]
            together = [same.popleft() for _ in range(min(len(same), _room(question.shape, plan, batch)))]
            found |= zip(together, _predicted([asked[own] for own in together], model, device), strict=True)
        yield found.pop(number)


def _room(shape: tuple[int, ...], plan: AskingPlan, batch: int | None) -> int:
    """How many predictions at latents of this shape are made in one pass; by default, no fewer than train in one."""
    if batch is not None:
        return batch
    return max(plan.most_values // math.prod(shape), rows_together(shape, plan.model.config))


@torch.no_grad()
def _predicted(
    together: Sequence[tuple[OldPrompt, Question]], model: WanModel, device: torch.device
) -> Iterator[Answer]:
    questions = [question for _, question in together]
    noisy = torch.stack([question.noisy() for question in questions])
    t_B = torch.tensor([question.t for question in questions])
    context = [old.text_SD.to(device) for old, _ in together]
    pictures = [question.pictures and question.pictures.read() for question in questions]
    starts = [question.starts_clean for question in questions]
    given = given_for(pictures, starts).to(device)
    velocity = predict(model, noisy.float().to(device), t_B.to(device), context, given).float().cpu()
    return map(Answer, noisy, t_B.tolist(), velocity, pictures, starts)
