"""Wan transformers from safetensors files: what a file holds, which task it fits, the model itself."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.fp8 import FP8, check_quantisation, dequantised, is_companion, scale_of
from wan.model import WanModel
from wan.safetensors_header import TensorEntry, read_file_header, why_not_a_file
from wan.stored_tensors import DTYPES, mapped_bytes, mapped_tensor, read_tensor

_PREFIX = re.compile(r"(?:model\.|diffusion_model\.|pipe\.dit\.|transformer\.|module\.|dit\.)*")
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
# What else users have, recognised by a part of its tensors' names.
_OTHER_FILES = {
    "condition_embedder.": "is a diffusers checkpoint; use the original one, from the repository without -Diffusers",
    "lora_": "is a LoRA; use a whole checkpoint",
    "decoder.": "is a VAE; use the file of the transformer",
    "token_embedding.": "is a text encoder; use the file of the transformer",
    "shared.weight": "is a text encoder; use the file of the transformer",
    "visual.": "is a CLIP image encoder; use the file of the transformer",
    "vision_model.": "is a CLIP image encoder; use the file of the transformer",
}
_OTHER_MODELS = {
    "vace_": "a VACE model",
    "control_adapter.": "a camera control model",
    "cam_encoder.": "a camera control model",
    "ref_conv.": "a Fun-Control model",
    "casual_audio_encoder.": "a speech-to-video model",
    "face_adapter.": "an Animate model",
    "audio_proj.": "a model driven by audio",
    "fps_embedding.": "a diffusion forcing model",
}
_SUPPORTED = f"which is not supported; supported are the models of --task {', '.join(TASKS)}"


@dataclass(frozen=True)
class CheckpointHeader:
    """The headers of a checkpoint's files: where each tensor lies, by its original name, and all metadata.

    Stored names have `prefix` in front of the original ones.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    prefix: str


