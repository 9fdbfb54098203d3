"""Full finetuning of one exact slice of a model's block matrices.

    trained = attach_slice(model, ff="0.001", ffid=1, device="cuda")      # choose and attach; the model is frozen
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    ...; loss.backward(); optimizer.step(); trained.write_back()          # in any training loop

`ff` is how much of every matrix trains, `ffid` which part: slices of different ids never share a value.
This file needs torch and numpy only: copied into another trainer it works the same. slice_saving.py, copied beside it,
writes checkpoints and slice files.

Slice contract, version 1. The values of a weight [out, in] form one line: G = 8, halved until it divides `out`; a unit
is L = out / G consecutive rows of one column; the columns are in an order hashed from the weight's name, and each lap
over them moves on by one of the G row groups, so that neighbouring units differ in column and rows.
Shapes: T tokens, G row groups, L rows of a unit, U units of a slice, M units of a slice in one row group, at most.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRACT = 1
ROW_GROUPS = 8
_SHARE = re.compile(r"\+?([0-9]+/[0-9]+|([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)")
_LONGEST_SHARE = 40  # characters
_TOGETHER = 2**24  # values that are written or reduced in one go: all of ff 0.001 of a 14B model
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_PREFIX = re.compile(r"^(model\.|diffusion_model\.|pipe\.dit\.|transformer\.|module\.|dit\.)+")
Ff = str | int | float | Decimal | Fraction
NameOf = Callable[[str], str]  # from a name in a model or its file to the contract's


class SliceError(ValueError):
    """A slice that does not exist or does not fit; its message is one line with what is allowed."""


# ---- the contract: which values a slice holds


def exact_fraction(ff: Ff) -> Fraction:
    """`ff` as the decimal (or a/b) that was typed, with 0 < ff <= 1; a float is read through its shortest decimal."""
    text = str(ff).strip()
    try:
        exact = Fraction(text) if "/" in text else Decimal(text)
        allowed = 0 < exact <= 1 and (isinstance(exact, Fraction) or exact.adjusted() >= -30)
    except (InvalidOperation, ValueError, ZeroDivisionError):
        allowed = False
    if not (allowed and len(text) <= _LONGEST_SHARE and _SHARE.fullmatch(text)):
        raise SliceError(
            f"ff is {text[:60]}: it is the share of the model that trains, a decimal (0.001, 1e-3) or a fraction "
            f"(1/1000) above 0 and up to 1, of at most {_LONGEST_SHARE} characters"
        )
    return Fraction(exact)


def ids_available(ff: Ff) -> int:
    """How many slices of `ff` there are: ffid runs from 1 to this."""
    return int(1 / exact_fraction(ff))


def check_slice(ff: Ff, ffid: int) -> None:
    """Raises SliceError with the allowed range where (ff, ffid) names no slice."""
    last = ids_available(ff)
    if not (isinstance(ffid, int) and not isinstance(ffid, bool) and 1 <= ffid <= last):
        raise SliceError(f"ffid is {ffid}: at ff {ff} it runs from 1 to {last}")


def slice_interval(numel: int, ff: Ff, ffid: int) -> tuple[int, int]:
    """The slice's first position on a line of `numel` values and the one behind its last, in exact arithmetic."""
    check_slice(ff, ffid)
    step = exact_fraction(ff) * numel
    return int((ffid - 1) * step), int(ffid * step)


@functools.lru_cache(maxsize=8)
def _column_order(name: str, columns: int) -> np.ndarray:
    words = hashlib.shake_256(f"wan-slice-{CONTRACT}:{name}".encode()).digest(8 * columns)
    return np.argsort(np.frombuffer(words, dtype="<u8"), kind="stable")


