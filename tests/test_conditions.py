"""What models are given of pictures: the official code's y, the mask by hand, and clean first frames."""

import pytest
import torch
from safetensors.torch import load_file
from test_picture_models import PER_TOKEN, tiny_inputs, tiny_model
from test_vae import ORACLE, known_vae

from utils.learning.conditions import (
    Conditioning,
    noisy_frames,
    picture_condition,
    picture_mask,
    predict,
    token_times,
    with_clean_start,
)
from wan.vae import load_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(known_vae("wan21", tmp_path_factory.mktemp("vae")).path, torch.float32, "cpu")


@pytest.mark.parametrize(("name", "pictures"), [("i2v", ("first",)), ("flf2v", ("first", "last"))])
def test_the_condition_is_that_of_the_official_code(vae, name, pictures):
    oracle = load_file(ORACLE / "i2v_condition.safetensors")
    ours = picture_condition(vae, [oracle[f"resized.{picture}"][None] for picture in pictures], frames=9)[0]
    assert torch.equal(ours[:4], oracle[f"y.{name}"][:4])
    assert (ours - oracle[f"y.{name}"]).norm() < 1e-5 * oracle[f"y.{name}"].norm()


@pytest.mark.parametrize(
    ("frames", "pictures", "given"),
    [(9, 1, {0: 4}), (9, 2, {0: 4, 2: 1}), (1, 1, {0: 4}), (5, 2, {0: 4, 1: 1})],
)
def test_the_mask_has_four_ones_for_the_first_frame_and_the_last_channel_for_the_last(frames, pictures, given):
    mask = picture_mask(frames, pictures, (2, 3))
    assert mask.shape == (4, (frames + 3) // 4, 2, 3)
    assert {frame: int(count) for frame, count in enumerate(mask[:, :, 0, 0].sum(0)) if count} == given
    assert pictures == 1 or mask[3, -1].all()


def test_only_tokens_of_a_clean_first_frame_have_timestep_0():
    times = token_times(torch.tensor([700.0, 300.0]), torch.tensor([True, False]), (2, 1, 3))
    assert times.values_U[times.numbers_BL].tolist() == [[0.0] * 3 + [700.0] * 3, [300.0] * 6]


def test_a_model_predicts_with_token_times_what_it_predicts_with_the_same_timesteps_in_full():
    model, (x, t, context) = tiny_model(PER_TOKEN), tiny_inputs(PER_TOKEN)
    with torch.no_grad():
        ours = predict(model, x, t[:, -1], context, Conditioning(starts_clean_B=torch.tensor([True, False])))
        assert (ours - model(x, t, context)).norm() < 1e-6 * ours.norm()
        assert (ours - model(x, t[:, -1], context)).norm() > 1e-3 * ours.norm()


def test_a_clean_start_replaces_the_first_latent_frame_and_leaves_the_loss():
    noisy, clean, starts = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2), torch.tensor([True, False])
    given = with_clean_start(noisy, clean, starts)
    assert torch.equal(given[0, :, 0], clean[0, :, 0]) and torch.equal(given[0, :, 1], noisy[0, :, 1])
    assert torch.equal(given[1], noisy[1])
    assert noisy_frames(starts, 2).flatten(1).tolist() == [[0.0, 1.0], [1.0, 1.0]]
