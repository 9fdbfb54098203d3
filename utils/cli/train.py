"""The flags of wan_train_network.py, checked into a TrainConfig."""

import importlib.util
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from utils.cli.command import Parser, refuse_flags, say
from utils.cli.swap_flags import read_swap
from utils.cli.train_flags import REFUSED, add_flags
from utils.data.config import read_dataset_config
from utils.files import existing_file, read_toml
from utils.learning.flow_matching import TimestepConfig
from utils.learning.lr_schedules import ScheduleConfig
from utils.learning.optimizers import OptimizerConfig
from utils.preserve.old_prompts import PreserveConfig
from utils.run.config import COMPUTE_DTYPES, LogConfig, MetadataConfig, TrainConfig
from utils.run.samples import SampleConfig
from utils.run.save_schedule import KINDS, SaveConfig
from utils.run.state import latest_state
from utils.sampling.prompts import read_prompt_file
from utils.selective_finetune import check_slice, ids_available
from utils.slices.ledger import is_concept_name
from wan.configs import TASKS
from wan.errors import InputError

_HAS_SHIFT = ("shift", "sigma")
_HAS_SIGMOID = ("sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "qinglong_flux")
_HAS_SIGMOID += ("qinglong_qwen",)
_COUNTS = (
    *("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "ddp_timeout", "save_every_n_epochs"),
    *("save_every_n_steps", "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps"),
    *("save_last_n_steps_state", "sample_every_n_epochs", "sample_every_n_steps", "lr_scheduler_num_cycles"),
    *("preserve_levels", "preserve_every"),
)

_LEVELS = 8  # of noise, at which an old prompt is asked
_LONGEST_NAME = 200  # bytes, of the 255 that a file's name has; a sample's adds up to 50


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The run that the flags describe; InputError, in one line, if it cannot be. Nothing is written."""
    flags = _parse(argv)
    _check_text(flags)
    _check_slice(flags)
    _check_required(flags)
    _check_numbers(flags)
    return TrainConfig(
        task=_text_to_video(flags.task),
        dit=flags.dit,
        ff=flags.ff.strip(),
        ffid=flags.ffid,
        dataset=read_dataset_config(flags.dataset_config),
        save=_save(flags),
        timesteps=_timesteps(flags),
        optimizer=_optimizer(flags),
        schedule=_schedule(flags),
        metadata=_metadata(flags),
        log=_log(flags),
        samples=_samples(flags),
        preserve=_preserve(flags),
        vae=flags.vae,
        inputs=_inputs(flags),
        mixed_precision=_mixed_precision(flags),
        slices=tuple(existing_file(path, "--slices") for path in flags.slices),
        continue_slice=flags.continue_slice,
        allow_overlap=flags.allow_overlap,
        save_precision="fp32" if flags.save_precision == "float" else flags.save_precision,
        max_train_steps=flags.max_train_steps,
        max_train_epochs=flags.max_train_epochs,
        accumulation=flags.gradient_accumulation_steps,
        gradient_checkpointing=flags.gradient_checkpointing,
        offload_block_inputs=_offloads_block_inputs(flags),
        swap=read_swap(flags),
        workers=_workers(flags),
        persistent_workers=flags.persistent_data_loader_workers,
        seed=flags.seed,
        resume=_resume(flags),
        training_debug=flags.training_debug,
        show_timesteps=_show_timesteps(flags),
        allow_tf32=flags.cuda_allow_tf32,
        cudnn_benchmark=flags.cuda_cudnn_benchmark,
        process_timeout=timedelta(minutes=flags.ddp_timeout) if flags.ddp_timeout else None,
    )


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(description="Trains one slice of a Wan checkpoint on a dataset.")
    add_flags(parser)
    refuse_flags(parser, REFUSED)
    flags = parser.parse_args(argv)
    if flags.config_file is None:
        return flags
    # Without the suffix too, as musubi-tuner takes it.
    path = flags.config_file if flags.config_file.suffix else flags.config_file.with_suffix(".toml")
    defaults, unknown = parser.parse_known_args(_as_arguments(read_toml(path), path))
    if unknown or defaults.config_file:
        raise InputError(
            f"{path}: unknown key {(unknown or ['--config_file'])[0].partition('=')[0][2:]} (--help lists all)"
        )
    return parser.parse_args(argv, namespace=defaults)


def _as_arguments(tables: dict, path: Path) -> list[str]:
    """The file's keys, whatever table they are in, as command-line arguments."""
    arguments = []
    for key, value in tables.items():
        if isinstance(value, dict):
            arguments += _as_arguments(value, path)
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is True:
            arguments.append(f"--{key}")
        elif value is not False:
            arguments.append(f"--{key}={value}")
    return arguments


def _check_text(flags: Namespace) -> None:
    """Files and metadata are written in UTF-8, which a text of other bytes would only break at the first save."""
    for name, value in vars(flags).items():
        for text in map(str, value if isinstance(value, list) else [value]):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"--{name} {text!a} is not UTF-8: write or name it anew in UTF-8")


def _check_slice(flags: Namespace) -> None:
    if flags.ff is None:
        raise InputError(
            "this script trains a slice of a checkpoint: give --ff 0.001 --ffid 1 (the share of every block matrix "
            "that trains, and which one; the next concept takes --ffid 2)"
        )
    if flags.ffid is None:
        raise InputError(f"--ffid is missing: at --ff {flags.ff} it runs from 1 to {ids_available(flags.ff)}")
    check_slice(flags.ff, flags.ffid)


def _check_required(flags: Namespace) -> None:
    for name in ("dit", "dataset_config", "output_dir", "output_name"):
        if getattr(flags, name) is None:
            raise InputError(f"--{name} is missing")
    if not flags.output_name or set(flags.output_name) & set('/\\:*?"<>|'):
        raise InputError(f"--output_name {flags.output_name} must be a file name without a folder; see --output_dir")
    if not is_concept_name(flags.output_name):
        raise InputError(
            f"--output_name {flags.output_name[:40]!a} names the concept in files: 255 characters are allowed, "
            "those that steer a terminal are not"
        )
    if (size := len(flags.output_name.encode())) > _LONGEST_NAME:
        raise InputError(
            f"--output_name has {size} bytes, {_LONGEST_NAME} are allowed: with what is added to it (steps, times), it "
            "has to be a file's name"
        )


def _check_numbers(flags: Namespace) -> None:
    for name in _COUNTS:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be 1 or more")
    for name in ("max_data_loader_n_workers", "seed"):
        value = getattr(flags, name)
        if value is not None and value < 0:
            raise InputError(f"--{name} {value} must be 0 or more")
    for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std", "learning_rate"):
        if not 0 < getattr(flags, name) < math.inf:
            raise InputError(f"--{name} {getattr(flags, name)} must be above 0")
    if not 0 <= flags.max_grad_norm < math.inf:
        raise InputError(f"--max_grad_norm {flags.max_grad_norm} must be 0 (off) or more")


def _inputs(flags: Namespace) -> tuple[Path, ...]:
    named = [flags.dataset_config, flags.vae, flags.t5, flags.tokenizer, flags.sample_prompts, flags.preserve_answers]
    named += [*flags.slices, *map(Path, flags.preserve_prompts or []), flags.config_file, flags.log_tracker_config]
    return tuple(path for path in named if path)


def _text_to_video(task: str) -> str:
    allowed = [known.name for known in TASKS.values() if known.config.model_type == "t2v"]
    if task not in allowed:
        raise InputError(f"--task {task}: text-to-video trains here, with {', '.join(allowed)}")
    return task


def _save(flags: Namespace) -> SaveConfig:
    for unit in ("epochs", "steps"):
        for suffix in ("", "_state"):
            flag = f"save_last_n_{unit}{suffix}"
            if getattr(flags, flag) and not getattr(flags, f"save_every_n_{unit}"):
                raise InputError(f"--{flag} has no effect without --save_every_n_{unit}")
        if getattr(flags, f"save_last_n_{unit}_state") and not flags.save_state:
            raise InputError(f"--save_last_n_{unit}_state has no effect without --save_state")
    return SaveConfig(
        folder=flags.output_dir,
        name=flags.output_name,
        kinds=tuple(kind for kind in KINDS if kind in flags.save_as),
        every_n_epochs=flags.save_every_n_epochs,
        every_n_steps=flags.save_every_n_steps,
        last_n_epochs=flags.save_last_n_epochs,
        last_n_epochs_state=flags.save_last_n_epochs_state,
        last_n_steps=flags.save_last_n_steps,
        last_n_steps_state=flags.save_last_n_steps_state,
        save_state=flags.save_state,
        save_state_at_end=flags.save_state_on_train_end,
    )


def _resume(flags: Namespace) -> Path | None:
    return latest_state(flags.output_dir, flags.output_name, say) if flags.resume == Path("latest") else flags.resume


def _timesteps(flags: Namespace) -> TimestepConfig:
    low, high = flags.min_timestep, flags.max_timestep
    if not 0 <= low < high <= 1000:
        raise InputError(f"--min_timestep {low:g} --max_timestep {high:g}: they must be in order, from 0 to 1000")
    if flags.num_timestep_buckets is not None and flags.num_timestep_buckets < 2:
        raise InputError(f"--num_timestep_buckets {flags.num_timestep_buckets} must be 2 or more")
    # Esser et al. 2024, 3.1: beyond these bounds the density is no longer one.
    if not -1 <= flags.mode_scale <= 2 / (math.pi - 2):
        raise InputError(f"--mode_scale {flags.mode_scale:g} must be from -1 to {2 / (math.pi - 2):.2f}")
    _refuse_unread_timestep_settings(flags)
    return TimestepConfig(
        sampling=flags.timestep_sampling,
        shift=flags.discrete_flow_shift,
        sigmoid_scale=flags.sigmoid_scale,
        weighting=flags.weighting_scheme,
        logit_mean=flags.logit_mean,
        logit_std=flags.logit_std,
        mode_scale=flags.mode_scale,
        min_timestep=low,
        max_timestep=high,
        preserve_shape=flags.preserve_distribution_shape,
        buckets=flags.num_timestep_buckets,
    )


def _refuse_unread_timestep_settings(flags: Namespace) -> None:
    sampling, weighting = flags.timestep_sampling, flags.weighting_scheme
    of_sigma = weighting if sampling == "sigma" else ""
    reads_logit = of_sigma == "logit_normal" or sampling in ("logsnr", "qinglong_flux")
    is_cut = flags.preserve_distribution_shape and (flags.min_timestep, flags.max_timestep) != (0, 1000)
    unread = {
        f"--weighting_scheme {weighting}": weighting in ("logit_normal", "mode") and sampling != "sigma",
        "--discrete_flow_shift": flags.discrete_flow_shift != 1 and sampling not in _HAS_SHIFT,
        "--sigmoid_scale": flags.sigmoid_scale != 1 and sampling not in _HAS_SIGMOID,
        "--logit_mean": flags.logit_mean != 0 and not reads_logit,
        "--logit_std": flags.logit_std != 1 and not reads_logit,
        "--mode_scale": flags.mode_scale != 1.29 and of_sigma != "mode",
        "--preserve_distribution_shape": is_cut and sampling == "sigma",
    }
    for flag, is_unread in unread.items():
        if is_unread:
            with_weighting = f" --weighting_scheme {weighting}" if sampling == "sigma" else ""
            raise InputError(
                f"{flag} has no effect with --timestep_sampling {sampling}{with_weighting}: leave it out, or choose "
                "another sampling (shift is the usual one)"
            )


def _optimizer(flags: Namespace) -> OptimizerConfig:
    return OptimizerConfig(flags.optimizer_type, flags.learning_rate, tuple(flags.optimizer_args), flags.max_grad_norm)


def _schedule(flags: Namespace) -> ScheduleConfig:
    return ScheduleConfig(
        name=flags.lr_scheduler,
        warmup=flags.lr_warmup_steps,
        decay=flags.lr_decay_steps,
        cycles=flags.lr_scheduler_num_cycles,
        power=flags.lr_scheduler_power,
        timescale=flags.lr_scheduler_timescale,
        min_lr_ratio=flags.lr_scheduler_min_lr_ratio,
        class_path=flags.lr_scheduler_type,
        args=tuple(flags.lr_scheduler_args),
    )


def _metadata(flags: Namespace) -> MetadataConfig:
    return MetadataConfig(
        settings=not flags.no_metadata,
        title=flags.metadata_title,
        author=flags.metadata_author,
        description=flags.metadata_description,
        license=flags.metadata_license,
        tags=flags.metadata_tags,
        resolution=flags.metadata_reso,
        architecture=flags.metadata_arch,
        comment=flags.training_comment,
    )


def _samples(flags: Namespace) -> SampleConfig | None:
    turns = {
        "--sample_every_n_epochs": flags.sample_every_n_epochs,
        "--sample_every_n_steps": flags.sample_every_n_steps,
        "--sample_at_first": flags.sample_at_first,
    }
    given = [flag for flag, value in turns.items() if value]
    if flags.sample_prompts is None:
        if given:
            raise InputError(f"{given[0]} needs --sample_prompts, a file of prompts")
        return None
    if not given:
        raise InputError(f"--sample_prompts needs one of {', '.join(turns)}")
    missing = [f"--{name}" for name in ("vae", "t5") if getattr(flags, name) is None]
    if missing:
        raise InputError(f"--sample_prompts needs {' and '.join(missing)} to make pictures")
    return SampleConfig(
        prompts=tuple(read_prompt_file(flags.sample_prompts)),
        vae=existing_file(flags.vae, "--vae"),
        t5=existing_file(flags.t5, "--t5"),
        tokenizer=flags.tokenizer,
        vae_dtype=flags.vae_dtype,
        every_n_epochs=flags.sample_every_n_epochs,
        every_n_steps=flags.sample_every_n_steps,
        at_first=flags.sample_at_first,
    )


def _preserve(flags: Namespace) -> PreserveConfig | None:
    prompts = flags.preserve_prompts or []
    if not (prompts or flags.preserve_answers):
        for name in ("preserve_levels", "preserve_every", "preserve_weight"):
            if getattr(flags, name) is not None:
                raise InputError(
                    f"--{name} has no effect without --preserve_prompts (a file of prompts or auto) or "
                    "--preserve_answers (a file that an earlier run wrote)"
                )
        return None
    if flags.t5 is None:
        raise InputError("--preserve_prompts and --preserve_answers need --t5 to encode the prompts")
    files = [Path(name) for name in prompts if name != "auto"]
    every = 4 if flags.preserve_every is None else flags.preserve_every
    # On average as strong at any --preserve_every.
    weight = float(every) if flags.preserve_weight is None else flags.preserve_weight
    if not 0 < weight < math.inf:
        raise InputError(f"--preserve_weight {weight} must be above 0")
    return PreserveConfig(
        prompts=tuple(line.prompt for file in files for line in read_prompt_file(file)),
        from_ledger="auto" in prompts,
        answers=flags.preserve_answers and existing_file(flags.preserve_answers, "--preserve_answers"),
        levels=_LEVELS if flags.preserve_levels is None else flags.preserve_levels,
        every=every,
        weight=weight,
        t5=existing_file(flags.t5, "--t5"),
        tokenizer=flags.tokenizer,
    )


def _log(flags: Namespace) -> LogConfig:
    with_folder = "tensorboard" if flags.logging_dir else None
    trackers = {None: (), "all": ("tensorboard", "wandb")}.get(name := flags.log_with or with_folder, (name,))
    if "tensorboard" in trackers and flags.logging_dir is None:
        raise InputError(f"--log_with {flags.log_with} needs --logging_dir")
    for flag in ("log_prefix", "log_tracker_config", "log_config", "wandb_run_name"):
        needed = "wandb" if flag == "wandb_run_name" else "tensorboard or wandb"
        if getattr(flags, flag) and not any(tracker in needed for tracker in trackers):
            raise InputError(f"--{flag} has no effect without logging: give --logging_dir, and --log_with {needed}")
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"logging with {tracker} needs its package: pip install {tracker}")
    return LogConfig(
        folder=flags.logging_dir,
        trackers=trackers,
        prefix=flags.log_prefix,
        tracker_name=flags.log_tracker_name,
        tracker_settings=_tracker_settings(flags, trackers),
        with_settings=flags.log_config,
    )


