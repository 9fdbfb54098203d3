"""Trains one slice of a Wan checkpoint on a dataset: the job behind wan_train_network.py.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from utils.block_inputs import BlockInputs
from utils.block_swap import checkpoint_blocks, memory_line, place_model
from utils.checkpoint_metadata import checkpoint_metadata
from utils.checkpoints import (
    Save,
    remove_expired,
    remove_unfinished,
    save_after_epoch,
    save_after_step,
    save_at_end,
    stop_state,
)
from utils.dataset import TrainingDataset, build_training_dataset, make_loader
from utils.flow_matching import add_noise, draw_generator, draw_uniforms, flow_loss, sigmas_of
from utils.interrupts import StopRequest
from utils.lr_schedules import build_scheduler
from utils.optimizers import build_optimizer, learning_rates
from utils.outputs import to_frames
from utils.preservation import Preservation, Targets, most_frequent, preserve_lines
from utils.selective_finetune import TrainedSlice, attach_slice
from utils.slice_files import SlicesOnBase
from utils.slice_overlay import load_with_slices, start_from_overlays
from utils.training_checks import check_dataset, check_plan, latent_sizes, read_dit, say_what_is_read
from utils.training_config import COMPUTE_DTYPES, TrainConfig
from utils.training_debug import TrainingDebug
from utils.training_plan import TrainingPlan, first_items, plan_training
from utils.training_preservation import encode_old_prompts, keep_answers, plan_asking, read_old_prompts
from utils.training_report import input_bytes, inputs_line, plan_line, slice_lines, slice_memory, timestep_lines
from utils.training_samples import PreparedSamples, draw_samples, due_after_epoch, due_after_step, prepare_samples
from utils.training_settings import base_settings, deciding_settings, other_settings, start_hash
from utils.training_slices import ledger_lines, own_entry, read_slices, write_files
from utils.training_state import check_state, load_state, save_state
from wan.configs import TASKS
from wan.errors import InputError
from wan.loading import CheckpointHeader, file_dtype
from wan.model import WanModel

_FRAMES_LOGGED = 4  # of a clip, in TensorBoard


@dataclass
class _Place:
    """Where the run is: its epoch (from 0), this process's next batch in it, the steps done, the last losses."""

    epoch: int
    batch: int
    step: int
    losses: deque[float]  # of as many steps as an epoch has

    def average_loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class _Run:
    """What the loop works with, all of it ready."""

    config: TrainConfig
    accelerator: Accelerator
    seed: int
    header: CheckpointHeader
    below: SlicesOnBase  # slices on top of the header's files, under the one that trains
    dataset: TrainingDataset
    plan: TrainingPlan
    settings: Mapping[str, str]  # those that decide the run's numbers
    metadata: Mapping[str, str]  # those, with the rest
    model: WanModel
    trained: TrainedSlice
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    samples: PreparedSamples | None
    preserved: Preservation | None
    debug: TrainingDebug | None
    say: Callable[[str], None]


