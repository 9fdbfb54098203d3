"""A slice as an ordinary LoRA, for loaders that do not know slices.

What a slice changes in a matrix lies in few columns, so it is a product of two: `up` [out, rank] holds the changes, a
column of the matrix each, and `down` [rank, in] says which column. The rank of each matrix is what it needs.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.selective_finetune import SliceUnits
from utils.slice_saving import DTYPES, StoredTensor, write_safetensors
from utils.slices.ledger import KEY, Entry, ledger_text
from utils.slices.on_base import same_bits

_STORED = {dtype: name for name, dtype in DTYPES.items()}
# Of the original names of block matrices, longest first where one begins another.
_DIFFUSERS = {
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    ".k_img": ".add_k_proj",
    ".v_img": ".add_v_proj",
    ".q": ".to_q",
    ".k": ".to_k",
    ".v": ".to_v",
    ".o": ".to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


# Which loaders take a file of these names; the others load nothing, without an error.
_LOADERS = {
    "comfyui": "for ComfyUI, musubi-tuner and diffusers' WanPipeline.load_lora_weights; a bare load_lora_adapter of "
    "diffusers loads nothing from it, without an error (for that: --names diffusers)",
    "diffusers": "for diffusers (WanPipeline.load_lora_weights, load_lora_adapter) and PEFT; ComfyUI and musubi-tuner "
    "load nothing from it, without an error (for those: --names comfyui)",
}
_EXACTNESS = {
    "fp32": "exact where it is added in fp32, near the trained weights where a program adds it in fp16 or bf16",
    "bf16": "only near the trained weights, as --dtype bf16 rounds what was learned",
}


@dataclass(frozen=True)
class LoraReport:
    """How near base + LoRA, added in fp32 and rounded to the base's dtype, is to the trained weights."""

    values: int
    different: int  # of them
    largest_error: float

    @property
    def line(self) -> str:
        """The same in words."""
        if not self.different:
            return f"base + LoRA, added in fp32, rounds to the trained weights in all {self.values:,} values"
        return (
            f"base + LoRA, added in fp32, rounds to another weight in {self.different:,} of {self.values:,} values "
            f"({100 * self.different / self.values:.3g} %), off by at most {self.largest_error:.3g}"
        )


def who_reads(names: str, dtype: str) -> str:
    """Which loaders take a file with these names, in words, and how exact it is in them; `dtype` is fp32 or bf16."""
    return f"{_LOADERS[names]}; {_EXACTNESS[dtype]} (a checkpoint or a slice file is exact everywhere)"


def lora_bytes(units: Mapping[str, SliceUnits], dtype: torch.dtype) -> int:
    """The size of the file, without its header."""
    return sum(rank_of(own) * sum(own.shape) * dtype.itemsize for own in units.values())


def rank_of(units: SliceUnits) -> int:
    """How many columns of a matrix the slice lies in."""
    return len(units.columns_U.unique())


def write_lora(
    path: Path,
    entry: Entry,
    units: Mapping[str, SliceUnits],
    start: Mapping[str, Tensor],
    final: Callable[[str], Tensor],
    names: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraReport:
    """Writes the change from `start` to `final` (by matrix, in line order) under `names`: comfyui or diffusers."""
    layout: dict[str, StoredTensor] = {}
    units = {name: units[name] for name in sorted(units)}
    for name, own in units.items():
        rank = rank_of(own)
        down, up, alpha = lora_names(name, names)
        layout[down] = _stored(down, dtype, [rank, own.shape[1]])
        layout[up] = _stored(up, dtype, [own.shape[0], rank])
        if alpha:
            layout[alpha] = _stored(alpha, torch.float32, [])
    found = Counter()
    chunks = _chunks(units, start, final, names, dtype, found)
    write_safetensors(path, layout, {**metadata, **_own_metadata(entry, units, names)}, chunks)
    return LoraReport(found["values"], found["different"], found["largest_error"])


def lora_names(name: str, names: str) -> tuple[str, str, str | None]:
    """The names of down, up and alpha for the matrix `name`; diffusers' files have no alpha."""
    module = name.removesuffix(".weight")
    if names == "comfyui":  # as musubi-tuner's own
        stem = "lora_unet_" + module.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    stem = f"transformer.{diffusers_module(module)}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", None


def diffusers_module(module: str) -> str:
    """The name in diffusers' transformer of the block matrix `module`."""
    for ours, theirs in _DIFFUSERS.items():
        if ours.endswith(".") or ours.startswith("ffn"):
            module = module.replace(f".{ours}", f".{theirs}")
        elif module.endswith(ours):
            return module.removesuffix(ours) + theirs
    return module


def _chunks(
    units: Mapping[str, SliceUnits],
    start: Mapping[str, Tensor],
    final: Callable[[str], Tensor],
    names: str,
    dtype: torch.dtype,
    found: Counter,
) -> Iterator:
    for name, own in units.items():
        before, after = start[name], final(name)
        change = (after.float() - before.float()).to(dtype)
        merged = (before.float() + change.float()).to(after.dtype)
        found["values"] += own.count
        found["different"] += int((~same_bits(merged, after) & (merged != after)).sum())
        error = float((merged.float() - after.float()).abs().max())
        found["largest_error"] = max(found["largest_error"], error)
        columns, place_U = own.columns_U.unique(return_inverse=True)
        down = torch.zeros(len(columns), own.shape[1], dtype=dtype)
        down[torch.arange(len(columns)), columns] = 1
        up = torch.zeros(own.shape[0], len(columns), dtype=dtype)
        replace(own, shape=tuple(up.shape), columns_U=place_U).write(up, change)
        yield from (_bytes(down), _bytes(up))
        if names == "comfyui":
            yield _bytes(torch.tensor(float(len(columns))))


def _bytes(tensor: Tensor):
    return tensor.view(-1).view(torch.uint8).numpy()


def _stored(name: str, dtype: torch.dtype, shape: list[int]) -> StoredTensor:
    return StoredTensor(name, _STORED[dtype], shape, math.prod(shape) * dtype.itemsize)


def _own_metadata(entry: Entry, units: Mapping[str, SliceUnits], names: str) -> dict[str, str]:
    metadata = {KEY: ledger_text([entry]), "modelspec.architecture": "wan2.1/lora"}
    ranks = {lora_names(name, names)[0].removesuffix(".lora_A.weight"): rank_of(own) for name, own in units.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    if names == "comfyui":
        return {**metadata, "ss_network_module": "networks.lora_wan", "ss_network_dim": str(most)}
    # Without it a loader may take one alpha for matrices of different ranks.
    others = {module.removeprefix("transformer."): rank for module, rank in ranks.items() if rank != most}
    config = {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    config["target_modules"] = [module.removeprefix("transformer.") for module in ranks]
    return {
        **metadata,
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()}),
    }
