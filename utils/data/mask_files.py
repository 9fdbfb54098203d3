"""The file of each picture's mask: of the same name, in the folder of masks."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from utils.data.folders import FROM_HERE
from utils.files import file_problem, folder_entries
from utils.pixels.media import IMAGE_SUFFIXES, is_hidden
from wan.errors import InputError


def find_masks(folder: Path, stems: Sequence[str]) -> tuple[list[Path | None], list[Path]]:
    """The mask of each stem, which may begin with a subfolder, None where there is none; and those of no stem.

    InputError if the folder cannot be listed, holds two masks of one name, or none at all of these.
    """
    folder_entries(folder, "mask_directory", FROM_HERE)
    by_folder = {below: _masks(folder / below) for below in {PurePosixPath(stem).parent for stem in stems}}
    found = [by_folder[PurePosixPath(stem).parent].get(PurePosixPath(stem).name.casefold()) for stem in stems]
    if not any(found):
        raise InputError(
            f"mask_directory {folder} holds no mask for any of {len(stems)} files: a mask has the name of its picture "
            f"or video, such as {stems[0]}.png"
        )
    others = {path for masks in by_folder.values() for path in masks.values()} - set(found)
    return found, sorted(others)


def _masks(folder: Path) -> dict[str, Path]:
    masks: dict[str, Path] = {}
    if file_problem(folder, or_folder=True) is not None:
        return masks
    for path in folder_entries(folder, "mask_directory"):
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path) and file_problem(path) is None:
            other = masks.setdefault(path.stem.casefold(), path)
            if other != path:
                raise InputError(f"{other} and {path} are masks of the same name: keep one of them")
    return masks
