"""A state that is damaged or made by hand is refused in one line before it is applied; the newest good one is taken."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_run import CONFIG, run, some_state, write_inputs

from utils.learning import optimizers
from utils.learning.lr_schedules import ScheduleConfig, build_scheduler
from utils.learning.optimizers import OptimizerConfig, build_optimizer
from utils.preserve.guard import Gathering, Guard
from utils.run.plan import plan_training
from utils.run.save_schedule import SaveConfig
from utils.run.state import LATEST, UnusableState, choose_state, read_state, save_state
from utils.run.state_check import check_state, expected_state
from utils.selective_finetune import attach_slice
from wan.errors import InputError
from wan.model import WanModel

PLAN = plan_training([(number,) for number in range(7)], 1, 3, 9, None)  # three steps an epoch, of 3, 3 and 1 batches
CPU = torch.device("cpu")


def trained_state(optimizer="AdamW", steps=4):
    """A state of a real optimizer and schedule after step 4, and what it is compared with."""
    with torch.random.fork_rng():
        trained = attach_slice(WanModel(CONFIG), "0.01", 2)
    config, schedule = OptimizerConfig(optimizer, 1e-3), ScheduleConfig("cosine")
    settings = {"ff": "0.01", "ffid": "2", "seed": "1"}
    units = {name: matrix.units for name, matrix in trained.matrices.items()}
    expected = expected_state(settings, PLAN, units, config, schedule, CPU, False)
    built = build_optimizer(config, trained.parameters())
    scheduler = build_scheduler(schedule, built, PLAN.steps)
    for _ in range(steps):
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        built.step()
        scheduler.step()
    tables = {"trained": trained.state_dict(), "optimizer": built.state_dict(), "scheduler": scheduler.state_dict()}
    place = {"epoch": 1, "batch": 3, "step": 4, "planned_steps": 9, "losses": [0.5] * 3}
    return some_state(settings=settings, **tables, **place), expected


@pytest.fixture(scope="module")
def good():
    return trained_state()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad", "RMSprop", "NAdam"])
def test_what_a_run_saves_is_accepted(tmp_path, optimizer):
    state, expected = trained_state(optimizer)
    save_state(tmp_path, state)
    check_state(tmp_path, read_state(tmp_path), expected)


@pytest.mark.parametrize(("then", "now"), [((), ("cpu",)), (("cpu",), ())])
def test_a_state_of_a_device_on_which_the_optimizer_steps_otherwise_is_accepted(monkeypatch, tmp_path, then, now):
    monkeypatch.setattr(optimizers, "_FUSED_ON", then)
    state = trained_state()[0]
    monkeypatch.setattr(optimizers, "_FUSED_ON", now)
    check_state(tmp_path, state, trained_state(steps=0)[1])


@pytest.mark.parametrize(("epoch", "batch", "step"), [(0, 3, 1), (0, 7, 3), (1, 0, 3), (1, 6, 5), (3, 0, 9)])
def test_every_place_that_a_run_can_be_at_is_accepted(good, tmp_path, epoch, batch, step):
    state = replace(good[0], epoch=epoch, batch=batch, step=step, losses=[0.5] * min(step, 3))
    check_state(tmp_path, replace(state, scheduler={**state.scheduler, "last_epoch": step}), good[1])


def first(table):
    return next(iter(table))


# What a hand can do to a state's tables, by what the message says of it.
CHANGES = {
    "not 9 of fp32": lambda s: s.trained.update({first(s.trained): torch.zeros(3)}),
    "not 9 of fp32 either": lambda s: s.trained.update({first(s.trained): torch.zeros(9).double()}),
    "another slice": lambda s: s.trained.pop(first(s.trained)),
    "another slice too": lambda s: s.trained.update(_extra_state=torch.tensor([91] * 900, dtype=torch.uint8)),
    "not finite": lambda s: s.trained[first(s.trained)].fill_(float("nan")),
    "repeats its values": lambda s: s.trained.update(
        {n: torch.zeros(1).expand(t.shape) for n, t in s.trained.items() if n == first(s.trained)}
    ),
    "optimizer's part": lambda s: s.optimizer.pop("state"),
    "optimizer's settings": lambda s: s.optimizer["param_groups"][0].pop("lr"),
    "optimizer's settings, a text": lambda s: s.optimizer["param_groups"][0].update(lr="x"),
    "optimizer's settings, amsgrad": lambda s: s.optimizer["param_groups"][0].update(amsgrad=True),
    "optimizer's settings, fused": lambda s: s.optimizer["param_groups"][0].update(fused="x"),
    "optimizer's settings, betas": lambda s: s.optimizer["param_groups"][0].update(betas=(0.9,)),
    "optimizer's settings, params": lambda s: s.optimizer["param_groups"][0].update(params=[0]),
    "other parameters": lambda s: s.optimizer["state"].update({99: {}}),
    "optimizer's state of parameter 0": lambda s: s.optimizer["state"].pop(0),
    "optimizer's state of parameter 1": lambda s: s.optimizer["state"][1].pop("exp_avg"),
    "optimizer's state of parameter 2": lambda s: s.optimizer["state"][2].update(exp_avg=torch.zeros(8)),
    "not finite either": lambda s: s.optimizer["state"][2]["exp_avg_sq"].fill_(float("inf")),
    "schedule is incomplete": lambda s: s.scheduler.pop("lr_lambdas"),
    "schedule is not": lambda s: s.scheduler.update(base_lrs=["x"]),
    "schedule is not, a method": lambda s: s.scheduler.update(step=5),
    "schedule is not that of step 4": lambda s: s.scheduler.update(last_epoch=5),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_change_by_hand_is_refused_with_what_is_wrong(good, tmp_path, reason):
    state, expected = copy.deepcopy(good[0]), good[1]
    count = next(iter(expected.counts.values()))
    CHANGES[reason](state)
    with pytest.raises(UnusableState) as error:
        check_state(tmp_path, state, expected)
    reason = reason.partition(",")[0].removesuffix(" too").removesuffix(" either").replace("9 of", f"{count} of")
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def guarded(good):
    """A state of a run with a guard, and what it is compared with."""
    settings = {**good[0].settings, "guard": "1.0"}
    with torch.random.fork_rng():
        trained = attach_slice(WanModel(CONFIG), "0.01", 2)
    rest = (OptimizerConfig("AdamW", 1e-3), ScheduleConfig("cosine"), CPU, False)
    expected = expected_state(settings, PLAN, {name: own.units for name, own in trained.matrices.items()}, *rest)
    return replace(good[0], settings=settings, guard=Guard(1.0, Gathering(trained).sums).state()), expected


GUARDS = {
    "nothing": lambda guard: guard.clear(),
    "one matrix less": lambda guard: guard.pop(first(guard)),
    "one matrix more": lambda guard: guard.update(more=guard[first(guard)]),
    "no outputs": lambda guard: guard[first(guard)].pop("outputs"),
    "another shape": lambda guard: guard[first(guard)].update(outputs=torch.zeros(8, 5)),
    "another dtype": lambda guard: guard[first(guard)].update(inputs=guard[first(guard)]["inputs"].double()),
    "a list": lambda guard: guard.update({first(guard): [1.0]}),
    "not finite": lambda guard: guard[first(guard)]["outputs"].fill_(float("nan")),
    "repeats its values": lambda guard: guard[first(guard)].update(
        outputs=torch.zeros(1).expand(guard[first(guard)]["outputs"].shape)
    ),
}


@pytest.mark.parametrize("change", GUARDS)
def test_a_guard_that_was_changed_by_hand_is_refused(guarded, tmp_path, change):
    state, expected = copy.deepcopy(guarded[0]), guarded[1]
    check_state(tmp_path, state, expected)
    GUARDS[change](state.guard)
    reason = change if change in ("not finite", "repeats its values") else "its guard's statistics are not as they were"
    with pytest.raises(UnusableState, match=reason):
        check_state(tmp_path, state, expected)


def test_a_guard_belongs_to_the_states_of_runs_that_have_one(good, guarded, tmp_path):
    with pytest.raises(UnusableState, match="its guard's statistics are not as they were saved"):
        check_state(tmp_path, replace(guarded[0], guard=None), guarded[1])
    with pytest.raises(UnusableState, match="its guard's statistics are not as they were saved"):
        check_state(tmp_path, replace(good[0], guard=guarded[0].guard), good[1])
    with pytest.raises(InputError, match=r"another run: guard 0 \(now 1.0\)"):
        check_state(tmp_path, good[0], guarded[1])


PLACES = [{"epoch": 0}, {"batch": 2}, {"batch": 9}, {"step": 5}, {"step": 0}, {"planned_steps": 3}, {"losses": [0.5]}]


@pytest.mark.parametrize("change", PLACES, ids=str)
def test_a_place_that_no_run_can_be_at_is_refused(good, tmp_path, change):
    with pytest.raises(UnusableState, match=r"no run is at|it has 1 losses"):
        check_state(tmp_path, replace(good[0], **change), good[1])


FIELDS = {"step": -1, "epoch": True, "batch": 1.5, "losses": [float("nan")], "trained": [], "settings": {"seed": 5}}
FIELDS |= {"name": None, "saved_at": "now", "scaler": 5}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused(tmp_path, field):
    fields = {field: FIELDS[field]}
    if field == "settings":
        save_state(tmp_path, some_state(**fields))
    else:
        save_state(tmp_path, replace(some_state(), **fields))
    with pytest.raises(UnusableState, match="cannot be used"):
        read_state(tmp_path)


def test_a_state_without_some_setting_is_passed_over_and_one_of_other_settings_is_not(good, tmp_path):
    state, expected = good
    for step, settings in ((1, state.settings), (2, {}), (3, {**state.settings, "seed": "2"})):
        save_state(tmp_path / f"a-step{step:08d}-state", replace(state, step=step, settings=settings))

    def choose(lines):
        return choose_state(LATEST, SaveConfig(tmp_path, "a"), lambda *own: check_state(*own, expected), lines.append)

    with pytest.raises(InputError, match=r"another run: seed 2 \(now 1\)"):
        choose([])


def test_a_damaged_newest_state_is_passed_over_with_its_reason(tmp_path):
    folder = write_inputs(tmp_path)
    run(folder, "--save_state", "--save_every_n_steps", "2", "--max_train_epochs", "1")
    newest = folder / "out" / "one-step00000004-state"
    shorter = newest / "state.pt"
    state = read_state(newest)
    state.trained[first(state.trained)][0] = float("nan")
    save_state(newest, state)
    (folder / "out" / "one-state" / "state.pt").write_bytes(shorter.read_bytes()[:-100])
    lines = run(folder, "--save_state", "--max_train_epochs", "1", "--resume", "latest")
    notes = [line for line in lines if line.startswith("note: --resume")]
    assert [("one-state" in notes[0], "cannot be used" in notes[0]), "not finite" in notes[1]] == [(True, True), True]
    assert any("continues from" in line and "one-step00000002-state" in line for line in lines)
    with pytest.raises(InputError, match="not finite"):
        run(folder, "--max_train_epochs", "1", "--resume", str(newest))
