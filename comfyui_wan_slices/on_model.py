"""A slice on a model that ComfyUI has loaded: checked against it, then handed over as patches of its weights."""

from dataclasses import dataclass, replace

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from .selective_finetune import SliceError, SliceUnits, contract_name, slice_units
from .slice_file import SliceFile
from .slice_saving import is_block_matrix, slice_digest, value_digest

PREFIX = "diffusion_model."  # of the names in a ComfyUI model
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_CACHED = 1 << 29  # bytes of one slice that stay on a device


@dataclass(frozen=True, eq=False)
class SliceOfMatrix:
    """What is the same on every device: which slice, its file, where it lies in one matrix."""

    file: SliceFile
    units: SliceUnits  # without the tables, which travel with the values


class SliceAdapter(WeightAdapterBase):
    """Puts a slice into one weight.

    `weights` are start values (None: those of the weight that comes), final values, and the columns and groups of the
    units, then a SliceOfMatrix. ComfyUI makes copies of adapters on a device from `loaded_keys` and `weights`.
    """

    name = "wan slice"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights
        self.used_on: torch.device | None = None
        self.on_device: tuple | None = None

    @property
    def matrix(self) -> SliceOfMatrix:
        return self.weights[-1]

    @torch.no_grad()
    def calculate_weight(self, weight: Tensor, key: str, strength: float, *_, **__) -> Tensor:
        """`weight` with the slice in it, rounded as the file is; what lies beside the slice stays."""
        start, final, columns_U, groups_U = self._tensors(weight.device)
        if strength == 0:
            return weight
        units = replace(self.matrix.units, columns_U=columns_U, groups_U=groups_U)
        weight = weight.contiguous()
        if strength != 1 and start is None:
            start = units.cut(units.read(weight))
        units.write(weight, final if strength == 1 else scaled(start, final, strength))
        return weight

    def _tensors(self, device: torch.device) -> tuple:
        """On the device; from the second use on they stay there, as every step of a sampler asks for offloaded ones."""
        if self.on_device is not None and self.used_on == device:
            return self.on_device
        moved = tuple(None if tensor is None else tensor.to(device) for tensor in self.weights[:-1])
        is_small = self.matrix.file.size <= _MOST_CACHED
        self.on_device = moved if is_small and self.used_on == device else None
        self.used_on = device
        return moved


def scaled(start: Tensor, final: Tensor, strength: float) -> Tensor:
    """round(start + strength * (final - start)) in the file's dtype; what was not moved keeps its bits."""
    before, after = start.float(), final.float()
    moved = (before + strength * (after - before)).to(final.dtype)
    return torch.where(before.view(torch.int32) == after.view(torch.int32), final, moved)


def with_slice(model, file: SliceFile, strength: float):
    """A clone of ComfyUI's `model` with the slice on top, and a report; SliceError if it does not belong there."""
    _refuse_overlaps(model, file)
    _refuse_merged(model, file)
    # Names and weights of modules, as state_dict() of GGUF models has entries that are no weights, in packed shapes.
    keys = {contract_name(key): key for key, _ in model.model.named_parameters() if key.startswith(PREFIX)}
    weights = {name: _stored(model, key) for name, key in keys.items()}
    units = _units(weights, file)
    start = _start_values({name: weights[name] for name in units}, units, file)
    if start is not None:
        _check_base(start, file)
    report = _report(file, strength, start)
    if strength == 0:
        return model, report
    kept = start if start is not None and strength != 1 else {}
    patches = {keys[name]: _adapter(keys[name], file, kept.get(name), own) for name, own in units.items()}
    patched = model.clone()
    taken = set(patched.add_patches(patches, strength))
    if missing := patches.keys() - taken:
        raise SliceError(f"ComfyUI did not take the slice for {min(missing)}: update ComfyUI, or report this")
    for key in patches:
        # Before the LoRAs, which add to what they find, so that the order of the nodes does not matter.
        patched.patches[key] = [patched.patches[key][-1], *patched.patches[key][:-1]]
    return patched, report


