"""Trains one slice of a Wan checkpoint on a dataset: the job behind wan_train_network.py."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.dataset import make_loader
from utils.devices import cpu_line
from utils.interrupts import StopRequest
from utils.learning.lr_schedules import build_scheduler
from utils.learning.optimizers import build_optimizer, learning_rates
from utils.preserve.asking import AskingPlan, encode_old_prompts, keep_answers
from utils.preserve.general_captions import general_captions
from utils.run.checks import Inputs, RunPlan, check_all, planned_lines, read_inputs
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.experts import expert_configs
from utils.run.fingerprint import other_settings, start_hash
from utils.run.finite import check_start_is_finite
from utils.run.forgetting import CAPTIONS, Probe, ProbedOn, encode_probe, start_probe
from utils.run.opening_lines import experts_lines, model_lines, run_lines, timestep_lines
from utils.run.plan import first_items
from utils.run.progress import StepBar, StepTimer
from utils.run.run import Place, Run, has_ended, has_ended_error, resume
from utils.run.samples import PreparedSamples, due_after_epoch, prepare_samples
from utils.run.save_schedule import remove_overwritten, save_after_epoch, save_after_step, save_at_end
from utils.run.state import read_state
from utils.run.step import backward, update
from utils.run.surroundings import only_run_of_its_names, start_trackers
from utils.run.turns import (
    draw_turn,
    draws_after_step,
    epoch_text,
    log,
    log_step,
    make_up,
    save_turn,
    step_text,
    stop_with_state,
    validate_turn,
)
from utils.run.two_experts import Expert, SharedSamples, shared_samples, take_turns
from utils.run.validation import WITHOUT_GRADIENT, Validation, ValidationConfig
from utils.sampling.defaults import read_sample_defaults
from utils.selective_finetune import attach_slice
from utils.slices.overlay import load_with_slices, start_from_overlays, start_in
from utils.swap.block_inputs import BlockInputs
from utils.swap.order import WeightOrder
from utils.swap.placement import LoadedWeights, checkpoint_blocks, place_model
from utils.swap.stage import LoadedModel, Stage
from utils.training_debug import TrainingDebug
from wan.configs import TASKS
from wan.loading import file_dtype
from wan.model import WanModel

# The other processes wait while the main one encodes prompts, draws samples or writes 28 GB; NCCL gives up after 10
# minutes unless it is told otherwise.
_WAIT_FOR_MAIN_PROCESS = timedelta(days=1)


def train(config: TrainConfig, say: Callable[[str], None]) -> bool:
    """Trains, saves and samples as `config` says; InputError, before the model loads, if something cannot work.

    False if it was interrupted before its last step.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    accelerator = _start_processes(config)
    say = say if accelerator.is_main_process else _say_nothing
    if line := cpu_line(accelerator.device):
        say(line)
    asked = expert_configs(config)  # one, or those of two experts
    inputs = read_inputs(asked, accelerator, say)
    if config.show_timesteps:
        for own, given in zip(asked, inputs, strict=True):
            for size in given.latent_sizes:
                say("\n".join(timestep_lines(own.timesteps, size, given.seed)))
        return True
    with only_run_of_its_names(config, asked, accelerator), Stage() as stage:
        plans = check_all(config, asked, inputs, accelerator, say)
        samples = _encode_samples(config, inputs[-1], accelerator, say)
        encoded = [_encode_prompts(*own, accelerator, say) for own in zip(asked, inputs, plans, strict=True)]
        block_inputs = _block_inputs(config, inputs[0], accelerator.device)
        experts = [
            _make_ready(*own, samples, block_inputs, stage, accelerator, started, _say_of(own[0], say))
            for own in zip(asked, inputs, plans, encoded, strict=True)
        ]
        if all(expert.ended for expert in experts):
            raise has_ended_error(experts[0].run, experts[0].place)
        lines = planned_lines(asked, plans)
        for line in [*run_lines(experts[0].run, experts[0].model.input_bytes, lines), *experts_lines(config)]:
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


def _say_nothing(line: str) -> None:
    pass


def _say_of(config: TrainConfig, say: Callable[[str], None]) -> Callable[[str], None]:
    """Says of which of two experts a line is."""
    return (lambda line: say(f"{config.expert}: {line}")) if config.expert else say