def train(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Trains, saves and samples as `config` says; InputError, before the model loads, if something cannot work."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    accelerator = _start_processes(config)
    say = say if accelerator.is_main_process else _say_nothing
    header, model_config = read_dit(config, accelerator.device)
    below = read_slices(config, header)
    dataset = build_training_dataset(config.dataset)
    check_dataset(dataset, model_config, config)
    seed = _agree_on_seed(config, accelerator, say)
    if config.show_timesteps:
        for size in latent_sizes(dataset):
            say("\n".join(timestep_lines(config.timesteps, size, seed)))
        return
    processes = accelerator.num_processes
    batches = dataset.epoch_batches(seed, 0)
    plan = plan_training(batches, processes, config.accumulation, config.max_train_steps, config.max_train_epochs)
    identity = base_settings(header, below)
    prompts = read_old_prompts(config, identity["base_sha256"], model_config, below, dataset)
    settings = deciding_settings(config, seed, dataset, batches, processes, prompts) | identity
    if config.resume:
        check_state(config.resume, settings)
    if accelerator.is_main_process:
        remove_unfinished(config.save)
    accelerator.wait_for_everyone()  # what is half written takes room, which every process looks for
    asking = plan_asking(config, model_config, prompts, dataset, batches, seed)
    saving_lines = check_plan(config, header, plan, asking)
    say_what_is_read(config, header, dataset, say)
    for line in asking.lines() if asking else ():
        say(line)
    samples = None
    if config.samples and accelerator.is_main_process:
        samples = prepare_samples(config.samples, TASKS[config.task], model_config, seed, accelerator.device)
    if asking:
        asking = encode_old_prompts(config.preserve, asking, accelerator, say)

    model, overlays = load_with_slices(config.dit, COMPUTE_DTYPES[config.mixed_precision], below)
    trained = attach_slice(model, config.ff, config.ffid, device=accelerator.device)
    if config.continue_slice or config.allow_overlap:
        start_from_overlays(trained, overlays)
    inputs = BlockInputs(len(model.blocks), accelerator.device) if config.offload_block_inputs else None
    if config.gradient_checkpointing:
        checkpoint_blocks(model, inputs)
    kept = asking.largest_kept if asking else ()
    input_size = input_bytes(model, dataset, batches, kept) if config.offload_block_inputs else 0
    placement = place_model(
        model,
        accelerator.device,
        config.blocks_to_swap,
        trained,
        config.swap,
        mapped=file_dtype(header) == model.dtype,
        reserved=(len(model.blocks) - 1) * input_size,
        overlays=overlays,
    )
    optimizer = build_optimizer(config.optimizer, trained.parameters())
    settings |= start_hash(trained)
    preserved = asking and keep_answers(config.preserve, asking, model, accelerator, settings, say)

    watches = config.training_debug and accelerator.is_main_process
    applied = [file.entry for file in below.files]
    run = _Run(
        config=config,
        accelerator=accelerator,
        seed=seed,
        header=header,
        below=below,
        dataset=dataset,
        plan=plan,
        settings=settings,
        metadata=settings | other_settings(config, plan, dataset, started),
        model=model,
        trained=trained,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, plan.steps),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16"),
        samples=samples,
        preserved=preserved,
        debug=TrainingDebug(trained, len(model.blocks), header.files, applied) if watches else None,
        say=say,
    )
    place = _resume(run) if config.resume else _Place(0, 0, 0, deque(maxlen=plan.steps_per_epoch))
    lines = [*ledger_lines(config, header, below), *slice_lines(trained, model, below.entries)]
    lines += preserve_lines(preserved, below.entries, own_entry(config), config.dit)
    lines.append(f"{memory_line(placement, accelerator.device)}; {slice_memory(trained, model)}")
    if inputs is not None:
        lines.append(inputs_line(len(model.blocks), input_size))
    for line in [*lines, plan_line(plan, processes), *saving_lines]:
        say(line)
    _start_trackers(run)
    with StopRequest() as stop:
        _loop(run, place, stop)
    accelerator.end_training()


