"""Models that read pictures or timesteps per token: against diffusers, under slices, and what they keep in memory."""

import copy
from dataclasses import replace

import pytest
import torch
from fake_device import FakeDevice
from safetensors.torch import save_file
from test_model import oracle_model, relative
from torch import nn
from torch.nn import functional as F

from utils.learning.conditions import Conditioning, predict
from utils.selective_finetune import attach_slice, block_linears, slice_indices
from utils.slice_saving import save_checkpoint
from utils.swap.block_inputs import BlockInputs
from utils.swap.placement import LoadedWeights, checkpoint_blocks, place_model, weight_sizes
from utils.swap.plan import SwapConfig, device_bytes, plan_swap
from wan.configs import WanConfig
from wan.loading import load_dit
from wan.model import PICTURE_TOKENS, WanModel

TINY = WanConfig("i2v", 48, 96, 4, 3, 12, 4, text_dim=24, freq_dim=32, text_len=7, image_dim=10)
PAIR = replace(TINY, model_type="flf2v")
PER_TOKEN = WanConfig("ti2v", 48, 96, 4, 3, 4, 4, text_dim=24, freq_dim=32, text_len=7)


def tiny_model(config):
    torch.manual_seed(0)
    model = WanModel(config).requires_grad_(False)
    nn.init.normal_(model.head.head.weight, std=0.1)
    if config.model_type == "flf2v":
        nn.init.normal_(model.img_emb.emb_pos)
    return model


def tiny_inputs(config):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.out_dim, 2, 6, 8, generator=draw)
    context = [torch.randn(n, 24, generator=draw) for n in (3, 7)]
    t = torch.tensor([300.0, 800.0])
    if config.model_type == "ti2v":
        return x, torch.where(torch.arange(24) < 12, torch.tensor([[0.0], [800.0]]), t[:, None]), context
    y = torch.randn(2, config.in_dim - config.out_dim, 2, 6, 8, generator=draw)
    if config.image_dim is None:
        return x, t, context, y
    pictures = 2 if config.model_type == "flf2v" else 1
    return x, t, context, y, torch.randn(2, pictures * PICTURE_TOKENS, config.image_dim, generator=draw)


def loss_of(model):
    return model(*tiny_inputs(model.config)).square().mean()


def diffusers_model(model):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    config, is_pair = model.config, model.config.model_type == "flf2v"
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", image_dim=config.image_dim,
        added_kv_proj_dim=None if config.image_dim is None else config.dim,
        pos_embed_seq_len=2 * PICTURE_TOKENS if is_pair else None,
    )  # fmt: skip
    converted = convert_wan_transformer_to_diffusers(dict(model.state_dict()))
    if is_pair:  # which the converter forgets
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    theirs.load_state_dict(converted, strict=True)
    return theirs


@pytest.mark.parametrize("name", ["dit_i2v_clip", "dit_flf2v", "dit_i2v_a14b", "dit_ti2v5b"])
def test_diffusers_computes_the_same_from_the_converted_weights(name):
    ours, _, (x, t, context, y, image_embeds) = oracle_model(name)
    padded = torch.stack([F.pad(tokens, (0, 0, 0, ours.text_len - len(tokens))) for tokens in context])
    if image_embeds is not None:  # diffusers has the first and the last picture of a sample as two rows
        image_embeds = image_embeds.reshape(-1, PICTURE_TOKENS, ours.config.image_dim)
    joined = x if y is None else torch.cat([x, y], 1)
    with torch.no_grad():
        reference = diffusers_model(ours)(joined, t, padded, image_embeds, return_dict=False)[0]
        image_embeds = None if image_embeds is None else image_embeds.reshape(2, -1, ours.config.image_dim)
        assert relative(ours(x, t, context, y, image_embeds), reference) < 1e-5


