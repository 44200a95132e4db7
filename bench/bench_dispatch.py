"""What a fan-out costs per layer beyond computing: encode, two hops each way, decode, add.

python bench/bench_dispatch.py [--nodes 2] [--rows 1,8,64,512] [--transports fast,grpcio]

Transports take turns, ROUNDS times; the row of medians is printed.

The model has Qwen3-30B-A3B's width and experts so narrow that computing them is next to nothing:
what remains is the wire. `beyond compute` is the latency less the slowest node's own compute time.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.local_nodes import start_nodes
from bench.make_synthetic import Geometry, make
from bench.measure import ROOT, Row, save, show
from bench.steady import warm_up
from client.node_process import stop_all
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.transport import Transport

NARROW = Geometry(layers=1, ffn_dim=32, experts=16, vocab=512)
WARM_UP, FANOUTS, ROUNDS = 50, 200, 5


def plan_of(num_rows: int, rng: np.random.Generator) -> RoutingPlan:
    """Return a plan that sends each row to random experts."""
    choices = [rng.permutation(NARROW.experts) for _ in range(num_rows)]
    experts = np.sort(np.array(choices, np.int32)[:, : NARROW.experts_per_token], axis=1)
    return RoutingPlan(experts, np.full(experts.shape, 1 / experts.shape[1], np.float32))


def measure(dispatch: RemoteDispatch, scheme: Any, num_rows: int) -> Row:
    """Return the figures of fan-outs of that many rows, one after the other."""
    rng = np.random.default_rng(num_rows)
    rows = ops.quantise_rows(scheme, rng.standard_normal((num_rows, NARROW.dim), np.float32))
    plans = [plan_of(num_rows, rng) for _ in range(16)]

    def fan_out(times: int) -> None:
        for i in range(times):
            dispatch.sums(0, rows, plans[i % len(plans)])

    warm_up(lambda: fan_out(WARM_UP))
    dispatch.stats.reset()
    count = max(20, FANOUTS // max(1, num_rows // 8))
    fan_out(count)
    summary = dispatch.stats.summary()
    return {
        "rows": num_rows,
        "fanouts": summary.num_fanouts,
        "latency_p50_us": summary.latency_p50_s * 1e6,
        "latency_p99_us": summary.latency_p99_s * 1e6,
        "beyond_compute_p50_us": summary.beyond_compute_p50_s * 1e6,
        "beyond_compute_p99_us": summary.beyond_compute_p99_s * 1e6,
        "bytes_up_per_row": summary.bytes_up / count / num_rows,
        "bytes_down_per_row": summary.bytes_down / count / num_rows,
    }


def take_turns(dispatches: dict[str, RemoteDispatch], scheme: Any, num_rows: int) -> list[Row]:
    """Return each transport's medians over ROUNDS turns."""
    turns: dict[str, list[Row]] = {name: [] for name in dispatches}
    for _ in range(ROUNDS):
        for name, dispatch in dispatches.items():
            turns[name].append(measure(dispatch, scheme, num_rows))
    return [
        {"transport": name, **{key: median(row[key] for row in rows) for key in rows[0]}}
        for name, rows in turns.items()
    ]


def main() -> None:
    """Measure every number of rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--transports", default="fast,grpcio", help="of both ends")
    chosen = parser.parse_args()
    _, path = make(ROOT / "build" / "bench", "narrow-experts", NARROW, "q4_0", 0)
    artifact = Artifact.open(path)
    dispatches: dict[str, RemoteDispatch] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, ExitStack() as stack:
        for name in chosen.transports.split(","):
            transport = Transport(name)
            setup = start_nodes(path, artifact, chosen.nodes, Path(scratch), transport)
            stack.callback(stop_all, setup.nodes)
            assert setup.shard_map is not None
            dispatch = open_remote_dispatch(artifact, setup.shard_map, transport=transport)
            stack.callback(dispatch.close)
            dispatches[name] = dispatch
        rows: list[Row] = []
        for num_rows in map(int, chosen.rows.split(",")):
            rows += take_turns(dispatches, artifact.scheme(0), num_rows)
    show(
        f"Fan-out of one layer to {chosen.nodes} nodes on loopback, D = {NARROW.dim}",
        rows,
        {
            "transport": lambda r: str(r["transport"]),
            "rows": lambda r: f"{r['rows']:.0f}",
            "p50 us": lambda r: f"{r['latency_p50_us']:.0f}",
            "p99 us": lambda r: f"{r['latency_p99_us']:.0f}",
            "beyond compute p50 us": lambda r: f"{r['beyond_compute_p50_us']:.0f}",
            "beyond compute p99 us": lambda r: f"{r['beyond_compute_p99_us']:.0f}",
            "bytes up per row": lambda r: f"{r['bytes_up_per_row']:.0f}",
            "bytes down per row": lambda r: f"{r['bytes_down_per_row']:.0f}",
        },
    )
    save("dispatch", rows, nodes=chosen.nodes, dim=NARROW.dim)


if __name__ == "__main__":
    main()
