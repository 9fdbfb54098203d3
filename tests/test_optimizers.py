"""Optimizers by name, and schedules against their formulas."""

import copy
import io
import math

import pytest
import torch
from live_bytes import LiveBytes

from utils.learning import optimizers
from utils.learning.lr_schedules import SCHEDULES, ScheduleConfig, build_scheduler, check_schedule, steps_of
from utils.learning.optimizers import OptimizerConfig, build_optimizer, check_optimizer, learning_rates, load_optimizer
from wan.errors import InputError

CLASSES = {
    "": "AdamW",
    "adamW": "AdamW",
    "AdamW8bit": "AdamW8bit",
    "PagedAdamW8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
    "adafactor": "Adafactor",
    "SGD": "SGD",
    "radam": "RAdam",
    "torch.optim.NAdam": "NAdam",
    "bitsandbytes.optim.AdEMAMix8bit": "AdEMAMix8bit",
}
REFUSED = {
    "Muon": "whole weight matrices",
    "torch.optim.Adafactor": "starts at 0",
    "bitsandbytes.optim.LAMB8bit": "starts at 0",
    "schedulefree.AdamWScheduleFree": "wrong one",
    "LBFGS": "several times",
    "AdmaW": "not a known optimizer .did you mean AdamW",
    "no.such.Optimizer": "cannot be imported",
    "torch.nn.Linear": "not a known optimizer",
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_name_gives_an_optimizer_that_steps(name):
    parameter = torch.nn.Parameter(torch.zeros(5000))
    optimizer = build_optimizer(OptimizerConfig(name, 0.1), [parameter])
    parameter.grad = torch.ones(5000)
    optimizer.step()
    assert type(optimizer).__name__ == CLASSES[name]
    assert (parameter < 0).all()


def test_arguments_reach_the_optimizer():
    config = OptimizerConfig("AdamW", 0.1, ("weight_decay=0.5", "betas=(0.8, 0.9)"))
    group = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.5, (0.8, 0.9))


@pytest.mark.parametrize(("name", "args"), [("AdamW", ()), ("adam", ("amsgrad=True",)), ("SGD", ("weight_decay=0.1",))])
def test_on_a_gpu_a_step_takes_no_memory_and_comes_to_the_same(monkeypatch, name, args):
    found = []
    for on in ((), ("cpu",)):
        monkeypatch.setattr(optimizers, "_FUSED_ON", on)
        parameter = torch.nn.Parameter(torch.arange(-2500.0, 2500) / 1000)
        optimizer = build_optimizer(OptimizerConfig(name, 0.1, args), [parameter])
        for _ in range(2):
            parameter.grad = 3 * parameter.detach().cos()
            with LiveBytes() as count:
                optimizer.step()
        found.append((parameter.detach(), count.peak))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] < 100 < found[0][1]


@pytest.mark.parametrize(("name", "arg"), [("AdamW", "foreach=True"), ("AdamW", "fused=False"), ("NAdam", "eps=1e-8")])
def test_how_an_optimizer_steps_is_left_to_whoever_says_so(monkeypatch, name, arg):
    monkeypatch.setattr(optimizers, "_FUSED_ON", ("cpu",))
    optimizer = build_optimizer(OptimizerConfig(name, 0.1, (arg,)), [torch.nn.Parameter(torch.zeros(1))])
    assert not optimizer.param_groups[0].get("fused")


