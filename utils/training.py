"""Trains one slice of a Wan checkpoint on a dataset: the job behind wan_train_network.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader

from utils.data.dataset import make_loader
from utils.devices import cpu_line
from utils.interrupts import StopRequest
from utils.learning.optimizers import learning_rates
from utils.run.checks import check_all, planned_lines
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.experts import expert_configs
from utils.run.inputs import read_inputs
from utils.run.opening_lines import experts_lines, run_lines, timestep_lines
from utils.run.plan import first_items
from utils.run.preparing import encode_prompts, encode_samples, make_block_inputs, make_ready
from utils.run.progress import StepBar
from utils.run.readings import Readings
from utils.run.run import Place, Run, has_ended_error
from utils.run.samples import due_after_epoch
from utils.run.save_schedule import remove_overwritten, save_after_epoch, save_after_step, save_at_end
from utils.run.step import backward, update
from utils.run.surroundings import only_run_of_its_names, start_trackers
from utils.run.turns import (
    draw_turn,
    draws_after_step,
    epoch_text,
    log,
    make_up,
    save_turn,
    step_text,
    stop_with_state,
    validate_turn,
)
from utils.run.two_experts import Expert, SharedSamples, shared_samples, take_turns
from utils.swap.stage import Stage
from wan.compiling import COMPILING, compiled_pointwise

# The other processes wait while the main one encodes prompts, draws samples or writes 28 GB; NCCL gives up after 10
# minutes unless it is told otherwise.
_WAIT_FOR_MAIN_PROCESS = timedelta(days=1)


def train(config: TrainConfig, say: Callable[[str], None]) -> bool:
    """Trains, saves and samples as `config` says; InputError, before the model loads, if something cannot work.

    False if it was interrupted before its last step.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    accelerator = _start_processes(config)
    say = say if accelerator.is_main_process else lambda line: None
    if line := cpu_line(accelerator.device):
        say(line)
    asked = expert_configs(config)  # one, or those of two experts
    inputs = read_inputs(asked, accelerator, say)
    if config.show_timesteps:
        for own, given in zip(asked, inputs, strict=True):
            for size in given.latent_sizes:
                _say_of(own, say)("\n".join(timestep_lines(own.timesteps, size, given.seed)))
        return True
    with only_run_of_its_names(config, asked, accelerator), Stage() as stage:
        plans = check_all(config, asked, inputs, accelerator, say)
        if config.compile:
            say(COMPILING)
            compiled_pointwise(inputs[0].model_config, COMPUTE_DTYPES[config.mixed_precision], accelerator.device)
        samples = encode_samples(config, inputs[-1], accelerator, say)
        encoded = [encode_prompts(*own, accelerator, say) for own in zip(asked, inputs, plans, strict=True)]
        block_inputs = make_block_inputs(config, inputs[0], accelerator.device)
        experts = [
            make_ready(*own, samples, block_inputs, stage, accelerator, started, _say_of(own[0], say))
            for own in zip(asked, inputs, plans, encoded, strict=True)
        ]
        if all(expert.ended for expert in experts):
            raise has_ended_error(experts[0].run, experts[0].place)
        lines = planned_lines(asked, plans)
        for line in [*run_lines(experts[0].run, experts[0].model.input_bytes, lines), *experts_lines(config, asked)]:
            say(line)
        if accelerator.is_main_process:
            for line in remove_overwritten([path for plan in plans for path in plan.removed]):
                say(line)
        start_trackers([expert.run for expert in experts])
        with StopRequest() as stop:
            _train(config, experts, shared_samples(config, inputs[0], samples), stage, stop, say)
        accelerator.end_training()
        return all(expert.place.step == expert.run.plan.steps for expert in experts)


