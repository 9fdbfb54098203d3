"""A slice file as the nodes read it: checked on its own, before any model is asked."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .selective_finetune import CONTRACT, SliceError, check_slice, contract_name, exact_fraction
from .slice_saving import LEDGER_KEY

_LONGEST = 60  # characters of a concept's name in a message
_JOINERS = "\u200c\u200d"  # of letters and of emoji, in real names
_ANSWERS_KEY = "wan_answers"  # of files with the reference predictions of earlier concepts
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MAYBE = (str, type(None))
_KINDS = {"contract": int, "ff": str, "ffid": int, "name": _MAYBE, "date": _MAYBE, "base": _MAYBE, "start": _MAYBE}
_KINDS |= {"steps": int, "strength": (int, float, type(None)), "captions": (list, type(None))}


@dataclass(frozen=True)
class SliceFile:
    """The ledger entry of a slice file, and its final values by matrix, in line order."""

    name: str  # of the file, as ComfyUI lists it
    entry: dict
    values: dict[str, Tensor] = field(repr=False)
    size: int  # bytes on disk

    @property
    def label(self) -> str:
        """The slice in words."""
        concept = self.concept if len(self.concept) <= _LONGEST else f"{self.concept[:_LONGEST]}..."
        return f"{concept} (ff {self.entry['ff']} ffid {self.entry['ffid']})"

    @property
    def concept(self) -> str:
        """Its name."""
        return _one_line(self.entry.get("name") or "unnamed")

    def overlaps(self, other: "SliceFile") -> bool:
        """Whether the two share values of a line."""
        one, another = exact_fraction(self.entry["ff"]), exact_fraction(other.entry["ff"])
        first = max((self.entry["ffid"] - 1) * one, (other.entry["ffid"] - 1) * another)
        return first < min(self.entry["ffid"] * one, other.entry["ffid"] * another)


def read_slice_file(path: str | None, name: str) -> SliceFile:
    """The slice file at `path`; SliceError, in one line, if it is something else or damaged."""
    if path is None:
        raise SliceError(f"{name} is not in models/slices any more: refresh the list of files and choose again")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            entry = _entry(metadata, names, name)
            shapes = {key: file.get_slice(key).get_shape() for key in names}
            if not names or any(len(shape) != 1 for shape in shapes.values()):
                raise SliceError(_not_a_slice(name, metadata, names))
            # Copies: tensors are maps of the file, which change with it and keep it from being replaced on Windows.
            values = {key: file.get_tensor(key).clone() for key in names}
    except (SafetensorError, OSError) as error:
        raise SliceError(f"{name} is damaged, or not a safetensors file ({error}): copy it here again") from None
    for key, own in values.items():
        if own.dtype not in _FLOATS or key != contract_name(key) or not own.isfinite().all():
            raise SliceError(f"{name} is damaged: {key[:80]} ({own.dtype}) does not hold a slice's values")
    return SliceFile(name, entry, values, Path(path).stat().st_size)


def describe(file: SliceFile) -> str:
    """What is known of a slice file, for a person, line by line."""
    entry = file.entry
    count = sum(own.numel() for own in file.values.values())
    dtypes = ", ".join(sorted({str(own.dtype).removeprefix("torch.") for own in file.values.values()}))
    strength = f"{entry.get('strength') or 1:g}{' (rescaled more than once)' if entry.get('rescaled') else ''}"
    lines = [
        f"file: {file.name}, {file.size / 1e6:,.1f} MB",
        f"concept: {file.concept}",
        f"slice: ff {entry['ff']}, ffid {entry['ffid']}, contract {entry['contract']}",
        f"values: {count:,} {dtypes} in {len(file.values)} matrices",
        f"steps: {entry['steps']}",
        f"date: {_one_line(entry.get('date') or 'unknown')}",
        f"strength in the file: {strength}",
        f"base: {_one_line(entry.get('base') or 'not recorded')}",
    ]
    captions = [_one_line(caption) for caption in entry.get("captions") or ()]
    return "\n".join([*lines, "captions:", *(f"  {caption}" for caption in captions or ["none recorded"])])


def _entry(metadata: dict[str, str], names: list[str], name: str) -> dict:
    try:
        ledger = json.loads(metadata.get(LEDGER_KEY, "[]"))
    except (ValueError, RecursionError):
        raise SliceError(f"{name} is damaged: its ledger of slices cannot be read; copy it here again") from None
    if not isinstance(ledger, list) or len(ledger) != 1 or _is_lora(names) or _ANSWERS_KEY in metadata:
        raise SliceError(_not_a_slice(name, metadata, names))
    (entry,) = ledger
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in _KINDS.items()):
        raise SliceError(f"{name} is damaged: its ledger does not describe a slice; copy it here again")
    if entry["contract"] != CONTRACT:
        raise SliceError(
            f"{name} follows slice contract {entry['contract']}, these nodes know contract {CONTRACT}: update "
            "comfyui_wan_slices"
        )
    try:
        check_slice(entry["ff"], entry["ffid"])
    except SliceError as error:
        raise SliceError(f"{name} is damaged: {error}") from None
    return entry


def _is_lora(names: list[str]) -> bool:
    return any(".lora_" in key for key in names)


def _not_a_slice(name: str, metadata: dict[str, str], names: list[str]) -> str:
    if _is_lora(names):
        return f"{name} is a LoRA, not a slice file: put it into models/loras and load it with a LoRA loader"
    if _ANSWERS_KEY in metadata:
        return f"{name} holds a trainer's reference predictions, not a slice: choose a .slice.safetensors file"
    if any(key.endswith("patch_embedding.weight") for key in names):
        return (
            f"{name} is a whole checkpoint, not a slice file: put it into models/diffusion_models and load it with "
            "Load Diffusion Model"
        )
    return f"{name} is not a slice file: slice files come from --save_as slice, or from python -m utils.slices extract"


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in str(text)).split())
