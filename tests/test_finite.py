"""What is not finite ends a run before it reaches the slice or a file, and the message names the cause."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import run, write_inputs

from utils import training
from utils.learning.flow_matching import flow_loss
from utils.run import preparing, readings, step
from wan.errors import InputError

SAVING = ("--save_every_n_steps", "2", "--save_state")


@pytest.fixture
def folder(tmp_path):
    return write_inputs(tmp_path)


def losses_that(monkeypatch, change, at):
    """From its call number `at` on, `change` is applied to each loss."""
    calls = []

    def changed(*given):
        calls.append(given)
        loss = flow_loss(*given)
        return change(loss, given[0]) if len(calls) >= at else loss

    monkeypatch.setattr(step, "flow_loss", changed)


def with_nan_gradient(loss, predicted):
    """A loss that is finite while its gradient is not."""
    return loss + (predicted.sum() * 0).sqrt()


def finite_files(folder):
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    for path in folder.rglob("state.pt"):
        state = torch.load(path, weights_only=True)["state"]
        assert all(tensor.isfinite().all() for tensor in state["trained"].values()), path
    return sorted(path.name for path in folder.glob("*"))


def test_a_gradient_that_is_not_finite_stops_the_run_before_that_steps_saves(folder, monkeypatch):
    losses_that(monkeypatch, with_nan_gradient, at=4)  # in the second of the steps that save
    expected = (
        r"the gradient of blocks\.0\.\S+, .* and \d+ more matrices of step 4 is not finite: lower --learning_rate"
    )
    with pytest.raises(InputError, match=expected + r".* the state of step 2 is good: .*one-step00000002-state"):
        run(folder, *SAVING)
    assert finite_files(folder / "out") == ["one-step00000002-state", "one-step00000002.safetensors"]


def test_a_loss_that_is_not_finite_stops_the_run(folder, monkeypatch):
    losses_that(monkeypatch, lambda loss, _: loss * float("inf"), at=3)
    with pytest.raises(InputError, match=r"the loss of step 3 is not finite: lower --learning.* no state before it"):
        run(folder)
    assert finite_files(folder / "out") == []


def test_a_step_that_makes_the_slice_infinite_saves_nothing(folder, monkeypatch):
    monkeypatch.setattr(preparing, "build_optimizer", lambda config, own: torch.optim.SGD(own, lr=float("inf")))
    with pytest.raises(InputError, match=r"step 1 made the slice infinite or NaN: lower --learning_rate"):
        run(folder, "--save_every_n_steps", "1")
    assert finite_files(folder / "out") == []


def test_the_first_step_does_not_blame_the_learning_rate(folder, monkeypatch):
    losses_that(monkeypatch, lambda loss, _: loss * float("nan"), at=1)
    with pytest.raises(InputError, match="the loss of step 1 is not finite, before anything was trained") as caught:
        run(folder)
    assert "--learning_rate" not in str(caught.value)


@pytest.mark.parametrize("name", ["head.head.weight", "blocks.1.ffn.0.weight"])
def test_a_base_that_holds_nan_is_named(folder, name):
    weights = load_file(folder / "base.safetensors")
    weights[name].view(-1)[:] = float("nan")
    save_file(weights, folder / "base.safetensors", {"num_heads": "4", "text_len": "8"})
    with pytest.raises(InputError, match=rf"base\.safetensors holds NaN or infinite values in {name}"):
        run(folder)
    assert finite_files(folder / "out") == []


def run_with_scaler(folder, monkeypatch, gradient):
    """Trains with the scaler of fp16, which overflows where `gradient` says; the learning rates of its steps."""
    scaler, schedule = torch.amp.GradScaler("cpu", init_scale=4.0), ("--lr_scheduler", "linear")
    monkeypatch.setattr(training.torch.amp, "GradScaler", lambda *_, **__: scaler)
    rates = []
    monkeypatch.setattr(readings, "log_step", lambda run, place, values, bar: rates.append(values["lr/slice"]))
    losses_that(monkeypatch, gradient, at=1)
    run(folder, *schedule)
    return rates


def test_an_overflow_that_the_scaler_handles_skips_the_step_and_its_learning_rate(folder, monkeypatch):
    steps = []

    def overflow_once(loss, predicted):
        steps.append(loss)
        return with_nan_gradient(loss, predicted) if len(steps) == 2 else loss

    rates = run_with_scaler(folder, monkeypatch, overflow_once)
    assert len(rates) == 10 and rates[1] == rates[2] and len(set(rates)) == 9


def test_an_overflow_that_no_smaller_scale_ends_stops_the_run(folder, monkeypatch):
    with pytest.raises(InputError, match=r"the gradient of .* of step 3 is not finite"):
        run_with_scaler(folder, monkeypatch, with_nan_gradient)


def test_a_resumed_run_continues_with_the_scale_that_its_state_has(folder, monkeypatch):
    scaler, made, calls = torch.amp.GradScaler, [], []

    def make(init_scale):
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda *_, **__: made.append(scaler("cpu", init_scale)) or made[-1]
        )

    def overflow_once(loss, predicted):
        calls.append(loss)
        return with_nan_gradient(loss, predicted) if len(calls) == 2 else loss

    losses_that(monkeypatch, overflow_once, at=1)
    make(4.0)
    run(folder, "--save_every_n_steps", "3", "--save_state")
    make(64.0)
    run(folder, "--save_every_n_steps", "3", "--save_state", "--resume", str(folder / "out" / "one-step00000003-state"))
    assert made[-1].get_scale() == 2.0
