"""Places a Wan model on a device: blocks that do not fit wait on the host and stream in when they are needed.

Forward and backward of a streamed matrix each ask for it anew and keep nothing, so checkpointing or none, accumulation,
and passes without gradient in between all work by construction.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

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
from utils.swap.order import WeightOrder
from utils.swap.plan import SwapConfig, SwapPlan, WeightSizes, plan_swap
from utils.swap.streamer import StreamedWeight, WeightStreamer
from wan.configs import WanConfig
from wan.errors import InputError
from wan.model import LinearFloat32, WanModel

_NO_SWAP = SwapConfig()


@dataclass(frozen=True)
class LoadedWeights:
    """A model's weights on the host before they are placed."""

    mapped: bool = False  # the block matrices are the file's own bytes
    overlays: Mapping[nn.Linear, Overlay] = field(default_factory=dict)  # what slices hold on top of these
    reserved: int = 0  # bytes of RAM to leave for other uses
    returns: bool = False  # to the host when the placement ends, so that the model can be placed again
    order: WeightOrder | None = None  # in which streamed weights are used, kept from one placement to the next


_IN_MEMORY = LoadedWeights()


@dataclass(frozen=True)
class Placement:
    """Where the weights are, in bytes: on the device in all, its buffers, what streams, RAM beside the file's pages.

    As a context it ends the streaming: copies are finished, pages unlocked, and layers use their weight on the host. A
    model that `returns` leaves the device, except for its slice, and the RAM that was made for it.
    """

    device_bytes: int
    buffer_bytes: int = 0
    streamed_bytes: int = 0
    streamed_blocks: int = 0
    host_bytes: int = 0
    host_mode: str = ""  # of the host store; "" where nothing is streamed
    note: str = ""
    streamer: WeightStreamer | None = None
    undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Placement":
        return self

    def __exit__(self, *_) -> None:
        self.undo.close()


def place_model(
    model: WanModel,
    device: torch.device | str,
    swap: SwapConfig = _NO_SWAP,
    trained: TrainedSlice | None = None,
    loaded: LoadedWeights = _IN_MEMORY,
    backend: HostBackend | CudaBackend | None = None,
) -> Placement:
    """Moves the model to `device`, except for the weights that stream from the host as `swap` says.

    With a trained slice (attach it first) what stays on the device becomes private memory, since the slice is written
    into it. Overlays are put into what is private then, and into each copy of what stays mapped. InputError if
    swap.weights_vram is too little, or the RAM for --host_weights.
    """
    device, overlays = torch.device(device), loaded.overlays
    backend = backend or make_backend(device)
    if swap.weights_vram is not None:  # which includes the overlays
        swap = replace(swap, weights_vram=swap.weights_vram - sum(overlay.nbytes for overlay in overlays.values()))
    plan = plan_swap(weight_sizes(model), swap)
    streamed, undo = _streamed_linears(model, plan), ExitStack()
    if loaded.returns:
        _return_weights(model, () if loaded.mapped else streamed, undo)
    resident_bytes = _move_resident(model, device, streamed, loaded, trained)
    weights = [linear.weight for linear in streamed]
    store = make_host_store(weights, swap.host_weights, backend, loaded.mapped, loaded.reserved) if streamed else None
    stays_mapped = set(streamed) if store and store.mode == "mapped" else set()
    for linear in overlays.keys() - stays_mapped:
        overlays[linear].write(linear.weight.data)
    if store is None:
        _write_slice(trained, loaded)
        return Placement(resident_bytes, undo=undo)

    beside = {linear: overlay.to(device) for linear, overlay in overlays.items() if linear in stays_mapped}
    streamer = _make_streamer(streamed, plan, store, backend, trained, beside)
    streamer.order = loaded.order or streamer.order
    undo.callback(streamer.close)
    _attach(model, streamed, trained, streamer, undo)
    _write_slice(trained, loaded)
    return Placement(
        device_bytes=resident_bytes + plan.slot_bytes + sum(overlay.nbytes for overlay in beside.values()),
        buffer_bytes=plan.slot_bytes,
        streamed_bytes=sum(weight.nbytes for weight in weights),
        streamed_blocks=len(plan.streamed),
        host_bytes=store.bytes,
        host_mode=store.mode,
        note=store.note,
        streamer=streamer,
        undo=undo,
    )


def _return_weights(model: WanModel, moved: Collection[nn.Linear], undo: ExitStack) -> None:
    """Has `undo` put every weight back to where it is now, except for those that are `moved` within the host."""
    weights = {linear.weight for linear in moved}
    for parameter in model.parameters():
        if parameter not in weights:
            undo.callback(setattr, parameter, "data", parameter.data)


def _write_slice(trained: TrainedSlice | None, loaded: LoadedWeights) -> None:
    """Puts what was trained in an earlier placement into the weights that are on the device now."""
    if trained is not None and loaded.returns:
        trained.write_back()


def _move_resident(
    model: WanModel,
    device: torch.device,
    streamed: Sequence[nn.Linear],
    loaded: LoadedWeights,
    trained: TrainedSlice | None,
) -> int:
    """Moves what does not stream to the device; copies of what will be written to. How many bytes lie there."""
    on_host = {linear.weight for linear in streamed}
    resident = [parameter for parameter in model.parameters() if parameter not in on_host]
    overlaid = {linear.weight for linear in loaded.overlays}
    is_own = loaded.returns and not loaded.mapped  # private memory that is kept: a CPU needs no second copy of it
    for parameter in resident:
        written = trained is not None or parameter in overlaid
        parameter.data = parameter.data.to(device, copy=written and not is_own)
    return sum(parameter.nbytes for parameter in resident)


