"""How much device memory does a training step of Wan take? Counted, not measured, so that no GPU is needed.

Each full-size model runs on the `meta` device, where tensors have shapes but no bytes, through the same placing,
streaming and training code; the live storages are added up. Attention, RMS norm and bitsandbytes are stand-ins that
keep what the kernels on a GPU keep; AdamW goes over the matrices one by one, which takes a little more than its kernel.
A GPU adds its context (0.3-0.6 GB) and scratch memory inside kernels. --compile counts of the compiled functions their
results alone; --slices prints what slices of each size take, with AdamW and AdamW8bit.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from live_bytes import LiveBytes  # noqa: E402
from on_meta import META, DeviceBytes, MetaBackend, gpu_kernels, results_alone  # noqa: E402

import wan.model  # noqa: E402
from utils.files import readable  # noqa: E402
from utils.learning import conditions  # noqa: E402
from utils.learning.conditions import Conditioning  # noqa: E402
from utils.learning.optimizers import OptimizerConfig, build_optimizer  # noqa: E402
from utils.preserve.guard import Gathering, Guard  # noqa: E402
from utils.sampling.batches import rows_together  # noqa: E402
from utils.selective_finetune import attach_slice, block_linears, ids_available, slice_units  # noqa: E402
from utils.swap.block_inputs import BlockInputs  # noqa: E402
from utils.swap.placement import LoadedWeights, Placement, checkpoint_blocks, place_model  # noqa: E402
from utils.swap.plan import SwapConfig  # noqa: E402
from utils.swap.streamer import Traffic  # noqa: E402
from wan.compiling import pointwise_of  # noqa: E402
from wan.configs import TASKS, LatentLayout, WanTask  # noqa: E402
from wan.vae import WAN_2_1, WAN_2_2, WanVAE, autoencoder_settings  # noqa: E402

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
    """Bytes on the device, of a training step and of samples; `state` is what a saved state holds of the slice.

    `gathering` is the pass that gathers a guard's statistics; 0 without one.
    """

    placed: int  # before the first step
    forward: int  # from here the highest points
    backward: int
    update: int
    sampling: int  # a pass through the model
    between: int  # what stays from step to step
    copied: int  # to the device, by a step
    state: int
    gathering: int = 0
    copied_gathering: int = 0

    @property
    def highest(self) -> int:
        """Of a training step, and of what comes before the first one."""
        return max(self.forward, self.backward, self.update, self.gathering)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ff", default="0.001")
    parser.add_argument("--blocks", type=int, help="of each model (fewer only to see that it works)")
    parser.add_argument("--compile", action="store_true", help="as with the trainer's --compile")
    parser.add_argument("--slices", action="store_true", help="print the table of slice sizes instead")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows that contain it")
    parser.add_argument("--optimizer", default="AdamW", help="AdamW or AdamW8bit (default: %(default)s)")
    flags = parser.parse_args(argv)
    if flags.slices:
        return print_slices(flags.blocks, flags.compile)
    parts = "placed | forward | backward | update | peak | to reach | copied | a sample's pass | decoding"
    print(f"| bf16, ff {flags.ff} | {parts} |\n|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        name = f"{case.task}, {case.name}"
        if flags.only not in name:
            continue
        peaks = measure(case, flags.ff, flags.blocks, compiled=flags.compile, optimizer=flags.optimizer)
        placed, forward, backward, update, highest, sampling, decoding = (
            f"{size / 1e9:.2f}"
            for size in (
                *(peaks.placed, peaks.forward, peaks.backward, peaks.update, peaks.highest, peaks.sampling),
                peaks.between + decoding_bytes(TASKS[case.task].latents, case.latents),
            )
        )
        limit = "" if case.limit is None else f"{case.limit:.1f}"
        drawn = f"{sampling}, {rows_of(case)} at a time | {decoding}"
        step_parts = f"{placed} | {forward} | {backward} | {update} | **{highest} GB** | {limit}"
        print(f"| {name} | {step_parts} | {peaks.copied / 1e9:.1f} GB | {drawn} |", flush=True)


def print_slices(blocks: int | None, compiled: bool) -> None:
    """For each size of slice what Wan 14B takes on a 512x512 picture; bytes a value are beyond the smallest slice's."""
    names = ("512x512x1, S = 40, one block-sized buffer", "512x512x1, S = 24")
    most, some = (next(case for case in CASES if case.name == name) for name in names)
    each = "GPU memory, S = 40 | bytes a value | state"
    print(f"| --ff | values | ids | slice file | S = 24 | {each} | AdamW8bit: {each} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    smallest = {}
    for ff in FFS:
        values, cells = slice_values(ff, blocks), []
        for optimizer in ("AdamW", "AdamW8bit"):
            peaks = measure(most, ff, blocks, compiled=compiled, optimizer=optimizer)
            first_values, first = smallest.setdefault(optimizer, (values, peaks.highest))
            each_value = f"{(peaks.highest - first) / (values - first_values):.2f}" if values > first_values else ""
            cells += [f"{peaks.highest / 1e9:.2f} GB", each_value, readable(peaks.state)]
        swapped_less = f"{measure(some, ff, blocks, compiled=compiled).highest / 1e9:.2f} GB"
        row = [ff, f"{values:,}", f"{ids_available(ff):,}", readable(2 * values), swapped_less, *cells]
        print(f"| {' | '.join(row)} |", flush=True)


def slice_values(ff: str, blocks: int | None = None) -> int:
    """How many values of Wan 14B a slice holds."""
    config = TASKS["t2v-14B"].config
    with META:
        model = wan.model.WanModel(replace(config, num_layers=blocks or config.num_layers))
    shapes = {f"{name}.weight": linear.weight.shape for name, linear in block_linears(model).items()}
    return sum(slice_units(name, shape, ff, 1).count for name, shape in shapes.items())


def measure(
    case: Case,
    ff: str = "0.001",
    blocks: int | None = None,
    steps: int = 3,
    compiled: bool = False,
    optimizer: str = "AdamW",
) -> Peaks:
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
    with gpu_kernels(optimizer), count:
        for model in models if compiled else ():
            wan.model.use_pointwise(model, pointwise_of(partial(results_alone, count)))
        inputs = BlockInputs(blocks, META, backend) if case.offload_inputs else None
        experts = [(model, *set_up(model, case, ff, inputs, backend, optimizer)) for model in models]
        for *expert, place in experts[:-1]:  # whose slice and optimizer's state stay on the device
            with place():
                count.add(*expert[0].parameters())
                step(*expert, task, case.latents, count)
        model, trained, own, place = experts[-1]
        placement = place()
        count.add(*model.parameters())
        placed = count.live
        traffic = placement.streamer.traffic if placement.streamer else Traffic()
        for _ in range(steps):
            before = traffic.bytes
            forward, backward, update = step(model, trained, own, task, case.latents, count)
        copied, before = traffic.bytes - before, traffic.bytes
        gathered = []
        gathering = peak_of(count, lambda: gathered.append(gather(model, trained, task, case))) if case.guard else 0
        copied_gathering = traffic.bytes - before
        if case.guard:
            *_, update = step(model, trained, own, task, case.latents, count, *gathered)
        between = count.live
        sampling = peak_of(count, lambda: sample(model, task, case.latents, rows_of(case)))
    of_guard = (gathering, copied_gathering)
    return Peaks(placed, forward, backward, update, sampling, between, copied, state_bytes(own), *of_guard)


def gather(model, trained, task: WanTask, case: Case) -> Guard:
    """A pass of the guard's gathering, and the guard of its sums."""
    gathered = Gathering(trained)
    with gathered.of_passes():
        predicted = predict(model, task, case.latents)
        gathered.backward(predicted, torch.empty_like(predicted), predicted.numel())
    return Guard(1.0, gathered.sums)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a saved state holds of a slice: the differences and the optimizer's own tensors."""
    values = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    storages = [tensor.untyped_storage() for tensor in (*values, *parameters)]  # some are shared
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def rows_of(case: Case) -> int:
    """How many latents of samples go through the model at a time, where --sample_batch does not say."""
    return rows_together(case.latents, TASKS[case.task].config)


@functools.cache
def decoding_bytes(layout: LatentLayout, latents: tuple[int, int, int]) -> int:
    """The VAE's weights, and the most that it takes to decode one sample, in bf16."""
    from diffusers import AutoencoderKLWan  # here, because it takes seconds

    kind, widths = (WAN_2_1, (96, 96)) if layout == WAN_2_1.layout else (WAN_2_2, (160, 256))
    with META:
        names = ("encoder.conv1.weight", "decoder.head.0.gamma")
        tensors = {name: torch.empty(width) for name, width in zip(names, widths, strict=True)}
        model = AutoencoderKLWan(**autoencoder_settings(tensors, kind))
    torch.nn.Module.to(model, torch.bfloat16)
    with LiveBytes() as count:
        count.add(*model.parameters())
        WanVAE(model, kind).decode(torch.empty(1, layout.channels, *latents, device=META))
    return count.peak


def set_up(model, case: Case, ff: str, inputs: BlockInputs | None, backend: MetaBackend, optimizer: str):
    """The slice, its optimizer, and what places the model."""
    trained = attach_slice(model, ff, 1, device=META)
    checkpoint_blocks(model, inputs)
    swap = SwapConfig(min(case.blocks_to_swap, len(model.blocks)), case.ring_blocks, fp8=case.fp8)
    loaded = LoadedWeights(mapped=True, returns=case.experts > 1)
    own = build_optimizer(OptimizerConfig(optimizer), trained.parameters())
    return trained, own, partial(place, model, swap, trained, loaded, backend)


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
def sample(model, task: WanTask, latents, rows: int) -> None:
    predict(model, task, latents, rows)


def predict(model, task: WanTask, latents: tuple[int, int, int], rows: int = 1) -> Tensor:
    """Of clips which start from a picture where the model can."""
    x, t = torch.empty(rows, task.latents.channels, *latents, device=META), torch.empty(rows, device=META)
    context = [torch.empty(40, 4096, dtype=torch.bfloat16, device=META) for _ in range(rows)]
    return conditions.predict(model, x, t, context, given_to(task, latents, rows))


def given_to(task: WanTask, latents: tuple[int, int, int], rows: int) -> Conditioning:
    """What the task's model is given beside noisy latents and text."""
    if task.config.model_type == "ti2v":
        return Conditioning(starts_clean_B=torch.ones(rows, dtype=torch.bool, device=META))
    wanted, joined = task.conditions, task.config.in_dim - task.config.out_dim
    y = torch.empty(rows, joined, *latents, device=META) if wanted.pictures else None
    tokens = wanted.pictures * wan.model.PICTURE_TOKENS
    clip = torch.empty(rows, tokens, task.config.image_dim, device=META) if wanted.clip else None
    return Conditioning(y, clip)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
