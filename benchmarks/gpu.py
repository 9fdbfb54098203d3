"""How fast does Wan 14B train on this GPU, in how much of its memory, and how long does it wait for weights?

Random weights of the full size, made in memory: nothing is read or downloaded. For each way of swapping the model is
placed once and takes a few steps of every size; what does not fit, or would take longer than --minutes, is skipped with
a line that says so. Prints one table, for benchmarks/README.md. --dry-run does the same with a tiny model on the CPU.
"""

import argparse
import gc
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

# Before CUDA starts: without it cuBLAS may choose another order of sums on another run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.learning.optimizers import OptimizerConfig, build_optimizer  # noqa: E402
from utils.selective_finetune import TrainedSlice, attach_slice  # noqa: E402
from utils.swap.backend import CudaBackend, HostBackend  # noqa: E402
from utils.swap.block_inputs import BlockInputs  # noqa: E402
from utils.swap.placement import (  # noqa: E402
    LoadedWeights,
    Placement,
    checkpoint_blocks,
    memory_line,
    place_model,
)
from utils.swap.plan import SwapConfig  # noqa: E402
from wan.compiling import compiled_pointwise, pointwise_of  # noqa: E402
from wan.configs import TASKS, WanConfig  # noqa: E402
from wan.errors import InputError  # noqa: E402
from wan.memory import available_bytes  # noqa: E402
from wan.model import WanModel, use_pointwise  # noqa: E402

TINY = replace(TASKS["t2v-14B"].config, dim=48, ffn_dim=96, num_heads=4, num_layers=4, text_dim=24, text_len=8)


@dataclass(frozen=True)
class Placing:
    """How the blocks are swapped; `blocks` is a share of the model's."""

    name: str
    blocks: float
    ring_blocks: int = 2
    host_weights: str = "auto"
    takes_clips: bool = True
    fp8: str = ""  # "scaled": the block matrices are rounded
    compiled: bool = False

    @property
    def computes(self) -> tuple[str, bool]:
        """What decides the bits of loss and gradients."""
        return self.fp8, self.compiled


@dataclass(frozen=True)
class Size:
    name: str
    batch: int
    latents: tuple[int, int, int]  # frames, height, width
    work: float  # expected time of a step, in steps of one picture
    steps: int = 3
    offload_inputs: bool = False


PLACINGS = (
    Placing("S = 0", 0),
    Placing("S = 24", 0.6),
    Placing("S = 40", 1),
    Placing("S = 40, one buffer", 1, ring_blocks=1, takes_clips=False),
    Placing("S = 40, staged", 1, host_weights="staged", takes_clips=False),
    Placing("S = 0, fp8", 0, takes_clips=False, fp8="scaled"),
    Placing("S = 40, fp8", 1, takes_clips=False, fp8="scaled"),
    Placing("S = 0, --compile", 0, takes_clips=False, compiled=True),
    Placing("S = 40, --compile", 1, takes_clips=False, compiled=True),
)
PICTURE = Size("512x512x1", 1, (1, 64, 64), work=1)
PICTURES = Size("512x512x1, batch 4", 4, (1, 64, 64), work=4)
CLIP = Size("832x480x81", 1, (21, 60, 104), work=75, steps=1)
OFFLOADED_CLIP = replace(CLIP, name="832x480x81, inputs on the host", offload_inputs=True)
SMALL = Size("32x32x1", 1, (1, 4, 4), work=1, steps=1)


@dataclass(frozen=True)
class Row:
    """One line of the table; None where it cannot be measured here."""

    placing: str
    size: str
    optimizer: str
    seconds: float | None  # a step, the median
    stalled: float | None  # share of the step in which computing waited for a copy
    copied: int  # bytes a step
    peak: int | None  # bytes, of PyTorch's allocator
    driver: int | None  # bytes in use on the device, as the driver counts
    note: str  # how loss and gradients compare with those of the first placing, or why nothing was measured


