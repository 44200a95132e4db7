"""What a coordinator accepts as its node, and what it says of one that it refuses."""

from dataclasses import replace

import pytest

from coordinator.handshake import Expected, NodeFacts, check_node
from shoal import limits
from shoal.errors import MalformedMessage, NodeDraining, NodeMismatch
from shoal.experts.ownership import OwnedRange

EXPECTED = Expected("a1" * 32, "tiny", "b2" * 32, "0.1.0")
FACTS = NodeFacts(
    protocol_version=limits.PROTOCOL_VERSION,
    shoal_version="0.1.0",
    identity="a1" * 32,
    model_name="tiny",
    numerics="b2" * 32,
    instance_epoch="x",
    owned=(OwnedRange(0, 3, 0, 7),),
    quantisation="q8_0",
    isa="avx2",
    num_threads=1,
    max_rows_per_call=512,
    is_ready=True,
    is_draining=False,
)


def test_a_node_like_us_is_accepted_ready_or_not() -> None:
    check_node("grpc://a:1", FACTS, EXPECTED, "")
    check_node("grpc://a:1", replace(FACTS, is_ready=False, isa="scalar"), EXPECTED, "")


@pytest.mark.parametrize(
    ("change", "missing", "error", "words"),
    [
        ({"protocol_version": 9}, "", NodeMismatch, ["protocol 9", "same shoal"]),
        (
            {"identity": "c3" * 32, "model_name": "other"},
            "",
            NodeMismatch,
            ["another model", "'other'", "c3c3c3c3c3c3c3c3", "'tiny'", "a1a1a1a1a1a1a1a1"],
        ),
        ({"numerics": "d4" * 32}, "", NodeMismatch, ["other bits", "d4d4d4", "same shoal"]),
        (
            {},
            "experts 4-7 of layer 1",
            NodeMismatch,
            ["does not own experts 4-7 of layer 1", "owns experts 0-7 of layers 0-3"],
        ),
        ({"owned": ()}, "experts 0-7 of layer 0", NodeMismatch, ["owns nothing"]),
        ({"is_draining": True}, "", NodeDraining, ["draining"]),
        ({"max_rows_per_call": 0}, "", MalformedMessage, ["0 rows a call"]),
    ],
)
def test_a_refusal_names_the_node_and_the_reason(
    change: dict[str, object], missing: str, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        check_node("grpc://a:1", replace(FACTS, **change), EXPECTED, missing)  # type: ignore[arg-type]
    for word in ["node grpc://a:1", *words]:
        assert word in str(caught.value)
