"""The host reads the outcome of a step while the next one runs, with the same numbers, files and errors as at once."""

import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_finite import losses_that, with_nan_gradient
from test_two_experts import read_tensors
from test_two_experts import same as same_state
from tiny_run import run, write_dit, write_inputs

from utils import training
from utils.run import preparing, readings, step, turns
from utils.run.outcome import Outcome, reads_late
from utils.run.progress import StepTimer
from wan.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
SAVING = ("--save_every_n_steps", "3", "--save_state", "--save_as", "slice", "--lr_scheduler", "cosine")
PLAIN = ("--optimizer_type", "SGD", "--learning_rate", "0.1")  # AdamW counts its steps in tensors of the host


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(files):
    yield files
    for out in ("out", "whole"):
        shutil.rmtree(files / out, ignore_errors=True)


@pytest.fixture
def late(monkeypatch):
    """As on a GPU, whose numbers arrive when they are asked for."""
    monkeypatch.setattr(step, "reads_late", lambda run: True)


def trained_files(folder):
    """The values in every file that a run wrote, and its states."""
    files = {path.name: read_tensors(path) for path in (folder / "out").glob("*.safetensors")}
    return files, {path.parent.name: torch.load(path)["state"] for path in (folder / "out").rglob("state.pt")}


def logged(monkeypatch, folder, *flags):
    """What a run tells the trackers at each step, but for times and memory."""
    told = []

    def log(run, place, values):
        told.append((place.step, {key: own for key, own in values.items() if not key.startswith(("time", "memory"))}))

    with monkeypatch.context() as patch:
        patch.setattr(turns, "log", log)
        patch.setattr(training, "log", log)
        run(folder, *flags)
    return told, *trained_files(folder)


def test_every_step_has_the_numbers_that_it_has_at_once_and_every_save_the_values(folder, monkeypatch):
    told, files, states = logged(monkeypatch, folder, *SAVING)
    (folder / "out").rename(folder / "whole")
    monkeypatch.setattr(step, "reads_late", lambda run: True)
    late_told, late_files, late_states = logged(monkeypatch, folder, *SAVING)
    assert (late_told, late_files) == (told, files) and same_state((late_states, states))
    assert [number for number, values in told if "grad_norm" in values] == [*range(1, 11)]
    assert len(states) == 4 == len(files)


def in_order(monkeypatch, folder, *flags):
    """What a run does one after another, by step: b(ackward), u(pdate), r(ead), s(ave)."""
    done, backward, update, log_step, save_turn = [], *(
        getattr(module, name)
        for module, name in (
            (training, "backward"), (training, "update"), (readings, "log_step"), (training, "save_turn")
        )
    )  # fmt: skip
    monkeypatch.setattr(training, "backward", lambda *own: done.append("b") or backward(*own))
    monkeypatch.setattr(training, "update", lambda run, place, *own: done.append("u") or update(run, place, *own))
    monkeypatch.setattr(
        readings, "log_step", lambda run, place, *own: done.append(f"r{place.step}") or log_step(run, place, *own)
    )
    monkeypatch.setattr(training, "save_turn", lambda *own: done.append("s") or save_turn(*own))
    run(folder, *flags)
    return "".join(done)


def test_a_step_is_read_after_the_next_ones_backward_or_before_what_is_due(folder, monkeypatch, late):
    """Five steps an epoch; a save after step 7."""
    found = in_order(monkeypatch, folder, "--save_every_n_steps", "7")
    assert found == "bu" + "br1u" + "br2u" + "br3u" + "br4ur5" + "bu" + "br6ur7s" + "bu" + "br8u" + "br9ur10" + "s"


def test_without_a_gpu_each_step_is_read_at_once(folder, monkeypatch):
    assert in_order(monkeypatch, folder, "--max_train_epochs", "1") == "bur1bur2bur3bur4bur5s"


def reads_of(monkeypatch, folder, *flags):
    """How the host asks tensors for their values while it launches each step's update."""
    reads, update, turns_after_step = [[]], training.update, training._turns_after_step
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            whole = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *own, n=name, f=whole: reads[-1].append(n) or f(*own))
        patch.setattr(training, "update", lambda *own: reads.append([]) or update(*own))
        patch.setattr(training, "_turns_after_step", lambda *own: reads.append([]) or turns_after_step(*own))
        run(folder, *flags)
    return reads[1::2]


