"""Records the model's predictions for old prompts before the first step: which are missing, their file, the recording.

The same for random contexts, each at one noise level.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from utils.data.cache_files import latents_shape, read_text
from utils.data.items import Item
from utils.files import readable
from utils.learning.flow_matching import draw_generator
from utils.preserve.answers import (
    Answer,
    OldPrompt,
    RandomContexts,
    answer_bytes,
    pictures_bytes,
    shared_pictures,
)
from utils.preserve.answers_file import Recorded, is_of_run, read_answers, write_answers
from utils.preserve.encoding import encoded
from utils.preserve.general_captions import caption_samples
from utils.preserve.guard import SAMPLES
from utils.preserve.old_prompts import (
    EMPTY_PROMPT,
    OldPrompts,
    Preservation,
    PreserveConfig,
    old_prompts,
)
from utils.preserve.questions import Question, TrainedOn, predictions, questions_at
from utils.preserve.random_contexts import MOST_TOKENS, DrawnContexts, TokenStatistics, first_texts
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
class NewContexts:
    """Random contexts that are still to be drawn: the questions at them, and what they are drawn like.

    That is the tokens of the shipped captions, of the run's own in their caches, and of the listed prompts.
    """

    questions: tuple[Question, ...]
    seed: int
    samples: tuple[str, ...]
    cached: tuple[tuple[Path, str], ...]  # caches with captions in them, in random order
    most_tokens: int  # that the captions in caches have, each

    def drawn_like(self, samples: Sequence[Tensor], listed: Sequence[Tensor]) -> RandomContexts:
        """The contexts, still without predictions, from the encoded samples and the listed prompts."""
        own = first_texts(read_text(path, caption) for path, caption in self.cached)
        statistics = TokenStatistics.of([*first_texts(samples), *own, *first_texts(listed)])
        return RandomContexts(DrawnContexts(self.seed, statistics, len(self.questions)), ())


@dataclass(frozen=True)
class AskingPlan:
    """The file for the run's reference predictions, and for each old prompt those that are still to be recorded.

    `random` are the contexts of earlier runs, or, once everything is encoded, the `new` ones.
    """

    path: Path
    asked: tuple[tuple[OldPrompt, tuple[Question, ...]], ...]
    most_values: int  # of latents, in the run's largest batch
    notes: tuple[str, ...]
    model: AskedModel
    random: RandomContexts | None = None
    new: NewContexts | None = None
    guard_weight: float = 0.0
    guard: tuple[Question, ...] = ()  # predictions from which its statistics are gathered

    @property
    def _at_random(self) -> tuple[Answer | Question, ...]:
        return (*(self.random.kept if self.random else ()), *(self.new.questions if self.new else ()))

    @property
    def size(self) -> int:
        """The bytes of the file, at most."""
        rows = [*chain.from_iterable((*old.kept, *asked) for old, asked in self.asked), *self._at_random]
        answers = sum(answer_bytes(answer.shape) for answer in rows) + sum(map(pictures_bytes, shared_pictures(rows)))
        tokens = sum(_most_tokens(old.text, self.model.config) for old, _ in self.asked)
        return answers + 2 * self.model.config.text_dim * (tokens + self._context_tokens())

    def _context_tokens(self) -> int:
        """How many tokens the file holds of random contexts, at most."""
        if self.random and isinstance(self.random.texts, DrawnContexts):
            return len(self.random.texts.statistics.tokens_TD) + len(self.random.texts[0])
        if self.random:
            return sum(map(len, self.random.texts))
        if self.new is None:
            return 0
        samples = [_most_tokens(text, self.model.config) for text in self.new.samples]
        listed = [_most_tokens(old.text, self.model.config) for old, _ in self.asked]
        own = [self.new.most_tokens] * len(self.new.cached)
        longest = max(*samples, *listed, *own)
        drawn_from = sum(min(sum(kind), max(MOST_TOKENS, longest)) for kind in (samples, listed, own))
        return min(drawn_from + longest, len(self.new.questions) * longest)

    @property
    def questions(self) -> int:
        return sum(len(questions) for _, questions in self.asked) + (len(self.new.questions) if self.new else 0)

    @property
    def largest_kept(self) -> tuple[int, ...]:
        """The shape of the largest latents among earlier predictions; new ones are no larger than a batch."""
        kept = [*chain.from_iterable(old.kept for old, _ in self.asked), *(self.random.kept if self.random else ())]
        return max((answer.shape for answer in kept), key=math.prod, default=(0,) * 4)

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


def _most_tokens(text: str, model: WanConfig) -> int:
    """A token is a byte of the text or more; plus </s> and a space in front."""
    return min(len(text.encode()) + 2, model.text_len)


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
    recorded = read_answers(config.answers, model.base, model.config) if config.answers else Recorded([], None)
    captions = {caption for item in items for caption in item.captions}
    if any(item.dropout for item in items):
        captions.add(EMPTY_PROMPT)
    return old_prompts(config, ledger, own, recorded.prompts, captions, recorded.random)


def plan_asking(
    config: PreserveConfig | None,
    path: Path,
    model: AskedModel | None,
    prompts: OldPrompts,
    trained_on: TrainedOn,
    guard_weight: float = 0.0,
) -> AskingPlan | None:
    """Which predictions have to be recorded, to be kept in `path`; None if nothing is preserved.

    With a `guard_weight`, also those from which the guard's statistics are gathered.
    """
    if config is None:
        return None
    shaped = [(item, latents_shape(item.latents)) for item in trained_on.items]
    asked = tuple(
        (old, () if old.kept else questions_at((old.text,), shaped, config.levels, trained_on, model.config))
        for old in prompts.all
    )
    sizes = [sum(math.prod(shaped[entry % len(shaped)][1]) for entry in batch) for batch in trained_on.batches]
    new = _new_contexts(prompts.new_random, shaped, trained_on, model.config) if prompts.new_random else None
    guard = questions_at(("guard", "prediction"), shaped, SAMPLES, trained_on, model.config) if guard_weight else ()
    return AskingPlan(path, asked, max(sizes), prompts.notes, model, prompts.random, new, guard_weight, guard)


def _new_contexts(
    count: int, items: Sequence[tuple[Item, tuple[int, ...]]], trained_on: TrainedOn, model: WanConfig
) -> NewContexts:
    seed = trained_on.seed
    by_caption = {caption: item.text for item, _ in items for caption in item.captions}
    captions = list(by_caption)
    order = torch.randperm(len(captions), generator=draw_generator(seed, "captions for random contexts"))
    cached = tuple((by_caption[captions[at]], captions[at]) for at in order.tolist())
    questions = questions_at(("random", "context"), items, count, trained_on, model)
    most_tokens = max(item.text_shape[0] for item, _ in items)
    return NewContexts(questions, seed, tuple(caption_samples()), cached, most_tokens)


def encode_old_prompts(
    config: PreserveConfig, plan: AskingPlan, accelerator: Accelerator, say: Callable[[str], None]
) -> AskingPlan:
    """The plan with its prompts encoded, and with its random contexts.

    One process does it for all: the text encoder of 14B models takes 11 GB.
    """
    made = [[], plan.random]
    if accelerator.is_main_process:
        samples = plan.new.samples if plan.new else ()
        rest = (config, plan.model.config, accelerator.device, say)
        prompts, samples = encoded([old for old, _ in plan.asked], samples, *rest)
        texts = [old.text_SD for old in prompts]
        made = [texts, plan.new.drawn_like(samples, texts) if plan.new else None]
    broadcast_object_list(made)
    texts, random = made
    asked = zip(plan.asked, texts, strict=True)
    asked = tuple((replace(old, text_SD=text_SD), own) for (old, own), text_SD in asked)
    if plan.new:
        lengths = random.texts.statistics.lengths
        like = (
            f"the {sum(lengths):,} tokens of {len(lengths)} captions: shipped ones, the run's own, the listed prompts"
        )
        say(f"{len(random.texts)} random contexts are drawn like {like}")
    return replace(plan, asked=asked, random=plan.random or random)


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

    A run that was started before with the same settings has already recorded them, whatever its guard was. InputError
    if the file is another run's and nothing says that it `replaces` that one.
    """
    of_predictions = {key: value for key, value in settings.items() if key != "guard"}
    run = hashlib.sha256(json.dumps(of_predictions, sort_keys=True).encode()).hexdigest()
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
    recorded = read_answers(plan.path, plan.model.base, model.config)
    general = tuple(old for old in recorded.prompts if old.concept is None)
    of_concepts = tuple(old for old in recorded.prompts if old.concept)
    return Preservation(general, of_concepts, config.every, config.weight, plan.most_values, recorded.random)


