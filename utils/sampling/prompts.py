"""Prompt files: one sample per line (or table) with its size, frames, seed and settings."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from utils.files import existing_file
from utils.sampling.picture_rules import LARGEST_SIDE, check_pictures, sample_size
from utils.text_files import read_json, read_text, read_toml, text_lines
from wan.configs import WAN_2_1_VAE, WanTask
from wan.errors import InputError
from wan.values import GUIDANCE, SEED, SHIFT, Number, nearest, shown

FRAMES = Number(1, 10_000, whole=True)
SAMPLE_STEPS = Number(1, 1000, whole=True)
_RANGES = {"frames": FRAMES, "steps": SAMPLE_STEPS, "seed": SEED, "flow_shift": SHIFT, "guidance_scale": GUIDANCE}


@dataclass(frozen=True)
class SamplePrompt:
    """One sample to generate; None leaves a value to the checkpoint or the task, and the seed to the run.

    A size that is left out follows from the picture; without one it is 256x256.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    image_path: Path | None = None  # the first frame
    end_image_path: Path | None = None  # the last one


# The name of an option in a line of text, in a table, and in SamplePrompt.
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
    ("i", "image_path", "image_path", Path),
    ("ei", "end_image_path", "end_image_path", Path),
)
IN_LINES, IN_TABLES = ("--i", "--ei"), ("image_path", "end_image_path")
_BY_LETTER = {letter: (field, kind) for letter, _, field, kind in _OPTIONS}
_BY_KEY = {key: (field, kind) for _, key, field, kind in _OPTIONS} | {"prompt": ("prompt", str)}
# Text that was copied from a web page holds spaces of other kinds, some of which have no width.
_SPACE = r"[\s\u200b\u2060\ufeff]+"
_BEFORE_OPTION = re.compile(_SPACE + r"--(?=[A-Za-z])")
# What word processors make of two hyphens; before an option's letter and a value it was one.
_OPTION = (  # its letter, where a value follows
    r"([whfdslg](?=\s+[-+.\d])|fs(?=\s+[+.\d])|n(?=\s)|e?i(?=\s+\S+\.(?:png|jpe?g|webp|bmp|avif|tiff?)\b))"
)
_AFTER_SPACE = r"(?:(?<=\s)|(?<=[\u200b\u2060\ufeff]))"
_DASHES = r"\u2010-\u2015\u2212\ufe63\uff0d"
_LONG_DASH = re.compile(rf"{_AFTER_SPACE}-?([{_DASHES}\ufe58])[-{_DASHES}]?{_OPTION}", re.I)
_ONE_HYPHEN = re.compile(rf"{_AFTER_SPACE}-{_OPTION}", re.I)
_CONTROL = "is for models with control videos, which are not supported; leave it out"
_ONE_FRAME = "is for one-frame inference, which is not supported; a picture as the first frame is "
_UNSUPPORTED = {
    **dict.fromkeys(("cn", "control_video_path"), _CONTROL),
    **dict.fromkeys(("ci", "cim", "of"), _ONE_FRAME + IN_LINES[0]),
    **dict.fromkeys(("control_image_path", "control_image_mask_path", "one_frame"), _ONE_FRAME + IN_TABLES[0]),
}


def read_prompt_file(
    path: Path, defaults: SamplePrompt | None = None, task: WanTask | None = None
) -> list[SamplePrompt]:
    """The samples of a .txt (one a line, # comments), .toml ([prompt] with [[prompt.subset]]) or .json (a list) file.

    What a sample leaves out comes from `defaults`. InputError names the file and the wrong line or entry; with a
    `task`, also a size or pictures that it does not take.
    """
    defaults = SamplePrompt("") if defaults is None else defaults
    readers = {".txt": _read_text, ".toml": _read_tables, ".json": _read_list}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"prompt file {path}: its name must end in .txt, .toml or .json")
    prompts = readers[suffix](existing_file(path, "prompt file"), defaults, task)
    if not prompts:
        raise InputError(f"prompt file {path} contains no prompt: write one per line")
    return prompts


def parse_prompt_line(line: str, defaults: SamplePrompt, where: str, task: WanTask | None = None) -> SamplePrompt:
    """`a text --w 512 --h 512 --d 1` as a SamplePrompt; `where` begins the message of an InputError."""
    text, *options = _BEFORE_OPTION.split(line.strip())
    if not text or re.match(r"--[A-Za-z]", text):
        raise InputError(f"{where}: there is no prompt before the options")
    if found := _LONG_DASH.search(line):
        name = unicodedata.name(found[1])
        raise InputError(f"{where}: {found[0].strip()} begins with {name}, where two hyphens belong: --{found[2]}")
    if found := _ONE_HYPHEN.search(line):
        raise InputError(f"{where}: {found[0]} begins with one hyphen, where two belong: --{found[1]}")
    values = {}
    for option in options:
        letter, *rest = re.split(_SPACE, option, maxsplit=1)
        value = "".join(rest)
        _add(values, "--" + letter, value.strip(), _target("--" + letter, _BY_LETTER, where), where)
    return check_prompt(replace(defaults, prompt=text, **values), where, task)