def _start_processes(config: TrainConfig) -> Accelerator:
    """Processes, devices and trackers; precision and gradients are this program's own, so nothing is wrapped."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    log = config.log
    folder = log.folder and log.folder / f"{log.prefix}{datetime.now():%Y%m%d%H%M%S}"
    timeout = [InitProcessGroupKwargs(timeout=config.process_timeout)] if config.process_timeout else []
    # "no" also where the launcher was given a precision: accelerate would only use it for wrapping.
    return Accelerator(
        mixed_precision="no", log_with=list(log.trackers) or None, project_dir=folder, kwargs_handlers=timeout
    )


def _say_nothing(line: str) -> None:
    pass


def _agree_on_seed(config: TrainConfig, accelerator: Accelerator, say: Callable[[str], None]) -> int:
    if config.seed is not None:
        return config.seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    say(f"seed {drawn[0]} (drawn at random; --seed {drawn[0]} repeats the run)")
    return drawn[0]


def _resume(run: _Run) -> _Place:
    """Puts the run where the state was saved."""
    folder = run.config.resume
    check_state(folder, run.settings)
    state = load_state(folder)
    run.trained.load_state_dict(state["trained"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.scaler.load_state_dict(state["scaler"])
    place = _Place(state["epoch"], state["batch"], state["step"], deque(state["losses"], run.plan.steps_per_epoch))
    if place.step >= run.plan.steps:
        raise InputError(
            f"--resume {folder} has done {place.step} steps and the run has {run.plan.steps}: raise --max_train_epochs "
            "or --max_train_steps to go on"
        )
    run.say(f"continues from {folder}: epoch {place.epoch + 1}, step {place.step}")
    if state["planned_steps"] != run.plan.steps:
        run.say(
            f"note: the learning rate now follows {run.plan.steps} steps, before it followed {state['planned_steps']}"
        )
    return place


def _state(run: _Run, place: _Place) -> dict:
    return {
        "trained": run.trained.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": place.epoch,
        "batch": place.batch,
        "step": place.step,
        "losses": list(place.losses),
        "planned_steps": run.plan.steps,
    }


def _start_trackers(run: _Run) -> None:
    log = run.config.log
    if log.trackers:
        settings = dict(run.metadata) if log.with_settings else None
        run.accelerator.init_trackers(log.tracker_name, config=settings, init_kwargs=dict(log.tracker_settings))


def _loop(run: _Run, place: _Place, stop: StopRequest) -> None:
    config, plan, accelerator = run.config, run.plan, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = make_loader(
        run.dataset, run.seed, place.epoch, place.batch, rank, processes, config.workers, config.persistent_workers
    )
    bar = tqdm(total=plan.steps, initial=place.step, desc="steps", disable=not accelerator.is_main_process)
    if config.samples and config.samples.at_first and place.step == 0:
        _sample(run, place, "e000000")
    for epoch in range(place.epoch, plan.epochs):
        skipped = place.batch if epoch == place.epoch else 0
        place.epoch = epoch
        loader.sampler.set_epoch(epoch, skipped)
        starts = first_items(run.dataset.epoch_batches(run.seed, epoch), rank, processes)
        losses_of_step, stops = torch.zeros(2, device=accelerator.device), False
        for number, batch in enumerate(loader, start=skipped):
            first_item = epoch * plan.items_per_epoch + starts[number]
            batches_done = epoch * plan.batches_per_epoch + number
            preserves = run.preserved is not None and run.preserved.is_due(place.step + 1)
            losses_of_step += _backward(run, batch, batches_done, first_item, plan.window(number), preserves)
            if not plan.ends_step(number):
                continue
            rates = learning_rates(run.optimizer)
            grad_norm = _update(run)
            place.step, place.batch = place.step + 1, number + 1
            # Processes may be interrupted at different steps, and have to stop at the same one.
            means = accelerator.reduce(torch.cat([losses_of_step, losses_of_step.new_tensor([stop.asked])]), "mean")
            loss, preserve_loss = _checked_losses(means[:2], place.step)
            stops = place.step < plan.steps and bool(means[2])
            place.losses.append(loss)
            losses_of_step = torch.zeros_like(losses_of_step)
            shown = {"loss/preserve": preserve_loss} if preserves else {}
            _show_step(run, place, {**shown, **rates, "grad_norm": grad_norm}, bar)
            if run.debug and (lines := run.debug.after_step(place.step, accelerator.trackers)):
                _say_beside_bar(run, *lines)
            if save := save_after_step(config.save, place.step):
                _save(run, place, save)
            # An epoch's own samples come at its end; twice the same would help nobody.
            ends_epoch = place.batch == plan.batches_per_epoch
            if due_after_step(config.samples, place.step) and not (
                ends_epoch and due_after_epoch(config.samples, epoch + 1)
            ):
                _sample(run, place, f"{place.step:06d}")
            if stops and not ends_epoch:
                return _stop(run, place, bar)
            if place.step == plan.steps:
                break
        accelerator.log({"loss/epoch": place.average_loss()}, step=place.step)
        if place.batch == plan.batches_per_epoch:
            place.epoch, place.batch = epoch + 1, 0
        if save := save_after_epoch(config.save, epoch + 1, plan.epochs):
            _save(run, place, save)
        if due_after_epoch(config.samples, epoch + 1):
            _sample(run, place, f"e{epoch + 1:06d}")
        if stops:
            return _stop(run, place, bar)
    _save(run, place, save_at_end(config.save))
    bar.close()


def _stop(run: _Run, place: _Place, bar: tqdm) -> None:
    """Ends a run that was interrupted, with a state to go on from."""
    folder = stop_state(run.config.save, place.step)
    if run.accelerator.is_main_process:
        save_state(folder, run.settings, _state(run, place))
    bar.close()
    run.accelerator.wait_for_everyone()
    run.say(f"stopped after step {place.step}; the same command with --resume latest goes on (or --resume {folder})")


def _backward(
    run: _Run, batch: Mapping, batches_done: int, first_item: int, batches_of_step: int, preserves: bool
) -> Tensor:
    """Adds the batch's share of its step's gradient; its share of the loss and of the preservation loss come back.

    Random numbers are the entries' own (seed, epoch, entry): a resumed run repeats them, and so does one with the same
    entries in more batches or on more processes.
    """
    device, timesteps = run.accelerator.device, run.config.timesteps
    latents_BCFHW = batch["latents"]
    epoch = batches_done // run.plan.batches_per_epoch
    generators = [draw_generator(run.seed, epoch, entry) for entry in batch["entries"]]
    u_B = draw_uniforms(timesteps, generators, run.seed, first_item)
    sigma_B = sigmas_of(timesteps, u_B, tuple(latents_BCFHW.shape[-2:]))
    noise_BCFHW = torch.stack([torch.randn(latents_BCFHW.shape[1:], generator=own) for own in generators])
    # All of it before the forward: a copy between it and backward would have the host wait for the device.
    moved = (*add_noise(latents_BCFHW, noise_BCFHW, sigma_B), sigma_B)
    noisy_BCFHW, t_B, target_BCFHW, sigma_B = (x.to(device, non_blocking=True) for x in moved)
    context = [text_SD.to(device, non_blocking=True) for text_SD in batch["t5"]]
    targets = [Targets(noisy_BCFHW, sigma_B, t_B, context, target_BCFHW)]
    if preserves:
        of_prompts = [draw_generator(run.seed, "preserve", epoch, entry) for entry in batch["entries"]]
        targets += run.preserved.draw(of_prompts, device)
    losses = torch.zeros(2, device=device)
    for number, own in enumerate(targets):
        # One backward for each, so that one graph at a time is held.
        predicted_BCFHW = run.model(own.noisy_BCFHW, own.t_B, own.context)
        loss = flow_loss(predicted_BCFHW, own.velocity_BCFHW, own.sigma_B, timesteps.weighting)
        loss = loss * own.share / batches_of_step
        run.scaler.scale(run.preserved.weight * loss if number else loss).backward()
        losses[min(number, 1)] += loss.detach()
    return losses


def _update(run: _Run) -> float:
    """One optimizer step on the gradients of all processes; the gradient's norm before clipping comes back."""
    if run.accelerator.num_processes > 1:
        run.trained.reduce_gradients()
    run.scaler.unscale_(run.optimizer)
    if run.debug:
        run.debug.before_update()
    limit = run.config.optimizer.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.trained.parameters(), limit)
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.get_scale() >= scale:  # smaller: fp16 gradients overflowed, and the optimizer did not step
        run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.trained.write_back()
    if run.debug:
        run.debug.after_update()
    return float(grad_norm)


