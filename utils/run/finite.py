"""What is not finite (NaN or infinite) stops a run before it reaches the slice or a file.

The message names what is not finite, says what to look at, and which state and checkpoint are still good.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.run.outcome import Outcome, is_slice_finite
from utils.run.run import Place, Run
from utils.selective_finetune import TrainedSlice
from wan.errors import InputError
from wan.model import WanModel

_NAMED = 3  # matrices


def check_start_is_finite(trained: TrainedSlice, dit: Path) -> None:
    """InputError if the base holds NaN or infinity where the slice lies."""
    matrices = list(trained.matrices.values())
    are_finite = torch.stack([matrix.start.isfinite().all() for matrix in matrices]).tolist()
    if not all(are_finite):
        name = matrices[are_finite.index(False)].name
        raise InputError(f"{dit} holds NaN or infinite values in {name}: download it again, or use another checkpoint")


def check_step_is_finite(run: Run, place: Place, outcome: Outcome) -> None:
    """InputError if a loss or the gradient is not finite; unless the outcome is late, before the optimizer steps.

    An overflow that the scaler of fp16 answers with a smaller scale is none: it skips that step by itself.
    """
    wrong = [what for what, value in outcome.values.items() if not math.isfinite(value)]
    if not wrong or (wrong == ["grad_norm"] and run.scaler.is_enabled() and run.scaler.get_scale() > 1):
        return
    texts = {"loss": "the loss", "preserve_loss": "the loss on reference predictions"}
    what = " and ".join(texts[key] for key in wrong if key in texts) or f"the gradient of {_gradients(outcome)}"
    cause = _cause(run, outcome.step)
    raise InputError(f"{what} of step {outcome.step} is not finite{cause}. {_what_is_good(place)}")


def check_slice_is_finite(run: Run, place: Place, outcome: Outcome) -> None:
    """To be called after the optimizer stepped, before anything is saved; InputError if the step broke the slice."""
    if not (outcome.slice_was_finite if outcome.is_late else bool(is_slice_finite(run.trained))):
        raise InputError(
            f"step {outcome.step} made the slice infinite or NaN: lower --learning_rate. {_what_is_good(place)}"
        )


def check_state_is_finite(state: Mapping, place: Place) -> None:
    """InputError if a state that is to be saved holds NaN or infinity."""
    for name, tensor in _tensors(state):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{name} is not finite after step {place.step}: lower --learning_rate or set --max_grad_norm. "
                f"{_what_is_good(place)}"
            )


def _tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            yield from _tensors(entry, f"{name} {key}".strip())


def _gradients(outcome: Outcome) -> str:
    """The matrices whose gradient is not finite."""
    wrong = outcome.broken_matrices
    more = f" and {len(wrong) - _NAMED} more matrices" if len(wrong) > _NAMED else ""
    return f"{', '.join(wrong[:_NAMED])}{more}" or "the whole slice (its norm overflows)"


def _cause(run: Run, step: int) -> str:
    if name := _not_finite(run.model):
        return f": {run.config.dit} holds NaN or infinite values in {name}; download it again, or use another"
    fp16 = run.config.mixed_precision == "fp16"
    if step == 1:
        other = " (fp16 overflows easily: try --mixed_precision bf16)" if fp16 else ""
        return f", before anything was trained: --dit, its VAE caches or its text caches do not belong together{other}"
    return f": lower --learning_rate or set --max_grad_norm{', or use --mixed_precision bf16' if fp16 else ''}"


def _not_finite(model: WanModel) -> str | None:
    """The first of the model's own tensors that holds NaN or infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((name for name, own in tensors if own.is_floating_point() and not bool(own.isfinite().all())), None)


def _what_is_good(place: Place) -> str:
    if place.state:
        return f"Nothing of this step was saved; the state of step {place.state_step} is good: {place.state}"
    return "Nothing of this step was saved, and no state before it: --save_state with --save_every_n_steps keeps some"
