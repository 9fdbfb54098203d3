"""Trains the tiny Wan 2.1 VAE on emoji pictures."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from emoji_pictures import MOTIONS, Emoji, moving, on_colour, on_white, psnr, warp
from original_names import original_vae_names
from safetensors.torch import save_file

WIDTH = 12
BATCH = 16
CLIP_BATCH = 4
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.1


def train_vae(known: Emoji, held_out: Emoji, path: Path, minutes: float, compiled: bool, seed: int = 0) -> None:
    """Trains for about `minutes`, the second half partly on clips, and saves bf16 in original names."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=WIDTH, z_dim=16)
    WanCausalConv3d.forward = _fast_on_single_frames
    encoder, decoder = (torch.compile(part) if compiled else part for part in (vae.encoder, vae.decoder))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        _set_learning_rate(optimizer, step, progress)
        if progress > 0.55 and step % 6 == 0:
            loss = _clip_loss(vae, known, draw)
        else:
            loss = _picture_loss(vae, encoder, decoder, known, draw)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step, progress = step + 1, (time.monotonic() - start) / (60 * minutes)
        if step % 100 == 0:
            print(f"{step} steps, {progress:.1%}, loss {loss.item():.4f}, {_report(vae, known, held_out)}", flush=True)
        if step % 500 == 0:
            torch.save(vae.state_dict(), path.with_suffix(".unfinished"))
    _normalise_latents(vae, known)
    vae.to(torch.bfloat16)
    save_file(original_vae_names(vae.state_dict()), path)
    path.with_suffix(".unfinished").unlink(missing_ok=True)


def _fast_on_single_frames(self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None):
    """A causal convolution; on one first frame, the past is zeros, so only the last tap in time counts."""
    before, height, width = self._padding[4], self._padding[2], self._padding[0]
    if x.shape[2] == 1 and cache_x is None and self.kernel_size[0] == before + 1:
        picture = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(height, width))
        return picture[:, :, None]
    if cache_x is not None and before > 0:
        x = torch.cat([cache_x, x], dim=2)
        before -= cache_x.shape[2]
    x = F.pad(x, (width, width, height, height, before, 0))
    return F.conv3d(x, self.weight, self.bias, self.stride)


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, progress: float) -> None:
    cosine = 0.5 * (1 + torch.cos(torch.tensor(min(progress, 1.0)) * torch.pi).item())
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * max(cosine, 0.005)


def _picture_loss(vae: AutoencoderKLWan, encoder, decoder, known: Emoji, draw: torch.Generator) -> torch.Tensor:
    pictures_NCHW = _changed_pictures(known, draw)[:, :, None]
    mean = vae.quant_conv(encoder(pictures_NCHW))[:, :16]
    noisy = mean + LATENT_NOISE * torch.randn(mean.shape, generator=draw)
    return _loss(decoder(vae.post_quant_conv(noisy)), pictures_NCHW, mean)


def _clip_loss(vae: AutoencoderKLWan, known: Emoji, draw: torch.Generator) -> torch.Tensor:
    rows = torch.randint(len(known.names), (CLIP_BATCH,), generator=draw)
    motions = [MOTIONS[i] for i in torch.randint(len(MOTIONS), (CLIP_BATCH,), generator=draw)]
    clips_NCFHW = moving(on_white(known.rgba_NCHW[rows]), motions, 5 + 4 * (torch.rand((), generator=draw) < 0.4).int())
    mean = vae.encode(clips_NCFHW).latent_dist.mode()
    noisy = mean + LATENT_NOISE * torch.randn(mean.shape, generator=draw)
    return _loss(vae.decode(noisy).sample, clips_NCFHW, mean)


def _loss(decoded: torch.Tensor, pictures: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """L1 + L2, with a pull that keeps the latents about as wide as a Gaussian of width 1."""
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + 1e-3 * mean.square().mean()


def _changed_pictures(known: Emoji, draw: torch.Generator) -> torch.Tensor:
    """A batch on white as it is (half), or moved, scaled, mirrored, on plain colours (half)."""
    rows = torch.randint(len(known.names), (BATCH,), generator=draw)
    half = BATCH // 2
    plain = on_white(known.rgba_NCHW[rows[:half]])
    rgba = known.rgba_NCHW[rows[half:]].float()
    scale = 0.6 + 0.6 * torch.rand(half, generator=draw)
    shift = 0.4 * torch.rand(half, 2, generator=draw) - 0.2
    flip = torch.randint(2, (half,), generator=draw) * 2.0 - 1
    rgba = warp(rgba, scale, shift, flip)
    colour = torch.rand(half, 3, generator=draw) * 2 - 1
    colour[::2] = 1
    return torch.cat([plain, on_colour(rgba, colour)])


@torch.no_grad()
def _report(vae: AutoencoderKLWan, known: Emoji, held_out: Emoji) -> str:
    texts = []
    for what, emoji in (("known", known.take(list(range(0, len(known.names), 40)))), ("held out", held_out)):
        pictures = on_white(emoji.rgba_NCHW)[:, :, None]
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
        texts.append(f"{what} {psnr(decoded, pictures):.2f} dB")
    return ", ".join(texts)


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKLWan, known: Emoji) -> None:
    """Folds an affine map into the layers around the latents, so that Wan's constants normalise the known emoji."""
    pictures = on_white(known.rgba_NCHW)[:, :, None]
    means = torch.cat([vae.quant_conv(vae.encoder(chunk))[:, :16] for chunk in pictures.split(64)])
    mean_C, std_C = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    wan_mean_C, wan_std_C = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    scale_C = wan_std_C / std_C
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:16] *= scale_C[:, None, None, None, None]
    encode.bias[:16] = (encode.bias[:16] - mean_C) * scale_C + wan_mean_C
    encode.weight[16:] = 0
    encode.bias[16:] = 2 * torch.log(LATENT_NOISE * scale_C)
    decode.bias += decode.weight[:, :, 0, 0, 0] @ (mean_C - wan_mean_C / scale_C)
    decode.weight /= scale_C[None, :, None, None, None]
