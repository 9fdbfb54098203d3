"""LoRAs beside a model: every trainer's names and scales, against slices and PEFT, and with weights that stream."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from fake_device import FakeDevice
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_chain import train_concept, write_base
from tiny_pictures import CONFIGS, tiny_model
from tiny_run import write_dit, write_sample_models

from utils.cli.slices import main
from utils.selective_finetune import attach_slice
from utils.slices.lora_files import _linears, read_loras
from utils.slices.loras_beside import lora_bytes_beside, lora_lines, loras_beside
from utils.swap.placement import LoadedWeights, place_model
from utils.swap.plan import SwapConfig
from wan.errors import InputError
from wan.loading import load_dit
from wan_generate_video import main as generate

CONFIG = CONFIGS["i2v-14B"]
STYLES = {  # made of our own export with the names of diffusers or of musubi-tuner
    "musubi-tuner": ("comfyui", lambda name: name),
    "Kohya": ("comfyui", lambda name: name.replace("lora_unet_", "lycoris_")),
    "diffusers": ("diffusers", lambda name: name),
    "PEFT": ("diffusers", lambda name: name.replace("transformer.", "base_model.model.")),
    "PEFT, named": ("diffusers", lambda name: name.replace("transformer.", "").replace(".weight", ".default.weight")),
    "old diffusers": ("diffusers", lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An i2v base in float32, a slice of it as a checkpoint, and the slice as a LoRA with both kinds of names."""
    folder = tmp_path_factory.mktemp("beside")
    write_base(folder / "base.safetensors", torch.float32, config=CONFIG)
    train_concept(folder / "base.safetensors", folder, "one", "0.05", 2)
    files = [str(folder / "one.slice.safetensors"), "--base", str(folder / "base.safetensors")]
    for names in ("comfyui", "diffusers"):
        main(["to-lora", *files, "-o", str(folder / f"{names}.safetensors"), "--names", names])
    return folder


def output(model, loras=()):
    draw = torch.Generator().manual_seed(5)
    rest = [torch.randn(2, 20, 2, 4, 4, generator=draw), torch.randn(2, 257, 24, generator=draw)]
    x, text = torch.randn(2, 16, 2, 4, 4, generator=draw), torch.randn(3, 24, generator=draw)
    text = torch.cat([text, text], dim=1)[:, : model.config.text_dim]
    with torch.no_grad(), loras_beside(model, loras, "cpu"):
        return model(x, torch.tensor([700.0, 20.0]), [text, text[:2]], *rest)


def random_lora(path, draw=1, alpha=None, modules=("blocks.0.self_attn.q", "blocks.1.ffn.0"), rank=3, bias=False):
    """A LoRA with ComfyUI's names beside `modules`; its file, and up @ down by the weight's name."""
    generator, tensors, products = torch.Generator().manual_seed(draw), {}, {}
    for name in modules:
        outputs, inputs = _linears(CONFIG)[0][name]
        down, up = (torch.randn(size, generator=generator) / 9 for size in ((rank, inputs), (outputs, rank)))
        tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        tensors |= {} if alpha is None else {f"diffusion_model.{name}.alpha": torch.tensor(alpha)}
        tensors |= {f"diffusion_model.{name}.diff_b": torch.ones(outputs)} if bias else {}
        products[f"{name}.weight"] = up @ down * (1 if alpha is None else alpha / rank)
    save_file(tensors, path)
    return path, products


def merged(*products, bias=()):
    model = tiny_model("i2v-14B")
    with torch.no_grad():
        for name, product in (pair for own in products for pair in own.items()):
            model.get_parameter(name).add_(product)
        for name in bias:
            model.get_parameter(f"{name}.bias").add_(1)
    return output(model)


def close(found, wanted, base=None):
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert base is None or (base - wanted).abs().max() > 1e-3  # what was learned is far larger


