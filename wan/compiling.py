"""The pointwise functions of a model, compiled once before it loads: for any number of tokens, forward and backward.

Only pure functions are compiled, so that streaming and checkpointing around them stay as they are, and a resident and
a streamed model compute the same bits. Shapes as in pointwise.py.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from wan.configs import WanConfig
from wan.errors import InputError
from wan.pointwise import (
    Kernels,
    Pointwise,
    apply_rope,
    gated,
    gated_backward,
    gated_residual,
    modulated_norm,
    normed,
    normed_backward,
)

BACKEND = "inductor"
_INSTEAD = "or leave out --compile"
COMPILING = "compiling the pointwise functions of the blocks, once: a minute or two, less where it was done before"
_COMPILERS = ("g++", "clang++", "c++", "cl")  # cl: of Visual Studio
# Batches of one or more, tokens with timesteps of their own or not, parts of tokens; more would be a mistake of ours.
_VARIANTS = 64
_TOKENS = 1031  # of the warm-up: unlike any width or number of heads, which a variant would take for the same


def check_compiler(device: torch.device) -> None:
    """InputError if nothing here can compile for `device`."""
    if device.type != "cpu" and find_spec("triton") is None:
        raise InputError(
            f"--compile needs Triton on {device}, which comes with PyTorch for CUDA on Linux: pip install triton "
            f"(on Windows triton-windows), {_INSTEAD}"
        )
    named = os.environ.get("CXX")
    if device.type == "cpu" and not any(map(shutil.which, [named] if named else _COMPILERS)):
        where = f"the variable CXX names {named}" if named else f"none of {', '.join(_COMPILERS)} was found"
        raise InputError(f"--compile needs a C++ compiler on the CPU, and {where}: install one, {_INSTEAD}")


@lru_cache(maxsize=2)  # two experts share it
def compiled_pointwise(config: WanConfig, dtype: torch.dtype, device: torch.device) -> Pointwise:
    """The functions compiled for a model of these widths; InputError, with the compiler's reason, if that fails."""
    pointwise = pointwise_of(_compiled)
    if device.type == "cpu":
        pointwise = replace(pointwise, apply_rope=apply_rope)  # its kernel of complex numbers takes half as long
    try:
        _warm_up(pointwise, config, dtype, device)
    except Exception as error:  # the compilers' own kinds of errors have no common class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"--compile failed on {device}: {' '.join(lines[:2])[:300]}; leave it out") from None
    return pointwise


def pointwise_of(compile: Callable[[Callable], Callable]) -> Pointwise:
    """The functions, what each computes compiled by `compile`."""
    kernels = Kernels(*map(compile, (normed, normed_backward, gated, gated_backward)))
    turn, turn_back, divide, divide_backward = map(compile, (rotated, rotated_back, rms_normed, rms_normed_backward))
    return Pointwise(
        partial(modulated_norm, kernels=kernels),
        partial(gated_residual, kernels=kernels),
        lambda x_BLNK, freqs: _Rotated.apply(x_BLNK, torch.view_as_real(freqs), turn, turn_back),
        lambda own, x_BLD: _RMSNorm.apply(x_BLD, own.weight, own.eps, divide, divide_backward),
    )


def _compiled(function: Callable) -> Callable:
    """`function`, which torch.compile compiles when it is first used."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=BACKEND)

    def run(*arguments):
        # Inside an autograd function, so without gradients; detached, as one that needs some would be a variant.
        return compiled(*(one.detach() if isinstance(one, Tensor) else one for one in arguments))

    return run


def _warm_up(pointwise: Pointwise, config: WanConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Has everything compiled that a step of one sample uses."""
    dim, heads = config.dim, config.num_heads
    with torch.enable_grad():
        x_BLD = torch.zeros(1, _TOKENS, dim, dtype=dtype, device=device, requires_grad=True)
        row = torch.zeros(1, 1, dim, device=device)
        freqs = torch.ones(_TOKENS, 1, dim // heads // 2, dtype=torch.complex64, device=device)
        own = nn.RMSNorm(dim, config.eps, device=device, dtype=dtype).requires_grad_(False)
        normed_BLD = pointwise.modulated_norm(x_BLD, row, row, config.eps, dtype=dtype)
        query_BLNK = pointwise.rms_norm(own, normed_BLD).unflatten(-1, (heads, -1))
        turned_BLD = pointwise.apply_rope(query_BLNK, freqs).flatten(2)
        y_BLD = pointwise.gated_residual(x_BLD, turned_BLD, row)
        pointwise.modulated_norm(y_BLD, row, row, config.eps).sum().backward()


# ---- what the plain functions have in complex numbers or in PyTorch's own kernels


def rotated(x_BLNK, turns):
    """`turns` is float32 [L, 1, K/2, 2]: cosines and sines."""
    (a, b), (cos, sin) = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BLNK.dtype)


def rotated_back(x_BLNK, turns):
    (a, b), (cos, sin) = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2).to(x_BLNK.dtype)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLNK, turns, turn, turn_back):
        ctx.save_for_backward(turns)
        ctx.turn_back = turn_back
        return turn(x_BLNK, turns)

    @staticmethod
    def backward(ctx, grad_BLNK):
        return ctx.turn_back(grad_BLNK, *ctx.saved_tensors), None, None, None


def rms_normed(x_BLD, weight, eps):
    """The norm in the dtype of x, and each token's 1 / root of the mean square."""
    wide_BLD = x_BLD.float()
    rstd = torch.rsqrt(wide_BLD.square().mean(-1, keepdim=True) + eps)
    return (wide_BLD * rstd * weight).to(x_BLD.dtype), rstd


def rms_normed_backward(grad_BLD, x_BLD, weight, rstd):
    weighted_BLD, normed_BLD = grad_BLD.float() * weight, x_BLD.float() * rstd
    along = (weighted_BLD * normed_BLD).mean(-1, keepdim=True)
    return (rstd * (weighted_BLD - normed_BLD * along)).to(x_BLD.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD, weight, eps, divide, divide_backward):
        y_BLD, rstd = divide(x_BLD, weight, eps)
        ctx.save_for_backward(x_BLD, weight, rstd)
        ctx.divide_backward = divide_backward
        return y_BLD

    @staticmethod
    def backward(ctx, grad_BLD):
        x_BLD, weight, rstd = ctx.saved_tensors
        dx = ctx.divide_backward(grad_BLD, x_BLD, weight, rstd) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad_BLD * x_BLD.float() * rstd).sum_to_size(weight.shape).to(weight.dtype)
        return dx, dweight, None, None, None
