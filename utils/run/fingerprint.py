"""The settings of a run as text: what --resume compares, what a checkpoint's metadata tells.

The names are musubi-tuner's, without its ss_.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction

from utils.data.cache_files import read_latents, read_mask, read_text
from utils.data.dataset import TrainingDataset
from utils.data.given_pictures import given_to_item
from utils.data.items import Item
from utils.preserve.old_prompts import OldPrompts
from utils.run.config import MetadataConfig, TrainConfig
from utils.run.plan import TrainingPlan
from utils.selective_finetune import TrainedSlice, exact_fraction
from utils.slice_saving import base_identity, slice_digest, value_digest
from utils.slices.ledger import KEY
from utils.slices.on_base import SlicesOnBase
from wan.configs import TASKS
from wan.loading import CheckpointHeader


def deciding_settings(
    config: TrainConfig,
    seed: int,
    dataset: TrainingDataset,
    processes: int,
    preserved: OldPrompts,
    guard_weight: float = 0.0,
) -> dict[str, str]:
    """All that decides the run's numbers; `preserved` are the old prompts, the `guard_weight` is 0 without one."""
    timesteps, schedule, optimizer = config.timesteps, config.schedule, config.optimizer
    values = {
        "ff": _plain_share(config.ff),
        "ffid": config.ffid,
        "seed": seed,
        "mixed_precision": config.mixed_precision,
        "learning_rate": optimizer.learning_rate,
        "optimizer": optimizer.name or "AdamW",
        "optimizer_args": " ".join(optimizer.args),
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler": schedule.class_path or schedule.name,
        "lr_warmup_steps": schedule.warmup,
        "lr_decay_steps": schedule.decay,
        "lr_scheduler_num_cycles": schedule.cycles,
        "lr_scheduler_power": schedule.power,
        "lr_scheduler_timescale": schedule.timescale,
        "lr_scheduler_min_lr_ratio": schedule.min_lr_ratio,
        "lr_scheduler_args": " ".join(schedule.args),
        "gradient_accumulation_steps": config.accumulation,
        "processes": processes,
        "timestep_sampling": timesteps.sampling,
        "discrete_flow_shift": timesteps.shift,
        "sigmoid_scale": timesteps.sigmoid_scale,
        "weighting_scheme": timesteps.weighting,
        "logit_mean": timesteps.logit_mean,
        "logit_std": timesteps.logit_std,
        "mode_scale": timesteps.mode_scale,
        "min_timestep": timesteps.min_timestep,
        "max_timestep": timesteps.max_timestep,
        "preserve_distribution_shape": timesteps.preserve_shape,
        "num_timestep_buckets": timesteps.buckets,
        "num_preserve_prompts": len(preserved.all),
        "preserve_prompts_sha256": preserved.digest if config.preserve else None,
        "preserve_levels": config.preserve and config.preserve.levels,
        "preserve_every": config.preserve and config.preserve.every,
        "preserve_weight": config.preserve and config.preserve.weight,
        "num_train_items": len(dataset.items),
        "dataset_sha256": _dataset_hash(dataset),
    }
    if config.swap.fp8:
        values["fp8_base"] = config.swap.fp8
    if TASKS[config.task].config.starts_from_latents:
        values["i2v_share"] = config.i2v_share
    if config.sample_batch is not None:
        values["sample_batch"] = config.sample_batch
    if preserved.random_count:
        values["preserve_random"] = preserved.random_count
    if guard_weight:
        values["guard"] = guard_weight
    return {key: str(value) for key, value in values.items()}


def other_settings(config: TrainConfig, plan: TrainingPlan, dataset: TrainingDataset, started: str) -> dict[str, str]:
    """What else the metadata tells, and a resumed run may change."""
    values = {
        "training_started_at": started,
        "num_batches_per_epoch": plan.batches_per_epoch,
        "num_epochs": plan.epochs,
        "max_train_steps": plan.steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "compile": config.compile,
        "datasets": json.dumps(dataset.describe()),
        "sd_model_name": config.dit.name,
        "vae_name": config.vae.name if config.vae else "",
    }
    return {key: str(value) for key, value in values.items()}


def base_settings(header: CheckpointHeader, below: SlicesOnBase) -> dict[str, str]:
    """What is trained on: --dit's identity, the slices that it holds, and those on top of it."""
    ledger = hashlib.sha256(header.metadata.get(KEY, "").encode()).hexdigest()
    slices = ", ".join(f"{file.entry.label} {file.digest[:12]}" for file in below.files)
    return {"base_sha256": base_identity(header.files), "base_ledger_sha256": ledger, "slices": slices}


def start_hash(trained: TrainedSlice) -> dict[str, str]:
    """The SHA-256 of the base's values in the slice: another base has another one."""
    digests = {name: value_digest(matrix.start.cpu()) for name, matrix in trained.matrices.items()}
    return {"slice_start_sha256": slice_digest(digests)}


def _plain_share(ff: str) -> str:
    """One text for every way to type a share: 0.1 for 0.10, 1e-1 and 1/10."""
    exact = exact_fraction(ff)
    decimal = Decimal(exact.numerator) / exact.denominator
    return f"{decimal.normalize():f}" if Fraction(decimal) == exact else str(exact)


@functools.lru_cache(maxsize=1)  # two experts train on one
def _dataset_hash(dataset: TrainingDataset) -> str:
    """The SHA-256 of what the run sees and in which order; not of files, whose metadata have no fixed order."""
    items = [_identity(item) for item in dataset.items]
    latents = [value_digest(read_latents(item.latents)).hex() for item in dataset.items]
    shown = dict.fromkeys((item.text, caption) for item in dataset.items for caption in _texts(item))
    texts = [value_digest(read_text(path, caption)).hex() for path, caption in shown]
    return hashlib.sha256(json.dumps([items, latents, texts, dataset.epoch_batches(0, 0)]).encode()).hexdigest()


def _identity(item: Item) -> tuple:
    own = (item.name, item.bucket, item.frames, item.text_shape, *item.captions)
    # Only what there is, so that states of earlier versions stay valid.
    mask = [value_digest(read_mask(item.latents)).hex()] if item.masked else []
    given = [value_digest(tensor).hex() for tensor in given_to_item(item) if tensor is not None]
    return (*own, *([item.dropout] if item.dropout else []), *mask, *given)


def _texts(item: Item) -> tuple[str, ...]:
    return (*item.captions, "") if item.dropout else item.captions


def checkpoint_metadata(
    config: MetadataConfig, name: str, settings: Mapping[str, object], timestep_range: str
) -> dict[str, str]:
    """All lines as text; `settings` are the run's, their names without ss_."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": config.architecture or "wan2.1",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": config.title or name,
        "modelspec.date": now,
        "modelspec.resolution": config.resolution or "1280x720",
        "modelspec.timestep_range": timestep_range,
        "modelspec.author": config.author,
        "modelspec.description": config.description,
        "modelspec.license": config.license,
        "modelspec.tags": config.tags,
        "ss_base_model_version": "wan",
    }
    if config.settings:
        values |= {f"ss_{key}": value for key, value in settings.items()}
        values |= {"ss_output_name": name, "ss_training_comment": config.comment, "ss_training_finished_at": now}
    return {key: str(value) for key, value in values.items() if value is not None}
