"""How shoal's decode scales: with context, rows a pass, nodes, and experts a token.

python -m bench.peer.scaling MODEL [--rounds 3] [--nodes 1 2 4 8]

MODEL: an artifact of bench/make_synthetic.py. Every point is a few passes in a process that stays;
points take turns, medians over rounds. Nodes are processes on this machine, one thread each: beyond
as many as it has cores they say what more fan-out costs, not what more machines bring. A model of
cost is fitted to what one process took (`Cost`).
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.bench_model import bytes_per_token
from bench.local_nodes import start_nodes
from bench.measure import BandwidthProbe, Row, save, show, spread
from bench.peer.engines import Engine, shoal_engine
from bench.peer.phases import FILL_ROWS, Phase
from client.node_process import stop_all
from shoal import ops
from shoal.artifact import Artifact

CONTEXTS = (0, 1024, 2048, 4096, 8192)
ROWS = (1, 2, 4, 8, 16, 32)
EXPERTS = (1, 2, 4, 8, 16)
STEPS = 8
IN_PROCESS = "in process"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a pass reads and computes."""

    dense_bytes: int
    expert_bytes: int  # of one expert in every layer
    num_experts: int
    experts_per_token: int

    def weight_bytes(self, rows: int, experts_per_token: int) -> float:
        """Return what a pass reads of the weights: each visited expert once.

        Rows that choose evenly and independently visit E (1 - (1 - A/E)^r) distinct experts.
        """
        share = 1 - (1 - experts_per_token / self.num_experts) ** rows
        return self.dense_bytes + self.expert_bytes * self.num_experts * share


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a pass: fixed + bytes of weights / bandwidth + a row, an expert of a row, a key.

    Fitted by least squares of the relative error, no part below 0.
    """

    fixed_s: float
    bytes_per_s: float
    row_s: float
    pair_s: float
    key_s: float

    def seconds(self, shape: Shape, rows: int, context: int, experts_per_token: int) -> float:
        """Return what such a pass takes."""
        parts = features(shape, rows, context, experts_per_token)
        prices = (self.fixed_s, 1 / self.bytes_per_s, self.row_s, self.pair_s, self.key_s)
        return sum(part * price for part, price in zip(parts, prices, strict=True))


def features(shape: Shape, rows: int, context: int, experts_per_token: int) -> tuple[float, ...]:
    """Return what a pass has of each part of its cost."""
    pairs = float(rows * experts_per_token)
    keys = float(rows * (context + (rows + 1) / 2))
    return 1.0, shape.weight_bytes(rows, experts_per_token), float(rows), pairs, keys


def fit(shape: Shape, points: Iterable[Row]) -> Cost:
    """Return the cost that explains these points best."""
    points = list(points)
    parts = np.array(
        [features(shape, p["rows"], p["context"], p["experts_per_token"]) for p in points]
    )
    seconds = np.array([p["pass_s"]["median"] for p in points])
    scale = parts.max(axis=0)
    system = parts / scale / seconds[:, None]
    used = list(range(parts.shape[1]))
    while True:  # what comes out negative is left out
        solved = np.linalg.lstsq(system[:, used], np.ones(len(points)), rcond=None)[0]
        if (solved >= 0).all():
            break
        used.pop(int(np.argmin(solved)))
    prices = np.zeros(parts.shape[1])
    prices[used] = solved
    fixed_s, byte_s, row_s, pair_s, key_s = (prices / scale).tolist()
    return Cost(fixed_s, 1 / byte_s if byte_s else float("inf"), row_s, pair_s, key_s)


def shape_of(artifact: Artifact) -> Shape:
    """Return an artifact's sizes."""
    router = next(layer.router for layer in artifact.spec.layers if layer.router is not None)
    expert_bytes = sum(layer.weights.num_bytes for layer in artifact.manifest.experts)
    dense = bytes_per_token(artifact) - router.experts_per_token * expert_bytes
    return Shape(dense, expert_bytes, router.num_experts, router.experts_per_token)


def measure(engines: Sequence[tuple[Engine, Row, list[Phase]]], rounds: int) -> list[Row]:
    """Return a row for each phase of each engine."""
    taken: dict[tuple[int, Phase], list[float]] = {}
    for number in range(rounds):
        for index, (engine, _, phases) in enumerate(engines):
            for phase in phases:
                seconds = statistics.median(engine.run(phase))
                taken.setdefault((index, phase), []).append(seconds)
        print(f"round {number + 1} of {rounds}", flush=True)
    return [
        {
            **engines[index][1],
            "rows": phase.rows,
            "context": phase.context,
            "pass_s": spread(seconds),
            "tokens_per_s": phase.rows / statistics.median(seconds),
        }
        for (index, phase), seconds in taken.items()
    ]


