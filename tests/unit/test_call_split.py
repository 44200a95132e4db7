"""Cutting a layer's rows into calls loses nothing, repeats nothing, and respects its bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator import call_split
from coordinator.call_split import Part
from shoal.router import RoutingPlan


def random_plan(num_rows: int, per_row: int, num_experts: int, seed: int) -> RoutingPlan:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((num_rows, num_experts)), axis=1)[:, :per_row]
    weights = rng.random((num_rows, per_row))
    return RoutingPlan(experts.astype(np.int32), weights.astype(np.float32))


def triples(part: Part) -> list[tuple[int, int, float]]:
    """Return the part's (row, expert, weight), as a reader of the wire would see them."""
    rows = np.repeat(part.rows, np.diff(part.row_offsets))
    pairs = zip(rows, part.experts, part.weights, strict=True)
    return [(int(row), int(expert), float(weight)) for row, expert, weight in pairs]


def expected_triples(plan: RoutingPlan) -> list[tuple[int, int, float]]:
    return [
        (row, int(expert), float(weight))
        for row in range(plan.experts.shape[0])
        for expert, weight in zip(plan.experts[row], plan.weights[row], strict=True)
    ]


def assert_well_formed(part: Part) -> None:
    assert part.rows.dtype == part.row_offsets.dtype == part.experts.dtype == np.int32
    assert part.weights.dtype == np.float32
    assert part.row_offsets[0] == 0 and part.row_offsets[-1] == part.experts.size
    assert (np.diff(part.row_offsets) >= 1).all(), "every row of a call visits an expert"
    assert (np.diff(part.rows) >= 1).all(), "rows ascend"


plans = st.builds(
    random_plan, st.integers(1, 40), st.integers(1, 8), st.just(8), st.integers(0, 1000)
)


@given(plans, st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(1, 20))
def test_each_pair_goes_once_to_its_owner(
    plan: RoutingPlan, owners: list[int], max_rows: int
) -> None:
    owner = np.array(owners, np.int32)
    seen = []
    for part in call_split.by_owner(plan, owner):
        assert_well_formed(part)
        assert (owner[part.experts] == part.slot).all()
        pieces = call_split.by_size(part, max_rows)
        assert [t for piece in pieces for t in triples(piece)] == triples(part)
        for piece in pieces:
            assert_well_formed(piece)
            assert 1 <= piece.num_rows <= max_rows
        seen += triples(part)
    assert sorted(seen) == sorted(expected_triples(plan))


def test_a_single_owner_gets_the_plan_as_it_is() -> None:
    plan = random_plan(5, 3, 8, seed=1)
    [part] = call_split.by_owner(plan, np.full(8, 2, np.int32))
    assert part.slot == 2
    assert triples(part) == expected_triples(plan)


def test_an_endpoint_that_owns_nothing_chosen_gets_no_call() -> None:
    plan = RoutingPlan(np.array([[0, 1]], np.int32), np.ones((1, 2), np.float32))
    parts = call_split.by_owner(plan, np.array([0, 2, 1, 1], np.int32))
    assert [part.slot for part in parts] == [0, 2]


@pytest.mark.parametrize(
    ("num_rows", "max_rows", "sizes"),
    [
        (512, 512, [512]),
        (512, 256, [256, 256]),
        (513, 256, [176, 176, 161]),
        (300, 256, [152, 148]),
        (9, 1, [1] * 9),
    ],
)
def test_calls_of_one_endpoint_are_nearly_equal(
    num_rows: int, max_rows: int, sizes: list[int]
) -> None:
    plan = random_plan(num_rows, 2, 4, seed=2)
    [part] = call_split.by_owner(plan, np.zeros(4, np.int32))
    assert [piece.num_rows for piece in call_split.by_size(part, max_rows)] == sizes


def test_parts_do_not_depend_on_the_order_of_endpoints() -> None:
    """Renaming the endpoints renames the parts and changes nothing else."""
    plan = random_plan(17, 4, 8, seed=3)
    owner = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)
    renamed: NDArray[np.int32] = np.array([2, 0, 1], np.int32)[owner]
    parts = {2: 0, 0: 1, 1: 2}
    by_name = {part.slot: triples(part) for part in call_split.by_owner(plan, owner)}
    for part in call_split.by_owner(plan, renamed):
        assert triples(part) == by_name[parts[part.slot]]
