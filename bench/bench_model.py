"""A whole model: prefill, decode and memory, in one process and over nodes on this machine.

python bench/bench_model.py MODEL [--prompt 512] [--decode 64] [--nodes 2] [--repeats 3]
    [--transports fast,grpcio]

Every figure comes from `shoal run --json` in a process of its own; the ways alternate. Nodes live
as long as one run: all transports' at once would not fit. MODEL: what bench/make_synthetic.py made,
or any artifact. All ways must give the same tokens.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.local_nodes import Setup, run_watched, start_nodes
from bench.measure import BandwidthProbe, Row, save, show, spread
from client.node_process import stop_all
from shoal import ops
from shoal.artifact import Artifact
from shoal.transport import Transport

POLL_S = 0.02


def bytes_per_token(artifact: Artifact) -> int:
    """Return the weight bytes that one decoded token reads: all but rows of the embedding."""
    spec = artifact.spec
    dense = sum(
        tensor.num_bytes
        for tensor in artifact.manifest.dense
        if tensor.name != "embed" or spec.tie_embeddings
    )
    for layer in artifact.manifest.experts:
        router = spec.layers[layer.layer].router
        assert router is not None
        dense += router.experts_per_token * layer.weights.num_bytes
    return dense


def run(
    model: Path,
    setup: Setup,
    transport: Transport | None,
    chosen: argparse.Namespace,
    ids: Sequence[int],
) -> Row:
    """Run one prompt in a process of its own; return its JSON report with its peak memory."""
    options = ["--threads", str(chosen.threads)]
    if setup.shard_map is not None and transport is not None:
        options += ["--moe-shards", setup.shard_map, "--transport", transport]
    report, peak = run_watched(model, ids, chosen.decode, options, POLL_S, resident)
    report["peak_rss_bytes"] = peak
    report["node_rss_bytes"] = [resident(node.pid) for node in setup.nodes]
    return report


def resident(pid: int) -> int:
    """Return the process's resident bytes; 0 once it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def summarise(name: str, reports: Sequence[Row], weights: int, probes: Sequence[float]) -> Row:
    """Return one row of figures for a way of serving."""
    dispatch = [report["dispatch"]["decode"] for report in reports]
    return {
        "setup": name,
        "prefill_tokens_per_s": spread([r["timings"]["prompt_tokens_per_s"] for r in reports]),
        "decode_tokens_per_s": spread([r["timings"]["decode_tokens_per_s"] for r in reports]),
        "dispatch_p50_us": spread([d["latency_p50_us"] for d in dispatch]),
        "beyond_compute_p50_us": spread([d["beyond_compute_p50_us"] for d in dispatch]),
        "wire_bytes_per_token": reports[-1]["dispatch"]["wire_bytes_per_token"],
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in reports),
        "node_rss_bytes": reports[-1]["node_rss_bytes"],
        "bytes_per_token": weights,
        "probe_gb_per_s": spread(probes),
        "decode_bound_tokens_per_s": max(probes) * 1e9 / weights,
    }


def measure(chosen: argparse.Namespace) -> list[Row]:
    """Alternate between the ways; return a row of figures each, that of one process first."""
    model: Path = chosen.model
    artifact = Artifact.open(model)
    ids = random.Random(0).choices(range(artifact.spec.vocab_size), k=chosen.prompt)
    probe = BandwidthProbe()
    ways: dict[str, Transport | None] = {"in process": None}
    for name in chosen.transports.split(","):
        ways[f"{chosen.nodes} nodes, {name}"] = Transport(name)
    reports: dict[str, list[Row]] = {way: [] for way in ways}
    probes: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        for _ in range(chosen.repeats):
            for way, transport in ways.items():
                setup = Setup(way, None, ())
                if transport is not None:
                    setup = start_nodes(model, artifact, chosen.nodes, Path(scratch), transport)
                try:
                    probes[way].append(probe.gb_per_s(chosen.threads))
                    reports[way].append(run(model, setup, transport, chosen, ids))
                finally:
                    stop_all(setup.nodes)
    digests = {(tuple(r["token_ids"]), r["logits_digest"]) for rs in reports.values() for r in rs}
    if len(digests) != 1:
        sys.exit("error: the ways of serving gave different tokens or logits")
    weights = bytes_per_token(artifact)
    return [summarise(way, reports[way], weights, probes[way]) for way in ways]


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens to generate")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--transports", default="fast,grpcio", help="of both ends")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=ops.num_threads(), help="of the coordinator")
    chosen = parser.parse_args()
    rows = measure(chosen)

    def middle(key: str, digits: int = 1) -> Any:
        return lambda row: f"{row[key]['median']:.{digits}f}"

    show(
        f"{chosen.model.name}: prompt {chosen.prompt}, decode {chosen.decode} ({ops.isa()})",
        rows,
        {
            "": lambda r: r["setup"],
            "prefill tok/s": middle("prefill_tokens_per_s"),
            "decode tok/s": middle("decode_tokens_per_s", 2),
            "decode bound": lambda r: f"{r['decode_bound_tokens_per_s']:.1f}",
            "probe GB/s": middle("probe_gb_per_s"),
            "dispatch p50 us": middle("dispatch_p50_us", 0),
            "beyond compute us": middle("beyond_compute_p50_us", 0),
            "wire KB/token": lambda r: f"{r['wire_bytes_per_token'] / 1e3:.1f}",
            "RSS GB": lambda r: f"{r['peak_rss_bytes'] / 1e9:.2f}",
            "nodes' RSS GB": lambda r: ", ".join(f"{b / 1e9:.2f}" for b in r["node_rss_bytes"]),
        },
    )
    in_process, *remote = (row["decode_tokens_per_s"]["median"] for row in rows)
    for row, speed in zip(rows[1:], remote, strict=True):
        print(f"decode, {row['setup']} / in process: {speed / in_process:.2f}")
    save(f"model-{chosen.model.stem}", rows, prompt=chosen.prompt, decode=chosen.decode)


if __name__ == "__main__":
    main()
