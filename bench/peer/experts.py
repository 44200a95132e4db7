"""One layer's expert FFN, shoal beside ggml: cold weights, the same experts, the same rows.

python -m bench.peer.experts [--formats q4_0 q4_k q8_0] [--rows 1 8 128] [--threads 1 2]

Eight experts of Qwen3-30B-A3B's shape (2048 x 768) a call, every row through all of them; more than
512 MB of experts, visited in random order. For each format three processes stay: shoal, ggml with
experts as they are in a GGUF file, ggml with experts rearranged ("repacked"). In every round each
of them does every cell in turn, the others asleep; medians over rounds. The better of the two ggml
counts. Before that each engine's result of every number of rows is compared with float64. One
result file a format.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.bench_kernels import ARENA_BYTES, random_expert
from bench.line_process import LineProcess
from bench.measure import ROOT, BandwidthProbe, Row, save, show, spread
from bench.peer.engines import SHOAL
from bench.peer.expert_turns import (
    DIM,
    EXPERTS_FILE,
    EXPERTS_PER_TOKEN,
    FFN_DIM,
    ROWS_FILE,
    Turn,
)
from bench.peer.run_shoal_experts import split
from bench.peer_llama import VERSION, peer_python
from shoal import ops
from shoal.ops_reference.matrices import Expert, dequantise, expert_ffn
from shoal.quant import Format, Scheme, parse_format

GGML, GGML_REPACKED = "ggml", "ggml, repacked"
NUM_DISTINCT = 5  # experts with weights of their own: a prime, so that eights of them differ
# A thread of libgomp waits actively for some milliseconds after a graph, and then sleeps.
ASLEEP_S = 0.02
# Rms, of the result's rms. Activations of eight bits make 1 to 4 % of these weights, one wrong
# expert of eight 50 %, an empty buffer 100 %.
MAX_ERROR = 0.08
# By rows: those that warm up (more bytes than a cache has), and those that are timed.
CALLS = {1: (8, 20), 8: (8, 8)}
CALLS_OF_MANY_ROWS = (1, 1)  # that takes long enough


class Engine(LineProcess):
    """A process that takes turns."""

    def turn(self, turn: Turn) -> Any:
        """Return its answer (`expert_turns.Answer`), when its threads sleep again."""
        answer = self.exchange(asdict(turn))
        time.sleep(ASLEEP_S)
        return answer


@dataclass(frozen=True)
class Cell:
    """What is compared."""

    rows: int
    threads: int


class Visits:
    """Experts to call: random, none again before all others."""

    def __init__(self, num_experts: int, rng: np.random.Generator) -> None:
        self._num_experts, self._rng = num_experts, rng
        self._left: list[list[int]] = []

    def take(self, num_calls: int) -> list[list[int]]:
        """Return eight experts a call."""
        while len(self._left) < num_calls:
            order = self._rng.permutation(self._num_experts)
            whole = order[: len(order) // EXPERTS_PER_TOKEN * EXPERTS_PER_TOKEN]
            self._left += whole.reshape(-1, EXPERTS_PER_TOKEN).tolist()
        taken, self._left = self._left[:num_calls], self._left[num_calls:]
        return taken


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    formats = ["q4_0", "q4_k", "q8_0"]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


@contextmanager
def engines_of(fmt: Format, folder: Path, num_experts: int) -> Iterator[list[Engine]]:
    """Start those that can compute this format. Raises NoPeer."""
    what = [fmt.label, str(folder), str(num_experts)]
    own = [sys.executable, "-m", "bench.peer.run_shoal_experts", *what]
    peer = [str(peer_python()), "-I", str(ROOT / "bench" / "peer" / "run_ggml_experts.py"), *what]
    commands = {SHOAL: own, GGML: peer, GGML_REPACKED: [*peer, "--repack"]}
    with ExitStack() as stack:
        started = [stack.enter_context(Engine(*each)) for each in commands.items()]
        yield [engine for engine in started if engine.answer()["ready"]]


def check(
    engines: Sequence[Engine], experts: Sequence[Expert], x: NDArray[np.float32], cells: list[Cell]
) -> dict[str, float]:
    """Return how far each engine's last row is from float64, rms, at the worst cell.

    Exits where one computed something else.

    Args: experts: the distinct ones.
    """
    worst = dict.fromkeys((engine.name for engine in engines), 0.0)
    visits = [list(range(EXPERTS_PER_TOKEN, 2 * EXPERTS_PER_TOKEN))]
    chosen = [experts[i % len(experts)] for i in visits[0]]
    for cell in cells:
        row = x[cell.rows - 1 : cell.rows].astype(np.float64)
        right = np.mean([expert_ffn(expert, row, Scheme.F32)[0] for expert in chosen], axis=0)
        for engine in engines:
            answer = engine.turn(Turn(cell.rows, cell.threads, visits, 0, wants_result=True))
            wrong = np.array(answer["result"]) - right
            error = math.sqrt(np.mean(wrong**2) / np.mean(right**2))
            if not error < MAX_ERROR:
                sys.exit(f"{engine.name}: {cell}: the result is {error:.1%} from float64")
            worst[engine.name] = max(worst[engine.name], error)
    return worst


def measure(
    engines: Sequence[Engine], cells: Sequence[Cell], visits: Visits, rounds: int
) -> tuple[dict[tuple[Cell, str], list[float]], dict[Cell, list[float]]]:
    """Return microseconds an expert of each cell and engine, and the probe's GB/s, by round."""
    probe = BandwidthProbe()
    taken: dict[tuple[Cell, str], list[float]] = {}
    probes: dict[Cell, list[float]] = {}
    for number in range(rounds):
        for cell in cells:
            probes.setdefault(cell, []).append(probe.steady_gb_per_s(cell.threads))
            num_warm, num_timed = CALLS.get(cell.rows, CALLS_OF_MANY_ROWS)
            calls = visits.take(num_warm + num_timed)
            turn = Turn(cell.rows, cell.threads, calls, num_warm)
            for engine in engines if number % 2 == 0 else reversed(engines):
                seconds = engine.turn(turn)["seconds"]
                us = seconds / (num_timed * EXPERTS_PER_TOKEN) * 1e6
                taken.setdefault((cell, engine.name), []).append(us)
    return taken, probes


