"""What --training_debug costs: a training step with and without it in turn, and the comparison of a save.

    python benchmarks/debug_cost.py

Two blocks of Wan 1.3B's size, 1,024 tokens, AdamW, one thread. Steps are measured in CPU seconds, so that other work of
the machine does not count. Prints markdown for benchmarks/README.md.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import save_file
from step_cost import DTYPES, FFS, FULL, QUICK, Blocks, Size, adamw, machine_line

from utils.saved_changes import compare_save
from utils.selective_finetune import TrainedSlice, attach_slice
from utils.training_debug import READ_EVERY, TrainingDebug


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=READ_EVERY, help="pairs of steps, one of them watched")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--ff", nargs="+", default=FFS)
    parser.add_argument("--quick", action="store_true", help="small blocks, to see that it runs: not the figures asked")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    print(machine_line(size), flush=True)
    columns = ("dtype", "ff", "values", "own share of a step", "step with / without", "saving, comparing the save")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for dtype in args.dtype:
        for ff in args.ff:
            print(row(size, dtype, ff, args.rounds), flush=True)


def row(size: Size, dtype: str, ff: str, rounds: int) -> str:
    model = Blocks(size, DTYPES[dtype], checkpointed=False)
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder, "base.safetensors"), Path(folder, "saved.safetensors")
        save_file(model.state_dict(), base)
        trained = attach_slice(model, ff, 1)
        shares, ratios = time_steps(model, trained, rounds, folder)
        start = time.perf_counter()
        trained.save_checkpoint(base, saved)
        middle = time.perf_counter()
        assert compare_save([base], saved, trained).fault is None
        seconds = f"{middle - start:.2f} s, {time.perf_counter() - middle:.2f} s for {base.stat().st_size / 1e6:.0f} MB"
    own = f"{100 * statistics.mean(shares):.2f} % (at most {100 * max(shares):.2f} %)"
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"| {dtype} | {ff} | {trained.count:,} | {own} | {ratio} | {seconds} |"


def time_steps(model: Blocks, trained: TrainedSlice, rounds: int, folder: str) -> tuple[list[float], list[float]]:
    """For each pair of steps: the watcher's share of its step, and that step's time over the other one's."""
    optimizer = adamw(list(trained.parameters()))
    debug = TrainingDebug(trained, len(model.blocks), [])
    tracker = TensorBoardTracker("debug_cost", folder)
    tracker.start()
    debug.seen = READ_EVERY  # past the first steps, which are all read

    def step(watched: bool) -> tuple[float, float]:
        own, start = 0.0, time.process_time()
        model.forward_backward()
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


if __name__ == "__main__":
    main()
