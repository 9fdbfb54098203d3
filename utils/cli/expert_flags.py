"""The flags of wan_train_network.py that train both experts of a model in one run."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from utils.cli.command import number
from utils.files import existing_file
from utils.run.config import ExpertsConfig
from utils.run.experts import HIGH, LOW, expert_name
from utils.run.save_schedule import SaveConfig
from utils.run.state import state_folders
from wan.configs import TASKS
from wan.errors import InputError
from wan.values import COUNT, Number

_TIMESTEP = Number(0, 1000)
SWITCH_EVERY = 100  # steps: a switch then copies at most 1 % of what the swapped blocks of a turn's steps are copied


def add_expert_flags(parser) -> None:
    """Adds the flags, in a group of their own."""
    add = parser.add_argument_group("both experts in one run").add_argument
    add(
        "--dit_high_noise",
        type=Path,
        metavar="FILE",
        help="the high-noise expert, to train the same slice of it too; --dit is the low-noise one then, and each "
        "writes its own files, NAME-high_noise... and NAME-low_noise... (default: train --dit alone)",
    )
    add(
        "--timestep_boundary",
        type=number(_TIMESTEP),
        metavar="T",
        help="timestep where the experts change over, from 0 to 1 or from 0 to 1000 (default: the task's: "
        + ", ".join(f"{task.boundary:g} for {name}" for name, task in TASKS.items() if task.boundary)
        + ")",
    )
    add(
        "--switch_expert_every",
        type=number(COUNT),
        metavar="N",
        help=f"optimizer steps after which the experts change places on the device (default: {SWITCH_EVERY})",
    )
    add(
        "--offload_inactive_dit",
        action="store_true",
        help="accepted for compatibility: only one expert is on the device at a time",
    )


def read_experts(flags: Namespace) -> ExpertsConfig | None:
    """Both experts, if the run trains both; InputError where the flags do not go together."""
    if flags.dit_high_noise is None:
        _refuse_for_one(flags)
        return None
    if (flags.min_timestep, flags.max_timestep) != (0, 1000):
        raise InputError(
            "--min_timestep and --max_timestep are for runs of one expert: with --dit_high_noise leave them out; "
            "--timestep_boundary says where the experts meet"
        )
    return ExpertsConfig(
        dit_high_noise=existing_file(flags.dit_high_noise, "--dit_high_noise"),
        boundary=_boundary(flags),
        switch_every=flags.switch_expert_every or SWITCH_EVERY,
        resume=tuple(flags.resume or ()),
        preserve_answers=tuple(existing_file(path, "--preserve_answers") for path in flags.preserve_answers or ()),
    )


def _refuse_for_one(flags: Namespace) -> None:
    for name in ("timestep_boundary", "switch_expert_every"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for two experts: give --dit_high_noise too, or leave it out")
    for name in ("resume", "preserve_answers"):
        if len(given := getattr(flags, name) or ()) > 1:
            raise InputError(
                f"--{name} {' '.join(map(str, given))}: a run of one model takes one; two are for --dit_high_noise"
            )


def _boundary(flags: Namespace) -> float:
    """As a timestep."""
    given, task = flags.timestep_boundary, TASKS[flags.task]
    if given is None and task.boundary is None:
        two = [name for name, other in TASKS.items() if other.boundary]
        raise InputError(
            f"--dit_high_noise with --task {task.name} needs --timestep_boundary (models with two experts are --task "
            f"{' and '.join(two)})"
        )
    boundary = 1000 * task.boundary if given is None else given if given > 1 else 1000 * given
    if not 0 < boundary < 1000:
        raise InputError(
            f"--timestep_boundary {given:g} leaves one expert without timesteps: give one between 0 and 1000"
        )
    return float(boundary)


def names_of(flags: Namespace) -> list[str]:
    """The names of a run's own files: --output_name, or those of its experts."""
    if flags.dit_high_noise is None:
        return [flags.output_name]
    return [expert_name(flags.output_name, expert) for expert in (HIGH, LOW)]


def has_states(flags: Namespace, save: SaveConfig) -> bool:
    """Whether --resume latest may find something."""
    return any(state_folders(replace(save, name=name)) for name in names_of(flags))
