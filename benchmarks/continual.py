"""Ten characters, one after another: how much of what was learned before does each way of training keep?

    python benchmarks/continual.py OUTPUT_FOLDER --quick       # 3 characters, 1 seed
    python benchmarks/continual.py OUTPUT_FOLDER               # all parts that are not there yet, then the report
    python benchmarks/continual.py OUTPUT_FOLDER --report      # of the parts that are there

A part is one learning rate, or one chain of concepts; its process is its own, so that its peak memory is, too.
"""

import argparse
import functools
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import continual_methods as methods
import continual_report
import torch
import torch.nn.functional as F
from continual_report import HALF
from parts import add_flags, read_part, run_parts
from tiny_world import KNOWN, World, fixed_inputs, velocities

from utils.preserve.guard import WEIGHT
from utils.sampling.writers import save_image
from utils.selective_finetune import block_linears, slice_indices

Learn = Callable[..., methods.Learner]  # of a model and the concept's number

STEPS = 120
SAMPLES, SAMPLES_AT_END = 4, 8  # a prompt
PLACES = 3  # of a picture, at which its loss is measured
LEARN = {
    "slices": methods.disjoint_slices,
    "lora": methods.lora,
    "one_slice": methods.one_slice,
    "full": methods.everything,
    "whole_tensors": methods.whole_tensors,
    "lora_apart": methods.lora,
}
APART = "lora_apart"
ROWS = [f"{name}{kept}" for name in LEARN for kept in ("", "+preserve") if (name, kept) != (APART, "+preserve")]
ROWS += [f"{name}+preserve+random" for name in ("slices", "lora", "full")] + ["slices+random"]
ROWS += [f"slices+{kept}+guard" for kept in ("preserve", "preserve+random", "random")]
RATES = [factor * 10.0**exponent for exponent in (-5, -4, -3, -2) for factor in (1, 2, 5)]
FIRST_TRIED = 6  # of RATES
WITHIN = 0.1  # of the least loss; a smaller rate disturbs less


@dataclass(frozen=True)
class Taught:
    """A model after one more concept: its weights, how many values were trained, in how many CPU seconds."""

    weights: dict
    values: int
    seconds: float


def concepts(world: World) -> tuple[list[str], list[str]]:
    """The ten held-out pictures that are trained, and the two with which learning rates are chosen."""
    pictures = random.Random("continual").sample(world.held_out, 12)
    return pictures[:10], pictures[10:]


def teach_all(
    world: World,
    learn: Learn,
    latents: Sequence[torch.Tensor],
    rate: float,
    seed: int,
    listed: Sequence[str] = (),
    remembered: int | None = None,
    every: int = methods.PRESERVE_EVERY,
    steps: int = STEPS,
    preserves: bool | None = None,
    captions: Sequence[str] = (),
    guard: float = 0.0,
) -> Iterator[Taught]:
    """The model after each of the concepts, trained one after another.

    With `listed` names, each run holds to what the model said to these when the first one began, and to each concept
    (or only each of the `remembered` newest) when the run after its own began, at the pictures of the run that asks;
    `preserves` says so without names. With `captions`, each holds to what the model said at contexts like them, too.
    `guard` is the weight of the guard, if there is one.
    """
    weights, general, earlier, random_contexts = world.base, [], [], None
    preserves = bool(listed) if preserves is None else preserves
    for number, own in enumerate(latents):
        started, model = time.process_time(), world.model(weights)
        if preserves and number == 0:
            general = [methods.ask(world, model, name, own, place) for place, name in enumerate(listed)]
        if captions and number == 0:
            random_contexts = methods.ask_at_random(world, model, captions, own, seed)
        if preserves and number > 0:
            newest = methods.ask(world, model, f"character{number - 1}", own, KNOWN + number)
            earlier = [*earlier, newest][-(remembered or len(latents)) :]
        weights, values = methods.teach(
            world,
            weights,
            functools.partial(learn, number=number),
            f"character{number}",
            own,
            rate,
            steps,
            100 * seed + number,
            (general, earlier) if general or earlier else None,
            every,
            random=random_contexts,
            guard=guard,
        )
        yield Taught(weights, values, time.process_time() - started)


