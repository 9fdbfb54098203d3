"""Preserves what a model knows: on some steps its predictions for old prompts are pulled towards earlier ones.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), with prompts in place of tasks. The model's
predictions for a prompt are recorded once, when the first run that preserves it begins, and serve as the reference in
all later runs: if every run used its own start as the reference, small errors would add up along the chain.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import gc
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.given_pictures import clean_starts
from utils.learning.conditions import NOTHING_GIVEN, Conditioning
from utils.learning.flow_matching import TIMESTEPS
from utils.preserve.answers_file import Answer, OldPrompt, Pictures
from utils.slice_saving import value_digest
from utils.slices.ledger import Entry
from wan.configs import WanConfig
from wan.errors import InputError
from wan.text_encoder import TextEncoder, load_text_encoder
from wan.tokenizer import clean_prompt

CAPTIONS_KEPT = 8  # per concept, in the ledger
_SAME_ENCODER = 0.3  # relative distance that encodings of one text may have


@dataclass(frozen=True)
class PreserveConfig:
    """What is preserved, how often, and how strongly."""

    prompts: tuple[str, ...]  # of files
    from_ledger: bool  # also the captions of the concepts in --dit
    answers: Path | None  # the reference predictions of earlier runs
    levels: int  # noise levels at which predictions for a new prompt are recorded
    every: int  # steps
    weight: float  # beside the loss on the new concept
    t5: Path
    tokenizer: Path | None
    batch: int | None = None  # predictions that are recorded in one pass of the model; None: by their size


@dataclass(frozen=True)
class OldPrompts:
    """The prompts to preserve, general ones and those of concepts, and notes on what is not preserved."""

    general: tuple[OldPrompt, ...] = ()
    of_concepts: tuple[OldPrompt, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[OldPrompt, ...]:
        return (*self.general, *self.of_concepts)

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts with their reference predictions, in order."""
        digest = hashlib.sha256(
            json.dumps([[old.text for old in part] for part in (self.general, self.of_concepts)]).encode()
        )
        for old in self.all:
            for answer in old.kept:
                digest.update(json.dumps([answer.t, answer.shape]).encode())
                digest.update(value_digest(answer.noisy_CFHW) + value_digest(answer.velocity_CFHW))
                digest.update(_given_digest(answer))
            if old.text_SD is not None:
                digest.update(value_digest(old.text_SD))
        return digest.hexdigest()


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
    """Old prompts with their reference predictions, and when and how strongly these are preserved.

    General prompts and those of concepts are drawn equally often, and so is each concept, so that few are not lost
    among many. A batch has at most `most_values` values of latents, as many as the largest batch of the run, unless a
    single prediction has more.
    """

    general: tuple[OldPrompt, ...]
    of_concepts: tuple[OldPrompt, ...]
    every: int
    weight: float
    most_values: int

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves."""
        return step % self.every == 0

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> list[Targets]:
        """For each generator an old prompt and one of its reference predictions, in batches of one latent size."""
        by_concept = defaultdict(list)
        for prompt in self.of_concepts:
            by_concept[prompt.concept].append(prompt)
        sources = [source for source in ([self.general], list(by_concept.values())) if any(source)]
        by_shape = defaultdict(list)
        for generator in generators:
            prompt = _choose(_choose(_choose(sources, generator), generator), generator)
            answer = _choose(prompt.kept, generator)
            by_shape[answer.shape].append((prompt.text_SD, answer))
        targets = []
        for shape, pairs in by_shape.items():
            size = max(self.most_values // math.prod(shape), 1)
            parts = (pairs[start : start + size] for start in range(0, len(pairs), size))
            targets += [_targets(part, len(part) / len(generators), device) for part in parts]
        return targets


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
    config: PreserveConfig, ledger: Sequence[Entry], own: Entry, kept: Sequence[OldPrompt], captions: Collection[str]
) -> OldPrompts:
    """The prompts to preserve: of files, of the ledger entries' captions, and of the answers file (`kept`).

    Left out are the slice that trains (`own`), its `captions`, and concepts that changed since their predictions were
    recorded. A concept's caption belongs to it, even if a prompt file lists it. InputError if nothing is left.
    """
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
    ]
    if not prompts:
        raise InputError("; ".join(_nothing_to_preserve(concepts, own) + notes))
    general = tuple(old for old in prompts if not old.concept)
    return OldPrompts(general, tuple(old for old in prompts if old.concept), tuple(notes))


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
    return [f"not preserved, because this run trains it: {', '.join(sorted(texts))}"] if texts else []


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


def encoded(
    prompts: Sequence[OldPrompt],
    config: PreserveConfig,
    model: WanConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> list[OldPrompt]:
    """The prompts, all of them encoded; the text encoder is freed afterwards.

    Says which ones are too long, and so are cut like captions. InputError if earlier ones were encoded by another text
    encoder.
    """
    if all(old.text_SD is not None for old in prompts):
        return list(prompts)
    text_encoder = load_text_encoder(
        config.t5, config.tokenizer, device=device, text_len=model.text_len, text_dim=model.text_dim
    )
    if known := next((old for old in prompts if old.text_SD is not None), None):
        _check_same_encoder(known, _encode(text_encoder, known.text), config)
    texts = [_encode(text_encoder, old.text) if old.text_SD is None else old.text_SD for old in prompts]
    for old in prompts:
        if old.text_SD is None and (tokens := text_encoder.count_tokens(old.text)) > model.text_len:
            say(f"note: {old.text[:60]!r} has {tokens} tokens; the model reads the first {model.text_len}")
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return [replace(old, text_SD=text_SD) for old, text_SD in zip(prompts, texts, strict=True)]


def _encode(text_encoder: TextEncoder, text: str) -> Tensor:
    """[S, D] on the CPU, in bf16 as text caches are."""
    return text_encoder([text])[0].bfloat16().cpu()


def _check_same_encoder(known: OldPrompt, again_SD: Tensor, config: PreserveConfig) -> None:
    """In another precision or on another device, encodings by the same encoder differ by a few percent."""
    kept_SD = known.text_SD
    if again_SD.shape != kept_SD.shape or (again_SD - kept_SD).norm() > _SAME_ENCODER * kept_SD.norm():
        raise InputError(
            f"{config.answers} was recorded with another text encoder than --t5 {config.t5}: use that one, or leave "
            "out --preserve_answers"
        )


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], own: Entry) -> list[str]:
    """What is preserved; if nothing is, though the model has learned other concepts, what that means for them."""
    if preserved is not None:
        when = "every step" if preserved.every == 1 else f"one step in {preserved.every}"
        return [
            f"preserves {len(preserved.general)} general prompts and {len(preserved.of_concepts)} prompts of concepts, "
            f"on {when}, with weight {preserved.weight:g}"
        ]
    beside = [entry for entry in ledger if not entry.overlaps(own)]
    if not beside:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in beside)
    auto = any(entry.captions for entry in beside)
    flags = "--preserve_prompts auto (and a file of prompts)" if auto else "--preserve_prompts with a file of prompts"
    return [
        f"note: the model has learned {names}; this run does not change their slices, but it may change what the model "
        f"generates for them: {flags} preserves that"
    ]
