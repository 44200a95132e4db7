"""Spans of experts and layers as people write them, and strict ownership."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import NotOwned, UsageError
from shoal.experts.ownership import OwnedRange, Ownership, format_spans, parse_spans


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", [5]), ("0-3", [0, 1, 2, 3]), ("0-1+4", [0, 1, 4]), (" 2 + 0-1 ", [0, 1, 2])],
)
def test_spans_parse(text: str, numbers: list[int]) -> None:
    assert list(parse_spans(text, name="--experts", limit=8)) == numbers


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a span"),
        ("1,2", "not a span"),
        ("a-b", "not a span"),
        ("3-", "not a span"),
        ("-3", "not a span"),
        ("²", "not a span"),
        ("9" * 400, "not a span"),
        ("3-1", "runs backwards"),
        ("0-8", "out of range: the model has 0-7"),
    ],
)
def test_what_is_no_span_is_refused_by_option_and_text(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_spans(text, name="--experts", limit=8)
    assert "--experts" in str(caught.value)


@given(st.sets(st.integers(0, 63), min_size=1))
def test_formatting_and_parsing_are_inverse(numbers: set[int]) -> None:
    ordered = tuple(sorted(numbers))
    assert parse_spans(format_spans(ordered), name="x", limit=64) == ordered


def test_layers_with_the_same_experts_share_their_ranges() -> None:
    owned = Ownership({0: range(4), 1: range(4), 3: range(4), 4: [0, 1, 7], 5: []})
    assert owned.ranges == (
        OwnedRange(0, 1, 0, 3),
        OwnedRange(3, 3, 0, 3),
        OwnedRange(4, 4, 0, 1),
        OwnedRange(4, 4, 7, 7),
    )
    assert str(owned).startswith("experts 0-3 of layers 0-1, experts 0-3 of layers 3")
    assert owned.layers == (0, 1, 3, 4)
    assert owned.num_experts == 15


def test_an_expert_that_is_not_owned_is_named_with_what_is() -> None:
    owned = Ownership({2: range(4)})
    owned.check(2, [0, 3])
    with pytest.raises(NotOwned, match=r"expert 5-6 of layer 2 .* has experts 0-3 of layers 2"):
        owned.check(2, [1, 6, 5])
    with pytest.raises(NotOwned, match="expert 0 of layer 9"):
        owned.check(9, [0])


@given(st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 9)), max_size=6))
def test_ranges_cover_exactly_what_is_owned(experts: dict[int, set[int]]) -> None:
    owned = Ownership(experts)
    covered = [
        (layer, index)
        for r in owned.ranges
        for layer in range(r.first_layer, r.last_layer + 1)
        for index in range(r.first_expert, r.last_expert + 1)
    ]
    assert len(covered) == len(set(covered)) == owned.num_experts
    assert set(covered) == {(layer, index) for layer in experts for index in experts[layer]}
    assert all(pair in owned for pair in covered)
