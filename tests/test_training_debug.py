"""--training_debug: its figures are those of plain recomputation, and each save is held against its base."""

import math
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CONFIG, run, write_inputs
from torch import nn

from utils import training, training_debug
from utils.learning.optimizers import OptimizerConfig, build_optimizer
from utils.run import preparing, turns
from utils.selective_finetune import attach_slice, slice_indices
from utils.training_debug import DRAW_EVERY, READ_EVERY, TrainingDebug, heat_map
from wan.model import WanModel

DEBUG = ("--mixed_precision", "bf16", "--training_debug")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("debug"))


@pytest.fixture
def folder(files):
    yield files
    for name in ("out", "logs"):
        shutil.rmtree(files / name, ignore_errors=True)


def two_blocks():
    """Linears as blocks, and a slice of 58 and 77 values in them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 16)])})
    return model, attach_slice(model, "0.3", 2)


def watched_step(debug, trained, lr=1e-3):
    debug.before_update()
    torch.optim.SGD(trained.parameters(), lr).step()
    trained.write_back()
    debug.after_update()


def rows_of(lines):
    """The cells of a table, by the name of their row."""
    return {line[:14].strip(): line[14:].split() for line in lines if line.startswith(" ")}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(next((folder / "logs").glob("*/*"))), {"images": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("optimizer", ["adamw", "AdamW8bit", "adafactor"])
def test_figures_are_those_of_plain_recomputation(optimizer):
    torch.manual_seed(0)
    model = WanModel(CONFIG).to(torch.bfloat16)
    trained = attach_slice(model, "0.3", 2)
    base, before = copies(model, trained)
    optimizer = build_optimizer(OptimizerConfig(optimizer, 2e-4, (), 1.0), trained.parameters())
    debug = TrainingDebug(trained, len(model.blocks), [])
    for step in (1, 2, 3):
        for parameter in trained.parameters():
            parameter.grad = torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.9)
        gradients = {name: matrix.difference.grad.clone() for name, matrix in trained.matrices.items()}
        debug.before_update()
        optimizer.step()
        trained.write_back()
        debug.after_update()
        debug.after_step(step, [])
        weights, after = copies(model, trained)
        check_figures(debug.recent_SQB[-1], gradients, before, after, base, weights)
        before = after


def copies(model, trained):
    """The weights in use, and the differences, by contract name."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, {name: matrix.difference.detach().clone() for name, matrix in trained.matrices.items()}


def check_figures(figures_QB, gradients, before, after, base, weights):
    for block, (gradient, update, moved, moved_in_use) in enumerate(figures_QB.T):
        names = [name for name in after if name.startswith(f"blocks.{block}.")]
        norms = [torch.cat([gradients[name] for name in names]), torch.cat([after[n] - before[n] for n in names])]
        found = torch.stack([gradient, update]).float()
        torch.testing.assert_close(found, torch.stack([values.norm() for values in norms]))
        assert moved == sum((after[name] != 0).sum() for name in names)
        assert moved_in_use == sum((weights[name] != base[name]).sum() for name in names)
        assert 0 < moved_in_use < moved


def test_a_run_logs_what_its_steps_did(folder):
    more = ("--gradient_accumulation_steps", "3", "--blocks_to_swap", "1", "--max_grad_norm", "0.01")
    run(folder, *DEBUG, *more, "--max_train_epochs", "3", "--logging_dir", str(folder / "logs"))
    found = events(folder)
    norms = {event.step: event.value for event in found.Scalars("grad_norm")}
    of_blocks = [{event.step: event.value for event in found.Scalars(f"debug_gradient/0{block}")} for block in (0, 1)]
    assert list(norms) == list(of_blocks[0]) == list(range(1, 7))
    for step, norm in norms.items():
        assert of_blocks[0][step] ** 2 + of_blocks[1][step] ** 2 == pytest.approx(norm**2, rel=1e-4)
    base, saved = load_file(folder / "base.safetensors"), load_file(folder / "out" / "one.safetensors")
    for block in (0, 1):
        names = [name for name in base if name.startswith(f"blocks.{block}.")]
        changed = sum((base[name] != saved[name]).sum() for name in names)
        count = sum(len(slice_indices(n, base[n].shape, "0.1", 2)) for n in names if base[n].dim() == 2)
        share = found.Scalars(f"debug_moved_in_use/0{block}")[-1].value
        assert share == pytest.approx(changed.item() / count, abs=2e-2)
        assert found.Histograms(f"debug_log10_of_update/0{block}")[-1].histogram_value.num == pytest.approx(
            count, abs=9
        )


