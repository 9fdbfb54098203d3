"""Tensors of a safetensors file, by the entries of its header."""

import torch
from torch import Tensor

from wan.safetensors_header import TensorEntry, read_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor that is not empty, copied into memory; for the small ones."""
    return torch.frombuffer(bytearray(read_bytes(entry)), dtype=DTYPES[entry.dtype]).reshape(entry.shape)
