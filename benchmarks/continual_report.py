"""The table and the figures of continual.py, from the parts that are done."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "slices": "slices, disjoint ids (ours)",
    "one_slice": "one slice reused",
    "whole_tensors": "whole tensors (predecessor)",
    "lora": "LoRA, merged one after another",
    "full": "all block matrices",
    "lora_apart": "LoRAs trained apart, summed",
}
BYTES = 2  # a value, in a bf16 file


def write(folder: Path) -> None:
    """Prints and writes table.md, and the figures, into `folder`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("chain-*.json"))]
    if not results:
        raise SystemExit(f"error: {folder} holds no results of chains yet")
    count = max(len(result["after"]) for result in results)
    by_row = defaultdict(list)
    for result in results:
        if len(result["after"]) == count:
            by_row[result["row"]].append(result)
    rows = {row: by_row[row] for row in sorted(by_row, key=_place)}
    text = "\n".join([*_table(rows), "", *_removal(rows)])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    _forgetting_curve(rows, folder / "forgetting.png")
    _pictures({row: folder / f"{row}-0-{count}.png" for row in rows}, folder)


PRESERVED = {
    "": "",
    "preserve": ", preserved",
    "preserve+random": ", preserved, with random contexts",
    "random": ", random contexts without a list",
    "preserve+guard": ", preserved, guarded",
    "preserve+random+guard": ", preserved, with random contexts, guarded",
    "random+guard": ", random contexts without a list, guarded",
}
LINES = dict(zip(PRESERVED, (":", "-", "--", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))), strict=True))


HALF = "-half"  # what the names of rows end with that are trained at half of the chosen rate


def _parts(row: str) -> tuple[str, str, bool]:
    """The method, what is kept, whether it is trained at half of the chosen rate."""
    name, _, kept = row.removesuffix(HALF).partition("+")
    return name, kept, row.endswith(HALF)


def _place(row: str) -> tuple[int, int, bool]:
    name, kept, is_half = _parts(row)
    return list(PRESERVED).index(kept), list(LABELS).index(name), is_half


def _label(row: str) -> str:
    name, kept, is_half = _parts(row)
    return LABELS[name] + PRESERVED[kept] + (", at half the rate" if is_half else "")


def _table(rows: dict[str, list[dict]]) -> list[str]:
    columns = {
        "seeds": lambda results: str(len(results)),
        "rate": lambda results: f"{results[0]['rate']:g}",
        "recognised right after": _spread(right_after),
        "at the end": _spread(at_end),
        "kept": _spread(lambda r: at_end(r) / right_after(r)),
        "loss right after": _spread(lambda r: mean(a["loss"][-1] for a in r["after"]), 3),
        "loss at the end": _spread(lambda r: mean(r["after"][-1]["loss"]), 3),
        "drift, listed": _spread(lambda r: r["after"][-1]["known"]["listed"]["drift"], 3),
        "drift, unlisted": _spread(lambda r: r["after"][-1]["known"]["unlisted"]["drift"], 3),
        "known recognised, listed": _spread(lambda r: r["after"][-1]["known"]["listed"]["recognised"]),
        "unlisted": _spread(lambda r: r["after"][-1]["known"]["unlisted"]["recognised"]),
        "leakage": _spread(leakage),
        "values": lambda results: f"{results[0]['values']:,}",
        "CPU s a concept": _spread(lambda r: mean(r["seconds"]), 1),
        "peak MB": _spread(lambda r: r["peak_mb"], 0),
        "kB a concept": lambda results: f"{results[0]['values'] * BYTES / 1000:.0f}",
    }
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row, results in rows.items():
        lines.append(f"| {_label(row)} | {' | '.join(column(results) for column in columns.values())} |")
    return lines


def right_after(result: dict) -> float:
    """The share of samples that show their concept, each concept right after it was trained."""
    return mean(after["recognised"][-1][-1] for after in result["after"])


def at_end(result: dict) -> float:
    """The same for all concepts after the last one."""
    return mean(row[i] for i, row in enumerate(result["after"][-1]["recognised"]))


def leakage(result: dict) -> float:
    """The share of samples that show another concept, at the end."""
    return mean(sum(row) - row[i] for i, row in enumerate(result["after"][-1]["recognised"]))


def _spread(value: Callable[[dict], float], digits: int = 2) -> Callable[[Sequence[dict]], str]:
    """Mean and standard deviation over the seeds."""

    def column(results: Sequence[dict]) -> str:
        values = [value(result) for result in results]
        deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{deviation}"

    return column


def _removal(rows: dict[str, list[dict]]) -> list[str]:
    """What the other concepts lose, and what is left of a concept, when its slice is set back to the base."""
    lines = ["| one slice taken out | seeds | that concept | the others | the others before |", "|---|---|---|---|---|"]
    for row, results in rows.items():
        if "removed" in results[0]:
            columns = [_spread(lambda r: _own(r)), _spread(_others), _spread(at_end)]
            lines.append(f"| {_label(row)} | {len(results)} | {' | '.join(column(results) for column in columns)} |")
    return lines


def _own(result: dict) -> float:
    return mean(matrix[i][i] for i, matrix in enumerate(result["removed"]))


def _others(result: dict) -> float:
    return mean(matrix[j][j] for i, matrix in enumerate(result["removed"]) for j in range(len(matrix)) if j != i)


def _forgetting_curve(rows: dict[str, list[dict]], path: Path) -> None:
    """After each concept, the mean over all that were taught so far: what is recognised of them, their loss."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5))
    shown = {row: results for row, results in rows.items() if not row.endswith(HALF)}
    shows = {"recognised": _taught, "loss": lambda after: mean(after["loss"])}
    for axes, (what, value) in zip(panels, shows.items(), strict=True):
        for number, (row, results) in enumerate(shown.items()):
            name, kept, _ = _parts(row)
            # A colour for each method, or for each row where one method has most of them.
            colour = f"C{number if len(shown) <= 10 else list(LABELS).index(name)}"
            curves = np.array([[value(after) for after in result["after"]] for result in results])
            x = np.arange(1, curves.shape[1] + 1)
            axes.plot(x, curves.mean(0), colour, linestyle=LINES[kept], marker="." if kept else "", label=_label(row))
            axes.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.08)
        axes.set(xlabel="concepts taught", ylabel=f"{what}, mean of all taught so far", ylim=(0, None))
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _taught(after: dict) -> float:
    return mean(row[i] for i, row in enumerate(after["recognised"]))


def _pictures(drawn: dict[str, Path], folder: Path) -> None:
    """The first sample of every concept at the end, one row per method, for seed 0."""
    strips = [(row, path) for row, path in drawn.items() if path.exists()]
    figure, axes = plt.subplots(len(strips), 1, figsize=(9, 0.95 * len(strips)), squeeze=False)
    for (row, path), axis in zip(strips, axes[:, 0], strict=True):
        axis.imshow(np.asarray(Image.open(path)))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(_label(row), rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(folder / "pictures.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