def _stored(model, key: str) -> Tensor:
    """The weight without any patches, which another chain of nodes may have put into it meanwhile."""
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    return model.backup[key].weight if key in model.backup else model.model.get_parameter(key)


def _adapter(key: str, file: SliceFile, start: Tensor | None, units: SliceUnits) -> SliceAdapter:
    nothing = torch.empty(0, dtype=torch.int64)
    place = SliceOfMatrix(file, replace(units, columns_U=nothing, groups_U=nothing))
    final = file.values[contract_name(key)]
    return SliceAdapter({key}, (start, final, units.columns_U, units.groups_U, place))


def _refuse_overlaps(model, file: SliceFile) -> None:
    patches = (patch[1] for own in model.patches.values() for patch in own)
    for other in {id(p.matrix.file): p.matrix.file for p in patches if isinstance(p, SliceAdapter)}.values():
        if other.overlaps(file):
            raise SliceError(
                f"{file.name}, {file.label}, shares values with {other.name}, {other.label}, which this model has "
                "already: use one of the two"
            )


def _refuse_merged(model, file: SliceFile) -> None:
    """A patch that is a list is another whole model: the slice would go into the first of the two, weakened with it."""
    if any(isinstance(patch[1], list) for own in model.patches.values() for patch in own):
        raise SliceError(
            f"two models were merged before this node, so {file.label} would be merged, too: move Load Wan Slice to "
            "before the merging node, behind the model that it was trained on"
        )


def _units(weights: dict[str, Tensor], file: SliceFile) -> dict[str, SliceUnits]:
    """Where the slice lies in every block matrix of the model, as many values as the file has."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    shapes = {name: shape for name, shape in shapes.items() if is_block_matrix(name, shape)}
    units = {name: slice_units(name, shape, file.entry["ff"], file.entry["ffid"]) for name, shape in shapes.items()}
    units = {name: own for name, own in units.items() if own.count}
    if not units.keys() & file.values.keys():
        raise SliceError(f"{file.name} is a slice of a Wan model, and this model has none of its matrices")
    counts, found = {n: own.count for n, own in units.items()}, {n: own.numel() for n, own in file.values.items()}
    if counts != found:
        wrong = min(name for name in counts.keys() | found.keys() if counts.get(name) != found.get(name))
        raise SliceError(
            f"{file.name} is damaged, or a slice of another model: it has {found.get(wrong, 0)} values for "
            f"{wrong[:80]}, and this model needs {counts.get(wrong, 0)}"
        )
    return units


def _start_values(weights: dict, units: dict[str, SliceUnits], file: SliceFile) -> dict[str, Tensor] | None:
    """What the model holds where the slice lies, in the file's dtype; None if it holds other than the base's values."""
    start = {}
    for name, weight in weights.items():
        dtype = file.values[name].dtype
        is_plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in _FLOATS
        if not is_plain or weight.dtype not in (dtype, torch.float32):  # fp32 holds what bf16 and fp16 do
            return None
        own = units[name].to(weight.device)
        start[name] = own.cut(own.read(weight.detach().contiguous())).to("cpu", dtype, copy=True)
    return start


def _check_base(start: dict[str, Tensor], file: SliceFile) -> None:
    expected = file.entry.get("start")
    if not expected or _digest(start) == expected:
        return
    if _digest(start) == _digest(file.values):
        raise SliceError(f"this model holds {file.label} already: take {file.name} out, or load the model's base")
    raise SliceError(
        f"this model is not what {file.name}, {file.label}, was trained on: another model, the other one of two A14B "
        "experts (high or low noise), or something was merged into it"
    )


def _digest(values: dict[str, Tensor]) -> str:
    return slice_digest({name: value_digest(own) for name, own in values.items()})


def _report(file: SliceFile, strength: float, start: dict[str, Tensor] | None) -> str:
    if start is None:
        base = (
            "note: this model's weights are quantised or cast, so it cannot be checked that it is the slice's base; "
            "what was learned is rounded as they are"
        )
    elif not file.entry.get("start"):
        base = "note: the file does not record its base, so it cannot be checked that this is it"
    else:
        base = "the model is the slice's base"
    return f"{file.label} from {file.name} at strength {strength:g}: {base}"