def phases_of(points: Iterable[tuple[int, int]], threads: int) -> list[Phase]:
    """Return a phase for each (rows, context)."""
    return [
        Phase(f"{rows} rows at {context}", rows, context, threads, STEPS)
        for rows, context in dict.fromkeys(points)
    ]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--name", default="scaling")
    return parser.parse_args()


def main() -> None:
    """Measure, fit, print, write the result file."""
    chosen = arguments()
    artifact, threads = Artifact.open(chosen.model), ops.num_threads()
    shape, longest = shape_of(artifact), max(CONTEXTS) + FILL_ROWS
    own = shape.experts_per_token
    points = [(1, context) for context in CONTEXTS] + [(rows, FILL_ROWS) for rows in ROWS]
    probe = BandwidthProbe()
    probes = [probe.gb_per_s(threads)]
    rows: list[Row] = []

    def facts(setup: str, experts_per_token: int) -> Row:
        return {"setup": setup, "experts_per_token": experts_per_token}

    with shoal_engine(chosen.model, longest) as engine:
        engine.wait_ready()
        rows += measure(
            [(engine, facts(IN_PROCESS, own), phases_of(points, threads))], chosen.rounds
        )
    for count in EXPERTS:
        if count == own or count > shape.num_experts:
            continue
        flags = ("--experts-per-token", str(count))
        with shoal_engine(chosen.model, 2 * FILL_ROWS, *flags) as engine:
            engine.wait_ready()
            plan = [(engine, facts(IN_PROCESS, count), phases_of([(1, FILL_ROWS)], threads))]
            rows += measure(plan, chosen.rounds)
    for count in chosen.nodes:
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, ExitStack() as stack:
            remote = start_nodes(chosen.model, artifact, count, Path(scratch))
            stack.callback(stop_all, remote.nodes)
            assert remote.shard_map is not None
            engine = stack.enter_context(
                shoal_engine(chosen.model, 2 * FILL_ROWS, "--moe-shards", remote.shard_map)
            ).wait_ready()
            setup = facts(f"{count} nodes", own)
            rows += measure([(engine, setup, phases_of([(1, FILL_ROWS)], threads))], chosen.rounds)
    probes.append(probe.gb_per_s(threads))
    cost = fit(shape, [row for row in rows if row["setup"] == IN_PROCESS])
    report(chosen, rows, shape, cost, probes)


def report(
    chosen: argparse.Namespace, rows: list[Row], shape: Shape, cost: Cost, probes: list[float]
) -> None:
    """Print the table beside what the cost says, and write the result file."""

    def predicted(row: Row) -> float:
        return cost.seconds(shape, row["rows"], row["context"], row["experts_per_token"])

    def says(row: Row) -> str:
        return f"{predicted(row) * 1e3:.1f}" if row["setup"] == IN_PROCESS else ""

    cells: dict[str, Callable[[Row], str]] = {
        "": lambda r: r["setup"],
        "rows": lambda r: str(r["rows"]),
        "context": lambda r: str(r["context"]),
        "experts a token": lambda r: str(r["experts_per_token"]),
        "ms a pass": lambda r: f"{r['pass_s']['median'] * 1e3:.1f}",
        "the cost says": says,
        "tok/s": lambda r: f"{r['tokens_per_s']:.1f}",
    }
    show(f"{chosen.model.name}", rows, cells)
    print(
        f"a pass: {cost.fixed_s * 1e3:.2f} ms + weights at {cost.bytes_per_s / 1e9:.1f} GB/s + "
        f"{cost.row_s * 1e3:.2f} ms a row + {cost.pair_s * 1e6:.0f} us an expert of a row + "
        f"{cost.key_s * 1e6:.2f} us a key; probe {max(probes):.1f} GB/s"
    )
    save(
        f"{chosen.name}-{chosen.model.stem}",
        [{**row, "predicted_s": predicted(row)} for row in rows],
        shape=asdict(shape),
        cost=asdict(cost),
        probe_gb_per_s=probes,
    )


if __name__ == "__main__":
    main()
