"""The pictures that a Wan model starts from: how training, sampling and reference predictions give them to it.

Image-to-video models read `y`: a mask and the latents of a clip that is grey but for the given pictures; those of
Wan 2.1 read CLIP tokens too. ti2v-5B finds the first frame clean among its noisy latents, at timestep 0.
Shapes: B batch, C channels, F H W latent frames, height, width, L tokens, P CLIP tokens, I their width, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.model import TokenTimes, WanModel
from wan.vae import WanVAE

_MASK_CHANNELS = 4  # one for each of the frames that a latent frame covers


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the samples of a batch start from; all None for text-to-video.

    `starts_clean_B` (bool) says which samples of ti2v-5B have a clean first latent frame.
    """

    y_BCFHW: Tensor | None = None
    clip_BPI: Tensor | None = None
    starts_clean_B: Tensor | None = None

    def to(self, device: torch.device | str) -> "Conditioning":
        values = (self.y_BCFHW, self.clip_BPI, self.starts_clean_B)
        return Conditioning(*(None if value is None else value.to(device, non_blocking=True) for value in values))


NOTHING_GIVEN = Conditioning()


def predict(
    model: WanModel,
    noisy_BCFHW: Tensor,
    t_B: Tensor,
    context: list[Tensor],
    given: Conditioning = NOTHING_GIVEN,
) -> Tensor:
    """The model's flow [B, C, F, H, W] at timesteps t_B (0 to 1000), and at 0 where a first frame is clean."""
    t = t_B
    if given.starts_clean_B is not None:
        grid = [n // p for n, p in zip(noisy_BCFHW.shape[2:], model.config.patch_size, strict=True)]
        t = token_times(t_B, given.starts_clean_B, grid)
    return model(noisy_BCFHW, t, context, given.y_BCFHW, given.clip_BPI)


def token_times(t_B: Tensor, starts_clean_B: Tensor, grid: Sequence[int]) -> TokenTimes:
    """The timestep of each token, frame by frame; 0 in a clean first frame."""
    frames, height, width = grid
    numbers_B = torch.arange(1, len(t_B) + 1, device=t_B.device)
    numbers_BF = numbers_B[:, None].repeat(1, frames)
    numbers_BF[:, 0] = torch.where(starts_clean_B, 0, numbers_B)
    return TokenTimes(torch.cat([t_B.new_zeros(1), t_B]), numbers_BF.repeat_interleave(height * width, dim=1))


def with_clean_start(noisy_BCFHW: Tensor, clean_BCFHW: Tensor, starts_clean_B: Tensor) -> Tensor:
    """The noisy latents, with the clean first frame (of C1HW or more) where a sample starts from it."""
    first = torch.where(starts_clean_B.view(-1, 1, 1, 1, 1), clean_BCFHW[:, :, :1], noisy_BCFHW[:, :, :1])
    return torch.cat([first, noisy_BCFHW[:, :, 1:]], dim=2)


def started(noisy_BCFHW: Tensor, clean_BCFHW: Tensor, given: Conditioning) -> Tensor:
    """The noisy latents of samples, the first frame clean in those that start from it."""
    if given.starts_clean_B is None:
        return noisy_BCFHW
    return with_clean_start(noisy_BCFHW, clean_BCFHW, given.starts_clean_B)


def loss_mask(given: Conditioning, frames: int, mask_B11HW: Tensor | None = None) -> Tensor | None:
    """[B, 1, F or 1, H or 1, W or 1]: what a loss is taken over, where that is not all; never a clean first frame."""
    if given.starts_clean_B is None:
        return mask_B11HW
    noisy_B1F11 = noisy_frames(given.starts_clean_B, frames)
    return noisy_B1F11 if mask_B11HW is None else noisy_B1F11 * mask_B11HW


def noisy_frames(starts_clean_B: Tensor, frames: int) -> Tensor:
    """[B, 1, F, 1, 1]: 1 in the latent frames that a loss is taken over, 0 in a clean first one."""
    mask_BF = torch.ones(len(starts_clean_B), frames, device=starts_clean_B.device)
    mask_BF[:, 0] = (~starts_clean_B).float()
    return mask_BF[:, None, :, None, None]


def picture_mask(frames: int, pictures: int, size: tuple[int, int]) -> Tensor:
    """[4, F, H, W]: 1 where a picture is given in a clip of `frames` frames; `size` is that of the latents.

    The first latent frame covers one frame, which is counted four times, each later one covers four.
    """
    given_T = torch.zeros(frames)
    given_T[0] = 1
    given_T[frames - 1] = 1 if pictures == 2 else given_T[frames - 1]
    counted = torch.cat([given_T[:1].expand(_MASK_CHANNELS - 1), given_T])
    return counted.view(-1, _MASK_CHANNELS).T[:, :, None, None].expand(-1, -1, *size).contiguous()


def picture_condition(vae: WanVAE, pictures_B3HW: Sequence[Tensor], frames: int) -> Tensor:
    """y [B, 20, F, H, W] of clips of `frames` frames: the mask, then the latents of grey clips with the pictures in.

    `pictures_B3HW` are the first frames, in [-1, 1], and for models of first and last frames the last ones.
    """
    first_B3HW, *last = pictures_B3HW
    video_B3THW = torch.zeros(*first_B3HW.shape[:2], frames, *first_B3HW.shape[2:], device=first_B3HW.device)
    video_B3THW[:, :, 0] = first_B3HW
    if last:
        video_B3THW[:, :, -1] = last[0]
    latents_BCFHW = vae.encode(video_B3THW)
    mask = picture_mask(frames, len(pictures_B3HW), latents_BCFHW.shape[-2:]).to(latents_BCFHW)
    return torch.cat([mask.expand(len(latents_BCFHW), -1, -1, -1, -1), latents_BCFHW], dim=1)