def summary(fmt: Format, cell: Cell, taken: dict[str, list[float]], probes: list[float]) -> Row:
    """Return a cell's medians, and how much faster shoal is than the better peer."""
    peers = {name: statistics.median(us) for name, us in taken.items() if name != SHOAL}
    best = min(peers, key=lambda name: peers[name])
    ours_us = statistics.median(taken[SHOAL])
    num_macs = 3 * DIM * FFN_DIM * cell.rows
    num_bytes = ops.ExpertLayout(DIM, FFN_DIM, fmt, fmt).num_bytes
    return {
        "format": fmt.label,
        **asdict(cell),
        "us_per_expert": {name: spread(us) for name, us in taken.items()},
        "rounds_us": taken,
        "best_peer": best,
        "ratio": spread([b / a for a, b in zip(taken[SHOAL], taken[best], strict=True)]),
        "reach": reach(fmt, cell.rows, cell.threads),
        "bytes_per_expert": num_bytes,
        "macs_per_expert": num_macs,
        "gb_per_s": num_bytes / ours_us / 1e3,
        "gmac_per_s": num_macs / ours_us / 1e3,
        "probe_gb_per_s": spread(probes),
        "share_of_probe": spread(
            [num_bytes / us / 1e3 / p for us, p in zip(taken[SHOAL], probes, strict=True)]
        ),
    }


def reach(fmt: Format, rows: int, threads: int) -> float | None:
    """Return the ratio that was set out for; None: none was."""
    many = 1.7 if fmt is Format.Q4_K else 5.0
    return {1: {1: 1.45, 2: 1.15}.get(threads), 8: 5.0, 128: many}.get(rows)


def compare(
    fmt: Format, chosen: argparse.Namespace, rng: np.random.Generator
) -> tuple[list[Row], dict[str, float]]:
    """Check and measure one format; return its rows, and what `check` does."""
    cells = [Cell(rows, threads) for rows, threads in product(chosen.rows, chosen.threads)]
    distinct = [random_expert(fmt, rng) for _ in range(NUM_DISTINCT)]
    flat = np.array([np.concatenate([m.ravel() for m in expert]) for expert in distinct])
    x = rng.standard_normal((max(chosen.rows), DIM), np.float32)
    num_experts = -(-ARENA_BYTES // flat.shape[1])
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        folder = Path(scratch)
        np.save(folder / EXPERTS_FILE, flat)
        np.save(folder / ROWS_FILE, x)
        with engines_of(fmt, folder, num_experts) as engines:
            experts = [Expert(*(dequantise(fmt, m) for m in split(each))) for each in flat]
            errors = check(engines, experts, x, cells)
            visits = Visits(num_experts, rng)
            taken, probes = measure(engines, cells, visits, chosen.rounds)
    names = [engine.name for engine in engines]
    rows = [
        summary(fmt, cell, {name: taken[cell, name] for name in names}, probes[cell])
        for cell in cells
    ]
    return rows, errors


def cell_of(name: str) -> Callable[[Row], str]:
    """Return how an engine's time shows."""

    def text(row: Row) -> str:
        us = row["us_per_expert"].get(name)
        return f"{us['median']:.1f} ({us['min']:.1f})" if us else "n/a"

    return text


def main() -> None:
    """Measure, print the tables, write the result files."""
    chosen = arguments()
    for fmt in map(parse_format, chosen.formats):
        rows, errors = compare(fmt, chosen, np.random.default_rng(0))
        show(
            f"{fmt.label}: us per expert, median (least)",
            rows,
            {
                "rows": lambda r: str(r["rows"]),
                "threads": lambda r: str(r["threads"]),
                **{name: cell_of(name) for name in (SHOAL, GGML, GGML_REPACKED)},
                "ratio": lambda r: f"{r['ratio']['median']:.2f}",
                "reach": lambda r: f"{r['reach']:.2f}" if r["reach"] else "",
                "GB/s": lambda r: f"{r['gb_per_s']:.1f}",
                "GMAC/s": lambda r: f"{r['gmac_per_s']:.0f}",
                "probe GB/s": lambda r: f"{r['probe_gb_per_s']['median']:.1f}",
                "share": lambda r: f"{r['share_of_probe']['median']:.0%}",
            },
        )
        print("from float64: " + ", ".join(f"{name} {e:.2%}" for name, e in errors.items()))
        more = {"dim": DIM, "ffn_dim": FFN_DIM, "error_of_float64": errors}
        save(f"experts-{fmt.label}", rows, peer=VERSION, **more)


if __name__ == "__main__":
    main()
