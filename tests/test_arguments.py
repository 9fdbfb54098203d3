"""What terminals, editors and graphical programs make of arguments, and messages whose advice can be followed."""

import re

import pytest
import torch
from short_command import SHORT, refusal

from utils.cli.cache import parse_cache_latents
from utils.cli.command import Parser
from utils.cli.slices import _parser as slices_parser
from utils.cli.train import parse_train
from utils.cli.train_flags import add_flags
from utils.cli.unsupported import TRAINING
from utils.sampling.prompts import SamplePrompt, parse_prompt_line
from utils.swap.placement import check_swap
from wan.errors import InputError
from wan.values import invisible

pytestmark = pytest.mark.usefixtures("in_flag_files")


def test_what_cannot_be_seen_has_a_name():
    assert invisible("a b\u200cc\u200d") == []
    assert invisible("\ufeffa\u00a0b\u200b\u200b\t") == [
        *("U+FEFF ZERO WIDTH NO-BREAK SPACE", "U+00A0 NO-BREAK SPACE", "U+200B ZERO WIDTH SPACE", "U+0009 TAB")
    ]


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        *(("\u00a0", "NO-BREAK SPACE"), ("\r", "CARRIAGE RETURN"), ("\u200b--seed", "ZERO WIDTH SPACE")),
        *(("--seed\u200b", "ZERO WIDTH SPACE"), ("--seed=1\u2060", "WORD JOINER")),
        *(("--seed\ufeff=1", "ZERO WIDTH NO-BREAK"), ("--task=t2v-14B\u200b", "ZERO WIDTH SPACE")),
    ],
)
def test_an_invisible_character_in_an_argument_is_named(argument, name):
    assert name in refusal(*SHORT, argument)


def test_a_space_alone_hints_at_a_backslash_that_is_not_the_last_character():
    assert "' ' was not expected; a backslash that continues a line must be its last character" in refusal(*SHORT, " ")


@pytest.mark.parametrize("flag", ["ff", "ffid", "output_name", "preserve_prompts", "lr_warmup_steps", "optimizer_type"])
def test_an_invisible_character_in_any_value_but_free_text_is_named(flag):
    message = refusal(*SHORT, f"--{flag}=5\u200b")
    assert message == f"--{flag}: '5\\u200b' holds U+200B ZERO WIDTH SPACE: delete what cannot be seen"
    assert parse_train([*SHORT, "--training_comment", "a\u200b\nb"]).metadata.comment == "a\u200b\nb"


@pytest.mark.parametrize("path", ["out\r", "\u202aC:/owl", "out\u200b", "out\u00a0", "\ufeffout", "a\tb"], ids=ascii)
def test_an_invisible_character_in_a_path_is_refused_before_anything_is_made(path):
    message = refusal(*SHORT, "--output_dir", path)
    assert message.startswith("--output_dir: ") and invisible(path)[0] in message


def test_names_of_real_files_may_hold_what_their_system_puts_there(flag_files):
    (flag_files / "at 1.00\u202fPM\u200b.safetensors").touch()
    assert parse_train([*SHORT, "--vae", "at 1.00\u202fPM\u200b.safetensors"]).vae.exists()
    assert parse_train([*SHORT, "--output_dir", "my\u00a0runs"]).save.folder.name == "my\u00a0runs"


@pytest.mark.parametrize(
    ("value", "named"),
    [("", "is empty"), (" ", "is empty"), ("out ", "ends with a space"), ("\u201cout\u201d", "quotes")],
)
def test_a_path_that_the_shell_left_empty_or_quoted_is_refused(value, named):
    assert named in refusal(*SHORT, "--logging_dir", value)


@pytest.mark.parametrize("dash", ["\u2014", "\u2013", "\u2013-", "-\u2014", "\u2212\u2212"], ids=ascii)
@pytest.mark.parametrize("rest", ["seed", "seed=1", "sede", "fp8_base"])
def test_a_long_dash_in_place_of_two_hyphens_is_noticed(dash, rest):
    name = f"--{rest.partition('=')[0]}"
    assert f"where two hyphens belong: {name}" in refusal(*SHORT, "--training_comment", "x", f"{dash}{rest}")


def test_a_long_dash_in_a_comment_is_text():
    assert parse_train([*SHORT, "--training_comment", "\u2014 owl"]).metadata.comment == "\u2014 owl"


DEFAULTS = SamplePrompt("")


