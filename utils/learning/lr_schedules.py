"""Learning-rate schedules by name or class, over a number of optimizer steps.

A schedule is a factor on --learning_rate: it rises in a straight line during the warmup, then follows its formula in
the progress p from 0 (the end of the warmup) to 1 (the end of the run). transformers has the same formulas, but takes
seconds to import.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from utils.learning.arguments import check_arguments, parse_arguments
from utils.learning.optimizers import find_attribute
from wan.errors import InputError
from wan.values import COUNT, SHARE, Number, nearest, shown

POWER = Number(0, 100)
MIN_LR_RATIO = SHARE
_FACTOR = Number(0, 1000)  # of piecewise_constant
_CHECKED = 1000  # steps of a schedule that are looked at before the run
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
_ARGS = "--lr_scheduler_args"
_STEPS_AND_SHARES = "a number of steps, a share of all steps below 1 (0.05), or a percentage (5%)"


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule, with its settings; a setting that the schedule does not use stays at its default."""

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
    check_schedule_flags(config)
    arguments = parse_arguments(_ARGS, config.args)
    if config.class_path:
        return _build_class(config.class_path, optimizer, arguments)
    name = config.name.lower()
    try:
        factor = _factor(config, name, steps, optimizer.defaults["lr"], arguments)
        _check_factor(factor, name, steps)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        given = f" --lr_scheduler_args {' '.join(config.args)}" if config.args else ""
        raise InputError(f"--lr_scheduler {name}{given}: {error}") from None
    return LambdaLR(optimizer, factor)


def fast_forward(scheduler: LRScheduler, steps: int) -> None:
    """Moves a schedule that has not begun to where it is after `steps` optimizer steps, rates included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer steps in between
        for _ in range(steps):
            scheduler.step()


def check_schedule_flags(config: ScheduleConfig) -> None:
    """InputError if the schedule is unknown or would not use a flag that was given; takes no optimizer, so no time."""
    name = config.name.lower()
    if config.class_path:
        _refuse_unread(config, (), f"--lr_scheduler_type {config.class_path}")
    elif name not in _READS:
        raise InputError(_unknown(config.name))
    else:
        _refuse_unread(config, _READS[name], f"--lr_scheduler {name}")
    parse_arguments(_ARGS, config.args)


def check_schedule(config: ScheduleConfig, steps: int, learning_rate: float = 1.0) -> None:
    """Raises what build_scheduler would."""
    build_scheduler(config, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate), steps)


def steps_of(text: str, steps: int, flag: str) -> int:
    """A number of steps from `50`, `0.05` or `5%` of `steps`."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    is_share = percent or value < 1
    if not 0 <= value < float("inf") or (percent and value > 1) or (not is_share and value != int(value)):
        raise InputError(f"{flag} {shown(text)} must be {_STEPS_AND_SHARES}")
    count = int(value * steps) if is_share else int(value)
    if count > steps:
        raise InputError(f"{flag} {text}: the run has only {steps} steps; take fewer, or a share of them such as 5%")
    return count


def _unknown(name: str) -> str:
    if name.lower() == "adafactor":
        return (
            "--lr_scheduler adafactor follows Adafactor's relative_step, which slices cannot use: use "
            "constant_with_warmup with --learning_rate"
        )
    return f"--lr_scheduler {shown(name)} is unknown{nearest(name, SCHEDULES)}; allowed: {', '.join(SCHEDULES)}"


def _refuse_unread(config: ScheduleConfig, read: tuple[str, ...], name: str) -> None:
    defaults = ScheduleConfig()
    for field, flag in _FLAGS.items():
        value, default = getattr(config, field), getattr(defaults, field)
        given = value != default and not (field in ("warmup", "decay") and steps_of(value, 10**9, flag) == 0)
        if given and field not in read:
            raise InputError(f"{name} does not use {flag}: leave it out{_better(field, config.name.lower())}")


def _better(field: str, name: str) -> str:
    return ", or use --lr_scheduler constant_with_warmup" if (field, name) == ("warmup", "constant") else ""


def _factor(
    config: ScheduleConfig, name: str, steps: int, rate: float, arguments: Mapping[str, object]
) -> Callable[[int], float]:
    """The factor on the learning rate at every step; the `arguments` go to the schedule's own formula."""
    warmup = steps_of(config.warmup, steps, _FLAGS["warmup"])
    least = config.min_lr_ratio or 0.0
    given: dict = {}
    match name:
        case "constant" | "constant_with_warmup":
            formula = _constant
        case "linear":
            formula = _linear
        case "cosine":
            formula = _cosine
        case "cosine_with_restarts":
            formula, given = _cosine_with_restarts, {"num_cycles": config.cycles}
        case "polynomial":
            formula, given = _polynomial, {"power": config.power, "rate": rate}
        case "inverse_sqrt":
            formula, given = _inverse_sqrt, {"timescale": config.timescale or warmup or 10_000, "decay": steps - warmup}
        case "cosine_with_min_lr":
            formula, given = _cosine_with_min_lr, {"min_lr_rate": least, "rate": rate}
        case "warmup_stable_decay":
            decay = steps_of(config.decay, steps, _FLAGS["decay"])
            check_arguments(_ARGS, arguments, _warmup_stable_decay, ours=("warmup", "decay", "steps"))
            return _warmup_stable_decay(warmup, decay, steps, **{"min_lr_ratio": least, **arguments})
        case "rex":
            formula, given = _rex, {"least": least}
        case "piecewise_constant":
            check_arguments(_ARGS, arguments, _piecewise_constant, ours=())
            return _piecewise_constant(**arguments)
    check_arguments(_ARGS, arguments, formula, ours=("p", "rate", "decay"))
    return _after_warmup(warmup, steps, formula, {**given, **arguments})


