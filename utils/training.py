"""Trains one slice of a Wan checkpoint on a dataset: the job behind wan_train_network.py."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.dataset import make_loader
from utils.devices import cpu_line
from utils.files import writable_folder
from utils.interrupts import StopRequest
from utils.learning.lr_schedules import build_scheduler
from utils.learning.optimizers import build_optimizer, learning_rates
from utils.locks import sole_writer
from utils.preserve.asking import AskingPlan, encode_old_prompts, keep_answers
from utils.preserve.general_captions import general_captions
from utils.run.checks import Inputs, RunPlan, check, read_inputs
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.fingerprint import other_settings, start_hash
from utils.run.finite import check_start_is_finite
from utils.run.forgetting import CAPTIONS, Probe, ProbedOn, encode_probe, start_probe
from utils.run.opening_lines import opening_lines, timestep_lines
from utils.run.plan import first_items
from utils.run.progress import StepBar, StepTimer
from utils.run.run import Place, Run, resume
from utils.run.samples import PreparedSamples, due_after_epoch, prepare_samples
from utils.run.save_schedule import SaveConfig, remove_overwritten, save_after_epoch, save_after_step, save_at_end
from utils.run.state import read_state
from utils.run.step import backward, update
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
from utils.run.validation import WITHOUT_GRADIENT, Validation, ValidationConfig
from utils.sampling.defaults import read_sample_defaults
from utils.selective_finetune import TrainedSlice, attach_slice
from utils.slices.overlay import load_with_slices, start_from_overlays
from utils.swap.block_inputs import BlockInputs
from utils.swap.placement import LoadedWeights, Placement, checkpoint_blocks, place_model
from utils.training_debug import TrainingDebug
from wan.compiling import COMPILING, compiled_pointwise
from wan.configs import TASKS
from wan.loading import file_dtype
from wan.model import WanModel, use_pointwise
from wan.pointwise import Pointwise

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
    inputs = read_inputs(config, accelerator, say)
    if config.show_timesteps:
        for size in inputs.latent_sizes:
            say("\n".join(timestep_lines(config.timesteps, size, inputs.seed)))
        return True
    with _only_run_of_its_name(config.save, accelerator):
        plan = check(config, inputs, accelerator, say)
        if config.compile:
            say(COMPILING)
            _pointwise(config, inputs, accelerator.device)  # before the model takes up memory
        samples, asking, probed = _encode_prompts(config, inputs, plan, accelerator, say)
        placed = place(config, inputs, plan, accelerator.device)
        run = prepare(config, inputs, plan, samples, asking, probed, placed, accelerator, started, say)
        position = resume(run, plan.resume) if plan.resume else Place(0, 0, 0, deque(maxlen=run.plan.steps_per_epoch))
        for line in opening_lines(run, placed.placement, placed.input_bytes, plan.saving_lines):
            say(line)
        if accelerator.is_main_process:
            for line in remove_overwritten(plan.removed):
                say(line)
        _start_trackers(run)
        with placed.placement, StopRequest() as stop:
            _loop(run, position, stop)
        accelerator.end_training()
        return position.step == run.plan.steps


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


@contextmanager
def _only_run_of_its_name(save: SaveConfig, accelerator: Accelerator) -> Iterator[None]:
    """Locks the names of this run's files; InputError while another run writes them."""
    if not accelerator.is_main_process:
        yield
        return
    is_new, what = not save.folder.exists(), f"--output_name {save.name} in {save.folder}"
    folder = writable_folder(save.folder, "--output_dir")
    try:
        with sole_writer(folder, save.name, what, "choose another --output_name, or wait until that run ends"):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty: the run was not refused
                folder.rmdir()


def _pointwise(config: TrainConfig, inputs: Inputs, device: torch.device) -> Pointwise:
    return compiled_pointwise(inputs.model_config, COMPUTE_DTYPES[config.mixed_precision], device)