@pytest.mark.parametrize(("is_late", "reads"), [(True, []), (False, ["tolist", "__bool__"])])
def test_the_device_is_asked_for_nothing_while_a_late_step_is_launched(folder, monkeypatch, is_late, reads):
    monkeypatch.setattr(step, "reads_late", lambda run: is_late)
    assert reads_of(monkeypatch, folder, *PLAIN, "--max_train_epochs", "1") == [reads] * 5


def broken(monkeypatch, folder, *flags, at, expected):
    """The differences and weights in use before step `at`, which is not finite, and after the error that names it."""
    kept, update = [], training.update

    def watched(run, place, *given):
        if place.step + 1 == at:
            values = {name: own.clone() for name, own in run.trained.state_dict().items()}
            kept.extend([run, values, {name: own.clone() for name, own in run.model.state_dict().items()}])
        return update(run, place, *given)

    monkeypatch.setattr(training, "update", watched)
    with pytest.raises(InputError, match=expected):
        run(folder, *flags)
    of_run, *before = kept
    return before, [dict(of_run.trained.state_dict()), dict(of_run.model.state_dict())]


def same(before, after):
    return all(torch.equal(own, two[name]) for one, two in zip(before, after, strict=True) for name, own in one.items())


def infinite(loss, predicted):
    """A loss that is not finite while its gradient is."""
    return loss + float("inf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [(with_nan_gradient, r"the gradient of blocks\.0\.\S+, .* more matrices"), (infinite, "the loss")],
)
def test_a_late_step_that_is_not_finite_is_named_and_leaves_the_slice_as_it_was(
    folder, monkeypatch, late, change, expected
):
    losses_that(monkeypatch, change, at=2)
    told = expected + " of step 2 is not finite: lower --learning_rate.* Nothing of this step was saved"
    assert same(*broken(monkeypatch, folder, at=2, expected=told))
    assert list((folder / "out").glob("one*")) == []


