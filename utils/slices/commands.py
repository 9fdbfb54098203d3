"""What is done with slices on disk: apply, remove, extract, scale, export as LoRA, verify.

Each command reads headers, checks the output and that everything fits, and only then writes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.locks import UNFINISHED, remove_unfinished
from utils.selective_finetune import SliceUnits, slice_units
from utils.slice_saving import (
    DTYPES,
    Patch,
    base_identity,
    change_rows,
    is_block_matrix,
    read_slice,
    slice_digest,
    this_process,
    value_digest,
    write_patched,
    write_slice,
)
from utils.slices.ledger import (
    KEY,
    VALUES_KEY,
    Entry,
    at_strength,
    description,
    ledger_text,
    list_of,
    read_ledger,
)
from utils.slices.lora import LoraReport, lora_bytes, rank_of, who_reads, write_lora
from utils.slices.on_base import (
    SliceFile,
    check_contract,
    read_slice_file,
    scaled,
    slices_on_base,
    units_of,
    values_digest,
)
from utils.slices.overlaps import over_earlier, overlapping
from wan.errors import InputError
from wan.loading import CheckpointHeader, read_checkpoint_header
from wan.safetensors_header import TensorEntry
from wan.stored_tensors import DTYPE_NAMES

Say = Callable[[str], None]


def _say_nothing(line: str) -> None:
    pass


def apply(
    base: Path,
    slices: Sequence[Path],
    strengths: Sequence[float],
    out: Path,
    overwrite: bool = False,
    say: Say = _say_nothing,
) -> list[Entry]:
    """Writes `base` with the slices in it, byte for byte the chained checkpoint; returns the ledger it has.

    `say` gets a line on what could not be checked. InputError if two slices overlap or one is another base's.
    """
    header = read_checkpoint_header(base)
    check_output(out, [*header.files, *slices], overwrite)
    on_base = slices_on_base(header, [read_slice_file(path) for path in slices], strengths)
    for line in on_base.notes:
        say(line)
    _write_checkpoint(out, header, on_base.patches, {**header.metadata, **on_base.metadata}, on_base.entries)
    return on_base.entries


def remove(checkpoint: Path, name: str, base: Path, out: Path, overwrite: bool = False) -> Entry:
    """Writes `checkpoint` without the slice `name`, every tensor byte for byte as if it was never trained.

    The description of the newest run goes with its slice; what is left is the base's, as no file keeps earlier runs'.
    """
    pair = _read_pair(checkpoint, base)
    check_output(out, pair.inputs, overwrite)
    entry = find_entry(pair.entries, name, checkpoint)
    pair.refuse_trained_over([entry])
    units = units_of(pair.header, entry)
    start = _base_values(pair.base, entry, units, checkpoint)
    patches: dict[str, Patch] = {}
    for matrix, own in units.items():
        patches[matrix] = partial(change_rows, own, lambda _, k, values=start[matrix]: values.index_select(0, k))
    left = [other for other in pair.entries if other is not entry]
    model = {key: text for key, text in pair.base.metadata.items() if key not in description(pair.base.metadata)}
    newest = pair.base if entry is pair.entries[-1] else pair.header
    _write_checkpoint(out, pair.header, patches, {**model, **description(newest.metadata)}, left)
    return entry


def extract(checkpoint: Path, base: Path, names: Sequence[str], folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes the slices of `checkpoint` that `base` does not have (or only those `names`) as files into `folder`."""
    pair = _read_pair(checkpoint, base)
    wanted = list(dict.fromkeys(find_entry(pair.entries, name, checkpoint) for name in names)) or pair.new_slices
    if not wanted:
        raise InputError(f"{checkpoint} has no slice that {base} does not have (its ledger has {len(pair.entries)})")
    paths = [folder / f"{stem}.slice.safetensors" for stem in _stems(wanted, checkpoint)]
    pair.refuse_trained_over(wanted)
    _make_folder(folder)
    for path in paths:
        check_output(path, pair.inputs, overwrite)
    identity = base_identity(pair.base.files)
    for entry, path in zip(wanted, paths, strict=True):
        units = units_of(pair.header, entry)
        start = _base_values(pair.base, entry, units, checkpoint, identity)
        # What the checkpoint says beyond its base, its newest run said.
        said = dict(pair.header.metadata.items() - pair.base.metadata.items()) if entry is pair.entries[-1] else {}
        of_base = replace(entry, base=identity, start=values_digest(start))
        _write_slice(path, read_slice(pair.header.files, units), description(said), of_base)
    return paths


def scale(
    slice_path: Path, base: Path, strength: float, out: Path, overwrite: bool = False, say: Say = _say_nothing
) -> Entry:
    """Writes the slice with `strength` times what it learned; `say` gets a line on what could not be checked."""
    file, _, start = _read_slice_and_start(slice_path, base, out, overwrite, say)
    entry = at_strength(file.entry, strength)
    values = {name: scaled(start[name], file.values(name), strength) for name in file.tensors}
    metadata = {key: text for key, text in file.metadata.items() if key != VALUES_KEY or strength == 1}
    _write_slice(out, values, metadata, entry)
    return entry


