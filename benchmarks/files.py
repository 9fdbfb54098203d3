"""What files of slices cost at 14B size: their size, the time and memory to apply, save and list them.

    python benchmarks/files.py --folder FOLDER      # needs 60 GB of room there

The base is a stand-in with the official names and shapes of Wan 14B (tests/oracle/checkpoint_keys.json), whose bytes
are zeros that take no room until they are copied; `--random_blocks` makes a smaller one of random bytes. `cp` is told
to write every byte; both it and ours end with fsync. Prints markdown for benchmarks/README.md.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KEYS = ROOT / "tests" / "oracle" / "checkpoint_keys.json"
FF = "0.001"

# What a training run does at a save: a slice that was attached to a model, written into a copy of the base.
SAVE = """
import sys, threading, time
from pathlib import Path
from utils.selective_finetune import attach_slice
from utils.slice_saving import {method}
from wan.loading import load_dit

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024 / 1e6

trained = attach_slice(load_dit(sys.argv[1], read_only=True), "0.001", 1)
before, most, ended = anonymous(), 0.0, False
def watch():
    global most
    while not ended:
        most = max(most, anonymous())
        time.sleep(0.02)
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
{method}(trained, sys.argv[1], sys.argv[2], concept="one", steps=1)
seconds = time.perf_counter() - began
ended = True
watcher.join()
print(seconds, most - before)
"""


@dataclass(frozen=True)
class Cost:
    """Seconds, CPU seconds, and the peak memory of the process in MB."""

    seconds: float
    cpu: float
    megabytes: float


def main() -> None:
    """Makes the stand-in and two slices, runs everything, prints the table."""
    flags = parse()
    folder = flags.folder
    folder.mkdir(parents=True, exist_ok=True)
    base = write_base(folder / "base.safetensors", flags.random_blocks)
    slices = [folder / f"concept{ffid}.slice.safetensors" for ffid in (1, 2)]
    for ffid, path in enumerate(slices, 1):
        # In processes of their own: what this one held would count as the peak of those that it starts.
        maker = multiprocessing.get_context("spawn").Process(target=write_random_slice, args=(base, path, ffid))
        maker.start()
        maker.join()
        assert maker.exitcode == 0
    rows = []
    for number in range(flags.rounds):
        copied = run(["cp", "--sparse=never", "--reflink=never", str(base), str(folder / "copy.safetensors")], folder)
        (folder / "copy.safetensors").unlink()
        out = folder / "applied.safetensors"
        applied = run([*COMMAND, "apply", str(base), *map(str, slices), "-o", str(out), "--overwrite"])
        listed = [run([*COMMAND, "list", str(out), *map(str, slices)]) for _ in range(3)]
        out.unlink()
        saved, increase = save(base, out, "save_checkpoint")
        out.unlink()
        slice_saved, slice_increase = save(base, folder / "saved.slice.safetensors", "save_slice")
        rows.append((copied, applied, min(listed, key=lambda cost: cost.seconds), saved, increase))
        print(f"round {number + 1}: {rows[-1]}, slice {slice_saved:.2f} s, {slice_increase:.0f} MB", file=sys.stderr)
    print("\n".join(report(base, slices, rows, slice_saved, own_list_time(slices))))


COMMAND = [sys.executable, "-m", "utils.slices"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the files, which are kept")
    parser.add_argument(
        "--random_blocks", type=int, help="a base of this many blocks with random bytes (default: zeros, all 40)"
    )
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def write_base(path: Path, random_blocks: int | None) -> Path:
    """A bf16 checkpoint with the official names; zeros take no space on the disk."""
    shapes = json.loads(KEYS.read_text())["t2v-14B and t2v-A14B"]
    if random_blocks is not None:
        shapes = {
            n: s for n, s in shapes.items() if not n.startswith("blocks.") or int(n.split(".")[1]) < random_blocks
        }
    table, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
        while random_blocks is not None and position > 0:
            file.write(os.urandom(min(position, 1 << 26)))
            position -= 1 << 26
    return path


def write_random_slice(base: Path, path: Path, ffid: int) -> None:
    """A slice of random values that fits the base."""
    import torch

    from utils.slice_saving import base_identity, read_slice, slice_digest, value_digest, write_slice
    from utils.slices.ledger import CONTRACT, KEY, Entry, ledger_text
    from utils.slices.on_base import units_of
    from wan.loading import read_checkpoint_header

    header = read_checkpoint_header(base)
    entry = Entry(CONTRACT, FF, ffid, f"concept{ffid}", 1000, datetime.now(timezone.utc).isoformat())
    units = units_of(header, entry)
    start = slice_digest({name: value_digest(values) for name, values in read_slice(base, units).items()})
    entry = replace(entry, base=base_identity(base), start=start)
    values = {name: torch.randn(own.count).bfloat16() for name, own in units.items()}
    write_slice(path, values, {KEY: ledger_text([entry])})


def run(command: Sequence[str], sync: Path | None = None) -> Cost:
    """Runs a command to its end; with `sync`, until the files in that folder are on the disk."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if sync:
        for path in sync.glob("copy*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
    assert status == 0, command
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def save(base: Path, out: Path, method: str) -> tuple[float, float]:
    """The seconds of a save in a training process, and the MB by which its own memory grew."""
    told = subprocess.run(
        [sys.executable, "-c", SAVE.replace("{method}", method), str(base), str(out)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return float(told[-2]), float(told[-1])


def own_list_time(files: Sequence[Path]) -> float:
    """The seconds of the listing itself, without the start of Python."""
    from utils.slices.listing import list_files, table

    return best(lambda: table(list_files(files)))


def best(job: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def report(base: Path, slices: Sequence[Path], rows: Sequence[tuple], slice_saved: float, listed: float) -> list[str]:
    from wan.safetensors_header import read_file_header

    size, values = slices[0].stat().st_size, sum(t.numel for t in read_file_header(slices[0])[0].values())
    copied, applied, listing, saved, increase = min(rows, key=lambda row: row[1].seconds / row[0].seconds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    memory = resource.getpagesize() * os.sysconf("SC_PHYS_PAGES") / 1e9
    ratios = [", ".join(f"{row[i].seconds / row[0].seconds:.2f}" for row in rows) for i in (1,)]
    saves = ", ".join(f"{row[3] / row[0].seconds:.2f}" for row in rows)
    return [
        f"Commit {commit.stdout.strip()}, {os.cpu_count()} cores ({platform.processor() or platform.machine()}), "
        f"{memory:.0f} GB of memory; base of {base.stat().st_size / 1e9:.1f} GB.",
        "",
        "| what | found | wanted |",
        "|---|---|---|",
        f"| slice file, {values:,} values | {size / 1e6:.2f} MB: 2 bytes a value and "
        f"{(size - 2 * values) / 1e3:.0f} kB | under 1 MB more |",
        f"| `cp`, then fsync | {copied.seconds:.1f} s | |",
        f"| `apply` of two slices, to `cp` | {applied.seconds:.1f} s; in each round {ratios[0]} | 1.3 |",
        f"| CPU seconds, `cp` and `apply` | {copied.cpu:.1f} s, {applied.cpu:.1f} s | |",
        f"| its memory, all of the process | {applied.megabytes:.0f} MB | 400 MB |",
        f"| a run's `save_checkpoint`, to `cp` | {saved:.1f} s; in each round {saves} | 1.3 |",
        f"| what it adds to the run's memory | {increase:.0f} MB | 400 MB |",
        f"| a run's `save_slice` | {slice_saved:.2f} s | |",
        f"| `list` of checkpoint and slices, with the start of Python | {listing.seconds:.2f} s | |",
        f"| `list` itself, two slices | {1e3 * listed:.1f} ms | 200 ms |",
    ]


if __name__ == "__main__":
    main()
