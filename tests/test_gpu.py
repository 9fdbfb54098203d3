"""The same numbers on a CUDA device: slices, swapped blocks, 8-bit optimizers, fp16. Skipped where there is none."""

import copy
import functools
from dataclasses import replace

import pytest
import test_musubi_network as musubi
import test_picture_models as pictures
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from test_selective_finetune import TINY, cut, tiny_model
from test_training_debug import events, rows_of
from tiny_models import MODELS, tiny_batch, tiny_step
from tiny_models import tiny_model as picture_model
from tiny_run import run, write_dataset, write_dit

from utils import training
from utils.learning.conditions import Conditioning, predict
from utils.learning.optimizers import OptimizerConfig, build_optimizer
from utils.run import readings
from utils.run import step as run_step
from utils.run.step import backward
from utils.selective_finetune import attach_slice, block_linears
from utils.swap.backend import CudaBackend
from utils.swap.block_inputs import BlockInputs
from utils.swap.host_store import LockedMemory
from utils.swap.placement import checkpoint_blocks, place_model
from utils.swap.plan import SwapConfig
from wan.compiling import compiled_pointwise
from wan.model import use_pointwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(
    device,
    blocks_to_swap=0,
    dtype=torch.bfloat16,
    optimizer="adamw",
    steps=3,
    offload=False,
    swap=None,
    compiled=False,
):
    """Losses and differences (on the CPU) of a few steps on `device`."""
    model = tiny_model(dtype)
    if compiled:
        use_pointwise(model, compiled_pointwise(model.config, dtype, torch.device(device)))
    trained = attach_slice(model, "0.05", 3, device=device)
    checkpoint_blocks(model, BlockInputs(len(model.blocks), torch.device(device)) if offload else None)
    place_model(model, device, replace(swap or SwapConfig(), blocks_to_swap=blocks_to_swap), trained)
    steps_taken = build_optimizer(OptimizerConfig(optimizer, 1e-3), trained.parameters())
    losses = []
    for step in range(steps):
        loss = loss_of(model, step, device)
        loss.backward()
        steps_taken.step()
        steps_taken.zero_grad()
        trained.write_back()
        losses.append(loss.item())
    return losses, [parameter.detach().cpu() for parameter in trained.parameters()]


def loss_of(model, seed, device="cuda"):
    draw = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(2, 4, 2, 6, 8, generator=draw).to(device) for _ in range(2))
    context = [torch.randn(n, TINY.text_dim, generator=draw).to(device) for n in (3, 7)]
    return (model(x, torch.tensor([300.0, 800.0], device=device), context) - target).square().mean()


