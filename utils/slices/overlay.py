"""Slices of files on a model whose weights stay the checkpoint's own bytes: kept beside them, put into each copy.

Put into the weights themselves they would make the whole file private memory, since a slice has values in almost every
page of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.selective_finetune import SliceUnits, TrainedSlice, block_linears
from utils.slices.on_base import SlicesOnBase
from wan.loading import block_matrices, file_dtype, load_dit
from wan.model import WanModel
from wan.stored_tensors import DTYPES


@dataclass(frozen=True, eq=False)
class Overlay:
    """What slices hold in one weight: where, and the values in line order."""

    parts: tuple[tuple[SliceUnits, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for _, values in self.parts)

    def to(self, device: torch.device) -> "Overlay":
        return Overlay(tuple((units.to(device), values.to(device)) for units, values in self.parts))

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Puts the values into `weight`, a copy of the file's."""
        for units, values in self.to(weight.device).parts:
            units.write(weight, values)


def load_with_slices(
    path: Path, dtype: torch.dtype, slices: SlicesOnBase, fp8: bool = False
) -> tuple[WanModel, dict[nn.Linear, Overlay]]:
    """The frozen model at `path`, mapped read-only, and what the slices hold, for place_model to put into copies.

    Weights that are cast at load are copies, and hold the slices already; with `fp8`, matrices of the blocks are not
    cast, since place_model rounds them. InputError if it is not the slices' base.
    """
    matrices = block_matrices(slices.header) if fp8 else frozenset()
    stored = {name: DTYPES[slices.header.tensors[name].dtype] for name in slices.patches}
    is_cast = file_dtype(slices.header) != dtype  # most of it: place_model takes the rest for private memory then, too
    cast = {name: patch for name, patch in slices.patches.items() if is_cast or stored[name] != dtype}
    cast = {name: patch for name, patch in cast.items() if name not in matrices}
    model = load_dit(path, dtype, read_only=True, patches=cast, as_stored=matrices)
    linears = {f"{name}.weight": linear for name, linear in block_linears(model).items()}
    overlays = {linears[name]: _overlay(slices, name, linears[name]) for name in slices.patches if name not in cast}
    return model, overlays


def _overlay(slices: SlicesOnBase, name: str, linear: nn.Linear) -> Overlay:
    weight = linear.weight.detach().clone()
    slices.patches[name](weight, 0)
    return Overlay(tuple((units, units.cut(units.read(weight)).clone()) for units in slices.units[name]))


def start_in(trained: TrainedSlice, dtype: torch.dtype) -> None:
    """Has the slice of matrices that are stored in another dtype begin, and compute, in `dtype`."""
    for matrix in trained.matrices.values():
        matrix.start = matrix.start.to(dtype)


def start_from_overlays(trained: TrainedSlice, overlays: Mapping[nn.Linear, Overlay]) -> None:
    """Where the slice that trains shares values with others, it begins at theirs."""
    for matrix in trained.matrices.values():
        if matrix.linear in overlays:
            weight = matrix.linear.weight.detach().clone()
            overlays[matrix.linear].write(weight)
            units = matrix.units.to(weight.device)
            matrix.start.copy_(units.cut(units.read(weight)))
