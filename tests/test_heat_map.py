"""Pictures of a table of numbers over time."""

import math

import pytest
import torch

from utils.training_debug import WIDTH, History, heat_map


def test_a_heat_map_is_bright_where_values_are_large():
    values_RC = torch.tensor([[1e-6, 1e-4], [1e-2, 0.0], [math.nan, math.inf]])
    picture = heat_map(values_RC, "title", ["0", "1", "2"], "step 1", "step 2")
    colours = picture[16 + 6 :: 12][:3][:, [32 + 128, 32 + 384]].astype(int)
    brightness = colours.sum(-1)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] == 253 + 231 + 37
    assert colours[0, 1].tolist() == [32, 145, 140]  # half way, by the logarithm
    assert colours[1, 1].tolist() == [0] * 3 and colours[2].tolist() == [[128] * 3, [255] * 3]


@pytest.mark.parametrize("steps", [1, WIDTH - 1, WIDTH, WIDTH + 1, 5 * WIDTH + 3])
def test_a_long_history_is_the_means_of_neighbouring_steps(steps):
    draw = torch.Generator().manual_seed(steps)
    numbers_SQR = torch.rand(steps, 2, 3, generator=draw, dtype=torch.float64)
    history, size = History(2, 3), None
    for part in numbers_SQR.split(7):
        history.add(part)
        size = size or history.sums_CQR.nbytes
    span = 1
    while -(-steps // span) > WIDTH:
        span *= 2
    expected = torch.stack([part.mean(0) for part in numbers_SQR.split(span)])
    torch.testing.assert_close(history.means(), expected)
    assert history.sums_CQR.nbytes == size


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (1, ("step 41", "step 41")),
        (WIDTH, ("step 41", "step 552")),
        (WIDTH + 1, ("steps 41-42", "step 553")),
        (WIDTH + 2, ("steps 41-42", "steps 553-554")),
        (5 * WIDTH + 3, ("steps 41-48", "steps 2601-2603")),
    ],
)
def test_outer_columns_are_named_by_the_steps_they_hold(steps, names):
    history = History(1, 1)
    history.add(torch.zeros(steps, 1, 1, dtype=torch.float64))
    assert history.outer_columns(40 + steps) == names
    assert heat_map(history.means()[:, 0].T, "title", ["0"], *names).shape[1] == 32 + WIDTH
