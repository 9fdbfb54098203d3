"""How long a command takes to start: `--help` of each script, and `utils.slices list`, beside the import of torch.

CPU seconds of whole processes, system time included, since they matter on a busy machine too. The runs take turns, and
the first of each, which reads from the disk, does not count.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("wan_cache_latents", "wan_cache_text_encoder_outputs", "wan_train_network", "wan_generate_video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each command (default: %(default)s)")
    parser.add_argument("--file", type=Path, default=ROOT / "examples/tiny_wan/tiny_wan_t2v.safetensors")
    args = parser.parse_args()
    commands = {
        "`import torch` alone": ("-c", "import torch"),
        **{f"`{script}.py --help`": (f"{script}.py", "--help") for script in SCRIPTS},
        "`python -m utils.slices list`, which does not import torch": ("-m", "utils.slices", "list", str(args.file)),
    }
    seconds = {name: [] for name in commands}
    for turn in range(args.runs + 1):
        for name, command in commands.items():
            took = cpu_seconds(command)
            seconds[name] += [took] if turn else []
    print_table(seconds, args.runs)


def cpu_seconds(command: Sequence[str]) -> float:
    """Of a Python process, from its start to its end."""
    before = os.times()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def print_table(seconds: dict[str, list[float]], runs: int) -> None:
    torch_alone = statistics.median(next(iter(seconds.values())))
    print(f"CPU seconds, median of {runs} (least to most):\n\n| what | CPU s | times `import torch` |\n|---|---|---|")
    for name, own in seconds.items():
        median = statistics.median(own)
        print(f"| {name} | {median:.2f} ({min(own):.2f} to {max(own):.2f}) | {median / torch_alone:.2f} |")


if __name__ == "__main__":
    main()
