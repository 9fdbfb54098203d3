"""The outcome of an optimizer step: its losses, the gradient's norm, whether all of it is finite, whether to stop.

A GPU that has to wait for the host to read it, and then to launch the next step, is idle meanwhile. So the outcome may
reach the host late, and the device itself takes back an update that is not finite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from utils.run.run import Run
from utils.selective_finetune import TrainedSlice

_LATE_UP_TO = 2**24  # values: all of ff 0.001 of a 14B model. A late step copies them: 4 bytes each, for a moment.


@dataclass(frozen=True)
class Outcome:
    """The numbers are fp32: the means of both losses and of the requests to stop, over the processes, and the norm.

    Then the norm of each matrix that has a gradient; in a late outcome also whether the slice was finite after the
    optimizer's step. Those of a late one are on the way to the host until `arrived` has passed.
    """

    step: int
    matrices: Sequence[str]
    numbers: Tensor
    is_late: bool
    arrived: torch.cuda.Event | None = None

    @cached_property
    def _read(self) -> list[float]:
        """Waits until they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()

    @property
    def values(self) -> dict[str, float]:
        loss, preserve_loss, _, norm = self._read[:4]
        return {"loss": loss, "preserve_loss": preserve_loss, "grad_norm": norm}

    @property
    def stops(self) -> bool:
        return self._read[2] > 0

    @property
    def broken_matrices(self) -> list[str]:
        """Those whose gradient has a norm that is not finite."""
        norms = self._read[4 : 4 + len(self.matrices)]
        return [name for name, norm in zip(self.matrices, norms, strict=True) if not math.isfinite(norm)]

    @property
    def slice_was_finite(self) -> bool:
        """Of a late outcome: whether the optimizer kept the slice finite."""
        return self._read[-1] > 0

    def sent(self, slice_is_finite: Tensor) -> "Outcome":
        """The late outcome, complete and on its way to the host, which does not wait."""
        numbers = torch.cat([self.numbers, slice_is_finite[None].float()])
        on_host = numbers.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None
        return replace(self, numbers=on_host, arrived=arrived)


def reads_late(run: Run) -> bool:
    """Whether the host reads the outcome of a step only when it has launched the backward passes of the next one.

    Every process of a run decides alike. On a CPU nothing would run meanwhile, and the scaler of fp16 waits anyway.
    """
    is_gpu, fp16 = run.accelerator.device.type == "cuda", run.scaler.is_enabled()
    return is_gpu and not fp16 and run.trained.count <= _LATE_UP_TO


def values_before(trained: TrainedSlice) -> Tensor:
    """A copy of all differences, for take_back_unless_finite()."""
    return torch.cat([parameter.detach() for parameter in trained.parameters()])


@torch.no_grad()
def take_back_unless_finite(trained: TrainedSlice, before: Tensor, outcome: Outcome) -> Outcome:
    """Undoes the optimizer's step on the device if its loss, its gradient or the slice after it is not finite.

    Selects rather than multiplies, because NaN * 0 is NaN. Returns the outcome on its way to the host.
    """
    slice_is_finite = is_slice_finite(trained)
    parameters = list(trained.parameters())
    kept = torch.where(outcome.numbers.isfinite().all() & slice_is_finite, torch.cat(parameters), before)
    torch._foreach_copy_(parameters, kept.split([parameter.numel() for parameter in parameters]))
    return outcome.sent(slice_is_finite)


def is_slice_finite(trained: TrainedSlice) -> Tensor:
    """Whether all values in use can be held by the weights' dtype, as a bool on the device."""
    matrices = list(trained.matrices.values())
    differences = torch.stack(torch._foreach_norm([matrix.difference.detach() for matrix in matrices], math.inf))
    starts = torch.stack(torch._foreach_norm([matrix.start for matrix in matrices], math.inf)).float()
    return (differences + starts <= torch.finfo(matrices[0].start.dtype).max).all()
