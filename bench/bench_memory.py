"""What each process holds in memory at its peak, beside what it has to hold.

python bench/bench_memory.py MODEL... [--prompt 512] [--decode 16] [--nodes 2] [--cached 4]

Every process is one of its own: `shoal run` with all experts in it, `shoal run` beside nodes that
hold them all, and the same with nodes whose cache holds one part in `--cached`. A coordinator has
to hold the dense tensors and the KV of its tokens, a node its budget; the rest is the interpreter,
libraries, buffers and whatever is held twice. Peaks are Linux's VmHWM.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.local_nodes import Setup, run_watched, start_nodes
from bench.measure import Row, save, show
from client.node_process import stop_all
from shoal import limits, ops
from shoal.artifact import Artifact

POLL_S = 0.005
MB = 1e6
REACH_BYTES = {"coordinator": 300e6, "node": 200e6}  # beyond what it has to hold


def peak_bytes(pid: int) -> int:
    """Return the most that a process has held resident so far; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


def run(model: Path, setup: Setup, chosen: argparse.Namespace, ids: Sequence[int]) -> int:
    """Complete one prompt in a process of its own; return its peak."""
    nodes = [] if setup.shard_map is None else ["--moe-shards", setup.shard_map]
    return run_watched(model, ids, chosen.decode, nodes, POLL_S, peak_bytes)[1]


def kv_bytes(artifact: Artifact, num_tokens: int) -> int:
    """Return the KV cache of that many tokens, whole blocks."""
    attention = artifact.spec.attention
    blocks = -(-num_tokens // limits.KV_BLOCK_TOKENS)
    shapes = ops.kv_shape(blocks, attention.num_kv_heads, attention.head_dim)
    values = sum(int(np.prod(shape)) for shape in shapes)
    return artifact.spec.num_layers * values * np.dtype(artifact.kv_dtype).itemsize


def row(model: Path, setup: str, process: str, held_bytes: int, peak: int) -> Row:
    """Return one line of the table. held_bytes: what it has to hold."""
    return {
        "model": model.stem,
        "setup": setup,
        "process": process,
        "held_bytes": held_bytes,
        "peak_rss_bytes": peak,
        "beyond_bytes": peak - held_bytes,
        "reach_bytes": REACH_BYTES[process],
    }


@contextmanager
def nodes(
    model: Path, artifact: Artifact, count: int, flags: Sequence[str] = ()
) -> Iterator[Setup]:
    """Nodes that share the experts, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        setup = start_nodes(model, artifact, count, Path(scratch), flags=flags)
        try:
            yield setup
        finally:
            stop_all(setup.nodes)


def measure(model: Path, chosen: argparse.Namespace) -> list[Row]:
    """Return the rows of one model."""
    artifact = Artifact.open(model)
    ids = random.Random(0).choices(range(artifact.spec.vocab_size), k=chosen.prompt)
    dense = sum(tensor.num_bytes for tensor in artifact.manifest.dense)
    kept = dense + kv_bytes(artifact, chosen.prompt + chosen.decode)
    experts = sum(
        len(owned) * artifact.expert_layer(layer).expert_bytes
        for layer, owned in artifact.owned_experts.items()
    )
    alone = Setup("in process", None, ())
    peak = run(model, alone, chosen, ids)
    rows = [row(model, alone.name, "coordinator", kept + experts, peak)]
    budget = experts // chosen.nodes
    part = budget // chosen.cached
    for name, size, flags in (
        (f"{chosen.nodes} nodes", budget, ()),
        (f"{chosen.nodes} nodes, 1/{chosen.cached} cached", part, ("--cache", str(part))),
    ):
        with nodes(model, artifact, chosen.nodes, flags) as setup:
            rows.append(row(model, name, "coordinator", kept, run(model, setup, chosen, ids)))
            largest = max(peak_bytes(node.pid) for node in setup.nodes)
            rows.append(row(model, name, "node", size, largest))
    return rows


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--decode", type=int, default=16, help="tokens to generate")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cached", type=int, default=4, help="one part in so many")
    chosen = parser.parse_args()
    rows = [each for model in chosen.models for each in measure(model, chosen)]
    show(
        f"Peak memory: prompt {chosen.prompt}, decode {chosen.decode}",
        rows,
        {
            "model": lambda r: r["model"],
            "": lambda r: r["setup"],
            "process": lambda r: r["process"],
            "has to hold MB": lambda r: f"{r['held_bytes'] / MB:.0f}",
            "peak MB": lambda r: f"{r['peak_rss_bytes'] / MB:.0f}",
            "beyond MB": lambda r: f"{r['beyond_bytes'] / MB:.0f}",
            "reach MB": lambda r: f"{r['reach_bytes'] / MB:.0f}",
        },
    )
    save("memory", rows, prompt=chosen.prompt, decode=chosen.decode)


if __name__ == "__main__":
    main()
