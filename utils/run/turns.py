"""What a training run writes on its way: curves, saves, samples, and what a crash kept the run before from writing.

At each turn the state is written first; files that a crash or a full disk prevented are written on resume.
"""

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from utils.preserve.old_prompts import most_frequent
from utils.run.contact_sheet import CONTACT_SHEET, open_sheet
from utils.run.fingerprint import checkpoint_metadata
from utils.run.finite import check_state_is_finite
from utils.run.progress import StepBar, between_steps
from utils.run.run import Place, Run, state_of, values_digest
from utils.run.samples import PreparedSamples, SampleConfig, SavedSample, draw_samples, due_after_epoch, due_after_step
from utils.run.save_schedule import (
    Save,
    SaveConfig,
    best_file,
    remove_expired,
    save_after_epoch,
    save_after_step,
    stop_state,
)
from utils.run.state import save_state
from utils.run.tracker_media import show_sample, show_sheet
from utils.run.validation import validation_line
from utils.run.write import write_files
from utils.slices.ledger import VALUES_KEY
from wan.errors import InputError


def say_beside_bar(run: Run, *lines: str) -> None:
    """Says lines without breaking the progress bar."""
    with tqdm.external_write_mode():
        for line in lines:
            run.say(line)


def log_step(run: Run, place: Place, values: Mapping[str, float], bar: StepBar) -> None:
    """Logs the step that was done, and moves the bar."""
    device, times = run.accelerator.device, run.timer.finish_step()
    losses = {"loss/current": place.losses[-1], "loss/average": place.average_loss()}
    memory = {"memory/host_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        memory["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    log(run, place, {**losses, **values, **times, **memory})
    if run.debug:
        with _stops_without_room(run, place):
            lines = run.debug.after_step(place.step, run.accelerator.trackers)
        say_beside_bar(run, *lines)
    bar.show(run.config.expert, place.losses[-1], place.average_loss())


def log(run: Run, place: Place, values: Mapping[str, float]) -> None:
    """Tells the trackers of this step's values, of two experts under names of their own."""
    named = {f"{name}/{run.config.expert}" if run.config.expert else name: value for name, value in values.items()}
    with _stops_without_room(run, place):
        for tracker in run.accelerator.trackers:
            tracker.log(named, step=_step_in(tracker, run, place))


def _step_in(tracker: GeneralTracker, run: Run, place: Place) -> int:
    """wandb drops what comes at an earlier step than the last, so there the steps of two experts count together."""
    return place.step + (sum(other.step for other in run.others) if tracker.name == "wandb" else 0)


@between_steps
def save_turn(run: Run, place: Place, turn: Save) -> None:
    """Writes the turn's state, then its files, then deletes what it ends.

    The state first: it is small, and the more useful one if the disk fills up.
    """
    if turn.state:
        _save_state(run, place, turn.state)
    if run.accelerator.is_main_process:
        lines = _write(run, place, turn.files)
        if run.debug:
            lines += run.debug.after_save(turn.files.get("checkpoint"), place.step, run.accelerator.trackers)
        lines += remove_expired(turn)
        paths = [*map(str, turn.files.values()), *([turn.state.name] if turn.state else [])]
        say_beside_bar(run, *lines, f"saved {' and '.join(paths)}")
    run.accelerator.wait_for_everyone()


def _write(run: Run, place: Place, files: Mapping[str, Path]) -> list[str]:
    """Writes the slice as it is now as each kind of `files`; returns lines on what is not exact."""
    name, timesteps = run.config.save.name, run.config.timesteps
    progress = {"steps": place.step, "epoch": -(-place.step // run.plan.steps_per_epoch)}
    timestep_range = f"{timesteps.min_timestep:g},{timesteps.max_timestep:g}"
    metadata = checkpoint_metadata(run.config.metadata, name, run.metadata | progress, timestep_range)
    metadata[VALUES_KEY] = values_digest(run.trained)
    concept = {"name": name, "steps": place.step, "captions": tuple(_captions(run))}
    return write_files(files, run.trained, run.header, run.below, metadata, concept)


@between_steps
def validate_turn(run: Run, place: Place) -> None:
    """Validates, once a step, and saves the slice if it is the best so far and --save_best asks for it."""
    validation = run.validation
    if validation is None or validation.measured_at == place.step:
        return
    values = validation.measure(run.model, run.accelerator)
    validation.measured_at = place.step
    log(run, place, values)
    lines = [validation_line(place.step, values)]
    loss = values.get("validation/loss", math.inf)
    if place.step and loss < validation.best:
        validation.best = loss
        if validation.config.save_best and run.accelerator.is_main_process:
            path = best_file(run.config.save)
            lines += [*_write(run, place, {"slice": path}), f"saved {path}, the best so far"]
    say_beside_bar(run, *lines)
    run.accelerator.wait_for_everyone()


def stop_with_state(run: Run, place: Place) -> None:
    """Ends a run that was interrupted, with a state to resume from: the one that this step has saved, if it has."""
    if place.step == 0:
        return run.say("stopped before the first step was finished, so there is nothing to resume from")
    keep_place(run, place)
    run.accelerator.wait_for_everyone()
    run.say(
        f"stopped after step {place.step}; to continue, run the same command with --resume latest (or {place.state})"
    )


def keep_place(run: Run, place: Place) -> None:
    """Saves a state, unless one of this very place is on disk: another one would have its files written again."""
    if not place.is_saved:
        _save_state(run, place, stop_state(run.config.save, place.step))


def _save_state(run: Run, place: Place, folder: Path) -> None:
    if run.accelerator.is_main_process:
        state = state_of(run, place)
        check_state_is_finite(vars(state), place)
        save_state(folder, state)
    place.was_saved(folder)


def _captions(run: Run) -> list[str]:
    """For a later run's --preserve_prompts auto; part of the settings that --no_metadata leaves out."""
    return most_frequent(run.dataset.shown_captions) if run.config.metadata.settings else []


def draws_after_step(run: Run, place: Place) -> bool:
    """Whether samples follow this step; an epoch's own come at its end, and twice the same would help nobody."""
    samples, ends_epoch = run.config.samples, place.batch == run.plan.batches_per_epoch
    return due_after_step(samples, place.step) and not (ends_epoch and due_after_epoch(samples, place.epoch + 1))


@between_steps
def draw_turn(run: Run, place: Place, when: str) -> None:
    """Draws and saves all samples; `when`, as step_text or epoch_text has it, is in their names."""
    if run.accelerator.is_main_process:
        folder, stem = run.config.save.folder / "sample", f"{run.config.save.name}_{when}"
        with tqdm(total=sum(sample.steps for sample in run.samples.samples), desc="sampling", leave=False) as bar:
            drawn = draw_samples(
                run.samples, run.model, run.accelerator.device, folder, stem, _weights(run, place), bar.update
            )
        show_drawn(run, place, run.config.save, run.settings, run.samples, drawn)
    run.accelerator.wait_for_everyone()


def show_drawn(
    run: Run,
    place: Place,
    save: SaveConfig,
    settings: Mapping[str, str],
    samples: PreparedSamples,
    drawn: Sequence[SavedSample],
) -> None:
    """Adds the turn to the contact sheet, and shows it in the trackers."""
    path = save.folder / "sample" / f"{save.name}{CONTACT_SHEET}"
    sheet = open_sheet(path, {**settings, **samples.settings}, samples.samples).with_turn(place.step, drawn).save(path)
    with _stops_without_room(run, place):
        for tracker in run.accelerator.trackers:
            step = _step_in(tracker, run, place)
            for number, saved in enumerate(drawn):
                show_sample(tracker, f"sample/{number:02d}", saved, samples.fps, step)
            show_sheet(tracker, "sample/contact_sheet", sheet, step)
    for saved in drawn:
        say_beside_bar(run, f"sampled {saved.path}")


def _weights(run: Run, place: Place) -> dict[str, object] | None:
    """What the samples of this place are drawn with, for their metadata; None with --no_metadata."""
    if not run.config.metadata.settings:
        return None
    slices = [file.entry.label for file in run.below.files]
    base = run.config.dit.stem
    loras = [file.label for file in run.samples.loras]
    own = {"model": run.config.save.name, "base_model": base, "slices": slices, "loras": loras}
    return own | {"trained_steps": place.step}


def make_up(run: Run, place: Place) -> None:
    """Writes what was due after the state that the run continues from, if a crash or a full disk prevented it."""
    saves, of_step = run.config.save, save_after_step(run.config.save, place.step, run.plan.steps)
    if place.batch == 0:
        # The step's own, too: a run that was complete and gets more steps has not written it.
        turn, when = save_after_epoch(saves, place.epoch, run.plan.epochs) or of_step, epoch_text(place.epoch)
        draws = due_after_epoch(run.config.samples, place.epoch)
    else:
        turn, when = of_step, step_text(place.step)
        draws = draws_after_step(run, place)
    # What the main process sees, before it writes: all have to take the same way.
    files = turn.missing(values_digest(run.trained)) if turn else {}
    missing = [files, draws and not are_drawn(run.config.save, run.config.samples, when, place.finished_at)]
    broadcast_object_list(missing)
    files, samples = missing
    if files or samples:
        run.say(f"writing what was not written after {place.state} was saved")
    if files:
        save_turn(run, place, replace(turn, files=files, state=None))
    if samples:
        draw_turn(run, place, when)


def step_text(step: int) -> str:
    return f"{step:06d}"


def epoch_text(epoch: int) -> str:
    return f"e{epoch:06d}"


def are_drawn(save: SaveConfig, samples: SampleConfig, when: str, since: int) -> bool:
    """Whether all samples of a turn are on disk, none of them older than `since`, in ns since 1970."""
    stem, folder = glob.escape(f"{save.name}_{when}"), save.folder / "sample"
    numbers = range(len(samples.prompts))
    drawn = {number: folder.glob(f"{stem}_{number:02d}_*") for number in numbers}
    return all(any(path.stat().st_mtime_ns >= since for path in paths) for paths in drawn.values())


@contextmanager
def _stops_without_room(run: Run, place: Place) -> Iterator[None]:
    """Ends the run, with a state to resume from, where the trackers cannot write (a full disk)."""
    try:
        yield
    except OSError as error:
        keep_place(run, place)
        raise InputError(
            f"--logging_dir {run.config.log.folder} cannot be written to ({error.strerror}): the run stops after step "
            f"{place.step}; to continue, run the same command with --resume latest (or {place.state})"
        ) from None