def _encode_samples(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator, say: Callable[[str], None]
) -> PreparedSamples | None:
    """The prompts of samples, encoded while the model does not take up memory yet."""
    if not (config.samples and accelerator.is_main_process):
        return None
    defaults = read_sample_defaults(inputs.header.metadata, config.dit)
    for line in defaults.lines(config.dit):
        say(line)
    return prepare_samples(
        config.samples, TASKS[config.task], inputs.model_config, inputs.seed, accelerator.device, defaults, say
    )


def _encode_prompts(
    config: TrainConfig, inputs: Inputs, plan: RunPlan, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[AskingPlan | None, list[Tensor]]:
    """The same for the prompts that are preserved, and for those at which forgetting is measured."""
    asking = plan.asking
    if asking:
        asking = encode_old_prompts(config.preserve, asking, accelerator, say)
    return asking, _encode_probe(config.validation, inputs, plan, accelerator, say)


def _encode_probe(
    validation: ValidationConfig | None,
    inputs: Inputs,
    plan: RunPlan,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> list[Tensor]:
    """The captions at which forgetting is measured; none where it is not, or from the start that a state keeps."""
    if validation is None or validation.t5 is None or _kept_probe(plan):
        return []
    captions = general_captions(without=_not_to_probe(inputs, plan))[:CAPTIONS]
    if not captions:
        say("note: forgetting is not measured, because the run trains or preserves every caption that it would ask")
        return []
    return encode_probe(validation.t5, validation.tokenizer, captions, inputs.model_config, accelerator)


def _kept_probe(plan: RunPlan) -> Mapping | None:
    """What the state that the run continues from keeps of the predictions at its start."""
    saved = read_state(plan.resume).validation if plan.resume else None
    return saved["probe"] if saved else None


def _not_to_probe(inputs: Inputs, plan: RunPlan) -> set[str]:
    """The captions that are trained or preserved."""
    preserved = {old.text for old, _ in plan.asking.asked} if plan.asking else set()
    return preserved | {caption for item in inputs.dataset.items for caption in item.captions}


def _block_inputs(config: TrainConfig, inputs: Inputs, device: torch.device) -> BlockInputs | None:
    """Where the blocks' inputs wait; two experts share it, since one of them computes at a time."""
    return BlockInputs(inputs.model_config.num_layers, device) if config.offload_block_inputs else None


def _make_ready(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    encoded: tuple[AskingPlan | None, list[Tensor]],
    samples: PreparedSamples | None,
    block_inputs: BlockInputs | None,
    stage: Stage,
    accelerator: Accelerator,
    started: str,
    say: Callable[[str], None],
) -> Expert:
    """Everything of a run, or of one of two experts, up to its first step."""
    loaded = load(config, inputs, plan, block_inputs, accelerator.device)
    placement = stage.bring(loaded)
    own_samples = samples if config.samples else None
    timer = StepTimer(stage.take_waits if placement.streamer else None)
    run = prepare(config, inputs, plan, own_samples, *encoded, loaded, timer, accelerator, started, say)
    place = resume(run, plan.resume) if plan.resume else Place(0, 0, 0, deque(maxlen=run.plan.steps_per_epoch))
    ended = plan.resume is not None and has_ended(run, place)
    for line in () if ended and not config.expert else model_lines(run, placement):
        say(line)
    return Expert(run, loaded, place, ended)


def load(
    config: TrainConfig, inputs: Inputs, plan: RunPlan, block_inputs: BlockInputs | None, device: torch.device
) -> LoadedModel:
    """Loads the model and attaches the slice; placed, the device has what trains and what fits."""
    dtype, rounds = COMPUTE_DTYPES[config.mixed_precision], bool(config.swap.fp8)
    model, overlays = load_with_slices(config.dit, dtype, inputs.below, rounds)
    trained = attach_slice(model, config.ff, config.ffid, device=device)
    start_in(trained, model.dtype)
    if config.continue_slice or config.allow_overlap:
        start_from_overlays(trained, overlays)
    check_start_is_finite(trained, config.dit)
    if config.gradient_checkpointing:
        checkpoint_blocks(model, block_inputs)
    offloaded = plan.block_input if config.offload_block_inputs else 0
    reserved = (len(model.blocks) - 1) * offloaded
    loaded = LoadedWeights(
        mapped=rounds or file_dtype(inputs.header) == model.dtype,
        overlays=overlays,
        reserved=reserved,
        returns=bool(config.expert),
        order=WeightOrder() if config.expert else None,
    )
    return LoadedModel(model, trained, partial(place_model, model, device, config.swap, trained, loaded), offloaded)


def prepare(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    samples: PreparedSamples | None,
    asking: AskingPlan | None,
    probed: Sequence[Tensor],
    loaded: LoadedModel,
    timer: StepTimer,
    accelerator: Accelerator,
    started: str,
    say: Callable[[str], None],
) -> Run:
    """Everything that the loop works with; records the reference predictions that the run preserves."""
    model, trained = loaded.model, loaded.trained
    optimizer = build_optimizer(config.optimizer, trained.parameters())
    settings = {**plan.settings, **start_hash(trained)}
    replaces = config.save.overwrite or plan.continues
    preserved = keep_answers(config.preserve, asking, model, accelerator, settings, replaces, say) if asking else None
    applied = [file.entry for file in inputs.below.files]
    watches = config.training_debug and accelerator.is_main_process
    return Run(
        config=config,
        accelerator=accelerator,
        seed=inputs.seed,
        header=inputs.header,
        below=inputs.below,
        dataset=inputs.dataset,
        plan=plan.steps,
        settings=settings,
        metadata=settings | other_settings(config, plan.steps, inputs.dataset, started),
        model=model,
        trained=trained,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, plan.steps.steps),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16"),
        samples=samples,
        preserved=preserved,
        validation=_validation(config, inputs, plan, probed, model, accelerator.device),
        debug=TrainingDebug(trained, len(model.blocks), inputs.header.files, applied, config.expert)
        if watches
        else None,
        say=say,
        timer=timer,
    )


def _validation(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    probed: Sequence[Tensor],
    model: WanModel,
    device: torch.device,
) -> Validation | None:
    """What the run is validated on; forgetting is measured from the model as it was before the run's first step."""
    if config.validation is None:
        return None
    most_values = WITHOUT_GRADIENT * plan.most_values
    if kept := _kept_probe(plan):
        probe = Probe.from_state(kept)
    else:
        asked = ProbedOn(probed, inputs.dataset.items, config.timesteps, config.i2v_share)
        probe = start_probe(asked, model, most_values, device) if probed else None
    rest = (most_values, probe, config.i2v_share)
    return Validation(config.validation, inputs.validated, config.timesteps, *rest)


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
            expert.steps = _steps(expert.run, expert.place, stop, bar)
        if config.experts:
            take_turns(experts, config.experts.switch_every, samples, stage, say)
        elif any(expert.steps):
            stop_with_state(expert.run, expert.place)


def _steps(run: Run, place: Place, stop: StopRequest, bar: StepBar) -> Iterator[bool]:
    """Trains from `place` on; yields after every optimizer step, once all that falls due after it is done.

    True is the last that it yields, where a stop was asked for.
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
        for stops in _steps_of_epoch(run, place, loader, stop, bar):
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


def _steps_of_epoch(run: Run, place: Place, loader: DataLoader, stop: StopRequest, bar: StepBar) -> Iterator[bool]:
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
            if stop.is_urgent and _any_asked(accelerator, stop):
                yield True  # without the unfinished step, whose gradients go with the process
            continue
        rates = learning_rates(run.optimizer)
        values, asked = update(run, place, losses, stop)
        losses = torch.zeros_like(losses)
        place.finish_step(number + 1)
        place.losses.append(values["loss"])
        preserved = {"loss/preserve": values["preserve_loss"]} if preserves else {}
        log_step(run, place, {**preserved, **rates, "grad_norm": values["grad_norm"]}, bar)
        if run.validation and run.validation.config.is_due_after_step(place.step):
            validate_turn(run, place)
        if turn := save_after_step(run.config.save, place.step, plan.steps):
            save_turn(run, place, turn)
        if draws_after_step(run, place):
            draw_turn(run, place, step_text(place.step))
        yield asked and place.step < plan.steps
        if place.step == plan.steps:
            return


def _any_asked(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: all have to stop after the same batch."""
    return bool(accelerator.reduce(torch.tensor([float(stop.asked)], device=accelerator.device), "sum"))
