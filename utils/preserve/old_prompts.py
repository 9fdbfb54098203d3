"""Preserves what a model knows: on some steps its predictions for old prompts are pulled towards earlier ones.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), with prompts in place of tasks. The model's
predictions for a prompt are recorded once, when the first run that preserves it begins, and serve as the reference in
all later runs: if every run used its own start as the reference, small errors would add up along the chain.
Random contexts stand for what nobody lists: one prediction each, recorded and kept alike.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.given_pictures import clean_starts
from utils.learning.conditions import NOTHING_GIVEN, Conditioning
from utils.learning.flow_matching import TIMESTEPS, draw_generator
from utils.preserve.answers import Answer, OldPrompt, Pictures, RandomContexts
from utils.preserve.general_captions import caption_samples
from utils.preserve.random_contexts import DrawnContexts
from utils.slice_saving import value_digest
from utils.slices.ledger import Entry
from wan.errors import InputError
from wan.tokenizer import clean_prompt

CAPTIONS_KEPT = 8  # per concept, in the ledger
RANDOM_CONTEXTS = 256
EMPTY_PROMPT = ""
ASKS = 8  # in a row, of which
ASKS_OF_RANDOM = 3  # are for random contexts, and
ASKS_OF_EMPTY = 1  # is for the empty prompt where no others are listed


@dataclass(frozen=True)
class PreserveConfig:
    """What is preserved, how often, and how strongly."""

    prompts: tuple[str, ...]  # of files
    from_ledger: bool  # also the captions of the concepts in --dit
    answers: Path | None  # the reference predictions of earlier runs
    levels: int  # noise levels at which predictions for a new prompt are recorded
    random: int | None  # contexts; None: as many as `answers` holds, else RANDOM_CONTEXTS
    every: int  # steps
    weight: float  # beside the loss on the new concept
    t5: Path
    tokenizer: Path | None
    guard: float | None = 0.0  # the weight of its penalty; 0: none; None: the default, or none where it cannot be
    batch: int | None = None  # predictions that are recorded in one pass of the model; None: by their size
    fp8_t5: bool = False


@dataclass(frozen=True)
class OldPrompts:
    """The prompts to preserve, general ones and those of concepts, and notes on what is not preserved.

    Beside them `random` contexts of earlier runs, or `new_random` ones, which are still to be drawn and recorded.
    """

    general: tuple[OldPrompt, ...] = ()
    of_concepts: tuple[OldPrompt, ...] = ()
    notes: tuple[str, ...] = ()
    random: RandomContexts | None = None
    new_random: int = 0

    @property
    def all(self) -> tuple[OldPrompt, ...]:
        return (*self.general, *self.of_concepts)

    @property
    def random_count(self) -> int:
        return len(self.random.kept) if self.random else self.new_random

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts and random contexts with their reference predictions, in order."""
        digest = hashlib.sha256(
            json.dumps([[old.text for old in part] for part in (self.general, self.of_concepts)]).encode()
        )
        for old in self.all:
            digest.update(_answers_digest(old.kept))
            if old.text_SD is not None:
                digest.update(value_digest(old.text_SD))
        if self.random:
            digest.update(b"random contexts")
            digest.update(_answers_digest(self.random.kept) + _contexts_digest(self.random.texts))
        if self.new_random:
            digest.update(json.dumps([self.new_random, caption_samples()]).encode())
        return digest.hexdigest()


def _answers_digest(kept: Sequence[Answer]) -> bytes:
    digest = b""
    for answer in kept:
        digest += json.dumps([answer.t, answer.shape]).encode()
        digest += value_digest(answer.noisy_CFHW) + value_digest(answer.velocity_CFHW) + _given_digest(answer)
    return digest


def _contexts_digest(texts: Sequence[Tensor]) -> bytes:
    """Of what contexts are drawn from, where they are: in other machines' arithmetic they differ in the last bits."""
    if isinstance(texts, DrawnContexts):
        told = json.dumps([texts.seed, texts.statistics.lengths]).encode()
        return told + value_digest(texts.statistics.tokens_TD)
    return b"".join(map(value_digest, texts))


