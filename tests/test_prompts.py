"""Prompt files: the three formats, options, defaults, and what is refused."""

from pathlib import Path

import pytest

from utils.sampling.prompts import SamplePrompt, parse_prompt_line, read_prompt_file
from wan.errors import InputError

DEFAULTS = SamplePrompt("")
WANTED = [
    SamplePrompt("a fox", width=512, height=320, frames=5, seed=7, steps=9, guidance_scale=3.0),
    SamplePrompt("a cat, sitting", "blurry, dark", seed=1, flow_shift=2.5),
]
TXT = """# w and h
a fox --w 512 --h 320 --f 5 --d 7 --s 9 --l 3

a cat, sitting --n blurry, dark --d 1 --fs 2.5
"""
TOML = """[prompt]
seed = 1
[[prompt.subset]]
prompt = "a fox"
width = 512
height = 320
frame_count = 5
seed = 7
sample_steps = 9
cfg_scale = 3
[[prompt.subset]]
prompt = "a cat, sitting"
negative_prompt = "blurry, dark"
discrete_flow_shift = 2.5
"""
JSON = """[
{"prompt": "a fox", "width": 512, "height": 320, "frame_count": 5, "seed": 7, "sample_steps": 9, "guidance_scale": 3},
"a cat, sitting --n blurry, dark --d 1 --fs 2.5"
]"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [("p.txt", TXT), ("p.toml", TOML), ("p.json", JSON)])
def test_every_format_gives_the_same_samples(tmp_path, name, text):
    assert read_prompt_file(write(tmp_path, name, text)) == WANTED


def test_a_number_that_is_left_empty_in_a_table_is_as_if_left_out(tmp_path):
    text = '[{"prompt": "a fox", "seed": "", "width": "", "negative_prompt": ""}]'
    assert read_prompt_file(write(tmp_path, "p.json", text)) == [SamplePrompt("a fox", "")]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TXT.replace("\n", "\r\n").encode())
    assert read_prompt_file(path) == WANTED


@pytest.mark.parametrize("text", ["I walk home", "N for night", "w 12", "a cat -- asleep", "d 5, f 3", "up 2--3 steps"])
def test_the_prompts_own_text_is_never_read_as_an_option(text):
    assert parse_prompt_line(text + " --w 64", DEFAULTS, "line 1") == SamplePrompt(text, width=64)


def test_a_line_keeps_the_defaults_that_it_does_not_set():
    defaults = SamplePrompt("", "dark", width=832, height=480, frames=81, seed=4, steps=50, guidance_scale=6.0)
    wanted = SamplePrompt("a fox", "dark", width=832, height=480, frames=17, seed=4, steps=50, guidance_scale=2.0)
    assert parse_prompt_line("a fox --F 17 --g 2", defaults, "line 1") == wanted


def test_a_prompt_that_no_file_could_contain_is_refused():
    with pytest.raises(InputError, match=r"line 1: 'a .udcff' is not valid UTF-8"):
        parse_prompt_line("a \udcff", DEFAULTS, "line 1")


@pytest.mark.parametrize(("given", "made"), [(1, 1), (4, 1), (5, 5), (8, 5), (81, 81), (84, 81)])
def test_frames_are_floored_to_4n_plus_1(given, made):
    assert parse_prompt_line(f"a fox --f {given}", DEFAULTS, "line 1").frames == made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox --w 500", "width 500 .* 496 or 512"),
        ("a fox --h 8", "height 8 must be a multiple of 16, from 16 to 16384"),
        (f"a fox --w {16**9}", "width 68719476736 must be"),
        (f"a fox --w {'9' * 5000}", "--w must be a whole number, not 99"),
        ("a fox --s 0", "steps must be a whole number from 1 to 1,000, not 0"),
        ("a fox --s ten", "--s must be a whole number, not ten"),
        ("a fox --d -1", "seed must be .*, not -1"),
        (f"a fox --d {2**64}", "seed must be a whole number from 0 to 18446744073709551615"),
        ("a fox --fs 0", "flow shift must be a number above 0"),
        ("a fox --l nan", "guidance scale must be .*, not nan"),
        ("a fox --l 1e999", "guidance scale must be .*, not inf"),
        ("a fox --sd 3", "unknown option --sd .did you mean s"),
        ("a fox --g 2 --l 3", "keep one"),
        ("a fox --i", "--i must be the path of a picture"),
        ("a fox --cn clip.mp4", "--cn is for models with control videos, which are not supported; leave it out"),
        ("a fox --ci cat.png", "--ci is for one-frame inference, .* a picture as the first frame is --i"),
        ("a fox --size 3", "unknown option --size; allowed: w, h, f"),
        ("--w 512", "there is no prompt before the options"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, line, message):
    path = write(tmp_path, "p.txt", f"# first\na fox\n{line}\n")
    with pytest.raises(InputError, match=f"p.txt line 3: .*{message}"):
        read_prompt_file(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "# nothing\n", "contains no prompt"),
        ("p.csv", "a fox", "must end in .txt, .toml or .json"),
        ("p.json", '{"prompt": "a fox"}', "must contain a list"),
        ("p.json", "[", "not valid JSON"),
        ("p.json", '[{"prompt": "a fox", "width": true}]', "entry 1: width must be a whole number, not True"),
        ("p.json", '[{"prompt": "a fox"}, {"width": 64}]', "entry 2: there is no prompt"),
        ("p.json", '[{"prompt": "a \\ud800"}]', "is not valid JSON"),
        ("p.json", f'[{{"prompt": "a fox", "seed": {"9" * 5000}}}]', "is not valid JSON"),
        ("p.json", '[{"prompt": "a fox", "guidance_scale": 1e999}]', "guidance scale must be .*, not inf"),
        ("p.json", f'[{{"prompt": "a fox", "guidance_scale": 1{"0" * 400}}}]', "guidance_scale must be a number"),
        ("p.json", "[" * 100_000, "is not valid JSON"),
        ("p.toml", '[prompt]\nprompt = "a fox"\nwidht = 64', "unknown option widht .did you mean width"),
        ("p.json", '[{"prompt": "a fox", "size": 64}]', "unknown option size; allowed: width"),
        ("p.toml", 'prompt = "a fox"', r"one table \[prompt\]"),
        ("p.toml", '[prompt]\nsubset = "a fox"', "must be a list of tables"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_prompt_file(write(tmp_path, name, text))


def test_a_long_dash_before_a_picture_is_noticed_but_not_before_a_sentence():
    for option in ("i cat.png", "ei my/last.JPEG"):
        with pytest.raises(InputError, match=r"begins with EM DASH, where two hyphens belong: --e?i"):
            parse_prompt_line(f"a fox \u2014{option}", DEFAULTS, "line 1")
    text = "a man says \u2014 I love it. Then \u2014I go"
    assert parse_prompt_line(text, DEFAULTS, "line 1").prompt == text


def test_options_of_pictures_are_paths_with_spaces_in_them():
    line = "a fox --i my pictures/first frame.png --ei ../last.png --f 5"
    paths = {"image_path": Path("my pictures/first frame.png"), "end_image_path": Path("../last.png")}
    assert parse_prompt_line(line, DEFAULTS, "line 1") == SamplePrompt("a fox", frames=5, **paths)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"prompt file .*p.txt does not exist"):
        read_prompt_file(tmp_path / "p.txt")


def test_the_example_file_can_be_read():
    path = Path(__file__).parent.parent / "examples" / "random_prompt.txt"
    assert [prompt.frames for prompt in read_prompt_file(path)] == [1, 17, 1]
