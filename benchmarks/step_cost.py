"""What a training step costs beyond a frozen model's: ours, LoRA in this and diffusers' model, dense gradients, all.

    pip install -e ".[bench]" && python benchmarks/step_cost.py

Two blocks of Wan 1.3B's size, 1,024 tokens. The frozen floor is the same forward and backward where only the input
needs a gradient; every other method adds its optimizer's step. Prints markdown for benchmarks/README.md.
"""

import argparse
import copy
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.selective_finetune import attach_slice, block_linears, slice_indices, slice_units
from wan.compiling import compiled_pointwise
from wan.configs import TASKS, WanConfig
from wan.model import WanBlock, WanModel, rope_frequencies, use_pointwise

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FFS = ("0.001", "0.01")
RIVALS_EVERY = 2  # rounds: what is only to be reported is timed half as often


@dataclass(frozen=True)
class Size:
    """The shapes of one measurement; the picture has side x side tokens."""

    config: WanConfig
    side: int
    text_len: int
    blocks: int = 2


FULL = Size(TASKS["t2v-1.3B"].config, side=32, text_len=512)
QUICK = Size(WanConfig("t2v", 384, 2240, 3, 30, 16, 16), side=16, text_len=128)


class Blocks(nn.Module):
    """Blocks of a Wan, named as in a checkpoint, with what a step feeds them."""

    def __init__(self, size: Size, dtype: torch.dtype, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        dim, tokens = size.config.dim, size.side**2
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(WanBlock(size.config) for _ in range(size.blocks)).to(dtype).requires_grad_(False)
        self.x_BLD = torch.randn(1, tokens, dim).to(dtype).requires_grad_(True)
        self.dy_BLD = torch.randn(1, tokens, dim).to(dtype)
        self.context_BSD = torch.randn(1, size.text_len, dim).to(dtype)
        self.e0 = torch.randn(1, 1, 6, dim) / 8
        self.freqs = rope_frequencies(dim // size.config.num_heads, (1, size.side, size.side), torch.device("cpu"))

    def forward_backward(self) -> None:
        x_BLD = self.x_BLD
        run = partial(checkpoint, self.run_block, use_reentrant=False) if self.checkpointed else self.run_block
        for block in self.blocks:
            x_BLD = run(block, x_BLD)
        x_BLD.backward(self.dy_BLD)

    def run_block(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        return block(x_BLD, self.e0, self.freqs, self.context_BSD)

    def tensors(self) -> list[Tensor]:
        return [*self.parameters(), self.x_BLD, self.dy_BLD, self.context_BSD, self.e0, self.freqs]


class DiffusersBlocks(Blocks):
    """The same step in the blocks of diffusers' WanTransformer3DModel, which are all that runs of it."""

    def __init__(self, size: Size, dtype: torch.dtype, checkpointed: bool):
        from diffusers import WanTransformer3DModel

        super().__init__(size, dtype, checkpointed)
        config, heads = size.config, size.config.num_heads
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=config.dim // heads,
            ffn_dim=config.ffn_dim,
            num_layers=size.blocks,
        )
        self.blocks = model.blocks.to(dtype).requires_grad_(False)
        for block in self.blocks:  # as its loader keeps them
            block.scale_shift_table.data = block.scale_shift_table.float()
        self.e0, grid = self.e0[:, 0], torch.zeros(1, 16, 1, 2 * size.side, 2 * size.side)
        self.rotations = model.rope(grid)

    def run_block(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        return block(x_BLD, self.context_BSD, self.e0, self.rotations)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.rotations]


# ---- the methods


@dataclass(frozen=True)
class Training:
    """What a method trains, and what it does after backward."""

    parameters: list[Tensor]
    update: Callable[[], None]


@dataclass(frozen=True)
class Method:
    """One way to train; `ff` where it is ours, `blocks` the model that it trains, compiled as by --compile or not."""

    name: str
    prepare: Callable[[Blocks], Training]
    ff: str | None = None
    every: int = RIVALS_EVERY
    blocks: type[Blocks] = Blocks
    compiled: bool = False


def train_nothing(model: Blocks) -> Training:
    return Training([], lambda: None)


def reach_every_matrix(model: Blocks) -> Training:
    """Trains nothing, but backward goes to the text's k and v too, as it does wherever they train."""
    anchor = torch.zeros(1, requires_grad=True)
    for name, linear in block_linears(model).items():
        if reads_text(name):
            linear.register_forward_hook(lambda linear, inputs, y: _Reach.apply(y, anchor))
    return Training([anchor], lambda: None)


class _Reach(torch.autograd.Function):
    """Passes `y` on, needs its gradient, and keeps nothing."""

    @staticmethod
    def forward(ctx, y, anchor):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return None, torch.zeros(1)


def train_slice(model: Blocks, ff: str) -> Training:
    trained = attach_slice(model, ff, 1)
    optimizer = adamw(trained.parameters())

    def update() -> None:
        optimizer.step()
        trained.write_back()

    return Training(list(trained.parameters()), update)


def train_lora(model: Blocks, rank: int = 16) -> Training:
    from peft import LoraConfig

    return train_adapter(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=matrix_names(model)))


def train_shira(model: Blocks) -> Training:
    """Rank 1 is the smallest: in + out values of each matrix, 0.98 times as many as a slice of 0.001."""
    from peft import ShiraConfig

    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is by default, but then with a warning
    return train_adapter(model, ShiraConfig(r=1, target_modules=matrix_names(model)))


def train_adapter(model: Blocks, config) -> Training:
    """PEFT's adapter in the dtype of the weights, its fastest: PEFT's own default computes it in fp32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(trainable, adamw(trainable).step)


def train_masked(model: Blocks, ff: str) -> Training:
    """The predecessor's way: whole gradients, set to zero outside the slice, and a whole-tensor optimizer."""
    weights, masks = [], []
    for name, linear in block_linears(model).items():
        weight = linear.weight.requires_grad_(True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[slice_indices(f"{name}.weight", weight.shape, ff, 1)] = True
        weights.append(weight)
        masks.append(mask.view_as(weight))
    optimizer = adamw(weights)

    def update() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()

    return Training(weights, update)


def train_everything(model: Blocks) -> Training:
    parameters = list(model.requires_grad_(True).parameters())
    return Training(parameters, adamw(parameters).step)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)


def reads_text(name: str) -> bool:
    return name.endswith(("cross_attn.k", "cross_attn.v"))


def matrix_names(model: Blocks) -> list[str]:
    return list(block_linears(model))


def all_methods(ffs: Sequence[str], compiled: bool = False) -> list[Method]:
    """The floor first; rows of PEFT, diffusers and a compiler only where they are installed."""
    ours = [Method(f"ours, ff {ff}", lambda model, ff=ff: train_slice(model, ff), ff=ff, every=1) for ff in ffs]
    peft = [Method("PEFT LoRA, rank 16", train_lora), Method("PEFT SHiRA, as many values as ff 0.001", train_shira)]
    diffusers = [
        Method("diffusers' model, frozen", train_nothing, blocks=DiffusersBlocks),
        Method("diffusers' model, PEFT LoRA, rank 16", train_lora, blocks=DiffusersBlocks),
    ]
    return [
        Method("frozen floor", train_nothing, every=1),
        *ours,
        *([replace(ours[0], name=f"{ours[0].name}, --compile", compiled=True)] if compiled else []),
        *(peft if find_spec("peft") else []),
        *(diffusers if find_spec("peft") and find_spec("diffusers") else []),
        Method(f"dense gradient, then mask (ff {ffs[0]})", lambda model: train_masked(model, ffs[0])),
        Method("everything trainable", train_everything),
    ]


# ---- one setting: dtype and checkpointing


@dataclass(frozen=True)
class Cost:
    """Of one method in one setting: a time ratio for each round, bytes, values that train."""

    ratios: list[float]
    bytes_beyond_floor: int | None
    bytes_predicted: int | None
    values: int


def measure(
    size: Size,
    dtype: torch.dtype,
    checkpointed: bool,
    methods: Sequence[Method],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Cost]:
    """Costs by method name; `methods` begins with the floor. Each round times all methods in turn."""
    prepared, peaks = {}, {}
    for method in methods:
        model = method.blocks(size, dtype, checkpointed)
        training, peaks[method.name] = count_bytes(model, method)
        if method.compiled:
            use_pointwise(model, compiled_pointwise(size.config, dtype, torch.device("cpu")))
            model.forward_backward()
            del peaks[method.name]  # what compiled code takes is not seen
        prepared[method.name] = (model, training)
    floor = methods[0].name
    _, reached = count_bytes(Blocks(size, dtype, checkpointed), Method("floor for memory", reach_every_matrix))
    ratios = defaultdict(list)
    for number in range(rounds):
        turn = [method.name for method in methods if number % method.every == 0]
        first = number % len(turn)
        seconds = {name: time_step(*prepared[name], clock) for name in turn[first:] + turn[:first]}
        for name in turn:
            ratios[name].append(seconds[name] / seconds[floor])
    return {
        method.name: Cost(
            ratios[method.name],
            peaks[method.name] - reached if method.name in peaks else None,
            predicted_bytes(prepared[floor][0], method.ff) if method.ff else None,
            sum(parameter.numel() for parameter in prepared[method.name][1].parameters),
        )
        for method in methods
    }


def count_bytes(model: Blocks, method: Method) -> tuple[Training, int]:
    """Prepares the method, and the peak of live bytes in a step that adds to gradients which are there already."""
    with LiveBytes() as counter:
        counter.add(*model.tensors())
        training = method.prepare(model)
        for parameter in training.parameters:
            parameter.grad = torch.zeros_like(parameter)
        training.update()
        counter.restart_peak()
        model.forward_backward()
        training.update()
    return training, counter.peak


def time_step(model: Blocks, training: Training, clock: Callable[[], float]) -> float:
    """Seconds of forward, backward, optimizer and write-back; gradients are made anew."""
    for tensor in (model.x_BLD, *training.parameters):
        tensor.grad = None
    start = clock()
    model.forward_backward()
    training.update()
    return clock() - start


def predicted_bytes(model: Blocks, ff: str) -> int:
    """What a slice adds at the peak: difference, gradient, two moments (fp32), start values, and the X[:, cols] kept.

    The peak is in the last block's GELU backward: its ffn.2 has its gradient by then and keeps nothing. Checkpointed,
    that block is the only one that keeps anything.
    """
    last = len(model.blocks) - 1
    predicted = 0
    for name, linear in block_linears(model).items():
        units = slice_units(f"{name}.weight", linear.weight.shape, ff, 1)
        predicted += units.count * (4 * 4 + linear.weight.itemsize)
        in_last = name.startswith(f"blocks.{last}.")
        if (in_last or not model.checkpointed) and name != f"blocks.{last}.ffn.2":
            tokens = (model.context_BSD if reads_text(name) else model.x_BLD).shape[1]
            predicted += tokens * min(len(units.columns_U), linear.in_features) * linear.weight.itemsize
    return predicted


# ---- choosing and attaching at 14B


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


# ---- the tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=6, help="repeats of ours and the floor; half as many for the others"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    parser.add_argument("--ff", nargs="+", default=FFS, help="slices of ours (default: 0.001 0.01)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only the floor and rows that contain one of these")
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU seconds on one thread, for a busy machine")
    parser.add_argument("--compile", action="store_true", help="a row of ours with --compile (C++, minutes)")
    parser.add_argument("--quick", action="store_true", help="small blocks, to see that it works")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    methods = all_methods(args.ff, args.compile)
    if args.only:
        methods = [methods[0], *(own for own in methods[1:] if any(text in own.name for text in args.only))]
    settings = list(product([args.dtype] if args.dtype else DTYPES, (False, True)))
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(machine_line(size), flush=True)
    costs = {}
    for number, (dtype, checkpointed) in enumerate(settings, 1):
        print(f"setting {number} of {len(settings)}", file=sys.stderr, flush=True)
        costs[dtype, checkpointed] = measure(size, DTYPES[dtype], checkpointed, methods, args.rounds, clock)
    print("\n" + "\n".join(step_table(costs, methods)), flush=True)
    if not (find_spec("peft") and find_spec("diffusers")):
        print('\nRows of PEFT or diffusers are missing: pip install -e ".[bench]" diffusers')
    print("\n" + "\n".join(choice_table(TASKS["t2v-14B"].config, args.ff)))


def step_table(costs: dict[tuple[str, bool], dict[str, Cost]], methods: Sequence[Method]) -> list[str]:
    """A row a method; for each setting its time as median (lowest-highest) ratio to the floor, peak MB beyond it."""
    headings = [f"{dtype}{', checkpointing' if checkpointed else ''}" for dtype, checkpointed in costs]
    lines = [
        "| | values | " + " | ".join(f"{what}, {h}" for what in ("time", "MB") for h in headings) + " |",
        "|---" * (2 + 2 * len(headings)) + "|",
    ]
    for method in methods:
        rows = [costs[setting][method.name] for setting in costs]
        cells = [method.name, f"{rows[0].values:,}", *map(time_cell, rows), *map(memory_cell, rows)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_cell(cost: Cost) -> str:
    return f"{statistics.median(cost.ratios):.3f} ({min(cost.ratios):.2f}-{max(cost.ratios):.2f})"


def memory_cell(cost: Cost) -> str:
    if cost.bytes_beyond_floor is None:
        return "not counted"
    megabytes = f"{cost.bytes_beyond_floor / 1e6:.2f}"
    if cost.bytes_predicted is None:
        return megabytes
    return f"{megabytes} ({cost.bytes_beyond_floor / cost.bytes_predicted:.3f} of predicted)"


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


def machine_line(size: Size) -> str:
    """Hardware, versions, commit and shapes, for the heading of the results."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    shape = f"{size.blocks} blocks of width {size.config.dim}, {size.side**2} tokens"
    return f"{shape}; {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}."


if __name__ == "__main__":
    main()
