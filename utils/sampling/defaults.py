"""Sampling settings that a checkpoint suggests in its metadata, for prompts that leave them open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from utils.sampling.prompts import SAMPLE_STEPS, SamplePrompt
from wan.errors import InputError
from wan.values import GUIDANCE, SHIFT

# Key in the metadata of a safetensors file -> field of SamplePrompt, what its text becomes.
KEYS: dict[str, tuple[str, Callable[[str], int | float | str]]] = {
    "sample_steps": ("steps", SAMPLE_STEPS),
    "sample_guidance_scale": ("guidance_scale", GUIDANCE),
    "sample_flow_shift": ("flow_shift", SHIFT),
    "sample_negative_prompt": ("negative_prompt", str),
}


@dataclass(frozen=True)
class SampleDefaults:
    """What stands in for settings that a prompt leaves open; None leaves them to the task."""

    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    negative_prompt: str | None = None

    def fill(self, prompt: SamplePrompt) -> SamplePrompt:
        """`prompt` with these settings where it has none of its own."""
        return replace(prompt, **{name: value for name, value in self._given() if getattr(prompt, name) is None})

    def lines(self, source: Path) -> list[str]:
        """One line that says what the file suggests, if it suggests anything."""
        shown = [f"{name.replace('_', ' ')} {value!r}" for name, value in self._given()]
        return [f"{source}: its metadata suggests for samples {', '.join(shown)}"] if shown else []

    def _given(self) -> list[tuple[str, object]]:
        return [(name, value) for name, value in vars(self).items() if value is not None]


NO_DEFAULTS = SampleDefaults()


def read_sample_defaults(metadata: Mapping[str, str], source: Path) -> SampleDefaults:
    """The settings in a checkpoint's metadata; InputError names `source` and the key if one cannot be used."""
    given = {key: text for key, text in metadata.items() if key in KEYS}
    return SampleDefaults(**{KEYS[key][0]: _read(text, key, source) for key, text in given.items()})


def _read(text: str, key: str, source: Path) -> int | float | str:
    _, read = KEYS[key]
    try:
        return read(text)
    except ValueError as error:
        raise InputError(f"{source}: {key} in its metadata {error}") from None
