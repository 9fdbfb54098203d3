"""The CLIP image encoder against the official one's tokens, and the files it comes from."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan.errors import InputError
from wan.image_encoder import clip_pixels, encoder_sizes, load_image_encoder, transformers_tensors

ORACLE = Path(__file__).parent / "oracle"
HEADS = {"num_heads": "2"}


@pytest.fixture(scope="module")
def oracle():
    return load_file(ORACLE / "clip_vision.safetensors")


@pytest.fixture(scope="module")
def weights(oracle):
    return {name.removeprefix("weight."): oracle[name] for name in oracle if name.startswith("weight.")}


def write(path, weights, metadata=HEADS):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata)
    return path


def picture(oracle, number):
    return ((oracle[f"input.image.{number}"].float() / 255 - 0.5) / 0.5)[None]


def encoded(path, oracle, dtype=torch.float32):
    encoder = load_image_encoder(path, dtype)
    return torch.cat([encoder.encode(picture(oracle, number)) for number in range(2)])


def relative(got, wanted):
    return ((got.float() - wanted).norm() / wanted.norm()).item()


def comfy_names(weights):
    """ComfyUI's layout: transformers' names in all blocks, and what is beside them."""
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=72, num_hidden_layers=3, num_attention_heads=2, patch_size=14
    )
    last = {name: tensor for name, tensor in CLIPVisionModel(config).state_dict().items() if "layers.2." in name}
    inside = transformers_tensors(weights, "test") | {name.removeprefix("vision_model."): last[name] for name in last}
    beside = {
        "visual_projection.weight": torch.zeros(24, 24),
        "vision_model.embeddings.position_ids": torch.arange(257),
    }
    return {f"vision_model.{name}": tensor for name, tensor in inside.items()} | beside


def visual_part(weights):
    return {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}


@pytest.mark.parametrize("layout", [dict, visual_part, comfy_names])
def test_tokens_are_the_official_ones_from_every_layout(oracle, weights, tmp_path, layout):
    tokens = encoded(write(tmp_path / "clip.safetensors", layout(weights)), oracle)
    assert tokens.shape == (2, 257, 24)
    assert relative(tokens, oracle["output"]) < 1e-5


def test_pictures_are_squashed_to_a_square_without_antialiasing(oracle):
    for number in range(2):
        pixels = clip_pixels(picture(oracle, number), 224)[0, :, ::8, ::8]
        torch.testing.assert_close(pixels, oracle[f"pixels.{number}"], rtol=0, atol=1e-5)


def test_float16_stays_close(oracle, weights, tmp_path):
    tokens = encoded(write(tmp_path / "clip.safetensors", weights), oracle, torch.float16)
    assert tokens.dtype == torch.float16 and relative(tokens, oracle["output"]) < 3e-3


def test_a_pth_file_gives_heads_of_width_80(weights, tmp_path):
    wider = {24: 160, 72: 480}
    wide = {name: torch.zeros([wider.get(n, n) for n in tensor.shape]) for name, tensor in weights.items()}
    torch.save(wide, tmp_path / "clip.pth")
    encoder = load_image_encoder(tmp_path / "clip.pth")
    assert encoder.model.config.num_attention_heads == 2 and encoder.dtype == torch.float32
    assert encoder.encode(torch.zeros(3, 3, 5, 7)).shape == (3, 257, 160)


def test_every_name_and_shape_of_the_full_encoder_is_taken():
    wanted = json.loads((ORACLE / "checkpoint_keys_more.json").read_text(encoding="utf-8"))["clip-xlm-roberta-vit-h-14"]
    with torch.device("meta"):
        tensors = transformers_tensors({name: torch.empty(shape) for name, shape in wanted.items()}, "test")
        sizes = encoder_sizes(tensors, {}, "test")
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    taken = {name.removeprefix("vision_model."): tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == taken
    assert (sizes["num_hidden_layers"], sizes["num_attention_heads"], sizes["image_size"]) == (31, 16, 224)


def test_weights_are_frozen(weights, tmp_path):
    model = load_image_encoder(write(tmp_path / "clip.safetensors", weights)).model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)])
def test_other_shapes_are_refused(weights, tmp_path, shape):
    encoder = load_image_encoder(write(tmp_path / "clip.safetensors", weights))
    with pytest.raises(InputError, match="pictures have the shape"):
        encoder.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual.pre_norm.bias": None}, "lacks tensors"),
        ({"visual.more": torch.zeros(2)}, "has unknown tensors: more"),
        ({"visual.pos_embedding": torch.zeros(1, 256, 24)}, "256 tokens are not one and a square of patches"),
        ({"visual.patch_embedding.weight": None}, "neither visual.patch_embedding.weight nor vision_model."),
        ({"visual.patch_embedding.weight": torch.zeros(24, 3)}, "is [24, 3]"),
        ({"visual.transformer.0.attn.to_qkv.weight": torch.zeros(71, 24)}, "to_qkv.weight is [71, 24]"),
    ],
)
def test_other_files_are_refused(weights, tmp_path, change, says):
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    path = write(tmp_path / "clip.safetensors", changed)
    with pytest.raises(InputError, match=f"clip.safetensors is not a CLIP image encoder: .*{re.escape(says)}"):
        load_image_encoder(path)


@pytest.mark.parametrize("metadata", [{"num_heads": "5"}, {"num_heads": "x"}, None])
def test_a_width_that_no_heads_share_is_refused(weights, tmp_path, metadata):
    with pytest.raises(InputError, match="width 24 cannot be split into"):
        load_image_encoder(write(tmp_path / "clip.safetensors", weights, metadata))
