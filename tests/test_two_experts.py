"""Both experts in one run: each is the run that it would have been alone, whatever turns they take."""

import hashlib
import os
import re
import shutil
import signal
import socket
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resuming import run_two
from tiny_models import run_flags, sample_flags, write_model, write_run_files
from tiny_run import flags, run, write_dit, write_inputs, write_sample_models
from torch.utils.tensorboard import SummaryWriter

from utils import training
from utils.cli.train import parse_train
from utils.locks import sole_writer
from utils.run import checks
from utils.run.experts import expert_configs
from utils.run.opening_lines import experts_lines
from utils.swap.stage import Stage
from utils.training import train
from wan.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
# Accumulated steps and a schedule; three steps an epoch.
COMMON = ("--mixed_precision", "bf16", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine")
SIDES = {"high_noise": ("high", "--min_timestep=875"), "low_noise": ("base", "--max_timestep=875")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    write_dit(folder / "high.safetensors", seed=5)
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


@pytest.fixture(scope="module")
def sample_models(files):
    """Flags of samples of one short prompt."""
    given = write_sample_models(files)
    (files / "prompts.txt").write_text("a red cat --w 16 --h 16 --s 1 --d 7\n", encoding="utf-8")
    return given


def run_both(folder, *more, every=2):
    both = ("--dit_high_noise", str(folder / "high.safetensors"), "--switch_expert_every", str(every))
    return run(folder, *COMMON, *both, *more)


def run_alone(folder, *more):
    """The folder of a run of each expert, as both of them in one run are to come out; trained once for all tests."""
    alone = folder / f"alone{hashlib.sha256(repr(more).encode()).hexdigest()[:8]}"
    for expert, (dit, side) in SIDES.items() if not alone.exists() else ():
        own = ("--dit", str(folder / f"{dit}.safetensors"), "--output_name", f"one-{expert}", side)
        run(folder, *COMMON, "--preserve_distribution_shape", *own, "--output_dir", str(alone), *more)
    return alone


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "sample")


def differing(folder, alone):
    """The files of weights that are not those of the runs alone; which files there are has to agree."""
    assert names(folder / "out") == names(alone) != []
    files = [name for name in names(alone) if name.endswith(".safetensors")]
    return [name for name in files if read_tensors(folder / "out" / name) != read_tensors(alone / name)]


def read_tensors(path):
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@contextmanager
def interrupted(monkeypatch, at):
    """Ctrl-C in step number `at` of both together."""
    steps, update = [0], training.update

    def counted(*given):
        steps[0] += 1
        if steps[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "update", counted)
        yield


def test_each_expert_writes_the_files_of_a_run_alone(folder):
    saves = (
        "--save_every_n_steps",
        "4",
        "--save_every_n_epochs",
        "1",
        "--save_state",
        "--save_as",
        "checkpoint",
        "slice",
    )
    lines, alone = run_both(folder, *saves), run_alone(folder, *saves)
    assert differing(folder, alone) == []
    assert (
        load_file(folder / "out" / "one-high_noise.safetensors").keys() == load_file(folder / "high.safetensors").keys()
    )
    for expert in SIDES:
        states = [torch.load(out / f"one-{expert}-state" / "state.pt") for out in (folder / "out", alone)]
        assert same([state["state"] for state in states]) and states[0]["settings"] == states[1]["settings"]
    assert any("as one-high_noise and " in line and "as one-low_noise to" in line for line in lines)


def same(pair):
    one, other = pair
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same((one[key], other[key])) for key in one)
    return one == other


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 4, 7])
def test_stopped_in_either_turn_both_go_on_to_the_same_end(folder, monkeypatch, at):
    """Turns of two steps: high 1-2, low 1-2, high 3-4, ..."""
    with interrupted(monkeypatch, at):
        lines = run_both(folder)
    high, low = {1: (1, 0), 4: (2, 2), 7: (4, 3)}[at]
    where = f"high_noise after step {high} and low_noise after step {low}"
    assert lines[-1] == f"stopped {where}; to continue, run the same command with --resume latest"
    kept = {f"one-high_noise-step{high:08d}-state", *([f"one-low_noise-step{low:08d}-state"] if low else [])}
    assert set(names(folder / "out")) == kept
    run_both(folder, "--resume", "latest", every=5)
    for path in (folder / "out").glob("*-state"):
        shutil.rmtree(path)
    assert differing(folder, run_alone(folder)) == []


