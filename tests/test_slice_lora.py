"""A slice as a LoRA: added in fp32 it is the trained weights; under the names that ComfyUI and diffusers know."""

import json
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_chain import CONFIG, train_concept, write_base

from utils.cli.slices import main
from utils.selective_finetune import slice_units
from utils.slices.ledger import Entry
from utils.slices.lora import write_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base, `one` (less than a lap of each matrix) and `wide` (two laps), whose matrices have different ranks."""
    folder = tmp_path_factory.mktemp("lora")
    write_base(folder / "base.safetensors")
    train_concept(folder / "base.safetensors", folder, "one", "0.05", 2)
    train_concept(folder / "base.safetensors", folder, "wide", "0.21", 3)
    return folder


def to_lora(folder, name, *more):
    out = folder / "lora.safetensors"
    files = [folder / f"{name}.slice.safetensors", "--base", folder / "base.safetensors", "-o", out, "--overwrite"]
    main(["to-lora", *map(str, files), *more])
    return out


def merged(base, lora):
    """What a loader of musubi-tuner's names makes of it: base + alpha / rank * up @ down, in fp32."""
    weights = {name: tensor.float() for name, tensor in base.items()}
    for name in weights:
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{stem}.alpha" in lora:
            down, up = lora.pop(f"{stem}.lora_down.weight").float(), lora.pop(f"{stem}.lora_up.weight").float()
            weights[name] += lora.pop(f"{stem}.alpha").item() / len(down) * (up @ down)
    assert not lora
    return weights


@pytest.mark.parametrize("name", ["one", "wide"])
def test_base_and_lora_in_fp32_round_to_the_trained_weights_in_every_element(folder, name, capsys):
    lora = load_file(to_lora(folder, name))
    found = merged(load_file(folder / "base.safetensors"), dict(lora))
    trained = load_file(folder / f"{name}.safetensors")
    assert all(torch.equal(found[n].bfloat16(), tensor) for n, tensor in trained.items())
    size = sum(tensor.nbytes for tensor in lora.values())
    told = capsys.readouterr().out.splitlines()
    assert f"{size / 1e6:,.1f} MB" in told[0] and "rounds to the trained weights in all" in told[1]


def test_in_bf16_it_is_half_the_size_and_the_share_that_differs_is_told(folder, capsys):
    exact = to_lora(folder, "one").stat().st_size
    capsys.readouterr()
    lora = load_file(to_lora(folder, "one", "--dtype", "bf16"))
    assert (folder / "lora.safetensors").stat().st_size < 0.6 * exact
    found = merged(load_file(folder / "base.safetensors"), lora)
    trained = load_file(folder / "one.safetensors")
    different = sum(int((found[n].bfloat16() != tensor).sum()) for n, tensor in trained.items())
    told = re.search(r"another weight in ([\d,]+) of", capsys.readouterr().out)[1]
    assert int(told.replace(",", "")) == different > 0


def test_a_value_that_no_fp32_lora_can_reach_is_counted(tmp_path):
    units = {"blocks.0.w.weight": slice_units("blocks.0.w.weight", (8, 8), "0.1", 1)}
    start = torch.ones(6, dtype=torch.bfloat16)
    final = torch.tensor([1e-6, 2, 3, 4, 5, 6], dtype=torch.bfloat16)
    entry = Entry(1, "0.1", 1, "one", 1, "")
    report = write_lora(
        tmp_path / "a.safetensors", entry, units, {"blocks.0.w.weight": start}, lambda name: final, "comfyui",
        torch.float32, {},
    )  # fmt: skip
    assert (report.values, report.different) == (6, 1) and "in 1 of 6 values (16.7 %)" in report.line


def diffusers_model(path):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.dim // CONFIG.num_heads,
            in_channels=CONFIG.in_dim, out_channels=CONFIG.out_dim, text_dim=CONFIG.text_dim,
            freq_dim=CONFIG.freq_dim, ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers,
        )  # fmt: skip
    converted = convert_wan_transformer_to_diffusers(dict(load_file(path)))
    model.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True, assign=True)
    return model


@pytest.mark.parametrize("name", ["one", "wide"])
def test_diffusers_loads_it_and_its_fused_weights_are_the_trained_ones(folder, name):
    model, trained = diffusers_model(folder / "base.safetensors"), diffusers_model(folder / f"{name}.safetensors")
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    model.load_lora_adapter(str(to_lora(folder, name, "--names", "diffusers")), prefix="transformer")
    model.fuse_lora()
    fused = {n.replace(".base_layer", ""): tensor for n, tensor in model.state_dict().items() if ".lora_" not in n}
    assert fused.keys() == before.keys()
    for n, tensor in trained.state_dict().items():
        assert torch.equal(fused[n].bfloat16(), tensor.bfloat16()), n
    assert sum(not torch.equal(fused[n], before[n]) for n in before) == 30


def test_a_loader_that_reads_the_config_in_the_file_finds_each_matrix_s_rank(folder):
    with safe_open(to_lora(folder, "one", "--names", "diffusers"), "pt") as file:
        lora = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = file.metadata()["lora_adapter_metadata"]
    model = diffusers_model(folder / "base.safetensors")
    model.load_lora_adapter(lora, prefix="transformer", metadata=json.loads(config))
    for module, layer in model.named_modules():
        if module.endswith("lora_A.default_0"):
            owner = model.get_submodule(module.removesuffix(".lora_A.default_0"))
            assert owner.scaling["default_0"] == 1 and owner.r["default_0"] == layer.weight.shape[0]


def test_diffusers_reads_the_comfyui_names_as_musubi_tuners(folder):
    converted = _convert_musubi_wan_lora_to_diffusers(load_file(to_lora(folder, "one")))
    ours = load_file(to_lora(folder, "one", "--names", "diffusers"))
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)


def test_the_last_line_names_the_loaders_that_take_the_file_and_where_it_is_exact(folder, capsys):
    to_lora(folder, "one")
    comfyui = capsys.readouterr().out.splitlines()[-1]
    to_lora(folder, "one", "--names", "diffusers", "--dtype", "bf16")
    diffusers = capsys.readouterr().out.splitlines()[-1]
    assert "for ComfyUI, musubi-tuner and diffusers' WanPipeline.load_lora_weights;" in comfyui
    assert "exact where it is added in fp32" in comfyui
    assert "ComfyUI and musubi-tuner load nothing from it" in diffusers and "rounds what was learned" in diffusers


def test_a_bare_adapter_loader_takes_nothing_from_the_comfyui_names_as_the_last_line_says(folder):
    model = diffusers_model(folder / "base.safetensors")
    model.load_lora_adapter(str(to_lora(folder, "one")), prefix="transformer")
    assert not any(".lora_" in name for name in model.state_dict())
