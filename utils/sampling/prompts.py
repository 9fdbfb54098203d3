"""Prompt files: one sample a line (or table) with its size, frames, seed and settings."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from utils.files import existing_file, read_toml
from wan.configs import WAN_2_1_VAE
from wan.errors import InputError

PIXEL_MULTIPLE = WAN_2_1_VAE.pixel_multiple


@dataclass(frozen=True)
class SamplePrompt:
    """One sample to make; None leaves a value to the task, and the seed to the run."""

    prompt: str
    negative_prompt: str | None = None
    width: int = 256
    height: int = 256
    frames: int = 1
    seed: int | None = None
    steps: int = 20
    guidance_scale: float | None = None
    flow_shift: float | None = None


# What an option is called: in a line of text, in a table, and in SamplePrompt.
_OPTIONS = (
    ("w", "width", "width", int),
    ("h", "height", "height", int),
    ("f", "frame_count", "frames", int),
    ("d", "seed", "seed", int),
    ("s", "sample_steps", "steps", int),
    ("g", "guidance_scale", "guidance_scale", float),
    ("l", "cfg_scale", "guidance_scale", float),
    ("fs", "discrete_flow_shift", "flow_shift", float),
    ("n", "negative_prompt", "negative_prompt", str),
)
_BY_LETTER = {letter: (field, kind) for letter, _, field, kind in _OPTIONS}
_BY_KEY = {key: (field, kind) for _, key, field, kind in _OPTIONS} | {"prompt": ("prompt", str)}
_PICTURE_INPUTS = (
    *("i", "ei", "cn", "ci", "cim", "of"),
    *("image_path", "end_image_path", "control_video_path"),
    *("control_image_path", "control_image_mask_path", "one_frame"),
)


def read_prompt_file(path: Path, defaults: SamplePrompt | None = None) -> list[SamplePrompt]:
    """The samples of a .txt (one a line, # comments), .toml ([prompt] with [[prompt.subset]]) or .json (a list) file.

    What a sample leaves out comes from `defaults`. InputError names the file and the line or entry that is wrong.
    """
    defaults = SamplePrompt("") if defaults is None else defaults
    readers = {".txt": _read_text, ".toml": _read_tables, ".json": _read_list}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"prompt file {path} must end in .txt, .toml or .json")
    prompts = readers[suffix](existing_file(path, "prompt file"), defaults)
    if not prompts:
        raise InputError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def parse_prompt_line(line: str, defaults: SamplePrompt, where: str) -> SamplePrompt:
    """`a text --w 512 --h 512 --d 1` as a SamplePrompt; `where` begins the message of an InputError."""
    text, *options = re.split(r"\s+--(?=[A-Za-z])", line.strip())
    if not text or re.match(r"--[A-Za-z]", text):
        raise InputError(f"{where}: no prompt before the options")
    values = {}
    for option in options:
        letter, _, value = option.replace("\t", " ").partition(" ")
        _add(values, "--" + letter, value.strip(), _target("--" + letter, _BY_LETTER, where), where)
    return check_prompt(replace(defaults, prompt=text, **values), where)


def check_prompt(prompt: SamplePrompt, where: str) -> SamplePrompt:
    """`prompt` with its frames floored to 4n + 1; InputError on sizes and settings that no sample can have."""
    for name, pixels in (("width", prompt.width), ("height", prompt.height)):
        if pixels < PIXEL_MULTIPLE or pixels % PIXEL_MULTIPLE:
            lower = max(pixels // PIXEL_MULTIPLE, 1) * PIXEL_MULTIPLE
            raise InputError(
                f"{where}: {name} {pixels} is not a multiple of {PIXEL_MULTIPLE}; "
                f"{lower} or {lower + PIXEL_MULTIPLE} would be"
            )
    _in_range(where, "frames", prompt.frames, 1, 10_000)
    _in_range(where, "steps", prompt.steps, 1, 1000)
    if prompt.seed is not None:
        _in_range(where, "seed", prompt.seed, 0, 2**63 - 1)
    if prompt.flow_shift is not None and not 0 < prompt.flow_shift < math.inf:
        raise InputError(f"{where}: flow shift {prompt.flow_shift} must be greater than 0")
    if prompt.guidance_scale is not None and not math.isfinite(prompt.guidance_scale):
        raise InputError(f"{where}: guidance scale {prompt.guidance_scale} must be a finite number")
    return replace(prompt, frames=WAN_2_1_VAE.whole_frames(prompt.frames))


def _in_range(where: str, name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise InputError(f"{where}: {name} {value} must be from {lowest} to {highest}")


def _target(shown: str, known: Mapping[str, tuple[str, type]], where: str) -> tuple[str, type]:
    name = shown.removeprefix("--").lower()
    if name in _PICTURE_INPUTS:
        raise InputError(f"{where}: {shown} starts from pictures or videos; only text-to-video is supported")
    if name not in known:
        raise InputError(f"{where}: unknown option {shown}; allowed: {', '.join(known)}")
    return known[name]


def _add(values: dict, name: str, value: object, target: tuple[str, type], where: str) -> None:
    field, kind = target
    converted = _convert(value, kind, name, where)
    if field == "guidance_scale" and field in values and values[field] != converted:
        raise InputError(f"{where}: {name} {converted} against {values[field]}: both set the guidance scale, keep one")
    values[field] = converted


def _convert(value: object, kind: type, name: str, where: str):
    expected = {int: "a whole number", float: "a number", str: "text"}[kind]
    allowed = {int: (int, str), float: (int, float, str), str: (str,)}[kind]
    wrong = InputError(f"{where}: {name} needs {expected}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise wrong
    try:
        return kind(value)
    except ValueError:
        raise wrong from None


def _read_text(path: Path, defaults: SamplePrompt) -> list[SamplePrompt]:
    lines = _decode(path).splitlines()
    return [
        parse_prompt_line(line, defaults, f"{path} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_tables(path: Path, defaults: SamplePrompt) -> list[SamplePrompt]:
    content = read_toml(path)
    common = content.get("prompt")
    if set(content) != {"prompt"} or not isinstance(common, dict):
        raise InputError(f"{path} must hold one table [prompt] (with [[prompt.subset]] for more than one sample)")
    shared = {key: value for key, value in common.items() if key != "subset"}
    subsets = common.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise InputError(f"{path}: subset must be tables, [[prompt.subset]]")
    return _read_entries(path, [shared | subset for subset in subsets], defaults)


def _read_list(path: Path, defaults: SamplePrompt) -> list[SamplePrompt]:
    try:
        content = json.loads(_decode(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid json: {error}") from None
    if not isinstance(content, list):
        raise InputError(f"{path} must hold a list of prompts (strings or objects)")
    return _read_entries(path, content, defaults)


def _read_entries(path: Path, entries: list, defaults: SamplePrompt) -> list[SamplePrompt]:
    return [_parse_entry(entry, defaults, f"{path} entry {number}") for number, entry in enumerate(entries, 1)]


def _parse_entry(entry: Mapping | str, defaults: SamplePrompt, where: str) -> SamplePrompt:
    if isinstance(entry, str):
        return parse_prompt_line(entry, defaults, where)
    if not isinstance(entry, Mapping) or not entry.get("prompt"):
        raise InputError(f"{where}: no prompt")
    values = {}
    for key, value in entry.items():
        _add(values, key, value, _target(key, _BY_KEY, where), where)
    return check_prompt(replace(defaults, **values), where)


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Windows editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