@pytest.mark.parametrize("style", STYLES)
def test_the_base_and_our_own_lora_of_a_slice_equal_the_slice_in_every_name_style(folder, tmp_path, style):
    names, renamed = STYLES[style]
    tensors = {renamed(name): tensor for name, tensor in load_file(folder / f"{names}.safetensors").items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    [lora] = read_loras([tmp_path / "lora.safetensors"], [1.0], CONFIG)
    base, one = load_dit(folder / "base.safetensors"), load_dit(folder / "one.safetensors")
    close(output(base, [lora]), output(one), output(base))
    assert len(lora.parts) == 2 * 12 and lora.lines == ()


@pytest.mark.parametrize("task", CONFIGS)
def test_every_layer_of_every_model_is_found_under_its_original_and_its_diffusers_name(task):
    linears, names = _linears(CONFIGS[task])
    weights = {name: tensor for name, tensor in tiny_model(task).state_dict().items() if name != "img_emb.emb_pos"}
    theirs = {id(tensor): name for name, tensor in convert_wan_transformer_to_diffusers(dict(weights)).items()}
    for name in linears:
        known = theirs[id(weights[f"{name}.weight"])].removesuffix(".weight")
        assert {names[own] for own in (name, name.replace(".", "_"), known, known.replace(".", "_"))} == {name}


def test_multipliers_and_alpha_scale_and_several_loras_add_up(tmp_path):
    first, a = random_lora(tmp_path / "a.safetensors", 1, alpha=1.5)
    second, b = random_lora(tmp_path / "b.safetensors", 2, rank=5)
    loras = read_loras([first, second], [0.5, -2.0], CONFIG)
    wanted = merged({name: 0.5 * own for name, own in a.items()}, {name: -2 * own for name, own in b.items()})
    model, before = tiny_model("i2v-14B"), output(tiny_model("i2v-14B"))
    close(output(model, loras), wanted, before)
    assert torch.equal(output(model), before) and not any("forward" in vars(own) for own in model.modules())


def test_layers_outside_the_blocks_and_biases_are_changed_too(tmp_path):
    modules = ("time_projection.1", "text_embedding.0", "img_emb.proj.3", "head.head", "blocks.1.cross_attn.k_img")
    path, products = random_lora(tmp_path / "a.safetensors", modules=modules, bias=True)
    found = output(tiny_model("i2v-14B"), read_loras([path], [1.0], CONFIG))
    close(found, merged(products, bias=modules), output(tiny_model("i2v-14B")))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_the_scale_of_an_adapter_of_peft_is_its_own(tmp_path, rslora, place):
    targets = r"blocks\.\d\.(self_attn\.[qk]|ffn\.2)"
    rest = {"alpha_pattern": {"self_attn.q": 2}, "init_lora_weights": False, "use_rslora": rslora}
    adapter = get_peft_model(tiny_model("i2v-14B"), LoraConfig(r=4, lora_alpha=7, target_modules=targets, **rest))
    adapter.save_pretrained(tmp_path)
    path, settings = tmp_path / "adapter_model.safetensors", (tmp_path / "adapter_config.json").read_text()
    if place == "metadata":
        table = {f"transformer.{key}": value for key, value in json.loads(settings).items()}
        save_file(load_file(path), tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(table)})
        path = tmp_path / "b.safetensors"
    base = tiny_model("i2v-14B")
    wrapped = adapter.base_model.model
    wrapped_output = output(wrapped)
    close(output(base, read_loras([path], [1.0], CONFIG)), wrapped_output, output(base))


@pytest.mark.parametrize("host", ["pinned", "mapped"])
def test_streamed_weights_stay_as_they_are(folder, tmp_path, host):
    path, _ = random_lora(tmp_path / "a.safetensors", modules=[f"blocks.{i}.ffn.0" for i in range(2)])
    loras = read_loras([path], [1.0], CONFIG)
    wanted = output(load_dit(folder / "base.safetensors"), loras)
    model = load_dit(folder / "base.safetensors", read_only=True)
    swap = SwapConfig(blocks_to_swap=1, host_weights=host)
    mapped = LoadedWeights(mapped=True)
    with place_model(model, "cpu", swap, loaded=mapped, backend=FakeDevice()) as placement:
        before = output(model)
        assert torch.equal(output(model, loras), wanted) and placement.streamed_bytes
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), output(load_dit(folder / "base.safetensors"))) and "forward" not in vars(
        model.blocks[1].ffn[0]
    )


