"""What --training_debug costs: a training step with and without it in turn, and the comparison of a save.

    python benchmarks/debug_cost.py

Two blocks of Wan 1.3B's size, 1,024 tokens, AdamW, one thread. Steps are measured in CPU seconds, so that other work of
the machine does not count. Prints markdown for benchmarks/README.md.
"""

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import save_file
from torch import nn

from utils.saved_changes import compare_save
from utils.selective_finetune import TrainedSlice, attach_slice
from utils.training_debug import READ_EVERY, TrainingDebug
from wan.configs import TASKS, WanConfig
from wan.model import WanBlock, rope_frequencies

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FULL = (TASKS["t2v-1.3B"].config, 32, 512)  # configuration, side of the picture in tokens, text tokens
QUICK = (WanConfig("t2v", 384, 2240, 3, 30, 16, 16), 16, 128)
BLOCKS = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=READ_EVERY, help="pairs of steps, one of them watched")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--ff", nargs="+", default=("0.001", "0.01"))
    parser.add_argument("--quick", action="store_true", help="small blocks, to see that it runs: not the figures asked")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    print(machine_line(sizes), flush=True)
    columns = ("dtype", "ff", "values", "own share of a step", "step with / without", "saving, comparing the save")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for dtype in args.dtype:
        for ff in args.ff:
            print(row(sizes, dtype, ff, args.rounds), flush=True)


def row(sizes: tuple, dtype: str, ff: str, rounds: int) -> str:
    config, side, text_len = sizes
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(WanBlock(config) for _ in range(BLOCKS)).to(DTYPES[dtype])
    forward_backward = step_of(model, config, side, text_len, DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder, "base.safetensors"), Path(folder, "saved.safetensors")
        save_file(model.state_dict(), base)
        trained = attach_slice(model, ff, 1)
        shares, ratios = time_steps(trained, forward_backward, rounds, folder)
        start = time.perf_counter()
        trained.save_checkpoint(base, saved)
        middle = time.perf_counter()
        assert compare_save([base], saved, trained).fault is None
        seconds = f"{middle - start:.2f} s, {time.perf_counter() - middle:.2f} s for {base.stat().st_size / 1e6:.0f} MB"
    own = f"{100 * statistics.mean(shares):.2f} % (at most {100 * max(shares):.2f} %)"
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"| {dtype} | {ff} | {trained.count:,} | {own} | {ratio} | {seconds} |"


def step_of(model: nn.Module, config: WanConfig, side: int, text_len: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward through the blocks, on noise; the input needs a gradient, as within a model."""
    dim = config.dim
    x_BLD, dy_BLD = torch.randn(1, side**2, dim).to(dtype).requires_grad_(), torch.randn(1, side**2, dim).to(dtype)
    context_BSD, e0 = torch.randn(1, text_len, dim).to(dtype), torch.randn(1, 1, 6, dim) / 8
    freqs = rope_frequencies(dim // config.num_heads, (1, side, side), torch.device("cpu"))

    def forward_backward() -> None:
        y_BLD = x_BLD
        for block in model.blocks:
            y_BLD = block(y_BLD, e0, freqs, context_BSD)
        y_BLD.backward(dy_BLD)

    return forward_backward


def time_steps(
    trained: TrainedSlice, forward_backward: Callable[[], None], rounds: int, folder: str
) -> tuple[list[float], list[float]]:
    """For each pair of steps: the watcher's share of its step, and that step's time over the other one's."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5, fused=True)
    debug = TrainingDebug(trained, BLOCKS, [])
    tracker = TensorBoardTracker("debug_cost", folder)
    tracker.start()
    debug.seen = READ_EVERY  # past the first steps, which are all read

    def step(watched: bool) -> tuple[float, float]:
        own, start = 0.0, time.process_time()
        forward_backward()
        own += timed(debug.before_update) if watched else 0
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        trained.write_back()
        own += timed(debug.after_update) if watched else 0
        own += timed(lambda: debug.after_step(debug.seen, [tracker])) if watched else 0
        optimizer.zero_grad(set_to_none=True)
        return own, time.process_time() - start

    step(watched=False)
    shares, ratios = [], []
    for number in range(rounds):
        results = {watched: step(watched) for watched in ((False, True) if number % 2 else (True, False))}
        shares.append(results[True][0] / results[True][1])
        ratios.append(results[True][1] / results[False][1])
    tracker.finish()
    return shares, ratios


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def machine_line(sizes: tuple) -> str:
    """Hardware, versions, commit and shapes, for the heading of the results."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    shape = f"{BLOCKS} blocks of width {sizes[0].dim}, {sizes[1] ** 2} tokens"
    return f"{shape}; {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}."


if __name__ == "__main__":
    main()
