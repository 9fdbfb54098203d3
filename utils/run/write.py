"""The slices around the one that trains: those below it, those it may not touch; the files that hold it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.selective_finetune import TrainedSlice
from utils.slice_saving import Patch, ledger_entry, slice_patches, stored_values, write_slice
from utils.slices.commands import write_patched
from utils.slices.ledger import KEY, Entry, extended, ledger_text, own_entry, refuse_overlap
from utils.slices.lora import write_lora
from utils.slices.on_base import SlicesOnBase, read_slice_file, units_of
from wan.errors import InputError
from wan.loading import CheckpointHeader
from wan.stored_tensors import DTYPES

_LORA_DTYPE = torch.float32  # exact


def read_slices(config: TrainConfig, header: CheckpointHeader) -> SlicesOnBase:
    """--slices, checked against --dit; InputError if one does not fit, or if the asked slice lies over another one."""
    below = SlicesOnBase(header, [read_slice_file(path) for path in config.slices], [1.0] * len(config.slices))
    own = own_entry(config.ff, config.ffid, config.save.name)
    same = [entry for entry in below.entries if entry.is_slice_of(own)]
    others = [entry for entry in below.entries if not entry.is_slice_of(own)]
    if config.continue_slice and not same:
        raise InputError(
            f"--continue_slice: {_sources(config)} does not hold ff {own.ff} ffid {own.ffid} "
            f"(it holds {', '.join(entry.label for entry in below.entries) or 'no slice'}); leave it out to begin"
        )
    if not config.allow_overlap:
        met = others if config.continue_slice else below.entries
        advice = "To train the same slice further add --continue_slice; " if same else ""
        refuse_overlap(met, own, _sources(config), f"{advice}--allow_overlap trains over what is there")
    stored = {DTYPES[header.tensors[name].dtype] for name in units_of(header, own)}
    cast = stored != {COMPUTE_DTYPES[config.mixed_precision]}
    if cast and any(file.entry.overlaps(own) for file in below.files):
        raise InputError(
            f"{config.dit} is cast for training, so a slice of --slices cannot be trained further on it: make one file "
            "of them first (python -m utils.cli.slices apply)"
        )
    return below


def ledger_lines(config: TrainConfig, header: CheckpointHeader, below: SlicesOnBase) -> list[str]:
    """What is known of the slices that the run trains beside or over."""
    lines = [f"on top of {config.dit}: {file.entry.label} from {file.path}" for file in below.files]
    lines += below.notes
    if KEY not in header.metadata:
        lines.append(
            f"note: {config.dit} has no ledger of slices (an original model, or a file of another tool): if something "
            "was trained into it before, it cannot be known where"
        )
    own = own_entry(config.ff, config.ffid, config.save.name)
    lines += [
        f"WARNING: {entry.label} is in the same values of this checkpoint: the run trains over it"
        for entry in below.entries
        if entry.overlaps(own) and not (config.continue_slice and entry.is_slice_of(own))
    ]
    return lines


def write_files(
    files: Mapping[str, Path],
    trained: TrainedSlice,
    header: CheckpointHeader,
    below: SlicesOnBase,
    metadata: Mapping[str, str],
    concept: Mapping,
) -> list[str]:
    """Writes what was trained, on top of `below`, as each kind of `files` (checkpoint, slice, lora).

    `concept` is what the ledger's entry tells: name, steps, captions. Lines on what is not exact come back.
    """
    start, final = stored_values(trained, header.files)
    entry = Entry(**{**ledger_entry(trained, header.files, start, "", 0), **concept})
    entries, lines = extended(below.entries, entry), []
    if "checkpoint" in files:
        patches = _one_after_the_other(below.patches, slice_patches(trained, start, final))
        write_patched(header, files["checkpoint"], patches, {**below.metadata, **metadata}, entries, below.check_starts)
    if "slice" in files:
        write_slice(files["slice"], final, {**metadata, KEY: ledger_text(entries[-1:])})
    if "lora" in files:
        units = {name: matrix.units.to("cpu") for name, matrix in trained.matrices.items()}
        report = write_lora(
            files["lora"], entries[-1], units, start, final.__getitem__, "comfyui", _LORA_DTYPE, metadata
        )
        if report.different:
            lines.append(report.line)
    return lines


def _sources(config: TrainConfig) -> str:
    return " with ".join(map(str, [config.dit, *config.slices]))


def _one_after_the_other(first: Mapping[str, Patch], then: Mapping[str, Patch]) -> dict[str, Patch]:
    def both(name: str, rows: Tensor, at: int) -> None:
        first[name](rows, at)
        then[name](rows, at)

    return {**first, **then, **{name: partial(both, name) for name in first.keys() & then.keys()}}
