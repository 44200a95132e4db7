"""shoal as an engine of bench/peer/experts.py: a layer's calls, as a node computes them.

python -m bench.peer.run_shoal_experts FORMAT FOLDER NUM_EXPERTS
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.bench_kernels import U8, Arena
from bench.peer.expert_turns import DIM, EXPERTS_FILE, FFN_DIM, ROWS_FILE, Answer, Turn, serve
from bench.peer.expert_turns import EXPERTS_PER_TOKEN as K
from bench.steady import warm_up
from shoal import ops
from shoal.quant import Format, parse_format

GRID = 20  # of the sums: 1e-6


class Engine:
    """Experts of one format in memory, called by number."""

    def __init__(self, fmt: Format, folder: Path, num_experts: int) -> None:
        self._x = np.load(folder / ROWS_FILE)
        distinct = [split(expert) for expert in np.load(folder / EXPERTS_FILE)]
        arena = Arena(fmt, distinct, num_experts)
        self._scheme = arena.layout.scheme
        self._table = ops.expert_table(arena.layout, dict(enumerate(arena.experts)))

    def run(self, turn: Turn) -> Answer:
        """Do the calls of one turn, activations quantised in each."""
        ops.set_threads(turn.threads)
        x = self._x[: turn.rows]
        experts = [np.tile(np.array(v, np.int32), (turn.rows, 1)) for v in turn.visits]
        weights = np.full((turn.rows, K), 1 / K, np.float32)
        sums = np.empty((0, DIM), np.int64)
        warm, timed = experts[: turn.num_warm], experts[turn.num_warm :]
        if warm:
            warm_up(lambda: [self._call(x, chosen, weights) for chosen in warm])
        began_s = time.perf_counter()
        for chosen in timed:
            sums = self._call(x, chosen, weights)
        seconds = time.perf_counter() - began_s
        result = (sums[-1] * 2.0**-GRID).tolist() if turn.wants_result else None
        return Answer(seconds, result)

    def _call(
        self, x: NDArray[np.float32], experts: NDArray[np.int32], weights: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        rows = ops.quantise_rows(self._scheme, x)
        sums = np.empty(x.shape, np.int64)
        table, values, scales = self._table, rows.values, rows.scales
        bad = table.sums(rows.scheme, rows.dim, values, scales, None, experts, weights, GRID, sums)
        assert bad == [], f"rows out of range: {bad}"
        return sums


def split(expert: U8) -> list[U8]:
    """Return gate, up and down, row-major, of one expert's bytes."""
    gate, up, down = np.split(expert, 3)
    return [gate.reshape(FFN_DIM, -1), up.reshape(FFN_DIM, -1), down.reshape(DIM, -1)]


def main() -> None:
    """Load, then serve turns until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", type=parse_format)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_experts", type=int)
    chosen = parser.parse_args()
    serve(Engine(chosen.format, chosen.folder, chosen.num_experts).run)


if __name__ == "__main__":
    main()