def test_tensorboard_has_a_heat_map_a_chart_and_histograms_of_each_quantity(folder):
    run(folder, *DEBUG, "--logging_dir", str(folder / "logs"), "--save_every_n_steps", "4")
    found = events(folder)
    quantities = ("gradient", "update", "moved", "moved_in_use")
    scalars = {f"debug_{quantity}/{block:02d}" for quantity in quantities for block in (0, 1)}
    assert scalars <= set(found.Tags()["scalars"])
    assert set(found.Tags()["images"]) == {f"debug/{quantity}" for quantity in quantities}
    assert [image.step for image in found.Images("debug/gradient")] == [4, 8, 10]
    layout = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert all(f"^debug_{quantity}/".encode() in layout for quantity in quantities)


def test_off_it_costs_no_call(folder, monkeypatch):
    monkeypatch.setattr(preparing, "TrainingDebug", None)
    assert not any("gradient norm" in line for line in run(folder))
    with pytest.raises(TypeError, match="not callable"):
        run(folder, "--training_debug", "--overwrite")


def test_the_main_process_alone_watches(folder, monkeypatch):
    monkeypatch.setattr(preparing, "TrainingDebug", None)
    monkeypatch.setattr(training.Accelerator, "is_main_process", False)
    run(folder, "--training_debug")


def test_watching_changes_nothing_in_the_run(folder):
    run(folder, *DEBUG)
    watched = load_file(folder / "out" / "one.safetensors")
    run(folder, *DEBUG[:2], "--overwrite")
    alone = load_file(folder / "out" / "one.safetensors")
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def test_steps_between_readings_wait_for_no_device():
    _, trained = two_blocks()
    debug = TrainingDebug(trained, 2, [])
    debug.seen = READ_EVERY
    # Nothing can be read from the meta device: whatever waits for a value raises.
    for name in ("updates", "no_gradient", "block_of_matrix"):
        there = getattr(debug, name)
        setattr(debug, name, [t.to("meta") for t in there] if isinstance(there, list) else there.to("meta"))
    for matrix in debug.matrices:
        matrix.start = matrix.start.to("meta")
        matrix.difference = nn.Parameter(matrix.difference.detach().to("meta"))
        matrix.difference.grad = torch.zeros_like(matrix.difference)
    for step in range(READ_EVERY + 1, 2 * READ_EVERY):
        debug.before_update()
        debug.after_update()
        assert debug.after_step(step, []) == []
    debug.before_update()
    debug.after_update()
    with pytest.raises(NotImplementedError, match="meta"):
        debug.after_step(2 * READ_EVERY, [])


def test_every_step_is_kept_until_it_is_read():
    _, trained = two_blocks()
    debug = TrainingDebug(trained, 2, [])
    for step in range(41, 72):
        for parameter in trained.parameters():
            parameter.grad = torch.full_like(parameter, step)
        watched_step(debug, trained)
        debug.after_step(step, [])
    assert (debug.step, debug.history.steps) == (70, 30)
    norms = torch.tensor([[step * count**0.5 for count in debug.counts] for step in range(41, 71)])
    torch.testing.assert_close(debug.history.means()[:, 0].float(), norms)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Histogram=lambda np_histogram: np_histogram))


def test_a_heat_map_of_a_long_run_shows_the_means_of_all_its_steps(wandb, monkeypatch):
    drawn = {}
    monkeypatch.setattr(training_debug, "heat_map", lambda *given: drawn.update({given[1]: given}) or heat_map(*given))
    _, trained = two_blocks()
    debug = TrainingDebug(trained, 2, [])
    for step in range(1, 1031):
        for parameter in trained.parameters():
            parameter.grad = torch.full_like(parameter, step % 7)
        watched_step(debug, trained)
        debug.after_step(step, [])
    debug.after_save(None, 1030, [FakeTracker("wandb")])
    steps = torch.arange(1, 1031)
    means = torch.stack([part.double().mean() for part in (steps % 7).split(4)])
    gradient_BC, _, _, *outer = drawn["gradient norm"]
    torch.testing.assert_close(gradient_BC, debug.counts.sqrt().double()[:, None] * means, rtol=1e-6, atol=0)
    update_BC = 1e-3 * gradient_BC / debug.weight_norms[:, None]
    torch.testing.assert_close(drawn["update norm / weight norm"][0], update_BC, rtol=1e-3, atol=0)
    assert (drawn["share of values that moved, fp32"][0] == 1).all()
    assert outer == ["steps 1-4", "steps 1029-1030"]
    assert len(debug.recent_SQB) == READ_EVERY and debug.history.sums_CQR.nbytes == 2 * 16384


def test_blocks_without_gradient_are_named():
    model, trained = two_blocks()
    debug = TrainingDebug(trained, 2, [])
    model["blocks"][0](torch.ones(3, 12)).sum().backward()
    watched_step(debug, trained)
    lines = debug.after_step(1, [])
    assert lines[-1] == "WARNING: no gradient in the last 1 steps in block 1"
    assert rows_of(lines)["block 1"] == ["0.000e+00", "0.000e+00", "0.00%", "0.00%"]
    model["blocks"][1](torch.ones(3, 16)).sum().backward()
    watched_step(debug, trained)
    debug.seen = READ_EVERY
    assert not any("WARNING" in line for line in debug.after_step(2, []))


