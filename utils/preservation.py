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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.flow_matching import TIMESTEPS
from utils.kept_answers import Answer, OldPrompt
from utils.ledger import Entry
from wan.errors import InputError
from wan.text_encoder import load_text_encoder

CAPTIONS_KEPT = 8  # of a concept, in the ledger


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
        """SHA-256 of all prompts with their kept answers, in order; InputError if one is not finite."""
        digest = hashlib.sha256(
            json.dumps([[old.text for old in part] for part in (self.general, self.of_concepts)]).encode()
        )
        for kept in (kept for old in self.all for kept in old.kept):
            answer = kept.read()
            digest.update(json.dumps([kept.t, kept.shape]).encode())
            digest.update(answer.noisy_CFHW.numpy().tobytes() + answer.velocity_CFHW.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class EncodedPrompt:
    """An old prompt with all the answers that are kept of it, and its text [S, D], on the CPU."""

    old: OldPrompt
    text_SD: Tensor


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

    The two are asked equally often: few concepts beside many general prompts would fade. A batch of kept answers has at
    most `most_values` values of latents, those of the largest batch of the run, unless a single one has more.
    """

    general: tuple[EncodedPrompt, ...]
    of_concepts: tuple[EncodedPrompt, ...]
    every: int
    weight: float
    most_values: int

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves; the first has nothing to be pulled back from."""
        return step % self.every == 0

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> list[Targets]:
        """From each generator an old prompt and one of its kept answers, in batches of one size of latents."""
        sources = [source for source in (self.general, self.of_concepts) if source]
        by_shape = defaultdict(list)
        for generator in generators:
            prompt = _any(_any(sources, generator), generator)
            answer = _any(prompt.old.kept, generator).read()
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
    noisy = torch.stack([answer.noisy_CFHW for _, answer in pairs])
    t = torch.tensor([answer.t for _, answer in pairs])
    velocity = torch.stack([answer.velocity_CFHW for _, answer in pairs])
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
    asked. InputError where nothing is left.
    """
    held = [entry for entry in ledger if not entry.is_slice_of(own)]
    still = [old for old in kept if old.concept is None or any(_is_the_same(old.concept, entry) for entry in held)]
    listed = [OldPrompt(text) for text in config.prompts]
    listed += [OldPrompt(text, entry) for entry in held if config.from_ledger for text in entry.captions]
    by_text = {old.text: old for old in [*listed, *still]}  # kept ones win
    prompts = [old for text, old in by_text.items() if text not in captions]
    notes = _notes(config, [old for old in kept if old not in still], by_text.keys() & captions, held, prompts)
    if not prompts:
        raise InputError("; ".join(["there is nothing to preserve: give --preserve_prompts a file of prompts", *notes]))
    general = tuple(old for old in prompts if not old.concept)
    return OldPrompts(general, tuple(old for old in prompts if old.concept), notes)


def _notes(
    config: PreserveConfig,
    gone: Sequence[OldPrompt],
    trained: Collection[str],
    held: Sequence[Entry],
    prompts: Sequence[OldPrompt],
) -> tuple[str, ...]:
    """What is not preserved, and why."""
    notes, labels = [], dict.fromkeys(old.concept.label for old in gone)
    if labels:
        notes.append(f"left out of {config.answers}: {', '.join(labels)}, not held by --dit, or not as it was asked")
    if trained:
        notes.append(f"not preserved, since it is trained now: {', '.join(sorted(trained))}")
    concepts = [old.concept for old in prompts if old.concept]
    bare = [entry.label for entry in held if not any(_is_the_same(concept, entry) for concept in concepts)]
    if bare:
        advice = (
            "the ledger tells no captions of it" if config.from_ledger else "--preserve_prompts auto adds its captions"
        )
        notes.append(f"note: no old prompt belongs to {', '.join(bare)}: {advice}")
    return tuple(notes)


def _is_the_same(concept: Entry, entry: Entry) -> bool:
    """Whether the model holds the concept as it was when it was asked: not trained anew, not at another strength."""
    same = (concept.name, concept.date, concept.strength) == (entry.name, entry.date, entry.strength)
    return same and concept.is_slice_of(entry)


def encode_prompts(
    config: PreserveConfig, prompts: Sequence[OldPrompt], text_len: int, device: torch.device
) -> list[Tensor]:
    """The text [S, D] (CPU) of every prompt, up to text_len tokens; the text encoder is freed."""
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=device, text_len=text_len)
    texts = [text_encoder([old.text])[0].cpu() for old in prompts]
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return texts


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], dit: Path) -> list[str]:
    """What is preserved; or, where concepts were taught before and nothing is, what is at stake."""
    if preserved is not None:
        when = "every step" if preserved.every == 1 else f"one step in {preserved.every}"
        return [
            f"preserves the answers to {len(preserved.general)} general prompts and {len(preserved.of_concepts)} of "
            f"concepts, on {when}, with weight {preserved.weight:g}"
        ]
    if not ledger:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in ledger)
    return [
        f"note: {dit} was taught {names}; another concept leaves those values alone but changes what comes out: "
        "--preserve_prompts auto (and a file of prompts) keeps it"
    ]