def _tracker_settings(flags: Namespace, trackers: Sequence[str]) -> dict[str, dict]:
    settings = read_toml(flags.log_tracker_config) if flags.log_tracker_config else {}
    for name, value in settings.items():
        if name not in trackers or not isinstance(value, dict):
            raise InputError(
                f"{flags.log_tracker_config}: {name} is no table of a tracker in use ({', '.join(trackers)})"
            )
    if flags.wandb_run_name:
        settings["wandb"] = {"name": flags.wandb_run_name} | settings.get("wandb", {})
    return settings


def _mixed_precision(flags: Namespace) -> str:
    """The flag's, or that of `accelerate launch`, which hands it down in the environment."""
    precision = flags.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in COMPUTE_DTYPES:
        raise InputError(f"accelerate launch --mixed_precision {precision}: allowed are {', '.join(COMPUTE_DTYPES)}")
    return precision


def _offloads_block_inputs(flags: Namespace) -> bool:
    if flags.gradient_checkpointing_cpu_offload and not flags.gradient_checkpointing:
        raise InputError("--gradient_checkpointing_cpu_offload needs --gradient_checkpointing")
    return flags.gradient_checkpointing_cpu_offload


def _workers(flags: Namespace) -> int:
    if flags.persistent_data_loader_workers and not flags.max_data_loader_n_workers:
        raise InputError("--persistent_data_loader_workers has no effect with --max_data_loader_n_workers 0")
    return min(flags.max_data_loader_n_workers, os.cpu_count() or 1)


def _show_timesteps(flags: Namespace) -> bool:
    if flags.show_timesteps == "image":
        raise InputError("--show_timesteps image is not supported: use console")
    return flags.show_timesteps == "console"
