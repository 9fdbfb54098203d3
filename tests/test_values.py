"""Numbers and names that users give: what is allowed, and what the message says otherwise."""

import pytest

from wan.values import COUNT, SEED, SHARE, SHIFT, Number, literal, nearest, shown

NEVER = ("nan", "inf", "-inf", "1e999", "9" * 5000, "x", "", "1,5", True, None, [1], 10**400, float("nan"))


@pytest.mark.parametrize("value", NEVER, ids=lambda value: shown(value)[:12])
@pytest.mark.parametrize("allowed", [COUNT, SEED, SHARE, SHIFT, Number(-1000, 1000)], ids=lambda n: n.allowed)
def test_what_is_in_no_range_is_refused_in_a_short_line(allowed, value):
    with pytest.raises(ValueError, match=r"^must be a ") as error:
        allowed(value)
    assert len(str(error.value)) < 160


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (SEED, ("0", str(2**64 - 1), 7), ("-1", str(2**64), 1.5)),
        (COUNT, ("1", 10**9), ("0", "-3", 10**9 + 1, "1.5", 2.0)),
        (SHARE, ("0", "1", "0.5", 1), ("-0.1", "1.1")),
        (SHIFT, ("1e-3", 3), ("0", "-1", "1e5")),
    ],
)
def test_a_range_includes_its_ends_unless_it_says_above(allowed, inside, outside):
    assert [allowed(value) for value in inside] == [(int if allowed.whole else float)(value) for value in inside]
    for value in outside:
        with pytest.raises(ValueError, match=allowed.allowed.replace("(", ".").replace(")", ".")):
            allowed(value)


def test_the_message_says_what_is_allowed_and_what_came():
    with pytest.raises(ValueError, match=r"^must be a number above 0 and up to 10,000, not -2$"):
        SHIFT("-2")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("linaer", " (did you mean linear?)"), ("ADAMW", " (did you mean AdamW?)"), ("zzz", ""), ("", "")],
)
def test_the_nearest_name_is_found_in_any_case(name, hint):
    assert nearest(name, ["AdamW", "linear", "cosine"]) == hint


@pytest.mark.parametrize("text", ["nan", "1e999", "(0.9, -1e999)", "{'a': [1e999]}", "9" * 5000, "(" * 5000, "a b", ""])
def test_a_literal_has_finite_numbers_and_no_code(text):
    with pytest.raises(ValueError, match=r"write key=value|must be finite"):
        literal(text)


def test_literals_that_optimizers_take():
    assert [literal(text) for text in ("0.1", "(0.9, 0.99)", "None", "True", "'a'", "-1e-8")] == [
        *(0.1, (0.9, 0.99), None, True, "a", -1e-8)
    ]
