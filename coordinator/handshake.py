"""Whether a node may compute for this coordinator: what it says of itself, judged (core)."""

from dataclasses import dataclass

from shoal import limits
from shoal.errors import MalformedMessage, NodeDraining, NodeMismatch
from shoal.experts.ownership import OwnedRange


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node's answer to Describe."""

    protocol_version: int
    shoal_version: str
    identity: str
    model_name: str
    numerics: str
    instance_epoch: str
    owned: tuple[OwnedRange, ...]
    quantisation: str
    isa: str
    num_threads: int
    max_rows_per_call: int
    is_ready: bool
    is_draining: bool


@dataclass(frozen=True, slots=True)
class Expected:
    """What this coordinator is, and so what each of its nodes must be."""

    identity: str
    model_name: str
    numerics: str
    shoal_version: str


def check_node(node: str, facts: NodeFacts, expected: Expected, missing: str) -> None:
    """Refuse a node that would compute something else, or less, than the map says.

    Args:
        node: its endpoint, for the message.
        missing: what the map gives to it and it does not own, in words; empty if nothing.

    Raises:
        NodeMismatch: protocol, model, numerics or range; NodeDraining; MalformedMessage.
    """
    if facts.protocol_version != limits.PROTOCOL_VERSION:
        raise NodeMismatch(
            f"node {node} speaks protocol {facts.protocol_version} (shoal {facts.shoal_version}), "
            f"this coordinator {limits.PROTOCOL_VERSION} (shoal {expected.shoal_version}): "
            "install the same shoal on both"
        )
    if facts.identity != expected.identity:
        raise NodeMismatch(
            f"node {node} serves another model: {facts.model_name!r}, identity "
            f"{facts.identity[:16]}; this coordinator has {expected.model_name!r}, "
            f"{expected.identity[:16]}: start the node with that artifact or a slice of it "
            "(`shoal inspect` shows an artifact's identity)"
        )
    if facts.numerics != expected.numerics:
        raise NodeMismatch(
            f"node {node} computes other bits: numerics {facts.numerics[:16]} (shoal "
            f"{facts.shoal_version}), here {expected.numerics[:16]} (shoal "
            f"{expected.shoal_version}): install the same shoal on both"
        )
    if missing:
        owned = "; ".join(map(str, facts.owned)) or "nothing"
        raise NodeMismatch(
            f"node {node} does not own {missing}, which the shard map gives to it; it owns "
            f"{owned}: start it with those experts and layers, or change --moe-shards"
        )
    if facts.is_draining:
        raise NodeDraining(f"node {node} is draining: start it again, or name another node")
    if not 1 <= facts.max_rows_per_call <= limits.MAX_ROWS_PER_CALL:
        raise MalformedMessage(
            f"node {node} takes {facts.max_rows_per_call} rows a call: "
            f"must be in 1..{limits.MAX_ROWS_PER_CALL}"
        )


def check_rows(node: str, facts: NodeFacts, max_rows: int) -> None:
    """Refuse a node that takes fewer rows a call than calls have. Raises MalformedMessage."""
    if facts.max_rows_per_call < max_rows:
        raise MalformedMessage(
            f"node {node} takes {facts.max_rows_per_call} rows a call, calls have up to {max_rows}"
        )
