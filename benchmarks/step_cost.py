"""What a training step costs beyond a frozen model's: ours, LoRA in three programs' models, dense gradients.

    pip install -e ".[bench]" && python benchmarks/step_cost.py

Two blocks of Wan 1.3B's size, 1,024 tokens. The frozen floor is the same forward and backward where only the input
needs a gradient; every other method adds its optimizer's step. Prints markdown for benchmarks/README.md.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attach_cost import choice_table
from live_bytes import LiveBytes
from step_methods import Method, Training, all_methods, reach_every_matrix, reads_text
from step_models import DTYPES, FULL, QUICK, Blocks, Size

from utils.selective_finetune import block_linears, slice_units
from wan.compiling import compiled_pointwise
from wan.configs import TASKS
from wan.model import use_pointwise

FFS = ("0.001", "0.01")


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
    if not all(map(find_spec, ("peft", "diffusers", "diffsynth"))):
        print('\nRows are missing: pip install -e ".[bench]" diffusers && pip install --no-deps diffsynth')
    print("\n" + "\n".join(choice_table(TASKS["t2v-14B"].config, args.ff)))


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


# ---- the tables


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