def test_the_idle_expert_does_not_move(folder, monkeypatch):
    seen, update = {}, training.update

    def watched(run, *given):
        for other in seen.keys() - {run.config.expert}:
            trained, optimizer, before = seen[other]
            assert same((snapshot(trained, optimizer), before))
        result = update(run, *given)
        seen[run.config.expert] = (run.trained, run.optimizer, snapshot(run.trained, run.optimizer))
        return result

    def snapshot(trained, optimizer):
        states = {i: dict(own) for i, own in enumerate(optimizer.state.values())}
        return {key: clone(value) for key, value in {"t": trained.state_dict(), "s": states}.items()}

    def clone(value):
        return {key: clone(own) for key, own in value.items()} if isinstance(value, dict) else value.clone()

    monkeypatch.setattr(training, "update", watched)
    run_both(folder, "--optimizer_args", "weight_decay=0.5")
    assert seen.keys() == SIDES.keys()


@pytest.mark.parametrize(
    "swap", ["--blocks_to_swap=2", pytest.param("--blocks_to_swap=1 --host_weights=staged", marks=pytest.mark.slow)]
)
def test_swapped_experts_write_the_files_of_resident_ones(folder, swap):
    run_both(folder, "--gradient_checkpointing", *swap.split(), every=1)
    assert differing(folder, run_alone(folder)) == []


@pytest.mark.slow
def test_samples_show_both_experts_after_as_many_steps(folder, sample_models):
    more = [*sample_models, "--vae_dtype", "fp32", "--sample_every_n_steps", "2", "--sample_at_first"]
    kept = ("--preserve_prompts", str(folder / "prompts.txt"), "--preserve_every=2", "--validate_every_n_steps=2")
    kept += ("--max_train_epochs", "1", "--preserve_random", "5")
    lines = run_both(folder, *more, *kept, "--sample_every_n_epochs", "1", every=100)
    drawn = {re.sub(r"_\d{14}.*", "", path.name) for path in (folder / "out" / "sample").glob("one_*_0*")}
    turns = ("e000000", "000002", "e000001")
    assert drawn == {f"one_{turn}_00" for turn in turns}
    assert any(line.startswith("sampled") for line in lines)
    alone = run_alone(folder, *more[1:3], *kept)  # their reference predictions are compared, too
    assert differing(folder, alone) == []


def test_names_of_either_expert_are_locked_and_replaced_with_overwrite_alone(folder):
    short = ("--max_train_steps", "1", "--save_state")
    run_both(folder, *short)
    with pytest.raises(InputError, match="holds an earlier run called one-high_noise"):
        run_both(folder, *short)
    for name in ("one", "one-high_noise", "one-low_noise"):
        with (
            sole_writer(folder / "out", name, name, "wait"),
            pytest.raises(InputError, match=f"--output_name {name} in"),
        ):
            run_both(folder, *short, "--overwrite")
    state = folder / "out" / "one-low_noise-state" / "state.pt"
    before = state.stat().st_mtime_ns
    run_both(folder, *short, "--overwrite")
    assert state.stat().st_mtime_ns > before


def both_flags(folder, *more):
    return flags(folder, *COMMON, "--dit_high_noise", str(folder / "high.safetensors"), *more)


def configs(folder, *more):
    """What each expert is asked for, by its name."""
    return {own.expert: own for own in expert_configs(parse_train(both_flags(folder, *more)))}


def test_slices_and_reference_predictions_go_to_the_expert_that_they_were_made_on(folder, sample_models):
    preserve = (*sample_models[1:3], "--preserve_prompts", str(folder / "prompts.txt"), "--preserve_every=2")
    preserve += ("--preserve_random", "5", "--guard", "0")
    run_both(folder, *preserve, "--save_as", "slice", "--max_train_steps", "2")
    out = [folder / "out" / f"one-{expert}" for expert in ("low_noise", "high_noise")]
    slices = [str(path.with_name(f"{path.name}.slice.safetensors")) for path in out]
    answers = [str(path.with_name(f"{path.name}.answers.safetensors")) for path in out]
    more = (*preserve, "--ffid", "3", "--output_name", "two", "--slices", *slices, "--preserve_answers", *answers)
    for expert, own in configs(folder, *more).items():
        assert [path.name for path in own.slices] == [f"one-{expert}.slice.safetensors"]
        assert own.preserve.answers.name == f"one-{expert}.answers.safetensors"
    lines = run_both(folder, *more, "--max_train_steps", "2")
    assert sum("on top of" in line for line in lines) == 2 and not any("no file of" in line for line in lines)
    of_one = parse_train(both_flags(folder, *preserve, "--slices", slices[0], "--preserve_answers", answers[0]))
    told = "note: no file of the high_noise expert is in --slices and --preserve_answers, so it trains without one"
    assert experts_lines(of_one, expert_configs(of_one))[1:] == [told]
    with pytest.raises(InputError, match="give one file of each expert"):
        configs(folder, *preserve, "--preserve_answers", answers[0], answers[0])