def _check_factor(factor: Callable[[int], float], name: str, steps: int) -> None:
    """ValueError if the rate would be negative, not finite, or, where it falls by its formula, above its start."""
    most = math.inf if name == "piecewise_constant" else 1 + 1e-9
    for step in {*range(min(steps, _CHECKED)), *range(0, steps, max(steps // _CHECKED, 1)), steps}:
        value = factor(step)
        if isinstance(value, complex) or not 0 <= value <= most or math.isinf(value):
            raise ValueError(f"at step {step} it is {value:g} times --learning_rate")


def _after_warmup(
    warmup: int, steps: int, formula: Callable[..., float], arguments: Mapping[str, object]
) -> Callable[[int], float]:
    """The factor step / warmup up to the warmup's end, then a formula of the progress from there to the run's end."""
    formula(0.0, **arguments)  # TypeError now, not after the warmup, for an argument that it does not have

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return formula(min((step - warmup) / max(steps - warmup, 1), 1.0), **arguments)

    return factor


def _constant(p: float) -> float:
    return 1.0


def _linear(p: float) -> float:
    return 1 - p


def _cosine(p: float, num_cycles: float = 0.5) -> float:
    return (1 + math.cos(2 * math.pi * num_cycles * p)) / 2


def _cosine_with_restarts(p: float, num_cycles: int = 1) -> float:
    return 0.0 if p >= 1 else (1 + math.cos(math.pi * (num_cycles * p % 1))) / 2


def _polynomial(p: float, rate: float, power: float = 1.0, lr_end: float = 1e-7) -> float:
    if lr_end >= rate:
        raise ValueError(f"lr_end {lr_end:g} must be below --learning_rate {rate:g}")
    end = lr_end / rate
    return (1 - end) * (1 - p) ** POWER(power) + end


def _inverse_sqrt(p: float, decay: int, timescale: int) -> float:
    return 1 / math.sqrt(1 + p * decay / COUNT(timescale))


def _cosine_with_min_lr(
    p: float, rate: float, min_lr_rate: float = 0.0, min_lr: float | None = None, num_cycles: float = 0.5
) -> float:
    least = MIN_LR_RATIO(min_lr_rate if min_lr is None else min_lr / rate)
    return _cosine(p, num_cycles) * (1 - least) + least


def _rex(p: float, least: float) -> float:
    """(1 - p) / (1/2 + (1 - p)/2), of Chen et al. 2021 (arXiv 2107.04197)."""
    return (1 - p) / (0.5 + 0.5 * (1 - p)) * (1 - MIN_LR_RATIO(least)) + least


_RAMPS = {
    "linear": lambda p: p,
    "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
    "1-sqrt": lambda p: 1 - math.sqrt(1 - p),
}


def _warmup_stable_decay(
    warmup: int,
    decay: int,
    steps: int,
    min_lr_ratio: float = 0.0,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    num_cycles: float = 0.5,
) -> Callable[[int], float]:
    """Up from `min_lr_ratio` during the warmup, 1 until the decay begins, then down to it."""
    for ramp in (warmup_type, decay_type):
        if ramp not in _RAMPS:
            raise ValueError(f"{ramp} is not one of {', '.join(_RAMPS)}{nearest(str(ramp), _RAMPS)}")
    least, decay_start = MIN_LR_RATIO(min_lr_ratio), steps - decay
    falls = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: _cosine(p, num_cycles),
        "1-sqrt": lambda p: 1 - math.sqrt(p),
    }

    def factor(step: int) -> float:
        share = 1.0
        if step < warmup:
            share = _RAMPS[warmup_type](step / warmup)
        elif step >= steps:
            share = 0.0
        elif step >= decay_start:
            share = falls[decay_type]((step - decay_start) / decay)
        return share * (1 - least) + least

    return factor


def _piecewise_constant(step_rules: str) -> Callable[[int], float]:
    """Factors by `step_rules`: "1:10,0.1:20,0.01" is 1 for 10 steps, 0.1 up to step 20, then 0.01."""
    *rules, last = step_rules.split(",")
    pairs = [rule.split(":") for rule in rules]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("step_rules must be like '1:10,0.1:20,0.01': FACTOR:STEP, and the last FACTOR alone")
    ends = sorted((COUNT(step), _FACTOR(factor)) for factor, step in pairs)
    after = _FACTOR(last)
    return lambda step: next((factor for end, factor in ends if step < end), after)


def _build_class(path: str, optimizer: Optimizer, arguments: Mapping) -> LRScheduler:
    found = find_attribute(path if "." in path else f"torch.optim.lr_scheduler.{path}", "--lr_scheduler_type")
    if isinstance(found, type):
        check_arguments(_ARGS, arguments, found, ours=("optimizer",))
    try:
        scheduler = found(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        given = f" with {dict(arguments)}" if arguments else ""
        raise InputError(f"--lr_scheduler_type {path}{given}: {error}") from None
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise InputError(f"--lr_scheduler_type {path} is not a schedule over steps of torch.optim.lr_scheduler")
    return scheduler
