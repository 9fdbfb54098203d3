"""What choosing a slice of a full-size model costs, and attaching it: seconds and bytes."""

import copy
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn

from utils.selective_finetune import attach_slice, block_linears, slice_indices, slice_units
from wan.configs import WanConfig
from wan.model import WanBlock, WanModel


def choice_table(config: WanConfig, ffs: Sequence[str]) -> list[str]:
    """Choosing a slice of every matrix of `config`, and attaching it to a bf16 model of that shape."""
    shapes = matrix_shapes(config)
    lines = [f"| {len(shapes)} matrices of Wan 14B | seconds | MB at the peak | |", "|---|---|---|---|"]
    for ff in ffs:
        for what, select in (("choose the units", slice_units), ("every position, int64", slice_indices)):
            choice = choose(shapes, ff, select)
            lines.append(
                f"| {what}, ff {ff} | {choice.seconds:.2f} | {choice.peak / 1e6:.1f} | {choice.values:,} values |"
            )
        a = attach(config, ff)
        stays = f"{a.grown / 1e6:.1f} MB stay ({a.grown / a.predicted:.3f} of predicted)"
        beside = f"beside a model of {a.model_bytes / 1e9:.1f} GB"
        lines.append(f"| attach, ff {ff} | {a.seconds:.2f} | {a.peak / 1e6:.1f} | {stays} {beside} |")
    return lines


@dataclass(frozen=True)
class Choice:
    """Choosing a slice of all matrices: seconds, peak bytes, values."""

    seconds: float
    peak: int
    values: int


def choose(shapes: dict[str, torch.Size], ff: str, select: Callable = slice_units) -> Choice:
    """`select` is slice_units, as attaching does, or slice_indices, every position; all results are kept."""

    def select_all() -> int:
        chosen = [select(name, shape, ff, 1) for name, shape in shapes.items()]
        return sum(len(one) if isinstance(one, Tensor) else one.count for one in chosen)

    start = time.perf_counter()
    values = select_all()
    seconds = time.perf_counter() - start
    tracemalloc.start()  # sees NumPy's arrays, as LiveBytes sees tensors
    with LiveBytes() as counter:
        select_all()
    peak = tracemalloc.get_traced_memory()[1] + counter.peak
    tracemalloc.stop()
    return Choice(seconds, peak, values)


def matrix_shapes(config: WanConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = WanModel(config)
    return {f"{name}.weight": linear.weight.shape for name, linear in block_linears(model).items()}


@dataclass(frozen=True)
class Attachment:
    """Attaching a slice: seconds, bytes that stay and at the peak beyond the model, bytes of differences and starts."""

    seconds: float
    grown: int
    peak: int
    predicted: int
    model_bytes: int


def attach(config: WanConfig, ff: str) -> Attachment:
    """Attaches to a bf16 model of `config` whose blocks share the memory of one, as large as one block."""
    with torch.device("meta"):
        block = WanBlock(config)
    block = block.to(torch.bfloat16).to_empty(device="cpu")
    model = nn.Module()
    shared = {id(parameter): parameter for parameter in block.parameters()}
    model.blocks = nn.ModuleList(copy.deepcopy(block, dict(shared)) for _ in range(config.num_layers))
    with LiveBytes() as counter:
        counter.add(*block.parameters())
        before = counter.live
        start = time.perf_counter()
        trained = attach_slice(model, ff, 1)
        seconds = time.perf_counter() - start
        grown = counter.live - before
    values = sum(parameter.numel() for parameter in trained.parameters())
    model_bytes = config.num_layers * sum(parameter.nbytes for parameter in block.parameters())
    return Attachment(seconds, grown, counter.peak - before, values * (4 + 2), model_bytes)
