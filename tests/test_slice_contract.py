"""The slice contract: which values a slice holds, against golden selections and its own laws."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.selective_finetune import SliceError, ids_available, slice_indices

GOLDEN = json.loads((Path(__file__).parent / "oracle" / "slices.json").read_text())
shapes = st.tuples(st.integers(1, 40), st.integers(1, 24))
fractions = st.fractions(Fraction(1, 200), 1, max_denominator=10**18)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['name']}-{case['shape']}-{case['ff']}-{case['ffid']}")
def test_selection_equals_the_golden_one(case):
    flat = slice_indices(case["name"], case["shape"], case["ff"], case["ffid"])
    positions = [list(divmod(i, case["shape"][1])) for i in flat.tolist()[:4] + flat.tolist()[-4:]]
    assert len(flat) == case["count"]
    assert positions[:4][: len(case["first"])] == case["first"]
    assert positions[-len(case["last"]) :] == case["last"] or not len(flat)
    assert hashlib.sha256(flat.numpy().astype("<i8").tobytes()).hexdigest() == case["sha256"]


@given(shapes, fractions)
@settings(max_examples=60, deadline=None)
def test_ids_of_one_ff_are_disjoint_and_cover_the_line_up_to_the_last(shape, ff):
    ids = [slice_indices("w", shape, ff, i) for i in range(1, ids_available(ff) + 1)]
    together = torch.cat(ids)
    covered = int(ids_available(ff) * ff * shape[0] * shape[1])
    assert len(together.unique()) == len(together) == covered
    assert together.numel() == 0 or (together.min() >= 0 and together.max() < shape[0] * shape[1])


@given(shapes, fractions, fractions, st.data())
@settings(max_examples=60, deadline=None)
def test_slices_of_different_ff_overlap_only_where_their_intervals_do(shape, ff, other, data):
    one = data.draw(st.integers(1, ids_available(ff)))
    two = data.draw(st.integers(1, ids_available(other)))
    apart = one * ff <= (two - 1) * other or two * other <= (one - 1) * ff
    shared = set(slice_indices("w", shape, ff, one).tolist()) & set(slice_indices("w", shape, other, two).tolist())
    assert not (apart and shared)


@given(shapes, fractions, st.data())
@settings(max_examples=60, deadline=None)
def test_the_budget_is_met_to_one_value(shape, ff, data):
    ffid = data.draw(st.integers(1, ids_available(ff)))
    assert abs(len(slice_indices("w", shape, ff, ffid)) - ff * shape[0] * shape[1]) < 1


@pytest.mark.parametrize("ff", ["0", "-0.1", "1.1", "nan", "inf", "1e-999999999", "a", "", True, 0.0])
def test_an_ff_outside_its_range_is_refused(ff):
    with pytest.raises(SliceError, match="above 0 and up to 1"):
        slice_indices("w", (8, 8), ff, 1)


@pytest.mark.parametrize(("ff", "ffid", "last"), [("0.3", 4, 3), ("0.001", 0, 1000), ("1", 2, 1), (0.1, -1, 10)])
def test_an_ffid_outside_its_range_is_refused_with_the_range(ff, ffid, last):
    with pytest.raises(SliceError, match=f"from 1 to {last}$"):
        slice_indices("w", (8, 8), ff, ffid)


def test_a_float_is_read_as_the_decimal_that_was_typed():
    assert torch.equal(slice_indices("w", (100, 100), 0.1, 3), slice_indices("w", (100, 100), "1e-1", 3))
