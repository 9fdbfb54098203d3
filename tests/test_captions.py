"""Several captions of a picture, a prefix for all, and entries that train with the empty caption."""

import json
import shutil
from collections import Counter

import pytest
import torch
from caching_jobs import FakeEncoder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import run, write_inputs

from utils import caching
from utils.cli.cache import parse_cache_text
from utils.data.cache_files import image_latents_path, read_text, text_path, write_latents, write_text
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset, make_loader
from utils.data.sources import list_sources
from utils.learning.flow_matching import draw_generator
from wan.errors import InputError


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "load_text_encoder", lambda *args, **settings: FakeEncoder())
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)
    (tmp_path / "t5.pth").touch()


def _config(folder, **settings):
    table = {"cache_directory": str(folder / "cache"), "resolution": [32, 32], **settings}
    (folder / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return folder / "data.json"


def _folder(folder, captions, **settings):
    """Pictures with these caption files and latent caches, and the file of their dataset."""
    (folder / "pics").mkdir(exist_ok=True)
    for stem, text in captions.items():
        Image.new("RGB", (32, 32)).save(folder / "pics" / f"{stem}.png")
        (folder / "pics" / f"{stem}.txt").write_text(text, encoding="utf-8", newline="")
        write_latents(image_latents_path(folder / "cache", stem, (32, 32)), torch.zeros(16, 1, 4, 4), (32, 32))
    return _config(folder, image_directory=str(folder / "pics"), caption_extension=".txt", **settings)


def _list(folder, *captions):
    """One picture that is listed with each of the captions in turn, and the file of its dataset."""
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    write_latents(image_latents_path(folder / "cache", "a", (32, 32)), torch.zeros(16, 1, 4, 4), (32, 32))
    lines = [json.dumps({"image_path": str(folder / "a.png"), "caption": caption}) for caption in captions]
    (folder / "l.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return _config(folder, image_jsonl_file=str(folder / "l.jsonl"))


def _captions(config):
    [dataset] = read_dataset_config(config).datasets
    return [source.captions for source in list_sources(dataset).found]


def _cached(config, *flags):
    """The dataset to train on, once its captions are cached."""
    argv = ["--dataset_config", str(config), "--t5", str(config.parent / "t5.pth"), "--device", "cpu", *flags]
    caching.cache_text(parse_cache_text(argv), lambda line: None)
    return build_training_dataset(read_dataset_config(config))


def test_lines_of_a_caption_file_are_captions_each_where_asked_for(tmp_path):
    text = "a cat \r\n\n an owl\u2028at\x85night\n a cat"
    assert _captions(_folder(tmp_path, {"a": text})) == [(text.strip().replace("\r", ""),)]
    assert _captions(_folder(tmp_path, {"a": text}, caption_mode="lines")) == [("a cat", "an owl\u2028at\x85night")]
    assert _captions(_folder(tmp_path, {"a": " \n\n"}, caption_mode="lines")) == [("",)]


def test_a_list_gives_several_captions_in_a_line_or_in_lines_of_their_own(tmp_path):
    assert _captions(_list(tmp_path, ["a", " b "])) == [("a", "b")]
    assert _captions(_list(tmp_path, "a", ["b", "a"], "c")) == [("a", "b", "c")]


def test_one_file_under_two_names_in_a_list_is_one_picture(tmp_path, monkeypatch):
    config = _list(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    with open(tmp_path / "l.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"image_path": "x/../a.png", "caption": "b"}')
    assert _captions(config) == [("a", "b")]
    [dataset] = read_dataset_config(config).datasets
    assert "lines that list a file again: 1;" in list_sources(dataset).notes[0]


@pytest.mark.parametrize("prefix", ["ohwx,", "ohwx, "])
def test_the_prefix_is_part_of_every_caption_but_the_empty_one(tmp_path, prefix):
    settings = {"caption_mode": "lines", "caption_prefix": prefix, "caption_dropout_rate": 0.5}
    dataset = _cached(_folder(tmp_path, {"a": "cat\nowl", "b": ""}, **settings))
    assert [item.captions for item in dataset.items] == [("ohwx, cat", "ohwx, owl"), ("ohwx,",)]
    with safe_open(tmp_path / "cache" / "a_wan_te.safetensors", "pt") as file:
        told = {key: value for key, value in file.metadata().items() if key.startswith("caption")}
    assert told == {"caption1": "ohwx, cat", "caption2": "ohwx, owl", "caption3": ""}


def test_further_captions_lie_beside_the_first_that_musubi_tuner_reads(tmp_path):
    _cached(_list(tmp_path, ["a", "bcd", "ef"]))
    path = tmp_path / "cache" / "a_wan_te.safetensors"
    stored = {key: tuple(value.shape) for key, value in load_file(path).items()}
    names = ("varlen_t5_bfloat16", "varlen_caption2_bfloat16", "varlen_caption3_bfloat16")
    assert stored == dict(zip(names, [(2, 8), (4, 8), (3, 8)], strict=True))
    for caption in ("a", "bcd", "ef"):
        assert torch.equal(read_text(path, caption), FakeEncoder()([caption])[0].bfloat16())
    with pytest.raises(InputError, match="lacks the caption 'g'"):
        read_text(path, "g")


def test_captions_that_are_gone_leave_the_cache(tmp_path):
    _cached(_list(tmp_path, ["a", "b", "c"]))
    _cached(_list(tmp_path, ["d"]))
    with safe_open(tmp_path / "cache" / "a_wan_te.safetensors", "pt") as file:
        assert list(file.keys()) == ["varlen_t5_bfloat16"]
        assert {key for key in file.metadata() if key.startswith("caption")} == {"caption1"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"caption_prefix": "x"}, "has captions that its text cache lacks"),
        ({"caption_mode": "whole"}, "has another caption than its text cache"),
        ({"caption_dropout_rate": 0.1}, "has a text cache without the empty caption, which caption_dropout_rate needs"),
    ],
)
def test_captions_that_change_are_noticed(tmp_path, settings, named):
    _cached(_folder(tmp_path, {"a": "cat\nowl"}, caption_mode="lines"))
    changed = _folder(tmp_path, {"a": "cat\nowl"}, **{"caption_mode": "lines", **settings})
    with pytest.raises(InputError, match=f"a.png {named}"):
        build_training_dataset(read_dataset_config(changed))
    assert len(_cached(changed).items) == 1


def test_captions_in_another_order_are_still_cached(tmp_path):
    _cached(_list(tmp_path, ["a", "bcd"]))
    dataset = build_training_dataset(read_dataset_config(_list(tmp_path, ["bcd"])))
    assert (dataset.longest_text, dataset[(0,)]["t5"][0].shape) == (4, (4, 8))


def test_each_entry_of_an_epoch_shows_a_caption_of_its_own_draw(tmp_path):
    settings = {"caption_mode": "lines", "caption_dropout_rate": 0.25, "num_repeats": 1000}
    dataset = _cached(_folder(tmp_path, {"a": "cat\na bird"}, **settings))
    shown = dataset.show(tuple(range(1000)), 7, 2).captions
    for entry in (0, 1, 999):
        dropped, chosen = torch.rand(2, generator=draw_generator(7, "caption", 2, entry), dtype=torch.float64)
        assert shown[entry] == ("" if dropped < 0.25 else ["cat", "a bird"][int(2 * chosen)])
    counts = Counter(shown)
    assert abs(counts[""] - 250) < 60 and abs(counts["cat"] - 375) < 60 and counts.total() == 1000
    assert dataset.show(tuple(range(1000)), 7, 3).captions != shown != dataset.show(tuple(range(1000)), 8, 2).captions


def test_a_loader_shows_the_drawn_captions_whatever_was_skipped(tmp_path):
    settings = {"caption_mode": "lines", "caption_dropout_rate": 0.3, "num_repeats": 20}
    dataset = _cached(_folder(tmp_path, {"a": "cat\na bird"}, **settings))
    drawn = {entry: len(dataset.show((entry,), 7, 1).captions[0]) for entry in range(20)}
    for workers, skip in ((0, 0), (0, 5), (1, 3)):
        batches = list(make_loader(dataset, 7, 1, skip, workers=workers))
        assert [batch["t5"][0].shape[0] - 1 for batch in batches] == [drawn[b["entries"][0]] for b in batches]
        assert len(batches) == 20 - skip


def test_all_captions_belong_to_the_concept(tmp_path):
    dataset = _cached(_list(tmp_path, ["a", "b"]))
    assert dataset.shown_captions == ["a", "b"]
    assert "up to 2 captions, of which each entry of an epoch shows one" in "\n".join(dataset.describe())


def test_where_only_caches_are_left_their_captions_are_drawn(tmp_path):
    config = _folder(tmp_path, {"a": "cat\nowl"}, caption_mode="lines", caption_dropout_rate=0.5)
    _cached(config)
    shutil.rmtree(tmp_path / "pics")
    assert build_training_dataset(read_dataset_config(config)).items[0].captions == ("cat", "owl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run's files whose pictures have two captions each, and some entries none."""
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    for path in (folder / "pics").glob("*.txt"):
        further = [("b", torch.ones(2, 48).bfloat16()), ("", torch.zeros(1, 48).bfloat16())]
        write_text(text_path(folder / "pics", path.stem), torch.randn(3, 48).bfloat16(), path.stem, None, further)
        path.write_text(f"{path.stem}\nb", encoding="utf-8")
    with open(folder / "data.toml", "a", encoding="utf-8") as file:
        file.write('\ncaption_mode = "lines"\ncaption_dropout_rate = 0.3\n')
    return folder


def test_a_resumed_run_shows_the_captions_of_the_run_that_never_stopped(files):
    run(files, "--save_state", "--save_every_n_steps", "3", "--save_as", "slice")
    (files / "out").rename(files / "whole")
    run(files, "--save_as", "slice", "--resume", str(files / "whole" / "one-step00000003-state"))
    whole, resumed = (load_file(files / name / "one.slice.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_state_of_other_captions_is_refused(files):
    shutil.rmtree(files / "out", ignore_errors=True)
    run(files, "--save_state", "--save_as", "slice", "--max_train_epochs", "1")
    text = (files / "data.toml").read_text(encoding="utf-8")
    (files / "data.toml").write_text(text.replace("rate = 0.3", "rate = 0.4"), encoding="utf-8")
    try:
        with pytest.raises(InputError, match="dataset_sha256 is different, so the pictures, captions or settings"):
            run(files, "--resume", "latest", "--save_as", "slice")
    finally:
        (files / "data.toml").write_text(text, encoding="utf-8")
