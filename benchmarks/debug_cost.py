"""What --training_debug costs: training steps with and without it in turn, drawing, and the comparison of a save.

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
from step_cost import FFS, machine_line
from step_methods import adamw
from step_models import DTYPES, FULL, QUICK, Blocks, Size
from torch import nn

from utils.selective_finetune import TrainedSlice, attach_slice
from utils.slice_saving import save_checkpoint
from utils.slices.compare import compare_save
from utils.training_debug import DRAW_EVERY, READ_EVERY, TrainingDebug

STEPS = (100, 10_000, 50_000)  # of a run, when it draws
MANY_BLOCKS = 40
DRAWS = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=READ_EVERY, help="pairs of steps, one of them with debugging")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--ff", nargs="+", default=FFS)
    parser.add_argument("--quick", action="store_true", help="small blocks, to see that it works")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    print(machine_line(size), flush=True)
    print_heading("dtype", "ff", "values", "share of a step", "step with / without", "a draw", "saving, comparing")
    for dtype in args.dtype:
        for ff in args.ff:
            print(row(size, dtype, ff, args.rounds), flush=True)
    print_heading(f"steps, of a run with {MANY_BLOCKS} blocks", "a draw", "history")
    for steps in STEPS:
        print(draw_row(steps), flush=True)


def print_heading(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def row(size: Size, dtype: str, ff: str, rounds: int) -> str:
    model = Blocks(size, DTYPES[dtype], checkpointed=False)
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder, "base.safetensors"), Path(folder, "saved.safetensors")
        save_file(model.state_dict(), base)
        trained = attach_slice(model, ff, 1)
        shares, ratios, draws = time_steps(model, trained, rounds, folder)
        start = time.perf_counter()
        save_checkpoint(trained, base, saved)
        middle = time.perf_counter()
        assert compare_save([base], saved, trained).fault is None
        seconds = f"{middle - start:.2f} s, {time.perf_counter() - middle:.2f} s for {base.stat().st_size / 1e6:.0f} MB"
    own = f"{100 * statistics.mean(shares):.2f} % (at most {100 * max(shares):.2f} %)"
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
    draw = f"{statistics.mean(draws):.3f} of a step, {100 * statistics.mean(draws) / DRAW_EVERY:.3f} %"
    return f"| {dtype} | {ff} | {trained.count:,} | {own} | {ratio} | {draw} | {seconds} |"


def draw_row(steps: int) -> str:
    """A draw's CPU seconds in a run of `steps` steps, all of whose figures are random; the history's size."""
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(256, 256) for _ in range(MANY_BLOCKS))})
    debug = TrainingDebug(attach_slice(model, "0.5", 1), MANY_BLOCKS, [])
    fill_history(debug, steps)
    for update in debug.updates:
        update.normal_()
    with tempfile.TemporaryDirectory() as folder:
        tracker = start_tracker(folder)
        seconds = [timed(lambda: debug.after_save(None, steps, [tracker])) for _ in range(DRAWS)]
        tracker.finish()
    return f"| {steps:,} | {statistics.median(seconds):.3f} s | {debug.history.sums_CQR.nbytes / 1e6:.2f} MB |"


def fill_history(debug: TrainingDebug, steps: int) -> None:
    for _ in range(0, steps, READ_EVERY):
        figures_SQB = torch.rand(READ_EVERY, *debug.shown_in_QB.shape, dtype=torch.float64)
        debug.history.add(figures_SQB)
    debug.recent_SQB, debug.step = figures_SQB, steps


def start_tracker(folder: str) -> TensorBoardTracker:
    tracker = TensorBoardTracker("debug_cost", folder)
    tracker.start()
    return tracker


def time_steps(
    model: Blocks, trained: TrainedSlice, rounds: int, folder: str
) -> tuple[list[float], list[float], list[float]]:
    """For each pair of steps the watcher's share of its step, and that step's time over the other one's.

    Then the times of draws with a full history, each over that of a step that nobody watched.
    """
    optimizer = adamw(list(trained.parameters()))
    debug = TrainingDebug(trained, len(model.blocks), [])
    tracker = start_tracker(folder)
    fill_history(debug, STEPS[-1])
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
    shares, ratios, unwatched = [], [], []
    for number in range(rounds):
        results = {watched: step(watched) for watched in ((False, True) if number % 2 else (True, False))}
        shares.append(results[True][0] / results[True][1])
        ratios.append(results[True][1] / results[False][1])
        unwatched.append(results[False][1])
    seconds = statistics.median(unwatched)
    draws = [timed(lambda: debug.after_save(None, debug.seen, [tracker])) / seconds for _ in range(DRAWS)]
    tracker.finish()
    return shares, ratios, draws


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
