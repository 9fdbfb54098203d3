"""What reading pictures costs: hashing, decoding, resizing, not the VAE; --before compares with another checkout.

    git worktree add ../before HEAD~1 && python benchmarks/decode.py --pictures 1000 --before ../before

Processor time of one thread, the median (lowest-highest) of the rounds. Twenty pictures of 2 megapixels are read again
and again, each checkout in a process of its own, in turns.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SIZE = (1728, 1152)  # 2 megapixels
BUCKET = (640, 640)  # square, so that turned pictures are scaled as much as others


def main() -> None:
    args = _parse()
    if args.read:
        print(_seconds(Path(args.read), args.pictures))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder), args.pictures, args.kind)
        checkouts = {"this": ROOT} | ({"before": args.before.resolve()} if args.before else {})
        seconds = {name: [] for name in checkouts}
        for number in range(args.rounds):  # in turns, so that what else the computer does meets both
            for name in sorted(checkouts, reverse=number % 2 == 1):
                seconds[name].append(_run(checkouts[name], folder, args.pictures))
    for name, times in seconds.items():
        print(f"{name}: {_spread([1000 * time / args.pictures for time in times], 1)} ms a picture")
    if args.before:
        ratios = [this / before for this, before in zip(seconds["this"], seconds["before"], strict=True)]
        print(f"this / before, within a round: {_spread(ratios, 2)}")


def _spread(values: list[float], digits: int) -> str:
    """The median (lowest-highest)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kind", choices=["jpg", "png", "transparent", "phone"], default="jpg")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # the folder, in the process that is measured
    return parser.parse_args()


def _write_pictures(folder: Path, count: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(min(count, 20)):
        coarse = Image.fromarray(rng.integers(0, 256, (72, 108, 4), np.uint8))
        image = coarse.resize(SIZE, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[274] = 6
        if kind in ("png", "transparent"):
            (image if kind == "transparent" else image.convert("RGB")).save(folder / f"{number}.png")
        else:
            image.convert("RGB").save(
                folder / f"{number}.jpg", quality=92, **({"exif": exif} if kind == "phone" else {})
            )


def _run(checkout: Path, folder: str, count: int) -> float:
    command = [sys.executable, __file__, "--read", folder, "--pictures", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def _seconds(folder: Path, count: int) -> float:
    try:
        from utils.pixels.pictures import read_image
    except ImportError:  # a checkout from before that module
        from utils.pixels.media import read_image
    try:
        from utils.data.origins import read_origin
    except ImportError:  # a checkout whose caches did not say what they were made of

        def read_origin(path: Path, made_by: dict) -> None:
            pass

    files = sorted(folder.iterdir())
    read_image(files[0], BUCKET)
    start = time.process_time()
    for number in range(count):
        read_origin(files[number % len(files)], {})
        read_image(files[number % len(files)], BUCKET)
    return time.process_time() - start


if __name__ == "__main__":
    main()
