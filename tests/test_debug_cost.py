"""The benchmark of what debugging costs: it runs, and its rows are whole."""

import debug_cost
import pytest

from utils.selective_finetune import attach_slice
from wan.configs import WanConfig

TINY = debug_cost.Size(WanConfig("t2v", 96, 560, 4, 3, 4, 4), side=16, text_len=32)


def test_a_row_has_the_share_the_ratio_and_the_seconds_of_a_save(monkeypatch):
    monkeypatch.setattr(debug_cost, "DRAWS", 1)
    cells = debug_cost.row(TINY, "fp32", "0.02", rounds=2).strip("| ").split(" | ")
    model = debug_cost.Blocks(TINY, debug_cost.DTYPES["fp32"], checkpointed=False)
    assert cells[:3] == ["fp32", "0.02", f"{attach_slice(model, '0.02', 1).count:,}"]
    assert 0 < float(cells[3].split()[0]) < 100 and float(cells[4].split()[0]) > 0 and cells[6].endswith("MB")
    of_a_step, percent = (float(part.split()[0]) for part in cells[5].split(", "))
    assert of_a_step > 0 and percent == pytest.approx(of_a_step, rel=0.1)  # one draw in 100 steps


def test_a_draw_of_a_longer_run_holds_no_more(monkeypatch):
    monkeypatch.setattr(debug_cost, "MANY_BLOCKS", 4)
    monkeypatch.setattr(debug_cost, "DRAWS", 1)
    short, long = (debug_cost.draw_row(steps).strip("| ").split(" | ") for steps in (100, 3000))
    assert (short[0], long[0]) == ("100", "3,000") and short[2] == long[2]
