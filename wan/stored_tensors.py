"""Tensors of a safetensors file, by the entries of its header."""

import mmap
import warnings
from pathlib import Path

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
DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # in flags and messages


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`."""
    return next(name for name, known in DTYPE_NAMES.items() if known == dtype)


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor that is not empty, copied into memory; for the small ones."""
    return torch.frombuffer(bytearray(read_bytes(entry)), dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def mapped_bytes(file: Path, read_only: bool = True) -> Tensor:
    """The file's bytes, read as they are used; the same ones though another file takes its name."""
    # What may be written to counts as memory from the start: Linux refuses it where the file is larger than the RAM.
    access = mmap.ACCESS_READ if read_only else mmap.ACCESS_COPY
    with file.open("rb") as opened, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=access), dtype=torch.uint8)


def mapped_tensor(contents: Tensor, entry: TensorEntry) -> Tensor:
    """A tensor in its mapped file; a copy where its bytes begin at an odd place, as some writers have it."""
    stored, dtype = contents[entry.start : entry.stop], DTYPES[entry.dtype]
    aligned = entry.start % dtype.itemsize == 0
    return (stored if aligned else stored.clone()).view(dtype).view(entry.shape)
