"""A run that stopped and went on is the run that never stopped: bit for bit, with its files and pictures."""

import multiprocessing
import os
import re
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import flags, run, write_inputs, write_sample_models
from torch.utils.tensorboard import SummaryWriter

from utils import training
from utils.cli.train import parse_train
from utils.run import readings, turns
from utils.selective_finetune import SliceError
from utils.slice_saving import read_ledger
from utils.training import train
from wan.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = ("--mixed_precision", "bf16")
# Over the end of an epoch of five batches, in steps of two batches, with a schedule, and with a resumed optimizer.
COMMON = (*BF16, "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--save_as", "checkpoint", "slice")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(files):
    yield files
    for name in ("out", "whole"):
        shutil.rmtree(files / name, ignore_errors=True)


def same_tensors(a, b):
    one, other = load_file(a), load_file(b)
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def interrupted(monkeypatch, at, times=1):
    """Ctrl-C in the middle of step number `at`."""
    steps, update = [0], training.update

    def counted(*given):
        steps[0] += 1
        if steps[0] == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "update", counted)
        yield steps


@pytest.mark.parametrize("at", [2, 3], ids=["within an epoch", "at an epoch's end"])
def test_ctrl_c_saves_a_state_and_the_latest_goes_on_to_the_same_end(folder, monkeypatch, at):
    run(folder, *COMMON)
    (folder / "out").rename(folder / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with interrupted(monkeypatch, at) as steps:
        told = run(folder, *COMMON)
    assert steps == [at] and signal.getsignal(signal.SIGINT) == handler
    assert [path.name for path in (folder / "out").iterdir()] == [f"one-step{at:08d}-state"]
    assert told[-1].startswith(f"stopped after step {at}; to continue, run the same command with --resume latest")
    told = run(folder, *COMMON, "--resume", "latest")
    assert any(f"one-step{at:08d}-state: epoch {1 if at == 2 else 2}, step {at}" in line for line in told)
    for name in ("one.safetensors", "one.slice.safetensors"):
        assert same_tensors(folder / "whole" / name, folder / "out" / name)


@pytest.mark.parametrize(("at", "state"), [(2, "one-step00000002"), (3, "one-000001")])
def test_ctrl_c_in_a_step_that_saves_its_state_saves_no_second_one(folder, monkeypatch, at, state):
    """A second, newer one would have --resume write the checkpoint and draw the samples of that step again."""
    saves = (*COMMON, "--save_every_n_epochs", "1", "--save_every_n_steps", "2", "--save_state")
    with interrupted(monkeypatch, at):
        lines = run(folder, *saves)
    assert len(list((folder / "out").glob("*-state"))) == at - 1 and f"{state}-state" in lines[-1]
    before = (folder / "out" / f"{state}.safetensors").stat().st_mtime_ns
    lines = run(folder, *saves, "--resume", "latest")
    assert any(f"continues from {folder / 'out' / state}-state" in line for line in lines)
    assert (folder / "out" / f"{state}.safetensors").stat().st_mtime_ns == before


def test_ctrl_c_twice_stops_at_once(folder, monkeypatch):
    with interrupted(monkeypatch, 2, times=2), pytest.raises(KeyboardInterrupt):
        run(folder, *COMMON)
    assert not (folder / "out").exists()


def test_ctrl_c_in_the_last_step_ends_the_run_as_ever(folder, monkeypatch):
    with interrupted(monkeypatch, 6):
        run(folder, *COMMON)
    assert (folder / "out" / "one.safetensors").is_file() and not list((folder / "out").glob("*-state"))


def outputs(folder):
    """Names without the time, and the bytes of pictures."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "state.pt")
    return {
        re.sub(r"_\d{14}", "", path.relative_to(folder).as_posix()): path.read_bytes()
        if path.suffix in (".png", ".mp4") and "sheet" not in path.name  # which shows what this folder has seen
        else b""
        for path in paths
    }


def test_a_resumed_run_writes_the_same_pictures_and_file_numbers(folder):
    samples = [*write_sample_models(folder), "--vae_dtype", "fp32", "--sample_every_n_steps", "2"]
    saves = ["--save_every_n_epochs", "1", "--save_every_n_steps", "2", "--save_state", "--max_train_epochs", "3"]
    run(folder, *COMMON, *samples, *saves, "--sample_every_n_epochs", "1")
    whole = outputs(folder / "out")
    state = folder / "one-step00000002-state"
    (folder / "out" / state.name).rename(state)
    shutil.rmtree(folder / "out")
    run(folder, *COMMON, *samples, *saves, "--sample_every_n_epochs", "1", "--resume", str(state))
    resumed = outputs(folder / "out")
    shutil.rmtree(state)
    assert sum("step00000002" in name or "_000002" in name for name in whole) == 4  # which are made up
    assert resumed == whole and sum(name.endswith("_7_000.png") for name in resumed) == 6


def test_the_last_step_writes_its_file_once_and_a_longer_run_writes_the_numbered_one(folder):
    saves = (*BF16, "--save_every_n_steps", "5", "--save_state")
    lines = run(folder, *saves, "--max_train_epochs", "2")
    checkpoints = {path.name for path in (folder / "out").glob("*.safetensors")}
    assert checkpoints == {"one-step00000005.safetensors", "one.safetensors"}
    assert any(line.startswith("will write 2 checkpoints") for line in lines)
    final = load_file(folder / "out" / "one.safetensors")
    run(folder, *saves, "--max_train_epochs", "3", "--resume", "latest")
    numbered = load_file(folder / "out" / "one-step00000010.safetensors")
    assert all(torch.equal(values, numbered[name]) for name, values in final.items())
    assert not (folder / "out" / "one-step00000015.safetensors").exists()


def without_room(*_):
    raise SliceError("no room")


def test_what_a_full_disk_kept_from_following_a_state_is_made_up(folder, monkeypatch):
    """After a step's state, an epoch's, the last one."""
    saves = (*COMMON, "--save_every_n_epochs", "1", "--save_every_n_steps", "4", "--save_state")
    run(folder, *saves)
    whole = outputs(folder / "out")
    (folder / "out").rename(folder / "whole")
    for state in ("one-000001", "one-step00000004", "one"):
        with monkeypatch.context() as patch, pytest.raises(SliceError):
            patch.setattr(turns, "write_files", without_room)
            run(folder, *saves, *(("--resume", "latest") if (folder / "out").exists() else ()))
        assert (folder / "out" / f"{state}-state").is_dir() and not (folder / "out" / f"{state}.safetensors").exists()
        if state == "one":
            told = run(folder, *saves, "--resume", "latest")
        else:
            with monkeypatch.context() as patch, pytest.raises(SliceError):
                patch.setattr(turns, "write_files", once(turns.write_files))
                run(folder, *saves, "--resume", "latest")
    assert outputs(folder / "out") == whole
    for name in whole:
        if name.endswith(".safetensors"):
            assert same_tensors(folder / "whole" / name, folder / "out" / name)
    with pytest.raises(InputError, match=r"has done 6 steps and the run has 6"):
        run(folder, *saves, "--resume", "latest")
    assert any("saved" in line for line in told)


def test_a_last_save_within_an_epoch_is_made_up_without_another_step(folder, monkeypatch):
    argv = flags(folder, *COMMON, "--save_state", "--max_train_steps", "4")
    at = argv.index("--max_train_epochs")  # which would decide
    argv = [*argv[:at], *argv[at + 2 :]]
    train(parse_train(argv), say=print)
    (folder / "out").rename(folder / "whole")
    with monkeypatch.context() as patch, pytest.raises(SliceError):
        patch.setattr(turns, "write_files", without_room)
        train(parse_train(argv), say=print)
    train(parse_train([*argv, "--resume", "latest"]), say=print)
    assert same_tensors(folder / "whole" / "one.safetensors", folder / "out" / "one.safetensors")


def test_an_older_file_of_the_same_name_does_not_pass_for_what_was_to_follow_a_state(folder, monkeypatch):
    """Whatever the times of files are: the older run's checkpoint is the newer file here."""
    run(folder, *COMMON, "--learning_rate", "2e-2")
    path = folder / "out" / "one.safetensors"
    older = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SliceError):
        patch.setattr(turns, "write_files", without_room)
        run(folder, *COMMON, "--save_state", "--overwrite")
    path.write_bytes(older)
    told = run(folder, *COMMON, "--save_state", "--resume", "latest")
    assert f"saved {path}" in " ".join(told) and path.read_bytes() != older


