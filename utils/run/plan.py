"""How many steps a run takes, and where each begins and ends among the batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from wan.errors import InputError


@dataclass(frozen=True)
class TrainingPlan:
    """Counts of one process; every process has as many batches."""

    items_per_epoch: int
    batches_per_epoch: int
    steps_per_epoch: int
    accumulation: int  # batches to a step; what is left at the end of an epoch is a step of its own
    epochs: int
    steps: int

    def window(self, batch: int) -> int:
        """How many batches are in the step that batch number `batch` (from 0) of an epoch belongs to."""
        first = batch // self.accumulation * self.accumulation
        return min(self.accumulation, self.batches_per_epoch - first)

    def ends_step(self, batch: int) -> bool:
        """Whether the optimizer steps after batch number `batch` (from 0) of an epoch."""
        return (batch + 1) % self.accumulation == 0 or batch + 1 == self.batches_per_epoch


def plan_training(
    batches: Sequence[Sequence[int]], processes: int, accumulation: int, max_steps: int, max_epochs: int | None
) -> TrainingPlan:
    """The plan for an epoch of `batches` over all processes; max_epochs, where given, decides instead of max_steps."""
    per_process = -(-len(batches) // processes)
    steps_per_epoch = -(-per_process // accumulation)
    steps = max_steps if max_epochs is None else max_epochs * steps_per_epoch
    if steps < 1:
        raise InputError("--max_train_steps or --max_train_epochs must be 1 or more")
    epochs = -(-steps // steps_per_epoch)
    return TrainingPlan(sum(map(len, batches)), per_process, steps_per_epoch, accumulation, epochs, steps)


def first_items(batches: Sequence[Sequence[int]], rank: int, processes: int) -> list[int]:
    """For each batch of process `rank`: how many items come before it in the epoch."""
    starts = [0, *accumulate(map(len, batches))]
    per_process = -(-len(batches) // processes)
    return [starts[(rank + i * processes) % len(batches)] for i in range(per_process)]
