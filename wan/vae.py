"""The VAEs of Wan 2.1 and 2.2: pixels to normalised latents and back.

B batch, T frames, H W height and width in pixels, C latent channels, F h w latent frames, height, width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.configs import WAN_2_1_VAE, WAN_2_2_VAE, LatentLayout
from wan.errors import InputError
from wan.state_dict_files import load_model, read_state_dict, strip_prefix

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Per channel, from Wan's own VAEs: stored latent = (mean of the posterior - mean) / std.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
LATENTS_MEAN_2_2 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD_2_2 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclass(frozen=True)
class VAEKind:
    """One of Wan's VAEs: how it lays out latents, and their statistics by channel."""

    name: str
    layout: LatentLayout
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tasks: str


WAN_2_1 = VAEKind("Wan 2.1 VAE", WAN_2_1_VAE, LATENTS_MEAN, LATENTS_STD, "of all models but ti2v-5B")
WAN_2_2 = VAEKind("Wan 2.2 VAE", WAN_2_2_VAE, LATENTS_MEAN_2_2, LATENTS_STD_2_2, "of ti2v-5B")

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
    # Wan 2.2 lists its blocks with their parts inside, Wan 2.1 its parts one after another.
    (
        r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.",
        r"encoder.down_blocks.\1.downsampler.\2.",
    ),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r"decoder.up_blocks.\1.upsampler.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
)


class WanVAE:
    """A loaded VAE of Wan 2.1 or 2.2; frozen, in evaluation mode."""

    def __init__(self, model: "AutoencoderKLWan", kind: VAEKind):
        self.model = model
        self.kind = kind

    @property
    def latent_channels(self) -> int:
        return self.kind.layout.channels

    @property
    def stride(self) -> tuple[int, int, int]:
        """The frames, rows and columns of pixels for one latent value."""
        layout = self.kind.layout
        return layout.frame_stride, layout.pixel_stride, layout.pixel_stride

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
        """Normalised latents [B, C, F, h, w] in float32 of a video [B, 3, T, H, W] in [-1, 1]: the posterior's mean.

        A picture is a video of one frame. InputError unless T is 4k+1 and H and W are multiples of the stride: the
        network would silently drop the rest.
        """
        _check_video(video_BCTHW, self.kind)
        posterior = self.model.encode(video_BCTHW.to(self.device, self.dtype)).latent_dist
        mean, std = _normalisation(self.kind, self.device)
        return (posterior.mode().float() - mean) / std

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The video [B, 3, 4F-3, H, W] in float32, clamped to [-1, 1], of normalised latents [B, C, F, h, w]."""
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != self.latent_channels:
            shape = tuple(latents_BCFHW.shape)
            raise InputError(
                f"latents have the shape {shape}; the {self.kind.name} decodes [B, {self.latent_channels}, F, h, w]"
            )
        mean, std = _normalisation(self.kind, self.device)
        latents = latents_BCFHW.to(self.device, torch.float32) * std + mean
        return self.model.decode(latents.to(self.dtype)).sample.float()  # diffusers clamps


def load_vae(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    latent_channels: int | None = None,
) -> WanVAE:
    """The VAE of a Wan 2.1 or 2.2 file (.pth or .safetensors, original names); which one, and how wide, the file says.

    `latent_channels`: those that a transformer reads, where one is known. InputError, in one line, for a file that is
    missing, truncated, contains code, is not one of Wan's VAEs, or makes latents of other channels.
    """
    tensors, _ = read_state_dict(path, "VAE")
    tensors = strip_prefix(tensors, ("model.",))
    kind = _kind(tensors, path)
    if latent_channels not in (None, kind.layout.channels):
        known = [f"the {k.name} ({k.tasks})" for k in (WAN_2_1, WAN_2_2) if k.layout.channels == latent_channels]
        raise InputError(
            f"{path} is the {kind.name} ({kind.tasks}), with {kind.layout.channels} latent channels; {latent_channels} "
            f"are needed: use {known[0] if known else 'the VAE of the model'}"
        )
    from diffusers import AutoencoderKLWan  # here, because it takes seconds

    settings = autoencoder_settings(tensors, kind)
    renamed = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    source = f"{path} is not a {kind.name}"
    return WanVAE(load_model(lambda: AutoencoderKLWan(**settings), renamed, dtype, device, source), kind)


def read_vae_kind(path: str | Path) -> VAEKind:
    """Which of Wan's VAEs a file holds; its weights are not read. InputError as load_vae."""
    tensors, _ = read_state_dict(path, "VAE")
    return _kind(strip_prefix(tensors, ("model.",)), path)


def diffusers_name(name: str) -> str:
    """The name in diffusers' AutoencoderKLWan of a parameter of Wan's own VAE; plain renames, one to one."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.upsamples\.(\d+)\.", _up_block, name)


def _up_block(match: re.Match) -> str:
    # Wan lists its up blocks flat: three residual blocks, then an upsampler, and so on.
    block, place = divmod(int(match[1]), 4)
    return f"decoder.up_blocks.{block}." + ("upsamplers.0." if place == 3 else f"resnets.{place}.")


def _kind(tensors: Mapping[str, Tensor], path: str | Path) -> VAEKind:
    for name, dimensions in (("encoder.conv1.weight", 5), ("decoder.head.0.gamma", 4), ("conv2.weight", 5)):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape is None or len(shape) != dimensions or 0 in shape:
            found = "is missing" if shape is None else f"is {list(shape)}"
            raise InputError(f"{path} is not a Wan 2.1 VAE or Wan 2.2 VAE: {name} {found}")
    kind = WAN_2_2 if "decoder.upsamples.0.upsamples.0.residual.2.weight" in tensors else WAN_2_1
    channels = tensors["conv2.weight"].shape[1]
    if channels != kind.layout.channels:
        raise InputError(f"{path} is a VAE of {channels} latent channels; the {kind.name} has {kind.layout.channels}")
    return kind


def autoencoder_settings(tensors: Mapping[str, Tensor], kind: VAEKind) -> dict[str, object]:
    """What AutoencoderKLWan is made with; its defaults are those of Wan 2.1."""
    base_dim, decoder_dim = tensors["encoder.conv1.weight"].shape[0], tensors["decoder.head.0.gamma"].shape[0]
    settings = {"base_dim": base_dim, "decoder_base_dim": decoder_dim, "z_dim": kind.layout.channels}
    if kind is WAN_2_1:
        return settings
    return settings | {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,  # 3 colours of 2x2 pixels
        "out_channels": 12,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": kind.layout.pixel_stride,
    }


def _check_video(video_BCTHW: Tensor, kind: VAEKind) -> None:
    if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != 3:
        raise InputError(f"a video has the shape {tuple(video_BCTHW.shape)}; the VAE encodes [B, 3, T, H, W]")
    frames, height, width = video_BCTHW.shape[2:]
    if frames % kind.layout.frame_stride != 1:
        raise InputError(f"a video has {frames} frames; the VAE encodes 1, 5, 9, ... (4k+1) frames")
    stride = kind.layout.pixel_stride
    if height % stride or width % stride or not height or not width:
        raise InputError(f"a video is {width}x{height}; the {kind.name} encodes sizes that are multiples of {stride}")


def _normalisation(kind: VAEKind, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (kind.mean, kind.std))
    return mean, std
