"""Runs of models that start from pictures, through the scripts: caches, steps, a resumed run, what they refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_preservation import logged
from tiny_models import CLIP_WIDTH, MODELS, run_flags, tiny_batch, write_model, write_run_files
from tiny_run import CONFIG

import wan_train_network
from utils.cli.train import parse_train
from utils.data.given_pictures import starts_clean
from utils.learning.conditions import Conditioning, predict
from utils.preserve.answers_file import read_answers
from utils.run.state import read_state
from utils.selective_finetune import slice_indices
from utils.slice_saving import base_identity
from utils.slices.base_identity import BaseModel
from utils.training import train
from wan.errors import InputError
from wan.loading import load_dit

# One of each way to give a picture in the default suite.
TASKS = [
    pytest.param(task, marks=() if task in ("i2v-14B", "ti2v-5B") else pytest.mark.slow, id=task) for task in MODELS
]


@pytest.fixture(scope="module", params=TASKS)
def task_files(request, tmp_path_factory):
    return request.param, write_run_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def files(task_files):
    yield task_files
    shutil.rmtree(task_files[1] / "out", ignore_errors=True)


def run(files, *more):
    task, folder = files
    said = []
    train(parse_train(run_flags(folder, task, *more)), say=said.append)
    return said


def saved(folder, name="one"):
    return load_file(folder / "out" / f"{name}.safetensors")


def check_resumed(files, steps, half):
    task, folder = files
    wan_train_network.main(run_flags(folder, task, *steps, "--save_state", "--save_every_n_steps", str(half)))
    state = folder / "out" / f"one-step{half:08d}-state"
    run(files, *steps, "--output_name", "two", "--resume", str(state), "--save_state")
    assert all(torch.equal(value, saved(folder, "two")[name]) for name, value in saved(folder).items())
    first, second = (read_state(folder / "out" / f"{name}-state") for name in ("one", "two"))
    assert first.losses == second.losses


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files):
    check_resumed(files, ("--max_train_steps", "6", "--max_train_epochs", "2"), 2)


@pytest.mark.slow
def test_thirty_steps_from_the_scripts_caches_move_the_slice_alone(files):
    check_resumed(files, ("--max_train_epochs", "8", "--gradient_checkpointing", "--blocks_to_swap", "2"), 15)
    old, new = load_file(files[1] / "base.safetensors"), saved(files[1])
    for name, tensor in new.items():
        changed = (tensor.view(torch.int16) != old[name].view(torch.int16)).flatten()
        if name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight"):
            inside = slice_indices(name, tensor.shape, "0.1", 2)
            assert changed[inside].any(), name
            changed[inside] = False
        assert not changed.any(), name