@pytest.mark.parametrize(("then", "now"), [((), ("cpu",)), (("cpu",), ()), (("cpu",), ("cpu",))])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_saved_optimizer_steps_as_its_new_device_does_and_under_the_scaler_of_fp16(monkeypatch, name, then, now):
    parameter, scaler, saved = torch.nn.Parameter(torch.zeros(5)), torch.amp.GradScaler("cpu"), None
    for devices in (then, now):
        monkeypatch.setattr(optimizers, "_FUSED_ON", devices)
        optimizer = build_optimizer(OptimizerConfig(name, 0.1), [parameter])
        if saved is not None:
            load_optimizer(optimizer, saved)
        scaler.scale(parameter.sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["fused"] == (True if now else None)
    torch.testing.assert_close(parameter.detach(), torch.full((5,), -0.2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_and_unfit_optimizers_are_refused_with_a_reason(name):
    with pytest.raises(InputError, match=REFUSED[name]):
        check_optimizer(OptimizerConfig(name))


@pytest.mark.parametrize(
    "args", [("decay=1",), ("weight_decay",), ("weight_decay=much",), ("lr=1",), ("betas=(5, 5)",)]
)
def test_wrong_arguments_are_refused(args):
    with pytest.raises(InputError, match="optimizer_"):
        check_optimizer(OptimizerConfig("AdamW", 0.1, args))


@pytest.mark.parametrize("setting", ["scale_parameter", "relative_step"])
def test_adafactor_runs_without_the_settings_that_need_the_weights(setting):
    check_optimizer(OptimizerConfig("adafactor", 0.1, (f"{setting}=False",)))
    with pytest.raises(InputError, match="learning_rate"):
        check_optimizer(OptimizerConfig("adafactor", 0.1, (f"{setting}=True",)))


def rates(config, steps=20):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(config, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(learning_rates(optimizer)["lr/slice"])
        optimizer.step()
        scheduler.step()
    return found


WARMUP, STEPS = 4, 20
PROGRESS = [max(step - WARMUP, 0) / (STEPS - WARMUP) for step in range(STEPS)]
DECAYS = {
    "constant_with_warmup": [1.0] * STEPS,
    "linear": [1 - p for p in PROGRESS],
    "cosine": [(1 + math.cos(math.pi * p)) / 2 for p in PROGRESS],
    "inverse_sqrt": [math.sqrt(WARMUP / max(step, WARMUP)) for step in range(STEPS)],
    "rex": [(1 - p) / (0.5 + 0.5 * (1 - p)) for p in PROGRESS],
}


@pytest.mark.parametrize("name", DECAYS)
def test_schedules_follow_their_formulas_after_a_warmup(name):
    expected = [min(step / WARMUP, 1) * factor for step, factor in enumerate(DECAYS[name])]
    assert rates(ScheduleConfig(name, warmup="20%")) == pytest.approx(expected)


def test_the_other_schedules_read_their_settings():
    assert rates(ScheduleConfig("cosine_with_min_lr", min_lr_ratio=0.25))[-1] == pytest.approx(0.25, abs=0.01)
    assert rates(ScheduleConfig("rex", min_lr_ratio=0.25))[-1] > 0.25
    assert rates(ScheduleConfig("polynomial", power=2.0))[10] == pytest.approx(0.25, abs=1e-4)
    assert rates(ScheduleConfig("cosine_with_restarts", cycles=2))[10] == 1
    assert rates(ScheduleConfig("warmup_stable_decay", warmup="5", decay="5", min_lr_ratio=0.1))[5:15] == [1] * 10
    assert rates(ScheduleConfig("inverse_sqrt", timescale=1))[3] == pytest.approx(0.5)
    steps = ScheduleConfig("piecewise_constant", args=("step_rules='1:5,0.5:10,0.1'",))
    assert rates(steps) == [1] * 5 + [0.5] * 5 + [0.1] * 10


def test_a_scheduler_class_takes_the_place_of_a_name():
    assert rates(ScheduleConfig(class_path="StepLR", args=("step_size=2", "gamma=0.5")), 5) == [1, 1, 0.5, 0.5, 0.25]
    assert rates(ScheduleConfig(class_path="torch.optim.lr_scheduler.ConstantLR", args=("factor=0.5",)), 2) == [0.5] * 2


@pytest.mark.parametrize(("text", "steps"), [("50", 50), ("0.05", 10), ("5%", 10), ("0", 0), ("100%", 200), (" 7 ", 7)])
def test_warmup_is_steps_a_share_or_a_percentage(text, steps):
    assert steps_of(text, 200, "--lr_warmup_steps") == steps


@pytest.mark.parametrize("text", ["-1", "many", "1.5", "300", "101%", "nan", "inf"])
def test_wrong_warmups_are_refused(text):
    with pytest.raises(InputError, match="--lr_warmup_steps"):
        steps_of(text, 200, "--lr_warmup_steps")


MISTAKES = {
    "misspelt": (ScheduleConfig("linaer"), "did you mean linear.*allowed: constant"),
    "adafactor": (ScheduleConfig("adafactor"), "constant_with_warmup"),
    "warmup of constant": (ScheduleConfig("constant", warmup="50"), "use --lr_scheduler constant_with_warmup"),
    "unread power": (ScheduleConfig("linear", power=2.0), "does not use --lr_scheduler_power"),
    "unread argument": (ScheduleConfig("linear", args=("speed=3",)), "speed"),
    "no rules": (ScheduleConfig("piecewise_constant"), "step_rules"),
    "plateau": (ScheduleConfig(class_path="ReduceLROnPlateau"), "not a schedule over steps"),
    "no class": (ScheduleConfig(class_path="NoLR"), "cannot be imported"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_do_not_fit_the_schedule_are_refused(mistake):
    config, told = MISTAKES[mistake]
    with pytest.raises(InputError, match=told):
        check_schedule(config, 100)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_of_zero_fits_every_schedule(name):
    args = ("step_rules='1:5,0.5'",) if name == "piecewise_constant" else ()
    check_schedule(ScheduleConfig(name, warmup="0%", args=args), 100)


# The settings of transformers' own schedules: the same numbers, without the seconds that its import takes.
OTHERS = {
    "linear": {},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-3, "power": 0.5},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr": 0.25, "num_cycles": 0.25},
    "warmup_stable_decay": {"min_lr_ratio": 0.2, "warmup_type": "1-sqrt", "decay_type": "linear"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_schedules_are_those_of_transformers(name):
    import transformers  # here, because it takes seconds

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    decay = {"num_decay_steps": 6} if name == "warmup_stable_decay" else {}
    theirs = transformers.get_scheduler(name, optimizer, 4, 20, scheduler_specific_kwargs={**OTHERS[name], **decay})
    expected = [theirs.lr_lambdas[0](step) for step in range(20)]
    args = tuple(f"{key}={value!r}" for key, value in OTHERS[name].items())
    assert rates(ScheduleConfig(name, "4", "6" if decay else "0", args=args)) == pytest.approx(expected)


IMPOSSIBLE = {
    "rex that climbs": ScheduleConfig("rex", min_lr_ratio=2.0),
    "rex below zero": ScheduleConfig("rex", min_lr_ratio=-1.0),
    "negative power": ScheduleConfig("polynomial", power=-1.0),
    "negative power as an argument": ScheduleConfig("polynomial", args=("power=-0.5",)),
    "an end above the start": ScheduleConfig("polynomial", args=("lr_end=2",)),
    "nan": ScheduleConfig("cosine", args=("num_cycles=nan",)),
    "infinite cycles": ScheduleConfig("cosine", args=("num_cycles=1e999",)),
    "no time": ScheduleConfig("inverse_sqrt", args=("timescale=0",)),
    "a minimum above the start": ScheduleConfig("cosine_with_min_lr", args=("min_lr=3",)),
    "an unknown ramp": ScheduleConfig("warmup_stable_decay", args=("decay_type='liner'",)),
    "rules that are none": ScheduleConfig("piecewise_constant", args=("step_rules='1,2'",)),
    "rules with nan": ScheduleConfig("piecewise_constant", args=("step_rules='nan:5,1'",)),
    "rules that are a number": ScheduleConfig("piecewise_constant", args=("step_rules=3",)),
    "an empty class path": ScheduleConfig(class_path=".x"),
}


@pytest.mark.parametrize("mistake", IMPOSSIBLE)
def test_a_rate_that_climbs_or_is_no_number_is_refused_before_the_run(mistake):
    with pytest.raises(InputError, match="--lr_scheduler"):
        check_schedule(IMPOSSIBLE[mistake], 20)


@pytest.mark.parametrize(
    "arg", ["betas=(0.9, nan)", "betas=(0.9, 1e999)", "eps=1e999", "weight_decay=-1e999", "lr=1e999"]
)
def test_an_optimizer_argument_that_is_not_finite_is_refused(arg):
    with pytest.raises(InputError, match=r"--optimizer_args .*(must be finite|write key=value)"):
        check_optimizer(OptimizerConfig("AdamW", 0.1, (arg,)))


def test_a_schedule_is_resumed_from_its_state():
    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return build_scheduler(ScheduleConfig("rex", warmup="4"), optimizer, 20)

    first, second = fresh(), fresh()
    for _ in range(7):
        first.optimizer.step()
        first.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.get_last_lr() == first.get_last_lr() and second.lr_lambdas[0](9) == first.lr_lambdas[0](9)


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [
        ("AdamW", "weigth_decay=0.1", "weigth_decay: AdamW has no such argument (did you mean weight_decay?)"),
        ("torch.optim.SGD", "Momentum=0.1", "Momentum: SGD has no such argument (did you mean momentum?)"),
        ("AdamW", "lr=0.1", "lr=0.1: set it as --learning_rate"),
        ("AdamW", "weight_decay=0,1", "weight_decay=(0, 1): weight_decay must be one number with a decimal point"),
        ("AdamW", "betas=(0.9)", "betas=0.9: betas must be 2 numbers, such as (0.9,0.999)"),
        ("AdamW", "amsgrad=1", "amsgrad=1: amsgrad must be True or False"),
    ],
)
def test_an_argument_that_an_optimizer_does_not_take_is_answered_with_the_nearest(name, arg, said):
    with pytest.raises(InputError) as refused:
        check_optimizer(OptimizerConfig(name, 0.1, (arg,)))
    assert str(refused.value).startswith(f"--optimizer_args {said}")


def test_arguments_of_a_schedule_are_answered_in_the_same_way():
    with pytest.raises(InputError, match=r"num_cycle: cosine has no such argument \(did you mean num_cycles\?\)"):
        check_schedule(ScheduleConfig("cosine", args=("num_cycle=3",)), 20)


def test_an_argument_that_is_given_twice_is_refused():
    with pytest.raises(InputError, match="--optimizer_args eps is given twice"):
        check_optimizer(OptimizerConfig("AdamW", 0.1, ("eps=1e-8", "eps=1e-6")))
