"""Keeps what a model knew: on some steps its answers to old prompts are pulled to those that it gave before.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), with prompts in place of tasks. Answers that a file
keeps are compared at their own noisy latents; those of other prompts come from a teacher, the run's own model at
strength 0 of its slice, which takes no memory.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import gc
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.kept_answers import Answer, OldPrompt, read_answers
from utils.ledger import Entry
from utils.selective_finetune import TrainedSlice
from wan.errors import InputError
from wan.model import WanModel
from wan.text_encoder import load_text_encoder

CAPTIONS_KEPT = 8  # of a concept, in the ledger
Ask = Callable[[Tensor, Tensor, list[Tensor]], Tensor]  # noisy latents, timesteps, texts -> velocities


@dataclass(frozen=True)
class PreserveConfig:
    """Which answers are preserved, on every how many steps, and with what weight beside the loss on the new concept."""

    prompts: tuple[str, ...]  # of files
    from_ledger: bool  # the captions of the concepts in --dit too
    answers: Path | None  # a file of kept ones
    every: int
    weight: float
    t5: Path
    tokenizer: Path | None


@dataclass(frozen=True)
class EncodedPrompt:
    """An old prompt and its text [S, D], on the CPU. Where no answer to it is kept, the teacher is asked."""

    old: OldPrompt
    text_SD: Tensor


@dataclass(frozen=True)
class Preservation:
    """Old prompts, and when and how strongly their answers are preserved.

    The sources, nobody's prompts and those of concepts, are asked equally often: few concepts beside many general
    prompts would fade.
    """

    sources: tuple[tuple[EncodedPrompt, ...], ...]
    every: int
    weight: float

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves."""
        return step % self.every == 0


@dataclass(frozen=True)
class Answers:
    """What is to be answered to `context`, old prompts, at noisy latents; `share` of all that a batch preserves."""

    noisy_BCFHW: Tensor
    t_B: Tensor
    context: list[Tensor]
    velocity_BCFHW: Tensor
    share: float


def most_frequent(captions: Sequence[str]) -> list[str]:
    """The few captions that a concept leaves in the ledger."""
    return [caption for caption, _ in Counter(captions).most_common(CAPTIONS_KEPT)]


def old_prompts(
    config: PreserveConfig, ledger: Sequence[Entry], own: Entry, base: str, dit: Path, captions: Collection[str]
) -> tuple[tuple[OldPrompt, ...], ...]:
    """The prompts to preserve, nobody's and those of the `ledger`'s concepts, with the answers that are kept of them.

    What is trained now, the slice `own` on these `captions`, is none of them. InputError where nothing is left, or
    where the ledger of `dit` is asked for captions and tells none.
    """
    kept = [old for old in _kept(config, base) if old.concept is None or _is_taught(old.concept, ledger, own)]
    listed = [OldPrompt(text) for text in config.prompts]
    if config.from_ledger:
        taught = [entry for entry in ledger if not entry.is_slice_of(own)]
        listed += [OldPrompt(caption, entry) for entry in taught for caption in entry.captions]
        if not any(prompt.concept for prompt in [*listed, *kept]):
            raise InputError(
                f"--preserve_prompts auto: {dit} tells no captions of concepts that it was taught before; give a file "
                "of prompts, one a line"
            )
    by_text = {prompt.text: prompt for prompt in [*listed, *kept] if prompt.text not in captions}  # kept ones win
    if not by_text:
        raise InputError("there is nothing to preserve: all the old prompts are captions of what is trained now")
    sources = [[p for p in by_text.values() if not p.concept], [p for p in by_text.values() if p.concept]]
    return tuple(tuple(source) for source in sources if source)


def _kept(config: PreserveConfig, base: str) -> list[OldPrompt]:
    return read_answers(config.answers, base) if config.answers else []


def _is_taught(concept: Entry, ledger: Sequence[Entry], own: Entry) -> bool:
    """Whether the model still holds it, as far as a ledger tells: what was removed is not to be taught again."""
    held = any(concept.is_slice_of(entry) and concept.name == entry.name for entry in ledger)
    return not concept.is_slice_of(own) and (held or not ledger)


def prompts_hash(sources: Sequence[Sequence[OldPrompt]]) -> str:
    """One SHA-256 of all prompts with their kept answers, in order."""
    digest = hashlib.sha256(json.dumps([[prompt.text for prompt in source] for source in sources]).encode())
    for kept in (kept for source in sources for prompt in source for kept in prompt.kept):
        answer = kept.read()
        digest.update(json.dumps([kept.t, kept.shape]).encode())
        digest.update(answer.noisy_CFHW.numpy().tobytes() + answer.velocity_CFHW.numpy().tobytes())
    return digest.hexdigest()


