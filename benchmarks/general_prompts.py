"""Which general prompts preserve what the base knew and nobody listed, and how large should a slice be?

    python benchmarks/general_prompts.py OUTPUT_FOLDER

Ten characters one after another with kept answers, as in continual.py. Prints a table of the parts that are there.
"""

import argparse
import functools
import random
from pathlib import Path
from statistics import mean, stdev

import continual_methods as methods
from continual import SAMPLES, Measure, choose_rate, concepts, teach_all
from parts import add_flags, part_file, read_part, run_parts
from tiny_world import World

SEEDS = 3
CONCEPTS = 10
MOST_WORDS = 3  # of a mixed prompt
LISTS = ("0", "10", "40", "160", "640", "160-mixed", "640-mixed")
SHARES = ("0.02", "0.05", "0.1")  # ff, at the list of 40


def general_prompts(world: World, which: str) -> list[str]:
    """The list `name`: known names that share no word with the unlisted ones, or mixes of the words of these names."""
    count, _, mixed = which.partition("-")
    held_back = {word for name in world.unlisted for word in name.split()}
    draw = random.Random("general")
    names = [name for name in world.names if name not in {*world.held_out, *world.listed}]
    names = [*world.listed, *draw.sample(names, len(names))]
    names = [name for name in names if held_back.isdisjoint(name.split())]
    if not mixed:
        return names[: int(count)]
    words = sorted({word for name in names for word in name.split()})
    return [" ".join(draw.sample(words, draw.randint(1, MOST_WORDS))) for _ in range(int(count))]


def chain(world: World, ff: str, which: str, seed: int, rate: float) -> dict:
    """How much is recognised of ten characters at the end, and of the listed and the unlisted names."""
    ten, _ = concepts(world)
    order = random.Random(seed).sample(ten, len(ten))
    prompts, latents = [f"character{n}" for n in range(CONCEPTS)], [world.character(picture) for picture in order]
    learn = functools.partial(methods.disjoint_slices, ff=ff)
    # Without general prompts the characters alone are preserved.
    general = general_prompts(world, which)
    *_, last = teach_all(world, learn, latents, rate, seed, general, preserves=True)
    measure, model = Measure(world, order, prompts, latents), world.model(last.weights)
    matrix = measure.recognised(model, CONCEPTS, 2 * SAMPLES)
    return {"recognised": mean(row[i] for i, row in enumerate(matrix)), "known": measure.known_now(model)}


def work(part: str, folder: Path) -> dict:
    """The result of the part `name`."""
    world = World()
    match part.split():
        case ["general-rate", ff]:
            return choose_rate(world, functools.partial(methods.disjoint_slices, ff=ff), world.listed)
        case ["general", ff, which, seed]:
            return chain(world, ff, which, int(seed), read_part(folder, f"general-rate {ff}")["rate"])


def parts() -> list[str]:
    """The names of all chains."""
    variants = [*(("0.1", which) for which in LISTS), *((ff, "40") for ff in SHARES if ff != "0.1")]
    return [f"general {ff} {which} {seed}" for seed in range(SEEDS) for ff, which in variants]


def report(folder: Path) -> None:
    """The table of the parts that are done."""
    columns = ["ff", "rate", "general prompts", "seeds", "characters at the end"]
    columns += [f"{what}, {which}" for what in ("drift", "recognised") for which in ("listed", "unlisted")]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant in dict.fromkeys(name.rsplit(" ", 1)[0] for name in parts()):
        done = [f"{variant} {seed}" for seed in range(SEEDS) if part_file(folder, f"{variant} {seed}").exists()]
        if done:
            _, ff, which = variant.split()
            results = [read_part(folder, name) for name in done]
            rate = read_part(folder, f"general-rate {ff}")["rate"]
            values = [[result["recognised"] for result in results]]
            values += [
                [result["known"][which][what] for result in results]
                for what in ("drift", "recognised")
                for which in ("listed", "unlisted")
            ]
            cells = [ff, f"{rate:g}", which.replace("-mixed", " mixed"), len(done), *map(_spread, values)]
            print(f"| {' | '.join(map(str, cells))} |")


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    options = parser.parse_args()
    if run_parts(options, [[f"general-rate {ff}" for ff in SHARES], parts()], work):
        report(options.folder)


if __name__ == "__main__":
    main()
