"""Slices of models that read pictures or timesteps per token: their files, the slice commands, and as LoRA."""

import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers
from safetensors.torch import load_file, save_file
from test_picture_models import diffusers_model, tiny_inputs
from test_slice_lora import merged
from tiny_chain import CONFIG, METADATA, write_chain
from torch.nn import functional as F

from utils.cli.slices import main
from utils.selective_finetune import attach_slice, slice_indices
from utils.slice_saving import base_identity
from utils.slices.commands import verify
from utils.training_debug import TrainingDebug
from wan.errors import InputError
from wan.loading import config_from_header, load_dit, read_checkpoint_header

CONFIGS = {
    "i2v with CLIP": replace(CONFIG, model_type="i2v", in_dim=36, image_dim=10),
    "i2v": replace(CONFIG, model_type="i2v", in_dim=36),
    "flf2v": replace(CONFIG, model_type="flf2v", in_dim=36, image_dim=10),
    "ti2v": replace(CONFIG, model_type="ti2v", in_dim=48, out_dim=48),
}


@pytest.fixture(scope="module", params=CONFIGS)
def chain(request, tmp_path_factory):
    """The files of tiny_chain, of one of the models."""
    return write_chain(tmp_path_factory.mktemp("chain"), CONFIGS[request.param])


def config_of(folder):
    return config_from_header(read_checkpoint_header(folder / "base.safetensors"))


def block_matrices(weights):
    return {name for name, tensor in weights.items() if name.startswith("blocks.") and tensor.dim() == 2}


def differing(one, other):
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def test_a_chain_changes_every_block_matrix_and_nothing_else_and_passes_verify(chain, capsys):
    base, last = load_file(chain / "base.safetensors"), load_file(chain / "two.safetensors")
    own = 12 if config_of(chain).image_dim else 10
    assert len(block_matrices(base)) == 3 * own
    assert differing(base, last) == block_matrices(base) == set(load_file(chain / "one.slice.safetensors"))
    entries, findings = verify(chain / "two.safetensors", chain / "base.safetensors")
    assert [entry.name for entry in entries] == ["one", "two"] and findings == []
    main(["list", *map(str, sorted(chain.glob("*.safetensors")))])
    assert "two" in capsys.readouterr().out


def test_applied_slices_are_the_chain_byte_for_byte_and_removed_ones_the_rest_of_it(chain, tmp_path):
    base, one, two = (str(chain / f"{name}.safetensors") for name in ("base", "one", "two"))
    main(["extract", two, "--base", base, "-o", str(tmp_path)])
    files = [str(tmp_path / f"{name}.slice.safetensors") for name in ("two", "one")]
    main(["apply", base, *files, "-o", str(tmp_path / "both.safetensors")])
    assert not differing(load_file(tmp_path / "both.safetensors"), load_file(two))
    main(["remove", two, "two", "--base", base, "-o", str(tmp_path / "first.safetensors")])
    assert not differing(load_file(tmp_path / "first.safetensors"), load_file(one))
    main(["scale", files[1], "0", "--base", base, "-o", str(tmp_path / "nothing.safetensors")])
    main(["apply", base, str(tmp_path / "nothing.safetensors"), "-o", str(tmp_path / "again.safetensors")])
    assert not differing(load_file(tmp_path / "again.safetensors"), load_file(base))


def test_the_base_identity_stays_along_the_chain_and_covers_what_reads_the_picture(chain, tmp_path):
    identity = base_identity([chain / "base.safetensors"])
    assert base_identity([chain / "two.safetensors"]) == identity
    weights = load_file(chain / "base.safetensors")
    frozen = [name for name in weights if name.startswith(("patch_embedding", "img_emb")) or "norm_k_img" in name]
    assert len(frozen) in (2, 2 + 8 + 3, 2 + 9 + 3)
    for name in frozen:
        save_file({**weights, name: weights[name] + 1}, tmp_path / "other.safetensors", METADATA)
        assert base_identity([tmp_path / "other.safetensors"]) != identity, name


def test_a_slice_of_another_model_is_refused(chain, tmp_path):
    config = config_of(chain)
    wider = replace(config, in_dim=36, model_type="i2v", out_dim=16) if config.in_dim != 36 else replace(config, dim=96)
    write_chain(tmp_path, wider)
    with pytest.raises(InputError, match="is not the base of"):
        main(
            [
                "apply",
                *map(
                    str,
                    (tmp_path / "base.safetensors", chain / "one.slice.safetensors", "-o", tmp_path / "x.safetensors"),
                ),
            ]
        )


