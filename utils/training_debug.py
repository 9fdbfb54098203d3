"""What the steps of a run do to each block of the model: its gradient, its update, how many values have moved.

TrainingDebug collects the figures: a few small operations around each optimizer step leave their results on the device
without waiting for it, and they are read after each of the first steps, then after every tenth. History keeps their
means over the whole run in a fixed number of columns, which heat_map() draws.
Shapes: S steps, C columns of a heat map, R rows of it, Q the quantities of _QUANTITIES, B blocks.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from utils.selective_finetune import SlicedMatrix, TrainedSlice
from utils.slices.compare import compare_save
from utils.slices.ledger import Entry

READ_EVERY = 10  # steps; each of the first ones is read
DRAW_EVERY = 100  # steps; heat maps and histograms are also drawn at every save
WIDTH = 512  # pixels of a heat map, and so the most columns
_TABLE_ROWS = 10  # at most: neighbouring blocks share a row if there are more
_QUANTITIES = {
    "gradient": "gradient norm",
    "update": "update norm / weight norm",
    "moved": "share of values that moved, fp32",
    "moved_in_use": "share of values that moved, in use",
}
_BINS = torch.arange(-14, 1.01, 0.25)  # edges for log10 of an update's size
_ROW, _LEFT, _TOP = 12, 32, 16  # pixels
_COLOURS = torch.tensor([[48, 18, 90], [57, 85, 145], [32, 145, 140], [120, 205, 85], [253, 231, 37]]).float()
_ZERO, _INFINITE, _NAN = (torch.tensor([grey] * 3).float() for grey in (0, 255, 128))


class TrainingDebug:
    """Watches the steps of a run; holds one fp32 copy of the slice, on its device, and 16 kB of figures per block.

    For each step and block: the norm of the gradient, over the batches of all processes and before clipping; the norm
    of what the step added to the differences; how many values have moved from the base, in fp32 (the difference is not
    0) and in use (the rounded value has other bits).
    """

    def __init__(
        self, trained: TrainedSlice, blocks: int, bases: Sequence[Path], applied: Sequence[Entry] = (), expert: str = ""
    ):
        self.trained = trained
        self.bases = bases
        self.applied = applied  # other slices that checkpoints contain
        self.suffix = f"/{expert}" if expert else ""  # of names in trackers
        self.matrices = list(trained.matrices.values())
        self.by_block = [[matrix for matrix in self.matrices if _block(matrix) == number] for number in range(blocks)]
        self.device = self.matrices[0].start.device
        self.block_of_matrix = torch.tensor([_block(matrix) for matrix in self.matrices], device=self.device)
        self.counts = torch.tensor([sum(matrix.units.count for matrix in matrices) for matrices in self.by_block])
        starts = [torch.linalg.vector_norm(matrix.start, dtype=torch.float32) for matrix in self.matrices]
        self.weight_norms = self._per_block(starts).cpu()
        nothing_without_slice = torch.where(self.counts > 0, 1.0, math.nan)
        self.shown_in_QB = torch.stack([nothing_without_slice, self.weight_norms, *[self.counts.double()] * 2])
        self.no_gradient = torch.zeros(1, device=self.device)
        self.updates = [torch.zeros_like(matrix.difference) for matrix in self.matrices]  # of the last step, negative
        self.seen = 0  # steps
        self.step = 0  # the last one that was read
        self.table_step = 0  # the last one with a table
        self.unread: list[tuple[Tensor, Tensor]] = []
        self.recent_SQB = torch.empty(0, len(_QUANTITIES), blocks, dtype=torch.float64)
        self.history = History(len(_QUANTITIES), blocks)

    @torch.no_grad()
    def before_update(self) -> None:
        """Records the gradients of the step: averaged over the processes, unscaled, not clipped yet."""
        gradients = [matrix.difference.grad for matrix in self.matrices]
        gradients = [self.no_gradient if gradient is None else gradient for gradient in gradients]
        self.gradient_norms = self._per_block(torch._foreach_norm(gradients))
        torch._foreach_copy_(self.updates, [matrix.difference for matrix in self.matrices])

    @torch.no_grad()
    def after_update(self) -> None:
        """Records what the optimizer did with them."""
        torch._foreach_sub_(self.updates, [matrix.difference for matrix in self.matrices])
        norms = torch.stack([self.gradient_norms, self._per_block(torch._foreach_norm(self.updates))])
        counts = torch.stack([self._count_moved(matrices) for matrices in self.by_block], dim=1)
        self.unread.append((norms, counts))
        self.seen += 1

    def after_step(self, step: int, trackers: Sequence) -> list[str]:
        """Logs what is due to accelerate's `trackers`; returns lines for the console."""
        if self.seen > READ_EVERY and self.seen % READ_EVERY:
            return []
        self._read(step, trackers)
        if self.seen % DRAW_EVERY == 0:
            self._draw(trackers)
        return self._table() if self.seen in (1, READ_EVERY) else []

    def after_save(self, checkpoint: Path | None, step: int, trackers: Sequence) -> list[str]:
        """Logs what has moved so far, and compares the checkpoint, if one was saved, with the base.

        RuntimeError, and the file is renamed, if something outside the slice has changed.
        """
        compared = [] if checkpoint is None else [self._compare(checkpoint)]
        self._read(step, trackers)
        if self.history.steps:
            self._draw(trackers)
        return [*self._table(), *compared]

    def _compare(self, checkpoint: Path) -> str:
        changes = compare_save(self.bases, checkpoint, self.trained, self.applied)
        if changes.fault:
            aside = checkpoint.with_name(f"{checkpoint.name}.wrong")
            checkpoint.replace(aside)
            raise RuntimeError(
                f"ERROR: {checkpoint.name} differs from --dit outside the slice: {changes.fault}. This is a bug in "
                f"the trainer, please report it; the file has been renamed to {aside}, do not use it"
            )
        changed = f"{changes.inside:,} of {self.counts.sum():,} values in the slice"
        beside = "" if not self.applied else " and --slices"
        return f"{checkpoint.name} against --dit{beside}: {changed} changed, none outside it"

    def _per_block(self, norms: Sequence[Tensor]) -> Tensor:
        """The norms of blocks, from those of matrices."""
        squares = torch.stack(list(norms)).square()
        return squares.new_zeros(len(self.by_block)).index_add_(0, self.block_of_matrix, squares).sqrt()

    def _count_moved(self, matrices: Sequence[SlicedMatrix]) -> Tensor:
        """How many of a block's values have moved: in fp32, in use."""
        if not matrices:
            return torch.zeros(2, dtype=torch.int64, device=self.device)
        # One block at a time takes few operations and little memory.
        starts, differences = torch.cat([m.start for m in matrices]), torch.cat([m.difference for m in matrices])
        in_use = (starts.float() + differences).to(starts.dtype)
        bits = torch.int32 if starts.dtype.itemsize == 4 else torch.int16
        moved = differences != 0
        moved_in_use = moved & (in_use.view(bits) != starts.view(bits))
        return torch.stack([moved.count_nonzero(), moved_in_use.count_nonzero()])

    def _read(self, step: int, trackers: Sequence) -> None:
        """Waits for the device, and logs the last unread step, which has the number `step`."""
        if not self.unread:
            return
        norms, counts = (torch.stack(tensors).cpu() for tensors in zip(*self.unread, strict=True))
        self.unread.clear()
        figures_SQB = torch.cat([norms.double(), counts], dim=1)
        self.recent_SQB = torch.cat([self.recent_SQB, figures_SQB])[-READ_EVERY:]
        self.history.add(figures_SQB)
        self.step = step
        values = {
            f"debug_{quantity}/{block:02d}{self.suffix}": value
            for quantity, of_blocks in zip(_QUANTITIES, figures_SQB[-1] / self.shown_in_QB, strict=True)
            for block, value in enumerate(of_blocks.tolist())
            if self.counts[block]
        }
        for tracker in trackers:
            if tracker.name == "tensorboard" and self.history.steps == len(norms):
                tracker.tracker.add_custom_scalars({"training debug": _charts()})
            tracker.log(values, step=step)

    def _draw(self, trackers: Sequence) -> None:
        """Logs heat maps of all steps so far, and histograms of the updates of the last one."""
        if not trackers:
            return
        shown_CQB = self.history.means() / self.shown_in_QB
        outer_columns = self.history.outer_columns(self.step)
        blocks = [str(number) for number in range(len(self.by_block))]
        histograms = self._histograms()
        for (quantity, title), values_CB in zip(_QUANTITIES.items(), shown_CQB.unbind(1), strict=True):
            picture = heat_map(values_CB.T, title, blocks, *outer_columns)
            for tracker in trackers:
                _log_picture(tracker, f"debug/{quantity}{self.suffix}", picture, self.step)
        for tracker in trackers:
            for block, counts in histograms.items():
                _log_histogram(tracker, f"debug_log10_of_update/{block:02d}{self.suffix}", counts, self.step)

    def _histograms(self) -> dict[int, Tensor]:
        """How many values of a block the last step moved by how much: [bins] for each block with a slice."""
        edges, places = _BINS[1:-1].to(self.device), len(_BINS) - 1
        found = torch.zeros(len(self.by_block), places, dtype=torch.int64, device=self.device)
        for block, update in zip(self.block_of_matrix.tolist(), self.updates, strict=True):
            sizes = update[update != 0].abs().log10()
            found[block] += torch.bincount(torch.bucketize(sizes, edges), minlength=places)
        return {block: counts for block, counts in enumerate(found.cpu()) if self.counts[block]}

    def _table(self) -> list[str]:
        """The figures of the last step, a row per block or group of blocks; then the blocks without any gradient."""
        if self.step == self.table_step:
            return []
        self.table_step, blocks = self.step, len(self.by_block)
        lines = [f"{f'step {self.step}':>14}  gradient norm  update/weight  moved in fp32  moved in use"]
        together = -(-blocks // _TABLE_ROWS)
        for first in range(0, blocks, together):
            rows = slice(first, min(first + together, blocks))
            name = f"block {first}" if rows.stop - first == 1 else f"blocks {first}-{rows.stop - 1}"
            lines.append(f"{name:>14}{self._cells(rows)}")
        lines.append(f"{'all':>14}{self._cells(slice(None))}")
        silent = (self.recent_SQB[:, 0] == 0).all(0) & (self.counts > 0)
        if silent.any():
            lines.append(f"WARNING: no gradient in the last {len(self.recent_SQB)} steps in {_named(silent)}")
        if (self.counts == 0).any():
            lines.append(f"the slice has no values in {_named(self.counts == 0)}")
        return lines

    def _cells(self, rows: slice) -> str:
        figures_QB, count = self.recent_SQB[-1][:, rows], self.counts[rows].sum()
        if not count:
            return f"{'-':>15}{'-':>15}{'-':>15}{'-':>14}"
        gradient, update = torch.linalg.vector_norm(figures_QB[:2], dim=1)
        weight = torch.linalg.vector_norm(self.weight_norms[rows])
        moved, moved_in_use = figures_QB[2:].sum(1) / count
        return f"{gradient:15.3e}{update / weight:15.3e}{moved:15.2%}{moved_in_use:14.2%}"


def _block(matrix: SlicedMatrix) -> int:
    return int(matrix.name.split(".")[1])


def _named(is_named: Tensor) -> str:
    numbers = is_named.nonzero().flatten().tolist()
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _charts() -> dict[str, list]:
    """TensorBoard's layout: one chart per quantity, with one line per block."""
    return {title: ["Multiline", [f"^debug_{quantity}/"]] for quantity, title in _QUANTITIES.items()}


def _log_picture(tracker, tag: str, picture, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.tracker.add_image(tag, picture, step, dataformats="HWC")
    else:
        tracker.log_images({tag: [picture]}, step=step)


def _log_histogram(tracker, tag: str, counts: Tensor, step: int) -> None:
    if tracker.name == "tensorboard":
        middles = (_BINS[1:] + _BINS[:-1]) / 2
        sums = [(counts * middles**power).sum().item() for power in range(3)]
        tracker.tracker.add_histogram_raw(
            tag, _BINS[0].item(), _BINS[-1].item(), *sums, _BINS[1:].numpy(), counts.numpy(), step
        )
    else:
        import wandb

        tracker.log({tag: wandb.Histogram(np_histogram=(counts.numpy(), _BINS.numpy()))}, step=step)


class History:
    """Means over all steps so far in at most WIDTH columns: when these are full, neighbours are merged in pairs."""

    def __init__(self, quantities: int, rows: int):
        self.sums_CQR = torch.zeros(WIDTH, quantities, rows, dtype=torch.float64)
        self.span = 1  # steps per column; the last one may have fewer
        self.steps = 0

    def add(self, numbers_SQR: Tensor) -> None:
        """Adds the next steps, [steps, quantities, rows]."""
        steps = self.steps + len(numbers_SQR)
        while steps > WIDTH * self.span:
            folded_CQR = self.sums_CQR.unflatten(0, (-1, 2)).sum(1)
            self.sums_CQR = torch.cat([folded_CQR, torch.zeros_like(folded_CQR)])
            self.span *= 2
        self.sums_CQR.index_add_(0, torch.arange(self.steps, steps) // self.span, numbers_SQR)
        self.steps = steps

    def means(self) -> Tensor:
        """[columns, quantities, rows]."""
        held_C = (self.steps - torch.arange(0, self.steps, self.span)).clamp(max=self.span)
        return self.sums_CQR[: len(held_C)] / held_C[:, None, None]

    def outer_columns(self, last: int) -> tuple[str, str]:
        """The steps of the first and of the last column in words, if the last step has the number `last`."""
        first = last + 1 - self.steps
        starts = range(first, last + 1, self.span)
        return _steps(first, first + self.span - 1), _steps(starts[-1], last)


def _steps(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first}-{last}"


def heat_map(values_RC: Tensor, title: str, rows: Sequence[str], first: str, last: str) -> np.ndarray:
    """A picture, uint8 [height, width, 3], of values [rows, columns] from 0 up: the larger the brighter, by logarithm.

    0 is black, infinity white, NaN grey. `first` and `last` label the outer columns, of which there are at most WIDTH.
    """
    assert values_RC.shape[1] <= WIDTH
    shown = values_RC[values_RC.isfinite() & (values_RC > 0)]
    low, high = (shown.min().item(), shown.max().item()) if len(shown) else (1.0, 1.0)
    cells_RC3 = _colours(values_RC, low, high)
    cells = cells_RC3.repeat_interleave(_ROW, 0).repeat_interleave(max(1, WIDTH // cells_RC3.shape[1]), 1)
    picture = Image.new("RGB", (_LEFT + max(cells.shape[1], WIDTH), 2 * _TOP + cells.shape[0]))
    picture.paste(Image.fromarray(cells.byte().numpy()), (_LEFT, _TOP))
    draw = ImageDraw.Draw(picture)
    draw.text((2, 2), f"{title}: dark {low:.1e}, bright {high:.1e}, black 0")
    for number, name in enumerate(rows):
        draw.text((2, _TOP + _ROW * number), name)
    draw.text((_LEFT, _TOP + cells.shape[0] + 2), first)
    draw.text((_LEFT + cells.shape[1], _TOP + cells.shape[0] + 2), last, anchor="ra")
    return np.array(picture)


def _colours(values_RC: Tensor, low: float, high: float) -> Tensor:
    """[rows, columns, 3], 0 to 255."""
    span = max(np.log(high) - np.log(low), 1e-6)
    place_RC = ((values_RC.double().log() - np.log(low)) / span).nan_to_num(0.0).clamp(0, 1) * (len(_COLOURS) - 1)
    below_RC = place_RC.long().clamp(max=len(_COLOURS) - 2)
    colours_RC3 = torch.lerp(_COLOURS[below_RC], _COLOURS[below_RC + 1], (place_RC - below_RC).float()[..., None])
    colours_RC3[values_RC == 0] = _ZERO
    colours_RC3[values_RC.isinf()] = _INFINITE
    colours_RC3[values_RC.isnan()] = _NAN
    return colours_RC3
