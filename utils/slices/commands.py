"""What is done with slices on disk: apply, remove, extract, scale, verify."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.selective_finetune import SliceUnits
from utils.slice_saving import (
    UNFINISHED,
    Patch,
    base_identity,
    change_rows,
    is_block_matrix,
    read_header,
    read_slice,
    stream,
    write_safetensors,
    write_slice,
)
from utils.slices.ledger import KEY, Entry, at_strength, ledger_text, read_ledger
from utils.slices.lora import DTYPES, LoraReport, lora_bytes, rank_of, write_lora
from utils.slices.on_base import (
    SLICED_DTYPES,
    SliceFile,
    SlicesOnBase,
    read_slice_file,
    scaled,
    units_of,
    values_digest,
)
from wan.errors import InputError
from wan.loading import CheckpointHeader, read_checkpoint_header
from wan.safetensors_header import TensorEntry

_GONE = 600  # seconds without a byte


def apply(
    base: Path,
    slices: Sequence[Path],
    strengths: Sequence[float],
    out: Path,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Entry]:
    """Writes `base` with the slices in it, byte for byte the chained checkpoint; the ledger it has comes back.

    What could not be checked is said.
    InputError if two slices overlap or one is another base's.
    """
    header = read_checkpoint_header(base)
    check_output(out, [*header.files, *slices], overwrite)
    on_base = SlicesOnBase(header, [read_slice_file(path) for path in slices], strengths)
    for line in on_base.notes:
        say(line)
    _remove_unfinished(out.parent)
    write_patched(header, out, on_base.patches, on_base.metadata, on_base.entries, on_base.check_starts)
    return on_base.entries


def remove(checkpoint: Path, name: str, base: Path, out: Path, overwrite: bool = False) -> Entry:
    """Writes `checkpoint` without the slice `name`, every tensor byte for byte as if it was never trained.

    With the newest slice goes what its run said in the metadata: the base's is left, as no file keeps an earlier run's.
    """
    header, base_header = read_checkpoint_header(checkpoint), read_checkpoint_header(base)
    check_output(out, [*header.files, *base_header.files], overwrite)
    entries = read_ledger(header.metadata, checkpoint)
    entry = find_entry(entries, name, checkpoint)
    _check_dtypes(header, base_header)
    _refuse_trained_over(entries, entry, checkpoint, read_ledger(base_header.metadata, base))
    units = units_of(header, entry)
    start = _base_values(base_header, entry, units, checkpoint)
    patches = {name: partial(_put, own, start[name]) for name, own in units.items()}
    left = [other for other in entries if other is not entry]
    if entry is entries[-1]:
        header = replace(header, metadata=base_header.metadata)
    _remove_unfinished(out.parent)
    write_patched(header, out, patches, {}, left)
    return entry


def extract(checkpoint: Path, base: Path, names: Sequence[str], folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes the slices of `checkpoint` that `base` does not have (or only those `names`) as files into `folder`."""
    header, base_header = read_checkpoint_header(checkpoint), read_checkpoint_header(base)
    entries = read_ledger(header.metadata, checkpoint)
    known = read_ledger(base_header.metadata, base)
    wanted = list(dict.fromkeys(find_entry(entries, name, checkpoint) for name in names))
    wanted = wanted or [entry for entry in entries if not any(entry.is_slice_of(other) for other in known)]
    if not wanted:
        raise InputError(f"{checkpoint} holds no slice that {base} does not hold (its ledger has {len(entries)})")
    _check_dtypes(header, base_header)
    paths = [folder / f"{stem}.slice.safetensors" for stem in _stems(wanted, checkpoint)]
    for entry in wanted:
        _refuse_trained_over(entries, entry, checkpoint, known)
    _make_folder(folder)
    for path in paths:
        check_output(path, [*header.files, *base_header.files], overwrite)
    for entry, path in zip(wanted, paths, strict=True):
        units = units_of(header, entry)
        start = _base_values(base_header, entry, units, checkpoint)
        told = replace(entry, base=base_identity(base_header.files), start=values_digest(start))
        # The newest run's own words are what the checkpoint says beyond its base.
        metadata = header.metadata.items() - base_header.metadata.items() if entry is entries[-1] else ()
        own = {key: text for key, text in header.metadata.items() if (key, text) in metadata and key != KEY}
        _remove_unfinished(folder)
        write_slice(path, read_slice(header.files, units), {**own, KEY: ledger_text([told])})
    return paths


