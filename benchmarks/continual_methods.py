"""The ways to train one more concept: what trains, and what the weights are afterwards.

Each is a function of a model, which is its own to change, and the concept's number (from 0).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_world import World, shifted
from torch import Tensor, nn

from utils.preserve.answers import Answer, OldPrompt, RandomContexts
from utils.preserve.guard import SAMPLES, Gathering, Guard
from utils.preserve.old_prompts import RANDOM_CONTEXTS, Preservation
from utils.preserve.random_contexts import DrawnContexts, TokenStatistics, first_texts
from utils.selective_finetune import TrainedSlice, attach_slice, block_linears, ids_available
from wan.model import WanModel

FF = "0.1"  # ten disjoint slices are the whole line
LORA_RANK = 10  # 249,600 values; the slice has 245,760
BATCH = 8
PRESERVE_EVERY = 4
LEVELS = 8  # of noise, at which an old prompt is asked
ASKED_AT_ONCE = 32


@dataclass(frozen=True)
class Learner:
    """What trains, what has to follow each optimizer step, and the weights at the end."""

    parameters: list[nn.Parameter]
    after_step: Callable[[], None]
    weights: Callable[[], dict[str, Tensor]]
    slice: TrainedSlice | None = None

    @property
    def values(self) -> int:
        """How many values train."""
        return sum(map(torch.numel, self.parameters))


def disjoint_slices(model: WanModel, number: int, ff: str = FF) -> Learner:
    """Each concept in a slice of its own."""
    trained = attach_slice(model, ff, number + 1)
    return Learner(list(trained.parameters()), trained.write_back, model.state_dict, trained)


def slices_in_turn(model: WanModel, number: int, ff: str = FF) -> Learner:
    """Each concept in the next slice; the first comes after the last one again."""
    return disjoint_slices(model, number % ids_available(ff), ff)


def one_slice(model: WanModel, number: int, ff: str = FF) -> Learner:
    """The same slice for every concept."""
    return disjoint_slices(model, 0, ff)


def whole_tensors(model: WanModel, number: int) -> Learner:
    """The predecessor's way: all tensors in a random order, cut into runs that begin within the budget."""
    named = dict(model.named_parameters())
    order = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())
    budget = float(FF) * sum(parameter.numel() for parameter in named.values())
    begin, chosen = 0, []
    for name in order:
        if number * budget <= begin < (number + 1) * budget:
            chosen.append(named[name])
        begin += named[name].numel()
    return _unfrozen(model, chosen)


def everything(model: WanModel, number: int) -> Learner:
    """All matrices of the blocks."""
    return _unfrozen(model, [linear.weight for linear in block_linears(model).values()])


def lora(model: WanModel, number: int, rank: int = LORA_RANK) -> Learner:
    """A LoRA on all matrices of the blocks (PEFT), merged into them at the end."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(block_linears(model)))
    with torch.random.fork_rng():
        torch.manual_seed(number)
        inject_adapter_in_model(config, model)

    def merged() -> dict[str, Tensor]:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
        kept = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
        return {name.replace(".base_layer", ""): value for name, value in kept.items()}

    return Learner([p for name, p in model.named_parameters() if "lora_" in name], _nothing, merged)


def masked(model: WanModel, choose: Callable[[str, Sequence[int]], Tensor]) -> Learner:
    """Any choice of values: `choose` gives flat indices in the weight of a name and shape."""
    weights = {f"{name}.weight": linear.weight for name, linear in block_linears(model).items()}
    chosen = {name: choose(name, weight.shape) for name, weight in weights.items()}
    start = {name: weight.flatten()[chosen[name]].clone() for name, weight in weights.items()}
    differences = {name: nn.Parameter(torch.zeros(len(at))) for name, at in chosen.items()}
    for name, weight in weights.items():
        weight.requires_grad_(True).register_post_accumulate_grad_hook(_gather(differences[name], chosen[name]))

    def write() -> None:
        for name, weight in weights.items():
            weight.data.view(-1)[chosen[name]] = start[name] + differences[name].detach()

    return Learner(list(differences.values()), write, model.state_dict)


def _gather(difference: nn.Parameter, at: Tensor) -> Callable[[Tensor], None]:
    def move(weight: Tensor) -> None:
        grad = weight.grad.flatten()[at]
        difference.grad = grad if difference.grad is None else difference.grad + grad
        weight.grad = None

    return move


def _unfrozen(model: WanModel, parameters: Sequence[nn.Parameter]) -> Learner:
    for parameter in parameters:
        parameter.requires_grad_(True)
    return Learner(list(parameters), _nothing, model.state_dict)


def _nothing() -> None:
    pass


def ask(world: World, model: WanModel, prompt: str, latents_NCFHW: Tensor, seed: int) -> OldPrompt:
    """The model's predictions for the prompt at evenly spread noise levels, as a run records them at its start."""
    answers = _answers(model, [world.text(prompt)] * LEVELS, latents_NCFHW, seed)
    return OldPrompt(prompt, kept=answers, text_SD=world.text(prompt))


