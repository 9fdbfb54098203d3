"""The configuration of one training run, composed of what each part of it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from utils.data.sources import DatasetConfig
from utils.learning.flow_matching import TimestepConfig
from utils.learning.lr_schedules import ScheduleConfig
from utils.learning.optimizers import OptimizerConfig
from utils.preserve.old_prompts import PreserveConfig
from utils.run.samples import SampleConfig
from utils.run.save_schedule import SaveConfig
from utils.run.validation import ValidationConfig
from utils.swap.plan import SwapConfig

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed_precision


@dataclass(frozen=True)
class MetadataConfig:
    """What the user says about the model; None leaves a line out or to its default."""

    settings: bool = True  # False: without the ss_* lines
    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    resolution: str | None = None
    architecture: str | None = None
    comment: str | None = None


@dataclass(frozen=True)
class LogConfig:
    """Where scalars and sample pictures are logged: one folder of its own per run."""

    folder: Path | None = None
    trackers: tuple[str, ...] = ()  # tensorboard, wandb; none: nothing is logged
    prefix: str = ""
    tracker_name: str = "network_train"
    tracker_settings: Mapping[str, dict] = field(default_factory=dict)  # tracker -> arguments of its own
    with_settings: bool = False  # log the run's settings too


@dataclass(frozen=True)
class ExpertsConfig:
    """What a run that trains both experts of a model is given beside --dit, the low-noise one."""

    dit_high_noise: Path
    boundary: float  # the timestep from which on the high-noise expert is used
    switch_every: int = 100  # optimizer steps
    resume: tuple[Path, ...] = ()  # a state of each, or one name that stands for both
    preserve_answers: tuple[Path, ...] = ()  # files of earlier runs, each of one expert


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    task: str
    dit: Path
    ff: str  # the decimal as it was typed
    ffid: int
    dataset: DatasetConfig
    save: SaveConfig
    experts: ExpertsConfig | None = None  # both are trained; their own configs are made of this one
    expert: str = ""  # which of two experts this is the config of, where both are trained
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SampleConfig | None = None
    sample_batch: int | None = None  # latents in a pass, of samples and recorded predictions; None: by their size
    preserve: PreserveConfig | None = None
    validation: ValidationConfig | None = None
    i2v_share: float = 0.0  # of the clips of ti2v-5B: those that start from their first frame
    vae: Path | None = None  # named in the metadata
    mixed_precision: str = "no"
    inputs: tuple[Path, ...] = ()  # all files that flags name beside dit: no output may replace one
    slices: tuple[Path, ...] = ()  # slice files that go on top of dit
    continue_slice: bool = False  # the slice is in dit or slices: train it further
    allow_overlap: bool = False  # train over other slices
    save_precision: str | None = None  # None: the file's
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    accumulation: int = 1
    gradient_checkpointing: bool = False
    offload_block_inputs: bool = False  # to the host, between forward and backward
    swap: SwapConfig = field(default_factory=SwapConfig)
    compile: bool = False  # the pointwise functions
    workers: int = 0
    persistent_workers: bool = False
    seed: int | None = None  # None: random
    resume: Path | None = None
    training_debug: bool = False  # tell what moves in each block, compare each save with its base
    show_timesteps: bool = False  # and end
    allow_tf32: bool = False
    cudnn_benchmark: bool = False
    process_timeout: timedelta | None = None
