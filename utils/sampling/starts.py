"""From picture files to what samples start from: y and CLIP tokens, or a clean first latent frame.

Shapes: B batch (always 1), C channels, F H W latent frames, height, width, P CLIP tokens, I their width.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.learning.conditions import Conditioning, picture_condition
from utils.pixels.pictures import read_image
from utils.pixels.remarks import BROKEN_PROFILE, HDR, SEVERAL_FRAMES, TRANSPARENT
from utils.sampling.denoising import NOISE_ALONE, Sample, Start, check_finite
from wan.configs import WanTask
from wan.errors import InputError
from wan.image_encoder import load_image_encoder
from wan.model import PICTURE_TOKENS
from wan.vae import WanVAE

_REMARKS = {
    TRANSPARENT: "is transparent: it is read as if on white",
    SEVERAL_FRAMES: "has several frames or pages, of which the first is used",
    BROKEN_PROFILE: "has a colour profile that cannot be used, so it is read as sRGB",
    HDR: "is HDR: it is tone-mapped to sRGB",
}


@dataclass(frozen=True)
class _Wanted:
    """The pictures of a sample and what they are made into; samples that share them share the result."""

    paths: tuple[str, ...]
    size: tuple[int, int]
    frames: int


def check_clip(task: WanTask, clip: Path | None) -> None:
    """InputError if the file of the CLIP image encoder is missing, or would not be used."""
    if task.conditions.clip and clip is None:
        raise InputError(
            f"--clip is missing: --task {task.name} reads its pictures through CLIP too; give the file "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or clip_vision_h.safetensors"
        )
    if clip is not None and not task.conditions.clip:
        raise InputError(f"--clip has no effect: --task {task.name} does not read pictures through CLIP; leave it out")


def encode_starts(
    samples: Sequence[Sample],
    task: WanTask,
    vae: WanVAE | None,
    clip: Path | None,
    image_dim: int | None,
    device: torch.device | str,
    say: Callable[[str], None],
) -> list[Start]:
    """What each sample starts from, by models on `device`, one after the other; the VAE waits on the CPU.

    `image_dim` is the width of the CLIP tokens that the transformer reads. InputError if a file cannot be used.
    """
    wanted = {_wanted(sample) for sample in samples if sample.pictures}
    pictures = {one: [_read(path, one.size) for path in one.paths] for one in wanted}
    for line in dict.fromkeys(line for read in pictures.values() for _, lines in read for line in lines):
        say(line)
    pixels = {one: [picture_B3HW for picture_B3HW, _ in read] for one, read in pictures.items()}
    tokens = _clip_tokens(pixels, clip, image_dim, device) if wanted and task.conditions.clip else {}
    starts = _starts(pixels, tokens, task, vae, device) if wanted else {}
    return [starts[_wanted(sample)] if sample.pictures else NOISE_ALONE for sample in samples]


def _wanted(sample: Sample) -> _Wanted:
    return _Wanted(sample.pictures, (sample.width, sample.height), sample.frames)


def _read(path: str, size: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """The picture [1, 3, H, W] in [-1, 1], scaled to cover the size and cropped, and what there is to say about it."""
    read = read_image(Path(path), size)
    lines = [f"{path} {text}" for remark, text in _REMARKS.items() if remark in read.remarks]
    return torch.tensor(read.values).permute(2, 0, 1)[None].float() / 127.5 - 1, lines


def _clip_tokens(
    pixels: Mapping[_Wanted, Sequence[Tensor]], clip: Path, image_dim: int | None, device: torch.device | str
) -> dict[_Wanted, Tensor]:
    """The tokens [1, P, I] of each sample's pictures, the first frame's before the last one's; frees the encoder."""
    encoder = load_image_encoder(clip, device=device)
    tokens = {
        one: torch.cat([encoder.encode(picture_B3HW).cpu() for picture_B3HW in own], dim=1)
        for one, own in pixels.items()
    }
    del encoder
    gc.collect()  # its memory is needed for the text encoder and the transformer
    for one, tokens_BPI in tokens.items():
        found, read = (tokens_BPI.shape[1] // len(one.paths), tokens_BPI.shape[2]), (PICTURE_TOKENS, image_dim)
        if found != read:
            raise InputError(
                f"--clip {clip} makes {found[0]} tokens of width {found[1]} from a picture; the model reads {read[0]} "
                f"of width {read[1]}"
            )
        check_finite(tokens_BPI, f"the output of --clip {clip}", "the file may be damaged")
    return tokens


def _starts(
    pixels: Mapping[_Wanted, Sequence[Tensor]],
    tokens: Mapping[_Wanted, Tensor],
    task: WanTask,
    vae: WanVAE,
    device: torch.device | str,
) -> dict[_Wanted, Start]:
    vae.to(device)
    if task.conditions.pictures:
        ys = {one: picture_condition(vae, own, one.frames).cpu() for one, own in pixels.items()}
        starts = {one: Start(Conditioning(y_BCFHW, tokens.get(one))) for one, y_BCFHW in ys.items()}
        encoded = ys.values()
    else:
        clean = {one: vae.encode(own[0][:, :, None]).cpu() for one, own in pixels.items()}
        given = Conditioning(starts_clean_B=torch.tensor([True]))
        starts = {one: Start(given, clean_BCFHW) for one, clean_BCFHW in clean.items()}
        encoded = clean.values()
    vae.to("cpu")
    _check_encoded(encoded)
    return starts


def _check_encoded(encoded: Iterable[Tensor]) -> None:
    for latents_BCFHW in encoded:
        check_finite(latents_BCFHW, "what the VAE makes of a picture", "try --vae_dtype float32")
