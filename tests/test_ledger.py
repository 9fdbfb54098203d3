"""The ledger's arithmetic, against the values that slices really hold."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import selective_finetune
from utils.selective_finetune import SliceError, check_slice, exact_fraction
from utils.slices import ledger
from utils.slices.ledger import Entry, extended, free_ids, is_concept_name, ledger_text, read_ledger
from utils.slices.on_base import scaled
from wan.errors import InputError

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


NAMES = [
    "",
    "a",
    "x" * 255,
    "x" * 256,
    "a\nb",
    "a\x1b[2J",
    "a\x7f",
    "\x9b2J",
    "\ud800",
    "\udcff",
    "a\u202eb",
    "\ufeffa",
]
NAMES += ["a\u2066b", "\xad", "\u0646\u200c\u0645", "\U0001f469\u200d\U0001f680", "a\u3000b", "\U000e0041"]
REFUSED_NAMES = [*NAMES[3:14], NAMES[-1]]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_patch_and_the_ledger_take_the_same_names(name):
    assert is_concept_name(name) == selective_finetune.is_concept_name(name) == (name not in REFUSED_NAMES)


@given(st.text(st.characters(), max_size=4))
def test_the_patch_and_the_ledger_take_the_same_names_of_any_characters(name):
    assert is_concept_name(name) == selective_finetune.is_concept_name(name)


SHARES = ["0.1", "0.10", ".5", "1.", "1", "+0.1", "1e-3", "1E-30", "1/3", "3/3", "0." + "1" * 38, "0." + "1" * 39]
SHARES += ["1_0e-2", "\uff10.1", "0.\u0661", "1/\uff13", "1e-31", "0", "-0.1", "1.5", "3/2", "1/0", "1 /3", "0.5/2"]
SHARES += ["nan", "inf", "1e-99999999999999999999", "", ".", "e-3", "1e", "0x1", "0.1j", "1/" + "3" * 39]


@pytest.mark.parametrize("ff", SHARES)
@pytest.mark.parametrize("around", ["", " "])
def test_the_patch_takes_the_shares_that_the_ledger_reads(ff, around):
    told = {"contract": 1, "ff": ff, "ffid": 1, "name": "", "steps": 1}
    if SHARES.index(ff) < 11:
        check_slice(around + ff, 1)
        assert read_ledger({"wan_slices": json.dumps([told])}, "file")[0].interval[1] == exact_fraction(ff)
    else:
        with pytest.raises(SliceError, match="above 0 and up to 1, of at most 40 characters"):
            check_slice(around + ff, 1)
        with pytest.raises(InputError, match="ff or ffid"):
            read_ledger({"wan_slices": json.dumps([told])}, "file")


def test_a_number_of_a_slice_is_no_truth_value():
    with pytest.raises(SliceError, match="ffid is True"):
        check_slice("0.1", True)


def test_captions_that_no_ledger_takes_are_left_out_when_it_is_written():
    captions = ("a red\tcat\r\n", "a\x1b[2J", "\udcff", "x" * 10_000, "x" * 10_001, *map(str, range(200)))
    read = read_ledger({"wan_slices": ledger_text([entry("0.1", 1, captions=captions)])}, "file")
    assert read[0].captions == (captions[0], captions[3], *map(str, range(98)))
    assert read_ledger({"wan_slices": ledger_text([entry("0.1", 1, captions=("\x1b",))])}, "file")[0].captions == ()


WRONG = {
    "ff or ffid": {"ffid": 11}, "name": {"name": "a\u202eb"}, "steps": {"steps": -1}, "date": {"date": "a\nb"},
    "base": {"base": "x"}, "start": {"start": 1}, "strength": {"strength": 1e7}, "rescaled": {"rescaled": 1},
    "captions": {"captions": ["a\x1b[2J"]}, "name, captions": {"name": "\n", "captions": [1]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_slice_that_cannot_be_is_refused_with_what_is_wrong(wrong):
    told = {"contract": 1, "ff": "0.1", "ffid": 1, "name": "one", "steps": 1} | WRONG[wrong]
    with pytest.raises(InputError, match=rf"cannot be \(ff '0.1' ffid \d+\) by its {wrong}; the file is damaged"):
        read_ledger({"wan_slices": json.dumps([told])}, "file")


@pytest.mark.parametrize("captions", [["\ud800"], ["a\x00"], ["x" * 10_001], ["x"] * 101])
def test_captions_are_checked_when_they_are_read(captions):
    told = {"contract": 1, "ff": "0.1", "ffid": 1, "name": "one", "steps": 1, "captions": captions}
    with pytest.raises(InputError, match="by its captions"):
        read_ledger({"wan_slices": json.dumps([told])}, "file")


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
