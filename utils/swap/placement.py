"""Places a Wan model on a device: blocks that do not fit wait on the host and stream through when they are needed.

Forward and backward of a streamed matrix each ask for it anew and keep nothing, so checkpointing or none, accumulation
and passes without gradient in between are all right by construction.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.files import readable
from utils.selective_finetune import SlicedMatrix, TrainedSlice
from utils.slices.overlay import Overlay
from utils.swap.backend import CudaBackend, HostBackend, make_backend
from utils.swap.block_inputs import BlockInputs
from utils.swap.host_store import BackgroundCopies, HostStore, aligned, make_host_store
from utils.swap.plan import SwapConfig, SwapPlan, WeightSizes, plan_swap
from utils.swap.streamer import StreamedWeight, WeightStreamer
from wan.configs import WanConfig
from wan.errors import InputError
from wan.model import LinearFloat32, WanModel


@dataclass(frozen=True)
class Placement:
    """Where the weights are, in bytes: on the device in all, its buffers, what streams, RAM beside the file's pages."""

    device_bytes: int
    buffer_bytes: int = 0
    streamed_bytes: int = 0
    streamed_blocks: int = 0
    host_bytes: int = 0
    host_mode: str = ""  # of the host store; "" where nothing is streamed
    note: str = ""
    streamer: WeightStreamer | None = None


def place_model(
    model: WanModel,
    device: torch.device | str,
    blocks_to_swap: int = 0,
    trained: TrainedSlice | None = None,
    swap: SwapConfig | None = None,
    mapped: bool = False,
    backend: HostBackend | CudaBackend | None = None,
    reserved: int = 0,
    overlays: Mapping[nn.Linear, Overlay] | None = None,
) -> Placement:
    """Moves the model to `device`, but for what streams from the host: `blocks_to_swap` blocks, or as `swap` says.

    `mapped`: the block matrices are a file's own bytes so far; `reserved`: bytes of RAM to leave for other uses.
    With a trained slice (attach it first) what stays on the device becomes private memory, since the slice is written
    into it. `overlays` are put into what is private then, and into each copy of what stays mapped. InputError if
    swap.weights_vram is too little.
    """
    device, swap, overlays = torch.device(device), swap or SwapConfig(), overlays or {}
    if swap.weights_vram is not None:  # which they may lie in
        beside = sum(overlay.nbytes for overlay in overlays.values())
        swap = replace(swap, weights_vram=swap.weights_vram - beside)
    backend = backend or make_backend(device)
    plan = plan_swap(weight_sizes(model), blocks_to_swap, swap)
    streamed = _streamed_linears(model, plan)
    on_host = {linear.weight for linear in streamed}
    resident = [parameter for parameter in model.parameters() if parameter not in on_host]
    overlaid = {linear.weight for linear in overlays}
    for parameter in resident:
        parameter.data = parameter.data.to(device, copy=trained is not None or parameter in overlaid)
    resident_bytes = sum(parameter.nbytes for parameter in resident)
    if not streamed:
        _put_in(overlays)
        return Placement(resident_bytes)

    store = make_host_store([linear.weight for linear in streamed], swap.host_weights, backend, mapped, reserved)
    stays_mapped = set(streamed) if store.mode == "mapped" else set()
    beside = {linear: overlay.to(device) for linear, overlay in overlays.items() if linear in stays_mapped}
    _put_in({linear: overlay for linear, overlay in overlays.items() if linear not in stays_mapped})
    return Placement(
        device_bytes=resident_bytes + plan.slot_bytes + sum(overlay.nbytes for overlay in beside.values()),
        buffer_bytes=plan.slot_bytes,
        streamed_bytes=sum(linear.weight.nbytes for linear in streamed),
        streamed_blocks=len(plan.streamed),
        host_bytes=store.bytes,
        host_mode=store.mode,
        note=store.note,
        streamer=_stream(model, streamed, plan, store, backend, trained, beside),
    )


def _put_in(overlays: Mapping[nn.Linear, Overlay]) -> None:
    for linear, overlay in overlays.items():
        overlay.write(linear.weight.data)


def check_swap(
    config: WanConfig, dtype: torch.dtype, device: torch.device, blocks_to_swap: int, swap: SwapConfig, mapped: bool
) -> None:
    """InputError, before the model loads, if its weights cannot be placed so; `mapped` as for place_model."""
    if blocks_to_swap > config.num_layers:
        raise InputError(f"--blocks_to_swap {blocks_to_swap}: this model has {config.num_layers} blocks")
    if swap.host_weights == "pinned" and device.type != "cuda":
        raise InputError(f"pinned memory is for copies to a GPU, and the device is {device}: use --host_weights mapped")
    if swap.host_weights == "mapped" and not mapped:
        raise InputError(
            "--host_weights mapped: the weights in use are not the file's own bytes, since they are cast at load; "
            "leave it out"
        )
    if swap.weights_vram is not None:
        with torch.device("meta"):
            plan_swap(weight_sizes(WanModel(config).to(dtype)), blocks_to_swap, swap)


