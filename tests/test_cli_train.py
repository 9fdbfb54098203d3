"""The training script's flags: the user's command, the config file, one line for every mistake."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from short_command import SHORT, refusal

import wan_train_network
from utils.cli.command import Parser, dtype, run, task
from utils.cli.swap_flags import size
from utils.cli.train import parse_train
from utils.cli.train_flags import add_flags
from utils.cli.unsupported import TRAINING
from utils.preserve.guard import WEIGHT

COMMAND = shlex.split("""
    --task t2v-A14B --dit wan22_t2v_14B_low_noise_bf16.safetensors --dataset_config data.toml --sdpa
    --mixed_precision bf16 --optimizer_type adamW --learning_rate 1e-4 --gradient_checkpointing
    --max_data_loader_n_workers 2 --persistent_data_loader_workers --timestep_sampling shift --discrete_flow_shift 3.0
    --max_train_epochs 1000 --save_every_n_epochs 10 --save_state --seed 1234 --output_dir saves
    --output_name character1_512 --vae vae.safetensors --t5 models_t5.pth --sample_prompts random_prompt.txt
    --sample_every_n_epochs 5 --logging_dir logs --lr_warmup_steps "50" --lr_scheduler "linear"
    --preserve_distribution_shape --min_timestep "0" --max_timestep "1000" --preserve_distribution_shape
    --ff 0.001 --ffid 1 --blocks_to_swap 24
