"""The ledger's arithmetic, against the values that slices really hold."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import ledger, selective_finetune
from utils.ledger import Entry, extended, free_ids, is_concept_name, ledger_text, read_ledger
from utils.slice_files import scaled

fractions = st.fractions(Fraction(1, 40), 1, max_denominator=40)


def entry(ff, ffid, **more):
    return Entry(ledger.CONTRACT, str(ff), ffid, "one", 10, "", **more)


@st.composite
def entries(draw):
    ff = draw(fractions)
    return entry(ff, draw(st.integers(1, int(1 / ff))))


def held(one, values=5040):
    """On a line that every small fraction divides, no slice begins or ends between two values."""
    low, high = one.interval
    return set(range(round(low * values * 40), round(high * values * 40)))


@given(entries(), entries())
@settings(max_examples=100, deadline=None)
def test_entries_overlap_exactly_when_their_slices_share_a_value(a, b):
    assert a.overlaps(b) == b.overlaps(a) == bool(held(a) & held(b))


@given(st.lists(entries(), max_size=4), fractions)
@settings(max_examples=100, deadline=None)
def test_free_ids_are_those_that_no_entry_touches(taken, ff):
    ids = [i for i in range(1, int(1 / ff) + 1) if not any(e.overlaps(entry(ff, i)) for e in taken)]
    assert free_ids(taken, str(ff)) == (len(ids), int(1 / ff), ids[0] if ids else None)


def test_of_another_contract_nothing_is_known():
    assert entry("0.1", 1).overlaps(Entry(2, "0.1", 9, "", 0, ""))


def test_the_ledger_comes_back_as_it_was_written():
    written = [entry("0.1", 2, base="a" * 64, start="b" * 64), entry("1/3", 1, strength=0.5, captions=("a\nb", "é"))]
    assert read_ledger({"wan_slices": ledger_text(written)}, "file") == written
    assert read_ledger({}, "file") == []


@pytest.mark.parametrize("name", ["a\u3000b", "a\xa0b", "\U0001f469\u200d\U0001f680", "x" * 255], ids=ascii)
def test_a_concept_can_have_any_name_that_a_file_can_have(name):
    written = [Entry(ledger.CONTRACT, "0.1", 1, name, 10, "")]
    assert is_concept_name(name) and read_ledger({"wan_slices": ledger_text(written)}, "file") == written


def test_a_slice_that_is_trained_further_is_the_newest_with_all_its_steps():
    old, other = entry("0.10", 2, start="a" * 64), entry("0.1", 3)
    assert extended([old, other], entry("0.1", 2, start="b" * 64)) == [
        other, Entry(1, "0.1", 2, "one", 20, "", start="a" * 64)
    ]  # fmt: skip


def test_the_patch_and_the_ledger_agree():
    assert (ledger.CONTRACT, ledger.KEY) == (selective_finetune.CONTRACT, selective_finetune.LEDGER_KEY)


def test_at_strength_0_and_1_the_bits_are_those_of_start_and_end():
    start, final = torch.tensor([-0.0, 1.0, -0.0, 3.0]), torch.tensor([1.0, 2.0, -0.0, float(2**30)])
    for strength, expected in ((0, start), (1, final)):
        assert torch.equal(scaled(start, final, strength).view(torch.int32), expected.view(torch.int32))
    assert scaled(start, final, 0.5)[2].view(torch.int32) == start[2].view(torch.int32)