def memory_line(placement: Placement, device: torch.device) -> str:
    """Where the weights lie and stream from, with the VRAM and RAM that they take."""
    line = f"memory: {readable(placement.device_bytes)} of weights on {device}"
    if not placement.host_mode:
        return line
    where = {
        "pinned": f"page-locked RAM ({readable(placement.host_bytes)})",
        "staged": f"RAM ({readable(placement.host_bytes)})",
        "mapped": "the checkpoint file (RAM: only what the system caches)",
    }[placement.host_mode]
    note = f"; {placement.note}" if placement.note else ""
    streamed = f"{placement.streamed_blocks} blocks ({readable(placement.streamed_bytes)}) stream from {where}"
    return f"{line}, buffers of {readable(placement.buffer_bytes)} in it; {streamed}{note}"


def checkpoint_blocks(model: WanModel, inputs: BlockInputs | None = None) -> None:
    """Recomputes each block in backward instead of keeping what it saved; `inputs` keeps the blocks' own inputs."""
    for number, block in enumerate(model.blocks):
        # Wan has no dropout, so there is no random state to restore.
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward if inputs is None else functools.partial(inputs.around, number, forward)


def weight_sizes(model: WanModel) -> WeightSizes:
    """What swapping can move of this model, and what it leaves on the device."""
    matrices = [linear.weight.nbytes for linear in _linears(model.blocks[0])]
    outside = sum(linear.weight.nbytes for linear in _outside(model))
    in_all = sum(parameter.nbytes for parameter in model.parameters())
    return WeightSizes(len(model.blocks), matrices, outside, in_all - outside - len(model.blocks) * sum(matrices))


def _stream(
    model: WanModel,
    linears: Sequence[nn.Linear],
    plan: SwapPlan,
    store: HostStore,
    backend: HostBackend | CudaBackend,
    trained: TrainedSlice | None,
    overlays: Mapping[nn.Linear, Overlay],
) -> WeightStreamer:
    """Has these layers take their weights from a streamer, which learns of every pass of the model."""
    matrices = {} if trained is None else {matrix.linear: matrix for matrix in trained.matrices.values()}
    streamer = WeightStreamer(
        [
            StreamedWeight(piece, matrices.get(linear), overlays.get(linear))
            for linear in linears
            for piece in _pieces(linear)
        ],
        plan.slots,
        backend,
        backend if store.mode == "pinned" else BackgroundCopies(backend),
        version=lambda: 0 if trained is None else trained.version,
        store=store,
    )
    _attach(linears, matrices, streamer)
    model.register_forward_pre_hook(
        lambda *_: streamer.begin_pass("training" if torch.is_grad_enabled() else "no grad")
    )
    return streamer


def _streamed_linears(model: WanModel, plan: SwapPlan) -> list[nn.Linear]:
    streamed = [linear for number in plan.streamed for linear in _linears(model.blocks[number])]
    if plan.streams_outside:
        largest = max(plan.slots)
        return [linear for linear in _outside(model) if aligned(_pieces(linear)[0].nbytes) <= largest] + streamed
    return streamed


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _outside(model: WanModel) -> list[nn.Linear]:
    """What comes before the blocks, where no gradient goes; the head is small, and a gradient goes through it."""
    return [
        linear
        for part in (model.time_embedding, model.time_projection, model.text_embedding)
        for linear in _linears(part)
    ]


def _pieces(linear: nn.Linear) -> Sequence[Tensor]:
    """The parts in which a layer reads its weight."""
    return linear.weight.data.chunk(linear.pieces) if isinstance(linear, LinearFloat32) else [linear.weight.data]


def _attach(linears: Sequence[nn.Linear], matrices: Mapping[nn.Linear, SlicedMatrix], streamer: WeightStreamer) -> None:
    """Has each layer ask the streamer for its weight; the streamer knows them by number, in this order."""
    first = 0
    for linear in linears:
        count = len(_pieces(linear))
        fetches = [functools.partial(streamer.use, number) for number in range(first, first + count)]
        first += count
        if linear in matrices:
            (matrices[linear].fetch,) = fetches
        elif isinstance(linear, LinearFloat32):
            linear.forward = functools.partial(_float32_forward, linear, fetches)
        else:
            linear.forward = functools.partial(_streamed_forward, linear, *fetches)


def _streamed_forward(linear: nn.Linear, fetch: Callable[[], Tensor], x: Tensor) -> Tensor:
    return _StreamedLinear.apply(x, linear.bias, fetch)


class _StreamedLinear(torch.autograd.Function):
    """F.linear with a frozen weight that is fetched when it is needed and not kept."""

    @staticmethod
    def forward(ctx, x, bias, fetch):
        ctx.fetch = fetch
        return F.linear(x, fetch(), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.fetch() if ctx.needs_input_grad[0] else None, None, None


@torch.no_grad()
def _float32_forward(linear: LinearFloat32, fetches: Sequence[Callable[[], Tensor]], x: Tensor) -> Tensor:
    assert not x.requires_grad, "only layers before the blocks are streamed in pieces"
    biases = linear.bias.chunk(len(fetches))
    parts = [F.linear(x, fetch().float(), bias.float()) for fetch, bias in zip(fetches, biases, strict=True)]
    return torch.cat(parts, dim=-1)