@pytest.mark.parametrize("swapped", [0, 3])
@pytest.mark.parametrize("config", [TINY, PAIR, PER_TOKEN], ids=["i2v", "flf2v", "ti2v"])
def test_slice_gradients_equal_those_of_whole_weights(config, swapped):
    model = tiny_model(config)
    whole = copy.deepcopy(model)
    expected = {f"{name}.weight": linear.weight.requires_grad_(True) for name, linear in block_linears(whole).items()}
    loss_of(whole).backward()
    trained = attach_slice(model, "0.05", 3)
    checkpoint_blocks(model)
    place_model(model, "cpu", SwapConfig(swapped), trained)
    loss_of(model).backward()
    assert expected.keys() == trained.matrices.keys()
    for name, matrix in trained.matrices.items():
        own = expected[name].grad.flatten()[slice_indices(name, expected[name].shape, "0.05", 3)]
        torch.testing.assert_close(matrix.difference.grad, own, rtol=1e-5, atol=1e-8)


ODD = [
    replace(kind, dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=1, out_dim=out, in_dim=out + joined, image_dim=clip)
    for kind, joined, clip in ((TINY, 9, 3), (PAIR, 7, 5), (PER_TOKEN, 0, None))
    for dim, ffn, heads, out in ((42, 35, 7, 5), (6, 1, 1, 1))
]


@pytest.mark.parametrize("config", ODD, ids=lambda config: f"{config.model_type}-{config.dim}")
def test_odd_widths_and_a_single_block_train_and_stream_as_well(config):
    model = tiny_model(config)
    whole = copy.deepcopy(model)
    for linear in block_linears(whole).values():
        linear.weight.requires_grad_(True)
    loss_of(whole).backward()
    trained = attach_slice(model, "0.3", 2)
    place_model(model, "cpu", SwapConfig(1, ring_blocks=1), trained, LoadedWeights(mapped=True), FakeDevice("lazy"))
    loss_of(model).backward()
    for name, matrix in trained.matrices.items():
        weight = whole.get_parameter(name)
        own = weight.grad.flatten()[slice_indices(name, weight.shape, "0.3", 2)]
        torch.testing.assert_close(matrix.difference.grad, own, rtol=1e-4, atol=1e-8)


def trained_on_a_fake_device(config, swap, **loaded):
    """Losses and slice of two bf16 steps, each with a pass without gradients before the optimizer's; the placement."""
    model, backend = tiny_model(config).bfloat16(), FakeDevice("lazy")
    trained = attach_slice(model, "0.02", 1)
    checkpoint_blocks(model, BlockInputs(3, torch.device("cpu"), backend))
    placement = place_model(model, "cpu", swap, trained, LoadedWeights(**loaded), backend)
    optimizer, losses = torch.optim.AdamW(trained.parameters(), lr=1e-2), []
    for _ in range(2):
        losses.append(loss_of(model))
        losses[-1].backward()
        with torch.no_grad():
            losses.append(loss_of(model))
        optimizer.step()
        optimizer.zero_grad()
        trained.write_back()
    values = [parameter.detach() for parameter in trained.parameters()]
    return torch.stack(losses).tolist(), torch.cat(values), placement


@pytest.mark.parametrize("host", ["pinned", *(pytest.param(m, marks=pytest.mark.slow) for m in ("staged", "mapped"))])
@pytest.mark.parametrize("config", [TINY, PAIR, PER_TOKEN], ids=["i2v", "flf2v", "ti2v"])
def test_streamed_weights_train_bit_for_bit_like_resident_ones(config, host):
    losses, values, _ = trained_on_a_fake_device(config, SwapConfig(0))
    for swap in (SwapConfig(1, host_weights=host), SwapConfig(3, ring_blocks=1, host_weights=host)):
        again, theirs, placement = trained_on_a_fake_device(config, swap, mapped=True)
        assert again == losses and torch.equal(theirs, values) and placement.host_mode == host
        assert again[0] != again[-1]


