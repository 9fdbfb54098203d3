"""Two blocks of a Wan with what a training step feeds them: ours, those of diffusers and of DiffSynth."""

import importlib
import sys
import types
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan.configs import TASKS, WanConfig
from wan.model import WanBlock, rope_frequencies

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """The shapes of one measurement; the picture has side x side tokens."""

    config: WanConfig
    side: int
    text_len: int
    blocks: int = 2


FULL = Size(TASKS["t2v-1.3B"].config, side=32, text_len=512)
QUICK = Size(WanConfig("t2v", 384, 2240, 3, 30, 16, 16), side=16, text_len=128)


class Blocks(nn.Module):
    """Blocks of a Wan, named as in a checkpoint, with what a step feeds them."""

    def __init__(self, size: Size, dtype: torch.dtype, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        dim, tokens = size.config.dim, size.side**2
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(WanBlock(size.config) for _ in range(size.blocks)).to(dtype).requires_grad_(False)
        self.x_BLD = torch.randn(1, tokens, dim).to(dtype).requires_grad_(True)
        self.dy_BLD = torch.randn(1, tokens, dim).to(dtype)
        self.context_BSD = torch.randn(1, size.text_len, dim).to(dtype)
        self.e0 = torch.randn(1, 1, 6, dim) / 8
        self.freqs = rope_frequencies(dim // size.config.num_heads, (1, size.side, size.side), torch.device("cpu"))

    def forward_backward(self) -> None:
        x_BLD = self.x_BLD
        run = partial(checkpoint, self.run_block, use_reentrant=False) if self.checkpointed else self.run_block
        for block in self.blocks:
            x_BLD = run(block, x_BLD)
        x_BLD.backward(self.dy_BLD)

    def run_block(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        return block(x_BLD, self.e0, self.freqs, self.context_BSD)

    def tensors(self) -> list[Tensor]:
        return [*self.parameters(), self.x_BLD, self.dy_BLD, self.context_BSD, self.e0, self.freqs]


class DiffusersBlocks(Blocks):
    """The same step in the blocks of diffusers' WanTransformer3DModel, which are all that runs of it."""

    def __init__(self, size: Size, dtype: torch.dtype, checkpointed: bool):
        from diffusers import WanTransformer3DModel

        super().__init__(size, dtype, checkpointed)
        config, heads = size.config, size.config.num_heads
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=config.dim // heads,
            ffn_dim=config.ffn_dim,
            num_layers=size.blocks,
        )
        self.blocks = model.blocks.to(dtype).requires_grad_(False)
        for block in self.blocks:  # as its loader keeps them
            block.scale_shift_table.data = block.scale_shift_table.float()
        self.e0, grid = self.e0[:, 0], torch.zeros(1, 16, 1, 2 * size.side, 2 * size.side)
        self.rotations = model.rope(grid)

    def run_block(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        return block(x_BLD, self.context_BSD, self.e0, self.rotations)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.rotations]


class DiffSynthBlocks(Blocks):
    """The same step in the blocks of DiffSynth's WanModel, in one dtype throughout, as its pipeline has them."""

    def __init__(self, size: Size, dtype: torch.dtype, checkpointed: bool):
        super().__init__(size, dtype, checkpointed)
        config, module = size.config, diffsynth_model()
        sizes = (config.dim, config.num_heads, config.ffn_dim, config.eps)
        self.blocks = nn.ModuleList(module.DiTBlock(False, *sizes) for _ in range(size.blocks))
        self.blocks.to(dtype).requires_grad_(False)
        self.e0 = self.e0[:, 0].to(dtype)
        frames, rows, columns = module.precompute_freqs_cis_3d(config.dim // config.num_heads)
        grid = (size.side, size.side, -1)
        parts = (
            frames[:1].expand(*grid),
            rows[: size.side, None].expand(*grid),
            columns[None, : size.side].expand(*grid),
        )
        self.freqs = torch.cat(parts, dim=-1).flatten(0, 1)[:, None]

    def run_block(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        return block(x_BLD, self.context_BSD, self.e0, self.freqs)


def diffsynth_model() -> types.ModuleType:
    """DiffSynth's module of Wan; what its packages import first, readers of data sets, needs torchvision and more."""
    for name in ("diffsynth", "diffsynth.core"):
        if name not in sys.modules:
            spec = find_spec(name)
            package = types.ModuleType(name)
            package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
            sys.modules[name] = package
    return importlib.import_module("diffsynth.models.wan_video_dit")
