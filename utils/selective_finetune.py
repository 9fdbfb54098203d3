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
Shapes: T tokens, G row groups, L rows of a unit, U units of a slice, M units of a slice in one row group, at most.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTRACT = 1
ROW_GROUPS = 8
LEDGER_KEY = "wan_slices"
_WRAPPERS = re.compile(
    r"^(model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|transformer\.|module\.|model\.|dit\.)+(?=blocks\.)"
    r"|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)
Ff = str | int | float | Decimal | Fraction


class SliceError(ValueError):
    """A slice that does not exist or does not fit; its message is one line with what is allowed."""


# ---- the contract: which values a slice holds


def exact_fraction(ff: Ff) -> Fraction:
    """`ff` as the decimal that was typed, with 0 < ff <= 1; a float is read through its shortest decimal."""
    try:
        exact = ff if isinstance(ff, Fraction) else Decimal(str(ff))
        allowed = 0 < exact <= 1 and (isinstance(ff, Fraction) or exact.adjusted() >= -30)
    except InvalidOperation:
        allowed = False
    if not allowed:
        raise SliceError(f"ff is {ff}: it is the share of the model that trains, a decimal above 0 and up to 1")
    return Fraction(exact)


def ids_available(ff: Ff) -> int:
    """How many slices of `ff` there are: ffid runs from 1 to this."""
    return int(1 / exact_fraction(ff))


def check_slice(ff: Ff, ffid: int) -> None:
    """Raises SliceError with the allowed range where (ff, ffid) names no slice."""
    last = ids_available(ff)
    if not (isinstance(ffid, int) and 1 <= ffid <= last):
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

    def __init__(self, name: str, linear: nn.Linear, units: SliceUnits, start: Tensor):
        device = start.device
        self.name = name
        self.linear = linear
        self.units = units.to(device)
        self.start = start  # [count], a part of the whole slice's
        self.difference = nn.Parameter(torch.zeros(units.count, dtype=torch.float32, device=device))
        self.strength = 1.0  # factor on the difference in the values in use
        self.fetch: Callable[[], Tensor] | None = None
        # Past half of the columns X itself is no larger than the gathered ones, and q, k and v share it.
        self.saves_whole_input = 2 * len(units.columns_U) > units.shape[1]
        unit_GM, place_U = _group_table(units)
        self.place_U = place_U.to(device)
        # Where the columns of each row group's units are in what saved_input() keeps.
        self.saved_GM = (units.columns_U[unit_GM] if self.saves_whole_input else unit_GM).to(device)

    @torch.no_grad()
    def write(self, weight: Tensor, values: Tensor | None = None) -> None:
        """Puts the values in use (`values`, where the caller has them) into `weight`: the matrix or a copy of it."""
        if values is None:
            values = _moved(self.start, self.difference, self.strength)
        self.units.to(weight.device).write(weight, values)

    @torch.no_grad()
    def patch(self, stored: Tensor) -> None:
        """Moves the slice in `stored`, the base file's own tensor on the CPU, by what was learned."""
        units = self.units.to("cpu")
        values, start = units.cut(units.read(stored)), self.start.to("cpu", stored.dtype)
        same_bits = torch.equal(values.view(torch.uint8), start.view(torch.uint8))
        if stored.dtype == self.linear.weight.dtype and not same_bits:
            raise SliceError(f"{self.name} in the base file is not what this slice was trained on")
        units.write(stored, _moved(values, self.difference.cpu(), self.strength))

    def saved_input(self, x: Tensor) -> Tensor:
        """What backward needs of the input: its columns in the slice."""
        return x if self.saves_whole_input else x[..., self.units.columns_U]

    def gradient(self, saved: Tensor, dy: Tensor) -> Tensor:
        """The slice's values of dY^T X, fp32 in line order: one product per row group, so no more than its units."""
        dy_GTL = dy.reshape(-1, len(self.saved_GM), self.units.rows).transpose(0, 1)
        # No more columns at a time than X has: the units of a large slice name each of them several times.
        grad_GML = torch.cat(
            [
                torch.bmm(saved[..., part_GM].reshape(-1, *part_GM.shape).permute(1, 2, 0), dy_GTL)
                for part_GM in self.saved_GM.split(max(1, self.units.shape[1] // len(self.saved_GM)), dim=1)
            ],
            dim=1,
        )
        grad_UL = grad_GML.flatten(0, 1)[self.place_U]
        return self.units.cut(grad_UL).to(torch.float32, copy=True)


def _group_table(units: SliceUnits) -> tuple[Tensor, Tensor]:
    """Unit numbers [G, M] by row group, where short groups repeat unit 0, and each unit's place [U] in that table."""
    groups = units.shape[0] // units.rows
    counts = torch.bincount(units.groups_U, minlength=groups)
    most = int(counts.max())
    sorted_U = torch.argsort(units.groups_U, stable=True)
    place_U = torch.empty_like(sorted_U)
    place_U[sorted_U] = torch.cat([g * most + torch.arange(n) for g, n in enumerate(counts.tolist())])
    unit_GM = torch.zeros(groups, most, dtype=torch.int64)
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


# ---- the slice of a model


def contract_name(name: str) -> str:
    """A weight's name in the contract: without the prefixes and wrapper parts that trainers put around Wan's names."""
    return _WRAPPERS.sub("", name)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the model's lists of repeated blocks, by module name."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{blocks}.") for blocks in lists)
    }


def attach_slice(
    model: nn.Module,
    ff: Ff,
    ffid: int,
    device: str | torch.device | None = None,
    linears: Mapping[str, nn.Linear] | None = None,
    name_of: Callable[[str], str] = contract_name,
) -> "TrainedSlice":
    """Freezes the model, makes slice (ff, ffid) of its block matrices trainable, and returns it.

    `device` holds the differences (the weights' own by default). `linears` (module name -> module) are the matrices to
    slice, those of repeated blocks by default; `name_of` turns a weight's name in the model into its contract name.
    """
    check_slice(ff, ffid)
    model.requires_grad_(False)
    chosen = []
    for name, linear in (block_linears(model) if linears is None else linears).items():
        if not linear.weight.is_floating_point() or linear.weight.dtype.itemsize < 2:
            raise SliceError(f"{name} holds {linear.weight.dtype}: slices train on bf16, fp16 or fp32 weights")
        units = slice_units(name_of(f"{name}.weight"), linear.weight.shape, ff, ffid)
        if units.count:
            chosen.append((name_of(f"{name}.weight"), linear, units))
    total = sum(p.numel() for p in model.parameters())
    if not chosen:
        raise SliceError(f"ff is {ff}: no matrix of this model ({total:,} values) is large enough to hold such a slice")
    return TrainedSlice(ff, ffid, chosen, torch.device(device or chosen[0][1].weight.device), total)


class TrainedSlice:
    """A slice attached to a model: its parameters, its values, its files."""

    def __init__(
        self, ff: Ff, ffid: int, chosen: Sequence[tuple[str, nn.Linear, SliceUnits]], device: torch.device, total: int
    ):
        self.ff = str(ff)
        self.ffid = ffid
        self.total = total  # values of the whole model
        self.version = 0  # of the values in use: goes up whenever they change
        counts = [units.count for _, _, units in chosen]
        dtype = functools.reduce(torch.promote_types, (linear.weight.dtype for _, linear, _ in chosen))
        self.start = torch.empty(sum(counts), dtype=dtype, device=device)  # in one piece, to be rounded in one go
        self.matrices = {}
        for (name, linear, units), start in zip(chosen, self.start.split(counts), strict=True):
            on_weight = units.to(linear.weight.device)
            start.copy_(on_weight.cut(on_weight.read(linear.weight.detach())))
            self.matrices[name] = matrix = SlicedMatrix(name, linear, units, start)
            linear.forward = functools.partial(_slice_forward, matrix)

    @property
    def count(self) -> int:
        """How many values train."""
        return self.start.numel()

    def parameters(self) -> list[nn.Parameter]:
        """The differences from the start values: fp32 leaves, one per matrix, for any optimizer."""
        return [matrix.difference for matrix in self.matrices.values()]

    @torch.no_grad()
    def write_back(self) -> None:
        """Puts the values in use into the resident weights; to be called after every optimizer step."""
        self.version += 1
        matrices = list(self.matrices.values())
        if any(matrix.fetch is None for matrix in matrices):
            values = _moved(self.start, torch.cat(self.parameters()), matrices[0].strength)
            for matrix, own in zip(matrices, values.split([m.units.count for m in matrices]), strict=True):
                if matrix.fetch is None:
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

    def state_dict(self) -> dict:
        """The differences by contract name, with the slice they belong to."""
        differences = {name: matrix.difference.detach() for name, matrix in self.matrices.items()}
        return {"contract": CONTRACT, "ff": self.ff, "ffid": self.ffid, "differences": differences}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Takes up the differences of state_dict() and puts them to use; SliceError where it is another slice's."""
        theirs = (state["contract"], exact_fraction(state["ff"]), state["ffid"])
        if theirs != (CONTRACT, exact_fraction(self.ff), self.ffid):
            raise SliceError(
                f"the state holds ff {state['ff']} ffid {state['ffid']}, not ff {self.ff} ffid {self.ffid}"
            )
        if {n: d.shape for n, d in state["differences"].items()} != {
            n: m.difference.shape for n, m in self.matrices.items()
        }:
            raise SliceError("the state holds the slice of a model with other matrices")
        for name, difference in state["differences"].items():
            self.matrices[name].difference.copy_(difference)
        self.write_back()

    def save_checkpoint(
        self,
        base: str | Path | Sequence[str | Path],
        path: str | Path,
        metadata: Mapping[str, str] | None = None,
        concept: str = "",
        steps: int = 0,
    ) -> None:
        """Writes the base (one safetensors file, or its shards) with the slice in use to `path`, streaming it once.

        Names, dtypes, order and metadata are the base's; `metadata` and this slice's line in the ledger are added.
        A file that is interrupted leaves whatever stood at `path`.
        """
        bases = [Path(base)] if isinstance(base, str | Path) else [Path(file) for file in base]
        entry = {
            "contract": CONTRACT,
            "ff": self.ff,
            "ffid": self.ffid,
            "name": concept,
            "steps": steps,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }
        patches = {name: matrix.patch for name, matrix in self.matrices.items()}
        _write_patched(bases, Path(path), patches, metadata or {}, entry)


# ---- files


def read_ledger(metadata: Mapping[str, str]) -> list[dict]:
    """The slices that a checkpoint's safetensors metadata says it holds, oldest first."""
    return json.loads(metadata.get(LEDGER_KEY, "[]"))


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24


def _write_patched(
    bases: Sequence[Path], path: Path, patches: Mapping[str, Callable[[Tensor], None]], metadata: Mapping, entry: dict
) -> None:
    if path.exists() and any(path.samefile(base) for base in bases):
        raise SliceError(f"{path} is the base itself: write the checkpoint to another file")
    headers = [_read_header(base) for base in bases]
    missing = patches.keys() - {contract_name(key) for _, header in headers for key in header}
    if missing:
        raise SliceError(f"{bases[0]} has no {min(missing)}: it is not the base of this slice")
    known = {key: value for _, header in headers for key, value in header.get("__metadata__", {}).items()}
    ledger = json.dumps([*read_ledger(known), entry])
    with _whole_or_nothing(path) as out:
        out.write(_merged_header([header for _, header in headers], {**known, **metadata, LEDGER_KEY: ledger}))
        for base, (data_start, header) in zip(bases, headers, strict=True):
            with base.open("rb") as source:
                for key, tensor in _in_file_order(header):
                    source.seek(data_start + tensor["data_offsets"][0])
                    _copy_tensor(source, out, tensor, patches.get(contract_name(key)))


def _read_header(path: Path) -> tuple[int, dict]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise SliceError(f"{path} is not a whole safetensors file")
        return 8 + size, json.loads(file.read(size))


def _in_file_order(header: dict) -> list[tuple[str, dict]]:
    tensors = [item for item in header.items() if item[0] != "__metadata__"]
    return sorted(tensors, key=lambda item: item[1]["data_offsets"])


def _merged_header(headers: Sequence[dict], metadata: Mapping[str, str]) -> bytes:
    merged, position = {"__metadata__": dict(metadata)}, 0
    for header in headers:
        for key, tensor in _in_file_order(header):
            size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
            merged[key] = {**tensor, "data_offsets": [position, position + size]}
            position += size
    text = json.dumps(merged, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy_tensor(source, out, tensor: dict, patch: Callable[[Tensor], None] | None) -> None:
    left = tensor["data_offsets"][1] - tensor["data_offsets"][0]
    if patch is None:
        while left:
            out.write(chunk := source.read(min(left, _CHUNK)))
            left -= len(chunk)
        return
    stored = bytearray(source.read(left))
    patch(torch.frombuffer(stored, dtype=_DTYPES[tensor["dtype"]]).view(tensor["shape"]))
    out.write(stored)


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator:
    """A binary file that takes the name `path` once it is complete and on disk."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # a rename is durable once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
