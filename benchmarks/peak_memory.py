"""How much device memory does a training step of Wan take? Counted, not measured, so that no GPU is needed.

Each full-size model runs on the `meta` device, where tensors have shapes but no bytes, through the same placing,
streaming and training code; the live storages are added up. Attention and RMS norm are stand-ins that keep what
the kernels on a GPU keep.
A GPU adds its context (0.3-0.6 GB) and scratch memory inside kernels. --compile counts of the compiled functions their
results alone; --slices prints what slices of each size take.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from live_bytes import LiveBytes  # noqa: E402

import wan.model  # noqa: E402
from utils.files import readable  # noqa: E402
from utils.learning import conditions  # noqa: E402
from utils.learning.conditions import Conditioning  # noqa: E402
from utils.preserve.guard import Gathering, Guard  # noqa: E402
from utils.selective_finetune import attach_slice, block_linears, ids_available, slice_units  # noqa: E402
from utils.swap.backend import HostBackend  # noqa: E402
from utils.swap.block_inputs import BlockInputs  # noqa: E402
from utils.swap.placement import LoadedWeights, Placement, checkpoint_blocks, place_model  # noqa: E402
from utils.swap.plan import SwapConfig  # noqa: E402
from utils.swap.streamer import Traffic  # noqa: E402
from wan.compiling import pointwise_of  # noqa: E402
from wan.configs import TASKS, WanTask  # noqa: E402

META = torch.device("meta")
IMAGE, CLIP, CLIP_720P = (1, 64, 64), (21, 60, 104), (21, 90, 160)  # latents: a 512x512 frame, clips of 81 frames
FFS = ("0.00001", "0.0001", "0.0005", "0.001", "0.01", "0.1", "1.0")
CLIP_5B = (31, 44, 80)  # 121 frames of 1280x704, by the VAE of Wan 2.2


@dataclass(frozen=True)
class Case:
    name: str
    latents: tuple[int, int, int]  # frames, height, width
    blocks_to_swap: int
    ring_blocks: int = 2
    offload_inputs: bool = False
    limit: float | None = None  # GB, the figure to reach
    task: str = "t2v-14B"
    experts: int = 1  # 2: both of A14B, of which one has trained and left the device
    fp8: str = ""  # "scaled": --fp8_base --fp8_scaled
    guard: bool = False  # with its statistics gathered before the first step


CASES = (
    Case("512x512x1, S = 0", IMAGE, 0, limit=29.7),
    Case("512x512x1, S = 24", IMAGE, 24, limit=12.9),
    Case("512x512x1, S = 40, ring of 2 blocks", IMAGE, 40, limit=2.5),
    Case("512x512x1, S = 40, one block-sized buffer", IMAGE, 40, ring_blocks=1, limit=1.8),
    Case("832x480x81, S = 40, block inputs on the host", CLIP, 40, offload_inputs=True, limit=9.0),
    Case("1280x720x81, S = 40, block inputs on the host", CLIP_720P, 40, offload_inputs=True, limit=17.0),
    Case("832x480x81, S = 40", CLIP, 40),
    Case("512x512x1, S = 0, fp8", IMAGE, 0, limit=15.6, fp8="scaled"),
    Case("512x512x1, S = 24, fp8", IMAGE, 24, limit=7.2, fp8="scaled"),
    Case("512x512x1, S = 40, fp8, ring of 2 blocks", IMAGE, 40, limit=1.9, fp8="scaled"),
    Case("512x512x1, S = 40, fp8, one block-sized buffer", IMAGE, 40, ring_blocks=1, limit=1.6, fp8="scaled"),
    Case("512x512x1, S = 24, two experts", IMAGE, 24, limit=13.1, task="t2v-A14B", experts=2),
    Case("512x512x1, S = 40, ring of 2 blocks, two experts", IMAGE, 40, limit=2.8, task="t2v-A14B", experts=2),
    *(
        Case(f"832x480x81, S = {swapped}", CLIP, swapped, task=task)
        for task in ("i2v-14B", "i2v-A14B")
        for swapped in (0, 24, 40)
    ),
    Case("832x480x81, S = 40, block inputs on the host", CLIP, 40, offload_inputs=True, task="i2v-14B"),
    *(Case(f"1280x704x121, S = {swapped}", CLIP_5B, swapped, task="ti2v-5B") for swapped in (0, 24, 30)),
    Case("1280x704x121, S = 30, block inputs on the host", CLIP_5B, 30, offload_inputs=True, task="ti2v-5B"),
)


@dataclass(frozen=True)
class Peaks:
    """Bytes on the device: placed, and at the highest point of each part of a step; bytes copied to it by the step.

    The same of the pass that gathers a guard's statistics, 0 without one.
    """

    placed: int
    forward: int
    backward: int
    update: int
    sampling: int
    copied: int
    gathering: int = 0
    copied_gathering: int = 0

    @property
    def highest(self) -> int:
        return max(self.forward, self.backward, self.update, self.sampling, self.gathering)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ff", default="0.001")
    parser.add_argument("--blocks", type=int, help="of each model (fewer only to see that it works)")
    parser.add_argument("--compile", action="store_true", help="as with the trainer's --compile")
    parser.add_argument("--slices", action="store_true", help="print the table of slice sizes instead")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows that contain it")
    flags = parser.parse_args(argv)
    if flags.slices:
        return print_slices(flags.blocks, flags.compile)
    print(
        f"| bf16, ff {flags.ff} | placed | forward | backward | update | sampling | peak | to reach | copied |",
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if flags.only not in f"{case.task}, {case.name}":
            continue
        peaks = measure(case, flags.ff, flags.blocks, compiled=flags.compile)
        cells = [peaks.placed, peaks.forward, peaks.backward, peaks.update, peaks.sampling]
        limit = "" if case.limit is None else f"{case.limit:.1f}"
        row = " | ".join(f"{size / 1e9:.2f}" for size in cells)
        name, highest, copied = f"{case.task}, {case.name}", peaks.highest / 1e9, peaks.copied / 1e9
        print(f"| {name} | {row} | **{highest:.2f} GB** | {limit} | {copied:.1f} GB |", flush=True)


def print_slices(blocks: int | None, compiled: bool) -> None:
    """For each size of slice what Wan 14B takes on a 512x512 picture."""
    names = ("512x512x1, S = 40, one block-sized buffer", "512x512x1, S = 24")
    cases = [next(case for case in CASES if case.name == name) for name in names]
    print("| --ff | values | ids | GPU memory, S = 40 | S = 24 | slice file | state |\n|---|---|---|---|---|---|---|")
    for ff in FFS:
        values = slice_values(ff, blocks)
        peaks = " | ".join(f"{measure(case, ff, blocks, compiled=compiled).highest / 1e9:.2f} GB" for case in cases)
        row = f"| {ff} | {values:,} | {ids_available(ff):,} | {peaks}"
        # bf16; the difference and two moments of AdamW, fp32.
        print(f"{row} | {readable(2 * values)} | {readable(12 * values)} |", flush=True)


def slice_values(ff: str, blocks: int | None = None) -> int:
    """How many values of Wan 14B a slice holds."""
    config = TASKS["t2v-14B"].config
    with META:
        model = wan.model.WanModel(replace(config, num_layers=blocks or config.num_layers))
    shapes = {f"{name}.weight": linear.weight.shape for name, linear in block_linears(model).items()}
    return sum(slice_units(name, shape, ff, 1).count for name, shape in shapes.items())


class DeviceBytes(LiveBytes):
    """Live bytes without those of tensors that stand for host memory."""

    def __init__(self, host: Sequence[Tensor]):
        super().__init__()
        self.host = list(host)  # held, so that no other storage gets one of their keys
        self._host_keys = {tensor.untyped_storage()._cdata for tensor in self.host}

    def leave_out(self, tensor: Tensor) -> None:
        self.host.append(tensor)
        key = tensor.untyped_storage()._cdata
        self._host_keys.add(key)
        self.live -= self._sizes[key]

    def add(self, *tensors: Tensor) -> None:
        super().add(*(t for t in tensors if t.is_meta and t.untyped_storage()._cdata not in self._host_keys))


class MetaBackend(HostBackend):
    """The meta device with host memory beside it."""

    def __init__(self, count: "DeviceBytes | None" = None):
        super().__init__(META)
        self.count = count

    def host_buffer(self, size: int) -> Tensor:
        buffer = super().host_buffer(size)
        self.count.leave_out(buffer)
        return buffer


def measure(case: Case, ff: str = "0.001", blocks: int | None = None, steps: int = 3, compiled: bool = False) -> Peaks:
    """The peaks of the last step, and of a sampling pass after it; `blocks` instead of the model's own number.

    Of three steps, the first learns the order of the weights, and the second fills what the third one starts with.
    """
    task = TASKS[case.task]
    blocks = blocks or task.config.num_layers
    with META:
        config = replace(task.config, num_layers=blocks)
        models = [wan.model.WanModel(config).bfloat16().requires_grad_(False) for _ in range(case.experts)]
    count = DeviceBytes([parameter.data for model in models for parameter in model.parameters()])
    backend = MetaBackend(count)
    with (
        mock.patch.object(wan.model, "attention", flash_like_attention),
        mock.patch.object(torch.nn.RMSNorm, "forward", fused_like_rms_norm),
        count,
    ):
        for model in models if compiled else ():
            wan.model.use_pointwise(model, pointwise_of(partial(results_alone, count)))
        inputs = BlockInputs(blocks, META, backend) if case.offload_inputs else None
        experts = [(model, *set_up(model, case, ff, inputs, backend)) for model in models]
        for *expert, place in experts[:-1]:  # whose slice and optimizer's state stay on the device
            with place():
                count.add(*expert[0].parameters())
                step(*expert, task, case.latents, count)
        model, trained, optimizer, place = experts[-1]
        placement = place()
        count.add(*model.parameters())
        placed = count.live
        traffic = placement.streamer.traffic if placement.streamer else Traffic()
        for _ in range(steps):
            before = traffic.bytes
            forward, backward, update = step(model, trained, optimizer, task, case.latents, count)
        copied, before = traffic.bytes - before, traffic.bytes
        gathered = []
        gathering = peak_of(count, lambda: gathered.append(gather(model, trained, task, case))) if case.guard else 0
        copied_gathering = traffic.bytes - before
        if case.guard:
            *_, update = step(model, trained, optimizer, task, case.latents, count, *gathered)
        sampling = peak_of(count, lambda: sample(model, task, case.latents))
    return Peaks(placed, forward, backward, update, sampling, copied, gathering, copied_gathering)


def gather(model, trained, task: WanTask, case: Case) -> Guard:
    """A pass of the guard's gathering, and the guard of its sums."""
    gathered = Gathering(trained)
    with gathered.of_passes():
        predicted = predict(model, task, case.latents)
        gathered.backward(predicted, torch.empty_like(predicted), predicted.numel())
    return Guard(1.0, gathered.sums)


