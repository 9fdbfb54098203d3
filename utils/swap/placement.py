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
from utils.swap.host_store import BackgroundCopies, HostStore, aligned, host_memory, make_host_store
from utils.swap.order import WeightOrder
from utils.swap.plan import SwapConfig, SwapPlan, WeightSizes, plan_swap
from utils.swap.rounding import Rounding, beside_rounded
from utils.swap.streamer import StreamedWeight, WeightStreamer
from wan.configs import WanConfig
from wan.errors import InputError
from wan.float8 import check_float8
from wan.model import LinearFloat32, WanModel

_NO_SWAP = SwapConfig()
FP8_TEXTS = {"plain": "fp8", "scaled": "fp8 with a scale for each row"}  # of SwapConfig.fp8


@dataclass(frozen=True)
class LoadedWeights:
    """A model's weights on the host before they are placed."""

    mapped: bool = False  # the block matrices are the file's own bytes; if they are rounded, in any dtype
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
    fp8: str = ""  # as in SwapConfig
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
    into it. Overlays are put into what is private then, and into each copy of what stays mapped. With swap.fp8 the
    block matrices are rounded; slice and overlays are put into what is made of them for each use, in full precision.
    InputError if swap.weights_vram is too little, or the RAM for --host_weights.
    """
    device, overlays = torch.device(device), loaded.overlays
    backend = backend or make_backend(device)
    if swap.weights_vram is not None:  # which includes the overlays
        swap = replace(swap, weights_vram=swap.weights_vram - sum(overlay.nbytes for overlay in overlays.values()))
    plan = plan_swap(weight_sizes(model, swap.fp8), swap)
    streamed, undo = _streamed_linears(model, plan), ExitStack()
    if loaded.returns:
        _return_weights(model, () if loaded.mapped else streamed, undo)
    rounding = _rounding(model, swap, device, undo)
    resident_bytes = _move_resident(model, device, streamed, loaded, trained, rounding)
    store = _host_store(streamed, swap, backend, loaded, rounding)
    stays = streamed if store and store.mode == "mapped" else _linears(model.blocks) if swap.fp8 else []
    beside = {linear: overlays[linear].to(device) for linear in stays if linear in overlays}
    for linear in overlays.keys() - beside.keys():
        overlays[linear].write(linear.weight.data)
    device_bytes = resident_bytes + rounding.device_bytes + sum(overlay.nbytes for overlay in beside.values())
    in_use = _in_use(rounding, model, trained, beside)
    for linear in in_use.keys() - set(streamed):
        _attach(linear, [functools.partial(_resident_in_use, linear, in_use[linear])], trained, undo)
    if store is None:
        _write_slice(trained, loaded)
        return Placement(device_bytes, fp8=swap.fp8, undo=undo)

    streamer = _make_streamer(streamed, plan, store, backend, trained, beside, in_use)
    streamer.order = loaded.order or streamer.order
    undo.callback(streamer.close)
    _attach_streamer(model, streamed, trained, streamer, undo)
    _write_slice(trained, loaded)
    return Placement(
        device_bytes=device_bytes + plan.slot_bytes,
        buffer_bytes=plan.slot_bytes,
        streamed_bytes=sum(linear.weight.nbytes for linear in streamed),
        streamed_blocks=len(plan.streamed),
        host_bytes=store.bytes,
        host_mode=store.mode,
        note=store.note,
        fp8=swap.fp8,
        streamer=streamer,
        undo=undo,
    )


def _rounding(model: WanModel, swap: SwapConfig, device: torch.device, undo: ExitStack) -> Rounding:
    """What rounds the block matrices, if they are to be; `undo` puts the file's own back, which takes no memory."""
    matrices = [linear.weight for linear in _linears(model.blocks)] if swap.fp8 else []
    for matrix in matrices:
        undo.callback(setattr, matrix, "data", matrix.data)
    return Rounding(matrices, swap.fp8 == "scaled", model.dtype, device)


def _host_store(
    linears: Sequence[nn.Linear],
    swap: SwapConfig,
    backend: HostBackend | CudaBackend,
    loaded: LoadedWeights,
    rounding: Rounding,
) -> HostStore | None:
    """Where these layers' weights wait, moved to there; None if there are none."""
    weights = [linear.weight for linear in linears]
    if not weights:
        return None
    return make_host_store(weights, swap.host_weights, backend, loaded.mapped, loaded.reserved, rounding)


