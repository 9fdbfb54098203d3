"""Benchmarks in parts: each is a process on one thread and leaves one JSON file; what is there is not done again."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The output folder and how to go about the parts."""
    parser.add_argument("folder", type=Path, help="for all results")
    parser.add_argument("--only", default="", metavar="REGEX", help="the parts whose names match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parts at a time, each on one thread")
    parser.add_argument("--report", action="store_true", help="of the parts that are there; nothing is run")
    parser.add_argument("--part", help=argparse.SUPPRESS)


def run_parts(options: argparse.Namespace, stages: Sequence[Sequence[str]], work: Callable[[str, Path], dict]) -> bool:
    """Does all parts of each stage before the next; False in a part's own process, where the caller is to end."""
    if options.report and not any(options.folder.glob("*.json")):
        sys.exit(f"error: {options.folder} holds no results yet")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        result = work(options.part, options.folder)
        text = json.dumps(result | {"cpu_seconds": time.process_time()})
        unfinished = part_file(options.folder, options.part).with_suffix(".tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(unfinished.with_suffix(".json"))
        return False
    for stage in stages if not options.report else ():
        wanted = [name for name in stage if re.search(options.only, name)]
        missing = [name for name in wanted if not part_file(options.folder, name).exists()]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda name: _in_a_process(name, options.folder), missing))
    return True


def _in_a_process(name: str, folder: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, sys.argv[0], str(folder), "--part", name]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
        sys.exit(f"{name} failed; what is done stays, and the same command goes on with the rest")
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def part_file(folder: Path, name: str) -> Path:
    """Where the part `name` leaves its result."""
    return folder / f"{name.replace(' ', '-')}.json"


def read_part(folder: Path, name: str) -> dict:
    """The result of a part that is done; the process ends where it is not."""
    path = part_file(folder, name)
    if not path.exists():
        sys.exit(f"{path} is missing: do the part {name!r} first")
    return json.loads(path.read_text(encoding="utf-8"))