def same(one, other):
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_a_slice_trains_on_the_gpu_as_on_the_cpu():
    losses, differences = train("cuda", dtype=torch.float32)
    expected_losses, expected = train("cpu", dtype=torch.float32)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    # Adam's first steps are signs of gradients: only near-zero gradients may differ.
    moved = torch.cat(differences) - torch.cat(expected)
    assert (moved.abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("blocks_to_swap", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_swapped_blocks_train_bit_for_bit_like_resident_ones(blocks_to_swap, optimizer):
    assert same(train("cuda", blocks_to_swap, optimizer=optimizer), train("cuda", optimizer=optimizer))


@pytest.mark.parametrize("host_weights", ["pinned", "staged"])
@pytest.mark.parametrize("ring_blocks", [1, 2])
def test_every_store_and_ring_trains_bit_for_bit_over_many_steps(host_weights, ring_blocks):
    swap = SwapConfig(ring_blocks=ring_blocks, host_weights=host_weights)
    assert same(train("cuda", 3, swap=swap, steps=30), train("cuda", steps=30))


def test_compiled_functions_train_as_plain_ones_and_with_swapped_blocks_bit_for_bit():
    compiled = train("cuda", compiled=True)
    assert same(train("cuda", 3, compiled=True), compiled)
    losses, differences = train("cuda", dtype=torch.float32, compiled=True)
    expected_losses, expected = train("cuda", dtype=torch.float32)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    moved = torch.cat(differences) - torch.cat(expected)
    assert (moved.abs() < 1e-4).float().mean() > 0.99


def test_block_inputs_on_the_host_change_no_bit():
    assert same(train("cuda", 3, offload=True, steps=10), train("cuda", steps=10))


def test_swapped_weights_stay_on_the_host():
    model = tiny_model(torch.bfloat16)
    trained = attach_slice(model, "0.05", 3, device="cuda")
    placement = place_model(model, "cuda", SwapConfig(2, ring_blocks=1), trained)
    kinds = {linear.weight.device.type for linear in (model.blocks[0].ffn[0], model.blocks[2].ffn[0])}
    assert kinds == {"cpu"} and placement.streamed_blocks == 3
    assert model.blocks[2].ffn[0].bias.device.type == "cuda" and model.head.head.weight.device.type == "cuda"
    assert all(parameter.device.type == "cuda" for parameter in trained.parameters())


def test_the_wait_for_a_copy_is_told_in_seconds_once_it_is_over():
    backend = CudaBackend(torch.device("cuda"))
    source, target = torch.empty(1 << 30, dtype=torch.uint8).pin_memory(), torch.empty(1 << 30, dtype=torch.uint8)
    target = target.to("cuda")
    began = backend.moment()
    backend.wait(backend.copy(target, source, backend.mark()))
    ended = backend.moment()
    assert backend.seconds(began, ended) is None  # 1 GiB takes milliseconds, and the host has waited for nothing
    torch.cuda.synchronize()
    assert 1e-3 < backend.seconds(began, ended) < 10


def test_page_locked_memory_is_seen_as_such_and_a_failure_leaves_no_error():
    backend = CudaBackend(torch.device("cuda"))
    memory = LockedMemory(backend)
    region = memory.region(1 << 20)
    assert not memory.failed and region.is_pinned()
    assert not backend.page_lock(region)  # it is locked already
    assert torch.ones(4, device="cuda").sum().item() == 4
    memory.release()
    assert not region.is_pinned()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_slice_has_the_gradient_of_whole_weights(dtype, checkpointed):
    model = tiny_model().to("cuda")
    whole = copy.deepcopy(model)
    for linear in block_linears(whole).values():
        linear.weight.requires_grad_(True)
    trained = attach_slice(model, "0.05", 3)
    if checkpointed:
        checkpoint_blocks(model)
    for either in (whole, model):
        with torch.autocast("cuda", dtype):
            loss = loss_of(either, 1)
        (1024 * loss).backward()  # what fp16 needs of loss scaling
    for name, matrix in trained.matrices.items():
        grad = whole.get_parameter(name).grad
        expected = cut(grad.cpu(), name, "0.05", 3)
        found = matrix.difference.grad
        assert found.dtype == torch.float32 and found.device.type == "cuda" and expected.norm() > 0
        assert (found.cpu() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("task", list(MODELS))
def test_models_that_start_from_pictures_have_the_cpus_gradients_with_all_blocks_swapped(task):
    found = []
    for device, swapped in (("cpu", 0), ("cuda", 2)):
        model = picture_model(task)
        trained = attach_slice(model, "0.05", 3, device=device)
        checkpoint_blocks(model, BlockInputs(2, torch.device(device)) if swapped else None)
        place_model(model, device, SwapConfig(swapped), trained)
        share = 0.5 if task == "ti2v-5B" else 0.0
        backward(tiny_step(model, share, device=device), tiny_batch(task, frames=3), 1, 0, 1, preserves=False)
        found.append(torch.cat([parameter.grad.flatten().cpu() for parameter in trained.parameters()]))
    assert (found[1] - found[0]).norm() < 1e-3 * found[0].norm()


@pytest.fixture
def accelerator_on_gpu():
    """The device is the process's own state, which tests on the CPU may have set."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run_folder(tmp_path, accelerator_on_gpu):
    write_dit(tmp_path / "base.safetensors", torch.float32)
    write_dataset(tmp_path)
    return tmp_path


def use_scale(monkeypatch, initial, backoff):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=initial, backoff_factor=backoff)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


SGD = ("--optimizer_type", "SGD", "--learning_rate", "1")


def test_fp16_with_loss_scaling_moves_the_slice_as_float32_does(run_folder, monkeypatch):
    use_scale(monkeypatch, 2.0**12, 0.5)
    moved, base = [], load_file(run_folder / "base.safetensors")
    for precision in ("no", "fp16"):
        run(run_folder, *SGD, "--mixed_precision", precision, "--output_name", precision)
        saved = load_file(run_folder / "out" / f"{precision}.safetensors")
        moved.append(torch.cat([(saved[name] - base[name]).flatten() for name in base]))
    assert 0 < (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


def test_a_step_whose_gradients_overflow_in_fp16_moves_nothing_and_the_next_one_does(run_folder, monkeypatch):
    use_scale(monkeypatch, 2.0**40, 2.0**-28)
    more = ("--mixed_precision", "fp16", "--lr_scheduler", "linear", "--training_debug", "--save_every_n_steps", "2")
    lines = run(run_folder, *SGD, *more, "--logging_dir", str(run_folder / "logs"))
    tables = [number for number, line in enumerate(lines) if line.strip().startswith("step ")]
    first, second = (rows_of(lines[begin : begin + 4])["all"] for begin in tables[:2])
    assert first[0] in ("inf", "nan") and first[1:] == ["0.000e+00", "0.00%", "0.00%"]
    assert float(second[0]) > 0 and float(second[2][:-1]) > 90
    rates = [event.value for event in events(run_folder).Scalars("lr/slice")]
    assert rates[0] == rates[1] > rates[2]


@pytest.mark.parametrize("base", musubi.BASES)
def test_musubi_tuner_trains_a_slice_on_the_gpu_as_on_the_cpu(base, tmp_path, accelerator_on_gpu, monkeypatch):
    save_file(tiny_model(torch.bfloat16).state_dict(), tmp_path / "base.safetensors")
    untrained = musubi.fake_trainer(tmp_path, base, steps=0)[-1]
    expected = musubi.fake_trainer(tmp_path, base, steps=10)
    reset_accelerate()
    monkeypatch.setattr(musubi, "Accelerator", lambda cpu, **more: Accelerator(**more))
    monkeypatch.setattr(musubi, "tiny_model", lambda dtype: tiny_model(dtype).to("cuda"))
    monkeypatch.setattr(musubi, "loss_of", loss_of)
    losses = musubi.fake_trainer(tmp_path, base, steps=10)
    assert losses == pytest.approx(expected, rel=5e-3)
    # The last one is of a pass without gradients: a lost update would leave it what it was.
    assert abs(losses[-1] - expected[-1]) < 0.3 * abs(untrained - expected[-1])


def test_a_clean_first_frame_makes_no_wait_for_the_gpu():
    model = pictures.tiny_model(pictures.PER_TOKEN).cuda()
    x, t, context = pictures.tiny_inputs(pictures.PER_TOKEN)
    x, t_B, context = x.cuda(), t[:, -1].cuda(), [tokens.cuda() for tokens in context]
    given = Conditioning(starts_clean_B=torch.tensor([True, False]).cuda())
    with torch.no_grad():
        expected = predict(model, x, t_B, context, given)  # the first call sets libraries up
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = predict(model, x, t_B, context, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


def without_waits(update):
    """An error where the host waits for the device, if it is to read late."""

    def watched(*given):
        torch.cuda.set_sync_debug_mode("error" if run_step.reads_late(given[0]) else "default")
        try:
            return update(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


def test_a_step_is_launched_without_a_wait_and_has_the_numbers_that_it_has_when_read_at_once(run_folder, monkeypatch):
    log_step, told = readings.log_step, {}
    monkeypatch.setattr(training, "update", without_waits(training.update))
    for name, late in (("late", run_step.reads_late), ("at_once", lambda run: False)):
        told[name] = []
        monkeypatch.setattr(run_step, "reads_late", late)
        monkeypatch.setattr(
            readings, "log_step", lambda *own, to=told[name]: to.append((own[1].step, own[2])) or log_step(*own)
        )
        run(run_folder, "--mixed_precision", "bf16", "--output_name", name)
    late, at_once = (load_file(run_folder / "out" / f"{name}.safetensors") for name in told)
    assert len(told["late"]) == 10 and told["late"] == told["at_once"]
    assert all(torch.equal(late[name], values) for name, values in at_once.items())