def _given_digest(answer: Answer) -> bytes:
    """Only of what there is, so that states of runs that preserve text-to-video stay valid."""
    pictures = answer.pictures
    values = [] if pictures is None else [pictures.y_CFHW, *([] if pictures.clip_PI is None else [pictures.clip_PI])]
    return b"".join([*map(value_digest, values), *([b"starts clean"] if answer.starts_clean else [])])


@dataclass(frozen=True)
class Targets:
    """What the model should predict for noisy latents, noise levels, texts and what else it is given.

    `share` is theirs in the mean over a batch.
    """

    noisy_BCFHW: Tensor
    sigma_B: Tensor
    t_B: Tensor
    context: list[Tensor]
    velocity_BCFHW: Tensor
    given: Conditioning = NOTHING_GIVEN
    share: float = 1.0


@dataclass(frozen=True)
class Preservation:
    """Old prompts and random contexts with their reference predictions, when and how strongly these are preserved.

    Of every ASKS in a row, ASKS_OF_RANDOM are for random contexts. General prompts and those of concepts share the rest
    equally, and so do the concepts, so that few are not lost among many; the empty prompt alone, where nothing else is
    listed, has ASKS_OF_EMPTY. A batch has at most `most_values` values of latents, as many as the largest batch of the
    run, unless a single prediction has more.
    """

    general: tuple[OldPrompt, ...]
    of_concepts: tuple[OldPrompt, ...]
    every: int
    weight: float
    most_values: int
    random: RandomContexts | None = None

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves."""
        return step % self.every == 0

    def draw(self, generators: Sequence[torch.Generator], device: torch.device, first_item: int = 0) -> list[Targets]:
        """For each generator a text and one of its reference predictions, in batches of one latent size.

        The generators are those of items number first_item, first_item + 1, ... of the run, whose places decide what is
        asked: so the shares are exact, however small the batches are.
        """
        by_concept = defaultdict(list)
        for prompt in self.of_concepts:
            by_concept[prompt.concept].append(prompt)
        concepts = list(by_concept.values())
        by_shape = defaultdict(list)
        for number, generator in enumerate(generators, first_item):
            text_SD, answer = self._draw_one(self._sources(number, concepts), generator)
            by_shape[answer.shape].append((text_SD, answer))
        targets = []
        for shape, pairs in by_shape.items():
            size = max(self.most_values // math.prod(shape), 1)
            parts = (pairs[start : start + size] for start in range(0, len(pairs), size))
            targets += [_targets(part, len(part) / len(generators), device) for part in parts]
        return targets

    def _sources(self, number: int, concepts: list[list[OldPrompt]]) -> list:
        """Where ask number `number` takes its prompt from, with equal chances; empty: from the random contexts."""
        prompts = [source for source in ([self.general], concepts) if any(source)]
        if self.random is None:
            return prompts
        place = _place(number)
        if place < ASKS_OF_RANDOM:
            return []
        if not _lists_nothing(self.general):
            return prompts
        if place < ASKS_OF_RANDOM + ASKS_OF_EMPTY:
            return [[self.general]]
        return [concepts] if concepts else []

    def _draw_one(self, sources: list, generator: torch.Generator) -> tuple[Tensor, Answer]:
        if not sources:
            number = int(torch.randint(len(self.random.kept), (), generator=generator))
            return self.random.texts[number], self.random.kept[number]
        prompt = _choose(_choose(_choose(sources, generator), generator), generator)
        return prompt.text_SD, _choose(prompt.kept, generator)


def _lists_nothing(general: Sequence[OldPrompt]) -> bool:
    """Whether the general prompts are the empty one alone."""
    return [old.text for old in general] == [EMPTY_PROMPT]


def _place(number: int) -> int:
    """The place, from 0, of an ask among ASKS in a row, which come in an order of their own each time.

    In a fixed order, asks on every fourth step, one each, would meet some of the places only.
    """
    row, at = divmod(number, ASKS)
    return int(torch.randperm(ASKS, generator=draw_generator(0, "asks", row))[at])


def _choose(choices: Sequence, generator: torch.Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _targets(pairs: Sequence[tuple[Tensor, Answer]], share: float, device: torch.device) -> Targets:
    noisy = torch.stack([answer.noisy_CFHW for _, answer in pairs]).float()
    t = torch.tensor([answer.t for _, answer in pairs])
    velocity = torch.stack([answer.velocity_CFHW for _, answer in pairs]).float()
    tensors = (noisy, t / TIMESTEPS, t, velocity, *(text_SD for text_SD, _ in pairs))
    noisy, sigma, t, velocity, *context = (tensor.to(device, non_blocking=True) for tensor in tensors)
    given = given_for([answer.pictures for _, answer in pairs], [answer.starts_clean for _, answer in pairs])
    return Targets(noisy, sigma, t, context, velocity, given.to(device), share)


def given_for(pictures: Sequence[Pictures | None], starts_clean: Sequence[bool]) -> Conditioning:
    """What a batch of predictions starts from, which are of one model, and so all have pictures or none has."""
    y_BCFHW = clip_BPI = None
    if pictures[0] is not None:
        y_BCFHW = torch.stack([own.y_CFHW for own in pictures]).float()
        if pictures[0].clip_PI is not None:
            clip_BPI = torch.stack([own.clip_PI for own in pictures]).float()
    return Conditioning(y_BCFHW, clip_BPI, clean_starts(starts_clean))


def most_frequent(captions: Sequence[str]) -> list[str]:
    """The few captions of a concept that its ledger entry keeps."""
    return [caption for caption, _ in Counter(captions).most_common(CAPTIONS_KEPT)]


def old_prompts(
    config: PreserveConfig,
    ledger: Sequence[Entry],
    own: Entry,
    kept: Sequence[OldPrompt],
    captions: Collection[str],
    random: RandomContexts | None = None,
) -> OldPrompts:
    """The prompts to preserve: of files, of the ledger entries' captions, and of the answers file (`kept`, `random`).

    Left out are the slice that trains (`own`), its `captions`, and concepts that changed since their predictions were
    recorded. A concept's caption belongs to it, even if a prompt file lists it. InputError if nothing is left.
    """
    contexts = _random_count(config, random)
    concepts = [entry for entry in ledger if not entry.is_slice_of(own)]
    owners = {clean_prompt(text): entry for entry in concepts for text in entry.captions}  # the newest of several
    valid = [old for old in kept if _is_still_valid(old, concepts, owners.get(clean_prompt(old.text)))]
    texts = [*config.prompts, *(text for entry in concepts if config.from_ledger for text in entry.captions)]
    listed = [OldPrompt(text, owners.get(clean_prompt(text))) for text in texts]
    by_text = {clean_prompt(old.text): old for old in [*listed, *valid]}  # recorded ones win
    trained = set(map(clean_prompt, captions))
    prompts = [old for text, old in by_text.items() if text not in trained]
    notes = [
        *_unused_notes([old for old in kept if old not in valid], concepts, config.answers),
        *_trained_notes([old.text for text, old in by_text.items() if text in trained]),
        *_concept_notes(config, concepts, prompts, trained),
        *_random_notes(config, random),
    ]
    if not (prompts or contexts):
        raise InputError("; ".join(_nothing_to_preserve(concepts, own) + notes))
    general = tuple(old for old in prompts if not old.concept)
    of_concepts = tuple(old for old in prompts if old.concept)
    own_random, new_random = (None, contexts) if random is None or not contexts else (random, 0)
    return OldPrompts(general, of_concepts, tuple(notes), own_random, new_random)


def _random_count(config: PreserveConfig, random: RandomContexts | None) -> int:
    """How many random contexts the run preserves; InputError if it cannot be as many as it was asked for."""
    if random is None:
        return RANDOM_CONTEXTS if config.random is None else config.random
    count = len(random.kept)
    if config.random not in (None, 0, count):
        raise InputError(
            f"--preserve_random {config.random}: {config.answers} holds {count} random contexts, which are recorded "
            "once and kept; leave --preserve_random out to use them, or give 0 to preserve none"
        )
    return count if config.random is None else config.random


def _random_notes(config: PreserveConfig, random: RandomContexts | None) -> list[str]:
    if random is None or config.random != 0:
        return []
    return [f"not used from {config.answers}: its {len(random.kept)} random contexts (--preserve_random 0)"]


def _nothing_to_preserve(concepts: Sequence[Entry], own: Entry) -> list[str]:
    alone = f"--dit contains no concept except ff {own.ff} ffid {own.ffid}, which this run trains"
    return ["there is nothing to preserve: give --preserve_prompts a file of prompts", *([] if concepts else [alone])]


def _is_still_valid(old: OldPrompt, concepts: Sequence[Entry], owner: Entry | None) -> bool:
    """Whether recorded predictions are still right: not if their concept changed or a later one took the caption."""
    if old.concept is None:
        return owner is None
    unchanged = any(_is_the_same(old.concept, entry) for entry in concepts)
    return unchanged and (owner is None or _is_the_same(old.concept, owner))


def _unused_notes(unused: Sequence[OldPrompt], concepts: Sequence[Entry], answers: Path | None) -> list[str]:
    """What in the answers file is not used, and why."""
    changed = [old for old in unused if old.concept and not any(_is_the_same(old.concept, e) for e in concepts)]
    notes = []
    if labels := dict.fromkeys(old.concept.label for old in changed):
        notes.append(f"not used from {answers}: {', '.join(labels)}, no longer in --dit, or changed since")
    if texts := sorted(old.text for old in unused if old not in changed):
        notes.append(f"not used from {answers}: {', '.join(texts)}, the caption of a concept that was trained since")
    return notes


def _trained_notes(texts: Sequence[str]) -> list[str]:
    shown = (text or "the empty prompt" for text in sorted(texts))
    return [f"not preserved, because this run trains it: {', '.join(shown)}"] if texts else []


def _concept_notes(
    config: PreserveConfig, concepts: Sequence[Entry], prompts: Sequence[OldPrompt], trained: Collection[str]
) -> list[str]:
    """The concepts of which nothing is preserved, grouped by the reason."""
    preserved = [old.concept for old in prompts if old.concept]
    by_reason = defaultdict(list)
    for entry in concepts:
        if not any(_is_the_same(concept, entry) for concept in preserved):
            by_reason[_why_not(entry, trained, config.from_ledger)].append(entry.label)
    return [f"note: nothing is preserved of {', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


def _why_not(entry: Entry, trained: Collection[str], from_ledger: bool) -> str:
    if not entry.captions:
        return "the ledger has no captions of it"
    if set(trained).issuperset(map(clean_prompt, entry.captions)):
        return "this run trains its captions"
    if from_ledger:
        return "its captions belong to a later concept"
    return "to use its captions, add auto to --preserve_prompts"


def _is_the_same(concept: Entry, entry: Entry) -> bool:
    """Whether the model holds the concept as it was recorded: not trained anew, not at another strength."""
    same = (concept.name, concept.date, concept.strength) == (entry.name, entry.date, entry.strength)
    return same and concept.is_slice_of(entry)


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], own: Entry) -> list[str]:
    """What is preserved; if nothing is, though the model has learned other concepts, what that means for them."""
    if preserved is not None:
        when = "every step" if preserved.every == 1 else f"one step in {preserved.every}"
        general = f"{len(preserved.general)} general prompts"
        general = "the empty prompt" if _lists_nothing(preserved.general) else general
        kinds = [general, f"{len(preserved.of_concepts)} prompts of concepts"]
        if preserved.random:
            kinds = [", ".join(kinds), f"{len(preserved.random.kept)} random contexts"]
        return [f"preserves {' and '.join(kinds)}, on {when}, with weight {preserved.weight:g}"]
    beside = [entry for entry in ledger if not entry.overlaps(own)]
    if not beside:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in beside)
    auto = any(entry.captions for entry in beside)
    flags = "--preserve_prompts" if auto else "--preserve_prompts with a file of prompts"
    return [
        f"note: the model has learned {names}; this run does not change their slices, but it may change what the model "
        f"generates for them: {flags} preserves that"
    ]
