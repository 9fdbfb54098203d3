"""The shortest command of the training script, with the files of conftest's flag_files, and how a mistake is told."""

import shlex

import pytest

from utils.cli.train import parse_train
from utils.selective_finetune import SliceError
from wan.errors import InputError

SHORT = shlex.split(
    "--dit base.safetensors --dataset_config data.toml --output_dir out --output_name one --ff 0.1 --ffid 2"
)


def refusal(*flags):
    with pytest.raises((InputError, SliceError)) as error:
        parse_train(flags)
    assert "\n" not in str(error.value)
    return str(error.value)
