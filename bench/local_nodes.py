"""Expert nodes on this machine, for benchmarks that need some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.node_process import NodeProcess, stop_all
from client.shards import even_ranges, moe_shards
from shoal.artifact import Artifact
from shoal.transport import Transport

READY_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Setup:
    """One way of serving the model: how many nodes (0: in process) and where they are."""

    name: str
    shard_map: str | None
    nodes: tuple[NodeProcess, ...]


def start_nodes(
    model: Path,
    artifact: Artifact,
    count: int,
    folder: Path,
    transport: Transport = Transport.AUTO,
    flags: Sequence[str] = (),
) -> Setup:
    """Start nodes with even ranges of the experts, one thread each, warm.

    Args:
        flags: of every `shoal node` besides.
    """
    router = next(layer.router for layer in artifact.spec.layers if layer.router is not None)
    ranges = even_ranges(router.num_experts, count)
    nodes: list[NodeProcess] = []
    try:
        for i, experts in enumerate(ranges):
            own = ["--experts", experts, "--listen", "127.0.0.1:0", "--threads", "1", "--warmup"]
            own += ["--transport", transport, *flags]
            log = folder / f"node-{transport}-{i}.log"
            nodes.append(NodeProcess(f"node {i}", [str(model), *own], log))
        for node in nodes:
            node.wait_ready(READY_TIMEOUT_S)
    except BaseException:
        stop_all(nodes)
        raise
    shard_map = moe_shards(ranges, [node.endpoint for node in nodes])
    return Setup(f"{count} nodes", shard_map, tuple(nodes))