""")
pytestmark = pytest.mark.usefixtures("in_flag_files")


def test_the_users_command_is_understood():
    config = parse_train(COMMAND)
    assert (config.ff, config.ffid, config.task, config.seed, config.swap.blocks_to_swap) == (
        "0.001",
        1,
        "t2v-A14B",
        1234,
        24,
    )
    assert (config.max_train_epochs, config.save.every_n_epochs, config.save.save_state) == (1000, 10, True)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamW", 1e-4)
    assert (config.schedule.name, config.schedule.warmup) == ("linear", "50")
    assert (config.timesteps.sampling, config.timesteps.shift, config.timesteps.preserve_shape) == ("shift", 3.0, True)
    assert (config.samples.prompts[0].prompt, config.samples.every_n_epochs) == ("a cat", 5)
    assert config.samples.vae_dtype == torch.bfloat16 and config.log.trackers == ("tensorboard",)
    assert config.gradient_checkpointing and config.persistent_workers and 1 <= config.workers <= 2


def test_what_is_left_out_has_musubi_tuners_defaults():
    config = parse_train(SHORT)
    assert (config.task, config.max_train_steps, config.optimizer.learning_rate) == ("t2v-14B", 1600, 2e-6)
    assert (config.timesteps.sampling, config.schedule.name, config.mixed_precision) == ("sigma", "constant", "no")
    assert config.samples is None and config.log.trackers == ()


def test_the_launchers_precision_is_taken_where_the_flag_is_missing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse_train(SHORT).mixed_precision == "bf16"
    assert parse_train([*SHORT, "--mixed_precision", "no"]).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "fp8 is not one of no, bf16, fp16" in refusal(*SHORT)


def test_a_file_gives_defaults_and_the_command_line_wins(flag_files):
    text = (
        'ff = "0.1"\n[model]\ndit = "C:/train/base.safetensors"\n[train]\nlearning_rate = 1e-3\nseed = 7\nsdpa = true\n'
    )
    text += 'save_state = false\nlogit_mean = -1.5\ntimestep_sampling = "logsnr"\n'
    text += 'optimizer_args = ["eps=1e-6", "foreach=True"]'
    (flag_files / "run.toml").write_text(text, encoding="utf-8")
    rest = [
        "--dataset_config",
        "data.toml",
        "--output_dir",
        "out",
        "--output_name",
        "one",
        "--ffid",
        "2",
        "--seed",
        "8",
    ]
    for name in ("run.toml", "run"):
        config = parse_train(["--config_file", name, *rest])
        assert (config.ff, config.seed, config.optimizer.learning_rate) == ("0.1", 8, 1e-3)
        assert (config.timesteps.logit_mean, config.optimizer.args) == (-1.5, ("eps=1e-6", "foreach=True"))
        assert config.dit == Path("C:/train/base.safetensors") and not config.save.save_state


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat = 1", "wrong.toml: unknown key learning_rat (did you mean learning_rate?)"),
        ('seed = "x"', "wrong.toml: --seed must be a whole number from 0"),
        ("lr_scheduler_power = nan", "--lr_scheduler_power must be a number from 0 to 100, not nan"),
        (f"seed = {'9' * 5000}", "wrong.toml is not valid toml"),
        (f"seed = 0x{'f' * 5000}", "--seed must be a whole number"),
        ("[a]\n" * 2, "wrong.toml is not valid toml"),
        ('compile_mode = "default"', "--compile_mode is not supported"),
        ("fp8_scaled = true", "--fp8_scaled has no effect without --fp8_base"),
        ('config_file = "b.toml"', "unknown key config_file"),
        ("guard = true", "--guard has no effect without --preserve_prompts"),
    ],
)
def test_a_mistake_in_the_config_file_is_named(flag_files, line, message):
    (flag_files / "wrong.toml").write_text(line, encoding="utf-8")
    assert message in refusal(*SHORT, "--config_file", "wrong.toml")


@pytest.mark.parametrize("flag", TRAINING)
def test_flags_that_are_not_supported_say_so_and_what_to_do(flag):
    message = refusal(*SHORT, flag, "1")
    assert message.startswith(f"{flag} is not supported: ") and len(message) > len(flag) + 40


MISTAKES = {
    "--ff 0": "above 0",
    "--ff 2": "up to 1",
    "--ff x": "a decimal",
    "--ffid 11": "it runs from 1 to 10",
    "--ffid 0": "it runs from 1 to 10",
    "--task t2v": "not one of t2v-1.3B, t2v-14B, t2i-14B, t2v-A14B, i2v-14B, i2v-A14B, flf2v-14B, ti2v-5B",
    "--output_name a/b": "--output_dir",
    "--output_name ..": "must be a file name",
    "--dataset_config none.toml": "does not exist",
    "--task t2v-14b": "did you mean t2v-14B?",
    "--min_timestep 500 --max_timestep 400": "must be below --max_timestep 400",
    "--timestep_sampling uniform --discrete_flow_shift 3": "no effect with --timestep_sampling uniform",
    "--timestep_sampling logsnr --sigmoid_scale 2": "no effect",
    "--timestep_sampling shift --weighting_scheme mode": "no effect",
    "--logit_mean 1": "no effect",
    "--mode_scale 1": "no effect",
    "--weighting_scheme mode --mode_scale 3": "from -1 to 1.75",
    "--save_last_n_epochs 2": "no effect without --save_every_n_epochs",
    "--save_every_n_steps 2 --save_last_n_steps_state 2": "no effect without --save_state",
    "--persistent_data_loader_workers --max_data_loader_n_workers 0": "no effect",
    "--save_as slices": "slices is not one of checkpoint, slice, lora (did you mean slice?)",
    "--slices none.safetensors": "--slices none.safetensors does not exist",
    "--resume latest": "has no usable state of one",
    "--sample_at_first": "needs --sample_prompts",
    "--sample_prompts random_prompt.txt": "needs one of",
    "--sample_prompts random_prompt.txt --sample_at_first": "needs --vae and --t5",
    "--sample_prompts random_prompt.txt --sample_at_first --vae no.pth --t5 models_t5.pth": "no.pth does not exist",
    "--preserve_every 4": "no effect without --preserve_prompts",
    "--preserve_weight 1": "no effect without --preserve_prompts",
    "--preserve_prompts auto": "need --t5",
    "--preserve_prompts none.txt --t5 models_t5.pth": "none.txt does not exist",
    "--preserve_answers none.safetensors --t5 models_t5.pth": "none.safetensors does not exist",
    "--preserve_answers none.safetensors": "need --t5",
    "--preserve_levels 4": "no effect without --preserve_prompts",
    "--preserve_random 4": "no effect without --preserve_prompts",
    "--guard": "--guard has no effect without --preserve_prompts",
    "--guard 0": "--guard has no effect without --preserve_prompts",
    "--guard -1 --preserve_prompts": "--guard must be a number from 0",
    "--guard none --preserve_prompts": "--guard must be a number from 0",
    "--preserve_random -1 --preserve_prompts": "--preserve_random",
    "--preserve_random 10001 --preserve_prompts": "--preserve_random",
    "--preserve_prompts": "need --t5",
    "--log_with tensorboard": "needs --logging_dir",
    "--log_prefix x": "no effect without logging",
    "--logging_dir logs --wandb_run_name x": "--log_with wandb",
    "--show_timesteps image": "use --show_timesteps console",
    "--mixed_precision fp8": "not one of no, fp16, bf16",
    "--vae_dtype int8": "not one of",
    "--timestep_sampling shfit": "did you mean shift?",
    "--learning-rate 1": "unknown flag --learning-rate (did you mean --learning_rate?)",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_named_in_one_line(flags):
    assert MISTAKES[flags] in refusal(*SHORT, *flags.split())


def actions():
    """Every flag of the training script that does something."""
    parser = Parser()
    add_flags(parser)
    return [action for action in parser._actions if action.dest != "help"]


NUMBERS = [action for action in actions() if action.type not in (None, Path, dtype, size, task)]


@pytest.mark.parametrize("value", ["nan", "inf", "-1e999", "9" * 5000, "x", ""], ids=lambda value: value[:8])
def test_no_flag_takes_a_number_that_is_none(value):
    for action in NUMBERS:
        [flag] = action.option_strings
        assert f"{flag} must be a" in refusal(*SHORT, f"{flag}={value}")


def test_every_number_is_read_in_one_place():
    assert len(NUMBERS) > 30 and {int, float}.isdisjoint(action.type for action in NUMBERS)


OUT_OF_RANGE = shlex.split("""
    --max_train_epochs=0 --max_train_steps=100000000 --blocks_to_swap=-1 --block_swap_ring_size=0 --learning_rate=0
    --learning_rate=1e38 --max_grad_norm=-1 --max_timestep=1001 --min_timestep=-1 --num_timestep_buckets=1
    --seed=-1 --seed=18446744073709551616 --lr_scheduler_min_lr_ratio=-0.1 --lr_scheduler_min_lr_ratio=1.1
    --lr_scheduler_power=-1 --preserve_every=0 --preserve_levels=0 --preserve_weight=0 --discrete_flow_shift=0
    --sigmoid_scale=0 --logit_std=-1 --ddp_timeout=99999999999 --num_timestep_buckets=9999999999