def _in_use(
    rounding: Rounding, model: WanModel, trained: TrainedSlice | None, overlays: Mapping[nn.Linear, Overlay]
) -> dict[nn.Linear, Callable[[Tensor], Tensor]]:
    """For each layer whose weight is rounded: what makes the values that compute of its copy on the device."""
    matrices = _matrices(trained)
    return {
        linear: functools.partial(_values_in_use, rounding, linear.weight, overlays.get(linear), matrices.get(linear))
        for linear in _linears(model.blocks)
        if linear.weight in rounding.matrices
    }


def _values_in_use(
    rounding: Rounding, weight: nn.Parameter, overlay: Overlay | None, matrix: SlicedMatrix | None, rounded: Tensor
) -> Tensor:
    values = rounding.turned_back(weight, rounded)
    for written in filter(None, (overlay, matrix)):
        written.write(values)
    return values


def _resident_in_use(linear: nn.Linear, in_use: Callable[[Tensor], Tensor]) -> Tensor:
    return in_use(linear.weight.data)


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
    rounding: Rounding,
) -> int:
    """Moves what does not stream to the device; copies of what will be written to. How many bytes lie there."""
    on_host = {linear.weight for linear in streamed}
    resident = [parameter for parameter in model.parameters() if parameter not in on_host]
    overlaid = {linear.weight for linear in loaded.overlays}
    is_own = loaded.returns and not loaded.mapped  # private memory that is kept: a CPU needs no second copy of it
    for parameter in resident:
        if parameter in rounding.matrices:
            rounding.move(parameter, host_memory(rounding.stored_bytes(parameter), parameter))
            parameter.data = parameter.data.to(device)
            continue
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
    in_use: Mapping[nn.Linear, Callable[[Tensor], Tensor]],
) -> WeightStreamer:
    """A streamer of these layers' weights, which knows them by number, in this order."""
    matrices = _matrices(trained)
    weights = [
        StreamedWeight(piece, in_use=in_use[linear])
        if linear in in_use
        else StreamedWeight(piece, matrices.get(linear), overlays.get(linear))
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
    if swap.fp8:
        check_float8(device)
    if swap.host_weights == "mapped" and swap.fp8:
        raise InputError(
            "--host_weights mapped streams the file's own bytes, but for fp8 the weights are rounded when they are "
            "loaded: leave one of the two out"
        )
    if swap.host_weights == "mapped" and not mapped:
        raise InputError(
            "--host_weights mapped needs the weights as they are in the file, but here they are cast when they are "
            "loaded: leave it out"
        )
    plan_swap(sizes_of(config, dtype, swap.fp8), swap)


def memory_line(placement: Placement, device: torch.device) -> str:
    """Where the weights lie and where they stream from, with the VRAM and RAM that they take."""
    fp8 = f" (block matrices in {FP8_TEXTS[placement.fp8]})" if placement.fp8 else ""
    line = f"memory: {readable(placement.device_bytes)} of weights on {device}{fp8}"
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
def sizes_of(config: WanConfig, dtype: torch.dtype, fp8: str = "") -> WeightSizes:
    """weight_sizes of a model that is not loaded."""
    with torch.device("meta"):
        return weight_sizes(WanModel(config).to(dtype), fp8)


def weight_sizes(model: WanModel, fp8: str = "") -> WeightSizes:
    """What swapping can move of this model, and what it leaves on the device; `fp8` as in SwapConfig."""
    matrices = [linear.weight for linear in _linears(model.blocks)]
    outside = sum(linear.weight.nbytes for linear in _outside(model))
    small = sum(parameter.nbytes for parameter in {*model.parameters()} - {*matrices}) - outside
    if fp8:
        small += beside_rounded(matrices, fp8 == "scaled", model.dtype)
    of_block = [linear.weight for linear in _linears(model.blocks[0])]
    sizes = [weight.numel() if fp8 else weight.nbytes for weight in of_block]
    return WeightSizes(len(model.blocks), sizes, outside, small)


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


def _attach_streamer(
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
    first = 0
    for linear in linears:
        fetches = [functools.partial(streamer.use, first + number) for number in range(len(_pieces(linear)))]
        _attach(linear, fetches, trained, undo)
        first += len(fetches)


def _attach(
    linear: nn.Linear, fetches: Sequence[Callable[[], Tensor]], trained: TrainedSlice | None, undo: ExitStack
) -> None:
    """Has the layer ask for (the pieces of) its weight whenever it needs it; `undo` ends that."""
    if matrix := _matrices(trained).get(linear):
        (matrix.fetch,) = fetches
        undo.callback(setattr, matrix, "fetch", None)
        return
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