def test_states_are_told_apart_and_one_name_stands_for_both(folder):
    run_both(folder, "--save_state", "--max_train_epochs", "1")
    states = {expert: folder / "out" / f"one-{expert}-state" for expert in SIDES}
    low, high = str(states["low_noise"]), str(states["high_noise"])
    for given in ([low, high], [high, low], [str(folder / "out" / "one-state")]):
        assert {name: own.resume for name, own in configs(folder, "--resume", *given).items()} == states
    for given, told in (([high, high], "one state of each expert"), ([high], "give both of their states")):
        with pytest.raises(InputError, match=told):
            configs(folder, "--resume", *given)
    shutil.rmtree(states["low_noise"])
    lines = run_both(folder, "--resume", "latest", "--max_train_epochs", "2")
    assert "one-low_noise has no usable state, so it begins at its first step" in lines
    assert any(line.startswith("high_noise: continues from") for line in lines)
    begun_again = [read_tensors(out / "one-low_noise.safetensors") for out in (folder / "out", run_alone(folder))]
    assert begun_again[0] == begun_again[1]
    shutil.rmtree(states["high_noise"])
    with pytest.raises(InputError, match="has no usable state of one; choose another --output_name"):
        run_both(folder, "--resume", "latest")


def test_the_bar_and_the_trackers_show_a_loss_of_each(folder, capfd):
    run_both(folder, "--logging_dir", str(folder / "logs"), "--max_train_epochs", "1")
    (log,) = (folder / "logs").glob("*/network_train")
    events = EventAccumulator(str(log)).Reload()
    for expert in SIDES:
        assert [event.step for event in events.Scalars(f"loss/current/{expert}")] == [1, 2, 3]
    assert "loss/current" not in events.Tags()["scalars"]
    shown = capfd.readouterr().err
    assert re.search(r"6/6 .*high_noise=\d\.\d{4} \(average \d\.\d{4}\), low_noise=\d\.\d{4}", shown)
    shutil.rmtree(folder / "logs")


