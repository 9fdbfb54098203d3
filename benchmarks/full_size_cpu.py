"""Does Wan 14B train on a machine whose memory is too small for it? On the CPU, from the checkpoint file.

Writes a random bf16 checkpoint with the official names and shapes (28.6 GB of disk), runs the training script on it for
two steps of one 64x64 picture with all blocks swapped, and checks what the slice became; then the same for a second
concept, on top of the first one's slice file. Linux only (/proc).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.data.cache_files import image_latents_path, text_path, write_latents, write_text  # noqa: E402
from utils.selective_finetune import slice_indices  # noqa: E402
from wan.configs import TASKS, WanConfig  # noqa: E402
from wan.loading import read_checkpoint_header  # noqa: E402
from wan.model import WanModel  # noqa: E402
from wan.stored_tensors import read_tensor  # noqa: E402

FF = "0.001"
STEPS = 2
RATE = 1e-4
BASE = "random_14B_bf16.safetensors"
MATRICES = 400
VALUES = {1: 14_050_720, 2: 14_050_800}  # of each ffid; the second is trained on top of the first
SHIFT = 1 << 24


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(argv)
    flags.folder.mkdir(parents=True, exist_ok=True)
    config = TASKS["t2v-14B"].config
    base = flags.folder / BASE
    if not base.exists():
        seconds = timed(lambda: write_random_checkpoint(base, config))
        print(f"wrote {base}: {base.stat().st_size / 1e9:.1f} GB in {seconds:.0f} s", flush=True)
    write_dataset(flags.folder, config)
    before = fingerprint(base)
    for ffid in VALUES:
        peaks, seconds = measure(training_command(flags.folder, flags.blocks_to_swap, ffid))
        report(peaks, seconds, flags.blocks_to_swap, ffid)
        check_slice(flags.folder, base, STEPS, ffid)
        assert fingerprint(base) == before, "the checkpoint file was written to"
    if not flags.keep:
        base.unlink()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint; needs 29 GB")
    parser.add_argument("--blocks_to_swap", default="40")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for another run")
    return parser.parse_args(argv)


def timed(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_random_checkpoint(path: Path, config: WanConfig) -> None:
    """Tensor by tensor, so that the model is never in memory; norms are 1, matrices have standard deviation 0.02."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanModel(config).state_dict().items()}
    header, position = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + 2 * shape.numel()]}
        position += 2 * shape.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draws = random_values(max(shape.numel() for shape in shapes.values()))
    with path.with_suffix(".tmp").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(values_of(name, shape, draws).view(torch.uint8).numpy())
    path.with_suffix(".tmp").rename(path)


def random_values(largest: int) -> Iterator[torch.Tensor]:
    """Windows of one drawn table at changing places: drawing 14 billion values would take longer than the run."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(largest + SHIFT, generator=generator).mul_(0.02).bfloat16()
    while True:
        yield table[int(torch.randint(SHIFT, (), generator=generator)) :]


def values_of(name: str, shape: torch.Size, draws: Iterator[torch.Tensor]) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape.numel(), dtype=torch.bfloat16)
    return next(draws)[: shape.numel()]


def write_dataset(folder: Path, config: WanConfig) -> None:
    """One captioned 64x64 picture, with caches of random latents and text."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(16, 1, 8, 8, generator=generator).bfloat16()
    write_latents(image_latents_path(pictures, "a", (64, 64)), latents, (64, 64))
    write_text(text_path(pictures, "a"), torch.randn(20, config.text_dim, generator=generator).bfloat16(), "a")
    table = {"image_directory": pictures.as_posix(), "caption_extension": ".txt", "resolution": [64, 64]}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    (folder / "data.toml").write_text("\n".join(["[[datasets]]", *lines]))


def concept_name(ffid: int) -> str:
    return f"full_size{ffid}"


def slice_path(folder: Path, ffid: int) -> Path:
    return folder / f"{concept_name(ffid)}.slice.safetensors"


def training_command(folder: Path, blocks_to_swap: str, ffid: int) -> list[str]:
    """The training command; it saves only the slice, since a checkpoint has 28.6 GB."""
    earlier = [str(slice_path(folder, number)) for number in range(1, ffid)]
    return [
        *(sys.executable, str(ROOT / "wan_train_network.py"), "--task", "t2v-14B", "--dit", str(folder / BASE)),
        *("--dataset_config", str(folder / "data.toml"), "--output_dir", str(folder)),
        *("--output_name", concept_name(ffid), *(["--slices", *earlier] if earlier else [])),
        *("--ff", FF, "--ffid", str(ffid), "--mixed_precision", "bf16", "--gradient_checkpointing", "--seed", "1"),
        *("--max_train_steps", str(STEPS), "--learning_rate", str(RATE), "--max_data_loader_n_workers", "0"),
        *("--blocks_to_swap", blocks_to_swap, "--host_weights", "mapped", "--save_as", "slice"),
    ]


def measure(command: Sequence[str]) -> tuple[dict[str, int], float]:
    """The peak memory of the command in bytes, by kind, and the seconds that it took."""
    started = time.perf_counter()
    child = subprocess.Popen(command)
    peaks = {"RssAnon": 0, "RssShmem": 0, "RssFile": 0}
    while child.poll() is None:
        for kind, size in memory_of(child.pid).items():
            peaks[kind] = max(peaks[kind], size)
        time.sleep(0.05)
    if child.returncode:
        sys.exit(f"training ended with code {child.returncode}")
    return peaks, time.perf_counter() - started


def memory_of(pid: int) -> dict[str, int]:
    """The bytes that the process holds now; nothing if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except ProcessLookupError:
        return {}
    pairs = [line.split(":") for line in lines if line.startswith(("RssAnon", "RssShmem", "RssFile"))]
    return {kind: int(size.split()[0]) * 1024 for kind, size in pairs}


def fingerprint(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_size


def check_slice(folder: Path, base: Path, steps: int, ffid: int) -> None:
    """Checks that every matrix has its share, and that each value moved by about the learning rate per step."""
    found, tensors = load_file(slice_path(folder, ffid)), read_checkpoint_header(base).tensors
    assert len(found) == MATRICES, len(found)
    count = moved = 0
    farthest = 0.0
    for name, values in found.items():
        weight = read_tensor(tensors[name])
        start = weight.flatten()[slice_indices(name, weight.shape, FF, ffid)]
        difference = (values.float() - start.float()).abs()
        # A value in bf16 has eight bits.
        assert torch.all(difference <= 1.5 * RATE * steps + start.float().abs() / 2**8), name
        count, moved = count + len(values), moved + int((difference > 0).sum())
        farthest = max(farthest, difference.max().item())
    print(f"the slice: {count:,} values in {len(found)} matrices, {moved / count:.1%} moved, by up to {farthest:.1e}")
    assert count == VALUES[ffid] and moved > 0.8 * count


def report(peaks: dict[str, int], seconds: float, blocks_to_swap: str, ffid: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print()
    on = f" on top of {ffid - 1} slice file" if ffid > 1 else ""
    print(f"| {STEPS} steps{on}, {blocks_to_swap} blocks swapped, {os.cpu_count()} cores, {memory:.0f} GiB of RAM | |")
    print("|---|---|")
    print(f"| time, including loading | {seconds / 60:.1f} minutes |")
    print(f"| peak anonymous memory | {peaks['RssAnon'] / 1e9:.2f} GB |")
    print(f"| peak shared memory | {peaks['RssShmem'] / 1e9:.2f} GB |")
    print(f"| peak of file pages in memory (which the system can drop) | {peaks['RssFile'] / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
