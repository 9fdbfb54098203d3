"""Benchmarks in parts: each is a process on one thread and writes one JSON file; what is done is not repeated."""

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
    """The flags: the output folder, and which parts are run how."""
    parser.add_argument("folder", type=Path, help="folder for all results")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only the parts whose names match")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="how many parts run at a time, each on one thread"
    )
    parser.add_argument("--report", action="store_true", help="report the parts that are done, and run nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)


def run_parts(options: argparse.Namespace, stages: Sequence[Sequence[str]], work: Callable[[str, Path], dict]) -> bool:
    """Runs all parts of a stage before the next one; False in the process of a part, where the caller should end."""
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
    """The path of the result of part `name`."""
    return folder / f"{name.replace(' ', '-')}.json"


def read_part(folder: Path, name: str) -> dict:
    """The result of a part; ends the process if that part is not done."""
    path = part_file(folder, name)
    if not path.exists():
        sys.exit(f"{path} is missing: do the part {name!r} first")
    return json.loads(path.read_text(encoding="utf-8"))
