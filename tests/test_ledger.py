"""The ledger's arithmetic, against the values that slices really hold."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from time import process_time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import locks, selective_finetune, slice_saving
from utils.selective_finetune import SliceError, check_slice, exact_fraction, slice_interval
from utils.slices import ledger
from utils.slices.ledger import Entry, is_concept_name, ledger_text, read_ledger
from utils.slices.on_base import scaled
from utils.slices.overlaps import covered, free_ids, holds, meetings, over_earlier, overlapping
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


def can_be_saved(name):
    """Whether the patch takes the name: the first thing that a save looks at."""
    with pytest.raises((SliceError, AttributeError)) as error:
        slice_saving.snapshot(None, (), name)
    return error.type is AttributeError


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_patch_and_the_ledger_take_the_same_names(name):
    assert is_concept_name(name) == can_be_saved(name) == (name not in REFUSED_NAMES)


@given(st.text(st.characters(), max_size=4))
def test_the_patch_and_the_ledger_take_the_same_names_of_any_characters(name):
    assert is_concept_name(name) == can_be_saved(name)


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
        with pytest.raises(InputError, match=r"\(ff .*, ffid 1\)"):
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
    "ff '0.1', ffid 11": {"ffid": 11}, "ffid 1.0": {"ffid": 1.0}, "name 'a\\u202eb'": {"name": "a\u202eb"},
    "steps -1": {"steps": -1}, "steps None": {"steps": None}, "date 'a\\nb'": {"date": "a\nb"},
    "base 'x'": {"base": "x"}, "start 1": {"start": 1}, "strength 10000000.0": {"strength": 1e7},
    "rescaled 1": {"rescaled": 1},
    "contract True": {"contract": True}, "captions of type list": {"captions": ["a\x1b[2J"]},
    "name '\\n', captions of type list": {"name": "\n", "captions": [1]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_slice_that_cannot_be_right_is_refused_with_what_is_wrong(wrong):
    fields = {"contract": 1, "ff": "0.1", "ffid": 1, "name": "one", "steps": 1} | WRONG[wrong]
    with pytest.raises(InputError) as error:
        read_ledger({"wan_slices": json.dumps([fields])}, "file")
    assert str(error.value) == f"file: its ledger has an entry that cannot be right ({wrong}); the file is damaged"


@pytest.mark.parametrize("captions", [["\ud800"], ["a\x00"], ["x" * 10_001], ["x"] * 101])
def test_captions_are_checked_when_they_are_read(captions):
    told = {"contract": 1, "ff": "0.1", "ffid": 1, "name": "one", "steps": 1, "captions": captions}
    with pytest.raises(InputError, match=r"\(captions of type list\)"):
        read_ledger({"wan_slices": json.dumps([told])}, "file")


def test_a_slice_that_is_trained_further_is_the_newest_with_all_its_steps():
    old = {"contract": 1, "ff": "0.10", "ffid": 2, "name": "old", "steps": 10, "start": "a" * 64}
    other, new = old | {"ffid": 3}, old | {"ff": "1/10", "name": "new", "steps": 5, "start": "b" * 64}
    assert slice_saving.extended([old, other], new) == [other, new | {"steps": 15, "start": "a" * 64}]
    assert slice_saving.extended([other], new) == [other, new]


def test_the_patch_and_the_ledger_agree():
    assert (ledger.CONTRACT, ledger.KEY) == (selective_finetune.CONTRACT, slice_saving.LEDGER_KEY)
    assert locks.UNFINISHED == slice_saving.UNFINISHED


@given(st.lists(entries(), max_size=5), st.sampled_from([1, 7, 24, 60]))
@settings(max_examples=60, deadline=None)
def test_a_value_is_held_where_a_slice_has_it(taken, numel):
    own = {place for e in taken for place in range(*slice_interval(numel, e.ff, e.ffid))}
    assert {place for place in range(numel) if holds(covered(taken), place, numel)} == own


@given(st.lists(entries(), max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_overlap_is_found_once(taken):
    pairs = {frozenset((a, b)) for a, b in combinations(range(len(taken)), 2) if taken[a].overlaps(taken[b])}
    named = [replace(one, name=str(number)) for number, one in enumerate(taken)]
    found = [frozenset((int(a.name), int(b.name))) for a, b in overlapping(named)]
    assert set(found) == pairs and len(found) == len(pairs)
    earlier = [any(one.overlaps(other) for other in taken[:number]) for number, one in enumerate(taken)]
    assert over_earlier(taken) == earlier


def test_at_strength_0_and_1_the_bits_are_those_of_start_and_end():
    start, final = torch.tensor([-0.0, 1.0, -0.0, 3.0]), torch.tensor([1.0, 2.0, -0.0, float(2**30)])
    for strength, expected in ((0, start), (1, final)):
        assert torch.equal(scaled(start, final, strength).view(torch.int32), expected.view(torch.int32))
    assert scaled(start, final, 0.5)[2].view(torch.int32) == start[2].view(torch.int32)


def test_thousands_of_entries_are_compared_in_linear_time():
    began = process_time()
    many = [entry("0.0001", number) for number in range(1, 5001)]
    assert not any(over_earlier(many)) and not list(overlapping(many)) and len(covered(many)) == 1
    assert all(over_earlier([many[0]] * 5000)[1:]) and len(meetings([many[0]] * 5000, many[0])) < 1000
    assert free_ids(many, "0.0002") == (2500, 5000, 2501) and process_time() - began < 2