def test_copied_files_and_a_clock_that_was_set_back_have_nothing_written_again(folder):
    saves = (*COMMON, "--save_every_n_steps", "4", "--save_state", "--save_every_n_epochs", "1")
    run(folder, *saves)
    for path in (folder / "out").iterdir():
        os.utime(path, (1, 1))
    for state in ("one-step00000004-state", "one-000001-state"):
        told = run(folder, *saves, "--resume", str(folder / "out" / state))
        assert not any("was not written" in line for line in told), told


def once(action):
    """Does it the first time, then there is no room."""
    actions = [action]
    return lambda *given: (actions.pop() if actions else without_room)(*given)


def test_a_full_disk_under_the_logs_stops_the_run_with_a_state(folder, monkeypatch):
    run(folder, *COMMON)
    (folder / "out").rename(folder / "whole")
    logs = ("--logging_dir", str(folder / "logs"))
    add_scalar, calls = SummaryWriter.add_scalar, []

    def add_until_full(writer, *given, **more):
        calls.append(given)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return add_scalar(writer, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"logs cannot be written to \(No space left"):
        patch.setattr(SummaryWriter, "add_scalar", add_until_full)
        run(folder, *COMMON, *logs)
    run(folder, *COMMON, *logs, "--resume", "latest")
    assert same_tensors(folder / "whole" / "one.safetensors", folder / "out" / "one.safetensors")


