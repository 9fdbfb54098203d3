"""Which base model a checkpoint stands on: its identity, and a value of each block matrix that no slice has touched."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from utils.selective_finetune import slice_indices
from utils.slice_saving import base_identity, is_block_matrix
from utils.slices.ledger import CONTRACT, Entry
from utils.slices.overlaps import covered, holds
from wan.loading import CheckpointHeader
from wan.safetensors_header import ITEM_BYTES, TensorEntry, read_bytes

_OTHER = 0.3  # share of the values; slices that are in no ledger, since another tool left it out, change fewer


@dataclass(frozen=True)
class BaseModel:
    """`identity` is of all that no slice can touch; `values` are hex, one for each block matrix, None inside slices."""

    identity: str
    values: tuple[str | None, ...] = ()

    def is_same(self, other: "BaseModel") -> bool:
        """Whether the two are one base, not one and a merged or otherwise finetuned one."""
        pairs = [pair for pair in zip(self.values, other.values, strict=False) if None not in pair]
        return self.identity == other.identity and sum(a != b for a, b in pairs) <= _OTHER * len(pairs)


def base_model(header: CheckpointHeader, slices: Sequence[Entry]) -> BaseModel:
    """The base of a checkpoint that holds these slices, or is going to."""
    known = [entry for entry in slices if entry.contract == CONTRACT]
    taken = covered(known) if len(known) == len(slices) else [(Fraction(0), Fraction(1))]  # it may be anywhere
    matrices = {name: tensor for name, tensor in header.tensors.items() if is_block_matrix(name, tensor.shape)}
    values = tuple(_value(name, matrices[name], taken) for name in sorted(matrices))
    return BaseModel(base_identity(header.files), values)


def _value(name: str, tensor: TensorEntry, taken: Sequence[tuple[Fraction, Fraction]]) -> str | None:
    """The stored value at a place on the matrix's line that its name decides; None if a slice holds it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % tensor.numel
    if holds(taken, place, tensor.numel):
        return None
    (index,) = slice_indices(name, tensor.shape, Fraction(1, tensor.numel), place + 1).tolist()
    size = ITEM_BYTES[tensor.dtype]
    start = tensor.start + index * size
    return read_bytes(replace(tensor, start=start, stop=start + size)).hex()
