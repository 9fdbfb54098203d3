"""The ways to teach a model one more concept: what trains, and what the weights are afterwards.

Each is a function of a model and the concept's number (from 0); a Learner comes back.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from utils.selective_finetune import attach_slice, block_linears, slice_interval
from wan.model import WanModel

FF = "0.1"  # ten disjoint slices are the whole line
LORA_RANK = 10  # 249,600 values, the slice has 245,760


@dataclass(frozen=True)
class Learner:
    """What trains, what has to follow each optimizer step, the model's weights at the end."""

    parameters: list[nn.Parameter]
    values: int
    after_step: Callable[[], None]
    weights: Callable[[], dict[str, Tensor]]


def disjoint_slices(model: WanModel, number: int, ff: str = FF) -> Learner:
    """Every concept in a slice of its own."""
    trained = attach_slice(model, ff, number + 1)
    return Learner(trained.parameters(), trained.count, trained.write_back, model.state_dict)


def one_slice(model: WanModel, number: int) -> Learner:
    """The same slice for every concept."""
    return disjoint_slices(model, 0)


def whole_tensors(model: WanModel, number: int) -> Learner:
    """The predecessor's second selection: tensors of any kind in a random order, cut into runs of the slice's size."""
    named = dict(model.named_parameters())
    order = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())
    budget = float(FF) * sum(parameter.numel() for parameter in named.values())
    begin, chosen = 0, []
    for name in order:
        if number * budget <= begin < (number + 1) * budget:
            chosen.append(named[name])
        begin += named[name].numel()
    return _plain(model, chosen)


def everything(model: WanModel, number: int) -> Learner:
    """All matrices of the blocks."""
    return _plain(model, [linear.weight for linear in block_linears(model).values()])


def lora(model: WanModel, number: int) -> Learner:
    """A LoRA on all matrices of the blocks (PEFT), merged at the end."""
    targets = list(block_linears(model))
    generator = torch.random.get_rng_state()
    torch.manual_seed(number)
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets), model)
    torch.random.set_rng_state(generator)
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def merged() -> dict[str, Tensor]:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
        kept = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
        return {name.replace(".base_layer", ""): value.detach().clone() for name, value in kept.items()}

    return Learner(parameters, sum(map(torch.numel, parameters)), _nothing, merged)


def masked(model: WanModel, choose: Callable[[str, Sequence[int]], Tensor]) -> Learner:
    """Any choice of values: `choose` gives the flat indices in the weight of a name and shape."""
    weights = {f"{name}.weight": linear.weight for name, linear in block_linears(model).items()}
    chosen = {name: choose(name, weight.shape) for name, weight in weights.items()}
    start = {name: weight.flatten()[chosen[name]].clone() for name, weight in weights.items()}
    parameters = [nn.Parameter(torch.zeros(len(chosen[name]))) for name in weights]

    for weight in weights.values():
        weight.requires_grad_(True)
    for (name, weight), parameter in zip(weights.items(), parameters, strict=True):
        weight.register_post_accumulate_grad_hook(_gather(parameter, chosen[name]))

    def write() -> None:
        for (name, weight), parameter in zip(weights.items(), parameters, strict=True):
            weight.data.view(-1)[chosen[name]] = start[name] + parameter.detach()

    return Learner(parameters, sum(map(torch.numel, parameters)), write, model.state_dict)


def _gather(parameter: nn.Parameter, chosen: Tensor) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        grad = weight.grad.flatten()[chosen]
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        weight.grad = None

    return hook


def _plain(model: WanModel, parameters: Sequence[nn.Parameter]) -> Learner:
    for parameter in parameters:
        parameter.requires_grad_(True)
    return Learner(list(parameters), sum(map(torch.numel, parameters)), _nothing, model.state_dict)


def _nothing() -> None:
    pass


METHODS = {
    "slices": disjoint_slices,
    "one_slice": one_slice,
    "whole_tensors": whole_tensors,
    "lora": lora,
    "full": everything,
}
