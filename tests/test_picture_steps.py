"""Training steps of models that start from pictures: the loss in plain arithmetic, gradients in every mode."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeDevice
from tiny_models import MODELS, tiny_batch, tiny_model, tiny_step

from utils.data.given_pictures import given_to_batch
from utils.learning.flow_matching import draw_generator
from utils.preserve.answers_file import Answer, OldPrompt, Pictures
from utils.preserve.old_prompts import Preservation
from utils.run.opening_lines import first_frame_line, input_bytes
from utils.run.step import backward
from utils.selective_finetune import attach_slice, block_linears, slice_indices
from utils.swap.block_inputs import BlockInputs
from utils.swap.placement import checkpoint_blocks, place_model
from utils.swap.plan import SwapConfig

KINDS = list(MODELS)


def drawn(batch, seed=3, epoch=0):
    """u and the noise of each entry, drawn as a step draws them."""
    generators = [draw_generator(seed, epoch, entry) for entry in batch["entries"]]
    sigma_B = torch.cat([torch.rand(1, generator=own, dtype=torch.float64) for own in generators]).float()
    return sigma_B, torch.stack([torch.randn(batch["latents"].shape[1:], generator=own) for own in generators])


def loss_by_hand(model, batch, starts=(False, False)):
    """The mean of each sample's error over the frames that it predicts, with its mask; one sample at a time."""
    losses, (sigma_B, noise_BCFHW) = [], drawn(batch)
    for number, (sigma, noise, x0) in enumerate(zip(sigma_B, noise_BCFHW, batch["latents"], strict=True)):
        noisy, first = (1 - sigma) * x0 + sigma * noise, int(starts[number])
        noisy[:, :first] = x0[:, :first]
        t = torch.full((1, x0.shape[1], x0[0, 0].numel() // 4), 1000 * sigma.item())
        t[:, :first] = 0
        given = [None if batch[key] is None else batch[key][number : number + 1] for key in ("y", "clip")]
        predicted = model(noisy[None], t.flatten(1) if any(starts) else t[0, 0, :1], [batch["t5"][number]], *given)[0]
        error = (predicted - (noise - x0)).square()[:, first:]
        weights = torch.ones_like(error) if batch["mask"] is None else batch["mask"][number].expand_as(error)
        losses.append((weights * error).sum() / weights.sum())
    return torch.stack(losses).mean()


def step_of(model, batch, i2v_share=0.0, batches_of_step=1, epoch=0):
    run = tiny_step(model, i2v_share)
    return backward(run, batch, epoch, 0, batches_of_step, preserves=False)[0]


def trainable(task):
    model = tiny_model(task)
    attach_slice(model, "0.05", 3)
    return model


@pytest.mark.parametrize("task", KINDS)
def test_the_loss_is_that_of_the_batchs_own_pictures(task):
    batch = tiny_batch(task)
    torch.testing.assert_close(step_of(trainable(task), batch), loss_by_hand(tiny_model(task), batch))


@pytest.mark.parametrize("masked", [False, True])
def test_clean_first_frames_are_at_timestep_0_and_leave_the_loss(masked):
    batch = tiny_batch("ti2v-5B", frames=3)
    if masked:
        batch["mask"] = torch.rand(2, 1, 1, 2, 4, generator=torch.Generator().manual_seed(2))
    model = tiny_model("ti2v-5B")
    for share, starts in ((1.0, (True, True)), (0.0, (False, False))):
        loss = step_of(trainable("ti2v-5B"), batch, share)
        torch.testing.assert_close(loss, loss_by_hand(model, batch, starts))


def test_a_mixed_batch_has_both_kinds_of_loss():
    share = 0.5
    epoch = next(epoch for epoch in range(50) if starts_of(share, tiny_batch("ti2v-5B"), epoch) == [True, False])
    batch = tiny_batch("ti2v-5B")
    run = tiny_step(trainable("ti2v-5B"), 0.5)
    mixed = backward(run, batch, epoch, 0, 1, preserves=False)[0]
    halves = [step_of(trainable("ti2v-5B"), batch, share, epoch=epoch) for share in (0.0, 1.0)]
    assert min(halves) < mixed < max(halves)


def starts_of(share, batch, epoch, seed=3):
    starts = given_to_batch(batch, share, seed, epoch).starts_clean_B
    return None if starts is None else starts.tolist()


def test_the_share_of_the_clips_that_start_clean_is_drawn_for_each_entry_and_epoch():
    batch, share = tiny_batch("ti2v-5B", entries=tuple(range(400))), 0.3
    first, second = (starts_of(share, batch, epoch) for epoch in range(2))
    assert 90 < sum(first) < 150 and first != second and first == starts_of(share, batch, 0)
    alone = {**batch, "entries": batch["entries"][7:], "latents": batch["latents"][7:]}
    assert starts_of(share, alone, 0) == first[7:]


def test_pictures_never_start_clean():
    assert starts_of(1.0, tiny_batch("ti2v-5B", frames=1), 0) is None
    batch = tiny_batch("ti2v-5B", frames=1)
    torch.testing.assert_close(step_of(trainable("ti2v-5B"), batch, 1.0), loss_by_hand(tiny_model("ti2v-5B"), batch))


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
@pytest.mark.parametrize("key", ["y", "clip"])
def test_another_picture_is_another_loss(task, key):
    batch = tiny_batch(task)
    other = {**batch, key: batch[key].flip(0)}
    assert abs(step_of(trainable(task), batch) - step_of(trainable(task), other)) > 1e-4


@pytest.mark.parametrize("swapped", [0, 2])
@pytest.mark.parametrize("checkpointed", ["no", "yes", "offloaded"])
@pytest.mark.parametrize("task", KINDS)
def test_accumulated_gradients_equal_those_of_whole_weights_in_every_mode(task, checkpointed, swapped):
    model, batches = tiny_model(task), [tiny_batch(task, frames, seed=frames) for frames in (2, 3)]
    assert starts_of(0.5, batches[0], 1) == [True, False]
    whole = copy.deepcopy(model)
    expected = {f"{name}.weight": linear.weight.requires_grad_(True) for name, linear in block_linears(whole).items()}
    trained = attach_slice(model, "0.05", 3)
    if checkpointed != "no":
        checkpoint_blocks(model, BlockInputs(2, "cpu", FakeDevice()) if checkpointed == "offloaded" else None)
    place_model(model, "cpu", SwapConfig(swapped), trained, backend=FakeDevice() if swapped else None)
    for own in (whole, model):
        for batch in batches:
            step_of(own, batch, i2v_share=0.5 if task == "ti2v-5B" else 0.0, batches_of_step=2, epoch=1)
    for name, matrix in trained.matrices.items():
        own = expected[name].grad.flatten()[slice_indices(name, expected[name].shape, "0.05", 3)]
        torch.testing.assert_close(matrix.difference.grad, own, rtol=1e-4, atol=1e-7)


def preserved(task, starts=False):
    """One old prompt with one prediction, at what `tiny_batch` gives."""
    batch = tiny_batch(task, entries=(0,), seed=9)
    given = None if batch["y"] is None else Pictures(batch["y"][0], None if batch["clip"] is None else batch["clip"][0])
    answer = Answer(batch["latents"][0], 600.0, torch.randn_like(batch["latents"][0]), given, starts)
    return Preservation((OldPrompt("old", None, (answer,), batch["t5"][0]),), (), 1, 2.0, 10**9), answer, batch


@pytest.mark.parametrize(("task", "starts"), [*((task, False) for task in KINDS), ("ti2v-5B", True)])
def test_reference_predictions_are_pulled_to_at_their_own_pictures(task, starts):
    torch.manual_seed(4)
    kept, answer, old = preserved(task, starts)
    run = tiny_step(trainable(task), preserved=kept)
    t = torch.full((1, 2, 2), 600.0)
    t[:, : int(starts)] = 0
    predicted = tiny_model(task)(
        answer.noisy_CFHW[None], t.flatten(1) if starts else t[0, 0, :1], old["t5"], old["y"], old["clip"]
    )
    expected = (predicted[0] - answer.velocity_CFHW).square()[:, int(starts) :].mean()
    pulled = backward(run, tiny_batch(task), 0, 0, 1, preserves=True)[1]
    torch.testing.assert_close(pulled, expected)


@pytest.mark.parametrize("task", KINDS)
def test_the_memory_of_a_blocks_input_is_what_blocks_get(task):
    model, sizes, batch = trainable(task), [], tiny_batch(task, frames=3)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].nbytes))
    step_of(model, batch, i2v_share=1.0 if task == "ti2v-5B" else 0.0)
    dataset = SimpleNamespace(
        items=[SimpleNamespace(latent_shape=tuple(latents.shape)) for latents in batch["latents"]]
    )
    assert set(sizes) == {input_bytes(MODELS[task], torch.float32, dataset, [(0, 1)])}


@pytest.mark.parametrize(
    ("share", "frames", "said"),
    [(0.0, (3, 1), None), (0.5, (1, 1), None), (0.5, (3, 3, 1), "50 % of the showings of 2 clips")],
)
def test_a_run_says_what_trains_as_image_to_video(share, frames, said):
    line = first_frame_line(share, [SimpleNamespace(latent_shape=(48, count, 2, 2)) for count in frames])
    assert line is None if said is None else line.startswith(f"{said} train as image-to-video")