""")


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(flag):
    name, _, value = flag.partition("=")
    assert re.fullmatch(f"{name} must be a (whole )?number .*, not {re.escape(value)}", refusal(*SHORT, flag))


@pytest.mark.parametrize("text", ["1" * 5000 + "GB", "2" * 16 + "TB", "1e3GB", "nan", "infGB", "9" * 16 + "G"])
def test_a_size_that_no_memory_has_is_refused(text):
    assert "--weights_vram: " in refusal(*SHORT, "--weights_vram", text)


@pytest.mark.parametrize("name", ["a\x1b[2J", "x" * 256, "a\u202eb"], ids=ascii)
def test_a_name_that_the_ledger_would_refuse_is_refused_before_training(name):
    assert re.search("at most 255 characters|cannot be seen", refusal(*SHORT, "--output_name", name))
    assert parse_train([*SHORT, "--output_name", "a\u3000b"]).save.name == "a\u3000b"


@pytest.mark.parametrize("ff", ["1_0e-2", "\uff10.1", "0." + "0" * 38 + "1"], ids=ascii)
def test_a_share_that_the_ledger_would_refuse_is_refused_before_training(ff):
    assert "a decimal (0.001, 1e-3) or a fraction" in refusal(*SHORT, "--ff", ff)
    assert parse_train([*SHORT, "--ff", " 0.1 "]).ff == "0.1"


def test_a_name_too_long_for_file_names_is_refused_before_training():
    assert "has 201 bytes, at most 200 are allowed" in refusal(*SHORT, "--output_name", "\xe9" * 100 + "x")
    assert len(parse_train([*SHORT, "--output_name", "x" * 200]).save.name) == 200


@pytest.mark.parametrize("flag", ["--output_name", "--training_comment", "--dit", "--slices"])
def test_a_text_that_no_file_could_contain_is_refused_before_training(flag):
    assert f"{flag} 'a\\udcff' is not valid UTF-8" in refusal(*SHORT, flag, "a\udcff")


def test_preserving_on_fewer_steps_weighs_more_unless_a_weight_is_given():
    common = [*SHORT, "--t5", "models_t5.pth", "--preserve_prompts", "random_prompt.txt"]
    assert [(p.every, p.weight) for p in (parse_train(common).preserve,)] == [(4, 4.0)]
    every, weight = ("--preserve_every", "10"), ("--preserve_weight", "2")
    assert parse_train([*common, *every]).preserve.weight == 10
    both = parse_train([*common, "auto", *every, *weight]).preserve
    assert (both.every, both.weight, both.from_ledger, both.prompts) == (10, 2.0, True, ("a cat",))


def test_without_a_file_the_empty_prompt_and_the_captions_of_concepts_are_preserved(tmp_path):
    (tmp_path / "flags.toml").write_text("preserve_prompts = true", encoding="utf-8")
    common = [*SHORT, "--t5", "models_t5.pth"]
    for more in (["--preserve_prompts"], ["--preserve_prompts", "auto"], [f"--config_file={tmp_path / 'flags.toml'}"]):
        preserve = parse_train([*common, *more]).preserve
        assert (preserve.prompts, preserve.from_ledger, preserve.random) == (("",), True, None)
    listed = parse_train([*common, "--preserve_prompts", "random_prompt.txt", "--preserve_random", "0"]).preserve
    assert (listed.prompts, listed.from_ledger, listed.random) == (("a cat",), False, 0)
    for more in ([], ["--preserve_random=7"]):
        preserve = parse_train([*common, "--preserve_answers", "models_t5.pth", *more]).preserve
        assert (preserve.prompts, preserve.from_ledger, preserve.random) == ((), False, 7 if more else None)


def test_whatever_is_preserved_has_a_guard_unless_it_is_turned_off(tmp_path):
    common = [*SHORT, "--t5", "models_t5.pth", "--preserve_prompts"]
    weights = {(): None, ("--guard",): WEIGHT, ("--guard", "2.5"): 2.5, ("--guard=0",): 0}
    for more, weight in weights.items():
        assert parse_train([*common, *more]).preserve.guard == weight
    for value, weight in {"true": WEIGHT, "2.5": 2.5, "0": 0, "false": 0, '""': None}.items():
        (tmp_path / "flags.toml").write_text(f"guard = {value}", encoding="utf-8")
        found = parse_train([*common, "--config_file", str(tmp_path / "flags.toml")]).preserve
        assert found.guard == weight
    assert str(parse_train([*common, "--guard", f"{WEIGHT:g}"]).preserve.guard) == str(WEIGHT)  # as settings tell it


def test_no_random_contexts_are_preserved_where_a_config_file_says_false(tmp_path):
    (tmp_path / "flags.toml").write_text("preserve_random = false", encoding="utf-8")
    file = ["--config_file", str(tmp_path / "flags.toml")]
    assert parse_train([*SHORT, "--t5", "models_t5.pth", "--preserve_prompts", *file]).preserve.random == 0


@pytest.mark.parametrize("name", ["dit", "dataset_config", "output_dir", "output_name"])
def test_a_missing_file_flag_is_named(name):
    at = SHORT.index(f"--{name}")
    assert f"--{name} is missing" in refusal(*SHORT[:at], *SHORT[at + 2 :])


def test_without_a_slice_the_script_shows_the_two_flags():
    assert "--ff 0.001 --ffid 1" in refusal(*SHORT[:-4])
    assert "from 1 to 10" in refusal(*SHORT[:-2])


def test_the_settings_of_trackers_come_from_a_file(flag_files):
    (flag_files / "trackers.toml").write_text("[tensorboard]\nmax_queue = 3\n", encoding="utf-8")
    config = parse_train([*SHORT, "--logging_dir", "logs", "--log_tracker_config", "trackers.toml"])
    assert config.log.tracker_settings == {"tensorboard": {"max_queue": 3}}
    (flag_files / "trackers.toml").write_text("[wandb]\nname = 'x'\n", encoding="utf-8")
    assert "wandb is not a table" in refusal(*SHORT, "--logging_dir", "logs", "--log_tracker_config", "trackers.toml")


def test_the_script_ends_with_one_line_and_a_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wan_train_network.py", *SHORT, "--dit", "missing.safetensors"])
    with pytest.raises(SystemExit) as ended:
        run(wan_train_network.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: missing.safetensors does not exist")
    assert not Path("out").exists()
