"""Keeps what a model knew: on some steps its answers to old prompts are pulled to those that it gave before.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), with prompts in place of tasks. Every old prompt is
asked once, when the first run that preserves it begins, and its answers are kept along the chain: a teacher that is
each run's own start would move with it, and small errors would add up.
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

from utils.learning.flow_matching import TIMESTEPS
from utils.preserve.answers_file import Answer, OldPrompt
from utils.slice_saving import value_digest
from utils.slices.ledger import Entry
from wan.configs import WanConfig
from wan.errors import InputError
from wan.text_encoder import TextEncoder, load_text_encoder
from wan.tokenizer import clean_prompt

CAPTIONS_KEPT = 8  # of a concept, in the ledger
_SAME_ENCODER = 0.3  # how far encodings of one text may be apart


@dataclass(frozen=True)
class PreserveConfig:
    """Which answers are preserved, on every how many steps, and with what weight beside the loss on the new concept."""

    prompts: tuple[str, ...]  # of files
    from_ledger: bool  # the captions of the concepts in --dit too
    answers: Path | None  # a file of kept ones
    levels: int  # of noise, at which a prompt is asked of which no answers are kept
    every: int
    weight: float
    t5: Path
    tokenizer: Path | None


@dataclass(frozen=True)
class OldPrompts:
    """What is preserved: nobody's prompts and those of concepts; why others of the answers file are not."""

    general: tuple[OldPrompt, ...] = ()
    of_concepts: tuple[OldPrompt, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[OldPrompt, ...]:
        return (*self.general, *self.of_concepts)

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts with their kept answers, in order."""
        digest = hashlib.sha256(
            json.dumps([[old.text for old in part] for part in (self.general, self.of_concepts)]).encode()
        )
        for old in self.all:
            for answer in old.kept:
                digest.update(json.dumps([answer.t, answer.shape]).encode())
                digest.update(value_digest(answer.noisy_CFHW) + value_digest(answer.velocity_CFHW))
            if old.text_SD is not None:
                digest.update(value_digest(old.text_SD))
        return digest.hexdigest()


@dataclass(frozen=True)
class Targets:
    """What the model is to say at noisy latents, noise levels, texts; `share` in the mean over a batch."""

    noisy_BCFHW: Tensor
    sigma_B: Tensor
    t_B: Tensor
    context: list[Tensor]
    velocity_BCFHW: Tensor
    share: float = 1.0


@dataclass(frozen=True)
class Preservation:
    """Old prompts, nobody's (general) and those of concepts, and when and how strongly their answers are preserved.

    The two are asked equally often, and so is each concept: few beside many would fade. A batch of kept answers has at
    most `most_values` values of latents, those of the largest batch of the run, unless a single one has more.
    """

    general: tuple[OldPrompt, ...]
    of_concepts: tuple[OldPrompt, ...]
    every: int
    weight: float
    most_values: int

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves; the first has nothing to be pulled back from."""
        return step % self.every == 0

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> list[Targets]:
        """From each generator an old prompt and one of its kept answers, in batches of one size of latents."""
        by_concept = defaultdict(list)
        for prompt in self.of_concepts:
            by_concept[prompt.concept].append(prompt)
        sources = [source for source in ([self.general], list(by_concept.values())) if any(source)]
        by_shape = defaultdict(list)
        for generator in generators:
            prompt = _any(_any(_any(sources, generator), generator), generator)
            answer = _any(prompt.kept, generator)
            by_shape[answer.shape].append((prompt.text_SD, answer))
        targets = []
        for shape, pairs in by_shape.items():
            size = max(self.most_values // math.prod(shape), 1)
            parts = (pairs[start : start + size] for start in range(0, len(pairs), size))
            targets += [_targets(part, len(part) / len(generators), device) for part in parts]
        return targets


def _any(choices: Sequence, generator: torch.Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _targets(pairs: Sequence[tuple[Tensor, Answer]], share: float, device: torch.device) -> Targets:
    noisy = torch.stack([answer.noisy_CFHW for _, answer in pairs]).float()
    t = torch.tensor([answer.t for _, answer in pairs])
    velocity = torch.stack([answer.velocity_CFHW for _, answer in pairs]).float()
    tensors = (noisy, t / TIMESTEPS, t, velocity, *(text_SD for text_SD, _ in pairs))
    noisy, sigma, t, velocity, *context = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Targets(noisy, sigma, t, context, velocity, share)


def most_frequent(captions: Sequence[str]) -> list[str]:
    """The few captions that a concept leaves in the ledger."""
    return [caption for caption, _ in Counter(captions).most_common(CAPTIONS_KEPT)]


def old_prompts(
    config: PreserveConfig, ledger: Sequence[Entry], own: Entry, kept: Sequence[OldPrompt], captions: Collection[str]
) -> OldPrompts:
    """The prompts to preserve: those of files, those of the `ledger`'s concepts, those of the answers file (`kept`).

    Not the slice that is trained, `own`, nor its `captions`, nor what the model no longer holds as it was when it was
    asked. A concept's caption belongs to it, also where a file names it. InputError where nothing is left.
    """
    held = [entry for entry in ledger if not entry.is_slice_of(own)]
    owners = {clean_prompt(text): entry for entry in held for text in entry.captions}  # the newest, where several are
    still = [old for old in kept if _still_holds(old, held, owners.get(clean_prompt(old.text)))]
    texts = [*config.prompts, *(text for entry in held if config.from_ledger for text in entry.captions)]
    listed = [OldPrompt(text, owners.get(clean_prompt(text))) for text in texts]
    by_text = {clean_prompt(old.text): old for old in [*listed, *still]}  # kept ones win
    trained = set(map(clean_prompt, captions))
    prompts = [old for text, old in by_text.items() if text not in trained]
    notes = [
        *_left_out([old for old in kept if old not in still], held, config.answers),
        *_trained([old.text for text, old in by_text.items() if text in trained]),
        *_without_prompt(config, held, prompts, trained),
    ]
    if not prompts:
        alone = [] if held else [f"--dit holds no concept beside ff {own.ff} ffid {own.ffid}, which trains"]
        raise InputError(
            "; ".join(["there is nothing to preserve: give --preserve_prompts a file of prompts", *alone, *notes])
        )
    general = tuple(old for old in prompts if not old.concept)
    return OldPrompts(general, tuple(old for old in prompts if old.concept), tuple(notes))


def _still_holds(old: OldPrompt, held: Sequence[Entry], owner: Entry | None) -> bool:
    """Whether what was kept is what is to be kept: not if its concept changed, or a later one has it as a caption."""
    if old.concept is None:
        return owner is None
    is_there = any(_is_the_same(old.concept, entry) for entry in held)
    return is_there and (owner is None or _is_the_same(old.concept, owner))


def _left_out(gone: Sequence[OldPrompt], held: Sequence[Entry], answers: Path | None) -> list[str]:
    """What of the answers file is not used, and why."""
    changed = [old for old in gone if old.concept and not any(_is_the_same(old.concept, entry) for entry in held)]
    notes = []
    if labels := dict.fromkeys(old.concept.label for old in changed):
        notes.append(f"left out of {answers}: {', '.join(labels)}, not held by --dit, or not as it was asked")
    if texts := sorted(old.text for old in gone if old not in changed):
        notes.append(f"left out of {answers}: {', '.join(texts)}, which a concept was taught with since it was asked")
    return notes


def _trained(texts: Sequence[str]) -> list[str]:
    return [f"not preserved, since it is trained now: {', '.join(sorted(texts))}"] if texts else []


def _without_prompt(
    config: PreserveConfig, held: Sequence[Entry], prompts: Sequence[OldPrompt], trained: Collection[str]
) -> list[str]:
    """The concepts that nothing is preserved of, by the reason."""
    concepts = [old.concept for old in prompts if old.concept]
    by_reason = defaultdict(list)
    for entry in held:
        if any(_is_the_same(concept, entry) for concept in concepts):
            continue
        if not entry.captions:
            reason = "the ledger tells no captions of it"
        elif trained.issuperset(map(clean_prompt, entry.captions)):
            reason = "its captions are trained now"
        elif config.from_ledger:
            reason = "its captions are those of a later concept"
        else:
            reason = "--preserve_prompts auto adds its captions"
        by_reason[reason].append(entry.label)
    return [f"note: no old prompt belongs to {', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


def _is_the_same(concept: Entry, entry: Entry) -> bool:
    """Whether the model holds the concept as it was when it was asked: not trained anew, not at another strength."""
    same = (concept.name, concept.date, concept.strength) == (entry.name, entry.date, entry.strength)
    return same and concept.is_slice_of(entry)


def encoded(
    prompts: Sequence[OldPrompt],
    config: PreserveConfig,
    model: WanConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> list[OldPrompt]:
    """The prompts, those encoded that are not yet; the text encoder is freed.

    Says which are too long and so are cut, as captions are. InputError if the others' text encoder was another one.
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
            say(f"note: {old.text[:60]!r} has {tokens} tokens, of which the model reads {model.text_len}")
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return [replace(old, text_SD=text_SD) for old, text_SD in zip(prompts, texts, strict=True)]


def _encode(text_encoder: TextEncoder, text: str) -> Tensor:
    """[S, D] on the CPU, in bf16 as text caches are."""
    return text_encoder([text])[0].bfloat16().cpu()


def _check_same_encoder(known: OldPrompt, again_SD: Tensor, config: PreserveConfig) -> None:
    """In another precision, or on another device, the same encoder differs by a few in a hundred."""
    kept_SD = known.text_SD
    if again_SD.shape != kept_SD.shape or (again_SD - kept_SD).norm() > _SAME_ENCODER * kept_SD.norm():
        raise InputError(
            f"{config.answers} was made with another text encoder than --t5 {config.t5}: give that one, or leave the "
            "file out"
        )


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], own: Entry) -> list[str]:
    """What is preserved; or, where concepts were taught beside the one that trains and nothing is, what is at stake."""
    if preserved is not None:
        when = "every step" if preserved.every == 1 else f"one step in {preserved.every}"
        return [
            f"preserves the answers to {len(preserved.general)} general prompts and {len(preserved.of_concepts)} of "
            f"concepts, on {when}, with weight {preserved.weight:g}"
        ]
    beside = [entry for entry in ledger if not entry.overlaps(own)]
    if not beside:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in beside)
    auto = any(entry.captions for entry in beside)
    advice = "--preserve_prompts auto (and a file of prompts)" if auto else "--preserve_prompts and a file of prompts"
    return [
        f"note: the model was taught {names}; this run leaves those values alone but changes what comes out: {advice} "
        "keeps it"
    ]
