"""What the documentation names exists: the targets of its links, the flags of its commands, the files of the map."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from test_vae import known_vae

from utils.cli.cache import parse_cache_latents, parse_cache_text
from utils.cli.command import Parser
from utils.cli.generate import parse_generate
from utils.cli.slices import main as slices
from utils.cli.train import parse_train
from wan.configs import TASKS

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md", "comfyui_wan_slices/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "wan_train_network.py": parse_train,
    "wan_generate_video.py": parse_generate,
    "wan_cache_latents.py": parse_cache_latents,
    "wan_cache_text_encoder_outputs.py": parse_cache_text,
    "utils.slices": slices,
}
OTHERS = {
    "a prompt's size and seed": {"--w", "--h", "--f", "--d"},
    "accelerate launch": {"--num_cpu_threads_per_process", "--mixed_precision"},
    "musubi-tuner": {"--network_module", "--network_args", "--fp8_base"},
    "a line of a prompt file": {"--s", "--g", "--l", "--fs", "--n", "--i", "--ei"},
    "tensorboard, cp, ruff": {"--logdir", "--sparse", "--reflink", "--check"},
}
FLAG = re.compile(r"(?<![\w-])--[A-Za-z](?:-?\w)*")
COMMAND = re.compile(r"^(?:python|accelerate launch) .*?(wan_\w+\.py) (.*)$", re.MULTILINE)
TASKS_PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
TASK_COMMANDS = list(dict.fromkeys(COMMAND.findall(TASKS_PAGE)))
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Caught(Exception):
    """The parser that a script would have parsed with."""


def flags_of(script, monkeypatch):
    """All flags that a script's parser has and does not refuse as not supported, of its subcommands too."""

    def catch(self, *_):
        raise Caught(self)

    with monkeypatch.context() as patched, pytest.raises(Caught) as caught:
        patched.setattr(Parser, "parse_known_args", catch)
        SCRIPTS[script]([])
    (parser,) = caught.value.args
    commands = [
        own for action in parser._actions if isinstance(action.choices, dict) for own in action.choices.values()
    ]
    actions = [action for own in (parser, *commands) for action in own._actions if not hasattr(action, "reason")]
    return {flag for action in actions for flag in action.option_strings}


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
    parts = [link.partition("#") for link in links if "#" in link]
    targets = [(page.parent / name if name else page, anchor) for name, _, anchor in parts]
    assert [anchor for target, anchor in targets if anchor not in anchors(target)] == []


def test_every_flag_in_the_documentation_exists(monkeypatch):
    known = set().union(*OTHERS.values(), *(flags_of(script, monkeypatch) for script in SCRIPTS))
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', benchmark.read_text(encoding="utf-8")))
    used = {(page.name, flag) for page in PAGES for flag in FLAG.findall(page.read_text(encoding="utf-8"))}
    assert {(name, flag) for name, flag in used if flag not in known} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_in_the_documentation_uses_flags_of_its_script(script, monkeypatch):
    lines = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).split("\n")
    given = [set(FLAG.findall(line.partition(f"{script} ")[2].partition("`")[0])) for line in lines]  # to a code's end
    assert any(given)
    assert set().union(*given) - flags_of(script, monkeypatch) == set()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file for each that the commands of docs/tasks.md name, as far as their parsers read them."""
    folder = tmp_path_factory.mktemp("tasks")
    for _, given in TASK_COMMANDS:
        for name in re.findall(r"\S+\.(?:safetensors|pth)", given):
            (folder / name).parent.mkdir(exist_ok=True)
            save_file({}, folder / name)
    shutil.copy(ROOT / "hunyuan_dataset.toml", folder)
    (clips,) = re.findall(r"^```toml\n# (clips\.toml.*?)^```", TASKS_PAGE, re.MULTILINE | re.DOTALL)
    (folder / "clips.toml").write_text(f"# {clips}", encoding="utf-8")
    for name in ("first.png", "last.png"):
        Image.new("RGB", (64, 48)).save(folder / name)
    for name, kind in (("wan_2.1_vae", "wan21"), ("wan2.2_vae", "wan22")):
        known_vae(kind, folder).path.replace(folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(("script", "given"), TASK_COMMANDS)
def test_every_command_of_the_page_on_tasks_is_accepted(script, given, files, monkeypatch):
    monkeypatch.chdir(files)
    SCRIPTS[script](shlex.split(given))


def test_the_page_on_tasks_trains_and_generates_with_each():
    for script in ("wan_train_network.py", "wan_generate_video.py"):
        assert {re.search(r"--task (\S+)", given)[1] for own, given in TASK_COMMANDS if own == script} == set(TASKS)


def test_the_map_names_only_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folder, missing = "", []
    for where, files in re.findall(r"^\|([^|]*)\|[^|]*\|([^|]*`[^|]*)\|$", text, re.MULTILINE):
        folder = where.strip("` ") or folder
        missing += [name for name in re.findall(r"`(\w+)`", files) if not (ROOT / folder / f"{name}.py").exists()]
    assert folder == "wan/" and missing == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
