"""Full finetuning of one exact slice of a model's block matrices.

    trained = attach_slice(model, ff="0.001", ffid=1, device="cuda")      # choose and attach; the model is frozen
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    ...; loss.backward(); optimizer.step(); trained.write_back()          # in any training loop
    trained.save_checkpoint("base.safetensors", "character1.safetensors")

`ff` is how much of every matrix trains, `ffid` which part: slices of different ids never share a value.
This file needs torch, numpy and nothing of its neighbours: copied into another trainer it works the same.

Slice contract, version 1. The values of a weight [out, in] form one line: G = 8, halved until it divides `out`; a unit
is L = out / G consecutive rows of one column; the columns are in an order hashed from the weight's name, and each lap
over them moves on by one of the G row groups, so that neighbouring units differ in column and rows.
Shapes: T tokens, G row groups, L rows of a unit, U units of a slice, M units of a slice in one row group, at most,
R rows of a matrix.
"""

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRACT = 1
ROW_GROUPS = 8
LEDGER_KEY = "wan_slices"
UNFINISHED = ".wan.tmp"  # what the names of half-written files end in: ours alone, since they are deleted
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARE = re.compile(r"\+?([0-9]+/[0-9]+|([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)")
_LONGEST_SHARE = 40  # characters
_LONGEST_NAME = 255  # characters
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_BLOCK_MATRIX = re.compile(r"(?:.*blocks\.\d+|.+\.\d+\..+)\.weight")
_PIECE = 1 << 22  # bytes that are read, patched and written in turn: few enough that the disk reads on meanwhile
_CHUNK = 1 << 18  # bytes; larger writes took five times as long (Linux 6.18, ext4)
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_PREFIX = re.compile(r"^(model\.|diffusion_model\.|pipe\.dit\.|transformer\.|module\.|dit\.)+")
Ff = str | int | float | Decimal | Fraction
NameOf = Callable[[str], str]  # from a name in a model or its file to the contract's
Files = str | Path | Sequence[str | Path]  # one safetensors file, or its shards
Patch = Callable[[Tensor, int], None]  # changes rows of a matrix on their way from a file; int: the first of them


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

    def change(self, rows: Tensor, first: int, new: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Puts new(values, k) in the place of the slice's values in `rows` [R, in] of the matrix, from row `first` on.

        k are the values' numbers in line order; they come group by group and not in that order.
        """
        flat, stop = rows.view(-1), first + len(rows)
        for top in range(first - first % self.rows, stop, self.rows):
            unit_M1 = (self.groups_U == top // self.rows).nonzero()
            row_R = torch.arange(max(first, top), min(stop, top + self.rows))
            at_MR = (row_R - first) * self.shape[1] + self.columns_U[unit_M1]
            k_MR = unit_M1 * self.rows + row_R - top - self.offset
            own_MR = (k_MR >= 0) & (k_MR < self.count)
            at, k = at_MR.masked_select(own_MR), k_MR.masked_select(own_MR)
            # flat[at] would wait for torch's other threads, which takes milliseconds where a core is busy.
            flat.index_copy_(0, at, new(flat.index_select(0, at), k))


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


def _moved(start: Tensor, difference: Tensor, strength: float) -> Tensor:
    """round(start + strength * difference) in start's dtype; an unmoved value keeps its bits (-0.0 + 0 would not)."""
    if strength == 0:
        return start
    return torch.where(difference == 0, start, torch.add(start.float(), difference, alpha=strength).to(start.dtype))


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
        self.strength = 1.0  # factor on the difference in the values in use
        self.fetch: Callable[[], Tensor] | None = None
        # Past half of the columns X itself is no larger than the gathered ones, and q, k and v share it.
        self.saves_whole_input = 2 * len(units.columns_U) > units.shape[1]
        self.unit_GM, self.place_U = (table.to(device) for table in _group_table(units))
        self.columns_GM = self.units.columns_U[self.unit_GM]

    @torch.no_grad()
    def write(self, weight: Tensor, values: Tensor | None = None) -> None:
        """Puts the values in use (`values`, where the caller has them) into `weight`: the matrix or a copy of it."""
        if values is None:
            values = _moved(self.start, self.difference, self.strength)
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
        grad_UL = torch.cat(products, dim=1).flatten(0, 1)[self.place_U]
        return self.units.cut(grad_UL).to(torch.float32, copy=True)

    def product(self, x: Tensor) -> Tensor:
        """The difference times the input, [..., out], in x's dtype: what it adds to the frozen linear."""
        units = self.units
        around = (units.offset, len(units.columns_U) * units.rows - units.offset - units.count)
        whole_UL = F.pad(self.strength * self.difference, around).view(-1, units.rows).to(x.dtype)
        table_GML = whole_UL.new_zeros(*self.unit_GM.shape, units.rows)
        table_GML = table_GML.view(-1, units.rows).index_copy(0, self.place_U, whole_UL).view_as(table_GML)
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


def _slice_forward(matrix: SlicedMatrix, x: Tensor) -> Tensor:
    weight, bias = matrix.linear.weight if matrix.fetch is None else matrix.fetch(), matrix.linear.bias
    # Backward runs without autocast, so the casts happen here, outside the Function.
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _SliceLinear.apply(x, weight, bias, matrix.difference, matrix)


def _beside_forward(matrix: SlicedMatrix, frozen_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = frozen_forward(x)
    return y + matrix.product(x.to(y.dtype))


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
        forward = (_beside_forward, matrix, matrix.linear.forward) if beside else (_slice_forward, matrix)
        matrix.linear.forward = functools.partial(*forward)
    return trained


class TrainedSlice(nn.Module):
    """A slice attached to a model: its parameters (fp32 differences from the start values), its values, its files."""

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
        if resident:
            # All of them in one go: a GPU would spend more time on starting small operations than on doing them.
            starts, differences = torch.cat([m.start for m in resident]), torch.cat([m.difference for m in resident])
            values = _moved(starts, differences, resident[0].strength)
            for matrix, own in zip(resident, values.split([m.units.count for m in resident]), strict=True):
                matrix.write(matrix.linear.weight, own)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Inside, the values in use are round(start + strength * difference): at 0 those of the model at the start.

        Enter and leave it between steps, never between a forward pass and its backward pass.
        """
        self._set_strength(strength)
        try:
            yield
        finally:
            self._set_strength(1.0)

    def _set_strength(self, strength: float) -> None:
        for matrix in self.matrices.values():
            matrix.strength = strength
        self.write_back()

    def reduce_gradients(self) -> None:
        """Averages the slice's gradients over the processes of torch.distributed, before clipping, on real steps."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad for parameter in self.parameters()])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for parameter, grad in zip(self.parameters(), flat.split([p.numel() for p in self.parameters()]), strict=True):
            parameter.grad.copy_(grad)

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

    def save_checkpoint(
        self, base: Files, path: str | Path, metadata: Mapping | None = None, concept: str = "", steps: int = 0
    ) -> None:
        """Writes the base (a safetensors file, or its shards) with the slice in use to `path`, streaming it once.

        Names, dtypes, order and metadata are the base's; `metadata` and this slice's line in the ledger are added.
        A save that is interrupted leaves whatever stood at `path`. SliceError if `concept` cannot be in a ledger.
        """
        check_concept(concept)
        refuse_base(path, base)
        tensors, known = read_header(base, self.name_of)
        start, final = self.stored_values(base)
        ledger = _extended(read_ledger(known), self.ledger_entry(base, start, concept, steps))
        told = {**known, **(metadata or {}), LEDGER_KEY: json.dumps(ledger)}
        write_safetensors(path, tensors, told, stream(tensors.values(), self.patches(start, final)))

    def save_slice(
        self, base: Files, path: str | Path, metadata: Mapping | None = None, concept: str = "", steps: int = 0
    ) -> None:
        """Writes the slice alone: its final values in the base's dtype, in line order, and its line in the ledger."""
        check_concept(concept)
        refuse_base(path, base)
        start, final = self.stored_values(base)
        known = read_ledger(read_header(base)[1])
        ledger = _extended(known, self.ledger_entry(base, start, concept, steps))[-1:]
        write_slice(path, final, {**(metadata or {}), LEDGER_KEY: json.dumps(ledger)})

    def stored_values(self, base: Files) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the base's files hold of the slice, and what a checkpoint will: by name, on the CPU."""
        dtypes = self.stored_dtypes(base)
        start = {name: matrix.start.cpu() for name, matrix in self.matrices.items()}
        cast = [name for name, values in start.items() if dtypes[name] != values.dtype]  # to be trained
        start |= read_slice(base, {name: self.matrices[name].units.to("cpu") for name in cast}, self.name_of)
        return start, {n: _moved(start[n], m.difference.detach().cpu(), 1.0) for n, m in self.matrices.items()}

    def stored_dtypes(self, base: Files) -> dict[str, torch.dtype]:
        """The dtype of each matrix in the base's files; SliceError where one is missing, or cannot take a slice."""
        stored = {tensor.name: tensor.dtype for tensor in read_header(base, self.name_of)[0].values()}
        for name in self.matrices:
            if stored.get(name) not in DTYPES:
                found = stored.get(name, "missing")
                raise SliceError(f"{name} is {found} in the base file: slices are saved into bf16, fp16 or fp32")
        return {name: DTYPES[stored[name]] for name in self.matrices}

    def patches(self, start: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> dict[str, Patch]:
        """What puts `final` in the place of `start` into the base's matrices; SliceError where they hold otherwise."""
        units = {name: matrix.units.to("cpu") for name, matrix in self.matrices.items()}
        return {n: functools.partial(_replace, n, own, start[n], final[n]) for n, own in units.items()}

    def ledger_entry(self, base: Files, start: Mapping[str, Tensor], concept: str, steps: int) -> dict:
        """This slice's line in the ledger of a file; `start` is what the base's files hold of it."""
        own = {"contract": CONTRACT, "ff": self.ff, "ffid": self.ffid, "name": concept, "steps": steps}
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        hashed = slice_digest({name: value_digest(values) for name, values in start.items()})
        return {**own, "date": date, "base": base_identity(base, self.name_of), "start": hashed}


# ---- files: read as they lie, written whole or not at all


class StoredTensor(NamedTuple):
    """A tensor in a file, or to be written: its contract name, its bytes, its dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: list[int]
    size: int  # in bytes
    file: str | Path | None = None
    begin: int = 0  # of its bytes in the file


def _listed(base: Files) -> Sequence[str | Path]:
    return [base] if isinstance(base, str | Path) else base


def read_ledger(metadata: Mapping[str, str]) -> list[dict]:
    """The slices that a checkpoint's safetensors metadata says it holds, oldest first."""
    return json.loads(metadata.get(LEDGER_KEY, "[]"))


def is_concept_name(text: str) -> bool:
    """Whether a ledger may name a concept so: 255 characters at the most, none that steers a terminal."""
    refused = (character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs"))
    return len(text) <= _LONGEST_NAME and all(character in _JOINERS for character in refused)


def check_concept(name: str) -> None:
    """SliceError if no ledger may name a concept so."""
    if not is_concept_name(name):
        raise SliceError(
            f"the name {name[:40]!a} cannot be a concept's: {_LONGEST_NAME} characters are allowed, those that steer a "
            "terminal are not"
        )


def _extended(ledger: Sequence[dict], entry: dict) -> list[dict]:
    """The ledger with `entry` as its newest; a slice that was trained further keeps its first start, adds up steps."""
    slices = [(one["contract"], exact_fraction(one["ff"]), one["ffid"]) for one in (*ledger, entry)]
    earlier = [one for one, which in zip(ledger, slices, strict=False) if which == slices[-1]]
    if earlier:
        steps = entry["steps"] + sum(one["steps"] for one in earlier)
        entry = {**entry, "steps": steps, "start": earlier[0].get("start")}
    return [*(one for one in ledger if one not in earlier), entry]


def read_header(base: Files, name_of: NameOf = contract_name) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of the files by its stored name, in the order of their bytes; their metadata."""
    tensors, metadata = {}, {}
    for path in _listed(base):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path) - 8:
                raise SliceError(f"{path} is not a whole safetensors file")
            header = json.loads(file.read(length))
        metadata |= header.pop("__metadata__", {})
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            stored = (name_of(key), entry["dtype"], entry["shape"], end - begin)
            tensors[key] = StoredTensor(*stored, path, 8 + length + begin)
    return tensors, metadata


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether slices are cut from a file's tensor of this contract name, as far as name and shape tell."""
    return len(shape) == 2 and _BLOCK_MATRIX.fullmatch(name) is not None


def base_identity(base: Files, name_of: NameOf = contract_name) -> str:
    """SHA-256 over every tensor that no slice can touch: the same all along a chain of concepts on one base."""
    digest = hashlib.sha256()
    for tensor in sorted(read_header(base, name_of)[0].values()):
        if not is_block_matrix(tensor.name, tensor.shape):
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for piece in stream([tensor]):
                digest.update(piece)
    return digest.hexdigest()


def slice_digest(digests: Mapping[str, bytes]) -> str:
    """SHA-256 over the digests of a slice's values by matrix: its start tells a merged base from the slice's own."""
    return hashlib.sha256(b"".join(name.encode() + digests[name] for name in sorted(digests))).hexdigest()


def value_digest(values: Tensor) -> bytes:
    """SHA-256 of the bytes of a matrix's values."""
    return hashlib.sha256(values.view(torch.uint8).numpy()).digest()


def stream(tensors: Iterable[StoredTensor], patches: Mapping[str, Patch] | None = None) -> Iterator[memoryview]:
    """The bytes of the tensors in order, patched by contract name; each piece lasts until the next one."""
    tensors, patches = list(tensors), patches or {}
    if missing := patches.keys() - {tensor.name for tensor in tensors}:
        raise SliceError(f"the base has no {min(missing)}: it is not the base of this slice")
    for tensor in tensors:
        patch = patches.get(tensor.name)
        row = tensor.size // tensor.shape[0] if patch else 1  # bytes that stay together
        step = max(_PIECE // row, 1) * row
        buffer = memoryview(bytearray(min(step, tensor.size)))
        with open(tensor.file, "rb") as source:
            source.seek(tensor.begin)
            for begin in range(0, tensor.size, step):
                piece = buffer[: tensor.size - begin]
                if source.readinto(piece) < len(piece):
                    raise SliceError(f"{tensor.file} is truncated")
                if patch:
                    rows = torch.frombuffer(piece, dtype=DTYPES[tensor.dtype]).view(-1, *tensor.shape[1:])
                    patch(rows, begin // row)
                yield piece


def read_slice(base: Files, units: Mapping[str, SliceUnits], name_of: NameOf = contract_name) -> dict[str, Tensor]:
    """What the files hold of a slice, by contract name in line order."""
    tensors = [tensor for tensor in read_header(base, name_of)[0].values() if tensor.name in units]
    values = {t.name: torch.empty(units[t.name].count, dtype=DTYPES[t.dtype]) for t in tensors}

    def record(name: str, rows: Tensor, first: int) -> None:
        units[name].change(rows, first, lambda stored, k: values[name].index_copy_(0, k, stored).index_select(0, k))

    for _ in stream(tensors, {name: functools.partial(record, name) for name in units}):
        pass
    return values


def _replace(name: str, units: SliceUnits, start: Tensor, final: Tensor, rows: Tensor, first: int) -> None:
    def checked(values: Tensor, k: Tensor) -> Tensor:
        if not torch.equal(values.view(torch.uint8), start.index_select(0, k).view(torch.uint8)):
            raise SliceError(f"{name} in the base file is not what this slice was trained on")
        return final.index_select(0, k)

    units.change(rows, first, checked)


def write_slice(path: str | Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a slice file: the final values of each matrix, in line order, by contract name."""
    names, ordered = {dtype: name for name, dtype in DTYPES.items()}, [(name, values[name]) for name in sorted(values)]
    tensors = {name: StoredTensor(name, names[own.dtype], list(own.shape), own.nbytes) for name, own in ordered}
    write_safetensors(path, tensors, metadata, (own.view(torch.uint8).numpy() for _, own in ordered))


def refuse_base(path: str | Path, base: Files) -> None:
    """SliceError if `path` is one of the base's files, which are read while it is written."""
    if any(os.path.exists(path) and os.path.samefile(path, file) for file in _listed(base)):
        raise SliceError(f"{path} is the base itself: write to another file")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], chunks: Iterable
) -> None:
    """Writes tensors, whose bytes `chunks` gives in their order, to `path`."""
    # Sorted, so that slices give one file in whatever order they came.
    table, size = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
    for key, tensor in tensors.items():
        offsets = [size, size := size + tensor.size]
        table[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(Path(path), 8 + len(text) + size) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            for at in range(0, len(chunk), _CHUNK):
                file.write(chunk[at : at + _CHUNK])


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator:
    """A binary file that takes the name `path` once it is complete and on disk, its folder made if missing.

    SliceError if it cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)  # what a killed run left there takes room
        try:
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise OSError(f"it needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            if os.name == "posix":  # a rename is durable once its folder is; Windows opens no folder
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise SliceError(f"{path} could not be written ({error}); older files are as they were") from None


# ---- musubi-tuner: --network_module selective_finetune --network_args ff=0.001 ffid=1

prepare_network = True  # that the module has this name is enough for network.prepare_network(flags) to be called


def create_arch_network(multiplier, network_dim, network_alpha, vae, text_encoders, unet, neuron_dropout=None, **args):
    """The SliceNetwork that --network_args ask for: `ff`, `ffid`; `save` checkpoint or slice; `allow_overlap` yes."""
    choices = {"save": ("checkpoint", "slice"), "allow_overlap": ("no", "yes")}
    known = {"ff", "ffid"} <= args.keys() <= {"ff", "ffid", *choices} and args.get("ffid", "").isdecimal()
    if not known or any(args.get(key, allowed[0]) not in allowed for key, allowed in choices.items()):
        given = " ".join(f"{key}={value}" for key, value in args.items())
        raise SliceError(
            f"--network_args {given}: it takes ff=0.001 ffid=1 (a number) and, if wanted, save=slice, allow_overlap=yes"
        )
    if network_dim is not None or neuron_dropout is not None:
        raise SliceError("a slice has no rank and no dropout: leave out --network_dim and --network_dropout")
    check_slice(args["ff"], int(args["ffid"]))
    allow_overlap = args.get("allow_overlap") == "yes"
    return SliceNetwork(args["ff"], int(args["ffid"]), args.get("save", "checkpoint"), allow_overlap)


def create_arch_network_from_weights(*_, **__):
    """What --base_weights and --dim_from_weights call before there is a network."""
    raise SliceError(
        "--base_weights and --dim_from_weights do not go with a slice, which trains on the values of the --dit file: "
        "merge the LoRA into a file first"
    )


def _refuse_overlap(ledger: Sequence[Mapping], ff: Ff, ffid: int) -> None:
    share = exact_fraction(ff)
    for entry in ledger:
        theirs = exact_fraction(entry["ff"])
        if max((entry["ffid"] - 1) * theirs, (ffid - 1) * share) < min(entry["ffid"] * theirs, ffid * share):
            held = f"{entry['name']} (ff {entry['ff']} ffid {entry['ffid']})"
            raise SliceError(f"--dit holds {held} in the values of ff {ff} ffid {ffid}: take another ffid")


class SliceNetwork(nn.Module):
    """A slice that musubi-tuner's trainer drives by the calls that it makes to a LoRA network.

    Each weight is written when it is used, because a block that is swapped may be on the move at any other time. Where
    the trainer uses copies (H2D-only swap) or fp8, the difference is multiplied beside the frozen linears.
    """

    def __init__(self, ff: str, ffid: int, save: str, allow_overlap: bool):
        super().__init__()
        self.ff, self.ffid, self.save, self.allow_overlap = ff, ffid, save, allow_overlap
        self.written: set[str] = set()  # weights that hold this step's values

    def prepare_network(self, args) -> None:
        flags = vars(args)
        refused = {
            "dit_high_noise": "train each expert in a run of its own",
            "network_weights": "go on with --resume, or give the checkpoint as --dit",
            "scale_weight_norms": "a slice has no norm to scale",
        }
        for flag, reason in refused.items():
            if flags.get(flag):
                raise SliceError(f"--{flag} does not go with a slice: {reason}")
        check_concept(str(args.output_name))
        path = Path(args.dit)
        shards = re.sub(r"-\d{5}-of-(\d{5})", r"-*-of-\1", path.name)
        self.base = sorted(path.parent.glob(glob.escape(path.name) if shards == path.name else shards))
        refuse_base(Path(args.output_dir, f"{args.output_name}.safetensors"), self.base)
        if not self.allow_overlap:
            _refuse_overlap(read_ledger(read_header(self.base)[1]), self.ff, self.ffid)
        self.beside = bool(flags.get("block_swap_h2d_only") or flags.get("fp8_base"))

    def apply_to(self, text_encoders, unet: nn.Module, apply_text_encoder=False, apply_unet=True) -> None:
        # With block swap some blocks are still on the CPU; what lies around them is on the training device.
        device = next((p.device for p in unet.parameters() if p.device.type != "cpu"), torch.device("cpu"))
        self.trained = attach_slice(unet, self.ff, self.ffid, device, beside=self.beside)
        self.trained.stored_dtypes(self.base)  # so that what cannot be saved is told now
        for matrix in () if self.beside else self.trained.matrices.values():
            matrix.linear.forward = functools.partial(self._write_and_forward, matrix)

    def _write_and_forward(self, matrix: SlicedMatrix, x: Tensor) -> Tensor:
        # No call tells that an optimizer stepped before samples are drawn, so passes without gradients always write.
        if matrix.name not in self.written or not torch.is_grad_enabled():
            matrix.write(matrix.linear.weight)
            self.written.add(matrix.name)
        return _slice_forward(matrix, x)

    def on_step_start(self) -> None:
        self.written.clear()

    def prepare_optimizer_params(self, unet_lr: float | None = None, **others) -> tuple[list[dict], list[str]]:
        return [{"params": list(self.parameters()), "lr": unet_lr}], ["slice"]

    get_trainable_params = nn.Module.parameters

    def _has_nothing_to_do(self, *_) -> None:
        pass

    enable_gradient_checkpointing = prepare_grad_etc = on_epoch_start = _has_nothing_to_do

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """A checkpoint (or slice file) in the base's dtypes: the trainer's `dtype` is that of LoRA files."""
        metadata = dict(metadata or {})
        name, steps = metadata.get("ss_output_name", Path(file).stem), int(metadata.get("ss_steps", 0))
        if "modelspec.architecture" in metadata:
            metadata["modelspec.architecture"] = metadata["modelspec.architecture"].removesuffix("/lora")
        save = self.trained.save_slice if self.save == "slice" else self.trained.save_checkpoint
        save(self.base, file, metadata, concept=name, steps=steps)
