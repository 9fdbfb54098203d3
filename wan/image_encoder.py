"""The CLIP image encoder of Wan 2.1's image-to-video models: a picture to the tokens that the transformer reads.

B batch, H W height and width in pixels, P tokens (one for the whole picture, then its patches by row), I width.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import InputError
from wan.state_dict_files import load_model, read_state_dict

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

# Of each colour from 0 to 1, as CLIP was trained.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

_HEAD_WIDTH = 80  # 1280 in 16 heads
_PATCHES = "embeddings.patch_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"
# Wan's own names, after `visual.`, and those of transformers.
_RENAMES = (
    (r"^cls_embedding$", "embeddings.class_embedding"),
    (r"^pos_embedding$", _POSITIONS),
    (r"^patch_embedding\.", "embeddings.patch_embedding."),
    (r"^pre_norm\.", "pre_layrnorm."),  # spelled so there
    (r"^post_norm\.", "post_layernorm."),
    (r"^transformer\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.(\d+)\.mlp\.0\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.(\d+)\.mlp\.2\.", r"encoder.layers.\1.mlp.fc2."),
)
_QKV = re.compile(r"transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")
# Numbers that are made anew, and the projections to the space in which CLIP compares pictures with texts.
_UNUSED = ("embeddings.position_ids", "head", "visual_projection.weight")


class ImageEncoder:
    """A loaded CLIP image encoder without its last block, whose output Wan does not use; frozen."""

    def __init__(self, model: "CLIPVisionModel"):
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device) -> "ImageEncoder":
        """Itself, moved to `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Tokens [B, P, I] (257 and 1280), in the encoder's dtype, of pictures [B, 3, H, W] in [-1, 1] of any size.

        To get Wan's own tokens, give the picture as it is, not one that was cut or scaled to the video's size.
        """
        if pixels_B3HW.ndim != 4 or pixels_B3HW.shape[1] != 3 or 0 in pixels_B3HW.shape:
            raise InputError(f"pictures have the shape {tuple(pixels_B3HW.shape)}; CLIP encodes [B, 3, H, W]")
        pixels = clip_pixels(pixels_B3HW.to(self.device), self.model.config.image_size)
        # Before the norm that follows the blocks: transformers applies that to the pooled output alone.
        return self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state


def clip_pixels(pixels_B3HW: Tensor, size: int) -> Tensor:
    """What CLIP reads of pictures in [-1, 1]: float32, squashed to a square of `size`, each colour normalised.

    As in Wan's code: bicubic without antialiasing, and what it overshoots stays.
    """
    square = F.interpolate(pixels_B3HW.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=square.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (square * 0.5 + 0.5 - mean) / std


def load_image_encoder(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ImageEncoder:
    """The CLIP image encoder of a file with Wan's names (a whole CLIP or its visual part) or ComfyUI's clip_vision_h.

    The file gives the sizes; each head is 80 wide unless its metadata has num_heads. `dtype` is float16 by default, in
    which Wan runs it, or float32 on a CPU, where halves are slow. InputError, in one line, for a
    file that is missing, truncated, contains code, or is not such an encoder.
    """
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    stored, metadata = read_state_dict(path, "image encoder")
    source = f"{path} is not a CLIP image encoder"
    tensors = transformers_tensors(stored, source)
    sizes = encoder_sizes(tensors, metadata, source)
    from transformers import CLIPVisionConfig, CLIPVisionModel  # here, because it takes seconds

    config = CLIPVisionConfig(**sizes, hidden_act="gelu", layer_norm_eps=1e-5)
    # Some versions of transformers have the encoder inside the model under this name, others have no prefix.
    prefixes = ("vision_model.",)
    model = load_model(lambda: CLIPVisionModel(config), tensors, dtype, device, source, prefixes)
    for module in model.modules():
        if "position_ids" in module._buffers:  # not in the file, so it is still on meta
            module.position_ids = torch.arange(tensors[_POSITIONS].shape[0], device=device)[None]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return ImageEncoder(model)


def transformers_tensors(stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The image part without its last block, under the names that transformers has for it, after its prefix."""
    own = {name.removeprefix("visual."): tensor for name, tensor in stored.items() if name.startswith("visual.")}
    inside = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    tensors = _renamed(own, source) if own else inside
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    blocks = [int(match[1]) for name in tensors if (match := _LAYER.match(name))]
    if _PATCHES not in tensors or not blocks:
        raise InputError(f"{source}: neither visual.patch_embedding.weight nor vision_model.{_PATCHES} is in it")
    last = f"encoder.layers.{max(blocks)}."
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}


def _renamed(own: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in own.items():
        if match := _QKV.fullmatch(name):
            if tensor.shape[:1].numel() % 3:
                raise InputError(f"{source}: visual.{name} is {list(tensor.shape)}")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = rows
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.flatten() if name == "embeddings.class_embedding" else tensor
    if _POSITIONS in renamed and renamed[_POSITIONS].ndim == 3:
        renamed[_POSITIONS] = renamed[_POSITIONS].flatten(0, 1)
    return renamed


def encoder_sizes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, int]:
    """The encoder's sizes by CLIPVisionConfig's names."""
    width, _, patch, _ = _shape(tensors, _PATCHES, 4, source)
    tokens, _ = _shape(tensors, _POSITIONS, 2, source)
    inner, _ = _shape(tensors, "encoder.layers.0.mlp.fc1.weight", 2, source)
    heads = metadata.get("num_heads", str(width // _HEAD_WIDTH))
    if not re.fullmatch("[0-9]{1,4}", heads) or int(heads) == 0 or width % int(heads):
        raise InputError(f"{source}: width {width} cannot be split into {heads[:20]} heads")
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise InputError(f"{source}: {tokens} tokens are not one and a square of patches")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len({match[1] for name in tensors if (match := _LAYER.match(name))}),
        "num_attention_heads": int(heads),
        "image_size": side * patch,
        "patch_size": patch,
    }


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, source: str) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape) if name in tensors else None
    if shape is None or len(shape) != dimensions or 0 in shape:
        found = "is not in it" if shape is None else f"is {list(shape)}"
        raise InputError(f"{source}: {name} {found}")
    return shape
