"""Whether a job's memory is there, checked in plain numbers before any of it is taken.

Weights that stay mapped from their file take no RAM of their own: the system drops their pages when it needs room. So
only copies count: weights that are cast when they are loaded, those that wait in RAM to be streamed, those that a CPU
trains. What a step allocates beside the inputs of its blocks is not known here and not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from utils.swap.host_store import aligned
from utils.swap.placement import sizes_of
from utils.swap.plan import SwapConfig, WeightSizes, device_bytes, plan_swap, streamed_bytes
from wan.configs import WanConfig
from wan.loading import CheckpointHeader, block_matrices, cast_bytes, file_dtype
from wan.memory import available_bytes, check_room, free_device_bytes


@dataclass(frozen=True)
class StepNeeds:
    """What a training step takes beside the weights, in bytes, at least."""

    trained: int  # the slice: start values, differences, gradients
    block_input: int = 0  # of the largest batch; a step keeps one for each block
    offloaded: bool = False  # in RAM


@dataclass(frozen=True)
class WeightNeeds:
    """What a model's weights take, in bytes: RAM while they load, RAM from then on, memory of a GPU."""

    loading: int
    host: int
    device: int


def check_memory(
    header: CheckpointHeader,
    config: WanConfig,
    dtype: torch.dtype,
    device: torch.device,
    swap: SwapConfig,
    lighter: str,
    step: StepNeeds | None = None,
) -> None:
    """InputError if the checkpoint's model, computing in `dtype`, needs more memory than there is.

    `lighter` is advice for weights that are cast or rounded: how to read them in place. `step`: the model is trained.
    """
    mapped, on_cpu = file_dtype(header) == dtype and not swap.fp8, device.type == "cpu"
    sizes = sizes_of(config, dtype, swap.fp8)
    cast = cast_bytes(header, dtype, as_stored=block_matrices(header) if swap.fp8 else ())
    needs = weight_needs(sizes, swap, cast, mapped, on_cpu, trains=step is not None)
    if mapped:
        streams = swap.blocks_to_swap or swap.weights_vram is not None
        lighter = "use --host_weights mapped" if streams else f"use --blocks_to_swap {sizes.blocks}"
    check_loading(needs, file_dtype(header), dtype, available_bytes(), lighter)
    check_host(needs, step, sizes.blocks, on_cpu, available_bytes(), lighter)
    check_device(needs, step, sizes, swap, device, free_device_bytes(device))


def weight_needs(
    sizes: WeightSizes, swap: SwapConfig, cast: int, mapped: bool, on_cpu: bool, trains: bool
) -> WeightNeeds:
    """The needs of weights of which loading casts `cast` bytes; `mapped`: the matrices are the file's own bytes.

    What --host_weights auto streams is not counted if it can stay mapped, which it does where RAM is short.
    """
    plan = plan_swap(sizes, swap)
    streamed = streamed_bytes(sizes, plan)
    resident = sizes.all - streamed
    host = streamed if not mapped or swap.host_weights in ("pinned", "staged") else 0
    if not on_cpu:
        return WeightNeeds(cast, host, device_bytes(sizes, plan))
    # A slice is written into the weights that stay on the device, so a CPU needs its own copies of those.
    return WeightNeeds(cast, host + plan.slot_bytes + (resident if trains or not mapped else 0), 0)


def check_loading(needs: WeightNeeds, stored: torch.dtype, used: torch.dtype, available: int, lighter: str) -> None:
    """InputError if the RAM cannot hold the weights while they are cast; `lighter` says how to need less of it."""
    names = (str(dtype).removeprefix("torch.") for dtype in (stored, used))
    check_room({f"casting the weights from {' to '.join(names)}": needs.loading}, available, "RAM", lighter)


def check_host(
    needs: WeightNeeds, step: StepNeeds | None, blocks: int, on_cpu: bool, available: int, lighter: str
) -> None:
    """InputError if the RAM cannot hold what stays in it during the job."""
    parts = {"the weights": needs.host}
    if step and on_cpu:
        parts |= {"the inputs of the blocks": blocks * step.block_input, "the slice": step.trained}
    elif step and step.offloaded:
        parts["the inputs of the blocks"] = (blocks - 1) * step.block_input
    check_room(parts, available, "RAM", _joined([*([lighter] if needs.host else []), *_smaller_step(parts)]))


def check_device(
    needs: WeightNeeds,
    step: StepNeeds | None,
    sizes: WeightSizes,
    swap: SwapConfig,
    device: torch.device,
    free: int | None,
) -> None:
    """InputError if a GPU cannot hold the weights, the slice and the inputs of the blocks; `free` None: unknown."""
    if free is None:
        return
    parts = {"the weights": needs.device}
    if step:
        # Offloaded, the last block's input stays, and two buffers bring the others back.
        inputs = min(3, sizes.blocks) if step.offloaded else sizes.blocks
        parts |= {"the inputs of the blocks": inputs * step.block_input, "the slice": step.trained}
    advice = [*_fewer_weights(sizes, swap, free - sum(parts.values()) + needs.device), *_smaller_step(parts)]
    if step and step.block_input and not step.offloaded:
        advice.append("use --gradient_checkpointing --gradient_checkpointing_cpu_offload")
    check_room(parts, free, f"memory on {device}", _joined(advice))


def _fewer_weights(sizes: WeightSizes, swap: SwapConfig, room: int) -> list[str]:
    """The flag that leaves at most `room` bytes of weights on the device, if there is one."""
    if swap.weights_vram is not None:
        least = sizes.small + sum(set(map(aligned, sizes.matrices)))
        return [f"use --weights_vram {room // 10**6}MB or less"] if least < room < swap.weights_vram else []
    for blocks in range(swap.blocks_to_swap + 1, sizes.blocks + 1):
        if device_bytes(sizes, plan_swap(sizes, replace(swap, blocks_to_swap=blocks))) <= room:
            return [f"use --blocks_to_swap {blocks} or more"]
    return []


def _smaller_step(parts: Mapping[str, int]) -> list[str]:
    advice = []
    if parts.get("the inputs of the blocks"):
        advice.append("train on fewer frames, a lower resolution or a smaller batch_size")
    if 2 * parts.get("the slice", 0) > sum(parts.values()):
        advice.append("choose a smaller --ff")
    return advice


def _joined(advice: Sequence[str]) -> str:
    return ", or ".join(advice) or "close other programs, or use a machine with more memory"