def set_up(model, case: Case, ff: str, inputs: BlockInputs | None, backend: MetaBackend):
    """The slice, its optimizer, and what places the model."""
    trained = attach_slice(model, ff, 1, device=META)
    checkpoint_blocks(model, inputs)
    swap = SwapConfig(min(case.blocks_to_swap, len(model.blocks)), case.ring_blocks, fp8=case.fp8)
    loaded = LoadedWeights(mapped=True, returns=case.experts > 1)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    return trained, optimizer, partial(place, model, swap, trained, loaded, backend)


def place(model, swap: SwapConfig, trained, loaded: LoadedWeights, backend: MetaBackend) -> Placement:
    """place_model; what waits on the host is not counted, where it is not the file's own."""
    placement = place_model(model, META, swap, trained, loaded, backend)
    if swap.fp8 and placement.streamer:
        hosts = [weight.host for weight in placement.streamer.weights]
        for host in {host.untyped_storage()._cdata: host for host in hosts}.values():
            backend.count.leave_out(host)
    return placement


def step(
    model, trained, optimizer, task: WanTask, latents, count: DeviceBytes, guard: Guard | None = None
) -> tuple[int, int, int]:
    losses = []
    forward = peak_of(count, lambda: losses.append(predict(model, task, latents).square().mean()))
    backward = peak_of(count, lambda: losses.pop().backward())

    def update() -> None:
        if guard:
            guard.add_gradient(trained)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.write_back()

    return forward, backward, peak_of(count, update)


