"""Keeps what a model knew: on some steps its answers to old prompts are pulled to those of when the run began.

Learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282), with prompts in place of tasks. The teacher is the
run's own model at strength 0 of its slice, so it takes no memory.
Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.ledger import Entry
from utils.selective_finetune import TrainedSlice
from wan.errors import InputError
from wan.model import WanModel
from wan.text_encoder import load_text_encoder

CAPTIONS_KEPT = 8  # of a concept, in the ledger


@dataclass(frozen=True)
class PreserveConfig:
    """Which answers are kept, on every how many steps, and with what weight beside the loss on the new concept."""

    prompts: tuple[str, ...]  # of files
    from_ledger: bool  # the captions of the concepts in --dit too
    every: int
    weight: float
    t5: Path
    tokenizer: Path | None


@dataclass(frozen=True)
class Preservation:
    """Old prompts, encoded (each [S, D], on the CPU), and when and how strongly their answers are kept.

    The sources, files and ledger, are asked equally often: few concepts beside many general prompts would fade.
    """

    sources: tuple[tuple[Tensor, ...], ...]
    every: int
    weight: float

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) preserves; the first would pull at what has not moved yet."""
        return step % self.every == 0


@dataclass(frozen=True)
class Answers:
    """What the teacher says to `context`, old prompts, at the noisy latents of a batch."""

    context: list[Tensor]
    velocity_BCFHW: Tensor


def most_frequent(captions: Sequence[str]) -> list[str]:
    """The few captions that a concept leaves in the ledger."""
    return [caption for caption, _ in Counter(captions).most_common(CAPTIONS_KEPT)]


def old_prompts(config: PreserveConfig, ledger: Sequence[Entry], dit: Path) -> tuple[tuple[str, ...], ...]:
    """The prompts to preserve, by source; InputError where the ledger of `dit` is asked for captions and has none."""
    captions = [caption for entry in ledger for caption in entry.captions]
    if config.from_ledger and not captions:
        raise InputError(
            f"--preserve_prompts auto: {dit} tells no captions of concepts that it was taught before; give a file of "
            "prompts, one a line"
        )
    sources = [config.prompts, captions if config.from_ledger else ()]
    return tuple(tuple(dict.fromkeys(source)) for source in sources if source)


def prompts_hash(sources: Sequence[Sequence[str]]) -> str:
    """One SHA-256 of all prompts, in order."""
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def encode_prompts(
    config: PreserveConfig, sources: Sequence[Sequence[str]], text_len: int, device: torch.device
) -> tuple[tuple[Tensor, ...], ...]:
    """The text [S, D] (CPU) of every prompt, up to text_len tokens; the text encoder is freed."""
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=device, text_len=text_len)
    texts = tuple(tuple(text_encoder([prompt])[0].cpu() for prompt in prompts) for prompts in sources)
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return texts


def draw_texts(sources: Sequence[Sequence[Tensor]], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """One text from each generator: any source is as likely as another, and in it any text."""
    drawn = []
    for generator in generators:
        source = sources[int(torch.randint(len(sources), (), generator=generator))]
        drawn.append(source[int(torch.randint(len(source), (), generator=generator))])
    return drawn


@torch.no_grad()
def ask_teacher(
    preserved: Preservation,
    model: WanModel,
    trained: TrainedSlice,
    noisy_BCFHW: Tensor,
    t_B: Tensor,
    generators: Sequence[torch.Generator],
) -> Answers:
    """What the model of the run's start answers to old prompts, one from each generator, at these noisy latents.

    It writes weights, so it belongs before the student's forward or after its backward, never between.
    """
    drawn = draw_texts(preserved.sources, generators)
    context = [text_SD.to(noisy_BCFHW.device, non_blocking=True) for text_SD in drawn]
    with trained.at_strength(0):
        return Answers(context, model(noisy_BCFHW, t_B, context))


def preserve_lines(preserved: Preservation | None, ledger: Sequence[Entry], dit: Path) -> list[str]:
    """What is preserved; or, where concepts were taught before and nothing is, what is at stake."""
    if preserved is not None:
        return [
            f"preserves the answers to {sum(map(len, preserved.sources))} prompts, on one step in {preserved.every}, "
            f"with weight {preserved.weight:g}"
        ]
    if not ledger:
        return []
    names = ", ".join(entry.name or "a concept without a name" for entry in ledger)
    return [
        f"note: {dit} was taught {names}; another concept leaves those values alone but changes what comes out: "
        "--preserve_prompts auto (or a file of prompts) keeps it"
    ]
