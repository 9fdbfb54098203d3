"""The flags of wan_train_network.py, checked into a TrainConfig."""

import os
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from utils.cli.command import USAGE, Parser, refuse_flags, unknown_choice
from utils.cli.config_file import flags_of_file
from utils.cli.expert_flags import has_states, names_of, read_experts
from utils.cli.learning_flags import read_optimizer, read_schedule, read_timesteps
from utils.cli.log_flags import read_log
from utils.cli.sampling_flags import SAMPLE_LORAS, read_loras
from utils.cli.swap_flags import read_swap
from utils.cli.train_flags import add_flags
from utils.cli.unsupported import TRAINING
from utils.data.config import read_dataset_config
from utils.data.sources import AnyDataset, DatasetConfig, VideoDataset
from utils.files import existing_file
from utils.preserve.old_prompts import EMPTY_PROMPT, PreserveConfig
from utils.run.config import COMPUTE_DTYPES, MetadataConfig, TrainConfig
from utils.run.samples import SampleConfig
from utils.run.save_schedule import KINDS, SaveConfig
from utils.run.state import LATEST, no_state
from utils.run.validation import ValidationConfig
from utils.sampling.prompts import read_prompt_file
from utils.sampling.starts import check_clip
from utils.selective_finetune import check_slice, ids_available
from utils.slices.ledger import is_concept_name
from wan.configs import TASKS
from wan.errors import InputError
from wan.values import outer_space_problem, quotes_problem, shown

_I2V_SHARE = 0.5  # of ti2v-5B's clips
_LEVELS = 8  # of noise, at which reference predictions of a prompt are recorded
_LONGEST_NAME = 200  # bytes, of the 255 that a file name may have; a sample's adds up to 50


