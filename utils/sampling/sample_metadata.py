"""What a sample was made of, as text for pictures and videos: for people, for other programs, and as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path

from utils.sampling.denoising import Sample

PARAMETERS, SETTINGS = "parameters", "wan_sample"  # the names of a PNG's two text chunks
_SAMPLERS = {"unipc": "UniPC", "dpm++": "DPM++ 2M", "vanilla": "Euler"}
# In the text that web UIs read, in its order: their name and ours. The prompts come before it.
_SHOWN = (
    ("Steps", "steps"),
    ("Sampler", "solver"),
    ("CFG scale", "guidance_scale"),
    ("CFG scale of high noise", "guidance_scale_high_noise"),
    ("Seed", "seed"),
    ("Size", "size"),
    ("Frames", "frames"),
    ("Flow shift", "flow_shift"),
    ("First frame", "image_path"),
    ("Last frame", "end_image_path"),
    ("Model", "model"),
    ("High noise model", "model_high_noise"),
    ("Slices", "slices"),
    ("LoRAs", "loras"),
    ("High noise LoRAs", "loras_high_noise"),
    ("Base model", "base_model"),
    ("Trained steps", "trained_steps"),
)
# Keys of a latent file, ours and musubi-tuner's.
_OF_LATENT = {"seeds": "seed", "video_length": "frames", "infer_steps": "steps"}
_PICTURES = ("image_path", "end_image_path")
_KEPT_OF_LATENT = ("prompt", "negative_prompt", "width", "height", "guidance_scale", *_PICTURES)


def sample_settings(sample: Sample, **more: object) -> dict[str, object]:
    """Everything that decides the sample; `more` says with which weights (model, trained_steps, slices)."""
    own = {name: value for name, value in vars(sample).items() if name != "latent_shape" and name not in _PICTURES}
    return own | picture_names(sample) | {name: value for name, value in more.items() if value not in (None, [], "")}


def picture_names(sample: Sample) -> dict[str, str]:
    """The names of the files that the sample starts from, without their folders, which are nobody's business."""
    paths = {name: getattr(sample, name) for name in _PICTURES}
    return {name: Path(path).name for name, path in paths.items() if path is not None}


def settings_of_latent(metadata: Mapping[str, str]) -> dict[str, object]:
    """What a latent file's metadata says of its sample; empty if it says nothing of the prompt."""
    if "prompt" not in metadata:
        return {}
    known = _OF_LATENT | {name: name for name in _KEPT_OF_LATENT}
    return {name: metadata[key] for key, name in known.items() if key in metadata}


def text_chunks(settings: Mapping[str, object]) -> dict[str, str]:
    """The chunks of a PNG: one that web UIs for diffusion models show, one that a program can read back."""
    if not settings:
        return {}
    return {PARAMETERS: parameters_text(settings), SETTINGS: json.dumps(dict(settings), ensure_ascii=False)}


def parameters_text(settings: Mapping[str, object]) -> str:
    """Prompt, negative prompt, then `Steps: 20, Sampler: UniPC, ...`, which AUTOMATIC1111's web UI began."""
    values = dict(settings)
    values["size"] = f"{values['width']}x{values['height']}" if {"width", "height"} <= values.keys() else None
    values["solver"] = _SAMPLERS.get(values.get("solver"))
    listed = [f"{label}: {_quoted(values[name])}" for label, name in _SHOWN if values.get(name) is not None]
    negative = values.get("negative_prompt")
    lines = [str(values["prompt"]), f"Negative prompt: {negative}" if negative else "", ", ".join(listed)]
    return "\n".join(filter(None, lines))


def _quoted(value: object) -> str:
    """As JSON where a plain value would be cut at a comma, a colon or a line's end."""
    text = f"{value:g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