def to_lora(
    slice_path: Path, base: Path, out: Path, names: str, dtype: str, overwrite: bool = False, say: Say = _say_nothing
) -> LoraReport:
    """Writes the slice as a LoRA with the names of comfyui or diffusers, in fp32 or bf16; says how exact it is."""
    file, units, start = _read_slice_and_start(slice_path, base, out, overwrite, say)
    stored = DTYPE_NAMES[dtype]
    say(f"{out}: {lora_bytes(units, stored) / 1e6:,.1f} MB, ranks up to {max(map(rank_of, units.values()))}")
    _remove_unfinished(out.parent)
    report = write_lora(out, file.entry, units, start, file.values, names, stored, file.metadata)
    say(report.line)
    say(f"{out}: {who_reads(names, dtype)}")
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
    held = set(known)
    entries = [entry for entry in read_ledger(header.metadata, checkpoint) if entry not in held]
    for entry in [*known, *entries] if entries else ():
        check_contract(entry)
    if entries:
        _check_dtypes(base_header)
    starts: list[dict[str, bytes]] = [{} for _ in entries]
    findings = []
    for name in dict.fromkeys([*base_header.tensors, *header.tensors]):
        found, stored = header.tensors.get(name), base_header.tensors.get(name)
        if problem := _form_problem(found, stored) or _difference(found, stored, name, entries, starts):
            findings.append(Finding(name, problem))
    # Trained over an earlier slice, a slice began with values that are in neither file.
    over = over_earlier([*known, *entries])[len(known) :]
    for entry, digests, is_over in zip(entries, starts, over, strict=True):
        if entry.start and not is_over and slice_digest(digests) != entry.start:
            findings.append(Finding(entry.label, "was trained on other values than the base holds"))
    return entries, findings


def check_output(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """InputError if `out` cannot be the name of the output, is one of the `inputs`, or exists and is to be kept."""
    try:
        if out.suffix.lower() != ".safetensors" or out.is_dir() or not out.parent.is_dir():
            raise InputError(f"{out} is not a name for a .safetensors file in an existing folder")
        for path in inputs:
            if out.exists() and path.exists() and out.samefile(path):
                raise InputError(f"{out} is {path}, an input: choose another name for the output")
        if out.exists() and not overwrite:
            raise InputError(f"{out} already exists: choose another output, or add --overwrite to replace it")
        out.with_name(f"{out.name}.{this_process()}{UNFINISHED}").exists()  # that name may be too long as well
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None


def find_entry(entries: Sequence[Entry], name: str, source: Path) -> Entry:
    """The entry of this name, or of FF:FFID; InputError lists what there is."""
    found = [entry for entry in entries if name in (entry.name, f"{entry.ff}:{entry.ffid}")]
    if len(found) != 1:
        listed = list_of([f"{entry.label} = {entry.ff}:{entry.ffid}" for entry in found or entries]) or "none"
        problem = "has no slice" if not found else f"has {len(found)} slices named"
        raise InputError(f"{source} {problem} {name}; there are: {listed}")
    return found[0]


@dataclass(frozen=True)
class _Pair:
    """A checkpoint and its base, with their ledgers."""

    header: CheckpointHeader
    base: CheckpointHeader
    entries: list[Entry]
    known: list[Entry]  # the base's

    @property
    def inputs(self) -> list[Path]:
        return [*self.header.files, *self.base.files]

    @property
    def new_slices(self) -> list[Entry]:
        """The slices that the base does not have."""
        known = {(entry.contract, entry.interval) for entry in self.known}
        return [entry for entry in self.entries if (entry.contract, entry.interval) not in known]

    def refuse_trained_over(self, wanted: Sequence[Entry]) -> None:
        """InputError where slices of the checkpoint share values, so that one cannot be had without the other."""
        known, wanted = set(self.known), set(wanted)
        # Over what the base itself holds the values to restore are the base's own.
        own = [entry for entry in self.entries if entry in wanted or entry not in known]
        for entry, other in (pair for a, b in overlapping(own) for pair in ((a, b), (b, a))):
            if entry in wanted and other not in known:
                raise InputError(
                    f"{self.header.files[0]}: {entry.label} shares values with {other.label} (--allow_overlap): they "
                    "cannot be told apart"
                )


def _read_pair(checkpoint: Path, base: Path) -> _Pair:
    header, base_header = read_checkpoint_header(checkpoint), read_checkpoint_header(base)
    ledgers = read_ledger(header.metadata, checkpoint), read_ledger(base_header.metadata, base)
    _check_dtypes(header, base_header)
    return _Pair(header, base_header, *ledgers)


def _read_slice_and_start(
    path: Path, base: Path, out: Path, overwrite: bool, say: Say
) -> tuple[SliceFile, dict[str, SliceUnits], dict[str, Tensor]]:
    """A slice file that fits its base, where it lies, and what the base holds there."""
    header, file = read_checkpoint_header(base), read_slice_file(path)
    check_output(out, [*header.files, path], overwrite)
    for line in slices_on_base(replace(header, metadata={}), [file], [1.0]).notes:
        say(line)
    units = units_of(header, file.entry)
    return file, units, _base_values(header, file.entry, units, path)


def _base_values(
    base: CheckpointHeader, entry: Entry, units: Mapping[str, SliceUnits], source: Path, identity: str | None = None
) -> dict[str, Tensor]:
    if entry.base and entry.base != (identity or base_identity(base.files)):
        raise InputError(f"{base.files[0]} is not the base of {entry.label} in {source}: its identity differs")
    start = read_slice(base.files, units)
    if entry.start and values_digest(start) != entry.start:
        raise InputError(
            f"{base.files[0]} is not the base of {entry.label} in {source}: it holds other values where the slice lies"
        )
    return start


def _check_dtypes(*headers: CheckpointHeader) -> None:
    """InputError for a file whose matrices cannot hold a slice, such as one in fp8."""
    for header in headers:
        for name, tensor in header.tensors.items():
            if is_block_matrix(name, tensor.shape) and tensor.dtype not in DTYPES:
                raise InputError(
                    f"{header.files[0]}: {name} is {tensor.dtype}, and slices lie in {', '.join(sorted(DTYPES))}: give "
                    "the file that they were trained on"
                )


def _write_checkpoint(
    out: Path,
    header: CheckpointHeader,
    patches: Mapping[str, Patch],
    metadata: Mapping[str, str],
    entries: Sequence[Entry],
) -> None:
    _remove_unfinished(out.parent)
    others = {key: text for key, text in metadata.items() if key != KEY}
    write_patched(out, header.files, patches, others | ({KEY: ledger_text(entries)} if entries else {}))


def _write_slice(out: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str], entry: Entry) -> None:
    _remove_unfinished(out.parent)
    write_slice(out, values, {**metadata, KEY: ledger_text([entry])})


