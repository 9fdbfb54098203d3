"""What must fit together before a training run loads its model."""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from utils.data.dataset import TrainingDataset
from utils.files import readable, writable_folder
from utils.learning.lr_schedules import check_schedule
from utils.learning.optimizers import check_optimizer
from utils.preserve.answers_file import ENDING
from utils.preserve.asking import AskedModel, AskingPlan, plan_asking, read_old_prompts
from utils.preserve.guard import MOST_BYTES, WEIGHT, guard_bytes
from utils.preserve.questions import TrainedOn
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.earlier_run import Replaced, check_earlier_run
from utils.run.fingerprint import base_settings, deciding_settings
from utils.run.inputs import Inputs
from utils.run.opening_lines import expert_line, first_frame_line, input_bytes, saving_lines
from utils.run.plan import TrainingPlan, plan_training
from utils.run.save_schedule import (
    DiskUse,
    best_file,
    check_saves,
    disk_use,
    planned_files,
    planned_saves,
    remove_unfinished,
)
from utils.run.state import LATEST, choose_state, latest_state, no_state
from utils.run.state_check import check_state, expected_state
from utils.selective_finetune import SliceUnits
from utils.slices.base_identity import base_model
from utils.slices.ledger import own_entry
from utils.slices.lora import lora_bytes
from utils.slices.on_base import units_of
from utils.swap.memory_checks import StepNeeds, check_memory
from utils.swap.placement import FP8_TEXTS, sizes_of
from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.loading import (
    CheckpointHeader,
    file_dtype,
)
from wan.memory import available_bytes, check_room
from wan.stored_tensors import dtype_name