def test_a_slice_that_trains_computes_beside_it_and_is_as_before_when_it_ends(tmp_path):
    path, products = random_lora(tmp_path / "a.safetensors")
    model, trained_alone = tiny_model("i2v-14B"), merged(products)
    trained = attach_slice(model, "0.1", 1)
    before = {name: vars(own.linear)["forward"] for name, own in trained.matrices.items()}
    close(output(model, read_loras([path], [1.0], CONFIG)), trained_alone)
    assert {name: vars(own.linear)["forward"] for name, own in trained.matrices.items()} == before
    assert torch.equal(output(model), output(tiny_model("i2v-14B")))


def refusal(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    with pytest.raises(InputError) as error:
        read_loras([path], [1.0], CONFIG)
    assert "\n" not in str(error.value)
    return str(error.value)


PLAIN = {f"blocks.0.self_attn.q.lora_{part}.weight": torch.ones(48, 48) for part in ("down", "up")}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"blocks.0.norm3.diff": torch.ones(48)}, r"changes a norm (blocks.0.norm3.diff)"),
        ({"blocks.0.norm3.diff_b": torch.ones(48)}, r"changes a norm (blocks.0.norm3.diff_b)"),
        ({"diffusion_model.patch_embedding.diff": torch.ones(48, 36, 1, 2, 2)}, "changes a convolution"),
        ({"patch_embedding.lora_down.weight": torch.ones(4, 36, 1, 2, 2)}, "changes a convolution"),
        ({"blocks.0.ffn.0.diff": torch.ones(64, 48)}, "changes a whole matrix (blocks.0.ffn.0.diff)"),
        ({"blocks.0.ffn.0.hada_w1_a": torch.ones(4)}, "is of another kind, LoHa"),
        ({"blocks.0.ffn.0.lokr_w1": torch.ones(4)}, "is of another kind, LoKr"),
        ({"blocks.0.self_attn.q.dora_scale": torch.ones(48)}, "is of another kind, DoRA"),
        ({"blocks.0.self_attn.q.lora_magnitude_vector.weight": torch.ones(48)}, "is of another kind, DoRA"),
        ({"blocks.0.ffn.0.lora_down.weight": torch.ones(4, 48)}, "is incomplete: blocks.0.ffn.0.lora_down.weight"),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(float("nan"))}, "the alpha of blocks.0.self_attn.q is nan"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(48, 48)}, "is there twice"),
        ({"blocks.0.self_attn.q.lora_up.weight": torch.ones(48, 48) * torch.inf}, "holds NaN or infinite values"),
        ({"blocks.0.self_attn.q.lora_up.weight": torch.ones(96, 48)}, "is [96, 48], and blocks.0.self_attn.q of this"),
        ({"blocks.0.self_attn.q.lora_down.weight": torch.ones(48, 48).int()}, "is I32, not F32, F16, BF16"),
    ],
)
def test_what_cannot_be_computed_beside_the_layers_is_refused_by_name(tmp_path, more, told):
    assert told in refusal(tmp_path / "a.safetensors", PLAIN | more)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("transformer.double_blocks.0.img_attn.qkv.lora_A.weight", "it is one of HunyuanVideo or FLUX"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "it is one of Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "it is one of LTX-Video, Qwen-Image"),
        ("lora_unet_blocks_7_self_attn_q.lora_down.weight", "none of its 1 keys names a matrix of this Wan model"),
    ],
)
def test_a_lora_of_another_model_is_refused_and_named(tmp_path, key, told):
    assert told in refusal(tmp_path / "a.safetensors", {key: torch.ones(4, 48)})


def test_a_slice_file_or_a_checkpoint_in_place_of_a_lora_is_refused(folder):
    for name, told in (("one.slice", "give slice files with --slices"), ("base", "is not a LoRA: none of its")):
        with pytest.raises(InputError, match=told):
            read_loras([folder / f"{name}.safetensors"], [1.0], CONFIG)


