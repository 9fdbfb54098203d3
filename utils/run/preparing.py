"""Prepares a run up to its first step: prompts are encoded, the model is placed, everything of the loop is made."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.learning.lr_schedules import build_scheduler
from utils.learning.optimizers import build_optimizer
from utils.preserve.asking import AskingPlan, encode_old_prompts, keep_answers
from utils.preserve.gathering import make_guard
from utils.preserve.general_captions import general_captions
from utils.run.checks import RunPlan
from utils.run.config import COMPUTE_DTYPES, TrainConfig
from utils.run.fingerprint import other_settings, start_hash
from utils.run.finite import check_start_is_finite
from utils.run.forgetting import CAPTIONS, Probe, ProbedOn, encode_probe, start_probe
from utils.run.inputs import Inputs
from utils.run.opening_lines import model_lines
from utils.run.progress import StepTimer
from utils.run.run import Place, Run, has_ended, resume
from utils.run.samples import PreparedSamples, prepare_samples
from utils.run.state import read_state
from utils.run.two_experts import Expert
from utils.run.validation import WITHOUT_GRADIENT, Validation, ValidationConfig
from utils.sampling.defaults import read_sample_defaults
from utils.selective_finetune import attach_slice
from utils.slices.overlay import load_with_slices, start_from_overlays, start_in
from utils.swap.block_inputs import BlockInputs
from utils.swap.order import WeightOrder
from utils.swap.placement import LoadedWeights, checkpoint_blocks, place_model
from utils.swap.stage import LoadedModel, Stage
from utils.training_debug import TrainingDebug
from wan.compiling import compiled_pointwise
from wan.configs import TASKS
from wan.loading import file_dtype
from wan.model import WanModel, use_pointwise


def encode_samples(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator, say: Callable[[str], None]
) -> PreparedSamples | None:
    """The prompts of samples, encoded while the model does not take up memory yet."""
    if not (config.samples and accelerator.is_main_process):
        return None
    defaults = read_sample_defaults(inputs.header.metadata, config.dit)
    for line in defaults.lines(config.dit):
        say(line)
    return prepare_samples(
        config.samples, TASKS[config.task], inputs.model_config, inputs.seed, accelerator.device, defaults, say
    )


def encode_prompts(
    config: TrainConfig, inputs: Inputs, plan: RunPlan, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[AskingPlan | None, list[Tensor]]:
    """The same for the prompts that are preserved, and for those at which forgetting is measured."""
    asking = plan.asking
    if asking:
        asking = encode_old_prompts(config.preserve, asking, accelerator, say)
    return asking, _encode_probe(config.validation, inputs, plan, accelerator, say)


def _encode_probe(
    validation: ValidationConfig | None,
    inputs: Inputs,
    plan: RunPlan,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> list[Tensor]:
    """The captions at which forgetting is measured; none where it is not, or from the start that a state keeps."""
    if validation is None or validation.t5 is None or _kept_probe(plan):
        return []
    captions = general_captions(without=_not_to_probe(inputs, plan))[:CAPTIONS]
    if not captions:
        say("note: forgetting is not measured, because the run trains or preserves every caption that it would ask")
        return []
    encoder = (validation.t5, validation.tokenizer, validation.fp8_t5)
    return encode_probe(*encoder, captions, inputs.model_config, accelerator)


def _kept_probe(plan: RunPlan) -> Mapping | None:
    """What the state that the run continues from keeps of the predictions at its start."""
    saved = read_state(plan.resume).validation if plan.resume else None
    return saved["probe"] if saved else None


def _not_to_probe(inputs: Inputs, plan: RunPlan) -> set[str]:
    """The captions that are trained or preserved."""
    preserved = {old.text for old, _ in plan.asking.asked} if plan.asking else set()
    return preserved | {caption for item in inputs.dataset.items for caption in item.captions}


def make_block_inputs(config: TrainConfig, inputs: Inputs, device: torch.device) -> BlockInputs | None:
    """Where the blocks' inputs wait; two experts share it, since one of them computes at a time."""
    return BlockInputs(inputs.model_config.num_layers, device) if config.offload_block_inputs else None


