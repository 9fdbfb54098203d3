"""The VAEs of Wan 2.1 and 2.2 against the official ones' latents and pictures, and the files they come from."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from wan.errors import InputError
from wan.state_dict_files import load_model, read_state_dict
from wan.vae import WAN_2_1, WAN_2_2, autoencoder_settings, diffusers_name, load_vae

ORACLE = Path(__file__).parent / "oracle"


@dataclass(frozen=True)
class Known:
    """One of Wan's VAEs as the official code computes it, with the file that holds its weights."""

    oracle: dict[str, torch.Tensor]
    path: Path


def known_vae(name, folder):
    oracle = load_file(ORACLE / f"vae_{name}.safetensors")
    path = folder / f"{name}.safetensors"
    save_file({key.removeprefix("weight."): oracle[key] for key in oracle if key.startswith("weight.")}, path)
    return Known(oracle, path)


@pytest.fixture(scope="module")
def wan21(tmp_path_factory):
    return known_vae("wan21", tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def wan22(tmp_path_factory):
    return known_vae("wan22", tmp_path_factory.mktemp("vae"))


@pytest.fixture(params=["wan21", "wan22"])
def known(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def oracle(wan21):
    return wan21.oracle


@pytest.fixture(scope="module")
def weights(wan21):
    return load_file(wan21.path)


@pytest.fixture(scope="module")
def vae_file(wan21):
    return wan21.path


@pytest.fixture(scope="module")
def vae(vae_file):
    return load_vae(vae_file)


def relative(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def test_encoding_is_the_official_normalised_latent(known):
    latents = load_vae(known.path).encode(known.oracle["input.video"])
    assert latents.dtype == torch.float32
    assert relative(latents, known.oracle["latent.normalised"]) < 1e-5


def test_decoding_is_the_official_clip_clamped(known):
    video = load_vae(known.path).decode(known.oracle["latent.normalised"])
    assert video.min() >= -1 and video.max() <= 1
    assert relative(video, known.oracle["decoded.unclamped"].clamp(-1, 1)) < 1e-5


def test_a_lone_picture_is_the_official_one_under_wan_2_2(wan22):
    vae = load_vae(wan22.path)
    latents = vae.encode(wan22.oracle["input.image"])
    assert relative(latents, wan22.oracle["latent.image.normalised"]) < 1e-5
    assert relative(vae.decode(latents), wan22.oracle["decoded.image.unclamped"].clamp(-1, 1)) < 1e-5


def test_a_vae_knows_its_stride_and_channels(wan21, wan22):
    for known, channels, stride in ((wan21, 16, (4, 8, 8)), (wan22, 48, (4, 16, 16))):
        vae, video = load_vae(known.path), known.oracle["input.video"]
        assert (vae.latent_channels, vae.stride) == (channels, stride)
        frames = 1 + (video.shape[2] - 1) // stride[0]
        sizes = [size // step for size, step in zip(video.shape[3:], stride[1:], strict=True)]
        assert known.oracle["latent.normalised"].shape[1:] == (channels, frames, *sizes)


def test_decoding_clamps_what_the_network_overshoots(vae, oracle):
    assert vae.decode(30 * oracle["latent.normalised"][:, :, :1]).abs().max() == 1


def test_constants_are_the_official_ones(wan21, wan22):
    for known, kind in ((wan21, WAN_2_1), (wan22, WAN_2_2)):
        assert torch.equal(torch.tensor(kind.mean), known.oracle["scale.mean"])
        torch.testing.assert_close(torch.tensor(kind.std), known.oracle["scale.std"], rtol=1e-6, atol=0)


def test_bfloat16_stays_close(vae_file, oracle):
    vae = load_vae(vae_file, dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert relative(vae.encode(oracle["input.video"]), oracle["latent.normalised"]) < 0.03
    assert relative(vae.decode(oracle["latent.normalised"]), oracle["decoded.unclamped"].clamp(-1, 1)) < 0.03


def test_a_picture_is_the_first_latent_frame_of_its_video(vae, oracle):
    picture = vae.encode(oracle["input.video"][:, :, :1])
    assert picture.shape == (1, 16, 1, 4, 6)
    assert relative(picture, oracle["latent.normalised"][:, :, :1]) < 1e-5


@pytest.mark.parametrize("frames", [2, 3, 4, 8, 10, 0])
def test_frames_that_would_be_dropped_are_refused(vae, frames):
    with pytest.raises(InputError, match=f"{frames} frames"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize("shape", [(1, 3, 1, 20, 16), (1, 3, 1, 16, 20), (3, 1, 16, 16), (1, 4, 1, 16, 16)])
def test_sizes_that_would_be_cut_are_refused(vae, shape):
    with pytest.raises(InputError):
        vae.encode(torch.zeros(shape))


def test_sizes_that_wan_2_2_would_cut_are_refused(wan22):
    with pytest.raises(InputError, match=r"24x16; the Wan 2.2 VAE encodes sizes that are multiples of 16"):
        load_vae(wan22.path).encode(torch.zeros(1, 3, 1, 16, 24))


@pytest.mark.parametrize("shape", [(1, 48, 1, 2, 2), (16, 1, 2, 2)])
def test_latents_of_another_vae_are_refused(vae, shape):
    with pytest.raises(InputError, match="latents"):
        vae.decode(torch.zeros(shape))


def test_the_vae_of_another_model_is_refused_with_the_one_to_use(wan21, wan22):
    with pytest.raises(InputError, match=r"is the Wan 2.2 VAE \(of ti2v-5B\).* use the Wan 2.1 VAE"):
        load_vae(wan22.path, latent_channels=16)
    with pytest.raises(InputError, match=r"is the Wan 2.1 VAE .* use the Wan 2.2 VAE \(of ti2v-5B\)"):
        load_vae(wan21.path, latent_channels=48)


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [("checkpoint_keys.json", "vae-wan2.1", WAN_2_1), ("checkpoint_keys_more.json", "vae-wan2.2", WAN_2_2)],
)
def test_every_name_and_shape_of_the_full_vae_is_taken(file, name, kind):
    wanted = json.loads((ORACLE / file).read_text(encoding="utf-8"))[name]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in wanted.items()}
        model = AutoencoderKLWan(**autoencoder_settings(tensors, kind))
    taken = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {diffusers_name(name): shape for name, shape in wanted.items()} == taken


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("wrap", [dict, lambda weights: {"state_dict": weights}])
def test_pth_files_give_the_same_weights(vae, weights, tmp_path, prefix, wrap):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(wrap({prefix + name: tensor for name, tensor in weights.items()}), path)
    loaded = load_vae(path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.model.state_dict().items())


def test_weights_are_frozen_and_off_meta(vae):
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in vae.model.parameters())


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if kind == "garbage":
        path.write_bytes(b"<html>not found</html>" * 50)
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "missing":
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "missing"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".gguf"])
def test_broken_files_are_one_clear_line(weights, tmp_path, kind, suffix):
    path = tmp_path / f"vae{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    damage(path, kind)
    with pytest.raises(InputError, match=f"vae{suffix}") as error:
        load_vae(path)
    assert "\n" not in str(error.value)


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "a_pickle_ran_code",)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickles_with_code_are_refused_unrun(weights, tmp_path, save):
    path = tmp_path / "vae.pth"
    save({**weights, "bomb": _Bomb()}, path)
    with pytest.raises(InputError, match=r"vae\.pth"):
        load_vae(path)
    assert not (Path(__file__).parent / "a_pickle_ran_code").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: {**weights, "decoder.upsamples.0.upsamples.0.residual.2.weight": torch.zeros(1)}, "Wan 2.2"),
        (lambda weights: {"blocks.0.ffn.0.weight": torch.zeros(1)}, "not a Wan 2.1 VAE"),
        (lambda weights: {n: w for n, w in weights.items() if n != "conv1.bias"}, "lacks tensors: quant_conv.bias"),
        (lambda weights: {**weights, "more": torch.zeros(1)}, "unknown tensors: more"),
        (lambda weights: {**weights, "conv1.bias": torch.zeros(31)}, "misshapen tensors: quant_conv.bias"),
        (lambda weights: {**weights, "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, "48 latent channels"),
        (lambda weights: {**weights, "conv2.weight": torch.zeros(())}, r"conv2.weight is \[\]"),
    ],
)
def test_other_files_are_refused(weights, tmp_path, change, says):
    path = tmp_path / "other.safetensors"
    save_file(change(weights), path)
    with pytest.raises(InputError, match=says):
        load_vae(path)


def test_weights_of_the_wanted_dtype_are_not_copied(vae_file):
    stored, _ = read_state_dict(vae_file, "VAE")
    named = {diffusers_name(name): tensor for name, tensor in stored.items()}
    model = load_model(lambda: AutoencoderKLWan(base_dim=8), named, torch.float32, "cpu", "test")
    assert model.quant_conv.weight.data_ptr() == stored["conv1.weight"].data_ptr()