def test_keys_without_a_matrix_are_counted_and_named_and_zero_differences_are_no_hindrance(tmp_path):
    unknown = {f"blocks.{i}.self_attn.q.lora_{part}.weight": torch.ones(1) for i in (7, 8) for part in ("down", "up")}
    tensors = {**PLAIN, **unknown, "blocks.0.norm3.diff": torch.zeros(48)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    [lora] = read_loras([tmp_path / "a.safetensors"], [0.5], CONFIG)
    told, zeros = lora.lines
    assert told.startswith("note: 4 of the 7 keys of") and "blocks.7.self_attn.q.lora_down.weight" in told
    assert told.endswith(" and 1 more") and "1 differences of norms or convolutions, which are zero" in zeros
    assert "multiplier 0.5, 4,608 values beside 1 matrices" in lora_lines([lora])[0]
    assert lora_bytes_beside([lora], torch.bfloat16) == 2 * 48 * 48 * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files of a generation with two experts; `one` is a slice of the low-noise one, and a LoRA."""
    folder = tmp_path_factory.mktemp("generation")
    write_sample_models(folder)
    for name, seed in (("low", 0), ("high", 1)):
        write_dit(folder / f"{name}.safetensors", torch.float32, seed)
    for name, base in (("one", "low"), ("two", "high")):
        train_concept(folder / f"{base}.safetensors", folder, name, "0.2", 1)
        files = [str(folder / f"{name}.slice.safetensors"), "--base", str(folder / f"{base}.safetensors")]
        main(["to-lora", *files, "-o", str(folder / f"{name}.lora.safetensors")])
    return folder


def generated(folder, out, low="low", high="high", *more):
    """The latents and the settings of a generation with the experts `low` and `high`."""
    files = {"dit": low, "dit_high_noise": high, "vae": "vae", "t5": "t5"}
    argv = [f"--{flag}={folder / name}.safetensors" for flag, name in files.items()]
    argv += ["--prompt", "a red cat", "--seed", "1", "--infer_steps", "4", "--output_type", "both", "--device", "cpu"]
    argv += ["--task", "t2v-A14B", "--video_size", "32", "32", "--video_length", "1", "--save_path", str(out)]
    generate([*argv, "--vae_dtype", "fp32", *more])
    [latent], [picture] = out.glob("*.safetensors"), out.glob("*.png")
    return load_file(latent)["latent"], json.loads(Image.open(picture).text["wan_sample"])


def test_generation_with_loras_beside_both_experts_is_that_with_their_slices(models, tmp_path):
    files = {"lora_weight": "one", "lora_weight_high_noise": "two"}
    loras = [f"--{flag}={models / name}.lora.safetensors" for flag, name in files.items()]
    swap = ["--blocks_to_swap", "1", "--host_weights", "mapped"]
    found, told = generated(models, tmp_path / "loras", "low", "high", *loras, *swap)
    wanted, _ = generated(models, tmp_path / "slices", "one", "two")
    plain, _ = generated(models, tmp_path / "plain")
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert (plain - wanted).abs().max() > 1e-3
    assert (told["loras"], told["loras_high_noise"]) == (["one.lora 1"], ["two.lora 1"])


def test_a_lora_adds_to_an_fp8_base_what_it_adds_to_the_base(models, tmp_path):
    lora, fp8 = f"--lora_weight={models}/one.lora.safetensors", ["--fp8", "--fp8_scaled", "--blocks_to_swap", "1"]
    names = {"a": [], "b": fp8, "c": [lora], "d": [lora, *fp8]}
    plain, rounded, learned, both = (generated(models, tmp_path / n, "low", "high", *m)[0] for n, m in names.items())
    assert (rounded - plain).abs().max() > 1e-3  # fp8 is another model
    added, wanted = both - rounded, learned - plain
    assert torch.cosine_similarity(added.flatten(), wanted.flatten(), dim=0) > 0.98


def test_generation_with_a_lora_beside_slices_is_that_with_both(models, tmp_path):
    train_concept(models / "one.safetensors", tmp_path, "three", "0.2", 3)
    slices = ["--slices", str(tmp_path / "three.slice.safetensors")]
    found, _ = generated(models, tmp_path / "a", "low", "high", *slices, f"--lora_weight={models}/one.lora.safetensors")
    wanted, _ = generated(models, tmp_path / "b", "one", "high", *slices)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_lora_of_other_widths_is_refused_before_anything_is_encoded(models, tmp_path):
    key = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(4, 24), key.format("B"): torch.ones(24, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"is of another model: .* give a LoRA of this model"):
        generated(models, tmp_path / "out", "low", "high", f"--lora_weight={tmp_path}/a.safetensors")
    assert not (tmp_path / "out").exists()
