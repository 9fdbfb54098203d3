"""The training dataset: cached latents with their captions' tokens, in batches of one size.

B batch, C channels, F H W latent frames, height, width, S text tokens, D text width, P CLIP tokens, I their width.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from utils.data.cache_files import read_clip, read_condition, read_latents, read_mask, read_text
from utils.data.dataset_lines import dataset_lines, problem_line
from utils.data.held_out import held_out
from utils.data.items import CachedItems, Item, cached_items, made_otherwise
from utils.data.sources import AnyDataset, DatasetConfig
from utils.interrupts import ignore_interrupts
from utils.learning.flow_matching import draw_generator
from wan.errors import InputError

_MOST_ENTRIES = 10_000_000  # of an epoch: at a second a step four months, and a gigabyte of numbers to shuffle


@dataclass(frozen=True)
class _Bucket:
    """The items of one dataset that share a size and a number of frames."""

    items: tuple[int, ...]
    num_repeats: int
    batch_size: int


@dataclass(frozen=True)
class ShownBatch:
    """The entries of a batch, and the caption that each of them shows."""

    entries: tuple[int, ...]
    captions: tuple[str, ...]


class TrainingDataset(Dataset):
    """All items of all datasets; indexed by a batch, which is a tuple of entries.

    An epoch shows an item num_repeats times, each time under an entry of its own: the item's number, plus len(items)
    for each repeat before.
    """

    def __init__(
        self, items: Sequence[Item], buckets: Sequence[_Bucket], lines: Sequence[str], held_out: Sequence[Item] = ()
    ):
        self.items = tuple(items)
        self.held_out = tuple(held_out)  # for validation: no batch has them
        self._buckets = tuple(buckets)
        self._lines = tuple(lines)

    def describe(self) -> list[str]:
        """What is trained on: one line per dataset, and one more for what is left out."""
        return list(self._lines)

    @property
    def text_width(self) -> int:
        """The width of the encoded tokens, the same in all items."""
        return self.items[0].text_shape[1]

    @property
    def clip_width(self) -> int | None:
        """The width of the CLIP tokens, the same in all items; None without them."""
        shape = self.items[0].clip_shape
        return None if shape is None else shape[1]

    @property
    def longest_text(self) -> int:
        """The tokens of the longest caption."""
        return max(item.text_shape[0] for item in self.items)

    @property
    def shown_captions(self) -> list[str]:
        """The captions of every entry of an epoch, in the order of the items."""
        shown = [(number, bucket.num_repeats) for bucket in self._buckets for number in bucket.items]
        captions = (self.items[number].captions for number, repeats in sorted(shown) for _ in range(repeats))
        return [caption for own in captions for caption in own]

    def latent_values(self, entry: int) -> int:
        """How many values the latents of an entry have."""
        return math.prod(self._item(entry).latent_shape)

    def epoch_batches(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        """The epoch's batches of entries: each item num_repeats times, a bucket's last one may be short.

        Depends on the items, `seed` and `epoch` alone.
        """
        generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
        batches = []
        for bucket in self._buckets:
            repeats = range(bucket.num_repeats)
            entries = [number + repeat * len(self.items) for repeat in repeats for number in bucket.items]
            shuffled = _shuffled(entries, generator)
            size = bucket.batch_size
            batches += [tuple(shuffled[start : start + size]) for start in range(0, len(shuffled), size)]
        return _shuffled(batches, generator)

    def show(self, entries: tuple[int, ...], seed: int, epoch: int) -> ShownBatch:
        """The entries with the caption that each shows in an epoch: one of its item's captions, or the empty one.

        Drawn for each epoch and entry by itself, so that a resumed run repeats it.
        """
        return ShownBatch(entries, tuple(_shown_caption(self._item(entry), seed, epoch, entry) for entry in entries))

    def __getitem__(self, batch: ShownBatch | tuple[int, ...]) -> dict:
        """{"latents": [B, C, F, H, W] float32, "t5": list of [S, D] in the caches' dtype, "names", "entries"}.

        "mask" is [B, 1, 1, H, W], or None where the whole of every item is trained on. What the model is given of
        pictures is "y" [B, 4 + C, F, H, W] and "clip" [B, P, I], in float32, or None where it is not given that.
        A tuple of entries shows the first caption of each.
        """
        if not isinstance(batch, ShownBatch):
            batch = ShownBatch(batch, tuple(self._item(entry).caption for entry in batch))
        items = [self._item(entry) for entry in batch.entries]
        return {
            "latents": _stacked(items, read_latents),
            "t5": [read_text(item.text, caption) for item, caption in zip(items, batch.captions, strict=True)],
            "names": [item.name for item in items],
            "entries": list(batch.entries),
            "mask": _masks(items),
            "y": _stacked(items, read_condition) if items[0].conditions.pictures else None,
            "clip": _stacked(items, read_clip) if items[0].conditions.clip else None,
        }

    def _item(self, entry: int) -> Item:
        return self.items[entry % len(self.items)]


class EpochSampler:
    """Yields one process's batches of an epoch, with the captions that they show.

    set_epoch moves a loader on and keeps its worker processes.
    """

    def __init__(self, dataset: TrainingDataset, seed: int, epoch: int, skip: int, rank: int, world: int):
        self._dataset, self._seed, self._rank, self._world = dataset, seed, rank, world
        self.set_epoch(epoch, skip)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next iteration is over `epoch`, without the first `skip` batches of this process."""
        batches = self._dataset.epoch_batches(self._seed, epoch)
        per_rank = -(-len(batches) // self._world)
        # Wrapped around, because processes with different numbers of steps would wait for each other forever.
        mine = range(self._rank, per_rank * self._world, self._world)
        self._batches = [batches[number % len(batches)] for number in mine][skip:]
        self._epoch = epoch

    def __iter__(self) -> Iterator[ShownBatch]:
        return (self._dataset.show(batch, self._seed, self._epoch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def build_training_dataset(config: DatasetConfig) -> TrainingDataset:
    """The datasets with all their caches; InputError names what is missing, stale or damaged, and what to run."""
    found = [cached_items(dataset) for dataset in config.datasets]
    problems = [problem for cached in found for problem in cached.problems]
    if problems:
        raise InputError(problem_line(problems, config))
    validated = held_out([cached.items for cached in found], config.validation_split)
    if config.validation_split and any(cached.items for cached in found):
        _check_split(config, validated, found)
    left_out = {item.latents for item in validated}
    found = [replace(cached, items=tuple(i for i in cached.items if i.latents not in left_out)) for cached in found]
    items = [item for cached in found for item in cached.items]
    if not items:
        if any(cached.one_frame for cached in found):
            raise InputError(
                f"{config.path}: there are only pictures and clips of one frame, and the model is given the first "
                "frame, so there is nothing to train on: add a dataset of videos with target_frames of 5 or more"
            )
        raise InputError(
            f"{config.path}: no video is as long as the smallest of its target_frames; there is nothing to train on"
        )
    _check_widths(items)
    _check_entries(config, found)
    lines = [
        line
        for number, (dataset, cached) in enumerate(zip(config.datasets, found, strict=True), 1)
        for line in dataset_lines(number, dataset, cached)
    ]
    lines += made_otherwise([*items, *validated])
    if validated:
        lines.append(f"{len(validated)} more items are held out for validation (validation_split)")
    return TrainingDataset(items, _buckets(config.datasets, found), lines, validated)


class BatchLoader:
    """One process's batches of an epoch; `sampler.set_epoch(epoch, skip=0)` moves it on, with the same workers."""

    def __init__(self, loader: DataLoader):
        self._loader = loader
        self.sampler = loader.sampler

    def __iter__(self) -> Iterator[dict]:
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def __len__(self) -> int:
        return len(self._loader)


def make_loader(
    dataset: TrainingDataset,
    seed: int,
    epoch: int,
    skip: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    persistent: bool = False,
    say: Callable[[str], None] = print,
) -> BatchLoader:
    """A loader of this process's batches from batch `skip` on; every process has as many.

    Its workers are kept from epoch to epoch if they are persistent; says so if they cannot be started.
    """
    if workers and (problem := _workers_problem(workers)):
        say(f"note: shared memory cannot be used ({problem}), so batches are read without data-loader workers")
        workers = 0
    loader = DataLoader(
        _SentByPipe(dataset) if workers else dataset,
        batch_size=None,
        sampler=EpochSampler(dataset, seed, epoch, skip, rank, world),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=ignore_interrupts,
        # Its own, because a loader draws a number from the global generator otherwise.
        generator=torch.Generator(),
    )
    return BatchLoader(loader)


class _SentByPipe(Dataset):
    """A dataset in a worker process: batches leave it through its pipe, errors of users as values.

    Sent as tensors, batches would lie in shared memory, which is small in containers and where a full one ends in a
    stall or a bus error; raised, an error would arrive with a traceback in its text.
    """

    def __init__(self, dataset: TrainingDataset):
        self._dataset = dataset

    def __getitem__(self, batch: ShownBatch | tuple[int, ...]) -> "dict | InputError":
        try:
            loaded = self._dataset[batch]
        except InputError as error:
            return error
        texts = [_PlainTensor(text_SD) for text_SD in loaded["t5"]]
        plain = {name: _PlainTensor(value) if isinstance(value, Tensor) else value for name, value in loaded.items()}
        return {**plain, "t5": texts}


class _PlainTensor:
    """A tensor that is pickled by its bytes, and unpickled as a tensor."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def __reduce__(self) -> tuple:
        values = self._tensor.contiguous()
        return _tensor_of, (bytearray(values.view(torch.uint8).numpy()), values.dtype, tuple(values.shape))


def _tensor_of(values: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(values, dtype=dtype).view(shape)


def _workers_problem(workers: int) -> str | None:
    """Why worker processes cannot be started; None if they can. Their queues need semaphores in shared memory."""
    try:
        _together = [multiprocessing.Queue() for _ in range(workers + 4)]  # about as many as the loader makes
    except (OSError, ImportError) as error:  # ImportError: a system without semaphores
        return str(error)
    return None


def _epoch_seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"batches {seed} {epoch}".encode()).digest()[:8], "little") >> 1


def _stacked(items: Sequence[Item], read: Callable[[Path], Tensor]) -> Tensor:
    return torch.stack([read(item.latents).float() for item in items])


def _masks(items: Sequence[Item]) -> Tensor | None:
    if not any(item.masked for item in items):
        return None
    whole_HW = torch.ones(items[0].latent_shape[-2:])
    masks_BHW = torch.stack([read_mask(item.latents) if item.masked else whole_HW for item in items])
    return masks_BHW[:, None, None]


def _shown_caption(item: Item, seed: int, epoch: int, entry: int) -> str:
    if len(item.captions) == 1 and not item.dropout:
        return item.caption
    dropped, chosen = torch.rand(2, generator=draw_generator(seed, "caption", epoch, entry), dtype=torch.float64)
    return "" if dropped < item.dropout else item.captions[int(chosen * len(item.captions))]


def _shuffled(values: Sequence, generator: torch.Generator) -> list:
    return [values[number] for number in torch.randperm(len(values), generator=generator).tolist()]


def _check_split(config: DatasetConfig, validated: Sequence[Item], found: Sequence[CachedItems]) -> None:
    """InputError if nothing is held out, or nothing is left to train on."""
    if not validated:
        raise InputError(
            f"{config.path}: validation_split holds out nothing, because no dataset has two files to train on: add "
            "files, or leave it out"
        )
    if len(validated) == sum(len(cached.items) for cached in found):
        raise InputError(
            f"{config.path}: validation_split leaves nothing to train on, because all files are copies of one another: "
            "add files, or leave it out"
        )


def _check_widths(items: Sequence[Item]) -> None:
    widths = sorted({item.text_shape[1] for item in items})
    if len(widths) > 1:
        raise InputError(
            f"the text caches come from different text encoders, their widths are {widths}: run "
            "wan_cache_text_encoder_outputs.py again"
        )
    widths = sorted({item.clip_shape[1] for item in items if item.clip_shape is not None})
    if len(widths) > 1:
        raise InputError(
            f"the CLIP tokens come from different image encoders, their widths are {widths}: run wan_cache_latents.py "
            "--clip again"
        )


def _check_entries(config: DatasetConfig, found: Sequence[CachedItems]) -> None:
    counts = [len(cached.items) * dataset.num_repeats for dataset, cached in zip(config.datasets, found, strict=True)]
    if sum(counts) > _MOST_ENTRIES:
        raise InputError(
            f"{config.path}: an epoch would show {sum(counts):,} items, more than {_MOST_ENTRIES:,}: lower num_repeats"
        )


def _buckets(datasets: Sequence[AnyDataset], found: Sequence[CachedItems]) -> list[_Bucket]:
    buckets, number = [], 0
    for dataset, cached in zip(datasets, found, strict=True):
        members = defaultdict(list)
        for item in cached.items:
            members[item.bucket, item.frames].append(number)
            number += 1
        buckets += [_Bucket(tuple(members[key]), dataset.num_repeats, dataset.batch_size) for key in sorted(members)]
    return buckets
