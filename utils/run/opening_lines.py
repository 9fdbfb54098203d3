"""The lines that a training run prints before its first step: what trains, for how long, what it will write."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from utils.data.dataset import TrainingDataset
from utils.data.items import Item
from utils.files import readable
from utils.interrupts import torchrun_line
from utils.learning.flow_matching import TimestepConfig, draw_generator, draw_uniforms, sigmas_of
from utils.preserve.guard import Guard
from utils.preserve.old_prompts import preserve_lines
from utils.run.config import TrainConfig
from utils.run.plan import TrainingPlan
from utils.run.run import Run
from utils.run.save_schedule import DiskUse
from utils.selective_finetune import TrainedSlice
from utils.slices.ledger import Entry, own_entry
from utils.slices.on_base import lines_below
from utils.slices.overlaps import ids_line
from utils.swap.placement import Placement, memory_line
from wan.configs import WanConfig, WanTask
from wan.model import WanModel

KIND_NAMES = {"checkpoint": "checkpoint", "slice": "slice file", "lora": "LoRA"}  # of --save_as, in words


def model_lines(run: Run, placement: Placement) -> list[str]:
    """What of the model trains, beside and over what, and the memory that it takes."""
    config, below, trained = run.config, run.below, run.trained
    own = own_entry(config.ff, config.ffid, config.save.name)
    lines = lines_below(config.dit, below, own, config.continue_slice)
    lines += slice_lines(trained, run.model, below.entries)
    lines += preserve_lines(run.preserved, below.entries, own)
    if run.guard:
        lines.append(f"guards the model's other predictions, on every step, with weight {run.guard.weight:g}")
    taken = slice_memory(trained, run.model, run.guard)
    return [*lines, f"{memory_line(placement, run.accelerator.device)}; {taken}"]


def run_lines(run: Run, input_bytes: int, saving_lines: Sequence[str]) -> list[str]:
    """How long it takes; `input_bytes` of each block's input wait on the host, `saving_lines` say what is written."""
    lines = [inputs_line(len(run.model.blocks), input_bytes)] if input_bytes else []
    lines += [plan_line(run.plan, run.accelerator.num_processes), *saving_lines]
    return [*lines, *filter(None, [torchrun_line()])]


def experts_lines(config: TrainConfig, asked: Sequence[TrainConfig]) -> list[str]:
    """How two experts share the run, and what only one of them is given; `asked` are their own configs."""
    if (two := config.experts) is None:
        return []
    lines = [
        f"each expert takes these steps, {two.dit_high_noise.name} on timesteps from {two.boundary:g}, "
        f"{config.dit.name} below; they take turns of {_counted(two.switch_every, 'step')}"
    ]
    if "high" in config.dit.name.lower() and "low" in two.dit_high_noise.name.lower():
        lines.append("WARNING: by their names, --dit is the high-noise expert and --dit_high_noise the low-noise one")
    for own in asked:
        left_out = {
            "--slices": config.slices and not own.slices,
            "--preserve_answers": two.preserve_answers and own.preserve.answers is None,
        }
        flags = " and ".join(flag for flag, is_left_out in left_out.items() if is_left_out)
        lines += [f"note: no file of the {own.expert} expert is in {flags}, so it trains without one"] if flags else []
    return lines


def slice_lines(trained: TrainedSlice, model: WanModel, ledger: Sequence[Entry]) -> list[str]:
    """How much trains and where, and which ids will still be free."""
    blocks = {name.split(".")[1] for name in trained.matrices}
    total = sum(parameter.numel() for parameter in model.parameters())
    own = own_entry(trained.ff, trained.ffid, "")
    return [
        f"slice ff {trained.ff} ffid {trained.ffid}: {trained.count:,} of {total:,} parameters train "
        f"({100 * trained.count / total:.4f} %), in {len(trained.matrices)} matrices of {len(blocks)} of "
        f"{len(model.blocks)} blocks",
        f"after this run {ids_line([*ledger, own], trained.ff)}",
    ]


def slice_memory(trained: TrainedSlice, model: WanModel, guard: Guard | None = None) -> str:
    """How much memory the slice takes on the device besides the weights."""
    # difference, gradient, the start values; then two fp32 values of state in Adam's family.
    slice_bytes = trained.count * (8 + model.dtype.itemsize)
    optimizer = f"AdamW's state {readable(8 * trained.count)}"
    guarding = f", its guard {readable(guard.nbytes)}" if guard else ""
    return f"the slice takes {readable(slice_bytes)} there{guarding} and {optimizer}, plus activations"


