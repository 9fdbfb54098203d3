"""The two nodes: Load Wan Slice, Wan Slice Info."""

import logging
import os
from contextlib import suppress

import folder_paths

from .on_model import with_slice
from .slice_file import describe, read_slice_file

FOLDER = "slices"
_CATEGORY = "Wan slices"


def _register_folder() -> None:
    """models/slices, beside those that extra_model_paths.yaml names."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    with suppress(OSError):  # models that cannot be written; extra_model_paths.yaml may name another folder
        os.makedirs(own, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, own)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


_register_folder()


def _file_input() -> tuple:
    return (folder_paths.get_filename_list(FOLDER), {"tooltip": "A slice file from models/slices."})


def _version(slice_name: str) -> str:
    """Changes when the file does, so that a slice that was trained further is read again."""
    path = folder_paths.get_full_path(FOLDER, slice_name)
    if path is None:
        return "missing"
    stat = os.stat(path)
    return f"{stat.st_mtime_ns} {stat.st_size}"


class LoadWanSlice:
    """Puts a slice file on top of a Wan model; several of them in any order, LoRAs before or after them."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Puts a concept's slice file on top of the Wan model that it was trained on. Chain one node for each."
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the slice.", "What was loaded, and whether the model is its base.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, "round": 0.001}
        strength["tooltip"] = "1 is as trained, bit for bit; 0 has no effect."
        model = {"tooltip": "The Wan model that the slice was trained on; of two experts, the right one."}
        return {
            "required": {"model": ("MODEL", model), "slice_name": _file_input(), "strength": ("FLOAT", strength)},
        }

    @classmethod
    def IS_CHANGED(cls, slice_name, **_):
        return _version(slice_name)

    def load(self, model, slice_name, strength):
        file = read_slice_file(folder_paths.get_full_path(FOLDER, slice_name), slice_name)
        patched, report = with_slice(model, file, strength)
        logging.info(report)
        return patched, report


class WanSliceInfo:
    """What a slice file holds, as text."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Concept, ff, ffid, steps, base and captions of a slice file, as text for a preview node."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("info",)
    FUNCTION = "info"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"slice_name": _file_input()}}

    @classmethod
    def IS_CHANGED(cls, slice_name, **_):
        return _version(slice_name)

    def info(self, slice_name):
        return (describe(read_slice_file(folder_paths.get_full_path(FOLDER, slice_name), slice_name)),)


NODE_CLASS_MAPPINGS = {"LoadWanSlice": LoadWanSlice, "WanSliceInfo": WanSliceInfo}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadWanSlice": "Load Wan Slice", "WanSliceInfo": "Wan Slice Info"}
