"""A stand-in for the few interfaces of ComfyUI that the nodes use, as docs/comfyui.md describes them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from uuid import uuid4

import torch
from torch import nn


class WeightAdapterBase:
    """What ComfyUI asks for a changed weight, whenever a patch is an instance of this."""


class Backup(NamedTuple):
    """A weight as it was before patches were put into it."""

    weight: torch.Tensor


class ModelPatcher:
    """A model, or a clone that shares its weights, with patches that are put into them when it is loaded."""

    def __init__(self, model: nn.Module):
        self.model, self.patches, self.backup, self.hook_backup = model, {}, {}, {}
        self.patches_uuid = uuid4()

    def clone(self):
        other = ModelPatcher(self.model)
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.backup = self.backup
        return other

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        taken = [key for key in patches if key in self.model.state_dict()]
        for key in taken:
            entry = (strength_patch, patches[key], strength_model, None, None)
            self.patches.setdefault(key, []).append(entry)
        return taken

    def load(self):
        """Puts the patches into the weights: summed in fp32, rounded to the dtype of the weights."""
        for key, patches in self.patches.items():
            parameter = self._weights()[key]
            self.backup[key] = Backup(parameter.detach().clone())
            self._set(key, apply(patches, parameter.detach().to(torch.float32, copy=True), key).to(parameter.dtype))

    def unload(self):
        for key in list(self.backup):
            self._set(key, self.backup.pop(key).weight)

    def offloaded(self, dtype=None):
        """What each weight computes with where it stays in host memory: a copy, patched in the dtype of the compute."""
        return {
            key: apply(self.patches.get(key, []), weight.detach().to(dtype or weight.dtype, copy=True), key)
            for key, weight in self._weights().items()
        }

    def prefetched(self):
        """The same where patches were copied to the device ahead of use: each adapter is built anew from its parts."""
        return {
            key: apply([(p[0], copied(p[1]), *p[2:]) for p in self.patches.get(key, [])], weight.detach().clone(), key)
            for key, weight in self._weights().items()
        }

    def _weights(self):
        return dict(self.model.named_parameters())

    def _set(self, key, value):
        owner, _, name = key.rpartition(".")
        setattr(self.model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


def copied(value):
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, copied(value.weights))
    if isinstance(value, tuple):
        return tuple(copied(part) for part in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def apply(patches, weight, key):
    """One patch after the other: an adapter changes the weight, a tensor is added."""
    for strength, patch, strength_model, offset, function in patches:
        if isinstance(patch, WeightAdapterBase):
            weight = patch.calculate_weight(
                weight, key, strength, strength_model, offset, function, torch.float32, None
            )
        else:
            weight += strength * patch.to(weight.dtype)
    return weight


def install(monkeypatch, models: Path):
    """Makes `comfy` and `folder_paths` importable, with a folder of models; returns folder_paths."""
    comfy, adapters, paths = (ModuleType(name) for name in ("comfy", "comfy.weight_adapter", "folder_paths"))
    adapters.WeightAdapterBase, comfy.weight_adapter = WeightAdapterBase, adapters
    paths.models_dir, paths.folder_names_and_paths = str(models), {}

    def add_model_folder_path(name, folder):
        paths.folder_names_and_paths.setdefault(name, ([], set()))[0].append(folder)

    def get_filename_list(name):
        folders, endings = paths.folder_names_and_paths[name]
        files = [(Path(folder), path) for folder in folders for path in Path(folder).rglob("*")]
        return sorted(path.relative_to(folder).as_posix() for folder, path in files if path.suffix in endings)

    def get_full_path(name, file):
        found = [Path(folder) / file for folder in paths.folder_names_and_paths[name][0]]
        return next((str(path) for path in found if path.is_file()), None)

    paths.add_model_folder_path, paths.get_filename_list = add_model_folder_path, get_filename_list
    paths.get_full_path = get_full_path
    for module in (comfy, adapters, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return paths