def scale(
    slice_path: Path,
    base: Path,
    strength: float,
    out: Path,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Entry:
    """Writes the slice with `strength` times what it learned; what could not be checked is said."""
    header, file = read_checkpoint_header(base), read_slice_file(slice_path)
    check_output(out, [*header.files, slice_path], overwrite)
    entry = at_strength(file.entry, strength)
    start = checked_start(header, file, say)
    values = {name: scaled(start[name], file.values(name), strength) for name in file.tensors}
    _remove_unfinished(out.parent)
    write_slice(out, values, {**file.metadata, KEY: ledger_text([entry])})
    return entry


def to_lora(
    slice_path: Path, base: Path, out: Path, names: str, dtype: str, say: Callable[[str], None], overwrite: bool = False
) -> LoraReport:
    """Writes the slice as a LoRA with the names of comfyui or diffusers, in fp32 or bf16; says how exact it is."""
    header, file = read_checkpoint_header(base), read_slice_file(slice_path)
    check_output(out, [*header.files, slice_path], overwrite)
    units = units_of(header, file.entry)
    say(f"{out}: {lora_bytes(units, DTYPES[dtype]) / 1e6:,.1f} MB, ranks up to {max(map(rank_of, units.values()))}")
    start = checked_start(header, file, say)
    _remove_unfinished(out.parent)
    report = write_lora(out, file.entry, units, start, file.values, names, DTYPES[dtype], file.metadata)
    say(report.line)
    return report


@dataclass(frozen=True)
class Finding:
    """A tensor that is not what the ledger says, and how."""

    name: str
    problem: str


def verify(checkpoint: Path, base: Path) -> tuple[list[Entry], list[Finding]]:
    """The slices by which `checkpoint` may differ from `base`, and every tensor that differs elsewhere."""
    header, base_header = read_checkpoint_header(checkpoint), read_checkpoint_header(base)
    known = read_ledger(base_header.metadata, base)
    entries = [entry for entry in read_ledger(header.metadata, checkpoint) if entry not in known]
    if entries:
        _check_dtypes(base_header)
    units = [units_of(base_header, entry) for entry in entries]
    names = [*base_header.tensors, *(name for name in header.tensors if name not in base_header.tensors)]
    findings = [
        Finding(name, problem)
        for name in names
        if (problem := _difference(header.tensors.get(name), base_header.tensors.get(name), _own(units, name)))
    ]
    for number, (entry, own) in enumerate(zip(entries, units, strict=True)):
        # Trained over another slice, it began with values that are in neither file.
        over = any(entry.overlaps(earlier) for earlier in [*known, *entries[:number]])
        if entry.start and not over and values_digest(read_slice(base_header.files, own)) != entry.start:
            findings.append(Finding(entry.label, "was trained on other values than the base holds"))
    return entries, findings


def write_patched(
    header: CheckpointHeader,
    out: Path,
    patches: Mapping[str, Patch],
    metadata: Mapping[str, str],
    entries: Sequence[Entry],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Streams a checkpoint to `out`, patched on the way; `check` has the last word before it takes its name."""
    tensors, _ = read_header(header.files)
    known = {key: text for key, text in header.metadata.items() if key != KEY}
    ledger = {KEY: ledger_text(entries)} if entries else {}
    write_safetensors(out, tensors, {**known, **metadata, **ledger}, _then(stream(tensors.values(), patches), check))


def check_output(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """InputError if `out` is no name for a safetensors file, is one of the `inputs`, or is there and not to be lost."""
    try:
        if out.suffix.lower() != ".safetensors" or out.is_dir() or not out.parent.is_dir():
            raise InputError(f"{out} is no name for a .safetensors file in a folder that exists")
        for path in inputs:
            if out.exists() and path.exists() and out.samefile(path):
                raise InputError(f"{out} is {path}, which is read: choose another name for the output")
        if out.exists() and not overwrite:
            raise InputError(f"{out} is there already: choose another output, or add --overwrite to replace it")
        out.with_name(out.name + UNFINISHED).exists()  # the name that it is written under may be too long as well
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None


def find_entry(entries: Sequence[Entry], name: str, source: Path) -> Entry:
    """The entry of this name, or of FF:FFID; InputError lists what there is."""
    found = [entry for entry in entries if name in (entry.name, f"{entry.ff}:{entry.ffid}")]
    if len(found) != 1:
        listed = ", ".join(f"{entry.label} = {entry.ff}:{entry.ffid}" for entry in entries) or "none"
        problem = "has no slice" if not found else f"has {len(found)} slices named"
        raise InputError(f"{source} {problem} {name}; there are: {listed}")
    return found[0]


def checked_start(header: CheckpointHeader, file: SliceFile, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The base's values at the slice's positions, after every check that the file fits the base."""
    for line in SlicesOnBase(replace(header, metadata={}), [file], [1.0]).notes:
        say(line)
    return _base_values(header, file.entry, units_of(header, file.entry), file.path)


def _base_values(base: CheckpointHeader, entry: Entry, units: Mapping[str, SliceUnits], source: Path) -> dict:
    if entry.base and entry.base != base_identity(base.files):
        raise InputError(f"{base.files[0]} is not the base of {entry.label} in {source}: its identity is another one")
    start = read_slice(base.files, units)
    if entry.start and values_digest(start) != entry.start:
        raise InputError(
            f"{base.files[0]} is not the base of {entry.label} in {source}: it holds other values where the slice lies"
        )
    return start


def _check_dtypes(*headers: CheckpointHeader) -> None:
    """InputError if one is of a file whose matrices can hold no slice, such as one in fp8."""
    for header in headers:
        for name, tensor in header.tensors.items():
            if is_block_matrix(name, tensor.shape) and tensor.dtype not in SLICED_DTYPES:
                raise InputError(
                    f"{header.files[0]}: {name} is {tensor.dtype}, and slices lie in {', '.join(SLICED_DTYPES)}: give "
                    "the file that they were trained on"
                )


def _put(units: SliceUnits, values: Tensor, rows: Tensor, first: int) -> None:
    change_rows(units, rows, first, lambda _, k: values.index_select(0, k))


def _then(chunks: Iterator, check: Callable[[], None]) -> Iterator:
    yield from chunks
    check()


def _remove_unfinished(folder: Path) -> None:
    """Deletes what killed writers left in a folder that a command writes to: to be called once nothing is refused."""
    for path in folder.glob(f"*.safetensors{UNFINISHED}"):
        with suppress(OSError):  # gone meanwhile, or open in another program: nothing that the output needs
            if time.time() - path.stat().st_mtime > _GONE:
                path.unlink()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None


def _refuse_trained_over(entries: Sequence[Entry], entry: Entry, source: Path, known: Sequence[Entry]) -> None:
    # Over what the base itself holds the values to restore are the base's own.
    over = [other.label for other in entries if other is not entry and other not in known and other.overlaps(entry)]
    if over:
        raise InputError(
            f"{source}: {entry.label} shares values with {', '.join(over)} (--allow_overlap): it cannot be told apart"
        )


def _stems(entries: Sequence[Entry], source: Path) -> list[str]:
    stems = []
    for entry in entries:
        if set(entry.name) & set('/\\:*?"<>|') or entry.name.strip(". ") != entry.name:
            raise InputError(f"{source}: {entry.name!a} cannot be a file's name")
        # Windows and macOS tell no upper case from lower.
        doubled = not entry.name or sum(entry.name.casefold() == other.name.casefold() for other in entries) > 1
        number = f"ff{entry.ff.replace('/', '_')}-ffid{entry.ffid}"
        stems.append("-".join(filter(None, [entry.name, number if doubled else ""])))
    if len({stem.casefold() for stem in stems}) < len(stems):
        raise InputError(f"{source}: two of {', '.join(stems)} would be one file; extract them one by one with --name")
    return stems


def _own(units: Sequence[Mapping[str, SliceUnits]], name: str) -> list[SliceUnits]:
    return [own[name] for own in units if name in own]


def _difference(found: TensorEntry | None, base: TensorEntry | None, slices: Sequence[SliceUnits]) -> str | None:
    if found is None or base is None:
        return "is missing" if found is None else "is not in the base"
    if (found.dtype, found.shape) != (base.dtype, base.shape):
        return f"is {found.dtype} {list(found.shape)}, in the base {base.dtype} {list(base.shape)}"
    if not base.numel:
        return None
    changed = (_bytes(found) != _bytes(base)).reshape(base.numel, -1).any(axis=1)
    outside = torch.from_numpy(changed).view(base.shape)
    for units in slices:
        units.write(outside, torch.zeros(units.count, dtype=torch.bool))
    count = int(outside.sum())
    return f"differs in {count:,} of its {base.numel:,} values outside the slices" if count else None


def _bytes(entry: TensorEntry) -> np.ndarray:
    return np.fromfile(entry.file, dtype=np.uint8, count=entry.stop - entry.start, offset=entry.start)
