"""Optimizers by name or dotted path, for slices: flat lists of differences that start at zero."""

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from utils.learning.arguments import check_arguments, parse_arguments
from wan.errors import InputError
from wan.values import Number, nearest, shown

LEARNING_RATE = Number(0, 1000, without_a=True)

# These need something that a slice does not have: its parameters are flat lists of values that start at zero.
_NEED_MATRICES = "needs whole weight matrices, but a slice trains as a flat list of values"
_NEED_SCALE = (
    "scales its steps by the size of the weights, but a slice trains the difference from them, which starts at 0"
)
_UNFIT = {
    **dict.fromkeys(("muon", "shampoo", "soap", "galore", "apollo", "kron", "lomo"), _NEED_MATRICES),
    **dict.fromkeys(("lamb", "lars", "torch.optim.adafactor"), _NEED_SCALE),
    "sparseadam": "needs sparse gradients, but a slice's are dense",
    "lbfgs": "evaluates the loss several times per step, but a training step does so once",
    "schedulefree": "keeps two sets of weights, and a checkpoint would contain the wrong one",
}
_INSTEAD = "use AdamW, AdamW8bit, Lion8bit, Adafactor, another of torch.optim, or a dotted path"
_KNOWN_8BIT = ("AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "PagedAdamW8bit", "PagedLion8bit")
_FUSED_ON = ("cuda",)
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # have a kernel which takes no memory
_WAYS_TO_STEP = {"foreach", "fused", "capturable", "differentiable"}
_ADAFACTOR_SETTINGS = {"scale_parameter": False, "relative_step": False, "warmup_init": False}


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, with which arguments; `name` may be empty for AdamW."""

    name: str = ""
    learning_rate: float = 2e-6
    args: tuple[str, ...] = ()  # key=value, the value a Python literal
    max_grad_norm: float = 1.0  # 0: gradients are not clipped


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over `parameters`; InputError if it is unknown, unfit for slices, or its arguments are wrong."""
    check_optimizer_flags(config)
    parameters = list(parameters)
    optimizer_class = _find_class(config.name or "AdamW")
    arguments = parse_arguments("--optimizer_args", config.args)
    if "lr" in arguments:
        raise InputError(f"--optimizer_args lr={shown(arguments['lr'])}: set it as --learning_rate")
    check_arguments("--optimizer_args", arguments, optimizer_class, ours=("params", "lr"))
    if _is_adafactor(optimizer_class):
        arguments = _adafactor_arguments(arguments)
    elif optimizer_class in _FUSED and parameters[0].device.type in _FUSED_ON and not _WAYS_TO_STEP & arguments.keys():
        # PyTorch's choice, one operation for all matrices at a time, takes 4 bytes a value while it steps.
        arguments = {**arguments, "fused": True}
    try:
        return optimizer_class(parameters, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"--optimizer_type {config.name or 'AdamW'} with {dict(arguments)}: {error}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Puts a saved state_dict() into an optimizer, which steps as it was built to: saved settings would overrule that.

    Otherwise a state from before fused kernels, or from another device, would meet a scaler of fp16 that expects them.
    """
    ways = [{"fused": group["fused"]} if "fused" in group else {} for group in optimizer.param_groups]
    groups = [{**group, **way} for group, way in zip(saved["param_groups"], ways, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})


def check_optimizer_flags(config: OptimizerConfig) -> None:
    """InputError if the optimizer is unknown or unfit for slices, as far as its name and arguments tell."""
    name = config.name.lower() or "adamw"
    _refuse_unfit(config.name)
    if name != "adafactor" and "." not in name and not name.endswith("8bit"):
        _find_class(config.name or "AdamW")
    parse_arguments("--optimizer_args", config.args)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises what build_optimizer would, from a parameter of one value."""
    build_optimizer(config, [nn.Parameter(torch.zeros(1))])


def find_attribute(path: str, flag: str):
    """What a dotted path `package.module.Name` names; InputError if there is no such module or name."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: of paths like .x and ..x
        raise InputError(f"{flag} {shown(path)} cannot be imported: {error}") from None


def learning_rates(optimizer: torch.optim.Optimizer) -> Mapping[str, float]:
    """Each group's learning rate; times `d` too where the optimizer (Prodigy, D-Adaptation) estimates that."""
    groups = optimizer.param_groups
    names = ["lr/slice"] if len(groups) == 1 else [f"lr/group{i}" for i in range(len(groups))]
    rates = {name: float(group["lr"]) for name, group in zip(names, groups, strict=True)}
    estimated = {
        name.replace("lr/", "lr/d*lr/"): float(group["d"]) * float(group["lr"])
        for name, group in zip(names, groups, strict=True)
        if "d" in group
    }
    return {**rates, **estimated}


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    if name.lower() == "adafactor":
        from transformers.optimization import Adafactor  # here, because it takes seconds

        return Adafactor
    if "." in name:
        found = find_attribute(name, "--optimizer_type")
    elif name.lower().endswith("8bit"):
        found = _classes_by_name(bitsandbytes_optimizers()).get(name.lower())
    else:
        found = _classes_by_name(torch.optim).get(name.lower())
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(
            f"--optimizer_type {shown(name)} is not a known optimizer{_nearest_optimizer(name)}: {_INSTEAD}"
        )
    return found


def _nearest_optimizer(name: str) -> str:
    known = [key for key, value in vars(torch.optim).items() if isinstance(value, type) and key != "Optimizer"]
    return nearest(name, [*(key for key in known if key.lower() not in _UNFIT), *_KNOWN_8BIT])


def _refuse_unfit(name: str) -> None:
    lowered = name.lower()
    for unfit, reason in _UNFIT.items():
        if unfit in lowered:
            raise InputError(f"--optimizer_type {name} {reason}: {_INSTEAD}")


def _classes_by_name(module) -> dict[str, type]:
    return {name.lower(): value for name, value in vars(module).items() if isinstance(value, type)}


def bitsandbytes_optimizers():
    """The module of 8-bit optimizers; InputError if it is not installed."""
    # It complains about a 4-bit kernel that no optimizer uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise InputError(f"8-bit optimizers need bitsandbytes ({error}): pip install bitsandbytes") from None


def _is_adafactor(optimizer_class: type) -> bool:
    return optimizer_class.__name__ == "Adafactor"


def _adafactor_arguments(arguments: Mapping) -> dict:
    """relative_step takes its rate from the weights' scale, which a slice does not have."""
    for key in _ADAFACTOR_SETTINGS:
        if arguments.get(key):
            raise InputError(
                f"--optimizer_args {key}={arguments[key]}: Adafactor with {key} {_NEED_SCALE}; leave it out (it is "
                "False here) and set --learning_rate"
            )
    return {**arguments, **_ADAFACTOR_SETTINGS}