class Exploding(torch.optim.SGD):
    """In its third step the rate is infinite."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        self.param_groups[0]["lr"] = float("inf") if self.steps == 3 else 0.1
        return super().step(closure)


def test_a_late_step_that_breaks_the_slice_itself_is_taken_back(folder, monkeypatch, late):
    monkeypatch.setattr(preparing, "build_optimizer", lambda config, own: Exploding(own, lr=0.1))
    told = "step 3 made the slice infinite or NaN: lower --learning_rate"
    assert same(*broken(monkeypatch, folder, at=3, expected=told))


def test_a_late_step_that_saves_and_is_not_finite_writes_nothing(folder, monkeypatch, late):
    losses_that(monkeypatch, with_nan_gradient, at=6)
    with pytest.raises(InputError, match=r"of step 6 is not finite.* the state of step 3 is good: .*step00000003"):
        run(folder, *SAVING)
    assert {path.name for path in (folder / "out").iterdir()} == {
        "one-step00000003-state", "one-step00000003.slice.safetensors",
    }  # fmt: skip


def test_ctrl_c_in_a_late_step_stops_after_it_and_the_run_goes_on_to_the_same_end(folder, monkeypatch, late):
    more = ("--save_state", "--max_train_epochs", "1")
    whole, files, states = logged(monkeypatch, folder, *more)
    (folder / "out").rename(folder / "whole")
    batches, backward, update = [], training.backward, training.update

    def interrupted(run, place, *given):
        if place.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run, place, *given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", lambda *own: batches.append(own) or backward(*own))
        patch.setattr(training, "update", interrupted)
        assert run(folder, *more)[-1].startswith("stopped after step 3;")
    assert len(batches) == 3
    told, resumed, their_states = logged(monkeypatch, folder, *more, "--resume", "latest")
    assert told == [own for own in whole if own[0] > 3]
    assert resumed == files and same_state((their_states["one-state"], states["one-state"]))


def test_a_state_that_full_logs_make_a_run_save_holds_the_step_that_was_read_and_no_more(folder, monkeypatch, late):
    more, log_step = ("--max_train_epochs", "1", "--save_state"), readings.log_step
    run(folder, *more, "--save_every_n_steps", "2")
    states = trained_files(folder)[1]
    (folder / "out").rename(folder / "whole")

    def full(run, place, *given):
        log_step(run, place, *given)
        if place.step == 2:
            turns.keep_place(run, place)
            raise InputError("no room")

    monkeypatch.setattr(readings, "log_step", full)
    with pytest.raises(InputError, match="no room"):
        run(folder, *more)
    name = "one-step00000002-state"
    assert same_state((trained_files(folder)[1], {name: states[name]}))


@pytest.mark.parametrize("more", [(), ("--gradient_accumulation_steps", "2")], ids=["", "accumulated"])
def test_a_stop_that_another_process_was_asked_for_is_found_before_the_next_step(folder, monkeypatch, late, more):
    """This process hears of it late; until then it must not send anything that the others do not wait for."""
    asks, update, any_asked = [], training.update, training._any_asked

    def asked_elsewhere(*given):
        outcome = update(*given)
        return replace(outcome, numbers=outcome.numbers.index_fill(0, torch.tensor([2]), 0.5))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(training, "update", asked_elsewhere)
    monkeypatch.setattr(training, "_any_asked", lambda *own: asks.append(own) or any_asked(*own))
    assert run(folder, *more)[-1].startswith("stopped after step 1;")
    assert len(asks) == len(more) / 2  # in the first step, and not in the second one
    assert [path.name for path in (folder / "out").iterdir()] == ["one-step00000001-state"]


def test_the_other_experts_turn_waits_for_the_last_step_which_may_end_the_run(folder, monkeypatch, late):
    """Turns of two steps: the third turn's second step is high's fourth."""
    write_dit(folder / "high.safetensors", seed=5)
    losses_that(monkeypatch, with_nan_gradient, at=6)
    with pytest.raises(InputError, match="of step 4 is not finite"):
        run(folder, "--dit_high_noise", str(folder / "high.safetensors"), "--switch_expert_every", "2")
    assert {path.name for path in (folder / "out").iterdir()} == {"one-low_noise-step00000002-state"}


@pytest.mark.parametrize(
    ("device", "fp16", "count", "is_late"),
    [("cuda", False, 2**24, True), ("cpu", False, 9, False), ("cuda", True, 9, False), ("cuda", False, 10**8, False)],
)
def test_gpus_read_late_but_not_with_fp16_or_for_a_large_slice(device, fp16, count, is_late):
    run = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device(device)),
        scaler=SimpleNamespace(is_enabled=lambda: fp16),
        trained=SimpleNamespace(count=count),
    )
    assert reads_late(run) == is_late


def test_an_outcome_is_read_once_it_has_arrived():
    order, numbers = [], torch.tensor([0.5, 0.0, 0.5, 2.0, float("nan"), 2.0])
    arrived = SimpleNamespace(synchronize=lambda: order.append("waited") or numbers[0].fill_(0.25))
    found = replace(Outcome(3, ("a", "b"), numbers, is_late=True), arrived=arrived).sent(torch.tensor(True))
    found = replace(found, numbers=numbers, arrived=arrived)
    assert order == []
    assert found.values == {"loss": 0.25, "preserve_loss": 0.0, "grad_norm": 2.0}
    assert found.stops and found.broken_matrices == ["a"] and order == ["waited"]


def test_batches_of_the_next_step_do_not_count_for_one_that_is_read_late():
    now, batch = [100.0], {"latents": torch.zeros(1, 16, 1, 4, 4)}
    timer = StepTimer(clock=lambda: now[0])
    batches = timer.batches([batch, batch, batch], (1, 2, 2))
    next(batches)
    timer.launch_step()
    next(batches), next(batches)
    now[0] += 2.0
    assert timer.finish_step()["time/tokens_per_second"] == 2.0
    timer.launch_step()
    now[0] += 4.0
    assert timer.finish_step()["time/tokens_per_second"] == 2.0
