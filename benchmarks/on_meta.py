"""A device that holds shapes alone: counts what a GPU would hold, with stand-ins for what only a GPU computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from live_bytes import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import wan.model
from utils.learning.optimizers import bitsandbytes_optimizers
from utils.swap.backend import HostBackend

META = torch.device("meta")


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


@contextmanager
def gpu_kernels(optimizer: str) -> Iterator[None]:
    """Stand-ins that keep what the kernels of a GPU keep, of attention, RMS norm and an 8-bit optimizer."""
    with (
        mock.patch.object(wan.model, "attention", flash_like_attention),
        mock.patch.object(torch.nn.RMSNorm, "forward", fused_like_rms_norm),
        updates_in_place() if optimizer.lower().endswith("8bit") else nullcontext(),
    ):
        yield


@contextmanager
def updates_in_place() -> Iterator[None]:
    """bitsandbytes makes its state as ever; its kernels change values and state where they are, and take nothing."""
    bitsandbytes_optimizers()
    kernels = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
    with mock.patch.multiple("bitsandbytes.functional", **dict.fromkeys(kernels, lambda *inputs, **settings: None)):
        yield


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


def fused_like_rms_norm(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedLike.apply(x, norm.weight)


def results_alone(count: DeviceBytes, function: Callable) -> Callable:
    """`function` as its compiled form takes memory: for its results, and for nothing on the way to them."""

    def run(*inputs):
        with _disable_current_modes():
            results = function(*inputs)
        count.add(*(results if isinstance(results, tuple) else (results,)))
        return results

    return run