@pytest.mark.parametrize(
    "option",
    [
        "\u2014w 64",
        "\u2013fs 2.5",
        "-\u2014d 1",
        "\u2212s 20",
        "\u2014n blurry",
        "\u2013\u2013w 64",
        "\uff0d\uff0dw 64",
    ],
)
def test_a_long_dash_before_an_option_of_a_prompt_is_noticed(option):
    with pytest.raises(InputError, match=r"line 1: .* begins with .*, where two hyphens belong: --"):
        parse_prompt_line(f"owl {option}", DEFAULTS, "line 1")


@pytest.mark.parametrize("text", ["owl \u2014 a study", "owl \u2014white", "ages 3\u20135 d 4", "\u2014w", "s\u2014 3"])
def test_a_long_dash_in_a_prompt_is_text(text):
    assert parse_prompt_line(f"{text} --w 64", DEFAULTS, "line 1") == SamplePrompt(text, width=64)


@pytest.mark.parametrize("option", ["-w 64", "-fs 3", "-n blurry", "-H\u00a032", "-s\t4"])
def test_one_hyphen_before_an_option_of_a_prompt_is_noticed(option):
    with pytest.raises(InputError, match=rf"{option.split()[0]} begins with one hyphen, where two belong: --"):
        parse_prompt_line(f"a cat {option} --d 1", SamplePrompt(""), "line 1")


@pytest.mark.parametrize("text", ["rock-n-roll", "a cat -5 degrees", "a cat - w 64", "a t-shirt -wide", "a mid-s 3 d"])
def test_a_hyphen_in_a_prompt_is_text(text):
    assert parse_prompt_line(f"{text} --w 64", SamplePrompt(""), "line 1").prompt == text


@pytest.mark.parametrize("space", ["\u200b", "\ufeff", "\u00a0", " \u200b ", "\u2003"], ids=ascii)
def test_spaces_of_other_kinds_separate_the_options_of_a_prompt(space):
    line = f"an owl{space}--w{space}64{space}--h 32"
    assert parse_prompt_line(line, DEFAULTS, "line 1") == SamplePrompt("an owl", width=64, height=32)


PATHS = ("logging_dir", "resume", "sample_prompts", "t5", "vae", "tokenizer", "preserve_answers", "log_tracker_config")
OTHERS = ("lr_scheduler_type", "optimizer_type", "seed", "wandb_run_name", "mixed_precision", "lr_scheduler", "save_as")


@pytest.mark.parametrize("value", ['""', '" "', '[""]', "[]"])
def test_an_empty_value_in_a_config_file_is_as_if_left_out(flag_files, value):
    lines = [f"{key} = {value}" for key in (*PATHS, *OTHERS)]
    (flag_files / "gui.toml").write_text("\n".join(lines), encoding="utf-8-sig")
    flags = SHORT
    left_out = parse_train(flags)
    found = parse_train([*flags, "--config_file", "gui.toml"])
    assert found.inputs[-1].name == "gui.toml"
    assert {**vars(found), "inputs": None} == {**vars(left_out), "inputs": None}


def test_backslashes_in_a_config_file_are_answered_with_the_right_ways(flag_files):
    (flag_files / "w.toml").write_text('vae = "C:\\train\\new.safetensors"\n', encoding="utf-8")
    message = refusal(*SHORT, "--config_file", "w.toml")
    assert message.startswith("w.toml: vae is ") and "write 'C:\\train\\new.safetensors' in single quotes" in message


@pytest.mark.parametrize("pairs", ["a=0.1 b=(1,2)", "a=0.1, b=(1, 2)", "a=(0.9,", "amsgrad=true", "a"])
def test_pairs_are_explained_with_tuples_and_a_word_for_each(pairs):
    message = refusal(*SHORT, "--optimizer_args", pairs)
    assert "betas=(0.9,0.99)" in message and "separate pairs with a space" in message and "no space within" in message
    assert parse_train([*SHORT, "--optimizer_args", "betas=(0.9,0.99)", "eps=1e-6"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("x ", "ends with a space"), (" x", "begins with a space"), ("\u201cx\u201d", "quotes that are part of the name")],
)
def test_a_name_is_refused_with_what_the_shell_left_around_it(name, said):
    assert said in refusal(*SHORT, "--output_name", name)


@pytest.mark.parametrize("sign", ["\\", "^", "`"])
def test_what_continues_a_line_in_another_shell_is_noticed(sign):
    assert refusal(*SHORT, "--seed", "1", sign).startswith(f"{sign} does not continue a line here (\\ in shells")


def test_a_number_with_letters_that_only_look_like_its_own_names_them():
    told = refusal(*SHORT, "--learning_rate", "1\u0435-3")
    assert "not 1\u0435-3, which holds U+0435 CYRILLIC SMALL LETTER IE" in told
    assert "not an empty text" in refusal(*SHORT, "--seed", "")


