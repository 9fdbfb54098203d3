"""Ways to train two blocks of a Wan, each with its optimizer: slices, LoRA, SHiRA, dense gradients, everything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from step_models import Blocks, DiffSynthBlocks, DiffusersBlocks
from torch import Tensor

from utils.selective_finetune import attach_slice, block_linears, slice_indices

RIVALS_EVERY = 2  # rounds: what is only to be reported is timed half as often


@dataclass(frozen=True)
class Training:
    """What a method trains, and what it does after backward."""

    parameters: list[Tensor]
    update: Callable[[], None]


@dataclass(frozen=True)
class Method:
    """One way to train; `ff` where it is ours, `blocks` the model that it trains, compiled as by --compile or not."""

    name: str
    prepare: Callable[[Blocks], Training]
    ff: str | None = None
    every: int = RIVALS_EVERY
    blocks: type[Blocks] = Blocks
    compiled: bool = False


def train_nothing(model: Blocks) -> Training:
    return Training([], lambda: None)


def reach_every_matrix(model: Blocks) -> Training:
    """Trains nothing, but backward goes to the text's k and v too, as it does wherever they train."""
    anchor = torch.zeros(1, requires_grad=True)
    for name, linear in block_linears(model).items():
        if reads_text(name):
            linear.register_forward_hook(lambda linear, inputs, y: _Reach.apply(y, anchor))
    return Training([anchor], lambda: None)


class _Reach(torch.autograd.Function):
    """Passes `y` on, needs its gradient, and keeps nothing."""

    @staticmethod
    def forward(ctx, y, anchor):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return None, torch.zeros(1)


def train_slice(model: Blocks, ff: str) -> Training:
    trained = attach_slice(model, ff, 1)
    optimizer = adamw(trained.parameters())

    def update() -> None:
        optimizer.step()
        trained.write_back()

    return Training(list(trained.parameters()), update)


def train_lora(model: Blocks, rank: int = 16) -> Training:
    from peft import LoraConfig

    return train_adapter(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=matrix_names(model)))


def train_shira(model: Blocks) -> Training:
    """Rank 1 is the smallest: in + out values of each matrix, 0.98 times as many as a slice of 0.001."""
    from peft import ShiraConfig

    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is by default, but then with a warning
    return train_adapter(model, ShiraConfig(r=1, target_modules=matrix_names(model)))


def train_adapter(model: Blocks, config) -> Training:
    """PEFT's adapter in the dtype of the weights, its fastest: PEFT's own default computes it in fp32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(trainable, adamw(trainable).step)


def train_masked(model: Blocks, ff: str) -> Training:
    """The predecessor's way: whole gradients, set to zero outside the slice, and a whole-tensor optimizer."""
    weights, masks = [], []
    for name, linear in block_linears(model).items():
        weight = linear.weight.requires_grad_(True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[slice_indices(f"{name}.weight", weight.shape, ff, 1)] = True
        weights.append(weight)
        masks.append(mask.view_as(weight))
    optimizer = adamw(weights)

    def update() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()

    return Training(weights, update)


def train_everything(model: Blocks) -> Training:
    parameters = list(model.requires_grad_(True).parameters())
    return Training(parameters, adamw(parameters).step)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)


def reads_text(name: str) -> bool:
    return name.endswith(("cross_attn.k", "cross_attn.v"))


def matrix_names(model: Blocks) -> list[str]:
    return list(block_linears(model))


def all_methods(ffs: Sequence[str], compiled: bool = False) -> list[Method]:
    """The floor first; rows of PEFT, diffusers, DiffSynth and a compiler only where they are installed."""
    ours = [Method(f"ours, ff {ff}", lambda model, ff=ff: train_slice(model, ff), ff=ff, every=1) for ff in ffs]
    peft = [Method("PEFT LoRA, rank 16", train_lora), Method("PEFT SHiRA, as many values as ff 0.001", train_shira)]
    diffusers = [
        Method("diffusers' model, frozen", train_nothing, blocks=DiffusersBlocks),
        Method("diffusers' model, PEFT LoRA, rank 16", train_lora, blocks=DiffusersBlocks),
    ]
    diffsynth = [
        Method("DiffSynth's model, frozen", train_nothing, blocks=DiffSynthBlocks),
        Method("DiffSynth's model, PEFT LoRA, rank 16", train_lora, blocks=DiffSynthBlocks),
    ]
    return [
        Method("frozen floor", train_nothing, every=1),
        *ours,
        *([replace(ours[0], name=f"{ours[0].name}, --compile", compiled=True)] if compiled else []),
        *(peft if find_spec("peft") else []),
        *(diffusers if find_spec("peft") and find_spec("diffusers") else []),
        *(diffsynth if find_spec("peft") and find_spec("diffsynth") else []),
        Method(f"dense gradient, then mask (ff {ffs[0]})", lambda model: train_masked(model, ffs[0])),
        Method("everything trainable", train_everything),
    ]
