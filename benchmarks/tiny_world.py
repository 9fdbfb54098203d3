"""What the benchmarks on the tiny Wan share: its model, its names, its pictures, its samples.

Shapes: N samples, C latent channels, F H W latent frames, height, width, S text tokens, D text width, P pixels.
"""

import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY_WAN = ROOT / "examples" / "tiny_wan"
sys.path[:0] = [str(ROOT), str(TINY_WAN)]

import torch  # noqa: E402
from atlas import read_atlas, read_picture  # noqa: E402
from emoji_pictures import HELD_OUT, nearest  # noqa: E402
from torch import Tensor  # noqa: E402

from wan.loading import load_dit  # noqa: E402
from wan.model import WanModel  # noqa: E402
from wan.text_encoder import load_text_encoder  # noqa: E402
from wan.vae import load_vae  # noqa: E402

SHIFTS = ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2), (1, 1), (-1, -1), (1, -1), (-1, 1))  # pixels down, right
FLOW_SHIFT = 3.0
SAMPLING_STEPS = 20
LEVELS = 8  # of noise, at which losses are measured
KNOWN = 40  # names in the preserve list, and as many that are not
CAPTIONS = 300  # names that random contexts are drawn like


class World:
    """The base's weights, the encoder of texts and pictures, the known names; all in float32 on the CPU."""

    def __init__(self):
        self.base = load_dit(TINY_WAN / "tiny_wan_t2v.safetensors", torch.float32).state_dict()
        self.names, self.pictures = read_atlas(TINY_WAN)
        self._vae = load_vae(TINY_WAN / "tiny_wan_vae.safetensors", torch.float32, "cpu")
        self._text_encoder = load_text_encoder(TINY_WAN / "models_t5_tiny.safetensors", dtype=torch.float32)
        self._texts: dict[str, Tensor] = {}
        self.held_out = self.names[-HELD_OUT:]
        self.listed, self.unlisted = self._choose_known()
        self.captions = self._choose_captions()

    def _choose_known(self) -> tuple[list[str], list[str]]:
        """Two lists of known names that share no word."""
        known, draw = self.names[:-HELD_OUT], random.Random("known")
        listed = draw.sample(known, KNOWN)
        words = {word for name in listed for word in name.split()}
        others = [name for name in known if words.isdisjoint(name.split())]
        return listed, draw.sample(others, KNOWN)

    def _choose_captions(self) -> list[str]:
        """Known names that share no word with those that are tested."""
        words = {word for name in (*self.listed, *self.unlisted) for word in name.split()}
        return [name for name in self.names[:-HELD_OUT] if words.isdisjoint(name.split())][:CAPTIONS]

    def model(self, state: dict[str, Tensor]) -> WanModel:
        """A new model with copies of these weights."""
        model = load_dit(TINY_WAN / "tiny_wan_t2v.safetensors", torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data = state[name].clone()
        return model.requires_grad_(False)

    def text(self, prompt: str) -> Tensor:
        """[S, D]."""
        if prompt not in self._texts:
            self._texts[prompt] = self._text_encoder([prompt])[0]
        return self._texts[prompt]

    @torch.no_grad()
    def character(self, picture: str) -> Tensor:
        """The latents [9, C, F, H, W] of a held-out picture at its nine places."""
        pixels_3PP = read_picture(TINY_WAN / "held_out" / f"{picture.replace(' ', '_')}.png")
        moved = torch.stack([pixels_3PP.roll(shift, dims=(-2, -1)) for shift in SHIFTS])  # the margins are white
        return self._vae.encode(moved[:, :, None])

    @torch.no_grad()
    def latents_of(self, names: Sequence[str]) -> Tensor:
        """[N, C, F, H, W] of the pictures of known or held-out names."""
        return self._vae.encode(self.pictures[[self.names.index(name) for name in names]][:, :, None])

    @torch.no_grad()
    def sample(self, model: WanModel, prompts: Sequence[str], seed: int, batch: int = 32) -> Tensor:
        """The latents [N, C, F, H, W] that a model draws without guidance, each sample from its own noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), 16, 1, 8, 8, generator=generator)
        drawn = []
        for start in range(0, len(prompts), batch):
            latents, texts = noise[start : start + batch], [self.text(p) for p in prompts[start : start + batch]]
            for sigma, following in pairwise(shifted(torch.linspace(1, 0, SAMPLING_STEPS + 1))):
                latents = latents + (following - sigma) * model(latents, (1000 * sigma).expand(len(texts)), texts)
            drawn.append(latents)
        return torch.cat(drawn)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, P, P] in [-1, 1]."""
        return torch.cat([self._vae.decode(part)[:, :, 0] for part in latents.split(64)])

    def recognise(self, latents: Tensor) -> list[str]:
        """The name of the nearest of all pictures, for every latent."""
        return [self.names[row] for row in nearest(self.decode(latents), self.pictures).tolist()]


def shifted(u: Tensor) -> Tensor:
    """Noise levels: uniform numbers, shifted towards more noise."""
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


def fixed_inputs(latents_NCFHW: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent at LEVELS noise levels: noisy latents, timesteps, targets (level by level)."""
    generator = torch.Generator().manual_seed(seed)
    noisy, t, target = [], [], []
    for level in range(LEVELS):
        sigma = shifted(torch.tensor((level + 0.5) / LEVELS))
        noise = torch.randn(latents_NCFHW.shape, generator=generator)
        noisy.append((1 - sigma) * latents_NCFHW + sigma * noise)
        t.append((1000 * sigma).expand(len(latents_NCFHW)))
        target.append(noise - latents_NCFHW)
    return torch.cat(noisy), torch.cat(t), torch.cat(target)


@torch.no_grad()
def velocities(model: WanModel, noisy: Tensor, t: Tensor, texts: Sequence[Tensor], batch: int = 32) -> Tensor:
    """What the model predicts at fixed_inputs; `texts` are those of the latents."""
    texts = list(texts) * LEVELS
    parts = range(0, len(noisy), batch)
    return torch.cat([model(noisy[i : i + batch], t[i : i + batch], texts[i : i + batch]) for i in parts])
