"""How blocks share a device: counts, bytes, and the order in which slots are given up."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.swap.host_store import aligned
from utils.swap.order import WeightOrder, evictions
from utils.swap.plan import SwapConfig, WeightSizes, plan_swap
from wan.errors import InputError

SQUARE, TALL = 2 * 5120 * 5120, 2 * 5120 * 13824
WAN_14B = WeightSizes(40, [SQUARE] * 8 + [TALL] * 2, outside=464_912_384, small=11_000_000)


@pytest.mark.parametrize(("swapped", "ring"), [(1, 2), (24, 2), (24, 1), (38, 2), (39, 2), (40, 2), (40, 1), (40, 50)])
def test_the_device_holds_the_blocks_that_are_not_swapped_or_the_ring(swapped, ring):
    plan = plan_swap(WAN_14B, SwapConfig(swapped, ring))
    buffers = max(40 - swapped, min(ring, 40))
    assert (40 - len(plan.streamed)) * WAN_14B.block + plan.slot_bytes == buffers * WAN_14B.block
    assert plan.streams_outside == (swapped == 40)


def test_blocks_that_stay_are_spread_between_those_that_stream():
    streamed = plan_swap(WAN_14B, SwapConfig(24)).streamed
    gaps = [after - before for before, after in itertools.pairwise(streamed)]
    assert len(streamed) == len(set(streamed)) == 26 and set(gaps) == {1, 2}
    assert plan_swap(WAN_14B, SwapConfig()).streamed == ()


@pytest.mark.parametrize("vram", [0.22, 0.5, 0.7, 0.72, 1.0, 1.5, 2.0, 2.4, 8.0, 16.0, 28.0, 28.6])
def test_weights_take_the_bytes_that_are_given_and_little_less(vram):
    budget = int(vram * 1e9)
    plan = plan_swap(WAN_14B, SwapConfig(weights_vram=budget))
    resident = (40 - len(plan.streamed)) * WAN_14B.block + WAN_14B.small
    taken = resident + plan.slot_bytes + (0 if plan.streams_outside else WAN_14B.outside)
    assert taken <= budget
    assert budget - taken < (SQUARE if plan.streamed else budget)


def test_two_of_each_size_come_first_so_that_copies_overlap_with_computing():
    plan = plan_swap(WAN_14B, SwapConfig(weights_vram=WAN_14B.small + 2 * (SQUARE + TALL) + SQUARE))
    assert plan.slots == {SQUARE: 3, TALL: 2}


def test_too_few_bytes_are_refused_with_the_least_that_works():
    with pytest.raises(InputError, match=f"needs at least {WAN_14B.small + SQUARE + TALL:,}") as error:
        plan_swap(WAN_14B, SwapConfig(weights_vram=100_000_000))
    least = int(str(error.value).split("at least ")[1].split(", and")[0].replace(",", ""))
    assert plan_swap(WAN_14B, SwapConfig(weights_vram=least)).slots == {SQUARE: 1, TALL: 1}


def test_slots_begin_where_tensors_may():
    assert [aligned(size) for size in (1, 256, 257, SQUARE)] == [256, 256, 512, SQUARE]


def loads(uses, held, slots):
    """How many loads `evictions` leads to, checking that a slot is free for each one use ahead."""
    unused, gives_up = evictions(uses, held, slots)
    on_device, count = set(held) - unused, 0
    for position, weight in enumerate(uses):
        for needed in uses[position : position + min(slots, 2)]:
            if needed not in on_device:
                on_device.add(needed)
                count += 1
        assert len(on_device) <= slots and weight in on_device
        if position in gives_up:
            on_device.remove(weight)
    return count


def fewest_loads(uses, held, slots):
    """By trying everything, one use at a time."""
    best = {frozenset(held): 0}
    for weight in uses:
        after = {}
        for state, count in best.items():
            if weight in state:
                options = [(state, count)]
            elif len(state) < slots:
                options = [(state | {weight}, count + 1)]
            else:
                options = [(state - {gone} | {weight}, count + 1) for gone in state]
            for option, total in options:
                after[option] = min(after.get(option, total), total)
        best = after
    return min(best.values())


@given(st.lists(st.integers(0, 5), max_size=14), st.sets(st.integers(0, 5), max_size=4), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_loads_are_the_fewest_that_slots_but_one_allow(uses, held, slots):
    held = set(sorted(held)[:slots])
    assert fewest_loads(uses, held, slots) <= loads(uses, held, slots)
    assert loads(uses, set(), slots) <= fewest_loads(uses, set(), slots - 1)


@pytest.mark.parametrize(("blocks", "kept"), [(6, 1), (6, 2), (6, 5), (40, 2), (40, 16)])
def test_sweeps_over_blocks_load_only_what_does_not_fit(blocks, kept):
    forward = list(range(8 * blocks))
    sweep = forward + [8 * block + i for block in range(blocks - 1, -1, -1) for i in [*range(8), *range(7, -1, -1)]]
    held = set(range(8 * kept))
    assert loads(sweep + sweep, held, 8 * kept) == 2 * 2 * 8 * (blocks - kept)


def test_an_order_is_learned_replayed_and_learned_anew():
    order = WeightOrder()
    for kind, used, ahead in [
        ("training", [1, 2, 2, 1], []),
        ("training", [1, 2, 2, 1], [1, 2, 2, 1, 1, 2, 2, 1]),
        ("no grad", [1, 2], []),
        ("training", [1, 3, 1], [1, 2, 2, 1, 1, 2]),  # what followed it last time comes next
        ("training", [1, 3, 1], [1, 3, 1, 1, 3, 1]),
    ]:
        order.begin(kind)
        assert list(order.future) == ahead
        for weight in used:
            order.used(weight)
    assert not order.learning


def test_a_pass_that_ends_early_leaves_the_order_as_it_was():
    order = WeightOrder()
    for used in ([1, 2, 3], [1], [1, 2, 3]):
        order.begin("training")
        for weight in used:
            order.used(weight)
    order.begin("training")
    assert list(order.future) == [1, 2, 3, 1, 2, 3]
