"""The whole story on the embedded tiny Wan, through the scripts' own main(): cache, two concepts, pictures."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image
from safetensors.torch import load_file

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from utils.selective_finetune import slice_indices
from wan.loading import load_dit

TINY_WAN = Path(__file__).parents[1] / "examples" / "tiny_wan"
BASE = str(TINY_WAN / "tiny_wan_t2v.safetensors")
VAE = str(TINY_WAN / "tiny_wan_vae.safetensors")
T5 = str(TINY_WAN / "models_t5_tiny.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where two concepts were trained, each for two steps, the second on the first one's checkpoint."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "pictures").mkdir()
    for number, colour in enumerate(["red", "green"]):
        Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text("character1", encoding="utf-8")
    toml = folder / "dataset.toml"
    toml.write_text(
        '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = 2\nenable_bucket = true\n'
        f"[[datasets]]\nimage_directory = '{(folder / 'pictures').as_posix()}'\nnum_repeats = 2\n",
        encoding="utf-8",
    )
    wan_cache_latents.main(["--dataset_config", str(toml), "--vae", VAE])
    wan_cache_text_encoder_outputs.main(["--dataset_config", str(toml), "--t5", T5, "--batch_size", "16"])
    _train(toml, BASE, "1", "character1")
    _train(toml, str(folder / "saves" / "character1.safetensors"), "2", "character2")
    return folder


def _train(toml, dit, ffid, name):
    flags = ["--task", "t2v-A14B", "--dit", dit, "--dataset_config", str(toml), "--sdpa", "--mixed_precision", "bf16"]
    flags += ["--optimizer_type", "adamW8bit", "--learning_rate", "1e-2", "--gradient_checkpointing", "--seed", "1234"]
    flags += ["--max_train_epochs", "1", "--max_data_loader_n_workers", "0", "--blocks_to_swap", "3"]
    flags += ["--output_dir", str(toml.parent / "saves"), "--output_name", name, "--ff", "0.01", "--ffid", ffid]
    wan_train_network.main(flags)


@pytest.mark.parametrize(("before", "after", "ffid"), [(None, "character1", 1), ("character1", "character2", 2)])
def test_a_checkpoint_differs_from_its_base_in_its_slice_alone(folder, before, after, ffid):
    old = load_file(folder / "saves" / f"{before}.safetensors" if before else BASE)
    new = load_file(folder / "saves" / f"{after}.safetensors")
    moved = 0
    for name, tensor in new.items():
        changed = (tensor.view(torch.int16) != old[name].view(torch.int16)).flatten()
        if name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight"):
            inside = slice_indices(name, tensor.shape, "0.01", ffid)
            moved += int(changed[inside].sum())
            changed[inside] = False
        assert not changed.any(), name
    assert moved > 10_000


def test_diffusers_reads_the_checkpoint_and_computes_the_same(folder):
    checkpoint = folder / "saves" / "character2.safetensors"
    ours = load_dit(checkpoint, torch.float32)
    config = ours.config
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    converted = convert_wan_transformer_to_diffusers(dict(load_file(checkpoint)))
    theirs.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True, assign=True)
    theirs.rope = type(theirs.rope)(config.dim // config.num_heads, config.patch_size, 1024)
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(5, config.text_dim, generator=draw)
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.text_len - 5))[None]
    with torch.no_grad():
        expected = theirs(x, torch.tensor([700.0]), padded, return_dict=False)[0]
        torch.testing.assert_close(ours(x, torch.tensor([700.0]), [text]), expected, rtol=1e-4, atol=1e-5)


def test_the_second_checkpoint_draws_a_picture(folder):
    flags = ["--task", "t2v-14B", "--video_length", "1", "--infer_steps", "3", "--prompt", "character2", "--seed", "1"]
    flags += [
        "--dit",
        str(folder / "saves" / "character2.safetensors"),
        "--vae",
        VAE,
        "--t5",
        T5,
        "--attn_mode",
        "sdpa",
    ]
    flags += ["--save_path", str(folder / "out"), "--output_type", "both", "--blocks_to_swap", "3"]
    wan_generate_video.main([*flags, "--video_size", "64", "64", "--flow_shift", "3", "--guidance_scale", "1"])
    assert sorted(path.suffix for path in (folder / "out").iterdir()) == [".png", ".safetensors"]


def test_an_overwritten_base_is_refused(folder):
    shutil.copy(BASE, folder / "saves" / "mine.safetensors")
    with pytest.raises(ValueError, match=r"mine\.safetensors"):
        _train(folder / "dataset.toml", str(folder / "saves" / "mine.safetensors"), "1", "mine")


def test_the_tiny_wan_takes_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in TINY_WAN.rglob("*") if path.is_file() and path.suffix != ".pyc") <= 12e6