def _checked_losses(losses: Tensor, step: int) -> list[float]:
    values = losses.tolist()
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"the loss of step {step} is {sum(values)}: lower --learning_rate, or continue from the last --save_state "
            "with it"
        )
    return values


def _show_step(run: _Run, place: _Place, values: dict[str, float], bar: tqdm) -> None:
    device = run.accelerator.device
    values = {
        "loss/current": place.losses[-1],
        "loss/average": place.average_loss(),
        **values,
        "memory/host_gb": psutil.Process().memory_info().rss / 1e9,
    }
    if device.type == "cuda":
        values["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    run.accelerator.log(values, step=place.step)
    bar.set_postfix(loss=f"{place.losses[-1]:.4f}", average=f"{place.average_loss():.4f}", refresh=False)
    bar.update()


def _save(run: _Run, place: _Place, save: Save) -> None:
    """The state first: it is small, and the more useful one if the disk fills up."""
    if run.accelerator.is_main_process:
        if save.state:
            save_state(save.state, run.settings, _state(run, place))
        name, timesteps = run.config.save.name, run.config.timesteps
        progress = {"steps": place.step, "epoch": -(-place.step // run.plan.steps_per_epoch)}
        timestep_range = f"{timesteps.min_timestep:g},{timesteps.max_timestep:g}"
        metadata = checkpoint_metadata(run.config.metadata, name, run.metadata | progress, timestep_range)
        concept = {"name": name, "steps": place.step, "captions": tuple(_captions(run))}
        lines = write_files(save.files, run.trained, run.header, run.below, metadata, concept)
        if run.debug:
            lines += run.debug.after_save(save.files.get("checkpoint"), place.step, run.accelerator.trackers)
        lines += remove_expired(save)
        paths = [*map(str, save.files.values()), *([save.state.name] if save.state else [])]
        for line in [*lines, f"saved {' and '.join(paths)}"]:
            _say_beside_bar(run, line)
    run.accelerator.wait_for_everyone()


def _captions(run: _Run) -> list[str]:
    """For a later run's --preserve_prompts auto; part of the settings that --no_metadata leaves out."""
    return most_frequent(run.dataset.shown_captions) if run.config.metadata.settings else []


def _sample(run: _Run, place: _Place, when: str) -> None:
    if run.accelerator.is_main_process:
        config = run.config
        stem = f"{config.save.name}_{when}"
        count = sum(sample.steps for sample in run.samples.samples)
        with tqdm(total=count, desc="sampling", leave=False) as bar:
            folder = config.save.folder / "sample"
            saved = draw_samples(run.samples, run.model, run.accelerator.device, folder, stem, bar.update)
        for number, sample in enumerate(saved):
            frames = to_frames(sample.video_3THW)
            shown = frames[:: -(-len(frames) // _FRAMES_LOGGED)]
            for tracker in run.accelerator.trackers:
                tracker.log_images({f"sample/{number:02d}": shown}, step=place.step, **_layout(tracker))
            _say_beside_bar(run, f"sampled {sample.path}")
    run.accelerator.wait_for_everyone()


def _layout(tracker) -> dict:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def _say_beside_bar(run: _Run, *lines: str) -> None:
    with tqdm.external_write_mode():
        for line in lines:
            run.say(line)
