"""The report on slices as one page of HTML that needs nothing else: no network, no server, no script."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import readable
from utils.slices.figures import heat_map, hue, ids_figure
from utils.slices.ledger import Entry
from utils.slices.listing import ListedFile
from utils.slices.overlaps import ids_line, overlapping
from utils.slices.report import Chain, Concept
from utils.slices.thumbnails import thumbnail
from wan.errors import InputError

if TYPE_CHECKING:
    from utils.slices.moved import MatrixChange

_MOST_SHARES = 8  # lines of ids
_MOST_OVERLAPS = 50
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1e21;--soft:#5c636b;--line:#d9dde2;--card:#f6f7f9;--free:#e3e6ea;
--light:46%;--warn:#a32020}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e8eaed;--soft:#a3abb4;--line:#343a41;--card:#1d2024;
--free:#2c3238;--light:62%;--warn:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:64rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2rem 0 .6rem}h3{font-size:1.05rem;margin:0 0 .3rem}
p{margin:.3rem 0}.soft{color:var(--soft)}.warn{color:var(--warn)}
article{background:var(--card);border:1px solid var(--line);border-left:6px solid hsl(var(--hue) 65% var(--light));
border-radius:6px;padding:.8rem 1rem;margin:.8rem 0}
dl{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:.3rem 0}dl div{display:flex;gap:.4rem}
dt{color:var(--soft)}dd{margin:0}
figure{margin:.6rem 0;overflow-x:auto}figcaption{color:var(--soft);font-size:.9rem}
.pictures{display:flex;flex-wrap:wrap;gap:.5rem}.pictures img{height:9rem;max-width:100%;width:auto;object-fit:contain;
border-radius:4px;display:block}
svg{width:100%;height:auto;display:block}svg text{font:9px system-ui,sans-serif;fill:var(--soft)}
.free{fill:var(--free)}.used,.heat{fill:hsl(var(--hue) 65% var(--light))}
.field{fill:var(--free)}
ul{margin:.3rem 0;padding-left:1.2rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
details{margin:.4rem 0}summary{cursor:pointer;color:var(--soft)}
@media (max-width:32rem){body{padding:.7rem}article{padding:.6rem .7rem}.pictures img{height:6.5rem}}
"""


def check_name(path: Path, overwrite: bool) -> None:
    """InputError if `path` is not a name for a page in a folder, or exists and is to be kept."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path} is not a name for a page: it must end in .html")
    if path.exists() and not overwrite:
        raise InputError(f"{path} already exists: choose another output, or add --overwrite to replace it")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")


def write_page(path: Path, text: str) -> None:
    """Writes the page; InputError if the disk does not take it."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def page(
    files: Sequence[ListedFile],
    chains: Sequence[Chain],
    changes: Mapping[Entry, Sequence["MatrixChange"]] | None,
) -> str:
    """The whole page; `changes` are those of the concepts on the bases, None if none were given."""
    count = sum(len(chain.concepts) for chain in chains)
    title = f"{count} concept{'' if count == 1 else 's'} in {len(files)} file{'' if len(files) == 1 else 's'}"
    body = [f"<h1>{title}</h1>"]
    if changes is None and count:
        body.append('<p class="soft">Add --base to see where in the model values moved.</p>')
    for chain in chains:
        if chain.concepts:
            body += _chain(chain, changes)
    body += _files(files)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _chain(chain: Chain, known: Mapping[Entry, Sequence["MatrixChange"]] | None) -> list[str]:
    changes = known or {}
    entries = [concept.entry for concept in chain.concepts]
    base = f"On base {chain.base[:12]}" if chain.base else "On an unknown base"
    lines = [f"<h2>{base}</h2>", *_ids(entries), *_overlaps(entries)]
    shown = [change for entry in entries for change in changes.get(entry, ())]
    largest = max((change.ratio for change in shown), default=0.0)
    if shown:
        lines.append(
            '<p class="soft">In the maps, the full colour is a change of '
            f"{100 * largest:.3g} % of the norm of the start values, the same for all concepts.</p>"
        )
    elif known is not None:
        lines.append('<p class="soft">No maps here: add its base to --base, and slice files or checkpoints.</p>')
    for number, concept in enumerate(chain.concepts):
        lines += _concept(number, concept, changes.get(concept.entry), largest)
    return lines


def _ids(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for ff in list(dict.fromkeys(entry.ff for entry in entries))[:_MOST_SHARES]:
        lines.append(
            f"<figure>{ids_figure(entries, ff)}<figcaption>{escape(ids_line(entries, ff))}</figcaption></figure>"
        )
    return lines


def _overlaps(entries: Sequence[Entry]) -> list[str]:
    met = [f"{a.label} and {b.label}" for (a, b), _ in zip(overlapping(entries), range(_MOST_OVERLAPS), strict=False)]
    return [f'<p class="warn" dir="auto">These share values: {escape(pair)}</p>' for pair in met]


def _concept(number: int, concept: Concept, changes: Sequence["MatrixChange"] | None, largest: float) -> list[str]:
    entry = concept.entry
    facts = {"ff": entry.ff, "ffid": f"{entry.ffid}", "steps": f"{entry.steps:,}", "date": entry.date[:10] or "unknown"}
    if entry.strength != 1 or entry.rescaled:
        facts["strength"] = entry.strength_text
    facts["in"] = ", ".join(file.path.name for file in concept.files)
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    lines = [
        f'<article style="--hue:{hue(number)}">',
        f"<h3>{number + 1}. <bdi>{escape(entry.name or 'unnamed')}</bdi></h3><dl>{listed}</dl>",
        *_captions(entry.captions),
        *_pictures(concept.pictures),
    ]
    if changes:
        moved, values = sum(change.moved for change in changes), sum(change.values for change in changes)
        told = f"{moved:,} of {values:,} values moved ({100 * moved / values:.3g} %); each column is a block"
        lines.append(f"<figure>{heat_map(changes, largest, number)}<figcaption>{told}</figcaption></figure>")
    return [*lines, "</article>"]


def _captions(captions: Sequence[str]) -> list[str]:
    if not captions:
        return []
    items = "".join(f'<li dir="auto">{escape(caption)}</li>' for caption in captions)
    count = "1 caption" if len(captions) == 1 else f"{len(captions)} captions"
    return [f"<details><summary>{count} that it was trained on</summary><ul>{items}</ul></details>"]


def _pictures(paths: Sequence[Path]) -> list[str]:
    if not paths:
        return []
    return ['<div class="pictures">', *map(thumbnail, paths), "</div>"]


def _files(files: Sequence[ListedFile]) -> list[str]:
    rows = "".join(
        f"<tr><td>{escape(file.path.name)}</td><td>{file.kind}</td><td>{readable(file.size)}</td>"
        f"<td>{len(file.entries)}</td></tr>"
        for file in files
    )
    head = "<tr><th>file</th><th>kind</th><th>size</th><th>slices</th></tr>"
    return ["<h2>Files</h2>", f"<table>{head}{rows}</table>"]
