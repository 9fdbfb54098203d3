"""The Wan 2.1 VAE: pixels to normalised latents and back.

B batch, T frames, H W height and width in pixels, C latent channels, F h w latent frames, height, width.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.configs import WAN_2_1_VAE as LAYOUT
from wan.errors import InputError
from wan.state_dict_files import fill_model, read_state_dict, strip_prefix

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Per channel, from Wan's own VAE: stored latent = (mean of the posterior - LATENTS_MEAN) / LATENTS_STD.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
)


class WanVAE:
    """A loaded Wan 2.1 VAE; frozen, in evaluation mode."""

    def __init__(self, model: "AutoencoderKLWan"):
        self.model = model.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device) -> "WanVAE":
        """Itself, moved to `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, h, w] in float32 of a video [B, 3, T, H, W] in [-1, 1]: the posterior's mean.

        A picture is a video of one frame. InputError unless T is 4k+1 and H and W are multiples of 8: the network would
        silently drop the rest.
        """
        _check_video(video_BCTHW)
        posterior = self.model.encode(video_BCTHW.to(self.device, self.dtype)).latent_dist
        mean, std = _normalisation(self.device)
        return (posterior.mode().float() - mean) / std

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The video [B, 3, 4F-3, 8h, 8w] in float32, clamped to [-1, 1], of normalised latents [B, 16, F, h, w]."""
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != LAYOUT.channels:
            shape = tuple(latents_BCFHW.shape)
            raise InputError(f"latents have the shape {shape}; the Wan 2.1 VAE decodes [B, {LAYOUT.channels}, F, h, w]")
        mean, std = _normalisation(self.device)
        latents = latents_BCFHW.to(self.device, torch.float32) * std + mean
        return self.model.decode(latents.to(self.dtype)).sample.float()  # diffusers clamps


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanVAE:
    """The VAE of a Wan 2.1 file (.pth or .safetensors, original names), its width read from the file.

    InputError for a file that is missing, truncated, contains code, or is not a Wan 2.1 VAE.
    """
    tensors, _ = read_state_dict(path, "VAE")
    tensors = strip_prefix(tensors, ("model.",))
    base_dim = _base_dim(tensors, path)
    from diffusers import AutoencoderKLWan  # here, because it takes seconds

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=base_dim, z_dim=LAYOUT.channels)
    renamed = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    fill_model(model, renamed, dtype, device, f"{path} is not a Wan 2.1 VAE")
    return WanVAE(model)


def diffusers_name(name: str) -> str:
    """The name in diffusers' AutoencoderKLWan of a parameter of Wan's own VAE; plain renames, one to one."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.upsamples\.(\d+)\.", _up_block, name)


def _up_block(match: re.Match) -> str:
    # Wan lists its up blocks flat: three residual blocks, then an upsampler, and so on.
    block, place = divmod(int(match[1]), 4)
    return f"decoder.up_blocks.{block}." + ("upsamplers.0." if place == 3 else f"resnets.{place}.")


def _base_dim(tensors: Mapping[str, Tensor], path: str | Path) -> int:
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in tensors:
        raise InputError(f"{path} is the Wan 2.2 VAE (of ti2v-5B): use the Wan 2.1 VAE, which the A14B models need too")
    if "decoder.head.0.gamma" not in tensors or "conv2.weight" not in tensors:
        raise InputError(f"{path} is not a Wan 2.1 VAE: it does not contain decoder.head.0.gamma or conv2.weight")
    channels = tensors["conv2.weight"].shape[1]
    if channels != LAYOUT.channels:
        raise InputError(f"{path} is a VAE of {channels} latent channels; the Wan 2.1 VAE has {LAYOUT.channels}")
    return tensors["decoder.head.0.gamma"].shape[0]


def _check_video(video_BCTHW: Tensor) -> None:
    if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != 3:
        raise InputError(f"a video has the shape {tuple(video_BCTHW.shape)}; the VAE encodes [B, 3, T, H, W]")
    frames, height, width = video_BCTHW.shape[2:]
    if frames % LAYOUT.frame_stride != 1:
        raise InputError(f"a video has {frames} frames; the VAE encodes 1, 5, 9, ... (4k+1) frames")
    if height % LAYOUT.pixel_stride or width % LAYOUT.pixel_stride or not height or not width:
        raise InputError(
            f"a video is {width}x{height}; the VAE encodes sizes that are multiples of {LAYOUT.pixel_stride}"
        )


def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    return mean, std