def input_bytes(
    model: WanConfig,
    dtype: torch.dtype,
    dataset: TrainingDataset,
    batches: Sequence[Sequence[int]],
    kept: Sequence[int] = (),
) -> int:
    """The input of one block, for the largest batch, or for latents of shape `kept` [C, F, H, W] where that is more."""
    tokens = max(sum(_tokens(dataset.items[entry % len(dataset.items)], model) for entry in batch) for batch in batches)
    tokens = max(tokens, math.prod(kept[1:]) // math.prod(model.patch_size) if kept else 0)
    return tokens * model.dim * dtype.itemsize


def inputs_line(blocks: int, size: int) -> str:
    """How much host memory the inputs of all blocks but the last take, each of `size` bytes."""
    return (
        f"block inputs are kept in host memory: up to {readable((blocks - 1) * size)}, "
        f"plus buffers of {readable(2 * size)} on the device"
    )


def plan_line(plan: TrainingPlan, processes: int) -> str:
    """Epochs, steps, batches."""
    where = f", {processes} processes" if processes > 1 else ""
    epochs = f"{_counted(plan.epochs, 'epoch')} of {_counted(plan.steps_per_epoch, 'step')}"
    batches = _counted(plan.batches_per_epoch * processes, "batch", "batches")
    items = f"{_counted(plan.items_per_epoch, 'item')} in {batches}"
    per_step = _counted(plan.accumulation, "batch", "batches")
    return f"{_counted(plan.steps, 'step')}: {epochs}, {items}, {per_step} per step{where}"


def saving_lines(uses: Mapping[str, DiskUse], sizes: Mapping[str, int], folder: Path, free: int) -> list[str]:
    """What the run will write in all, with a warning if the disk has no room; `sizes` are those of one save.

    `uses` are by output name: one, or those of two experts.
    """
    each = [_written(use, sizes) + (f" as {name}" if len(uses) > 1 else "") for name, use in uses.items()]
    written, kept = (sum(getattr(use, field) for use in uses.values()) for field in ("written", "kept"))
    lines = [
        f"will write {' and '.join(each)} to {folder}: {readable(written)} in all, of which {readable(kept)} will be "
        f"kept; {readable(free)} are free"
    ]
    if kept > free:
        lines.append(
            f"WARNING: {readable(kept)} will not fit into {readable(free)}: save less often "
            "(--save_every_n_epochs), keep fewer files (--save_last_n_epochs), or use --save_as slice"
        )
    return lines


def _written(use: DiskUse, sizes: Mapping[str, int]) -> str:
    each = [f"{_counted(use.saves, KIND_NAMES[kind])} of {readable(size)}" for kind, size in sizes.items()]
    return ", ".join([*each, *([_counted(use.states, "state")] if use.states else [])])


def expert_line(task: WanTask, dit: Path, timesteps: TimestepConfig) -> str | None:
    """Advice if one of two experts would train on timesteps at which the other one is used."""
    if task.boundary is None:
        return None
    boundary = 1000 * task.boundary
    low_only, high_only = timesteps.max_timestep <= boundary, timesteps.min_timestep >= boundary
    low, high = f"--min_timestep 0 --max_timestep {boundary:g}", f"--min_timestep {boundary:g} --max_timestep 1000"
    is_high = "high" in dit.name.lower() and "low" not in dit.name.lower()
    is_low = "low" in dit.name.lower() and "high" not in dit.name.lower()
    if (low_only and not is_high) or (high_only and not is_low):
        return None
    named = {(True, False): f"is the high-noise one: use {high}", (False, True): f"is the low-noise one: use {low}"}
    advice = named.get((is_high, is_low), f"is one of them: use {low} or {high}, or train both (--dit_high_noise)")
    return (
        f"note: this run trains on timesteps {timesteps.min_timestep:g} to {timesteps.max_timestep:g}, but "
        f"{task.name} has two experts, one on each side of {boundary:g}, and {dit.name} {advice}"
    )


def first_frame_line(i2v_share: float, items: Sequence[Item]) -> str | None:
    """How ti2v-5B is trained, where there is a choice: with and without the first frame of its clips."""
    clips = sum(item.latent_shape[1] > 1 for item in items)
    if not (i2v_share and clips):
        return None
    return (
        f"{100 * i2v_share:g} % of the showings of {_counted(clips, 'clip')} train as image-to-video, from their first "
        "frame; everything else trains as text-to-video (--i2v_share)"
    )


def timestep_lines(config: TimestepConfig, latent_size: tuple[int, int], seed: int) -> list[str]:
    """A histogram, as text, of the timesteps that training would draw."""
    u_B = draw_uniforms(config, [draw_generator(seed, "show timesteps")] * 100_000, seed, 0)
    counts = torch.histc(sigmas_of(config, u_B, latent_size), bins=20, min=0, max=1).tolist()
    height, width = latent_size
    lines = [f"timesteps of 100,000 samples, {config.sampling}, latents of {height}x{width}:"]
    for number, count in enumerate(counts):
        lines.append(f"{50 * number:4d}-{50 * number + 50:4d} {'#' * round(60 * count / max(counts))} {count:.0f}")
    return lines


def _counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _tokens(item: Item, model: WanConfig) -> int:
    return math.prod(length // patch for length, patch in zip(item.latent_shape[1:], model.patch_size, strict=True))
