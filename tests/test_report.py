"""`slices show`: one page that needs nothing else, with what ledgers say, escaped, and what moved."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chain import train_concept, write_base, write_chain

from utils.cli.slices import main
from utils.sampling.writers import save_video
from utils.selective_finetune import slice_indices
from utils.slices.figures import ids_figure
from utils.slices.ledger import Entry
from utils.slices.moved import changes_of
from utils.slices.report import read_chains
from utils.slices.thumbnails import thumbnail
from wan.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("report"))


def shown(tmp_path, *arguments):
    out = tmp_path / "report.html"
    main(["show", *map(str, arguments), "-o", str(out), "--overwrite"])
    return out.read_text(encoding="utf-8")


def renamed(path, out, **fields):
    """A slice file with other fields in its ledger."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    (entry,) = json.loads(metadata["wan_slices"])
    save_file(load_file(path), out, metadata | {"wan_slices": json.dumps([entry | fields])})
    return out


class Tags(HTMLParser):
    """The elements of a page that stay open, or are closed without having been opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_concepts_stand_in_the_order_in_which_they_were_taught(chain, tmp_path):
    text = shown(tmp_path, chain / "two.slice.safetensors", chain / "one.slice.safetensors")
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["1. <bdi>one</bdi>", "2. <bdi>two</bdi>"]
    assert "<dt>ff</dt><dd>0.05</dd>" in text and "<dt>ffid</dt><dd>2</dd>" in text and "<dd>20</dd>" in text


def test_a_slice_in_several_files_is_one_concept_that_names_them(chain, tmp_path):
    text = shown(tmp_path, chain / "two.safetensors", chain / "one.slice.safetensors", chain / "one.safetensors")
    held = "two.safetensors, one.slice.safetensors, one.safetensors"
    assert text.count("<article") == 2 and f"<dt>in</dt><dd>{held}</dd>" in text


def test_a_page_is_whole_and_names_nothing_outside_itself(chain, tmp_path):
    Image.new("RGB", (40, 30), "red").save(chain / "one_00.png")
    text = shown(tmp_path, chain / "two.safetensors", "--base", chain / "base.safetensors")
    tags = Tags(text)
    (chain / "one_00.png").unlink()
    assert (tags.open, tags.wrong) == ([], []) and len(tags.links) == 1 and tags.links[0].startswith("data:image/jpeg")
    assert "url(" not in text and "<script" not in text and "prefers-color-scheme:dark" in text


def test_what_a_file_says_is_escaped(chain, tmp_path):
    evil = {"name": "<script>x</script>&", "captions": ['"><img src=http://a.b/c>']}
    text = shown(tmp_path, renamed(chain / "one.slice.safetensors", tmp_path / "a<b>.safetensors", **evil))
    assert "&lt;script&gt;x&lt;/script&gt;&amp;" in text and "a&lt;b&gt;.safetensors" in text
    assert "<script" not in text and "<b>" not in text and Tags(text).links == []


def test_pictures_beside_the_files_are_shown_with_the_concept_that_they_are_of(chain, tmp_path):
    for place, name in enumerate(("sample/one_000.png", "one-000010_x.jpg", "one2.png", "other.png", "one.txt")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (700 + place, 70)).save(path, "PNG")
    Image.new("RGB", (9, 9)).save(tmp_path / "one_contact_sheet.png")
    (tmp_path / "one_broken.png").write_bytes(b"no picture")
    (tmp_path / "one.slice.safetensors").write_bytes((chain / "one.slice.safetensors").read_bytes())
    text = shown(tmp_path, tmp_path / "one.slice.safetensors")
    assert set(re.findall(r'alt="([^"]*)"', text)) == {"one_000.png", "one-000010_x.jpg"}
    assert "one_broken.png cannot be read" in text and 'width="320"' in text


def test_a_picture_is_of_the_concept_with_the_longest_name_that_fits_and_experts_share_theirs(chain, tmp_path):
    for name in ("cat-high_noise", "cat-low_noise", "cat_and_dog"):
        renamed(chain / "one.slice.safetensors", tmp_path / f"{name}.slice.safetensors", name=name)
    (tmp_path / "sample").mkdir()
    for name in ("cat_00_2026", "cat-step00000004_01_2026", "cat_and_dog_00_2026"):
        Image.new("RGB", (9, 9)).save(tmp_path / "sample" / f"{name}.png")
    text = shown(tmp_path, *sorted(tmp_path.glob("*.safetensors")))
    found = {part.partition("</bdi>")[0]: set(re.findall('alt="(.*?)"', part)) for part in text.split("<bdi>")[1:]}
    of_both = {"cat_00_2026.png", "cat-step00000004_01_2026.png"}
    expected = {"cat-high_noise": of_both, "cat-low_noise": of_both, "cat_and_dog": {"cat_and_dog_00_2026.png"}}
    assert found == expected


def pixel_shown(path):
    """The colour in the middle of the picture as the page has it, and its size."""
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', thumbnail(path))[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        return picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2)), picture.size


def test_transparent_and_16_bit_pictures_look_as_viewers_show_them(tmp_path):
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (4000, 20), "white").save(tmp_path / "wide.png")
    assert pixel_shown(tmp_path / "clear.png") == ((255, 255, 255), (40, 30))
    assert pixel_shown(tmp_path / "deep.png") == ((128, 128, 128), (40, 30))
    assert pixel_shown(tmp_path / "wide.png") == ((255, 255, 255), (320, 2))


def test_a_sample_that_is_a_clip_is_shown_by_its_first_frame(chain, tmp_path):
    (tmp_path / "sample").mkdir()
    frames = torch.full((3, 5, 32, 48), -1.0)
    frames[:, 1:] = 1
    save_video(tmp_path / "sample" / "one_00_20260101.mp4", frames, fps=16)
    (tmp_path / "one.slice.safetensors").write_bytes((chain / "one.slice.safetensors").read_bytes())
    text = shown(tmp_path, tmp_path / "one.slice.safetensors")
    assert 'alt="one_00_20260101.mp4"' in text and "clip" in text
    assert max(pixel_shown(tmp_path / "sample" / "one_00_20260101.mp4")[0]) < 8


def test_used_and_free_ids_are_cells_of_the_line_at_each_ff(chain, tmp_path):
    text = shown(tmp_path, chain / "two.safetensors")
    assert "<title>ffid 2: one (ff 0.05 ffid 2)</title>" in text and "<title>ffid 3: free</title>" in text
    assert "<title>ffid 4: one (ff 0.05 ffid 2)</title>" in text  # of ff 0.03, from 0.09 to 0.12
    assert "18 of 20 ids at ff 0.05 are free, the next is --ffid 3" in text


@pytest.mark.parametrize("ff", ["1", "0.3", "0.001", "1e-9"])
def test_a_line_of_ids_has_a_cell_for_each_or_a_thousand_for_all(ff):
    figure = ids_figure([Entry(1, ff, 1, "a<b", 1)], ff)
    cells = int(1 / float(ff))
    assert figure.count("<title>") == min(cells, 1000) and figure.count('class="used"') == 1
    assert "a&lt;b" in figure


@pytest.mark.parametrize("name", ["one.slice", "two", "one"])
def test_the_change_of_each_matrix_is_that_of_its_values_in_slice_files_and_in_checkpoints(chain, name):
    _, chains = read_chains([chain / f"{name}.safetensors"])
    found = next(own for entry, own in changes_of(chains, [chain / "base.safetensors"]).items() if entry.name == "one")
    base, trained = load_file(chain / "base.safetensors"), load_file(chain / "one.safetensors")
    for change in found:
        matrix = f"blocks.{change.block}.{change.kind}.weight"
        at = slice_indices(matrix, base[matrix].shape, "0.05", 2)
        before, after = (weights[matrix].double().view(-1)[at] for weights in (base, trained))
        assert (change.values, change.moved) == (len(at), int((before != after).sum()))
        assert change.ratio == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-6)
    assert len(found) == 30


def test_the_strongest_change_has_the_full_colour_and_a_silent_matrix_none(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    trained = train_concept(base, tmp_path, "a", "0.05", 1)
    with safe_open(tmp_path / "a.slice.safetensors", "pt") as file:
        metadata = file.metadata()
    values = load_file(tmp_path / "a.slice.safetensors")
    silent = trained.matrices["blocks.1.ffn.2.weight"]
    values[silent.name] = silent.start.clone()
    save_file(values, tmp_path / "a.slice.safetensors", metadata)
    text = shown(tmp_path, tmp_path / "a.slice.safetensors", "--base", base)
    cells = re.findall(r"opacity:([\d.]+)\"><title>(block \d+ [\w.]+)", text)
    told = {place: float(opacity) for opacity, place in cells}
    assert len(told) == 30 and told["block 1 ffn.2"] == 0 and max(told.values()) == 1
    assert f"block 1 ffn.2: 0 % of the start values' norm; 0 of {silent.units.count} values moved" in text


def test_a_base_that_is_not_the_slices_is_refused(chain, tmp_path):
    other = write_base(tmp_path / "other.safetensors", seed=1)
    for name in ("one.slice.safetensors", "two.safetensors"):
        with pytest.raises(InputError, match="is not the base of one"):
            shown(tmp_path, chain / name, "--base", other)
    unknown = renamed(chain / "one.slice.safetensors", tmp_path / "unknown.safetensors", base=None)
    with pytest.raises(InputError, match="holds other values where the slice lies"):
        shown(tmp_path, unknown, "--base", other)


def test_a_folder_with_slices_of_two_bases_is_shown_and_each_base_has_its_maps(chain, tmp_path):
    other = write_base(tmp_path / "other.safetensors", seed=1)
    train_concept(other, tmp_path, "far", "0.05", 1)
    files, own = [chain / "one.slice.safetensors", tmp_path / "far.slice.safetensors"], chain / "base.safetensors"
    some = shown(tmp_path, *files, "--base", own)
    assert some.count("each column is a block") == 1 and some.count("No maps here: add its base to --base") == 1
    assert shown(tmp_path, *files, "--base", own, other).count("each column is a block") == 2
    with pytest.raises(InputError, match=r"one\.safetensors and .*base\.safetensors are one base at different stages"):
        shown(tmp_path, *files, "--base", own, chain / "one.safetensors")


def test_the_name_of_the_page_is_checked_before_files_are_read(chain, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        main(["show", str(tmp_path / "none"), "--base", str(tmp_path), "-o", str(tmp_path / "report.html")])


def test_an_existing_page_stays_unless_told_and_its_name_must_be_a_page_s(chain, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    one = str(chain / "one.slice.safetensors")
    with pytest.raises(InputError, match="already exists"):
        main(["show", one, "-o", str(tmp_path / "report.html")])
    with pytest.raises(InputError, match=r"must end in \.html"):
        main(["show", one, "-o", str(tmp_path / "report.safetensors"), "--overwrite"])
    with pytest.raises(InputError, match="cannot be written: there is no folder"):
        main(["show", one, "-o", str(tmp_path / "no" / "report.html")])
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_file_without_slices_makes_a_page_that_lists_it(chain, tmp_path):
    text = shown(tmp_path, chain / "base.safetensors")
    assert "0 concepts in 1 file" in text and "<td>base.safetensors</td><td>checkpoint</td>" in text


def test_without_a_base_no_torch_is_imported(chain, tmp_path):
    code = f"""
import sys
sys.modules["torch"] = None
from utils.cli.slices import main
main(["show", {str(chain / "two.safetensors")!r}, "-o", {str(tmp_path / "report.html")!r}])"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert "<h3" in (tmp_path / "report.html").read_text()