def check_prompt(
    prompt: SamplePrompt,
    where: str,
    task: WanTask | None = None,
    options: tuple[str, str] = IN_LINES,
    complete: bool = True,
) -> SamplePrompt:
    """`prompt` with its frames rounded down to 4n + 1; InputError for a size or setting that is out of range.

    With a `task`, its pictures have to be what the task takes; `options` give them. Only defaults are not `complete`.
    """
    layout = WAN_2_1_VAE if task is None else task.latents
    for name, pixels in (("width", prompt.width), ("height", prompt.height)):
        if pixels is not None:
            _check_side(pixels, layout.pixel_multiple, f"{where}: {name}")
    for text in (prompt.prompt, prompt.negative_prompt or ""):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{where}: {shown(ascii(text))} is not valid UTF-8")
    for name, allowed in _RANGES.items():
        value = getattr(prompt, name)
        if value is not None:
            _check_number(value, allowed, name.replace("_", " "), where)
    prompt = replace(prompt, frames=layout.whole_frames(prompt.frames))
    if task is not None:
        given = dict(zip(options, (prompt.image_path, prompt.end_image_path), strict=True))
        check_pictures(task, given, prompt.frames, where, complete)
        sample_size(task, prompt.width, prompt.height, prompt.image_path)
    return prompt


def _check_side(pixels: int, multiple: int, what: str) -> None:
    if multiple <= pixels <= LARGEST_SIDE and pixels % multiple == 0:
        return
    lower = pixels // multiple * multiple
    is_between = multiple <= pixels < LARGEST_SIDE
    use = f"such as {lower} or {lower + multiple}" if is_between else f"from {multiple} to {LARGEST_SIDE}"
    raise InputError(f"{what} {shown(pixels)} must be a multiple of {multiple}, {use}")


def _check_number(value: float, allowed: Number, name: str, where: str) -> None:
    try:
        allowed(value)
    except ValueError as error:
        raise InputError(f"{where}: {name} {error}") from None


def _target(option: str, known: Mapping[str, tuple[str, type]], where: str) -> tuple[str, type]:
    name = option.removeprefix("--").lower()
    if name in _UNSUPPORTED:
        raise InputError(f"{where}: {option} {_UNSUPPORTED[name]}")
    if name not in known:
        raise InputError(f"{where}: unknown option {shown(option)}{nearest(name, known)}; allowed: {', '.join(known)}")
    return known[name]


def _add(values: dict, name: str, value: object, target: tuple[str, type], where: str) -> None:
    field, kind = target
    converted = _convert(value, kind, name, where)
    if field == "guidance_scale" and field in values and values[field] != converted:
        raise InputError(
            f"{where}: {name} {converted} contradicts {values[field]}: both set the guidance scale, keep one of them"
        )
    values[field] = converted


def _convert(value: object, kind: type, name: str, where: str):
    expected = {int: "a whole number", float: "a number", str: "text", Path: "the path of a picture"}[kind]
    allowed = {int: (int, str), float: (int, float, str)}.get(kind, (str,))
    wrong = InputError(f"{where}: {name} must be {expected}, not {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, allowed) or (kind is Path and not value):
        raise wrong
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise wrong from None


def _read_text(path: Path, defaults: SamplePrompt, task: WanTask | None) -> list[SamplePrompt]:
    lines = text_lines(read_text(path, "prompt file"))
    return [
        parse_prompt_line(line, defaults, f"{path} line {number}", task)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_tables(path: Path, defaults: SamplePrompt, task: WanTask | None) -> list[SamplePrompt]:
    content = read_toml(path)
    common = content.get("prompt")
    if set(content) != {"prompt"} or not isinstance(common, dict):
        raise InputError(
            f"{path} must contain one table [prompt] (with a [[prompt.subset]] for each of several samples)"
        )
    shared = {key: value for key, value in common.items() if key != "subset"}
    subsets = common.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise InputError(f"{path}: subset must be a list of tables, [[prompt.subset]]")
    return _read_entries(path, [shared | subset for subset in subsets], defaults, task)


def _read_list(path: Path, defaults: SamplePrompt, task: WanTask | None) -> list[SamplePrompt]:
    content = read_json(path, "prompt file")
    if not isinstance(content, list):
        raise InputError(f"{path} must contain a list of prompts (strings or objects)")
    return _read_entries(path, content, defaults, task)


def _read_entries(path: Path, entries: list, defaults: SamplePrompt, task: WanTask | None) -> list[SamplePrompt]:
    numbered = enumerate(entries, 1)
    return [_parse_entry(entry, defaults, f"{path} entry {number}", task) for number, entry in numbered]


def _parse_entry(entry: Mapping | str, defaults: SamplePrompt, where: str, task: WanTask | None) -> SamplePrompt:
    if isinstance(entry, str):
        return parse_prompt_line(entry, defaults, where, task)
    if not isinstance(entry, Mapping) or not entry.get("prompt"):
        raise InputError(f"{where}: there is no prompt")
    values = {}
    for key, value in entry.items():
        target = _target(key, _BY_KEY, where)
        if value != "" or target[1] is str:  # graphical programs write numbers that are not set as empty texts
            _add(values, key, value, target, where)
    return check_prompt(replace(defaults, **values), where, task, IN_TABLES)
