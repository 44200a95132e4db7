"""One decode with experts that stream, in a process of its own (bench/bench_streaming.py).

python bench/stream_decode.py MODEL IDS [--cache BYTES] [--node] [--prefetch off] [--io auto]
    [--verify first] [--threads 2] [--node-threads 2] [--trace FILE.npy]

Every token is given, so that each engine reads the same text: a model with random weights soon
repeats itself. Prints one JSON object: seconds of every token, the best next tokens, a digest of
all logits, and, before the first token and after each, this process's CPU seconds and what the
store had read, hit and waited. --node: the experts are on a node with that cache, in this process's
memory cgroup; it computes while its coordinator waits, so each of them may use all cores. --trace:
experts [tokens, layers, k] in place of the router's.
"""

import argparse
import hashlib
import json
import resource
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.replay import ReplayDispatch
from client.node_process import NodeProcess, stop_all
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import ExpertDispatch, LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.remote_dispatch import open_remote_dispatch
from coordinator.sequence import Sequence
from coordinator.transformer import exact_transformer
from shoal import ops
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts
from shoal.experts.options import Io, Mode, Verify
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions

READY_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0
MAX_CONTEXT = 1024  # bounds the KV cache, as the memory cap does everything
# Of a store's figures, those that are kept, and what a node's metrics call them.
FIGURES = {
    "num_bytes": "shoal_read_bytes_total",
    "hits": "shoal_cache_hits_total",
    "misses": "shoal_cache_misses_total",
    "stall_s": "shoal_cache_stall_seconds_total",
    "resident_bytes": "shoal_cache_bytes",
    "budget_bytes": "shoal_cache_budget_bytes",
    "prefetch_issued_bytes": 'shoal_prefetch_bytes_total{result="issued"}',
    "prefetch_used_bytes": 'shoal_prefetch_bytes_total{result="used"}',
    "prefetch_wasted_bytes": 'shoal_prefetch_bytes_total{result="wasted"}',
}
Figures = dict[str, Any]


def open_local(
    artifact: Artifact, chosen: argparse.Namespace, stack: ExitStack
) -> tuple[ExpertDispatch, Callable[[], Figures]]:
    """Open a store in this process; return the dispatch and a reader of its figures."""
    options = StoreOptions(
        cache_bytes=chosen.cache, verify=Verify(chosen.verify), backend=Io(chosen.io).backend
    )
    owned = Ownership(dict(artifact.owned_experts))
    local = LocalExperts(artifact, owned, options, Mode(chosen.prefetch))
    stack.callback(local.close)

    def read_figures() -> Figures:
        figures = local.store.figures()
        return {key: getattr(figures, key) for key in FIGURES}

    return LocalDispatch(local.executor), read_figures


def open_node(
    artifact: Artifact, chosen: argparse.Namespace, stack: ExitStack
) -> tuple[ExpertDispatch, Callable[[], Figures]]:
    """Start a node; return the dispatch and a reader of the node's metrics."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [str(artifact.path), "--listen", "127.0.0.1:0", "--io", chosen.io]
    flags += ["--threads", str(chosen.node_threads)]
    flags += ["--cache", str(chosen.cache), "--verify", chosen.verify]
    flags += ["--prefetch", chosen.prefetch, "--metrics-listen", metrics]
    node = NodeProcess("node", flags, folder / "node.log")
    stack.callback(stop_all, [node])
    node.wait_ready(READY_TIMEOUT_S)
    last = next(layer.router for layer in artifact.spec.layers if layer.router is not None)
    shards = f"0-{last.num_experts - 1}={node.endpoint}"
    dispatch = open_remote_dispatch(artifact, shards, CALL_TIMEOUT_S)
    stack.callback(dispatch.close)
    return dispatch, lambda: scrape(metrics)


def scrape(endpoint: str) -> Figures:
    """Return a node's FIGURES."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=READY_TIMEOUT_S) as reply:
        lines = reply.read().decode().splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {key: float(samples[name]) for key, name in FIGURES.items()}


def decode(
    artifact: Artifact,
    dispatch: ExpertDispatch,
    ids: list[int],
    read_figures: Callable[[], Figures],
) -> Figures:
    """Run one pass a token; return the report."""
    transformer = exact_transformer(artifact, dispatch)
    num_blocks = blocks_for(MAX_CONTEXT)
    kv = KvArrays(artifact.spec, artifact.kv_dtype, num_blocks)
    sequence = Sequence(KvBlockPool(num_blocks))
    seconds: list[float] = []
    best: list[int] = []
    digest = hashlib.sha256()
    figures, cpu_s = [read_figures()], [time.process_time()]
    for token in ids:
        began_s = time.perf_counter()
        sequence.extend([token])
        assert sequence.try_reserve(sequence.num_cached + 1), "beyond MAX_CONTEXT"
        batch = make_batch([Piece(sequence, 1, num_logits=1)])
        logits = transformer.forward(batch, kv, Cancellation())[0]
        sequence.advance(1)
        best.append(int(logits.argmax()))
        seconds.append(time.perf_counter() - began_s)
        cpu_s.append(time.process_time())
        figures.append(read_figures())
        digest.update(logits.tobytes())
    return {
        "token_s": seconds,
        "cpu_s": cpu_s,
        "best": best,
        "logits_digest": digest.hexdigest(),
        "figures": figures,
    }


def main() -> None:
    """Open, decode, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids")
    parser.add_argument("--cache", type=int)
    parser.add_argument("--node", action="store_true")
    parser.add_argument("--prefetch", default=Mode.AUTO.value)
    parser.add_argument("--io", default=Io.AUTO.value)
    parser.add_argument("--verify", default=Verify.FIRST.value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--node-threads", type=int, default=2)
    parser.add_argument("--trace", type=Path)
    chosen = parser.parse_args()
    ops.set_threads(chosen.threads)
    began_s = time.perf_counter()
    artifact = Artifact.open(chosen.model)
    with ExitStack() as stack:
        opener = open_node if chosen.node else open_local
        dispatch, read_figures = opener(artifact, chosen, stack)
        if chosen.trace is not None:
            layers = [i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None]
            dispatch = ReplayDispatch(dispatch, np.load(chosen.trace), layers)
        ids = [int(word) for word in chosen.ids.split(",")]
        report = decode(artifact, dispatch, ids, read_figures)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report["peak_rss_bytes"] = usage.ru_maxrss * 1024
    report["total_s"] = time.perf_counter() - began_s
    print(json.dumps(report))


if __name__ == "__main__":
    main()
