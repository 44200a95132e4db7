"""Expert nodes on this machine and runs beside them, for benchmarks that need some."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def run_watched(
    model: Path,
    ids: Sequence[int],
    num_tokens: int,
    options: Sequence[str],
    poll_s: float,
    resident: Callable[[int], int],
) -> tuple[dict[str, Any], int]:
    """Complete a prompt by a `shoal run` of its own; return its JSON report and its peak, in bytes.

    Experts are read before, and nothing is guessed: random weights repeat themselves, and guesses
    would be right more often than of any real text. Exits as that run does, if it fails.

    Args: resident: what a process holds, by its number, asked every poll_s seconds.
    """
    arguments = ["run", str(model), "--prompt-ids", ",".join(map(str, ids)), "--json"]
    arguments += ["--max-tokens", str(num_tokens), "--ignore-eos", "--speculate", "off"]
    command = [sys.executable, "-P", "-m", "client.cli", *arguments, "--warmup", *options]
    peak = 0
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out) as running:
        while running.poll() is None:
            peak = max(peak, resident(running.pid))
            time.sleep(poll_s)
        if running.returncode != 0:
            sys.exit(running.returncode)
        out.seek(0)
        return json.load(out), peak
