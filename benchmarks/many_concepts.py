"""Forty concepts, one after another: which old prompts have to be preserved, how often, at which rate?

    python benchmarks/many_concepts.py OUTPUT_FOLDER

Slices of ff 0.02, kept answers, one order of the concepts. Prints a table of the parts that are there.
"""

import argparse
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import continual_methods as methods
from continual import Measure, choose_rate, concepts, teach_all
from parts import add_flags, part_file, read_part, run_parts
from tiny_world import World

COUNT = 40
FF = "0.02"
SAMPLES = 4
MARKS = (10, 20, 30, 40)  # concepts taught, at which all of them are measured
# Names in the preserve list, newest concepts that are preserved, on every how many steps, share of the chosen rate.
VARIANTS = ((40, 40, 4, 1), (40, 10, 4, 1), (10, 40, 4, 1), (40, 40, 1, 1), (40, 40, 4, 0.2), (40, 40, 1, 0.2))
LEARN = functools.partial(methods.disjoint_slices, ff=FF)


def chain(world: World, listed: int, remembered: int, every: int, rate: float) -> dict:
    """What is recognised of each concept right after it was taught, and of all of them at the MARKS; the drift."""
    _, outside = concepts(world)
    others = [picture for picture in world.held_out if picture not in outside]
    order = random.Random("many").sample(others, COUNT)
    prompts, latents = [f"character{n}" for n in range(COUNT)], [world.character(picture) for picture in order]
    measure, right_after, marks = Measure(world, order, prompts, latents), [], {}
    taught = teach_all(world, LEARN, latents, rate, 0, world.listed[:listed], remembered, every)
    for number, state in enumerate(taught, 1):
        model = world.model(state.weights)
        found = world.recognise(world.sample(model, [prompts[number - 1]] * SAMPLES, seed=1))
        right_after.append(found.count(order[number - 1]) / SAMPLES)
        if number in MARKS:
            matrix = measure.recognised(model, number, SAMPLES)
            marks[number] = [row[i] for i, row in enumerate(matrix)]
    return {"rate": rate, "right_after": right_after, "marks": marks, "known": measure.known_now(model)}


def work(part: str, folder: Path) -> dict:
    """The result of the part of that name."""
    world = World()
    match part.split():
        case ["many-rate"]:
            return choose_rate(world, LEARN, world.listed)
        case ["many", *numbers]:
            listed, remembered, every, share = map(float, numbers)
            rate = share * read_part(folder, "many-rate")["rate"]
            return chain(world, int(listed), int(remembered), int(every), rate)


def report(folder: Path) -> None:
    """The table of the parts that are there."""
    columns = ["names preserved", "newest concepts preserved", "every", "rate", "right after"]
    columns += [f"all, after {mark}" for mark in MARKS] + ["drift of 40 listed", "unlisted"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant in VARIANTS:
        if part_file(folder, _part(variant)).exists():
            listed, remembered, every, _ = variant
            result = read_part(folder, _part(variant))
            shown = [str(listed), "all" if remembered == COUNT else str(remembered), str(every), f"{result['rate']:g}"]
            shown.append(f"{mean(result['right_after']):.2f}")
            shown += [f"{mean(result['marks'][str(mark)]):.2f}" for mark in MARKS]
            shown += [f"{result['known'][which]['drift']:.3f}" for which in ("listed", "unlisted")]
            print(f"| {' | '.join(shown)} |")


def _part(variant: Sequence[float]) -> str:
    return " ".join(["many", *map(str, variant)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    options = parser.parse_args()
    if run_parts(options, [["many-rate"], list(map(_part, VARIANTS))], work):
        report(options.folder)


if __name__ == "__main__":
    main()