def _start_processes(config: TrainConfig) -> Accelerator:
    """Processes, devices and trackers; precision and gradients are this program's own, so nothing is wrapped."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    log = config.log
    folder = log.folder and log.folder / f"{log.prefix}{datetime.now():%Y%m%d%H%M%S}"
    timeout = InitProcessGroupKwargs(timeout=config.process_timeout or _WAIT_FOR_MAIN_PROCESS)
    # "no" also where the launcher was given a precision: accelerate would only use it for wrapping.
    return Accelerator(
        mixed_precision="no", log_with=list(log.trackers) or None, project_dir=folder, kwargs_handlers=[timeout]
    )


def _say_of(config: TrainConfig, say: Callable[[str], None]) -> Callable[[str], None]:
    """Says of which of two experts a line is."""
    return (lambda line: say(f"{config.expert}: {line}")) if config.expert else say


def _train(
    config: TrainConfig,
    experts: Sequence[Expert],
    samples: SharedSamples | None,
    stage: Stage,
    stop: StopRequest,
    say: Callable[[str], None],
) -> None:
    """Trains to the end, or until a stop is asked for: one model, or two experts in turn."""
    steps, done = (
        sum(counts) for counts in zip(*((own.run.plan.steps, own.place.step) for own in experts), strict=True)
    )
    run = experts[0].run
    with StepBar(run.timer, steps, done, run.accelerator.is_main_process) as bar:
        for expert in experts:
            others = [own.place for own in experts if own is not expert]
            expert.run = replace(expert.run, timer=run.timer, others=others)
            expert.readings = Readings(expert.run, expert.place, bar)
            expert.steps = _steps(expert.run, expert.place, expert.readings, stop)
        if config.experts:
            take_turns(experts, config.experts.switch_every, samples, stage, say)
        elif any(expert.steps):
            stop_with_state(expert.run, expert.place)


def _steps(run: Run, place: Place, readings: Readings, stop: StopRequest) -> Iterator[bool]:
    """Trains from `place` on; yields after every optimizer step, once all that falls due after it is done.

    True is the last that it yields, where a stop was asked for. Whoever leaves off at another step reads that first.
    """
    config, plan, accelerator = run.config, run.plan, run.accelerator
    loader = make_loader(
        run.dataset,
        run.seed,
        place.epoch,
        place.batch,
        accelerator.process_index,
        accelerator.num_processes,
        config.workers,
        config.persistent_workers,
        run.say,
    )
    if config.samples and config.samples.at_first and place.step == 0:
        draw_turn(run, place, epoch_text(0))
    if place.step == 0:
        validate_turn(run, place)
    if place.step > 0:
        make_up(run, place)
    run.timer.restart()
    for epoch in range(place.epoch + 1, plan.epochs + 1):
        stops = False
        for stops in _steps_of_epoch(run, place, loader, readings, stop):
            if place.batch < plan.batches_per_epoch and (stops or place.step < plan.steps):
                yield stops
        _end_epoch(run, place, epoch)
        yield stops
    validate_turn(run, place)
    save_turn(run, place, save_at_end(config.save, plan.steps))


def _end_epoch(run: Run, place: Place, epoch: int) -> None:
    """What falls due after an epoch, counted from 1."""
    config, plan = run.config, run.plan
    log(run, place, {"loss/epoch": place.average_loss()})
    if place.batch == plan.batches_per_epoch:  # not where --max_train_steps ends the run within an epoch
        place.epoch, place.batch = epoch, 0
    if run.validation and run.validation.config.is_due_after_epoch(epoch):
        validate_turn(run, place)
    if turn := save_after_epoch(config.save, epoch, plan.epochs):
        save_turn(run, place, turn)
    if due_after_epoch(config.samples, epoch):
        draw_turn(run, place, epoch_text(epoch))


def _steps_of_epoch(
    run: Run, place: Place, loader: DataLoader, readings: Readings, stop: StopRequest
) -> Iterator[bool]:
    """Trains from `place` to the end of its epoch, or of the run; yields after each step whether to stop."""
    plan, accelerator = run.plan, run.accelerator
    loader.sampler.set_epoch(place.epoch, place.batch)
    batches = run.dataset.epoch_batches(run.seed, place.epoch)
    starts = first_items(batches, accelerator.process_index, accelerator.num_processes)
    losses = torch.zeros(2, device=accelerator.device)
    shown = run.timer.batches(loader if place.step < plan.steps else (), run.model.config.patch_size)
    for number, batch in enumerate(shown, start=place.batch):
        first_item = place.epoch * plan.items_per_epoch + starts[number]
        preserves = run.preserved is not None and run.preserved.is_due(place.step + 1)
        losses += backward(run, batch, place.epoch, first_item, plan.window(number), preserves)
        if not plan.ends_step(number):
            if stop.is_urgent and (readings.read() or _any_asked(accelerator, stop)):
                yield True  # without the unfinished step, whose gradients go with the process
            continue
        if readings.read():  # the last step, while the device is at work on this one
            yield True
        rates = learning_rates(run.optimizer)
        outcome = update(run, place, losses, stop)
        losses = torch.zeros_like(losses)
        place.finish_step(number + 1)
        readings.add(outcome, rates, preserves)
        turns, ends = _turns_after_step(run, place), plan.steps == place.step
        needs_outcome = turns or ends or place.batch == plan.batches_per_epoch or stop.asked
        stops = (needs_outcome or not outcome.is_late) and readings.read()
        for turn in turns:
            turn()
        yield stops and not ends
        if ends:
            return


def _turns_after_step(run: Run, place: Place) -> list[Callable[[], None]]:
    """What falls due after the step that was done, in its order."""
    turns: list[Callable[[], None]] = []
    if run.validation and run.validation.config.is_due_after_step(place.step):
        turns.append(partial(validate_turn, run, place))
    if turn := save_after_step(run.config.save, place.step, run.plan.steps):
        turns.append(partial(save_turn, run, place, turn))
    if draws_after_step(run, place):
        turns.append(partial(draw_turn, run, place, step_text(place.step)))
    return turns


def _any_asked(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: all have to stop after the same batch."""
    return bool(accelerator.reduce(torch.tensor([float(stop.asked)], device=accelerator.device), "sum"))
