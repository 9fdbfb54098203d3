"""Masks of the loss: from files and from alpha, down to latent pixels, cached with the latents."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from caching_jobs import cache_latents, write_vae
from PIL import Image
from safetensors.torch import load_file
from tiny_run import run, write_inputs

from utils import caching
from utils.data.cache_files import image_latents_path, read_latents, read_mask, text_path, write_latents, write_text
from utils.data.config import read_dataset_config
from utils.data.dataset import build_training_dataset, make_loader
from utils.learning.flow_matching import TimestepConfig, flow_loss, sample_losses
from utils.run.validation import validation_sums
from wan.errors import InputError
from wan.loading import load_dit


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"), "vae_wan21")


@pytest.fixture(autouse=True)
def without_advice_on_gpus(monkeypatch):
    monkeypatch.setattr(caching, "cpu_line", lambda device: None)


def _grey(values_HW, mode="L"):
    return Image.fromarray(np.asarray(values_HW, np.uint8)).convert(mode)


def _halves(width=32, height=32):
    """White on the left, black on the right."""
    return _grey(np.where(np.arange(width) < width // 2, 255, 0)[None].repeat(height, 0))


def _files(folder, masks, size=(32, 32), **settings):
    """Pictures a and b, these masks, text caches, and the file of their dataset."""
    for name in ("pics", "masks"):
        (folder / name).mkdir(exist_ok=True)
    for stem in "ab":
        Image.new("RGB", size, "teal").save(folder / "pics" / f"{stem}.png")
        (folder / "pics" / f"{stem}.txt").write_text(stem, encoding="utf-8")
        write_text(text_path(folder / "cache", stem), torch.zeros(2, 8), stem)
    for name, mask in masks.items():
        mask.save(folder / "masks" / name)
    return _config(folder, image_directory=str(folder / "pics"), **settings)


def _config(folder, **settings):
    table = {"cache_directory": str(folder / "cache"), "resolution": [32, 32], "caption_extension": ".txt"}
    table |= {"mask_directory": str(folder / "masks")} | settings
    table = {key: value for key, value in table.items() if value is not None}
    (folder / "data.json").write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return folder / "data.json"


def _build(config):
    return build_training_dataset(read_dataset_config(config))


def _mask(folder, stem="a", size=(32, 32)):
    return read_mask(image_latents_path(folder / "cache", stem, size))


def test_the_loss_is_the_mean_of_what_is_white():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 16, 2, 4, 6, generator=generator)
    mask = torch.rand(3, 1, 1, 4, 6, generator=generator)
    mask[1], mask[2] = 0, 1
    mask[1, ..., 1:3, 2:5] = 1
    losses = sample_losses(predicted, target, torch.ones(3), "none", mask)
    error = (predicted - target) ** 2
    weights = mask[0].expand_as(error[0])
    wanted = [(weights * error[0]).sum() / weights.sum(), error[1][..., 1:3, 2:5].mean(), error[2].mean()]
    torch.testing.assert_close(losses, torch.stack(wanted))


@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_a_white_mask_changes_no_bit(weighting):
    predicted, target = torch.randn(2, 3, 16, 3, 30, 52)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    white = flow_loss(predicted, target, sigma, weighting, torch.ones(3, 1, 1, 30, 52))
    assert torch.equal(white, flow_loss(predicted, target, sigma, weighting))


def test_a_mask_is_brought_to_latent_pixels_by_its_mean_and_cached(tmp_path, vae_file):
    values = np.random.default_rng(0).integers(0, 256, (32, 32))
    config = _files(tmp_path, {"a.png": _grey(values), "B.webp": Image.new("RGB", (16, 16), "white")})
    cache_latents(config, vae_file)
    means = torch.from_numpy(values / 255).float().view(4, 8, 4, 8).mean((1, 3))
    torch.testing.assert_close(_mask(tmp_path), means)
    assert torch.equal(_mask(tmp_path, "b"), torch.ones(4, 4))
    stored = load_file(image_latents_path(tmp_path / "cache", "a", (32, 32)))
    assert sorted(stored) == ["latents_1x4x4_bfloat16", "varlen_loss_mask_float32"]
    batch = _build(config)[(0, 1)]
    assert batch["mask"].shape == (2, 1, 1, 4, 4) and torch.equal(batch["mask"][0, 0, 0], _mask(tmp_path))


def test_a_mask_is_resized_and_cropped_as_its_picture(tmp_path, vae_file):
    size = (128, 64)  # scaled by a half, and 16 pixels cut off on either side
    columns = _grey(np.where(np.arange(128) < 48, 255, 0)[None].repeat(64, 0))
    cache_latents(
        _files(tmp_path, {"a.png": columns, "b.png": columns.resize((64, 32), Image.Resampling.NEAREST)}, size),
        vae_file,
    )
    for stem in "ab":
        assert _mask(tmp_path, stem, size).tolist() == [[1, 0, 0, 0]] * 4


def test_a_mask_may_lie_on_its_side_as_its_picture_does(tmp_path, vae_file):
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise
    top = _halves(32, 64).rotate(0)
    config = _files(tmp_path, {}, (64, 32), enable_bucket=True, resolution=[32, 64])
    for stem, folder in (("a", "pics"), ("a", "masks")):
        picture = Image.new("RGB", (64, 32)) if folder == "pics" else top.transpose(Image.Transpose.ROTATE_90)
        picture.save(tmp_path / folder / f"{stem}.png", exif=exif)
    (tmp_path / "masks" / "b.png").write_bytes((tmp_path / "masks" / "a.png").read_bytes())
    shutil.copy(tmp_path / "pics" / "a.png", tmp_path / "pics" / "b.png")
    top.save(tmp_path / "masks" / "b.png")  # upright already
    cache_latents(config, vae_file)
    for stem in "ab":
        assert _mask(tmp_path, stem, (32, 64)).tolist() == [[1, 1, 0, 0]] * 8


@pytest.mark.parametrize(
    ("mask", "value"),
    [
        (Image.new("1", (32, 32), 1), 1.0),
        (Image.fromarray(np.full((32, 32), 32768, np.uint16)), 128 / 255),
        (Image.new("LA", (32, 32), (255, 51)), 0.2),
        (Image.new("RGB", (32, 32), (255, 0, 0)), 1 / 3),
    ],
    ids=["1 bit", "16 bits", "transparent is black", "colours"],
)
def test_masks_of_every_kind_are_read(tmp_path, vae_file, mask, value):
    cache_latents(_files(tmp_path, {"a.png": mask}), vae_file)
    torch.testing.assert_close(_mask(tmp_path), torch.full((4, 4), value), atol=1e-3, rtol=0)


def test_alpha_is_the_mask_where_asked_for(tmp_path, vae_file):
    config = _files(tmp_path, {}, mask_directory=None, alpha_mask=True)
    picture = Image.new("RGB", (32, 32), "teal")
    picture.putalpha(_halves())
    picture.save(tmp_path / "pics" / "a.png")
    cache_latents(config, vae_file)
    assert _mask(tmp_path).tolist() == [[1, 1, 0, 0]] * 4
    assert torch.equal(_mask(tmp_path, "b"), torch.ones(4, 4))
    assert [item.masked for item in _build(config).items] == [True, True]


def test_pictures_without_a_mask_train_whole_and_are_named(tmp_path, vae_file):
    config = _files(tmp_path, {"a.png": _halves()})
    said = cache_latents(config, vae_file)
    assert any(line.endswith("trained on as a whole: 1, b.png") for line in said)
    dataset = _build(config)
    assert [item.masked for item in dataset.items] == [True, False]
    assert "dataset 1: the loss of 1 of them is masked" in dataset.describe()
    assert torch.equal(dataset[(0, 1)]["mask"][1], torch.ones(1, 1, 4, 4))
    for workers in (0, 1):
        masks = [batch["mask"] for batch in make_loader(dataset, 1, 0, workers=workers)]
        assert sorted(0 if mask is None else mask.mean().item() for mask in masks) == [0, 0.5]


def test_masks_that_belong_to_no_picture_are_named(tmp_path, vae_file):
    said = cache_latents(_files(tmp_path, {"a.png": _halves(), "A2.png": _halves()}), vae_file)
    assert "masks of no file that is trained on: 1, A2.png" in said


@pytest.mark.parametrize(
    ("masks", "settings", "named"),
    [
        ({}, {}, "holds no mask for any of 2 files: a mask has the name of its picture or video, such as a.png"),
        ({"a.png": _halves(64, 32)}, {}, "a.png is 64x32, and a.png is 32x32 as viewers show it: a mask must have the"),
        ({"a.png": Image.new("L", (32, 32))}, {}, "a.png is black wherever it would be trained on"),
        ({"a.png": _halves(), "a.webp": _halves()}, {}, "are masks of the same name"),
        ({}, {"mask_directory": "nowhere"}, "mask_directory nowhere does not exist"),
        ({}, {"alpha_mask": True}, "mask_directory and alpha_mask contradict each other"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_mistakes_with_masks_are_named(tmp_path, vae_file, masks, settings, named):
    with pytest.raises(InputError, match=named):
        cache_latents(_files(tmp_path, masks, **settings), vae_file)


def test_pictures_are_not_their_own_masks(tmp_path):
    config = _files(tmp_path, {}, mask_directory=str(tmp_path / "masks" / ".." / "pics"))
    with pytest.raises(InputError, match="mask_directory must be another folder"):
        read_dataset_config(config)


def test_masks_that_are_new_or_changed_or_gone_are_noticed(tmp_path, vae_file):
    config = _files(tmp_path, {"a.png": _halves()}, mask_directory=None)
    cache_latents(config, vae_file)
    with pytest.raises(InputError, match=r"a\.png was cached without its mask"):
        _build(_config(tmp_path, image_directory=str(tmp_path / "pics")))
    cache_latents(config, vae_file)
    assert _mask(tmp_path).mean() == 0.5
    old = os.stat(tmp_path / "masks" / "a.png").st_mtime - 1000
    _grey(255 - np.asarray(_halves())).save(tmp_path / "masks" / "a.png")
    os.utime(tmp_path / "masks" / "a.png", (old, old))
    with pytest.raises(InputError, match=r"a\.png was cached with another mask"):
        _build(config)
    cache_latents(config, vae_file)
    assert [item.masked for item in _build(config).items] == [True, False]
    _config(tmp_path, image_directory=str(tmp_path / "pics"), mask_directory=None)
    assert _build(config)[(0,)]["mask"] is None


def test_a_damaged_mask_is_cached_again(tmp_path, vae_file):
    config = _files(tmp_path, {"a.png": _halves()})
    cache_latents(config, vae_file)
    path = image_latents_path(tmp_path / "cache", "a", (32, 32))
    for values in (torch.full((4, 4), 2.0), torch.full((4, 4), float("nan")), torch.zeros(4, 4), torch.ones(4, 5)):
        write_latents(path, read_latents(path), (32, 32), None, None, values)
        with pytest.raises(InputError, match=r"a\.png (has a damaged mask|was cached with a mask of 4x5)"):
            _build(config)


def test_a_clip_has_one_mask_for_all_of_its_frames(tmp_path, vae_file):
    (tmp_path / "clips" / "a").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), "teal").save(tmp_path / "clips" / "a" / f"{number}.png")
    line = {"video_path": str(tmp_path / "clips" / "a"), "caption": "a"}
    (tmp_path / "l.jsonl").write_text(json.dumps(line), encoding="utf-8")
    _halves().save(tmp_path / "masks" / "a.png")
    config = _config(tmp_path, video_jsonl_file=str(tmp_path / "l.jsonl"), target_frames=[1, 5])
    cache_latents(config, vae_file)
    write_text(text_path(tmp_path / "cache", "a"), torch.zeros(2, 8), "a")
    dataset = _build(config)
    assert [dataset[(entry,)]["mask"].tolist() for entry in range(2)] == [[[[[[1, 1, 0, 0]] * 4]]]] * 2
    said = cache_latents(config, vae_file)
    assert any("2 current" in line or "current" in line for line in said)


def test_where_only_caches_are_left_their_masks_are_used(tmp_path, vae_file):
    config = _files(tmp_path, {"a.png": _halves()})
    cache_latents(config, vae_file)
    shutil.rmtree(tmp_path / "pics")
    shutil.rmtree(tmp_path / "masks")
    assert [item.masked for item in _build(config).items] == [True, False]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("run"))


def _losses(folder, mask, *more):
    """The losses of a short run whose caches hold `mask`, of each picture's (height, width); None: no masks."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "masks").mkdir(exist_ok=True)
    text = (folder / "data.toml").read_text(encoding="utf-8").split("\nmask_directory")[0]
    for path in (folder / "pics").glob("*.png"):
        width, height = Image.open(path).size
        Image.new("L", (width, height), 255).save(folder / "masks" / path.name)
        masks = None if mask is None else mask(height // 8, width // 8)
        cache = image_latents_path(folder / "pics", path.stem, (width, height))
        write_latents(cache, read_latents(cache), (width, height), None, None, masks)
    masks = "" if mask is None else f'\nmask_directory = "{(folder / "masks").as_posix()}"'
    (folder / "data.toml").write_text(text + masks, encoding="utf-8")
    run(folder, "--max_train_epochs", "1", "--save_as", "slice", *more)
    return load_file(folder / "out" / "one.slice.safetensors")


def test_a_state_of_other_masks_is_refused(files):
    _losses(files, torch.ones, "--save_state")
    path = image_latents_path(files / "pics", "wide0", (32, 16))
    write_latents(path, read_latents(path), (32, 16), mask_HW=torch.tensor([[0.0, 1, 1, 1]] * 2))
    with pytest.raises(InputError, match="another run: dataset_sha256"):
        run(files, "--resume", "latest", "--save_as", "slice", "--max_train_epochs", "2")


def test_the_validation_loss_is_masked_too(files):
    _losses(files, lambda h, w: (torch.arange(w) < 1).float().expand(h, w))
    items = _build(files / "data.toml").items[:1]
    model, timesteps = load_dit(files / "base.safetensors", torch.float32), TimestepConfig("uniform")
    where = (timesteps, 10**6, torch.device("cpu"))
    masked = validation_sums(model, items, *where)
    whole = validation_sums(model, [replace(items[0], masked=False)], *where)
    assert masked[1, 0] == whole[1, 0] and masked[0, 0] != whole[0, 0]


def test_a_run_with_white_masks_is_the_run_without_masks_bit_for_bit_and_others_are_not(files):
    without, white = _losses(files, None), _losses(files, torch.ones)
    assert all(torch.equal(without[key], white[key]) for key in without)
    left = _losses(files, lambda h, w: (torch.arange(w) < w // 2).float().expand(h, w))
    assert not all(torch.equal(without[key], left[key]) for key in without)
