"""LoRAs beside a model: each layer computes what it did, and what the LoRAs add to its output is added to it.

No weight is touched, so it is the same for weights that stream, that stay mapped, that hold slices or train; and when
the context ends, the model is what it was.
Shapes: R ranks of all LoRAs together, O I outputs and inputs of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.slices.lora_files import LoraFile
from wan.model import LinearFloat32, WanModel


@dataclass(frozen=True, eq=False)
class _Beside:
    """What all LoRAs together add to one layer; scale_R (float32) holds alpha / rank times the multiplier."""

    down_RI: Tensor | None
    scale_R: Tensor | None
    up_OR: Tensor | None
    bias_O: Tensor | None


@contextmanager
def loras_beside(model: WanModel, files: Sequence[LoraFile], device: torch.device | str) -> Iterator[None]:
    """Inside, the placed model computes with the LoRAs, which then lie on `device`; for passes without gradient."""
    linears = {name: own for name, own in model.named_modules() if isinstance(own, nn.Linear)}
    with ExitStack() as undo:
        for name in dict.fromkeys(name for file in files for name in file.parts):
            linear = linears[name]
            dtype = torch.float32 if isinstance(linear, LinearFloat32) else model.dtype
            _attach(linear, _together(files, name, dtype, device), undo)
        yield


def lora_bytes_beside(files: Sequence[LoraFile], dtype: torch.dtype) -> int:
    """What they take on the device, but for the few matrices that compute in float32 whatever the model's dtype is."""
    return sum(file.values for file in files) * dtype.itemsize


def lora_lines(files: Sequence[LoraFile], when: str = "") -> list[str]:
    """What there is to say about each: what is used of it, and what is not."""
    return [
        line
        for file in files
        for line in (
            f"LoRA {file.path}: multiplier {file.multiplier:g}, {file.values:,} values beside {len(file.parts)} "
            f"matrices{when}",
            *file.lines,
        )
    ]


def _attach(linear: nn.Linear, beside: _Beside, undo: ExitStack) -> None:
    before = vars(linear).get("forward")
    inner = linear.forward
    linear.forward = partial(_forward, beside, inner)
    if before is None:
        undo.callback(delattr, linear, "forward")
    else:
        undo.callback(setattr, linear, "forward", before)


def _forward(beside: _Beside, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    assert not torch.is_grad_enabled(), "LoRAs beside a model are for passes without gradient"
    y = inner(x)
    if beside.bias_O is not None:
        y = y + beside.bias_O
    if beside.down_RI is None:
        return y
    ranks = (F.linear(x.to(y.dtype), beside.down_RI) * beside.scale_R).to(y.dtype)
    # In place, so that there is never a second tensor as large as y, and only one rounding.
    return y.flatten(0, -2).addmm_(ranks.flatten(0, -2), beside.up_OR.t()).view_as(y)


def _together(files: Sequence[LoraFile], name: str, dtype: torch.dtype, device: torch.device | str) -> _Beside:
    parts = [(file, file.parts[name]) for file in files if name in file.parts]
    low_rank = [(file, own) for file, own in parts if own.down_RI is not None]
    biases = [
        file.read(own.bias_O).float() * own.bias_scale * file.multiplier
        for file, own in parts
        if own.bias_O is not None
    ]
    bias = sum(biases[1:], biases[0]).to(device, dtype) if biases else None
    if not low_rank:
        return _Beside(None, None, None, bias)
    scales = [torch.full((own.down_RI.shape[0],), own.scale * file.multiplier) for file, own in low_rank]
    down = torch.cat([file.read(own.down_RI).to(device, dtype) for file, own in low_rank])
    up = torch.cat([file.read(own.up_OR).to(device, dtype) for file, own in low_rank], dim=1)
    return _Beside(down, torch.cat(scales).to(device), up, bias)
