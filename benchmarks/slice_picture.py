"""Draws where slices lie in a weight matrix: the picture in README.md.

    python benchmarks/slice_picture.py docs/slices.png

The matrix and its share are small enough to see single values; the values are those that the trainer would choose.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.selective_finetune import slice_indices  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

NAME = "blocks.0.self_attn.q.weight"
SHAPE = (32, 56)
FF = "0.06"
FROZEN = "#e4e7ec"
COLOURS = ("#2563eb", "#f97316", "#16a34a")  # of ffid 1, 2, 3
CONCEPTS = len(COLOURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "docs" / "slices.png", help="the picture")
    output = parser.parse_args().output
    figure, panels = plt.subplots(1, CONCEPTS, figsize=(9, 2.35), dpi=110)
    for concept, panel in enumerate(panels, 1):
        _draw_matrix(panel, concept)
    legend = {"frozen": FROZEN, "trained before, now frozen (pale)": _shade(COLOURS[0], pale=True)}
    legend |= {f"slice {ffid} trains": colour for ffid, colour in enumerate(COLOURS, 1)}
    patches = [Patch(color=colour, label=name) for name, colour in legend.items()]
    figure.legend(handles=patches, ncols=len(patches), loc="lower center", frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.13, wspace=0.05)
    figure.savefig(output)
    print(f"saved {output}")


def _draw_matrix(panel: plt.Axes, concept: int) -> None:
    """The matrix while `concept` trains: its slice, those trained before it (paler), the frozen rest."""
    pixels = np.tile(to_rgb(FROZEN), (SHAPE[0] * SHAPE[1], 1))
    for ffid in range(1, concept + 1):
        pixels[slice_indices(NAME, SHAPE, FF, ffid).numpy()] = _shade(COLOURS[ffid - 1], pale=ffid < concept)
    panel.imshow(pixels.reshape(*SHAPE, 3), interpolation="nearest", aspect="auto")
    panel.set_xticks(np.arange(SHAPE[1]) + 0.5, [])
    panel.set_yticks(np.arange(SHAPE[0]) + 0.5, [])
    panel.grid(color="white", linewidth=0.35)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title(f"concept {concept}: --ff {FF} --ffid {concept}", fontsize=9.5, family="monospace")


def _shade(colour: str, pale: bool) -> np.ndarray:
    return np.array(to_rgb(colour)) * 0.45 + 0.55 if pale else np.array(to_rgb(colour))


if __name__ == "__main__":
    main()