def teach_apart(
    world: World, learn: Learn, latents: Sequence[torch.Tensor], rate: float, seed: int
) -> Iterator[Taught]:
    """The base plus the changes that each concept so far makes on its own."""
    summed = world.base
    for number, own in enumerate(latents):
        started = time.process_time()
        own_learn = functools.partial(learn, number=number)
        learned, values = methods.teach(
            world, world.base, own_learn, f"character{number}", own, rate, STEPS, 100 * seed + number
        )
        summed = {name: value + learned[name] - world.base[name] for name, value in summed.items()}
        yield Taught(summed, values, time.process_time() - started)


def preserved(world: World, row: str) -> dict:
    """What a row preserves: the names that it lists, the captions that its random contexts are like, its guard.

    As keywords of teach_all. Without a list it is the empty prompt, as in a run of wan_train_network.py.
    """
    _, *kept = row.removesuffix(HALF).split("+")
    listed = world.listed if "preserve" in kept else [""] if "random" in kept else []
    captions = world.captions if "random" in kept else []
    return {"listed": listed, "captions": captions, "guard": WEIGHT if "guard" in kept else 0.0}


def choose_rate(
    world: World,
    learn: Learn,
    listed: Sequence[str],
    steps: int = STEPS,
    captions: Sequence[str] = (),
    guard: float = 0.0,
) -> dict:
    """The smallest of RATES whose loss on the two extra concepts, trained one after the other, is within WITHIN.

    The least loss is found by walking downhill from FIRST_TRIED.
    """
    _, outside = concepts(world)
    latents, tried = [world.character(picture) for picture in outside], {}

    def loss(place: int) -> float:
        rate = RATES[place]
        if rate not in tried:
            *_, last = teach_all(world, learn, latents, rate, 0, listed, steps=steps, captions=captions, guard=guard)
            model = world.model(last.weights)
            tried[rate] = mean(concept_loss(world, model, f"character{n}", own) for n, own in enumerate(latents))
        return tried[rate]

    best = FIRST_TRIED
    while (lower := min(range(max(best - 1, 0), min(best + 2, len(RATES))), key=loss)) != best:
        best = lower
    chosen = best
    while chosen and loss(chosen - 1) <= (1 + WITHIN) * loss(best):
        chosen -= 1
    return {"rate": RATES[chosen], "tried": {f"{rate:g}": tried[rate] for rate in sorted(tried)}}


def chain(world: World, row: str, seed: int, count: int, rate: float, folder: Path) -> dict:
    """Trains the concepts one after another and measures after each; the seed decides the order and all noise."""
    ten, _ = concepts(world)
    order = random.Random(seed).sample(ten, len(ten))[:count]
    prompts = [f"character{number}" for number in range(count)]
    latents = [world.character(picture) for picture in order]
    measure = Measure(world, order, prompts, latents)
    result = {"row": row, "seed": seed, "rate": rate, "order": order, "seconds": [], "after": []}
    name = row.partition("+")[0]
    teach = teach_apart if name == APART else functools.partial(teach_all, **preserved(world, row))
    for number, taught in enumerate(teach(world, LEARN[name], latents, rate, seed), 1):
        result["values"] = taught.values
        result["seconds"].append(taught.seconds)
        result["after"].append(measure.after(world.model(taught.weights), number, is_last=number == count))
    weights = taught.weights
    if row.startswith("slices"):
        without_one = [world.model(without(world, weights, number)) for number in range(count)]
        result["removed"] = [measure.recognised(model, count, SAMPLES) for model in without_one]
    drawn = world.decode(world.sample(world.model(weights), prompts, seed=1))
    save_image(folder / f"{row}-{seed}-{count}.png", torch.cat(list(drawn), dim=-1))
    return result | {"peak_mb": peak_mb(), "steps": STEPS, "threads": torch.get_num_threads()}


