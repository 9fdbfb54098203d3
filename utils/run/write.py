"""The files that hold what a run trained: a checkpoint, a slice file, a LoRA."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from utils.selective_finetune import TrainedSlice
from utils.slice_saving import Patch, extended, snapshot, write_patched, write_slice
from utils.slices.ledger import KEY, ledger_text, read_ledger, recorded_captions
from utils.slices.lora import write_lora
from utils.slices.on_base import SlicesOnBase, in_turn
from wan.loading import CheckpointHeader

_LORA_DTYPE = torch.float32  # exact


def write_files(
    files: Mapping[str, Path],
    trained: TrainedSlice,
    header: CheckpointHeader,
    below: SlicesOnBase,
    metadata: Mapping[str, str],
    concept: Mapping,
) -> list[str]:
    """Writes what was trained, on top of `below`, as each kind of `files` (checkpoint, slice, lora).

    `concept` is what the ledger records: name, steps, captions. Returns lines on what is not exact.
    """
    now = snapshot(trained, header.files, concept["name"], concept["steps"], recorded_captions(concept["captions"]))
    ledger = extended(json.loads(ledger_text(below.entries)), now.entry)
    own = {KEY: json.dumps(ledger[-1:])}
    if "checkpoint" in files:
        known = {**header.metadata, **below.metadata, **metadata, KEY: json.dumps(ledger)}
        write_patched(files["checkpoint"], header.files, _on_top(below.patches, now.patches), known)
    if "slice" in files:
        write_slice(files["slice"], now.final, {**metadata, **own})
    if "lora" in files:
        (entry,) = read_ledger(own, files["lora"])
        units = {name: matrix.units.to("cpu") for name, matrix in trained.matrices.items()}
        final = now.final.__getitem__
        report = write_lora(files["lora"], entry, units, now.start, final, "comfyui", _LORA_DTYPE, metadata)
        return [report.line] if report.different else []
    return []


def _on_top(below: Mapping[str, Patch], own: Mapping[str, Patch]) -> dict[str, Patch]:
    names = below.keys() | own.keys()
    parts = {name: [patches[name] for patches in (below, own) if name in patches] for name in names}
    return {name: partial(in_turn, patches) for name, patches in parts.items()}
