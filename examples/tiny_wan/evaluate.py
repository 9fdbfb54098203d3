"""Measures the tiny Wan as it is saved: reconstruction, and how many emoji it draws when asked by name."""

import random
from itertools import pairwise
from pathlib import Path

import torch
from emoji_pictures import MOTIONS, Emoji, moving, nearest, on_white, psnr

from wan.loading import load_dit
from wan.text_encoder import load_text_encoder
from wan.vae import WanVAE, load_vae

STEPS, SHIFT = 20, 3.0


def evaluate(known: Emoji, held_out: Emoji, folder: Path, seed: int = 0, guidance_scales=(1.0, 2.0, 3.0)) -> None:
    """Prints PSNR of pictures and clips, and recognition of 100 known names, of held out ones and of new words."""
    vae = load_vae(folder / "tiny_wan_vae.safetensors")
    _report_reconstruction(vae, known, held_out)
    names = random.Random(seed).sample(known.names, 100)
    everything = (*known.names, *held_out.names)
    pictures = torch.cat([on_white(known.rgba_NCHW), on_white(held_out.rgba_NCHW)])
    draw = sampler(folder, vae)
    for guidance in guidance_scales:
        samples = draw(names, guidance, seed)
        rate = _recognised(samples, names, everything, pictures)
        print(f"guidance {guidance}: {rate:.0%} of 100 known names recognised", flush=True)
    samples = draw(list(held_out.names), 2.0, seed)
    print(f"held out names: {_recognised(samples, held_out.names, everything, pictures):.0%} recognised")
    found = nearest(draw(["character1"] * 4 + ["character2"] * 4, 2.0, seed)[:, :, 0], pictures)
    print("character1, character2 look like:", ", ".join(everything[row] for row in found.tolist()))


def sampler(folder: Path, vae: WanVAE):
    """A function of prompts, guidance scale and seed (frames=1) that draws decoded samples [N, 3, T, 64, 64]."""
    model = load_dit(folder / "tiny_wan_t2v.safetensors", torch.float32)
    text_encoder = load_text_encoder(folder / "models_t5_tiny.safetensors", dtype=torch.float32)

    @torch.no_grad()
    def draw(prompts: list[str], guidance: float, seed: int, frames: int = 1) -> torch.Tensor:
        context, empty = text_encoder(prompts), text_encoder([""]) * len(prompts)
        shape = (len(prompts), 16, 1 + (frames - 1) // 4, 8, 8)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        share = torch.linspace(1, 0, STEPS + 1)
        sigmas = SHIFT * share / (1 + (SHIFT - 1) * share)
        for sigma, following in pairwise(sigmas):
            t = (1000 * sigma).expand(len(prompts))
            flow = model(x, t, context)
            if guidance != 1:
                flow = torch.lerp(model(x, t, empty), flow, guidance)
            x = x + (following - sigma) * flow
        return vae.decode(x)

    return draw


def _report_reconstruction(vae: WanVAE, known: Emoji, held_out: Emoji) -> None:
    for what, emoji in (("known", known), ("held out", held_out)):
        pictures = on_white(emoji.rgba_NCHW)[:, :, None]
        decoded = torch.cat([vae.decode(vae.encode(part)) for part in pictures.split(64)])
        print(f"{what} pictures: {psnr(decoded, pictures):.2f} dB", flush=True)
    for frames in (5, 9):
        motions = [MOTIONS[i % len(MOTIONS)] for i in range(len(held_out.names))]
        clips = moving(on_white(held_out.rgba_NCHW), motions, frames)
        print(f"held out clips of {frames} frames: {psnr(vae.decode(vae.encode(clips)), clips):.2f} dB", flush=True)


def _recognised(samples: torch.Tensor, names, everything: tuple[str, ...], pictures: torch.Tensor) -> float:
    found = nearest(samples[:, :, 0], pictures).tolist()
    return sum(everything[row] == name for row, name in zip(found, names, strict=True)) / len(found)