class Measure:
    """What a model keeps: recognition of its samples, losses on fixed noise, drift from the base's predictions."""

    def __init__(self, world: World, order, prompts, latents):
        self.world, self.order, self.prompts, self.latents = world, order, prompts, latents
        base = world.model(world.base)
        self.known = {}
        for which, names in (("listed", world.listed), ("unlisted", world.unlisted)):
            inputs, texts = fixed_inputs(world.latents_of(names)), [world.text(name) for name in names]
            self.known[which] = (names, texts, inputs, velocities(base, *inputs[:2], texts))

    def after(self, model, taught: int, is_last: bool) -> dict:
        """What is kept once `taught` concepts have been trained; of what the base knew, only at the end."""
        result = {}
        if is_last:
            result["known"] = self.known_now(model)
        pairs = list(zip(self.prompts, self.latents, strict=True))[:taught]
        losses = [concept_loss(self.world, model, prompt, latents[:PLACES]) for prompt, latents in pairs]
        samples = SAMPLES_AT_END if is_last else SAMPLES
        return result | {"recognised": self.recognised(model, taught, samples), "loss": losses}

    def known_now(self, model) -> dict:
        """For the listed and the unlisted names that the base knows: loss, drift, and the share that is recognised."""
        return {which: self._known(model, *fixed) for which, fixed in self.known.items()}

    def _known(self, model, names, texts, inputs, before) -> dict:
        now = velocities(model, *inputs[:2], texts)
        found = self.world.recognise(self.world.sample(model, names, seed=0))
        right = sum(a == b for a, b in zip(found, names, strict=True))
        return {"loss": mse(now, inputs[2]), "drift": mse(now, before), "recognised": right / KNOWN}

    def recognised(self, model, taught: int, samples: int) -> list[list[float]]:
        """[i][j]: the share of prompt i's samples that show concept j."""
        prompts = [prompt for prompt in self.prompts[:taught] for _ in range(samples)]
        found = self.world.recognise(self.world.sample(model, prompts, seed=1))
        rows = [found[start : start + samples] for start in range(0, len(found), samples)]
        return [[row.count(picture) / samples for picture in self.order[:taught]] for row in rows]


def without(world: World, weights: dict, number: int) -> dict:
    """The weights, with the values of the base in the slice of concept `number`."""
    removed = {name: value.clone() for name, value in weights.items()}
    for name in block_linears(world.model(weights)):
        key = f"{name}.weight"
        at = slice_indices(key, weights[key].shape, methods.FF, number + 1)
        removed[key].view(-1)[at] = world.base[key].flatten()[at]
    return removed


def concept_loss(world: World, model, prompt: str, latents) -> float:
    """The mean squared error on fixed noise, over all the latents."""
    noisy, t, target = fixed_inputs(latents)
    return mse(velocities(model, noisy, t, [world.text(prompt)] * len(latents)), target)


def mse(a, b) -> float:
    return F.mse_loss(a, b).item()


def peak_mb() -> float:
    """The peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def work(part: str, folder: Path) -> dict:
    """The result of the part `name`."""
    world = World()
    match part.split():
        case ["rate", row]:
            return choose_rate(world, LEARN[row.partition("+")[0]], **preserved(world, row))
        case ["chain", row, seed, count]:
            rate = read_part(folder, f"rate {'lora' if row == APART else row.removesuffix(HALF)}")["rate"]
            return chain(world, row, int(seed), int(count), rate / 2 if row.endswith(HALF) else rate, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 characters, 1 seed")
    add_flags(parser)
    options = parser.parse_args()
    count, seeds = (3, 1) if options.quick else (10, 3)
    rates = [f"rate {row}" for row in ROWS if row != APART]
    rows = ROWS if options.quick else [*ROWS, *(f"{row}{HALF}" for row in ROWS if "+" in row)]
    chains = [f"chain {row} {seed} {count}" for seed in range(seeds) for row in rows]
    if run_parts(options, [rates, chains], work):
        continual_report.write(options.folder)


if __name__ == "__main__":
    main()
