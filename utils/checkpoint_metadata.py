"""The safetensors metadata of a checkpoint: how it was trained (ss_*), what it is (modelspec.*)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone


@dataclass(frozen=True)
class MetadataConfig:
    """What the user says about the model; None leaves a line out or to its default."""

    settings: bool = True  # False: without the ss_* lines
    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    resolution: str | None = None
    architecture: str | None = None
    comment: str | None = None


def checkpoint_metadata(
    config: MetadataConfig, name: str, settings: Mapping[str, object], timestep_range: str
) -> dict[str, str]:
    """All lines as text; `settings` are the run's, their names without ss_."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": config.architecture or "wan2.1",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": config.title or name,
        "modelspec.date": now,
        "modelspec.resolution": config.resolution or "1280x720",
        "modelspec.timestep_range": timestep_range,
        "modelspec.author": config.author,
        "modelspec.description": config.description,
        "modelspec.license": config.license,
        "modelspec.tags": config.tags,
        "ss_base_model_version": "wan",
    }
    if config.settings:
        values |= {f"ss_{key}": value for key, value in settings.items()}
        values |= {"ss_output_name": name, "ss_training_comment": config.comment, "ss_training_finished_at": now}
    return {key: str(value) for key, value in values.items() if value is not None}