def encode_prompts(
    config: PreserveConfig, sources: Sequence[Sequence[OldPrompt]], text_len: int, device: torch.device
) -> tuple[tuple[EncodedPrompt, ...], ...]:
    """Every prompt with its text, up to text_len tokens; the text encoder is freed."""
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=device, text_len=text_len)
    encoded = tuple(
        tuple(EncodedPrompt(prompt, text_encoder([prompt.text])[0].cpu()) for prompt in source) for source in sources
    )
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return encoded


def draw_prompts(
    sources: Sequence[Sequence[EncodedPrompt]], generators: Sequence[torch.Generator]
) -> list[tuple[Tensor, Answer | None]]:
    """From each generator a prompt's text and one of its kept answers, if there are any.

    Any source is as likely as another, and in it any prompt, and of that any answer.
    """
    drawn = []
    for generator in generators:
        prompt = _any(_any(sources, generator), generator)
        drawn.append((prompt.text_SD, _any(prompt.old.kept, generator).read() if prompt.old.kept else None))
    return drawn


def _any(choices: Sequence, generator: torch.Generator):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


@torch.no_grad()
def old_answers(
    sources: Sequence[Sequence[EncodedPrompt]],
    ask: Ask,
    noisy_BCFHW: Tensor,
    t_B: Tensor,
    generators: Sequence[torch.Generator],
) -> list[Answers]:
    """What is to be answered to old prompts, one from each generator, in batches of one size of latents.

    What is not kept is asked at these noisy latents.
    """
    drawn, batches, by_shape = draw_prompts(sources, generators), [], defaultdict(list)
    if asked := [place for place, (_, kept) in enumerate(drawn) if kept is None]:
        context = [drawn[place][0].to(noisy_BCFHW.device, non_blocking=True) for place in asked]
        velocity_BCFHW = ask(noisy_BCFHW[asked], t_B[asked], context)
        batches.append(Answers(noisy_BCFHW[asked], t_B[asked], context, velocity_BCFHW, len(asked) / len(drawn)))
    for text_SD, kept in drawn:
        if kept is not None:
            by_shape[kept.noisy_CFHW.shape].append((text_SD, kept))
    return batches + [_batch(pairs, len(drawn), noisy_BCFHW.device) for pairs in by_shape.values()]


def _batch(pairs: Sequence[tuple[Tensor, Answer]], drawn: int, device: torch.device) -> Answers:
    noisy = torch.stack([answer.noisy_CFHW for _, answer in pairs])
    t = torch.tensor([answer.t for _, answer in pairs])
    velocity = torch.stack([answer.velocity_CFHW for _, answer in pairs])
    noisy, t, velocity, *context = (
        x.to(device, non_blocking=True) for x in (noisy, t, velocity, *(text_SD for text_SD, _ in pairs))
    )
    return Answers(noisy, t, context, velocity, len(pairs) / drawn)


@torch.no_grad()
def ask_model(model: WanModel, noisy_BCFHW: Tensor, t_B: Tensor, context: list[Tensor]) -> Tensor:
    """What the model answers as it is now."""
    return model(noisy_BCFHW, t_B, context)


def ask_teacher(
    model: WanModel, trained: TrainedSlice, noisy_BCFHW: Tensor, t_B: Tensor, context: list[Tensor]
) -> Tensor:
    """What the model of the run's start answers.

    It writes weights, so it belongs before the student's forward or after its backward, never between.
    """
    with trained.at_strength(0):
        return ask_model(model, noisy_BCFHW, t_B, context)


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], dit: Path) -> list[str]:
    """What is preserved; or, where concepts were taught before and nothing is, what is at stake."""
    if preserved is not None:
        prompts = [prompt for source in preserved.sources for prompt in source]
        kept = sum(bool(prompt.old.kept) for prompt in prompts)
        return [
            f"preserves the answers to {len(prompts)} prompts ({kept} of them kept), on "
            f"{'every step' if preserved.every == 1 else f'one step in {preserved.every}'}, with weight "
            f"{preserved.weight:g}"
        ]
    if not ledger:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in ledger)
    return [
        f"note: {dit} was taught {names}; another concept leaves those values alone but changes what comes out: "
        "--preserve_answers with the file of the run before, or --preserve_prompts auto, keeps it"
    ]
