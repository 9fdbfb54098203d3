"""Learning-rate schedules by name or class, over a number of optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from utils.learning.optimizers import find_attribute, parse_arguments
from wan.errors import InputError

# What each schedule reads beside the number of steps.
_READS = {
    "constant": (),
    "constant_with_warmup": ("warmup",),
    "linear": ("warmup",),
    "cosine": ("warmup",),
    "cosine_with_restarts": ("warmup", "cycles"),
    "polynomial": ("warmup", "power"),
    "inverse_sqrt": ("warmup", "timescale"),
    "cosine_with_min_lr": ("warmup", "min_lr_ratio"),
    "warmup_stable_decay": ("warmup", "decay", "min_lr_ratio"),
    "rex": ("warmup", "min_lr_ratio"),
    "piecewise_constant": (),
}
SCHEDULES = tuple(_READS)
_FLAGS = {
    "warmup": "--lr_warmup_steps",
    "decay": "--lr_decay_steps",
    "cycles": "--lr_scheduler_num_cycles",
    "power": "--lr_scheduler_power",
    "timescale": "--lr_scheduler_timescale",
    "min_lr_ratio": "--lr_scheduler_min_lr_ratio",
}
# transformers' own names of the values above.
_ARGUMENTS = {"cycles": "num_cycles", "power": "power", "timescale": "timescale", "min_lr_ratio": "min_lr_ratio"}
_STEPS_AND_SHARES = "a number of steps, a share of them below 1 (0.05), or a percentage (5%)"


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule, with its settings; one that the schedule does not read stays at its default."""

    name: str = "constant"
    warmup: str = "0"  # _STEPS_AND_SHARES, as `decay`
    decay: str = "0"
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None
    class_path: str = ""  # of a scheduler class, in place of `name`
    args: tuple[str, ...] = ()  # key=value, more arguments of the schedule


def build_scheduler(config: ScheduleConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The schedule over `steps` optimizer steps; InputError if it is unknown or a setting does not fit it."""
    arguments = parse_arguments("--lr_scheduler_args", config.args)
    if config.class_path:
        _refuse_unread(config, (), f"--lr_scheduler_type {config.class_path}")
        return _build_class(config.class_path, optimizer, arguments)
    name = config.name.lower()
    if name not in _READS:
        raise InputError(_unknown(config.name))
    _refuse_unread(config, _READS[name], f"--lr_scheduler {name}")
    warmup = steps_of(config.warmup, steps, _FLAGS["warmup"])
    try:
        return _build(config, name, optimizer, warmup, steps, arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"--lr_scheduler {name} with {arguments}: {error}") from None


def check_schedule(config: ScheduleConfig, steps: int) -> None:
    """Raises what build_scheduler would."""
    build_scheduler(config, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), steps)


def steps_of(text: str, steps: int, flag: str) -> int:
    """A number of steps from `50`, `0.05` or `5%` of `steps`."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    is_share = percent or value < 1
    if not 0 <= value < float("inf") or (percent and value > 1) or (not is_share and value != int(value)):
        raise InputError(f"{flag} {text} must be {_STEPS_AND_SHARES}")
    count = int(value * steps) if is_share else int(value)
    if count > steps:
        raise InputError(f"{flag} {text}: the run has only {steps} steps")
    return count


def _unknown(name: str) -> str:
    if name.lower() == "adafactor":
        return (
            "--lr_scheduler adafactor follows Adafactor's relative_step, which slices cannot use; constant_with_warmup "
            "with --learning_rate does the same job"
        )
    return f"--lr_scheduler {name} is unknown; allowed: {', '.join(SCHEDULES)}"


def _refuse_unread(config: ScheduleConfig, read: tuple[str, ...], name: str) -> None:
    defaults = ScheduleConfig()
    for field, flag in _FLAGS.items():
        value, default = getattr(config, field), getattr(defaults, field)
        given = value != default and not (field in ("warmup", "decay") and steps_of(value, 10**9, flag) == 0)
        if given and field not in read:
            raise InputError(f"{name} does not read {flag}: leave it out{_better(field, config.name.lower())}")


def _better(field: str, name: str) -> str:
    return ", or use --lr_scheduler constant_with_warmup" if (field, name) == ("warmup", "constant") else ""


def _build(
    config: ScheduleConfig, name: str, optimizer: Optimizer, warmup: int, steps: int, arguments: Mapping
) -> LRScheduler:
    # Here, because the imports take seconds.
    from diffusers.optimization import get_piecewise_constant_schedule
    from transformers import get_scheduler

    if name == "rex":
        return LambdaLR(optimizer, _Rex(warmup, steps, config.min_lr_ratio or 0.0, **arguments))
    if name == "piecewise_constant":
        return get_piecewise_constant_schedule(optimizer, **arguments)
    given = {_ARGUMENTS[field]: getattr(config, field) for field in _READS[name] if field in _ARGUMENTS}
    given = {key: value for key, value in given.items() if value is not None}
    if name == "cosine_with_min_lr":
        given = {"min_lr_rate": given.get("min_lr_ratio", 0.0)}
    if name == "warmup_stable_decay":
        given["num_decay_steps"] = steps_of(config.decay, steps, _FLAGS["decay"])
    return get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs={**given, **arguments})


class _Rex:
    """The factor (1 - p) / (1/2 + (1 - p)/2) at progress p, of Chen et al. 2021 (arXiv 2107.04197), after a warmup."""

    def __init__(self, warmup: int, steps: int, least: float):
        self.warmup, self.steps, self.least = warmup, steps, least

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return step / self.warmup
        left = 1 - (step - self.warmup) / max(self.steps - self.warmup, 1)
        return max(left, 0.0) / (0.5 + 0.5 * max(left, 0.0)) * (1 - self.least) + self.least


def _build_class(path: str, optimizer: Optimizer, arguments: Mapping) -> LRScheduler:
    found = find_attribute(path if "." in path else f"torch.optim.lr_scheduler.{path}", "--lr_scheduler_type")
    try:
        scheduler = found(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"--lr_scheduler_type {path} with {dict(arguments)}: {error}") from None
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise InputError(f"--lr_scheduler_type {path} is not a schedule over steps of torch.optim.lr_scheduler")
    return scheduler
