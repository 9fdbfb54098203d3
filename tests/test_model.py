"""The transformer against the official one's numbers, diffusers' model and the names of the released checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from wan.configs import TASKS, WanConfig
from wan.errors import InputError
from wan.model import WanModel, rope_frequencies

ORACLE = Path(__file__).parent / "oracle"
RELEASED = {
    name: shapes
    for file in ("checkpoint_keys.json", "checkpoint_keys_more.json")
    for name, shapes in json.loads((ORACLE / file).read_text(encoding="utf-8")).items()
}
RELEASED_NAMES = {
    "t2v-14B": "t2v-14B and t2v-A14B",
    "t2i-14B": "t2v-14B and t2v-A14B",
    "t2v-A14B": "t2v-14B and t2v-A14B",
}
TINY = WanConfig(
    "t2v", dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=20, freq_dim=16, text_len=6
)


def read_oracle(name: str) -> tuple[dict[str, torch.Tensor], WanConfig]:
    with safe_open(ORACLE / f"{name}.safetensors", framework="pt") as file:
        fields = json.loads(file.metadata()["config"])
        fields["image_dim"] = int(file.metadata()["clip_dim"]) if "clip_dim" in file.metadata() else None
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, WanConfig(**{**fields, "patch_size": tuple(fields["patch_size"])})


def oracle_model(name: str) -> tuple[WanModel, dict[str, torch.Tensor], tuple]:
    tensors, config = read_oracle(name)
    model = WanModel(config)
    model.load_state_dict(
        {key.removeprefix("weight."): value for key, value in tensors.items() if "weight." in key[:7]}
    )
    context = [tensors["input.context.0"], tensors["input.context.1"]]
    y, image_embeds = tensors.get("input.y"), tensors.get("input.clip_fea")
    if image_embeds is not None:  # the official code has the first and the last picture of a sample as two rows
        image_embeds = image_embeds.reshape(len(context), -1, model.config.image_dim)
    return model, tensors, (tensors["input.x"], tensors["input.t"], context, y, image_embeds)


def tiny_model(config: WanConfig = TINY) -> WanModel:
    torch.manual_seed(0)
    return WanModel(config)


def tiny_inputs(channels: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, 2, 6, 4, generator=generator)
    context = [torch.randn(2 + sample, 20, generator=generator) for sample in range(batch)]
    return x, torch.linspace(50.0, 930.0, batch), context


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v_a14b", "dit_i2v_clip", "dit_flf2v", "dit_ti2v5b"])
def test_output_is_the_official_models(name):
    model, tensors, inputs = oracle_model(name)
    with torch.no_grad():
        output = model(*inputs)
    assert output.dtype == torch.float32
    assert relative(output, tensors["output"]) < 1e-5
    torch.testing.assert_close(F.mse_loss(output, tensors["target"]), tensors["loss"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v_clip", "dit_flf2v", "dit_ti2v5b"])
def test_gradients_are_the_official_models(name):
    model, tensors, inputs = oracle_model(name)
    F.mse_loss(model(*inputs), tensors["target"]).backward()
    gradients = {f"grad.{parameter}": p.grad for parameter, p in model.named_parameters()}
    known = {key for key in tensors if key.startswith("grad.")}
    assert known and max(relative(gradients[key], tensors[key]) for key in known) < 1e-4


def test_the_oracle_has_a_gradient_for_every_block_parameter():
    tensors, config = read_oracle("dit_t2v")
    names = {name for name, _ in WanModel(config).named_parameters() if name.startswith("blocks.")}
    assert {key for key in tensors if key.startswith("grad.")} == {f"grad.{name}" for name in names}


@pytest.mark.parametrize("task", TASKS)
def test_names_and_shapes_are_the_released_checkpoints(task):
    with torch.device("meta"):
        model = WanModel(TASKS[task].config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == RELEASED[RELEASED_NAMES.get(task, task)]


@pytest.mark.parametrize("per_token", [False, True])
def test_diffusers_computes_the_same_from_the_converted_weights(per_token):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=20, freq_dim=16,
        ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    ours = tiny_model()
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(ours.state_dict())), strict=True)
    x, t, context = tiny_inputs()
    if per_token:
        t = torch.tensor([0.0, 40.5, 812.0])[torch.arange(2 * 12).reshape(2, 12) % 3]
    padded = torch.stack([F.pad(tokens, (0, 0, 0, 6 - len(tokens))) for tokens in context])
    with torch.no_grad():
        output, reference = ours(x, t, context), theirs(x, t, padded, return_dict=False)[0]
    assert relative(output, reference) < 1e-5


def test_one_timestep_for_all_tokens_is_that_of_the_sample():
    model, (x, t, context) = tiny_model(), tiny_inputs()
    torch.testing.assert_close(model(x, t[:, None].expand(-1, 12), context), model(x, t, context), rtol=1e-5, atol=1e-6)


def test_a_timestep_per_token_reaches_that_token():
    model, (x, t, context) = tiny_model(), tiny_inputs(batch=1)
    per_token = t[:, None].repeat(1, 12)
    per_token[:, 0] = 0.0
    change = (model(x, per_token, context) - model(x, t, context)).abs()[0].sum(dim=0)
    assert change[0, :2, :2].min() > 10 * change[1].max() > 0


def test_samples_of_a_batch_do_not_see_each_other():
    model, (x, t, context) = tiny_model(), tiny_inputs()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(x, t, context), alone, rtol=1e-5, atol=1e-6)


def test_text_shorter_than_text_len_is_padded_with_zeros_that_count():
    model, (x, t, context) = tiny_model(), tiny_inputs(batch=1)
    padded = [F.pad(context[0], (0, 0, 0, 4))]
    assert torch.equal(model(x, t, context), model(x, t, padded))
    model.text_len = 2
    assert relative(model(x, t, context), model(x, t, [context[0][:1]])) > 1e-4


def test_text_longer_than_text_len_is_refused():
    model, (x, t, _) = tiny_model(), tiny_inputs(batch=1)
    with pytest.raises(InputError, match=r"9 tokens.*at most 6"):
        model(x, t, [torch.zeros(9, 20)])


@pytest.mark.parametrize("per_token", [False, True])
def test_bfloat16_stays_close_to_float32(per_token):
    model, _, (x, t, context, _, _) = oracle_model("dit_t2v")
    if per_token:
        t = t[:, None].expand(-1, 72)
    with torch.no_grad():
        reference = model(x, t, context)
        output = model.bfloat16()(x, t, context)
    assert model.dtype == torch.bfloat16 and output.dtype == torch.float32
    assert relative(output, reference) < 0.015


def test_bfloat16_keeps_the_residual_stream_in_bfloat16_with_gradients_to_text_and_weights():
    model, (x, t, context) = tiny_model().bfloat16(), tiny_inputs()
    seen = []
    model.blocks[1].register_forward_hook(
        lambda _, args, output: seen.extend([args[0].dtype, args[1].dtype, output.dtype])
    )
    context = [tokens.requires_grad_() for tokens in context]
    model(x, t, context).square().mean().backward()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert all(tokens.grad.abs().sum() > 0 for tokens in context)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_timesteps_in_bfloat16_models_are_not_rounded():
    model = tiny_model().bfloat16()
    near = [model.embed_time(torch.tensor([t]))[1] for t in (900.0, 900.5)]  # one value in bfloat16
    assert relative(near[0], near[1]) > 1e-3


def test_rope_tables_follow_the_formula_for_each_axis():
    freqs = rope_frequencies(128, (2, 3, 4), torch.device("cpu")).squeeze(1).reshape(2, 3, 4, 64)
    for pair, axis_pair, width, position in ((3, 3, 44, 1), (22 + 5, 5, 42, 2), (43 + 20, 20, 42, 3)):
        angle = torch.tensor(position * 10000.0 ** (-2 * axis_pair / width), dtype=torch.float64)
        torch.testing.assert_close(freqs[1, 2, 3, pair], torch.polar(torch.ones_like(angle), angle).to(freqs.dtype))


def test_importing_what_loads_models_needs_torch_and_einops_alone():
    modules = "wan.loading, wan.vae, wan.image_encoder"
    code = f"import sys, {modules}; print({{'diffusers', 'transformers', 'av', 'bitsandbytes'}} & sys.modules.keys())"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"