REFUSED = {
    "--min_timestep 10": "with --dit_high_noise leave them out",
    "--max_timestep 900": "with --dit_high_noise leave them out",
    "--task t2v-14B": "needs --timestep_boundary",
    "--timestep_boundary 1000": "leaves one expert without timesteps",
    "--timestep_boundary 1.5": "leaves the low_noise expert only 1e-14 of the distribution shift",
    "--timestep_boundary 0.9999": "--timestep_boundary 999.9 leaves the high_noise expert only",
    "--continue_slice": "leave it out if neither expert does",
    "--dit {folder}/high.safetensors": "are the same file",
    "--resume {folder}/none-state": "give both of their states",
    "--resume latest {folder}/none-state": "latest stands for the states of both",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_two_experts_cannot_do_is_refused_with_what_to_use(folder, given):
    with pytest.raises(InputError, match=re.escape(REFUSED[given])):
        run_both(folder, *given.format(folder=folder).split())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_two_processes_take_the_same_turns(folder, sample_models):
    more = [*sample_models, "--vae_dtype", "fp32", "--sample_every_n_steps", "1"]
    both = ("--dit_high_noise", str(folder / "high.safetensors"), "--switch_expert_every", "2")
    run_two(folder, unused_port(), *COMMON, *both, *more)
    for expert, (dit, side) in SIDES.items():
        own = ("--dit", str(folder / f"{dit}.safetensors"), "--output_name", f"one-{expert}", side)
        more = ("--preserve_distribution_shape", *own, "--output_dir", str(folder / "alone"))
        run_two(folder, unused_port(), *COMMON, *more)
    assert differing(folder, folder / "alone") == []


@pytest.mark.slow
def test_experts_that_start_from_pictures(tmp_path):
    write_model(write_run_files(tmp_path, "i2v-A14B") / "high.safetensors", "i2v-A14B", seed=5)
    steps = ("--max_train_epochs", "1", "--mixed_precision", "bf16")
    high = ("--dit_high_noise", str(tmp_path / "high.safetensors"), *sample_flags(tmp_path, "i2v-A14B"))
    train(parse_train(run_flags(tmp_path, "i2v-A14B", *steps, *high)), say=print)
    drawn = sorted((tmp_path / "out" / "sample").glob("one_e000000_*.mp4"))
    assert len(drawn) == 2 and drawn[0].read_bytes() != drawn[1].read_bytes()  # of one seed, from two pictures
    for expert, (dit, side) in SIDES.items():
        own = (
            "--dit",
            str(tmp_path / f"{dit}.safetensors"),
            "--output_name",
            f"one-{expert}",
            side.replace("875", "900"),
        )
        own += ("--preserve_distribution_shape", "--output_dir", str(tmp_path / "alone"))
        train(parse_train(run_flags(tmp_path, "i2v-A14B", *steps, *own)), say=print)
    assert differing(tmp_path, tmp_path / "alone") == []


def test_timesteps_are_shown_by_expert(folder):
    shown = [line.split("timesteps")[0] for line in run_both(folder, "--show_timesteps", "console") if "#" in line]
    assert shown == ["high_noise: "] * 2 + ["low_noise: "] * 2  # of two sizes


def test_files_that_are_not_two_models_of_one_shape_are_refused(folder):
    shutil.copy(folder / "base.safetensors", folder / "copy.safetensors")
    high = load_file(folder / "high.safetensors")
    fewer = {name: tensor for name, tensor in high.items() if not name.startswith("blocks.1.")}
    save_file(fewer, folder / "other.safetensors", {"num_heads": "4", "text_len": "8"})
    for name, told in (("copy", "hold the same model"), ("other", "models of different shapes")):
        with pytest.raises(InputError, match=told):
            run_both(folder, "--dit_high_noise", str(folder / f"{name}.safetensors"))


def test_weights_that_are_cast_need_room_for_both_experts(folder, monkeypatch):
    wide = [write_dit(folder / f"wide{seed}.safetensors", torch.float32, seed) for seed in range(2)]
    size = wide[0].stat().st_size  # in fp32, so of both in bf16
    monkeypatch.setattr(checks, "available_bytes", lambda: size // 2)
    with pytest.raises(InputError, match="the weights of both experts"):
        run_both(folder, "--dit", str(wide[0]), "--dit_high_noise", str(wide[1]))
    run_both(folder, "--max_train_epochs", "1")


@pytest.mark.parametrize(("where", "kept"), [(Stage, {"high_noise", "low_noise"}), (training, {"high_noise"})])
def test_an_error_loses_nothing_of_an_idle_expert(folder, monkeypatch, where, kept):
    """In the fifth placement or the fourth step: preparing places each once, then high and low take two steps each."""
    name, after = ("bring", 4) if where is Stage else ("update", 3)
    calls, real = [], getattr(where, name)

    def failing(*given):
        calls.append(given)
        if len(calls) > after:
            raise InputError("no more of it")
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="no more of it"):
        patch.setattr(where, name, failing)
        run_both(folder)
    assert set(names(folder / "out")) == {f"one-{expert}-step00000002-state" for expert in kept}


def test_full_logs_stop_the_run_with_a_state_of_each(folder, monkeypatch):
    add_scalar, calls = SummaryWriter.add_scalar, []

    def add_until_full(writer, *given, **more):
        calls.append(given)
        if len(calls) > 40:
            raise OSError(28, "No space left on device")
        return add_scalar(writer, *given, **more)

    logs = ("--logging_dir", str(folder / "logs"))
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"logs cannot be written to"):
        patch.setattr(SummaryWriter, "add_scalar", add_until_full)
        run_both(folder, *logs)
    shutil.rmtree(folder / "logs")
    run_both(folder, "--resume", "latest")
    assert {len(list((folder / "out").glob(f"one-{expert}-*-state"))) for expert in SIDES} == {1}
    for path in (folder / "out").glob("*-state"):
        shutil.rmtree(path)
    assert differing(folder, run_alone(folder)) == []


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
