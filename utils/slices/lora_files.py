"""LoRA files of any trainer, matched with the linear layers of a Wan model by name; only headers are read here.

Shapes: R rank, O I outputs and inputs of a layer.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.slices.ledger import KEY
from utils.slices.lora import diffusers_module
from utils.text_files import read_json
from wan.configs import WanConfig
from wan.errors import InputError
from wan.model import WanModel
from wan.safetensors_header import TensorEntry, read_file_header
from wan.stored_tensors import DTYPES, mapped_bytes, mapped_tensor, read_tensor

_ADAPTER = r"(?:\.(?!weight$|bias$)\w+)?"  # PEFT's name of one of several
_PARTS = {
    "down": re.compile(rf"\.(?:lora_down|lora_A|lora\.down){_ADAPTER}\.weight$"),
    "up": re.compile(rf"\.(?:lora_up|lora_B|lora\.up){_ADAPTER}\.weight$"),
    "alpha": re.compile(r"\.(?:lora_)?alpha$"),
    "bias": re.compile(rf"\.(?:lora_up|lora_B){_ADAPTER}\.bias$"),
    "diff": re.compile(r"\.(?:diff|w_norm)$"),
    "diff_b": re.compile(r"\.(?:diff_b|b_norm)$"),
}
_OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "DoRA": re.compile(r"\.(?:dora_scale|lora_magnitude_vector)\b"),
    "OFT": re.compile(r"\.oft_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "LoCon with a middle matrix": re.compile(r"\.lora_mid\b"),
}
# A part of the names in adapters of other models.
_OTHER_MODELS = {
    "double_blocks": "HunyuanVideo or FLUX",
    "single_transformer_blocks": "FLUX or HunyuanVideo",
    "transformer_blocks": "LTX-Video, Qwen-Image, FLUX or Stable Diffusion 3",
    "input_blocks": "Stable Diffusion",
    "down_blocks": "Stable Diffusion",
    "joint_blocks": "Stable Diffusion 3",
    "context_refiner": "Z-Image or Lumina",
    "lora_te": "a text encoder",
}
_PREFIXES = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|pipe|dit|module|_orig_mod)\.)*"
    r"(?:lora_unet_|lora_transformer_|lora_dit_|lycoris_)?"
)
_OUTSIDE = {  # of the blocks, in diffusers
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_FLOATS = ("F32", "F16", "BF16")
_CONFIG = "adapter_config.json"  # beside the files of PEFT
_NAMED = 3  # of the keys without a matrix


@dataclass(frozen=True)
class LoraPart:
    """What a LoRA adds to one layer: scale * up(down(x)), and a difference of its bias; either may be missing."""

    down_RI: TensorEntry | None = None
    up_OR: TensorEntry | None = None
    scale: float = 1.0
    bias_O: TensorEntry | None = None
    bias_scale: float = 1.0

    @property
    def entries(self) -> list[TensorEntry]:
        return [entry for entry in (self.down_RI, self.up_OR, self.bias_O) if entry is not None]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that fits a model: by the name of the layer in it, what is added there; `lines` tell what is not used."""

    path: Path
    multiplier: float
    parts: Mapping[str, LoraPart]
    lines: tuple[str, ...]
    contents: Tensor  # the file's bytes, mapped

    @property
    def label(self) -> str:
        """Its name and multiplier, for the metadata of samples."""
        return f"{self.path.stem} {self.multiplier:g}"

    @property
    def values(self) -> int:
        """How many numbers it adds to a model."""
        return sum(entry.numel for own in self.parts.values() for entry in own.entries)

    def read(self, entry: TensorEntry) -> Tensor:
        """A tensor of the file, as it was when the file was checked."""
        return mapped_tensor(self.contents, entry)