def test_an_fp8_base_takes_no_slice(chain, tmp_path):
    weights = load_file(chain / "base.safetensors")
    cast = {name: weights[name].to(torch.float8_e4m3fn) for name in block_matrices(weights)}
    save_file({**weights, **cast}, tmp_path / "fp8.safetensors", METADATA)
    slice_file, out = chain / "one.slice.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(InputError) as caught:
        main(["apply", *map(str, (tmp_path / "fp8.safetensors", slice_file, "-o", out))])
    assert "\n" not in str(caught.value) and not out.exists()


def to_lora(chain, tmp_path, *more):
    out = tmp_path / "lora.safetensors"
    files = [chain / "one.slice.safetensors", "--base", chain / "base.safetensors", "-o", out, "--overwrite"]
    main(["to-lora", *map(str, files), *more])
    return out


def test_base_and_lora_round_to_the_trained_weights_in_every_matrix(chain, tmp_path):
    lora = load_file(to_lora(chain, tmp_path))
    assert len(lora) == 3 * len(block_matrices(load_file(chain / "base.safetensors")))
    found = merged(load_file(chain / "base.safetensors"), dict(lora))
    trained = load_file(chain / "one.safetensors")
    assert all(torch.equal(found[name].bfloat16(), tensor) for name, tensor in trained.items())


def test_diffusers_reads_both_kinds_of_names_as_one_lora(chain, tmp_path):
    converted = _convert_musubi_wan_lora_to_diffusers(load_file(to_lora(chain, tmp_path)))
    ours = load_file(to_lora(chain, tmp_path, "--names", "diffusers"))
    assert converted.keys() == ours.keys() and all(torch.equal(converted[name], ours[name]) for name in ours)


def flow_of(model, config, inputs):
    """What diffusers' model predicts of the inputs that ours takes."""
    x, t, context, *others = inputs
    padded = torch.stack([F.pad(tokens, (0, 0, 0, 512 - len(tokens))) for tokens in context])
    clip = others[1].reshape(-1, 257, config.image_dim) if len(others) > 1 else None
    joined = torch.cat([x, others[0]], 1) if others else x
    return model(joined, t, padded, clip, return_dict=False)[0]


def test_the_lora_in_diffusers_computes_what_the_trained_checkpoint_does(chain, tmp_path):
    config = config_of(chain)
    base, trained = (load_dit(chain / f"{name}.safetensors", torch.float32) for name in ("base", "one"))
    trained.text_len = 512  # diffusers takes the tokens before the last 512 for the picture's
    theirs, inputs = diffusers_model(base), tiny_inputs(config)
    with torch.no_grad():
        before, expected = flow_of(theirs, config, inputs), trained(*inputs)
        theirs.load_lora_adapter(str(to_lora(chain, tmp_path, "--names", "diffusers")), prefix="transformer")
        after = flow_of(theirs, config, inputs)
        checkpoint = flow_of(diffusers_model(trained), config, inputs)
    size = (expected - before).norm()
    assert size > 0.01 * expected.norm() and (checkpoint - expected).norm() < 1e-5 * expected.norm()
    assert (after - expected).norm() < 1e-4 * size


def test_training_debug_counts_what_moved_in_every_matrix(chain):
    model = load_dit(chain / "base.safetensors", torch.bfloat16)
    trained = attach_slice(model, "0.05", 2)
    debug = TrainingDebug(trained, len(model.blocks), [chain / "base.safetensors"])
    loss = model(*tiny_inputs(config_of(chain))).square().mean()
    loss.backward()
    debug.before_update()
    torch.optim.SGD(trained.parameters(), 1.0).step()
    trained.write_back()
    debug.after_update()
    lines = debug.after_step(1, [])
    assert debug.counts.sum() == trained.count and any(line.split()[:1] == ["all"] for line in lines)
    assert not any("WARNING" in line for line in lines)


@pytest.mark.parametrize("part", ["k_img", "v_img"])
def test_the_slice_of_a_matrix_that_reads_the_picture_is_that_of_the_contract_by_hand(part):
    name, (rows, columns), start, stop = f"blocks.2.cross_attn.{part}.weight", (24, 24), 57, 86  # ff 0.05, ffid 3
    words = hashlib.shake_256(f"wan-slice-1:{name}".encode()).digest(8 * columns)
    order = sorted(range(columns), key=lambda c: (int.from_bytes(words[8 * c : 8 * c + 8], "little"), c))
    expected = []
    for position in range(start, stop):
        unit, row = divmod(position, rows // 8)
        lap, place = divmod(unit, columns)
        expected.append(((place + lap) % 8 * (rows // 8) + row) * columns + order[place])
    assert slice_indices(name, (rows, columns), "0.05", 3).tolist() == expected
