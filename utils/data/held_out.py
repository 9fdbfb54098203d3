"""Which pictures a run validates on and does not train on, under whatever name another dataset lists them."""

import hashlib
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path

from utils.data.cache_files import latents_origin
from utils.data.items import Item


def held_out(datasets: Sequence[Sequence[Item]], share: float) -> list[Item]:
    """The items of a share of each dataset's pictures, and all others that show one of these pictures."""
    chosen = {path for items in datasets for path in _chosen(items, share)} if share else set()
    every = [item for items in datasets for item in items]
    return same_pictures([item for item in every if item.text in chosen], every) if chosen else []


def _chosen(items: Sequence[Item], share: float) -> list[Path]:
    """The text caches of a share of the pictures: at least one, not all; by their names, not by their order."""
    names = {path: hashlib.sha256(path.name.encode()).digest() for path in {item.text for item in items}}
    # Files in different subfolders may have one name.
    order = sorted(names, key=lambda path: (names[path], path.as_posix()))
    return order[: min(max(round(share * len(order)), 1), len(order) - 1)]


def same_pictures(some: Collection[Item], items: Sequence[Item]) -> list[Item]:
    """Those of `items` that show a picture or video which one of `some` shows, in their order."""
    marks = {item.latents: _marks(item) for item in (*items, *some)}
    wanted = set().union(*(marks[item.latents] for item in some))
    found: list[Item] = []
    # Again, because what is found may tie further ones to it: a copy, which another dataset lists by its own name.
    while len(more := [item for item in items if marks[item.latents] & wanted]) > len(found):
        found = more
        wanted = wanted.union(*(marks[item.latents] for item in found))
    return found


def _marks(item: Item) -> set[Hashable]:
    """Two items that share one of these show the same picture: its file, its content, the cache of its captions."""
    origin = latents_origin(item.latents)
    content = {("content", origin.content)} if origin else set()
    file = {("file", item.source.resolve())} if item.source else set()
    return {("captions", item.text.resolve()), *content, *file}
