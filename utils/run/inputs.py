"""What a run is given, read from its files: InputError where they do not fit together."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from utils.data.dataset import TrainingDataset, build_training_dataset
from utils.data.held_out import same_pictures
from utils.data.items import Item, made_otherwise
from utils.learning.flow_matching import check_timesteps
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.state import seed_of_state
from utils.selective_finetune import check_slice
from utils.slices.base_identity import base_model
from utils.slices.ledger import own_entry, read_ledger
from utils.slices.on_base import SlicesOnBase, read_below
from utils.swap.placement import check_swap
from wan.compiling import check_compiler
from wan.configs import WanConfig
from wan.errors import InputError
from wan.loading import (
    CheckpointHeader,
    check_fits_task,
    config_from_header,
    file_dtype,
    is_fp8,
    read_checkpoint_header,
)
from wan.stored_tensors import dtype_name


@dataclass(frozen=True)
class Inputs:
    """What a run is given, read from its files: the base and the slices on top of it, the dataset, the seed."""

    header: CheckpointHeader
    model_config: WanConfig
    below: SlicesOnBase  # slices on top of the header's files, under the one that trains
    dataset: TrainingDataset
    validated: Sequence[Item]  # pictures that are not trained on
    seed: int

    @property
    def latent_sizes(self) -> list[tuple[int, int]]:
        return latent_sizes(self.dataset)


def read_inputs(asked: Sequence[TrainConfig], accelerator: Accelerator, say: Callable[[str], None]) -> list[Inputs]:
    """Reads the headers, slices and caches that a run, or each expert of one, is given: one dataset, one seed.

    InputError if they do not fit together.
    """
    models = [(config, *read_dit(config, accelerator.device)) for config in asked]
    if len(models) > 1:
        check_are_experts(*(header for _, header, _ in models))
    below = [_read_below(config, header) for config, header, _ in models]
    dataset = build_training_dataset(asked[0].dataset)
    for config, _, model_config in models:
        check_dataset(dataset, model_config, config)
    validated = _validated_items(config, dataset, model_config, say)
    seed = _agree_on_seed(asked, say)
    return [
        Inputs(header, model_config, own, dataset, validated, seed)
        for (_, header, model_config), own in zip(models, below, strict=True)
    ]


def _read_below(config: TrainConfig, header: CheckpointHeader) -> SlicesOnBase:
    own, dtype = own_entry(config.ff, config.ffid, config.save.name), COMPUTE_DTYPES[config.mixed_precision]
    how = (config.continue_slice, config.allow_overlap, bool(config.expert))
    return read_below(config.dit, header, config.slices, own, dtype, *how)


def _validated_items(
    config: TrainConfig, dataset: TrainingDataset, model: WanConfig, say: Callable[[str], None]
) -> Sequence[Item]:
    if config.validation is None or config.validation.dataset is None:
        return dataset.held_out
    other = build_training_dataset(config.validation.dataset)
    check_dataset(other, model, replace(config, dataset=config.validation.dataset))
    if both := list(dict.fromkeys(item.name for item in same_pictures(dataset.items, other.items))):
        files = f"{both[0]} is" if len(both) == 1 else f"{both[0]} and {len(both) - 1} more files are"
        raise InputError(
            f"{files} in --dataset_config and in --validation_dataset_config: validate on pictures that are not "
            "trained on"
        )
    for line in [*other.describe(), *made_otherwise(other.items, dataset.items)]:
        say(f"validation {line}" if line.startswith("dataset") else f"validation: {line}")
    return other.items


def _agree_on_seed(asked: Sequence[TrainConfig], say: Callable[[str], None]) -> int:
    for config in asked:
        if config.seed is not None:
            return config.seed
        if config.resume and (seed := seed_of_state(config.resume, config.save)) is not None:
            say(f"seed {seed}, as the run that --resume continues")
            return seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    say(f"seed {drawn[0]} (drawn at random; --seed {drawn[0]} repeats the run)")
    return drawn[0]


def read_dit(config: TrainConfig, device: torch.device) -> tuple[CheckpointHeader, WanConfig]:
    """The header of --dit, its model's widths; InputError if it is not a file that this run can train."""
    check_slice(config.ff, config.ffid)
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU: on the CPU use bf16 or no")
    header = read_checkpoint_header(config.dit)
    check_fits_task(header, config.task)
    if is_fp8(header):
        raise InputError(
            f"{config.dit} is stored in fp8, which cannot be trained: use the bf16, fp16 or fp32 file, with --fp8_base "
            "if its frozen weights are to take as little memory"
        )
    if config.save_precision not in (None, dtype_name(file_dtype(header))):
        raise InputError(
            f"--save_precision {config.save_precision}: a checkpoint keeps the dtypes of --dit, here "
            f"{dtype_name(file_dtype(header))}, since only the slice is written anew; leave it out"
        )
    model_config = config_from_header(header)
    dtype = COMPUTE_DTYPES[config.mixed_precision]
    check_swap(model_config, dtype, device, config.swap, mapped=file_dtype(header) == dtype)
    if config.compile:
        check_compiler(device)
    if config.offload_block_inputs and device.type == "cpu":
        raise InputError("--gradient_checkpointing_cpu_offload has no effect where the CPU trains: leave it out")
    return header, model_config