def test_blocks_without_a_slice_are_named_and_have_no_figures():
    model, _ = two_blocks()
    trained = attach_slice(model, "0.3", 2, linears={"blocks.1": model["blocks"][1]})
    debug = TrainingDebug(trained, 3, [])
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    watched_step(debug, trained)
    tracker = FakeTracker("tensorboard")
    lines = debug.after_step(1, [tracker])
    assert lines[-1] == "the slice has no values in blocks 0, 2"
    assert rows_of(lines)["block 2"] == ["-"] * 4 and rows_of(lines)["block 1"][2] == "100.00%"
    assert {tag[-2:] for tag in tracker.logged} == {"01"}
    shown_QB = (debug.history.means() / debug.shown_in_QB)[0]
    assert shown_QB[:, [0, 2]].isnan().all() and shown_QB[:, 1].isfinite().all()


def test_neighbours_of_many_blocks_share_a_row():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 16 + 16 * (i % 2)) for i in range(25)])})
    trained = attach_slice(model, "0.5", 1)
    debug = TrainingDebug(trained, 25, [])
    for number, parameter in enumerate(trained.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    starts = [matrix.start.clone() for matrix in debug.matrices]
    watched_step(debug, trained, lr=1.0)
    rows = rows_of(debug.after_step(1, []))
    assert list(rows)[1:] == [f"blocks {i}-{i + 2}" for i in range(0, 24, 3)] + ["block 24", "all"]
    gradient = torch.cat([parameter.grad for parameter in list(trained.parameters())[3:6]]).norm()
    weight = torch.cat(starts[3:6]).norm()
    assert rows["blocks 3-5"] == [f"{gradient:.3e}", f"{gradient / weight:.3e}", "100.00%", "100.00%"]
    assert rows["blocks 0-2"][2] == f"{192 / 256:.2%}"  # block 0 has no gradient, and 64 of the 256 values


def test_wandb_is_given_pictures_and_histograms(wandb):
    _, trained = two_blocks()
    debug = TrainingDebug(trained, 2, [])
    for parameter in trained.parameters():
        parameter.grad = (torch.arange(len(parameter)) >= 5).float()
    for step in range(1, DRAW_EVERY + 1):
        watched_step(debug, trained, lr=2e-3)
        debug.after_step(step, [tracker := FakeTracker("wandb")])
    counts, edges = tracker.logged["debug_log10_of_update/00"]
    assert counts.sum() == debug.counts[0] - 5  # those that moved
    assert edges[counts.argmax()] < math.log10(2e-3) < edges[counts.argmax() + 1]
    assert tracker.logged["debug/update"][0].shape[2] == 3


class FakeTracker:
    """Keeps what a tracker is given, by tag; takes TensorBoard's layout."""

    def __init__(self, name):
        self.name, self.logged = name, {}
        self.log = self.log_images = lambda values, step: self.logged.update(values)
        self.tracker = types.SimpleNamespace(add_custom_scalars=lambda layout: None)


def test_a_run_ends_with_a_save_that_is_wrong_and_keeps_it_aside(folder, monkeypatch):
    write_files = turns.write_files

    def save_wrongly(files, *more):
        lines, path = write_files(files, *more), files["checkpoint"]
        if path.stem == "one-000001":
            return lines
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        return lines

    monkeypatch.setattr(turns, "write_files", save_wrongly)
    keep = ("--save_every_n_epochs", "1", "--save_last_n_epochs", "1")
    with pytest.raises(RuntimeError, match=r"ERROR: one-000002.safetensors differs .* 1 values, the first is \S+ \["):
        run(folder, *DEBUG, *keep, "--max_train_epochs", "3")
    # What the wrong one would have replaced is still there.
    found = sorted(path.name for path in (folder / "out").iterdir())
    assert found == ["one-000001.safetensors", "one-000002.safetensors.wrong"]


def test_each_save_has_its_table_and_its_counts_on_the_console(folder):
    lines = run(folder, *DEBUG, "--save_every_n_epochs", "1")
    tables = [int(line.split()[1]) for line in lines if line.strip().startswith("step ")]
    assert tables == [1, 5, 10]
    base = load_file(folder / "base.safetensors")
    for name in ("one-000001", "one"):
        saved = load_file(folder / "out" / f"{name}.safetensors")
        changed = sum((base[key] != saved[key]).sum().item() for key in base)
        told = f"{name}.safetensors against --dit: {changed:,} of 4,908 values in the slice changed, none outside it"
        assert told in lines


def test_a_resumed_run_counts_what_moved_from_the_base_on(folder):
    run(folder, *DEBUG, "--save_state", "--max_train_epochs", "1")
    resumed = run(folder, *DEBUG, "--resume", str(folder / "out" / "one-state"), "--learning_rate", "1e-2")
    first = rows_of(resumed)
    assert any(line.strip().startswith("step 6 ") for line in resumed) and float(first["all"][3][:-1]) > 99
