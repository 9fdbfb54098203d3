"""What a command line imports: --help and a mistake wait for torch at most, `utils.slices list` not even for that."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

from tiny_chain import write_base
from tiny_run import write_dataset

from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "diffusers", "bitsandbytes", "tensorboard", "av", "scipy", "pandas", "torch._dynamo")
# Runs commands one after another as their scripts would; prints what each said, and what was imported by then.
PROBE = """
import contextlib, importlib, io, json, pickle, sys
commands, names, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
from utils.cli.command import run
def work(path):
    with open(path, "rb") as file:
        pickle.load(file)[(0,)]
for module, *arguments in commands:
    said, sys.argv = io.StringIO(), [module, *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        work(*arguments) if module == "worker" else run(importlib.import_module(module).main)
    found.append([said.getvalue(), [name for name in names if name in sys.modules]])
print(json.dumps(found))
"""


def check(expected, names):
    """Each command says what is expected, and imports none of the modules called `names`."""
    arguments = [sys.executable, "-c", PROBE, json.dumps(list(expected)), json.dumps(names)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for command, words, (said, imported) in zip(expected, expected.values(), json.loads(done.stdout), strict=True):
        assert words in said and imported == [], command


def test_help_mistakes_and_workers_import_torch_at_most(tmp_path):
    data = write_dataset(tmp_path)
    dataset = build_training_dataset(read_dataset_config(data))
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    run = [
        "--dataset_config",
        str(data),
        "--output_dir",
        str(tmp_path),
        "--output_name",
        "a",
        "--ff",
        "1",
        "--ffid",
        "1",
    ]
    expected = {
        ("wan_train_network", "--help"): "usage: wan_train_network [options]\n\nTrains",
        ("wan_generate_video", "--help"): "usage: wan_generate_video [options]\n\nGenerates",
        ("wan_cache_latents", "--help"): "--vae_dtype",
        ("wan_cache_text_encoder_outputs", "--help"): "--t5",
        ("wan_train_network", "--ffix", "1"): "did you mean --ffid?",
        ("wan_train_network", *run, "--dit", "x", "--optimizer_type", "AdmaW"): "did you mean AdamW?",
        ("wan_train_network", *run, "--dit", "x", "--lr_scheduler", "linaer"): "did you mean linear?",
        ("wan_cache_latents", "--dataset_config", "no.toml", "--vae", "no"): "--vae no does not exist",
        ("worker", str(tmp_path / "dataset")): "",
        ("wan_train_network", "--dit", "missing.safetensors", *run): "missing.safetensors does not exist",
    }
    check(expected, HEAVY)


def test_a_list_of_slices_imports_no_torch(tmp_path):
    base = str(write_base(tmp_path / "base.safetensors"))
    expected = {("list", base): "base.safetensors", ("list", "no"): "no does not exist", ("lst",): "did you mean list?"}
    check({("utils.cli.slices", *command): words for command, words in expected.items()}, ("torch", "numpy"))
