"""Which values should a slice contain, and how many? Convergence over ff, and alternatives to staggered columns.

    python benchmarks/slice_choices.py OUTPUT_FOLDER

Choices: two concepts, each in a slice of its own at ff 0.01, nothing preserved, at several learning rates.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import continual_methods as methods
import matplotlib
import numpy as np
import torch
from continual import STEPS, Measure, concept_loss, concepts
from parts import add_flags, read_part, run_parts
from tiny_world import World

from utils.selective_finetune import slice_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = 3
EVERY = 10  # steps between losses
FFS = ("0.0001", "0.001", "0.01", "0.1", "0.3")
RATES = (5e-4, 2e-3, 1e-2, 5e-2)
CHOICE_FF = "0.01"
CHOICES = {
    "elements": "single elements, in random order",
    "columns": "whole columns",
    "rows": "whole rows",
    "staggered-2": "columns staggered in 2 row groups",
    "staggered-8": "in 8 (the contract)",
    "staggered-32": "in 32",
}
CHOICE_RATES = (5e-3, 1e-2, 2e-2, 5e-2)
SHOWN = (1e-2, 5e-2)  # of these: one that does not disturb much, the one that learns most
_MEASURED = ("loss right after", "first one's loss after the second", "drift")


def choose(kind: str, number: int) -> Callable[[str, Sequence[int]], torch.Tensor]:
    """Flat indices of slice `number` (from 0) for a weight: intervals of a line, laid out as `kind` says."""

    def indices(name: str, shape: Sequence[int]) -> torch.Tensor:
        rows, columns = shape
        position = np.arange(*slice_interval(rows * columns, CHOICE_FF, number + 1))
        if kind == "elements":
            return torch.from_numpy(_order(name, rows * columns)[position])
        if kind == "rows":
            return torch.from_numpy(_order(name, rows)[position // columns] * columns + position % columns)
        groups = 1 if kind == "columns" else int(kind.partition("-")[2])
        assert rows % groups == 0
        unit, within = np.divmod(position, rows // groups)
        lap, i = np.divmod(unit, columns)
        row = (i + lap) % groups * (rows // groups) + within
        return torch.from_numpy(row * columns + _order(name, columns)[i])

    return indices


def _order(name: str, count: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).permutation(count)


def converge(world: World, ff: str, seed: int) -> dict:
    """The loss on fixed noise every few steps, for each learning rate."""
    _, (outside, _) = concepts(world)
    latents, curves = world.character(outside), {}
    for rate in RATES:
        curve = curves[f"{rate:g}"] = []

        def note(step: int, model, curve=curve) -> None:
            if step % EVERY == 0:
                curve.append(concept_loss(world, model, "character0", latents))

        learn = functools.partial(methods.disjoint_slices, number=0, ff=ff)
        methods.teach(world, world.base, learn, "character0", latents, rate, STEPS, seed, on_step=note)
    return {"ff": ff, "seed": seed, "curves": curves}


def compare(world: World, kind: str, seed: int) -> dict:
    """For every rate: each concept's loss right after it was trained, the first one's at the end, the drift."""
    ten, _ = concepts(world)
    order, prompts = ten[2 * seed : 2 * seed + 2], ["character0", "character1"]
    latents = [world.character(picture) for picture in order]
    measure, result = Measure(world, order, prompts, latents), {}
    for rate in CHOICE_RATES:
        weights, after = world.base, []
        for number, prompt in enumerate(prompts):
            learn = functools.partial(methods.masked, choose=choose(kind, number))
            weights, _ = methods.teach(world, weights, learn, prompt, latents[number], rate, STEPS, seed + number)
            after.append(measure.after(world.model(weights), number + 1, is_last=number == 1))
        result[f"{rate:g}"] = after
    return {"kind": kind, "seed": seed, "rates": result}


def work(part: str, folder: Path) -> dict:
    """The result of the part `name`."""
    what, which, seed = part.split()
    return (converge if what == "converge" else compare)(World(), which, int(seed))


def report(folder: Path) -> None:
    """Writes choices.md, choices.png and convergence.png from the parts that are done."""
    columns = [f"rate {rate:g}: {what}" for rate in SHOWN for what in _MEASURED]
    lines = [f"| choice | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    found = {kind: results for kind in CHOICES if (results := _found(folder, f"choice {kind}"))}
    for kind, results in found.items():
        values = [value for rate in SHOWN for value in _measured(results, rate)]
        shown = [f"{mean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {CHOICES[kind]} | {len(results)} | {' | '.join(shown)} |")
    (folder / "choices.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    measured = {kind: _measured(results, SHOWN[0]) for kind, results in found.items()}
    _plot_choices(measured, folder / "choices.png")
    _convergence(folder)


def _found(folder: Path, name: str) -> list[dict]:
    names = [f"{name} {seed}" for seed in range(SEEDS)]
    return [read_part(folder, part) for part in names if (folder / f"{part.replace(' ', '-')}.json").exists()]


def _measured(results: list[dict], rate: float) -> list[list[float]]:
    """What _MEASURED names at this learning rate, for each seed."""
    chains = [result["rates"][f"{rate:g}"] for result in results]
    right_after = [mean(after["loss"][-1] for after in chain) for chain in chains]
    drift = [mean(known["drift"] for known in chain[-1]["known"].values()) for chain in chains]
    return [right_after, [chain[-1]["loss"][0] for chain in chains], drift]


def _plot_choices(measured: dict[str, list[list[float]]], path: Path) -> None:
    """A bar for the mean of each choice, a point for each seed."""
    figure, axes = plt.subplots(1, len(_MEASURED), figsize=(11, 3.2))
    for number, (axis, title) in enumerate(zip(axes, _MEASURED, strict=True)):
        for place, values in enumerate(measured.values()):
            axis.bar(place, mean(values[number]), color=f"C{place}", alpha=0.4)
            axis.plot([place] * len(values[number]), values[number], "k.")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(measured)), list(measured), rotation=35, ha="right", fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _convergence(folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for ff in FFS:
        found = _found(folder, f"converge {ff}")
        if not found:
            continue
        rate = min(found[0]["curves"], key=lambda rate: mean(result["curves"][rate][-1] for result in found))
        curves = np.array([result["curves"][rate] for result in found])
        steps = EVERY * np.arange(1, curves.shape[1] + 1)
        (line,) = axes.plot(steps, curves.mean(0), label=f"ff {ff}, rate {rate}")
        axes.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="steps", ylabel="loss on the new concept", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(folder / "convergence.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    options = parser.parse_args()
    names = [f"{what} {which}" for what, all_ in (("converge", FFS), ("choice", CHOICES)) for which in all_]
    if run_parts(options, [[f"{name} {seed}" for seed in range(SEEDS) for name in names]], work):
        report(options.folder)


if __name__ == "__main__":
    main()
