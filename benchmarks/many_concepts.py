"""Forty concepts, one after another: what keeps them, which old prompts have to be preserved, and how often?

    python benchmarks/many_concepts.py OUTPUT_FOLDER

One order of the concepts, kept answers. Prints a table of the parts that are there.
"""

import argparse
import functools
import random
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean

import continual_methods as methods
from continual import STEPS, Measure, choose_rate, concepts, preserved, teach_all
from parts import add_flags, part_file, read_part, run_parts
from tiny_world import World

COUNT = 40
SAMPLES = 4
MARKS = (10, 20, 30, 40)  # concepts taught, at which all of them are measured
FF = "0.02"  # 49,152 values; a LoRA of rank 2 has 49,920
LEARN = {
    "slices": functools.partial(methods.disjoint_slices, ff=FF),
    "slices-in-turn": functools.partial(methods.slices_in_turn, ff="0.1"),
    "one-slice": functools.partial(methods.one_slice, ff=FF),
    "one-slice-0.1": functools.partial(methods.one_slice, ff="0.1"),
    "lora-2": functools.partial(methods.lora, rank=2),
    "full": methods.everything,
}
LABELS = {
    "slices": "disjoint slices (ours)",
    "slices-in-turn": "ten slices of ff 0.1 in turn",
    "one-slice": "one slice reused, ff 0.02",
    "one-slice-0.1": "one slice reused, ff 0.1",
    "lora-2": "LoRA, rank 2",
    "full": "all block matrices",
}


@dataclass(frozen=True)
class Variant:
    """One chain: the method, the names that are preserved, the newest concepts that are, on every how many steps.

    `share` is of the chosen rate; `steps` are those of a concept; `kept` says what helps the names: "random+guard".
    """

    method: str = "slices"
    listed: int = 40
    remembered: int = COUNT
    every: int = 4
    share: float = 1
    steps: int = STEPS
    kept: str = ""

    @property
    def part(self) -> str:
        return " ".join(["many", *map(str, astuple(self))]).rstrip()


VARIANTS = [
    Variant(),
    Variant(remembered=10),
    Variant(every=1),
    Variant(share=0.2),
    Variant(every=1, share=0.2),
    *(Variant(method) for method in LEARN if method != "slices"),
    *(Variant(method, every=1) for method in ("lora-2", "full")),
    *(Variant(method, every=1, steps=4 * STEPS) for method in ("slices", "lora-2")),
    *(Variant(method, kept=kept) for method in ("slices", "slices-in-turn") for kept in ("guard", "random+guard")),
]


def chain(world: World, variant: Variant, rate: float) -> dict:
    """How much is recognised of each concept right after it was trained, and of all at the MARKS; the drift."""
    _, outside = concepts(world)
    others = [picture for picture in world.held_out if picture not in outside]
    order = random.Random("many").sample(others, COUNT)
    prompts, latents = [f"character{n}" for n in range(COUNT)], [world.character(picture) for picture in order]
    measure, right_after, marks = Measure(world, order, prompts, latents), [], {}
    keep = _kept(world, variant.kept) | {"listed": world.listed[: variant.listed], "remembered": variant.remembered}
    keep |= {"every": variant.every, "steps": variant.steps}
    taught, seconds = teach_all(world, LEARN[variant.method], latents, rate, 0, **keep), 0.0
    for number, state in enumerate(taught, 1):
        model, seconds = world.model(state.weights), seconds + state.seconds
        found = world.recognise(world.sample(model, [prompts[number - 1]] * SAMPLES, seed=1))
        right_after.append(found.count(order[number - 1]) / SAMPLES)
        if number in MARKS:
            matrix = measure.recognised(model, number, SAMPLES)
            marks[number] = [row[i] for i, row in enumerate(matrix)]
    known = measure.known_now(model)
    return {"rate": rate, "right_after": right_after, "marks": marks, "known": known, "seconds": seconds}


def _kept(world: World, kept: str) -> dict:
    return preserved(world, f"slices+preserve+{kept}")


def work(part: str, folder: Path) -> dict:
    """The result of the part `name`."""
    world = World()
    match part.split():
        case ["many-rate", method, steps, *kept]:
            return choose_rate(world, LEARN[method], steps=int(steps), **_kept(world, "".join(kept)))
        case ["many", *_]:
            [variant] = [variant for variant in VARIANTS if variant.part == part]
            rate = variant.share * read_part(folder, _rate_part(variant))["rate"]
            return chain(world, variant, rate)


def report(folder: Path) -> None:
    """The table of the parts that are done."""
    columns = ["method", "beside", "names preserved", "newest concepts preserved", "every", "steps", "rate"]
    columns += ["CPU s a concept", "right after"]
    columns += [f"all, after {mark}" for mark in MARKS] + ["drift of 40 listed", "unlisted"]
    columns += ["recognised, listed", "unlisted"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant in VARIANTS:
        if part_file(folder, variant.part).exists():
            result = read_part(folder, variant.part)
            newest = "all" if variant.remembered == COUNT else variant.remembered
            shown = [
                LABELS[variant.method],
                variant.kept or "-",
                variant.listed,
                newest,
                variant.every,
                variant.steps,
                f"{result['rate']:g}",
            ]
            seconds = result.get("seconds")  # parts of earlier versions have none
            shown.append(f"{seconds / COUNT:.1f}" if seconds else "-")
            shown.append(f"{mean(result['right_after']):.2f}")
            shown += [f"{mean(result['marks'][str(mark)]):.2f}" for mark in MARKS]
            shown += [f"{result['known'][which]['drift']:.3f}" for which in ("listed", "unlisted")]
            shown += [f"{result['known'][which]['recognised']:.2f}" for which in ("listed", "unlisted")]
            print(f"| {' | '.join(map(str, shown))} |")


def _rate_part(variant: Variant) -> str:
    return f"many-rate {variant.method} {variant.steps} {variant.kept}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    options = parser.parse_args()
    rates = sorted(set(map(_rate_part, VARIANTS)))
    if run_parts(options, [rates, [variant.part for variant in VARIANTS]], work):
        report(options.folder)


if __name__ == "__main__":
    main()