def make_ready(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    encoded: tuple[AskingPlan | None, list[Tensor]],
    samples: PreparedSamples | None,
    block_inputs: BlockInputs | None,
    stage: Stage,
    accelerator: Accelerator,
    started: str,
    say: Callable[[str], None],
) -> Expert:
    """Everything of a run, or of one of two experts, up to its first step."""
    loaded = _load(config, inputs, plan, block_inputs, accelerator.device)
    placement = stage.bring(loaded)
    own_samples = samples if config.samples else None
    timer = StepTimer(stage.take_waits if placement.streamer else None)
    run = _make_run(config, inputs, plan, own_samples, *encoded, loaded, timer, accelerator, started, say)
    place = resume(run, plan.resume) if plan.resume else Place(0, 0, 0, deque(maxlen=run.plan.steps_per_epoch))
    ended = plan.resume is not None and has_ended(run, place)
    for line in () if ended and not config.expert else model_lines(run, placement):
        say(line)
    return Expert(run, loaded, place, ended)


def _load(
    config: TrainConfig, inputs: Inputs, plan: RunPlan, block_inputs: BlockInputs | None, device: torch.device
) -> LoadedModel:
    """Loads the model and attaches the slice; placed, the device has what trains and what fits."""
    dtype, rounds = COMPUTE_DTYPES[config.mixed_precision], bool(config.swap.fp8)
    model, overlays = load_with_slices(config.dit, dtype, inputs.below, rounds)
    if config.compile:
        use_pointwise(model, compiled_pointwise(model.config, dtype, device))
    trained = attach_slice(model, config.ff, config.ffid, device=device)
    start_in(trained, model.dtype)
    if config.continue_slice or config.allow_overlap:
        start_from_overlays(trained, overlays)
    check_start_is_finite(trained, config.dit)
    if config.gradient_checkpointing:
        checkpoint_blocks(model, block_inputs)
    offloaded = plan.block_input if config.offload_block_inputs else 0
    reserved = (len(model.blocks) - 1) * offloaded
    loaded = LoadedWeights(
        mapped=rounds or file_dtype(inputs.header) == model.dtype,
        overlays=overlays,
        reserved=reserved,
        returns=bool(config.expert),
        order=WeightOrder() if config.expert else None,
    )
    return LoadedModel(model, trained, partial(place_model, model, device, config.swap, trained, loaded), offloaded)


def _make_run(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    samples: PreparedSamples | None,
    asking: AskingPlan | None,
    probed: Sequence[Tensor],
    loaded: LoadedModel,
    timer: StepTimer,
    accelerator: Accelerator,
    started: str,
    say: Callable[[str], None],
) -> Run:
    """Everything that the loop works with; records the reference predictions that the run preserves."""
    model, trained = loaded.model, loaded.trained
    optimizer = build_optimizer(config.optimizer, trained.parameters())
    settings = {**plan.settings, **start_hash(trained)}
    replaces = config.save.overwrite or plan.continues
    preserved = guard = None
    if asking:
        preserved = keep_answers(config.preserve, asking, model, accelerator, settings, replaces, say)
        kept = read_state(plan.resume).guard if plan.resume else None
        guard = make_guard(asking, preserved, kept, model, trained, accelerator, say)
    applied = [file.entry for file in inputs.below.files]
    watches = config.training_debug and accelerator.is_main_process
    return Run(
        config=config,
        accelerator=accelerator,
        seed=inputs.seed,
        header=inputs.header,
        below=inputs.below,
        dataset=inputs.dataset,
        plan=plan.steps,
        settings=settings,
        metadata=settings | other_settings(config, plan.steps, inputs.dataset, started),
        model=model,
        trained=trained,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, plan.steps.steps),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16"),
        samples=samples,
        preserved=preserved,
        guard=guard,
        validation=_validation(config, inputs, plan, probed, model, accelerator.device),
        debug=TrainingDebug(trained, len(model.blocks), inputs.header.files, applied, config.expert)
        if watches
        else None,
        say=say,
        timer=timer,
    )


def _validation(
    config: TrainConfig,
    inputs: Inputs,
    plan: RunPlan,
    probed: Sequence[Tensor],
    model: WanModel,
    device: torch.device,
) -> Validation | None:
    """What the run is validated on; forgetting is measured from the model as it was before the run's first step."""
    if config.validation is None:
        return None
    most_values = WITHOUT_GRADIENT * plan.most_values
    if kept := _kept_probe(plan):
        probe = Probe.from_state(kept)
    else:
        asked = ProbedOn(probed, inputs.dataset.items, config.timesteps, config.i2v_share)
        probe = start_probe(asked, model, most_values, device) if probed else None
    rest = (most_values, probe, config.i2v_share)
    return Validation(config.validation, inputs.validated, config.timesteps, *rest)
