"""Encodes the texts that a run preserves, before its model takes up memory.

Shapes: S text tokens, D text width.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.preserve.answers import OldPrompt
from utils.preserve.old_prompts import PreserveConfig
from wan.configs import WanConfig
from wan.errors import InputError
from wan.text_encoder import TextEncoder, load_text_encoder

_SAME_ENCODER = 0.3  # relative distance that encodings of one text may have


def encoded(
    prompts: Sequence[OldPrompt],
    captions: Sequence[str],
    config: PreserveConfig,
    model: WanConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[OldPrompt], list[Tensor]]:
    """The prompts, all of them encoded, and the captions, [S, D] each; the text encoder is freed afterwards.

    Says which prompts are too long, and so are cut like captions. InputError if earlier ones were encoded by another
    text encoder.
    """
    if not captions and all(old.text_SD is not None for old in prompts):
        return list(prompts), []
    widths = {"text_len": model.text_len, "text_dim": model.text_dim}
    text_encoder = load_text_encoder(config.t5, config.tokenizer, device=device, fp8=config.fp8_t5, **widths)
    if known := next((old for old in prompts if old.text_SD is not None), None):
        _check_same_encoder(known, _encode(text_encoder, known.text), config)
    texts = [_encode(text_encoder, old.text) if old.text_SD is None else old.text_SD for old in prompts]
    for old in prompts:
        if old.text_SD is None and (tokens := text_encoder.count_tokens(old.text)) > model.text_len:
            say(f"note: {old.text[:60]!r} has {tokens} tokens; the model reads the first {model.text_len}")
    encoded_captions = [_encode(text_encoder, caption) for caption in captions]
    del text_encoder
    gc.collect()  # its memory is needed for the transformer
    return [replace(old, text_SD=text_SD) for old, text_SD in zip(prompts, texts, strict=True)], encoded_captions


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
