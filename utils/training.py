"""Trains one slice of a Wan checkpoint on a dataset: the job behind wan_train_network.py.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import build_training_dataset, make_loader
from utils.interrupts import StopRequest
from utils.learning.flow_matching import add_noise, draw_generator, draw_uniforms, flow_loss, sigmas_of
from utils.learning.lr_schedules import build_scheduler
from utils.learning.optimizers import build_optimizer, learning_rates
from utils.preserve.answers_file import ENDING
from utils.preserve.asking import encode_old_prompts, keep_answers, plan_asking, read_old_prompts
from utils.preserve.old_prompts import Targets, preserve_lines
from utils.run.checks import check_dataset, check_plan, latent_sizes, read_dit, say_what_is_read
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.fingerprint import base_settings, deciding_settings, other_settings, start_hash
from utils.run.opening_lines import input_bytes, inputs_line, plan_line, slice_lines, slice_memory, timestep_lines
from utils.run.plan import first_items, plan_training
from utils.run.run import Place, Run, resume, state_of
from utils.run.samples import due_after_epoch, prepare_samples
from utils.run.save_schedule import remove_unfinished, save_after_epoch, save_after_step, save_at_end, stop_state
from utils.run.state import check_state, save_state
from utils.run.turns import draw_turn, draws_after_step, epoch_text, log, log_step, make_up, save_turn, step_text
from utils.run.write import ledger_lines, read_slices
from utils.selective_finetune import attach_slice
from utils.slices.base_identity import base_model
from utils.slices.ledger import own_entry
from utils.slices.overlay import load_with_slices, start_from_overlays
from utils.swap.block_inputs import BlockInputs
from utils.swap.placement import checkpoint_blocks, memory_line, place_model
from utils.training_debug import TrainingDebug
from wan.configs import TASKS
from wan.errors import InputError
from wan.loading import file_dtype


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
    base = config.preserve and base_model(header, below.entries)
    own = own_entry(config.ff, config.ffid, config.save.name)
    prompts = read_old_prompts(config.preserve, base, model_config, below.entries, own, dataset.items)
    settings = deciding_settings(config, seed, dataset, batches, processes, prompts) | identity
    if config.resume:
        check_state(config.resume, settings)
    if accelerator.is_main_process:
        remove_unfinished(config.save)
    accelerator.wait_for_everyone()  # what is half written takes room, which every process looks for
    answers = config.save.folder / f"{config.save.name}{ENDING}"
    asking = plan_asking(
        config.preserve, answers, config.timesteps, base, model_config, prompts, dataset.items, batches, seed
    )
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
    run = Run(
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
    place = resume(run) if config.resume else Place(0, 0, 0, deque(maxlen=plan.steps_per_epoch))
    lines = [*ledger_lines(config, header, below), *slice_lines(trained, model, below.entries)]
    lines += preserve_lines(preserved, below.entries, own)
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


def _start_trackers(run: Run) -> None:
    log = run.config.log
    if log.trackers:
        settings = dict(run.metadata) if log.with_settings else None
        run.accelerator.init_trackers(log.tracker_name, config=settings, init_kwargs=dict(log.tracker_settings))


def _loop(run: Run, place: Place, stop: StopRequest) -> None:
    config, plan, accelerator = run.config, run.plan, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = make_loader(
        run.dataset, run.seed, place.epoch, place.batch, rank, processes, config.workers, config.persistent_workers
    )
    bar = tqdm(total=plan.steps, initial=place.step, desc="steps", disable=not accelerator.is_main_process)
    if config.samples and config.samples.at_first and place.step == 0:
        draw_turn(run, place, epoch_text(0))
    if place.step > 0:
        make_up(run, place)
    for epoch in range(place.epoch, plan.epochs):
        skipped = place.batch if epoch == place.epoch else 0
        place.epoch = epoch
        loader.sampler.set_epoch(epoch, skipped)
        starts = first_items(run.dataset.epoch_batches(run.seed, epoch), rank, processes)
        losses_of_step, stops = torch.zeros(2, device=accelerator.device), False
        for number, batch in enumerate(loader if place.step < plan.steps else (), start=skipped):
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
            log_step(run, place, {**shown, **rates, "grad_norm": grad_norm}, bar)
            if turn := save_after_step(config.save, place.step):
                save_turn(run, place, turn)
            if draws_after_step(run, place):
                draw_turn(run, place, step_text(place.step))
            if stops and place.batch < plan.batches_per_epoch:
                return _stop(run, place, bar)
            if place.step == plan.steps:
                break
        log(run, place, {"loss/epoch": place.average_loss()})
        if place.batch == plan.batches_per_epoch:
            place.epoch, place.batch = epoch + 1, 0
        if turn := save_after_epoch(config.save, epoch + 1, plan.epochs):
            save_turn(run, place, turn)
        if due_after_epoch(config.samples, epoch + 1):
            draw_turn(run, place, epoch_text(epoch + 1))
        if stops:
            return _stop(run, place, bar)
    save_turn(run, place, save_at_end(config.save))
    bar.close()


def _stop(run: Run, place: Place, bar: tqdm) -> None:
    """Ends a run that was interrupted, with a state to go on from."""
    folder = stop_state(run.config.save, place.step)
    if run.accelerator.is_main_process:
        save_state(folder, run.config.save.name, run.settings, state_of(run, place))
    bar.close()
    run.accelerator.wait_for_everyone()
    run.say(f"stopped after step {place.step}; the same command with --resume latest goes on (or --resume {folder})")


def _backward(
    run: Run, batch: Mapping, batches_done: int, first_item: int, batches_of_step: int, preserves: bool
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


def _update(run: Run) -> float:
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
