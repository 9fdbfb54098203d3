"""The guard: a penalty on what the slice's change does to predictions that nobody listed.

Before the first step the model predicts at random contexts, forward and backward. What its linears read there, and how
much each of their outputs moves a prediction, are kept: with them the squared change of the model's predictions is
approximated by a quadratic form of the differences, whose gradient costs no pass of the model. It is the Kronecker
form of K-FAC (Martens and Grosse 2015, arXiv 1503.05671) on the slice's own columns, so that it is small, as a penalty
on leaving what was learned before (Ritter, Botev and Barber 2018, arXiv 1805.07810).
Shapes: T tokens, G row groups, M units of a slice in one row group, at most, L rows of a unit; D the table [G, M, L] of
a matrix's differences, C [G, M, M] the mean of x x^T of its inputs x in the slice's columns, r [G, L] the mean squared
gradient of a prediction by each output.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.selective_finetune import SlicedMatrix, SliceUnits, TrainedSlice

SAMPLES = 32  # predictions
WEIGHT = 20.0
MOST_BYTES = 2**30  # of statistics, above which a run goes without a guard
_TOGETHER = 2**22  # values that are converted to fp32 in one go


@dataclass(frozen=True, eq=False)
class MatrixStatistics:
    """Of one matrix, on the slice's device, in fp32."""

    inputs_GMM: Tensor  # C
    outputs_GL: Tensor  # r

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.inputs_GMM, self.outputs_GL


@dataclass(frozen=True, eq=False)
class Guard:
    """Pulls the differences towards changing nothing at random contexts; `statistics` are by matrix."""

    weight: float  # 1: as much as the mean squared change itself, beside the training loss
    statistics: Mapping[str, MatrixStatistics]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for own in self.statistics.values() for tensor in own.tensors())

    @torch.no_grad()
    def add_gradient(self, trained: TrainedSlice) -> None:
        """Adds the penalty's gradient, 2 weight C D diag(r), to the slice's; once for each optimizer step."""
        for name, matrix in trained.matrices.items():
            own = self.statistics[name]
            pull_GML = (own.inputs_GMM @ matrix.table(matrix.difference)) * own.outputs_GL[:, None]
            pull = matrix.from_table(pull_GML).mul_(2 * self.weight)
            matrix.difference.grad = pull if matrix.difference.grad is None else matrix.difference.grad.add_(pull)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a resumed run takes over, since the model at its start is gone by then."""
        return {name: {"inputs": own.inputs_GMM, "outputs": own.outputs_GL} for name, own in self.statistics.items()}


def guard_from_state(weight: float, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> Guard:
    """The guard of a run that is resumed."""
    own = {name: MatrixStatistics(one["inputs"].to(device), one["outputs"].to(device)) for name, one in state.items()}
    return Guard(weight, own)


def statistics_shapes(units: SliceUnits) -> dict[str, tuple[int, ...]]:
    """The shapes of a matrix's statistics, as Guard.state names them."""
    groups = units.shape[0] // units.rows
    most = int(torch.bincount(units.groups_U, minlength=groups).max())
    return {"inputs": (groups, most, most), "outputs": (groups, units.rows)}


def guard_bytes(units: Iterable[SliceUnits]) -> int:
    """What the statistics of a slice take on its device."""
    return sum(4 * math.prod(shape) for own in units for shape in statistics_shapes(own).values())


class Gathering:
    """Sums up the statistics in backward passes, each from the sum of predictions times noise of unit variance.

    In the mean over the noise, the squared gradient of that sum is the sum of every predicted value's squared gradient.
    """

    def __init__(self, trained: TrainedSlice):
        self.sums = {name: _empty(matrix) for name, matrix in trained.matrices.items()}
        self.tokens = dict.fromkeys(self.sums, 0)
        self.samples = 0
        self.values = 1  # of each prediction in the pass
        self.trained = trained

    @contextmanager
    def of_passes(self) -> Iterator[None]:
        """Within it, backward gathers the statistics, and gives the slice no gradient."""
        for name, matrix in self.trained.matrices.items():
            matrix.gradient = lambda saved, dy, name=name, matrix=matrix: self._add(name, matrix, saved, dy)
        try:
            yield
        finally:
            for matrix in self.trained.matrices.values():
                del matrix.gradient  # the class has its own

    def backward(self, predicted_BCFHW: Tensor, noise_BCFHW: Tensor, values: int) -> None:
        """One pass; the noise is 0 where a prediction does not count, and `values` of each prediction do count."""
        self.samples += len(predicted_BCFHW)
        self.values = values
        (predicted_BCFHW.float() * noise_BCFHW).sum().backward()

    def _add(self, name: str, matrix: SlicedMatrix, saved: Tensor, dy: Tensor) -> None:
        sums = self.sums[name]
        saved_GM = matrix.columns_GM if matrix.saves_whole_input else matrix.unit_GM
        # In pieces: fp32 copies of all tokens of a clip would take more memory than a training step.
        size = max(1, _TOGETHER // max(*matrix.units.shape, saved_GM.numel()))
        pieces = zip(saved.flatten(0, -2).split(size), dy.flatten(0, -2).split(size), strict=True)
        for saved_T, dy_T in pieces:
            x_GTM = saved_T[:, saved_GM].float().transpose(0, 1)
            sums.inputs_GMM.baddbmm_(x_GTM.mT, x_GTM)
            squares = dy_T.float().square().sum(0)
            sums.outputs_GL.add_(squares.view_as(sums.outputs_GL), alpha=1 / self.values)
            self.tokens[name] += len(saved_T)

    def statistics(self, processes: int = 1) -> dict[str, MatrixStatistics]:
        """The means over all passes, of all processes."""
        samples = torch.tensor([float(self.samples)])
        tokens = torch.tensor([float(count) for count in self.tokens.values()])
        tensors = [tensor for own in self.sums.values() for tensor in own.tensors()]
        counts = torch.cat([samples, tokens]).to(tensors[0].device)
        if processes > 1:
            for tensor in [*tensors, counts]:
                torch.distributed.all_reduce(tensor)
        samples, *tokens = counts.tolist()
        for (name, own), count in zip(self.sums.items(), tokens, strict=True):
            own.inputs_GMM.mul_(_both_in_slice(self.trained.matrices[name]) / max(count, 1))
            own.outputs_GL.div_(samples)
        return self.sums


def _empty(matrix: SlicedMatrix) -> MatrixStatistics:
    groups, most = matrix.unit_GM.shape
    shapes = ((groups, most, most), (groups, matrix.units.rows))
    return MatrixStatistics(*(torch.zeros(shape, device=matrix.start.device) for shape in shapes))


def _both_in_slice(matrix: SlicedMatrix) -> Tensor:
    """[G, M, M]: 1 where both are units of the slice, 0 where a short row group is filled up."""
    is_unit_GM = torch.zeros_like(matrix.unit_GM, dtype=torch.float32)
    is_unit_GM.view(-1)[matrix.place_U] = 1
    return is_unit_GM[:, :, None] * is_unit_GM[:, None]
