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
Shapes: T tokens, G row groups, L rows of a unit, U units of a slice.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
        columns_U, groups_U = self.columns_U.to(device), self.groups_U.to(device)
        return SliceUnits(self.shape, self.rows, columns_U, groups_U, self.offset, self.count)


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
    flat = (rows_UL * units.shape[1] + units.columns_U[:, None]).reshape(-1)
    return flat[units.offset : units.offset + units.count]


# ---- the slice of one matrix: its values, its gradient


def _read_units(weight: Tensor, units: SliceUnits) -> Tensor:
    return weight.view(-1, units.rows, units.shape[1])[units.groups_U, :, units.columns_U]


def _write_units(weight: Tensor, units: SliceUnits, values_UL: Tensor) -> None:
    weight.view(-1, units.rows, units.shape[1])[units.groups_U, :, units.columns_U] = values_UL


def _moved(start: Tensor, difference: Tensor) -> Tensor:
    """round(start + difference) in start's dtype; an unmoved value keeps its bits (-0.0 + 0 would not)."""
    return torch.where(difference == 0, start, (start.float() + difference).to(start.dtype))


class SlicedMatrix:
    """The trained slice of one weight: where it lies, what it held at the start, how far it has moved."""

    def __init__(self, name: str, linear: nn.Linear, units: SliceUnits, device: torch.device):
        self.name = name
        self.linear = linear
        self.fetch: Callable[[], Tensor] | None = None  # a streamed weight on the device, never kept
        self.start_UL = _read_units(linear.weight.detach(), units.to(linear.weight.device)).to(device)
        self.units = units.to(device)
        self.difference = nn.Parameter(torch.zeros(units.count, dtype=torch.float32, device=device))
        # Past half of the columns X itself is no larger than the gathered ones, and q, k and v share it.
        self.saves_whole_input = 2 * len(units.columns_U) > units.shape[1]
        self.by_group_U = torch.argsort(self.units.groups_U, stable=True)
        self.columns_by_group_U = self.units.columns_U[self.by_group_U]
        counts = torch.bincount(units.groups_U).tolist()
        ends = np.cumsum(counts).tolist()
        self.group_runs = [(g, end - n, end) for g, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]

    def cut(self, values_UL: Tensor) -> Tensor:
        """The slice's own values, in line order: a view of its whole units' without what they hold beyond it."""
        return values_UL.view(-1)[self.units.offset : self.units.offset + self.units.count]

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Puts the values in use, round(start + difference), into `weight`: the matrix or a copy of it."""
        values_UL = self.start_UL.clone()
        self.cut(values_UL).copy_(_moved(self.cut(self.start_UL), self.difference))
        _write_units(weight, self.units, values_UL)

    @torch.no_grad()
    def patch(self, stored: Tensor) -> None:
        """Moves the slice in `stored`, the base file's own tensor on the CPU, by what was learned."""
        units = self.units.to("cpu")
        values_UL = _read_units(stored, units)
        start_UL = self.start_UL.cpu()
        if stored.dtype == start_UL.dtype and not _same_bits(values_UL, start_UL):
            raise SliceError(f"{self.name} in the base file is not what this slice was trained on")
        self.cut(values_UL).copy_(_moved(self.cut(values_UL), self.difference.cpu()))
        _write_units(stored, units, values_UL)

    def weight_in_use(self) -> Tensor:
        """The weight with the slice's values in use."""
        return self.linear.weight if self.fetch is None else self.fetch()

    def saved_input(self, x: Tensor) -> Tensor:
        """What backward needs of the input: its columns in the slice, group by group."""
        return x if self.saves_whole_input else x.index_select(-1, self.columns_by_group_U)

    def gradient(self, saved: Tensor, dy: Tensor) -> Tensor:
        """The slice's values of dY^T X, fp32 in line order: per row group, so that only its units are computed."""
        x_TU, dy_TO = saved.flatten(0, -2), dy.flatten(0, -2)
        rows = self.units.rows
        grad_UL = torch.empty(self.start_UL.shape, dtype=torch.float32, device=dy.device)
        for group, begin, end in self.group_runs:
            columns = self.columns_by_group_U[begin:end]
            x_TR = x_TU.index_select(1, columns) if self.saves_whole_input else x_TU[:, begin:end]
            grad_UL[self.by_group_U[begin:end]] = (x_TR.T @ dy_TO[:, group * rows : (group + 1) * rows]).float()
        return self.cut(grad_UL)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class _SliceLinear(torch.autograd.Function):
    """F.linear whose weight gradient exists for the slice alone."""

    @staticmethod
    def forward(ctx, x, bias, difference, matrix: SlicedMatrix):
        ctx.matrix = matrix
        ctx.save_for_backward(matrix.saved_input(x) if ctx.needs_input_grad[2] else None)
        return F.linear(x, matrix.weight_in_use().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        dx = dy @ ctx.matrix.weight_in_use().to(dy.dtype) if ctx.needs_input_grad[0] else None
        grad = ctx.matrix.gradient(saved, dy) if ctx.needs_input_grad[2] else None
        return dx, None, grad, None


def _slice_forward(matrix: SlicedMatrix, x: Tensor) -> Tensor:
    bias = matrix.linear.bias
    # Backward runs without autocast, so the casts happen here, outside the Function.
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _SliceLinear.apply(x, bias, matrix.difference, matrix)
    return _SliceLinear.apply(x, bias, matrix.difference, matrix)


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
    matrices = []
    for name, linear in (block_linears(model) if linears is None else linears).items():
        if not linear.weight.is_floating_point() or linear.weight.dtype.itemsize < 2:
            raise SliceError(f"{name} holds {linear.weight.dtype}: slices train on bf16, fp16 or fp32 weights")
        units = slice_units(name_of(f"{name}.weight"), linear.weight.shape, ff, ffid)
        if units.count:
            matrices.append(SlicedMatrix(name_of(f"{name}.weight"), linear, units, device or linear.weight.device))
    total = sum(p.numel() for p in model.parameters())
    if not matrices:
        raise SliceError(f"ff is {ff}: no matrix of this model ({total:,} values) is large enough to hold such a slice")
    for matrix in matrices:
        matrix.linear.forward = functools.partial(_slice_forward, matrix)
    return TrainedSlice(ff, ffid, matrices, total)


class TrainedSlice:
    """A slice attached to a model: its parameters, its values, its files."""

    def __init__(self, ff: Ff, ffid: int, matrices: Sequence[SlicedMatrix], total: int):
        self.ff = str(ff)
        self.ffid = ffid
        self.total = total  # values of the whole model
        self.matrices = {matrix.name: matrix for matrix in matrices}
        self.version = 0  # of the values in use

    @property
    def count(self) -> int:
        """How many values train."""
        return sum(matrix.units.count for matrix in self.matrices.values())

    def parameters(self) -> list[nn.Parameter]:
        """The differences from the start values: fp32 leaves, one per matrix, for any optimizer."""
        return [matrix.difference for matrix in self.matrices.values()]

    def write_back(self) -> None:
        """Puts the values in use into the resident weights; to be called after every optimizer step."""
        for matrix in self.matrices.values():
            if matrix.fetch is None:
                matrix.write(matrix.linear.weight)
        self.version += 1

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