def _encode_prompts(
    config: TrainConfig, inputs: Inputs, plan: RunPlan, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[PreparedSamples | None, AskingPlan | None, list[Tensor]]:
    """Encodes every prompt of the run while the model does not take up memory yet.

    Those of samples, those that are preserved, and those at which forgetting is measured.
    """
    samples, asking = None, plan.asking
    if config.samples and accelerator.is_main_process:
        defaults = read_sample_defaults(inputs.header.metadata, config.dit)
        for line in defaults.lines(config.dit):
            say(line)
        samples = prepare_samples(
            config.samples, TASKS[config.task], inputs.model_config, inputs.seed, accelerator.device, defaults, say
        )
    if asking:
        asking = encode_old_prompts(config.preserve, asking, accelerator, say)
    return samples, asking, _encode_probe(config.validation, inputs, plan, accelerator, say)


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


@dataclass(frozen=True)
class PlacedModel:
    """The model with its slice attached, and where its weights are; `input_bytes` of each block wait on the host."""

    model: WanModel
    trained: TrainedSlice
    placement: Placement
    input_bytes: int


def place(config: TrainConfig, inputs: Inputs, plan: RunPlan, device: torch.device) -> PlacedModel:
    """Loads the model, attaches the slice, and moves to the device what trains and what fits."""
    model, overlays = load_with_slices(config.dit, COMPUTE_DTYPES[config.mixed_precision], inputs.below)
    if config.compile:
        use_pointwise(model, _pointwise(config, inputs, device))
    trained = attach_slice(model, config.ff, config.ffid, device=device)
    if config.continue_slice or config.allow_overlap:
        start_from_overlays(trained, overlays)
    check_start_is_finite(trained, config.dit)
    block_inputs = BlockInputs(len(model.blocks), device) if config.offload_block_inputs else None
    if config.gradient_checkpointing:
        checkpoint_blocks(model, block_inputs)
    offloaded = plan.block_input if config.offload_block_inputs else 0
    reserved = (len(model.blocks) - 1) * offloaded
    loaded = LoadedWeights(file_dtype(inputs.header) == model.dtype, overlays, reserved)
    placement = place_model(model, device, config.swap, trained, loaded)
    return PlacedModel(model, trained, placement, offloaded)


def prepare(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    samples: PreparedSamples | None,
    asking: AskingPlan | None,
    probed: Sequence[Tensor],
    placed: PlacedModel,
    accelerator: Accelerator,
    started: str,
    say: Callable[[str], None],
) -> Run:
    """Everything that the loop works with; records the reference predictions that the run preserves."""
    model, trained, streamer = placed.model, placed.trained, placed.placement.streamer
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
        debug=TrainingDebug(trained, len(model.blocks), inputs.header.files, applied) if watches else None,
        say=say,
        timer=StepTimer(streamer.time_waits().take if streamer else None),
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


def _start_trackers(run: Run) -> None:
    log, folder = run.config.log, run.accelerator.project_dir
    if not log.trackers:
        return
    arguments = {tracker: dict(own) for tracker, own in log.tracker_settings.items()}
    if "wandb" in log.trackers and folder:  # else it writes to the folder that the run was started in
        Path(folder).mkdir(parents=True, exist_ok=True)
        arguments["wandb"] = {"dir": str(folder)} | arguments.get("wandb", {})
    settings = dict(run.metadata) if log.with_settings else None
    run.accelerator.init_trackers(log.tracker_name, config=settings, init_kwargs=arguments)


def _loop(run: Run, place: Place, stop: StopRequest) -> None:
    """Epoch after epoch from `place` on, with what falls due after each; ends early where a stop was asked for."""
    config, plan, accelerator = run.config, run.plan, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = make_loader(
        run.dataset,
        run.seed,
        place.epoch,
        place.batch,
        rank,
        processes,
        config.workers,
        config.persistent_workers,
        run.say,
    )
    with StepBar(run.timer, plan.steps, place.step, accelerator.is_main_process) as bar:
        if config.samples and config.samples.at_first and place.step == 0:
            draw_turn(run, place, epoch_text(0))
        if place.step == 0:
            validate_turn(run, place)
        if place.step > 0:
            make_up(run, place)
        run.timer.restart()
        for epoch in range(place.epoch + 1, plan.epochs + 1):
            stops = _train_epoch(run, place, loader, stop, bar)
            if stops and place.batch < plan.batches_per_epoch:
                return stop_with_state(run, place)
            log(run, place, {"loss/epoch": place.average_loss()})
            if place.batch == plan.batches_per_epoch:  # not where --max_train_steps ends the run within an epoch
                place.epoch, place.batch = epoch, 0
            if run.validation and run.validation.config.is_due_after_epoch(epoch):
                validate_turn(run, place)
            if turn := save_after_epoch(config.save, epoch, plan.epochs):
                save_turn(run, place, turn)
            if due_after_epoch(config.samples, epoch):
                draw_turn(run, place, epoch_text(epoch))
            if stops:
                return stop_with_state(run, place)
        validate_turn(run, place)
        save_turn(run, place, save_at_end(config.save, plan.steps))


def _train_epoch(run: Run, place: Place, loader: DataLoader, stop: StopRequest, bar: StepBar) -> bool:
    """Trains from `place` to the end of its epoch, or of the run; whether a stop was asked for on the way."""
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
                return True  # without the unfinished step, whose gradients go with the process
            continue
        rates = learning_rates(run.optimizer)
        values, asked = update(run, place, losses, stop)
        losses = torch.zeros_like(losses)
        place.finish_step(number + 1)
        stops = asked and place.step < plan.steps
        place.losses.append(values["loss"])
        preserved = {"loss/preserve": values["preserve_loss"]} if preserves else {}
        log_step(run, place, {**preserved, **rates, "grad_norm": values["grad_norm"]}, bar)
        if run.validation and run.validation.config.is_due_after_step(place.step):
            validate_turn(run, place)
        if turn := save_after_step(run.config.save, place.step, plan.steps):
            save_turn(run, place, turn)
        if draws_after_step(run, place):
            draw_turn(run, place, step_text(place.step))
        if stops or place.step == plan.steps:
            return stops
    return False


def _any_asked(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: all have to stop after the same batch."""
    return bool(accelerator.reduce(torch.tensor([float(stop.asked)], device=accelerator.device), "sum"))