@pytest.mark.parametrize("config", [TINY, PAIR, PER_TOKEN], ids=["i2v", "flf2v", "ti2v"])
def test_the_sums_of_weights_hold_what_lies_on_the_device_with_every_matrix_outside_the_blocks(config):
    model = tiny_model(config).bfloat16()
    sizes, outside = weight_sizes(model), [part for part in (model.img_emb, model.text_embedding) if part is not None]
    assert sizes.all == sum(parameter.nbytes for parameter in model.parameters())
    with place_model(model, "cpu", SwapConfig(3, ring_blocks=1), None, LoadedWeights(mapped=True), FakeDevice()) as own:
        assert own.device_bytes == device_bytes(sizes, plan_swap(sizes, SwapConfig(3, ring_blocks=1)))
        assert own.streamed_bytes == sizes.outside + 3 * sum(sizes.matrices)
        linears = [linear for part in outside for linear in part.modules() if isinstance(linear, nn.Linear)]
        assert all("forward" in vars(linear) for linear in linears) and len(linears) == 2 * len(outside)


def test_the_matrices_that_read_the_picture_take_part_in_slices():
    names = attach_slice(tiny_model(TINY), "0.01", 1).matrices.keys()
    own = {f"blocks.{block}.cross_attn.{part}.weight" for block in range(3) for part in ("k_img", "v_img")}
    assert own <= names and len(names) == 3 * 12 and not any("img_emb" in name for name in names)


def test_a_checkpoint_of_an_image_to_video_model_holds_the_trained_slice(tmp_path):
    model = tiny_model(PAIR).bfloat16()
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"num_heads": "4", "text_len": "7"})
    trained = attach_slice(model, "0.05", 3)
    for difference in trained.parameters():
        nn.init.normal_(difference)
    trained.write_back()
    save_checkpoint(trained, tmp_path / "base.safetensors", tmp_path / "out.safetensors", concept="fox")
    loaded = load_dit(tmp_path / "out.safetensors")
    assert loaded.config == PAIR
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_order_of_two_pictures_counts():
    model = tiny_model(PAIR)
    *inputs, image_embeds = tiny_inputs(PAIR)
    turned = torch.cat(image_embeds.chunk(2, dim=1)[::-1], dim=1)
    assert relative(model(*inputs, turned), model(*inputs, image_embeds)) > 1e-3


@pytest.mark.parametrize("config", [TINY, PAIR, PER_TOKEN], ids=["i2v", "flf2v", "ti2v"])
def test_bfloat16_stays_close_to_float32_also_with_float16_tokens(config):
    model, inputs = tiny_model(config), list(tiny_inputs(config))
    with torch.no_grad():
        reference = model(*inputs)
        if config.image_dim is not None:
            inputs[-1] = inputs[-1].half()
        assert relative(model.bfloat16()(*inputs), reference) < 0.03


def test_clip_tokens_go_to_models_that_read_them_alone():
    x, t, context, y, image_embeds = tiny_inputs(TINY)
    with pytest.raises(AssertionError, match="img_emb"):
        tiny_model(TINY)(x, t, context, y)
    with pytest.raises(AssertionError, match="img_emb"):
        tiny_model(replace(TINY, image_dim=None))(x, t, context, y, image_embeds)


def test_timesteps_per_token_give_a_row_for_each_different_one_not_for_each_token():
    model, seen = tiny_model(PER_TOKEN), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].shape))
    model(*tiny_inputs(PER_TOKEN))
    assert seen == [(1, 3, 6, 48)]  # t = 0, 300 and 800


@pytest.mark.parametrize("config", [TINY, PAIR, PER_TOKEN], ids=["i2v", "flf2v", "ti2v"])
def test_models_run_on_meta_where_no_value_can_be_seen(config):
    x, t, context, *others = (
        [tokens.to("meta") for tokens in given] if isinstance(given, list) else given.to("meta")
        for given in tiny_inputs(config)
    )
    assert tiny_model(config).to("meta")(x, t, context, *others).shape == x.shape


def test_the_timesteps_of_a_clean_first_frame_are_told_apart_without_reading_any():
    model, (x, t, context) = tiny_model(PER_TOKEN).to("meta"), tiny_inputs(PER_TOKEN)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].shape))
    given = Conditioning(starts_clean_B=torch.ones(2, dtype=torch.bool, device="meta"))
    predict(model, x.to("meta"), t[:, 0].to("meta"), [tokens.to("meta") for tokens in context], given)
    assert seen == [(1, 3, 6, 48)]  # 0 and that of each sample
