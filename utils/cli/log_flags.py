"""What the flags of wan_train_network.py say about logs and trackers."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence

from utils.run.config import LogConfig
from utils.text_files import read_toml
from wan.errors import InputError
from wan.values import shown


def read_log(flags: Namespace) -> LogConfig:
    """Where a run logs; InputError where a flag would have no effect."""
    with_folder = "tensorboard" if flags.logging_dir else None
    trackers = {None: (), "all": ("tensorboard", "wandb")}.get(name := flags.log_with or with_folder, (name,))
    if "tensorboard" in trackers and flags.logging_dir is None:
        raise InputError(f"--log_with {flags.log_with} needs --logging_dir")
    for flag in ("log_prefix", "log_tracker_config", "log_config", "wandb_run_name"):
        needed = "wandb" if flag == "wandb_run_name" else "tensorboard or wandb"
        if getattr(flags, flag) and not any(tracker in needed for tracker in trackers):
            raise InputError(f"--{flag} has no effect without logging: give --logging_dir, and --log_with {needed}")
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"logging with {tracker} needs its package: pip install {tracker}")
    return LogConfig(
        folder=flags.logging_dir,
        trackers=trackers,
        prefix=flags.log_prefix,
        tracker_name=flags.log_tracker_name,
        tracker_settings=_tracker_settings(flags, trackers),
        with_settings=flags.log_config,
    )


def _tracker_settings(flags: Namespace, trackers: Sequence[str]) -> dict[str, dict]:
    settings = read_toml(flags.log_tracker_config) if flags.log_tracker_config else {}
    for name, value in settings.items():
        if name not in trackers or not isinstance(value, dict):
            raise InputError(
                f"{flags.log_tracker_config}: {shown(name)} is not a table of a tracker in use ({', '.join(trackers)})"
            )
    if flags.wandb_run_name:
        settings["wandb"] = {"name": flags.wandb_run_name} | settings.get("wandb", {})
    return settings