def read_checkpoint_header(path: str | Path) -> CheckpointHeader:
    """What the checkpoint at `path` holds: a .safetensors file, a shard, an index.json, or a folder with one of these.

    InputError if a file is missing or damaged, is not a Wan transformer, or is quantised in an unknown way.
    """
    path = Path(path)
    try:
        files = _checkpoint_files(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    stored, metadata = {}, {}
    for file in files:
        entries, file_metadata = read_file_header(file)
        if twice := stored.keys() & entries.keys():
            raise InputError(f"{path}: {min(twice)} is in two of its files; download them again")
        stored.update(entries)
        metadata.update(file_metadata)
    prefix = _find_prefix(path, stored)
    tensors = {_WRAPPERS.sub("", key).removeprefix(prefix): entry for key, entry in stored.items()}
    if len(tensors) < len(stored):
        raise InputError(
            f"{path}: some tensors are there both with and without a prefix; use a file with a single model"
        )
    check_quantisation(path, tensors, metadata)
    return CheckpointHeader(tuple(files), tensors, metadata, prefix)


def config_from_header(header: CheckpointHeader) -> WanConfig:
    """The model's widths, from its tensors' shapes; heads and text length from the metadata where it has them.

    InputError if the tensors are not exactly those of a model that this project knows.
    """
    source, tensors = header.files[0], header.tensors
    for part, what in _OTHER_MODELS.items():
        if any(part in name for name in tensors):
            raise InputError(f"{source} is {what}, {_SUPPORTED}")
    dim = _length(header, "head.modulation", 3, 2)
    in_dim = _length(header, "patch_embedding.weight", 5, 1)
    out_dim = _length(header, "head.head.weight", 2, 0) // 4
    has_clip = any(name.startswith("img_emb.") for name in tensors)
    config = WanConfig(
        model_type=_model_type(header, in_dim, out_dim, has_clip),
        dim=dim,
        ffn_dim=_length(header, "blocks.0.ffn.0.weight", 2, 0),
        num_heads=_num_heads(header, dim),
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        in_dim=in_dim,
        out_dim=out_dim,
        text_dim=_length(header, "text_embedding.0.weight", 2, 1),
        freq_dim=_length(header, "time_embedding.0.weight", 2, 1),
        text_len=_metadata_number(header, "text_len", 512),
        image_dim=_length(header, "img_emb.proj.0.weight", 1, 0) if has_clip else None,
    )
    _check_tensors(header, config)
    return config


def check_fits_task(header: CheckpointHeader, task_name: str) -> None:
    """InputError, naming the tasks that fit, if the file's model belongs to another task.

    A file with `num_heads` in its metadata is not a released model; it fits any task of its kind.
    """
    if task_name not in TASKS:
        raise InputError(f"--task {task_name} is unknown; allowed are {', '.join(TASKS)}")
    config = config_from_header(header)
    kinds = {name: task.config for name, task in TASKS.items() if _kind(task.config) == _kind(config)}
    fits = [name for name, known in kinds.items() if replace(config, text_len=known.text_len) == known]
    if "num_heads" in header.metadata:
        fits = list(kinds)
    if task_name in fits:
        return
    advice = f"use --task {' or '.join(fits)}" if fits else "no task has such a model"
    raise InputError(f"{header.files[0]} ({_described(config)}) does not fit --task {task_name}: {advice}")


def _kind(config: WanConfig) -> tuple[str, bool]:
    """What a model is given to make a video."""
    return config.model_type, config.image_dim is not None


def _described(config: WanConfig) -> str:
    """What tells the models of two tasks apart, in words."""
    widths = f"width {config.dim}, {config.num_layers} blocks, {config.in_dim} input channels"
    if config.image_dim is None:
        return widths
    return f"{widths}, CLIP for {'two pictures' if config.conditions.pictures == 2 else 'one picture'}"


def is_shard(path: Path) -> bool:
    """Whether a file of this name is taken as one of several parts of a checkpoint."""
    return _SHARD.fullmatch(path.name) is not None


def file_dtype(header: CheckpointHeader) -> torch.dtype:
    """The dtype in which the file stores (most of) its block matrices."""
    values = Counter()
    for name in block_matrices(header):
        values[header.tensors[name].dtype] += header.tensors[name].numel
    return DTYPES[values.most_common(1)[0][0]]


def is_fp8(header: CheckpointHeader) -> bool:
    """Whether any weight of the file is stored in fp8."""
    return any(entry.dtype in FP8 for entry in header.tensors.values())


def block_matrices(header: CheckpointHeader) -> frozenset[str]:
    """The names of the matrices in the blocks."""
    return frozenset(
        name for name, entry in header.tensors.items() if name.startswith("blocks.") and len(entry.shape) == 2
    )


def cast_bytes(header: CheckpointHeader, dtype: torch.dtype, as_stored: Collection[str] = ()) -> int:
    """RAM that load_dit takes for a model in `dtype`: that of tensors stored in another one; others stay mapped."""
    names = (name for name in header.tensors.keys() - as_stored if not is_companion(name))
    cast = (header.tensors[name] for name in names if DTYPES[header.tensors[name].dtype] != dtype)
    return sum(entry.numel * dtype.itemsize for entry in cast)


def load_dit(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    read_only: bool = False,
    patches: Mapping[str, Callable[[Tensor], None]] | None = None,
    as_stored: Collection[str] = (),
) -> WanModel:
    """The frozen model of a checkpoint, all in `dtype`: the file's own by default, bfloat16 for fp8 files.

    On the CPU, tensors that are already in `dtype` stay mapped from the file: a page is copied when it is written to;
    if `read_only`, which files larger than the RAM need, nothing may be written to them. `patches` change copies of
    the stored tensors, by original name; those in `as_stored` keep the file's dtype. Errors: those of
    read_checkpoint_header and config_from_header.
    """
    header = read_checkpoint_header(path)
    config = config_from_header(header)
    if dtype is None:
        dtype = torch.bfloat16 if is_fp8(header) else file_dtype(header)
    with torch.device("meta"):
        model = WanModel(config)
    dtypes = {name: DTYPES[header.tensors[name].dtype] if name in as_stored else dtype for name in header.tensors}
    tensors = dict(_load_tensors(header, dtypes, torch.device(device), read_only, patches or {}))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _checkpoint_files(path: Path) -> list[Path]:
    if path.is_dir():
        return _checkpoint_files(_only_checkpoint(path))
    if not path.is_file():
        raise InputError(f"{path} {why_not_a_file(path)}")
    if path.name.endswith(".index.json"):
        return _indexed_files(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file, the only format that transformers are loaded from")
    shard = _SHARD.fullmatch(path.name)
    if shard is None:
        return [path]
    stem, count = shard["stem"], int(shard["count"])
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.safetensors") for number in range(1, count + 1)]


def _only_checkpoint(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".safetensors")
    indices = sorted(file.name for file in folder.glob("*.safetensors.index.json"))
    stems = {shard["stem"] if (shard := _SHARD.fullmatch(name)) else name for name in names}
    if len(indices) == 1:
        return folder / indices[0]
    if len(stems) == 1:
        return folder / names[0]
    found = ", ".join([*indices, *names][:4]) or "none"
    if (folder / "model_index.json").is_file() and not names:
        raise InputError(f"{folder} {_OTHER_FILES['condition_embedder.']}")
    experts = [name for name in ("high_noise_model", "low_noise_model") if (folder / name).is_dir()]
    hint = f"; use its folder {' or '.join(experts)}" if experts else "; name the file itself"
    raise InputError(f"{folder} does not contain exactly one checkpoint (found: {found}){hint}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain or not names:
        raise InputError(f"{index} is not the index of a sharded checkpoint: it has no weight_map with file names")
    return [index.with_name(name) for name in sorted(names)]


def _find_prefix(path: Path, stored: Mapping[str, TensorEntry]) -> str:
    names = [_WRAPPERS.sub("", key) for key in stored]
    prefixes = {name.removesuffix("head.modulation") for name in names if name.endswith("head.modulation")}
    known = [prefix for prefix in prefixes if _PREFIX.fullmatch(prefix)]
    if len(known) == 1:
        return known[0]
    if known:
        raise InputError(f"{path} contains {len(known)} transformers; use a file with a single model")
    for part, what in _OTHER_FILES.items():
        if any(part in name for name in names):
            raise InputError(f"{path} {what}")
    for part, what in _OTHER_MODELS.items():
        if any(part in name for name in names):
            raise InputError(f"{path} is a part of {what}, {_SUPPORTED}")
    raise InputError(
        f"{path} is not a Wan transformer: it has no tensor head.modulation, with or without a known prefix"
    )


def _length(header: CheckpointHeader, name: str, dimensions: int, axis: int) -> int:
    entry = header.tensors.get(name)
    if entry is None or len(entry.shape) != dimensions:
        found = "is missing" if entry is None else f"is {list(entry.shape)}"
        raise InputError(f"{header.files[0]} is not a complete Wan transformer: {name} {found}")
    return entry.shape[axis]


def _model_type(header: CheckpointHeader, in_dim: int, out_dim: int, has_clip: bool) -> str:
    if in_dim == out_dim and not has_clip:
        return "ti2v" if out_dim == 48 else "t2v"
    # The latents, 4 channels of mask, the latents of the given pictures; with 48 channels it is an inpainting model.
    if in_dim == 2 * out_dim + 4 and out_dim != 48:
        return "flf2v" if "img_emb.emb_pos" in header.tensors else "i2v"
    with_clip = " and a CLIP branch" if has_clip else ""
    raise InputError(
        f"{header.files[0]} has {in_dim} input and {out_dim} output channels{with_clip} (a control or inpainting "
        f"model?), {_SUPPORTED}"
    )


def _num_heads(header: CheckpointHeader, dim: int) -> int:
    num_heads = _metadata_number(header, "num_heads", dim // 128)
    # RoPE rotates pairs of channels, at least one pair for each of three axes.
    if num_heads < 1 or dim % num_heads or dim // num_heads % 2 or dim // num_heads < 6:
        raise InputError(f"{header.files[0]}: width {dim} cannot be split into {num_heads} heads")
    if "num_heads" not in header.metadata and dim % 128:
        raise InputError(f"{header.files[0]}: width {dim} is not a multiple of 128, and the metadata has no num_heads")
    return num_heads


def _metadata_number(header: CheckpointHeader, key: str, default: int) -> int:
    text = header.metadata.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or (key in header.metadata and int(text) == 0):
        raise InputError(
            f"{header.files[0]}: {key} in its metadata is {text[:20]!r}, which is not a whole number above 0"
        )
    return int(text)


def _check_tensors(header: CheckpointHeader, config: WanConfig) -> None:
    wanted = _shapes(config)
    stored = {name: entry.shape for name, entry in header.tensors.items() if not is_companion(name)}
    problems = {
        "missing": wanted.keys() - stored.keys(),
        "unexpected": stored.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]},
    }
    found = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in problems.items() if names]
    if found:
        raise InputError(f"{header.files[0]} is not exactly one Wan transformer; tensors: {'; '.join(found)}")


@lru_cache(maxsize=2)  # used when flags are checked and when the model is loaded; two experts share it
def _shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(config).state_dict().items()}


def _load_tensors(
    header: CheckpointHeader, dtypes: Mapping, device: torch.device, read_only: bool, patches: Mapping
) -> Iterator[tuple[str, Tensor]]:
    for file in header.files:
        inside = {name: entry for name, entry in header.tensors.items() if entry.file == file}
        contents = mapped_bytes(file, read_only)
        for name, entry in inside.items():
            if is_companion(name):
                continue
            stored = mapped_tensor(contents, entry)
            if name in patches:
                patches[name](stored := stored.clone())
            yield name, _load_tensor(stored, scale_of(name, header.tensors), dtypes[name], device)


def _load_tensor(stored: Tensor, scale: TensorEntry | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if scale is None:
        return stored.to(device, dtype)
    return dequantised(stored.to(device), read_tensor(scale).to(device), dtype)