def _remove_unfinished(folder: Path) -> None:
    remove_unfinished(folder.glob(f"*.safetensors*{UNFINISHED}"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None


def _stems(entries: Sequence[Entry], source: Path) -> list[str]:
    # Windows and macOS do not tell upper case from lower case.
    names, stems = Counter(entry.name.casefold() for entry in entries), []
    for entry in entries:
        if set(entry.name) & set('/\\:*?"<>|') or entry.name.strip(". ") != entry.name:
            raise InputError(f"{source}: {entry.name!a} cannot be a file's name")
        number = f"ff{entry.ff.replace('/', '_')}-ffid{entry.ffid}"
        is_unique = entry.name and names[entry.name.casefold()] == 1
        stems.append(entry.name if is_unique else "-".join(filter(None, [entry.name, number])))
    if twice := [stem for stem, count in Counter(stem.casefold() for stem in stems).items() if count > 1]:
        raise InputError(f"{source}: two slices would be one file, {twice[0]}; extract them one by one with --name")
    return stems


def _form_problem(found: TensorEntry | None, base: TensorEntry | None) -> str | None:
    if found is None or base is None:
        return "is missing" if found is None else "is not in the base"
    if (found.dtype, found.shape) != (base.dtype, base.shape):
        return f"is {found.dtype} {list(found.shape)}, in the base {base.dtype} {list(base.shape)}"
    return None


def _difference(
    found: TensorEntry, base: TensorEntry, name: str, entries: Sequence[Entry], starts: Sequence[dict[str, bytes]]
) -> str | None:
    """How a tensor differs outside the slices; `starts` get the digests of what the base holds inside them."""
    if not base.numel:
        return None
    stored = _bytes(base)
    changed = (_bytes(found) != stored).reshape(base.numel, -1).any(axis=1)
    outside = torch.from_numpy(changed).view(base.shape)
    for units, digests in _slices_in(name, base.shape, entries, starts):
        units.write(outside, torch.zeros(units.count, dtype=torch.bool))
        weight = torch.from_numpy(stored).view(DTYPES[base.dtype]).view(base.shape)
        digests[name] = value_digest(units.cut(units.read(weight)))
    count = int(outside.sum())
    return f"differs in {count:,} of its {base.numel:,} values outside the slices" if count else None


def _slices_in(
    name: str, shape: Sequence[int], entries: Sequence[Entry], starts: Sequence[dict[str, bytes]]
) -> Iterator[tuple[SliceUnits, dict[str, bytes]]]:
    if is_block_matrix(name, shape):
        for entry, digests in zip(entries, starts, strict=True):
            if (units := slice_units(name, shape, entry.ff, entry.ffid)).count:
                yield units, digests


def _bytes(entry: TensorEntry) -> np.ndarray:
    return np.fromfile(entry.file, dtype=np.uint8, count=entry.stop - entry.start, offset=entry.start)