def peak_of(count: DeviceBytes, action) -> int:
    count.restart_peak()
    action()
    return count.peak


@torch.no_grad()
def sample(model, task: WanTask, latents) -> None:
    predict(model, task, latents)


def predict(model, task: WanTask, latents: tuple[int, int, int]) -> Tensor:
    """One clip, which starts from a picture where the model can."""
    x, t = torch.empty(1, task.latents.channels, *latents, device=META), torch.empty(1, device=META)
    context = [torch.empty(40, 4096, dtype=torch.bfloat16, device=META)]
    return conditions.predict(model, x, t, context, given_to(task, latents))


def given_to(task: WanTask, latents: tuple[int, int, int]) -> Conditioning:
    """What the task's model is given beside noisy latents and text."""
    if task.config.model_type == "ti2v":
        return Conditioning(starts_clean_B=torch.ones(1, dtype=torch.bool, device=META))
    wanted, joined = task.conditions, task.config.in_dim - task.config.out_dim
    y = torch.empty(1, joined, *latents, device=META) if wanted.pictures else None
    tokens = wanted.pictures * wan.model.PICTURE_TOKENS
    clip = torch.empty(1, tokens, task.config.image_dim, device=META) if wanted.clip else None
    return Conditioning(y, clip)


class _FlashLike(torch.autograd.Function):
    """Keeps q, k, v, the output and one float32 per head and token; backward adds up dq in float32."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        sum_dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        return sum_dq.to(q.dtype), torch.empty_like(k), torch.empty_like(v)


def flash_like_attention(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    return _FlashLike.apply(q_BLNK, k_BSNK, v_BSNK).flatten(2)


class _FusedLike(torch.autograd.Function):
    """Keeps the input and one float32 per token; other devices than CUDA keep a float32 copy of the input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None


def results_alone(count: DeviceBytes, function: Callable) -> Callable:
    """`function` as its compiled form takes memory: for its results, and for nothing on the way to them."""

    def run(*inputs):
        with _disable_current_modes():
            results = function(*inputs)
        count.add(*(results if isinstance(results, tuple) else (results,)))
        return results

    return run


def fused_like_rms_norm(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedLike.apply(x, norm.weight)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