def _make_streamer(
    linears: Sequence[nn.Linear],
    plan: SwapPlan,
    store: HostStore,
    backend: HostBackend | CudaBackend,
    trained: TrainedSlice | None,
    overlays: Mapping[nn.Linear, Overlay],
) -> WeightStreamer:
    """A streamer of these layers' weights, which knows them by number, in this order."""
    matrices = _matrices(trained)
    weights = [
        StreamedWeight(piece, matrices.get(linear), overlays.get(linear))
        for linear in linears
        for piece in _pieces(linear)
    ]
    link = backend if store.mode == "pinned" else BackgroundCopies(backend)
    return WeightStreamer(
        weights, plan.slots, backend, link, version=lambda: trained.version if trained else 0, store=store
    )


def _matrices(trained: TrainedSlice | None) -> dict[nn.Linear, SlicedMatrix]:
    return {} if trained is None else {matrix.linear: matrix for matrix in trained.matrices.values()}


def check_swap(config: WanConfig, dtype: torch.dtype, device: torch.device, swap: SwapConfig, mapped: bool) -> None:
    """InputError, before the model loads, if its weights cannot be placed like this; `mapped` as in LoadedWeights."""
    if swap.host_weights == "pinned" and device.type != "cuda":
        raise InputError(
            f"--host_weights pinned (or --use_pinned_memory_for_block_swap) is for copies to a GPU, and the device is "
            f"{device}: leave it out"
        )
    if swap.host_weights == "mapped" and not mapped:
        raise InputError(
            "--host_weights mapped needs the weights as they are in the file, but here they are cast when they are "
            "loaded: leave it out"
        )
    plan_swap(sizes_of(config, dtype), swap)


def memory_line(placement: Placement, device: torch.device) -> str:
    """Where the weights lie and where they stream from, with the VRAM and RAM that they take."""
    line = f"memory: {readable(placement.device_bytes)} of weights on {device}"
    if not placement.host_mode:
        return line
    where = {
        "pinned": f"page-locked RAM ({readable(placement.host_bytes)})",
        "staged": f"RAM ({readable(placement.host_bytes)})",
        "mapped": "the checkpoint file (which takes no RAM but the system's file cache)",
    }[placement.host_mode]
    note = f"; {placement.note}" if placement.note else ""
    streamed = f"{placement.streamed_blocks} blocks ({readable(placement.streamed_bytes)}) stream from {where}"
    return f"{line}, {readable(placement.buffer_bytes)} of it buffers; {streamed}{note}"


def checkpoint_blocks(model: WanModel, inputs: BlockInputs | None = None) -> None:
    """Recomputes each block in backward instead of keeping what it saved; `inputs` keeps the blocks' own inputs."""
    for number, block in enumerate(model.blocks):
        # Wan has no dropout, so there is no random state to restore.
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward if inputs is None else functools.partial(inputs.around, number, forward)


@functools.lru_cache(maxsize=2)  # asked by several checks; two experts share it
def sizes_of(config: WanConfig, dtype: torch.dtype) -> WeightSizes:
    """weight_sizes of a model that is not loaded."""
    with torch.device("meta"):
        return weight_sizes(WanModel(config).to(dtype))


def weight_sizes(model: WanModel) -> WeightSizes:
    """What swapping can move of this model, and what it leaves on the device."""
    matrices = [linear.weight.nbytes for linear in _linears(model.blocks[0])]
    outside = sum(linear.weight.nbytes for linear in _outside(model))
    in_all = sum(parameter.nbytes for parameter in model.parameters())
    return WeightSizes(len(model.blocks), matrices, outside, in_all - outside - len(model.blocks) * sum(matrices))


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
    parts = [model.time_embedding, model.time_projection, model.text_embedding]
    if model.img_emb is not None:
        parts.append(model.img_emb)
    return [linear for part in parts for linear in _linears(part)]


def _pieces(linear: nn.Linear) -> Sequence[Tensor]:
    """The parts in which a layer reads its weight."""
    return linear.weight.data.chunk(linear.pieces) if isinstance(linear, LinearFloat32) else [linear.weight.data]


def _attach(
    model: WanModel,
    linears: Sequence[nn.Linear],
    trained: TrainedSlice | None,
    streamer: WeightStreamer,
    undo: ExitStack,
) -> None:
    """Tells the streamer when a pass begins, and has each layer ask it for its weight; `undo` ends that."""
    hook = model.register_forward_pre_hook(
        lambda *_: streamer.begin_pass("training" if torch.is_grad_enabled() else "no grad")
    )
    undo.callback(hook.remove)
    matrices, first = _matrices(trained), 0
    for linear in linears:
        count = len(_pieces(linear))
        fetches = [functools.partial(streamer.use, number) for number in range(first, first + count)]
        first += count
        if linear in matrices:
            (matrices[linear].fetch,) = fetches
            undo.callback(setattr, matrices[linear], "fetch", None)
            continue
        if isinstance(linear, LinearFloat32):
            linear.forward = functools.partial(_float32_forward, linear, fetches)
        else:
            linear.forward = functools.partial(_streamed_forward, linear, *fetches)
        undo.callback(delattr, linear, "forward")


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
