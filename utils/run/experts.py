"""What each of two experts is asked for where both are trained: a run of its own, on its side of the boundary.

The high-noise expert denoises from timestep 1000 down to the boundary, the boundary included; the low-noise one the
rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from utils.preserve.answers_file import base_identity_of
from utils.preserve.old_prompts import PreserveConfig
from utils.run.config import ExpertsConfig, TrainConfig
from utils.run.save_schedule import STATE
from utils.run.state import LATEST, is_state, read_state
from utils.slice_saving import base_identity
from utils.slices.on_base import read_slice_file
from wan.errors import InputError
from wan.loading import read_checkpoint_header

HIGH, LOW = "high_noise", "low_noise"


def expert_configs(config: TrainConfig) -> list[TrainConfig]:
    """The configs of both experts, the high-noise one's first; of any other run its own."""
    if (two := config.experts) is None:
        return [config]
    files, boundary = {HIGH: two.dit_high_noise, LOW: config.dit}, two.boundary
    if files[HIGH].exists() and files[LOW].exists() and files[HIGH].samefile(files[LOW]):
        raise InputError(f"--dit and --dit_high_noise are the same file, {config.dit}: give the two experts of a model")
    names = {expert: expert_name(config.save.name, expert) for expert in files}
    slices, answers = _by_expert(config, files, two)
    states = _states(config, two, names)
    return [
        replace(
            config,
            dit=file,
            experts=None,
            expert=expert,
            samples=None,  # are drawn with both
            save=replace(config.save, name=names[expert]),
            timesteps=replace(
                config.timesteps,
                min_timestep=boundary if expert == HIGH else 0.0,
                max_timestep=boundary if expert == LOW else 1000.0,
                preserve_shape=True,
            ),
            slices=slices[expert],
            preserve=_preserve(config, answers[expert], expert),
            resume=states[expert],
            inputs=(*config.inputs, *files.values(), *two.preserve_answers, *filter(None, states.values())),
        )
        for expert, file in files.items()
    ]


def expert_name(name: str, expert: str) -> str:
    """The --output_name of one expert's files."""
    return f"{name}-{expert}"


def _by_expert(
    config: TrainConfig, files: Mapping[str, Path], two: ExpertsConfig
) -> tuple[dict[str, tuple[Path, ...]], dict[str, Path | None]]:
    """The slices, and the file of reference predictions, of each expert: those that were made on its base."""
    slices: dict[str, tuple[Path, ...]] = dict.fromkeys(files, ())
    answers: dict[str, Path | None] = dict.fromkeys(files)
    if not (config.slices or two.preserve_answers):
        return slices, answers
    bases = {expert: base_identity(read_checkpoint_header(file).files) for expert, file in files.items()}
    for path in config.slices:
        base = read_slice_file(path).entry.base
        # One that fits neither goes to --dit, where the check that follows refuses it with the reason.
        for expert in [own for own in files if bases[own] == base] or [LOW]:
            slices[expert] += (path,)
    for path in two.preserve_answers:
        base = base_identity_of(path)
        expert = next((own for own in files if bases[own] == base and answers[own] is None), LOW)
        if answers[expert] is not None:
            raise InputError(
                f"--preserve_answers {answers[expert]} {path}: give one file of each expert, as runs of both write them"
            )
        answers[expert] = path
    return slices, answers


def _preserve(config: TrainConfig, answers: Path | None, expert: str) -> PreserveConfig | None:
    if config.preserve is None:
        return None
    if answers is None and not (config.preserve.prompts or config.preserve.from_ledger):
        raise InputError(
            f"--preserve_answers has no file of the {expert} expert: give one of each, or --preserve_prompts too"
        )
    return replace(config.preserve, answers=answers)


def _states(config: TrainConfig, two: ExpertsConfig, names: Mapping[str, str]) -> dict[str, Path | None]:
    """The state that each expert continues from."""
    match two.resume:
        case ():
            return dict.fromkeys(names)
        case (path,) if path == LATEST:
            return dict.fromkeys(names, LATEST)
        case (path,):
            return _pair(path, config.save.name, names)
        case paths:
            return _sorted_states(paths, two.boundary)


def _pair(path: Path, name: str, names: Mapping[str, str]) -> dict[str, Path | None]:
    """The states that one name stands for: NAME-000010-state for NAME-high_noise-000010-state and the other one."""
    rest = path.name.removeprefix(name)
    pair = {expert: path.with_name(f"{own}{rest}") for expert, own in names.items()}
    if is_state(path) or not all(map(is_state, pair.values())):
        raise InputError(
            f"--resume {path}: with two experts give both of their states, or {name}-...{STATE} for "
            f"{names[HIGH]}-...{STATE} and {names[LOW]}-...{STATE}, or latest"
        )
    return pair


def _sorted_states(paths: Sequence[Path], boundary: float) -> dict[str, Path | None]:
    """Two states by the timesteps that they trained on."""
    found: dict[str, Path | None] = {}
    for path in paths:
        lowest = read_state(path).settings.get("min_timestep")
        found[HIGH if lowest == str(boundary) else LOW] = path
    if len(paths) != 2 or found.keys() != {HIGH, LOW}:
        raise InputError(f"--resume {' '.join(map(str, paths))}: give one state of each expert")
    return found
