"""What is said of the items that a run trains on: counts and sizes, what is left out, why caches are refused."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from utils.data.commands import caching_command
from utils.data.items import CachedItems, Item, Problem
from utils.data.sources import AnyDataset, DatasetConfig, ImageDataset

_NAMED = 3  # files


def problem_line(problems: Sequence[Problem], config: DatasetConfig) -> str:
    """Why caches cannot be trained on, and the commands that make them."""
    names = defaultdict(list)
    for problem in problems:
        names[problem.text].append(problem.source.name)
    named = [f"{own[0]} {text}{_also(own[1:])}" for text, own in list(names.items())[:_NAMED]]
    more = sum(len(own) for own in list(names.values())[_NAMED:])
    named += [f"and {more} more"] if more else []
    caches = sorted({problem.cache for problem in problems})
    model = (config.latents, config.conditions)
    commands = " ; then ".join(caching_command(cache, config.path, *model) for cache in caches)
    return f"{'; '.join(named)}. Run: {commands}"


def _also(names: Sequence[str]) -> str:
    """The other files of which the same is true."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (also {', '.join(names[:_NAMED])}{more})" if names else ""


def dataset_lines(number: int, dataset: AnyDataset, cached: CachedItems) -> list[str]:
    """What is trained on of the dataset of that number, and what is not."""
    what = "pictures" if isinstance(dataset, ImageDataset) else "clips"
    sizes = Counter((item.bucket, item.frames) for item in cached.items)
    listed = ", ".join(f"{w}x{h}x{frames}: {count}" for ((w, h), frames), count in sorted(sizes.items()))
    repeats = f", {dataset.num_repeats} times an epoch" if dataset.num_repeats > 1 else ""
    lines = [f"dataset {number}: {len(cached.items)} {what} ({listed}), batch size {dataset.batch_size}{repeats}"]
    if cached.one_frame:
        lines, single = lines if cached.items else [], "pictures" if what == "pictures" else "clips of one frame"
        lines.append(
            f"dataset {number}: {cached.one_frame} {single} are left out, because the model is given that frame itself"
        )
    if cached.left_out:
        why = "without a caption" if isinstance(dataset, ImageDataset) else "shorter than their target_frames"
        names = ", ".join(path.name for path in cached.left_out[:_NAMED])
        lines.append(f"dataset {number}: {len(cached.left_out)} files {why} are left out: {names}")
    lines += [f"dataset {number}: {line}" for line in _caption_lines(dataset, cached.items)]
    if masked := sum(item.masked for item in cached.items):
        lines.append(f"dataset {number}: the loss of {masked} of them is masked")
    return lines + [f"dataset {number}: {note}" for note in cached.notes]


def _caption_lines(dataset: AnyDataset, items: Sequence[Item]) -> list[str]:
    lines, most = [], max((len(item.captions) for item in items), default=0)
    if most > 1:
        lines.append(f"up to {most} captions, of which each entry of an epoch shows one")
    if dataset.caption_dropout_rate:
        lines.append(f"{dataset.caption_dropout_rate:.0%} of the entries train with the empty caption")
    return lines
