"""Cache files as musubi-tuner writes and reads them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.data import cache_files, cache_problems
from utils.data.cache_files import CachedClip
from utils.data.cache_problems import Wanted
from wan.errors import InputError


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_names_are_musubi_tuners():
    folder = Path("cache")
    assert cache_files.image_latents_path(folder, "cat", (640, 96)).name == "cat_0640x0096_wan.safetensors"
    clip = cache_files.clip_latents_path(folder, "cat", 7, 25, (832, 480))
    assert clip.name == "cat_00007-025_0832x0480_wan.safetensors"
    assert cache_files.text_path(folder, "cat").name == "cat_wan_te.safetensors"


@pytest.mark.parametrize("stem", ["cat", "a_0001x0002", "b_00001-005", "ünï code", "x.y"])
def test_names_are_parsed_back(stem):
    image = cache_files.image_latents_path(Path(), stem, (12345, 16))
    assert cache_files.parse_image_name(image, Path()) == (stem, (12345, 16))
    clip = cache_files.clip_latents_path(Path(), stem, 7, 25, (832, 480))
    assert cache_files.parse_clip_name(clip, Path()) == (stem, CachedClip(clip, 7, 25, (832, 480)))


def test_a_pictures_latents_have_musubi_tuners_key_and_metadata(tmp_path):
    latents = torch.randn(16, 1, 4, 6).bfloat16()
    path = cache_files.image_latents_path(tmp_path, "cat", (100, 50))
    cache_files.write_latents(path, latents, (100, 50))
    assert torch.equal(load_file(path)["latents_1x4x6_bfloat16"], latents)
    assert _metadata(path) == {"architecture": "wan", "width": "100", "height": "50", "format_version": "1.0.1"}
    assert cache_files.latents_shape(path) == (16, 1, 4, 6)
    assert torch.equal(cache_files.read_latents(path), latents)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_clips_latents_tell_their_frames(tmp_path):
    cache_files.write_latents(tmp_path / "a", torch.zeros(16, 2, 4, 6), (48, 32), 5)
    assert list(load_file(tmp_path / "a")) == ["latents_2x4x6_float32"]
    assert _metadata(tmp_path / "a")["frame_count"] == "5"


def test_encoded_text_has_musubi_tuners_key_and_metadata(tmp_path):
    tokens = torch.randn(7, 32).bfloat16()
    cache_files.write_text(tmp_path / "a", tokens, "a cat, ünï")
    assert torch.equal(load_file(tmp_path / "a")["varlen_t5_bfloat16"], tokens)
    assert _metadata(tmp_path / "a") == {"architecture": "wan", "caption1": "a cat, ünï", "format_version": "1.0.1"}
    assert cache_files.text_shapes(tmp_path / "a") == [("a cat, ünï", (7, 32))]
    assert torch.equal(cache_files.read_text(tmp_path / "a"), tokens)


def test_other_keys_of_a_text_file_stay_and_its_tokens_are_replaced(tmp_path):
    tensors = {"varlen_t5_float16": torch.ones(3, 8).half(), "other_mask": torch.arange(3)}
    save_file(tensors, tmp_path / "a", {"caption1": "old", "note": "kept"})
    cache_files.write_text(tmp_path / "a", torch.zeros(2, 8), "new")
    assert sorted(load_file(tmp_path / "a")) == ["other_mask", "varlen_t5_float32"]
    assert torch.equal(load_file(tmp_path / "a")["other_mask"], torch.arange(3))
    assert (_metadata(tmp_path / "a")["note"], _metadata(tmp_path / "a")["caption1"]) == ("kept", "new")


def test_image_to_video_caches_give_their_latents(tmp_path):
    tensors = {
        "latents_2x4x6_bfloat16": torch.ones(16, 2, 4, 6).bfloat16(),
        "latents_image_2x4x6_bfloat16": torch.zeros(20, 2, 4, 6).bfloat16(),
        "clip_bfloat16": torch.zeros(257, 8).half(),
    }
    save_file(tensors, tmp_path / "a")
    assert torch.equal(cache_files.read_latents(tmp_path / "a"), tensors["latents_2x4x6_bfloat16"])


def test_only_caches_of_wan_are_listed(tmp_path):
    names = ["b_0064x0064_wan.safetensors", "a_00000-005_0064x0064_wan.safetensors", "a_wan_te.safetensors"]
    for name in [*names, "my_lora_wan.safetensors", "a_0064x0064_hv.safetensors"]:
        (tmp_path / name).touch()
    assert [path.name for path in cache_files.latents_files(tmp_path)] == sorted(names[:2])
    assert [path.name for path in cache_files.text_files(tmp_path)] == names[2:]


NOT_LATENTS = {
    "I16": torch.ones(16, 1, 4, 4).short(),
    "U16": torch.ones(16, 1, 4, 4).to(torch.uint16),
    "F64": torch.ones(16, 1, 4, 4).double(),
    "F8_E4M3": torch.ones(16, 1, 4, 4).to(torch.float8_e4m3fn),
    "[16, 4, 4]": torch.ones(16, 4, 4),
    "[16, 0, 4, 4]": torch.ones(16, 0, 4, 4),
}
NOT_TEXT = {
    "U16": torch.ones(3, 8).to(torch.uint16),
    "I64": torch.ones(3, 8).long(),
    "[3]": torch.ones(3),
    "[0, 8]": torch.ones(0, 8),
    "[1, 3, 8]": torch.ones(1, 3, 8),
}


@pytest.mark.parametrize("found", NOT_LATENTS)
def test_latents_of_a_wrong_kind_or_shape_are_a_problem_that_names_it(tmp_path, found):
    (tmp_path / "a.png").touch()
    save_file({"latents_1x4x4_bfloat16": NOT_LATENTS[found]}, tmp_path / "a")
    problem = cache_problems.latents_problem(tmp_path / "a", tmp_path / "a.png", Wanted(1, (32, 32)))
    assert problem.startswith(f"has a damaged latent cache ({tmp_path / 'a'} holds latents ") and found in problem


@pytest.mark.parametrize("found", NOT_TEXT)
def test_text_of_a_wrong_kind_or_shape_is_a_problem_that_names_it(tmp_path, found):
    save_file({"varlen_t5_bfloat16": NOT_TEXT[found]}, tmp_path / "a", {"caption1": "cat"})
    problem = cache_problems.text_problem(tmp_path / "a", "cat")
    assert problem.startswith(f"has a damaged text cache ({tmp_path / 'a'} holds text ") and found in problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_that_is_not_finite_names_its_file(tmp_path, value, dtype):
    tensors = {"latents_1x4x4_x": torch.zeros(16, 1, 4, 4, dtype=dtype), "varlen_t5_x": torch.zeros(3, 8, dtype=dtype)}
    for tensor in tensors.values():
        tensor.view(-1)[7] = value
    save_file(tensors, tmp_path / "a")
    for read in (cache_files.read_latents, cache_files.read_text):
        with pytest.raises(InputError, match="a holds NaN or infinity"):
            read(tmp_path / "a")


def test_a_damaged_text_cache_is_written_anew(tmp_path):
    (tmp_path / "a").write_bytes(b"damaged")
    cache_files.write_text(tmp_path / "a", torch.zeros(2, 8), "new")
    assert cache_problems.text_problem(tmp_path / "a", ["new"]) is None


def test_folders_and_pipes_are_not_caches(tmp_path):
    (tmp_path / "a_0064x0064_wan.safetensors").mkdir()
    os.mkfifo(tmp_path / "b_wan_te.safetensors")
    assert cache_files.latents_files(tmp_path) == cache_files.text_files(tmp_path) == []


def test_damaged_and_foreign_files_are_named(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="a is not a readable cache file"):
        cache_files.latents_shape(tmp_path / "a")
    save_file({"latents": torch.zeros(2)}, tmp_path / "b")
    with pytest.raises(InputError, match="b holds 0 latents tensors for Wan"):
        cache_files.read_latents(tmp_path / "b")
