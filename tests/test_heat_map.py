"""Pictures of a table of numbers over time."""

import math

import torch

from utils.heat_map import heat_map


def test_a_heat_map_is_bright_where_values_are_large():
    values_RC = torch.tensor([[1e-6, 1e-4], [1e-2, 0.0], [math.nan, math.inf]])
    picture = heat_map(values_RC, "title", ["0", "1", "2"], "step 1", "step 2")
    colours = picture[16 + 6 :: 12][:3][:, [32 + 128, 32 + 384]].astype(int)
    brightness = colours.sum(-1)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] == 253 + 231 + 37
    assert colours[0, 1].tolist() == [32, 145, 140]  # half way, by the logarithm
    assert colours[1, 1].tolist() == [0] * 3 and colours[2].tolist() == [[128] * 3, [255] * 3]


def test_a_heat_map_of_a_long_run_keeps_its_width():
    values_RC = torch.ones(2, 5000)
    values_RC[1, 2500:] = 100
    picture = heat_map(values_RC, "title", ["0", "1"], "step 1", "step 5000")
    assert picture.shape == (2 * 16 + 2 * 12, 32 + 512, 3)
    assert (picture[16 + 12 + 6, 32 : 32 + 256].sum(-1) < picture[16 + 12 + 6, 32 + 256 :].sum(-1)).all()