@dataclass(frozen=True)
class SliceUnits:
    """The units that a slice touches in one matrix, in line order; its first and last unit may be cut."""

    shape: tuple[int, int]
    rows: int  # L, of every unit
    columns_U: Tensor
    groups_U: Tensor
    offset: int  # of the slice's first value within its first unit
    count: int  # of the slice's values

    def to(self, device) -> "SliceUnits":
        return replace(self, columns_U=self.columns_U.to(device), groups_U=self.groups_U.to(device))

    def cut(self, values_UL: Tensor) -> Tensor:
        """The slice's own values, in line order: a view of its whole units' without what they hold beyond it."""
        return values_UL.view(-1)[self.offset : self.offset + self.count]

    def read(self, weight: Tensor) -> Tensor:
        """A copy of the whole units [U, L] in `weight`."""
        return weight.view(-1, self.rows, self.shape[1])[self.groups_U, :, self.columns_U]

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Puts the slice's `values` (line order) into `weight`; what its cut units hold beyond it stays."""
        values_UL = self.read(weight)
        self.cut(values_UL).copy_(values)
        weight.view(-1, self.rows, self.shape[1])[self.groups_U, :, self.columns_U] = values_UL


def slice_units(name: str, shape: Sequence[int], ff: Ff, ffid: int) -> SliceUnits:
    """The units of slice (ff, ffid) in the weight `name` of `shape` [out, in]."""
    rows, columns = shape
    start, stop = slice_interval(rows * columns, ff, ffid)
    groups = next(g for g in (ROW_GROUPS, 4, 2, 1) if rows % g == 0)
    length = rows // groups
    first = start // length
    unit = np.arange(first, -(-stop // length) if stop > start else first)
    lap, i = np.divmod(unit, columns)
    columns_U = torch.from_numpy(_column_order(name, columns)[i])
    groups_U = torch.from_numpy((i + lap) % groups)
    return SliceUnits((rows, columns), length, columns_U, groups_U, start - first * length, stop - start)


def slice_indices(name: str, shape: Sequence[int], ff: Ff, ffid: int) -> Tensor:
    """Flat indices (row * in + column, int64, line order) of slice (ff, ffid) in the weight `name` of `shape`."""
    units = slice_units(name, shape, ff, ffid)
    rows_UL = units.groups_U[:, None] * units.rows + torch.arange(units.rows)
    return units.cut(rows_UL * units.shape[1] + units.columns_U[:, None])


# ---- the slice of one matrix: its values, its gradient


def moved_values(start: Tensor, difference: Tensor) -> Tensor:
    """round(start + difference) in start's dtype; an unmoved value keeps its bits (-0.0 + 0 would not)."""
    return torch.where(difference == 0, start, (start.float() + difference).to(start.dtype))


class SlicedMatrix:
    """The trained slice of one weight: where it lies, what it held at the start, how far it has moved.

    `fetch` is None where the linear's own weight is in use; set, it gives a copy on the device with the values in use,
    and forward and backward each ask anew.
    """

    def __init__(self, name: str, linear: nn.Linear, units: SliceUnits, device: str | torch.device):
        self.name = name
        self.linear = linear
        self.units = units.to(device)
        on_weight = units.to(linear.weight.device)
        self.start = on_weight.cut(on_weight.read(linear.weight.detach())).to(device, copy=True)  # [count]
        self.difference = nn.Parameter(torch.zeros(units.count, dtype=torch.float32, device=device))
        self.fetch: Callable[[], Tensor] | None = None
        # Past half of the columns X itself is no larger than the gathered ones, and q, k and v share it.
        self.saves_whole_input = 2 * len(units.columns_U) > units.shape[1]
        self.unit_GM, self.place_U = (table.to(device) for table in _group_table(units))
        self.columns_GM = self.units.columns_U[self.unit_GM]

    def table(self, values: Tensor) -> Tensor:
        """Values in line order as [G, M, L], by row group; 0 where the slice has none."""
        units = self.units
        around = (units.offset, len(units.columns_U) * units.rows - units.offset - units.count)
        whole_UL = F.pad(values, around).view(-1, units.rows)
        table_GML = whole_UL.new_zeros(*self.unit_GM.shape, units.rows)
        return table_GML.view(-1, units.rows).index_copy(0, self.place_U, whole_UL).view_as(table_GML)

    def from_table(self, table_GML: Tensor) -> Tensor:
        """The slice's own values of a table, in line order."""
        return self.units.cut(table_GML.flatten(0, 1)[self.place_U])

    @torch.no_grad()
    def write(self, weight: Tensor, values: Tensor | None = None) -> None:
        """Puts the values in use (`values`, where the caller has them) into `weight`: the matrix or a copy of it."""
        if values is None:
            values = moved_values(self.start, self.difference)
        self.units.to(weight.device).write(weight, values)

    def saved_input(self, x: Tensor) -> Tensor:
        """What backward needs of the input: its columns in the slice."""
        return x if self.saves_whole_input else x[..., self.units.columns_U]

    def gradient(self, saved: Tensor, dy: Tensor) -> Tensor:
        """The slice's values of dY^T X, fp32 in line order: one product per row group, so no more than its units."""
        saved_GM = self.columns_GM if self.saves_whole_input else self.unit_GM
        dy_GTL = dy.reshape(-1, len(saved_GM), self.units.rows).transpose(0, 1)
        # No more columns at a time than X has: the units of a large slice name each of them several times.
        parts = saved_GM.split(max(1, self.units.shape[1] // len(saved_GM)), dim=1)
        products = [torch.bmm(saved[..., part].reshape(-1, *part.shape).permute(1, 2, 0), dy_GTL) for part in parts]
        return self.from_table(torch.cat(products, dim=1)).to(torch.float32, copy=True)

    def product(self, x: Tensor) -> Tensor:
        """The difference times the input, [..., out], in x's dtype: what it adds to the frozen linear."""
        table_GML = self.table(self.difference.to(x.dtype))
        return torch.einsum("...gm,gml->...gl", x[..., self.columns_GM], table_GML).flatten(-2)


def _group_table(units: SliceUnits) -> tuple[Tensor, Tensor]:
    """Unit numbers [G, M] by row group, where short groups repeat unit 0, and each unit's place [U] in that table."""
    in_group_UG = F.one_hot(units.groups_U, units.shape[0] // units.rows)
    rank_U = (in_group_UG * in_group_UG.cumsum(0)).sum(1) - 1
    unit_GM = torch.zeros(in_group_UG.shape[1], int(rank_U.max()) + 1, dtype=torch.int64)
    place_U = units.groups_U * unit_GM.shape[1] + rank_U
    unit_GM.view(-1)[place_U] = torch.arange(len(place_U))
    return unit_GM, place_U


class _SliceLinear(torch.autograd.Function):
    """F.linear whose weight gradient exists for the slice alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, difference, matrix: SlicedMatrix):
        ctx.matrix = matrix
        needs_x_grad, needs_slice_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        saved = matrix.saved_input(x) if needs_slice_grad else None
        ctx.save_for_backward(saved, weight if needs_x_grad and matrix.fetch is None else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        saved, weight = ctx.saved_tensors
        dx = grad = None
        if ctx.needs_input_grad[3]:
            grad = ctx.matrix.gradient(saved, dy)
        if ctx.needs_input_grad[0]:
            dx = dy @ (ctx.matrix.fetch().to(dy.dtype) if weight is None else weight)
        return dx, None, None, grad, None


def slice_forward(matrix: SlicedMatrix, x: Tensor) -> Tensor:
    weight, bias = matrix.linear.weight if matrix.fetch is None else matrix.fetch(), matrix.linear.bias
    # Backward runs without autocast, so the casts happen here, outside the Function.
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _SliceLinear.apply(x, weight, bias, matrix.difference, matrix)


def _beside_forward(matrix: SlicedMatrix, frozen_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = frozen_forward(x)
    return y + matrix.product(x.to(y.dtype))


def _in_runs(items: Sequence, counts: Sequence[int]) -> list[list]:
    """The items in their order, in runs of at most _TOGETHER values unless a single one has more."""
    runs, held = [], _TOGETHER
    for item, count in zip(items, counts, strict=True):
        if held + count > _TOGETHER:
            runs, held = [*runs, []], 0
        runs[-1].append(item)
        held += count
    return runs


# ---- the slice of a model


def contract_name(name: str) -> str:
    """A weight's name in the contract: without the wrapper parts and prefixes that trainers put around Wan's names."""
    return _PREFIX.sub("", _WRAPPERS.sub("", name))


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear that is called inside the model's lists of repeated blocks, by module name."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # of nn.MultiheadAttention
        and any(name.startswith(f"{blocks}.") for blocks in lists)
    }


def attach_slice(
    model: nn.Module,
    ff: Ff,
    ffid: int,
    device: str | torch.device | None = None,
    linears: Mapping[str, nn.Linear] | None = None,
    name_of: NameOf = contract_name,
    beside: bool = False,
) -> "TrainedSlice":
    """Freezes the model, makes slice (ff, ffid) of its block matrices trainable, and returns it.

    `device` holds the differences (the weights' own by default). `linears` (module name -> module) are the matrices to
    slice, those of repeated blocks by default; `name_of` turns a weight's name in the model into its contract name.
    With `beside` no weight is written: each frozen linear does what it did, and the difference's product is added.
    """
    check_slice(ff, ffid)
    model.requires_grad_(False)
    matrices = []
    for name, linear in (block_linears(model) if linears is None else linears).items():
        if not beside and (not linear.weight.is_floating_point() or linear.weight.dtype.itemsize < 2):
            raise SliceError(f"{name} holds {linear.weight.dtype}: slices train on bf16, fp16 or fp32 weights")
        units = slice_units(name_of(f"{name}.weight"), linear.weight.shape, ff, ffid)
        if units.count:
            matrices.append(SlicedMatrix(name_of(f"{name}.weight"), linear, units, device or linear.weight.device))
    if not matrices:
        raise SliceError(
            f"ff is {ff}: no nn.Linear in a list of blocks holds such a slice; take a larger ff, or name the matrices "
            "(linears=)"
        )
    if len({matrix.start.device for matrix in matrices}) > 1:
        raise SliceError("the matrices are on several devices: name the one that trains (device=)")
    trained = TrainedSlice(ff, ffid, matrices, name_of, beside)
    for matrix in matrices:
        forward = (_beside_forward, matrix, matrix.linear.forward) if beside else (slice_forward, matrix)
        matrix.linear.forward = functools.partial(*forward)
    return trained


class TrainedSlice(nn.Module):
    """A slice attached to a model: its parameters (fp32 differences from the start values) and its values in use."""

    contract = CONTRACT

    def __init__(self, ff: Ff, ffid: int, matrices: Sequence[SlicedMatrix], name_of: NameOf, beside: bool):
        super().__init__()
        self.ff, self.ffid = str(ff).strip(), ffid
        self.name_of = name_of  # of names in the model, and in its files
        self.beside = beside
        self.version = 0  # of the values in use: goes up whenever they change
        self.matrices = {matrix.name: matrix for matrix in matrices}
        if len(self.matrices) < len(matrices):
            raise SliceError("two matrices have one name in the contract, as in two models: attach each on its own")
        for name, matrix in self.matrices.items():
            self.register_parameter(name.replace(".", "/"), matrix.difference)

    @property
    def count(self) -> int:
        """How many values train."""
        return sum(matrix.units.count for matrix in self.matrices.values())

    @torch.no_grad()
    def write_back(self) -> None:
        """Puts the values in use into the resident weights; to be called after every optimizer step."""
        self.version += 1
        resident = [matrix for matrix in self.matrices.values() if matrix.fetch is None and not self.beside]
        for together in _in_runs(resident, [matrix.units.count for matrix in resident]):
            # A GPU would spend more time on starting small operations than on doing them.
            starts, differences = (torch.cat([getattr(m, part) for m in together]) for part in ("start", "difference"))
            values = moved_values(starts, differences)
            for matrix, own in zip(together, values.split([m.units.count for m in together]), strict=True):
                matrix.write(matrix.linear.weight, own)

    def reduce_gradients(self) -> None:
        """Averages the slice's gradients over the processes of torch.distributed, before clipping, on real steps."""
        parameters = list(self.parameters())
        for together in _in_runs(parameters, [parameter.numel() for parameter in parameters]):
            flat = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in together])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for parameter, grad in zip(together, flat.split([p.numel() for p in together]), strict=True):
                parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.copy_(grad)

    def get_extra_state(self) -> Tensor:
        """Which slice state_dict() is of, as text in bytes, since some savers take tensors alone."""
        text = json.dumps({"contract": CONTRACT, "ff": self.ff, "ffid": self.ffid})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Puts loaded differences to use; SliceError where they are another slice's."""
        theirs = json.loads(bytes(state.tolist()))
        same = (theirs["contract"], theirs["ffid"]) == (CONTRACT, self.ffid)
        if not same or exact_fraction(theirs["ff"]) != exact_fraction(self.ff):
            raise SliceError(f"the state holds ff {theirs['ff']} ffid {theirs['ffid']}, not {self.ff} and {self.ffid}")
        self.write_back()