def test_a_state_of_other_data_or_settings_is_refused_with_what_differs(folder):
    run(folder, *COMMON, "--save_state", "--max_train_epochs", "1")
    text = (folder / "data.toml").read_text(encoding="utf-8")
    (folder / "data.toml").write_text(f"{text}\nnum_repeats = 2", encoding="utf-8")
    try:
        with pytest.raises(InputError, match="is the state of another run: dataset_sha256"):
            run(folder, *COMMON, "--resume", "latest")
    finally:
        (folder / "data.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"another run: gradient_accumulation_steps 2 \(now 3\)"):
        run(folder, *COMMON, "--gradient_accumulation_steps", "3", "--resume", "latest")


@pytest.mark.parametrize("ff", ["0.10", "1e-1", "1/10"])
def test_a_share_that_is_typed_in_another_way_is_the_same_run(folder, ff):
    run(folder, *COMMON, "--save_state", "--max_train_epochs", "1")
    told = run(folder, *COMMON, "--resume", "latest", "--ff", ff)
    assert any("one-state: epoch 2, step 3" in line for line in told)
    with safe_open(folder / "out" / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_ff"], read_ledger(metadata)[0]["ff"]) == ("0.1", ff)


def test_a_share_that_is_no_decimal_is_the_same_run_in_lowest_terms(folder):
    run(folder, *COMMON, "--save_state", "--max_train_epochs", "1", "--ff", "2/6")
    assert any("one-state: epoch 2" in line for line in run(folder, *COMMON, "--resume", "latest", "--ff", "1/3"))
    with pytest.raises(InputError, match=r"another run: ff 1/3 \(now 0\.3333\)"):
        run(folder, *COMMON, "--resume", "latest", "--ff", "0.3333")


def process(rank, port, folder, flags):
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if rank == 1 and "interrupted" in flags:
        flags.remove("interrupted")
        with interrupted(pytest.MonkeyPatch(), 2):  # one of them is enough
            run(folder, *flags)
    else:
        run(folder, *(flag for flag in flags if flag != "interrupted"))


def run_two(folder, port, *flags):
    workers = [multiprocessing.get_context("fork").Process(target=process, args=(rank, port, folder, list(flags)))
               for rank in range(2)]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_two_processes_stop_together_and_go_on_bit_for_bit(folder, unused_port):
    run_two(folder, unused_port(), *COMMON)
    (folder / "out").rename(folder / "whole")
    run_two(folder, unused_port(), *COMMON, "interrupted")
    assert [path.name for path in (folder / "out").iterdir()] == ["one-step00000002-state"]
    run_two(folder, unused_port(), *COMMON, "--resume", "latest")
    assert same_tensors(folder / "whole" / "one.safetensors", folder / "out" / "one.safetensors")
    with pytest.raises(InputError, match=r"processes 2 \(now 1\)"):
        run(folder, *COMMON, "--resume", "latest")


@pytest.fixture
def unused_port():
    import socket

    def port():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return port


def rates_of(monkeypatch, folder, *flags):
    """The learning rate of every step of a run."""
    rates = []
    with monkeypatch.context() as patch:
        patch.setattr(readings, "log_step", lambda run, place, values, *_: rates.append(values["lr/slice"]))
        run(folder, *flags)
    return rates


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_with_more_epochs_a_resumed_run_has_the_rates_of_the_longer_schedule_from_its_first_step(
    folder, monkeypatch, scheduler
):
    flags = ("--lr_scheduler", scheduler, "--lr_warmup_steps", "0.2", "--save_state")
    whole = rates_of(monkeypatch, folder, *flags, "--max_train_epochs", "4")
    rates_of(monkeypatch, folder, *flags, "--max_train_epochs", "2", "--overwrite")
    assert rates_of(monkeypatch, folder, *flags, "--max_train_epochs", "4", "--resume", "latest") == whole[10:]


def test_a_resumed_run_without_a_seed_has_that_of_its_state(folder):
    def without_seed(*more):
        given = [*flags(folder, *more)]
        at, lines = given.index("--seed"), []
        train(parse_train(given[:at] + given[at + 2 :]), say=lines.append)
        return next(line for line in lines if line.startswith("seed"))

    seed = re.match(r"seed (\d+) \(drawn at random", without_seed("--save_state", "--max_train_epochs", "1"))[1]
    for resume in ("latest", str(folder / "out" / "one-state")):
        again = without_seed(
            "--save_state", "--resume", resume, "--max_train_epochs", "2" if resume == "latest" else "3"
        )
        assert again == f"seed {seed}, as the run that --resume continues"