def read_loras(paths: Sequence[Path], multipliers: Sequence[float], config: WanConfig) -> tuple[LoraFile, ...]:
    """The LoRAs in these files; InputError, in one line, if one is not a LoRA of a model with these widths."""
    files = tuple(_read_lora(*own, config) for own in zip(paths, multipliers, strict=True))
    for file in files:
        for entry in (entry for own in file.parts.values() for entry in own.entries):
            if not file.read(entry).isfinite().all():
                raise InputError(f"LoRA {file.path}: {entry.key[:80]} holds NaN or infinite values; do not use it")
    return files


def _read_lora(path: Path, multiplier: float, config: WanConfig) -> LoraFile:
    entries, metadata = read_file_header(path)
    _refuse_other_files(path, entries, metadata)
    _refuse_other_kinds(path, entries)
    linears, names = _linears(config)
    found: dict[str, dict[str, TensorEntry]] = {}
    unknown, without_effect = [], 0
    for key, entry in entries.items():
        name, part = _split(key)
        module = names.get(_PREFIXES.sub("", name, count=1))
        is_difference = part == "diff" or (part == "diff_b" and module is None)
        if is_difference or (part in ("down", "up") and len(entry.shape) > 2):
            _refuse_difference(path, entry, module)
            without_effect += 1
        elif module is None or part is None:
            unknown.append(key)
        elif part in found.setdefault(module, {}):
            raise InputError(f"LoRA {path}: {key} is there twice, under two kinds of names; give a file with one kind")
        else:
            found[module][part] = entry
    if not found:
        raise InputError(f"LoRA {path}: {_nothing_matches(unknown, len(entries))}")
    scales = _Scales(path, metadata)
    parts = {module: _part(path, module, own, linears[module], scales) for module, own in found.items()}
    return LoraFile(
        path, multiplier, parts, tuple(_lines(path, unknown, without_effect, len(entries))), mapped_bytes(path)
    )


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer, and which part of a LoRA it holds there; None for what is not a part."""
    for part, pattern in _PARTS.items():
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, None


@lru_cache(maxsize=2)  # two experts share it
def _linears(config: WanConfig) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The shape [O, I] of every linear layer of the model, and the layer that each known name means."""
    with torch.device("meta"):
        model = WanModel(config)
    linears = {name: tuple(own.weight.shape) for name, own in model.named_modules() if isinstance(own, nn.Linear)}
    names = {}
    for name in linears:
        for known in (name, _OUTSIDE.get(name) or diffusers_module(name)):
            names |= {known: name, known.replace(".", "_"): name}
    return linears, names


