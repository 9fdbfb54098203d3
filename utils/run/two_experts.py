"""Training both experts of a model: they take turns, one of them on the device at a time.

Each is a run of its own, so its numbers are those that it would have alone. They meet only to draw samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from utils.run.config import TrainConfig
from utils.run.experts import HIGH, LOW
from utils.run.inputs import Inputs
from utils.run.readings import Readings
from utils.run.run import Place, Run
from utils.run.samples import PreparedSamples, SampleConfig, due_after_epoch, due_after_step, save_drawn
from utils.run.save_schedule import SaveConfig
from utils.run.turns import are_drawn, epoch_text, keep_place, show_drawn, step_text
from utils.sampling.batches import advance
from utils.sampling.defaults import read_sample_defaults
from utils.slices.loras_beside import loras_beside
from utils.swap.stage import LoadedModel, Stage
from wan.configs import TASKS
from wan.errors import InputError


@dataclass(eq=False)
class Expert:
    """An expert, where its training is, and what trains it on: a generator that yields after every optimizer step."""

    run: Run
    model: LoadedModel
    place: Place
    ended: bool = False  # all that it has to write is written
    readings: Readings | None = None  # None until it trains
    steps: Iterator[bool] = field(default_factory=lambda: iter(()))  # True: a stop was asked for


@dataclass(frozen=True)
class SharedSamples:
    """The samples that both experts draw together, the high-noise one down to timestep `boundary`."""

    config: SampleConfig
    prepared: PreparedSamples | None  # None: another process draws them
    save: SaveConfig  # of the names without an expert's
    boundary: float
    guidance_scale_high: float | None  # None: the sample's


def shared_samples(config: TrainConfig, high: Inputs, prepared: PreparedSamples | None) -> SharedSamples | None:
    """The samples of a run that trains two experts, if it draws any; `high` is what the high-noise one is given."""
    if config.experts is None or config.samples is None:
        return None
    suggested = read_sample_defaults(high.header.metadata, config.experts.dit_high_noise).guidance_scale
    scale = TASKS[config.task].guidance_scale_high if suggested is None else suggested
    return SharedSamples(config.samples, prepared, config.save, config.experts.boundary, scale)


def take_turns(
    experts: Sequence[Expert], every: int, samples: SharedSamples | None, stage: Stage, say: Callable[[str], None]
) -> None:
    """Trains the experts, the one behind first, in turns of `every` optimizer steps.

    A turn ends early where samples are due, so that these show both experts after as many steps.
    """
    idle = experts
    try:
        _draw_at_start(experts, samples, stage, say)
        while waiting := [expert for expert in experts if not expert.ended]:
            expert = min(waiting, key=lambda expert: expert.place.step)
            stage.bring(expert.model)
            expert.run.timer.restart()
            idle = [own for own in experts if own is not expert]
            if _take_turn(expert, every, samples):
                return _stop(experts, say)
            idle = experts
            if samples and _are_together(experts):
                for when in _due(samples.config, expert):
                    _draw(experts, samples, stage, when, say)
    except InputError:  # which says what is good of the expert that was training
        _keep_places(idle)
        raise


def _are_together(experts: Sequence[Expert]) -> bool:
    return len({expert.place.step for expert in experts}) == 1


def _take_turn(expert: Expert, every: int, samples: SharedSamples | None) -> bool:
    """Trains on to the end of the turn, or of the run; whether a stop was asked for."""
    for stops in expert.steps:
        if stops:
            return True
        step, steps = expert.place.step, expert.run.plan.steps
        if step < steps and (step % every == 0 or (samples and _due(samples.config, expert))):
            return expert.readings.read()  # before the other expert's turn
    expert.ended = True
    return False


def _due(config: SampleConfig, expert: Expert) -> list[str]:
    """What the names of the samples that follow this step have, as in a run of one model."""
    place, plan = expert.place, expert.run.plan
    ends_epoch = place.batch == 0
    epoch = place.epoch if ends_epoch else place.epoch + 1
    after_epoch = (ends_epoch or place.step == plan.steps) and due_after_epoch(config, epoch)
    after_step = due_after_step(config, place.step) and not (ends_epoch and after_epoch)
    return [*([step_text(place.step)] if after_step else []), *([epoch_text(epoch)] if after_epoch else [])]


def _draw_at_start(
    experts: Sequence[Expert], samples: SharedSamples | None, stage: Stage, say: Callable[[str], None]
) -> None:
    """The samples before the first step, or those that a crash prevented."""
    if samples is None or not _are_together(experts):
        return
    if experts[0].place.step == 0:
        due = [epoch_text(0)] if samples.config.at_first else []
    else:
        since = min(expert.place.finished_at for expert in experts)
        whens = _due(samples.config, experts[0])
        due = [when for when in whens if not are_drawn(samples.save, samples.config, when, since)]
    found = [due]  # by the main process, before it draws: all have to take the same way
    broadcast_object_list(found)
    for when in found[0]:
        _draw(experts, samples, stage, when, say)


def _draw(
    experts: Sequence[Expert], samples: SharedSamples, stage: Stage, when: str, say: Callable[[str], None]
) -> None:
    """Draws and saves all samples, the high-noise expert first; `when` is in their names."""
    run, place = replace(experts[-1].run, say=say), experts[-1].place
    save, prepared, device = samples.save, samples.prepared, run.accelerator.device
    if run.accelerator.is_main_process:
        latents = _sample(experts, samples, stage)
        weights = _weights(experts, samples)
        drawn = save_drawn(prepared, latents, device, save.folder / "sample", f"{save.name}_{when}", weights)
        own = [(expert.run.config.expert, expert.run.settings) for expert in experts]
        settings = {f"{key}/{name}": value for name, of_expert in own for key, value in of_expert.items()}
        show_drawn(run, place, save, settings, prepared, drawn)
    run.accelerator.wait_for_everyone()


def _sample(experts: Sequence[Expert], samples: SharedSamples, stage: Stage) -> list[Tensor]:
    """The latents [C, F, H, W] of all samples."""
    prepared = samples.prepared
    denoisings = prepared.denoisings()
    with tqdm(total=sum(own.sample.steps for own in denoisings), desc="sampling", leave=False) as bar:
        for expert in experts:
            run, is_high = expert.run, expert.run.config.expert == HIGH
            stage.bring(expert.model)
            device, source = run.accelerator.device, f"the {run.config.expert} model in training"
            scale, t_end = (samples.guidance_scale_high, samples.boundary) if is_high else (None, 0.0)
            with loras_beside(run.model, prepared.loras_high_noise if is_high else prepared.loras, device):
                how = (scale, prepared.texts, device, prepared.batch, t_end, bar.update, source)
                advance(denoisings, run.model, *how)
    return [denoising.latent_CFHW for denoising in denoisings]


def _weights(experts: Sequence[Expert], samples: SharedSamples) -> dict[str, object] | None:
    """What the samples are drawn with, for their metadata; None with --no_metadata."""
    if not experts[0].run.config.metadata.settings:
        return None
    runs = {expert.run.config.expert: expert.run for expert in experts}
    return {
        "model": runs[LOW].config.save.name,
        "model_high_noise": runs[HIGH].config.save.name,
        "guidance_scale_high_noise": samples.guidance_scale_high,
        "base_model": runs[LOW].config.dit.stem,
        "slices": [file.entry.label for run in runs.values() for file in run.below.files],
        "loras": [file.label for file in samples.prepared.loras],
        "loras_high_noise": [file.label for file in samples.prepared.loras_high_noise],
        "trained_steps": experts[0].place.step,
    }


def _stop(experts: Sequence[Expert], say: Callable[[str], None]) -> None:
    """Ends a run that was interrupted, with a state of each expert."""
    for expert in experts:
        expert.steps.close()
    if not any(expert.place.step for expert in experts):
        return say("stopped before the first step was finished, so there is nothing to resume from")
    _keep_places(experts)
    experts[0].run.accelerator.wait_for_everyone()
    where = " and ".join(f"{own.run.config.expert} after step {own.place.step}" for own in experts)
    say(f"stopped {where}; to continue, run the same command with --resume latest")


def _keep_places(experts: Sequence[Expert]) -> None:
    for expert in experts:
        if expert.place.step:
            keep_place(expert.run, expert.place)
