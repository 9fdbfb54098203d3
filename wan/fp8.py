"""How fp8 checkpoints store their weights: plain, or scaled in ComfyUI's older or newer layout.

Plain: a weight is its float8 value. Older: `<layer>.scale_weight`, one marker tensor `scaled_fp8`. Newer:
`<layer>.weight_scale`, `<layer>.comfy_quant` (JSON), or `_quantization_metadata` (JSON) in the file's metadata.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from wan.errors import InputError
from wan.safetensors_header import TensorEntry, read_bytes
from wan.stored_tensors import read_tensor

FP8 = ("F8_E4M3", "F8_E5M2")
_PLAIN = ("F32", "F16", "BF16")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (".scale_weight", ".weight_scale")
# Scales of activations, which only fp8 matrix products use.
_INPUT_SCALES = (".scale_input", ".input_scale")
_USE = "use a bf16, fp16 or fp32 file"  # for training too, which refuses fp8


def is_companion(name: str) -> bool:
    """Whether a tensor only says how the weights are stored."""
    return name == "scaled_fp8" or name.endswith((*_SCALES, *_INPUT_SCALES, ".comfy_quant"))


def scale_of(name: str, tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The scale that belongs to weight `name`, if the file has one and the weight is fp8."""
    if tensors[name].dtype not in FP8:
        return None
    layer = name.removesuffix(".weight")
    return next((tensors[layer + suffix] for suffix in _SCALES if layer + suffix in tensors), None)


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale in float32, rounded to `dtype`; the scale is one number, or one per row."""
    rows = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())
    return weight.float().mul_(rows).to(dtype)


def check_quantisation(source: object, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """InputError, starting with `source`, unless every tensor is plain floating point or fp8 as described above."""
    for layer, settings in _declared(source, tensors, metadata).items():
        if not isinstance(settings, dict) or settings.get("format") not in _FORMATS:
            raise InputError(f"{source}: {layer} is quantised as {_short(settings)}, which is not supported; {_USE}")
        if unknown := settings.keys() - {"format", "full_precision_matrix_mult"}:
            raise InputError(f"{source}: {layer} is quantised with unknown settings {sorted(unknown)}; {_USE}")
    scaled = any(is_companion(name) for name in tensors) or "_quantization_metadata" in metadata
    for name, entry in tensors.items():
        if not is_companion(name):
            _check_weight(source, name, entry, scale_of(name, tensors), scaled)
        elif name.endswith(_SCALES):
            _check_scale(source, name, entry, tensors)


def _declared(source: object, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> dict[str, object]:
    texts = {name: read_bytes(entry) for name, entry in tensors.items() if name.endswith(".comfy_quant")}
    declared = {name: _parsed(source, name, text) for name, text in texts.items()}
    whole = _parsed(source, "_quantization_metadata", metadata.get("_quantization_metadata", "{}"))
    layers = whole.get("layers", {}) if isinstance(whole, dict) else None
    if not isinstance(layers, dict):
        raise InputError(f"{source}: _quantization_metadata is {_short(whole)}, which cannot be read; {_USE}")
    return {**declared, **layers}


def _parsed(source: object, name: str, text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{source}: {name} is not JSON, so the format of the weights is unknown; {_USE}") from None


def _short(settings: object) -> str:
    return str(settings.get("format") if isinstance(settings, dict) else settings)[:60]


def _check_weight(source: object, name: str, entry: TensorEntry, scale: TensorEntry | None, scaled: bool) -> None:
    if entry.dtype not in _PLAIN + FP8:
        raise InputError(f"{source}: {name} is stored as {entry.dtype}, which is not supported; {_USE}")
    matrix = name.endswith(".weight") and len(entry.shape) == 2
    if scaled and matrix and entry.dtype in FP8 and scale is None:
        raise InputError(f"{source}: {name} is scaled fp8, but its scale is missing; {_USE}")


def _check_scale(source: object, name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> None:
    weight = tensors.get(name.rsplit(".", 1)[0] + ".weight")
    if weight is None:
        raise InputError(f"{source}: {name} belongs to no weight of the file; {_USE}")
    rows = weight.shape[:1]
    if entry.dtype not in _PLAIN or (entry.numel != 1 and entry.shape not in (rows, (*rows, 1))):
        found = f"{entry.dtype} {list(entry.shape)}"
        raise InputError(f"{source}: {name} is {found}, supported are one scale per matrix and one per row; {_USE}")
    # Some converters leave scales of 1 for the layers that they kept in 16 bit.
    if weight.dtype not in FP8 and not torch.all(read_tensor(entry) == 1):
        raise InputError(f"{source}: {name} scales a weight that is stored as {weight.dtype}; {_USE}")
