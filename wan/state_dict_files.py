"""The VAE, the text encoder and the image encoder from .safetensors and .pth files, memory-mapped and free of code."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan.errors import InputError
from wan.safetensors_header import read_file_header, why_not_a_file

Model = TypeVar("Model", bound=nn.Module)
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


def read_state_dict(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the file under its stored name, and the file's metadata (empty for .pth).

    The tensors stay memory-mapped until something copies them. InputError, which begins with `what` the file should be,
    for one that is missing, truncated, of another format, or that contains code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what} {path} {why_not_a_file(path)}")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path, what)
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return _read_pickle(path, what), {}
    allowed = ", ".join((".safetensors", *_PICKLE_SUFFIXES))
    raise InputError(f"{what} {path} has an unknown file type; allowed are {allowed}")


def strip_prefix(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under the first of `prefixes` that occurs in the file, without it; all tensors if none occurs."""
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            return inside
    return dict(tensors)


def load_model(
    make: Callable[[], Model],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str | torch.device,
    source: str,
    prefixes: tuple[str, ...] = (),
) -> Model:
    """The model that `make` makes, frozen, with these weights in `dtype` on `device`.

    What needs no conversion stays memory-mapped. The model's own names have the first of `prefixes` that one of them
    begins with before those of `tensors`. InputError, starting with `source`, if names or shapes are not exactly its.
    """
    with torch.device("meta"):
        model = make()
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefix = next((own for own in prefixes if any(name.startswith(own) for name in wanted)), "")
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for problem, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has unknown", sorted(found.keys() - wanted.keys())),
        ("has misshapen", sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])),
    ):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise InputError(f"{source}: it {problem} tensors: {', '.join(names[:2])}{more}")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        read_file_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (InputError, SafetensorError, OSError) as error:
        raise InputError(f"{what} {path} is truncated or not a safetensors file ({error}): download it again") from None


def _read_pickle(path: Path, what: str) -> dict[str, Tensor]:
    # torch's zip files end with their directory, so a truncated one is not recognised as a zip file.
    if not zipfile.is_zipfile(path):
        raise InputError(f"{what} {path} is truncated or not in torch.save's zip format: download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{what} {path} contains code or objects besides tensors, so it is not opened") from None
    except RuntimeError as error:
        raise InputError(f"{what} {path} is damaged ({str(error).splitlines()[0]}): download it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{what} {path} is not a plain dictionary of tensors")
    return content
