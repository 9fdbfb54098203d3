"""What of a picture or clip is trained on: white in its mask, or opaque in the picture itself.

H W height and width in pixels, h w latent height and width.
"""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from utils.data.origins import content_hash, size_text
from utils.data.sizes import SizedSource
from utils.data.sources import AnyDataset, ImageDataset, Source
from utils.pixels.pictures import image_size, read_alpha, read_image
from wan.errors import InputError

_BLACK = (0, 0, 0)
_OF_ALPHA = "alpha"


def wants_masks(dataset: AnyDataset) -> bool:
    """Whether the loss of the dataset's pictures or clips is weighted."""
    return dataset.mask_directory is not None or _by_alpha(dataset)


def mask_settings(dataset: AnyDataset, source: Source) -> dict[str, str]:
    """What a cache says of the mask in it, among the settings by the names of `made_by`; nothing if there is none."""
    if source.mask is not None:
        return {"mask": content_hash(source.mask)}
    return {"mask": _OF_ALPHA} if _by_alpha(dataset) else {}


def is_masked(dataset: AnyDataset, source: Source) -> bool:
    """Whether the cache of a source is to hold a mask."""
    return source.mask is not None or _by_alpha(dataset)


def read_mask(dataset: AnyDataset, entry: SizedSource) -> torch.Tensor | None:
    """[h, w] float32 from 0 (not trained on) to 1: the mean of the mask over each latent pixel; None without a mask.

    The mask is resized and cropped as the picture is. InputError if it has another shape or is black all over.
    """
    mask = entry.source.mask
    if mask is not None:
        _check_shape(mask, entry)
        values_HW = read_image(mask, entry.bucket, _BLACK).values.mean(-1, dtype=np.float32)
    elif _by_alpha(dataset):
        values_HW = read_alpha(entry.source.path, entry.bucket).astype(np.float32)
    else:
        return None
    stride = dataset.latents.pixel_stride
    mask_hw = rearrange(torch.from_numpy(values_HW / 255), "(h a) (w b) -> h w (a b)", a=stride, b=stride).mean(-1)
    if not mask_hw.any():
        what = f"its mask {mask} is black" if mask is not None else "it is transparent"
        raise InputError(f"{entry.source.path}: {what} wherever it would be trained on; white is what is trained on")
    return mask_hw


def _by_alpha(dataset: AnyDataset) -> bool:
    return isinstance(dataset, ImageDataset) and dataset.alpha_mask


def _check_shape(mask: Path, entry: SizedSource) -> None:
    """A mask may be smaller or larger than its picture, but must show as much of it."""
    (width, height), (own_width, own_height) = entry.size, image_size(mask)
    if abs(own_width * height - own_height * width) > max(width, height, own_width, own_height):
        raise InputError(
            f"the mask {mask} is {size_text((own_width, own_height))}, and {entry.source.path.name} is "
            f"{size_text(entry.size)} as viewers show it: a mask must have the shape of its picture"
        )
