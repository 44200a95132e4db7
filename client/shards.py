"""Cuts a model's experts into even ranges for nodes, and writes the map that names them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from shoal.errors import UsageError


def even_ranges(num_experts: int, num_nodes: int) -> list[str]:
    """Cut 0..num_experts-1 into consecutive ranges whose sizes differ by at most one.

    Raises UsageError when there are fewer experts than nodes.
    """
    if num_nodes > num_experts:
        raise UsageError(
            f"--nodes {num_nodes}: the model has {num_experts} experts a layer, and every node "
            "needs one at least"
        )
    cuts = [num_experts * node // num_nodes for node in range(num_nodes + 1)]
    return [
        str(first) if last == first + 1 else f"{first}-{last - 1}" for first, last in pairwise(cuts)
    ]


def moe_shards(ranges: Sequence[str], endpoints: Sequence[str]) -> str:
    """Return what --moe-shards takes: each range of experts at its endpoint."""
    return ",".join(
        f"{experts}={endpoint}" for experts, endpoint in zip(ranges, endpoints, strict=True)
    )


def num_experts(model: Path) -> int:
    """Return how many experts a layer of a whole artifact has, the most of any layer.

    Raises UsageError when it has none, or is a slice that lacks some.
    """
    from shoal.artifact import Artifact

    layers = Artifact.open(model).manifest.experts
    if not layers:
        raise UsageError(f"{model} has no experts: `shoal run` needs no nodes for it")
    for layer in layers:
        if layer.num_present < layer.num_experts:
            raise UsageError(
                f"{model} is a slice without all experts of layer {layer.layer}: "
                "starting nodes by even ranges needs the whole artifact"
            )
    return max(layer.num_experts for layer in layers)
