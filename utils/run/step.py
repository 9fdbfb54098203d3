"""One optimizer step: the gradient of its batches, then the update, unless something is not finite.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from utils.data.given_pictures import given_to_batch
from utils.interrupts import StopRequest
from utils.learning.conditions import loss_mask, predict, started
from utils.learning.flow_matching import add_noise, draw_generator, draw_uniforms, flow_loss, sigmas_of
from utils.preserve.old_prompts import Targets
from utils.run.finite import check_slice_is_finite, check_step_is_finite
from utils.run.outcome import Outcome, reads_late, take_back_unless_finite, values_before
from utils.run.run import Place, Run


def backward(run: Run, batch: Mapping, epoch: int, first_item: int, batches_of_step: int, preserves: bool) -> Tensor:
    """Adds the batch's share of its step's gradient; returns its shares of the loss and of the preservation loss.

    Random numbers are the entries' own (seed, epoch, entry): a resumed run repeats them, and so does one with the same
    entries in more batches or on more processes.
    """
    device, timesteps = run.accelerator.device, run.config.timesteps
    latents_BCFHW = batch["latents"]
    generators = [draw_generator(run.seed, epoch, entry) for entry in batch["entries"]]
    u_B = draw_uniforms(timesteps, generators, run.seed, first_item)
    sigma_B = sigmas_of(timesteps, u_B, tuple(latents_BCFHW.shape[-2:]))
    noise_BCFHW = torch.stack([torch.randn(latents_BCFHW.shape[1:], generator=own) for own in generators])
    given = given_to_batch(batch, run.config.i2v_share, run.seed, epoch)
    noisy_BCFHW, t_B, target_BCFHW = add_noise(latents_BCFHW, noise_BCFHW, sigma_B)
    # All of it before the forward: a copy between it and backward would have the host wait for the device.
    moved = (started(noisy_BCFHW, latents_BCFHW, given), t_B, target_BCFHW, sigma_B)
    noisy_BCFHW, t_B, target_BCFHW, sigma_B = (x.to(device, non_blocking=True) for x in moved)
    context = [text_SD.to(device, non_blocking=True) for text_SD in batch["t5"]]
    mask_B11HW = None if batch["mask"] is None else batch["mask"].to(device, non_blocking=True)
    targets = [Targets(noisy_BCFHW, sigma_B, t_B, context, target_BCFHW, given.to(device))]
    if preserves:
        of_prompts = [draw_generator(run.seed, "preserve", epoch, entry) for entry in batch["entries"]]
        targets += run.preserved.draw(of_prompts, device, first_item)
    losses = torch.zeros(2, device=device)
    for number, own in enumerate(targets):
        # One backward for each, so that one graph at a time is held.
        predicted_BCFHW = predict(run.model, own.noisy_BCFHW, own.t_B, own.context, own.given)
        # Reference predictions are pulled to as a whole.
        mask = loss_mask(own.given, own.noisy_BCFHW.shape[2], None if number else mask_B11HW)
        loss = flow_loss(predicted_BCFHW, own.velocity_BCFHW, own.sigma_B, timesteps.weighting, mask)
        loss = loss * own.share / batches_of_step
        run.scaler.scale(run.preserved.weight * loss if number else loss).backward()
        losses[min(number, 1)] += loss.detach()
    return losses


def update(run: Run, place: Place, losses: Tensor, stop: StopRequest) -> Outcome:
    """One optimizer step on the gradients of all processes, or none where a gradient or loss is not finite.

    Where outcomes are read late the device sees to that, and the host waits for nothing; anywhere else InputError.
    """
    if run.accelerator.num_processes > 1:
        run.trained.reduce_gradients()
    run.scaler.unscale_(run.optimizer)
    matrices = {name: own for name, own in run.trained.matrices.items() if own.difference.grad is not None}
    parameters = [matrix.difference for matrix in matrices.values()]
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    grad_norm = torch.linalg.vector_norm(norms)
    # Processes may be interrupted at different steps, and have to stop at the same one.
    means = run.accelerator.reduce(torch.cat([losses, losses.new_full((1,), float(stop.asked))]), "mean")
    numbers = torch.cat([means, grad_norm[None], norms])
    outcome = Outcome(place.step + 1, tuple(matrices), numbers, is_late=reads_late(run))
    if not outcome.is_late:
        check_step_is_finite(run, place, outcome)
    if run.debug:
        run.debug.before_update()
    torch.nn.utils.clip_grads_with_norm_(parameters, run.config.optimizer.max_grad_norm or math.inf, grad_norm)
    before = values_before(run.trained) if outcome.is_late else None
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.get_scale() >= scale:  # smaller: fp16 gradients overflowed, and the optimizer did not step
        run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    if outcome.is_late:
        outcome = take_back_unless_finite(run.trained, before, outcome)
    run.trained.write_back()
    if not outcome.is_late:
        check_slice_is_finite(run, place, outcome)
    if run.debug:
        run.debug.after_update()
    return outcome
