"""A run that is asked to stop, by whatever signal, leaves a state; so does one whose terminal is gone."""

import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import flags, run, write_inputs

import wan_train_network
from utils import training
from utils.cli import command
from utils.interrupts import StopRequest, ignore_interrupts, torchrun_line

pty, termios, fcntl = map(pytest.importorskip, ("pty", "termios", "fcntl"))  # not on Windows
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVED = "one-step00000002-state"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


@contextmanager
def before_batch(number, action):
    """Does it before the backward pass of the run's batch `number` (from 1)."""
    batches, backward = [0], training.backward

    def counted(*given):
        batches[0] += 1
        if batches[0] == number:
            action()
        return backward(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "backward", counted)
        yield batches


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def saved(folder):
    return sorted(path.name for path in (folder / "out").glob("*"))


@pytest.mark.parametrize("number", SIGNALS)
def test_every_request_to_end_finishes_the_step_and_saves_a_state(folder, number):
    with before_batch(2, lambda: send(number)) as batches:
        run(folder)
    assert batches == [2] and saved(folder) == [SAVED]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_request_stops_at_once(numbers):
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        send(*numbers)


@pytest.mark.parametrize("numbers", [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP)])
def test_what_a_closing_terminal_or_a_service_manager_sends_together_is_one_request(monkeypatch, numbers):
    with StopRequest() as stop:
        send(*numbers)
        assert stop.asked
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            send(numbers[1])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_ignored_and_handlers_come_back(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(number)
        assert not stop.asked and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    with StopRequest():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


def test_workers_of_the_data_loader_outlive_the_signals_of_their_group(folder):
    """A worker that died would end the run with an error before its state is saved."""

    def to_workers():
        for worker in torch.multiprocessing.active_children():
            for number in SIGNALS:
                os.kill(worker.pid, number)
        send(signal.SIGTERM)

    workers = ("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers")
    with before_batch(2, to_workers):
        run(folder, *workers)
    assert saved(folder) == [SAVED]
    before = [signal.getsignal(number) for number in SIGNALS]
    ignore_interrupts()
    assert {signal.signal(number, old) for number, old in zip(SIGNALS, before, strict=True)} == {signal.SIG_IGN}


def test_under_torchrun_the_unfinished_step_is_dropped_and_repeated_bit_for_bit(folder, monkeypatch):
    more = ("--gradient_accumulation_steps", "2", "--max_train_epochs", "1")
    run(folder, *more)
    whole = (folder / "out" / "one.safetensors").rename(folder / "whole.safetensors")
    assert torchrun_line() is None
    with monkeypatch.context() as patch, before_batch(3, lambda: send(signal.SIGTERM, signal.SIGTERM)) as batches:
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        lines = run(folder, *more)
        assert torchrun_line() in lines
    assert batches == [3] and saved(folder) == ["one-step00000001-state"]
    run(folder, *more, "--resume", "latest")
    uninterrupted, resumed = load_file(whole), load_file(folder / "out" / "one.safetensors")
    assert all(torch.equal(resumed[name], values) for name, values in uninterrupted.items())


def test_a_stop_before_the_first_step_saves_nothing_and_says_so(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with before_batch(1, lambda: send(signal.SIGINT)):
        lines = run(folder, "--gradient_accumulation_steps", "2")
    assert "stopped before the first step" in lines[-1] and saved(folder) == []


def in_child(folder, prepare, action):
    """The exit code of a training script in a forked child, in which `action` happens before batch 2."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        torch.set_num_threads(1)  # the parent's other threads are not in a forked child
        signal.alarm(60)  # ends a child that hangs
        prepare()
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        sys.argv = ["wan_train_network.py", *flags(folder)]
        with before_batch(2, action):
            command.run(wan_train_network.main, needs_console=False)
        code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_terminal_that_closes_leaves_a_state(folder):
    terminal, console = pty.openpty()
    closed, close = os.pipe()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(console, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(console, number)
        os.close(terminal)

    def wait_until_closed():
        os.write(close, b"x")
        time.sleep(0.2)

    child = in_child(folder, take_terminal, wait_until_closed)
    os.close(console)
    os.close(close)  # a child that ends early ends this wait too
    os.read(closed, 1)
    os.close(terminal)
    assert exit_code(child) == command.INTERRUPTED
    assert saved(folder) == [SAVED]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_console_on_a_full_disk_ends_no_run(folder):
    def fill():
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)

    assert exit_code(in_child(folder, fill, lambda: None)) == 0
    assert saved(folder) == ["one.safetensors"]
