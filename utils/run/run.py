"""A training run in memory: what its loop works with, where it is, what of it a state keeps."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.data.dataset import TrainingDataset
from utils.learning.lr_schedules import fast_forward
from utils.learning.optimizers import load_optimizer
from utils.preserve.guard import Guard
from utils.preserve.old_prompts import Preservation
from utils.run.config import TrainConfig
from utils.run.plan import TrainingPlan
from utils.run.progress import StepTimer
from utils.run.samples import PreparedSamples
from utils.run.save_schedule import save_at_end
from utils.run.state import State, check_settings, damaged_state, read_state
from utils.run.validation import Validation
from utils.selective_finetune import TrainedSlice
from utils.slice_saving import slice_digest, value_digest
from utils.slices.on_base import SlicesOnBase
from utils.training_debug import TrainingDebug
from wan.errors import InputError
from wan.loading import CheckpointHeader
from wan.model import WanModel


@dataclass
class Place:
    """Where the run is: its epoch (from 0), this process's next batch in it, the steps done, the last losses.

    `finished_at` is when the last step was done, in this run or the one that it continues, in ns since 1970; `state` is
    the newest state on disk, which was saved after `state_step` steps, in epoch `state_epoch`.
    """

    epoch: int
    batch: int
    step: int
    losses: deque[float]  # of as many steps as an epoch has
    finished_at: int = field(default_factory=time.time_ns)
    state: Path | None = None
    state_step: int = 0
    state_epoch: int = 0

    @property
    def is_saved(self) -> bool:
        """Whether the newest state is of this very place."""
        return self.state is not None and (self.state_step, self.state_epoch) == (self.step, self.epoch)

    def finish_step(self, batch: int) -> None:
        """Moves to the place after an optimizer step, which batch number `batch` (from 1) of the epoch completed."""
        self.step, self.batch, self.finished_at = self.step + 1, batch, time.time_ns()

    def was_saved(self, folder: Path) -> None:
        self.state, self.state_step, self.state_epoch = folder, self.step, self.epoch

    def average_loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Run:
    """What the loop works with, all of it ready."""

    config: TrainConfig
    accelerator: Accelerator
    seed: int
    header: CheckpointHeader
    below: SlicesOnBase  # slices on top of the header's files, under the one that trains
    dataset: TrainingDataset
    plan: TrainingPlan
    settings: Mapping[str, str]  # those that decide the run's numbers
    metadata: Mapping[str, str]  # those, with the rest
    model: WanModel
    trained: TrainedSlice
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    samples: PreparedSamples | None
    preserved: Preservation | None
    guard: Guard | None
    validation: Validation | None
    debug: TrainingDebug | None
    say: Callable[[str], None]
    timer: StepTimer
    others: Sequence[Place] = ()  # of the expert that trains in turn with this one


def resume(run: Run, folder: Path) -> Place:
    """Puts the run where the state in `folder` was saved, which state_check has accepted."""
    state = read_state(folder)
    check_settings(folder, state, run.settings)  # by now with what the base holds in the slice
    if list(state.trained) != list(run.trained.state_dict()):  # the optimizer's state goes by the order
        raise damaged_state(folder, "its matrices are not in the model's order")
    run.trained.load_state_dict(state.trained)
    _resume_schedule(run, state)
    run.scaler.load_state_dict(state.scaler)
    if run.validation and state.validation:
        run.validation.load_state(state.validation)
    losses = deque(state.losses, run.plan.steps_per_epoch)
    place = Place(state.epoch, state.batch, state.step, losses, state.saved_at, folder, state.step, state.epoch)
    if place.step > run.plan.steps:
        raise has_ended_error(run, place)
    run.say(f"continues from {folder}: epoch {place.epoch + 1}, step {place.step}")
    if (before := state.planned_steps) != run.plan.steps:
        run.say(f"note: the learning-rate schedule now spans {run.plan.steps} steps instead of {before}")
    return place


def has_ended(run: Run, place: Place) -> bool:
    """Whether a resumed run has nothing left to do: its steps are done, and its last files are written."""
    # As the main process sees it, before it writes: all have to take the same way.
    final = save_at_end(run.config.save, run.plan.steps)
    ended = [place.step >= run.plan.steps and not final.missing(values_digest(run.trained))]
    broadcast_object_list(ended)
    return ended[0]


def has_ended_error(run: Run, place: Place) -> InputError:
    """What --resume of a run that has ended comes to."""
    return InputError(
        f"--resume {place.state} has done {place.step} steps and the run has {run.plan.steps}: raise "
        "--max_train_epochs or --max_train_steps to continue"
    )


def _resume_schedule(run: Run, state: State) -> None:
    """The optimizer's state, and the schedule where it was; with another number of steps, the new schedule's rates."""
    if state.planned_steps == run.plan.steps:
        load_optimizer(run.optimizer, state.optimizer)
        run.scheduler.load_state_dict(state.scheduler)
        return
    fast_forward(run.scheduler, state.scheduler.get("last_epoch", state.step))
    rates = [group["lr"] for group in run.optimizer.param_groups]
    load_optimizer(run.optimizer, state.optimizer)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def state_of(run: Run, place: Place) -> State:
    """What a later run needs to continue from `place`."""
    return State(
        name=run.config.save.name,
        settings=run.settings,
        saved_at=place.finished_at,
        epoch=place.epoch,
        batch=place.batch,
        step=place.step,
        losses=list(place.losses),
        planned_steps=run.plan.steps,
        trained=run.trained.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        scaler=run.scaler.state_dict(),
        validation=run.validation.state() if run.validation else None,
        guard=run.guard.state() if run.guard else None,
    )


def values_digest(trained: TrainedSlice) -> str:
    """SHA-256 of the differences: files that carry it hold what a state with the same differences would save."""
    return slice_digest({name: value_digest(own.difference.detach().cpu()) for name, own in trained.matrices.items()})
