"""Gathers the guard's statistics before the first step: at which contexts, and the passes of the model.

Shapes: B batch, C latent channels, F H W latent frames, height, width, S text tokens, D text width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from utils.learning.conditions import Conditioning, loss_mask
from utils.learning.flow_matching import draw_generator
from utils.preserve.asking import AskingPlan, room_in_training
from utils.preserve.guard import Gathering, Guard, MatrixStatistics, guard_from_state
from utils.preserve.old_prompts import Preservation
from utils.preserve.questions import Question, predictions
from utils.selective_finetune import TrainedSlice
from wan.errors import InputError
from wan.model import WanModel


def make_guard(
    plan: AskingPlan,
    preserved: Preservation,
    state: Mapping | None,
    model: WanModel,
    trained: TrainedSlice,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Guard | None:
    """The guard of a run that has one: as its `state` keeps it, or from the model, which nothing has trained yet."""
    if not plan.guard:
        return None
    if state is not None:
        return guard_from_state(plan.guard_weight, state, accelerator.device)
    return Guard(plan.guard_weight, _gather(plan, preserved, model, trained, accelerator, say))


def _gather(
    plan: AskingPlan,
    preserved: Preservation,
    model: WanModel,
    trained: TrainedSlice,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Mapping[str, MatrixStatistics]:
    """Each process makes its share of the passes, and has the statistics of all."""
    processes = accelerator.num_processes
    texts = _contexts(preserved)
    own = plan.guard[accelerator.process_index :: processes]
    batches = list(_batches(own, plan))
    say(
        f"for the guard, the run first makes {len(plan.guard)} predictions, forward and backward, which take about as "
        f"long as {len(batches)} training {'batch' if len(batches) == 1 else 'batches'}"
    )
    gathering = Gathering(trained)
    shown = tqdm(batches, desc="guard", leave=False, disable=not accelerator.is_main_process)
    with gathering.of_passes(), shown:
        for batch in shown:
            made = predictions([(_text(texts, one), one) for one in batch], model, accelerator.device)
            noise_BCFHW, values = _noise(batch, made.given)
            gathering.backward(made.velocity_BCFHW, noise_BCFHW.to(accelerator.device), values)
    statistics = gathering.statistics(processes)
    _check_is_finite(statistics, model)
    return statistics


def _check_is_finite(statistics: Mapping[str, MatrixStatistics], model: WanModel) -> None:
    """InputError, which names the first matrix that is not; of every process, since they have the same statistics."""
    for name, own in statistics.items():
        if not all(tensor.isfinite().all() for tensor in own.tensors()):
            why = "fp16 overflows easily: try --mixed_precision bf16" if model.dtype == torch.float16 else ""
            raise InputError(
                f"the guard's statistics of {name} are NaN or infinite, before anything was trained: "
                f"{why or 'check that --dit is not damaged and belongs to its caches'}; --guard 0 trains without them"
            )


def _noise(batch: Sequence[Question], given: Conditioning) -> tuple[Tensor, int]:
    """Of unit variance, 0 in a clean first frame, for which nothing is predicted; how many values of each are not."""
    noise_BCFHW = torch.stack([torch.randn(one.shape, generator=_generator(one, "guard")) for one in batch])
    mask = loss_mask(given.to("cpu"), noise_BCFHW.shape[2])
    if mask is None:
        return noise_BCFHW, noise_BCFHW[0].numel()
    return noise_BCFHW * mask, int(mask[0].expand_as(noise_BCFHW[0]).sum())


def _contexts(preserved: Preservation) -> Sequence[Tensor]:
    """Where predictions should stay: at random contexts, or at what is listed where there are none."""
    if preserved.random:
        return preserved.random.texts
    return [old.text_SD for old in (*preserved.general, *preserved.of_concepts)]


def _batches(questions: Sequence[Question], plan: AskingPlan) -> Iterator[Sequence[Question]]:
    """As large as in training; all of a batch have one shape, and a clean first frame or none."""
    alike: dict[tuple, list[Question]] = {}
    for one in questions:
        alike.setdefault((one.shape, one.starts_clean), []).append(one)
    for (shape, _), same in alike.items():
        size = room_in_training(shape, plan)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _text(texts: Sequence[Tensor], question: Question) -> Tensor:
    return texts[int(torch.randint(len(texts), (), generator=_generator(question, "text")))]


def _generator(question: Question, use: str) -> torch.Generator:
    return draw_generator(*question.place, use)