def _record(
    plan: AskingPlan,
    model: WanModel,
    accelerator: Accelerator,
    batch: int | None,
    run: str,
    say: Callable[[str], None],
) -> None:
    say(_recording_line(plan))
    answers = _answers(plan, model, accelerator.device, batch)
    if accelerator.is_main_process:
        random = (plan.random, plan.new.questions if plan.new else ()) if plan.random else None
        with tqdm(answers, total=plan.questions, desc="recording", leave=False) as bar:
            write_answers(plan.path, plan.model.base, run, plan.asked, iter(bar), random)
    else:
        for _ in answers:  # as long as the main one, for which others could not wait: collectives time out
            pass


def _recording_line(plan: AskingPlan) -> str:
    if not plan.questions:
        return "the run needs no new reference predictions: earlier runs have recorded all of them"
    return f"before the first step the run records {plan.questions} predictions of the model, {_recorded_for(plan)}"


def _recorded_for(plan: AskingPlan) -> str:
    new = sum(not old.kept for old, _ in plan.asked)
    contexts = f"{len(plan.new.questions)} random contexts" if plan.new else ""
    if plan.new and not new:
        return f"at {contexts}"
    listed = f"for the {new} of {len(plan.asked)} listed prompts that have none yet"
    return f"{listed}, and at {contexts}" if contexts else listed


def _answers(plan: AskingPlan, model: WanModel, device: torch.device, batch: int | None) -> Iterator[Answer]:
    """The predictions, prompt after prompt and then at random contexts; those of one size share a pass of the model."""
    asked = list(_asked_in_order(plan))
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
    return max(room_in_training(shape, plan), rows_together(shape, plan.model.config))


def room_in_training(shape: tuple[int, ...], plan: AskingPlan) -> int:
    """How many latents of this shape are as much as the run's largest batch; one at least."""
    return max(plan.most_values // math.prod(shape), 1)


@torch.no_grad()
def _predicted(together: Sequence[tuple[Tensor, Question]], model: WanModel, device: torch.device) -> Iterator[Answer]:
    made = predictions(together, model, device)
    starts = [question.starts_clean for _, question in together]
    return map(Answer, made.noisy_BCFHW, made.t_B.tolist(), made.velocity_BCFHW.float().cpu(), made.pictures, starts)


def _asked_in_order(plan: AskingPlan) -> Iterator[tuple[Tensor, Question]]:
    """Each question with its encoded text."""
    for old, questions in plan.asked:
        yield from ((old.text_SD, question) for question in questions)
    if plan.new:
        yield from zip(plan.random.texts, plan.new.questions, strict=True)