_STATE_BYTES = 12  # a value: the difference, two of AdamW


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, all of it checked: its steps, what it records before the first one, what it will write.

    `resume` is the folder of the state that it continues from; `continues` says that it is this name's own.
    """

    steps: TrainingPlan
    settings: Mapping[str, str]  # those that decide the run's numbers
    asking: AskingPlan | None
    block_input: int  # bytes: the input of a block, for the largest batch
    most_values: int  # of latents, in the largest batch
    notes: Sequence[str]  # on files that it replaces, or leaves
    use: DiskUse
    sizes: Mapping[str, int]  # bytes of one save, by kind
    resume: Path | None
    continues: bool
    removed: Sequence[Path]  # by --overwrite, before the first step


def check(config: TrainConfig, inputs: Inputs, accelerator: Accelerator, say: Callable[[str], None]) -> RunPlan:
    """Plans the whole run; InputError if some part of it could not work. Says what is read and what is kept."""
    header, below, dataset, seed = inputs.header, inputs.below, inputs.dataset, inputs.seed
    processes = accelerator.num_processes
    batches = dataset.epoch_batches(seed, 0)
    steps = plan_training(batches, processes, config.accumulation, config.max_train_steps, config.max_train_epochs)
    model = AskedModel(base_model(header, below.entries), inputs.model_config) if config.preserve else None
    own = own_entry(config.ff, config.ffid, config.save.name)
    prompts = read_old_prompts(config.preserve, model, below.entries, own, dataset.items)
    units = units_of(header, own)
    guard_weight = _guard_weight(config, units.values(), say)
    settings = deciding_settings(config, seed, dataset, processes, prompts, guard_weight) | base_settings(header, below)
    resume, continues = _choose_state(config, header, steps, settings, accelerator.device, say)
    if accelerator.is_main_process:
        remove_unfinished(config.save)
    accelerator.wait_for_everyone()  # what a killed run left takes room, which every process looks for
    answers = config.save.folder / f"{config.save.name}{ENDING}"
    trained_on = TrainedOn(dataset.items, batches, config.timesteps, seed, config.i2v_share)
    asking = plan_asking(config.preserve, answers, model, prompts, trained_on, guard_weight)
    guarded = guard_bytes(units.values()) if guard_weight else 0
    replaced, use, sizes = check_plan(config, header, steps, asking, resume, continues, guarded)
    kept = asking.largest_kept if asking else ()
    block_input = input_bytes(inputs.model_config, COMPUTE_DTYPES[config.mixed_precision], dataset, batches, kept)
    check_run_memory(config, header, inputs.model_config, accelerator.device, block_input, guarded)
    say_what_is_read(config, header, dataset, say)
    for line in asking.lines() if asking else ():
        say(line)
    most_values = max(sum(dataset.latent_values(entry) for entry in batch) for batch in batches)
    return RunPlan(
        steps,
        settings,
        asking,
        block_input,
        most_values,
        replaced.lines,
        use,
        sizes,
        resume,
        continues,
        replaced.removed,
    )


def check_all(
    config: TrainConfig,
    asked: Sequence[TrainConfig],
    inputs: Sequence[Inputs],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> list[RunPlan]:
    """The plans of what is `asked` for by `config`: of a run, or of each expert; InputError if one could not work."""
    plans = [check(own, given, accelerator, say) for own, given in zip(asked, inputs, strict=True)]
    if config.experts is None:
        return plans
    for line in inputs[0].dataset.describe():
        say(line)
    if asked[0].resume and not any(plan.resume for plan in plans):
        raise no_state(config.save, [own.save.name for own in asked])
    for own, plan in zip(asked, plans, strict=True):
        if own.resume and plan.resume is None:
            say(f"{own.save.name} has no usable state, so it begins at its first step")
    if config.samples:
        writable_folder(config.save.folder / "sample", "the folder of samples")
        if accelerator.is_main_process:
            remove_unfinished(config.save)
    return plans


def planned_lines(asked: Sequence[TrainConfig], plans: Sequence[RunPlan]) -> list[str]:
    """What will be replaced and written, by a run or by both experts together."""
    folder = asked[0].save.folder
    uses = {config.save.name: plan.use for config, plan in zip(asked, plans, strict=True)}
    lines = saving_lines(uses, plans[0].sizes, folder, shutil.disk_usage(folder).free)
    return [*(note for plan in plans for note in plan.notes), *lines]


def _guard_weight(config: TrainConfig, units: Collection[SliceUnits], say: Callable[[str], None]) -> float:
    """That of the guard's penalty; 0 where there is none, or where its statistics would be too large.

    InputError if they would be and a weight was asked for.
    """
    asked = config.preserve.guard if config.preserve else 0.0
    if asked == 0 or (size := guard_bytes(units)) <= MOST_BYTES:
        return WEIGHT if asked is None else asked
    sizes = f"{readable(size)} at ff {config.ff}, and {readable(MOST_BYTES)} at most are kept"
    if asked is not None:
        raise InputError(
            f"--guard {asked:g}: its statistics would take {sizes}; leave it out to train without a guard, or take a "
            "smaller --ff (they grow with its square)"
        )
    who = f"the {config.expert} expert" if config.expert else "the run"
    say(f"note: {who} has no guard, because its statistics would take {sizes}; they grow with the square of ff")
    return 0.0


def _choose_state(
    config: TrainConfig,
    header: CheckpointHeader,
    plan: TrainingPlan,
    settings: Mapping[str, str],
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Path | None, bool]:
    """The state that --resume continues from, checked, and whether it is one of this --output_name."""
    if config.resume is None:
        return None, False
    units = units_of(header, own_entry(config.ff, config.ffid, config.save.name))
    scales_loss = config.mixed_precision == "fp16"
    expected = expected_state(settings, plan, units, config.optimizer, config.schedule, device, scales_loss)
    fits = partial(check_state, expected=expected)
    if config.expert and config.resume == LATEST:  # the other one may have got further before a crash
        return latest_state(config.save, fits, say), True
    folder, name = choose_state(config.resume, config.save, fits, say)
    if name == config.save.name and config.save.overwrite:
        raise InputError(f"--overwrite trains again from the first step, and --resume {folder} continues: give one")
    return folder, name == config.save.name


def check_plan(
    config: TrainConfig,
    header: CheckpointHeader,
    plan: TrainingPlan,
    asking: AskingPlan | None,
    resume: Path | None,
    continues: bool,
    guarded: int = 0,
) -> tuple[Replaced, DiskUse, dict[str, int]]:
    """What the run replaces, what it will write in all, and the bytes of one save by kind.

    A guard's statistics are `guarded` bytes of each state.

    InputError if the optimizer, the schedule or a planned file cannot be.
    """
    check_optimizer(config.optimizer)
    check_schedule(config.schedule, plan.steps, config.optimizer.learning_rate)
    if config.preserve and config.preserve.every > plan.steps:
        raise InputError(
            f"--preserve_every {config.preserve.every}: the run has {plan.steps} steps, so none would preserve; take "
            f"{plan.steps} at the most"
        )
    units = units_of(header, own_entry(config.ff, config.ffid, config.save.name))
    values = sum(own.count for own in units.values())
    every = {
        "checkpoint": sum(file.stat().st_size for file in header.files),
        "slice": values * file_dtype(header).itemsize,
        "lora": lora_bytes(units, torch.float32),
    }
    sizes = {kind: every[kind] for kind in config.save.kinds}
    saves = list(planned_saves(config.save, plan.steps, plan.steps_per_epoch, plan.epochs))
    inputs, others = [*header.files, *config.inputs], {}
    if asking:
        others[asking.path] = asking.size
    if config.validation and config.validation.save_best:
        others[best_file(config.save)] = every["slice"]
    check_saves(saves, config.save, inputs, sizes, others)
    if config.samples:
        writable_folder(config.save.folder / "sample", "the folder of samples")
    if config.log.trackers and config.log.folder:
        writable_folder(config.log.folder, "--logging_dir")
    own = own_entry(config.ff, config.ffid, config.save.name)
    planned = [*planned_files(saves), *(path for path in others if path == best_file(config.save))]
    replaced = check_earlier_run(config.save, planned, own, [*inputs, *filter(None, [resume])], continues)
    return replaced, disk_use(saves, sizes, values * _STATE_BYTES + guarded), sizes


def check_run_memory(
    config: TrainConfig,
    header: CheckpointHeader,
    model: WanConfig,
    device: torch.device,
    block_input: int,
    guarded: int = 0,
) -> None:
    """InputError if the model, the slice with its guard, the inputs of its blocks (`block_input` each) do not fit."""
    stored, dtype = file_dtype(header), COMPUTE_DTYPES[config.mixed_precision]
    flag = next((name for name, used in COMPUTE_DTYPES.items() if used == stored), None)
    own = units_of(header, own_entry(config.ff, config.ffid, config.save.name)).values()
    # The start values; fp32 differences and gradients.
    values = sum(units.count for units in own)
    trained = values * (dtype.itemsize + 4 + 4) + guarded
    if config.expert:  # the other one's slice and AdamW's state of it stay
        trained += values * (dtype.itemsize + _STATE_BYTES) + guarded
    usable = stored.itemsize <= dtype.itemsize and not (stored == torch.float16 and device.type == "cpu")
    lighter = f"use --mixed_precision {flag}" if usable else f"use a {dtype_name(dtype)} file as --dit"
    lighter = "use --host_weights mapped instead of --fp8_base" if config.swap.fp8 else lighter
    if config.expert and stored != dtype and not config.swap.fp8:  # read in place, they would stay in their files
        both = {"the weights of both experts": 2 * sizes_of(model, dtype).all}
        check_room(both, available_bytes(), "RAM", lighter)
    step = StepNeeds(trained, block_input, config.offload_block_inputs)
    check_memory(header, model, dtype, device, config.swap, f"{lighter}, so that the weights are read in place", step)


def say_what_is_read(
    config: TrainConfig, header: CheckpointHeader, dataset: TrainingDataset, say: Callable[[str], None]
) -> None:
    """The model's file, how it is computed, the dataset."""
    stored, used = file_dtype(header), COMPUTE_DTYPES[config.mixed_precision]
    cast = "" if stored == used else f", cast to {dtype_name(used)} at load, saved in {dtype_name(stored)}"
    fp8 = f"; block matrices rounded to {FP8_TEXTS[config.swap.fp8]}, but not the slice" if config.swap.fp8 else ""
    say(f"{config.dit}: {dtype_name(stored)}{cast}{fp8}")
    if config.expert:
        return
    for line in dataset.describe():
        say(line)
    if line := first_frame_line(config.i2v_share, dataset.items):
        say(line)
    if line := expert_line(TASKS[config.task], config.dit, config.timesteps):
        say(line)