def check_are_experts(high: CheckpointHeader, low: CheckpointHeader) -> None:
    """InputError if two files are not two models of one shape."""
    files = f"--dit {low.files[0]} and --dit_high_noise {high.files[0]}"
    bases = [base_model(own, read_ledger(own.metadata, own.files[0])) for own in (high, low)]
    if bases[0].is_same(bases[1]):
        raise InputError(f"{files} hold the same model: give the low-noise expert, then the high-noise one")
    shapes = [{name: tensor.shape for name, tensor in own.tensors.items()} for own in (high, low)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{files} are models of different shapes: give the two experts of one model")


def check_dataset(dataset: TrainingDataset, model: WanConfig, config: TrainConfig) -> None:
    """InputError if the caches were made for another kind of model, or hold texts that are too long for this one."""
    path = config.dataset.path
    _check_latents(dataset, model, config)
    if dataset.text_width != model.text_dim:
        raise InputError(
            f"the text caches of {path} are {dataset.text_width} wide, {config.dit} reads {model.text_dim}: make them "
            "again with this model's text encoder (wan_cache_text_encoder_outputs.py)"
        )
    if dataset.longest_text > model.text_len:
        raise InputError(
            f"a caption of {path} has {dataset.longest_text} tokens, {config.dit} reads at most {model.text_len}: "
            "shorten it, then run wan_cache_text_encoder_outputs.py again"
        )
    check_timesteps(config.timesteps, latent_sizes(dataset), config.expert)


def _check_latents(dataset: TrainingDataset, model: WanConfig, config: TrainConfig) -> None:
    """InputError if latents or CLIP tokens are not as wide as the model reads them."""
    path = config.dataset.path
    again = f"make them again (wan_cache_latents.py) with the VAE and CLIP of --task {config.task}"
    if wrong := next((item for item in dataset.items if item.latent_shape[0] != model.out_dim), None):
        raise InputError(
            f"the latent caches of {path} have {wrong.latent_shape[0]} channels, {config.dit} reads {model.out_dim}: "
            f"{again}"
        )
    if dataset.clip_width != model.image_dim:
        raise InputError(
            f"the CLIP tokens of {path} are {dataset.clip_width} wide, {config.dit} reads {model.image_dim}: {again}"
        )


def latent_sizes(dataset: TrainingDataset) -> list[tuple[int, int]]:
    """Every (height, width) that latents of the dataset have."""
    return sorted({item.latent_shape[-2:] for item in dataset.items})
