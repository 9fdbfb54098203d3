"""The blocks' pointwise chains as pure functions: modulated norm, gated residual, RoPE and RMS norm, plain or compiled.

Each goes over its input several times in float32, unless it is compiled (compiling.py): then once, with only its result
in memory. Shapes: B batch, L video tokens, D width, N heads, K head width. Rows are [B, 1, D] or [B, L, D], or, with
`times_BL`, [1, U, D], of which each token takes the row that its number names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kernels:
    """What the functions below compute forward and backward, without autograd; compiled where --compile asks for it."""

    normed: Callable[..., tuple[Tensor, Tensor, Tensor]]
    normed_backward: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    gated_backward: Callable[..., Tensor]


@dataclass(frozen=True)
class Pointwise:
    """The functions that a model computes with."""

    modulated_norm: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    apply_rope: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[nn.RMSNorm, Tensor], Tensor]


def at_tokens(rows: Tensor, times_BL: Tensor | None) -> Tensor:
    """[B, T, D] of rows that are [B, 1, D], or [1, U, D] and numbered by `times_BL`."""
    return rows if times_BL is None else rows[0, times_BL]


def summed_to_rows(values_BLD: Tensor, rows: Tensor, times_BL: Tensor | None) -> Tensor:
    """The gradient of rows whose at_tokens have the gradients `values_BLD`."""
    if times_BL is None:
        return values_BLD.sum_to_size(rows.shape)
    return torch.zeros_like(rows[0]).index_add(0, times_BL.flatten(), values_BLD.flatten(0, 1))[None]


# ---- what is computed


def normed(x_BLD, shift, scale, times_BL, eps, dtype):
    """The modulated norm in `dtype`, and each token's mean and 1 / standard deviation."""
    wide_BLD = x_BLD.float()
    normed_BLD, mean, rstd = torch.native_layer_norm(wide_BLD, wide_BLD.shape[-1:], None, None, eps)
    y_BLD = torch.addcmul(at_tokens(shift, times_BL), normed_BLD, 1 + at_tokens(scale, times_BL))
    return y_BLD.to(dtype), mean, rstd


def normed_backward(grad_BLD, x_BLD, scale, times_BL, mean, rstd):
    dnormed_BLD = grad_BLD * (1 + at_tokens(scale, times_BL))
    wide_BLD = x_BLD.float()
    rest = (wide_BLD.shape[-1:], mean, rstd, None, None, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(dnormed_BLD, wide_BLD, *rest)[0].to(x_BLD.dtype)


def gated(x_BLD, y_BLD, gate, times_BL):
    return (x_BLD + y_BLD * at_tokens(gate, times_BL)).to(x_BLD.dtype)


def gated_backward(grad_BLD, gate, times_BL, dtype):
    return (grad_BLD * at_tokens(gate, times_BL)).to(dtype)


_PLAIN_KERNELS = Kernels(normed, normed_backward, gated, gated_backward)


# ---- with gradients


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the input in its own dtype and each token's statistics, where autograd would keep float32 copies."""

    @staticmethod
    def forward(ctx, x_BLD, shift, scale, times_BL, eps, dtype, kernels):
        ctx.kernels = kernels
        y_BLD, mean, rstd = kernels.normed(x_BLD, shift, scale, times_BL, eps, dtype)
        ctx.save_for_backward(x_BLD, shift, scale, times_BL, mean, rstd)
        return y_BLD

    @staticmethod
    def backward(ctx, grad_BLD):
        x_BLD, shift, scale, times_BL, mean, rstd = ctx.saved_tensors
        dx = dshift = dscale = None
        if ctx.needs_input_grad[1]:
            dshift = summed_to_rows(grad_BLD.float(), shift, times_BL)
        if ctx.needs_input_grad[2]:
            dscale = summed_to_rows(grad_BLD * (x_BLD.float() - mean) * rstd, scale, times_BL)
        if ctx.needs_input_grad[0]:
            dx = ctx.kernels.normed_backward(grad_BLD, x_BLD, scale, times_BL, mean, rstd)
        return dx, dshift, dscale, None, None, None, None


def modulated_norm(
    x_BLD: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    times_BL: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = _PLAIN_KERNELS,
) -> Tensor:
    """float32 layer norm of `x_BLD` without weights, scaled by 1 + scale and shifted; rounded to `dtype` once."""
    return _ModulatedNorm.apply(x_BLD, shift, scale, times_BL, eps, dtype, kernels)


class _GatedResidual(torch.autograd.Function):
    """Passes the gradient on in the dtype it came in, where autograd would make float32 ones for both terms first."""

    @staticmethod
    def forward(ctx, x_BLD, y_BLD, gate, times_BL, kernels):
        ctx.save_for_backward(gate, times_BL, y_BLD if ctx.needs_input_grad[2] else None)
        ctx.dtype, ctx.kernels = y_BLD.dtype, kernels
        return kernels.gated(x_BLD, y_BLD, gate, times_BL)

    @staticmethod
    def backward(ctx, grad_BLD):
        gate, times_BL, y_BLD = ctx.saved_tensors
        dgate = summed_to_rows(grad_BLD * y_BLD.float(), gate, times_BL) if ctx.needs_input_grad[2] else None
        return grad_BLD, ctx.kernels.gated_backward(grad_BLD, gate, times_BL, ctx.dtype), dgate, None, None


def gated_residual(
    x_BLD: Tensor, y_BLD: Tensor, gate: Tensor, times_BL: Tensor | None = None, kernels: Kernels = _PLAIN_KERNELS
) -> Tensor:
    """x + y * gate: the float32 gate (rows) promotes both, so the result is rounded only once."""
    return _GatedResidual.apply(x_BLD, y_BLD, gate, times_BL, kernels)


def apply_rope(x_BLNK: Tensor, freqs: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs in float32; the dtype of `x_BLNK` comes back."""
    pairs = torch.view_as_complex(x_BLNK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x_BLNK.dtype)


def rms_norm(own: nn.RMSNorm, x_BLD: Tensor) -> Tensor:
    return own(x_BLD)


PLAIN = Pointwise(modulated_norm, gated_residual, apply_rope, rms_norm)
