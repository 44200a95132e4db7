"""Placement: the map as arrays, and what a node lacks."""

import numpy as np

from coordinator.placement import Placement
from shoal import shard_map
from shoal.experts.ownership import OwnedRange
from shoal.model_spec import AttentionSpec, LayerSpec, ModelSpec, QkNorm, RouterKind, RouterSpec


def model(experts_of_layer: list[int]) -> ModelSpec:
    """A spec whose layers have so many experts; 0: a dense layer."""
    layers = tuple(
        LayerSpec(None, RouterSpec(RouterKind.SOFTMAX, n, 2, True) if n else None, 16)
        for n in experts_of_layer
    )
    attention = AttentionSpec(4, 2, 8, QkNorm.NONE, False, None, 0.35)
    return ModelSpec("test", 32, 16, 1e-6, 8, 1.0, 64, True, attention, layers)


def place(text: str, experts_of_layer: list[int]) -> Placement:
    return Placement(shard_map.parse(text), model(experts_of_layer))


def test_an_endpoint_of_several_entries_is_one_endpoint() -> None:
    placement = place("0-1=grpc://a:1,2=grpc://b:1,3=grpc://a:1", [4, 4])
    assert [str(endpoint) for endpoint in placement.endpoints] == ["grpc://a:1", "grpc://b:1"]
    np.testing.assert_array_equal(placement.owners(0), [0, 0, 1, 0])


def test_owners_of_a_layer_end_where_its_experts_end() -> None:
    placement = place("0-7@0=grpc://a:1,0-7@1=grpc://b:1", [8, 4])
    np.testing.assert_array_equal(placement.owners(0), [0] * 8)
    np.testing.assert_array_equal(placement.owners(1), [1] * 4)


def test_assigned_leaves_out_experts_that_do_not_exist() -> None:
    placement = place("0-7=local", [8, 0, 4])
    assigned = placement.assigned(0)
    assert [int(row.sum()) for row in assigned] == [8, 0, 4]


def test_a_node_that_owns_what_the_map_gives_it_lacks_nothing() -> None:
    placement = place("0-3=grpc://a:1,4-7=grpc://b:1", [8, 8])
    assert placement.missing(0, (OwnedRange(0, 1, 0, 7),)) == ""
    assert placement.missing(1, (OwnedRange(0, 0, 4, 7), OwnedRange(1, 1, 4, 9))) == ""


def test_what_a_node_lacks_is_named() -> None:
    placement = place("0-3=grpc://a:1,4-7=grpc://b:1", [8, 8])
    assert placement.missing(0, (OwnedRange(0, 1, 0, 2),)) == "expert 3 of layers 0-1"
    assert placement.missing(1, (OwnedRange(0, 0, 0, 7),)) == "experts 4-7 of layer 1"
    assert placement.missing(1, ()) == "experts 4-7 of layers 0-1"


def test_a_stranger_s_absurd_ranges_own_nothing() -> None:
    placement = place("0-7=grpc://a:1", [8])
    owned = (OwnedRange(5, 4, 0, 7), OwnedRange(2**32 - 1, 2**32 - 1, 0, 2**32 - 1))
    assert placement.missing(0, owned) == "experts 0-7 of layer 0"


def test_replicas_share_a_range_expert_by_expert_and_each_can_take_all_of_it() -> None:
    placement = place("0-5=grpc://a:1|grpc://b:1,6-7=grpc://c:1", [8, 8])
    a, b, c = range(3)
    preferred = [placement.slots[slot][0] for slot in placement.owners(1)]
    assert preferred == [a, b, a, b, a, b, c, c]
    assert set(placement.slots) == {(a, b), (b, a), (c,)}
    for endpoint in (a, b):
        assert placement.assigned(endpoint).tolist() == [[True] * 6 + [False] * 2] * 2
        assert placement.missing(endpoint, (OwnedRange(0, 1, 0, 4),)) == "expert 5 of layers 0-1"


def test_three_replicas_take_turns_and_the_order_of_writing_them_makes_no_other_slots() -> None:
    placement = place(
        "0-2=grpc://a:1|grpc://b:1|grpc://c:1,3-5=grpc://b:1|grpc://c:1|grpc://a:1", [6]
    )
    assert placement.slots == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert [placement.slots[slot][0] for slot in placement.owners(0)] == [0, 1, 2, 1, 2, 0]


def test_a_range_is_covered_while_one_of_its_replicas_is_there() -> None:
    placement = place("0-3=grpc://a:1|grpc://b:1,4-7=grpc://b:1|grpc://c:1", [8, 0, 8])
    assert placement.uncovered({0, 2}) == placement.uncovered({1}) == ""
    assert placement.uncovered({0}) == "experts 4-7 of layers 0+2"
    assert placement.uncovered(()) == "experts 0-7 of layers 0+2"
    slot = int(placement.owners(2)[5])
    assert placement.range_of(slot) == "experts 4-7 of layers 0+2"