def ask_at_random(
    world: World,
    model: WanModel,
    captions: Sequence[str],
    latents_NCFHW: Tensor,
    seed: int,
    count: int = RANDOM_CONTEXTS,
) -> RandomContexts:
    """The model's predictions at contexts that are drawn like the captions' tokens, one noise level each."""
    statistics = TokenStatistics.of(first_texts(map(world.text, captions)))
    texts = DrawnContexts(seed, statistics, count)
    return RandomContexts(texts, _answers(model, list(texts), latents_NCFHW, seed))


@torch.no_grad()
def _answers(model: WanModel, texts: Sequence[Tensor], latents_NCFHW: Tensor, seed: int) -> tuple[Answer, ...]:
    """The model's predictions for the texts, at as many evenly spread noise levels."""
    noisy, t = _spread(latents_NCFHW, len(texts), torch.Generator().manual_seed(seed))
    parts = range(0, len(texts), ASKED_AT_ONCE)
    velocity = [model(noisy[i:j], t[i:j], texts[i:j]) for i, j in ((at, at + ASKED_AT_ONCE) for at in parts)]
    return tuple(map(Answer, noisy, t.tolist(), torch.cat(velocity)))


def _spread(latents_NCFHW: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` of the latents with noise of evenly spread levels, and the timesteps."""
    clean = latents_NCFHW[torch.randint(len(latents_NCFHW), (count,), generator=draw)]
    sigma = shifted((torch.arange(count) + torch.rand(count, generator=draw)) / count)
    noisy = torch.lerp(clean, torch.randn(clean.shape, generator=draw), sigma.view(-1, 1, 1, 1, 1))
    return noisy, 1000 * sigma


def make_guard(
    model: WanModel,
    trained: TrainedSlice,
    texts: Sequence[Tensor],
    latents_NCFHW: Tensor,
    weight: float,
    seed: int,
    samples: int = SAMPLES,
) -> Guard:
    """A guard of the slice, with statistics at some of the texts, as a run gathers them at its start."""
    draw, gathering = torch.Generator().manual_seed(seed), Gathering(trained)
    chosen = [texts[int(number)] for number in torch.randint(len(texts), (samples,), generator=draw)]
    noisy, t = _spread(latents_NCFHW, samples, draw)
    with gathering.of_passes():
        for own in torch.arange(samples).split(BATCH):
            predicted = model(noisy[own], t[own], [chosen[number] for number in own])
            gathering.backward(predicted, torch.randn(predicted.shape, generator=draw), predicted[0].numel())
    return Guard(weight, gathering.statistics())


def teach(
    world: World,
    start: Mapping[str, Tensor],
    learn: Callable[[WanModel], Learner],
    prompt: str,
    latents_NCFHW: Tensor,
    rate: float,
    steps: int,
    seed: int,
    preserve: tuple[Sequence[OldPrompt], Sequence[OldPrompt]] | None = None,
    every: int = PRESERVE_EVERY,
    on_step: Callable[[int, WanModel], None] | None = None,
    random: RandomContexts | None = None,
    guard: float = 0.0,
) -> tuple[dict[str, Tensor], int]:
    """Trains `prompt` to draw the latents; the weights, how many values train.

    The arithmetic of wan_train_network.py --timestep_sampling shift --lr_scheduler cosine. `preserve`: general old
    prompts and those of concepts, with their answers; `random`: contexts with theirs; `guard`: the weight of a guard at
    these contexts, or at what is listed.
    """
    model = world.model(start)
    learner = learn(model)
    optimizer = torch.optim.AdamW(learner.parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    preserve = preserve or (random and ((), ()))
    kept = preserve and Preservation(*map(tuple, preserve), every, every, most_values=10**9, random=random)
    guarded = None
    if guard:
        texts = random.texts if random else [old.text_SD for part in preserve for old in part]
        guarded = make_guard(model, learner.slice, texts, latents_NCFHW, guard, seed)
    for step in range(1, steps + 1):
        clean = latents_NCFHW[torch.randint(len(latents_NCFHW), (BATCH,), generator=draw)]
        sigma = shifted(torch.rand(BATCH, generator=draw))
        noise = torch.randn(clean.shape, generator=draw)
        noisy, t = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1)), 1000 * sigma
        F.mse_loss(model(noisy, t, [world.text(prompt)] * BATCH), noise - clean).backward()
        if kept and kept.is_due(step):
            for old in kept.draw([draw] * BATCH, device=noisy.device):
                loss = F.mse_loss(model(old.noisy_BCFHW, old.t_B, old.context), old.velocity_BCFHW)
                (kept.weight * old.share * loss).backward()
        if guarded:
            guarded.add_gradient(learner.slice)
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        learner.after_step()
        if on_step:
            on_step(step, model)
    return {name: value.detach().clone() for name, value in learner.weights().items()}, learner.values
