"""Whether a state fits the run that is to continue from it, found out before a model loads and before it is applied."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.learning.lr_schedules import ScheduleConfig, build_scheduler
from utils.learning.optimizers import OptimizerConfig, build_optimizer
from utils.preserve.guard import statistics_shapes
from utils.run.plan import TrainingPlan
from utils.run.state import State, check_settings, damaged_state
from utils.run.validation import state_problem
from utils.selective_finetune import CONTRACT, SliceError, SliceUnits, exact_fraction

_WHICH = "_extra_state"  # torch's name for what a module adds to its parameters: here, whose slice they are
_PLAIN = (bool, int, float, str, type(None))
_DEEPEST = 10  # tables within tables; what is saved has five


@dataclass(frozen=True)
class Expected:
    """What a state of a run is like.

    `counts` are the values of each parameter, by name; `entries` are what the optimizer keeps for one of each count,
    `guard` what a guard keeps of each matrix.
    """

    settings: Mapping[str, str]
    plan: TrainingPlan
    counts: Mapping[str, int]
    entries: Mapping[int, Mapping]
    group: Mapping  # the optimizer's settings
    optimizer: Optimizer  # of one value, to try settings on
    scheduler: LRScheduler  # before its first step
    scaler: Mapping
    guard: Mapping[str, Mapping[str, Tensor]] | None


def expected_state(
    settings: Mapping[str, str],
    plan: TrainingPlan,
    units: Mapping[str, SliceUnits],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    device: torch.device,
    scales_loss: bool,
) -> Expected:
    """What a run of these `settings` saves; `units` are the slice's by matrix, `scales_loss` is fp16's scaling.

    What an optimizer keeps is learned by one step on a parameter of each size.
    """
    counts, entries = {name: own.count for name, own in units.items()}, {}
    for count in set(counts.values()):
        parameter = nn.Parameter(torch.zeros(count, device=device))
        parameter.grad = torch.full_like(parameter, 1e-3)
        stepped = build_optimizer(optimizer, [parameter])
        stepped.step()
        entries[count] = stepped.state_dict()["state"].get(0, {})
    by_parameter = {name.replace(".", "/"): count for name, count in counts.items()}
    fresh = build_optimizer(optimizer, [nn.Parameter(torch.zeros(1, device=device))])
    scheduler = build_scheduler(schedule, fresh, plan.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=scales_loss).state_dict()
    group = copy.deepcopy(fresh.state_dict()["param_groups"][0])
    guard = {name: _statistics_like(own) for name, own in units.items()} if "guard" in settings else None
    return Expected(settings, plan, by_parameter, entries, group, fresh, scheduler, scaler, guard)


def _statistics_like(units: SliceUnits) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in statistics_shapes(units).items()}


def check_state(folder: Path, state: State, expected: Expected) -> None:
    """InputError if the state in `folder` is of a run with other settings; UnusableState if it cannot be continued."""
    check_settings(folder, state, expected.settings)
    problem = (
        _place_problem(state, expected.plan)
        or _trained_problem(state.trained, expected)
        or _optimizer_problem(state, expected)
        or _scheduler_problem(state, expected.scheduler)
        or (None if _is_like(state.scaler, expected.scaler) else "its loss scaling is not as it was saved")
        or _guard_problem(state.guard, expected.guard)
        or state_problem(state.validation)
        or _values_problem(state)
    )
    if problem:
        raise damaged_state(folder, problem)


def _guard_problem(guard: object, expected: Mapping | None) -> str | None:
    same = _is_like(guard, expected) and (guard is None or guard.keys() == expected.keys())
    return None if same else "its guard's statistics are not as they were saved"


def _place_problem(state: State, plan: TrainingPlan) -> str | None:
    done = state.epoch * plan.steps_per_epoch + -(-state.batch // plan.accumulation)
    ends_step = state.batch == 0 or (state.batch <= plan.batches_per_epoch and plan.ends_step(state.batch - 1))
    if not ends_step or state.step != done or not 1 <= state.step <= state.planned_steps:
        return f"no run is at step {state.step} after batch {state.batch} of epoch {state.epoch + 1}"
    if len(state.losses) != min(state.step, plan.steps_per_epoch):
        return f"it has {len(state.losses)} losses after {state.step} steps"
    return None


def _trained_problem(trained: Mapping, expected: Expected) -> str | None:
    if trained.keys() != {*expected.counts, _WHICH} or not _is_same_slice(trained[_WHICH], expected.settings):
        return "it holds another slice"
    for name, count in expected.counts.items():
        if not _is_like(trained[name], torch.empty(count, device="meta")):
            return f"the trained values of {name} are not {count} of fp32"
    return None


def _is_same_slice(which: object, settings: Mapping[str, str]) -> bool:
    if not isinstance(which, Tensor) or which.dtype != torch.uint8 or which.dim() != 1 or which.numel() > 1000:
        return False
    try:
        match json.loads(bytes(which.tolist())):
            case {"contract": contract, "ff": str(ff), "ffid": ffid}:
                same = (contract, str(ffid)) == (CONTRACT, settings["ffid"])
                return same and exact_fraction(ff) == exact_fraction(settings["ff"])
    except (ValueError, SliceError):
        pass
    return False


def _optimizer_problem(state: State, expected: Expected) -> str | None:
    entries, groups = state.optimizer.get("state"), state.optimizer.get("param_groups")
    counts = [expected.counts[name] for name in state.trained if name != _WHICH]
    if (
        not isinstance(entries, dict)
        or not isinstance(groups, list)
        or not all(isinstance(own, dict) for own in groups)
    ):
        return "its optimizer's part is not as it was saved"
    if len(groups) != 1 or groups[0].get("params") != [*range(len(counts))] or not _has_settings(groups[0], expected):
        return "its optimizer's settings are not as they were saved"
    if not entries.keys() <= {*range(len(counts))}:
        return "its optimizer has state of other parameters"
    for number, count in enumerate(counts):
        entry, ours = entries.get(number, {}), expected.entries[count]
        never_stepped = entry == {} and expected.scaler  # fp16 gradients overflowed at every step so far
        if not never_stepped and not _is_like(entry, ours):
            return f"its optimizer's state of parameter {number} is not as it was saved"
    return None


def _has_settings(group: Mapping, expected: Expected) -> bool:
    """Whether an optimizer can go by this param group; what an older torch did not save yet, torch adds itself."""
    ours = expected.group
    known = {key: value for key, value in ours.items() if key in group and key not in ("params", "fused")}
    same = all(group[key] is value for key, value in known.items() if value is None or isinstance(value, bool))
    steps_somehow = isinstance(group.get("fused"), bool | None)  # which depends on the device, and on the version
    if not same or not steps_somehow or not _is_like(group, known):
        return False
    expected.optimizer.load_state_dict({"state": {}, "param_groups": [{**group, "params": ours["params"]}]})
    return ours.keys() <= expected.optimizer.param_groups[0].keys() and group["lr"] >= 0


def _scheduler_problem(state: State, fresh: LRScheduler) -> str | None:
    ours, theirs = fresh.state_dict(), state.scheduler
    extra = theirs.keys() - ours.keys()
    if any(key not in theirs for key in ours if not key.startswith("_")):  # those another torch's may lack
        return "its learning-rate schedule is incomplete"
    # What is None at first may be set later.
    known = {key: value for key, value in ours.items() if key in theirs and value is not None}
    unset = {key: value for key, value in theirs.items() if key not in known}
    if not _is_like(theirs, known) or not all(isinstance(value, _PLAIN) for value in unset.values()):
        return "its learning-rate schedule is not as it was saved"
    if not all(isinstance(key, str) for key in extra) or extra & {*dir(fresh)}:
        return "its learning-rate schedule is not as it was saved"
    last = theirs.get("last_epoch", 0)
    if type(last) is not int or not 0 <= last <= state.step:
        return f"its learning-rate schedule is not that of step {state.step}"
    return None


def _is_like(value: object, ours: object) -> bool:
    """Whether a value has the type, shape and keys of ours, and is finite where ours is one number."""
    if isinstance(ours, Tensor):
        return isinstance(value, Tensor) and (value.dtype, value.shape) == (ours.dtype, ours.shape)
    if isinstance(ours, dict):
        return isinstance(value, dict) and all(key in value and _is_like(value[key], ours[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return type(value) is type(ours) and len(value) == len(ours) and all(map(_is_like, value, ours))
    if type(ours) in (int, float):
        return type(value) in (int, float) and (abs(value) < 2.0**63 or value == ours)
    return isinstance(value, type(ours))


def _values_problem(state: State) -> str | None:
    """Looked at last: a tensor of the right shape cannot be larger than what was saved."""
    for tensor in _tensors(
        [state.trained, state.optimizer, state.scheduler, state.scaler, state.validation, state.guard]
    ):
        if tensor is None:
            return "its tables are nested too deeply"
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.requires_grad:
            return "a tensor is not as it was saved"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return "a tensor repeats its values"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return "it has values that are not finite"
    return None


def _tensors(value: object, depth: int = 0) -> Iterator[Tensor | None]:
    """Every tensor in nested tables; None for what lies deeper than any that was saved."""
    if isinstance(value, Tensor):
        yield value
    if isinstance(value, dict | list | tuple):
        if depth > _DEEPEST:
            yield None
            return
        for own in value.values() if isinstance(value, dict) else value:
            yield from _tensors(own, depth + 1)
