"""What a run measures of its own speed."""

import pytest
import torch
from tiny_run import flags, write_inputs

from utils.cli.train import parse_train
from utils.run import turns
from utils.run.progress import StepBar, StepTimer
from utils.swap.backend import HostBackend
from utils.swap.host_store import BackgroundCopies
from utils.training import train


class Clock:
    """Stands still unless something takes time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def loader(self, seconds: float, batches: list):
        """Takes so long for each batch."""
        for batch in batches:
            self.now += seconds
            yield batch


def step(timer: StepTimer, clock: Clock, waits: float, computes: float) -> dict[str, float]:
    batch = {"latents": torch.zeros(2, 16, 3, 8, 6)}
    for _ in timer.batches(clock.loader(waits, [batch]), (1, 2, 2)):
        clock.now += computes
    timer.launch_step()
    return timer.finish_step()


def test_a_step_has_its_seconds_tokens_and_share_of_waiting():
    timer = StepTimer(clock=(clock := Clock()))
    values = step(timer, clock, waits=1.0, computes=3.0)
    tokens = 2 * 3 * 4 * 3
    expected = {"time/step_seconds": 4.0, "time/tokens_per_second": tokens / 4, "time/data_wait_share": 0.25}
    assert values == pytest.approx(expected)


class Streamed:
    """Weights that computing waits for."""

    seconds = 0.0

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


def test_of_a_step_that_waits_for_weights_the_share_is_logged():
    weights = Streamed()
    timer = StepTimer(weights.take, clock := Clock())
    with timer.paused():
        weights.seconds = 50.0  # of a sample
    weights.seconds += 1.0
    assert step(timer, clock, waits=0.0, computes=4.0)["time/weight_wait_share"] == 0.25
    weights.seconds = 7.0  # of the first validation, before the first step
    timer.restart()
    assert step(timer, clock, waits=1.0, computes=1.0)["time/weight_wait_share"] == 0.0
    assert "time/weight_wait_share" not in step(StepTimer(clock=clock), clock, waits=1.0, computes=1.0)


@pytest.mark.parametrize("swap", [(), ("--blocks_to_swap", "2")])
def test_a_run_logs_its_waits_for_weights_where_blocks_are_swapped(tmp_path, monkeypatch, swap):
    clock, logged = Clock(), []

    def late(link, copied):
        copied.result()
        clock.now += 0.5

    monkeypatch.setattr(turns, "log", lambda run, place, values: logged.append(values))
    monkeypatch.setattr(BackgroundCopies, "wait", late)
    monkeypatch.setattr(HostBackend, "moment", lambda backend: clock())
    monkeypatch.setattr(StepTimer.__init__, "__defaults__", (None, clock))
    train(parse_train(flags(write_inputs(tmp_path), "--mixed_precision", "bf16", *swap)), say=print)
    shares = [values.get("time/weight_wait_share") for values in logged if "grad_norm" in values]
    assert shares == [1.0 if swap else None] * 10


def test_accumulated_batches_make_one_step():
    timer = StepTimer(clock=(clock := Clock()))
    batch = {"latents": torch.zeros(1, 16, 1, 4, 4)}
    for _ in timer.batches(clock.loader(1.0, [batch, batch]), (1, 2, 2)):
        clock.now += 1.0
    timer.launch_step()
    values = timer.finish_step()
    assert (values["time/step_seconds"], values["time/tokens_per_second"]) == (4.0, 2.0)


def test_the_time_left_counts_no_pause():
    timer = StepTimer(clock=(clock := Clock()))
    with StepBar(timer, total=10, done=4, shown=False) as bar:
        assert bar.format_dict["rate"] is None
        for _ in range(2):
            step(timer, clock, waits=0.5, computes=1.5)
            with timer.paused():
                clock.now += 60.0
                with timer.paused():
                    clock.now += 60.0
        assert bar.format_dict["rate"] == 0.5
    assert step(timer, clock, waits=0.0, computes=2.0)["time/step_seconds"] == 2.0


def test_what_a_run_logs_of_time_leaves_out_its_turns(tmp_path, monkeypatch):
    clock, logged = Clock(), []

    def slow(*_):
        clock.now += 1000.0
        return []

    monkeypatch.setattr(turns, "write_files", slow)
    monkeypatch.setattr(turns, "log", lambda run, place, values: logged.append(values))
    monkeypatch.setattr(StepTimer.__init__, "__defaults__", (None, clock))
    train(parse_train(flags(write_inputs(tmp_path), "--save_every_n_steps", "2")), say=print)
    assert [values["time/step_seconds"] for values in logged if "grad_norm" in values] == [0.0] * 10
    assert clock.now >= 5000