def main(argv: Sequence[str] | None = None) -> list[Row]:
    flags = parse(argv)
    device = torch.device("cpu" if flags.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; --dry-run shows on the CPU what would be measured")
    config = TINY if flags.dry_run else TASKS["t2v-14B"].config
    print(heading(device), flush=True)
    deadline = time.monotonic() + 60 * flags.minutes
    rows, references = [], {placing.computes: {} for placing in PLACINGS}
    try:
        for placing in PLACINGS:
            measured = attempt(
                placing.name, deadline, lambda p=placing: measure(p, config, device, deadline, references[p.computes])
            )
            for row in measured:
                rows.append(row)
                print(f"# {row}", flush=True)
    finally:
        print_table(rows)
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7, help="start nothing after this time (default 7)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args(argv)


def heading(device: torch.device) -> str:
    """What was measured, on what."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (dry run)"
    line = f"{name}, {platform.system()}, PyTorch {torch.__version__}, commit {commit()}"
    return f"{line}\n{copy_rates(device)}" if device.type == "cuda" else line


def commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    told = subprocess.run([git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def copy_rates(device: torch.device) -> str:
    """Host to device, from page-locked and from ordinary memory, in GB/s."""
    target = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    rates = []
    for pinned in (True, False):
        source = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=pinned)
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(8 * source.nbytes / (time.perf_counter() - started) / 1e9)
    return f"host to device: {rates[0]:.1f} GB/s from page-locked memory, {rates[1]:.1f} GB/s from ordinary memory"


def attempt(what: str, deadline: float, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows that time and memory allow."""
    if time.monotonic() > deadline:
        print(f"# {what}: skipped, no time left", flush=True)
        return
    try:
        yield from rows()
    except torch.OutOfMemoryError:
        print(f"# {what}: out of device memory", flush=True)
    except InputError as error:
        print(f"# {what}: {error}", flush=True)
    except RuntimeError as error:  # how libraries report memory that they cannot get, on the device or the host
        print(f"# {what}: {str(error).partition(chr(10))[0]}", flush=True)
    if torch.cuda.is_available():
        gc.collect()  # a checkpointed block refers to itself through its forward
        torch.cuda.empty_cache()


def measure(
    placing: Placing, config: WanConfig, device: torch.device, deadline: float, reference: dict[str, list[Tensor]]
) -> Iterator[Row]:
    """Every size and optimizer with the model placed once."""
    is_gpu = device.type == "cuda"
    backend = TimedBackend(device) if is_gpu else HostBackend(device)
    model = random_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if placing.host_weights == "staged" and available_bytes() < 1.2 * size:
        print(f"# {placing.name}: skipped, {size / 1e9:.0f} GB do not fit into the free memory", flush=True)
        return
    trained = attach_slice(model, "0.001" if is_gpu else "0.05", 1, device=device)
    inputs = OptionalInputs(len(model.blocks), device, TimedBackend(device) if is_gpu else None)
    checkpoint_blocks(model, inputs)
    if placing.compiled:  # a dry run computes the same without a compiler
        kind = compiled_pointwise(config, model.dtype, device) if is_gpu else pointwise_of(lambda own: own)
        use_pointwise(model, kind)
    swapped = round(placing.blocks * len(model.blocks))
    swap = SwapConfig(swapped, placing.ring_blocks, host_weights=placing.host_weights, fp8=placing.fp8)
    started = time.perf_counter()
    # As if mapped: windows of one small table are not the memory that the choice of a store would count on.
    with place_model(model, device, swap, trained, LoadedWeights(mapped=True), backend) as placement:
        seconds = time.perf_counter() - started
        print(f"# {placing.name}: placed in {seconds:.0f} s; {memory_line(placement, device)}", flush=True)
        if is_gpu and placement.streamer and placement.streamer.link is not backend:
            placement.streamer.link.wait = backend.wait
        placed = Placed(placing.name, model, trained, placement, [backend, inputs.backend])
        equal = equality(placed, PICTURE if is_gpu else SMALL, reference)
        yield from measure_sizes(placing, placed, inputs, deadline, equal)


def measure_sizes(
    placing: Placing, placed: "Placed", inputs: "OptionalInputs", deadline: float, equal: str
) -> Iterator[Row]:
    second = 0.0
    for size, optimizer in cases_of(placing, placed.device.type == "cuda"):
        inputs.in_use = size.offload_inputs
        needed = (1 + size.steps) * size.work * second
        what = f"{placing.name}, {size.name}, {optimizer}"
        for row in attempt(what, deadline - needed, lambda s=size, o=optimizer: time_steps(placed, s, o, equal)):
            second = row.seconds / size.work if row.seconds else second
            yield row


def cases_of(placing: Placing, is_gpu: bool) -> list[tuple[Size, str]]:
    """The sizes, and the optimizers of each."""
    if not is_gpu:
        return [(SMALL, "AdamW"), (SMALL, "AdamW8bit")]
    cases = [(PICTURE, "AdamW"), (PICTURE, "AdamW8bit"), (PICTURES, "AdamW")]
    clip = OFFLOADED_CLIP if placing.blocks == 1 else CLIP
    return [*cases, (clip, "AdamW")] if placing.takes_clips else cases


@dataclass(frozen=True)
class Placed:
    name: str
    model: WanModel
    trained: TrainedSlice
    placement: Placement
    backends: Sequence["TimedBackend | HostBackend"]  # of the weights, of the block inputs

    @property
    def device(self) -> torch.device:
        return self.backends[0].device


class OptionalInputs(BlockInputs):
    """Block inputs go to the host while `in_use` is set."""

    in_use = False

    def around(self, number: int, forward: Callable[..., Tensor], x: Tensor, *shared) -> Tensor:
        return super().around(number, forward, x, *shared) if self.in_use else forward(x, *shared)


class TimedBackend(CudaBackend):
    """Measures how long computing waits for copies, with a pair of events around each wait."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, event: torch.cuda.Event | Future) -> None:
        """Also for BackgroundCopies: while the host waits for a copy to be on its way, the device waits with it."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(torch.cuda.current_stream(self.device))
        super().wait(event.result() if isinstance(event, Future) else event)
        after.record(torch.cuda.current_stream(self.device))
        self.waits.append((before, after))

    def waited(self) -> float:
        """Seconds since the last call; the device has to be idle."""
        seconds = sum(before.elapsed_time(after) for before, after in self.waits) / 1000
        self.waits.clear()
        return seconds


def random_model(config: WanConfig) -> WanModel:
    """bf16, on the CPU. The matrices are windows of one table: 28 GB would take minutes to draw."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16().requires_grad_(False)
    largest = max(parameter.numel() for parameter in model.parameters())
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(2 * largest, generator=draw).mul_(0.02).bfloat16()
    values = {}
    for name, parameter in model.named_parameters():
        start = int(torch.randint(largest, (), generator=draw))
        window = table[start : start + parameter.numel()].view(parameter.shape)
        values[name] = torch.ones(parameter.shape, dtype=torch.bfloat16) if "norm" in name else window
    model.load_state_dict(values, assign=True)
    return model.requires_grad_(False)


def loss_of(model: WanModel, size: Size, device: torch.device, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, size.batch, 16, *size.latents, generator=draw).to(device)
    text_width = model.config.text_dim
    context = [torch.randn(8, text_width, generator=draw).to(device) for _ in range(size.batch)]
    times = torch.full((size.batch,), 500.0, device=device)
    return (model(x, times, context) - target).square().mean()


@contextmanager
def one_order_of_sums() -> Iterator[None]:
    """Makes attention's backward add up in one order, which is slower; cuDNN's cannot, so it is off."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)


def equality(placed: Placed, size: Size, reference: dict[str, list[Tensor]]) -> str:
    """Compares loss and gradients of two steps at the same values: while the order is learned, and replayed."""
    found = []
    with one_order_of_sums():
        for _ in range(2):
            loss = loss_of(placed.model, size, placed.device, 0)
            loss.backward()
            found.append([loss.detach().cpu(), *(p.grad.cpu() for p in placed.trained.parameters())])
            placed.trained.zero_grad()
    if not reference:
        reference["values"] = found[0]
        reference["name"] = placed.name
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return "reproducible" if same else "not reproducible"
    same = [all(torch.equal(a, b) for a, b in zip(run, reference["values"], strict=True)) for run in found]
    if all(same):
        return f"equal to {reference['name']}"
    pairs = [(a.double(), b.double()) for a, b in zip(found[1], reference["values"], strict=True)]
    apart = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return f"differs by up to {apart:.0e}"


def time_steps(placed: Placed, size: Size, optimizer_name: str, equal: str) -> Iterator[Row]:
    if optimizer_name == "AdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
        yield Row(placed.name, size.name, optimizer_name, None, None, 0, None, None, "bitsandbytes is not installed")
        return
    model, trained, streamer = placed.model, placed.trained, placed.placement.streamer
    device = placed.device
    is_gpu = device.type == "cuda"
    optimizer = build_optimizer(OptimizerConfig(optimizer_name, 1e-5), trained.parameters())
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, stalls, copied = [], [], 0
    for step in range(1 + size.steps):
        before = streamer.traffic.bytes if streamer else 0
        started = time.perf_counter()
        loss_of(model, size, device, step).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.write_back()
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        stalls.append(sum(backend.waited() for backend in placed.backends) if is_gpu else None)
        copied = streamer.traffic.bytes - before if streamer else 0
    middle = sorted(range(1, 1 + size.steps), key=seconds.__getitem__)[size.steps // 2]
    yield Row(
        placing=placed.name,
        size=size.name,
        optimizer=optimizer_name,
        seconds=seconds[middle],
        stalled=stalls[middle] / seconds[middle] if is_gpu else None,
        copied=copied,
        peak=torch.cuda.max_memory_allocated() if is_gpu else None,
        driver=driver_bytes() if is_gpu else None,
        note=equal,
    )


def driver_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def print_table(rows: Sequence[Row]) -> None:
    print(
        "\n| blocks | size | optimizer | step | stalled | copied a step | copy rate | peak, PyTorch | in use, driver |",
        end="",
    )
    print(" loss and gradients |\n|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            "-" if row.seconds is None else f"{row.seconds:.2f} s",
            "-" if row.stalled is None else f"{row.stalled:.1%}",
            f"{row.copied / 1e9:.1f} GB",
            "-" if row.seconds is None else f"{row.copied / row.seconds / 1e9:.1f} GB/s",
            "-" if row.peak is None else f"{row.peak / 1e9:.2f} GB",
            "-" if row.driver is None else f"{row.driver / 1e9:.2f} GB",
        ]
        print(f"| {row.placing} | {row.size} | {row.optimizer} | {' | '.join(cells)} | {row.note} |")


if __name__ == "__main__":
    main()