_VALIDATE_ON = "--validation_dataset_config FILE, or validation_split = 0.1 under [general] in --dataset_config"


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The run that the flags describe; InputError if it cannot be done. Nothing is written."""
    flags = _parse(argv)
    _check_text(flags)
    _check_slice(flags)
    _check_required(flags)
    _check_batch(flags)
    save, dataset = _save(flags), _dataset(flags, flags.dataset_config)
    return TrainConfig(
        task=flags.task,
        dit=flags.dit,
        ff=flags.ff.strip(),
        ffid=flags.ffid,
        dataset=dataset,
        save=save,
        experts=read_experts(flags),
        timesteps=read_timesteps(flags),
        optimizer=read_optimizer(flags),
        schedule=read_schedule(flags),
        metadata=_metadata(flags),
        log=read_log(flags),
        samples=_samples(flags),
        sample_batch=flags.sample_batch,
        preserve=_preserve(flags),
        validation=_validation(flags, dataset),
        i2v_share=_i2v_share(flags, dataset),
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
        swap=read_swap(flags, "--fp8_base"),
        compile=flags.compile,
        workers=_workers(flags),
        persistent_workers=flags.persistent_data_loader_workers,
        seed=flags.seed,
        resume=_resume(flags, save),
        training_debug=flags.training_debug,
        show_timesteps=_show_timesteps(flags),
        allow_tf32=flags.cuda_allow_tf32,
        cudnn_benchmark=flags.cuda_cudnn_benchmark,
        process_timeout=timedelta(minutes=flags.ddp_timeout) if flags.ddp_timeout else None,
    )


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(usage=USAGE, description="Trains one slice of a Wan checkpoint on a dataset.")
    add_flags(parser)
    refuse_flags(parser, TRAINING)
    flags = parser.parse_args(argv)
    if flags.config_file is None:
        return flags
    return parser.parse_args(argv, namespace=flags_of_file(parser, flags.config_file))


def _check_text(flags: Namespace) -> None:
    """Files and metadata are written in UTF-8: a text with other bytes would fail only at the first save."""
    for name, value in vars(flags).items():
        for text in map(str, value if isinstance(value, list) else [value]):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"--{name} {text!a} is not valid UTF-8: type it again, or rename the file")


def _check_slice(flags: Namespace) -> None:
    if flags.ff is None:
        raise InputError(
            "--ff is missing: this script trains a slice of a checkpoint. Give --ff 0.001 --ffid 1: the share of every "
            "block's matrices, and which slice of that size; the next concept takes --ffid 2"
        )
    if flags.ffid is None:
        raise InputError(
            f"--ffid is missing: with --ff {shown(flags.ff)} it is a number from 1 to {ids_available(flags.ff)}"
        )
    check_slice(flags.ff, flags.ffid)


def _check_required(flags: Namespace) -> None:
    for name in ("dit", "dataset_config", "output_dir", "output_name"):
        if getattr(flags, name) is None:
            raise InputError(f"--{name} is missing")
    if flags.fp8_t5 and flags.t5 is None:
        raise InputError("--fp8_t5 has no effect without --t5: leave it out")
    if problem := outer_space_problem(flags.output_name) or quotes_problem(flags.output_name):
        raise InputError(f"--output_name {problem}")
    if not flags.output_name.strip(". ") or set(flags.output_name) & set('/\\:*?"<>|'):
        raise InputError(
            f"--output_name {shown(flags.output_name)} must be a file name; give the folder as --output_dir"
        )
    if not is_concept_name(flags.output_name):
        raise InputError(
            f"--output_name {flags.output_name[:40]!a} must have at most 255 characters and no control characters: it "
            "is the concept's name in files"
        )
    if (size := max(len(name.encode()) for name in names_of(flags))) > _LONGEST_NAME:
        raise InputError(
            f"--output_name has {size} bytes, at most {_LONGEST_NAME} are allowed: steps and times are added to it"
        )


def _check_batch(flags: Namespace) -> None:
    used = [flags.sample_prompts, flags.preserve_prompts, flags.preserve_answers]
    # Not any(): --preserve_prompts without a file is an empty list.
    if flags.sample_batch is not None and all(flag is None for flag in used):
        raise InputError(
            f"--sample_batch {flags.sample_batch} has no effect without --sample_prompts or --preserve_prompts"
        )


def _dataset(flags: Namespace, path: Path) -> DatasetConfig:
    task = TASKS[flags.task]
    return read_dataset_config(path, task.latents, task.conditions)


def _i2v_share(flags: Namespace, dataset: DatasetConfig) -> float:
    """The share of clips that start from their first frame, where there is a choice."""
    has_clips = any(map(_has_clips, dataset.datasets))
    has_choice = TASKS[flags.task].config.starts_from_latents
    if flags.i2v_share is None:
        return _I2V_SHARE if has_choice and has_clips else 0.0
    if not has_choice:
        names = [name for name, task in TASKS.items() if task.config.starts_from_latents]
        raise InputError(
            f"--i2v_share has no effect with --task {flags.task}: it is for {', '.join(names)}, the model that makes "
            "videos with and without a first frame; leave it out"
        )
    if not has_clips:
        raise InputError(
            f"--i2v_share has no effect on pictures, which train as text-to-video, and {flags.dataset_config} has no "
            "videos; leave it out"
        )
    return flags.i2v_share


def _has_clips(dataset: AnyDataset) -> bool:
    """Whether some of what it has is longer than one frame, as far as its settings say."""
    if not isinstance(dataset, VideoDataset):
        return False
    return dataset.frame_extraction == "full" or max(dataset.target_frames) > 1


def _inputs(flags: Namespace) -> tuple[Path, ...]:
    named = [flags.dataset_config, flags.vae, flags.t5, flags.tokenizer, flags.sample_prompts]
    named += [flags.validation_dataset_config, flags.clip, *(flags.preserve_answers or [])]
    named += [*flags.slices, *flags.sample_lora, *flags.sample_lora_high_noise, flags.config_file]
    named += [*map(Path, flags.preserve_prompts or []), flags.log_tracker_config]
    return tuple(path for path in named if path)


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
        overwrite=flags.overwrite,
    )


def _resume(flags: Namespace, save: SaveConfig) -> Path | None:
    if not flags.resume:
        return None
    latest = LATEST in flags.resume
    if latest and flags.overwrite:
        raise InputError(
            "--overwrite trains again from the first step, and --resume latest continues: give one of them"
        )
    if latest and len(flags.resume) > 1:
        raise InputError(
            f"--resume {' '.join(map(str, flags.resume))}: latest stands for the states of both experts, so give it "
            "alone"
        )
    if latest and not has_states(flags, save):
        raise no_state(save, names_of(flags))
    return flags.resume[0] if flags.dit_high_noise is None else None


def _metadata(flags: Namespace) -> MetadataConfig:
    return MetadataConfig(
        settings=not flags.no_metadata,
        title=flags.metadata_title,
        author=flags.metadata_author,
        description=flags.metadata_description,
        license=flags.metadata_license,
        tags=flags.metadata_tags,
        resolution=flags.metadata_reso or "x".join(map(str, TASKS[flags.task].sizes[0])),
        architecture=flags.metadata_arch,
        comment=flags.training_comment,
    )


def _samples(flags: Namespace) -> SampleConfig | None:
    task = TASKS[flags.task]
    if flags.clip or flags.sample_prompts:
        check_clip(task, flags.clip)
    turns = {
        "--sample_every_n_epochs": flags.sample_every_n_epochs,
        "--sample_every_n_steps": flags.sample_every_n_steps,
        "--sample_at_first": flags.sample_at_first,
    }
    given = [flag for flag, value in turns.items() if value]
    (loras, multipliers), (loras_high, multipliers_high) = (read_loras(flags, own) for own in SAMPLE_LORAS)
    if loras_high and flags.dit_high_noise is None:
        raise InputError("--sample_lora_high_noise is for two experts: give --dit_high_noise too, or use --sample_lora")
    if flags.sample_prompts is None:
        given += ["--sample_lora"] if loras or loras_high else []
        if given:
            raise InputError(f"{given[0]} needs --sample_prompts, a file of prompts")
        return None
    if not given:
        raise InputError(f"--sample_prompts needs one of {', '.join(turns)}")
    missing = [f"--{name}" for name in ("vae", "t5") if getattr(flags, name) is None]
    if missing:
        raise InputError(f"--sample_prompts needs {' and '.join(missing)} to draw samples")
    return SampleConfig(
        prompts=tuple(read_prompt_file(flags.sample_prompts, task=task)),
        vae=existing_file(flags.vae, "--vae"),
        t5=existing_file(flags.t5, "--t5"),
        fp8_t5=flags.fp8_t5,
        clip=flags.clip and existing_file(flags.clip, "--clip"),
        tokenizer=flags.tokenizer,
        vae_dtype=flags.vae_dtype,
        every_n_epochs=flags.sample_every_n_epochs,
        every_n_steps=flags.sample_every_n_steps,
        at_first=flags.sample_at_first,
        batch=flags.sample_batch,
        loras=loras,
        lora_multipliers=multipliers,
        loras_high_noise=loras_high,
        lora_multipliers_high_noise=multipliers_high,
    )


def _validation(flags: Namespace, dataset: DatasetConfig) -> ValidationConfig | None:
    every_n_steps, every_n_epochs = flags.validate_every_n_steps, flags.validate_every_n_epochs
    if flags.validation_dataset_config and dataset.validation_split:
        raise InputError(
            f"--validation_dataset_config, and validation_split in {dataset.path}: give one of them to say what to "
            "validate on"
        )
    has_pictures = bool(flags.validation_dataset_config or dataset.validation_split)
    if not has_pictures:
        if flags.save_best:
            raise InputError(f"--save_best needs pictures to validate on: {_VALIDATE_ON}")
        if not (every_n_steps or every_n_epochs):
            return None
        if flags.t5 is None:
            raise InputError(f"there is nothing to validate: {_VALIDATE_ON}, or --t5, which measures forgetting")
    validated = flags.validation_dataset_config and _dataset(flags, flags.validation_dataset_config)
    if validated and validated.validation_split:
        raise InputError(
            f"validation_split is for --dataset_config: leave it out of {validated.path}, which is validated on as a "
            "whole"
        )
    return ValidationConfig(
        dataset=validated,
        every_n_steps=every_n_steps,
        every_n_epochs=every_n_epochs or (None if every_n_steps else 1),
        save_best=flags.save_best,
        t5=flags.t5 and existing_file(flags.t5, "--t5"),
        fp8_t5=flags.fp8_t5,
        tokenizer=flags.tokenizer,
    )


def _preserve(flags: Namespace) -> PreserveConfig | None:
    names = flags.preserve_prompts
    if names is None and flags.preserve_answers is None:
        for name in ("preserve_random", "preserve_levels", "preserve_every", "preserve_weight", "guard"):
            if getattr(flags, name) is not None:
                raise InputError(
                    f"--{name} has no effect without --preserve_prompts (with files of prompts, or without any) or "
                    "--preserve_answers (a file that an earlier run wrote)"
                )
        return None
    if flags.t5 is None:
        raise InputError("--preserve_prompts and --preserve_answers need --t5 to encode the prompts")
    files = [Path(name) for name in names or () if name != "auto"]
    nothing_listed = names is not None and not files
    every = 4 if flags.preserve_every is None else flags.preserve_every
    # So that it has the same effect on average, whatever --preserve_every is.
    weight = float(every) if flags.preserve_weight is None else flags.preserve_weight
    return PreserveConfig(
        prompts=(EMPTY_PROMPT,) if nothing_listed else _prompts_of(files),
        from_ledger=nothing_listed or "auto" in (names or ()),
        answers=_answers(flags),
        levels=_LEVELS if flags.preserve_levels is None else flags.preserve_levels,
        random=flags.preserve_random,
        every=every,
        weight=weight,
        guard=flags.guard,
        t5=existing_file(flags.t5, "--t5"),
        tokenizer=flags.tokenizer,
        batch=flags.sample_batch,
        fp8_t5=flags.fp8_t5,
    )


def _prompts_of(files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(line.prompt for file in files for line in read_prompt_file(file))


def _answers(flags: Namespace) -> Path | None:
    """Of one model; those of two experts are told apart later."""
    if flags.preserve_answers is None or flags.dit_high_noise is not None:
        return None
    return existing_file(flags.preserve_answers[0], "--preserve_answers")


def _mixed_precision(flags: Namespace) -> str:
    """The flag's value, or that of `accelerate launch`, which passes it on in the environment."""
    precision = flags.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in COMPUTE_DTYPES:
        raise InputError(f"accelerate launch --mixed_precision: {unknown_choice(precision, COMPUTE_DTYPES)}")
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
        raise InputError("--show_timesteps image is not supported: use --show_timesteps console")
    return flags.show_timesteps == "console"