def _refuse_other_files(path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    parts = {_split(key)[1] for key in entries}
    if KEY in metadata and parts == {None}:
        raise InputError(f"{path} is a slice file or a checkpoint, not a LoRA: give slice files with --slices")
    if parts == {None} and not any(kind.search(key) for key in entries for kind in _OTHER_KINDS.values()):
        raise InputError(f"{path} is not a LoRA: none of its {len(entries)} tensors is part of one")


def _refuse_other_kinds(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if key := next((key for key in entries if pattern.search(key)), None):
            raise InputError(
                f"LoRA {path} is of another kind, {kind} ({key}), which is not supported: give an ordinary LoRA (up "
                "and down matrices)"
            )


def _refuse_difference(path: Path, entry: TensorEntry, module: str | None) -> None:
    """InputError for a difference of a norm, a convolution or a whole matrix, unless it is zero, as in some files."""
    if entry.dtype in _FLOATS and entry.numel and not read_tensor(entry).any():
        return
    what = "a whole matrix" if module else "a norm" if "norm" in entry.key else "a weight that is not a linear layer's"
    what = "a convolution" if len(entry.shape) > 2 or "patch_embedding" in entry.key else what
    raise InputError(
        f"LoRA {path} changes {what} ({entry.key}), which is not supported: give a LoRA of linear layers alone, or a "
        "checkpoint that it is merged into"
    )


def _nothing_matches(unknown: Sequence[str], count: int) -> str:
    models = [model for part, model in _OTHER_MODELS.items() if any(part in key for key in unknown)]
    whose = f"; it is one of {models[0]}" if models else ""
    shown = f" ({unknown[0][:80]}, ...)" if unknown else ""
    return f"none of its {count} keys names a matrix of this Wan model{shown}{whose}; give a LoRA of this model"


def _lines(path: Path, unknown: Sequence[str], without_effect: int, count: int) -> list[str]:
    lines = []
    if unknown:
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        lines.append(
            f"note: {len(unknown)} of the {count} keys of {path} find no matrix in this model and are not used: "
            f"{', '.join(unknown[:_NAMED])}{more}"
        )
    if without_effect:
        lines.append(f"note: {path} has {without_effect} differences of norms or convolutions, which are zero")
    return lines


def _part(
    path: Path, module: str, own: Mapping[str, TensorEntry], shape: tuple[int, int], scales: "_Scales"
) -> LoraPart:
    """What the file adds to a layer of `shape` [O, I]; InputError where that is incomplete or of other widths."""
    down, up, bias = own.get("down"), own.get("up"), own.get("bias") or own.get("diff_b")
    if (down is None) != (up is None) or not (down or bias):
        there = next(iter(own.values())).key
        raise InputError(f"LoRA {path} is incomplete: {there} has no counterpart; download it again")
    outputs, inputs = shape
    rank = down.shape[0] if down and down.shape else 0
    for entry, wanted in ((down, (rank, inputs)), (up, (outputs, rank)), (bias, (outputs,))):
        if entry is None:
            continue
        if entry.shape != wanted or not entry.numel:
            raise InputError(
                f"LoRA {path} is of another model: {entry.key[:80]} is {list(entry.shape)}, and {module} of this one "
                f"has {inputs} inputs and {outputs} outputs; give a LoRA of this model"
            )
        if entry.dtype not in _FLOATS:
            raise InputError(f"LoRA {path}: {entry.key[:80]} is {entry.dtype}, not {', '.join(_FLOATS)}")
    scale = scales.of(module, rank, own.get("alpha")) if down else 1.0
    return LoraPart(down, up, scale, bias, scale if "bias" in own else 1.0)


class _Scales:
    """alpha / rank of each layer: by the file's alpha, else by PEFT's settings in or beside the file, else 1."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        self.path = path
        self.settings = _peft_settings(path, metadata)

    def of(self, module: str, rank: int, alpha: TensorEntry | None) -> float:
        if alpha is not None:
            if alpha.numel != 1 or alpha.dtype not in DTYPES:
                raise InputError(f"LoRA {self.path}: {alpha.key[:80]} is {list(alpha.shape)}, not one number")
            value = float(read_tensor(alpha))
        else:
            value = self._by_settings(module, rank)
        if not math.isfinite(value):
            raise InputError(f"LoRA {self.path}: the alpha of {module} is {value}; do not use the file")
        # Rank-stabilised LoRA (Kalajdzievski 2023) divides by the root.
        return value / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _by_settings(self, module: str, rank: int) -> float:
        names = (module, _OUTSIDE.get(module) or diffusers_module(module))
        patterns = self.settings.get("alpha_pattern")
        for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
            if any(name == pattern or name.endswith(f".{pattern}") for name in names):
                return self._number(own)
        own = self.settings.get("lora_alpha")
        return float(rank) if own is None else self._number(own)

    def _number(self, value: object) -> float:
        if type(value) not in (int, float):
            raise InputError(f"LoRA {self.path}: an alpha in its settings is {str(value)[:40]!r}, not a number")
        return float(value)


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict:
    """What PEFT and diffusers say of their adapter; empty if there is nothing."""
    text, beside = metadata.get("lora_adapter_metadata"), path.parent / _CONFIG
    if text is not None:
        try:
            settings = json.loads(text)
        except ValueError:
            raise InputError(f"LoRA {path}: lora_adapter_metadata in its metadata is not JSON") from None
    elif path.stem.startswith("adapter_model") and beside.is_file():
        settings = read_json(beside, "the settings of a LoRA")
    else:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"LoRA {path}: its settings are not a table")
    return {key.removeprefix("transformer."): value for key, value in settings.items()}
