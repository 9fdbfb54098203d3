"""Places a Wan model on a device: swapped blocks keep their matrices on the host, copied in for each use.

A copy is made anew for each use and never recycled, and autograd sees only copies, so checkpointing is right by
construction: recomputation makes its own.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.selective_finetune import SlicedMatrix, TrainedSlice, block_linears
from wan.model import WanModel


def place_model(
    model: WanModel, device: torch.device | str, blocks_to_swap: int = 0, trained: TrainedSlice | None = None
) -> None:
    """Moves the model to `device`, but for the matrices of its last `blocks_to_swap` blocks.

    With a trained slice (attach it first) the resident tensors become private memory, since the slice is written into
    them: memory that is mapped from a file would be copied page by page.
    """
    resident_blocks = len(model.blocks) - blocks_to_swap
    assert 0 <= resident_blocks <= len(model.blocks), "the command line checks it against the number of blocks"
    swapped = [linear for name, linear in block_linears(model).items() if int(name.split(".")[1]) >= resident_blocks]
    host_weights = {linear.weight for linear in swapped}
    for parameter in model.parameters():
        if parameter not in host_weights:
            parameter.data = parameter.data.to(device, copy=trained is not None)
    stage = functools.partial(Tensor.to, device=device, copy=True)
    sliced = {matrix.linear: matrix for matrix in trained.matrices.values()} if trained else {}
    for linear in swapped:
        if linear in sliced:
            sliced[linear].fetch = functools.partial(_staged_slice, sliced[linear], stage)
        else:
            linear.forward = functools.partial(_staged_forward, linear, stage)


def checkpoint_blocks(model: WanModel) -> None:
    """Recomputes each block in backward instead of keeping what it saved."""
    for block in model.blocks:
        # Wan has no dropout, so there is no random state to restore.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _staged_slice(matrix: SlicedMatrix, stage) -> Tensor:
    weight = stage(matrix.linear.weight)
    matrix.write(weight)
    return weight


def _staged_forward(linear: nn.Linear, stage, x: Tensor) -> Tensor:
    return F.linear(x, stage(linear.weight), linear.bias)