def known(add=add_flags):
    parser = Parser()
    add(parser)
    return parser.known_flags()


@pytest.mark.parametrize("flag", TRAINING)
def test_a_refused_flag_advises_flags_that_exist(flag):
    advised = set(re.findall(r"--[a-z0-9_]+", TRAINING[flag]))
    assert advised <= set(known()) | {"--l"}  # an option of a prompt's line


# What the user typed, what the message advises, and whether that is then accepted as it is.
ADVICE = [
    ("--flash_attn", "--sdpa"),
    ("--network_module x", "--ff 0.001 --ffid 1"),
    ("--show_timesteps image", "--show_timesteps console"),
    ("--block_swap_ring_size 2", "--blocks_to_swap 1 --block_swap_ring_size 2"),
    ("--host_weights mapped", "--weights_vram 1GB --host_weights mapped"),
    ("--timestep_sampling shift --weighting_scheme mode", "--timestep_sampling sigma --weighting_scheme mode"),
    ("--timestep_sampling uniform --discrete_flow_shift 3", "--timestep_sampling shift --discrete_flow_shift 3"),
    ("--timestep_sampling uniform --sigmoid_scale 2", "--timestep_sampling shift --sigmoid_scale 2"),
    ("--logit_mean 1", "--timestep_sampling logsnr --logit_mean 1"),
    ("--logit_std 2", "--timestep_sampling sigma --weighting_scheme logit_normal --logit_std 2"),
    ("--mode_scale 1", "--timestep_sampling sigma --weighting_scheme mode --mode_scale 1"),
    ("--save_last_n_epochs 2", "--save_every_n_epochs 1 --save_last_n_epochs 2"),
    ("--save_every_n_steps 2 --save_last_n_steps_state 2", "--save_every_n_steps 2 --save_state"),
    ("--persistent_data_loader_workers --max_data_loader_n_workers 0", "--max_data_loader_n_workers 0"),
    (
        "--sample_at_first",
        "--sample_prompts random_prompt.txt --sample_at_first --vae vae.safetensors --t5 models_t5.pth",
    ),
    ("--log_with tensorboard", "--logging_dir logs --log_with tensorboard"),
    ("--log_prefix x", "--logging_dir logs --log_with tensorboard --log_prefix x"),
    ("--gradient_checkpointing_cpu_offload", "--gradient_checkpointing --gradient_checkpointing_cpu_offload"),
    ("--preserve_every 4", "--preserve_prompts auto --t5 models_t5.pth --preserve_every 4"),
    ("--resume latest --overwrite", "--overwrite"),
    ("--lr_warmup_steps 5", "--lr_warmup_steps 5 --lr_scheduler constant_with_warmup"),
    ("--save_best", "--save_best --validation_dataset_config data.toml"),
    ("--validate_every_n_steps 5", "--validate_every_n_steps 5 --t5 models_t5.pth"),
    ("--task t2v", "--task t2v-A14B"),
]


@pytest.mark.parametrize(("typed", "advised"), ADVICE)
def test_advice_that_is_followed_is_not_refused_next(typed, advised):
    message = refusal(*SHORT, *typed.split())
    new = {word for word in advised.split() if word.startswith("--")} - {"--vae", "--t5"}
    assert all(flag in message for flag in new - set(typed.split()))
    parse_train([*SHORT, *advised.split()])


@pytest.mark.parametrize("flag", ["--use_pinned_memory_for_block_swap", "--host_weights=pinned"])
def test_page_locked_memory_on_a_cpu_is_refused_with_the_flag_that_asked_for_it(flag):
    swap = parse_train([*SHORT, "--blocks_to_swap", "1", flag]).swap
    with pytest.raises(InputError, match=f"{flag.replace('=', ' ')}.*leave it out"):
        check_swap(None, torch.float32, torch.device("cpu"), swap, mapped=True)


def test_other_scripts_name_what_cannot_be_seen_too():
    with pytest.raises(InputError, match=r"--vae: .* holds U\+000D CARRIAGE RETURN"):
        parse_cache_latents(["--dataset_config", "data.toml", "--vae", "vae.safetensors\r"])


def test_a_flag_of_another_command_is_said_to_be_one():
    with pytest.raises(InputError, match="--strength is a flag of apply, not of this command"):
        slices_parser().parse_args(["scale", "x.safetensors", "1", "--base", "b", "--strength", "0", "-o", "y"])
